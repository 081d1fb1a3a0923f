"""Draws the pictures of the documentation: python docs/figures.py [--shapes DIR] [--photo DIR].

They are committed; a test holds the drawing to what this command makes. Curves come from results/.
With WORKDIR/joint of the quickstart, images of its evaluation are drawn, too; with a run of
`configs/voc2012_refine_ablation.py` (such as joint/seed-0), what it makes of a photograph.
"""

import argparse
import ast
import html
import io
import json
import pathlib
import textwrap
import tomllib
from typing import Any

import cv2
import numpy as np

import dilaff_jax
from dilaff_jax import affinity, visualize

IMAGES = pathlib.Path(__file__).parent / "images"
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
# Okabe and Ito's colours, told apart also by the colour-blind.
COLORS = ("#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7")
CELL = 24
DETAIL = 4  # its side is this part of the photograph's


def neighbourhood(dilations: tuple[int, ...] = (1, 2, 4, 8)) -> str:
    """An SVG of pixel i and its neighbours i + o; each bears the number of its channel."""
    offsets = affinity.offsets(dilations)
    reach, width = max(dilations), (2 * max(dilations) + 1) * CELL
    parts = [_grid(width)]
    for k, (offset, dilation) in enumerate(
        zip(offsets, affinity.dilation_of(offsets), strict=True)
    ):
        parts.append(_cell(offset + reach, COLORS[dilations.index(dilation)], str(k)))
    parts.append(_cell(np.array([reach, reach]), "#000000", "i"))
    per_dilation = len(offsets) // len(dilations)
    for n, dilation in enumerate(dilations):
        first = n * per_dilation
        caption = f"dilation {dilation}: channels {first} to {first + per_dilation - 1}"
        parts.append(_legend(n, width + 2 * CELL, COLORS[n], caption))
    box = f"{-CELL // 2} {-CELL // 2} {width + 11 * CELL} {width + CELL}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-family="sans-serif"'
        ' font-size="12">\n<rect x="-50%" y="-50%" width="200%" height="200%" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _grid(width: int) -> str:
    lines = [
        f"M{at},0V{width}M0,{at}H{width}"  # one line down, one across
        for at in range(0, width + 1, CELL)
    ]
    return f'<path d="{"".join(lines)}" stroke="#d0d0d0" fill="none"/>'


def _cell(at: np.ndarray, color: str, text: str) -> str:
    y, x = (int(v) * CELL for v in at)
    return (
        f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{color}"/>'
        f'<text x="{x + CELL // 2}" y="{y + CELL // 2 + 4}" text-anchor="middle" fill="#ffffff">'
        f"{text}</text>"
    )


def _legend(row: int, left: int, color: str, text: str) -> str:
    y = row * (CELL + 8)
    return (
        f'<rect x="{left}" y="{y}" width="{CELL}" height="{CELL}" fill="{color}"/>'
        f'<text x="{left + CELL + 8}" y="{y + CELL // 2 + 4}" fill="#000000">{text}</text>'
    )


def rooms(width: int = 960) -> str:
    """An SVG of the rooms of the package in the layers of pyproject.toml, and what is in each."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [layers] = [c["layers"] for c in contracts["contracts"] if c["id"] == "layers"]
    parts, total = [], 0
    for layer in layers:
        # In parentheses: former names of commands, and configs.
        names = [name for name in layer.split(" | ") if not name.startswith("(")]
        each = (width - 8 * (len(names) - 1)) // len(names)
        captions = [_caption(name, each) for name in names]
        height = 26 + 14 * max(map(len, captions))
        for column, (name, caption) in enumerate(zip(names, captions, strict=True)):
            parts.append(_room(name, caption, (column * (each + 8), total), (each, height)))
        total += height + 8
    arrow = (
        f'<path d="M{width + 22},6V{total - 20}" stroke="#777" marker-end="url(#down)"/>'
        f'<text x="{width + 34}" y="{total // 2}" fill="#555" '
        f'transform="rotate(90 {width + 34} {total // 2})" text-anchor="middle">imports</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -12 {width + 64} {total + 16}" '
        'font-family="sans-serif" font-size="11">\n<defs><marker id="down" viewBox="0 0 8 8" '
        'refX="4" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path d="M0,0L8,4L0,8" '
        'fill="#777"/></marker></defs>\n<rect x="-12" y="-12" width="100%" height="100%" '
        'fill="#ffffff"/>\n' + "\n".join([*parts, arrow]) + "\n</svg>\n"
    )


def _caption(name: str, width: int) -> list[str]:
    """The first line of a module's docstring, in lines that fit."""
    folder = ROOT / "dilaff_jax" / name
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0]
    return textwrap.wrap(html.escape(first.replace("`", ""), quote=False), width // 6)


def _room(name: str, lines: list[str], at: tuple[int, int], size: tuple[int, int]) -> str:
    """A room, blue, or a file, grey: its name and what is in it."""
    (x, y), (width, height) = at, size
    is_room = (ROOT / "dilaff_jax" / name).is_dir()
    color = COLORS[0] if is_room else "#666666"
    texts = "".join(
        f'<text x="{x + 8}" y="{y + 34 + 14 * i}" fill="#333">{line}</text>'
        for i, line in enumerate(lines)
    )
    title = f"{name}/" if is_room else f"{name}.py"
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="#ffffff" '
        f'stroke="{color}"/><text x="{x + 8}" y="{y + 18}" font-weight="bold" font-size="13" '
        f'fill="{color}">{title}</text>{texts}'
    )


