"""What keeps a run honest: a stop when the loss runs away, none within a step, and results that do not vary."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch

from synthseg.config.training import DivergenceConfig
from synthseg.training.state import RunState

FAST = 0.02  # weight of a step in the running means: over about 50 steps


def follow(state: RunState, config: DivergenceConfig, loss: float, dice: float) -> bool:
    """Add the loss and Dice of one step to the running means of a state; True if the run has diverged.

    Steps are counted from the start of the run (``state.step``, after the step), where the means are plain means. The
    level is the lowest that the running mean has been since ``after_steps``: a rising loss cannot drag it along.
    """
    if state.loss == 0.0:  # the first step, or a state of an earlier version
        state.loss = loss
    weight = max(FAST, 1 / state.step)
    state.loss += weight * (loss - state.loss)
    state.dice += weight * (dice - state.dice) if math.isfinite(dice) else 0.0
    if state.step <= config.after_steps:
        return False
    state.level = min(state.level, state.loss) if state.level > 0 else state.loss
    far = state.level > 0 and state.loss > config.factor * state.level  # of a loss below zero there is no "times"
    state.above = state.above + 1 if far else 0
    return 0 < config.steps <= state.above


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when what is inside is done, or when they come a second time."""
    if threading.current_thread() is not threading.main_thread():  # signals are no business of other threads
        yield
        return
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        if number in came:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        came.append(number)

    try:
        for number, handler in before.items():
            if handler is not None:  # one that was not set by Python cannot be set again
                signal.signal(number, wait)
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only algorithms that give the same result each time, inside; as it was before, outside.

    cuBLAS needs a fixed workspace for it (``CUBLAS_WORKSPACE_CONFIG``), which is set if the user has not set it.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
