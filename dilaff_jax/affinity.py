"""Shifts along the dilated neighbourhood, and ground-truth affinities from label maps.

An edge joins pixel i with i + o, for every offset o = d·u with d a dilation and u a step to one of
the 3^n - 1 neighbours in n dimensions. All functions work in any number of spatial dimensions;
arrays are `[..., *spatial]` or `[..., *spatial, channels]`.
"""

import functools
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer, Real, Shaped

from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.neighbourhood import (
    check_offsets,
    dilation_of,
    distinct_dilations,
    offsets,
    places,
    points_forward,
)

__all__ = [
    "check_offsets",
    "check_shapes",
    "close_void",
    "dilation_of",
    "distinct_dilations",
    "downsample_labels",
    "inside",
    "mirror",
    "neighbours",
    "neighbours_by_product",
    "offsets",
    "pair_weights",
    "per_offset",
    "places",
    "shift",
    "soft_targets",
    "targets",
]

# Wider maps are shifted on a TPU, too: the product grows with the square of the width.
_WIDEST = 640


def shift(
    x: Shaped[ArrayLike, " *spatial C"],
    offset: Sequence[int] | Int[np.ndarray, " ndim"],
    fill: ArrayLike = 0,
) -> Shaped[Array, " *spatial C"]:
    """Moves `x` `[..., *spatial, C]` so that y[i] = x[i + offset], or `fill` where that is outside.

    The offset may exceed the array. Its length says how many axes before the last are spatial.

    Raises:
        UserError: `x` has fewer axes than the offset needs.
    """
    x = jnp.asarray(x)
    if x.ndim < len(offset) + 1:
        raise UserError(f"x has shape {x.shape}; an offset {tuple(offset)} needs [*spatial, C]")
    return _shift(x, offset, fill, x.ndim - 1 - len(offset))


def _shift(
    x: jax.Array, offset: Sequence[int] | np.ndarray, fill: ArrayLike, first: int
) -> jax.Array:
    """`shift` over the axes from `first` on."""
    fill = jnp.asarray(fill, x.dtype)
    padding = [(0, 0, 0)] * x.ndim
    for axis, o in enumerate(offset, start=first):
        if abs(o) >= x.shape[axis]:
            return jnp.full(x.shape, fill)
        padding[axis] = (-int(o), int(o), 0)
    return jax.lax.pad(x, fill, padding)


def inside(
    spatial: Sequence[int], offsets: Int[np.ndarray, " K ndim"]
) -> Bool[Array, " *spatial K"]:
    """Returns where i + o is in the image: bool `[*spatial, K]`.

    Built from one comparison per axis, so that XLA fuses it instead of storing K maps.
    """
    masks = jnp.ones((1,) * len(spatial) + (len(offsets),), bool)
    for axis, size in enumerate(spatial):
        column = [1] * (len(spatial) + 1)
        column[axis] = size
        target = jnp.arange(size).reshape(column) + np.asarray(offsets)[:, axis]
        masks = masks & (target >= 0) & (target < size)
    return masks


def targets(
    labels: Integer[ArrayLike, " *spatial"],
    offsets: Int[np.ndarray, " K ndim"],
    ignore_label: int = IGNORE_LABEL,
) -> tuple[Bool[Array, " *spatial K"], Bool[Array, " *spatial K"]]:
    """Returns ground-truth affinities and their validity, both bool `[..., *spatial, K]`.

    target[i,o] = 1 where labels[i] = labels[i+o]; valid[i,o] = 1 where i+o is inside the image and
    neither label is `ignore_label`. Invalid pairs have target 0.

    Args:
        labels: integers `[..., *spatial]`.
        offsets: `[K, ndim]`, from `offsets`.
        ignore_label: the label that takes part in no edge.

    Raises:
        UserError: `labels` are not integers or have fewer axes than the offsets.
    """
    offsets = check_offsets(offsets)
    labels = _check_labels(labels, offsets.shape[1])
    # Outside counts as ignored: one test then covers both reasons for a pair to be invalid.
    around = _label_neighbours(labels, offsets, ignore_label)
    valid = (labels[..., None] != ignore_label) & (around != ignore_label)
    return (labels[..., None] == around) & valid, valid


