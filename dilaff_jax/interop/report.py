"""Rows of the parity report: how far two arrays are apart, and how far they may be."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dilaff_jax.errors import UserError

FORWARD_BOUND = 1e-4
GRADIENT_BOUND = 1e-3


class Row(NamedTuple):
    """One comparison: what, where, the largest difference, the largest value, what is allowed."""

    kind: str
    name: str
    delta: float
    scale: float
    bound: float

    @property
    def relative(self) -> float:
        """Largest difference / largest value; where that is 0, the difference itself."""
        return self.delta / self.scale if self.scale else self.delta

    @property
    def passed(self) -> bool:
        """Whether it is within the bound; NaN is not."""
        return self.relative <= self.bound


def compare(
    kind: str, name: str, ours: Any, theirs: Any, bound: float, scale: float | None = None
) -> Row:
    """A Row from two arrays; `scale` is max |theirs| unless given.

    Raises:
        UserError: their shapes differ.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise UserError(f"{kind} {name}: ours has shape {ours.shape}, torch's {theirs.shape}")
    scale = float(np.abs(theirs).max()) if scale is None else scale
    return Row(kind, name, float(np.abs(ours - theirs).max()), scale, bound)


def print_rows(rows: Sequence[Row], everything: bool) -> None:
    """Prints every row, or of each kind those beyond their bound, else the three worst."""
    width = max(len(r.name) for r in rows)
    for kind in dict.fromkeys(r.kind for r in rows):
        of_kind = [r for r in rows if r.kind == kind]
        worst = sorted(of_kind, key=lambda r: -r.relative)
        shown = [r for r in worst if not r.passed] or worst[:3]
        print(f"  {kind}: {len(of_kind)} compared")
        for r in of_kind if everything else shown:
            print(
                f"    {r.name:{width}}  max|Δ| {r.delta:9.2e}  relative {r.relative:9.2e}"
                f"  bound {r.bound:7.0e}  {'ok' if r.passed else 'BEYOND'}",
                flush=True,
            )
