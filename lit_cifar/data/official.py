"""The official files of CIFAR-10 and CIFAR-100, in a folder or in their archive. download.py fetches the archive, and
archives.py verifies and unpacks it; torchvision reads the files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lit_cifar.data import archives, download
from lit_cifar.data.archives import ARCHIVES
from lit_cifar.data.cache import cache_dir
from lit_cifar.data.members import first_folder
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError

DEFAULT_DATA_DIR = "data"  # may hold other things than the dataset, which is downloaded beside them
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
# by which a folder that was renamed is known
KNOWN_BY = {"cifar10": ("data_batch_1",), "cifar100": ("train", "meta")}


class OfficialFiles:
    """A data source: a dataset's unpacked files, in `folder` or in the folder of their own name below it.

    Where they are not, `prepare` downloads them.
    """

    def __init__(self, folder: Path, dataset: str, mirrors: Sequence[str] | None = None) -> None:
        self.folder, self.dataset, self.mirrors = folder, dataset, mirrors
        self.num_classes = NUM_CLASSES[dataset]

    @property
    def is_here(self) -> bool:
        return official_folder(self.folder, self.dataset) is not None

    def prepare(self) -> None:
        """Downloads and unpacks the archive when the files are not there.

        Raises:
            UserError: no mirror delivers the archive, or the folder holds other things, which a download would mix
                with.
        """
        if not self.is_here:
            self._check_may_download()
            download.fetch_folder(self.folder, ARCHIVES[self.dataset], self.mirrors or None)

    def read(self, train: bool) -> Split:
        """The official training or test images. Raises what `read_official` raises."""
        return read_official(self.folder, self.dataset, train)

    def _check_may_download(self) -> None:
        if self.folder == Path(DEFAULT_DATA_DIR) or not self.folder.is_dir():
            return
        spec = ARCHIVES[self.dataset]
        # what an earlier, interrupted download left does not count
        if all(entry.name.startswith(".") for entry in self.folder.iterdir()) or (self.folder / spec.name).is_file():
            return
        found = find_dataset(self.folder)
        if found not in (None, self.dataset):
            raise UserError(other_dataset(self.folder, found, self.dataset))
        raise UserError(
            f"{self.folder} holds neither {spec.title} ({spec.folder}/) nor an image tree (train/<class>/ and "
            "test/<class>/); name one of them or an archive with --data_dir (a missing or empty folder is filled "
            f"with {spec.title})"
        )


class OfficialArchive:
    """A data source: a dataset's published archive, which is unpacked into the folder for caches."""

    is_here = True

    def __init__(self, path: Path, dataset: str) -> None:
        self.path, self.dataset = path, dataset
        self.num_classes = NUM_CLASSES[dataset]

    @property
    def folder(self) -> Path:
        """Where the archive is unpacked."""
        return cache_dir() / self.dataset

    def prepare(self) -> None:
        """Verifies and unpacks the archive unless that was done before.

        Raises:
            UserError: it is not the published archive, or the folder for caches cannot be written.
        """
        if official_folder(self.folder, self.dataset) is None:
            archives.unpack(self.path, self.folder, ARCHIVES[self.dataset])

    def read(self, train: bool) -> Split:
        """The official training or test images. Raises what `read_official` raises."""
        return read_official(self.folder, self.dataset, train)


def official_folder(folder: Path, dataset: str) -> Path | None:
    """The folder that a dataset's unpacked files lie in: this one or one in it; None when neither does."""
    unpacked = folder / ARCHIVES[dataset].folder
    if unpacked.is_dir():
        return unpacked
    return folder if all((folder / name).is_file() for name in KNOWN_BY[dataset]) else None


def find_dataset(folder: Path) -> str | None:
    """The dataset of `ARCHIVES` whose files or whose archive a folder holds, if any."""
    for dataset, spec in ARCHIVES.items():
        if official_folder(folder, dataset) is not None or (folder / spec.name).is_file():
            return dataset
    return None


def published_in(path: Path) -> str | None:
    """The dataset of `ARCHIVES` that an archive holds, whatever it is called; None when it holds none or is damaged."""
    first = first_folder(path)
    return next((dataset for dataset, spec in ARCHIVES.items() if spec.folder == first), None)


def other_dataset(path: Path, found: str, wanted: str) -> str:
    """The line about a path that holds another dataset than was asked for."""
    return (
        f"{path} holds {ARCHIVES[found].title}, not {ARCHIVES[wanted].title}: add --dataset {found}, or name other "
        "data with --data_dir"
    )


def read_official(folder: Path, dataset: str, train: bool) -> Split:
    """The official 50,000 training or 10,000 test images of 'cifar10' or 'cifar100' in the official order.

    CIFAR-100's labels are the fine ones, of 100 classes. `folder` holds the unpacked archive's folder or is it. No
    pickle is opened before the sums of all files are right.

    Raises:
        UserError: a file is missing or its MD5 sum is wrong; the first such file is named.
    """
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity

    files = official_folder(folder, dataset)
    if files is None:
        raise UserError(f"{folder} does not hold {ARCHIVES[dataset].folder}/; give the folder that does")
    reader = CIFAR100 if dataset == "cifar100" else CIFAR10
    sums = [*reader.train_list, *reader.test_list, [reader.meta["filename"], reader.meta["md5"]]]
    for name, md5 in sums:
        if not (files / name).is_file():
            raise UserError(f"{files / name} is missing; delete {files} and start again")
        if not check_integrity(str(files / name), md5):
            raise UserError(f"{files / name} does not match its checksum (damaged?); delete {files} and start again")

    class Renamed(reader):  # type: ignore[misc, valid-type]
        base_folder = ""  # the folder may have been renamed

    data = Renamed(str(files), train=train, download=False)
    images = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
    return Split(torch.from_numpy(images), torch.tensor(data.targets, dtype=torch.int64), tuple(data.classes))
