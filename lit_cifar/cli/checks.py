"""What is refused before a run begins, because Lightning takes it silently or complains when work is done. parser.py
checks each setting's type; blame.py words what is found out too late for this."""

import os
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
)
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.errors import UserError
from lit_cifar.model.check import check_training as check_net
from lit_cifar.model.module import LitClassifier
from lit_cifar.run.save import Checkpoints
from lit_cifar.run.write import DurableCheckpointIO
from lit_cifar.text import printable

# smallest value of settings that Lightning divides by or compares with, whatever they are
SMALLEST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1e-9,
    "log_every_n_steps": 0,
    "gradient_clip_val": 0,
    "min_epochs": 0,
    "min_steps": 0,
}
NUM_NAMES = 12  # of logged values, in a message


def check_ranges(settings: Any) -> None:
    """Checks the numbers among the Trainer's settings.

    Raises:
        UserError: one is out of range, or two contradict each other.
    """
    if settings["barebones"]:
        raise UserError(
            "--trainer.barebones true leaves out the states and figures that a run consists of: leave it out; bench "
            "measures recipes"
        )
    for name, smallest in SMALLEST.items():
        value = settings[name]
        if isinstance(value, (int, float)) and not value >= smallest:  # times are texts
            bound = f"{smallest} or more" if isinstance(smallest, int) else "above 0"
            raise UserError(f"--trainer.{name} {value} is out of range: choose {bound}")
    for what in ("epochs", "steps"):
        least, most = settings[f"min_{what}"], settings[f"max_{what}"]
        if least is not None and most is not None and 0 <= most < least:
            raise UserError(
                f"--trainer.min_{what} {least} is more than --trainer.max_{what} {most}: change one of them"
            )


def check_mps(settings: Any) -> None:
    """Checks the Trainer's settings on a Mac, where they choose Apple's GPU.

    Raises:
        UserError: they want something of it that it has not.
    """
    if not MPSAccelerator.is_available() or settings["accelerator"] not in ("auto", "gpu", "mps"):
        return
    way_out = "leave it out, or add --accelerator cpu"
    if str(settings["devices"]) not in ("1", "auto", "-1", "[0]"):
        raise UserError(f"--devices {settings['devices']}: Apple's GPU is one device: {way_out}")
    if int(settings["num_nodes"]) > 1:
        raise UserError(f"--num_nodes {settings['num_nodes']}: Apple's GPU trains in one process: {way_out}")
    if str(settings["precision"]) in ("64", "64-true"):
        raise UserError(f"--precision {settings['precision']}: Apple's GPU has no float64: {way_out}")


def check_port() -> None:
    """Checks the port that several processes meet at, where the environment names one.

    Raises:
        UserError: it is none.
    """
    port = os.environ.get("MASTER_PORT", "1")
    if not (port.isdecimal() and 0 <= int(port) < 2**16):
        raise UserError(f"MASTER_PORT={printable(port)} is no port: unset it, or choose a number from 1 to 65535")


def with_writer(plugins: list[Any]) -> list[Any]:
    """The Trainer's plugins with the one that writes states, alone or within AsyncCheckpointIO.

    Raises:
        UserError: another one is to write them, which may leave half a state.
    """
    writer: Any = next((plugin for plugin in plugins if isinstance(plugin, CheckpointIO)), None)
    if writer is None:
        return [*plugins, DurableCheckpointIO()]
    while isinstance(writer, AsyncCheckpointIO):
        writer.checkpoint_io = DurableCheckpointIO()  # which keeps what it has
        writer = writer.checkpoint_io
    if not isinstance(writer, DurableCheckpointIO):
        raise UserError(
            f"--trainer.plugins: {type(writer).__name__} may leave half a state where a run is killed: leave it out, "
            "or make it a subclass of lit_cifar.run.write.DurableCheckpointIO"
        )
    return plugins


