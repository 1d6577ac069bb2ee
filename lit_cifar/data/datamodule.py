"""CIFAR10DataModule: which source, the validation split, the loaders. Per-batch work is loader's and augment's."""

import contextlib
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lit_cifar.data import download, shapes, sources
from lit_cifar.data.augment import Augment
from lit_cifar.data.loader import DeviceLoader, EvalBatches, TrainBatches, check_transform, make_generator
from lit_cifar.data.sources import Split
from lit_cifar.errors import UserError

DEFAULT_DATA_DIR = "data"
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}  # of the official sets


class CIFAR10DataModule(LightningDataModule):
    """CIFAR-10 or CIFAR-100 (50,000 training and 10,000 test images of 32x32), or other images in their place.

    Args:
        data_dir: where the images are: a folder with the dataset's official files (downloaded into it when it is
            missing or empty), a tree train/<class>/* and test/<class>/* of images in any number of classes, or an
            archive of such a tree (.tar, .tar.gz, .tar.xz, .zip).
        dataset: 'cifar10' or 'cifar100' (its 100 fine classes), from data_dir; or 'shapes', ten classes of drawn
            shapes, embedded, nothing to download. Where data_dir is a tree or its archive, the tree decides.
        batch_size: images in the batch of one optimiser step, shared by all devices.
        eval_batch_size: most images in one device's batch in validation and test; it changes no result.
        num_val: images taken from the training set for validation, equally many of each class; 0 is none. The test set
            is never used for selection.
        augment: built-in augmentation of training images, on the device.
        transform: torchvision v2 transforms applied in turn to each training image (uint8, 3x32x32) by workers, for
            example RandAugment.
        num_workers: processes on each device that apply the transform.
        drop_last: leave out the last training batch of an epoch when it is shorter than the others.
        mirrors: where the dataset's archive is fetched from, in order: URLs (file:// too) or folders; the default is
            a list of public mirrors.
        seed: with the epoch, decides the order and augmentation of training images, and the validation split.
    """

    def __init__(
        self,
        data_dir: str = DEFAULT_DATA_DIR,
        dataset: Literal["cifar10", "cifar100", "shapes"] = "cifar10",
        batch_size: int = 4,
        eval_batch_size: int = 500,
        num_val: int = 0,
        augment: Augment = Augment(),  # noqa: B008 (frozen)
        transform: list[nn.Module] | None = None,
        num_workers: int = 2,
        drop_last: bool = False,
        mirrors: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data_dir = Path(data_dir)
        self.dataset = dataset
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_val = num_val
        self.augment = augment
        self.transform = transform
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.mirrors = mirrors
        self.seed = seed
        self._prepared = False
        self._cache_file: Path | None = None
        self._train: Split | None = None
        self._val: Split | None = None
        self._test: Split | None = None

    def prepare_data(self) -> None:
        """Downloads or decodes what is missing; locks let any number of processes call it at once.

        Raises:
            UserError: there is no data and no way to get it, or it is damaged.
        """
        if self.dataset == "shapes" or self._prepared:
            return
        source = sources.find_source(self.data_dir, self.dataset)
        if source == "nothing":
            self._check_may_download()
            download.fetch_folder(self.data_dir, download.ARCHIVES[self.dataset], self.mirrors or None)
        elif source == "official-archive" and sources.find_source(self._unpacked_dir(), self.dataset) != "official":
            download.unpack(self.data_dir, self._unpacked_dir(), download.ARCHIVES[self.dataset])
        elif source in ("tree", "archive"):
            self._cache_file = sources.prepare_tree(self.data_dir)
        self._prepared = True

    def count_classes(self) -> int:
        """The number of classes K, before setup and without a download: a tree or archive of images is prepared for it.

        Raises:
            UserError: as of prepare_data.
        """
        if self.dataset == "shapes":
            return len(shapes.CLASSES)
        if sources.find_source(self.data_dir, self.dataset) not in ("tree", "archive"):
            return NUM_CLASSES[self.dataset]
        self.prepare_data()
        assert self._cache_file is not None
        return len(sources.prepared_classes(self._cache_file))

    def adopt_prepared(self, other: "CIFAR10DataModule") -> None:
        """Takes over what `other` has prepared, which names the same data: a tree is not listed twice."""
        self._prepared, self._cache_file = other._prepared, other._cache_file

    def setup(self, stage: str) -> None:
        """Reads what the stage needs: 'fit', 'validate' or 'test'."""
        if stage in ("fit", "validate") and self._train is None:
            train = self._read(train=True)
            if self.num_val:
                self._train, self._val = split_validation(train, self.num_val, self.seed)
            else:
                self._train = train
            if self.transform:
                check_transform(nn.Sequential(*self.transform), self._train)
        if stage == "test" and self._test is None:
            self._test = self._read(train=False)

    def use_images_of(self, other: "CIFAR10DataModule") -> None:
        """Shares the training and validation images that another module, with the same settings of them, has read."""
        self._train, self._val = other._train, other._val
        self._prepared, self._cache_file = other._prepared, other._cache_file

    @property
    def train(self) -> Split:
        assert self._train is not None, "setup('fit') comes first"
        return self._train

    @property
    def test(self) -> Split:
        assert self._test is not None, "setup('test') comes first"
        return self._test

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes, known after setup."""
        split = self._train or self._test
        assert split is not None, "setup comes first"
        return split.classes

    def train_batches(self) -> TrainBatches:
        """The order and shares of training batches on this rank, without their pixels."""
        # Lightning asks for the same batches in each epoch then
        overfit = bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        return TrainBatches(
            len(self.train.labels), self.batch_size, self.seed, not overfit, self.drop_last, *self._rank()
        )

    def train_dataloader(self) -> DeviceLoader:
        batches = self.train_batches()
        if self.transform:
            transform = nn.Sequential(*self.transform)
            return DeviceLoader(self.train, batches, self._device(), transform=transform, num_workers=self.num_workers)
        return DeviceLoader(self.train, batches, self._device(), augment=self.augment)

    def val_dataloader(self) -> DeviceLoader | list[DeviceLoader]:
        return self._eval_loader(self._val) if self._val else []

    def test_dataloader(self) -> DeviceLoader:
        return self._eval_loader(self.test)

    def _eval_loader(self, split: Split) -> DeviceLoader:
        return DeviceLoader(split, EvalBatches(len(split.labels), self.eval_batch_size, *self._rank()), self._device())

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _read(self, train: bool) -> Split:
        if self.dataset == "shapes":
            return sources.draw_shapes(train)
        if self._cache_file is not None:
            with contextlib.suppress(Exception):  # gone or damaged meanwhile: read_tree decodes again
                return sources.read_prepared(self._cache_file, train)
        source = sources.find_source(self.data_dir, self.dataset)
        if source == "official":
            return sources.read_official(self.data_dir, self.dataset, train)
        if source == "official-archive":
            return sources.read_official(self._unpacked_dir(), self.dataset, train)
        return sources.read_tree(self.data_dir, train)

    def _unpacked_dir(self) -> Path:
        return sources.cache_dir() / self.dataset

    def _check_may_download(self) -> None:
        if self.data_dir == Path(DEFAULT_DATA_DIR) or not self.data_dir.is_dir():
            return
        spec = download.ARCHIVES[self.dataset]
        # what an earlier, interrupted download left does not count
        if (
            all(entry.name.startswith(".") for entry in self.data_dir.iterdir())
            or (self.data_dir / spec.name).is_file()
        ):
            return
        found = sources.find_dataset(self.data_dir)
        if found not in (None, self.dataset):
            raise UserError(sources.other_dataset(self.data_dir, found, self.dataset))
        raise UserError(
            f"{self.data_dir} holds neither {spec.title} ({spec.folder}/) nor an image tree (train/<class>/ and "
            "test/<class>/); name one of them or an archive with --data_dir (a missing or empty folder is filled "
            f"with {spec.title})"
        )


def split_validation(train: Split, num_val: int, seed: int) -> tuple[Split, Split]:
    """Splits into (training, validation), the validation part stratified: class shares differ by at most one image.

    Raises:
        UserError: num_val leaves a class without training images.
    """
    num_classes = len(train.classes)
    generator = make_generator(seed, "validation")
    remainder = torch.randperm(num_classes, generator=generator)[: num_val % num_classes]
    chosen: list[Tensor] = []
    for label in range(num_classes):
        of_class = (train.labels == label).nonzero().flatten()
        num_chosen = num_val // num_classes + int(label in remainder)
        if not 0 <= num_chosen < len(of_class):
            raise UserError(
                f"--data.num_val {num_val} takes {num_chosen} of the {len(of_class)} training images of class "
                f"{train.classes[label]!r} and leaves none: choose fewer"
            )
        chosen.append(of_class[torch.randperm(len(of_class), generator=generator)[:num_chosen]])
    in_val = torch.zeros(len(train.labels), dtype=torch.bool)
    in_val[torch.cat(chosen)] = True
    return tuple(Split(train.images[mask], train.labels[mask], train.classes) for mask in (~in_val, in_val))  # type: ignore[return-value]
