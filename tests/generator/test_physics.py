"""MR signal equations against limits and simulation; the contrasts that they give against those of known scans."""

import math
from typing import Any

import numpy as np
import pytest

from synthseg import rng
from synthseg.config import ContrastConfig, parse
from synthseg.generator.anomalies import KINDS
from synthseg.generator.contrast import sample_contrast
from synthseg.generator.draw import Draw
from synthseg.generator.means import Means
from synthseg.generator.physics import (
    FLOWING,
    INVERSION_EFFICIENCY,
    RANGES,
    Protocol,
    Tissue,
    enhanced,
    inversion_recovery,
    mprage,
    null_time,
    sample_physics,
    spin_echo,
    spoiled,
    tables,
)
from synthseg.labels import LabelTable, load_scheme

WM, GM, CSF = Tissue(0.7, 850, 75, 50), Tissue(0.82, 1350, 95, 60), Tissue(1.0, 4200, 1500, 500)
TISSUES = sorted({label.tissue for name in ("head", "brainweb") for label in load_scheme(name).labels})
SEQUENCES = sorted(tables()["sequences"])


def drawn(sequence: str, seed: int, **changes: Any) -> Means:
    config = parse(
        ContrastConfig,
        {
            **{"random_weight": 0, "named_weights": {}, "physics_weight": 1, "physics_sequences": {sequence: 1.0}},
            **changes,
        },
        "test",
    )
    return sample_physics(config, TISSUES, Draw(rng.generator(seed, 0, "contrast")))


# ---------------------------------------------------------------- equations


@pytest.mark.parametrize("tissue", [WM, GM, CSF])
def test_long_repetition_and_short_echo_leave_the_water(tissue: Tissue) -> None:
    assert spin_echo(tissue, Protocol("spin_echo", 1e6, 1e-6)) == pytest.approx(tissue.pd, rel=1e-5)
    assert spoiled(tissue, Protocol("spoiled", 1e6, 1e-6)) == pytest.approx(tissue.pd, rel=1e-5)
    assert inversion_recovery(tissue, Protocol("inversion_recovery", 1e6, 1e-6, 1e-6)) == pytest.approx(
        tissue.pd, rel=1e-5
    )


def test_decay_is_t2_in_spin_echo_and_t2_star_in_gradient_echo() -> None:
    short, long = Protocol("spin_echo", 1e6, 10), Protocol("spin_echo", 1e6, 60)
    assert spin_echo(GM, long) / spin_echo(GM, short) == pytest.approx(math.exp(-50 / GM.t2))
    assert spoiled(GM, long) / spoiled(GM, short) == pytest.approx(math.exp(-50 / GM.t2s))


@pytest.mark.parametrize("tr", [2500.0, 9000.0])
def test_a_nulled_tissue_gives_no_signal(tr: float) -> None:
    protocol = Protocol("inversion_recovery", tr, 90, null_time(CSF.t1, tr))
    assert inversion_recovery(CSF, protocol) == pytest.approx(0, abs=1e-12)
    assert inversion_recovery(GM, protocol) > 0.05
    assert null_time(CSF.t1, 1e9) == pytest.approx(CSF.t1 * math.log(2))


def test_the_ernst_angle_gives_the_most() -> None:
    ernst = math.degrees(math.acos(math.exp(-20 / WM.t1)))
    signals = {
        angle: spoiled(WM, Protocol("spoiled", 20, 3, flip=angle)) for angle in (0.7 * ernst, ernst, 1.4 * ernst)
    }
    assert max(signals, key=lambda angle: signals[angle]) == ernst


