"""Losses of the segmentation: logits `[B, *spatial, C]` against labels `[B, *spatial]`."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer, Real

from dilaff_jax import resize
from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.losses import mining
from dilaff_jax.losses.loss_sum import LossSum, check_gamma, check_segmentation
from dilaff_jax.numerics import TINY

Blocks: TypeAlias = Literal["rows", "planes"]

# Rows of labels for which logits exist at a time: 8 images of 513 pixels and 21 classes then take
# 28 MB, which stays in a TPU's VMEM.
_ROWS = 64
# Bytes of logits that exist at a time in planes: so few blocks that their launches do not count,
# and not more than a GPU can spare.
_PLANES = 2**29


def upsampled_loss(
    loss: Callable[..., LossSum],
    logits: Float[Array, " B h w C"],
    labels: Integer[Array, " B H W"],
    blocks: Blocks = "rows",
    **options: Any,
) -> LossSum:
    """A loss of logits upsampled to the size of the labels, which never exist as a whole.

    loss(resize.bilinear(logits, labels.shape[1:]), labels), summed over blocks of rows whose logits
    are made again in the backward pass: at 513², stride 8 and 21 classes they would be 22 MB an
    image, written once and read four times.

    Two ways to the same numbers. "rows": blocks of at most 64 rows, channels last, which stay in a
    TPU's VMEM. "planes": a plane a class, in blocks of at most 512 MB, mostly one: a GPU has no
    such memory, pays for every launch, and would turn the channels around between products and
    sums.

    Args:
        loss: `cross_entropy` or `focal`: one that weighs every pixel by itself. Mining, which
            compares the pixels of an image, needs them all at once.
        logits: `[B, h, w, C]`.
        labels: integers `[B, H, W]`; `options` may name another `ignore_label`.
        blocks: "rows" or "planes".
        options: of the loss.

    Raises:
        UserError: as the loss.
    """
    height, width = labels.shape[1:]
    most = _ROWS
    if blocks == "planes":
        if logits.shape[1:3] == (height, width):
            return loss(logits.astype(jnp.float32), labels, **options)
        most = max(1, _PLANES // (4 * logits.shape[0] * logits.shape[3] * width))
    elif height <= _ROWS:
        return loss(resize.bilinear(logits, (height, width)), labels, **options)
    count = -(-height // most)
    rows = -(-height // count)
    missing = count * rows - height
    # Each block: the few rows of logits that it reads, their weights, its labels; at the end,
    # ignored rows.
    matrix = np.pad(resize.matrix(logits.shape[1], height), ((0, missing), (0, 0)), mode="edge")
    starts, weights = _bands(matrix.reshape(count, rows, -1))
    few = jnp.stack([logits[:, i : i + weights.shape[-1]] for i in starts])
    ignored = options.get("ignore_label", IGNORE_LABEL)
    padded = jnp.pad(labels, ((0, 0), (0, missing), (0, 0)), constant_values=ignored)
    parts = jnp.moveaxis(padded.reshape(-1, count, rows, width), 1, 0)
    across = resize.matrix(logits.shape[2], width)

    def block(few: jax.Array, weights: jax.Array, labels: jax.Array) -> LossSum:
        if blocks == "planes":
            few = jnp.moveaxis(few.astype(jnp.float32), -1, 1)
            tall = jnp.einsum("rh,bchw->bcrw", weights, few, precision="highest")
            full = jnp.einsum("kw,bcrw->bcrk", across, tall, precision="highest")
            return loss(jnp.moveaxis(full, 1, -1), labels, **options)
        tall = jnp.einsum("rh,bhwc->brwc", weights, few, precision="highest")
        full = jnp.einsum("kw,brwc->brkc", across, tall, precision="highest")
        return loss(full, labels, **options)

    if count == 1:
        return block(few[0], weights[0], labels)
    block = jax.checkpoint(block)

    def visit(total: LossSum, xs: tuple[jax.Array, ...]) -> tuple[LossSum, None]:
        return total + block(*xs), None

    nothing = LossSum(jnp.zeros(()), jnp.zeros(()))
    return jax.lax.scan(visit, nothing, (few, jnp.asarray(weights), parts))[0]


def _bands(matrices: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Cuts the columns that are not zero out of `[N, R, n]`: where they begin, and `[N, R, m]`."""
    used = [np.flatnonzero(m.any(axis=0)) for m in matrices]
    width = max(int(u[-1] - u[0]) + 1 for u in used)
    starts = [min(int(u[0]), matrices.shape[-1] - width) for u in used]
    cut = [m[:, i : i + width] for m, i in zip(matrices, starts, strict=True)]
    return starts, np.stack(cut)


