"""The method's part of the parity report: affinity targets, propagation, every loss, gradients."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch

from dilaff_jax import affinity, losses, propagate
from dilaff_jax.interop import torch_reference
from dilaff_jax.interop.report import FORWARD_BOUND, GRADIENT_BOUND, Row, compare

Function: TypeAlias = Callable[[Any, Any], Any]

_SHAPE = (2, 23, 17)
_CLASSES = 5
_WALK: dict[str, Any] = {
    "steps": 3,
    "sharpness": 4.0,
    "threshold": 0.2,
    "self_weight": 0.7,
    "restart": 0.1,
}
_SIGNED: dict[str, Any] = {"steps": 5, "strength": 0.1, "bias": -0.5, "repulsion": 0.7}


def rows(seed: int) -> list[Row]:
    """Compares each function with `torch_reference` on random data with ignored labels."""
    rng = np.random.default_rng(seed)
    offsets = affinity.offsets()
    # Blocks of one class, so that both kinds of edges occur at every dilation.
    labels = rng.integers(0, _CLASSES, (_SHAPE[0], 5, 4)).repeat(5, 1).repeat(5, 2)
    labels = np.where(rng.random(_SHAPE) < 0.1, 255, labels[:, : _SHAPE[1], : _SHAPE[2]])
    logits = rng.normal(0, 2, (*_SHAPE, _CLASSES)).astype(np.float32)
    affinity_logits = rng.normal(0, 2, (*_SHAPE, len(offsets))).astype(np.float32)
    with jax.default_matmul_precision("float32"):
        return [
            *_target_rows(labels, offsets),
            *_propagation_rows(logits, affinity_logits, offsets),
            *_loss_rows(logits, affinity_logits, labels, offsets),
        ]


def _target_rows(labels: np.ndarray, offsets: np.ndarray) -> list[Row]:
    ours = affinity.targets(labels, offsets)
    theirs = torch_reference.targets(torch.from_numpy(labels), offsets.tolist())
    return [
        compare("targets", name, a, _to_last(b), 0)
        for name, a, b in zip(("target", "valid"), ours, theirs, strict=True)
    ]


def _propagation_rows(
    logits: np.ndarray, affinity_logits: np.ndarray, offsets: np.ndarray
) -> list[Row]:
    where = offsets.tolist()
    cases: dict[str, tuple[Function, Function]] = {
        "random_walk": (
            lambda x, e: propagate.random_walk(
                jax.nn.softmax(x), jax.nn.sigmoid(e), offsets, **_WALK
            ),
            lambda x, e: torch_reference.random_walk(
                torch.softmax(x, 1), torch.sigmoid(e), where, **_WALK
            ),
        ),
        "signed": (
            lambda x, e: propagate.signed(jax.nn.softmax(x), e, offsets, **_SIGNED),
            lambda x, e: torch_reference.signed(torch.softmax(x, 1), e, where, **_SIGNED),
        ),
    }
    return [
        row
        for name, pair in cases.items()
        for row in _operator_rows(name, *pair, logits, affinity_logits)
    ]


def _operator_rows(
    name: str, ours: Function, theirs: Function, logits: np.ndarray, affinity_logits: np.ndarray
) -> list[Row]:
    """The operator, and the gradient of the sum of its squares."""
    leaves = _to_torch(logits), _to_torch(affinity_logits)
    result = theirs(*leaves)
    expected = torch.autograd.grad((result**2).sum(), leaves)
    gradients = jax.grad(lambda x, e: jnp.sum(ours(x, e) ** 2), argnums=(0, 1))(
        logits, affinity_logits
    )
    rows = [
        compare("propagation", name, ours(logits, affinity_logits), _to_last(result), FORWARD_BOUND)
    ]
    for by, a, b in zip(("logits", "affinity logits"), gradients, expected, strict=True):
        kind = f"propagation, gradient by {by}"
        rows.append(compare(kind, name, a, _to_last(b), GRADIENT_BOUND))
    return rows


def _loss_rows(
    logits: np.ndarray, affinity_logits: np.ndarray, labels: np.ndarray, offsets: np.ndarray
) -> list[Row]:
    y = torch.from_numpy(labels)
    target, valid = torch_reference.targets(y, offsets.tolist())
    x, e = _to_torch(logits), _to_torch(affinity_logits)
    of_pixels = torch_reference.segmentation_losses(x, y)
    of_pixels["adaptive_affinity_fields"] = torch_reference.adaptive_affinity_fields(x, y)
    of_edges = torch_reference.affinity_losses(e, target, valid, offsets.tolist())
    rows = []
    for name, value in of_pixels.items():
        rows += _one_loss(name, (labels,), logits, value, x)
    for name, value in of_edges.items():
        rows += _one_loss(name, (_to_last(target), _to_last(valid), 4), affinity_logits, value, e)
    return rows


def _one_loss(
    name: str, targets: tuple[Any, ...], x: np.ndarray, reference: torch.Tensor, leaf: torch.Tensor
) -> list[Row]:
    def loss(x: jax.Array) -> jax.Array:
        return losses.finish(getattr(losses, name)(x, *targets))

    value, gradient = jax.value_and_grad(loss)(x)
    (theirs,) = torch.autograd.grad(reference, leaf, retain_graph=True)
    return [
        compare("losses", name, value, reference.detach().numpy(), FORWARD_BOUND),
        compare("losses, gradient by logits", name, gradient, _to_last(theirs), GRADIENT_BOUND),
    ]


def _to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()


def _to_last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)
