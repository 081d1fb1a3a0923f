"""Where the affinity head errs, does the segmentation err too? What propagation can correct at all.

Propagation corrects a pair of pixels that the segmentation parts or joins wrongly only if the head
is right about it. If both err together there is nothing to win, however good each is.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax import affinity, propagate, resize
from dilaff_jax.ablation import network_outputs
from dilaff_jax.ablation.network_outputs import Outputs

# Of the last two axes of the counts: 0 for wrong, 1 for right.
AXES = ("dilation", "one class", "segmentation right", "head right")


def count(outputs: Outputs, bias: np.ndarray, rows: int) -> np.ndarray:
    """Counts pairs on the head's grid by `AXES`, int64 `[D, 2, 2, 2]`.

    The segmentation joins a pair where it gives both ends one class, the head where its logit is
    above the bias.

    Args:
        outputs: of a run with an affinity head.
        bias: `[D]`.
        rows: images at a time.
    """
    assert outputs.affinity_logits is not None
    assert outputs.offsets is not None
    offsets = tuple(map(tuple, outputs.offsets.tolist()))
    limits = propagate.per_offset(bias, outputs.offsets)
    total: Any = 0
    for batch in outputs.batches(rows):
        labels = network_outputs.padded_labels(outputs, batch.indices, rows)
        total = total + np.asarray(
            _count(batch.logits, batch.affinity_logits, labels, limits, offsets), np.int64
        )
    return total


def figures(counts: np.ndarray, dilations: Sequence[int]) -> dict[str, float]:
    """Figures of `count`'s result, for each dilation d and, as mean/..., their mean.

    dD/phi: correlation of the two errors over pairs, both kinds of pairs weighing the same, so that
    the rare class edges are seen: φ = (n₁₁n₀₀ - n₁₀n₀₁) / √(n₁·n₀·n·₁n·₀). dD/mendable: of the
    class edges that the segmentation misses or the joins that it breaks, weighed likewise, the
    share that the head has right. dD/spoilable: of those that the segmentation has right, the share
    that the head has wrong.
    """
    kinds = counts.sum(axis=(2, 3), keepdims=True)
    shares = np.divide(counts, kinds, out=np.zeros(counts.shape), where=kinds > 0).sum(axis=1)
    shares_of = {}
    for d, table in zip(dilations, shares, strict=True):
        sides = np.prod([*table.sum(axis=0), *table.sum(axis=1)])
        wrong, right = table
        shares_of[f"d{d}/phi"] = _divide(np.linalg.det(table), np.sqrt(sides))
        shares_of[f"d{d}/mendable"] = _divide(wrong[1], wrong.sum())
        shares_of[f"d{d}/spoilable"] = _divide(right[0], right.sum())
    for name in ("phi", "mendable", "spoilable"):
        shares_of[f"mean/{name}"] = float(np.mean([shares_of[f"d{d}/{name}"] for d in dilations]))
    return shares_of


def _divide(part: Any, whole: Any) -> float:
    return float(part / whole) if whole > 0 else float("nan")


@functools.partial(jax.jit, static_argnames=("offsets",))
def _count(
    logits: jax.Array,
    affinity_logits: jax.Array,
    labels: jax.Array,
    limits: jax.Array,
    offsets: tuple[tuple[int, ...], ...],
) -> jax.Array:
    rows, grid = np.array(offsets), affinity_logits.shape[1:3]
    target, valid = affinity.targets(affinity.downsample_labels(labels, grid), rows)
    classes = jnp.argmax(resize.bilinear(logits, grid), axis=-1).astype(jnp.int32)
    joined, _ = affinity.targets(classes, rows)
    right = joined == target, (affinity_logits.astype(jnp.float32) > limits) == target
    dilations = len(affinity.distinct_dilations(rows))
    # By place, not by size: figures name dilations in the order of the channels.
    number = np.repeat(np.arange(dilations), len(rows) // dilations)
    cell = ((2 * number + target) * 2 + right[0]) * 2 + right[1]
    size = 8 * dilations
    counts = jnp.bincount(jnp.where(valid, cell, size).ravel(), length=size + 1)[:-1]
    return counts.reshape(-1, 2, 2, 2)
