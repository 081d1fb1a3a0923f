"""The loss of semantic boundaries, a rival of the affinity loss as an auxiliary task."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, Real

from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.losses.edges import affinity_balanced
from dilaff_jax.losses.loss_sum import LossSum


def boundary_targets(
    labels: Int[ArrayLike, " B *spatial"], num_classes: int, ignore_label: int = IGNORE_LABEL
) -> tuple[Bool[Array, " B *spatial C"], Bool[Array, " B *spatial C"]]:
    """Where each class has a boundary: c and another class are among the cells around.

    Around are those within a cell along every axis, 3×3 or, of volumes, 3×3×3. On a grid of
    stride 2 that marks two pixels on each side, as SBD and SBCB do.

    Args:
        labels: on the grid of the logits, `[B, *spatial]`.
        num_classes: C.
        ignore_label: of cells that are of no class.

    Returns:
        The target and where it counts, `[B, *spatial, C]`: cells with a label.
    """
    labels = jnp.asarray(labels)
    classes = jnp.arange(num_classes, dtype=labels.dtype)
    valid = labels != ignore_label
    of_class = labels[..., None] == classes
    here = _around(of_class)
    others = _around(valid[..., None] & ~of_class)
    return here & others, jnp.broadcast_to(valid[..., None], of_class.shape)


def semantic_boundaries(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Int[ArrayLike, " B *spatial"],
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """Binary cross-entropy of the boundaries of each class, boundary and rest weighing the same.

    `finish` gives mean_c ½·Σ Y·(-log p) / ΣY + ½·Σ (1-Y)·(-log(1-p)) / Σ(1-Y). CASENet (Yu et al.
    2017, https://arxiv.org/abs/1705.09759) balances so within an image; over the whole batch and by
    class is our choice, as everywhere here.

    Args:
        logits: `[B, *spatial, C]`.
        labels: on the same grid, `[B, *spatial]`.
        ignore_label: of cells that do not count.

    Returns:
        LossSum of shape `[C, 2]`: boundaries, the rest.

    Raises:
        UserError: shapes that do not match, NaN.
    """
    if jnp.shape(logits)[:-1] != jnp.shape(labels):
        raise UserError(
            f"logits have shape {jnp.shape(logits)} and labels {jnp.shape(labels)}; expected "
            "[B, *spatial, C] and [B, *spatial]"
        )
    num_classes = jnp.shape(logits)[-1]
    target, valid = boundary_targets(labels, num_classes, ignore_label)
    return affinity_balanced(logits, target, valid, num_classes)


def _around(x: jax.Array) -> jax.Array:
    """Whether it is so in any of the cells around, `[B, *spatial, C]`."""
    for axis in range(1, x.ndim - 1):
        edge = [(0, 0)] * x.ndim
        edge[axis] = (1, 1)
        padded = jnp.pad(x, edge)
        n = x.shape[axis]
        parts = [jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(3)]
        x = parts[0] | parts[1] | parts[2]
    return x
