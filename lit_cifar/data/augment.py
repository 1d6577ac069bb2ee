"""Crop, flip, cutout and colour as arithmetic on a batch of uint8 images. Nothing here knows epochs: `draw` takes a
generator that loader.py has seeded, and `apply` takes what was drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from lit_cifar.errors import UserError
from lit_cifar.settings import checked_arguments

CUTOUT_FILL = 122  # grey of 0..255, about CIFAR-10's mean pixel, so that the net sees some zeros after normalising
Pad = Literal["zeros", "reflect"]
Flip = Literal["none", "random", "alternating"]
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601 weights, as in torchvision's rgb_to_grayscale


@dataclass(frozen=True)
class Draws:
    """The random numbers of N images; a field is None where that augmentation is off."""

    offsets: Tensor | None = None  # (N, 2) int64 in 0..2 * crop: row and column of the crop in the padded image
    flips: Tensor | None = None  # (N,) bool
    centres: Tensor | None = None  # (N, 2) int64 in 0..31: row and column of cutout's centre
    brightness: Tensor | None = None  # (N,) float32 factors
    contrast: Tensor | None = None  # (N,) float32 factors

    def __getitem__(self, indices: Tensor) -> "Draws":
        """The draws of the images at `indices` (B,) int64."""
        return self.map(lambda field: field[indices])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        """The same with each field that is on changed."""
        return Draws(*(None if field is None else change(field) for field in vars(self).values()))


@dataclass(frozen=True)
class Augment:
    """Which augmentations are applied to training images, each drawn per image and epoch.

    Args:
        crop: pixels of padding on each side before a random 32x32 crop; 0 is off.
        pad: what the padding holds: 'zeros', or the image reflected ('reflect'), at most 31 pixels of it.
        flip: mirror left to right: 'random' with probability 1/2 in each epoch; 'alternating' flips a random half in
            the first epoch and each image the other way in every next one (arXiv 2404.00498, section 3.6).
        cutout: side in pixels of a grey square at a random place, partly outside near the border (arXiv 1708.04552);
            0 is off.
        brightness: pixels are multiplied by a factor from [1 - brightness, 1 + brightness]; 0 is off.
        contrast: distance to the image's mean grey is multiplied by a factor from [1 - contrast, 1 + contrast]; 0 is
            off.

    Raises:
        UserError: a setting is out of its range, or more pixels are to be reflected than an image has.
    """

    crop: NonNegativeInt = 0
    pad: Pad = "zeros"
    flip: Flip = "none"
    cutout: NonNegativeInt = 0
    brightness: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        checked_arguments(Augment, vars(self), "--data.augment.")
        if self.pad == "reflect" and self.crop > 31:
            raise UserError(
                f"--data.augment.crop {self.crop} does not go with --data.augment.pad reflect: choose 31 or less"
            )

    def draw(self, num_images: int, generator: torch.Generator) -> Draws:
        """Draws for `num_images` images from a CPU generator; the same state gives the same draws.

        Each field is drawn whether or not it is on, so that switching one augmentation on leaves the others alone.
        """
        offsets = torch.randint(2 * self.crop + 1, (num_images, 2), generator=generator)
        flips = torch.randint(2, (num_images,), generator=generator).bool()
        centres = torch.randint(32, (num_images, 2), generator=generator)
        brightness = 1 + self.brightness * (2 * torch.rand(num_images, generator=generator) - 1)
        contrast = 1 + self.contrast * (2 * torch.rand(num_images, generator=generator) - 1)
        return Draws(
            offsets=offsets if self.crop else None,
            flips=flips if self.flip != "none" else None,
            centres=centres if self.cutout else None,
            brightness=brightness if self.brightness else None,
            contrast=contrast if self.contrast else None,
        )

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Augments images (B, 3, 32, 32) uint8 with their draws; returns the same shape, dtype and device."""
        if not len(images):  # a rank's share of a short last batch
            return images
        if draws.offsets is not None:
            images = _crop(images, draws.offsets, self.crop, self.pad)
        if draws.flips is not None:
            images = _flip(images, draws.flips)
        if draws.brightness is not None or draws.contrast is not None:
            images = _colour(images, draws.brightness, draws.contrast)
        if draws.centres is not None:
            images = _cutout(images, draws.centres, self.cutout)
        return images


def _crop(images: Tensor, offsets: Tensor, crop: int, pad: str) -> Tensor:
    # Each row of a crop is a run of bytes in the padded images: taking runs costs 0.6 us an image where advanced
    # indexing of windows costs 3.6 (one thread, batch 512).
    num_images, num_channels, side, _ = images.shape
    padded = F.pad(images, (crop,) * 4)
    width = side + 2 * crop
    pixels = torch.arange(width, device=images.device)
    rows = offsets[:, :1] + pixels[:side]
    if pad == "reflect":  # F.pad does not reflect uint8: columns are copied, rows looked up
        mirrored = images.flip(3)
        inner = padded[:, :, crop : crop + side]
        inner[..., :crop] = mirrored[..., side - 1 - crop : side - 1]
        inner[..., crop + side :] = mirrored[..., 1 : 1 + crop]
        last = side - 1
        rows = (crop + last - (last - (pixels - crop).abs()).abs())[rows]
    planes = torch.arange(num_images * num_channels, device=images.device).view(num_images, num_channels, 1)
    first_bytes = (planes * width * width + offsets[:, 1, None, None]) + rows[:, None] * width
    runs = padded.flatten().unfold(0, side, 1)  # a view
    return runs.index_select(0, first_bytes.flatten()).view_as(images)


def _flip(images: Tensor, flips: Tensor) -> Tensor:
    # eight pixels at a time: where() on bytes takes 3.5 us an image, on these 0.7 (one thread)
    flipped, kept = images.flip(3).view(torch.int64), images.view(torch.int64)
    return torch.where(flips[:, None, None, None], flipped, kept).view(torch.uint8)


def _colour(images: Tensor, brightness: Tensor | None, contrast: Tensor | None) -> Tensor:
    # rounded down to uint8 after each step, as torchvision's adjust_brightness and adjust_contrast are
    if brightness is not None:
        images = (images * brightness[:, None, None, None]).clamp(0, 255).to(torch.uint8)
    if contrast is not None:
        red, green, blue = images.float().unbind(1)
        grey = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).floor().mean((1, 2))[:, None, None, None]
        factor = contrast[:, None, None, None]
        images = (factor * images + (1 - factor) * grey).clamp(0, 255).to(torch.uint8)
    return images


def _cutout(images: Tensor, centres: Tensor, side: int) -> Tensor:
    pixels = torch.arange(images.shape[2], device=images.device)
    start = centres - side // 2
    rows, columns = ((pixels >= start[:, i, None]) & (pixels < start[:, i, None] + side) for i in (0, 1))
    square = rows[:, None, :, None] & columns[:, None, None, :]
    return images.masked_fill(square, CUTOUT_FILL)
