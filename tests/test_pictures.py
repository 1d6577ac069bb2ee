"""Pictures show what they are given, whole: text uncut, colours that follow the numbers, few classes or many."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cifar.results import pictures
from lit_cifar.results.metrics import NUM_BINS, Calibration, Mistakes
from lit_cifar.results.report import Report

NONE_WRONG = Mistakes(
    torch.zeros(0, 3, 32, 32, dtype=torch.uint8), *(torch.zeros(0, dtype=torch.int64),) * 2, torch.zeros(0)
)
ZEROS = torch.zeros(NUM_BINS, dtype=torch.int64)
UNSEEN = Calibration(ZEROS, ZEROS, ZEROS.double())


def report(confusion: Tensor, names: list[str] | None = None) -> Report:
    classes = tuple(names or [f"class {label}" for label in range(len(confusion))])
    return Report(confusion, 0.5, classes, UNSEEN, NONE_WRONG)


def has_white_border(picture: pictures.Picture) -> bool:
    edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
    return all(bool((edge == 255).all()) for edge in edges)


@pytest.mark.parametrize("num_classes", [1, 2, 10, 20, 21, 60, 61, 100, 1000, 3000])
def test_a_confusion_matrix_of_any_size_is_whole(num_classes: int) -> None:
    names = [f"a class with a long name, number {label}" for label in range(num_classes)]
    picture = pictures.confusion_matrix(report(torch.eye(num_classes, dtype=torch.int64) * 12_345, names))
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert max(picture.shape) < 1600, "TensorBoard would shrink it beyond reading"
    assert has_white_border(picture), "something is cut"


def test_the_picture_of_many_classes_shows_groups_of_neighbours_and_the_worst_pairs() -> None:
    confusion = 100 * torch.eye(1000, dtype=torch.int64)
    right = pictures.confusion_matrix(report(confusion))
    assert num_pixels(right, pictures.BLUE) == 0, "no pair is confused"
    assert num_pixels(right, pictures.DARKEST) == 50 * 12 * 12
    for label in range(0, 300, 10):  # of each a whole class
        confusion[label, label], confusion[label, label + 500] = 0, 100
    picture = pictures.confusion_matrix(report(confusion))
    assert picture.shape == right.shape
    bars = (picture == pictures.BLUE).all(2).sum(1)
    assert set(bars[bars > 0].tolist()) == {121}, "a whole class is a whole bar"
    assert int((bars > 0).sum()) == pictures.NUM_PAIRS * 15
    assert 0 < num_pixels(picture, pictures.DARKEST) < 50 * 12 * 12, "groups that are confused are less dark"


def test_images_that_predict_no_class_and_names_that_hold_control_characters_are_drawn() -> None:
    confusion = torch.tensor([[3, 1, 2], [0, 4, 0]])
    names = ["two\nlines", "\x1b[2J\udcff"]
    assert has_white_border(pictures.confusion_matrix(report(confusion, names)))
    found = Mistakes(torch.stack([red(70)]), torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]))
    assert has_white_border(pictures.mistakes(found, names))
    assert has_white_border(pictures.training_images(found.images, found.labels, names))
    many = torch.eye(100, dtype=torch.int64).roll(1, 1)
    assert has_white_border(pictures.confusion_matrix(report(many, names * 50)))


def test_darker_cells_are_larger_shares_of_their_row() -> None:
    def lightness(share: int) -> float:
        confusion = torch.zeros(30, 30, dtype=torch.int64)  # so many classes have no counts written on cells
        confusion[0, 1], confusion[0, 0] = share, 100 - share
        other = confusion.clone()
        other[0, 1], other[0, 0] = 0, 100
        changed = (
            pictures.confusion_matrix(report(confusion)).astype(int)[120:]
            - pictures.confusion_matrix(report(other)).astype(int)[120:]
        )
        return float(changed.min())

    shares = [lightness(share) for share in (2, 10, 30, 60, 100)]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == len(shares)


# reds that no grey letter has
def red(value: int, side: int = 32) -> Tensor:
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    image[0] = value
    return image


def num_pixels(picture: pictures.Picture, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(2).sum())


def test_mistakes_show_their_images_and_none_at_all_is_a_picture_too() -> None:
    images = torch.stack([red(70), red(200), red(70)])
    found = Mistakes(images, torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.9, 0.5]))
    picture = pictures.mistakes(found, ("cat", "dog"))
    assert num_pixels(picture, (70, 0, 0)) == 2 * num_pixels(picture, (200, 0, 0)) == 2 * 128 * 128
    assert has_white_border(picture)
    assert has_white_border(pictures.mistakes(NONE_WRONG, ("cat", "dog")))


@pytest.mark.parametrize("side", [16, 24, 32])
def test_training_images_stand_in_order_at_one_size(side: int) -> None:
    images = torch.stack([red(40 * label + 40, side) for label in range(5)])
    picture = pictures.training_images(images, torch.arange(5), tuple("abcde"))
    assert has_white_border(picture)
    places = [np.argwhere((picture == (40 * label + 40, 0, 0)).all(2)) for label in range(5)]
    assert all(len(place) == 64 * 64 for place in places)
    columns = [place[:, 1].min() for place in places]
    assert columns == sorted(columns)


def test_filters_are_scaled_each_by_itself_with_0_as_grey() -> None:
    weight = torch.zeros(2, 3, 2, 2)
    weight[0, 0, 0, 0], weight[1, 1, 1, 1] = 5.0, -0.001
    picture = pictures.filters(weight)
    assert num_pixels(picture, (255, 128, 128)) == 24 * 24
    assert num_pixels(picture, (128, 0, 128)) == 24 * 24
    assert num_pixels(picture, (128, 128, 128)) >= 6 * 24 * 24


def test_a_reliability_diagrams_bars_are_as_high_as_the_accuracy() -> None:
    heights = []
    for num_correct in (0, 25, 50, 100):
        num_images, correct, confidence = ZEROS.clone(), ZEROS.clone(), ZEROS.double()
        num_images[14], correct[14], confidence[14] = 100, num_correct, 99.0
        picture = pictures.reliability(Calibration(num_images, correct, confidence))
        heights.append(int((picture[70:] == pictures.BLUE).all(2).any(1).sum()))
        assert has_white_border(picture)
    assert heights[0] <= 1
    assert heights[1] == pytest.approx(90, abs=4)
    assert heights[2] == pytest.approx(180, abs=4)
    assert heights[3] == pytest.approx(360, abs=4)
