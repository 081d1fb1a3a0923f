"""Which implementation runs where: XLA, or the kernel of the platform."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType

from dilaff_jax.errors import UserError

Backend: TypeAlias = Literal["auto", "xla", "pallas"]

# Bytes of inputs and result from which the kernel for a GPU is known to be ahead of XLA's loops: on
# an H200 it takes under two thirds of their time at 5 to 78 MB, and under a third at 587 MB.
_LARGE = 2**22
# Of the chips on which that was measured, Hopper's.
_MEASURED = "9."


def check(backend: str) -> None:
    """Raises UserError for a backend that there is not."""
    if backend not in ("auto", "xla", "pallas"):
        raise UserError(f"backend is {backend!r}; expected 'auto', 'xla' or 'pallas'")


def run(
    backend: Backend,
    name: str,
    xla: Callable[..., jax.Array],
    arrays: tuple[Any, ...],
    scalars: Any,
    offsets: tuple[tuple[int, ...], ...],
    steps: int,
) -> jax.Array:
    """Runs a propagation operator in XLA or as a kernel, of `kernels.tpu` or `kernels.gpu`.

    "auto" takes the kernel of the platform that is traced for, where nothing stands against it
    (`bands.plan`, `gpu.obstacle`) and, on a GPU, the maps are large; else XLA. On a CPU it is
    always XLA. Only then is a kernel traced, and its size chosen by a TPU's VMEM.

    Args:
        backend: "auto", "xla" or "pallas".
        name: of the kernel.
        xla: the operator as a function of `arrays`, whose gradient the kernel takes.
        arrays: probs, affinities or their logits, and the options.
        scalars: a tree of the options that the kernels want to be scalars.
        offsets: K tuples.
        steps: T.

    Raises:
        UserError: backend "pallas" and a case that the kernel does not take.
    """
    platform = traced_for()
    ahead = platform == "tpu" or (platform == "gpu" and _is_ahead(*arrays[:2]))
    if backend == "xla" or (backend == "auto" and not ahead):
        return xla(*arrays)
    made = (_for_gpu if platform == "gpu" else _for_tpu)(name, arrays, scalars, offsets, steps)
    if isinstance(made, str):
        if backend == "pallas":
            raise UserError(f"backend 'pallas' does not take this case: {made}; use 'auto'")
        return xla(*arrays)

    def kernel(interpret: bool) -> Callable[..., jax.Array]:
        return _with_gradient_of(xla, functools.partial(made, interpret=interpret))

    # A CPU interprets the kernel for a TPU; that for a GPU it can only within a test.
    elsewhere = xla if backend == "auto" or platform == "gpu" else kernel(interpret=True)
    here = {"cuda" if platform == "gpu" else "tpu": kernel(interpret=False)}
    return jax.lax.platform_dependent(*arrays, **here, default=elsewhere)


def obstacle(probs: Any, guide: Any, scalars: Any) -> str | None:
    """Why no kernel takes these maps, in words; None where one may.

    Args:
        probs: `[B, *spatial, C]`.
        guide: affinities or their logits, `[B, *spatial, K]`.
        scalars: a tree of the options that the kernels want to be scalars.
    """
    if not all(isinstance(n, int) and n > 0 for n in (*probs.shape, *guide.shape)):
        return f"the shapes {probs.shape} and {guide.shape} are not fixed, or empty"
    if any(np.ndim(x) for x in jax.tree.leaves(scalars)):
        return "an option is no scalar"
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    divided = [str(n) for n, size, kind in kinds if size > 1 and kind != AxisType.Manual]
    if divided:
        return f"jit divides arrays along {', '.join(divided)}, and a kernel it cannot divide"
    if tracked(probs) or tracked(guide):
        return "shard_map keeps track of what varies over devices (check_vma=True)"
    return None


def tracked(x: Any) -> bool:
    """Whether a `shard_map` keeps track of what of this array varies over devices."""
    kind = jax.typeof(x) if isinstance(x, jax.Array) else None
    return bool(getattr(getattr(kind, "manual_axis_type", None), "varying", ()))


def capability() -> str:
    """The compute capability of this machine's GPU, such as "9.0"; "" where there is none."""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def _is_ahead(probs: jax.Array, guide: jax.Array) -> bool:
    """Whether the kernel for a GPU is known to be ahead: of large maps, on the chips it ran on.

    Of a GPU that is not there, for which a program is compiled, it is taken to be such a chip.
    """
    here = capability()
    if here and not here.startswith(_MEASURED):
        return False
    if not all(isinstance(n, int) for n in probs.shape):
        return False
    return math.prod(probs.shape[:-1]) * 4 * (guide.shape[-1] + 2 * probs.shape[-1]) >= _LARGE


def _for_tpu(
    name: str, arrays: tuple[Any, ...], scalars: Any, offsets: Any, steps: int
) -> Callable[..., jax.Array] | str:
    from dilaff_jax.kernels import bands, tpu  # Pallas takes a while to import

    plan = bands.plan(arrays[0], arrays[1], offsets, steps, scalars)
    return plan if isinstance(plan, str) else functools.partial(getattr(tpu, name), plan=plan)


def _for_gpu(
    name: str, arrays: tuple[Any, ...], scalars: Any, offsets: Any, steps: int
) -> Callable[..., jax.Array] | str:
    from dilaff_jax.kernels import gpu  # Pallas takes a while to import

    obstacle = gpu.obstacle(arrays[0], arrays[1], scalars, offsets)
    return obstacle or functools.partial(getattr(gpu, name), offsets=offsets, steps=steps)


def _with_gradient_of(
    reference: Callable[..., jax.Array], kernel: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """`kernel`, differentiated as `reference`, the same function of arrays written in XLA.

    The backward pass makes the reference's steps again and keeps one map a step. It is no kernel:
    what it moves is mostly gradients of the K weights, which XLA writes as often as a kernel would.
    """
    function = jax.custom_vjp(kernel)
    function.defvjp(
        lambda *arrays: (kernel(*arrays), arrays),
        lambda arrays, gradient: jax.vjp(reference, *arrays)[1](gradient),
    )
    return function


def traced_for() -> str:
    """The platform that what is traced is for, "cpu", "gpu" or "tpu".

    That of the mesh, else of the machine's default device. A program that is lowered for another
    platform later, as an exported file may be, is not known to be.
    """
    device = (
        jax.sharding.get_abstract_mesh().abstract_device
        or jax.default_device.value
        or jax.devices()[0]
    )
    kind = (device if isinstance(device, str) else device.device_kind).lower()
    return "tpu" if "tpu" in kind else "cpu" if kind == "cpu" else "gpu"
