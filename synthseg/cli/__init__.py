"""The command line: a thin layer over functions with the same names and arguments. Each command has its module."""

# In the order of --help.
# isort: off
from synthseg.cli import (
    segment,
    init,
    train,
    pretrain,
    finetune,
    generate,
    features,
    synthesize_t1,
    correct_bias,
    templates,
    priors,
    info,
)

# isort: on
from synthseg.cli.base import app, main, run

__all__ = [
    "app",
    "correct_bias",
    "features",
    "finetune",
    "generate",
    "info",
    "init",
    "main",
    "pretrain",
    "priors",
    "run",
    "segment",
    "synthesize_t1",
    "templates",
    "train",
]
