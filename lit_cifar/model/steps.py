"""How many optimiser steps and batches a training run takes, counted as Lightning takes them. optim.py has the learning
rate of each step."""

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def accumulation(trainer: Trainer, epoch: int) -> int:
    """How many batches' gradients make one optimiser step in an epoch, of which the first is 0."""
    scheduler = _scheduler(trainer)
    return scheduler.get_accumulate_grad_batches(epoch) if scheduler else int(trainer.accumulate_grad_batches)


def limited(num_batches: int, limit: float) -> int:
    """Batches of an epoch under --trainer.limit_train_batches: a number of batches, or as a float a share of them."""
    return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)


def left(trainer: Trainer, num_batches: int) -> tuple[int, int] | None:
    """Optimiser steps and batches from where the Trainer is to the end of its training run; None where it has no end.

    Early stopping and Timer may end it sooner.

    Args:
        trainer: on its way, or not begun.
        num_batches: of one epoch, within its limit.
    """
    epoch, batch = _position(trainer)
    last_epoch = math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
    max_steps = math.inf if trainer.max_steps < 0 else trainer.max_steps - _steps_taken(trainer)
    if last_epoch == max_steps == math.inf:
        return None
    num_steps = num_given = 0
    while num_batches and epoch < last_epoch and num_steps < max_steps:
        factor = accumulation(trainer, epoch)
        # the rest of an epoch that has begun, or all epochs up to the next change at once
        num_alike = 1 if batch else min([last_epoch, *_changes_after(trainer, epoch)]) - epoch
        # an epoch's last batch ends a step in any case
        of_epoch = -(-num_batches // factor) - batch // factor if batch < num_batches else 0
        if num_steps + num_alike * of_epoch >= max_steps:
            full, rest = divmod(int(max_steps) - num_steps, of_epoch)
            within = min((batch // factor + rest) * factor, num_batches) - batch if rest else 0
            return int(max_steps), num_given + full * (num_batches - batch) + within
        num_steps += int(num_alike) * of_epoch
        num_given += int(num_alike) * (num_batches - batch)
        epoch, batch = epoch + int(num_alike), 0
    return num_steps, num_given


def steps_at_end(trainer: Trainer, num_batches: int) -> int | None:
    """Optimiser steps of the whole training run: those that were taken and those that are left."""
    rest = left(trainer, num_batches)
    return None if rest is None else _steps_taken(trainer) + rest[0]


def _steps_taken(trainer: Trainer) -> int:
    return int(getattr(trainer, "global_step", 0))


def _scheduler(trainer: Trainer) -> GradientAccumulationScheduler | None:
    """The last one decides, since each sets the factor when an epoch begins."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    found = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    return found[-1] if found else None


def _changes_after(trainer: Trainer, epoch: int) -> list[int]:
    scheduler = _scheduler(trainer)
    return [change for change in scheduler.epochs if change > epoch] if scheduler else []


def _position(trainer: Trainer) -> tuple[int, int]:
    """Epochs that are done, and batches of the next."""
    loop = getattr(trainer, "fit_loop", None)
    if loop is None:
        return 0, 0
    epochs = loop.epoch_progress.current
    return epochs.processed, loop.epoch_loop.batch_progress.current.ready if epochs.started > epochs.processed else 0
