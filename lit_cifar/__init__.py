"""CIFAR-10 with PyTorch Lightning: exact on any number of devices. Importing the package does no work."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_cifar.model.classifier import load

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":  # imports torch, which a look at the version need not wait for
        from lit_cifar.model.classifier import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
