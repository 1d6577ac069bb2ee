"""PlateauModule: tells a ReduceLROnPlateau of ours what it follows, at the same step whether or not a run was stopped
in between. optimised.py makes it, and every other scheduler."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch.optim import lr_scheduler

from lit_cifar.errors import UserError, calls_chosen


class PlateauModule(LightningModule):
    """A module whose optimiser has the scheduler that was made with it as `lit_cifars_schedule`."""

    _has_followed = False  # in this epoch
    _followed: dict[str, float]  # what it will follow, by name, as a state said

    def begin_following(self) -> None:
        """Before the first step: what a state knew is known again, and the validation that it was due to is made."""
        self._has_followed = False
        known = {name: torch.tensor(value) for name, value in self._followed.items()}
        self.trainer.callback_metrics.update(known)
        self._followed = {}
        self._validate_what_is_due()

    def follow_at_start(self, config: Any) -> None:
        """Makes up for what our scheduler was not told when the state was saved.

        Raises:
            UserError: it follows what was known at an epoch's end only.
        """
        if self._follows(config.scheduler):
            self._follow_at_last(config)
        elif isinstance(config.scheduler, lr_scheduler.ReduceLROnPlateau):
            known = self.trainer.callback_metrics.get(str(config.monitor))
            if config.scheduler.last_epoch < self.trainer.global_step and known is not None:
                config.scheduler.step(known)  # the state was saved before Lightning told it

    def _follow_at_last(self, config: Any) -> None:
        """Where the state was saved after an epoch's last step, and before that: Lightning takes such an epoch as done,
        and leaves its validation out."""
        loop: Any = self.trainer.fit_loop.epoch_loop
        is_validated = loop.restarted_on_last and self.trainer.fit_loop.restarted_mid_epoch
        is_due = config.scheduler.last_epoch < (self.current_epoch + is_validated) // config.frequency
        is_at_end = loop.batch_progress.is_last_batch and (loop.restarted_on_train_batch_end or is_validated)
        if not (is_due and is_at_end):
            return
        if not config.monitor.startswith("val/"):
            raise UserError(
                f"the state was saved in an epoch's last step, before {config.monitor} was there, which "
                "ReduceLROnPlateau follows: go on with another state"
            )
        self._validate()
        self._has_followed = False

    def _validate_what_is_due(self) -> None:
        """Validates where a state was saved within an epoch, after a batch and before the validation that follows it,
        which Lightning leaves out: its values would be missing, and so would the best state be."""
        loop: Any = self.trainer.fit_loop.epoch_loop
        is_within = loop.restarted_on_train_batch_end and not loop.batch_progress.is_last_batch
        if is_within and _TrainingEpochLoop._should_check_val_fx(loop, self.trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            loop.val_loop.restarting = False
            self._validate()

    def _validate(self) -> None:
        self.trainer.validating = True
        self.trainer.fit_loop.epoch_loop.val_loop.run()
        self.trainer.training = True

    def follow(self, of: str = "") -> None:
        """Tells our ReduceLROnPlateau, at the end of an epoch, the value that it follows, if it begins with `of`.

        Lightning does so after states are saved, and not at the end of an epoch that was resumed in its middle, so that
        a resumed run would go on with another rate.
        """
        for config in self.trainer.lr_scheduler_configs:
            value = self.trainer.callback_metrics.get(str(config.monitor))
            if self._follows(config.scheduler) and value is not None and str(config.monitor).startswith(of):
                config.scheduler.step(value)  # type: ignore[arg-type]
                self._has_followed = True

    def on_train_epoch_end(self) -> None:
        frequencies = [config.frequency for config in self.trainer.lr_scheduler_configs]
        if not self._has_followed and all((self.current_epoch + 1) % frequency == 0 for frequency in frequencies):
            self.follow()
        self._has_followed = False

    @calls_chosen("in training")
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not self._follows(scheduler):
            super().lr_scheduler_step(scheduler, metric)

    def _follows(self, scheduler: Any) -> bool:
        """Whether it is ours and a ReduceLROnPlateau of epochs; Lightning tells one of steps what it follows."""
        is_ours = scheduler is getattr(self.trainer.optimizers[0], "lit_cifars_schedule", None)
        is_plateau = is_ours and isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        return is_plateau and self.trainer.lr_scheduler_configs[0].interval == "epoch"

    def what_is_followed(self) -> dict[str, float]:
        """What our scheduler will be told next, by name, where it is known already: for a state."""
        if self._trainer is None or self._has_followed:
            return {}
        known = self._trainer.callback_metrics
        names = {str(config.monitor) for config in self._trainer.lr_scheduler_configs}
        return {name: float(known[name]) for name in names & known.keys()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        followed = checkpoint.get("followed")
        followed = followed if isinstance(followed, dict) else {}
        self._followed = {str(name): value for name, value in followed.items() if isinstance(value, (int, float))}
