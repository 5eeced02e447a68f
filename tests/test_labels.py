"""Label tables: ids and indices, partners, relations between schemes, and what a wrong table says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthseg.errors import LabelError
from synthseg.labels import Label, LabelTable, load_scheme

FINE = LabelTable("fine", tuple(Label(i, f"Fine-{i}") for i in (0, 4, 7, 9)))


def coarse(**to: tuple[int, ...]) -> LabelTable:
    """Background, A and B; what A and B are in ``fine`` is given."""
    return LabelTable(
        "coarse",
        (
            Label(0, "Background", to={"fine": (0,)}),
            *(Label(i, n, to={"fine": t}) for i, (n, t) in enumerate(to.items(), 1)),
        ),
    )


SIDES = LabelTable(
    "sides",
    (Label(0, "Background"), Label(300, "Left-X", partner=5), Label(2, "Middle"), Label(5, "Right-X", partner=300)),
)


def test_ids_become_positions_in_the_table() -> None:
    label_map = np.array([[[0, 300], [5, 2]], [[2, 2], [300, 0]]], dtype=np.uint16)
    out = SIDES.to_index(label_map)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, [[[0, 1], [3, 2]], [[2, 2], [1, 0]]])
    np.testing.assert_array_equal(SIDES.ids[out], label_map)


def test_partners_swap() -> None:
    np.testing.assert_array_equal(SIDES.flip, [0, 3, 2, 1])


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, np.int64])
def test_unknown_ids_are_named(dtype: Any) -> None:
    with pytest.raises(LabelError, match=r"scan\.nii.*\[77\].*'sides'"):
        SIDES.to_index(np.array([0, 2, 77], dtype=dtype), "scan.nii")


def test_negative_ids_are_refused() -> None:
    with pytest.raises(LabelError, match="-1"):
        SIDES.to_index(np.array([0, -1]))


def test_a_missing_label_is_named() -> None:
    assert SIDES[5].name == "Right-X"
    with pytest.raises(LabelError, match="no label 6"):
        SIDES[6]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((), "begin with label 0"),
        ((Label(1, "A"),), "begin with label 0"),
        ((Label(0, "B"), Label(3, "A"), Label(3, "C")), r"\[3\] more than once"),
        ((Label(0, "B"), Label(3, "A", partner=4)), "partner"),
        ((Label(0, "B"), Label(3, "A", partner=4), Label(4, "C")), "partner"),
        ((Label(0, "B"), Label(3, "A", partner=4), Label(4, "C", partner=5), Label(5, "D", partner=4)), "partner"),
    ],
)
def test_wrong_tables_are_refused(labels: tuple[Label, ...], message: str) -> None:
    with pytest.raises(LabelError, match=message):
        LabelTable("wrong", labels)


# ---------------------------------------------------------------- relations


def test_groups_by_hand() -> None:
    table = coarse(A=(4, 9), B=(7,))
    expected = [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]
    np.testing.assert_array_equal(table.groups(FINE), np.array(expected, bool))


def test_a_table_is_itself() -> None:
    np.testing.assert_array_equal(FINE.groups(FINE), np.eye(4, dtype=bool))
    np.testing.assert_array_equal(FINE.mapping(FINE), range(4))


def test_mapping_where_the_relation_is_exact() -> None:
    np.testing.assert_array_equal(coarse(A=(9,), B=(9,)).mapping(FINE), [0, 3, 3])
    with pytest.raises(LabelError, match=r"\['A'\]"):
        coarse(A=(4, 9), B=(7,)).mapping(FINE)


def test_no_relation_is_an_error() -> None:
    with pytest.raises(LabelError, match="does not say what"):
        FINE.groups(coarse(A=(4,)))


def test_a_relation_to_a_class_that_is_not_there_is_an_error() -> None:
    with pytest.raises(LabelError, match=r"A.*55.*fine|fine.*55"):
        coarse(A=(55,)).groups(FINE)


def test_a_relation_to_nothing_is_an_error() -> None:
    with pytest.raises(LabelError, match="A"):
        coarse(A=()).groups(FINE)


# ---------------------------------------------------------------- files


def test_json_round_trip() -> None:
    table = coarse(A=(4, 9), B=(7,))
    again = LabelTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table
    assert LabelTable.from_dict(SIDES.to_dict()) == SIDES
    head = load_scheme("head")
    assert LabelTable.from_dict(json.loads(json.dumps(head.to_dict()))) == head


def test_a_scheme_is_found_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(SIDES.to_dict()))
    assert load_scheme(file) == SIDES
    assert load_scheme(str(file)) == SIDES


def test_unknown_scheme_names_the_nearest() -> None:
    with pytest.raises(LabelError, match="did you mean 'siam16'"):
        load_scheme("siam")
    with pytest.raises(LabelError, match="brainweb, freesurfer, head, head45, siam16"):
        load_scheme("qqq")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"name": "x", "labels": [{"id": 0}]}',
        '{"name": "x", "labels": [{"id": 0, "name": "B", "colour": [1, 2, 3]}]}',
        '{"name": "x", "labels": 3}',
        '{"name": "x", "labels": [3]}',
        '{"name": "x", "labels": [{"id": 0, "name": "B", "to": [1]}]}',
    ],
)
def test_damaged_schemes_name_their_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(LabelError, match=r"mine\.json"):
        load_scheme(file)


def test_missing_scheme_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"none\.json"):
        load_scheme(tmp_path / "none.json")


def test_two_tables_of_one_name_must_be_the_same(head: LabelTable) -> None:
    other = LabelTable(head.name, head.labels[:-1], head.description)
    with pytest.raises(LabelError, match="two different label tables"):
        other.groups(head)
    assert np.array_equal(head.groups(LabelTable(head.name, head.labels, "copied")), np.eye(len(head), dtype=bool))
