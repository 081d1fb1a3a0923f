"""Joint augmentation of an image and its labels: scale, crop, flip, colours, padding.

The recipe is mmsegmentation's (RandomResize, RandomCrop with cat_max_ratio, RandomFlip,
PhotoMetricDistortion, padding), with two differences that change speed only: the crop is
cut out before it is scaled, so that nothing outside it is computed, and the steps of the
photometric distortion are tables. Images are resampled bilinearly, labels by nearest neighbour with
the same half-pixel centres, so both stay aligned at any scale.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from dilaff_jax.data import bands
from dilaff_jax.data.bands import Bands
from dilaff_jax.labels import IGNORE_LABEL

_TRIES = 10  # mmsegmentation's number of crops tried for cat_max_ratio


class Crop(NamedTuple):
    """A crop: the part of the source that is seen, and the size it is scaled to."""

    top: int
    left: int
    height: int
    width: int
    out_height: int
    out_width: int


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random augmentation; the fields are the keys of `config.data` with the same names."""

    crop_size: tuple[int, int]
    scale_range: tuple[float, float] = (1.0, 1.0)
    base_size: int | None = None
    cat_max_ratio: float = 1.0
    flip: float = 0.0
    photometric: bool = False
    pad_rgb: tuple[int, int, int] = (124, 116, 104)
    bands: Bands | None = None

    @classmethod
    def from_config(cls, config: Any, bands: Bands | None = None) -> "Augmentation":
        """Takes its fields from `config.data`; `bands` of images that are not RGB."""
        return cls(**fields_of(cls, config), bands=bands)

    def __call__(
        self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augments one example.

        Args:
            image: RGB uint8 `[H, W, 3]`, or `[H, W, C]` of `bands`; not changed.
            label: uint8 `[H, W]`, not changed.
            rng: The example's own source of randomness.

        Returns:
            `[*crop_size, C]` and uint8 `[*crop_size]`. Beyond the image, at the bottom and right:
            `pad_rgb` (of bands their means), and 255.
        """
        crop = self.choose(label, rng)
        image, label = cut(image, label, crop)
        if rng.random() < self.flip:
            image, label = np.ascontiguousarray(image[:, ::-1]), cv2.flip(label, 1)
        if self.photometric:
            image = (
                photometric(image, rng)
                if self.bands is None
                else bands.photometric(image, self.bands, rng)
            )
        return pad(image, label, self.crop_size, padding(self.pad_rgb, self.bands))

    def choose(self, label: np.ndarray, rng: np.random.Generator) -> Crop:
        """Draws a scale and a crop, again while one class fills more than `cat_max_ratio` of it."""
        scale = rng.uniform(*self.scale_range)
        if self.base_size is not None:
            scale *= self.base_size / min(label.shape)
        for _ in range(_TRIES):
            crop = random_crop(label.shape, self.crop_size, scale, rng)
            if self.cat_max_ratio >= 1 or largest_share(label, crop) < self.cat_max_ratio:
                break
        return crop


def fields_of(cls: type, config: Any) -> dict[str, Any]:
    """The fields of an augmentation from `config.data`, which may hold lists; but for `bands`."""
    names = [f.name for f in dataclasses.fields(cls) if f.name != "bands"]
    values = {name: config[name] for name in names}
    return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()}


def random_crop(
    size: tuple[int, ...], crop_size: tuple[int, int], scale: float, rng: np.random.Generator
) -> Crop:
    """A random crop of `crop_size` out of the image scaled by `scale`, in unscaled coordinates.

    Where the scaled image is smaller than the crop, all of it is taken. The crop has whole
    pixels, so the scale is met to within half a source pixel over the crop.
    """
    starts, lengths, outs = [], [], []
    for length, crop in zip(size, crop_size, strict=True):
        scaled = max(1, round(length * scale))
        part = length if scaled <= crop else min(length, max(1, round(crop / scale)))
        starts.append(int(rng.integers(length - part + 1)))
        lengths.append(part)
        outs.append(min(scaled, crop))
    return Crop(*starts, *lengths, *outs)


def largest_share(label: np.ndarray, crop: Crop) -> float:
    """Share of the largest class among a crop's labelled pixels; 1 if nothing is labelled."""
    top, left, height, width = crop[:4]
    part = np.ascontiguousarray(label[top : top + height, left : left + width])
    counts = cv2.calcHist([part], [0], None, [256], [0, 256])[:IGNORE_LABEL]
    total = float(counts.sum())
    return float(counts.max()) / total if total else 1.0


def cut(image: np.ndarray, label: np.ndarray, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a crop out of both and scales it: bilinear for the image, nearest for the labels."""
    top, left, height, width, out_height, out_width = crop
    image = image[top : top + height, left : left + width]
    label = label[top : top + height, left : left + width]
    if (out_height, out_width) != (height, width):
        size = (out_width, out_height)
        image = bands.resized(image, (out_height, out_width), cv2.INTER_LINEAR)
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return image, label


_LEVELS = np.arange(256, dtype=np.float32)


def _levels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def photometric(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random brightness (±32), contrast, saturation (×0.5 to 1.5) and hue (±18 of 180).

    Each with probability ½; contrast comes first or last with equal chances (SSD, Liu et al. 2016,
    with mmsegmentation's ranges).

    Args:
        image: RGB uint8 `[H, W, 3]`, not changed.
        rng: Source of randomness.

    Returns:
        RGB uint8 `[H, W, 3]`.
    """
    use = rng.random(5) < 0.5
    delta, contrast, saturation = rng.uniform([-32, 0.5, 0.5], [32, 1.5, 1.5])
    hue = int(rng.integers(-18, 19))
    before = _levels(_LEVELS + delta) if use[0] else _levels(_LEVELS)
    contrasted = _levels(_LEVELS * contrast)
    if use[1] and use[4]:
        before = contrasted[before]
    if use[0] or (use[1] and use[4]):
        image = cv2.LUT(image, before)
    if use[2] or use[3]:
        table = np.repeat(_LEVELS.astype(np.uint8)[:, None], 3, axis=1)
        if use[3]:
            table[:180, 0] = (np.arange(180) + hue) % 180
        if use[2]:
            table[:, 1] = _levels(_LEVELS * saturation)
        hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table[None])
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return cv2.LUT(image, contrasted) if use[1] and not use[4] else image


def padding(pad_rgb: Sequence[int], bands: Bands | None) -> tuple[float, ...]:
    """What fills an image outside its content: `pad_rgb`, or the means of its bands."""
    return tuple(pad_rgb) if bands is None else bands.mean


def pad(
    image: np.ndarray, label: np.ndarray, size: tuple[int, ...], fill: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Pads at the end of each axis to `size`: images with `fill`, `[C]`, labels with 255."""
    if label.shape == tuple(size):
        return image, label
    part = tuple(slice(n) for n in label.shape)
    wide = blank((*size, image.shape[-1]), image.dtype, fill)
    wide[part] = image
    wide_label = np.full(size, IGNORE_LABEL, np.uint8)
    wide_label[part] = label
    return wide, wide_label


def blank(shape: Sequence[int], dtype: np.dtype, fill: Sequence[float]) -> np.ndarray:
    """An image, or a batch of them, of one colour `[C]`; whole numbers are rounded."""
    colour = np.asarray(fill)
    image = np.empty(shape, dtype)
    image[:] = np.rint(colour) if image.dtype.kind in "ui" else colour
    return image
