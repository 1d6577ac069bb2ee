"""CIFAR10DataModule: settings to source, validation split and loaders. source.py finds the images; what is done for
each batch is in loader.py and augment.py."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lit_cifar import log
from lit_cifar.data.augment import Augment
from lit_cifar.data.cache import SPLITS
from lit_cifar.data.loader import DeviceLoader, EvalBatches, TrainBatches
from lit_cifar.data.official import DEFAULT_DATA_DIR, OfficialFiles
from lit_cifar.data.source import Source, find_source
from lit_cifar.data.split import Split, split_validation
from lit_cifar.data.tree import Tree
from lit_cifar.data.workers import check_transform
from lit_cifar.errors import UserError
from lit_cifar.files import local_path
from lit_cifar.settings import checked_arguments
from lit_cifar.text import is_command

Dataset = Literal["cifar10", "cifar100", "shapes"]
NUM_WORKERS = 2
# On a CPU 2,000 images at once take 10 % longer each than 500, and SpeedNet 0.75 GB more memory (one thread).
EVAL_BATCH, GPU_EVAL_BATCH = 500, 2000
LARGE_GPU = 7 * 2**30  # bytes, which a card of 8 GB has; an activation of ResNet-18 is 0.5 GB for 2,000 images


class CIFAR10DataModule(LightningDataModule):
    """CIFAR-10 or CIFAR-100 (50,000 training and 10,000 test images of 32x32), or other images in their place.

    Args:
        data_dir: where the images are: a folder with the dataset's official files (downloaded into it when it is
            missing or empty), a tree train/<class>/* and test/<class>/* of images in any number of classes, or an
            archive of such a tree (.tar, .tar.gz, .tar.xz, .zip). ~ is the home folder.
        dataset: 'cifar10' or 'cifar100' (its 100 fine classes), from data_dir; or 'shapes', ten classes of drawn
            shapes, embedded, nothing to download. Where data_dir is a tree or its archive, the tree decides.
        batch_size: images in the batch of one optimiser step, shared by all devices.
        eval_batch_size: most images in one device's batch in validation and test; null: 2,000 on a CUDA GPU of 8 GB or
            more, else 500. It changes no accuracy, and the loss in its last digits at most.
        num_val: images taken from the training set for validation, equally many of each class; 0 is none. The test set
            is never used for selection.
        augment: built-in augmentation of training images, on the device, after the transform.
        transform: torchvision v2 transforms applied in turn to each training image (uint8, 3x32x32) by workers, for
            example RandAugment.
        num_workers: processes on each device that apply the transform.
        drop_last: leave out the last training batch of an epoch when it is shorter than the others.
        mirrors: where the dataset's archive is fetched from, in order: URLs (file:// too) or folders; the default is
            a list of public mirrors.
        seed: with the epoch, decides the order and augmentation of training images, and the validation split.
        normalised: give float32 batches, scaled to [0, 1] and normalised as torchvision does it. For modules other than
            LitClassifier, which normalises uint8 images itself.
        mean: subtracted per channel where images are normalised.
        std: then divides them, above 0.

    Raises:
        UserError: a setting is of a wrong type or out of its range, or data_dir is a URL.
    """

    IN_PYTHON = ("normalised", "mean", "std")  # no flags: commands train LitClassifier

    def __init__(
        self,
        data_dir: str = DEFAULT_DATA_DIR,
        dataset: Dataset = "cifar10",
        batch_size: PositiveInt = 4,
        eval_batch_size: PositiveInt | None = None,
        num_val: NonNegativeInt = 0,
        augment: Augment = Augment(),  # noqa: B008 (frozen)
        transform: list[nn.Module] | None = None,
        num_workers: NonNegativeInt = NUM_WORKERS,
        drop_last: bool = False,
        mirrors: list[str] | None = None,
        seed: int = 0,
        normalised: bool = False,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5),
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        if isinstance(data_dir, os.PathLike):
            given["data_dir"] = os.fspath(data_dir)
        if isinstance(transform, nn.Module):
            given["transform"] = [transform]
        given = checked_arguments(CIFAR10DataModule.__init__, given, "--data.")
        super().__init__()
        self.data_dir = local_path(given["data_dir"], "--data_dir")
        self.dataset: Dataset = given["dataset"]
        self.batch_size: int = given["batch_size"]
        self.eval_batch_size: int | None = given["eval_batch_size"]
        self.num_val: int = given["num_val"]
        self.augment: Augment = given["augment"]
        self.transform: list[nn.Module] | None = given["transform"]
        self.num_workers: int = given["num_workers"]
        self.drop_last: bool = given["drop_last"]
        self.mirrors: list[str] | None = given["mirrors"]
        self.seed: int = given["seed"]
        self.normalised: bool = given["normalised"]
        self.mean: list[float] = given["mean"]
        self.std: list[float] = given["std"]
        if mirrors is not None and not mirrors:
            raise UserError("--data.mirrors names none: list one at least, or leave it out for the public ones")
        if not is_command():  # whose config has them
            self.save_hyperparameters(self._plain_settings())
            self._hparams_name = "kwargs"  # for load_from_checkpoint
        self._source: Source | None = None
        self._train: Split | None = None
        self._val: Split | None = None
        self._test: Split | None = None
        self._checked = False  # whether settings without effect were looked for

    def _plain_settings(self) -> dict[str, Any]:
        """All that decides the batches, for loggers and checkpoints."""
        settings = {name: getattr(self, name) for name in inspect.signature(CIFAR10DataModule).parameters}
        settings["data_dir"], settings["augment"] = str(self.data_dir), asdict(self.augment)
        settings["transform"] = self.transform and [repr(part) for part in self.transform]
        # others normalise images themselves, perhaps with other numbers
        return {name: value for name, value in settings.items() if self.normalised or name not in self.IN_PYTHON}

    @property
    def source(self) -> Source:
        """Where the images come from, found out when it is first asked for."""
        if self._source is None:
            self._source = find_source(self.data_dir, self.dataset, self.mirrors)
        return self._source

    def prepare_data(self) -> None:
        """Downloads or decodes what is missing; locks let any number of processes call it at once.

        Raises:
            UserError: there are no images and no way to get them, or they are damaged.
        """
        self.source.prepare()

    def count_classes(self) -> int:
        """The number of classes K, before setup and without a download: a tree or archive of images is prepared for it.

        Raises:
            UserError: as of prepare_data.
        """
        return self.source.num_classes

    def adopt_prepared(self, other: "CIFAR10DataModule") -> None:
        """Takes over what `other`, with the same settings, has prepared and read: nothing is listed or read twice."""
        if other._source is not None and other._source.is_here:  # otherwise the mirrors matter, which may be others
            self._source = other._source
        self._train, self._val, self._checked = other._train, other._val, other._checked

    def setup(self, stage: str | None = None) -> None:
        """Reads what the stage needs: 'fit', 'validate', 'test' or 'predict'; None: everything. Says once which
        settings have no effect. Without a Trainer it prepares the data too.

        Raises:
            UserError: there is no such stage, or as of prepare_data, or the module would normalise images again.
        """
        if stage not in (None, "fit", "validate", "test", "predict"):
            raise UserError(
                f"there is no stage {stage!r}: set up 'fit', 'validate', 'test' or 'predict', or leave it out"
            )
        self._check_module()
        # not in val_dataloader: what is raised there leaves torch's loaders as Lightning 2.6 has patched them
        if stage == "validate" and not self.num_val and self.trainer and self.trainer.state.fn == "validate":
            raise UserError("there are no images for validation: set --data.num_val above 0")
        if self.trainer is None and not is_command():  # both of which prepare first
            self.prepare_data()
        if not self._checked and (self.trainer.global_rank if self.trainer else log.rank()) == 0:
            for line in self._without_effect(stage):
                log.warn(line)
        self._checked = True
        if stage in (None, "fit", "validate") and self._train is None:
            train = self.source.read(train=True)
            if self.num_val:
                self._train, self._val = split_validation(train, self.num_val, self.seed)  # it gives `train` away
            else:
                self._train = train
            if self.transform:
                check_transform(nn.Sequential(*self.transform), self._train, self.num_workers)
        if stage in (None, "test", "predict") and self._test is None:
            self._test = self.source.read(train=False)

    def _check_module(self) -> None:
        module = self.trainer.lightning_module if self.trainer else None
        example = getattr(module, "example_input_array", None)  # by which a module says what it takes
        if self.normalised and isinstance(example, Tensor) and example.dtype == torch.uint8:
            raise UserError(
                f"{type(module).__name__} normalises uint8 images itself: leave out normalised=True, and give it the "
                "mean and std"
            )
        for name in getattr(module, "hparams_initial", {}).keys() & self.hparams_initial.keys():
            # for loggers; Lightning would end the run where the values differ
            mine: Any = self.__dict__["_hparams_initial"]
            mine[f"data/{name}"] = mine.pop(name)

    def _without_effect(self, stage: str | None) -> Iterator[str]:
        """Lines on what was chosen and changes nothing; a chosen default looks like one that was left alone."""
        source = self.source
        if self.dataset == "shapes" and str(self.data_dir) != DEFAULT_DATA_DIR:
            yield f"--data_dir {self.data_dir} has no effect with --dataset shapes, which is embedded"
        if isinstance(source, Tree) and self.dataset != "cifar10":
            yield f"--dataset {self.dataset} has no effect: {self.data_dir} holds images in folders of their classes"
        if isinstance(source, OfficialFiles) and all((self.data_dir / name).is_dir() for name in SPLITS):
            yield f"{self.data_dir} holds images in train/ and test/ too, which are not used: --dataset's are"
        if self.mirrors and not isinstance(source, OfficialFiles):
            yield "--data.mirrors has no effect: nothing is downloaded for these data"
        if stage in (None, "fit"):
            if self.augment.pad != "zeros" and not self.augment.crop:
                yield f"--data.augment.pad {self.augment.pad} has no effect without --data.augment.crop"
            if self.num_workers not in (0, NUM_WORKERS) and not self.transform:
                yield f"--data.num_workers {self.num_workers} has no effect without --data.transform"

    @property
    def train(self) -> Split:
        return self._read(self._train, "fit")

    @property
    def test(self) -> Split:
        return self._read(self._test, "test")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes, known after setup."""
        return self._read(self._train or self._test, "fit").classes

    def _read(self, split: Split | None, stage: str) -> Split:
        if split is None:
            raise UserError(f"the images are not read yet: call setup({stage!r}) first, which a Trainer does by itself")
        return split

    def train_batches(self) -> TrainBatches:
        """The order and shares of training batches on this rank, without their pixels."""
        # Lightning asks for the same batches in each epoch then
        overfit = bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        rank, num_ranks = self._rank()
        num_images = len(self.train.labels)
        # a rank without an image in the last batch: the mean loss of other people's modules is not a number there
        drop_last = self.drop_last or (self.normalised and num_images % self.batch_size < num_ranks)
        return TrainBatches(num_images, self.batch_size, self.seed, not overfit, drop_last, rank, num_ranks)

    def train_dataloader(self) -> DeviceLoader:
        batches = self.train_batches()
        transform = nn.Sequential(*self.transform) if self.transform else None
        num_epochs = self.trainer.max_epochs if self.trainer else None
        workers: dict[str, Any] = {"transform": transform, "num_workers": self.num_workers}
        return DeviceLoader(
            self.train, batches, self._device(), self.augment, **workers, num_epochs=num_epochs, finish=self._finish()
        )

    def val_dataloader(self) -> DeviceLoader | list[DeviceLoader]:
        return self._eval_loader(self._val) if self._val else []

    def test_dataloader(self) -> DeviceLoader:
        return self._eval_loader(self.test)

    def predict_dataloader(self) -> DeviceLoader:
        """The test images, with their labels."""
        return self.test_dataloader()

    def num_batches(self) -> dict[str, int]:
        """Batches of 'train', 'val' and 'test' on each rank, of those that are set up and have images."""
        of_stages = {"train": self.train_batches(), "val": self.eval_batches("val"), "test": self.eval_batches("test")}
        return {stage: len(batches) for stage, batches in of_stages.items() if batches is not None}

    def eval_batches(self, stage: str) -> EvalBatches | None:
        """The shares of 'val' or 'test' images on this rank, without their pixels; None where there are none."""
        split = {"val": self._val, "test": self._test}[stage]
        return self._eval_batches(split) if split else None

    def _eval_batches(self, split: Split) -> EvalBatches:
        size = self._default_eval_batch() if self.eval_batch_size is None else self.eval_batch_size
        return EvalBatches(len(split.labels), size, *self._rank())

    def _default_eval_batch(self) -> int:
        device = self._device()
        is_large = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU
        size = GPU_EVAL_BATCH if is_large else EVAL_BATCH
        return self.trainer.strategy.broadcast(size) if self.trainer else size  # ranks have equally many batches

    def _eval_loader(self, split: Split) -> DeviceLoader:
        return DeviceLoader(split, self._eval_batches(split), self._device(), finish=self._finish())

    def _finish(self) -> Callable[[Tensor], Tensor] | None:
        if not self.normalised:
            return None
        mean, std = (torch.tensor(numbers, device=self._device()).view(3, 1, 1) for numbers in (self.mean, self.std))
        return functools.partial(_normalised, mean=mean, std=std)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")


def _normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """What ToTensor and Normalize of torchvision make of uint8 images, to the bit."""
    return images.float().div_(255).sub_(mean).div_(std)
