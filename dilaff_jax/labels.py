"""What a label may be."""

from typing import Any

import numpy as np

from dilaff_jax.errors import UserError

# Pixels with this label take part in no loss, no edge and no metric.
IGNORE_LABEL = 255


def check_values(
    labels: Any, num_classes: int, ignore_label: int | None, name: str = "labels"
) -> None:
    """Refuses label values that are neither a class 0..num_classes-1 nor `ignore_label`.

    `ignore_label` may be None: no such label. Values that are being traced cannot be seen; the
    callers say what they do with those.

    Raises:
        UserError: not integers, or such a value; the message lists what was found and is allowed.
    """
    if not np.issubdtype(np.dtype(labels.dtype), np.integer):
        raise UserError(f"{name} have dtype {labels.dtype}; expected integer class indices")
    import jax  # here, so that workers that only read images do without it

    if isinstance(labels, jax.core.Tracer):
        return
    distinct, counts = np.unique(np.asarray(labels).astype(np.int64), return_counts=True)
    bad = (distinct < 0) | (distinct >= num_classes)
    if ignore_label is not None:
        bad &= distinct != ignore_label
    if bad.any():
        values = ", ".join(map(str, distinct[bad][:5])) + (", ..." if bad.sum() > 5 else "")
        raise UserError(
            f"{name} hold {values} at {counts[bad].sum()} pixels; expected classes 0 to "
            f"{num_classes - 1}"
            + ("" if ignore_label is None else f" or the ignore label {ignore_label}")
        )
