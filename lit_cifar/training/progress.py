"""Loss, speed and the lines that a person reads while a net trains. watch.py judges the figures, dashboard.py draws."""

import contextlib
import math
import os
import shutil
import sys
import time
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lit_cifar import log
from lit_cifar.data.loader import DeviceLoader
from lit_cifar.errors import DivergedError, UserError
from lit_cifar.model.module import LitClassifier
from lit_cifar.results.report import peak_memory
from lit_cifar.run.folder import Run
from lit_cifar.training.watch import Watch


class RunningLoss(Callback):
    """Logs loss, gradient norm, learning rates and speed, prints the running loss, the speed and the time left, warns
    of what Watch finds in them, and stops a training whose loss or gradients are no longer finite.

    Losses stay on the device until they are logged, so that nothing waits for the device between logging steps. Each
    mean is over all ranks and all steps since the one before. Times leave out validation and what else happens between
    two epochs.

    Args:
        every_n_steps: steps of an epoch between two printed lines; shorter epochs print one at their end.
    """

    def __init__(self, every_n_steps: int = 2000) -> None:
        if every_n_steps < 1:
            raise UserError(f"--running_loss.every_n_steps {every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self._losses: list[Tensor] = []  # of the steps since they were summed, on the device
        self._logged = [0.0, 0]  # sum and count since the last time, summed over ranks, in float64
        self._printed = [0.0, 0]
        self._logged_step = 0
        self._waited_seconds = 0.0
        self._watches = {"logged": Stopwatch(), "printed": Stopwatch()}
        self._watch = Watch()
        self.run: Run | None = None  # set by the command
        self.train_started = 0.0  # on time.perf_counter's clock
        self.first_step_seconds = 0.0  # with what comes with it once: warming up, compiling

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_every = int(trainer.log_every_n_steps) or self.every_n_steps  # type: ignore[attr-defined]
        self._losses = []
        self._logged_step = trainer.global_step
        self._watch = Watch()
        if trainer.is_global_zero:
            num_parameters = sum(parameter.numel() for parameter in pl_module.parameters())
            folder = f"; run folder {self.run.folder}" if self.run else ""
            write(trainer, f"training {num_parameters:,} parameters{folder}")
        self.train_started, self.first_step_seconds = time.perf_counter(), 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for watch in self._watches.values():
            watch.go_on()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def _pause(self) -> None:
        for watch in self._watches.values():
            watch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitClassifier)
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            report = pl_module.reports["val"]
            write(
                trainer,
                f"epoch {trainer.current_epoch + 1}  validation accuracy {100 * report.accuracy:.2f} %, "
                f"loss {report.loss:.3f}",
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.first_step_seconds:
            self.first_step_seconds = time.perf_counter() - self.train_started
        self._losses.append(outputs["loss"])
        for watch in self._watches.values():
            watch.num_batches += 1
        step_in_epoch, num_steps = batch_idx + 1, int(trainer.num_training_batches)
        prints = step_in_epoch % self.every_n_steps == 0 or (trainer.is_last_batch and num_steps < self.every_n_steps)
        step = trainer.global_step
        logs = step % self._log_every == 0 or (trainer.is_last_batch and num_steps < self._log_every)
        logs = logs and step != self._logged_step  # with accumulated gradients a step has several batches
        if prints or logs or len(self._losses) == self._log_every or trainer.is_last_batch:
            self._collect(trainer, batch_idx)
        if logs:
            self._log(trainer, pl_module)
        if prints:
            assert isinstance(pl_module, LitClassifier)
            running_loss = pl_module.running_loss = self._printed[0] / self._printed[1]
            self._printed = [0.0, 0]
            num_batches, seconds = self._watches["printed"].read()
            seconds_a_batch = seconds / max(1, num_batches)
            pl_module.images_per_second = _batch_size(trainer) / max(seconds_a_batch, 1e-9)
            if trainer.is_global_zero:
                width = len(f"{num_steps:,}")
                write(
                    trainer,
                    f"epoch {trainer.current_epoch + 1}  step {step_in_epoch:>{width},} of {num_steps:,}  "
                    f"loss {running_loss:.3f}  {pl_module.images_per_second:,.0f} images/s"
                    f"{_time_left(trainer, batch_idx, seconds_a_batch)}",
                )

    def _collect(self, trainer: Trainer, batch_idx: int) -> None:
        if not self._losses:
            return
        losses, self._losses = torch.stack(self._losses), []
        precise = losses if losses.device.type == "mps" else losses.double()  # mps has no float64
        total = float(trainer.strategy.reduce(precise.sum(), reduce_op="sum")) / trainer.world_size
        total *= trainer.accumulate_grad_batches  # by which Lightning has divided the loss of each batch
        if not torch.isfinite(torch.tensor(total)):
            self._stop(trainer, losses, batch_idx)
        for window in (self._logged, self._printed):
            window[0] += total
            window[1] += len(losses)

    def _stop(self, trainer: Trainer, losses: Tensor, batch_idx: int) -> None:
        finite = losses.isfinite()
        first = int(finite.long().argmin()) if not bool(finite.all()) else len(losses)
        steps_ago = trainer.strategy.reduce(
            torch.tensor(float(len(losses) - 1 - first), device=losses.device), reduce_op="max"
        )
        step = trainer.global_step - int(steps_ago)
        raise DivergedError(
            f"the loss is not finite at step {step} (epoch {trainer.current_epoch + 1}, batch "
            f"{batch_idx + 1 - int(steps_ago)}): {self._way_out()}"
        )

    def _way_out(self) -> str:
        kept = self.run.checkpoint("last") if self.run else None
        return (
            f"go on from {kept} with --resume and a smaller --lr"
            if kept and kept.is_file()
            else "choose a smaller --lr"
        )

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged_step = trainer.global_step
        metrics = {"train/loss": self._logged[0] / self._logged[1]}
        self._logged = [0.0, 0]
        if isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):  # others give a rank parts of gradients
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            norm = metrics["train/gradient_norm"] = torch.nn.utils.get_total_norm(gradients).item()
            # a gradient scaler finds such gradients by itself, leaves out the step, and goes on with a smaller scale
            if not math.isfinite(norm) and getattr(trainer.precision_plugin, "scaler", None) is None:
                raise DivergedError(
                    f"the gradients are not finite at step {trainer.global_step} (epoch {trainer.current_epoch + 1}), "
                    f"though the loss is: {self._way_out()}"
                )
        for group in trainer.optimizers[0].param_groups:
            metrics[f"lr/{group['name']}"] = group["lr"]
        waited = waited_seconds(trainer)
        num_batches, seconds = self._watches["logged"].read()
        if num_batches and seconds:
            metrics["speed/images_per_second"] = num_batches * _batch_size(trainer) / seconds
            metrics["speed/step_ms"] = 1000 * seconds / num_batches * trainer.accumulate_grad_batches
            metrics["speed/data_wait_ms"] = 1000 * (waited - self._waited_seconds) / num_batches
        self._waited_seconds = waited
        for name, num_bytes in peak_memory().items():
            if num_bytes is not None:
                metrics[f"speed/peak_{name}_memory_mb"] = num_bytes / 1e6
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if trainer.is_global_zero:
            self._look(trainer, pl_module, metrics)

    def _look(self, trainer: Trainer, pl_module: LightningModule, metrics: dict[str, float]) -> None:
        assert isinstance(pl_module, LitClassifier)
        step, loader = trainer.global_step, trainer.train_dataloader
        found = [self._watch.loss(step, metrics["train/loss"], len(pl_module.classes))]
        if isinstance(loader, DeviceLoader) and "speed/step_ms" in metrics:
            wait_ms = metrics["speed/data_wait_ms"] * trainer.accumulate_grad_batches
            num_cores = os.cpu_count() or 1
            found.append(self._watch.data(step, wait_ms, metrics["speed/step_ms"], loader.num_workers, num_cores))
        if self.run is not None:
            with contextlib.suppress(OSError):  # whoever writes there says what is wrong with the folder
                last, folder = self.run.checkpoint("last"), self.run.folder
                num_bytes = last.stat().st_size if last.is_file() else 0
                found.append(self._watch.disk(step, folder, shutil.disk_usage(folder).free, num_bytes))
        for warning in filter(None, found):
            warn(trainer, warning)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # called on every rank: what is on the devices is summed, so that a resumed run's means are those of the whole
        self._collect(trainer, trainer.fit_loop.epoch_loop.batch_idx)
        checkpoint["running_loss"] = {"logged": self._logged, "printed": self._printed}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("running_loss", {"logged": [0.0, 0], "printed": [0.0, 0]})
        self._logged, self._printed = list(state["logged"]), list(state["printed"])


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


