"""Label tables of maps that no shipped scheme describes, from the tables that other tools write beside their maps.

Read are FreeSurfer colour tables (``id name R G B A``, as CHARM's ``*_LUT.txt``; the colour may be left out), the label
descriptions of ITK-SNAP (``id R G B A VIS MSH "name"``) and the ``dseg.tsv`` of BIDS (columns ``index``, ``name``,
perhaps ``color``). Tissue and left/right partner are guessed from the names, since such tables do not say them.
"""

from __future__ import annotations

import colorsys
import csv
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from synthseg.errors import LabelError
from synthseg.labels import MAX_ID, MAX_LABELS, Label, LabelTable, load_scheme

Color = tuple[int, int, int]
Entry = tuple[str, Color | None]

ID = re.compile(r"-?[0-9]+")
ITK_SNAP_LINE = re.compile(r'(-?\d+)((?:\s+\d+){3})\s+[\d.]+\s+[01]\s+[01]\s+"(.*)"')
EXAMPLE = "0 Background 0 0 0 0\n2 Left-Putamen 236 13 176 0\n3 Right-Putamen 236 13 176 0"

# First match decides; names are lower case with single blanks between words.
TISSUE_OF_NAME: tuple[tuple[str, str], ...] = tuple(
    (pattern, tissue)
    for tissue, pattern in (
        ("lesion", r"hypointens|lesion|\bwmh\b"),
        ("tumour", r"tumou?r"),
        ("oedema", r"o?edema"),
        ("haemorrhage", r"ha?emorrhag"),
        ("bone_cancellous", r"spong|cancellous|diplo|marrow"),
        ("bone_cortical", r"bone|skull|compacta"),
        ("dura", r"\bdura|mening"),
        ("nerve", r"\bnerve"),
        ("wm", r"chiasm|callosum|\bcc\b|fornix"),
        ("wm", r"cerebell.*(white|\bwm\b)"),
        ("cerebellar_gm", r"cerebell|vermi?s?\b|vermal"),
        ("brainstem", r"brain ?stem|midbrain|\bpons\b|medulla|ventral ?dc|spinal cord|\bscp\b"),
        ("ventricle", r"ventric|\blat vent|choroid"),
        ("csf", r"\bcsf\b|cerebrospinal|\bfluid"),
        ("gm", r"hypothalam|\bbasal forebrain"),
        *((part, part[:-2]) for part in ("thalamus", "pallidum", "putamen", "caudate", "accumbens", "hippocampus")),
        ("amygdala", r"amygdal"),
        ("gm", r"\bctx\b|cortex|gr[ae]y|\bgm\b|gyrus"),
        ("wm", r"white|\bwm\b"),
        ("artery", r"arter"),
        ("vein", r"\bvein|venous|sagittal sinus"),
        ("vessel", r"vessel|blood"),
        ("fat", r"\bfat\b|adipos"),
        ("muscle", r"muscle"),
        ("skin", r"skin|scalp"),
        ("mucosa", r"mucosa"),
        ("eye", r"\beye"),
        ("soft", r"\bsoft\b|other tissue|extra ?cerebral|\bhead\b"),
        ("air", r"\bair\b|background"),
    )
)
# Tissue -> classes of siam16, and where a class is thought to be that no label of the table is for.
SIAM_CLASS_OF = {
    **{"air": 0, "gm": 1, "wm": 2, "brainstem": 2, "csf": 3, "ventricle": 4, "cerebellar_gm": 5},
    **dict.fromkeys(("lesion", "tumour", "oedema", "haemorrhage"), 2),
    **{"thalamus": 6, "pallidum": 7, "putamen": 8, "caudate": 9, "accumbens": 10, "amygdala": 11, "hippocampus": 12},
    **{"dura": 13, "artery": 14, "vein": 14, "vessel": 14, "bone_cortical": 15, "bone_cancellous": 15},
    **dict.fromkeys(("soft", "fat", "muscle", "skin", "mucosa", "eye", "nerve"), 16),
}
SIAM_INSIDE: dict[int, tuple[str, ...]] = {
    **dict.fromkeys(range(5, 13), ("gm",)),
    **{3: ("air",), 4: ("csf", "air"), 13: ("csf", "air"), 14: ("csf", "soft", "skin", "air")},
    **{15: ("soft", "skin", "air"), 16: ("air",)},
}
SIDES = {"left": "right", "right": "left", "lh": "rh", "rh": "lh", "l": "r", "r": "l"}

