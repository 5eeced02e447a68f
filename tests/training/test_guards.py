"""A loss that runs away stops the run; a deterministic run is the same each time and leaves no setting behind."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthseg.config.training import DivergenceConfig
from synthseg.errors import TrainingError
from synthseg.generator.plan import Plan
from synthseg.networks.checkpoint import read_tensors
from synthseg.training.guards import deterministic, follow
from synthseg.training.loop import Trainer
from synthseg.training.state import RunState


def stops_at(losses: Any, **settings: Any) -> int | None:
    """The step at which a run with these losses is stopped."""
    state, config = RunState(), DivergenceConfig(**settings)
    for step, loss in enumerate(losses, 1):
        state.step = step
        if follow(state, config, float(loss), 0.5):
            return step
    return None


def learning(n: int, seed: int = 0) -> np.ndarray:
    """Losses as they come with a batch of one: from 4 down to 0.6, each image easier or harder by a factor."""
    chance = np.random.default_rng(seed)
    return (0.6 + 3.4 * np.exp(-np.arange(n) / 150)) * chance.lognormal(0, 0.35, n)


@pytest.mark.parametrize("seed", range(5))
def test_an_ordinary_run_is_left_alone(seed: int) -> None:
    assert stops_at(learning(6000, seed)) is None


def test_hard_images_and_a_bad_spell_are_no_divergence() -> None:
    losses = learning(4000)
    losses[1000::97] *= 10  # single images
    losses[3000:3060] = 3.0  # a spell
    assert stops_at(losses) is None


def test_a_warm_start_whose_loss_rises_at_first_is_left_alone() -> None:
    losses = learning(4000)[::-1][:4000]  # from 0.6, noisy
    rise = 0.6 + 0.9 * np.exp(-(((np.arange(4000) - 150) / 80) ** 2))  # while the learning rate warms up
    assert stops_at(np.minimum(losses, rise)) is None


@pytest.mark.parametrize("begin", [600, 3000])
def test_a_loss_that_stays_high_stops_the_run(begin: int) -> None:
    losses = learning(begin + 1000)
    losses[begin:] = 3.0
    stopped = stops_at(losses)
    assert stopped is not None
    assert begin + 200 < stopped < begin + 300  # the running mean takes some steps to get there
    assert stops_at(losses, steps=0) is None
    assert stops_at(losses, steps=50) == stopped - 150
    assert stops_at(losses, factor=6.0) is None


def test_a_slowly_rising_loss_does_not_drag_its_level_along() -> None:
    losses = learning(8000)
    losses[4000:] += np.linspace(0, 6, 4000)
    assert stops_at(losses) is not None


def test_running_means_begin_as_plain_means() -> None:
    state = RunState()
    for step, (loss, dice) in enumerate([(4.0, 0.2), (2.0, math.nan), (3.0, 0.4)], 1):
        state.step = step
        follow(state, DivergenceConfig(), loss, dice)
    assert state.loss == pytest.approx(3.0)
    assert state.level == 0.0  # not looked at yet
    assert state.dice == pytest.approx(0.2 + (0.4 - 0.2) / 3)  # NaN is passed over


def test_divergence_stops_a_run_with_its_plan(make_config: Any, tmp_path: Path) -> None:
    settings = {"factor": 1.01, "steps": 4, "after_steps": 3}
    config = make_config(steps=40, divergence=settings, checkpoint_every_s=1e-4, optimiser__gradient_clip=1e9)
    trainer = Trainer(config, tmp_path)
    trainer.run(until=5)
    good = trainer.state.step
    with torch.no_grad():
        for tensor in trainer.plain.parameters():
            tensor.mul_(50)
    with pytest.raises(TrainingError, match=r"stayed above 1\.01 times .* at step \d+; the plans.*offending"):
        trainer.run()
    (plan,) = json.loads((tmp_path / "offending_plan.json").read_text())
    assert Plan.model_validate(plan).index == trainer.state.step - 1
    saved = read_tensors(tmp_path / "state.safetensors")[1]["state"]
    assert good <= saved["step"] < trainer.state.step - 2  # none of the bad steps
    assert saved["above"] == 0


def test_two_deterministic_runs_are_one(make_config: Any, tmp_path: Path) -> None:
    """With several threads as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    class Watching(Trainer):
        def step(self, batch: Any) -> tuple[float, float]:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().step(batch)

    try:
        states = []
        for name in ("a", "b"):
            Watching(make_config(deterministic=True, steps=4), tmp_path / name).run()
            states.append(read_tensors(tmp_path / name / "state.safetensors")[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert seen == [True] * 8
    assert not torch.are_deterministic_algorithms_enabled()


def test_settings_are_as_before_after_a_deterministic_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def fail() -> None:
        with deterministic(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            assert not torch.backends.cudnn.benchmark
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert torch.backends.cudnn.benchmark
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
