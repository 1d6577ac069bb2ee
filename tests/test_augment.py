"""What augmentation promises: torchvision's pixels, image by image, from draws that do not depend on one another."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from lit_cifar.data.augment import CUTOUT_FILL, Augment, Draws
from lit_cifar.errors import UserError

ALL = Augment(crop=4, pad="reflect", flip="random", cutout=8, brightness=0.3, contrast=0.4)
SWITCHES = {"crop": 2, "flip": "random", "cutout": 8, "brightness": 0.3, "contrast": 0.4}
FIELDS = {"crop": "offsets", "flip": "flips", "cutout": "centres", "brightness": "brightness", "contrast": "contrast"}


def make_images(num_images: int = 40) -> Tensor:
    return torch.randint(256, (num_images, 3, 32, 32), generator=generator(99), dtype=torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("pad", "numpy_mode"), [("zeros", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("crop", [1, 4])
def test_crop_equals_padding_and_slicing_each_image(crop: int, pad: str, numpy_mode: str) -> None:
    images = make_images((2 * crop + 1) ** 2)
    offsets = torch.cartesian_prod(*[torch.arange(2 * crop + 1)] * 2)  # every offset once
    cropped = Augment(crop=crop, pad=pad).apply(images, Draws(offsets=offsets))  # type: ignore[arg-type]
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (crop, crop), (crop, crop)), mode=numpy_mode)  # type: ignore[call-overload]
    for image, whole, (row, column) in zip(cropped.numpy(), padded, offsets.tolist(), strict=True):
        assert np.array_equal(image, whole[:, row : row + 32, column : column + 32])


def test_every_offset_is_drawn_and_about_equally_often() -> None:
    offsets = Augment(crop=4).draw(8100, generator()).offsets
    assert offsets is not None
    counts = torch.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert len(counts) == 81
    assert 50 < counts.min() <= counts.max() < 150  # 100 expected, standard deviation 10


def test_flip_mirrors_exactly_the_images_drawn() -> None:
    images = make_images()
    draws = Augment(flip="random").draw(len(images), generator())
    assert draws.flips is not None
    flipped = Augment(flip="random").apply(images, draws)
    for image, original, flip in zip(flipped, images, draws.flips, strict=True):
        assert torch.equal(image, reference.horizontal_flip(original) if flip else original)
    assert 5 < int(draws.flips.sum()) < 35


@pytest.mark.parametrize("kind", ["brightness", "contrast"])
def test_colour_is_within_one_level_of_torchvision(kind: str) -> None:
    images = make_images()
    augment = Augment(**{kind: 0.8})  # type: ignore[arg-type]
    draws = augment.draw(len(images), generator())
    factors = getattr(draws, kind)
    assert 0.2 <= factors.min() < 0.5
    assert 1.5 < factors.max() <= 1.8
    adjust = getattr(reference, f"adjust_{kind}")
    for image, original, factor in zip(augment.apply(images, draws), images, factors.tolist(), strict=True):
        assert (image.int() - adjust(original, factor).int()).abs().max() <= 1
        assert not torch.equal(image, original)


@pytest.mark.parametrize("side", [7, 8, 33])
def test_cutout_is_a_grey_square_around_its_centre_clipped_at_the_borders(side: int) -> None:
    places = [(0, 0), (0, 31), (31, 0), (31, 31), (16, 2), (15, 16)]
    images = make_images(len(places)).clamp(max=CUTOUT_FILL - 1)  # so that grey comes from cutout alone
    result = Augment(cutout=side).apply(images, Draws(centres=torch.tensor(places)))
    for image, original, (row, column) in zip(result, images, places, strict=True):
        top, left = row - side // 2, column - side // 2
        expected = original.clone()
        expected[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = CUTOUT_FILL
        assert torch.equal(image, expected)


@pytest.mark.parametrize(("kind", "other"), list(permutations(SWITCHES, 2)))
def test_draws_of_one_augmentation_do_not_change_when_another_is_switched(kind: str, other: str) -> None:
    alone = Augment(**{kind: SWITCHES[kind]})  # type: ignore[arg-type]
    both = Augment(**{kind: SWITCHES[kind], other: SWITCHES[other]})  # type: ignore[arg-type]
    field = FIELDS[kind]
    drawn = getattr(alone.draw(50, generator()), field)
    assert torch.equal(drawn, getattr(both.draw(50, generator()), field))
    assert len(drawn.unique()) > 1


def test_what_is_off_is_neither_drawn_nor_applied() -> None:
    images = make_images()
    draws = Augment().draw(len(images), generator())
    assert draws == Draws()
    assert torch.equal(Augment().apply(images, draws), images)


def test_draws_follow_from_the_state_of_the_generator() -> None:
    first, again, other = (ALL.draw(50, generator(seed)) for seed in (5, 5, 6))
    for name, drawn in vars(first).items():
        assert torch.equal(drawn, getattr(again, name))
        assert not torch.equal(drawn, getattr(other, name))


def test_an_image_becomes_the_same_whatever_stands_beside_it() -> None:
    images = make_images()
    draws = ALL.draw(len(images), generator())
    whole = ALL.apply(images, draws)
    for indices in (torch.randperm(40, generator=generator()), torch.tensor([7, 7, 0]), torch.tensor([39])):
        assert torch.equal(ALL.apply(images[indices], draws[indices]), whole[indices])


@pytest.mark.parametrize("kind", [*SWITCHES, "all"])
def test_images_keep_shape_and_dtype_and_the_originals_stay_as_they_were(kind: str) -> None:
    augment = ALL if kind == "all" else Augment(**{kind: SWITCHES[kind]})  # type: ignore[arg-type]
    images = make_images()
    before = images.clone()
    result = augment.apply(images, augment.draw(len(images), generator()))
    assert (result.shape, result.dtype, result.device) == (before.shape, torch.uint8, before.device)
    assert not torch.equal(result, before)
    assert torch.equal(images, before)
    none = augment.apply(images[:0], augment.draw(0, generator()))  # a rank's share of a short batch may be empty
    assert (none.shape, none.dtype) == ((0, 3, 32, 32), torch.uint8)


def test_no_more_pixels_are_reflected_than_an_image_has() -> None:
    widest = Augment(crop=31, pad="reflect")
    images = make_images(4)
    assert widest.apply(images, widest.draw(4, generator())).shape == images.shape
    with pytest.raises(UserError, match=r"crop=32 does not go with .*pad='reflect': choose 31 or less"):
        Augment(crop=32, pad="reflect")
