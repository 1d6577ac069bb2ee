"""The Trainer's loop over training batches, without the calls of hooks that nobody overrides. model/module.py has what
a step computes; callbacks such as progress.py do what happens around it.

Lightning 2.6 makes some 60 Python calls a step to hooks of the strategy, the precision, the optimiser, the module and
each callback, whether or not they do anything. For the tutorial's net at batch 4 that was a third of a step.
"""

from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lit_cifar import log
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.data.loader import DeviceLoader
from lit_cifar.errors import calls_chosen
from lit_cifar.model.module import LitClassifier

KNOWN_VERSIONS = ("2.6.",)  # of Lightning, whose loop this one replaces; tests/test_loop.py compares the two
HOOKS = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_train_batch_end")


def install(trainer: Trainer) -> None:
    """Gives a Trainer this loop, where Lightning's version is known."""
    # asked where a run goes on: with max_steps Lightning takes an epoch's end for the middle of that epoch
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    if lightning.__version__.startswith(KNOWN_VERSIONS):
        trainer.fit_loop.epoch_loop = LeanEpochLoop(trainer, trainer.min_steps, trainer.max_steps)
    else:
        _explain(f"it is not known to fit Lightning {lightning.__version__}")


def _explain(obstacle: str) -> None:
    log.debug(f"Lightning's own loop takes each step, and the lean loop none: {obstacle}")