_ASEG_EXTRAS = {
    **{31: "Left-choroid-plexus", 63: "Right-choroid-plexus", 77: "WM-hypointensities"},
    **{78: "Left-WM-hypointensities", 79: "Right-WM-hypointensities", 80: "non-WM-hypointensities"},
    **{81: "Left-non-WM-hypointensities", 82: "Right-non-WM-hypointensities"},
    **{251: "CC_Posterior", 252: "CC_Mid_Posterior", 253: "CC_Central", 254: "CC_Mid_Anterior", 255: "CC_Anterior"},
}
_DESIKAN_KILLIANY = (
    "unknown bankssts caudalanteriorcingulate caudalmiddlefrontal corpuscallosum cuneus entorhinal fusiform "
    "inferiorparietal inferiortemporal isthmuscingulate lateraloccipital lateralorbitofrontal lingual "
    "medialorbitofrontal middletemporal parahippocampal paracentral parsopercularis parsorbitalis parstriangularis "
    "pericalcarine postcentral posteriorcingulate precentral precuneus rostralanteriorcingulate rostralmiddlefrontal "
    "superiorfrontal superiorparietal superiortemporal supramarginal frontalpole temporalpole transversetemporal insula"
)
_CHARM = (
    "Background White-Matter Gray-Matter CSF Bone Scalp Eye_balls Compact_bone Spongy_bone Blood Muscle"
)  # fmt: skip


def freesurfer_entries() -> dict[int, Entry]:
    """Names of the ids of aseg and aparc+aseg (Desikan-Killiany)."""
    entries: dict[int, Entry] = {x.id: (x.name, x.color) for x in load_scheme("head").labels if x.id < 500}
    entries |= {i: (name, None) for i, name in _ASEG_EXTRAS.items()}
    for base, side in ((1000, "lh"), (2000, "rh")):
        entries |= {base + i: (f"ctx-{side}-{name}", None) for i, name in enumerate(_DESIKAN_KILLIANY.split())}
    return entries


def charm_entries() -> dict[int, Entry]:
    """Names of the ids of CHARM's ``final_tissues``."""
    return {i: (name, None) for i, name in enumerate(_CHARM.split())}


