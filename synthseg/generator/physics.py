"""MR contrasts from relaxation times and a pulse sequence, by the standard signal equations.

Tissue values and protocols, with their sources, are in relaxation.yaml. Signals are magnitudes per unit of water:

- spin echo: Hahn 1950; Bernstein, King and Zhou, Handbook of MRI Pulse Sequences, 2004, section 14.3;
- inversion recovery: Bydder and Young, J Comput Assist Tomogr 9:659, 1985; FLAIR: Hajnal et al., same journal 16:841,
  1992; the inversion time nulls a tissue at TI = T1 ln(2 / (1 + exp(-TR / T1)));
- spoiled gradient echo: Ernst and Anderson 1966; Haase et al., J Magn Reson 67:258, 1986;
- MPRAGE: Mugler and Brookeman, MRM 15:152, 1990, in the steady state of Marques et al., NeuroImage 49:1271, 2010.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from synthseg.config import ContrastConfig
from synthseg.generator.draw import Draw
from synthseg.generator.means import Means

# Relaxivity of a gadolinium agent, per second and mmol/l, at 1.5 T and 3 T (Rohrer et al., Invest Radiol 40:715, 2005)
R1_GD = {1.5: 4.1, 3.0: 3.7}
R2_GD = {1.5: 4.6, 3.0: 5.2}
# mmol/l a few minutes after a single dose; brain behind its barrier takes none, and the choroid plexus has no label
GD_MMOL_L = {
    "artery": (0.5, 1.5),
    "vein": (0.5, 1.5),
    "vessel": (0.5, 1.5),
    "dura": (0.2, 0.7),
    "mucosa": (0.2, 0.7),
    "muscle": (0.02, 0.1),
    "skin": (0.02, 0.12),
    "soft": (0.02, 0.1),
}
FLOWING = ("artery", "vein", "vessel")
SUPPRESSED = (0.05, 0.2)  # what is left of the signal of fat
INVERSION_EFFICIENCY = 0.96
RANGES = ("pd", "t1", "t2", "t2s")


@dataclass(frozen=True)
class Tissue:
    """Water content (CSF = 1) and relaxation times in ms."""

    pd: float
    t1: float
    t2: float
    t2s: float


@dataclass(frozen=True)
class Protocol:
    """A pulse sequence; times in ms, angles in degrees. What a kind does not use stays 0."""

    kind: str
    tr: float
    te: float
    ti: float = 0.0
    flip: float = 90.0
    echo_spacing: float = 0.0
    train: float = 0.0


def spin_echo(tissue: Tissue, p: Protocol) -> float:
    """Recovery to the middle of the echo, with the second half of it flipped by the refocusing pulse."""
    recovery = 1 - 2 * math.exp(-(p.tr - p.te / 2) / tissue.t1) + math.exp(-p.tr / tissue.t1)
    return tissue.pd * recovery * math.exp(-p.te / tissue.t2)


def inversion_recovery(tissue: Tissue, p: Protocol) -> float:
    """Magnitude image of an inversion pulse followed by a spin echo after TI."""
    recovery = 1 - 2 * math.exp(-p.ti / tissue.t1) + math.exp(-p.tr / tissue.t1)
    return tissue.pd * abs(recovery) * math.exp(-p.te / tissue.t2)


def null_time(t1: float, tr: float) -> float:
    """The inversion time at which a tissue gives no signal."""
    return t1 * math.log(2 / (1 + math.exp(-tr / t1)))


def spoiled(tissue: Tissue, p: Protocol) -> float:
    """Steady state of small flip angles with the transverse magnetisation spoiled."""
    angle, e1 = math.radians(p.flip), math.exp(-p.tr / tissue.t1)
    return tissue.pd * math.sin(angle) * (1 - e1) / (1 - math.cos(angle) * e1) * math.exp(-p.te / tissue.t2s)


def mprage(tissue: Tissue, p: Protocol) -> float:
    """Magnitude at the middle of the train of gradient echoes, in the steady state over inversions TR apart.

    The middle of the train of ``train`` echoes is TI after the inversion. During the train the magnetisation moves
    towards its driven equilibrium with a shorter time constant.
    """
    angle, t1 = math.radians(p.flip), tissue.t1
    before = max(p.ti - p.train * p.echo_spacing / 2, 0.0)
    readout = p.train * p.echo_spacing
    after = max(p.tr - before - readout, 0.0)
    e_echo = math.exp(-p.echo_spacing / t1)
    driven = (1 - e_echo) / (1 - math.cos(angle) * e_echo)
    per_train = (math.cos(angle) * e_echo) ** p.train
    e_before, e_after = math.exp(-before / t1), math.exp(-after / t1)
    # m = magnetisation just before the inversion: linear in itself after one cycle
    constant = 1 - e_after + e_after * (driven * (1 - per_train) + (1 - e_before) * per_train)
    m = constant / (1 + INVERSION_EFFICIENCY * e_before * per_train * e_after)
    start = 1 - e_before - INVERSION_EFFICIENCY * m * e_before
    middle = driven + (start - driven) * math.sqrt(per_train)
    return tissue.pd * abs(middle) * math.sin(angle) * math.exp(-p.te / tissue.t2s)


EQUATIONS = {"spin_echo": spin_echo, "inversion_recovery": inversion_recovery, "spoiled": spoiled, "mprage": mprage}


def signal(tissue: Tissue, protocol: Protocol) -> float:
    """Magnitude of one tissue, relative to fully relaxed CSF at echo time 0."""
    return EQUATIONS[protocol.kind](tissue, protocol)


def fresh_blood(tissue: Tissue, p: Protocol) -> float:
    """Blood that flows in between the pulses of a gradient echo, fully relaxed: time-of-flight enhancement."""
    return tissue.pd * math.sin(math.radians(p.flip)) * math.exp(-p.te / tissue.t2s)


@lru_cache(maxsize=1)
def tables() -> dict[str, dict[str, dict[str, Any]]]:
    """relaxation.yaml: ``tissues`` and ``sequences``."""
    record: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(
        (Path(__file__).parent / "relaxation.yaml").read_text()
    )
    return record


def sample_tissues(tesla: float, draw: Draw) -> dict[str, tuple[Tissue, float]]:
    """Values and fat fraction of every tissue of the table.

    Half of a value's place in its range is shared by all tissues of the image, as age, temperature and calibration
    move them together, and half is the tissue's own.
    """
    field = 0 if tesla == 1.5 else 1
    shared = {name: draw.uniform(0.0, 1.0) for name in RANGES}
    found = {}
    for name, record in tables()["tissues"].items():
        values = {}
        for key in RANGES:
            low, high = record[key] if key == "pd" else record[key][field]
            values[key] = low + (high - low) * (shared[key] + draw.uniform(0.0, 1.0)) / 2
        found[name] = Tissue(**values), draw.uniform(*record.get("fat", (0.0, 0.0)))
    return found


def sample_protocol(name: str, tissues: Mapping[str, tuple[Tissue, float]], draw: Draw) -> Protocol:
    """Parameters of a sequence of relaxation.yaml; the inversion time follows the tissue that it nulls."""
    record = dict(tables()["sequences"][name])
    kind, nulled, factor = record.pop("kind"), record.pop("nulls", None), record.pop("null_factor", None)
    protocol = Protocol(kind=kind, **{key: draw.uniform(*limits) for key, limits in record.items()})
    if nulled is None:
        return protocol
    return replace(protocol, ti=draw.uniform(*factor) * null_time(tissues[nulled][0].t1, protocol.tr))


def enhanced(tissue: Tissue, mmol_l: float, tesla: float) -> Tissue:
    """A tissue with contrast agent: both rates rise in proportion to the concentration."""
    r1, r2 = R1_GD[tesla] * mmol_l / 1000, R2_GD[tesla] * mmol_l / 1000  # per ms
    return Tissue(tissue.pd, 1 / (1 / tissue.t1 + r1), 1 / (1 / tissue.t2 + r2), 1 / (1 / tissue.t2s + r2))


def sample_physics(config: ContrastConfig, tissues: Collection[str], draw: Draw) -> Means:
    """Means of one image, relative to its brightest tissue (vessels may be brighter); air is 0.

    A tissue that the table does not know takes a mean at random.
    """
    name = draw.pick({str(key): weight for key, weight in config.physics_sequences.items()})
    tesla = 1.5 if draw.chance(0.5) else 3.0
    values = sample_tissues(tesla, draw)
    protocol = sample_protocol(name, values, draw)
    if draw.chance(config.enhanced_probability):
        for tissue, dose in GD_MMOL_L.items():
            values[tissue] = enhanced(values[tissue][0], draw.uniform(*dose), tesla), values[tissue][1]
    suppression = draw.uniform(*SUPPRESSED) if draw.chance(config.fat_suppression_probability) else 1.0
    water = {tissue: signal(value, protocol) for tissue, (value, _) in values.items()}
    fat = suppression * water["fat"]
    for tissue in FLOWING:
        flows, amount = draw.chance(config.flow_probability), draw.uniform(0.0, 1.0)
        if flows and protocol.kind in {"spoiled", "mprage"}:
            water[tissue] += amount * (fresh_blood(values[tissue][0], protocol) - water[tissue])
        elif flows:
            water[tissue] *= 0.25 * amount
    mean = {tissue: (1 - part) * water[tissue] + part * fat for tissue, (_, part) in values.items()}
    mean["fat"] = fat
    brightest = max(mean[tissue] for tissue in mean if tissue in tissues and tissue not in FLOWING)
    top = max(brightest, 1e-9)
    parts = {
        "soft": (fat, water["muscle"], water["mucosa"]),
        "skin": (fat, water["skin"]),
        "bone_cancellous": (fat, water["bone_cortical"]),
    }
    return Means(
        name=f"physics_{name}",
        mean={"air": 0.0}
        | {t: mean[t] / top if t in mean else draw.uniform(*config.mean) for t in sorted(tissues) if t != "air"},
        parts={tissue: tuple(value / top for value in found) for tissue, found in parts.items()},
        settings={"tesla": tesla, "tr": protocol.tr, "te": protocol.te, "ti": protocol.ti, "flip": protocol.flip},
    )
