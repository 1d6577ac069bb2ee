"""One half of a data set, checked, and the validation images taken from it. Where they come from is in source.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_cifar.data.seeds import make_generator
from lit_cifar.errors import UserError

CHUNK = 10_000  # images that are moved at once: 31 MB


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

    Both take over the memory of `train`, which is of no use afterwards: a million images are 3 GB.

    Raises:
        UserError: num_val leaves a class without training images.
    """
    num_classes = len(train.classes)
    generator = make_generator(seed, "validation")
    share, rest = divmod(num_val, num_classes)
    num_chosen = [share] * num_classes
    for label in torch.randperm(num_classes, generator=generator)[:rest].tolist():
        num_chosen[label] += 1
    num_of_class = torch.bincount(train.labels, minlength=num_classes).tolist()
    in_val = torch.zeros(len(train.labels), dtype=torch.bool)
    # sorted once for all classes: to search for each took as many passes over the labels
    for label, of_class in enumerate(train.labels.argsort(stable=True).split(num_of_class)):
        if num_chosen[label] < 0 or (num_chosen[label] and num_chosen[label] >= len(of_class)):
            raise UserError(
                f"--data.num_val {num_val} takes {num_chosen[label]} of the {len(of_class)} training images of class "
                f"{train.classes[label]!r} and leaves none: choose fewer"
            )
        in_val[of_class[torch.randperm(len(of_class), generator=generator)[: num_chosen[label]]]] = True
    images = train.images
    num_train = len(images) - num_val
    _partition(images, in_val)
    parts = (images[:num_train], train.labels[~in_val]), (images[num_train:], train.labels[in_val])
    train_part, val_part = (Split(*part, train.classes) for part in parts)
    return train_part, val_part


def _partition(images: Tensor, last: Tensor) -> None:
    """Moves the images (N, ...) that `last` (N,) bool names behind the others, within their memory; order is kept.

    Beside them there is room for CHUNK images, and for those that move to the end.
    """
    moved, start = images[last], 0
    for kept in (~last).nonzero().flatten().split(CHUNK):  # each comes from where it goes, or from behind it
        images[start : start + len(kept)] = images[kept]
        start += len(kept)
    images[start:] = moved
