"""Where an image lies on what the network sees, and what the network says at the image's size."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax import gate, resize


class Geometry(NamedTuple):
    """Height and width of an image as given, as scaled, and as padded for the network.

    Of a volume its three sides.
    """

    original: tuple[int, ...]
    scaled: tuple[int, ...]
    canvas: tuple[int, ...]

    def cells(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """How many of a grid's cells over the canvas touch the scaled image."""
        return tuple(-(-n * g // c) for n, g, c in zip(self.scaled, grid, self.canvas))  # noqa: B905


@functools.partial(jax.jit, static_argnames=("geometry", "grid", "own"))
def enlarge(
    logits: jax.Array,
    change: jax.Array | None,
    keep: np.ndarray | None,
    geometry: Geometry,
    grid: tuple[int, ...],
    own: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Labels, unrefined labels `[B, H, W]`, probabilities `[B, H, W, C]`, at the original size.

    Args:
        logits: `[B, h, w, C]`.
        change: what propagation adds to them, `[B, *cells, C]`; None for nothing.
        keep: of the operator's gate, see `gate.corrected`.
        geometry: of the image.
        grid: of the affinities over the canvas.
        own: the logits cover the canvas; else the image.
    """

    def fit(x: jax.Array, covered: tuple[int, ...]) -> jax.Array:
        """Enlarges what covers so many scaled pixels, and cuts the image out of it."""
        inner = resize.bilinear(x, covered)[:, *map(slice, geometry.scaled)]
        return resize.bilinear(inner, geometry.original)

    if own:
        scores = plain = fit(logits, geometry.canvas)
    else:
        scores = plain = resize.bilinear_logits(logits, geometry.original)
    if change is not None:
        # Cells of a padded canvas are whole; of an unpadded one they are stretched to its size.
        covered = [n * c // g for n, c, g in zip(change.shape[1:-1], geometry.canvas, grid)]  # noqa: B905
        scores = gate.corrected(plain, fit(change, tuple(covered)), keep)
    labels, unrefined = (jnp.argmax(x, axis=-1).astype(jnp.uint8) for x in (scores, plain))
    return labels, unrefined, jax.nn.softmax(scores)
