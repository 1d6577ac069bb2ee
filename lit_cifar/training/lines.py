"""Printing while a net trains: whole lines, above the progress bar where there is one, and that bar. What the lines say
is up to the callbacks that print them."""

import sys
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_cifar import log
from lit_cifar.model.module import LitClassifier


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the running loss, which costs no synchronisation beyond that of the logged loss."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}")  # as lines count

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, LitClassifier)
        shown = {}
        if pl_module.running_loss is not None:
            shown["loss"] = f"{pl_module.running_loss:.3f}"
            shown["images/s"] = f"{pl_module.images_per_second:,.0f}"
        if "val" in pl_module.reports:
            shown["val_accuracy"] = f"{100 * pl_module.reports['val'].accuracy:.2f} %"
        return shown


def write(trainer: Trainer, line: str) -> None:
    """Prints what is going on, a whole line on standard output at once."""
    if log.is_said("info"):
        _write(trainer, line, sys.stdout)


def warn(trainer: Trainer, line: str) -> None:
    """Prints what somebody may have to act on, a line on standard error."""
    if log.is_said("warning"):
        print(end="", flush=True)
        _write(trainer, f"lit_cifar: warning: {line}", sys.stderr)


def _write(trainer: Trainer, line: str, file: TextIO) -> None:
    if isinstance(trainer.progress_bar_callback, TQDMProgressBar) and trainer.progress_bar_callback.is_enabled:
        trainer.progress_bar_callback.print(line, file=file)
    else:
        print(f"{line}\n", end="", file=file, flush=True)  # in one piece, between other ranks' lines
