"""Random streams that follow from a key alone. What is drawn from them is decided in split.py and loader.py."""

import hashlib

import torch


def make_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `key` alone, e.g. (seed, epoch, 'order').

    The key is hashed, because torch's CPU generator keeps 32 bits of a seed: (seed << 32) + epoch would lose the seed.
    """
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """A seed 0..2**32-1 that depends on `key` alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")
