"""Segment any head or brain scan with networks trained on synthetic images alone."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("synthseg")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

# Imported when first asked for: PyTorch takes seconds. Type checkers read __init__.pyi.
_HOME = {
    "segment": "synthseg.api",
    "Segmentation": "synthseg.inference",
    "load_model": "synthseg.networks.checkpoint",
    "Volume": "synthseg.volume",
    "load_volume": "synthseg.volume",
}

__all__ = ["Segmentation", "Volume", "__version__", "load_model", "load_volume", "segment"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
