"""Segment any head or brain scan with networks trained on synthetic images alone."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("synthseg")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
