"""The images on which propagation did best, middling and worst, drawn tile by tile."""

import pathlib
import shutil
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np

from dilaff_jax import propagate, visualize
from dilaff_jax.ablation import baseline_outputs, network_outputs, scoring, summary
from dilaff_jax.ablation.analysis import Study
from dilaff_jax.ablation.network_outputs import Outputs
from dilaff_jax.data import contact_sheet, images

# Larger images are shrunk to this width.
WIDTH = 640


def draw(
    study: Study, folder: pathlib.Path, executor: baseline_outputs.Pool
) -> list[dict[str, Any]]:
    """Draws images of the first seed; returns what and where they are, for `ablation.json`.

    Ranked by the share of labelled pixels made right minus those made wrong.
    """
    number = study.config.ablate.pictures
    if "refined" not in study.counts or not number:
        return []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outputs, bias = study.reported["joint"][0], study.bias[0]
    gain = summary.gains(study.counts["refined"][0])
    ranked = _ranked(gain, number)
    indices = np.array([index for _, index in ranked])
    after = study.selected["refined"].chosen
    maps = scoring.maps_after(outputs, after, bias, 1, executor, indices)
    entries = []
    for (rank, _), (index, refined) in zip(ranked, maps, strict=True):
        name = outputs.source.names[index]
        tiles = {}
        for title, tile in _tiles(outputs, index, refined, bias).items():
            file = f"{rank.replace(' ', '_')}_{title}.{'jpg' if title == 'image' else 'png'}"
            _write(folder / file, tile)
            tiles[title] = f"{folder.name}/{file}"
        entries.append(
            {
                "rank": rank.split(" ")[0],
                "name": name,
                "seed": study.config.ablate.seeds[0],
                "gain": float(gain[index]),
                "tiles": tiles,
            }
        )
    return entries


def _ranked(gain: np.ndarray, number: int) -> list[tuple[str, int]]:
    """(rank, index) of the best, the median and the worst, each image once."""
    order = np.argsort(-gain, kind="stable")
    middle = np.argsort(np.abs(np.arange(len(order)) - (len(order) - 1) / 2), kind="stable")
    chosen = {
        "best": order[:number],
        "median": order[middle[:number]],
        "worst": order[::-1][:number],
    }
    seen: set[int] = set()
    chosen_images = []
    for rank, indices in chosen.items():
        for place, index in enumerate(map(int, indices), start=1):
            if index not in seen:
                chosen_images.append((f"{rank} {place}", index))
            seen.add(index)
    return chosen_images


def _tiles(
    outputs: Outputs, index: int, refined: np.ndarray, bias: np.ndarray
) -> dict[str, np.ndarray]:
    """{title: RGB picture of the image's size}."""
    example, colors = outputs.source[index], outputs.source.colors
    truth, picture = example["label"], outputs.source.picture(example["image"])
    batch = next(outputs.batches(1, np.array([index])))
    plain = outputs.cut(np.asarray(network_outputs.plain_labels(batch.logits, outputs.size)), index)
    return {
        "image": picture,
        "truth": contact_sheet.paint(truth, colors),
        "before": contact_sheet.paint(plain[0], colors),
        "after": contact_sheet.paint(refined, colors),
        "changes": visualize.paint_changes(picture, truth, plain[0], refined),
        "edges": _edges(outputs, batch.affinity_logits, index, bias),
    }


def _edges(outputs: Outputs, affinity_logits: Any, index: int, bias: np.ndarray) -> np.ndarray:
    """The predicted class edges of the first dilation at the fitted bias, dark on white."""
    offsets = outputs.offsets
    assert offsets is not None
    calibrated = jnp.asarray(affinity_logits, jnp.float32) - propagate.per_offset(bias, offsets)
    strength = np.asarray(visualize.edge_strength(calibrated, offsets))[0, ..., 0]
    # Enlarged with the padding it was computed with, then cut as the image is.
    height, width = outputs.size
    enlarged = cv2.resize(255 - strength, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.repeat(outputs.cut(enlarged, index)[..., None], 3, axis=-1)


def _write(path: pathlib.Path, tile: np.ndarray) -> None:
    height, width = tile.shape[:2]
    if width > WIDTH:
        smooth = path.suffix == ".jpg"
        mode = cv2.INTER_AREA if smooth else cv2.INTER_NEAREST_EXACT
        tile = cv2.resize(tile, (WIDTH, round(height * WIDTH / width)), interpolation=mode)
    if path.suffix == ".jpg":
        bgr = cv2.cvtColor(np.ascontiguousarray(tile), cv2.COLOR_RGB2BGR)
        path.write_bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes())
    else:
        path.write_bytes(images.encode_png(np.ascontiguousarray(tile)))
