"""The command line: a thin layer over functions with the same names and arguments. Each command has its module."""

# In the order of --help.
# isort: off
from synthseg.cli import segment, init, train, generate, templates, priors, info

# isort: on
from synthseg.cli.base import app, main, run

__all__ = ["app", "generate", "info", "init", "main", "priors", "run", "segment", "templates", "train"]
