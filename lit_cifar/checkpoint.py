"""Files that must survive: durable checkpoints, stopping at a signal, the run's folder, finding and reading what a run
left. Training logic is not here."""

import contextlib
import os
import pickle
import pickletools
import re
import signal
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from packaging.version import Version
from tensorboard.compat.proto.summary_pb2 import Summary

from lit_cifar import log
from lit_cifar.errors import DivergedError, UserError
from lit_cifar.files import replaced
from lit_cifar.folders import RUNS, run_version

STOP_SIGNALS = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))  # Windows has no SIGUSR1
STOPPED = 75  # exit code of a run that a signal ended and that can be resumed; EX_TEMPFAIL of sysexits.h
TRUSTED = ("lit_cifar.", "torchvision.", "torch.nn.")  # a checkpoint's config may name classes from these by itself
MAX_PICKLE_BYTES = 2**22  # of a checkpoint, without its tensors; a small run's is 10 to 100 kB
MAX_CONFIG_VALUES, MAX_CONFIG_TEXT = 100_000, 10_000  # how many, and how many characters of each
POSITION = {"epoch": 0, "batch": 0}  # states are compared with these: in the data,
RUNNING_LOSS = {"logged": [0.0, 0], "printed": [0.0, 0]}  # sums and counts,
GPU_RANDOM_STATE = torch.zeros(16, dtype=torch.uint8)  # and torch.cuda's
IMPORTABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
TEXTS = ("data_dir", "default_root_dir", "mirrors", "name", "pattern")  # settings whose dots mean something else


class RunLogger(TensorBoardLogger):
    """TensorBoard in `lightning_logs/version_N`, a folder that no other run gets, or that of the run to resume.

    Args:
        save_dir: where the folder `lightning_logs` is.
        version: N of the run to resume; None takes the next free one when it is first asked for.
        purge_step: TensorBoard forgets what the resumed run wrote at this step and later.
    """

    def __init__(self, save_dir: str, version: int | None = None, purge_step: int | None = None) -> None:
        super().__init__(save_dir, name=RUNS.name, version=version, default_hp_metric=False, purge_step=purge_step)
        self._claimed = version
        self._resumed_step = None if purge_step is None else purge_step - 1

    @property
    def version(self) -> int:
        """N; taken by making the folder, so that two runs that start at once get different ones."""
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return 0  # the other ranks are told rank 0's folder, and write nothing
        while self._claimed is None:
            runs = Path(self.save_dir) / RUNS
            version = max((run_version(run) for run in runs.glob("version_*")), default=-1) + 1
            try:
                (runs / f"version_{version}").mkdir(parents=True)
                self._claimed = version
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(f"cannot make a run's folder in {runs} ({error.strerror}): make it writable") from None
        return self._claimed

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """All metrics of a step in one event; with one for each, the writer's thread interrupts a step as often."""
        if any(isinstance(value, Mapping) for value in metrics.values()):  # curves that share a chart
            super().log_metrics(dict(metrics), step)
            return
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        if step is not None and step == self._resumed_step:
            # nothing is left to train: a test that was killed after it had logged, or that is repeated
            written = scalars_at(Path(self.log_dir), step)
            values = [value for value in values if written.get(value.tag) != value.simple_value]
        if values:
            self.experiment._get_file_writer().add_summary(Summary(value=values), step)

    @rank_zero_only
    def save(self) -> None:
        """Brings events onto the disk; no hparams.yaml, whose place config.yaml takes."""
        self.experiment.flush()


