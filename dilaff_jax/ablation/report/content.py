"""What the page says, from the numbers: rows of tables, sentences, formats."""

from collections.abc import Mapping, Sequence
from typing import Any

MINUS, THIN, DASH = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}", "\N{EN DASH}"

MAIN = {
    "miou": "mean IoU",
    "boundary_iou": "boundary IoU",
    "boundary_f": "boundary F",
    "boundary_f_class": "boundary F, by class",
    "pixel_accuracy": "pixel accuracy",
}
CONTRASTED = ("miou", "boundary_iou", "boundary_f")
EDGES = {
    "class_edges": "share of edges",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "average_precision": "AP",
    "calibration_error": "calibration error",
}


def percent(value: float | None, digits: int = 2) -> str:
    """A share in per cent, without the sign."""
    return DASH if value is None else _signed(f"{100 * value:.{digits}f}")


def points(value: float | None, digits: int = 2) -> str:
    """A difference of shares in percentage points, with its sign unless it rounds to zero."""
    if value is None:
        return DASH
    text = f"{100 * value:+.{digits}f}"
    return _signed(text) if float(text) else text[1:]


def spread(figure: Mapping[str, Any] | None, digits: int = 2) -> str:
    """Mean ± std in per cent; the mean alone with one seed."""
    if figure is None:
        return DASH
    std = figure["std"]
    tail = "" if std is None else f"{THIN}±{THIN}{100 * std:.{digits}f}"
    return f"{percent(figure['mean'], digits)}{tail}"


def interval(bounds: Sequence[float] | None, digits: int = 2) -> str:
    """[low, high] in percentage points."""
    if bounds is None:
        return DASH
    return f"[{points(bounds[0], digits)}, {points(bounds[1], digits)}]"


def number(value: float | None, digits: int = 2) -> str:
    """With thousands parted by thin spaces."""
    return DASH if value is None else f"{value:,.{digits}f}".replace(",", THIN)


def sign_class(bounds: Sequence[float] | None) -> str:
    """CSS class of an interval: whether it excludes zero, and on which side."""
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return ""
    return "up" if bounds[0] > 0 else "down"


def _signed(text: str) -> str:
    return text.replace("-", MINUS)


FILTERS = {
    "percent": percent,
    "points": points,
    "spread": spread,
    "interval": interval,
    "number": number,
    "sign_class": sign_class,
}


