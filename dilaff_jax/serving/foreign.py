"""What another network says of an image, as logits that can be refined here."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dilaff_jax import resize
from dilaff_jax.data.class_list import Classes
from dilaff_jax.errors import UserError
from dilaff_jax.serving.network import Network
from dilaff_jax.serving.refine import take


def one_image(logits: Any, channels_first: bool) -> jax.Array:
    """Logits of one image, of NumPy, JAX or torch, as JAX's `[1, h, w, C]`.

    Raises:
        TypeError: they are no such array.
        UserError: they are not floating point, or of another number of axes.
    """
    scores, _ = take("logits", logits)
    if scores.ndim == 4 and scores.shape[0] == 1:
        scores = scores[0]
    if scores.ndim != 3 or not jnp.issubdtype(scores.dtype, jnp.floating):
        order = "[C, h, w]" if channels_first else "[h, w, C]"
        raise UserError(
            f"logits have shape {scores.shape} and dtype {scores.dtype}; expected floating point "
            f"{order} of one image"
        )
    return (jnp.moveaxis(scores, 0, -1) if channels_first else scores)[None]


def classes(scores: jax.Array, network: Network) -> Classes:
    """The classes that logits `[1, h, w, C]` are of: the network's own, or numbered ones.

    Raises:
        UserError: the network has a segmentation, of another number of classes.
    """
    count, own = scores.shape[-1], len(network.classes.names)
    if count != own and network.segmentation:
        hint = ", or channels_first=True for [C, h, w]" if scores.shape[1] == own else ""
        raise UserError(
            f"logits have {count} classes, of shape {scores.shape[1:]}, and this model has {own}; "
            f"give those of the same classes{hint}"
        )
    return network.classes_for(count)


def on_canvas(scores: jax.Array, scaled: Sequence[int], canvas: Sequence[int]) -> jax.Array:
    """Logits of an image as those of the canvas to which it is scaled and padded."""
    if tuple(canvas) == tuple(scaled):
        return scores
    margins = [(0, c - n) for c, n in zip(canvas, scaled, strict=True)]
    return jnp.pad(resize.bilinear_logits(scores, scaled), [(0, 0), *margins, (0, 0)], mode="edge")