def read_entries(path: Path) -> dict[int, Entry]:
    """Ids with names and colours of a colour table or a ``dseg.tsv``. Raises LabelError that names the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(f"{path}: cannot be read as a label table ({error})") from None
    entries = _read_tsv(path, text) if path.suffix.lower() == ".tsv" else _read_lut(path, text)
    if not entries:
        raise LabelError(
            f"{path}: holds no labels; write one a line: id name R G B A, as in '2 Left-Putamen 236 13 176 0'"
        )
    return entries


def _read_lut(path: Path, text: str) -> dict[int, Entry]:
    entries: dict[int, Entry] = {}
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}, line {number}"
        itk_snap = ITK_SNAP_LINE.match(line.strip())
        if itk_snap:
            r, g, b = (min(int(w), 255) for w in itk_snap[2].split())
            _add(entries, int(itk_snap[1]), itk_snap[3], (r, g, b), where)
            continue
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) < 2 or not ID.fullmatch(words[0]):
            raise LabelError(f"{where}: expected 'id name' or 'id name R G B A', got '{line.strip()[:60]}'")
        colour: Color | None = None
        for count in (4, 3):  # a name may hold blanks; what follows it is the colour
            if len(words) >= 2 + count and all(w.isdigit() and int(w) < 256 for w in words[-count:]):
                r, g, b = (int(w) for w in words[len(words) - count :][:3])
                colour, words = (r, g, b), words[:-count]
                break
        _add(entries, int(words[0]), " ".join(words[1:]), colour, where)
    return entries


def _read_tsv(path: Path, text: str) -> dict[int, Entry]:
    entries: dict[int, Entry] = {}
    rows = csv.DictReader(text.splitlines(), delimiter="\t")
    columns = rows.fieldnames or []
    if "index" not in columns or "name" not in columns:
        raise LabelError(f"{path}: expected the columns 'index' and 'name', parted by tabs; got {list(columns)}")
    for number, row in enumerate(rows, 2):
        index, name = (row["index"] or "").strip(), (row["name"] or "").strip()
        if not ID.fullmatch(index) or not name:
            raise LabelError(
                f"{path}, line {number}: 'index' must be a whole number and 'name' a word, got {index!r}, {name!r}"
            )
        hexes = re.fullmatch(r"#?([0-9a-fA-F]{6})", (row.get("color") or "").strip())
        colour = None
        if hexes:
            r, g, b = bytes.fromhex(hexes[1])
            colour = (r, g, b)
        _add(entries, int(index), name, colour, f"{path}, line {number}")
    return entries


def _add(entries: dict[int, Entry], label_id: int, words: str, colour: Color | None, where: str) -> None:
    """Add an entry under a name without blanks and slashes, unless no map can hold its id."""
    name = re.sub(r"[\s/\\]+", "-", words.strip())
    if not name:
        raise LabelError(f"{where}: id {label_id} has no name; give it one")
    if label_id in entries and entries[label_id][0] != name:
        raise LabelError(f"{where}: id {label_id} is {entries[label_id][0]} already, and now {name}; keep one")
    if label_id >= 0:
        entries[label_id] = name, colour


def tissue_of(name: str) -> str:
    """The tissue that a name speaks of; a name that says none is a tissue of its own."""
    plain = " ".join(re.split(r"[\s_.\-+/]+", name.lower()))
    for pattern, tissue in TISSUE_OF_NAME:
        if re.search(pattern, plain):
            return tissue
    sides = [word for word in plain.split() if word not in SIDES]
    return "_".join(sides) or plain


def other_side(name: str) -> str | None:
    """The name of the same structure on the other side, or None."""
    parts = re.split(r"([\s_.\-+/]+)", name)
    for position, part in enumerate(parts):
        swapped = SIDES.get(part.lower())
        if swapped:
            swapped = swapped.upper() if part.isupper() else swapped.title() if part.istitle() else swapped
            return "".join([*parts[:position], swapped, *parts[position + 1 :]])
    return None


def table_from(
    entries: Mapping[int, Entry], ids: Collection[int], name: str, where: str = "the label table"
) -> LabelTable:
    """A LabelTable of the ids that the maps hold, 0 included. Raises LabelError if one is not in the table."""
    wanted = sorted({0, *ids})
    large = [i for i in wanted if i > MAX_ID]
    if large:
        raise LabelError(f"the maps hold the ids {large[:10]}, but ids end at {MAX_ID}; give these smaller ones")
    missing = [i for i in wanted if i and i not in entries]
    if missing:
        raise LabelError(f"{where} has no line for the ids {missing[:10]} that the maps hold; add 'id name' for each")
    if len(wanted) > MAX_LABELS:
        raise LabelError(f"the maps hold {len(wanted)} labels; at most {MAX_LABELS} can be trained on: merge some")
    known = {x.name: x for x in load_scheme("head").labels}
    by_name = {entries[i][0]: i for i in wanted if i in entries}
    labels = []
    for position, i in enumerate(wanted):
        title, colour = entries.get(i, ("Background", (0, 0, 0)))
        twin = known.get(title)
        tissue = "air" if i == 0 else twin.tissue if twin else tissue_of(title)
        partner = by_name.get(other_side(title) or "") if i else None
        colour = colour or ((0, 0, 0) if i == 0 else _palette(position))
        labels.append(
            Label(i, title, colour, tissue, partner if partner != i else None, twin.components if twin else 0)
        )
    return LabelTable(name, _related_to_siam16(labels), f"Made by synthseg init from {where}.")


def _palette(position: int) -> Color:
    """Colours that differ: hues a golden section apart."""
    r, g, b = colorsys.hsv_to_rgb(position * 0.618034 % 1, 0.75 if position % 2 else 0.45, 0.95)
    return round(r * 255), round(g * 255), round(b * 255)


def _related_to_siam16(labels: Sequence[Label]) -> tuple[Label, ...]:
    """Say what each label is in siam16, where all tissues are known; a class of siam16 without a label of its own is
    inside those labels that the tissue it borders or belongs to has (thalamus in a map's one grey matter)."""
    if any(label.tissue not in SIAM_CLASS_OF for label in labels):
        return tuple(labels)
    meant = {label.id: {SIAM_CLASS_OF[label.tissue]} for label in labels}
    tissues = {label.tissue for label in labels}
    for lost in set(range(17)) - set().union(*meant.values()):
        homes = [t for t in SIAM_INSIDE.get(lost, ()) if t in tissues][:1]
        for label in labels:
            if label.tissue in homes:
                meant[label.id].add(lost)
    return tuple(replace(label, to={"siam16": tuple(sorted(meant[label.id]))}) for label in labels)


def unknown_tissues(table: LabelTable) -> list[str]:
    """Names of labels whose tissue no named contrast knows: their mean is random in every contrast."""
    return [label.name for label in table.labels if label.tissue not in SIAM_CLASS_OF]
