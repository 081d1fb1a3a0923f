"""Linear resizing with torch's conventions, for logits, features and probabilities."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real


def bilinear(
    x: Real[Array, " *spatial C"],
    size: Sequence[int],
    *,
    align_corners: bool = False,
) -> Float[Array, " *size C"]:
    """Resizes `x` `[..., *spatial, C]` to `[..., *size, C]` by linear interpolation on every axis.

    Half-pixel centres and no antialiasing, as `torch.nn.functional.interpolate(mode="bilinear")`
    (two axes) and `"trilinear"` (three); with `align_corners=True` the corner pixels of both grids
    coincide, as in TensorFlow 1 DeepLab. Computed and returned in float32. (`jax.image.resize`
    antialiases by default when it shrinks, which torch does not.)
    """
    x = x.astype(jnp.float32)
    shape = (*x.shape[: x.ndim - 1 - len(size)], *size, x.shape[-1])
    if shape == x.shape:
        return x
    if not align_corners:
        return jax.image.resize(x, shape, "linear", antialias=False)
    axes = tuple(range(x.ndim - 1 - len(size), x.ndim - 1))
    scale, translation = jnp.array([_align_corners(x.shape[a], shape[a]) for a in axes]).T
    return jax.image.scale_and_translate(
        x, shape, axes, scale, translation, "linear", antialias=False
    )


def from_aligned_corners(
    x: Real[Array, "B h w C"], image: Sequence[int], size: Sequence[int]
) -> Float[Array, "B H W C"]:
    """`bilinear` to the size of the image with corners aligned, then to `size` without, in one.

    So what a network made whose scores are enlarged with `align_corners=True` gets a grid that can
    be enlarged as all others are. Enlarged again it differs from the original where that bends
    within a cell of `size`. Our choice.
    """
    rows, columns = (
        jnp.asarray(matrix(full, n) @ _aligned_matrix(n_in, full))
        for n_in, full, n in zip(x.shape[1:3], image, size, strict=True)
    )
    x = x.astype(jnp.float32)
    return jnp.einsum("bhwc,yh,xw->byxc", x, rows, columns, precision="highest")


def bilinear_logits(
    x: Real[Array, " *spatial C"], size: Sequence[int], *, align_corners: bool = False
) -> Float[Array, " *size C"]:
    """`bilinear` of logits that may be -inf, which says "never": so people switch classes off.

    A class is never at an output pixel where it is never at the nearest input pixel; elsewhere it
    is interpolated between the input pixels at which it is possible, their weights scaled to sum to
    one. So a class that is switched off stays off, and what lies around a pixel that is -inf is not
    spoilt. Equal to `bilinear` where all is finite; gradients are finite. Our choice.
    """
    x = x.astype(jnp.float32)
    first = x.ndim - 1 - len(size)
    if x.shape[first:-1] == tuple(size):
        return x
    never = jnp.isneginf(x)
    weight = bilinear(jnp.where(never, 0.0, 1.0), size, align_corners=align_corners)
    total = bilinear(jnp.where(never, 0.0, x), size, align_corners=align_corners)
    for axis, n_out in enumerate(size, start=first):
        n_in = never.shape[axis]
        index = (2 * np.arange(n_out, dtype=np.int64) + 1) * n_in // (2 * n_out)
        if align_corners:
            index = (2 * np.arange(n_out) * (n_in - 1) + max(n_out - 1, 1)) // max(2 * n_out - 2, 1)
        never = jnp.take(never, index, axis=axis)
    possible = ~never & (weight > 0)
    # Divided only where a class is partly possible: elsewhere the numbers stay those of `bilinear`.
    partly = possible & (weight < 1 - 1e-6)
    scaled = jnp.where(partly, total / jnp.where(partly, weight, 1), total)
    return jnp.where(possible, scaled, -jnp.inf)


def bicubic(
    x: Real[Array, "B h w C"], size: Sequence[int], *, antialias: bool
) -> Float[Array, "B H W C"]:
    """Resizes by cubic convolution, as `torch.nn.functional.interpolate(mode="bicubic")`.

    Keys' kernel with a = -0.75 and the border repeated; with `antialias` a = -0.5, widened where
    it shrinks, and cut at the border, which torch does so as well. Computed in float32.
    """
    x = x.astype(jnp.float32)
    if x.shape[1:3] == tuple(size):
        return x
    if antialias:
        return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "cubic", antialias=True)
    rows, columns = (_cubic(n, n_out) for n, n_out in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("bhwc,yh,xw->byxc", x, rows, columns, precision="highest")


def _cubic(n_in: int, n_out: int) -> jax.Array:
    """Weights `[n_out, n_in]` of cubic convolution, four to a row."""
    centre = (jnp.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    first = jnp.floor(centre)
    index = first.astype(jnp.int32)[:, None] + jnp.arange(-1, 3)
    t = jnp.abs(centre[:, None] - index)
    a = -0.75
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weights = jnp.where(t <= 1, near, far)
    pixels = jax.nn.one_hot(jnp.clip(index, 0, n_in - 1), n_in)
    return jnp.einsum("ik,ikj->ij", weights, pixels, precision="highest")


def matrix(n_in: int, n_out: int) -> Float[np.ndarray, " n_out n_in"]:
    """The weights `[n_out, n_in]` that `bilinear` gives the pixels along one axis, float32."""
    return _weights((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, n_in)


def _aligned_matrix(n_in: int, n_out: int) -> np.ndarray:
    """The same with corners aligned."""
    return _weights(np.arange(n_out) * (n_in - 1) / max(n_out - 1, 1), n_in)


def _weights(centre: np.ndarray, n_in: int) -> np.ndarray:
    """Weights `[len(centre), n_in]` of linear interpolation at these places, in input pixels."""
    n_out = len(centre)
    centre = np.clip(centre, 0, n_in - 1)
    below = np.minimum(centre.astype(int), max(n_in - 2, 0))
    weights = np.zeros((n_out, n_in))
    weights[np.arange(n_out), below] = 1 - (centre - below)
    if n_in > 1:
        weights[np.arange(n_out), below + 1] = centre - below
    return weights.astype(np.float32)


def _align_corners(n_in: int, n_out: int) -> tuple[float, float]:
    """Scale and translation for which output centre i + 1/2 reads i·(n_in-1)/(n_out-1) + 1/2."""
    if n_in == 1 or n_out == 1:  # no second corner to align: the first input pixel is read
        return (float(n_out) if n_in == 1 else 1.0), 0.0
    scale = (n_out - 1) / (n_in - 1)
    return scale, 0.5 - 0.5 * scale
