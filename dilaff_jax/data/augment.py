"""Joint augmentation of an image and its labels: scale, crop, flip, colours, padding.

The recipe is mmsegmentation's (RandomResize, RandomCrop with cat_max_ratio, RandomFlip,
PhotoMetricDistortion, padding), with two differences that change speed only: the crop is
cut out before it is scaled, so that nothing outside it is computed, and the steps of the
photometric distortion are tables. Images are resampled bilinearly, labels by nearest neighbour with
the same half-pixel centres, so both stay aligned at any scale.
"""

import dataclasses
from typing import Any, NamedTuple

import cv2
import numpy as np

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

    @classmethod
    def from_config(cls, config: Any) -> "Augmentation":
        """Takes its fields from `config.data`."""
        values: dict[str, Any] = {f.name: config[f.name] for f in dataclasses.fields(cls)}
        for key in ("crop_size", "scale_range", "pad_rgb"):  # a config may hold lists
            values[key] = tuple(values[key])
        return cls(**values)

    def __call__(
        self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augments one example.

        Args:
            image: RGB uint8 `[H, W, 3]`, not changed.
            label: uint8 `[H, W]`, not changed.
            rng: The example's own source of randomness.

        Returns:
            RGB uint8 `[*crop_size, 3]` and uint8 `[*crop_size]`. Beyond the image, at the bottom
            and right: `pad_rgb`, and 255.
        """
        crop = self.choose(label, rng)
        image, label = cut(image, label, crop)
        if rng.random() < self.flip:
            image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        if self.photometric:
            image = photometric(image, rng)
        return pad(image, label, self.crop_size, self.pad_rgb)

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
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
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


def pad(
    image: np.ndarray, label: np.ndarray, size: tuple[int, int], pad_rgb: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pads at the bottom and right to `size`: images with `pad_rgb`, labels with 255."""
    missing = (0, size[0] - label.shape[0], 0, size[1] - label.shape[1])
    if any(missing):
        image = cv2.copyMakeBorder(image, *missing, cv2.BORDER_CONSTANT, value=pad_rgb)
        label = cv2.copyMakeBorder(label, *missing, cv2.BORDER_CONSTANT, value=(IGNORE_LABEL,))
    return image, label
