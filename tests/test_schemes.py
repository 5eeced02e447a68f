"""The schemes that ship, against the published ids and names."""

import itertools

import numpy as np
import pytest

from synthseg.labels import LabelTable, available_schemes, load_scheme

SIAM16 = [
    *("Background", "GM", "WM", "CSF", "Ventricular-CSF", "Cerebellar-GM"),
    *("Thalamus", "Pallidum", "Putamen", "Caudate", "Accumbens", "Amygdala", "Hippocampus"),
    *("Dura", "Vessels", "Skull", "Head"),
]

# FreeSurferColorLUT.txt
FREESURFER = {
    2: "Left-Cerebral-White-Matter",
    3: "Left-Cerebral-Cortex",
    4: "Left-Lateral-Ventricle",
    5: "Left-Inf-Lat-Vent",
    7: "Left-Cerebellum-White-Matter",
    8: "Left-Cerebellum-Cortex",
    10: "Left-Thalamus",
    11: "Left-Caudate",
    12: "Left-Putamen",
    13: "Left-Pallidum",
    14: "3rd-Ventricle",
    15: "4th-Ventricle",
    16: "Brain-Stem",
    17: "Left-Hippocampus",
    18: "Left-Amygdala",
    24: "CSF",
    25: "Left-Lesion",
    26: "Left-Accumbens-area",
    28: "Left-VentralDC",
    30: "Left-vessel",
    41: "Right-Cerebral-White-Matter",
    42: "Right-Cerebral-Cortex",
    43: "Right-Lateral-Ventricle",
    44: "Right-Inf-Lat-Vent",
    46: "Right-Cerebellum-White-Matter",
    47: "Right-Cerebellum-Cortex",
    49: "Right-Thalamus",
    50: "Right-Caudate",
    51: "Right-Putamen",
    52: "Right-Pallidum",
    53: "Right-Hippocampus",
    54: "Right-Amygdala",
    57: "Right-Lesion",
    58: "Right-Accumbens-area",
    60: "Right-VentralDC",
    62: "Right-vessel",
    72: "5th-Ventricle",
    85: "Optic-Chiasm",
}
# SimNIBS charm
CHARM = {
    502: "Artery",
    506: "EyeBalls",
    507: "Other-Tissues",
    508: "Rectus-Muscles",
    509: "Mucosa",
    511: "Skin",
    512: "Spinal-Cord",
    514: "Vein",
    515: "Bone-Cortical",
    516: "Bone-Cancellous",
    530: "Optic-Nerve",
}
# Every class of siam16 and the words by which the names of `head` belong to it
TO_SIAM16 = {
    1: ["Cerebral-Cortex"],
    2: ["White-Matter", "Brain-Stem", "VentralDC", "Lesion", "Optic-Chiasm", "Spinal-Cord"],
    3: ["CSF"],
    4: ["Ventricle", "Inf-Lat-Vent"],
    5: ["Cerebellum-Cortex"],
    6: ["Thalamus"],
    7: ["Pallidum"],
    8: ["Putamen"],
    9: ["Caudate"],
    10: ["Accumbens"],
    11: ["Amygdala"],
    12: ["Hippocampus"],
    13: ["Dura"],
    14: ["vessel", "Artery", "Vein"],
    15: ["Bone"],
    16: ["EyeBalls", "Other-Tissues", "Muscles", "Mucosa", "Skin", "Optic-Nerve"],
}


@pytest.fixture(params=["brainweb", "freesurfer", "head", "head45", "siam16"])
def scheme(request: pytest.FixtureRequest) -> LabelTable:
    return load_scheme(request.param)


def test_what_ships() -> None:
    assert available_schemes() == ["brainweb", "freesurfer", "head", "head45", "siam16"]


def test_siam16_has_the_published_ids() -> None:
    table = load_scheme("siam16")
    assert table.ids.tolist() == list(range(17))
    assert table.names == SIAM16
    assert all(label.partner is None for label in table.labels)


@pytest.mark.parametrize(("label_id", "name"), [*FREESURFER.items(), *CHARM.items()])
def test_head_uses_published_ids_and_names(label_id: int, name: str, head: LabelTable) -> None:
    assert head[label_id].name == name


def test_every_head_label_is_one_siam16_class(head: LabelTable) -> None:
    mapping = head.mapping(load_scheme("siam16"))
    for label, target in zip(head.labels[1:], mapping[1:], strict=True):
        fitting = [c for c, words in TO_SIAM16.items() for word in words if word in label.name]
        assert target in fitting, label.name
        assert len(set(fitting)) == 1, f"{label.name} fits {fitting}: the test's own table is vague"
    assert mapping[0] == 0
    assert set(mapping) == set(range(17))


def test_head45_is_the_head_with_small_structures_merged(head: LabelTable) -> None:
    head45, siam = load_scheme("head45"), load_scheme("siam16")
    assert len(head45) == 46
    kept = [label for label in head.labels if label.id in head45.index_of]
    assert [(x.id, x.name, x.tissue, x.partner) for x in kept] == [
        (x.id, x.name, x.tissue, x.partner) for x in head45.labels
    ]
    assert all(head.mapping(head45)[head.index_of[label.id]] == head45.index_of[label.id] for label in kept)
    np.testing.assert_array_equal(head45.mapping(siam)[head.mapping(head45)], head.mapping(siam))


