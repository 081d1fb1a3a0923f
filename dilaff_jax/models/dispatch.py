"""Which platform layers are made for, and how a convolution of `cpu` is differentiated.

The choice is made when a model is traced, by the platform that it is traced for
(`kernels.backends.traced_for`): a program for a GPU or TPU holds nothing of what `cpu` has. What is
to run on several platforms, an exported file, is traced within `made_for("any")`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias, TypeVar

import jax

from dilaff_jax.kernels import backends
from dilaff_jax.models.cpu import materialize as materialize_lib
from dilaff_jax.models.geometry import Geometry, native

Gradients: TypeAlias = tuple[jax.Array, jax.Array]
T = TypeVar("T")

_made_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("made_for", default=None)


def target() -> str:
    """The platform that layers are traced for: "cpu", "gpu", "tpu", or "any" for several."""
    return _made_for.get() or backends.traced_for()


@contextlib.contextmanager
def made_for(platform: str) -> Iterator[None]:
    """What is traced inside is for this platform, "any" for several, whatever this machine has."""
    token = _made_for.set(platform)
    try:
        yield
    finally:
        _made_for.reset(token)


def materialize(tree: T) -> T:
    """`materialize.materialize` for a CPU; elsewhere, where XLA fuses by cost, `tree` itself."""
    return materialize_lib.materialize(tree) if target() == "cpu" else tree


class CpuConv(NamedTuple):
    """A convolution for a CPU: forward `f(x, kernel, geometry)`, `b(x, kernel, dy, geometry)`.

    depthwise: one filter a channel.
    """

    forward: Callable[[jax.Array, jax.Array, Geometry], jax.Array]
    backward: Callable[[jax.Array, jax.Array, jax.Array, Geometry], Gradients]
    depthwise: bool


def conv(x: jax.Array, kernel: jax.Array, form: CpuConv, at: Geometry) -> jax.Array:
    """Convolves `[B, H, W, C]` with `[k, l, C or 1, F]`, by `form` on a CPU.

    Forward-mode differentiation works off a CPU, where this is XLA's own convolution; `form` has a
    rule for reverse mode alone.
    """
    match target():
        case "cpu":
            return _with_own_gradient(x, kernel, form, at)
        case "any":
            return jax.lax.platform_dependent(
                x,
                kernel,
                cpu=lambda x, kernel: form.forward(x, kernel, at),
                default=functools.partial(native, at=at, depthwise=form.depthwise),
            )
        case _:
            return native(x, kernel, at, form.depthwise)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _with_own_gradient(x: jax.Array, kernel: jax.Array, form: CpuConv, at: Geometry) -> jax.Array:
    return form.forward(x, kernel, at)


def _forward(
    x: jax.Array, kernel: jax.Array, form: CpuConv, at: Geometry
) -> tuple[jax.Array, Gradients]:
    x = materialize_lib.materialize(x)
    return form.forward(x, kernel, at), (x, kernel)


def _backward(form: CpuConv, at: Geometry, residuals: Gradients, dy: jax.Array) -> Gradients:
    return form.backward(*residuals, dy, at)


_with_own_gradient.defvjp(_forward, _backward)