@pytest.mark.parametrize("tissue", [WM, GM, CSF])
@pytest.mark.parametrize(
    "protocol", [Protocol("mprage", 2300, 3, 900, 9, 7, 160), Protocol("mprage", 1800, 3, 1000, 8, 6, 180)]
)
def test_mprage_is_the_steady_state_of_a_pulse_by_pulse_simulation(tissue: Tissue, protocol: Protocol) -> None:
    p, angle, m, seen = protocol, math.radians(protocol.flip), 1.0, 0.0

    def relaxed(value: float, ms: float) -> float:
        return 1 + (value - 1) * math.exp(-ms / tissue.t1)

    before = p.ti - p.train * p.echo_spacing / 2
    for _ in range(20):
        m = relaxed(-INVERSION_EFFICIENCY * m, before)
        for echo in range(int(p.train)):
            if echo == p.train / 2:
                seen = abs(m) * math.sin(angle)
            m = relaxed(m * math.cos(angle), p.echo_spacing)
        m = relaxed(m, p.tr - before - p.train * p.echo_spacing)
    assert mprage(tissue, p) == pytest.approx(tissue.pd * seen * math.exp(-p.te / tissue.t2s), rel=1e-4)


def test_contrast_agent_shortens_both_times() -> None:
    blood = Tissue(0.85, 1500, 200, 100)
    some, more = enhanced(blood, 0.5, 1.5), enhanced(blood, 1.0, 1.5)
    assert blood.t1 > some.t1 > more.t1
    assert blood.t2 > some.t2 > more.t2
    assert 1 / more.t1 - 1 / blood.t1 == pytest.approx(4.1 / 1000)  # relaxivity times concentration
    for name, value in vars(enhanced(blood, 0.0, 3.0)).items():
        assert value == pytest.approx(getattr(blood, name))


# ---------------------------------------------------------------- tables


def test_the_table_knows_every_tissue_and_its_ranges_are_ordered() -> None:
    record = tables()["tissues"]
    assert set(record) == (set(TISSUES) | {kind.tissue for kind in KINDS.values()}) - {"air"}
    for values in record.values():
        for field in (0, 1):
            found = {k: values[k] if k == "pd" else values[k][field] for k in RANGES}
            assert all(0 < low <= high for low, high in found.values())
            assert found["t2s"][0] <= found["t2"][0] < found["t1"][0]
            assert found["t2s"][1] <= found["t2"][1]
        assert values["pd"][1] <= 1
        assert all(
            one <= three for one, three in zip(values["t1"][0], values["t1"][1], strict=True)
        )  # T1 grows with B0


def test_published_values_lie_in_the_ranges() -> None:
    """Stanisz 2005 (T1, T2), Peters 2007 (T2*), Wright 2008 (T1 at 3 T)."""
    record = tables()["tissues"]
    for tissue, key, field, value in (
        *(("wm", "t1", 0, 884), ("wm", "t1", 1, 1084), ("gm", "t1", 0, 1124), ("gm", "t1", 1, 1820)),
        *(("wm", "t2", 0, 72), ("wm", "t2", 1, 69), ("gm", "t2", 0, 95), ("gm", "t2", 1, 99)),
        *(("muscle", "t1", 0, 1008), ("muscle", "t1", 1, 1412), ("nerve", "t1", 1, 1083)),
        *(("gm", "t2s", 0, 84.0), ("wm", "t2s", 0, 66.2), ("gm", "t2s", 1, 66.0), ("wm", "t2s", 1, 53.2)),
        *(("caudate", "t2s", 1, 41.3), ("putamen", "t2s", 1, 31.5), ("putamen", "t2s", 0, 55.5)),
        *(("wm", "t1", 1, 838), ("gm", "t1", 1, 1607), ("putamen", "t1", 1, 1332), ("caudate", "t1", 1, 1395)),
    ):
        low, high = record[tissue][key][field]
        assert low <= value <= high, (tissue, key, value)


# ---------------------------------------------------------------- contrasts


def test_every_sequence_of_the_settings_is_in_the_table() -> None:
    assert set(ContrastConfig().physics_sequences) == set(SEQUENCES)


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_means_are_relative_to_the_brightest_tissue(sequence: str) -> None:
    for seed in range(20):
        found = drawn(sequence, seed, flow_probability=0.5, enhanced_probability=0.5)
        assert found.name == f"physics_{sequence}"
        assert set(found.mean) == set(TISSUES)
        still = {t: m for t, m in found.mean.items() if t not in FLOWING}
        assert max(still.values()) == pytest.approx(1)
        assert min(still.values()) >= 0
        assert found.mean["air"] == 0
        assert found.mean["bone_cortical"] < 0.15  # its signal is gone before any echo
        assert found.settings["tr"] > found.settings["te"] > 0


