"""Refinement by colour instead of learned affinity, to compare with: PAMR and DenseCRF.

Both are called as the operators of `propagate` are, `f(probs, guide, offsets, *, steps=...)`, but
their guide is the image: RGB in [0, 255] at the resolution of the probabilities.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dilaff_jax import affinity

# The authors' dilations, for `affinity.offsets`.
PAMR_DILATIONS = (1, 2, 4, 8, 12, 24)


def pamr(
    probs: ArrayLike,
    image: ArrayLike,
    offsets: np.ndarray | None = None,
    *,
    steps: int = 10,
    temperature: float = 0.1,
) -> jax.Array:
    """Pixel-adaptive mask refinement: p[i] ← Σ_o α[i,o]·p[i+o], `steps` times.

    α[i,·] = softmax over o of mean over channels of -|I[i] - I[i+o]| / (t·σ[i] + 1e-8), σ[i] the
    unbiased standard deviation of I over the neighbours i+o and, once a dilation, i itself. Outside
    the image the nearest pixel stands in. As the code of Araslanov and Roth 2020
    (https://arxiv.org/abs/2005.08104, visinf/1-stage-wseg), but by shifting and adding: it holds K
    maps where theirs holds K·C.

    Args:
        probs: `[B, *spatial, C]`.
        image: `[B, *spatial, 3]`, in [0, 255]; any common scale gives the same result.
        offsets: `[K, ndim]`, from `affinity.offsets`; None for the authors' `PAMR_DILATIONS`.
        steps: ≥ 0.
        temperature: t > 0.

    Returns:
        float32 `[B, *spatial, C]`.

    Raises:
        ValueError: shapes that do not match; outside `jit`, values that are not finite.
    """
    probs, image = jnp.asarray(probs), jnp.asarray(image)
    if offsets is None:
        offsets = affinity.offsets(PAMR_DILATIONS, probs.ndim - 2)
    _check(probs, image, affinity.check_offsets(offsets).shape[1], steps)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    rows = tuple(tuple(int(x) for x in row) for row in offsets)
    return _pamr(probs, image, temperature, rows, steps)


def dense_crf(
    probs: ArrayLike,
    image: ArrayLike,
    offsets: np.ndarray | None = None,
    *,
    steps: int = 10,
    spatial_sigma: float = 3.0,
    spatial_weight: float = 3.0,
    bilateral_sigma: float = 80.0,
    color_sigma: float = 13.0,
    bilateral_weight: float = 10.0,
) -> np.ndarray:
    """Mean-field inference in a fully connected CRF with Gaussian edges and a Potts model.

    Energy -log p of a pixel, and for two pixels of different classes the sum of
    w₁·exp(-|x_i-x_j|²/2σ₁²) and w₂·exp(-|x_i-x_j|²/2σ₂² - |I_i-I_j|²/2σ₃²), with the kernels
    normalised symmetrically. Krähenbühl and Koltun 2011 (https://arxiv.org/abs/1210.5644), by the
    package pydensecrf2; its example's values are the defaults. Runs on the host, image by image.

    Args:
        probs: `[B, H, W, C]`, ≥ 0.
        image: `[B, H, W, 3]`, in [0, 255]; rounded to whole numbers.
        offsets: not used, every pixel is a neighbour; there for the common signature.
        steps: ≥ 0.
        spatial_sigma: σ₁ in pixels.
        spatial_weight: w₁; 0 leaves the term out.
        bilateral_sigma: σ₂ in pixels.
        color_sigma: σ₃ in levels of 255.
        bilateral_weight: w₂; 0 leaves the term out.

    Returns:
        float32 NumPy array `[B, H, W, C]`, on the simplex.

    Raises:
        ImportError: without the extra `crf`.
        ValueError: shapes that do not match, values that are not finite; under `jit`.
    """
    del offsets
    if isinstance(probs, jax.core.Tracer) or isinstance(image, jax.core.Tracer):
        raise ValueError("dense_crf runs on the host; call it outside jit, grad and vmap")
    probs, image = np.asarray(probs, np.float32), np.asarray(image)
    _check(probs, image, 2, steps)
    refine = functools.partial(
        _dense_crf,
        steps=steps,
        spatial=(spatial_sigma, spatial_weight),
        bilateral=(bilateral_sigma, color_sigma, bilateral_weight),
    )
    return np.stack([refine(p, i) for p, i in zip(probs, image, strict=True)])


@functools.partial(jax.jit, static_argnames=("offsets", "steps"))
def _pamr(
    probs: jax.Array,
    image: jax.Array,
    temperature: float,
    offsets: tuple[tuple[int, ...], ...],
    steps: int,
) -> jax.Array:
    image = image.astype(jnp.float32)
    around = _neighbours(image, offsets)
    spread = temperature * _local_std(image, around, offsets) + 1e-8
    scores = [jnp.mean(-jnp.abs(image - x) / spread, axis=-1) for x in around]
    weights = jax.nn.softmax(jnp.stack(scores, axis=-1))

    def step(p: jax.Array, _: None) -> tuple[jax.Array, None]:
        terms = (weights[..., k : k + 1] * x for k, x in enumerate(_neighbours(p, offsets)))
        return sum(terms, jnp.zeros_like(p)), None

    return jax.lax.scan(step, probs.astype(jnp.float32), length=steps)[0]


def _local_std(
    image: jax.Array, around: list[jax.Array], offsets: tuple[tuple[int, ...], ...]
) -> jax.Array:
    """In two passes, as the difference of squares cancels where the image is flat."""
    repeats = len({max(map(abs, o)) for o in offsets})
    number = len(around) + repeats
    mean = sum(around, repeats * image) / number
    squares = sum(((x - mean) ** 2 for x in around), repeats * (image - mean) ** 2)
    return jnp.sqrt(squares / (number - 1))


def _neighbours(x: jax.Array, offsets: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """x[i + o] for every o, the nearest pixel's value outside; slices of one padded array."""
    spatial = x.shape[1:-1]
    reach = [max(abs(o[axis]) for o in offsets) for axis in range(len(spatial))]
    padded = jnp.pad(x, [(0, 0), *((r, r) for r in reach), (0, 0)], mode="edge")
    windows = [
        tuple(slice(r + a, r + a + n) for r, a, n in zip(reach, o, spatial, strict=True))
        for o in offsets
    ]
    return [padded[(slice(None), *window)] for window in windows]


def _dense_crf(
    probs: np.ndarray,
    image: np.ndarray,
    steps: int,
    spatial: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> np.ndarray:
    densecrf, unary_from_softmax = _import_crf()
    height, width, classes = probs.shape
    field = densecrf.DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(unary_from_softmax(np.ascontiguousarray(np.moveaxis(probs, -1, 0))))
    if spatial[1]:
        field.addPairwiseGaussian(sxy=spatial[0], compat=spatial[1])
    if bilateral[2]:
        rgb = np.ascontiguousarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))
        field.addPairwiseBilateral(
            sxy=bilateral[0], srgb=bilateral[1], rgbim=rgb, compat=bilateral[2]
        )
    refined = np.array(field.inference(steps), np.float32)
    return np.moveaxis(refined.reshape(classes, height, width), 0, -1)


def _import_crf() -> tuple[Any, Any]:
    try:
        from pydensecrf import densecrf, utils
    except ImportError as error:
        raise ImportError(
            "dense_crf needs the package pydensecrf2: pip install 'dilaff-jax[crf]'"
        ) from error
    return densecrf, utils.unary_from_softmax


def _check(probs: Any, image: Any, ndim: int, steps: int) -> None:
    if probs.ndim != ndim + 2:
        raise ValueError(
            f"probs has shape {probs.shape}; expected {ndim + 2} axes [B, *spatial, C]"
        )
    if image.shape != (*probs.shape[:-1], 3):
        raise ValueError(
            f"image has shape {image.shape}; expected {(*probs.shape[:-1], 3)}: RGB at the "
            "resolution of probs"
        )
    if int(steps) != steps or steps < 0:
        raise ValueError(f"steps is {steps}; expected a whole number, zero or more")
    for name, x in (("probs", probs), ("image", image)):
        if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x, np.float32)).all():
            raise ValueError(f"{name} holds NaN or infinity; expected finite values")