def scaling(file: pathlib.Path = RESULTS / "propagation_scaling_cpu.json") -> bytes:
    """An SVG of the curves that `python -m benchmarks.propagation_scaling` measured."""
    curves = json.loads(file.read_text())["curves"]
    figure, axes = _subplots(len(curves), 12, 3)
    for axis, curve, color in zip(axes, curves, COLORS, strict=False):
        x = [point[curve["curve"]] for point in curve["points"]]
        y = [1e3 * point["median_seconds"] for point in curve["points"]]
        axis.loglog(x, y, "o-", color=color)
        axis.set_title(f"{curve['curve']}: exponent {curve['exponent']:.2f}")
        axis.set_xlabel(curve["curve"])
        axis.grid(which="both", color="#e0e0e0", linewidth=0.5)
    axes[0].set_ylabel("median ms")
    return _svg(figure)


def study(file: pathlib.Path) -> bytes:
    """An SVG of a study: plain and refined figures of the baseline and of every change."""
    rows = json.loads(file.read_text())["rows"]
    names = list(rows)
    figure, axes = _subplots(2, 10, 0.6 + 0.28 * len(rows))
    for axis, (key, title) in zip(
        axes, (("miou", "mean IoU, %"), ("boundary_f", "boundary F, %")), strict=True
    ):
        for y, row in enumerate(rows.values()):
            plain = 100 * row["plain"][key]["mean"]
            refined = 100 * row.get("refined", row["plain"])[key]["mean"]
            axis.plot([plain, refined], [y, y], color="#b0b0b0", zorder=1)
            axis.scatter([plain], [y], facecolor="white", edgecolor=COLORS[0], zorder=2)
            if "refined" in row:
                axis.scatter([refined], [y], color=COLORS[3], zorder=3)
        axis.axvline(100 * rows["baseline"]["plain"][key]["mean"], color="#b0b0b0", linestyle=":")
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        axis.set_title(f"{title}: plain \N{WHITE CIRCLE}, refined \N{BLACK CIRCLE}")
        axis.invert_yaxis()
        axis.grid(axis="x", color="#e0e0e0", linewidth=0.5)
    return _svg(figure)


STUDIES = ("study_camvid", "study_camvid_0001TP", "study_shapes")
# In the picture of all gains: a data set, its file, and what is shown of it.
_ALONE, _AFTER, _CRF = "affinity loss alone", "propagation", "DenseCRF"
GAINS = (
    ("CamVid", "ablation_camvid", (_ALONE, _AFTER, _CRF)),
    ("LabelMeFacade", "ablation_labelmefacade", (_ALONE, _AFTER, _CRF)),
    ("VOC, frozen network", "ablation_voc2012_refine", (_AFTER, _CRF)),
    ("hippocampus, volumes", "study_hippocampus", (_ALONE, _AFTER)),
)


def gains() -> bytes:
    """An SVG of differences on every data set, with their intervals over seeds."""
    rows = [(name, kind, file) for name, file, kinds in GAINS for kind in kinds]
    colors = dict(zip((_ALONE, _AFTER, _CRF), (COLORS[0], COLORS[3], "#808080"), strict=True))
    figure, axes = _subplots(2, 10, 0.6 + 0.32 * len(rows))
    for axis, (key, title) in zip(
        axes, (("miou", "mean IoU"), ("boundary_iou", "boundary IoU")), strict=True
    ):
        for y, (name, kind, file) in enumerate(rows):
            found = _gain(json.loads((RESULTS / f"{file}.json").read_text()), kind)[key]
            low, high = found["over_seeds"]
            axis.plot([100 * low, 100 * high], [y, y], color=colors[kind], linewidth=2)
            axis.scatter([100 * found["mean"]], [y], color=colors[kind], zorder=3)
            if y and name != rows[y - 1][0]:
                axis.axhline(y - 0.5, color="#b0b0b0", linewidth=0.5)
        axis.axvline(0, color="#404040", linewidth=1)
        labels = [f"{name}: {kind}" for name, kind, _ in rows]
        axis.set_yticks(range(len(rows)), labels if axis is axes[0] else [""] * len(rows))
        axis.set_title(f"{title}, points, 95 % over seeds")
        axis.invert_yaxis()
        axis.grid(axis="x", color="#e0e0e0", linewidth=0.5)
    return _svg(figure)


