"""TensorBoard events of a run, in its folder. What is logged is up to the callers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary

from lit_cifar.errors import UserError
from lit_cifar.run.folder import RUNS, run_version


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
