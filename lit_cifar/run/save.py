"""When the states of a training run are saved, and which one is the best. write.py writes them, stop.py says when a run
stops."""

import contextlib
import math
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_cifar import clock, log
from lit_cifar.errors import DivergedError, UserError, calls_chosen
from lit_cifar.files import write_durably, writing
from lit_cifar.run.folder import Run
from lit_cifar.run.read import read_checkpoint
from lit_cifar.run.stop import STOP_SIGNALS, Agreement, Stopped
from lit_cifar.run.write import get_random_state, keep, restore_callbacks, set_random_state, way_out

OWN_NAME = re.compile(r"(last|best|final)(-\d+)?\.ckpt")  # of files that Checkpoints writes


class OpenRun(Callback):
    """Tells each rank the run's folder, and Lightning's own callbacks, which write there then; writes config.yaml.

    Args:
        run: whose folder rank 0 has claimed.
        config: the settings.
    """

    def __init__(self, run: Run, config: dict[str, Any]) -> None:
        self.run = run
        self.config = config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = str(self.run.folder) if trainer.is_global_zero else ""
        self.run.adopt(*trainer.strategy.broadcast((folder, self.run.identity)))
        trainer._default_root_dir = str(self.run.folder)  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            name = f"{getattr(callback, 'filename', None)}.ckpt"
            if isinstance(callback, ModelCheckpoint) and (callback.save_last or OWN_NAME.fullmatch(name)):
                callback.dirpath = callback.dirpath or str(self.run.checkpoint("last").with_name("ModelCheckpoint"))
        if isinstance(trainer.precision_plugin, DoublePrecision):
            pl_module.double()  # Lightning does so when it has read a state, half of whose digits are gone then
        if trainer.is_global_zero and stage == "fit":
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            with writing(self.run.config, "choose another place with --trainer.default_root_dir"):
                write_durably(self.run.config, text.encode())