def check_launcher(trainer: Trainer, strategy: Any) -> None:
    """Checks that the processes of a strategy, if there are several, begin like this one.

    Raises:
        UserError: they are copies, such as those of ddp_spawn and ddp_notebook: what they learn stays in them.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UserError(f"--strategy {strategy} is for notebooks, and its results stay in copies: use --strategy ddp")


def check_training(trainer: Trainer, module: LitClassifier, data: CIFAR10DataModule) -> None:
    """Checks, once the data are known, that the net can be trained on them and that callbacks get what they watch.

    Raises:
        UserError: it is not so.
    """
    batches = data.train_batches()
    check_limits(trainer, data.num_batches())
    # on GPUs SyncBatchNorm looks at the whole batch
    num_ranks = 1 if trainer.strategy.root_device.type == "cuda" else trainer.world_size
    sizes = {batches.num_in_batch(batch) for batch in (0, max(0, len(batches) - 1))}
    check_net(module, {share for size in sizes for share in (size // num_ranks, -(-size // num_ranks))})
    check_callbacks(trainer, module)
    check_monitors(trainer, module, data.classes, validates=bool(data.num_val and trainer.limit_val_batches))


def check_limits(trainer: Trainer, num_batches: dict[str, int]) -> None:
    """Checks that shares of batches are a batch at least, which Lightning refuses when it comes to them: in the test.

    Args:
        trainer: with the limits.
        num_batches: by stage.

    Raises:
        UserError: a share is less than a batch.
    """
    for stage, num in num_batches.items():
        name = f"limit_{stage}_batches"
        limit = getattr(trainer, name)
        if trainer.overfit_batches and stage != "test":  # type: ignore[attr-defined]
            name = "overfit_batches"  # which sets the limits
        if isinstance(limit, float) and 0 < limit * num < 1:
            raise UserError(
                f"--trainer.{name} {limit} of {num} batches is no batch: choose {1 / num:.3g} or more, "
                "or a whole number of batches"
            )


def check_callbacks(trainer: Trainer, module: LitClassifier) -> None:
    """Checks that the module has what callbacks of Lightning's change in it.

    Raises:
        UserError: it has not, or what they leave could not be loaded again.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning) and not callback._make_pruning_permanent:
            raise UserError(
                "the callback ModelPruning: states with make_pruning_permanent false fit no net again: leave it out"
            )
        if isinstance(callback, BackboneFinetuning) and not hasattr(module, "backbone"):
            raise UserError(
                f"the callback BackboneFinetuning: {type(module).__name__} has no backbone: train a class of your own "
                "that has one, or a subclass of BaseFinetuning"
            )
        if type(callback) is BaseFinetuning:
            raise UserError("the callback BaseFinetuning does nothing by itself: make it a subclass that does")


def check_monitors(trainer: Trainer, module: LitClassifier, classes: tuple[str, ...], validates: bool) -> None:
    """Checks that what a scheduler and callbacks watch will be there; where somebody's own code may log it, nothing is
    known.

    Args:
        trainer: with all its callbacks.
        module: whose learning rates they may watch.
        classes: names of the classes.
        validates: whether there are validation images.

    Raises:
        UserError: one watches a value that will not be there.
    """
    of_validation = ["val/accuracy", "val/loss", "val/calibration_error", *(f"val/accuracy/{name}" for name in classes)]
    of_validation = of_validation if validates else []
    watched: list[tuple[str, Any, list[str]]] = []  # by whom, what, of which
    configured: Any = module.configure_optimizers() if module.has_own_optimizer else None
    if isinstance(configured, dict):
        value = configured["lr_scheduler"].get("monitor")
        watched.append(("--model.scheduler_monitor", value, ["train/loss", *of_validation]))
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    packages = {type(callback).__module__.split(".")[0] for callback in callbacks}
    logs_more = any(isinstance(callback, LearningRateMonitor) for callback in callbacks)
    if packages <= {"lightning", "lit_cifar"} and type(module) is LitClassifier and not logs_more:
        rates = [f"lr/{group['name']}" for group in module.settings()]
        for callback in callbacks:
            if isinstance(callback, Checkpoints) and validates:
                watched.append(("--checkpoint.monitor", callback.monitor, of_validation))
            if isinstance(callback, ModelCheckpoint) or (isinstance(callback, EarlyStopping) and callback.strict):
                logged = ["train/loss", "train/gradient_norm", *rates, *of_validation]
                watched.append((f"the callback {type(callback).__name__}:", callback.monitor, logged))
    for who, value, names in watched:
        if value is None or value in names:
            continue
        if not validates and str(value).startswith("val"):
            raise UserError(f"{who} there is no {printable(value)} without validation: add --data.num_val 5000")
        shown = ", ".join(map(printable, names[:NUM_NAMES])) + (", ..." if len(names) > NUM_NAMES else "")
        raise UserError(f"{who} {printable(value)} is not logged: choose one of {shown}")
