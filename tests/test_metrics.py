"""Dice by hand."""

import numpy as np
import pytest
import torch

from synthseg.labels import BRAIN_TISSUES, INTRACRANIAL_TISSUES, PARENCHYMA_TISSUES, load_scheme, tissue_mask
from synthseg.metrics import dice, dice_table

PRED = np.array([[0, 1, 1, 2], [0, 1, 2, 2]])
REF = np.array([[0, 1, 3, 2], [1, 1, 2, 3]])


def test_dice_by_hand() -> None:
    # 1: 3 and 3 voxels, 2 in common. 2: 3 and 2, 2 in common. 3: 0 and 2. 4: in neither.
    scores = dice(PRED, REF, [1, 2, 3, 4])
    np.testing.assert_allclose(scores[:3], [4 / 6, 4 / 5, 0.0])
    assert np.isnan(scores[3])


def test_torch_and_numpy_agree() -> None:
    np.testing.assert_array_equal(dice(torch.tensor(PRED), torch.tensor(REF), [1, 2]), dice(PRED, REF, [1, 2]))


def test_groups_compare_maps_of_different_schemes() -> None:
    # pred {1, 2} covers 6 voxels, ref {3} covers 2, both of them inside.
    scores = dice_table(PRED, REF, {"all": ([1, 2], [1, 2, 3]), "three": ([1, 2], [3]), "none": ([9], [9])})
    assert scores["all"] == pytest.approx(2 * 6 / (6 + 7))
    assert scores["three"] == pytest.approx(2 * 2 / (6 + 2))
    assert np.isnan(scores["none"])


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        dice(PRED, REF[:1], [1])


def test_tissues_of_the_shipped_scheme() -> None:
    table = load_scheme("siam16")
    brain = {table.names[i] for i in np.flatnonzero(tissue_mask(table, PARENCHYMA_TISSUES))}
    assert brain == {
        *("GM", "WM", "Cerebellar-GM", "Thalamus", "Pallidum", "Putamen", "Caudate"),
        *("Accumbens", "Amygdala", "Hippocampus"),
    }
    assert {"Ventricular-CSF"} == {
        table.names[i] for i in np.flatnonzero(tissue_mask(table, BRAIN_TISSUES - PARENCHYMA_TISSUES))
    }
    assert {"CSF"} == {table.names[i] for i in np.flatnonzero(tissue_mask(table, INTRACRANIAL_TISSUES - BRAIN_TISSUES))}