def _label_neighbours(labels: jax.Array, offsets: np.ndarray, fill: int) -> jax.Array:
    """labels[i + o] `[..., *spatial, K]`, `fill` outside; on a TPU in the form it is fast at."""
    stacked = functools.partial(neighbours, offsets=offsets, fill=fill)
    if labels.dtype != jnp.uint8 or offsets.shape[1] != 2 or labels.shape[-1] > _WIDEST:
        return stacked(labels)
    products = functools.partial(neighbours_by_product, offsets=offsets, fill=fill)
    return jax.lax.platform_dependent(labels, tpu=products, default=stacked)


def neighbours(x: jax.Array, offsets: np.ndarray, fill: ArrayLike) -> jax.Array:
    """x[i + o] of a map without channels: `[..., *spatial]` to `[..., *spatial, K]`."""
    first = x.ndim - offsets.shape[1]
    return jnp.stack([_shift(x, o, fill, first) for o in offsets], axis=-1)


def neighbours_by_product(labels: jax.Array, offsets: np.ndarray, fill: int) -> jax.Array:
    """The same of uint8 `[..., H, W]`, as a product with zeros and ones that picks the columns.

    A TPU keeps channels in the 128 lanes of its registers: K shifted maps, joined as channels, are
    moved lane by lane and padded from 1 to 128 on the way. A product writes them where they belong,
    at 18·K·H·W² operations for the nine rows of four dilations. Exact: it has one term that is not
    0, and bfloat16 holds the integers to 256.
    """
    rows, of_row = np.unique(offsets[:, 0], return_inverse=True)
    code = (labels.astype(jnp.int32) + 1).astype(jnp.bfloat16)  # 0 is outside
    moved = [_shift(code, (int(row), 0), 0, labels.ndim - 2) for row in rows]
    width = labels.shape[-1]
    read, write = jnp.arange(width)[:, None, None], jnp.arange(width)[:, None]
    column = read == write + offsets[:, 1]
    picks = column & (np.arange(len(rows))[:, None, None, None] == of_row)  # [rows, W, W, K]
    codes = jnp.einsum(
        "...hrv,rvwk->...hwk",
        jnp.stack(moved, axis=-2),
        picks.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    ).astype(jnp.int32)
    return jnp.where(codes > 0, codes - 1, fill).astype(labels.dtype)


def pair_weights(
    labels: Integer[ArrayLike, " *spatial"],
    offsets: Int[np.ndarray, " K ndim"],
    class_weights: Real[ArrayLike, " C"],
    ignore_label: int = IGNORE_LABEL,
) -> Float[Array, " *spatial K"]:
    """Returns weights of pairs by their classes, float32 `[..., *spatial, K]`.

    weights[i,o] = (W[labels[i]] + W[labels[i+o]]) / 2, and 0 where the pair is not valid: pairs
    within a rare class, and those that end at one, count for more. Our choice, after the class
    weights of the segmentation's cross-entropy.

    Args:
        labels: integers `[..., *spatial]`.
        offsets: `[K, ndim]`, from `offsets`.
        class_weights: W, `[C]`, 0 or more.
        ignore_label: the label that takes part in no edge.

    Raises:
        UserError: as `targets`; or `class_weights` are not a vector of numbers from 0.
    """
    weights = np.asarray(class_weights, np.float32)
    if weights.ndim != 1 or not weights.size or not np.all(weights >= 0):
        raise UserError(f"class_weights are {class_weights}; expected [C] numbers, 0 or more")
    offsets = check_offsets(offsets)
    labels = _check_labels(labels, offsets.shape[1])
    _, valid = targets(labels, offsets, ignore_label)
    # What is ignored has no class; its weight is not used.
    known = jnp.where(labels == ignore_label, 0, labels)
    at = jnp.take(jnp.asarray(weights), known, mode="fill", fill_value=jnp.nan)
    return jnp.where(valid, (at[..., None] + neighbours(at, offsets, 0)) / 2, 0)


