"""What the benchmark of writing says of stored probabilities, by hand. No time is judged."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_writing.py"


@pytest.fixture(scope="module")
def bench(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


def test_errors_of_stored_probabilities_by_hand(bench: ModuleType, tmp_path: Path) -> None:
    shares = np.array([0.6, 0.399, 0.001], np.float32)  # as bytes: 153, 102 and 0 of 255
    rows = bench.precision(np.broadcast_to(shares[:, None, None, None], (3, 5, 6, 7)), tmp_path)
    assert list(rows) == ["1 byte", "2 bytes", "float16"]
    assert rows["1 byte"]["largest_error"] == pytest.approx(0.001, rel=1e-4)  # 0.4 for 0.399, 0 for 0.001
    assert rows["1 byte"]["soft_volume_change"] == pytest.approx(1, rel=1e-6)
    assert rows["2 bytes"]["largest_error"] < 0.5 / 65535 + 1e-7
    assert rows["2 bytes"]["soft_volume_change"] == pytest.approx(66 / 65.535 - 1, rel=1e-3)
    assert all(row["changed_winners"] == 0 < row["mib"] for row in rows.values())
