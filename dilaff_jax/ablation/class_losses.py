"""What propagation does to each class, and the gate by which none of them loses.

The gate (`gate.Gated`) has one number a class, so each class's pixels can be left alone, wholly or
where the network is sure of them. Which numbers do follows from counts of the pixels that
propagation changes: by the class that they were of, how sure it was, and what became of them.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from dilaff_jax import metrics
from dilaff_jax.ablation import network_outputs, operators
from dilaff_jax.ablation.network_outputs import Outputs
from dilaff_jax.ablation.operators import IDENTITY, Candidate
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.runtime import parallel

# What a gate's numbers may be: 0 leaves a class alone, 1 changes whatever propagation would.
CONFIDENCES = np.array([0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1], np.float32)
# A loss of one class beyond the limit is worse than holding all changes, and the worse the larger:
# of 0.001 points of IoU twice as bad.
_PENALTY = 1e5


@dataclasses.dataclass(frozen=True)
class Sides:
    """Pixels of each class, `[..., C]`: that are right, of it, predicted to be."""

    right: np.ndarray
    true: np.ndarray
    predicted: np.ndarray

    @property
    def ious(self) -> np.ndarray:
        """`[..., C]`; NaN for a class that is absent."""
        return metrics.ious(self.right, self.true, self.predicted)


@dataclasses.dataclass(frozen=True)
class Changed:
    """Labelled pixels that propagation changes, L = len(CONFIDENCES).

    Attributes:
        pixels: `[C, L, C]`, from class a, of a confidence up to CONFIDENCES[l] and above the one
            before, to class b.
        were_right: `[C, L, C]`, those of them that are of class a.
        are_right: `[C, L, C]`, those that are of class b.
    """

    pixels: np.ndarray
    were_right: np.ndarray
    are_right: np.ndarray

    def effects(self) -> tuple[np.ndarray, np.ndarray]:
        """What changing the pixels of class a up to level l adds to right and predicted.

        `[C, L, C]` each: of a, l, to each class.
        """
        classes = range(len(self.pixels))
        up_to = [np.cumsum(x, axis=1) for x in (self.pixels, self.were_right, self.are_right)]
        right, predicted = up_to[2].copy(), up_to[0].copy()
        for a in classes:
            right[a, :, a] -= up_to[1][a].sum(axis=-1)
            predicted[a, :, a] -= up_to[0][a].sum(axis=-1)
        return right, predicted


@dataclasses.dataclass(frozen=True)
class Compared:
    """An operator against doing nothing: counts of both results, and of what changes."""

    plain: Sides
    refined: Sides
    changed: Changed


def compare(outputs: Outputs, candidate: Candidate, bias: np.ndarray, rows: int) -> Compared:
    """Counts an operator over a split and all processes.

    Args:
        outputs: of a run with an affinity head.
        candidate: the operator.
        bias: the fitted one, one a dilation.
        rows: images at a time.
    """
    classes, levels = outputs.source.num_classes, len(CONFIDENCES)
    confusions = np.zeros((2, classes, classes), np.int64)
    changed = np.zeros((3, classes, levels, classes), np.int64)
    for truth, before, after, sure in _maps(outputs, candidate, bias, rows):
        labelled = truth != IGNORE_LABEL
        for confusion, found in zip(confusions, (before, after), strict=True):
            confusion += metrics.host_confusion(found, truth, classes, labelled)
        moved = labelled & (before != after)
        a, b, t = before[moved].astype(np.int64), after[moved], truth[moved]
        cell = (a * levels + np.searchsorted(CONFIDENCES, sure[moved])) * classes + b
        for counted, which in zip(changed, (slice(None), t == a, t == b), strict=True):
            counted += np.bincount(cell[which], minlength=counted.size).reshape(counted.shape)
    confusions, changed = parallel.sum_over_processes((confusions, changed))
    plain, refined = (Sides(np.diag(c), c.sum(axis=1), c.sum(axis=0)) for c in confusions)
    return Compared(plain, refined, Changed(*changed))


def best_gate(plain: Sides, changed: Changed, limit: float) -> np.ndarray:
    """The numbers `[C]` of `CONFIDENCES` that hold back the fewest changes so that none loses more.

    The operator was chosen for what it does on the whole, so no more of it is taken away than a
    class needs. Two classes at a time, from nothing changed and from everything, until no other
    numbers of two are better; the better of both ends.

    Args:
        plain: of the network's own result.
        changed: by propagation.
        limit: by how much a class's IoU may fall.
    """
    right, predicted = changed.effects()
    done = np.cumsum(changed.pixels.sum(axis=-1), axis=1)
    held = (done[:, -1:] - done) / max(done[:, -1].sum(), 1)
    before, last = plain.ious, len(CONFIDENCES) - 1
    effects = np.stack([right, predicted], axis=2)  # [C, L, 2, C]

    def score(sums: np.ndarray, held: np.ndarray) -> np.ndarray:
        ious = Sides(sums[..., 0, :], plain.true, sums[..., 1, :]).ious
        # One that is absent has no IoU to lose.
        lost = np.nan_to_num(before - ious - limit, nan=0.0)
        beyond = np.maximum(lost, 0).sum(axis=-1)
        return -held - (beyond > 0) - _PENALTY * beyond

    ends = []
    for start in (0, last):
        level, best = np.full(len(right), start), -np.inf
        while True:
            for pair in itertools.combinations(range(len(right)), 2):
                first, second = pair
                others = np.delete(np.arange(len(right)), pair)
                rest = effects[others, level[others]].sum(axis=0)
                rest = rest + np.stack([plain.right, plain.predicted])
                # Every level of the first with every one of the second.
                sums = rest + effects[first][:, None] + effects[second][None]
                of_both = held[first][:, None] + held[second][None]
                scores = score(sums, held[others, level[others]].sum() + of_both)
                # Of equals the last, so that nothing is held for nothing.
                at = scores.size - 1 - int(np.argmax(scores.ravel()[::-1]))
                level[first], level[second] = np.unravel_index(at, scores.shape)
            reached = float(scores.ravel()[at])
            if reached <= best:
                break
            best = reached
        ends.append((best, level))
    return CONFIDENCES[max(ends, key=lambda end: end[0])[1]]


def gated(
    outputs: Outputs,
    candidate: Candidate,
    bias: np.ndarray,
    rows: int,
    limit: float,
    found: Compared,
) -> tuple[Candidate, Sides]:
    """The operator behind the best gate by which no class loses more than `limit`; its counts.

    The operator itself where none loses more; `IDENTITY` where all would have to be held. The gate
    is of pixels, as the counts are, so what they say of it is exact; with it in its place it is
    counted again.

    Args:
        outputs: as for `compare`, like the next three.
        candidate: the operator.
        bias: the fitted one.
        rows: images at a time.
        limit: by how much a class's IoU may fall.
        found: without a gate.
    """
    if _beyond(found.plain, found.refined, limit) <= 0:
        return candidate, found.refined
    keep = best_gate(found.plain, found.changed, limit)
    options = (*candidate.options, ("keep", tuple(map(float, keep))))
    held = Candidate(candidate.operator, options)
    of = compare(outputs, held, bias, rows).refined
    return (held, of) if keep.any() else (IDENTITY, found.plain)


def _beyond(plain: Sides, of: Sides, limit: float) -> float:
    """By how much the class that loses most loses more than it may."""
    return float(np.nanmax(plain.ious - of.ious)) - limit


def _maps(
    outputs: Outputs, candidate: Candidate, bias: np.ndarray, rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each image: truth, labels before and after, and how sure the network was of the first."""
    for batch, after in operators.refined_labels(outputs, [candidate], bias, rows):
        before = np.asarray(network_outputs.plain_labels(batch.logits, outputs.size))
        probs = network_outputs.probabilities(batch.logits, outputs.size)
        sure = np.asarray(probs.max(axis=-1))
        for i, index in enumerate(map(int, batch.indices)):
            plain, refined, certain = (outputs.cut(x[i], index) for x in (before, after[0], sure))
            yield outputs.source[index]["label"], plain, refined, certain
