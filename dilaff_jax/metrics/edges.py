"""How well the affinity head finds class edges, dilation by dilation.

Plain accuracy hides everything, as class edges are rare: the positives of precision, recall and
average precision are the *class edges* (target 0), scored by 1 - a.

All follows from one histogram of logits. Its bins are of equal width in asinh(1000·logit): under
1 % of the logit from 0.002 to 10,000, and 0.00001 below. So ranks survive at any scale, where a
histogram of probabilities puts all edges of a confident head into its first and last bins.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from dilaff_jax.errors import UserError
from dilaff_jax.losses.loss_sum import check_affinity_shapes
from dilaff_jax.metrics.regions import POISON, check_counts, mean

BINS = 4096
_UNIT, _LARGEST = 0.001, 1e4
_SCALE = BINS / 2 / float(np.arcsinh(_LARGEST / _UNIT))


def affinity_histogram(
    logits: Real[ArrayLike, " B *spatial K"],
    target: Bool[ArrayLike, " B *spatial K"],
    valid: Bool[ArrayLike, " B *spatial K"],
    num_dilations: int,
) -> Int[Array, " D 2 bins"]:
    """Counts valid edges by dilation, target and logit: int32 `[D, 2, BINS]`.

    Row 0 of the second axis holds the class edges. Under `jit`, NaN at a valid edge makes all
    counts negative, which `add` and the figures refuse.

    Args:
        logits: `[B, *spatial, K]`, channels dilation-major; logits above 0 say "one class".
        target: bool `[B, *spatial, K]`, from `affinity.targets`.
        valid: bool `[B, *spatial, K]`; add the mask of a padded batch with `&`.
        num_dilations: D.

    Raises:
        UserError: shapes that do not match, targets that are not bool, NaN outside `jit`.
    """
    check_affinity_shapes(logits, target, valid, num_dilations)
    logits, target, valid = (
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(target),
        jnp.asarray(valid),
    )
    if target.dtype != bool:
        raise UserError(
            f"target has dtype {target.dtype}; expected bool: figures need hard targets, from "
            "affinity.targets"
        )
    broken = jnp.any(valid & jnp.isnan(logits))
    if not isinstance(broken, jax.core.Tracer) and broken:
        raise UserError("logits hold NaN at valid edges; expected numbers")
    # Floor before the offset is added, so that bins part exactly at logit 0.
    place = jnp.floor(jnp.arcsinh(jnp.clip(logits, -_LARGEST, _LARGEST) / _UNIT) * _SCALE)
    place = jnp.clip(jnp.nan_to_num(place).astype(jnp.int32) + BINS // 2, 0, BINS - 1)
    dilation = np.repeat(np.arange(num_dilations), logits.shape[-1] // num_dilations)
    size = num_dilations * 2 * BINS
    cell = jnp.where(valid, (2 * dilation + target) * BINS + place, size)
    counts = jnp.bincount(cell.ravel(), length=size + 1)[:-1]
    counts = jnp.where(broken, POISON, counts)
    return counts.reshape(num_dilations, 2, BINS).astype(jnp.int32)


def precision_recall_f1(
    histogram: Real[ArrayLike, " D 2 bins"], threshold: float = 0.0
) -> Float[np.ndarray, " D 3"]:
    """Precision, recall and F1 of class edges, float64 `[D, 3]`.

    An edge is called a class edge where its logit is below `threshold` (to the nearest bin; 0 is
    exact). NaN where nothing is called so, or where there is none.
    """
    called = int(np.argmin(np.abs(bin_limits() - threshold)))
    return _precision_recall_f1(_check_histogram(histogram))[:, called]


def best_f1(
    histogram: Real[ArrayLike, " D 2 bins"],
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """The logit threshold with the best F1 of class edges, and that F1, each float64 `[D]`.

    As any threshold, choose it on a split that is not reported. NaN without class edges.
    """
    f1 = _precision_recall_f1(_check_histogram(histogram))[..., 2]
    best = np.argmax(np.nan_to_num(f1, nan=-1.0), axis=1)
    score = f1[np.arange(len(f1)), best]
    return np.where(np.isnan(score), np.nan, bin_limits()[best]), score


def average_precision(histogram: Real[ArrayLike, " D 2 bins"]) -> Float[np.ndarray, " D"]:
    """Average precision of class edges, float64 `[D]`: Σ_n (R_n - R_(n-1))·P_n over the bins.

    scikit-learn's `average_precision_score(target == 0, -logit)`, edges of one bin counting as
    ties. NaN without class edges.
    """
    counts = _check_histogram(histogram)
    called = np.cumsum(counts, axis=-1)
    precision = called[:, 0] / np.maximum(called.sum(axis=1), 1)
    number = counts[:, 0].sum(axis=-1)
    total = np.sum(counts[:, 0] * precision, axis=-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def reliability(
    histogram: ArrayLike, *, bias: ArrayLike = 0.0, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reliability curve of a = σ(logit - bias) in `bins` equal steps of probability.

    Args:
        histogram: `[D, 2, BINS]`.
        bias: scalar or `[D]`, such as `fit_bias` finds on another split.
        bins: how many.

    Returns:
        Mean a, share of edges within a class (both NaN in empty bins) and number of edges, each
        `[D, bins]`. A logit stands for the centre of its bin.
    """
    counts = _check_histogram(histogram)
    bias = np.broadcast_to(np.asarray(bias, np.float64), len(counts))
    prob = _sigmoid(bin_centres() - bias[:, None])
    place = np.minimum((prob * bins).astype(int), bins - 1)
    number, same, mass = (
        np.array([np.bincount(p, w, bins) for p, w in zip(place, weights, strict=True)])
        for weights in (counts.sum(axis=1), counts[:, 1], counts.sum(axis=1) * prob)
    )
    safe = np.where(number > 0, number, np.nan)
    return mass / safe, same / safe, number


