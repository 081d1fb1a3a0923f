"""DenseCRF, by the package pydensecrf2."""

import functools
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from dilaff_jax.baselines.arguments import check_arguments
from dilaff_jax.errors import MissingPackageError, UserError


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
        UserError: shapes that do not match, values that are not finite; under `jit`.
    """
    del offsets
    if isinstance(probs, jax.core.Tracer) or isinstance(image, jax.core.Tracer):
        raise UserError("dense_crf runs on the host; call it outside jit, grad and vmap")
    probs, image = np.asarray(probs, np.float32), np.asarray(image)
    check_arguments(probs, image, 2, steps)
    refine = functools.partial(
        _dense_crf,
        steps=steps,
        spatial=(spatial_sigma, spatial_weight),
        bilateral=(bilateral_sigma, color_sigma, bilateral_weight),
    )
    return np.stack([refine(p, i) for p, i in zip(probs, image, strict=True)])


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
        raise MissingPackageError(
            "dense_crf needs the package pydensecrf2: pip install 'dilaff-jax[crf]'"
        ) from error
    return densecrf, utils.unary_from_softmax
