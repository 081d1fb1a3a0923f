"""Rows of the parity report: how far two arrays are apart, and how far they may be."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dilaff_jax.errors import UserError

FORWARD_BOUND = 1e-4
GRADIENT_BOUND = 1e-3
# Where float32 itself is farther from float64 than the bound, ours may be this often as far from
# it as torch's: two programs that both only round differ by no more, a wrong one by far more.
ROUNDING = 4.0


class Row(NamedTuple):
    """One comparison: what, where, the largest difference, the largest value, what is allowed.

    rounding: how far torch's own float32 is from its float64, where that is known.
    """

    kind: str
    name: str
    delta: float
    scale: float
    bound: float
    rounding: float = 0.0

    @property
    def relative(self) -> float:
        """Largest difference / largest value; where that is 0, the difference itself."""
        return self.delta / self.scale if self.scale else self.delta

    @property
    def passed(self) -> bool:
        """Whether it is within the bound, or rounds as torch does; NaN is and does not."""
        return self.relative <= self.bound or self.delta <= ROUNDING * self.rounding


def compare(
    kind: str,
    name: str,
    ours: Any,
    theirs: Any,
    bound: float,
    scale: float | None = None,
    exact: Any = None,
) -> Row:
    """A Row from two arrays; `scale` is max |theirs| unless given.

    Args:
        kind: of the comparison.
        name: of what is compared.
        ours: computed in float32.
        theirs: computed in float32 by torch.
        bound: of the largest difference, relative to `scale`.
        scale: see above.
        exact: the same computed in float64 by torch; then both are judged by their distance to it.

    Raises:
        UserError: their shapes differ.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise UserError(f"{kind} {name}: ours has shape {ours.shape}, torch's {theirs.shape}")
    scale = float(np.abs(theirs).max()) if scale is None else scale
    if exact is None:
        return Row(kind, name, float(np.abs(ours - theirs).max()), scale, bound)
    delta, rounding = (float(np.abs(x - exact).max()) for x in (ours, theirs))
    return Row(kind, name, delta, scale, bound, rounding)


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
                f"  bound {r.bound:7.0e}  torch rounds {r.rounding:9.2e}"
                f"  {'ok' if r.passed else 'BEYOND'}",
                flush=True,
            )