class LeanEpochLoop(_TrainingEpochLoop):
    """Does what Lightning's loop does, and leaves the same progress in checkpoints.

    It takes a step itself where LitClassifier decides what happens between a batch and the weights, on one device or on
    several by DDP, and where each batch makes a step. Otherwise, and for the first step after a resume, Lightning's own
    loop does; a debug line says why.
    """

    _obstacle: str | None = None  # why steps are not lean
    _is_plain = True  # whether nothing stands between the backward pass and the optimiser
    _validates = False
    _overriding: dict[str, list[Callback]]

    def _broadcast_sigterm_tensor(self) -> None:
        """Does nothing: Checkpoints stops at signals. Lightning's waits for the device and all ranks in each step."""

    @calls_chosen("in training")
    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        self._validates = super()._should_check_val_epoch()
        callbacks: list[Callback] = self.trainer.callbacks
        self._overriding = {hook: [callback for callback in callbacks if _overrides(callback, hook)] for hook in HOOKS}
        self._is_plain = not (
            getattr(self.trainer.precision_plugin, "scaler", None)
            or self.trainer.gradient_clip_val
            or getattr(self.trainer.strategy, "_model_averager", None)
            or any(_overrides(callback, "on_before_optimizer_step") for callback in callbacks)
        )
        before, self._obstacle = self._obstacle, self._find_obstacle(data_fetcher)
        if self._obstacle and self._obstacle != before and self.trainer.is_global_zero:
            _explain(self._obstacle)

    @calls_chosen("in training")
    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        """Answers at once in an epoch without validation; Lightning asks after each step."""
        return self._validates and super()._should_check_val_fx(data_fetcher)

    @calls_chosen("in training")
    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        if self.trainer.lr_scheduler_configs:
            super().update_lr_schedulers(interval, update_plateau_schedulers)

    def _find_obstacle(self, data_fetcher: _DataFetcher) -> str | None:
        """Why Lightning's own loop must take the steps; None where they can be lean."""
        trainer: Any = self.trainer
        precision, loader = trainer.precision_plugin, trainer.train_dataloader
        # what is wanted, and what it is instead
        conditions = (
            (type(trainer.lightning_module) is LitClassifier, "the module is", trainer.lightning_module),
            (type(trainer.datamodule) is CIFAR10DataModule, "the data module is", trainer.datamodule),
            (isinstance(loader, DeviceLoader), "the training loader is", loader),
            (type(data_fetcher) is _PrefetchDataFetcher, "the data fetcher is", data_fetcher),
            (type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy), "the strategy is", trainer.strategy),
            (type(precision) in (Precision, MixedPrecision), "the precision plugin is", precision),
            (type(trainer.profiler) is PassThroughProfiler, "the profiler is", trainer.profiler),
        )
        for fits, what, found in conditions:
            if not fits:
                return f"{what} {type(found).__name__}"
        if len(trainer.optimizers) != 1:
            return f"there are {len(trainer.optimizers)} optimisers"
        if trainer.accumulate_grad_batches != 1:
            return f"gradients of {trainer.accumulate_grad_batches} batches are accumulated"
        return None

    @calls_chosen("in training")
    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Takes one step; raises StopIteration when there are no more batches."""
        if self._obstacle or self.restarting or self.trainer.accumulate_grad_batches != 1:
            super().advance(data_fetcher)
            return
        trainer: Any = self.trainer
        batch_progress, connector, results = self.batch_progress, trainer._logger_connector, self._results
        if self.val_loop.restarting:
            self.val_loop.restarting = False

        batch = _next_batch(data_fetcher)
        batch_idx = self.batch_idx + 1
        batch_progress.is_last_batch = data_fetcher.done
        batch_progress.increment_ready()
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None
        self._call("on_train_batch_start", batch, batch_idx)
        batch_progress.increment_started()
        loss = self._step(batch, batch_idx)
        batch_progress.increment_processed()
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self._call("on_train_batch_end", {"loss": loss}, batch, batch_idx)
        if results:  # somebody has logged something
            connector.on_batch_end()
        else:
            results.batch = results.batch_size = None
        batch_progress.increment_completed()
        if results:
            connector.update_train_step_metrics()

    @calls_chosen("in training")
    def _step(self, batch: Any, batch_idx: int) -> Tensor:
        """Makes a step of a batch, and returns its loss."""
        trainer: Any = self.trainer
        strategy, optimizer = trainer.strategy, trainer.optimizers[0]
        progress = self.automatic_optimization.optim_progress.optimizer
        scaler = getattr(strategy.precision_plugin, "scaler", None)
        losses: list[Tensor] = []

        def closure() -> Tensor:
            loss: Tensor = strategy.training_step(batch, batch_idx)  # through DDP, where there is one
            losses.append(loss.detach())
            progress.zero_grad.increment_ready()
            self._call("on_before_zero_grad", optimizer)
            progress.zero_grad.increment_started()
            for group in optimizer.param_groups:  # what zero_grad does, in 2 us instead of 25
                for parameter in group["params"]:
                    parameter.grad = None
            progress.zero_grad.increment_completed()
            if scaler:
                loss = scaler.scale(loss)
            self._call("on_before_backward", loss)
            loss.backward()
            self._call("on_after_backward")
            return losses[-1]

        progress.step.increment_ready()
        with torch.enable_grad():
            if self._is_plain:
                optimizer.step(closure)
            else:
                strategy.optimizer_step(optimizer, closure)
        progress.step.increment_completed()
        return losses[-1]

    @calls_chosen("in training")
    def _call(self, hook: str, *args: Any) -> None:
        if not self._overriding[hook]:
            return
        trainer: Any = self.trainer
        module = trainer.lightning_module
        attributes = vars(module)  # a module's own __setattr__ takes 3 us
        attributes["_current_fx_name"] = hook  # for callbacks that log
        for callback in self._overriding[hook]:
            getattr(callback, hook)(trainer, module, *args)
        attributes["_current_fx_name"] = None


def _next_batch(data_fetcher: Any) -> Any:
    """The next batch of the only loader, straight from it: the fetcher and the loaders' combination take 20 us."""
    if data_fetcher.length is None or data_fetcher.done:
        return next(data_fetcher)[0]
    cycle = data_fetcher.iterator._iterator
    batch = next(cycle.iterators[0], None)
    if batch is None:  # sooner than its length said
        data_fetcher.done = True
        raise StopIteration
    cycle._idx += 1
    data_fetcher.fetched += 1
    data_fetcher.done = data_fetcher.fetched >= data_fetcher.length
    return batch


def _overrides(callback: Callback, hook: str) -> bool:
    return hook in vars(callback) or getattr(type(callback), hook) is not getattr(Callback, hook)
