"""The dilated neighbourhood, drawn as SVG."""

from collections.abc import Sequence

from dilaff_jax import affinity

COLORS = ("#b5482f", "#c98a2b", "#4b8a6b", "#3b6fb6", "#7a5a9a", "#6b7280")
# Of the whole grid, in the units of its text.
SIDE = 306


def neighbourhood(dilations: Sequence[int]) -> str:
    """Every neighbour i + o of a pixel i, coloured by its dilation; of at most 17 by 17 pixels."""
    shown = [d for d in dilations if d <= 8] or [min(dilations)]
    side = 2 * max(shown) + 1
    cell, middle = SIDE / side, SIDE / 2
    color = {d: COLORS[n % len(COLORS)] for n, d in enumerate(dilations)}
    parts = [_grid(side, cell)]
    for y, x in affinity.offsets(tuple(shown)).tolist():
        d = max(abs(y), abs(x))
        cx, cy = middle + x * cell, middle + y * cell
        parts.append(
            f'<line x1="{middle}" y1="{middle}" x2="{cx:.1f}" y2="{cy:.1f}" stroke="{color[d]}" '
            'stroke-width="1" opacity="0.35"/>' + _square(cx, cy, 0.76 * cell, color[d])
        )
    parts.append(_square(middle, middle, 0.84 * cell, "#1c1c1c"))
    parts.append(
        f'<text x="{middle}" y="{middle + 4}" fill="#fff" font-size="12" text-anchor="middle" '
        'font-style="italic">i</text>'
    )
    hidden = [d for d in dilations if d not in shown]
    note = f"; not drawn: {hidden}" if hidden else ""
    label = f"Pixel i and its neighbours at the dilations {', '.join(map(str, shown))}{note}"
    return (
        f'<svg viewBox="-1 -1 {SIDE + 2} {SIDE + 30}" role="img" aria-label="{label}">'
        + "".join(parts)
        + _legend(shown, color)
        + "</svg>"
    )


def _square(x: float, y: float, side: float, fill: str) -> str:
    return (
        f'<rect x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" '
        f'height="{side:.1f}" rx="2" fill="{fill}"/>'
    )


def _grid(side: int, cell: float) -> str:
    at = (n * cell for n in range(side + 1))
    lines = "".join(f"M{x:.1f} 0V{SIDE}M0 {x:.1f}H{SIDE}" for x in at)
    return f'<path d="{lines}" stroke="#e3e1dc" stroke-width="1" fill="none"/>'


def _legend(dilations: Sequence[int], color: dict[int, str]) -> str:
    parts = []
    for n, d in enumerate(dilations):
        left = n * SIDE / max(4, len(dilations))
        parts.append(
            f'<rect x="{left:.1f}" y="{SIDE + 10}" width="12" height="12" rx="2" '
            f'fill="{color[d]}"/><text x="{left + 17:.1f}" y="{SIDE + 20}" font-size="12" '
            f'fill="#333">d = {d}</text>'
        )
    return "".join(parts)
