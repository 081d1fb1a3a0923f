"""A convolution in the form that each backend is fast at: one on a CPU, XLA's own elsewhere."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from dilaff_jax import memory

Padding = str | Sequence[tuple[int, int]]
Pads = tuple[tuple[int, int], ...]
Pair = tuple[jax.Array, jax.Array]


class Geometry(NamedTuple):
    """How the filter moves over the image."""

    strides: tuple[int, ...]
    pads: Pads
    rates: tuple[int, ...]


class Form(NamedTuple):
    """What a CPU runs, forward `f(x, kernel, geometry)` and backward `b(x, kernel, dy, geometry)`.

    depthwise: one filter a channel.
    """

    forward: Callable[[jax.Array, jax.Array, Geometry], jax.Array]
    backward: Callable[[jax.Array, jax.Array, jax.Array, Geometry], Pair]
    depthwise: bool


def geometry(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Padding,
    rates: Sequence[int],
) -> Geometry:
    """The padding in numbers, as `lax` understands "SAME" and "VALID"."""
    if isinstance(padding, str):
        window = [d * (k - 1) + 1 for k, d in zip(kernel.shape[:2], rates, strict=True)]
        padding = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    pads = tuple((int(a), int(b)) for a, b in padding)
    return Geometry(tuple(strides), pads, tuple(rates))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, form: Form, at: Geometry) -> jax.Array:
    """Convolves `[B, H, W, C]` with `[k, l, C or 1, F]`, in `form` on a CPU."""
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: form.forward(x, kernel, at),
        default=functools.partial(native, at=at, depthwise=form.depthwise),
    )


def _forward(x: jax.Array, kernel: jax.Array, form: Form, at: Geometry) -> tuple[jax.Array, Pair]:
    x = memory.written(x)
    return conv(x, kernel, form, at), (x, kernel)


def _backward(form: Form, at: Geometry, residuals: Pair, dy: jax.Array) -> Pair:
    def own(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Pair:
        function = functools.partial(native, at=at, depthwise=form.depthwise)
        return jax.vjp(function, x, kernel)[1](dy)

    return jax.lax.platform_dependent(
        *residuals, dy, cpu=lambda x, kernel, dy: form.backward(x, kernel, dy, at), default=own
    )


conv.defvjp(_forward, _backward)


def native(x: jax.Array, kernel: jax.Array, at: Geometry, depthwise: bool) -> jax.Array:
    """XLA's own convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        at.strides,
        at.pads,
        rhs_dilation=at.rates,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] if depthwise else 1,
    )
