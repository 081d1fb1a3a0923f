"""Convolution of volumes as a CPU is fast at it: a sum of convolutions of their slices.

XLA's CPU backend runs a convolution in three dimensions many times slower than the same sum over
the taps of the first axis, each a convolution in two dimensions of all slices at once. Gradients
are XLA's of that sum (`benchmarks/volume_conv.py`).
"""

import functools

import jax
import jax.numpy as jnp

from dilaff_jax.models import dispatch, geometry

# Fewer channels, those of a volume, are joined for all taps: alone they fill no register.
_FEW = 8


@geometry.called_by_flax
def conv(x: jax.Array, kernel: jax.Array, at: geometry.Geometry) -> jax.Array:
    """Convolves `[B, D, H, W, C]` with `[j, k, l, C, F]`, at any stride and dilation."""
    match dispatch.target():
        case "cpu":
            return _by_slices(x, kernel, at)
        case "any":
            default = functools.partial(geometry.native, at=at, depthwise=False)
            slices = functools.partial(_by_slices, at=at)
            return jax.lax.platform_dependent(x, kernel, cpu=slices, default=default)
        case _:
            return geometry.native(x, kernel, at, depthwise=False)


def _by_slices(x: jax.Array, kernel: jax.Array, at: geometry.Geometry) -> jax.Array:
    (stride, *strides), (pads, *others), (rate, *rates) = at
    of_slices = geometry.Geometry(tuple(strides), tuple(others), tuple(rates))
    batch, depth = x.shape[:2]
    count = (depth + sum(pads) - rate * (kernel.shape[0] - 1) - 1) // stride + 1
    padded = jnp.pad(x, ((0, 0), pads, *[(0, 0)] * 3))
    seen, filters = [], []
    for tap in range(kernel.shape[0]):
        first = tap * rate
        last = first + (count - 1) * stride
        if pads[0] <= last and first < pads[0] + depth:  # else it sees padding alone
            part = jax.lax.slice_in_dim(padded, first, last + 1, stride, axis=1)
            seen.append(part.reshape(-1, *x.shape[2:]))
            filters.append(kernel[tap])
    if kernel.shape[3] < _FEW:  # one product of few channels is as thin as three
        seen, filters = [jnp.concatenate(seen, axis=-1)], [jnp.concatenate(filters, axis=2)]
    convolve = functools.partial(geometry.native, at=of_slices, depthwise=False)
    parts = [convolve(y, w) for y, w in zip(seen, filters, strict=True)]
    total = sum(parts[1:], parts[0])
    return total.reshape(batch, count, *total.shape[1:])