def expected_calibration_error(
    histogram: Real[ArrayLike, " D 2 bins"], *, bias: ArrayLike = 0.0, bins: int = 15
) -> Float[np.ndarray, " D"]:
    """Σ_m n_m/n·|mean a - share of edges within a class|, `[D]` (Guo et al. 2017, 1706.04599).

    Arguments as `reliability`. NaN without edges.
    """
    confidence, share, number = reliability(histogram, bias=bias, bins=bins)
    gap = np.nansum(number * np.abs(confidence - share), axis=1)
    return np.where(number.sum(axis=1) > 0, gap / np.maximum(number.sum(axis=1), 1), np.nan)


def fit_bias(histogram: Real[ArrayLike, " D 2 bins"]) -> Float[np.ndarray, " D"]:
    """The bias b per dilation that minimises the plain cross-entropy of σ(logit - b), `[D]`.

    Undoes the shift of class-balanced training; pass it as `bias` to `propagate.signed`. At the
    minimum the mean probability equals the share of edges within a class, which is solved by
    bisection, exact to the bins. Fit it on a split that is not reported.

    Raises:
        UserError: a dilation without both kinds of edges; its bias would be infinite.
    """
    counts = _check_histogram(histogram)
    number, same = counts.sum(axis=(1, 2)), counts[:, 1].sum(axis=-1)
    lone = np.flatnonzero((same == 0) | (same == number))
    if lone.size:
        raise UserError(
            f"dilation number {lone[0]} has {same[lone[0]]} edges within a class of "
            f"{number[lone[0]]}; a bias needs both kinds: count more images"
        )
    low, high = np.full(len(counts), -2000.0), np.full(len(counts), 2000.0)
    for _ in range(60):
        middle = (low + high) / 2
        expected = np.sum(counts.sum(axis=1) * _sigmoid(bin_centres() - middle[:, None]), axis=-1)
        low, high = np.where(expected > same, middle, low), np.where(expected > same, high, middle)
    return (low + high) / 2


def affinity_summary(
    histogram: ArrayLike, dilations: Sequence[int], *, bias: ArrayLike = 0.0
) -> dict[str, float]:
    """Turns a histogram into figures per dilation d, and their means over dilations.

    dD/class_edges: their share of all edges; dD/precision, recall, f1: of class edges at a < ½ with
    a = σ(logit - bias); dD/average_precision; dD/best_f1 and dD/best_threshold (a logit);
    dD/calibration_error. mean/average_precision, mean/f1, mean/recall. What is undefined (no class
    edge at this dilation) is left out.

    Raises:
        UserError: not one dilation a row.
    """
    counts = _check_histogram(histogram)
    if len(dilations) != len(counts):
        raise UserError(f"{len(dilations)} dilations for {len(counts)} rows of the histogram")
    bias = np.broadcast_to(np.asarray(bias, np.float64), len(counts))
    scores = [precision_recall_f1(counts, b)[d] for d, b in enumerate(bias)]
    precision, recall, f1 = np.array(scores).T
    threshold, best = best_f1(counts)
    class_edges = counts[:, 0].sum(axis=-1) / np.maximum(counts.sum(axis=(1, 2)), 1)
    columns = {
        "class_edges": class_edges,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "average_precision": average_precision(counts),
        "best_f1": best,
        "best_threshold": threshold,
        "calibration_error": expected_calibration_error(counts, bias=bias),
    }
    rows = {f"d{d}/{k}": float(v[i]) for i, d in enumerate(dilations) for k, v in columns.items()}
    means = {f"mean/{k}": float(mean(columns[k])) for k in ("average_precision", "f1", "recall")}
    return {key: value for key, value in {**rows, **means}.items() if not np.isnan(value)}


def bin_limits() -> np.ndarray:
    """The BINS + 1 logits between bins."""
    return _UNIT * np.sinh((np.arange(BINS + 1) - BINS / 2) / _SCALE)


def bin_centres() -> np.ndarray:
    """The logit that stands for each of the BINS bins."""
    return _UNIT * np.sinh((np.arange(BINS) + 0.5 - BINS / 2) / _SCALE)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _precision_recall_f1(counts: np.ndarray) -> np.ndarray:
    """At every limit, `[D, BINS + 1, 3]`."""
    below = np.cumsum(np.pad(counts, [(0, 0), (0, 0), (1, 0)]), axis=-1)
    right, called = below[:, 0], below.sum(axis=1)
    number = np.broadcast_to(right[:, -1:], right.shape)
    total = np.where(number > 0, called + number, 0)
    pairs = ((right, called), (right, number), (2 * right, total))
    return np.stack([np.divide(a, np.where(b > 0, b, np.nan)) for a, b in pairs], axis=-1)


def _check_histogram(histogram: ArrayLike) -> np.ndarray:
    counts = check_counts(histogram)
    if counts.ndim != 3 or counts.shape[1:] != (2, BINS):
        raise UserError(f"histogram has shape {counts.shape}; expected [D, 2, {BINS}]")
    return counts