def scalars_at(run: Path, step: int) -> dict[str, float]:
    """What TensorBoard shows of a run at a step, by tag."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    found: dict[str, float] = {}
    for path in sorted(run.glob("events.out.tfevents.*")):  # in TensorBoard's own order
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.session_log.status == SessionLog.START and event.step <= step:
                found.clear()  # forgotten by a resumed run, from the event's step on
            if event.step == step:
                found |= {value.tag: value.simple_value for value in event.summary.value}
    return found


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their final name, onto the disk, and renames them.

    Lightning's own goes through $TMPDIR without fsync, and swallows a PermissionError (fabric/utilities/cloud_io.py).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            with replaced(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
            lines = str(error).splitlines()  # below a RuntimeError's first line stands where in torch it came from
            reason = getattr(error, "strerror", None) or (lines[0] if lines else type(error).__name__)
            raise UserError(
                f"checkpoint {path} could not be written ({reason}); the one before is whole: free space or mend the "
                f"folder, then go on with --resume {path}"
            ) from error


class Stopped(Exception):
    """A signal ended the training after its state was saved; the run can be resumed."""


class Checkpoints(Checkpoint):
    """Keeps `last.ckpt`, the newest state, and `best.ckpt`, the best in validation, in the run's `checkpoints/`.

    At SIGTERM or SIGUSR1, whichever rank gets it, all ranks save after the same step and stop.

    Args:
        every_n_train_steps: optimiser steps between two saves; the end of each epoch is saved besides.
        every_n_minutes: minutes between two saves, besides; null is off.
        num_kept: how many of the newest states are kept: `last.ckpt`, and before it `last-1.ckpt`, `last-2.ckpt`, ...
        monitor: the logged value that `best.ckpt` follows, where there is validation.
        mode: whether its largest ('max') or smallest ('min') value is best.
    """

    def __init__(
        self,
        every_n_train_steps: int = 1000,
        every_n_minutes: float | None = None,
        num_kept: int = 2,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
    ) -> None:
        for flag, value, valid in (
            ("every_n_train_steps", every_n_train_steps, every_n_train_steps >= 1),
            ("every_n_minutes", every_n_minutes, every_n_minutes is None or every_n_minutes > 0),
            ("num_kept", num_kept, num_kept >= 1),
        ):
            if not valid:
                raise UserError(f"--checkpoint.{flag} {value} is out of range; see --help")
        self.every_n_train_steps = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.num_kept = num_kept
        self.monitor = monitor
        self.mode = mode
        self._signal: int | None = None  # the newest that came, set by the handler and by nothing else
        self._agreement = Agreement()
        self._saved_at = 0.0  # on time.monotonic's clock
        self.best_score: float | None = None
        self._seen_step = 0  # with accumulated gradients, only the first batch end at a step is a step's end
        self._random_states: list[dict[str, Any]] = []

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = number

    def _take_signals(self) -> None:
        # Over Lightning's handlers, which work at once: a checkpoint in mid-step, a broadcast that other ranks do not
        # join. Lightning puts back what was there before the run.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_signals()  # and does nothing at one: a test is short

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_signals()
        run = Path(trainer.log_dir or ".")  # asked for on every rank: rank 0 broadcasts it
        if trainer.is_global_zero:
            for unfinished in (run / "checkpoints").glob(".*.part"):  # of a run killed in a save
                unfinished.unlink()
        self._agreement = Agreement()
        self._saved_at = time.monotonic()
        self._seen_step = trainer.global_step
        if len(self._random_states) == trainer.world_size:  # on other numbers of ranks nobody can continue the draws
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
        stops = trainer.should_stop or step == trainer.max_steps
        if stops or due or interrupted or step % self.every_n_train_steps == 0:
            self._save(trainer, "last.ckpt")
        if interrupted:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_last_batch:
            return
        self._save(trainer, "last.ckpt")
        if self._agree(wait=True)[0]:
            self._stop(trainer)

    def _agree(self, wait: bool = False) -> tuple[bool, bool]:
        """Whether any rank got a signal, and whether one thinks that it is time for a save; the same on all ranks."""
        seconds = time.monotonic() - self._saved_at
        due = self.every_n_minutes is not None and seconds >= 60 * self.every_n_minutes
        return self._agreement.ask(self._signal is not None, due, wait=wait)

    def _stop(self, trainer: Trainer) -> None:
        name = signal.Signals(self._signal).name if self._signal else "a signal to another rank"
        kept = Path(trainer.log_dir or ".") / "checkpoints" / "last.ckpt"
        raise Stopped(f"stopped by {name} after step {trainer.global_step}; go on with --resume {kept}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            names = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"--checkpoint.monitor {self.monitor} is not logged: choose one of {names}")
        score = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        if self.best_score is None or sign * score > sign * self.best_score:
            self.best_score = score
            self._save(trainer, "best.ckpt")

    def _save(self, trainer: Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert trainer.log_dir is not None
        path = Path(trainer.log_dir) / "checkpoints" / name
        if name == "last.ckpt" and trainer.is_global_zero:
            keep(path, self.num_kept)
        trainer.save_checkpoint(path)
        self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [get_random_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, get_random_state())
        return {"best_score": self.best_score, "random_states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self._random_states = state_dict["best_score"], state_dict["random_states"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for name, weight in checkpoint["state_dict"].items():
            if weight.is_floating_point() and not bool(weight.isfinite().all()):
                raise DivergedError(
                    f"step {trainer.global_step}: {name} is not finite, so nothing is saved and the checkpoint before "
                    "is kept: go on from it with --resume and a smaller --lr, or start anew with one"
                )


class Agreement:
    """Two yes-or-no questions that all ranks answer alike: yes as soon as one rank says so.

    Asked after each step. An answer is fetched when the next is asked for, so that no step waits for one; Lightning's
    own broadcast, which each step waits for, took 9 % of a step of the tutorial's net on 2 processes (py-spy).
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._answers: torch.Tensor | None = None
        self._work: Any = None

    def ask(self, *questions: bool, wait: bool = False) -> tuple[bool, bool]:
        """Answers to the questions as asked the time before; as asked now, if the ranks shall wait for each other."""
        first, second = questions
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return first, second
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")  # on the CPU: the device is not asked
        before = self._fetch()
        self._answers = torch.tensor([first, second], dtype=torch.uint8)
        self._work = torch.distributed.all_reduce(
            self._answers, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return self._fetch() if wait else before

    def _fetch(self) -> tuple[bool, bool]:
        if self._work is None:
            return False, False
        self._work.wait()
        self._work = None
        assert self._answers is not None
        first, second = self._answers.tolist()
        return bool(first), bool(second)


def keep(path: Path, num_kept: int) -> None:
    """Before `path` is replaced: makes last.ckpt also last-1.ckpt, and last-1.ckpt last-2.ckpt, up to `num_kept` files.

    `path` itself stays where it is, so that a run killed here has it still.
    """
    previous = path.with_name(f"{path.stem}-1{path.suffix}")
    if num_kept == 1 or not path.exists() or (previous.exists() and previous.samefile(path)):
        return  # the same file when a run was killed between this and its save
    for age in range(num_kept - 2, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            os.replace(
                path.with_name(f"{path.stem}-{age}{path.suffix}"), path.with_name(f"{path.stem}-{age + 1}{path.suffix}")
            )
    with contextlib.suppress(OSError):  # a file system without hard links keeps one state less
        previous.unlink(missing_ok=True)
        os.link(path, previous)


def get_random_state() -> dict[str, Any]:
    """torch's random state on the CPU and the current GPU, which nets with dropout draw from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores what `get_random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def find_checkpoint(resume: str, save_dir: Path) -> Path | None:
    """The checkpoint that `--resume` means: a file, a run's folder, or for 'auto' and 'if-any' that of the newest run.

    In a folder, the newest state that is whole: one that is cut short is named and passed over for the one before.
    None for 'if-any' where no run has a checkpoint.

    Raises:
        UserError: there is none, or none that is whole.
    """
    if resume not in ("auto", "if-any"):
        path = Path(resume)
        if states_of(path):
            return _newest_whole(path, resume)
        if not path.is_file():
            raise UserError(
                f"--resume {resume}: no such checkpoint; name a .ckpt file, a run's folder, 'auto' or 'if-any'"
            )
        return path
    runs = sorted((save_dir / RUNS).glob("version_*"), key=run_version, reverse=True)
    for run in runs:
        if states_of(run):
            return _newest_whole(run, resume)
    if resume == "if-any":
        return None
    raise UserError(f"--resume auto: no run in {save_dir / RUNS} has a checkpoint; start one without --resume")


def states_of(run: Path) -> list[Path]:
    """The files of a run's newest states, the newest first."""
    found = [run / "checkpoints" / "last.ckpt", *(run / "checkpoints").glob("last-*.ckpt")]
    ages = {path: int(age[1]) if (age := re.search(r"-(\d+)$", path.stem)) else 0 for path in found}
    return sorted((path for path in found if path.is_file()), key=ages.__getitem__)


def _newest_whole(run: Path, resume: str) -> Path:
    for path in states_of(run):
        try:
            read_checkpoint(path)
        except UserError as error:
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                log.warn(f"{error}: passed over")
        else:
            return path
    raise UserError(f"--resume {resume}: {run} has no checkpoint that is whole; start anew without --resume")


def run_folder(checkpoint: Path) -> Path | None:
    """The run's folder that a checkpoint lies in, version_N/checkpoints/*.ckpt; None for any other place."""
    folder = checkpoint.resolve().parent
    if folder.name != "checkpoints" or run_version(folder.parent) < 0:
        return None
    here = Path.cwd()
    return folder.parent.relative_to(here) if folder.is_relative_to(here) else folder.parent


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of ours, without running code that may be in the file (weights_only).

    Its checksums are right, it takes no more memory than its size, and what `on_save_checkpoint` of the module put into
    it is of the right types.

    Raises:
        UserError: it is missing, cut short, or something else.
    """
    try:
        _check_records(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; name a .ckpt file") from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror})") from None
    except Exception as error:  # torch.load raises almost anything on bytes it does not know
        raise UserError(
            f"{path} is no checkpoint, or was cut short or damaged ({type(error).__name__}); name another one"
        ) from None
    if not _is_ours(checkpoint):
        raise UserError(f"{path} is not a checkpoint of lit_cifar; name one from lightning_logs/*/checkpoints")
    return checkpoint


def _check_records(path: Path) -> None:
    """Raises unless the file is as torch.save writes it: a zip, stored, with right sums, and a pickle of a sane size.

    torch.load looks at none of this: it unpacks what is packed, and lets a flipped bit of a weight pass.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            raise zipfile.BadZipFile
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise zipfile.BadZipFile
            if sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size:
                raise zipfile.BadZipFile
            for record in records:
                if record.filename.endswith("/data.pkl"):
                    if record.file_size > MAX_PICKLE_BYTES:
                        raise zipfile.BadZipFile
                    _check_pickle(archive.read(record))
            if archive.testzip() is not None:
                raise zipfile.BadZipFile


def _check_pickle(data: bytes) -> None:
    """bytearray is the one function that torch's unpickler would call with a size that needs no bytes in the file."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and "bytearray" in str(argument):  # the only opcode that brings torch a function
            raise pickle.UnpicklingError


def _is_ours(checkpoint: Any) -> bool:
    if not isinstance(checkpoint, dict) or not {"state_dict", "lit_cifar"} <= checkpoint.keys():
        return False
    weights, ours = checkpoint["state_dict"], checkpoint["lit_cifar"]
    if not (isinstance(weights, dict) and isinstance(ours, dict) and unlike(checkpoint.get("global_step"), 0) is None):
        return False
    if not all(isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in weights.items()):
        return False
    classes, config = ours.get("classes", []), ours.get("config") or {}
    return (
        isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and isinstance(config, dict)
        and all(isinstance(config.get(section, {}), dict) for section in ("model", "data", "trainer", "checkpoint"))
        and _is_plain(ours)
        and _is_plain(checkpoint, (torch.Tensor, tuple))
        and _is_version(checkpoint.get("pytorch-lightning_version"))
        and _are_states_of_callbacks(checkpoint.get("callbacks", {}))
        and unlike(checkpoint.get("running_loss", RUNNING_LOSS), RUNNING_LOSS) is None
    )


def _is_version(value: Any) -> bool:
    """Whether it is one of Lightning's from 2 on; there are no checkpoints of ours of an earlier one."""
    try:
        return Version(value) >= Version("2")
    except (TypeError, ValueError):
        return False


def _are_states_of_callbacks(states: Any) -> bool:
    if not (isinstance(states, dict) and all(isinstance(state, dict) for state in states.values())):
        return False
    ours = states.get(Checkpoints.__name__)
    if ours is None:
        return True
    best_score, random_states = ours.get("best_score"), ours.get("random_states")
    return (
        isinstance(best_score, (float, type(None)))
        and isinstance(random_states, list)
        and all(_is_random_state(state) for state in random_states)
    )


def _is_random_state(state: Any) -> bool:
    """Whether `set_random_state` takes it, on any machine."""
    if not isinstance(state, dict):
        return False
    try:
        torch.Generator().set_state(state["cpu"])
    except (TypeError, KeyError, RuntimeError):
        return False
    gpu = state.get("cuda", GPU_RANDOM_STATE)
    # CUDA's is a seed and an offset of 8 bytes each, and the offset a multiple of 4
    return unlike(gpu, GPU_RANDOM_STATE) is None and gpu.dtype == torch.uint8 and int(gpu[8]) % 4 == 0


def check_state(checkpoint: dict[str, Any], trainer: Trainer, module: LightningModule) -> None:
    """Checks that a checkpoint's state of the training is one that this training could have saved.

    Lightning and torch take what they find, and the training fails of it later.

    Args:
        checkpoint: from `read_checkpoint`.
        trainer: with the data module.
        module: with the trainer.

    Raises:
        UserError: the file is spoilt, or from another version or kind of training.
    """
    configured: Any = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    own_groups = optimizer.state_dict()["param_groups"]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    buffers = {number: {"momentum_buffer": weight} for number, weight in enumerate(weights)}
    scaler = trainer.precision_plugin.state_dict()
    try:
        fit_loop, (state,) = checkpoint["loops"]["fit_loop"], checkpoint["optimizer_states"]
        groups, schedulers = state["param_groups"], checkpoint["lr_schedulers"]
        wrong = (
            unlike(
                fit_loop,
                {**_common(trainer.fit_loop.state_dict(), fit_loop), "state_dict": {"combined_loader": [POSITION]}},
                "loops.fit_loop",
            )
            or unlike(state["state"], _common(buffers, state["state"]), "optimizer_states.state")
            or unlike(groups, [_common(*pair) for pair in zip(own_groups, groups, strict=True)], "param_groups")
            or unlike(schedulers, [scheduler.state_dict()] * len(schedulers), "lr_schedulers")
        )
        for own, group in zip(own_groups, groups, strict=True):
            for key in {"dampening", "maximize", "differentiable", "foreach"} & own.keys() & group.keys():
                wrong = wrong or (None if group[key] == own[key] else f"param_groups.{key}")  # no settings of ours
        for name in (type(trainer.precision_plugin).__qualname__, "native_amp_scaling_state"):
            if scaler and name in checkpoint:
                wrong = wrong or unlike(checkpoint[name], scaler, name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = f"its structure ({type(error).__name__})"
    if wrong:
        raise UserError(
            f"--resume: the checkpoint's state of the training is spoilt, or another version's or another kind of "
            f"training's: see {wrong}; name another checkpoint, or start anew without --resume"
        )


def _common(own: dict[Any, Any], found: dict[Any, Any]) -> dict[Any, Any]:
    """Our own values of those keys that were found: another version of Lightning or torch may have counted less."""
    return {key: value for key, value in own.items() if key in found}


def unlike(value: Any, own: Any, where: str = "") -> str | None:
    """The first place in a value whose keys, length, shape or type are not those of our own one; None: nowhere."""
    pairs: list[tuple[Any, Any, str]] = []
    if isinstance(own, dict):
        fits = isinstance(value, dict) and value.keys() == own.keys()
        pairs = [(value[key], own[key], f"{where}.{key}") for key in own] if fits else []
    elif isinstance(own, list):
        fits = isinstance(value, list) and len(value) == len(own)
        pairs = [(*pair, where) for pair in zip(value, own, strict=True)] if fits else []
    elif isinstance(own, torch.Tensor):
        fits = isinstance(value, torch.Tensor) and value.shape == own.shape
        fits = fits and value.is_floating_point() == own.is_floating_point()
    elif type(own) is int:  # a count
        fits = type(value) is int and 0 <= value < 2**63
    elif type(own) is float:
        fits = type(value) in (int, float)
    else:
        fits = type(value) is type(own)
    if not fits:
        return where or "it"
    return next(filter(None, (unlike(*pair) for pair in pairs)), None)


def _is_plain(value: Any, more: tuple[type, ...] = ()) -> bool:
    """Whether it is what YAML could hold, a tree and of a sane size: no references to itself, nor a million to one.

    Args:
        more: what it may hold besides, tuples or tensors.
    """
    values = [(value, 0)]
    num_values = 0
    while values:
        value, depth = values.pop()
        num_values += 1
        if num_values > MAX_CONFIG_VALUES or depth > 50:
            return False
        if isinstance(value, dict):
            values += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list) or (isinstance(value, tuple) and tuple in more):
            values += [(inner, depth + 1) for inner in value]
        elif isinstance(value, torch.Tensor) and torch.Tensor in more:
            # one stored number may pose as the weights of any size
            if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                return False
        elif isinstance(value, str):
            if len(value) > MAX_CONFIG_TEXT:
                return False
        elif not isinstance(value, (int, float, type(None))):
            return False
    return True


def checkpoint_config(checkpoint: dict[str, Any], trust: bool) -> dict[str, Any]:
    """The config that a checkpoint travels with, empty in one that no command wrote.

    Raises:
        UserError: see `check_trusted`.
    """
    config: dict[str, Any] = checkpoint["lit_cifar"].get("config") or {}
    if not trust:
        check_trusted(config)
    return config


def check_trusted(config: Any) -> None:
    """Checks that a checkpoint's config, or a part of it, names only classes that may be made without asking.

    Raises:
        UserError: it names one from another package; making that may run code of whoever wrote the file.
    """
    for class_path in _class_paths(config):
        if not class_path.startswith(TRUSTED):
            raise UserError(
                f"the checkpoint names the class {class_path}, which runs code of that package: "
                "add --trust true (in Python: trust=True) if you trust the file"
            )


def _class_paths(value: Any, key: str = "") -> list[str]:
    """Everything in a config that jsonargparse would import: not only after class_path, it takes a bare string too."""
    if isinstance(value, dict):
        return [path for key, inner in value.items() for path in _class_paths(inner, key)]
    if isinstance(value, list):
        return [path for inner in value for path in _class_paths(inner, key)]
    if not isinstance(value, str):
        return []
    if key == "class_path" or (IMPORTABLE.fullmatch(value) and key not in TEXTS):
        return [value]
    if key in TEXTS:
        return []
    try:
        meant = yaml.safe_load(value)  # as jsonargparse does: the text may be that of a dict with a class_path
    except (yaml.YAMLError, ValueError, RecursionError):
        return [value]  # no setting of ours, and no YAML
    if not _is_plain(meant):
        return [value]
    return _class_paths(meant, key) if meant != value else []
