"""What every baseline checks of its arguments."""

from typing import Any

import jax
import numpy as np

from dilaff_jax.errors import UserError


def check_arguments(probs: Any, image: Any, ndim: int, steps: int) -> None:
    """Raises UserError for shapes that do not match, and values that are not finite."""
    if probs.ndim != ndim + 2:
        raise UserError(f"probs has shape {probs.shape}; expected {ndim + 2} axes [B, *spatial, C]")
    if image.shape != (*probs.shape[:-1], 3):
        raise UserError(
            f"image has shape {image.shape}; expected {(*probs.shape[:-1], 3)}: RGB at the "
            "resolution of probs"
        )
    if int(steps) != steps or steps < 0:
        raise UserError(f"steps is {steps}; expected a whole number, zero or more")
    for name, x in (("probs", probs), ("image", image)):
        if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x, np.float32)).all():
            raise UserError(f"{name} holds NaN or infinity; expected finite values")
