"""shapes: procedural images, hard where a segmentation's borders are hard. Needs no download.

    background   smooth cloudy texture
    stripes      regions of bars, strong edges inside one class
    dots         regions of dots, likewise
    checks       regions of a chequer pattern, likewise
    bar          thin straight lines, 3 to 7 pixels wide
    ring         thin circles, 3 to 7 pixels wide
    disc         filled circles, singly and in clusters that touch: an edge in the image between
                 two objects of one class, and no class edge
    polygon      filled triangles and rectangles of the same sizes as discs

Half of the filled objects take the colour of what lies around them, plus little (low-contrast
borders). Light falls off across the image, and there is noise. Ignored (255): a contour around some
objects, as in PASCAL VOC, and a strip across every third image.

So it is learnt within minutes. `--object_scale 100 --tint 0` makes it hard: lines of 2 to 4 pixels,
and all classes draw their colours from the same distribution, so that colour tells nothing and only
texture and form do.

All arithmetic is on integers and all borders are drawn hard, so that one seed gives one data set.
Generator: our choice, for this project.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from dilaff_jax.data import builder, images
from dilaff_jax.data.images import DataError
from dilaff_jax.labels import IGNORE_LABEL

CLASSES = ("background", "stripes", "dots", "checks", "bar", "ring", "disc", "polygon")
BACKGROUND, STRIPES, DOTS, CHECKS, BAR, RING, DISC, POLYGON = range(8)
OBJECT_SCALE, TINT = 180, 85  # per cent, by default
# RGB towards which `tint` moves the colours of a class.
_TINTS = {BAR: (210, 200, 50), RING: (50, 110, 210), DISC: (210, 90, 60), POLYGON: (190, 80, 200)}
_SPLIT_KEYS = {"train": 0, "validation": 1, "test": 2}


def _option(default: int, text: str) -> int:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class ShapesOptions(builder.Options):
    """What the generator can be told."""

    size: int = _option(128, "Side of the square images, pixels, 32 to 2048.")
    train: int = _option(960, "Number of training images.")
    validation: int = _option(120, "Number of validation images.")
    test: int = _option(120, "Number of test images.")
    generator_seed: int = _option(0, "Seed of the generator; splits never share an image.")
    object_scale: int = _option(OBJECT_SCALE, "Size of objects and lines, per cent, 50 to 400.")
    tint: int = _option(TINT, "How much colours of lines and objects tell their class, 0 to 100.")


class _Item(NamedTuple):
    split: str
    number: int


class _Canvas:
    """An image and its labels while being drawn."""

    def __init__(self, rng: np.random.Generator, size: int, scale: int, tint: int) -> None:
        self.rng = rng
        self.size = size
        self.scale = scale
        self.tint = tint
        self.image = _cloudy(rng, size, _color(rng), 22)
        self.label = np.full((size, size), BACKGROUND, np.uint8)

    def unit(self, length: int) -> int:
        """Scales a length given for images of 128 pixels."""
        return max(1, length * self.size // 128)

    def object_unit(self, length: int) -> int:
        """Scales a length of an object or a line, given for 128 pixels and 100 per cent."""
        return max(1, length * self.size * self.scale // 12800)

    def point(self) -> tuple[int, int]:
        """A random pixel, (x, y)."""
        x, y = self.rng.integers(0, self.size, 2)
        return int(x), int(y)

    def empty(self) -> np.ndarray:
        """A mask to draw on."""
        return np.zeros((self.size, self.size), np.uint8)

    def paint(self, mask: np.ndarray, texture: np.ndarray, index: int) -> None:
        """Puts `texture` and the class where `mask` is set."""
        self.image[mask > 0] = texture[mask > 0]
        self.label[mask > 0] = index

    def color(self, index: int) -> np.ndarray:
        """A random colour, and as much of the class's own as `tint` says."""
        return (_color(self.rng) * (100 - self.tint) + np.array(_TINTS[index]) * self.tint) // 100

    def near_color(self, mask: np.ndarray, index: int) -> np.ndarray:
        """A colour for an object at `mask`: half of the time nearly that of its surroundings."""
        if self.rng.integers(2) or not mask.any():
            return self.color(index)
        around = self.image[mask > 0].mean(axis=0).astype(np.int64)
        return np.clip(around + self.rng.choice([-26, -20, 20, 26]), 0, 255)


