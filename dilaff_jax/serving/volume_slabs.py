"""Volumes whose affinity maps do not fit into memory: windows, and propagation slab by slab.

The windows, their weights and the sums are those of `models.test_time`, and a slab is propagated
with as many slices around it as the operator reaches, so that the result is that of the whole
volume at once. What is held at a time are the maps of a window's depth, twice the reach and a
slab, over the whole cross-section: memory does not grow with the depth.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dilaff_jax import gate, propagate, resize
from dilaff_jax.models import test_time
from dilaff_jax.serving.network import Network, Windows
from dilaff_jax.serving.reach import reach

# Bytes of a volume's affinities, float32, from which on it goes by slabs.
LARGE = 2 * 2**30


class Slab(NamedTuple):
    """Slices [start, stop) along the first axis: classes, and without refinement; probabilities."""

    start: int
    stop: int
    labels: np.ndarray
    plain: np.ndarray
    probs: np.ndarray


class _Maps(NamedTuple):
    """Logits `[n, H, W, C]` and affinity logits `[n, H, W, K]` of consecutive slices."""

    logits: np.ndarray
    edges: np.ndarray

    def rows(self, start: int, stop: int) -> "_Maps":
        return _Maps(self.logits[start:stop], self.edges[start:stop])


def are_needed(network: Network, size: Sequence[int]) -> bool:
    """Whether a volume's affinities take more than LARGE bytes, and windows are given."""
    if network.windows is None or network.offsets is None:
        return False
    if all(n <= w for n, w in zip(size, network.windows.size, strict=True)):
        return False
    return 4 * int(np.prod(size)) * len(network.offsets) > LARGE


def predict(
    network: Network, pixels: np.ndarray, *, refine: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and unrefined labels, uint8 `[D, H, W]`, and probabilities, float32 `[D, H, W, C]`.

    Args:
        network: with windows, and affinities on a grid of the volume's size.
        pixels: `[D, H, W, C]`, as the network takes them.
        refine: propagate along the affinities.

    Raises:
        UserError: an operator of the user's, of which nobody knows how far it reaches.
    """
    size = pixels.shape[:-1]
    labels, plain = np.empty(size, np.uint8), np.empty(size, np.uint8)
    probs = np.empty((*size, len(network.classes.names)), np.float32)
    for slab in slabs(network, pixels, network.refine if refine else {"name": "identity"}):
        own = slice(slab.start, slab.stop)
        labels[own], plain[own], probs[own] = slab.labels, slab.plain, slab.probs
    return labels, plain, probs


def slabs(network: Network, pixels: np.ndarray, refine: Mapping[str, Any]) -> Iterator[Slab]:
    """The slabs of a volume, in their order; `refine` as for `propagate.operator`."""
    assert network.windows is not None
    assert network.offsets is not None
    halo = reach(refine, network.offsets)
    held, first, done, depth = None, 0, 0, len(pixels)
    for maps in _averaged(network.windows, network.variables, pixels):
        held = maps if held is None else _Maps(*map(np.concatenate, zip(held, maps, strict=True)))
        end = first + len(held.logits)
        stop = depth if end == depth else end - halo
        if stop <= done:
            continue
        part = held.rows(max(0, done - halo) - first, min(stop + halo, end) - first)
        results = _finished(*part, _frozen(network.offsets), _frozen_options(refine))
        around = min(done, halo)
        own = slice(around, around + stop - done)
        yield Slab(done, stop, *(np.asarray(x)[own] for x in results))
        done = stop
        kept = max(0, done - halo)
        held, first = held.rows(kept - first, end - first), kept


def _averaged(windows: Windows, variables: Any, pixels: np.ndarray) -> Iterator[_Maps]:
    """The weighted means over all windows, as soon as no window to come changes them."""
    size = pixels.shape[:-1]
    window = tuple(min(w, n) for w, n in zip(windows.size, size, strict=True))
    tops = [
        test_time.window_starts(n, w, windows.stride, 1) for n, w in zip(size, window, strict=True)
    ]
    weights = test_time.gaussian(window)
    sums: list[np.ndarray] | None = None
    total = len(tops[0]) * len(tops[1]) * len(tops[2])
    with tqdm(total=total, desc="windows", leave=False, disable=total < 8) as bar:
        for top, following in zip(tops[0], [*tops[0][1:], size[0]], strict=True):
            for y, x in itertools.product(*tops[1:]):
                corner = np.s_[y : y + window[1], x : x + window[2]]
                own = pixels[top : top + window[0]][:, *corner]
                parts = [
                    *map(np.asarray, _of_window(windows.apply, variables, own[None], weights)),
                    weights,
                ]
                if sums is None:
                    shape = (window[0], *size[1:])
                    sums = [np.zeros((*shape, p.shape[-1]), np.float32) for p in parts]
                for canvas, part in zip(sums, parts, strict=True):
                    canvas[:, *corner] += part
                bar.update()
            assert sums is not None
            count = following - top
            logits, edges, weight = (s[:count] for s in sums)
            yield _Maps(logits / weight, edges / weight)
            sums = [np.concatenate([s[count:], np.zeros_like(s[:count])]) for s in sums]


@functools.partial(jax.jit, static_argnums=0)
def _of_window(
    apply: Callable[..., Any], variables: Any, part: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits, edges = apply(variables, part)
    return weights * resize.bilinear(logits, part.shape[1:-1])[0], weights * edges[0]


@functools.partial(jax.jit, static_argnames=("offsets", "refine"))
def _finished(
    logits: jax.Array,
    edges: jax.Array,
    offsets: tuple[tuple[int, ...], ...],
    refine: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Labels, unrefined labels, probabilities of slices, of which the outer ones are not right."""
    operator = propagate.operator(**dict(refine))
    change = propagate.correction(
        logits[None], edges[None], np.array(offsets), operator, finite=True
    )[0]
    scores = gate.corrected(logits, change, gate.limits(operator))
    labels, plain = (jnp.argmax(x, axis=-1).astype(jnp.uint8) for x in (scores, logits))
    return labels, plain, jax.nn.softmax(scores)


def _frozen(offsets: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, offsets.tolist()))


def _frozen_options(refine: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(np.asarray(v).tolist()) if np.ndim(v) else v) for k, v in refine.items())