def _gain(content: dict[str, Any], kind: str) -> dict[str, Any]:
    """The figures of one difference, from an ablation's file or a study's."""
    differences = content["differences"]
    if isinstance(differences, dict):
        joint = differences["joint"]
        return joint["plain minus baseline" if kind == _ALONE else "refined minus plain"]
    of, minus = {
        _ALONE: ("joint", "baseline"),
        _AFTER: ("refined", "joint"),
        _CRF: ("joint+dense_crf", "joint"),
    }[kind]
    (found,) = [d["figures"] for d in differences if (d["of"], d["minus"]) == (of, minus)]
    return found


def result(workdir: pathlib.Path, names: tuple[str, ...]) -> np.ndarray:
    """Pictures of the last evaluation of a run, one below the other, BGR."""
    last = max((workdir / "evaluation").iterdir(), key=lambda folder: int(folder.name))
    rows = [cv2.imread(str(last / "pictures" / f"{name}.png")) for name in names]
    # The captions of the first serve all.
    below = [row[-row.shape[1] // 5 :] for row in rows[1:]]
    return np.concatenate([rows[0], *below])


def photo(workdir: pathlib.Path, file: pathlib.Path) -> np.ndarray:
    """A photograph, the classes of a frozen network, the same refined; below, a border of each.

    The operator is the one that the ablation of results/ablation_voc2012_refine.json chose, with
    the biases of the first seed. The detail is where most pixels changed.

    Returns:
        BGR uint8 `[H, W, 3]`.
    """
    chosen = json.loads((RESULTS / "ablation_voc2012_refine.json").read_text())["selection"]
    operator = chosen["choices"]["refined"]["chosen"]
    share = float(operator["options"]["bias"].partition("*")[2] or 1)
    bias = tuple(share * value for value in chosen["bias"][0])
    refine = {"name": operator["operator"], **operator["options"], "bias": bias}
    said = dilaff_jax.load(workdir, refine=refine)(file)
    tiles = {
        "photograph": said.image,
        "a network that somebody else trained": said.overlay(said.plain),
        "the same, refined along affinities": said.overlay(),
    }
    changed = (said.labels != said.plain).astype(np.float32)
    height, width = (n // DETAIL for n in changed.shape)
    most = cv2.boxFilter(changed, -1, (width, height), normalize=False)
    inner = most[height // 2 : -height // 2, width // 2 : -width // 2]
    top, left = np.unravel_index(int(inner.argmax()), inner.shape)
    columns = []
    for title, tile in tiles.items():
        part = tile[top : top + height, left : left + width]
        size = (tile.shape[1], round(tile.shape[1] * height / width))
        large = cv2.resize(part, size, interpolation=cv2.INTER_NEAREST)
        marked = np.ascontiguousarray(tile)
        corners = (int(left), int(top)), (int(left) + width, int(top) + height)
        cv2.rectangle(marked, *corners, (255, 255, 255), 2)
        columns.append(np.concatenate([visualize.captioned(title, marked), large]))
    return cv2.cvtColor(np.concatenate(columns, axis=1), cv2.COLOR_RGB2BGR)


def _subplots(columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    # Neither random names nor the date, so that the same numbers give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "dilaff_jax"
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def main() -> None:
    """Writes every picture, of a result only with its workdir."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--photo", type=pathlib.Path, metavar="WORKDIR")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "neighbourhood.svg").write_text(neighbourhood())
    (IMAGES / "rooms.svg").write_text(rooms())
    (IMAGES / "propagation_scaling.svg").write_bytes(scaling())
    (IMAGES / "gains.svg").write_bytes(gains())
    for file in (RESULTS / f"{name}.json" for name in STUDIES):
        (IMAGES / f"{file.stem}.svg").write_bytes(study(file))
    if options.shapes:
        names = ("validation_00000", "validation_00001", "validation_00002")
        cv2.imwrite(str(IMAGES / "shapes_result.png"), result(options.shapes, names))
    if options.photo:
        drawn = photo(options.photo, ROOT / "tests/images/astronaut.png")
        cv2.imwrite(str(IMAGES / "photo_refined.jpg"), drawn, [cv2.IMWRITE_JPEG_QUALITY, 90])


if __name__ == "__main__":
    main()
