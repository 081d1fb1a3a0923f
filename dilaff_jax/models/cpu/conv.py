"""Convolution over all channels as a CPU is fast at it.

XLA's CPU backend runs some of what a convolution needs slower than the same sum written as one
matrix product for each tap of the filter: dilated convolutions, and the gradient of filters. A
product is taken only of the pixels that its tap sees inside the image: at the rates of DeepLabv3
most of what a filter covers is padding.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from dilaff_jax.models import dispatch, geometry
from dilaff_jax.models.cpu.materialize import materialize

Crop: TypeAlias = tuple[slice, slice]

# The share of its map that a tap sees above which the rest is not worth cutting off.
_MOST = 0.75
# Fewer channels, those of an image, make a product too thin to be fast.
_FEW = 8


@geometry.called_by_flax
def conv(x: jax.Array, kernel: jax.Array, at: geometry.Geometry) -> jax.Array:
    """Convolves `[B, H, W, C]` with `[k, l, C, F]`, at any stride and dilation.

    Sums in float32 on a CPU.
    """
    if max(at.rates) > 1 and not all(isinstance(n, int) for n in x.shape[1:3]):
        # Exported for any size: which taps see the image is not known.
        return geometry.native(x, kernel, at, depthwise=False)
    return dispatch.conv(x, kernel, _FORM, at)


def _forward(x: jax.Array, kernel: jax.Array, at: geometry.Geometry) -> jax.Array:
    if kernel.shape[:2] == (1, 1) or max(at.rates) > 1:
        return _by_taps(x, kernel, at)
    return geometry.native(x, kernel, at, depthwise=False)


def _backward(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, at: geometry.Geometry
) -> dispatch.Gradients:
    dx = jax.vjp(lambda x: _forward(x, kernel, at), x)[1](dy)[0]
    wide, given = x.astype(jnp.float32), dy.astype(jnp.float32)
    if kernel.shape[2] < _FEW:
        filters = kernel.astype(jnp.float32)
        own = jax.vjp(lambda w: geometry.native(wide, w, at, depthwise=False), filters)[1]
        gradient = own(given)[0]
    else:
        gradient = _filter_gradient(wide, given, kernel.shape, at)
    return dx, gradient.astype(kernel.dtype)


def _by_taps(x: jax.Array, kernel: jax.Array, at: geometry.Geometry) -> jax.Array:
    # XLA's CPU backend has no product of bfloat16 with sums in float32.
    wide, filters = x.astype(jnp.float32), kernel.astype(jnp.float32)
    out = [_outputs(x.shape[1 + axis], kernel.shape[axis], at, axis) for axis in (0, 1)]
    total = jnp.zeros((x.shape[0], *out, kernel.shape[3]), jnp.float32)
    for u, v, read, write in _taps(x.shape, kernel.shape, at):
        if not _empty(write):
            product = jnp.einsum("bhwc,cf->bhwf", wide[:, *read], filters[u, v])
            total += jnp.pad(product, ((0, 0), *_around(write, out), (0, 0)))
    return total.astype(x.dtype)


def _filter_gradient(
    x: jax.Array, dy: jax.Array, shape: Sequence[int], at: geometry.Geometry
) -> jax.Array:
    """Of each tap the sum over pixels of what it sees times what is given back, `[k, l, C, F]`.

    As a product of two matrices, `[C, pixels]·[pixels, F]`: XLA's CPU backend is fast at those that
    lie so, and leaves those that do not to a slower library. Hence the map of fewer channels is
    turned beforehand, once for all taps. Where a tap sees most of the other map, zeros are put
    around the turned one instead of cutting a window out of the other, which is more to copy.
    """
    few_is_x = shape[2] <= shape[3]
    few, many = (x, dy) if few_is_x else (dy, x)
    pixels = (few.shape[0], *few.shape[1:3])
    turned = materialize(few.reshape(-1, few.shape[3]).T).reshape(-1, *pixels)
    taps = []
    for _, _, read, write in _taps(x.shape, shape, at):
        here, there = (read, write) if few_is_x else (write, read)
        if _empty(write):
            taps.append(jnp.zeros(shape[2:], jnp.float32))
            continue
        seen, given = turned[:, :, *here], many
        if at.strides == (1, 1) and seen.size > _MOST * turned.size:
            seen = jnp.pad(seen, ((0, 0), (0, 0), *_around(there, many.shape[1:3])))
        else:
            given = many[:, *there]
        product = materialize(seen.reshape(seen.shape[0], -1)) @ given.reshape(-1, many.shape[3])
        # Written down, or the product would be made the other way round instead of being turned.
        taps.append(product if few_is_x else materialize(product).T)
    return jnp.stack(taps).reshape(tuple(shape))


def _taps(
    image: Sequence[int], taps: Sequence[int], at: geometry.Geometry
) -> list[tuple[int, int, Crop, Crop]]:
    """Of each tap u, v the pixels of the image that it reads, those of the result it adds to."""
    rows = [_seen(image[1], taps[0], u, at, 0) for u in range(taps[0])]
    columns = [_seen(image[2], taps[1], v, at, 1) for v in range(taps[1])]
    return [
        (u, v, (rows[u][0], columns[v][0]), (rows[u][1], columns[v][1]))
        for u in range(taps[0])
        for v in range(taps[1])
    ]


def _seen(n: int, taps: int, tap: int, at: geometry.Geometry, axis: int) -> tuple[slice, slice]:
    stride, rate = at.strides[axis], at.rates[axis]
    shift = tap * rate - at.pads[axis][0]  # result i reads pixel i·stride + shift
    first = max(0, -(shift // stride))
    last = min(_outputs(n, taps, at, axis), (n - 1 - shift) // stride + 1)
    begin = first * stride + shift
    return slice(begin, begin + max(last - first - 1, 0) * stride + 1, stride), slice(first, last)


def _outputs(n: int, taps: int, at: geometry.Geometry, axis: int) -> int:
    return (n + sum(at.pads[axis]) - at.rates[axis] * (taps - 1) - 1) // at.strides[axis] + 1


def _empty(crop: Crop) -> bool:
    return any(s.start >= s.stop for s in crop)


def _around(crop: Crop, size: Sequence[int]) -> list[tuple[int, int]]:
    """The pixels before and after a crop on each axis."""
    return [(s.start, n - s.stop) for s, n in zip(crop, size, strict=True)]


_FORM = dispatch.CpuConv(_forward, _backward, depthwise=False)
