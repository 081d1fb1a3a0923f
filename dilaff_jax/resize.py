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


def matrix(n_in: int, n_out: int) -> Float[np.ndarray, " n_out n_in"]:
    """The weights `[n_out, n_in]` that `bilinear` gives the pixels along one axis, float32."""
    centre = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
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
