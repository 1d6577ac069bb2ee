"""CIFAR-10 with PyTorch Lightning: exact on any number of devices. Importing the package does no work."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_cifar.data.datamodule import CIFAR10DataModule
    from lit_cifar.model.classifier import load
    from lit_cifar.model.module import LitClassifier

__all__ = ["CIFAR10DataModule", "LitClassifier", "load"]
__version__ = "0.1.0"

_MODULES = {
    "CIFAR10DataModule": "lit_cifar.data.datamodule",
    "LitClassifier": "lit_cifar.model.module",
    "load": "lit_cifar.model.classifier",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, so that a look at the version need not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
