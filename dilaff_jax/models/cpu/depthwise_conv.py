"""Depthwise convolution as a CPU is fast at it.

XLA's CPU backend runs a convolution of as many groups as channels many times slower than the same
sum written as shifted products, forward and backward; accelerators have kernels of their own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dilaff_jax.models import dispatch, geometry


@geometry.called_by_flax
def conv(x: jax.Array, kernel: jax.Array, at: geometry.Geometry) -> jax.Array:
    """Convolves `[B, H, W, C]` with one filter a channel, `[k, l, 1, C]`.

    Sums in float32.
    """
    return dispatch.conv(x, kernel, _FORM, at)


def _shifted(x: jax.Array, kernel: jax.Array, at: geometry.Geometry) -> jax.Array:
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), *at.pads, (0, 0)))
    total = sum(
        window * kernel[u, v, 0].astype(jnp.float32)
        for u, v, window in _windows(padded, kernel.shape, at.strides, at.rates)
    )
    return jnp.asarray(total).astype(x.dtype)


def _backward(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, at: geometry.Geometry
) -> dispatch.Gradients:
    """The gradient by x gathers what each pixel gave; as scattered sums it would be slow again."""
    wide = dy.astype(jnp.float32)
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), *at.pads, (0, 0)))
    dkernel = _filter_gradient(padded, wide, kernel.shape, at.strides, at.rates)
    spread = [(0, 0, 0)]
    for axis, (stride, (begin, _), rate) in enumerate(zip(*at, strict=True)):
        reach = rate * (kernel.shape[axis] - 1)
        length = (dy.shape[axis + 1] - 1) * stride + 1
        low = reach - begin
        spread.append((low, x.shape[axis + 1] + reach - low - length, stride - 1))
    dilated = jax.lax.pad(wide, jnp.float32(0), [*spread, (0, 0, 0)])
    whole = geometry.Geometry((1, 1), ((0, 0), (0, 0)), at.rates)
    dx = _shifted(dilated, kernel[::-1, ::-1], whole)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


def _filter_gradient(
    padded: jax.Array,
    dy: jax.Array,
    kernel: Sequence[int],
    strides: tuple[int, ...],
    rates: tuple[int, ...],
) -> jax.Array:
    """Row by row, so that all taps find it in the cache; tap by tap each would fetch it anew."""
    batch, height, width, channels = dy.shape
    band = 1, rates[0] * (kernel[0] - 1) + 1, *padded.shape[2:]

    def add(sums: list[jax.Array], row: jax.Array) -> tuple[list[jax.Array], None]:
        image, y = row // height, row % height
        seen = jax.lax.dynamic_slice(padded, (image, y * strides[0], 0, 0), band)
        given = jax.lax.dynamic_slice(dy, (image, y, 0, 0), (1, 1, width, channels))
        windows = _windows(seen, kernel, strides, rates)
        return [s + w * given for s, (_, _, w) in zip(sums, windows, strict=True)], None

    zeros = [jnp.zeros((1, 1, width, channels))] * (kernel[0] * kernel[1])
    sums, _ = jax.lax.scan(add, zeros, jnp.arange(batch * height))
    return jnp.stack([jnp.sum(s, axis=(0, 1, 2)) for s in sums]).reshape(kernel)


def _windows(
    padded: jax.Array, kernel: Sequence[int], strides: tuple[int, ...], rates: tuple[int, ...]
) -> list[tuple[int, int, jax.Array]]:
    """For each filter tap (u, v) the pixels that it multiplies, `[B, H', W', C]`."""
    out = [
        (n - rate * (k - 1) - 1) // stride + 1
        for n, k, stride, rate in zip(padded.shape[1:3], kernel[:2], strides, rates, strict=True)
    ]
    ends = [(n - 1) * stride + 1 for n, stride in zip(out, strides, strict=True)]
    return [
        (
            u,
            v,
            padded[
                :,
                u * rates[0] : u * rates[0] + ends[0] : strides[0],
                v * rates[1] : v * rates[1] + ends[1] : strides[1],
            ],
        )
        for u in range(kernel[0])
        for v in range(kernel[1])
    ]


_FORM = dispatch.CpuConv(_shifted, _backward, depthwise=True)
