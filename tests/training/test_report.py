"""The report of a run: one file that needs no other, with the figures of the run; and the log that it is made from."""

import base64
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from synthseg.config import PretrainConfig, TrainConfig
from synthseg.training.journal import Journal, forget_after
from synthseg.training.pretraining import Pretrainer
from synthseg.training.report import curves_figure, read_curves, write_report
from synthseg.training.state import RunState

MANIFEST = {
    "synthseg": "0.1.0",
    "torch": "2",
    "python": "3.11",
    "templates": ["mine <b>", "yours"],
    "validation_templates": ["other"],
    "parameters": 1_234_567,
    "devices": 2,
    "steps": 100,
    "train_seconds": 3600.0,
    "earlier": [{"steps": 77}],
}


def validation(step: int, level: float) -> dict[str, Any]:
    dice = {"t1": {"GM": level, "WM": 0.8}, "ct": {"GM": level / 2, "WM": 0.4}}
    return {"step": step, "mean": level, "dice": dice, "scans": {"a & b": {"WM": 0.7, "GM + Thalamus": 0.123}}}


def write_log(folder: Path) -> None:
    (folder / "log.csv").write_text("50,100.0,2.0,0.3\n# 50 validation 0.5\n100,150.0,1.5,0.4\n150,150.0,1.4,0.5\n")


def test_the_page_holds_everything_and_needs_no_other_file(tmp_path: Path) -> None:
    write_log(tmp_path)
    config = TrainConfig(name="a <run>", steps=200, seed=4711)
    page = write_report(tmp_path, config, MANIFEST, [validation(50, 0.5), validation(100, 0.625)]).read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for data, name in zip(pictures, ("curves", "classes"), strict=True):
        assert base64.b64decode(data) == (tmp_path / f"{name}.png").read_bytes()
    assert "a &lt;run&gt;" in page
    assert "<run>" not in page
    for text in (
        "mine &lt;b&gt;",
        "yours",
        "other",
        "seed: 4711",
        "1.23 million",
        "77 steps",
        "a &amp; b",
        "step 100 of",
    ):
        assert text in page, text
    cells = re.findall(r"<td[^>]*>([\d.]+)</td>", page)
    assert {"0.625", "0.312", "0.800", "0.123"} <= set(cells)
    row = re.search(r"<tr><td>GM</td>(.*?)</tr>", page)
    assert row is not None
    assert re.findall(r">([\d.]+)<", row.group(1)) == ["0.625", "0.312", "0.469"]  # t1, ct, mean


def test_the_picture_changes_with_the_curves(tmp_path: Path) -> None:
    write_log(tmp_path)
    pictures = []
    for validations in ([validation(50, 0.5)], [validation(50, 0.5), validation(100, 0.7)]):
        figure = curves_figure(read_curves(tmp_path / "log.csv"), validations)
        figure.savefig(tmp_path / "picture.png", dpi=40)
        pictures.append(matplotlib.image.imread(tmp_path / "picture.png")[..., :3])
    assert 0.02 < (pictures[0] < 0.95).any(-1).mean() < 0.5  # lines and text on white
    assert np.abs(pictures[1] - pictures[0]).max() > 0.5


def test_a_run_without_validation_or_log_has_a_report(tmp_path: Path) -> None:
    page = write_report(tmp_path, TrainConfig(), MANIFEST | {"train_seconds": 0.0}, []).read_text()
    assert "There is none yet" in page
    assert not (tmp_path / "classes.png").exists()


def test_the_curves_are_those_of_the_log(tmp_path: Path) -> None:
    write_log(tmp_path)
    curves = read_curves(tmp_path / "log.csv")
    assert curves.step.tolist() == [50, 100, 150]
    assert curves.dice.tolist() == [0.3, 0.4, 0.5]
    np.testing.assert_array_equal(curves.steps_per_hour, [3600, np.nan])  # 50 steps in 50 s; none in no time
    assert len(read_curves(tmp_path / "nothing.csv").step) == 0


def test_lines_after_the_state_are_forgotten(tmp_path: Path) -> None:
    """A resumed run writes them again; and one that was cut off by the end of the process is no line."""
    write_log(tmp_path)
    with (tmp_path / "log.csv").open("a") as log:
        log.write("# 150 scan a 0.5\n50,1")
    forget_after(tmp_path / "log.csv", 100)
    assert (tmp_path / "log.csv").read_text() == "50,100.0,2.0,0.3\n# 50 validation 0.5\n100,150.0,1.5,0.4\n"
    forget_after(tmp_path / "nothing.csv", 3)
    assert not (tmp_path / "nothing.csv").exists()


def test_a_silent_journal_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = RunState(step=50, validation=validation(50, 0.5))
    with Journal(TrainConfig(), tmp_path / "run", state, active=False) as journal:
        journal.step(state, last=True)
        journal.validated(state)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_the_bar_names_what_validation_goes_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pretraining goes by minus its loss, which read as a Dice below zero would alarm."""
    state = RunState(step=50, best=-1.25, validation=validation(50, -1.25))
    state.validations.append(state.validation)
    with Journal(PretrainConfig(), tmp_path, state, active=True, figure="match", score=Pretrainer.score) as journal:
        journal.step(state, last=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "best -loss" in said
    assert "-1.250" in said


@pytest.mark.parametrize("found", [None, float("nan")])
def test_the_bar_has_no_best_before_a_validation_has_found_one(
    found: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = RunState(step=50, validations=[] if found is None else [validation(50, found)])
    with Journal(TrainConfig(), tmp_path, state, active=True) as journal:
        journal.step(state, last=True)
    assert "best" not in capsys.readouterr().err
    state.validations.append(validation(100, 0.25))
    state.best = 0.25
    with Journal(TrainConfig(), tmp_path, state, active=True) as journal:
        journal.step(state, last=True)
    assert "best dice 0.250" in " ".join(capsys.readouterr().err.split())
