"""TensorBoard's events in a run's folder. The callers decide what is logged; training/dashboard.py fills TensorBoard's
pages, chosen.py makes other loggers."""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from lit_cifar import log
from lit_cifar.run.folder import Run


class RunLogger(TensorBoardLogger):
    """TensorBoard's events in the folder of a run.

    Args:
        run: the run, with a folder.
        resumed_step: the step that a resumed run goes on from; TensorBoard forgets what was written for later ones.
        place: another folder than the run's.
        prefix: of each tag.
        settings: the writer's others.
    """

    def __init__(
        self, run: Run, resumed_step: int | None = None, place: Path | None = None, prefix: str = "", **settings: Any
    ) -> None:
        if resumed_step is not None:
            settings["purge_step"] = resumed_step + 1
        place = place or run.folder
        super().__init__(place.parent, "", place.name, default_hp_metric=False, prefix=prefix, **settings)
        self._done = resumed_step if run.tested_step == resumed_step else None  # only the test is left, as logged
        self.is_resumed = resumed_step is not None and any(place.glob("events.out.tfevents.*"))
        run.closing.callback(self._close)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, **self._kwargs)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """All metrics of a step in one event; with one for each, the writer's thread interrupts a step as often."""
        if any(isinstance(value, Mapping) for value in metrics.values()):  # curves that share a chart
            super().log_metrics(dict(metrics), step)
            return
        prefix = f"{self._prefix}-" if self._prefix else ""
        values = [Summary.Value(tag=prefix + name, simple_value=float(value)) for name, value in metrics.items()]
        if step is None or step != self._done:
            self.experiment._get_file_writer().add_summary(Summary(value=values), step)

    @rank_zero_only
    def save(self) -> None:
        """Brings events onto the disk; no hparams.yaml, whose place config.yaml takes."""
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Leaves the file open from training to the test: the run closes it. TensorBoard reads files in the order of
        their names, and of two that a process made in one second its 10th comes before its 9th."""
        if self._experiment is not None:
            self.save()

    def _close(self) -> None:
        if self._experiment is not None:
            self._experiment.close()


class _Writer(SummaryWriter):
    """Says so once where events cannot be written, as on a full disk, and goes on without: states and results matter
    more. TensorBoard's own raises in whatever logs next, after its thread has printed a traceback."""

    is_lost = False

    def lose(self, error: Exception) -> None:
        if not self.is_lost:
            self.is_lost = True
            reason = getattr(error, "strerror", None) or error
            log.warn(
                f"TensorBoard's events in {self.log_dir} cannot be written ({reason}): the run goes on without them; "
                "make room or fix the folder"
            )

    def _get_file_writer(self) -> Any:
        if self.file_writer is not None:
            return self.file_writer
        probe = Path(self.log_dir, f".events.{os.getpid()}.part")
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(bytes(4096))  # more than the file begins with
        except OSError as error:
            self.lose(error)
            nowhere: Any = _Guarded(None, self.lose)
            self.file_writer, self.all_writers = nowhere, {self.log_dir: nowhere}  # type: ignore[assignment]
            return nowhere
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
        writer: Any = super()._get_file_writer()
        records = writer.event_writer._async_writer._writer  # the thread has it too
        records._writer = _Guarded(records._writer, self.lose)
        return writer


class _Guarded:
    """A file of events, dropped at its first error; without a file whatever is called does nothing."""

    def __init__(self, file: Any, lose: Callable[[Exception], None]) -> None:
        self._file, self._lose = file, lose

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._do, name)

    def _do(self, name: str, *args: Any, **settings: Any) -> None:
        if self._file is not None:
            try:
                getattr(self._file, name)(*args, **settings)
            except Exception as error:  # TensorFlow's files, which are used where there is one, raise their own
                self._file = None
                self._lose(error)
