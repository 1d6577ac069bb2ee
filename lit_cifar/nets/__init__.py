"""Architectures: one short file each, with its citation. Losses, optimisers and data live elsewhere."""

from lit_cifar.nets.tutorial import Net

__all__ = ["Net"]
