"""From images to logits and affinities: whole image, sliding window, several scales, flips."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dilaff_jax import propagate, resize, schema
from dilaff_jax.affinity import places
from dilaff_jax.errors import UserError
from dilaff_jax.schema import Key, Rule

Outputs: TypeAlias = Mapping[str, Any]
Apply: TypeAlias = Callable[[jax.Array], Outputs]
# What the pixels of a window count, `[*window, 1]`.
Weigh: TypeAlias = Callable[[Sequence[int]], np.ndarray]

# The axis that a flip turns round: of images left and right change places.
_MIRRORED = 2
# Of a window's weights, as a share of its sides; and the least of them.
_SIGMA, _LEAST = 1 / 8, 1e-3

KEYS: schema.Section = {
    "window": Key(
        None,
        schema.or_none(Rule("(height, width), or three sides of volumes", schema.is_size)),
        "(height, width) of a sliding window, or its three sides; None: the whole image at once.",
    ),
    "stride": Key(
        2 / 3,
        Rule("a share in (0, 1]", lambda v: schema.is_number(v) and 0 < v <= 1),
        "Of the window, as a share of its size; 2/3 as mmsegmentation's.",
    ),
    "scales": Key(
        (1.0,),
        Rule(
            "positive numbers, 1 among them",
            # Affinities at another scale belong to other neighbours: they come from scale 1 alone.
            lambda v: (
                schema.is_sequence(v) and all(schema.is_number(x) and x > 0 for x in v) and 1.0 in v
            ),
        ),
        "Of the image, 1 among them; probabilities are averaged over scales and flips.",
    ),
    "flip": Key(False, schema.SWITCH, "Also mirrored."),
}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for an inference config that `KEYS` does not allow."""
    schema.check(config, KEYS, "config.inference")


