"""Which figures of a training run are worth a warning, and the warnings' words; each is given once. progress.py and
ranks.py measure the figures and print the warnings, and end with an error what cannot go on."""

import contextlib
import math
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lit_cifar.data.loader import DeviceLoader
from lit_cifar.model.module import LitClassifier
from lit_cifar.results.report import Report
from lit_cifar.run.folder import Run

STARVES = 0.5  # share of a step that it waits for its images
LAGS, LAG_OF_STEP = 1.3, 0.1  # times what the other ranks take, and the difference as a share of the step
IN_A_ROW = 3  # times that something must be seen which may come and go with the machine's load
CHECKPOINTS_LEFT = 3  # checkpoints for which the disk must have room
ROOM_BYTES = 50_000_000  # and for events and reports


class Watch:
    """Judges the figures of a training run, each time over the steps since the time before.

    A method gives a warning when there is something to say that was not said yet, and None otherwise.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._in_a_row = {"starves": 0, "lags": 0}
        self._slowest: int | None = None

    def figures(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        metrics: dict[str, float],
        batches_per_step: float,
        run: Run | None,
    ) -> list[str]:
        """New warnings about what was logged at a step, about the loader and about the run's disk.

        Args:
            metrics: what was logged; only those of the loss and the speed are looked at.
            batches_per_step: of the steps that they are of.
            run: the run whose disk is watched; None where there is none.
        """
        assert isinstance(pl_module, LitClassifier)
        step, loader = trainer.global_step, trainer.train_dataloader
        loss = metrics.get("train/loss", 0.0)  # of a module's own training_step there may be none
        found = [self.loss(step, loss, len(pl_module.classes))]
        if isinstance(loader, DeviceLoader) and "speed/step_ms" in metrics:
            wait_ms = metrics["speed/data_wait_ms"] * batches_per_step
            num_cores = os.cpu_count() or 1
            found.append(self.data(step, wait_ms, metrics["speed/step_ms"], loader.num_workers, num_cores))
        if run is not None:
            with contextlib.suppress(OSError):  # whoever writes there says what is wrong with the folder
                last = run.checkpoint("last")
                num_bytes = last.stat().st_size if last.is_file() else 0
                found.append(self.disk(step, run.folder, shutil.disk_usage(run.folder).free, num_bytes))
        return [warning for warning in found if warning]

    def loss(self, step: int, loss: float, num_classes: int) -> str | None:
        """Judges a mean cross-entropy. Guessing costs ln K, so a loss of twice that is on its way up."""
        guessing = math.log(num_classes)
        return self._once(
            "explodes",
            loss > 2 * guessing,
            f"the loss is {loss:.4g} at step {step}, where guessing costs {guessing:.3f}: training diverges; stop "
            "it and choose a smaller --lr, or let it begin small with --model.warmup",
        )

    def validation(self, step: int, report: Report) -> str | None:
        """Judges the logits of a validation: they may overflow in 16 bits though all weights are finite."""
        warnings = report.warnings()
        return self._once("not finite", bool(warnings), f"validation at step {step}: {'; '.join(warnings)}")

    def data(self, step: int, wait_ms: float, step_ms: float, num_workers: int | None, num_cores: int) -> str | None:
        """Judges the time that a step waits for its images; `num_workers` is None where no workers make them."""
        if num_workers is None:
            way_out = "choose less --data.augment, or a faster device for it"
        elif num_workers < num_cores:
            way_out = f"raise --data.num_workers, which is {num_workers} on {num_cores} CPU cores"
        else:
            way_out = f"choose a cheaper --data.transform, since {num_workers} workers keep all CPU cores busy"
        return self._once(
            "starves",
            self._repeated("starves", wait_ms > STARVES * step_ms),
            f"a step waits {wait_ms:.1f} of its {step_ms:.1f} ms for images (step {step}): {way_out}",
        )

    def ranks(self, step: int, own_ms: Sequence[float], step_ms: float, hosts: Sequence[str]) -> str | None:
        """Judges the part of a step that each rank does by itself, before gradients are exchanged."""
        slowest = max(range(len(own_ms)), key=own_ms.__getitem__)
        others_ms = statistics.median([*own_ms[:slowest], *own_ms[slowest + 1 :]])
        lags = own_ms[slowest] > LAGS * others_ms and own_ms[slowest] - others_ms > LAG_OF_STEP * step_ms
        if slowest != self._slowest:
            self._slowest, self._in_a_row["lags"] = slowest, 0
        return self._once(
            "lags",
            self._repeated("lags", lags),
            f"rank {slowest} on {hosts[slowest]} takes {own_ms[slowest]:.1f} ms for what the other ranks do in "
            f"{others_ms:.1f} ms, and all wait for it (step {step}): check what else runs there and whether its "
            "device is throttled, or leave it out",
        )

    def disk(self, step: int, folder: Path, free_bytes: int, checkpoint_bytes: int) -> str | None:
        """Judges the free space where the run writes; `checkpoint_bytes` is 0 before the first checkpoint."""
        return self._once(
            "disk",
            free_bytes < CHECKPOINTS_LEFT * checkpoint_bytes + ROOM_BYTES,
            f"{free_bytes / 1e6:.0f} MB are left on the disk of {folder}, and a checkpoint takes "
            f"{checkpoint_bytes / 1e6:.1f} MB (step {step}): free some, or keep fewer with --checkpoint.num_kept 1",
        )

    def _repeated(self, what: str, seen: bool) -> bool:
        self._in_a_row[what] = self._in_a_row[what] + 1 if seen else 0
        return self._in_a_row[what] >= IN_A_ROW

    def _once(self, what: str, seen: bool, warning: str) -> str | None:
        if not seen or what in self._told:
            return None
        self._told.add(what)
        return warning
