"""Draws the embedded data set: ten kinds of shapes on varied grounds. Nothing here touches a file."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from lit_cifar.data.split import Split

Floats = npt.NDArray[np.float64]
Shape = Callable[[Floats, Floats], Floats]

NUM_TRAIN, NUM_TEST = 10_000, 2_000
CHUNK = 100  # images drawn at once: an array of 0.8 MB stays in the CPU's cache; divides both numbers by ten classes
COS72, COS36 = (math.sqrt(5) - 1) / 4, (math.sqrt(5) + 1) / 4
SIN72, SIN36 = math.sqrt(1 - COS72 * COS72), math.sqrt(1 - COS36 * COS36)
STAR_NORMALS = ((0.0, 1.0), (SIN72, COS72), (-SIN72, COS72), (SIN36, -COS36), (-SIN36, -COS36))


def bar(u: Floats, v: Floats) -> Floats:
    return np.minimum(0.95 - np.abs(u), 0.28 - np.abs(v))


def circle(u: Floats, v: Floats) -> Floats:
    return 0.82 - np.sqrt(u * u + v * v)


def crescent(u: Floats, v: Floats) -> Floats:
    return np.minimum(0.9 - np.sqrt(u * u + v * v), np.sqrt((u - 0.45) * (u - 0.45) + v * v) - 0.7)


def cross(u: Floats, v: Floats) -> Floats:
    return np.maximum(bar(u, v), bar(v, u))


def diamond(u: Floats, v: Floats) -> Floats:
    return (0.6 * 0.95 - 0.95 * np.abs(u) - 0.6 * np.abs(v)) / math.sqrt(0.6 * 0.6 + 0.95 * 0.95)


def heart(u: Floats, v: Floats) -> Floats:
    u = np.abs(u)
    lobe = 0.75 * math.sqrt(0.5) - np.sqrt((u - 0.375) * (u - 0.375) + (v + 0.375) * (v + 0.375))
    return np.maximum(lobe, (0.75 - u - np.abs(v)) * math.sqrt(0.5))


def ring(u: Floats, v: Floats) -> Floats:
    return 0.2 - np.abs(np.sqrt(u * u + v * v) - 0.7)


def square(u: Floats, v: Floats) -> Floats:
    return 0.72 - np.maximum(np.abs(u), np.abs(v))


def star(u: Floats, v: Floats) -> Floats:
    # Inside where at least four of five half-planes hold: the second smallest of their distances.
    lowest = second = np.full_like(u, 9.0)
    for x, y in STAR_NORMALS:
        distance = 0.36 - (x * u + y * v)
        second = np.minimum(second, np.maximum(lowest, distance))
        lowest = np.minimum(lowest, distance)
    return second


def triangle(u: Floats, v: Floats) -> Floats:
    return 0.5 - np.maximum(v, math.sqrt(0.75) * np.abs(u) - 0.5 * v)


# Each takes coordinates in which the shape about fills the unit disc, v downwards, and gives the distance to its edge,
# positive inside. Some are alike on purpose (circle and heart, diamond and square, cross and star): the tutorial
# recipe is to learn them in seconds and still to confuse a few.
SHAPES: dict[str, Shape] = {
    shape.__name__: shape for shape in (bar, circle, crescent, cross, diamond, heart, ring, square, star, triangle)
}
CLASSES = tuple(SHAPES)


class Shapes:
    """The data source of the embedded set: it is drawn, so that nothing is prepared."""

    is_here = True
    num_classes = len(CLASSES)

    def prepare(self) -> None:
        """Does nothing."""

    def read(self, train: bool) -> Split:
        """10,000 training or 2,000 test drawings, the same on any machine."""
        return draw_shapes(train)


def draw_shapes(train: bool) -> Split:
    """10,000 training or 2,000 test drawings in ten balanced classes; the labels are 0, 1, ... 9, 0, 1, ...

    The bytes are the same on every machine: RandomState's stream is frozen, and what is done with its numbers is one
    correctly rounded operation at a time (+ - * / sqrt floor abs, comparisons), never sin, exp, pow or a sum whose
    order the hardware chooses.
    """
    random = np.random.RandomState(1 if train else 2)
    num_images = NUM_TRAIN if train else NUM_TEST
    images = np.empty((num_images, 3, 32, 32), np.uint8)
    for label, shape in enumerate(SHAPES.values()):
        of_class = images[label :: len(SHAPES)]
        for start in range(0, len(of_class), CHUNK):
            of_class[start : start + CHUNK] = _draw_chunk(shape, random)
    return Split(torch.from_numpy(images), torch.arange(num_images) % len(SHAPES), CLASSES)


def _draw_chunk(shape: Shape, random: np.random.RandomState) -> Floats:
    """CHUNK drawings (CHUNK, 3, 32, 32), whole numbers 0..255."""

    def uniform(low: float, high: float) -> Floats:
        return low + (high - low) * random.random_sample((CHUNK, 1, 1))

    x, y = np.arange(32.0) - 15.5, (np.arange(32.0) - 15.5)[:, None]
    radius = uniform(7.5, 13)
    dx, dy = x - uniform(-3, 3), y - uniform(-3, 3)
    slope = uniform(-0.65, 0.65)  # up to 33 degrees either way
    length = radius * np.sqrt(1 + slope * slope)
    cos, sin = 1 / length, slope / length
    # A pixel is covered from none to all over the one pixel around the edge.
    coverage = np.clip(shape(cos * dx + sin * dy, cos * dy - sin * dx) * radius + 0.5, 0, 1)

    ramp = (uniform(-1, 1) * x + uniform(-1, 1) * y) / 16
    phase = ramp * uniform(2, 4)
    stripes = 4 * np.abs(phase - np.floor(phase) - 0.5) - 1
    kind = np.floor(uniform(0, 3))
    relief = 0.25 * np.where(kind == 0, 0, np.where(kind == 1, ramp, stripes))

    pixels = 0.5 * random.random_sample((CHUNK, 3, 32, 32)) - 0.25
    for channel in range(3):
        colour = uniform(0.1, 0.5)
        ground = colour + relief * uniform(0.3, 1)
        pixels[:, channel] += ground + (colour + uniform(0.25, 0.6) - ground) * coverage
    return np.floor(np.clip(256 * pixels, 0, 255))
