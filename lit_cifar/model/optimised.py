"""OptimisedModule: the optimiser and the schedule of a training run, from settings to what the Trainer takes. optim.py
has their arithmetic, module.py the loss."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lit_cifar.errors import UserError
from lit_cifar.model import steps
from lit_cifar.model.data import num_train_batches
from lit_cifar.model.optim import Group, Schedule, lr_factor, make_optimizer
from lit_cifar.model.ranges import ClosedUnitInterval, HalfOpenUnitInterval, NonNegativeFloat, checked


class OptimisedModule(LightningModule):
    """A module whose `net` is trained by SGD, or by groups of SGD and Muon, with a schedule over all steps.

    Args: those of LitClassifier, which says what they mean.

    Raises:
        UserError: a setting is out of its range.
    """

    net: nn.Module

    def __init__(
        self,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        schedule: Schedule,
        warmup: float,
        groups: list[Group] | None,
    ) -> None:
        super().__init__()
        if nesterov and not momentum:
            raise UserError("--model.nesterov true needs --model.momentum above 0")
        self.lr: float = checked("--model.lr", lr, NonNegativeFloat)
        self.momentum: float = checked("--model.momentum", momentum, HalfOpenUnitInterval)
        self.weight_decay: float = checked("--model.weight_decay", weight_decay, NonNegativeFloat)
        self.nesterov = nesterov
        self.schedule: Schedule = schedule
        self.warmup: float = checked("--model.warmup", warmup, ClosedUnitInterval)
        self.groups = groups or []
        for group in self.groups:
            group.check()
        self._planned_steps: int | None = None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer(self.net, self.groups, self.settings(), self._can_fuse())
        if self.schedule == "constant" and not self.warmup:
            return optimizer
        self._planned_steps = self._num_steps()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._lr_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        return lr_factor(step, self.plan_steps(), self.schedule, self.warmup)

    def settings(self) -> list[dict[str, Any]]:
        """Settings of each parameter group; the module's own stand in for those that a group leaves open."""
        own = {name: getattr(self, name) for name in ("lr", "momentum", "weight_decay", "nesterov")}
        return [
            {
                "name": group.name,
                **{key: value if (value := getattr(group, key)) is not None else own[key] for key in own},
            }
            for group in self.groups
        ] or [{"name": "net", **own}]

    def on_train_start(self) -> None:
        """Applies settings changed since the checkpoint, whose own come with a restored optimiser, and plans anew: only
        now is it known where the training run goes on from, and what a search before it has changed."""
        trainer = self.trainer
        # Lightning leaves it at 1 for the rest of an epoch that is resumed in its middle
        trainer.accumulate_grad_batches = steps.accumulation(trainer, trainer.current_epoch)
        self._planned_steps = None
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, torch.optim.SGD) and optimizer.state:
            # it was restored without buffers for weights that had no gradient yet; torch's fused step needs them
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                optimizer.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        if any("swa_lr" in group for group in optimizer.param_groups):
            return  # restored within stochastic weight averaging, which has a schedule of its own
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if not all(isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR) for scheduler in schedulers):
            return  # not of configure_optimizers: such as those with which LearningRateFinder tries rates
        settings = self.settings()
        factor = 1.0
        for scheduler in schedulers:
            scheduler.base_lrs = [setting["lr"] for setting in settings]
            factor = self._lr_factor(scheduler.last_epoch)
        for group, setting in zip(optimizer.param_groups, settings, strict=False):  # a callback may have added some
            group.update({**setting, "lr": setting["lr"] * factor})
            if schedulers:
                group["initial_lr"] = setting["lr"]

    def _can_fuse(self) -> bool:
        # one call for all parameters: 124 instead of 246 us a step for the tutorial's net (one CPU thread, torch 2.15);
        # not with a gradient scaler, and not in mixed precision where gradients are clipped, which Lightning refuses
        trainer = self.trainer
        if trainer.precision == "16-mixed" or ("mixed" in trainer.precision and trainer.gradient_clip_val):
            return False
        return self.device.type in ("cpu", "cuda")

    def plan_steps(self) -> int:
        """`_num_steps`, counted once for the whole training run, whose learning rate and sides follow it."""
        if self._planned_steps is None:
            self._planned_steps = self._num_steps()
        return self._planned_steps

    def _num_steps(self) -> int:
        """Optimiser steps of the whole training run, from where it is: as steps will be made, with what they were.

        Not trainer.estimated_stepping_batches: it knows one accumulation factor only, and asked for here, it makes
        Lightning 2.6 forget the loader's position on resume (pytorch-lightning issue 20550).

        Raises:
            UserError: the training run has no end.
        """
        trainer = self.trainer
        num_batches = num_train_batches(trainer)
        # an epoch without an end may end by steps
        num_steps = trainer.max_steps if math.isinf(num_batches) else steps.steps_at_end(trainer, int(num_batches))
        if num_steps is None or num_steps < 0:
            raise UserError(f"--model.schedule {self.schedule} needs an end: set --max_epochs or --trainer.max_steps")
        return max(1, num_steps)
