"""Callbacks that break a run on purpose, for the tests to name on a command line. Not collected as tests."""

import os
import signal
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


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


class NoWaiting(Callback):
    """Makes a synchronisation with the GPU an error in the steps between logging."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 10:
            torch.cuda.set_sync_debug_mode("error")
        if batch_idx == 90:
            torch.cuda.set_sync_debug_mode("default")
