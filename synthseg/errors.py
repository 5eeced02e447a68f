"""Errors that a user can mend. Each message says what was got, what was expected, and how to mend it.

The command line prints such an error as one line on stderr and exits with code 2; any other exception is an
internal error (exit code 3).
"""

from __future__ import annotations


class SynthSegError(Exception):
    """Base of every error that is the input's or the user's, not the program's."""


class InputError(SynthSegError):
    """A file or array that cannot be used: missing, damaged, of the wrong shape or without content."""


class OutputError(SynthSegError):
    """A result that cannot be written where it was asked for."""


class LabelError(SynthSegError):
    """A label id, scheme or relation between schemes that does not exist."""


class TemplateError(SynthSegError):
    """A template folder that does not hold what a template must."""


class ConfigError(SynthSegError):
    """A recipe, preset or option with a wrong key or value."""


class CheckpointError(SynthSegError):
    """A weights file that is missing, damaged or made for something else."""


class DeviceError(SynthSegError):
    """A device that was asked for and is not there. Never replaced by another device silently."""


class MemoryShortageError(SynthSegError):
    """The machine, container or job has too little memory for what was asked."""


class TrainingError(SynthSegError):
    """A training run that cannot go on, for example because the loss is not finite."""
