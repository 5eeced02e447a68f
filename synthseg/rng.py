"""The only maker of random generators: (seed, sample index, stage) -> torch.Generator.

Every random draw of the package comes from here, so that sample *i* is a pure function of (seed, *i*) whatever the
number of workers, and adding a draw to one stage does not move those of another.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, index: int, stage: str) -> int:
    """A 63-bit seed from the three keys, the same on every platform."""
    digest = hashlib.blake2b(f"{seed}/{index}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, index: int, stage: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one stage of one sample, on ``device``."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, index, stage))
