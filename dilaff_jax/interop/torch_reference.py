"""Affinity targets, propagation and losses in plain torch: shift, multiply, add.

An independent reading of the formulas for `interop.parity`, written for plainness, not speed. Maps
are channels-first, as torch has them: probabilities `[B, C, H, W]`, affinities `[B, K, H, W]`.
Needs the extra `torch`.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch.nn import functional

Offsets = Sequence[Sequence[int]]
IGNORE = 255


def shift(x: torch.Tensor, offset: Sequence[int], fill: float = 0) -> torch.Tensor:
    """y[..., i, j] = x[..., i + dy, j + dx], `fill` where that is outside."""
    dy, dx = (int(v) for v in offset)
    height, width = x.shape[-2:]
    result = torch.full_like(x, fill)
    if abs(dy) < height and abs(dx) < width:
        result[..., max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)] = x[
            ..., max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)
        ]
    return result


def targets(labels: torch.Tensor, offsets: Offsets) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and validity, bool `[B, K, H, W]`, of labels `[B, H, W]`."""
    neighbours = torch.stack([shift(labels, o, IGNORE) for o in offsets], dim=1)
    labels = labels[:, None]
    valid = (labels != IGNORE) & (neighbours != IGNORE)
    return (labels == neighbours) & valid, valid


def random_walk(
    probs: torch.Tensor,
    affinity: torch.Tensor,
    offsets: Offsets,
    steps: int,
    sharpness: float = 1.0,
    threshold: float = 0.0,
    self_weight: float = 1.0,
    restart: float = 0.0,
) -> torch.Tensor:
    """`propagate.random_walk`."""
    inside = torch.cat([shift(torch.ones_like(probs[:, :1]), o) for o in offsets], dim=1)
    weights = affinity**sharpness * (affinity > threshold) * inside
    p = probs
    for _ in range(steps):
        total = self_weight * p
        for k, offset in enumerate(offsets):
            total = total + weights[:, k : k + 1] * shift(p, offset)
        walked = total / (self_weight + weights.sum(dim=1, keepdim=True))
        p = (1 - restart) * walked + restart * probs
    return p


def signed(
    probs: torch.Tensor,
    affinity_logits: torch.Tensor,
    offsets: Offsets,
    steps: int,
    strength: float,
    bias: float,
    repulsion: float = 1.0,
) -> torch.Tensor:
    """`propagate.signed`; neighbours outside are zeros and so have no vote."""
    votes = affinity_logits - bias
    votes = strength * torch.where(votes < 0, repulsion * votes, votes)
    q = probs
    for _ in range(steps):
        scores = torch.log(probs)
        for k, offset in enumerate(offsets):
            scores = scores + votes[:, k : k + 1] * shift(q, offset)
        q = torch.softmax(scores, dim=1)
    return q


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the pixels that are not ignored, torch's own."""
    return functional.cross_entropy(logits, labels, ignore_index=IGNORE)


