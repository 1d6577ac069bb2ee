"""Architectures: one short file each, with its citation. Losses, optimisers and data live elsewhere."""

from lit_cifar.nets.resnet import ResNet18
from lit_cifar.nets.speednet import SpeedNet
from lit_cifar.nets.tutorial import Net

__all__ = ["Net", "ResNet18", "SpeedNet"]