class Stopwatch:
    """Seconds and batches since it was last read, pauses left out."""

    def __init__(self) -> None:
        self.num_batches = 0
        self._seconds = 0.0
        self._since: float | None = None  # None while paused

    def go_on(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def read(self) -> tuple[int, float]:
        """(batches, seconds), and starts anew."""
        running = self._since is not None
        self.pause()
        read = self.num_batches, self._seconds
        self.num_batches, self._seconds = 0, 0.0
        if running:
            self.go_on()
        return read


def _batch_size(trainer: Trainer) -> int:
    return int(trainer.datamodule.batch_size)  # type: ignore[attr-defined]


def waited_seconds(trainer: Trainer) -> float:
    loader = trainer.train_dataloader
    return loader.waited_seconds if isinstance(loader, DeviceLoader) else 0.0


def _time_left(trainer: Trainer, batch_idx: int, seconds_a_batch: float) -> str:
    """Of the training, for the end of a line; nothing where its end is not known."""
    num_batches = int(trainer.num_training_batches)
    left = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        left.append((trainer.max_epochs - trainer.current_epoch) * num_batches - batch_idx - 1)
    if trainer.max_steps >= 0:
        left.append((trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
    if not left:
        return ""
    seconds = round(max(0, min(left)) * seconds_a_batch)
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return f"  {hours} h {minutes % 60} min left"
    return f"  {minutes} min {seconds % 60} s left" if minutes else f"  {seconds} s left"


def write(trainer: Trainer, line: str) -> None:
    """Says what goes on: a whole line to standard output at once, above the progress bar where there is one."""
    if log.is_said("info"):
        _write(trainer, line, sys.stdout)


def warn(trainer: Trainer, line: str) -> None:
    """Says what someone may have to do something about, in a line on standard error."""
    if log.is_said("warning"):
        sys.stdout.flush()
        _write(trainer, f"lit_cifar: warning: {line}", sys.stderr)


def _write(trainer: Trainer, line: str, file: TextIO) -> None:
    if isinstance(trainer.progress_bar_callback, TQDMProgressBar) and trainer.progress_bar_callback.is_enabled:
        trainer.progress_bar_callback.print(line, file=file)
    else:
        file.write(line + "\n")
        file.flush()
