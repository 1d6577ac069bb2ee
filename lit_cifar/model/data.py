"""What LitClassifier and the callbacks ask of the Trainer's data module, reached in one place. data/ has the data."""

from collections.abc import Sized
from typing import Any, Protocol

from lightning.pytorch import Trainer

from lit_cifar.data.loader import EvalBatches, TrainBatches
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError


class Data(Protocol):
    """The part of CIFAR10DataModule that is asked for; another data module may have it too."""

    batch_size: int  # images of one optimiser step, on all devices together; the callbacks' figures need it
    num_val: int  # images for validation; the dashboard's layout depends on it

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes."""

    @property
    def train(self) -> Split:
        """The training images, which some nets are initialised from."""

    def train_batches(self) -> Sized:
        """The batches of one epoch, whose number decides the schedule's length."""


def data_of(trainer: Trainer) -> Data:
    """The data module that a Trainer was given.

    Raises:
        UserError: it was given none.
    """
    data: Data | None = getattr(trainer, "datamodule", None)
    if data is None:
        raise UserError(
            "LitClassifier needs a data module, for the names of the classes and the number of batches: give the "
            "Trainer datamodule=CIFAR10DataModule(...), or one of your own with `classes` and `train_batches`"
        )
    return data


def batches_of(trainer: Trainer, stage: str) -> TrainBatches | EvalBatches | None:
    """This rank's batches of 'train', 'val' or 'test', without their pixels; None where nothing is known of them."""
    data: Any = data_of(trainer)
    evaluated = getattr(data, "eval_batches", lambda stage: None)  # of CIFAR10DataModule
    batches = data.train_batches() if stage == "train" else evaluated(stage)
    return batches if isinstance(batches, (TrainBatches, EvalBatches)) else None
