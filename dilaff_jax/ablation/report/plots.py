"""The plots, as inline SVG whose text takes the page's font."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dilaff_jax import visualize
from dilaff_jax.ablation.report import content

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#2b2b2b", "#d9d7d2"
RIGHT, WRONG, OTHER = ("#{:02x}{:02x}{:02x}".format(*rgb) for rgb in visualize.CHANGES.values())
COLORS = {"baseline": "#7a7a7a", "joint": "#3b6fb6", "refined": "#b5482f", "aaf": "#c98a2b"}
COLORS |= {"joint+dense_crf": "#4b8a6b", "joint+pamr": "#7a5a9a"}
MARKS = {"baseline": "s", "joint": "o", "refined": "D", "aaf": "^"}
MARKS |= {"joint+dense_crf": "v", "joint+pamr": "P"}
# Typed loosely, as its keys are matplotlib's to check.
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "axes.edgecolor": "#8a8884",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


def draw(result: Mapping[str, Any]) -> dict[str, str]:
    """{name: SVG} of what can be drawn of these numbers."""
    svgs: dict[str, str] = {}
    if result["differences"]:
        svgs["differences"] = _differences(result)
    svgs["trimap"] = _trimap(result)
    if result["affinity"]:
        svgs["edges"], svgs["reliability"] = _edges(result), _reliability(result)
    if "refined" in result["transitions"]:
        svgs["rings"], svgs["classes"] = _rings(result), _classes(result)
    if result["per_image"]:
        svgs["images"] = _images(result)
    if "refined" in result["selection"]["choices"]:
        svgs["selection"] = _selection(result)
    return svgs


@contextlib.contextmanager
def _figure(name: str, height: float = 3.1) -> Iterator[tuple["Axes", list[str]]]:
    """Axes to draw on; the second value holds the SVG afterwards."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    svg: list[str] = []
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(4.7, height), layout="constrained")
        yield figure.subplots(), svg
        buffer = io.StringIO()
        bare = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=bare, transparent=True)
    svg.append(_inline(buffer.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """Cuts what only a file needs; identifiers get the figure's name, so that none occurs twice."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = re.sub(r"\sxmlns(?::xlink)?=\"[^\"]*\"", "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = svg.replace("xlink:href", "href")
    # The page's own font, at the sizes that were laid out.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return svg.replace("<svg", '<svg role="img"', 1)


def _differences(result: Mapping[str, Any]) -> str:
    """Paired differences of mean IoU and boundary F with both intervals."""
    rows = [d for d in result["differences"] if "+" not in d["minus"] + d["of"]]
    rivals = [d for d in result["differences"] if d["of"] == "refined" and "+" in d["minus"]]
    rows += [d for d in rivals if d["minus"].startswith("joint")]
    with _figure("differences", 1.2 + 0.46 * len(rows)) as (axes, svg):
        for place, row in enumerate(rows):
            for shift, key, color in (
                (-0.15, "miou", COLORS["refined"]),
                (0.15, "boundary_f", COLORS["joint"]),
            ):
                _contrast(axes, place + shift, row["figures"].get(key), color)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [_contrast_name(row) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        # Differences of nothing but rounding must not fill the plot.
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -0.1), max(high, 0.1))
        axes.set_xlabel("difference, percentage points")
        for key, color in (("mean IoU", COLORS["refined"]), ("boundary F", COLORS["joint"])):
            axes.plot([], [], "o-", color=color, label=key)
        axes.figure.legend(loc="outside upper right", ncols=2)
    return svg[0]


def _contrast(axes: "Axes", y: float, figure: Mapping[str, Any] | None, color: str) -> None:
    if figure is None:
        return
    if figure["over_images"]:
        axes.plot(
            100 * np.array(figure["over_images"]), [y, y], color=color, linewidth=4, alpha=0.3
        )
    if figure["over_seeds"]:
        axes.plot(100 * np.array(figure["over_seeds"]), [y, y], color=color, linewidth=1.3)
    axes.plot([100 * figure["mean"]], [y], "o", color=color)


SHORT = {
    "baseline": "baseline",
    "joint": "joint",
    "refined": "full",
    "aaf": "AAF",
    "joint+dense_crf": "joint + CRF",
    "joint+pamr": "joint + PAMR",
}


def _contrast_name(row: Mapping[str, Any]) -> str:
    return f"{SHORT[row['of']]} {content.MINUS} {SHORT[row['minus']]}"


def _trimap(result: Mapping[str, Any]) -> str:
    """MIoU in bands around true boundaries."""
    with _figure("trimap") as (axes, svg):
        for name in (n for n in COLORS if n in result["variants"]):
            figures = result["variants"][name]["figures"]
            bands = [(int(k.split("/")[1]), v) for k, v in figures.items() if "trimap" in k]
            widths = [w for w, _ in bands]
            mean = 100 * np.array([v["mean"] for _, v in bands])
            std = 100 * np.array([v["std"] or 0 for _, v in bands])
            axes.plot(widths, mean, color=COLORS[name], marker=MARKS[name], label=SHORT[name])
            axes.fill_between(widths, mean - std, mean + std, color=COLORS[name], alpha=0.15, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [str(w) for w in widths])
        axes.minorticks_off()
        axes.set_xlabel("half-width of the band, pixels")
        axes.set_ylabel("mean IoU in the band, %")
        axes.figure.legend(loc="outside upper center", ncols=3)
    return svg[0]


def _edges(result: Mapping[str, Any]) -> str:
    """Precision, recall and AP of class edges, by dilation, of the head and of the segmentation."""
    affinity = result["affinity"]
    dilations = affinity["dilations"]
    with _figure("edges") as (axes, svg):
        for key, mark in (("precision", "o"), ("recall", "s"), ("average_precision", "D")):
            for name, color, line in (
                ("head", COLORS["refined"], "-"),
                ("segmentation", COLORS["baseline"], "--"),
            ):
                cells = [affinity[name].get(f"d{d}/{key}") for d in dilations]
                mean = [100 * c["mean"] if c else np.nan for c in cells]
                std = [100 * (c["std"] or 0) if c else 0 for c in cells]
                axes.errorbar(
                    range(len(dilations)), mean, std, color=color, linestyle=line, marker=mark
                )
        for mark, text in (("o", "precision"), ("s", "recall"), ("D", "AP")):
            axes.plot([], [], mark, color=INK, label=text)
        for color, line, text in (
            (COLORS["refined"], "-", "affinity head"),
            (COLORS["baseline"], "--", "segmentation"),
        ):
            axes.plot([], [], color=color, linestyle=line, label=text)
        axes.set_xticks(range(len(dilations)), [f"d = {d}" for d in dilations])
        axes.set_ylim(0, 103)
        axes.set_xlabel("dilation, pixels of the head's grid")
        axes.set_ylabel("class edges, %")
        axes.figure.legend(loc="outside upper center", ncols=3)
    return svg[0]


def _reliability(result: Mapping[str, Any]) -> str:
    """Predicted against observed share of pairs within a class."""
    affinity = result["affinity"]
    shades = ("#7f2f1e", "#b5482f", "#d98a6b", "#e9bfa8", "#c98a2b", "#6b7280")
    with _figure("reliability") as (axes, svg):
        axes.plot([0, 100], [0, 100], color="#8a8884", linewidth=0.8, linestyle=":")
        for which, line in (("fitted", "-"), ("none", "--")):
            curves = affinity["reliability"][which]
            for n, d in enumerate(affinity["dilations"]):
                mean, share = (_floats(curves[key][n]) for key in ("mean", "share"))
                label = f"d = {d}" if which == "fitted" else None
                axes.plot(
                    100 * mean,
                    100 * share,
                    line,
                    color=shades[n % 6],
                    label=label,
                    lw=1.2,
                    marker=".",
                    ms=3,
                )
        axes.plot([], [], "-", color=INK, label="bias fitted", lw=1.2)
        axes.plot([], [], "--", color=INK, label="as trained", lw=1.2)
        axes.set_xlabel("predicted: one class, %")
        axes.set_ylabel("observed: one class, %")
        axes.set_aspect("equal")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return svg[0]


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], float)


def _rings(result: Mapping[str, Any]) -> str:
    """Shares of pixels that changed, by distance to a boundary: right above, wrong below."""
    rings = content.rings(result)
    with _figure("rings") as (axes, svg):
        _mirrored(axes, [ring["shares"] for ring in rings])
        axes.set_xticks(range(len(rings)), [r["label"].replace(" ", "") for r in rings])
        axes.set_xticklabels([r["label"].replace(" and more", "+").replace(" ", "") for r in rings])
        axes.set_xlabel("distance to the nearest true boundary, pixels")
        axes.set_ylabel("share of the ring's pixels, %")
    return svg[0]


def _classes(result: Mapping[str, Any]) -> str:
    """The same by true class."""
    transitions = result["transitions"]["refined"]
    rows = [
        (name, [n / sum(row) for n in row])
        for name, row in zip(result["classes"]["names"], transitions["by_class"], strict=True)
        if sum(row)
    ][:24]
    with _figure("classes") as (axes, svg):
        _mirrored(
            axes, [dict(zip(transitions["kinds"], shares, strict=True)) for _, shares in rows]
        )
        names = [name.replace("_", " ") for name, _ in rows]
        axes.set_xticks(range(len(rows)), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_ylabel("share of the class's pixels, %")
    return svg[0]


def _mirrored(axes: "Axes", rows: Sequence[Mapping[str, float | None]]) -> None:
    def share(kind: str) -> np.ndarray:
        return 100 * np.array([row[kind] or 0 for row in rows])

    places = np.arange(len(rows))
    axes.bar(places, share("wrong_to_right"), 0.72, color=RIGHT, label="wrong → right")
    axes.bar(places, -share("right_to_wrong"), 0.72, color=WRONG, label="right → wrong")
    axes.bar(
        places,
        -share("wrong_to_wrong"),
        0.72,
        bottom=-share("right_to_wrong"),
        color=OTHER,
        alpha=0.55,
        label="wrong → wrong",
    )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.figure.legend(loc="outside upper center", ncols=3)


def _images(result: Mapping[str, Any]) -> str:
    """Pixels gained in each image, from the worst to the best."""
    gain = np.sort(100 * np.array(result["per_image"]["gain"], float))
    with _figure("images") as (axes, svg):
        place = 100 * (np.arange(len(gain)) + 0.5) / len(gain)
        colors = [RIGHT if x > 0 else WRONG for x in gain]
        axes.bar(place, gain, 100 / len(gain), color=colors, alpha=0.85)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("images, from worst to best, %")
        axes.set_ylabel("pixels gained, %")
    return svg[0]


def _selection(result: Mapping[str, Any]) -> str:
    """Scores of all candidates on the selection split, by operator."""
    candidates = result["selection"]["choices"]["refined"]["candidates"]
    operators = list(dict.fromkeys(c["operator"] for c in candidates))
    with _figure("selection") as (axes, svg):
        for n, operator in enumerate(operators):
            scores = sorted(
                100 * c["score"] for c in candidates if c["operator"] == operator and c["score"]
            )
            spread = np.linspace(-0.28, 0.28, len(scores)) if len(scores) > 1 else np.zeros(1)
            axes.plot(
                n + spread[: len(scores)], scores, "o", color=COLORS["joint"], alpha=0.55, ms=4
            )
        axes.axhline(100 * (candidates[0]["score"] or 0), color=INK, linewidth=0.8, linestyle="--")
        best = max(c["score"] or 0 for c in candidates)
        axes.axhline(100 * best, color=COLORS["refined"], linewidth=1)
        axes.set_xticks(range(len(operators)), [o.replace("_", " ") for o in operators])
        axes.set_xlim(-0.5, len(operators) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("score on the selection split, %")
    return svg[0]