def infer(
    apply: Apply,
    images: jax.Array,
    offsets: np.ndarray | None,
    config: ml_collections.ConfigDict,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns logits `[B, h, w, C]` and affinity logits `[B, h', w', K]`, None for what is not.

    With one scale and no flip they are the network's own, at its strides; otherwise the logits
    are logarithms of the averaged probabilities at the size of the images.

    Args:
        apply: the network in evaluation mode.
        images: `[B, H, W, C]`.
        offsets: of the affinity channels; says how they change places in a mirrored image.
        config: see `KEYS`.
    """
    check(config)
    size = images.shape[1:-1]
    flips = (False, True) if config.flip else (False,)
    views = list(itertools.product(config.scales, flips))
    if views == [(1.0, False)]:
        return _one_view(apply, images, config)
    probs, affinities = jnp.zeros(()), []
    for scale, flip in views:
        view = jnp.flip(images, _MIRRORED) if flip else images
        scaled = tuple(max(1, round(n * scale)) for n in size)
        logits, affinity = _one_view(apply, resize.bilinear(view, scaled), config)
        if logits is not None:
            seen = jax.nn.softmax(resize.bilinear(logits, size))
            probs = probs + (jnp.flip(seen, _MIRRORED) if flip else seen)
        if scale == 1.0 and affinity is not None:
            affinities.append(_unflip(affinity, offsets) if flip else affinity)
    mean = sum(affinities[1:], affinities[0]) / len(affinities) if affinities else None
    scored = logits is not None
    return propagate.log_probs(probs / len(views)) if scored else None, mean


def _one_view(
    apply: Apply, images: jax.Array, config: ml_collections.ConfigDict
) -> tuple[jax.Array | None, jax.Array | None]:
    if config.window is None or _fits(images.shape[1:-1], config.window):
        outputs = apply(images)
        return outputs["logits"], outputs["affinity_logits"]
    return _sliding(apply, images, config.window, config.stride)


def _fits(size: Sequence[int], window: Sequence[int]) -> bool:
    if len(size) != len(window):
        raise UserError(f"inference.window is {tuple(window)}; expected {len(size)} sides")
    return all(n <= w for n, w in zip(size, window, strict=True))


def _sliding(
    apply: Apply, images: jax.Array, window: Sequence[int], stride: float
) -> tuple[jax.Array | None, jax.Array | None]:
    """Averages the logits of overlapping windows; affinities likewise, on their own grid.

    Of volumes a window counts less towards its sides, where it sees less around: by a Gaussian of
    an eighth of its side, as in nnU-Net (https://arxiv.org/abs/1809.10486). Of images all alike.
    """
    batch, *size, _ = images.shape
    window = tuple(min(w, n) for w, n in zip(window, size, strict=True))
    crop = jax.ShapeDtypeStruct((batch, *window, images.shape[-1]), images.dtype)
    shapes = jax.eval_shape(apply, crop)
    logits_shape, affinity_shape = shapes["logits"], shapes["affinity_logits"]
    # Windows begin on the affinity grid, so that its cells of all windows coincide.
    cell = 1 if affinity_shape is None else -(-window[0] // affinity_shape.shape[1])
    tops = [window_starts(n, w, stride, cell) for n, w in zip(size, window, strict=True)]
    canvas = [t[-1] + w for t, w in zip(tops, window, strict=True)]
    padding = [(0, 0), *((0, max(0, c - n)) for c, n in zip(canvas, size, strict=True)), (0, 0)]
    padded = jnp.pad(images, padding, mode="edge")
    corners = np.array(list(itertools.product(*tops)), np.int32)
    # Of images all count alike, and nothing is multiplied.
    weigh = gaussian if len(size) == 3 else None

    def visit(sums: Any, corner: jax.Array) -> tuple[Any, None]:
        part = jax.lax.dynamic_slice(padded, (0, *corner, 0), crop.shape)
        outputs = apply(part)
        new = {}
        if logits_shape is not None:
            logits = resize.bilinear(outputs["logits"], window)
            new["logits"] = _add(sums["logits"], logits, corner, weigh)
        if affinity_shape is not None:
            edges = outputs["affinity_logits"]
            new["affinity"] = _add(sums["affinity"], edges, corner // cell, weigh)
        return new, None

    sums = {}
    if logits_shape is not None:
        sums["logits"] = jnp.zeros((batch, *canvas, logits_shape.shape[-1]))
    if affinity_shape is not None:
        grid = [t[-1] // cell + n for t, n in zip(tops, affinity_shape.shape[1:-1], strict=True)]
        sums["affinity"] = jnp.zeros((batch, *grid, affinity_shape.shape[-1]))
    sums, _ = jax.lax.scan(visit, sums, jnp.asarray(corners))
    logits = None
    if logits_shape is not None:
        logits = sums["logits"] / _visits(canvas, corners, window, weigh)
        logits = logits[:, *map(slice, size)]
    if affinity_shape is None:
        return logits, None
    cells = affinity_shape.shape[1:-1]
    affinity = sums["affinity"] / _visits(grid, corners // cell, cells, weigh)
    return logits, affinity[:, *(slice(-(-n // cell)) for n in size)]


def window_starts(size: int, window: int, stride: float, cell: int) -> list[int]:
    """Where windows begin: every stride·window pixels, the last one where the image ends."""
    step = max(cell, int(window * stride) // cell * cell)
    last = -(-max(0, size - window) // cell) * cell
    return sorted({*range(0, last, step), last})


def _add(canvas: jax.Array, part: jax.Array, corner: jax.Array, weigh: Weigh | None) -> jax.Array:
    start = (0, *corner, 0)
    part = part if weigh is None else jnp.asarray(weigh(part.shape[1:-1])) * part
    before = jax.lax.dynamic_slice(canvas, start, part.shape)
    return jax.lax.dynamic_update_slice(canvas, before + part, start)


def gaussian(window: Sequence[int]) -> np.ndarray:
    """Weights `[*window, 1]`, 1 in the middle, never so small that their sum loses digits."""
    weights = np.ones((*window, 1))
    for axis, n in enumerate(window):
        distance = (np.arange(n) - (n - 1) / 2) / (n * _SIGMA)
        weights *= np.exp(-(distance**2) / 2).reshape(-1, *[1] * (len(window) - axis))
    return np.maximum(weights, _LEAST).astype(np.float32)


def _visits(
    size: Sequence[int], corners: np.ndarray, window: Sequence[int], weigh: Weigh | None
) -> np.ndarray:
    counts = np.zeros((*size, 1), np.float32)
    weights = 1 if weigh is None else weigh(window)
    for corner in corners:
        part = tuple(slice(a, a + n) for a, n in zip(corner, window, strict=True))
        counts[part] += weights
    return counts


def _unflip(affinity: jax.Array, offsets: np.ndarray | None) -> jax.Array:
    """Mirrors affinities back: o = (u, v) seen in a mirror is (u, -v), along the second axis."""
    assert offsets is not None
    mirrored = offsets.copy()
    mirrored[:, _MIRRORED - 1] *= -1
    order = places(mirrored, offsets)
    return jnp.flip(affinity, _MIRRORED)[..., np.array(order)]