def _color(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(40, 216, 3)


def _cloudy(rng: np.random.Generator, size: int, color: np.ndarray, strength: int) -> np.ndarray:
    """Smooth noise of three octaves around a colour."""
    total = np.zeros((size, size), np.int64)
    for cells in (3, 7, 17):
        grid = rng.integers(0, 256, (cells, cells)).astype(np.uint8)
        octave = cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR_EXACT)
        total += octave.astype(np.int64)
    clouds = (total // 3 - 128) * strength // 64
    return np.clip(color + clouds[..., None], 0, 255).astype(np.uint8)


def _two_tone(canvas: _Canvas, pattern: np.ndarray) -> np.ndarray:
    """A pattern of two colours that differ by 30 to 90 grey levels."""
    rng = canvas.rng
    first = _color(rng)
    step = int(rng.integers(30, 91)) * int(rng.choice([-1, 1]))
    second = np.clip(first + step + rng.integers(-15, 16, 3), 0, 255)
    texture = np.where(pattern[..., None], first, second).astype(np.int64)
    clouds = _cloudy(rng, canvas.size, np.full(3, 128), 10).astype(np.int64) - 128
    return np.clip(texture + clouds, 0, 255).astype(np.uint8)


def _turned(canvas: _Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in a random one of 16 directions, times 5 (integers: the same everywhere)."""
    y, x = np.mgrid[: canvas.size, : canvas.size] + 4 * canvas.size
    a, b = [(5, 0), (4, 3), (3, 4), (0, 5)][int(canvas.rng.integers(4))]
    sign = int(canvas.rng.choice([-1, 1]))
    shift = canvas.rng.integers(0, 500, 2)
    return a * x + sign * b * y + shift[0], a * y - sign * b * x + shift[1]


def _pattern(canvas: _Canvas, index: int) -> np.ndarray:
    """Boolean texture of the stripes, dots or checks class."""
    u, v = _turned(canvas)
    period = 5 * canvas.unit(int(canvas.rng.integers(3, 7)))
    if index == STRIPES:
        return (u // period) % 2 == 0
    if index == CHECKS:
        return ((u // period) + (v // period)) % 2 == 0
    cell = 2 * period
    du, dv = u % cell - period, v % cell - period
    return du * du + dv * dv < (period * 3 // 5) ** 2


def _blob(canvas: _Canvas) -> np.ndarray:
    """A large smooth region: where clouds are high."""
    grid = canvas.rng.integers(0, 256, (4, 4)).astype(np.uint8)
    clouds = cv2.resize(grid, (canvas.size, canvas.size), interpolation=cv2.INTER_LINEAR_EXACT)
    x, y = canvas.point()
    reach = canvas.empty()
    cv2.circle(reach, (x, y), canvas.unit(int(canvas.rng.integers(28, 52))), 1, -1)
    return ((clouds > 96) & (reach > 0)).astype(np.uint8)


def _draw_regions(canvas: _Canvas) -> None:
    for _ in range(int(canvas.rng.integers(2, 5))):
        index = int(canvas.rng.choice([STRIPES, DOTS, CHECKS]))
        canvas.paint(_blob(canvas), _two_tone(canvas, _pattern(canvas, index)), index)


def _draw_filled(canvas: _Canvas, mask: np.ndarray, index: int) -> None:
    texture = _cloudy(canvas.rng, canvas.size, canvas.near_color(mask, index), 8)
    canvas.paint(mask, texture, index)
    if canvas.rng.integers(4) == 0:  # an unlabelled contour, as in PASCAL VOC
        contour = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
        canvas.label[contour > 0] = IGNORE_LABEL


def _draw_discs(canvas: _Canvas) -> None:
    """One disc, or a cluster in which each next disc touches the one before it."""
    x, y = canvas.point()
    radius = canvas.object_unit(int(canvas.rng.integers(7, 14)))
    for _ in range(int(canvas.rng.choice([1, 1, 2, 3, 4]))):
        mask = canvas.empty()
        cv2.circle(mask, (x, y), radius, 1, -1)
        _draw_filled(canvas, mask, DISC)
        dx, dy = [(2, 0), (0, 2), (-2, 0), (0, -2)][int(canvas.rng.integers(4))]
        x, y = x + dx * radius, y + dy * radius


def _draw_polygon(canvas: _Canvas) -> None:
    x, y = canvas.point()
    radius = canvas.object_unit(int(canvas.rng.integers(8, 17)))
    corners = int(canvas.rng.choice([3, 4]))
    wheel = np.array(
        [(0, -16), (11, -11), (16, 0), (11, 11), (0, 16), (-11, 11), (-16, 0), (-11, -11)]
    )
    start, step = int(canvas.rng.integers(8)), (3 if corners == 3 else 2)
    picked = wheel[(start + step * np.arange(corners)) % 8] * radius // 16
    mask = canvas.empty()
    cv2.fillPoly(mask, [(picked + np.array([x, y])).astype(np.int32)], 1)
    if mask.any():
        _draw_filled(canvas, mask, POLYGON)


def _bar(canvas: _Canvas, width: int) -> np.ndarray:
    """A straight line of some width: |across| ≤ width/2, 0 ≤ along ≤ length, in integers.

    Not by cv2.line, which draws other pixels in other versions of OpenCV.
    """
    (x, y), (dx, dy) = canvas.point(), map(int, canvas.rng.integers(-70, 71, 2))
    if abs(dx) + abs(dy) < 30:  # too short to be a line
        dx = 60
    dx, dy = (n * canvas.size * canvas.scale // 12800 for n in (dx, dy))
    v, u = np.mgrid[: canvas.size, : canvas.size] - np.array([y, x])[:, None, None]
    along, across = u * dx + v * dy, u * dy - v * dx
    length = dx * dx + dy * dy
    return ((along >= 0) & (along <= length) & (4 * across**2 <= width**2 * length)).astype(
        np.uint8
    )


def _draw_thin(canvas: _Canvas, index: int) -> None:
    """A bar or a ring."""
    width = canvas.object_unit(int(canvas.rng.integers(2, 5)))
    if index == BAR:
        mask = _bar(canvas, width)
    else:
        mask = canvas.empty()
        center, radius = canvas.point(), int(canvas.rng.integers(7, 18))
        cv2.circle(mask, center, canvas.object_unit(radius), 1, width)
    texture = _cloudy(canvas.rng, canvas.size, canvas.color(index), 8)
    canvas.paint(mask, texture, index)


def _light_and_noise(canvas: _Canvas) -> np.ndarray:
    """Light that falls off across the image (to 55 to 100 %), and noise of ±12 grey levels."""
    rng, size = canvas.rng, canvas.size
    grid = rng.integers(140, 257, (2, 2)).clip(0, 255).astype(np.uint8)
    light = cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR_EXACT).astype(np.int64)
    noise = rng.integers(-6, 7, (2, size, size, 3)).sum(axis=0)
    lit = canvas.image.astype(np.int64) * light[..., None] // 255
    return np.clip(lit + noise, 0, 255).astype(np.uint8)


def draw(
    rng: np.random.Generator, size: int, object_scale: int = OBJECT_SCALE, tint: int = TINT
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one example.

    Args:
        rng: Source of randomness; only integers are drawn.
        size: Side, pixels.
        object_scale: Size of objects and lines, per cent.
        tint: Per cent of a colour that is the class's own, of lines and of objects that stand out.

    Returns:
        RGB uint8 `[size, size, 3]` and labels uint8 `[size, size]`.
    """
    canvas = _Canvas(rng, size, object_scale, tint)
    _draw_regions(canvas)
    todo = ["disc"] * int(rng.integers(1, 4)) + ["polygon"] * int(rng.integers(2, 5))
    for kind in rng.permutation(todo):
        (_draw_discs if kind == "disc" else _draw_polygon)(canvas)
    for index in rng.permutation([BAR, BAR, RING, RING, RING][: int(rng.integers(3, 6))]):
        _draw_thin(canvas, int(index))
    if rng.integers(3) == 0:
        start, width = int(rng.integers(size)), canvas.unit(int(rng.integers(3, 9)))
        strip = canvas.label if rng.integers(2) else canvas.label.T
        strip[start : start + width] = IGNORE_LABEL
    return _light_and_noise(canvas), canvas.label


class Builder(builder.SegmentationBuilder):
    """Splits train, validation, test; see the module's docstring."""

    name = "shapes"
    class_names = CLASSES
    # Okabe and Ito's palette, which colour-blind readers can tell apart.
    colors = (
        (60, 60, 60),
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
        (204, 121, 167),
    )
    options_type = ShapesOptions
    options: ShapesOptions
    needs_source = False

    def splits(self) -> Mapping[str, Sequence[_Item]]:
        """As many examples as the options say."""
        for name, low, high in (("size", 32, 2048), ("object_scale", 50, 400), ("tint", 0, 100)):
            if not low <= getattr(self.options, name) <= high:
                raise DataError(f"--{name}={getattr(self.options, name)}: want {low} to {high}")
        return {
            split: [_Item(split, i) for i in range(getattr(self.options, split))]
            for split in _SPLIT_KEYS
        }

    def read(self, item: _Item) -> builder.Example:
        """Draws one example from (generator_seed, split, index)."""
        key = [self.options.generator_seed, _SPLIT_KEYS[item.split], item.number]
        rng = np.random.Generator(np.random.PCG64(key))
        options = self.options
        image, label = draw(rng, options.size, options.object_scale, options.tint)
        name = f"{item.split}_{item.number:05d}"
        return builder.Example(name, images.encode_png(image), label.shape, label)
