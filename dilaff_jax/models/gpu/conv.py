"""Dilated convolution as a GPU is fast at it: in undilated convolutions, or in matrix products.

XLA finds no cuDNN kernel for the filter gradient of a dilated convolution and runs one as large as
the map in its place. Two other forms of the same sums:

- *apart*: the r² sets of pixels that see each other at rate r are maps of their own (space to
  batch), on which the convolution is an undilated one;
- *product*: y = Σ_t shift_t(x·W_t), with all taps t side by side in one matrix product `[pixels,
  C]·[C, 9·F]`, and its two transposes, in which the shifted copies of dy stand side by side. It
  moves 9·F numbers a pixel, so it is for layers of many more channels than features, as in an ASPP.

What is taken where was measured (benchmarks/accelerator.py); docs/performance.md has the table.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dilaff_jax.kernels import backends
from dilaff_jax.models import geometry

# Channels a feature from which all three directions go as products.
_MANY = 4


@geometry.called_by_flax
def conv(x: jax.Array, kernel: jax.Array, at: geometry.Geometry) -> jax.Array:
    """Convolves `[B, H, W, C]` with `[k, l, C, F]`, at any stride and dilation.

    Differentiable in both modes, any number of times. XLA's own where it is not dilated, does not
    keep the size of the map, or is traced for maps of any size or in a `shard_map` that keeps track
    of what varies.
    """
    if takes(x, kernel, at) and not backends.tracked(x):
        return _conv.bind(x, kernel, at=at)
    return geometry.native(x, kernel, at, depthwise=False)


def takes(x: jax.Array, kernel: jax.Array, at: geometry.Geometry) -> bool:
    """Whether this is a dilated convolution of odd windows, stride 1, that keeps the map's size."""
    fixed = all(isinstance(n, int) for n in x.shape[1:3])
    same = all(
        k % 2 == 1 and pads == (r * (k // 2), r * (k // 2))
        for k, r, pads in zip(kernel.shape[:2], at.rates, at.pads, strict=True)
    )
    return fixed and same and max(at.rates) > 1 and at.strides == (1, 1)


def _forward(x: jax.Array, kernel: jax.Array, *, at: geometry.Geometry) -> jax.Array:
    if not _is_wide(kernel):
        return geometry.native(x, kernel, at, depthwise=False)
    rows, columns, channels, features = kernel.shape
    side_by_side = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    # In float32 until the taps are summed, as the convolution sums them.
    products = jnp.einsum("bhwc,cn->bhwn", x, side_by_side, preferred_element_type=jnp.float32)
    taps = products.reshape(*x.shape[:3], rows * columns, features)
    shifted = (_shift(taps[..., t, :], by) for t, by in enumerate(_reach(kernel.shape, at)))
    return functools.reduce(jnp.add, shifted).astype(x.dtype)


def _to_input(dy: jax.Array, kernel: jax.Array, *, at: geometry.Geometry) -> jax.Array:
    """The gradient of x: the convolution of dy with the filters turned around."""
    if not _is_wide(kernel):
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        return geometry.native(dy, turned, at, depthwise=False)
    filters = kernel.swapaxes(2, 3).reshape(-1, kernel.shape[2])
    return jnp.einsum("bhwn,nc->bhwc", _side_by_side(dy, kernel.shape, at), filters)


def _to_filter(
    x: jax.Array, dy: jax.Array, *, at: geometry.Geometry, window: tuple[int, int]
) -> jax.Array:
    """The gradient of the filters `[k, l, C, F]`."""
    shape = (*window, x.shape[-1], dy.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    if not _is_wide(kernel):
        plain = geometry.Geometry((1, 1), tuple((k // 2, k // 2) for k in window), (1, 1))
        filters = jnp.zeros(shape, x.dtype)
        undilated = functools.partial(geometry.native, _apart(x, at), at=plain, depthwise=False)
        return jax.vjp(undilated, filters)[1](_apart(dy, at))[0]
    copies = _side_by_side(dy, shape, at)
    product = jnp.einsum("bhwc,bhwn->cn", x, copies, preferred_element_type=jnp.float32)
    taps = product.reshape(x.shape[-1], *window, dy.shape[-1])
    return taps.transpose(1, 2, 0, 3).astype(x.dtype)


def _is_wide(kernel: Any) -> bool:
    return kernel.shape[2] >= _MANY * kernel.shape[3]


def _reach(shape: Sequence[int], at: geometry.Geometry) -> list[tuple[int, int]]:
    """Where each tap reads, from the pixel it adds to."""
    rows, columns = (
        [(t - k // 2) * r for t in range(k)] for k, r in zip(shape[:2], at.rates, strict=True)
    )
    return [(v, u) for v in rows for u in columns]


def _shift(x: jax.Array, by: tuple[int, int]) -> jax.Array:
    """x[i + by], zero outside."""
    window, around = [slice(None)], [(0, 0)]
    for n, d in zip(x.shape[1:3], by, strict=True):
        d = max(-n, min(n, d))
        window.append(slice(max(d, 0), n + min(d, 0)))
        around.append((max(-d, 0), max(d, 0)))
    return jnp.pad(x[tuple(window)], [*around, (0, 0)])


def _side_by_side(dy: jax.Array, shape: Sequence[int], at: geometry.Geometry) -> jax.Array:
    """Of each tap what x[i] is given back through it, dy[i - by], `[B, H, W, k·l·F]`."""
    return jnp.concatenate([_shift(dy, (-v, -u)) for v, u in _reach(shape, at)], axis=-1)


def _apart(x: jax.Array, at: geometry.Geometry) -> jax.Array:
    """Every r-th row and column as a map of its own, `[B·r², ⌈H/r⌉, ⌈W/r⌉, C]`."""
    (rows, columns), (batch, height, width, channels) = at.rates, x.shape
    high, wide = math.ceil(height / rows), math.ceil(width / columns)
    around = ((0, 0), (0, high * rows - height), (0, wide * columns - width), (0, 0))
    cells = jnp.pad(x, around).reshape(batch, high, rows, wide, columns, channels)
    return cells.transpose(0, 2, 4, 1, 3, 5).reshape(-1, high, wide, channels)


def _primitive(name: str, function: Callable[..., jax.Array]) -> Primitive:
    """A function of two arrays, linear in each, as something to give derivatives to.

    As primitives, and not through `custom_vjp`, since that would allow no forward mode.
    """
    result = Primitive(f"dilated_conv{name}")
    static = [
        p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    result.def_impl(jax.jit(function, static_argnames=static))

    def shape(*arrays: Any, **static: Any) -> Any:
        made = jax.eval_shape(functools.partial(function, **static), *arrays)
        return jax.core.ShapedArray(made.shape, made.dtype)

    def batched(arrays: Any, axes: Any, **static: Any) -> Any:
        return jax.vmap(functools.partial(function, **static), axes)(*arrays), 0

    result.def_abstract_eval(shape)
    batching.primitive_batchers[result] = batched
    mlir.register_lowering(result, mlir.lower_fun(function, multiple_results=False))
    return result


_conv = _primitive("", _forward)
_conv_to_input = _primitive("_to_input", _to_input)
_conv_to_filter = _primitive("_to_filter", _to_filter)

# Each is the transpose of the others in one of its arguments.
ad.defbilinear(
    _conv,
    lambda dy, x, kernel, at: _conv_to_input.bind(dy, kernel, at=at),
    lambda dy, x, kernel, at: _conv_to_filter.bind(x, dy, at=at, window=kernel.aval.shape[:2]),
)
ad.defbilinear(
    _conv_to_input,
    lambda dx, dy, kernel, at: _conv.bind(dx, kernel, at=at),
    lambda dx, dy, kernel, at: _conv_to_filter.bind(dx, dy, at=at, window=kernel.aval.shape[:2]),
)
ad.defbilinear(
    _conv_to_filter,
    lambda dw, x, dy, at, window: _conv_to_input.bind(dy, dw, at=at),
    lambda dw, x, dy, at, window: _conv.bind(x, dw, at=at),
)