def median(sequence: str, **changes: Any) -> dict[str, float]:
    many = [drawn(sequence, seed, **changes).mean for seed in range(80)]
    return {tissue: float(np.median([m[tissue] for m in many])) for tissue in TISSUES}


def test_contrasts_have_the_known_order_of_tissues() -> None:
    for name in ("t1_spin_echo", "mprage", "t1_spoiled"):
        m = median(name)
        assert m["fat"] > m["wm"] > m["thalamus"] > m["gm"] > m["csf"], name
    m = median("mprage")
    assert 0.6 < m["gm"] / m["wm"] < 0.85
    assert m["csf"] / m["wm"] < 0.35
    m = median("t2_spin_echo")
    assert m["csf"] > m["lesion"] > m["gm"] > m["wm"] > m["pallidum"] > m["muscle"]
    m = median("flair")
    assert m["lesion"] > m["gm"] > m["wm"] > m["csf"]
    assert m["csf"] < 0.25 * m["wm"]
    m = median("pd_spin_echo")
    assert m["gm"] > m["wm"]
    m = median("stir")
    assert m["fat"] < 0.15
    assert m["csf"] > m["gm"] > m["wm"]
    m = median("t2star_spoiled")
    assert m["pallidum"] < m["wm"]  # iron
    assert m["bone_cancellous"] < m["fat"]


def test_fat_suppression_takes_fat_out_of_mixtures_too() -> None:
    for seed in range(10):
        with_fat = drawn("t1_spin_echo", seed)
        without = drawn("t1_spin_echo", seed, fat_suppression_probability=1.0)
        ratio = {
            t: without.mean[t] / without.mean["wm"] / (with_fat.mean[t] / with_fat.mean["wm"])
            for t in with_fat.mean
            if t != "air"
        }
        assert 0.05 <= ratio["fat"] <= 0.2
        assert ratio["fat"] < ratio["bone_cancellous"] < 1
        assert ratio["fat"] < ratio["soft"] < 1
        assert ratio["gm"] == pytest.approx(1)


def test_vessels_take_up_contrast_agent_and_brain_does_not() -> None:
    plain, after = median("t1_spin_echo"), median("t1_spin_echo", enhanced_probability=1.0)
    for tissue in ("artery", "vein", "dura", "mucosa"):
        assert after[tissue] / after["wm"] > 1.15 * plain[tissue] / plain["wm"], tissue
    assert after["gm"] / after["wm"] == pytest.approx(plain["gm"] / plain["wm"], rel=0.05)
    assert after["ventricle"] / after["wm"] == pytest.approx(plain["ventricle"] / plain["wm"], rel=0.05)


def test_flow_darkens_spin_echoes_and_brightens_gradient_echoes() -> None:
    for sequence, brighter in (("t2_spin_echo", False), ("flair", False), ("t1_spoiled", True), ("mprage", True)):
        still, flowing = median(sequence), median(sequence, flow_probability=1.0)
        for vessel in FLOWING:
            assert (flowing[vessel] > 1.3 * still[vessel]) == brighter
            assert (flowing[vessel] < 0.5 * still[vessel]) == (not brighter)


def test_a_plan_records_the_sequence_and_shares_sides(head: LabelTable) -> None:
    config = parse(ContrastConfig, {"random_weight": 0, "named_weights": {}, "physics_weight": 1}, "test")
    names = set()
    for seed in range(40):
        plan = sample_contrast(config, head, (40.0,) * 3, Draw(rng.generator(seed, 0, "contrast")), False)
        names.add(plan.name)
        assert plan.settings["tesla"] in (1.5, 3.0)
        for label in head.labels:
            if label.partner is not None:
                assert plan.mean[head.index_of[label.id]] == plan.mean[head.index_of[label.partner]]
    assert len(names) >= 6
    assert all(name.startswith("physics_") for name in names)
