"""Where the data that ships with the package lies: in an installed wheel, or in a checkout."""

from pathlib import Path
from typing import Literal

DataKind = Literal["templates", "pipelines", "weights", "schemes", "samples"]

_PACKAGE_DIR = Path(__file__).resolve().parent
# Kept at the root of the repository, and mapped to synthseg/_data/ in the wheel (pyproject.toml).
_AT_REPOSITORY_ROOT = ("templates", "pipelines")
_IN_PACKAGE = ("weights", "schemes", "samples")


def data_dir(kind: DataKind) -> Path:
    """Return the folder that holds the shipped data of one kind.

    Parameters
    ----------
    kind
        ``templates`` and ``pipelines`` are looked for in the wheel (``synthseg/_data/<kind>``), then in the
        repository beside the package; ``weights``, ``schemes`` and ``samples`` are folders of the package.

    Raises
    ------
    FileNotFoundError
        If this installation has no such folder; the message names every place that was tried.
    ValueError
        If `kind` is not one of the five.
    """
    if kind in _IN_PACKAGE:
        candidates = [_PACKAGE_DIR / kind]
    elif kind in _AT_REPOSITORY_ROOT:
        candidates = [_PACKAGE_DIR / "_data" / kind]
        repository = _PACKAGE_DIR.parent
        # In a wheel the parent is site-packages, where a folder of that name would be somebody else's.
        if (repository / "pyproject.toml").is_file():
            candidates.append(repository / kind)
    else:
        known = ", ".join(_AT_REPOSITORY_ROOT + _IN_PACKAGE)
        raise ValueError(f"unknown kind of data {kind!r}; known kinds: {known}")
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    tried = " nor ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(
        f"this installation of synthseg has no {kind}: no folder {tried}; "
        "install the package again, or run from a complete checkout of the repository"
    )
