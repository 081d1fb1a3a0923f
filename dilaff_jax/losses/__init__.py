"""Masked losses, each returned as a sum and a count, so that devices add them before dividing.

`finish(psum(parts))` then divides by the *global* number of valid pixels or edges; the mean of
per-device means is another number wherever ignore masks are uneven. Mining (OHEM, loss
max-pooling) selects within each image, so that its parts add too and do not depend on how a batch
is laid over devices. All arithmetic is float32, whatever the dtype of the logits.

Bad values are refused with a ValueError where they can be seen. Under `jit` they cannot: there a
label that is neither a class nor the ignore label turns the loss *and its gradient* into NaN,
rather than being left out in silence.
"""

from dilaff_jax.losses.edges import (
    affinity_balanced,
    affinity_bce,
    affinity_focal,
    affinity_max_pooling,
    affinity_ohem,
)
from dilaff_jax.losses.fields import adaptive_affinity_fields
from dilaff_jax.losses.parts import Parts, finish
from dilaff_jax.losses.segmentation import (
    cross_entropy,
    enlarged,
    focal,
    loss_max_pooling,
    ohem,
)

__all__ = [
    "Parts",
    "adaptive_affinity_fields",
    "affinity_balanced",
    "affinity_bce",
    "affinity_focal",
    "affinity_max_pooling",
    "affinity_ohem",
    "cross_entropy",
    "enlarged",
    "finish",
    "focal",
    "loss_max_pooling",
    "ohem",
]
