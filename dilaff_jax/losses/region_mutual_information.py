"""Region mutual information: what is unknown of the regions of labels, given those of a network."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Integer, Real

from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.losses.loss_sum import LossSum, check_segmentation

# Theirs: what is added to a covariance, and the least probability.
_ALPHA, _LEAST = 5e-4, 1e-6


def region_mutual_information(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Integer[ArrayLike, " B *spatial"],
    *,
    weight: float = 0.5,
    radius: int = 3,
    pool: int = 3,
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """Region mutual information loss: λ·BCE + (1-λ)·Σ_c ½·log det(M_c) / d, of each image.

    Y_c and P_c are vectors of d = radius^n neighbouring pixels of one class, in the labels and in
    p = sigmoid(logits), both averaged over windows of `pool`^n pixels before. M = Σ_Y -
    Σ_YP·(Σ_P + αI)⁻¹·Σ_PY + αI, with sums over all places in the place of means and α = 5e-4,
    bounds the covariance of Y given P from above, and so ½·log det(M) the part of the mutual
    information that can be learnt. BCE is the mean over labelled pixels of the sum over classes.
    Zhao et al. 2019 (https://arxiv.org/abs/1910.12037), with the defaults of their code; per image
    (theirs: per batch), and without the classes that an image lacks, for which M is constant.

    Computed as M = R·Rᵀ + α·A·Aᵀ + αI with A = Σ_YP·(Σ_P + αI)⁻¹ and R = Y - A·P, which is equal
    and positive in float32 (theirs takes float64).

    Args:
        logits: `[B, *spatial, C]`.
        labels: integers `[B, *spatial]`, classes 0..C-1 or `ignore_label`.
        weight: λ, 0 to 1.
        radius: of a region, along each axis, 1 or more.
        pool: side and stride of the windows, odd, 1 or more.
        ignore_label: the label of pixels that do not count; they are 0 in Y and P.

    Returns:
        LossSum of shape `[]`: the images' losses and their number. May be below 0.

    Raises:
        UserError: shapes that do not match, NaN, labels that are neither class nor ignored; an
            option out of its range; images that are smaller than a region.
    """
    if not 0 <= weight <= 1:
        raise UserError(f"weight is {weight}; expected 0 to 1")
    if radius < 1 or pool < 1 or pool % 2 == 0:
        raise UserError(
            f"radius is {radius} and pool {pool}; expected a radius of 1 or more and an odd pool"
        )
    logits, labels, valid = check_segmentation(logits, labels, ignore_label)
    inside = valid[..., None]
    truth = jnp.where(inside, jax.nn.one_hot(labels, logits.shape[-1]), 0)
    space = tuple(range(1, logits.ndim - 1))
    pixels = jnp.sum(valid, space)
    # log(1 + e^x) - y·x: the binary cross-entropy of all classes of a pixel.
    each = jnp.where(inside, jax.nn.softplus(logits) - truth * logits, 0)
    binary = jnp.sum(each, (*space, -1)) / jnp.maximum(pixels, 1)
    probs = jnp.where(inside, jax.nn.sigmoid(logits), 0) + _LEAST
    y, p = (_regions(_pooled(x, pool), radius) for x in (truth, probs))
    present = jnp.sum(truth, space) > 0
    unknown = jnp.where(present, _half_log_det(y, p), 0)
    loss = weight * binary + (1 - weight) * jnp.sum(unknown, -1) / y.shape[2]
    return LossSum(
        jnp.sum(jnp.where(pixels > 0, loss, 0 * loss)), jnp.sum(pixels > 0, dtype=jnp.float32)
    )


def _pooled(x: jax.Array, pool: int) -> jax.Array:
    """Means over windows, with zeros around, `[B, *spatial / pool, C]`."""
    dims = x.ndim - 2
    window = (1, *[pool] * dims, 1)
    pads = ((0, 0), *[(pool // 2, pool // 2)] * dims, (0, 0))
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, pads) / pool**dims


def _regions(x: jax.Array, radius: int) -> jax.Array:
    """All regions within, less their mean: `[B, C, d, places]`."""
    space = x.shape[1:-1]
    if min(space) < radius:
        raise UserError(
            f"pooled labels are {'x'.join(map(str, space))}, smaller than a region of {radius} "
            "along each axis; take larger crops, or a smaller pool or radius"
        )
    shifted = []
    for first in itertools.product(range(radius), repeat=len(space)):
        last = [f + n - radius + 1 for f, n in zip(first, space, strict=True)]
        part = jax.lax.slice(x, (0, *first, 0), (x.shape[0], *last, x.shape[-1]))
        shifted.append(part.reshape(x.shape[0], -1, x.shape[-1]))
    vectors = jnp.transpose(jnp.stack(shifted), (1, 3, 0, 2))
    return vectors - jnp.mean(vectors, -1, keepdims=True)


def _half_log_det(y: jax.Array, p: jax.Array) -> jax.Array:
    """½·log det(M) of regions `[B, C, d, places]`, `[B, C]`."""
    product = functools.partial(jnp.einsum, precision="highest")
    little = _ALPHA * jnp.eye(y.shape[2])
    own = jnp.linalg.cholesky(product("bcdn,bcen->bcde", p, p) + little)
    across = product("bcdn,bcen->bcde", p, y)
    a = jnp.swapaxes(jax.scipy.linalg.cho_solve((own, True), across), -1, -2)
    rest = y - product("bcde,bcen->bcdn", a, p)
    m = product("bcdn,bcen->bcde", rest, rest) + _ALPHA * product("bcde,bcfe->bcdf", a, a) + little
    diagonal = jnp.diagonal(jnp.linalg.cholesky(m), axis1=-2, axis2=-1)
    return jnp.sum(jnp.log(diagonal), -1)
