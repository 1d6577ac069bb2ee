"""Follows a training run by its loss: sums it, logs figures, prints lines, and stops where it is no longer finite.
speed.py measures time, watch.py judges the figures, lines.py prints, dashboard.py draws."""

import math
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lit_cifar import clock
from lit_cifar.errors import DivergedError, calls_chosen
from lit_cifar.model.data import data_of
from lit_cifar.model.module import LitClassifier, named_for
from lit_cifar.results.report import peak_memory
from lit_cifar.run.folder import Run
from lit_cifar.settings import PositiveInt, checked
from lit_cifar.training.lines import warn, write
from lit_cifar.training.speed import Speed, time_left, waited_seconds
from lit_cifar.training.watch import Watch


class Progress(Callback):
    """Logs loss, gradient norm, learning rates and speed, prints the running loss, the speed and the time left, warns
    of what Watch finds in them, and stops a training run whose loss or gradients are no longer finite.

    Losses stay on the device until they are logged, so that nothing waits for the device between logging steps. Each
    mean is over all ranks and all steps since the one before. The learning rates of step N are those that it was taken
    with, and the gradient norm is that of its gradients, clipped where they are. Times leave out validation and what
    else happens between two epochs.

    Callbacks find in `trainer.callback_metrics` what Lightning's own `log(on_step=True, on_epoch=True)` leaves there:
    `train/loss` is the newest step's, and from the last step of an epoch on the mean over that epoch; `lr/GROUP` and
    `train/gradient_norm` are those last logged. A module whose training_step gives no loss has none.

    Args:
        every_n_steps: steps of an epoch between two printed lines; shorter epochs print one at their end.
    """

    logs_loss = True  # so that the module need not

    def __init__(self, every_n_steps: PositiveInt = 2000) -> None:
        self.every_n_steps: int = checked("--running_loss.every_n_steps", every_n_steps, PositiveInt)
        self.run: Run | None = None  # the command sets it; without one the disk is not watched
        self.train_started = 0.0  # on time.perf_counter's clock
        self._stepped = False
        self._losses: list[Tensor] = []  # of the steps since they were summed, on the device
        self._logged = [0.0, 0]  # sum and count since the last time, summed over ranks, in float64
        self._printed = [0.0, 0]
        self._of_epoch = [0.0, 0]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_every = int(trainer.log_every_n_steps) or self.every_n_steps  # type: ignore[attr-defined]
        self._losses = []
        self._logged_step = trainer.global_step
        self._speeds = {"logged": Speed(), "printed": Speed()}
        self._watch = Watch()
        self._metrics: dict[str, Tensor] = trainer.callback_metrics
        self._rates = _rates(trainer)  # of the newest step; after it the scheduler moves them
        watched = {getattr(callback, "monitor", None) for callback in trainer.callbacks}  # type: ignore[attr-defined]
        # whether a callback watches the loss of each step, which has a part on each rank
        self._shares = trainer.world_size > 1 and "train/loss" in watched
        self._publish(named_rates(trainer, self._rates))
        if trainer.is_global_zero:
            num_parameters = sum(parameter.numel() for parameter in pl_module.parameters())
            folder = f"; run folder {self.run.folder}" if self.run else ""
            write(trainer, f"training {num_parameters:,} parameters{folder}")
            if trainer.limit_val_batches == 0 and (num_val := data_of(trainer).num_val):
                warn(
                    trainer,
                    f"--trainer.limit_val_batches 0: the {num_val:,} images of --data.num_val are neither trained on "
                    "nor looked at, and no best state is chosen",
                )
        self.train_started, self._stepped = time.perf_counter(), False
        if self.run is not None:
            clock.note("start", self.train_started - self.run.started)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clock.start("steps")  # the epoch's first batch has a part in them

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        clock.start("steps")
        self._rates = _rates(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clock.stop("steps", trainer.strategy.root_device)

    on_validation_start = on_train_end = on_train_epoch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitClassifier)
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            report = pl_module.reports["val"]
            write(
                trainer,
                f"epoch {trainer.current_epoch + 1}  validation accuracy {100 * report.accuracy:.2f} %, "
                f"loss {report.loss:.3f}",
            )
            if warning := self._watch.validation(trainer.global_step, report):
                warn(trainer, warning)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._stepped:
            clock.wait_for(trainer.strategy.root_device)
            clock.note("first_step", time.perf_counter() - self.train_started)
            self._stepped = True
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs  # of a module's own training_step
        if loss is not None:
            loss = loss.detach() if loss.requires_grad else loss
            self._losses.append(loss)
            loss = trainer.strategy.reduce(loss.clone(), reduce_op="mean") if self._shares else loss
            factor = trainer.accumulate_grad_batches  # by which Lightning has divided it
            self._metrics["train/loss"] = loss if factor == 1 else loss * factor
        for speed in self._speeds.values():
            speed.count()
        step_in_epoch, num_steps = batch_idx + 1, int(trainer.num_training_batches)
        prints = step_in_epoch % self.every_n_steps == 0 or (trainer.is_last_batch and num_steps < self.every_n_steps)
        step = trainer.global_step
        logs = step % self._log_every == 0 or (trainer.is_last_batch and num_steps < self._log_every)
        logs = logs and step != self._logged_step  # with accumulated gradients a step has several batches
        if prints or logs or len(self._losses) == self._log_every or trainer.is_last_batch:
            self._collect(trainer, batch_idx)
        if logs:
            self._log(trainer, pl_module)
        if trainer.is_last_batch and self._of_epoch[1]:
            self._publish({"train/loss": self._of_epoch[0] / self._of_epoch[1]})
            self._of_epoch = [0.0, 0]
        if prints:
            self._print(trainer, pl_module, batch_idx)

    def _collect(self, trainer: Trainer, batch_idx: int) -> None:
        """Sums the losses that are still on the devices, over all ranks."""
        if not self._losses:
            return
        losses, self._losses = torch.stack(self._losses), []
        precise = (losses.cpu() if losses.device.type == "mps" else losses).double()  # mps has no float64
        total = float(trainer.strategy.reduce(precise.sum(), reduce_op="sum")) / trainer.world_size
        # by which Lightning has divided the loss of each batch; the same for all, since an epoch's end sums too
        total *= trainer.accumulate_grad_batches
        if not math.isfinite(total):
            self._stop(trainer, losses, batch_idx)
        for window in (self._logged, self._printed, self._of_epoch):
            window[0] += total
            window[1] += len(losses)

    def _stop(self, trainer: Trainer, losses: Tensor, batch_idx: int) -> None:
        finite = losses.isfinite()
        first = int(finite.long().argmin()) if not bool(finite.all()) else len(losses)
        batches_ago = trainer.strategy.reduce(
            torch.tensor(float(len(losses) - 1 - first), device=losses.device), reduce_op="max"
        )
        batch, factor = batch_idx + 1 - int(batches_ago), trainer.accumulate_grad_batches
        taken = -(-(batch_idx + 1) // factor) if trainer.is_last_batch else (batch_idx + 1) // factor  # of this epoch
        step = trainer.global_step - taken + -(-batch // factor)  # that the batch is, or would have been, part of
        raise DivergedError(
            f"the loss is not finite at step {step} (epoch {trainer.current_epoch + 1}, batch {batch}): "
            f"{self._way_out()}"
        )

    def _way_out(self) -> str:
        last = self.run.checkpoint("last") if self.run else None
        if last is None or not last.is_file():
            return "choose a smaller --lr"
        return f"go on from {last} with --resume and a smaller --lr"

    @calls_chosen("when figures were logged")
    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        num_steps, self._logged_step = trainer.global_step - self._logged_step, trainer.global_step
        metrics = {"train/loss": self._logged[0] / self._logged[1]} if self._logged[1] else {}
        self._logged, figures = [0.0, 0], named_rates(trainer, self._rates)
        if isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):  # others give a rank parts of gradients
            figures["train/gradient_norm"] = self._gradient_norm(trainer, pl_module)
        self._publish(figures)
        metrics |= figures
        pace = self._speeds["logged"].read(waited_seconds(trainer))
        batches_per_step = pace.num_batches / num_steps
        metrics |= pace.figures(data_of(trainer).batch_size, batches_per_step)
        for name, num_bytes in peak_memory().items():
            if num_bytes is not None:
                metrics[f"speed/peak_{name}_memory_mb"] = num_bytes / 1e6
        for logger in trainer.loggers:
            logger.log_metrics(named_for(logger, metrics), step=trainer.global_step)
        if trainer.is_global_zero:
            for warning in self._watch.figures(trainer, pl_module, metrics, batches_per_step, self.run):
                warn(trainer, warning)

    def _publish(self, figures: dict[str, float]) -> None:
        self._metrics.update({name: torch.tensor(value) for name, value in figures.items()})

    def _gradient_norm(self, trainer: Trainer, pl_module: LightningModule) -> float:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        # a gradient scaler finds such gradients by itself, leaves out the step, and goes on with a smaller scale
        if not math.isfinite(norm) and getattr(trainer.precision_plugin, "scaler", None) is None:
            raise DivergedError(
                f"the gradients are not finite at step {trainer.global_step} (epoch {trainer.current_epoch + 1}), "
                f"though the loss is: {self._way_out()}"
            )
        return norm

    def _print(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        assert isinstance(pl_module, LitClassifier)
        loss = pl_module.running_loss = self._printed[0] / self._printed[1] if self._printed[1] else None
        self._printed = [0.0, 0]
        pace = self._speeds["printed"].read(waited_seconds(trainer))
        speed = pl_module.images_per_second = pace.images_per_second(data_of(trainer).batch_size)
        if trainer.is_global_zero:
            num_steps = f"{int(trainer.num_training_batches):,}"
            step = f"{batch_idx + 1:>{len(num_steps)},}"
            parts = [
                f"epoch {trainer.current_epoch + 1}",
                f"step {step} of {num_steps}",
                "" if loss is None else f"loss {loss:.3f}",
                f"{speed:,.0f} images/s",
                time_left(trainer, pace.seconds_per_batch),
            ]
            write(trainer, "  ".join(filter(None, parts)))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # called on every rank: what is on the devices is summed, so that a resumed run's means are those of the whole
        self._collect(trainer, trainer.fit_loop.epoch_loop.batch_idx)
        checkpoint["running_loss"] = {"logged": self._logged, "printed": self._printed, "epoch": self._of_epoch}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("running_loss", {})
        windows = (list(state.get(key, (0.0, 0))) for key in ("logged", "printed", "epoch"))
        self._logged, self._printed, self._of_epoch = windows


def _rates(trainer: Trainer) -> list[float]:
    return [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]


def named_rates(trainer: Trainer, rates: list[float]) -> dict[str, float]:
    """Learning rates as lr/NAME, by the group's name, else by the optimiser's class; numbered where names repeat."""
    named: dict[str, float] = {}
    groups = [(optimizer, group) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for (optimizer, group), rate in zip(groups, rates, strict=False):  # a callback may have added a group
        name = f"lr/{group.get('name') or type(optimizer).__name__}"
        num_before = sum(key == name or key.startswith(f"{name}-") for key in named)
        named[f"{name}-{num_before}" if num_before else name] = float(rate)
    return named
