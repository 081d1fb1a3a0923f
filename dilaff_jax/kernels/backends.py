"""Which implementation runs where: XLA, or the kernel of the platform."""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax

from dilaff_jax.errors import UserError

Backend: TypeAlias = Literal["auto", "xla", "pallas"]


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
    """Runs a propagation operator in XLA or as the kernel of `kernels.tpu`.

    "auto" takes the kernel on a TPU where `bands.plan` finds no reason against it, else XLA: only
    then is it traced, and its size chosen by that TPU's VMEM.

    Args:
        backend: "auto", "xla" or "pallas".
        name: of the kernel.
        xla: the operator as a function of `arrays`, whose gradient the kernel takes.
        arrays: probs, affinities or their logits, and the options.
        scalars: a tree of the options that the kernel wants to be scalars.
        offsets: K tuples.
        steps: T.

    Raises:
        UserError: backend "pallas" and a case that the kernel does not take.
    """
    if backend == "xla" or (backend == "auto" and traced_for() != "tpu"):
        return xla(*arrays)
    from dilaff_jax.kernels import bands, tpu  # Pallas takes a while to import

    plan = bands.plan(arrays[0], arrays[1], offsets, steps, scalars)
    if isinstance(plan, str):
        if backend == "pallas":
            raise UserError(f"backend 'pallas' does not take this case: {plan}; use 'auto'")
        return xla(*arrays)

    def kernel(interpret: bool) -> Callable[..., jax.Array]:
        function = getattr(tpu, name)
        call = functools.partial(function, plan=plan, interpret=interpret)
        return tpu.with_gradient_of(xla, call)

    elsewhere = xla if backend == "auto" else kernel(interpret=True)
    return jax.lax.platform_dependent(*arrays, tpu=kernel(interpret=False), default=elsewhere)


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