def segmentation_losses(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The segmentation losses of `losses` at their defaults; logits `[B, C, H, W]`."""
    valid = labels != IGNORE
    loss = functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    prob = torch.exp(-loss)
    mined, pooled, mined_count = logits.new_zeros(()), logits.new_zeros(()), 0
    for image_loss, image_valid in zip(loss, valid, strict=True):
        values = image_loss[image_valid].sort(descending=True).values
        hard = int((values > -math.log(0.7)).sum())
        chosen = max(hard, math.ceil(0.2 * len(values)))
        mined, mined_count = mined + values[:chosen].sum(), mined_count + chosen
        pooled = pooled + max_pooled(values, 1.7, 0.3)
    return {
        "cross_entropy": cross_entropy(logits, labels),
        "focal": ((1 - prob) ** 2 * loss)[valid].mean(),
        "ohem": mined / mined_count,
        "loss_max_pooling": pooled / valid.sum(),
    }


def affinity_losses(
    logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, offsets: Offsets
) -> dict[str, torch.Tensor]:
    """The affinity losses of `losses` at their defaults; all `[B, K, H, W]`."""
    loss = functional.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    own = torch.sigmoid(torch.where(target, logits, -logits))
    alpha = torch.where(target, 0.25, 0.75)
    dilations = [max(abs(int(v)) for v in o) for o in offsets]
    terms: dict[str, list[torch.Tensor]] = {"balanced": [], "ohem": [], "max_pooling": []}
    for dilation in dict.fromkeys(dilations):
        channels = [k for k, d in enumerate(dilations) if d == dilation]
        ell, same, ok = loss[:, channels], target[:, channels], valid[:, channels]
        terms["balanced"] += [ell[ok & same].mean(), ell[ok & ~same].mean()]
        mined, pooled, count = logits.new_zeros(()), logits.new_zeros(()), 0
        for e, s, v in zip(ell, same, ok, strict=True):
            class_edges = e[v & ~s]
            rest = e[v & s].sort(descending=True).values[: 3 * len(class_edges)]
            mined, count = (
                mined + class_edges.sum() + rest.sum(),
                count + len(class_edges) + len(rest),
            )
            pooled = pooled + max_pooled(e[v], 1.7, 0.3)
        terms["ohem"].append(mined / count)
        terms["max_pooling"].append(pooled / ok.sum())
    return {f"affinity_{k}": torch.stack(v).mean() for k, v in terms.items()} | {
        "affinity_bce": loss[valid].mean(),
        "affinity_focal": (alpha * (1 - own) ** 2 * loss)[valid].mean(),
    }


def max_pooled(values: torch.Tensor, p: float, ratio: float) -> torch.Tensor:
    """n·max_w Σ w·ℓ over ‖w‖_p ≤ n^(-1/q), ‖w‖_∞ ≤ n^(-1/q)·(ratio·n)^(-1/p); α by bisection."""
    n, q = len(values), p / (p - 1)
    radius = n ** (-1 / q)
    top = radius * (ratio * n) ** (-1 / p)
    fixed = values.detach().double()

    def weights(alpha: torch.Tensor) -> torch.Tensor:
        return top * (fixed / alpha).clamp(max=1) ** (q - 1)

    low, high = fixed.new_tensor(1e-12), fixed.max() * n
    for _ in range(200):
        middle = (low + high) / 2
        too_heavy = (weights(middle) ** p).sum() > radius**p
        low, high = (middle, high) if too_heavy else (low, middle)
    # By the envelope theorem the best weights are constants to the gradient.
    return n * (weights(high).to(values.dtype) * values).sum()


def adaptive_affinity_fields(
    logits: torch.Tensor, labels: torch.Tensor, sizes: Sequence[int] = (1, 2, 3)
) -> torch.Tensor:
    """`losses.adaptive_affinity_fields` without weights, pair by pair."""
    probs = torch.softmax(logits, dim=1)
    one_hot = functional.one_hot(labels.where(labels != IGNORE, 0), probs.shape[1]).permute(
        0, 3, 1, 2
    )
    total = logits.new_zeros(())
    for size in sizes:
        edge_terms, other_terms = [], []
        for dy, dx in itertools.product((-size, 0, size), repeat=2):
            if dy == dx == 0:
                continue
            ahead, back = (shift(labels, (s * dy, s * dx), IGNORE) for s in (1, -1))
            valid = (labels != IGNORE) & (ahead != IGNORE) & (back != IGNORE)
            divergence = _bernoulli_kl(shift(probs, (dy, dx)), probs)
            edge = one_hot != shift(one_hot, (dy, dx))
            valid = valid[:, None].expand_as(edge)
            edge_terms.append((3 - divergence).clamp(min=0)[valid & edge])
            other_terms.append(divergence[valid & ~edge])
        total = total + torch.cat(edge_terms).mean() + torch.cat(other_terms).mean()
    return total


def _bernoulli_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    pairs = [(p.clamp(1e-4, 1), q.clamp(1e-4, 1)), ((1 - p).clamp(1e-4, 1), (1 - q).clamp(1e-4, 1))]
    return sum((a * (a / b).log() for a, b in pairs), torch.zeros_like(p))
