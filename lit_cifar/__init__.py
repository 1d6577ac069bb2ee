"""CIFAR-10 with PyTorch Lightning: exact on any number of devices. Importing the package does no work."""

__version__ = "0.1.0"
