"""Candidates: the grid of operators with their options, and how they are run over outputs."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax import affinity, metrics, propagate, resize
from dilaff_jax.ablation import network_outputs
from dilaff_jax.ablation.network_outputs import Batch, Outputs
from dilaff_jax.errors import UserError

FITTED = "fitted"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One operator with its options; a fitted `bias` is resolved by each run for itself."""

    operator: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Under which its figures are kept."""
        return f"{self.operator} {json.dumps(dict(self.options))}"

    def __str__(self) -> str:
        said = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.options)
        return " ".join([self.operator, *said])


IDENTITY = Candidate("identity")


def grid(config: Mapping[str, Any]) -> list[Candidate]:
    """Identity, then every combination of the values of each entry of a grid.

    Args:
        config: {label: {option: values}}, "name" for an operator other than the label.

    Raises:
        UserError: an option without values, or a bias that cannot be.
    """
    candidates = [IDENTITY]
    for label, entry in config.items():
        entry = dict(entry)
        operator = entry.pop("name", label)
        for option, values in entry.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise UserError(
                    f"ablate grid {label}.{option} is {values!r}; expected a tuple of values"
                )
        for bias in entry.get("bias", ()):
            resolved(bias, np.zeros(1))
        for values in itertools.product(*entry.values()):
            candidates.append(Candidate(operator, tuple(zip(entry, values, strict=True))))
    return list(dict.fromkeys(candidates))


def refined_labels(
    outputs: Outputs,
    candidates: Sequence[Candidate],
    bias: np.ndarray,
    rows: int,
    indices: np.ndarray | None = None,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Runs candidates that differ only in numbers: yields batches and labels `[P, n, *size]`.

    Args:
        outputs: of a run with an affinity head.
        candidates: with the same `program_key`.
        bias: the fitted one, one a dilation `[D]`.
        rows: images at a time.
        indices: of the images; None for all.
    """
    assert outputs.affinity_logits is not None
    first = candidates[0]
    static = tuple((k, v) for k, v in first.options if _is_static(k, v))
    names = [k for k, v in first.options if not _is_static(k, v) and k != "bias"]
    options = {k: jnp.array([dict(c.options)[k] for c in candidates], jnp.float32) for k in names}
    biases = jnp.stack([_bias(c, bias, outputs.offsets) for c in candidates])
    offsets = tuple(map(tuple, np.asarray(outputs.offsets).tolist()))
    for batch in outputs.batches(rows, indices):
        labels = _refine(
            batch.logits,
            batch.affinity_logits,
            options,
            biases,
            first.operator,
            static,
            offsets,
            outputs.size,
        )
        yield batch, np.asarray(labels)[:, : len(batch.indices)]


def program_key(candidate: Candidate) -> tuple[Any, ...]:
    """Candidates with one key are one compiled program."""
    return candidate.operator, *(
        (k, v) if _is_static(k, v) else k for k, v in candidate.options if k != "bias"
    )


def groups(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates by program."""
    by_key: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in candidates:
        by_key.setdefault(program_key(candidate), []).append(candidate)
    return list(by_key.values())


def operator(candidate: Candidate, bias: np.ndarray) -> propagate.Operator:
    """The operator itself, with the fitted bias where it says so."""
    options = dict(candidate.options)
    if "bias" in options:
        options["bias"] = resolved(options["bias"], bias)
    return propagate.operator(candidate.operator, **options)


def edge_histograms(outputs: Outputs, rows: int) -> dict[str, np.ndarray]:
    """Histograms of edge logits `[D, 2, BINS]`: of the head, and of the segmentation by itself.

    What the segmentation by itself says of an edge is Σ_c p_i[c]·p_j[c], the probability that both
    ends are of one class if they are independent; on the head's grid.
    """
    assert outputs.affinity_logits is not None
    offsets = tuple(map(tuple, np.asarray(outputs.offsets).tolist()))
    total: dict[str, np.ndarray] = {}
    for batch in outputs.batches(rows):
        labels = network_outputs.padded_labels(outputs, batch.indices, rows)
        counts = jax.device_get(_edge_counts(batch.logits, batch.affinity_logits, labels, offsets))
        total = metrics.add(total, counts) if total else metrics.add(counts)
    return total


@functools.partial(jax.jit, static_argnames=("operator", "static", "offsets", "size"))
def _refine(
    logits: jax.Array,
    affinity_logits: jax.Array,
    options: dict[str, jax.Array],
    biases: jax.Array,
    operator: str,
    static: tuple[tuple[str, Any], ...],
    offsets: tuple[tuple[int, ...], ...],
    size: tuple[int, ...],
) -> jax.Array:
    """Labels of P settings of one operator, uint8 `[P, B, *size]`."""
    affinity_logits = affinity_logits.astype(jnp.float32)

    def one(setting: tuple[dict[str, jax.Array], jax.Array]) -> jax.Array:
        numbers, bias = setting
        refine = propagate.operator(operator, bias=bias, **dict(static), **numbers)
        rows = np.array(offsets)
        labels, _ = propagate.refine_logits(
            logits, affinity_logits, rows, size, refine, finite=True
        )
        return labels.astype(jnp.uint8)

    return jax.lax.map(one, (options, biases))


@functools.partial(jax.jit, static_argnames=("offsets",))
def _edge_counts(
    logits: jax.Array,
    affinity_logits: jax.Array,
    labels: jax.Array,
    offsets: tuple[tuple[int, ...], ...],
) -> dict[str, jax.Array]:
    rows, grid = np.array(offsets), affinity_logits.shape[1:-1]
    target, valid = affinity.targets(affinity.downsample_labels(labels, grid), rows)
    probs = jax.nn.softmax(resize.bilinear(logits, grid))
    same = [jnp.sum(probs * affinity.shift(probs, o), axis=-1) for o in offsets]
    agree = jnp.clip(jnp.stack(same, axis=-1), 1e-7, 1 - 1e-7)
    number = len(affinity.distinct_dilations(rows))
    return {
        "head": metrics.affinity_histogram(
            affinity_logits.astype(jnp.float32), target, valid, number
        ),
        "segmentation": metrics.affinity_histogram(
            jnp.log(agree) - jnp.log1p(-agree), target, valid, number
        ),
    }


def _bias(candidate: Candidate, fitted: np.ndarray, offsets: np.ndarray | None) -> jax.Array:
    """`[K]`."""
    assert offsets is not None
    bias = dict(candidate.options).get("bias", 0.0)
    return propagate.per_offset(resolved(bias, fitted), offsets)


def resolved(bias: Any, fitted: np.ndarray) -> Any:
    """What a candidate's bias is in numbers: "fitted*0.5" is half of the fitted one.

    Raises:
        UserError: a text that is not "fitted" or "fitted*NUMBER".
    """
    if not isinstance(bias, str):
        return bias
    match = re.fullmatch(FITTED + r"(?:\*([\d.]+))?", bias)
    if match is None:
        raise UserError(
            f"ablate grid has the bias {bias!r}; expected a number, {FITTED!r} or '{FITTED}*0.5'"
        )
    share = float(match[1] or 1)
    return np.asarray(share * fitted, np.float32)


def _is_static(option: str, value: Any) -> bool:
    """Numbers of steps, names and switches shape the program; other numbers go through it."""
    return option != "bias" and not isinstance(value, float)
