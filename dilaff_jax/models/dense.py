"""Convolution over all channels, in the form each backend is fast at.

On a CPU, XLA runs some of what a convolution needs slower than the same sum written as one matrix
product for each tap of the filter: dilated convolutions, and the gradient of every filter. A
product is taken only of the pixels that its tap sees inside the image: at the rates of DeepLabv3
most of what a filter covers is padding.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dilaff_jax.models import forms


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: forms.Padding,
    *,
    rhs_dilation: Sequence[int],
    **_: Any,
) -> jax.Array:
    """Convolves `[B, H, W, C]` with `[k, l, C, F]`, at any stride and dilation.

    Called as `flax.linen.Conv` calls its `conv_general_dilated`; sums in float32 on a CPU.
    """
    at = forms.geometry(x, kernel, strides, padding, rhs_dilation)
    if max(at.rates) > 1 and not all(isinstance(n, int) for n in x.shape[1:3]):
        # Exported for any size: which taps see the image is not known.
        return forms.native(x, kernel, at, depthwise=False)
    return forms.conv(x, kernel, _FORM, at)


def _by_taps(x: jax.Array, kernel: jax.Array, at: forms.Geometry) -> jax.Array:
    rows = [_seen(x.shape[1], kernel.shape[0], u, at, 0) for u in range(kernel.shape[0])]
    columns = [_seen(x.shape[2], kernel.shape[1], v, at, 1) for v in range(kernel.shape[1])]
    out = [
        (n + sum(pads) - rate * (k - 1) - 1) // stride + 1
        for n, k, stride, pads, rate in zip(
            x.shape[1:3], kernel.shape[:2], at.strides, at.pads, at.rates, strict=True
        )
    ]
    # XLA's CPU backend has no product of bfloat16 with sums in float32.
    wide, filters = x.astype(jnp.float32), kernel.astype(jnp.float32)
    total = jnp.zeros((x.shape[0], *out, kernel.shape[3]), jnp.float32)
    for u, (read_y, write_y) in enumerate(rows):
        for v, (read_x, write_x) in enumerate(columns):
            if write_y.start < write_y.stop and write_x.start < write_x.stop:
                product = jnp.einsum("bhwc,cf->bhwf", wide[:, read_y, read_x], filters[u, v])
                around = [
                    (s.start, n - s.stop) for s, n in zip((write_y, write_x), out, strict=True)
                ]
                total += jnp.pad(product, ((0, 0), *around, (0, 0)))
    return total.astype(x.dtype)


def _seen(n: int, taps: int, tap: int, at: forms.Geometry, axis: int) -> tuple[slice, slice]:
    """The pixels of the image that a tap reads, and those of the result that it adds to."""
    stride, (before, after), rate = at.strides[axis], at.pads[axis], at.rates[axis]
    out = (n + before + after - rate * (taps - 1) - 1) // stride + 1
    shift = tap * rate - before  # result i reads pixel i·stride + shift
    first = max(0, -(shift // stride))
    last = min(out, (n - 1 - shift) // stride + 1)
    begin = first * stride + shift
    return slice(begin, begin + max(last - first - 1, 0) * stride + 1, stride), slice(first, last)


def _forward(x: jax.Array, kernel: jax.Array, at: forms.Geometry) -> jax.Array:
    if kernel.shape[:2] == (1, 1) or max(at.rates) > 1:
        return _by_taps(x, kernel, at)
    return forms.native(x, kernel, at, depthwise=False)


def _backward(x: jax.Array, kernel: jax.Array, dy: jax.Array, at: forms.Geometry) -> forms.Pair:
    dx = jax.vjp(lambda x: _forward(x, kernel, at), x)[1](dy)[0]
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    taps = [
        [_tap_gradient(x, dy, kernel.shape, u, v, at) for v in range(kernel.shape[1])]
        for u in range(kernel.shape[0])
    ]
    return dx, jnp.stack([jnp.stack(row) for row in taps]).astype(kernel.dtype)


def _tap_gradient(
    x: jax.Array, dy: jax.Array, shape: Sequence[int], u: int, v: int, at: forms.Geometry
) -> jax.Array:
    """Of one tap, `[C, F]`: the sum over pixels of what it sees times what is given back.

    As a product of two matrices, which XLA's CPU backend takes as they lie; summed over three axes
    (`bhwc,bhwf->cf`) it would first write one side down transposed.
    """
    read_y, write_y = _seen(x.shape[1], shape[0], u, at, 0)
    read_x, write_x = _seen(x.shape[2], shape[1], v, at, 1)
    if write_y.start >= write_y.stop or write_x.start >= write_x.stop:
        return jnp.zeros(shape[2:], jnp.float32)
    seen = x[:, read_y, read_x].reshape(-1, shape[2])
    given = dy[:, write_y, write_x].reshape(-1, shape[3])
    return jax.lax.dot_general(seen, given, (((0,), (0,)), ((), ())))


_FORM = forms.Form(_forward, _backward, depthwise=False)
