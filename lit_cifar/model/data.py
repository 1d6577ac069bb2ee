"""What LitClassifier and the callbacks ask of the Trainer's data, a data module or loaders, in one place. batch.py says
what becomes of a batch, data/ has the data."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lit_cifar.data.loader import EvalBatches, TrainBatches
from lit_cifar.errors import UserError
from lit_cifar.model import steps

if TYPE_CHECKING:
    from lit_cifar.data.datamodule import CIFAR10DataModule

NUM_AT_ONCE = 100
LOOPS = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}


class Loaders:
    """As much of the same as plain loaders tell, or a data module that makes loaders and no more.

    Args:
        trainer: on its way.
        source: where the Trainer takes the loaders of this stage from.
    """

    def __init__(self, trainer: Any, source: Any) -> None:
        self._trainer, self._source = trainer, source

    def loader(self) -> Any:
        """The first loader of this stage, as the Trainer is given it."""
        return next(iter(CombinedLoader(self._source.dataloader()).flattened), None)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names that the data module or the loader's data set has as `classes`; none where neither has any."""
        owner: Any = self._trainer.datamodule if self._source.instance is self._trainer.datamodule else None
        names = getattr(owner, "classes", None)
        owner = self.loader()
        for _ in range(20):  # data sets within each other
            if names or owner is None:
                break
            inner = next(iter(getattr(owner, "datasets", ())), None)  # of ConcatDataset
            owner = getattr(owner, "dataset", None) if inner is None else inner
            names = getattr(owner, "classes", None)
        if not isinstance(names, (list, tuple)):
            return ()
        return tuple(", ".join(map(str, name)) if isinstance(name, (list, tuple)) else str(name) for name in names)

    @property
    def batch_size(self) -> int:
        """Images of one optimiser step, as far as the loader tells its own number."""
        size = getattr(self.loader(), "batch_size", None) or 1
        return int(size * self._trainer.world_size * self._trainer.accumulate_grad_batches)

    @property
    def num_val(self) -> int:
        """Whether there is a loader for validation."""
        return int(self._trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined())

    def some(self, num_images: int) -> list[Any]:
        """Batches with some `num_images`, evenly spaced where the data set has numbers; leaves random states alone.

        The loader's own workers and sampler are not touched.
        """
        loader = self.loader()
        dataset: Any = getattr(loader, "dataset", None)
        if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
            chosen = range(0, len(dataset), max(1, len(dataset) // num_images))
            loader = DataLoader(dataset, NUM_AT_ONCE, sampler=chosen, collate_fn=loader.collate_fn)
        batches: list[Any] = []
        with isolate_rng():
            for batch in loader:
                batches.append(batch)
                if sum(len(batch[0]) for batch in batches) >= num_images:
                    break
        return batches


def data_of(trainer: Trainer) -> "CIFAR10DataModule | Loaders":
    """The data module that a Trainer was given, if it is CIFAR10DataModule or like it, else what its loaders tell.

    Raises:
        UserError: it was given neither.
    """
    data: Any = getattr(trainer, "datamodule", None)
    stage = getattr(getattr(trainer, "state", None), "fn", None)
    source = getattr(trainer, LOOPS[stage])._data_source if stage else None
    # a Trainer remembers the data module of an earlier call
    if hasattr(type(data), "train_batches") and (source is None or source.instance is data):
        return data
    if source is None:
        raise UserError(
            "LitClassifier needs data, for the names of the classes and the number of batches: give the Trainer "
            "datamodule=CIFAR10DataModule(...), or loaders"
        )
    return Loaders(trainer, source)


def batches_of(trainer: Trainer, stage: str) -> TrainBatches | EvalBatches | None:
    """This rank's batches of 'train', 'val' or 'test', without their pixels; None where nothing is known of them."""
    data: Any = data_of(trainer)
    if isinstance(data, Loaders):
        return None
    evaluated = getattr(data, "eval_batches", lambda stage: None)  # of CIFAR10DataModule
    batches = data.train_batches() if stage == "train" else evaluated(stage)
    return batches if isinstance(batches, (TrainBatches, EvalBatches)) else None


def num_train_batches(trainer: Trainer) -> float:
    """Batches of an epoch on this rank, within --trainer.limit_train_batches; infinity where a loader has no length."""
    data = data_of(trainer)
    if not isinstance(data, Loaders):
        return steps.limited(len(data.train_batches()), trainer.limit_train_batches)
    loop: Any = trainer.fit_loop
    if loop._combined_loader is None:  # Lightning counts when it sets up its loader, with a sampler for several ranks
        loop.setup_data()
        num_batches = trainer.num_training_batches
        if trainer.ckpt_path:
            loop._combined_loader = None  # again then, since a loader's state comes later (pytorch-lightning 20550)
        return num_batches
    return trainer.num_training_batches


def some_batches(trainer: Trainer, num_images: int) -> list[Any]:
    """Training batches with some `num_images` evenly spaced, or all there are: images, or images and labels."""
    data: Any = data_of(trainer)
    if isinstance(data, Loaders):
        return data.some(num_images)
    images = data.train.images
    return [images[:: max(1, len(images) // num_images)]]
