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

    def part(mask: Tensor) -> Split:
        return Split(train.images[mask], train.labels[mask], train.classes)

    return part(~in_val), part(in_val)
