"""Callbacks that break a run on purpose, for the tests to name on a command line. Not collected as tests."""

import os
import signal
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_cifar.errors import UserError


class KillAt(Callback):
    """Ends this process with SIGKILL, as a cluster would, when it is about to take a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Bug(Callback):
    """Fails as a programming error does."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise AssertionError("a bug of ours")


class ScaleWeights(Callback):
    """Multiplies the net's weights at a step, as a learning rate that is far too large may."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                for weight in pl_module.parameters():
                    weight.mul_(self.factor)


class SpoilGradients(Callback):
    """Puts an infinite number among the gradients of a step whose loss is finite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 == self.step:
            gradient = next(pl_module.parameters()).grad
            assert gradient is not None
            gradient.view(-1)[0] = torch.inf


class SlowTransform(torch.nn.Module):
    """Takes its time for each image, on one rank or on all."""

    def __init__(self, seconds: float, rank: int | None = None) -> None:
        super().__init__()
        self.seconds, self.rank = seconds, rank

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if self.rank in (None, int(os.environ.get("LOCAL_RANK", "0"))):
            time.sleep(self.seconds)
        return image


class KillBeforeMeeting(Callback):
    """Rank 1 of a node ends a rank with SIGKILL before the ranks have met."""

    def __init__(self, rank: int) -> None:
        if os.environ.get("LOCAL_RANK") == "1":
            os.kill(os.getpid() if rank == 1 else os.getppid(), signal.SIGKILL)
            time.sleep(600)


class FailOnRank(Callback):
    """A fault that the user can fix, on one rank alone."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == 2:
            raise UserError("this rank alone")


class FaultyTransform(torch.nn.Module):
    """Kills the process that applies it with a signal, or raises."""

    def __init__(self, signal: int = 0) -> None:
        super().__init__()
        self.signal = signal

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if torch.utils.data.get_worker_info() is not None:
            if not self.signal:
                raise KeyError("no\nsuch pixel")
            os.kill(os.getpid(), self.signal)
        return image


class RefusesArguments(Callback):
    """Cannot be made."""

    def __init__(self, width: int = 1) -> None:
        raise ValueError("width must be even")


class LogsAValue(Callback):
    """Logs a value of its own."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("own/value", 1.0)


class RefusesAnImage(torch.nn.Module):
    """A transform that fails on some of the images, and not on the first."""

    num_images = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.num_images += 1
        if self.num_images == 30:
            raise ValueError("a bad image")
        return image


class WithoutUse(torch.nn.Module):
    """A net with a parameter that no step uses."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(3072, num_classes), torch.nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.used(images.flatten(1))


class NoMemory(Callback):
    """Runs out of memory on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == 2:
            raise MemoryError