def test_head45_is_the_same_in_freesurfers_ids() -> None:
    head45, freesurfer = load_scheme("head45"), load_scheme("freesurfer")
    there, back = head45.mapping(freesurfer), freesurfer.mapping(head45)
    np.testing.assert_array_equal(back[there], range(len(head45)))
    np.testing.assert_array_equal(
        freesurfer.mapping(load_scheme("siam16"))[there], head45.mapping(load_scheme("siam16"))
    )
    # FreeSurferColorLUT.txt; in its table 502 to 516 are fields of the hippocampus
    head = {"Dura": 98, "Spinal-Cord": 126, "Globe": 134, "Artery": 902, "Other-Tissues": 907, "Rectus-Muscles": 908}
    head |= {"Mucosa": 909, "Skin": 911, "Vein": 914, "Bone-Cortical": 915, "Bone-Cancellous": 916, "Optic-Nerve": 930}
    for label, target in zip(head45.labels[1:], there[1:], strict=True):
        renamed = freesurfer.labels[target]
        assert renamed.name == label.name.replace("EyeBalls", "Globe")
        assert renamed.id == head.get(renamed.name, label.id), label.name
        assert FREESURFER.get(renamed.id, renamed.name) == renamed.name
        assert (renamed.tissue, renamed.components) == (label.tissue, label.components)
    siam_alone = load_scheme("siam16")
    assert not any("freesurfer" in label.to for label in siam_alone.labels)


def test_siam16_and_head45_say_the_same_of_each_other() -> None:
    head45, siam = load_scheme("head45"), load_scheme("siam16")
    np.testing.assert_array_equal(siam.groups(head45), head45.groups(siam).T)


def test_brainweb_says_nothing_of_sides_and_the_same_of_both_schemes() -> None:
    brainweb, head45, siam = (load_scheme(name) for name in ("brainweb", "head45", "siam16"))
    groups = brainweb.groups(head45)
    np.testing.assert_array_equal(groups, groups[:, head45.flip])
    for label, fine, coarse in zip(brainweb.labels, groups, brainweb.groups(siam), strict=True):
        reached = (fine[:, None] & head45.groups(siam)).any(0)
        assert (reached <= coarse).all(), label.name  # at least as exact: the cord is never deep white matter
        if not label.name.startswith("Deep"):
            np.testing.assert_array_equal(reached, coarse, err_msg=label.name)


def test_left_and_right_are_partners_by_name(scheme: LabelTable) -> None:
    for label in scheme.labels:
        if label.name.startswith(("Left-", "Right-")):
            here, there = ("Left-", "Right-") if label.name.startswith("Left-") else ("Right-", "Left-")
            assert label.partner is not None, label.name
            other = scheme[label.partner]
            assert other.name == label.name.replace(here, there, 1)
            assert (other.tissue, other.components, set(other.to)) == (label.tissue, label.components, set(label.to))
            for name, ids in label.to.items():
                sides = load_scheme(name)
                mirrored = {i if sides[i].partner is None else sides[i].partner for i in ids}
                assert set(other.to[name]) == mirrored, label.name
        else:
            assert label.partner is None, label.name
    np.testing.assert_array_equal(scheme.flip[scheme.flip], range(len(scheme)))


def test_brainweb_cannot_tell_deep_nuclei_apart() -> None:
    brainweb, siam = load_scheme("brainweb"), load_scheme("siam16")
    # the ids of the discrete BrainWeb phantoms (Aubert-Broche et al. 2006)
    assert brainweb.names == [
        *("Background", "CSF", "GM", "WM", "Fat", "Muscle", "Muscle-Skin"),
        *("Skull", "Vessels", "Around-Fat", "Dura", "Bone-Marrow", "Deep-GM", "Deep-WM"),
    ]
    groups = {
        name: {siam.names[c] for c in np.flatnonzero(row)}
        for name, row in zip(brainweb.names, brainweb.groups(siam), strict=True)
    }
    assert groups["CSF"] == {"CSF", "Ventricular-CSF"}
    assert groups["GM"] == {"GM", "Cerebellar-GM"}
    assert groups["WM"] == {"WM"}
    deep = {"Thalamus", "Pallidum", "Putamen", "Caudate", "Accumbens", "Amygdala", "Hippocampus"}
    assert groups["Deep-GM"] == groups["Deep-WM"] == deep | {"GM", "WM", "Cerebellar-GM"}
    assert groups["Skull"] == groups["Bone-Marrow"] == {"Skull"}
    assert groups["Dura"] == {"Dura"}
    assert groups["Vessels"] == {"Vessels"}
    for name in ("Fat", "Muscle", "Muscle-Skin", "Around-Fat"):
        assert groups[name] == {"Head"}
    assert groups["Background"] == {"Background"}
    assert set().union(*groups.values()) == set(siam.names)


def test_colours_can_be_told_apart(scheme: LabelTable) -> None:
    colors = [tuple(c) for c in scheme.colors.tolist()]
    sided = [c for c, label in zip(colors, scheme.labels, strict=True) if not label.name.startswith("Right-")]
    assert scheme.colors[0].tolist() == [0, 0, 0]
    assert all(0 <= v <= 255 for label in scheme.labels for v in label.color)
    alike = [(a, b) for a, b in itertools.combinations(sided, 2) if a == b]
    assert not alike


def test_background_is_air(scheme: LabelTable) -> None:
    assert scheme[0].tissue == "air"
    assert sum(label.tissue == "air" for label in scheme.labels) == 1