class Checkpoints(Checkpoint):
    """Keeps states in the run's `checkpoints/`: `last.ckpt`, the newest, and `best.ckpt`, the best in validation; also
    `final.ckpt`, where another callback changes the weights after the last step, as weight averaging does.

    At SIGTERM or SIGUSR1, whichever rank gets it, all ranks save after the same step and stop.

    Args:
        every_n_train_steps: optimiser steps between two saves; the end of the training run is saved besides.
        every_n_minutes: minutes between two saves, besides; null is off.
        epoch_end_seconds: the end of an epoch is saved besides when the newest state is that old, or older than the
            best; 0 saves each.
        num_kept: how many of the newest states are kept: `last.ckpt`, and before it `last-1.ckpt`, `last-2.ckpt`, ...
        monitor: the logged value that `best.ckpt` follows, where there is validation.
        mode: whether its largest ('max') or smallest ('min') value is best.
    """

    def __init__(
        self,
        every_n_train_steps: int = 1000,
        every_n_minutes: float | None = None,
        epoch_end_seconds: float = 30.0,
        num_kept: int = 2,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
    ) -> None:
        for flag, value, valid in (
            ("every_n_train_steps", every_n_train_steps, every_n_train_steps >= 1),
            ("every_n_minutes", every_n_minutes, every_n_minutes is None or every_n_minutes > 0),
            ("epoch_end_seconds", epoch_end_seconds, epoch_end_seconds >= 0),
            ("num_kept", num_kept, num_kept >= 1),
        ):
            if not valid:
                raise UserError(f"--checkpoint.{flag} {value} is out of range; see --help")
        self.every_n_train_steps = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.epoch_end_seconds = epoch_end_seconds
        self.num_kept = num_kept
        self.monitor = monitor
        self.mode = mode
        self._signal: int | None = None  # the newest that came, set by the handler and by nothing else
        self._agreement = Agreement()
        self._saved_at = 0.0  # when last.ckpt was saved, on time.monotonic's clock
        self._saved_step = 0  # that it is of
        self.run: Run | None = None  # set by the command; without one nothing is saved
        self.best_score: float | None = None  # of best.ckpt, in the line of states that this run goes on from
        self.best_step: int | None = None
        self.stopped = False  # whether a callback has ended the training run, and not its last epoch or step
        self._seen_step = 0  # with accumulated gradients, only the first batch end at a step is a step's end
        self._random_states: list[dict[str, Any]] = []
        self._saved_weights: list[tuple[int, int]] = []  # by _versions, of last.ckpt
        self._fit_started = 0.0  # on time.perf_counter's clock

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = number

    def _take_signals(self) -> None:
        # Over Lightning's handlers, which work at once: a checkpoint in mid-step, a broadcast that other ranks do not
        # join. Lightning puts back what was there before the run.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_started = time.perf_counter()
        trainer.should_stop = trainer.should_stop or self.stopped

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_signals()  # and does nothing at one: a test is short

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_signals()
        if self.run is not None:
            if trainer.is_global_zero:
                for unfinished in self.run.checkpoint("last").parent.glob(".*.part"):  # of a run killed in a save
                    with contextlib.suppress(OSError):
                        unfinished.unlink()
            if self.best_score is not None and not self.has_best(trainer):
                self.best_score = self.best_step = None
        restore_callbacks(trainer, pl_module)
        self._agreement = Agreement()
        self._saved_at = time.monotonic()
        self._saved_step = self._seen_step = trainer.global_step
        if len(self._random_states) == trainer.world_size:  # on another number of ranks the draws cannot be continued
            set_random_state(self._random_states[trainer.global_rank])
        self._random_states = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        # The end of an epoch is saved in on_train_epoch_end. Saved there, a stop in mid-epoch would count as its end.
        if trainer.is_last_batch:
            return
        interrupted, due = self._agree()
        stops = _is_ended(trainer) or step == trainer.max_steps
        if stops or due or interrupted or step % self.every_n_train_steps == 0:
            self._save(trainer, "last")
        if interrupted:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_last_batch:
            if trainer.global_step > self._saved_step:  # ended by what is asked after this callback
                self._save_within_epoch(trainer)
            return
        due = (
            time.monotonic() - self._saved_at >= self.epoch_end_seconds
            or (self.best_step or 0) > self._saved_step  # a run resumed before its best would have to give that up
            or trainer.global_step % self.every_n_train_steps == 0
            or _is_over(trainer)
        )
        interrupted, due = self._agree(due, wait=True)
        if interrupted or due:
            self._save(trainer, "last")
            interrupted, _ = self._agree(wait=True)  # a signal may have come meanwhile
        if interrupted:
            self._stop(trainer)

    def _save_within_epoch(self, trainer: Trainer) -> None:
        # Lightning counts an epoch as done however it ends, and a resumed run would leave out its other batches
        epochs: Any = trainer.fit_loop.epoch_progress
        for count in (epochs.current, epochs.total):
            count.processed -= 1
        try:
            self._save(trainer, "last")
        finally:
            for count in (epochs.current, epochs.total):
                count.processed += 1

    def _agree(self, due: bool = False, wait: bool = False) -> tuple[bool, bool]:
        """Whether any rank got a signal, and whether one thinks that it is time for a save; the same on all ranks."""
        seconds = time.monotonic() - self._saved_at
        due = due or (self.every_n_minutes is not None and seconds >= 60 * self.every_n_minutes)
        return self._agreement.ask(self._signal is not None, due, wait=wait)

    def _stop(self, trainer: Trainer) -> None:
        _wait_for_saves(trainer)
        name = signal.Signals(self._signal).name if self._signal else "a signal to another rank"
        way_on = f"; go on with --resume {self.run.checkpoint('last')}" if self.run else ""
        raise Stopped(f"stopped by {name} after step {trainer.global_step}{way_on}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning calls checkpoint callbacks last: what others change at the end is changed by now
        if self.run is None:
            return
        if trainer.global_step > self._saved_step:  # ended by what is asked after this callback, such as the module
            self._save(trainer, "last")
        if not self._saved_weights:
            return
        _wait_for_saves(trainer)
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            return  # others give a rank parts of the weights
        changed = trainer.is_global_zero and _versions(pl_module) != self._saved_weights
        if trainer.strategy.broadcast(changed and not _holds(self.run.checkpoint("last"), pl_module)):
            self._save(trainer, "final")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            names = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"--checkpoint.monitor {self.monitor} is not logged: choose one of {names}")
        score = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        # no other score would be better than nan
        if not math.isnan(score) and (self.best_score is None or sign * score > sign * self.best_score):
            self.best_score, self.best_step = score, trainer.global_step
            self._save(trainer, "best")
        if _is_ended(trainer) and not trainer.is_last_batch:  # by this validation, within an epoch
            self._save(trainer, "last")

    def has_best(self, trainer: Trainer) -> bool:
        """Whether best.ckpt is there and was chosen in the line of states that this run goes on from; ask on all ranks.

        It may be of another run, or of states that were given up for an earlier one.
        """
        assert self.run is not None
        _wait_for_saves(trainer)
        path, is_ours = self.run.checkpoint("best"), False
        if trainer.is_global_zero and self.best_score is not None and path.exists():
            is_ours = self._is_ours("best", self.best_step, self.best_score)
            if not is_ours:
                log.warn(f"{path} is not the best of the states that this run goes on from: the best is chosen anew")
        return bool(trainer.strategy.broadcast(is_ours))

    def has_final(self, trainer: Trainer) -> bool:
        """Whether final.ckpt is there and of this run's last step; ask on all ranks."""
        return bool(trainer.strategy.broadcast(trainer.is_global_zero and self._is_ours("final", trainer.global_step)))

    def _is_ours(self, name: str, step: int | None, score: float | None = None) -> bool:
        """Whether a state is there, whole, of this run, and of a step and with a best score, where these are known."""
        assert self.run is not None
        try:
            state = read_checkpoint(self.run.checkpoint(name))
        except UserError:
            return False
        fits = step in (None, state.step) and score in (None, state.chosen.get("best_score"))
        return fits and state.identity == self.run.identity

    @calls_chosen("when a state was saved")
    def _save(self, trainer: Trainer, name: str) -> None:
        if self.run is None:
            return
        path = self.run.checkpoint(name)
        with clock.timed("save", trainer.strategy.root_device):
            _wait_for_saves(trainer)
            if name == "last":
                if trainer.is_global_zero:
                    with writing(path, way_out(path)):
                        self.run.set_results_aside()
                        keep(path, self.num_kept)
                self._saved_weights = _versions(trainer.lightning_module)
            self.stopped = name == "last" and trainer.should_stop
            trainer.save_checkpoint(path)
        if name == "last":
            self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [get_random_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, get_random_state())
        content: dict[str, Any] = {"best_score": self.best_score, "best_step": self.best_step, "stopped": self.stopped}
        content |= {"random_states": states, "run": None, "seconds": []}
        if self.run is not None:
            now = time.perf_counter()
            piece = {"fit": now - self._fit_started, "total": now - self.run.started, **clock.seconds()}
            content |= {"run": self.run.identity, "seconds": [*self.run.earlier, piece]}  # this one up to now
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self._random_states = state_dict["best_score"], state_dict["random_states"]
        self.best_step = state_dict.get("best_step")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        weights = {name: weight for name, weight in checkpoint["state_dict"].items() if weight.is_floating_point()}
        finite = [weight.isfinite().all() for weight in weights.values()]
        if not finite or bool(torch.stack(finite).all()):  # one wait for the device, not one for each weight
            return
        name = next(name for name, is_finite in zip(weights, finite, strict=True) if not is_finite)
        last = self.run.checkpoint("last") if self.run else None
        way_on = f"go on from {last} with --resume and" if last and last.is_file() else "start anew with"
        raise DivergedError(
            f"step {trainer.global_step}: {name} is not finite, so nothing is saved: {way_on} a smaller --lr"
        )


def _is_ended(trainer: Trainer) -> bool:
    """Whether a callback, such as EarlyStopping, ends the training run here, and --trainer.min_epochs lets it."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


def _is_over(trainer: Trainer) -> bool:
    """Whether the training run ends with this epoch; asked of the loop itself, it would count the epoch too soon."""
    loop: Any = trainer.fit_loop
    return _is_ended(trainer) or (
        trainer.global_step == trainer.max_steps or loop.epoch_progress.current.processed == loop.max_epochs
    )


def _wait_for_saves(trainer: Trainer) -> None:
    """Returns when what was saved is on the disk, which AsyncCheckpointIO puts there meanwhile."""
    trainer.strategy.checkpoint_io.teardown()


def _versions(module: LightningModule) -> list[tuple[int, int]]:
    """Changes whenever a weight of the module does, in place or not."""
    return [(tensor.data_ptr(), tensor._version) for tensor in (*module.parameters(), *module.buffers())]


def _holds(path: Path, module: LightningModule) -> bool:
    """Whether a checkpoint holds the module's weights."""
    saved = read_checkpoint(path).weights
    weights = module.state_dict()
    return saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name].cpu()) for name in saved)
