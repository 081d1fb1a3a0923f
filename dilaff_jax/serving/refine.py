"""Refinement of anybody's logits: arrays of NumPy, JAX or torch in, the same kind out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax import affinity, propagate
from dilaff_jax.errors import UserError


class Refined(NamedTuple):
    """labels: int32 `[B, *size]`. probs: float32 `[B, *size, C]`, or `[B, C, *size]`."""

    labels: Any
    probs: Any


def refine(
    logits: Any,
    affinity_logits: Any,
    *,
    size: Sequence[int] | None = None,
    offsets: np.ndarray | None = None,
    dilations: Sequence[int] = (1, 2, 4, 8),
    operator: str = "signed",
    channels_first: bool = False,
    **options: Any,
) -> Refined:
    """Refines segmentation logits along affinities, wherever both come from.

    Calls `propagate.refine_logits`. Torch tensors are passed over by DLPack, without a copy where
    their memory allows it, and no gradient flows back through them; a tensor on a GPU needs a JAX
    that sees this GPU.

    Args:
        logits: `[B, h, w, C]`, floating point; NumPy, JAX or torch.
        affinity_logits: `[B, h', w', K]`, of the same kind, on a grid of its own.
        size: of the result; by default that of the logits.
        offsets: of the K channels, `[K, ndim]` in cells of their grid. By default those of
            `dilations`; they need not be of two dimensions, and the arrays follow them.
        dilations: for `affinity.offsets(dilations)`, dilation-major, then row-major.
        operator: see `propagate.operator`.
        channels_first: arrays are `[B, C, h, w]` and `[B, K, h', w']`, as in torch.
        **options: of the operator, such as steps=5, strength=0.1, bias=0.0.

    Returns:
        Refined labels and probabilities of the kind, and on the device, of `logits`.

    Raises:
        TypeError: an array of another kind, or two kinds.
        UserError: shapes or values that do not fit.
    """
    offsets = affinity.offsets(dilations) if offsets is None else affinity.check_offsets(offsets)
    ndim = offsets.shape[1]
    scores, give_back = take("logits", logits)
    edges, _ = take("affinity_logits", affinity_logits)
    if _kind(logits) != _kind(affinity_logits):
        raise TypeError(
            f"logits are of {_kind(logits)}, affinity_logits of {_kind(affinity_logits)}; give "
            "two arrays of one kind"
        )
    for name, x, channels in (("logits", scores, "C"), ("affinity_logits", edges, "K")):
        if x.ndim != ndim + 2:
            order = f"[B, {channels}, *spatial]" if channels_first else f"[B, *spatial, {channels}]"
            raise UserError(f"{name} has shape {x.shape}; expected {order}, {ndim} spatial axes")
    if channels_first:
        scores, edges = (jnp.moveaxis(x, 1, -1) for x in (scores, edges))
    size = scores.shape[1:-1] if size is None else size
    labels, probs = propagate.refine_logits(
        scores, edges, offsets, size, propagate.operator(operator, **options)
    )
    if channels_first:
        probs = jnp.moveaxis(probs, -1, 1)
    return Refined(give_back(labels), give_back(probs))


def _kind(x: Any) -> str:
    return "jax" if isinstance(x, jax.Array) else type(x).__module__.partition(".")[0]


def take(name: str, x: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """An array as JAX's, and the function that turns JAX's into its kind."""
    kind = _kind(x)
    if kind == "jax":
        return x, lambda y: y
    if kind == "numpy":
        return jnp.asarray(x), np.array
    if kind != "torch":
        raise TypeError(f"{name} is of type {type(x)}; expected an array of NumPy, JAX or torch")
    import torch  # whoever holds a tensor has it

    return (
        jnp.from_dlpack(x.detach().contiguous()),
        lambda y: torch.from_dlpack(y).to(x.device),
    )