def cross_entropy(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Integer[ArrayLike, " B *spatial"],
    *,
    class_weights: Real[ArrayLike, " C"] | None = None,
    label_smoothing: float = 0.0,
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """Softmax cross-entropy: Σ_i w[y_i]·(-log p_i[y_i]) and Σ_i w[y_i], over labelled pixels.

    With smoothing ε the term is (1-ε)·w[y]·(-log p[y]) + ε/C·Σ_c w[c]·(-log p[c]). Equal to torch's
    `cross_entropy(weight=, ignore_index=, label_smoothing=)` with `reduction='mean'`.

    Args:
        logits: `[B, *spatial, C]`.
        labels: integers `[B, *spatial]`, classes 0..C-1 or `ignore_label`.
        class_weights: w, `[C]`, ≥ 0; all one when None.
        label_smoothing: ε in [0, 1).
        ignore_label: the label of pixels that do not count.

    Returns:
        LossSum of shape `[]`.

    Raises:
        UserError: shapes that do not match, NaN, or labels that are neither class nor ignored.
    """
    logits, labels, valid = check_segmentation(logits, labels, ignore_label)
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing is {label_smoothing}; expected a value in [0, 1)")
    weights = _class_weights(class_weights, logits.shape[-1])
    weight = jnp.where(valid, weights[labels], 0)
    loss = (1 - label_smoothing) * weight * _nll(logits, labels)
    if label_smoothing:
        uniform = jnp.sum(-jax.nn.log_softmax(logits) * weights, axis=-1)
        loss = loss + label_smoothing / logits.shape[-1] * jnp.where(valid, uniform, 0)
    return LossSum(jnp.sum(loss), jnp.sum(weight))


def focal(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Integer[ArrayLike, " B *spatial"],
    *,
    gamma: float = 2.0,
    class_weights: Real[ArrayLike, " C"] | None = None,
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """Softmax focal loss: Σ_i -α[y_i]·(1 - p_i[y_i])^γ·log p_i[y_i], and the number of pixels.

    The α-balanced form of Lin et al. 2017 (https://arxiv.org/abs/1708.02002) on the softmax instead
    of C sigmoids, as is usual where classes exclude each other. γ = 0 without weights is the
    cross-entropy. The divisor is the number of labelled pixels, not the sum of weights.

    Args:
        logits: `[B, *spatial, C]`.
        labels: integers `[B, *spatial]`, classes 0..C-1 or `ignore_label`.
        gamma: γ ≥ 0.
        class_weights: α, `[C]`, ≥ 0; all one when None.
        ignore_label: the label of pixels that do not count.

    Returns:
        LossSum of shape `[]`.

    Raises:
        UserError: as `cross_entropy`.
    """
    logits, labels, valid = check_segmentation(logits, labels, ignore_label)
    check_gamma(gamma)
    weights = _class_weights(class_weights, logits.shape[-1])
    nll = _nll(logits, labels)
    # -expm1(-nll) = 1 - p without cancellation; max keeps the power's gradient finite at p = 1.
    wrong = jnp.maximum(-jnp.expm1(-nll), TINY)
    loss = jnp.where(valid, weights[labels], 0) * wrong**gamma * nll
    return LossSum(jnp.sum(loss), jnp.sum(valid, dtype=jnp.float32))


def ohem(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Integer[ArrayLike, " B *spatial"],
    *,
    threshold: float = 0.7,
    min_kept: float = 0.2,
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """Online hard example mining: cross-entropy of the pixels with p_i[y_i] < threshold.

    In each image at least the hardest `min_kept` of the labelled pixels count; pixels that tie at
    the limit share the places that are left. The rule of HRNet's and mmsegmentation's OHEM, which
    follow Shrivastava et al. 2016 (https://arxiv.org/abs/1604.03540). They give `min_kept` as a
    number of pixels, 100,000 of a 512×1024 crop (19 %), and select across a device's whole batch;
    a share within each image does not change with the crop or the number of devices.

    Args:
        logits: `[B, *spatial, C]`.
        labels: integers `[B, *spatial]`, classes 0..C-1 or `ignore_label`.
        threshold: in (0, 1].
        min_kept: share of an image's labelled pixels, in (0, 1].
        ignore_label: the label of pixels that do not count.

    Returns:
        LossSum of shape `[]`: the selected pixels' losses and their number.

    Raises:
        UserError: as `cross_entropy`; an option out of its range.
    """
    for name, value in (("threshold", threshold), ("min_kept", min_kept)):
        if not 0 < value <= 1:
            raise UserError(
                f"{name} is {value}; expected a value in (0, 1] (min_kept is a share of an image's "
                "labelled pixels: 100,000 of 512 by 1024 is 0.19)"
            )
    nll, valid = _pixel_losses(logits, labels, ignore_label)
    hard = valid & (nll > -np.log(threshold))
    least = jnp.round(min_kept * mining.count_along(valid, (1,)))
    selected = mining.hardest(nll, valid, jnp.maximum(mining.count_along(hard, (1,)), least), (1,))
    return LossSum(jnp.sum(selected * nll), jnp.sum(selected))


def loss_max_pooling(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Integer[ArrayLike, " B *spatial"],
    *,
    p: float = 1.7,
    ratio: float = 0.3,
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """Loss max-pooling of the cross-entropy: per image, max_w Σ_i w_i·ℓ_i over weightings w.

    These are `{w ≥ 0, ‖w‖_p ≤ n^(-1/q), ‖w‖_∞ ≤ τ}` with 1/p + 1/q = 1, n labelled pixels and
    τ = n^(-1/q)·m^(-1/p), so that at least m = ratio·n pixels carry weight. The maximum is at
    w_i = τ·min(1, (ℓ_i/α)^(q-1)), α such that the p-norm is reached; the gradient takes w as
    constant. p → ∞ gives the mean, p → 1 the mean of the m largest. The sum is n·Σ w·ℓ and the
    count n: images weigh by their labelled pixels. Rota Bulò, Neuhold and Kontschieder 2017
    (https://arxiv.org/abs/1704.02966); defaults of bes-dev/mpl.pytorch.

    Args:
        logits: `[B, *spatial, C]`.
        labels: integers `[B, *spatial]`, classes 0..C-1 or `ignore_label`.
        p: > 1.
        ratio: m/n in (0, 1]; at 1 the weighting is uniform.
        ignore_label: the label of pixels that do not count.

    Returns:
        LossSum of shape `[]`.

    Raises:
        UserError: as `cross_entropy`; an option out of its range.
    """
    nll, valid = _pixel_losses(logits, labels, ignore_label)
    weights = mining.pooling_weights(nll, valid, p, ratio, (1,))
    return LossSum(jnp.sum(weights * nll), jnp.sum(valid, dtype=jnp.float32))


def _pixel_losses(
    logits: ArrayLike, labels: ArrayLike, ignore_label: int
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and mask of the pixels, each `[B, N]`."""
    logits, labels, valid = check_segmentation(logits, labels, ignore_label)
    rows = labels.shape[0], int(np.prod(labels.shape[1:]))
    return _nll(logits, labels).reshape(rows), valid.reshape(rows)


def _nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label]. Compare and sum fuse; a gather's gradient is a scatter."""
    chosen = jnp.arange(logits.shape[-1]) == labels[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0), axis=-1)


def _class_weights(weights: ArrayLike | None, num_classes: int) -> jax.Array:
    if weights is None:
        return jnp.ones(num_classes, jnp.float32)
    weights = jnp.asarray(weights, jnp.float32)
    if weights.shape != (num_classes,):
        raise UserError(f"class_weights have shape {weights.shape}; expected ({num_classes},)")
    return weights
