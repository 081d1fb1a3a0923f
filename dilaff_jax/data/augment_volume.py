"""Augmentation of a volume and its labels: patch, turn, scale, flip, intensity.

A patch is cut, turned and scaled in one resampling: linear for the volume, nearest for the labels,
so both stay aligned. Turning and scaling are in millimetres, whatever the spacing. What is drawn is
nnU-Net's in kind (https://arxiv.org/abs/1809.10486); ranges are our choice.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dilaff_jax.data.augment import blank, fields_of
from dilaff_jax.data.bands import Bands
from dilaff_jax.labels import IGNORE_LABEL

# Each with this probability.
_OFTEN = 0.5


@dataclasses.dataclass(frozen=True)
class VolumeAugmentation:
    """Random augmentation; the fields are the keys of `config.data` with the same names."""

    crop_size: tuple[int, int, int]
    bands: Bands
    scale_range: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    rare: float = 0.0
    flip: float = 0.0
    photometric: bool = False

    @classmethod
    def from_config(cls, config: Any, bands: Bands) -> "VolumeAugmentation":
        """Takes its fields from `config.data`."""
        return cls(**fields_of(cls, config), bands=bands)

    def __call__(
        self,
        image: np.ndarray,
        label: np.ndarray,
        rng: np.random.Generator,
        spacing: Sequence[float] | np.ndarray = (1.0, 1.0, 1.0),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augments one example.

        Args:
            image: float32 `[D, H, W, C]`, not changed.
            label: uint8 `[D, H, W]`, not changed.
            rng: The example's own source of randomness.
            spacing: size of a voxel along each axis.

        Returns:
            float32 `[*crop_size, C]` and uint8 `[*crop_size]`. Beyond the volume: the means of the
            bands, and 255.
        """
        first = self.choose(label, rng)
        scale = rng.uniform(*self.scale_range)
        angles = rng.uniform(-self.rotation, self.rotation, 3)
        if scale == 1 and not angles.any():
            image, label = self._cut(image, label, first)
        else:
            matrix = turned(scale, angles, spacing)
            image, label = self._resampled(image, label, first, matrix)
        axes = tuple(np.flatnonzero(rng.random(3) < self.flip).tolist())
        image, label = np.flip(image, axes), np.flip(label, axes)
        if self.photometric:
            image = intensity(image, rng)
        return np.ascontiguousarray(image), np.ascontiguousarray(label)

    def choose(self, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The first voxel of a patch, `[3]`; it is before the volume where that is smaller."""
        free = np.array(label.shape) - self.crop_size
        around, draws = rng.random() < self.rare, rng.random(5)
        rare = _rare(label) if around else ()
        if len(rare):
            chosen = rare[int(draws[3] * len(rare))]
            places = np.flatnonzero(label.ravel() == chosen)
            place = np.array(np.unravel_index(places[int(draws[4] * len(places))], label.shape))
            first = place - (draws[:3] * self.crop_size).astype(int)
            return np.where(free > 0, np.clip(first, 0, free), free // 2)
        first = (draws[:3] * (np.maximum(free, 0) + 1)).astype(int)
        return np.where(free > 0, first, free // 2)

    def _cut(
        self, image: np.ndarray, label: np.ndarray, first: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        begin, end = np.maximum(first, 0), np.minimum(first + self.crop_size, label.shape)
        seen, place = (
            tuple(slice(a, b) for a, b in zip(begin - start, end - start, strict=True))
            for start in (0, first)
        )
        patch = blank((*self.crop_size, image.shape[-1]), image.dtype, self.bands.mean)
        mask = np.full(self.crop_size, IGNORE_LABEL, np.uint8)
        patch[place], mask[place] = image[seen], label[seen]
        return patch, mask

    def _resampled(
        self, image: np.ndarray, label: np.ndarray, first: np.ndarray, matrix: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        middle = (np.array(self.crop_size) - 1) / 2
        offset = first + middle - matrix @ middle
        common: dict[str, Any] = {"offset": offset, "output_shape": self.crop_size}
        channels = [
            ndimage.affine_transform(image[..., c], matrix, order=1, cval=mean, **common)
            for c, mean in enumerate(self.bands.mean)
        ]
        label = ndimage.affine_transform(label, matrix, order=0, cval=IGNORE_LABEL, **common)
        return np.stack(channels, axis=-1), label


def _rare(label: np.ndarray) -> np.ndarray:
    """The classes of a volume but for its most frequent one."""
    counts = np.bincount(label.ravel(), minlength=256)[:IGNORE_LABEL]
    present = np.flatnonzero(counts)
    return present[present != counts.argmax()]


def turned(
    scale: float, angles: Sequence[float] | np.ndarray, spacing: Sequence[float] | np.ndarray
) -> np.ndarray:
    """From voxels of a patch to voxels of the volume, `[3, 3]`, about its middle.

    The volume appears `scale` times as large, and turned by `angles` (degrees, about each axis), in
    millimetres.
    """
    millimetres = np.asarray(spacing, float)
    rotation = Rotation.from_euler("xyz", np.asarray(angles), degrees=True).as_matrix()
    return rotation * millimetres[None, :] / millimetres[:, None] / scale


def intensity(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random contrast (×0.75 to 1.25), brightness (±¼ deviation), noise (up to 0.1) and gamma.

    Each with probability ½, of all channels alike; noise is in deviations of the patch. Gamma, 0.7
    to 1.5, bends what lies between the patch's least and largest value.

    Args:
        image: float32 `[D, H, W, C]`, not changed.
        rng: Source of randomness.
    """
    use = rng.random(4) < _OFTEN
    factor, shift, noise, gamma = rng.uniform([0.75, -0.25, 0.0, 0.7], [1.25, 0.25, 0.1, 1.5])
    axes = tuple(range(image.ndim - 1))
    mean, std = image.mean(axis=axes), image.std(axis=axes)
    if use[0]:
        image = (image - mean) * np.float32(factor) + mean
    if use[1]:
        image = image + np.float32(shift) * std
    if use[2]:
        image = image + np.float32(noise) * std * rng.standard_normal(image.shape, np.float32)
    if use[3]:
        low = image.min(axis=axes)
        width = np.maximum(image.max(axis=axes) - low, np.float32(1e-6))
        image = np.power((image - low) / width, np.float32(gamma)) * width + low
    return image.astype(np.float32)