def page(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template lays out beside the result itself."""
    seeds, split = len(result["seeds"]), result["splits"]["report"]
    return {
        "seeds": f"{seeds} seed{'s' if seeds > 1 else ''}",
        "basis": f"{split['title']}, {split['images']} images, {seeds} seed"
        f"{'s' if seeds > 1 else ''}",
        "main": MAIN,
        "contrasted": {k: MAIN[k] for k in CONTRASTED},
        "arms": {k: v for k, v in result["variants"].items() if "+" not in k},
        "rivals": {k: v for k, v in result["variants"].items() if "+" in k},
        "findings": findings(result),
        "classes": _classes(result),
        "edges": _edges(result),
        "rings": rings(result),
        "choices": _choices(result),
        "costs": _costs(result),
        "times": _times(result),
        "title_of": {k: v["title"] for k, v in result["variants"].items()},
        "hours": sum(result["seconds"]["training"].values()) / 3600,
    }


def dilations(result: Mapping[str, Any]) -> list[int]:
    """Of the head; the default's where no head was trained."""
    return result["affinity"]["dilations"] if result["affinity"] else [1, 2, 4, 8]


def difference(result: Mapping[str, Any], of: str, minus: str) -> Mapping[str, Any] | None:
    """The figures of one paired difference."""
    for entry in result["differences"]:
        if (entry["of"], entry["minus"]) == (of, minus):
            return entry["figures"]
    return None


def findings(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The questions the ablation was made for, each with its answer in numbers."""
    asked = (
        ("Does the affinity loss alone help?", "joint", "baseline"),
        ("Does propagation help after it?", "refined", "joint"),
        ("Does the whole pipeline help?", "refined", "baseline"),
        ("Does a rival loss, AAF, help?", "aaf", "baseline"),
        ("Is propagation better than DenseCRF on the same logits?", "refined", "joint+dense_crf"),
        ("Is propagation better than PAMR on the same logits?", "refined", "joint+pamr"),
    )
    rows = []
    for question, of, minus in asked:
        figures = difference(result, of, minus)
        if figures:
            answers = {k: figures[k] for k in CONTRASTED if k in figures}
            rows.append({"question": question, "figures": answers, "verdict": verdict(figures)})
    return rows


def verdict(figures: Mapping[str, Any]) -> str:
    """What may be said of mean IoU: by the interval over seeds, if there are several."""
    gain = figures.get("miou")
    if gain is None:
        return "undefined"
    over_seeds, mean = gain["over_seeds"], gain["mean"]
    side = "higher" if mean > 0 else "lower"
    if gain["values"] and not any(gain["values"]):
        return "no change"
    if over_seeds is None:
        decided = gain["over_images"] and sign_class(gain["over_images"])
        return f"{side} in the one run made" if decided else "undecided, one run"
    return side if sign_class(over_seeds) else "undecided: interval includes zero"


def _classes(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """IoU by class of the arms, and the difference of the last to the first."""
    arms = [k for k in result["variants"] if "+" not in k]
    contrast = difference(result, "refined", "baseline") or difference(result, "joint", "baseline")
    rows = []
    for name, color in zip(result["classes"]["names"], result["classes"]["colors"], strict=True):
        key = f"iou/{name}"
        figures = [result["variants"][arm]["figures"].get(key) for arm in arms]
        if any(figures):
            change = contrast.get(key) if contrast else None
            rows.append({"name": name, "color": color, "arms": figures, "change": change})
    return rows


def _edges(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Figures of class edges by dilation, of the head and of the segmentation by itself."""
    affinity = result["affinity"]
    if not affinity:
        return []
    rows = []
    for name, title in (("head", "affinity head"), ("segmentation", "segmentation by itself")):
        for d in affinity["dilations"]:
            cells = {k: affinity[name].get(f"d{d}/{k}") for k in EDGES}
            rows.append({"title": title, "dilation": d, "cells": cells})
    return rows


def rings(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Transitions by distance to the nearest true boundary, shares of each ring's pixels."""
    transitions = result["transitions"].get("refined")
    if not transitions:
        return []
    limits = [0, *transitions["distances"], None]
    rows = []
    for low, high, row in zip(limits, limits[1:], transitions["by_distance"], strict=False):
        total = sum(row)
        shares = {
            k: n / total if total else None for k, n in zip(transitions["kinds"], row, strict=True)
        }
        label = f"{low:g} {DASH} {high:g}" if high is not None else f"{low:g} and more"
        rows.append({"label": label, "pixels": total, "shares": shares})
    return rows


def _choices(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was selected, with the best candidates of each search."""
    rows = []
    for name, choice in result["selection"]["choices"].items():
        ranked = sorted(
            choice["candidates"],
            key=lambda c: -1 if c["score"] is None else c["score"],
            reverse=True,
        )
        identity = next(c for c in choice["candidates"] if c["operator"] == "identity")
        chosen = choice["chosen"]
        best = next(
            c
            for c in choice["candidates"]
            if (c["operator"], c["options"]) == (chosen["operator"], chosen["options"])
        )
        rows.append(
            {
                "title": result["variants"][name]["title"],
                "chosen": described(best),
                "score": best["score"],
                "identity": identity["score"],
                "images": choice["images"],
                "number": len(ranked),
                "best": [{"text": described(c), **c} for c in ranked[:12]],
            }
        )
    return rows


def described(candidate: Mapping[str, Any]) -> str:
    """Such as "signed: steps 5, strength 0.1, bias fitted"."""
    options = ", ".join(
        f"{k.replace('_', ' ')} {v:g}" if isinstance(v, int | float) else f"{k} {v}"
        for k, v in candidate["options"].items()
    )
    name = {"dense_crf": "DenseCRF", "pamr": "PAMR", "random_walk": "random walk"}
    operator = name.get(candidate["operator"], candidate["operator"])
    return f"{operator}: {options}" if options else operator


def _costs(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Networks and propagation, with what each adds to the baseline."""
    networks, times = result["cost"]["networks"], result["cost"]["milliseconds"]
    base = networks["baseline"]
    rows = [_cost("baseline", base, base, times.get("baseline"))]
    if "joint" in networks:
        joint = networks["joint"]
        rows.append(_cost("with affinity head", joint, base, times.get("joint")))
    if "propagation" in networks:
        after = networks["propagation"]
        both = {
            "parameters": joint["parameters"],
            "gflop": joint["gflop"] + after["gflop"] - after["resizing_gflop"],
            "memory_mb": max(joint["memory_mb"], after["memory_mb"]),
        }
        total = times["joint"] + times["propagation"] - times["resizing"]
        rows.append(_cost("with head and propagation", both, base, total))
    return rows


def _cost(
    title: str, network: Mapping[str, float], base: Mapping[str, float], time: float | None
) -> dict[str, Any]:
    added = {k: network[k] / base[k] - 1 if base[k] else None for k in ("parameters", "gflop")}
    return {"title": title, "time": time, "added": added, **network}


def _times(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Refinements: quality on the same logits, time, and how many times propagation's that is."""
    times, variants = result["cost"]["milliseconds"], result["variants"]
    shown = [("refined", "propagation", "propagation")]
    shown += [
        (f"{arm}+{rival}", rival, f"{title}, {logits} logits")
        for arm, logits in (("joint", "joint"), ("baseline", "baseline"))
        for rival, title in (("dense_crf", "DenseCRF"), ("pamr", "PAMR"))
    ]
    own = times.get("propagation")
    rows = []
    for name, key, title in shown:
        if name in variants and key in times:
            rows.append(
                {
                    "title": title,
                    "after": variants[name]["after"],
                    "figures": {k: variants[name]["figures"].get(k) for k in CONTRASTED},
                    "plain": variants[name]["arm"],
                    "time": times[key],
                    "times": times[key] / own if own else None,
                }
            )
    return rows
