"""Losses of the affinity head: logits, target and valid, each `[B, *spatial, K]`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Bool, Real, Shaped

from dilaff_jax.errors import UserError
from dilaff_jax.losses import mining
from dilaff_jax.losses.loss_sum import LossSum, check_affinity, check_edge_weights, check_gamma


def affinity_balanced(
    logits: Real[ArrayLike, " B *spatial K"],
    target: Shaped[ArrayLike, " B *spatial K"],
    valid: Bool[ArrayLike, " B *spatial K"],
    num_dilations: int,
    *,
    weights: Real[ArrayLike, " B *spatial K"] | None = None,
) -> LossSum:
    """Class-balanced binary cross-entropy per dilation.

    `finish` gives mean_d ½·Σ V·A·(-log a) / ΣV·A + ½·Σ V·(1-A)·(-log(1-a)) / ΣV·(1-A), a = σ(ℓ);
    with weights W, every sum is of W·V instead of V.
    A soft target counts as A of an edge within a class and 1-A of a class edge. Our choice, after
    the balanced loss of AffinityNet (Ahn and Kwak 2018, https://arxiv.org/abs/1803.10464). It
    shifts the logits; `metrics.fit_bias` measures by how much.

    Args:
        logits: ℓ, `[B, *spatial, K]`, channels dilation-major.
        target: A, `[B, *spatial, K]`, bool or in [0, 1], from `affinity.targets`.
        valid: V, bool `[B, *spatial, K]`.
        num_dilations: D; K = D·(channels a dilation).
        weights: W ≥ 0, `[B, *spatial, K]`, from `affinity.pair_weights`; None for 1.

    Returns:
        LossSum of shape `[D, 2]`: edges within a class, class edges.

    Raises:
        UserError: shapes that do not match, K not a multiple of D, NaN, targets or weights out of
            range.
    """
    logits, target, valid = check_affinity(logits, target, valid, num_dilations)
    weights = check_edge_weights(weights, valid)
    same, other = weights * target, weights * (1 - target)
    sums = (same * jax.nn.softplus(-logits), other * jax.nn.softplus(logits))
    return LossSum(
        jnp.stack([_per_dilation(x, num_dilations) for x in sums], axis=-1),
        jnp.stack([_per_dilation(x, num_dilations) for x in (same, other)], axis=-1),
    )


def affinity_bce(
    logits: Real[ArrayLike, " B *spatial K"],
    target: Shaped[ArrayLike, " B *spatial K"],
    valid: Bool[ArrayLike, " B *spatial K"],
    num_dilations: int,
    *,
    weights: Real[ArrayLike, " B *spatial K"] | None = None,
) -> LossSum:
    """Plain binary cross-entropy over all valid edges; LossSum of shape `[]`.

    Arguments and errors as `affinity_balanced`; soft targets allowed.
    """
    logits, target, valid = check_affinity(logits, target, valid, num_dilations)
    weights = check_edge_weights(weights, valid)
    loss = weights * optax.sigmoid_binary_cross_entropy(logits, target)
    return LossSum(jnp.sum(loss), jnp.sum(weights))


def affinity_focal(
    logits: Real[ArrayLike, " B *spatial K"],
    target: Shaped[ArrayLike, " B *spatial K"],
    valid: Bool[ArrayLike, " B *spatial K"],
    num_dilations: int,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weights: Real[ArrayLike, " B *spatial K"] | None = None,
) -> LossSum:
    """Sigmoid focal loss over all valid edges; LossSum of shape `[]`: the sum, the edges' weight.

    -α_A·(1 - a_A)^γ·log a_A, with a_A = a and α_A = α for edges within a class, 1 - a and 1 - α for
    class edges: the default weighs the rare class edges 3:1. Lin et al. 2017
    (https://arxiv.org/abs/1708.02002), `torchvision.ops.sigmoid_focal_loss`. Arguments and errors
    as `affinity_balanced`; `gamma` ≥ 0, `alpha` in [0, 1].
    """
    logits, target, valid = check_affinity(logits, target, valid, num_dilations)
    check_gamma(gamma)
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}; expected a value in [0, 1]")
    loss = optax.sigmoid_focal_loss(logits, target, alpha=alpha, gamma=gamma)
    weights = check_edge_weights(weights, valid)
    return LossSum(jnp.sum(weights * loss), jnp.sum(weights))


def affinity_ohem(
    logits: Real[ArrayLike, " B *spatial K"],
    target: Shaped[ArrayLike, " B *spatial K"],
    valid: Bool[ArrayLike, " B *spatial K"],
    num_dilations: int,
    *,
    ratio: float = 3.0,
) -> LossSum:
    """Binary cross-entropy of all class edges and the hardest `ratio` times as many other edges.

    Selected within each image and dilation, as SSD does with its rare class (Liu et al. 2016,
    https://arxiv.org/abs/1512.02325): an image without class edges contributes nothing. Edges that
    tie at the limit share the places that are left. A target below ½ is a class edge. Arguments and
    errors as `affinity_balanced`; `ratio` > 0.

    Returns:
        LossSum of shape `[D]`: the selected edges' losses and their number.
    """
    logits, target, valid = check_affinity(logits, target, valid, num_dilations)
    if not ratio > 0:
        raise UserError(f"ratio is {ratio}; expected a positive number")
    loss, valid, class_edge = (
        _by_image(x, num_dilations)
        for x in (optax.sigmoid_binary_cross_entropy(logits, target), valid, target < 0.5)
    )
    negative, positive = valid & class_edge, valid & ~class_edge
    wanted = jnp.floor(ratio * mining.count_along(negative, (1, 3)))
    selected = negative + mining.hardest(loss, positive, wanted, (1, 3))
    return LossSum(jnp.sum(selected * loss, axis=(0, 1, 3)), jnp.sum(selected, axis=(0, 1, 3)))


def affinity_max_pooling(
    logits: Real[ArrayLike, " B *spatial K"],
    target: Shaped[ArrayLike, " B *spatial K"],
    valid: Bool[ArrayLike, " B *spatial K"],
    num_dilations: int,
    *,
    p: float = 1.7,
    ratio: float = 0.3,
) -> LossSum:
    """Loss max-pooling of the binary cross-entropy within each image and dilation; LossSum `[D]`.

    Arguments and errors as `affinity_balanced`; `p`, `ratio` and source as `loss_max_pooling`.
    """
    logits, target, valid = check_affinity(logits, target, valid, num_dilations)
    loss = _by_image(optax.sigmoid_binary_cross_entropy(logits, target), num_dilations)
    valid = _by_image(valid, num_dilations)
    weights = mining.pooling_weights(loss, valid, p, ratio, (1, 3))
    return LossSum(jnp.sum(weights * loss, axis=(0, 1, 3)), jnp.sum(valid, (0, 1, 3), jnp.float32))


def _per_dilation(x: jax.Array, num_dilations: int) -> jax.Array:
    """Sums `[B, *spatial, K]` to `[D]`."""
    return x.sum(axis=tuple(range(x.ndim - 1))).reshape(num_dilations, -1).sum(axis=-1)


def _by_image(x: jax.Array, num_dilations: int) -> jax.Array:
    """`[B, *spatial, K]` to `[B, pixels, D, channels a dilation]`."""
    pixels = int(np.prod(x.shape[1:-1]))
    return x.reshape(x.shape[0], pixels, num_dilations, x.shape[-1] // num_dilations)