def soft_targets(
    labels: Integer[ArrayLike, " *spatial"],
    offsets: Int[np.ndarray, " K ndim"],
    size: Sequence[int],
    num_classes: int,
    ignore_label: int = IGNORE_LABEL,
) -> tuple[Float[Array, " *size K"], Bool[Array, " *size K"]]:
    """Returns soft affinities at a coarser grid: target float32, valid bool, `[..., *size, K]`.

    With q[i] the class shares of the labelled pixels in cell i (area-pooled one-hot labels),
    target[i,o] = Σ_c q[i,c]·q[i+o,c]: the chance that two labelled pixels, one drawn from each
    cell, are of one class. valid where both cells hold a labelled pixel. On cells of one class it
    equals `targets`. Our choice; the hard counterpart is `targets(downsample_labels(...))`.

    Raises:
        UserError: as `targets`; or `size` does not divide the labels' size (no area pooling then).
    """
    ndim = check_offsets(offsets).shape[1]
    labels = _check_labels(labels, ndim)
    spatial = labels.shape[labels.ndim - ndim :]
    if len(size) != ndim or any(n % m for n, m in zip(spatial, size, strict=True)):
        raise UserError(
            f"labels of size {spatial} cannot be pooled to {tuple(size)} in whole cells"
        )
    shares = jax.nn.one_hot(
        jnp.where(labels == ignore_label, num_classes, labels), num_classes, dtype=jnp.float32
    )
    split = labels.shape[: labels.ndim - ndim]
    for n, m in zip(spatial, size, strict=True):
        split += (m, n // m)
    first = labels.ndim - ndim
    cells = shares.reshape(*split, num_classes).sum(
        axis=tuple(first + 1 + 2 * a for a in range(ndim))
    )
    counts = cells.sum(axis=-1, keepdims=True)
    cells = cells / jnp.maximum(counts, 1)
    labelled = counts > 0
    target = [jnp.sum(cells * shift(cells, o), axis=-1) for o in offsets]
    valid = [(labelled & shift(labelled, o, False))[..., 0] for o in offsets]
    return jnp.stack(target, axis=-1), jnp.stack(valid, axis=-1)


def downsample_labels(
    labels: Integer[ArrayLike, " *spatial"], size: Sequence[int]
) -> Integer[Array, " *size"]:
    """Takes labels `[..., *spatial]` at the grid `[..., *size]`, nearest, half-pixel centres.

    Cell i reads pixel floor((i + 1/2)·n_in/n_out), torch's `nearest-exact`: the centre of what
    `resize.bilinear` would spread it over.

    Raises:
        UserError: `labels` are not integers or have fewer axes than `size`.
    """
    labels = _check_labels(labels, len(size))
    for axis, n_out in enumerate(size, start=labels.ndim - len(size)):
        n_in = labels.shape[axis]
        index = (2 * np.arange(n_out, dtype=np.int64) + 1) * n_in // (2 * n_out)
        labels = labels if n_in == n_out else jnp.take(labels, index, axis=axis)
    return labels


def close_void(
    labels: Integer[ArrayLike, " *spatial"],
    reach: int,
    ndim: int = 2,
    ignore_label: int = IGNORE_LABEL,
) -> Integer[Array, " *spatial"]:
    """Gives void within `reach` pixels of a class that class: strips between objects are closed.

    In each of `reach` steps a void pixel takes the class of a neighbour along an axis, the first
    that has one (before on the first axis, after, before on the second, ...), so that strips are
    shared between both sides, and larger areas stay void but for their rim. PASCAL VOC parts all
    objects by strips of about five pixels, across which no pair of small dilation has two classes.
    Our choice.

    Args:
        labels: integers `[..., *spatial]`.
        reach: steps, 0 for none; half the width of the strips, rounded up, closes them.
        ndim: spatial axes.
        ignore_label: what is void.

    Raises:
        UserError: `labels` are not integers.
    """
    labels = _check_labels(labels, ndim)
    first = labels.ndim - ndim
    steps = [s * e for e in np.eye(ndim, dtype=int) for s in (-1, 1)]
    for _ in range(reach):
        closed = labels
        # The last to be written wins, so the first neighbour comes last.
        for offset in reversed(steps):
            beside = _shift(labels, offset, ignore_label, first)
            takes = (labels == ignore_label) & (beside != ignore_label)
            closed = jnp.where(takes, beside, closed)
        labels = closed
    return labels


def mirror(
    half: Shaped[ArrayLike, " *spatial half"], offsets: Int[np.ndarray, " K ndim"]
) -> Shaped[Array, " *spatial K"]:
    """Completes symmetric affinities: `[..., *spatial, K/2]` to `[..., *spatial, K]`.

    a[i,o] = a[i+o,-o] for the offsets that point backward. Where i+o is outside the image the value
    is 0; propagation and losses mask these pairs.

    Args:
        half: maps of the forward offsets, in the order in which they stand in `offsets`.
        offsets: all K offsets, `[K, ndim]`; with each o it holds -o.

    Raises:
        UserError: an offset has no opposite, or `half` has not K/2 channels.
    """
    half = jnp.asarray(half)
    rows = check_offsets(offsets)
    forward = np.array([points_forward(o) for o in rows.tolist()])
    lonely = [o for o in rows.tolist() if [-x for x in o] not in rows.tolist()]
    if lonely:
        raise UserError(f"offset {tuple(lonely[0])} has no opposite; mirror needs all K offsets")
    opposite = places(-rows, rows)
    count = int(forward.sum())
    if half.ndim < rows.shape[1] + 1 or half.shape[-1] != count:
        raise UserError(f"half has shape {half.shape}; expected [..., *spatial, {count}]")
    own = np.cumsum(forward) - 1  # where a forward offset stands in `half`

    def channel(k: int) -> jax.Array:
        if forward[k]:
            return half[..., own[k]][..., None]
        return shift(half[..., own[opposite[k]]][..., None], rows[k])

    return jnp.concatenate([channel(k) for k in range(len(rows))], axis=-1)


def per_offset(bias: ArrayLike, offsets: Int[np.ndarray, " K ndim"]) -> Float[Array, " K"]:
    """Spreads a scalar, one value a dilation `[D]`, or one an offset `[K]`, to `[K]`.

    Raises:
        UserError: `bias` has another shape.
    """
    bias = jnp.asarray(bias, jnp.float32)
    dilation, present = dilation_of(offsets), distinct_dilations(offsets)
    if bias.shape in ((), dilation.shape):
        return jnp.broadcast_to(bias, dilation.shape)
    if bias.shape != (len(present),):
        raise UserError(
            f"bias has shape {bias.shape}; expected a scalar, [{len(present)}] (one a dilation) or "
            f"[{len(dilation)}] (one an offset)"
        )
    return bias[np.array([present.index(d) for d in dilation])]


def check_shapes(
    probs: jax.Array, guide: jax.Array, offsets: np.ndarray, steps: int, name: str
) -> tuple[tuple[int, ...], ...]:
    """Returns the offsets as a hashable constant.

    Args:
        probs: `[B, *spatial, C]`.
        guide: affinities or their logits, `[B, *spatial, K]`.
        offsets: `[K, ndim]`.
        steps: how many a propagation takes.
        name: of the guide, for messages.

    Raises:
        UserError: shapes that do not match, or a number of steps that cannot be.
    """
    rows = check_offsets(offsets)
    k, ndim = rows.shape
    if probs.ndim != ndim + 2:
        raise UserError(
            f"probs has shape {probs.shape}; offsets of {ndim} dimensions need "
            f"{ndim + 2} axes [B, *spatial, C]"
        )
    if guide.shape != (*probs.shape[:-1], k):
        raise UserError(
            f"{name} has shape {guide.shape}; expected {(*probs.shape[:-1], k)}: probs has shape "
            f"{probs.shape} and there are {k} offsets"
        )
    if not (isinstance(steps, numbers.Real) and steps >= 0 and steps % 1 == 0):
        raise UserError(f"steps is {steps!r}; expected a whole number, zero or more")
    return tuple(tuple(int(x) for x in row) for row in rows)


def _check_labels(labels: ArrayLike, ndim: int) -> jax.Array:
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(f"labels have dtype {labels.dtype}; expected integer class indices")
    if labels.ndim < ndim:
        raise UserError(f"labels have shape {labels.shape}; expected at least {ndim} axes")
    return labels
