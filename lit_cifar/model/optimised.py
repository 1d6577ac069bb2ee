"""OptimisedModule: the optimiser and the schedule of a training run, from settings to what the Trainer takes. optim.py
has their arithmetic, plateau.py what a ReduceLROnPlateau is told, module.py the loss."""

import inspect
import math
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import lr_scheduler

from lit_cifar import log
from lit_cifar.errors import UserError, calls_chosen
from lit_cifar.model import steps
from lit_cifar.model.chosen import class_of, default_of, make_optimizer, one_line
from lit_cifar.model.data import num_train_batches
from lit_cifar.model.optim import OPTIONS, Group, Schedule, lr_factor
from lit_cifar.model.plateau import PlateauModule
from lit_cifar.run.trust import is_plain
from lit_cifar.run.write import plain

Interval = Literal["step", "epoch"]
CYCLES = (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)  # which go by steps, and have a rate of their own: max_lr


class OptimisedModule(PlateauModule):
    """A module whose `net` is trained by SGD, by groups of SGD and Muon, or by an optimiser and a scheduler of the
    user's, with a schedule over all steps. LitClassifier says what its settings mean."""

    net: nn.Module
    lr: float
    momentum: float | None
    weight_decay: float | None
    nesterov: bool | None

    def take_settings(self, given: dict[str, Any]) -> None:
        """Takes those of LitClassifier's arguments that the optimiser and the schedule have, once the net is there.

        Raises:
            UserError: two contradict each other, or the user's optimiser cannot be made.
        """
        self.schedule: Schedule = given["schedule"]
        self.warmup: float = given["warmup"]
        self.groups: list[Group] = given["groups"] or []
        self._optimizer, self._scheduler = given["optimizer"], given["scheduler"]
        self.scheduler_interval, self.scheduler_monitor = given["scheduler_interval"], given["scheduler_monitor"]
        self._planned_steps: int | None = None
        self._followed = {}
        self._made_for: tuple[float, int | None] | None = None  # rate and length that the user's scheduler was made for
        for key, default in OPTIONS.items():  # what is None for an optimiser of the user's is up to it
            setattr(self, key, default if given[key] is None and self._optimizer is None else given[key])
        largest: Any = getattr(self._scheduler, "keywords", {}).get("max_lr")
        self.sets_rates_itself = largest is not None
        if self.sets_rates_itself:
            largest = largest[0] if isinstance(largest, (list, tuple)) else largest
            if given["lr"] not in (None, largest) or any(group.lr is not None for group in self.groups):
                raise UserError(
                    f"--model.scheduler sets the rates itself, up to its max_lr {largest}: leave --model.lr and the "
                    "groups' lr out; max_lr may be a list, with one for each group"
                )
            self.lr = float(largest)
        if self.nesterov and self.momentum == 0:
            raise UserError("--model.nesterov true needs --model.momentum above 0")
        if self._scheduler and (self.schedule != "constant" or self.warmup):
            raise UserError("--model.scheduler takes the place of --model.schedule and --model.warmup: leave these out")
        for key in ("scheduler_interval", "scheduler_monitor"):
            if given[key] and not self._scheduler:
                raise UserError(f"--model.{key} {given[key]} needs --model.scheduler")
        if not self.has_own_optimizer:
            self._check_effect(given)
        elif self._optimizer is not None:
            self._settle()

    def _check_effect(self, given: dict[str, Any]) -> None:
        """Says which settings a subclass that makes its own optimiser leaves without effect, as far as its code tells.

        Raises:
            UserError: an optimiser or a scheduler is among them.
        """
        kinds = [kind for kind in type(self).__mro__ if not kind.__module__.startswith(("lit_cifar.", "lightning."))]
        functions = [inspect.unwrap(value) for kind in kinds for value in vars(kind).values() if callable(value)]
        codes = [function.__code__ for function in functions if inspect.isfunction(function)]
        known: set[Any] = set()
        for code in codes:
            known |= {*code.co_names, *code.co_consts}
            codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
        if "configure_optimizers" in known:
            return  # it calls ours
        name, own = type(self).__name__, "makes its own optimizer in configure_optimizers"
        for key in ("optimizer", "scheduler"):
            if given[key] is not None:
                raise UserError(
                    f"--model.{key} has no effect: {name} {own}; leave it out, or call super().configure_optimizers()"
                )
        defaults = {**OPTIONS, "schedule": "constant", "warmup": 0.0, "groups": None}
        changed = [key for key, default in defaults.items() if given[key] not in (None, default)]
        if lost := [] if "hparams" in known else [f"--model.{key}" for key in changed if key not in known]:
            log.warn(f"{', '.join(lost)} may have no effect: {name} {own}")

    def _settle(self) -> None:
        """Makes the user's optimiser once, before anything is written, for its learning rate and what is wrong with it.

        Raises:
            UserError: it cannot be made, lacks a setting, or has another value for it than the module.
        """
        optimizer = self._make()
        named = getattr(optimizer, "named", optimizer)
        for key, theirs in named.defaults.items():
            ours = getattr(self, key) if key in OPTIONS else None
            if ours is not None and theirs not in (ours, default_of(type(named), key)):
                raise UserError(
                    f"--model.{key} {ours} and --model.optimizer.{key} {theirs} contradict each other: give one of "
                    f"them, or add --model.{key} null"
                )
        if self.lr is None:
            self.lr = float(named.defaults.get("lr", named.param_groups[0]["lr"]))

    def note_optimizer(self, settings: dict[str, Any]) -> None:
        """Puts into a config's settings of the model the numbers that they leave open; the rate stands there once."""
        for key in settings.keys() & OPTIONS.keys():
            if settings[key] is None:
                settings[key] = getattr(self, key)
        named = settings.get("optimizer")  # the name alone, of a function without settings
        arguments = (named.get("init_args") if isinstance(named, dict) else None) or {}
        if "lr" in arguments and self._optimizer is not None:
            arguments["lr"] = self.lr
            if default_of(class_of(self._optimizer), "lr") is not inspect.Parameter.empty:
                del arguments["lr"]

    @property
    def has_own_optimizer(self) -> bool:
        """Whether the optimiser is made here, and not by a subclass."""
        return type(self).configure_optimizers is OptimisedModule.configure_optimizers

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer: Any = self._make()
        configured: dict[str, Any]
        optimizer.lit_cifars_schedule = None  # by which it is known as ours
        if self._scheduler is not None:
            configured = self._make_scheduler(optimizer)
        elif self.schedule == "constant" and not self.warmup:
            made: torch.optim.Optimizer = optimizer
            return made
        else:
            self._planned_steps = self._num_steps(f"--model.schedule {self.schedule}")
            scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: self._lr_factor(step))
            configured = {"scheduler": scheduler, "interval": "step"}
        optimizer.lit_cifars_schedule = configured["scheduler"]
        return {"optimizer": optimizer, "lr_scheduler": configured}  # type: ignore[return-value]

    def _make(self) -> torch.optim.Optimizer:
        fused = self._optimizer is None and not self.groups and self._can_fuse()
        return make_optimizer(self.net, self.groups, self.settings(), fused, self._optimizer)

    @calls_chosen("when the scheduler was made")
    def _make_scheduler(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The user's scheduler, as the Trainer takes it."""
        assert self._scheduler is not None
        kind, keywords = class_of(self._scheduler), getattr(self._scheduler, "keywords", {})
        more: dict[str, Any] = {}
        is_planned = keywords.get("total_steps") or keywords.get("epochs")
        if kind and issubclass(kind, lr_scheduler.OneCycleLR) and not is_planned:
            more["total_steps"] = self._num_calls(self.scheduler_interval or "step")
        self._made_for = self.lr, more.get("total_steps")
        try:
            scheduler = self._scheduler(optimizer, **more)
        except Exception as error:
            raise UserError(f"--model.scheduler cannot be made: {one_line(error)}") from error
        name = type(scheduler).__name__
        if not isinstance(scheduler, lr_scheduler.LRScheduler):
            raise UserError(f"--model.scheduler gives {name}, no scheduler of torch.optim.lr_scheduler")
        self._check_state(scheduler)
        configured: dict[str, Any] = {"scheduler": scheduler}
        configured["interval"] = self.scheduler_interval or ("step" if isinstance(scheduler, CYCLES) else "epoch")
        self._check_length(scheduler, configured["interval"])
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            configured["monitor"] = self.scheduler_monitor or getattr(scheduler, "monitor", "val/loss")
            if configured["monitor"].startswith("val/"):
                if configured["interval"] == "step":
                    raise UserError("--model.scheduler_interval step: a validation's values change with epochs only")
                configured["frequency"] = self.trainer.check_val_every_n_epoch or 1
        elif self.scheduler_monitor:
            raise UserError(f"--model.scheduler_monitor {self.scheduler_monitor}: {name} watches nothing; leave it out")
        return configured

    @staticmethod
    def _check_state(scheduler: lr_scheduler.LRScheduler) -> None:
        """Raises UserError where a scheduler's state cannot be saved: it would be noticed by whoever resumes."""
        name = type(scheduler).__name__
        try:
            state = plain(scheduler.state_dict())
        except Exception as error:
            raise UserError(f"--model.scheduler: the state of {name} cannot be saved: {one_line(error)}") from error
        wrong = [repr(key) for key, value in state.items() if not is_plain(value, (torch.Tensor, tuple))]
        if wrong:
            raise UserError(
                f"--model.scheduler: the state of {name} cannot be saved, for what it has in {', '.join(wrong)}: give "
                "it a state_dict() of numbers, texts, lists and dicts, and a load_state_dict()"
            )

    def _num_calls(self, interval: Interval) -> int:
        """How often a scheduler is called in the whole training run.

        Raises:
            UserError: the training run has no end.
        """
        if interval == "step":
            return self._num_steps("--model.scheduler OneCycleLR")
        if (self.trainer.max_epochs or -1) < 0:
            raise UserError("--model.scheduler_interval epoch needs an end: set --max_epochs")
        return int(self.trainer.max_epochs or 0)

    def _check_length(self, scheduler: Any, interval: Interval) -> None:
        """Raises UserError where OneCycleLR would be called after its end, which torch does not allow."""
        if isinstance(scheduler, lr_scheduler.OneCycleLR):
            num_calls = self._num_calls(interval)
            if scheduler.total_steps < num_calls:
                raise UserError(
                    f"OneCycleLR ends after {scheduler.total_steps} {interval}s, and the training run has {num_calls}: "
                    "a run goes on with the end that it began with; give a new one no total_steps"
                )

    def _lr_factor(self, step: int) -> float:
        return lr_factor(step, self.plan_steps(), self.schedule, self.warmup)

    def settings(self) -> list[dict[str, Any]]:
        """Settings of each parameter group; the module's own stand in for those that a group leaves open. What both
        leave open is None: it is up to the user's optimiser."""
        own = {key: getattr(self, key) for key in OPTIONS}
        given = [{key: value for key, value in vars(group).items() if value is not None} for group in self.groups]
        return [{key: {**own, **group}[key] for key in ("name", *own)} for group in given] or [{"name": "net", **own}]

    def on_train_start(self) -> None:
        """Applies settings changed since the checkpoint, whose own come with a restored optimiser, and plans anew: only
        now is it known where the training run goes on from, and what a search before it has changed.

        An optimiser that this module did not make stays as it is."""
        trainer = self.trainer
        # Lightning leaves it at 1 for the rest of an epoch that is resumed in its middle
        trainer.accumulate_grad_batches = steps.accumulation(trainer, trainer.current_epoch)
        self._planned_steps = None
        self.begin_following()
        optimizer: Any = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        if not hasattr(optimizer, "lit_cifars_schedule"):
            return
        if self._optimizer is None and isinstance(optimizer, torch.optim.SGD) and optimizer.state:
            # it was restored without buffers for weights that had no gradient yet; torch's fused step needs them
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                optimizer.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        if any("swa_lr" in group for group in optimizer.param_groups):
            return  # restored within stochastic weight averaging, which has a schedule of its own
        schedule = optimizer.lit_cifars_schedule
        configs = trainer.lr_scheduler_configs
        if [config.scheduler for config in configs] != ([schedule] if schedule else []):
            return  # not of configure_optimizers: such as those with which LearningRateFinder tries rates
        if self._scheduler is None:
            self._apply_settings(optimizer, schedule)
        elif trainer.global_step == 0 and self._made_for != self._wanted(configs[0].interval):
            self._apply_settings(optimizer, None)
            for group in optimizer.param_groups:
                group.pop("initial_lr", None)
            configs[0].scheduler = optimizer.lit_cifars_schedule = self._make_scheduler(optimizer)["scheduler"]
        else:
            self._check_length(schedule, configs[0].interval)  # type: ignore[arg-type]
            self.follow_at_start(configs[0])

    def _wanted(self, interval: Any) -> tuple[float, int | None]:
        length = self._made_for[1] if self._made_for else None
        return self.lr, length and self._num_calls(interval)

    def _apply_settings(self, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        """Gives an optimiser's groups the settings of a new one, but for what optimisers keep there besides."""
        new = self._make()
        keys = {"name", *OPTIONS, *inspect.signature(type(getattr(new, "named", new))).parameters} - {"params"}
        factor = self._lr_factor(schedule.last_epoch) if schedule else 1.0
        for group, made in zip(optimizer.param_groups, new.param_groups, strict=False):  # a callback may add
            group.update({key: value for key, value in made.items() if key in keys})
            if schedule:
                group["initial_lr"] = made["lr"]
                group["lr"] = made["lr"] * factor
        if schedule:
            schedule.base_lrs = [group["lr"] for group in new.param_groups]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the states of schedulers readable to whoever resumes, ours and weight averaging's. Keeps what a
        ReduceLROnPlateau will be told next, where it is known already."""
        checkpoint["lr_schedulers"] = plain(checkpoint.get("lr_schedulers", []))
        checkpoint["followed"] = self.what_is_followed()
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and isinstance(state.get("scheduler_state"), dict):
                state["scheduler_state"] = plain(state["scheduler_state"])

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
            self._planned_steps = self._num_steps(f"--model.schedule {self.schedule}")
        return self._planned_steps

    def _num_steps(self, what: str = "--model.sides") -> int:
        """Optimiser steps of the whole training run, from where it is: as steps will be made, with what they were.

        Not trainer.estimated_stepping_batches: it knows one accumulation factor only, and asked for here, it makes
        Lightning 2.6 forget the loader's position on resume (pytorch-lightning issue 20550).

        Args:
            what: needs to know them, for messages.

        Raises:
            UserError: the training run has no end.
        """
        trainer = self.trainer
        num_batches = num_train_batches(trainer)
        # an epoch without an end may end by steps
        num_steps = trainer.max_steps if math.isinf(num_batches) else steps.steps_at_end(trainer, int(num_batches))
        if num_steps is None or num_steps < 0:
            raise UserError(f"{what} needs an end: set --max_epochs or --trainer.max_steps")
        return max(1, num_steps)
