"""Random streams: stable, and independent of each other."""

import hashlib

import torch

from synthseg.rng import derive_seed, generator


def test_seed_is_the_hash_of_its_keys() -> None:
    digest = hashlib.blake2b(b"3/17/deform", digest_size=8).digest()
    assert derive_seed(3, 17, "deform") == int.from_bytes(digest, "little") // 2
    assert 0 <= derive_seed(-5, 10**9, "x") < 2**63


def test_keys_are_not_mixed_up() -> None:
    seeds = {derive_seed(s, i, stage) for s in range(12) for i in range(12) for stage in ("", "a", "1", "1/a")}
    # "1/a" of seed s and index i is no other triple: only stages with a slash could collide, and none is named so
    assert len(seeds) == 12 * 12 * 4


def test_streams_are_reproducible_and_apart() -> None:
    def draw(*keys: object) -> torch.Tensor:
        return torch.rand(4, generator=generator(*keys))  # type: ignore[arg-type]

    first = draw(1, 2, "a")
    torch.manual_seed(0)
    assert torch.equal(draw(1, 2, "a"), first)
    for other in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b")):
        assert not torch.equal(draw(*other), first)


def test_global_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    torch.rand(3, generator=generator(0, 0, "a"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_streams_are_uncorrelated() -> None:
    draws = torch.stack([torch.rand((), generator=generator(0, i, "deform")) for i in range(1000)]).double()
    assert abs(draws.mean() - 0.5) < 0.04
    assert abs(torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1]) < 0.1
