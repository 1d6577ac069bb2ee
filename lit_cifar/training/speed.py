"""How fast a net trains: the seconds of batches, the waiting for images, the time left. progress.py logs and prints
the figures, watch.py judges them."""

from dataclasses import dataclass

from lightning.pytorch import Trainer

from lit_cifar import clock
from lit_cifar.data.loader import DeviceLoader
from lit_cifar.model import steps


@dataclass(frozen=True)
class Pace:
    """How fast some batches were trained on.

    Args:
        num_batches: number of batches.
        seconds: time that they took, pauses left out.
        wait_seconds: the part of it that was spent waiting for images.
    """

    num_batches: int
    seconds: float
    wait_seconds: float

    @property
    def seconds_per_batch(self) -> float:
        return self.seconds / max(1, self.num_batches)

    def images_per_second(self, batch_size: int) -> float:
        """Images per second on all devices together; `batch_size` counts those of all devices too."""
        return batch_size / max(self.seconds_per_batch, 1e-9)

    def figures(self, batch_size: int, batches_per_step: float) -> dict[str, float]:
        """Values by name for loggers; empty where there was no batch."""
        if not self.num_batches or not self.seconds:
            return {}
        return {
            "speed/images_per_second": self.images_per_second(batch_size),
            "speed/step_ms": 1000 * self.seconds_per_batch * batches_per_step,
            "speed/data_wait_ms": 1000 * self.wait_seconds / self.num_batches,
        }


class Speed:
    """Counts batches, and reads the seconds that they took from the clock's `steps`, which stand still in validation,
    in a save, and between two epochs."""

    def __init__(self) -> None:
        self._num_batches = 0
        self._seconds = clock.seconds().get("steps", 0.0)
        self._waited_seconds = 0.0

    def count(self) -> None:
        """Counts a batch."""
        self._num_batches += 1

    def read(self, waited_seconds: float) -> Pace:
        """The pace since the last time it was read.

        Args:
            waited_seconds: the time spent waiting for images since training began.
        """
        seconds = clock.seconds().get("steps", 0.0)
        pace = Pace(self._num_batches, seconds - self._seconds, waited_seconds - self._waited_seconds)
        self._num_batches, self._seconds, self._waited_seconds = 0, seconds, waited_seconds
        return pace


def waited_seconds(trainer: Trainer) -> float:
    """Time spent waiting for images since training began; 0 where the loader does not measure it."""
    loader = trainer.train_dataloader
    return loader.waited_seconds if isinstance(loader, DeviceLoader) else 0.0


def time_left(trainer: Trainer, seconds_per_batch: float) -> str:
    """The rest of the training run, such as '2 min 3 s left'; empty where its end is not known."""
    rest = steps.left(trainer, int(trainer.num_training_batches))
    if rest is None:
        return ""
    seconds = round(rest[1] * seconds_per_batch)
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return f"{hours} h {minutes % 60} min left"
    return f"{minutes} min {seconds % 60} s left" if minutes else f"{seconds} s left"
