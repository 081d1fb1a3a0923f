"""How a filter moves over a map, in numbers, and XLA's own convolution of that."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

Padding: TypeAlias = str | Sequence[tuple[int, int]]
Pads: TypeAlias = tuple[tuple[int, int], ...]


class Geometry(NamedTuple):
    """How the filter moves over the image."""

    strides: tuple[int, ...]
    pads: Pads
    rates: tuple[int, ...]


def geometry(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Padding,
    rates: Sequence[int],
) -> Geometry:
    """The padding in numbers, as `lax` understands "SAME" and "VALID"."""
    if isinstance(padding, str):
        window = [d * (k - 1) + 1 for k, d in zip(kernel.shape[:-2], rates, strict=True)]
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], window, strides, padding)
    pads = tuple((int(a), int(b)) for a, b in padding)
    return Geometry(tuple(strides), pads, tuple(rates))


def called_by_flax(
    convolve: Callable[[jax.Array, jax.Array, Geometry], jax.Array],
) -> Callable[..., jax.Array]:
    """`convolve(x, kernel, geometry)` as `flax.linen.Conv` calls its `conv_general_dilated`."""

    @functools.wraps(convolve)
    def conv(
        x: jax.Array,
        kernel: jax.Array,
        strides: Sequence[int],
        padding: Padding,
        *,
        rhs_dilation: Sequence[int],
        **_: Any,
    ) -> jax.Array:
        return convolve(x, kernel, geometry(x, kernel, strides, padding, rhs_dilation))

    return conv


def native(x: jax.Array, kernel: jax.Array, at: Geometry, depthwise: bool) -> jax.Array:
    """XLA's own convolution, of images or volumes."""
    order = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        at.strides,
        at.pads,
        rhs_dilation=at.rates,
        dimension_numbers=order,
        feature_group_count=x.shape[-1] if depthwise else 1,
    )
