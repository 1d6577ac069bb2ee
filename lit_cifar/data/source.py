"""Finds what `data_dir` is. Each kind of data source reads its own images: official.py, tree.py, shapes.py."""

import os
from collections.abc import Sequence

from lit_cifar.data.archives import ARCHIVES
from lit_cifar.data.cache import SPLITS
from lit_cifar.data.members import ARCHIVE_SUFFIXES
from lit_cifar.data.official import OfficialArchive, OfficialFiles, official_folder, other_dataset, published_in
from lit_cifar.data.shapes import Shapes
from lit_cifar.data.tree import Tree
from lit_cifar.errors import UserError
from lit_cifar.files import local_path

# Where images come from. Each has `is_here`, whether they are on this machine; `num_classes`, known without a download;
# `prepare()`, which downloads, unpacks or decodes what is missing; and `read(train)`, before which `prepare` comes.
Source = OfficialFiles | OfficialArchive | Tree | Shapes


def find_source(
    data_dir: str | os.PathLike[str], dataset: str = "cifar10", mirrors: Sequence[str] | None = None
) -> Source:
    """What `data_dir` is; it writes and downloads nothing.

    Args:
        data_dir: a folder with the dataset's unpacked files, or the folder above; the dataset's archive, whatever it
            is called; a tree with train/ and test/; an archive of a tree, known by its suffix; or a folder that does
            not exist or has none of these, to download the dataset into.
        dataset: 'cifar10', 'cifar100', or 'shapes', for which `data_dir` has no meaning.
        mirrors: where the dataset's archive is fetched from, in place of the public mirrors.

    Raises:
        UserError: `data_dir` is a URL, half a tree, a file that is no archive, an archive that does not exist, or the
            archive of another dataset.
    """
    path = local_path(data_dir, "--data_dir")
    if dataset == "shapes":
        return Shapes()
    if path.is_dir():
        present = [name for name in SPLITS if (path / name).is_dir()]
        if official_folder(path, dataset) is not None or not present:
            return OfficialFiles(path, dataset, mirrors)
        if len(present) == 1:
            missing = "test" if present == ["train"] else "train"
            raise UserError(f"{path} has a folder {present[0]}/ but no {missing}/: add {missing}/<class>/<image>")
        return Tree(path)
    named_as_archive = path.name.lower().endswith(ARCHIVE_SUFFIXES)
    if path.exists():
        published = published_in(path)
        if published == dataset:
            return OfficialArchive(path, dataset)
        if published is not None:
            raise UserError(other_dataset(path, published, dataset))
        if named_as_archive:
            return Tree(path)
        raise UserError(f"{path} is neither a folder nor an archive; looked for {', '.join(ARCHIVE_SUFFIXES)}")
    if named_as_archive:
        raise UserError(
            f"there is no archive {path}; check the path, or give a folder to download {ARCHIVES[dataset].title} into"
        )
    return OfficialFiles(path, dataset, mirrors)
