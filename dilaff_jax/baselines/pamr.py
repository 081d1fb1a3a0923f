"""Pixel-adaptive mask refinement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dilaff_jax import affinity
from dilaff_jax.baselines.arguments import check_arguments
from dilaff_jax.errors import UserError

# The authors' dilations, for `affinity.offsets`.
PAMR_DILATIONS = (1, 2, 4, 8, 12, 24)


def pamr(
    probs: ArrayLike,
    image: ArrayLike,
    offsets: np.ndarray | None = None,
    *,
    steps: int = 10,
    temperature: float = 0.1,
) -> jax.Array:
    """Pixel-adaptive mask refinement: p[i] ← Σ_o α[i,o]·p[i+o], `steps` times.

    α[i,·] = softmax over o of mean over channels of -|I[i] - I[i+o]| / (t·σ[i] + 1e-8), σ[i] the
    unbiased standard deviation of I over the neighbours i+o and, once a dilation, i itself. Outside
    the image the nearest pixel stands in. As the code of Araslanov and Roth 2020
    (https://arxiv.org/abs/2005.08104, visinf/1-stage-wseg), but by shifting and adding: it holds K
    maps where theirs holds K·C.

    Args:
        probs: `[B, *spatial, C]`.
        image: `[B, *spatial, 3]`, in [0, 255]; any common scale gives the same result.
        offsets: `[K, ndim]`, from `affinity.offsets`; None for the authors' `PAMR_DILATIONS`.
        steps: ≥ 0.
        temperature: t > 0.

    Returns:
        float32 `[B, *spatial, C]`.

    Raises:
        UserError: shapes that do not match; outside `jit`, values that are not finite.
    """
    probs, image = jnp.asarray(probs), jnp.asarray(image)
    if offsets is None:
        offsets = affinity.offsets(PAMR_DILATIONS, probs.ndim - 2)
    check_arguments(probs, image, affinity.check_offsets(offsets).shape[1], steps)
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; expected a positive number")
    rows = tuple(tuple(int(x) for x in row) for row in offsets)
    return _pamr(probs, image, temperature, rows, steps)


@functools.partial(jax.jit, static_argnames=("offsets", "steps"))
def _pamr(
    probs: jax.Array,
    image: jax.Array,
    temperature: float,
    offsets: tuple[tuple[int, ...], ...],
    steps: int,
) -> jax.Array:
    image = image.astype(jnp.float32)
    around = _neighbours(image, offsets)
    spread = temperature * _local_std(image, around, offsets) + 1e-8
    scores = [jnp.mean(-jnp.abs(image - x) / spread, axis=-1) for x in around]
    weights = jax.nn.softmax(jnp.stack(scores, axis=-1))

    def step(p: jax.Array, _: None) -> tuple[jax.Array, None]:
        terms = (weights[..., k : k + 1] * x for k, x in enumerate(_neighbours(p, offsets)))
        return sum(terms, jnp.zeros_like(p)), None

    return jax.lax.scan(step, probs.astype(jnp.float32), length=steps)[0]


def _local_std(
    image: jax.Array, around: list[jax.Array], offsets: tuple[tuple[int, ...], ...]
) -> jax.Array:
    """In two passes, as the difference of squares cancels where the image is flat."""
    repeats = len({max(map(abs, o)) for o in offsets})
    number = len(around) + repeats
    mean = sum(around, repeats * image) / number
    squares = sum(((x - mean) ** 2 for x in around), repeats * (image - mean) ** 2)
    return jnp.sqrt(squares / (number - 1))


def _neighbours(x: jax.Array, offsets: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """x[i + o] for every o, the nearest pixel's value outside; slices of one padded array."""
    spatial = x.shape[1:-1]
    reach = [max(abs(o[axis]) for o in offsets) for axis in range(len(spatial))]
    padded = jnp.pad(x, [(0, 0), *((r, r) for r in reach), (0, 0)], mode="edge")
    windows = [
        tuple(slice(r + a, r + a + n) for r, a, n in zip(reach, o, spatial, strict=True))
        for o in offsets
    ]
    return [padded[(slice(None), *window)] for window in windows]
