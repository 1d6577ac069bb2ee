"""What batches of any data set are to LitClassifier: the scale of float images, labels as classes, or one line on what
does not fit. data.py asks the Trainer for the data."""

from typing import Any

import torch
from torch import Tensor

from lit_cifar.errors import UserError

Scale = tuple[Tensor, Tensor]  # what float images are multiplied by, and what is added then, for 0..255; (3, 1, 1) each
WANTED = "want a pair (images, labels), which the DataLoader's collate_fn can make"
TOLERANCE = 0.02  # of the whole range; half precision and resizing overshoot a little


def find_scale(images: Tensor, mean: Tensor, std: Tensor) -> Scale:
    """How float images (B, 3, 32, 32) are scaled: within [0, 1] as by ToTensor, beyond as normalised by mean and std
    (3, 1, 1), or else as 0..255.

    Raises:
        UserError: they are none of these.
    """
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    low, high = images.amin((0, 2, 3)).view(3, 1, 1), images.amax((0, 2, 3)).view(3, 1, 1)
    for factor, offset in ((one, zero), (std, mean)):
        lowest, highest = low * factor + offset, high * factor + offset
        if bool((lowest >= -TOLERANCE).all() and (highest <= 1 + TOLERANCE).all()):
            return 255 * factor, 255 * offset
    least, most = float(low.min()), float(high.max())
    if least >= 0 and 16 < most <= 255:
        return one, zero
    raise UserError(
        f"images go from {least:.3g} to {most:.3g}, so they are normalised with other numbers than LitClassifier's: "
        "give it the same mean and std, or leave Normalize out"
    )


def images_of(batch: Any) -> Tensor:
    """The images (B, 3, 32, 32) of a batch, which may be images alone, or begin with them.

    Raises:
        UserError: there are none, or they have another shape.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        parts = ", ".join(map(str, batch) if isinstance(batch, dict) else [type(images).__name__])
        raise UserError(f"a batch is a {type(batch).__name__} of {parts}; {WANTED}")
    if images.shape[1:] != (3, 32, 32):
        raise UserError(
            f"images are {'x'.join(map(str, images.shape[1:]))}, but LitClassifier takes 3x32x32: give the data set a "
            "transform with torchvision.transforms.v2.Resize((32, 32)), and before it RGB() for grey ones"
        )
    return images


def images_and_labels(batch: Any, num_classes: int, mixed: bool) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 32, 32) and labels (B,) int64 of a batch.

    Args:
        batch: a pair; its labels are integers (B,) or (B, 1), or shares of the classes (B, K), as of MixUp or one-hot.
        num_classes: number of classes K.
        mixed: leave shares as they are, (B, K) float32, for a loss that takes them.

    Raises:
        UserError: it is something else.
    """
    images = images_of(batch)
    if isinstance(batch, Tensor) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        parts = [] if isinstance(batch, Tensor) else [type(part).__name__ for part in batch]
        raise UserError(f"a batch is a {type(batch).__name__} of {', '.join(parts) or 'images alone'}; {WANTED}")
    labels = batch[1]
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if labels.shape == (len(images), num_classes):
        return images, labels.float() if mixed else labels.argmax(1)
    if labels.shape != (len(images),) or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"labels are {labels.dtype} {tuple(labels.shape)}: want integers ({len(images)},), or shares of the "
            f"classes ({len(images)}, {num_classes})"
        )
    return images, labels.long()


class Intake:
    """What the first batch of each stage has decided, so that no later one waits for the device."""

    def __init__(self) -> None:
        self._scales: dict[str, Scale] = {}  # of float images, by stage
        self._labelled: set[str] = set()  # stages whose labels were checked

    def pixels(self, images: Tensor, stage: str, mean: Tensor, std: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) on the scale 0..255: float ones as new floats, integers as they are.

        Args:
            stage: of the Trainer; '' outside of one, where each call decides.
            mean: of find_scale; so is std.

        Raises:
            UserError: as of find_scale.
        """
        if not images.is_floating_point():
            return images
        images = images.to(mean.dtype)
        scale = self._scales.get(stage) or find_scale(images, mean, std)
        if stage:
            self._scales[stage] = scale
        return torch.addcmul(scale[1], images, scale[0])

    def batch(self, batch: Any, stage: str, num_classes: int) -> Tensor | tuple[Tensor, Tensor]:
        """`images_and_labels`, or in prediction images alone.

        Raises:
            UserError: as of these; labels are not from 0 to K - 1.
        """
        if stage == "predict":
            return images_of(batch)
        images, labels = images_and_labels(batch, num_classes, mixed=stage == "train")
        if stage not in self._labelled and labels.ndim == 1 and len(labels):
            self._labelled.add(stage)
            if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
                raise UserError(
                    f"labels go from {int(labels.min())} to {int(labels.max())}, but there are {num_classes} classes: "
                    "number them from 0, or give the net another number of logits"
                )
        return images, labels
