"""One half of a data set, checked, and the validation images taken from it. Where they come from is in source.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_cifar.data.seeds import make_generator
from lit_cifar.errors import UserError


@dataclass(frozen=True)
class Split:
    """The training, validation or test images of a data set, checked when made.

    Raises:
        ValueError: a shape, a dtype or the range of the labels is wrong.
    """

    images: Tensor  # (N, 3, 32, 32) uint8 0..255, contiguous
    labels: Tensor  # (N,) int64, 0..K-1
    classes: tuple[str, ...]  # K names; labels index into them

    def __post_init__(self) -> None:
        num_images, num_classes = len(self.labels), len(self.classes)
        if self.images.shape != (num_images, 3, 32, 32) or self.labels.shape != (num_images,):
            raise ValueError(f"images {tuple(self.images.shape)} and labels {tuple(self.labels.shape)} do not match")
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.int64:
            raise ValueError(f"images are {self.images.dtype}, labels {self.labels.dtype}; want uint8 and int64")
        if not self.images.is_contiguous():
            raise ValueError("images are not contiguous")
        if num_images and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < num_classes:
            raise ValueError(f"labels go beyond 0..{num_classes - 1}")


def split_validation(train: Split, num_val: int, seed: int) -> tuple[Split, Split]:
    """Splits into (training, validation), the validation part stratified: class shares differ by at most one image.

    The training part takes over the memory of `train`, which is of no use afterwards: a million images are 3 GB.

    Raises:
        UserError: num_val leaves a class without training images.
    """
    num_classes = len(train.classes)
    generator = make_generator(seed, "validation")
    remainder = torch.randperm(num_classes, generator=generator)[: num_val % num_classes]
    chosen: list[Tensor] = []
    # sorted at once: a mask for each class left holes between what is kept, 1 KB an image with 1,000 classes
    by_class = train.labels.argsort(stable=True).split(train.labels.bincount(minlength=num_classes).tolist())
    for label, of_class in enumerate(by_class):
        num_chosen = num_val // num_classes + int(label in remainder)
        if not 0 <= num_chosen < len(of_class):
            raise UserError(
                f"--data.num_val {num_val} takes {num_chosen} of the {len(of_class)} training images of class "
                f"{train.classes[label]!r} and leaves none: choose fewer"
            )
        chosen.append(of_class[torch.randperm(len(of_class), generator=generator)[:num_chosen]])
    in_val = torch.zeros(len(train.labels), dtype=torch.bool)
    in_val[torch.cat(chosen)] = True

    val = Split(train.images.index_select(0, in_val.nonzero().flatten()), train.labels[in_val], train.classes)
    return _compacted(train, (~in_val).nonzero().flatten()), val


def _compacted(split: Split, kept: Tensor) -> Split:
    """The images at the indices `kept`, in ascending order, moved to the front of the split's own memory."""
    for start in range(0, len(kept), 2**12):
        of_chunk = kept[start : start + 2**12]  # no index is less than its place: what is overwritten was moved before
        split.images[start : start + len(of_chunk)] = split.images.index_select(0, of_chunk)
    return Split(split.images[: len(kept)], split.labels[kept], split.classes)
