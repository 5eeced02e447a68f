"""Windows: what they share is the same place of the grid."""

from __future__ import annotations

import pytest
import torch

from synthseg.representation.windows import Windows


def test_the_shared_part_of_every_window_is_that_of_the_grid() -> None:
    windows = Windows.draw(5, (16, 12, 20), 8, torch.Generator().manual_seed(3), step=2)
    assert windows.grid == (24, 20, 28)
    assert len(set(windows.corners)) > 1
    assert all(0 <= c <= 8 and c % 2 == 0 for corner in windows.corners for c in corner)
    grid = torch.arange(24 * 20 * 28.0).view(1, 24, 20, 28)
    inner = windows.shared_of_grid(grid)
    assert inner.shape == (1, 8, 4, 12)
    for number in range(5):
        seen = windows.cut(grid, number)
        assert seen.shape == (1, 16, 12, 20)
        assert torch.equal(windows.shared(seen, number), inner)
        blocks = torch.nn.functional.avg_pool3d(seen, 2)
        assert torch.equal(windows.shared(blocks, number, cell=2), torch.nn.functional.avg_pool3d(inner, 2))


def test_windows_need_a_margin_of_whole_steps() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        Windows.draw(2, (8, 8, 8), 6, torch.Generator(), step=4)
