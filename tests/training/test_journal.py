"""What a run writes while it goes on: the curves of TensorBoard are the figures of ``log.csv``, each step once."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from synthseg.config import TrainConfig
from synthseg.training import journal
from synthseg.training.journal import Journal
from synthseg.training.loop import Trainer
from synthseg.training.state import RunState

Series = dict[str, dict[int, float]]


def curves(folder: Path) -> Series:
    """Each curve as TensorBoard shows it: its value at each step."""
    found = EventAccumulator(str(folder)).Reload()
    series: Series = {}
    for tag in found.Tags()["scalars"]:
        events = found.Scalars(tag)
        series[tag] = {event.step: event.value for event in events}
        assert len(series[tag]) == len(events), f"{tag} has a step twice"
    return series


def logged(folder: Path, figure: str = "dice") -> Series:
    """The same from the log."""
    series: Series = {}
    for line in (folder / "log.csv").read_text().splitlines():
        if line.startswith("# "):
            step, kind, name, value = line.removeprefix("# ").split(" ")
            found = {f"{'train' if kind == 'term' else kind}/{name}": value}
        else:
            step, _, loss, mean = line.split(",")
            found = {"train/loss": loss, f"train/{figure}": mean}
        for tag, number in found.items():
            series.setdefault(tag, {})[int(step)] = float(number)
    return series


def assert_same(folder: Path) -> None:
    shown, written = curves(folder), logged(folder)
    assert set(shown) == set(written)
    for tag, values in written.items():
        assert shown[tag] == pytest.approx(values, abs=1e-4), tag  # the log has four decimals


def test_tensorboard_shows_what_the_log_says(
    make_config: Callable[..., TrainConfig],
    template_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal, "LOG_EVERY", 1)
    held_out = {"validation_templates": [str(template_folders["other"])], "validation_contrasts": ["t1"]}
    trainer = Trainer(make_config(steps=3, validate_every=2, **held_out), tmp_path)
    trainer.run()
    assert_same(tmp_path)
    shown = curves(tmp_path)
    assert {tag: sorted(values) for tag, values in shown.items()} == {
        "train/loss": [1, 2, 3],
        "train/dice": [1, 2, 3],
        "validation/dice": [2, 3],
    }
    assert shown["train/loss"][3] == pytest.approx(trainer.state.loss, rel=1e-6)
    validations = {validation["step"]: validation["mean"] for validation in trainer.state.validations}
    assert shown["validation/dice"] == pytest.approx(validations, abs=1e-4)


def test_steps_that_are_taken_again_are_shown_once(
    make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 5, and gone on from the state of step 3."""
    monkeypatch.setattr(journal, "LOG_EVERY", 1)
    for first, last in ((0, 5), (3, 6)):
        state = RunState(step=first)
        with Journal(make_config(), tmp_path, state, active=True) as writes:
            for step in range(first + 1, last + 1):
                state.step, state.loss, state.dice = step, 1 / step + first, 0.1 * step
                writes.step(state, step == last, {"entropy": 2.0 / step})
                state.validation = {"mean": 0.01 * step, "scans": {"anna": {"GM": 0.4, "WM": 0.6 + first / 100}}}
                writes.validated(state)
        time.sleep(1.1)  # files of curves are read in the order of the seconds in their names
    assert_same(tmp_path)
    shown = curves(tmp_path)
    assert set(shown) == {"train/loss", "train/dice", "train/entropy", "validation/dice", "scan/anna"}
    assert all(sorted(values) == [1, 2, 3, 4, 5, 6] for values in shown.values())
    assert [shown["train/loss"][step] for step in (3, 4)] == pytest.approx([1 / 3, 1 / 4 + 3])
