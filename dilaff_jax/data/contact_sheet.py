"""A picture of examples with their labels overlaid: the quickest check of a data set."""

import os
import pathlib
from collections.abc import Sequence

import cv2
import numpy as np

from dilaff_jax.data import datasets
from dilaff_jax.data.images import encode_png
from dilaff_jax.labels import IGNORE_LABEL

_TEXT = (cv2.FONT_HERSHEY_SIMPLEX, 0.42)
_LINE = 18
_WHITE, _BLACK, _GREY = (255, 255, 255), (0, 0, 0), 40


def paint(label: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Labels uint8 `[H, W]` as RGB `[H, W, 3]`; ignored pixels are white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(colors)] = colors
    return table[label]


def overlay(image: np.ndarray, label: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """The image with its labels over it at 45 %, class borders black, ignored pixels hatched."""
    painted = paint(label, colors)
    mixed = cv2.addWeighted(image, 0.55, painted, 0.45, 0)
    rows, columns = np.indices(label.shape)
    mixed[(label == IGNORE_LABEL) & ((rows + columns) % 6 < 2)] = _WHITE
    border = np.zeros(label.shape, bool)
    border[:, 1:] |= label[:, 1:] != label[:, :-1]
    border[1:] |= label[1:] != label[:-1]
    mixed[border] = _BLACK
    return mixed


def _fit(picture: np.ndarray, side: int, smooth: bool) -> np.ndarray:
    """Scales the longer side to `side`; narrower pictures get a grey margin at the right."""
    scale = side / max(picture.shape[:2])
    height, width = (max(1, round(s * scale)) for s in picture.shape[:2])
    mode = cv2.INTER_AREA if smooth and scale < 1 else cv2.INTER_NEAREST_EXACT
    wide = np.full((height, side, 3), _GREY, np.uint8)
    wide[:, :width] = cv2.resize(picture, (width, height), interpolation=mode)
    return wide


def _side_by_side(tiles: list[np.ndarray], columns: int) -> np.ndarray:
    """A row of tiles, filled with grey to one height and to `columns` tiles."""
    height, width = max(tile.shape[0] for tile in tiles), tiles[0].shape[1]
    row = np.full((height, columns * width, 3), _GREY, np.uint8)
    for place, tile in enumerate(tiles):
        row[: tile.shape[0], place * width : (place + 1) * width] = tile
    return row


def _caption(text: str, width: int) -> np.ndarray:
    strip = np.full((_LINE, width, 3), 255, np.uint8)
    return cv2.putText(strip, text, (3, _LINE - 5), *_TEXT, _BLACK, 1, cv2.LINE_AA)


def legend(names: Sequence[str], colors: np.ndarray, width: int) -> np.ndarray:
    """Class indices, names and colours, as many in a row as fit: RGB uint8 `[H, width, 3]`."""
    cell = 12 + 8 * (6 + max(map(len, names)))
    columns = max(1, width // cell)
    entries = [(f"{i} {name}", colors[i]) for i, name in enumerate(names)]
    entries.append((f"{IGNORE_LABEL} ignored", np.array(_WHITE)))
    rows = []
    for start in range(0, len(entries), columns):
        row = np.full((_LINE, width, 3), 235, np.uint8)
        for place, (text, color) in enumerate(entries[start : start + columns]):
            left = place * cell
            row[4:15, left + 4 : left + 18] = color
            cv2.putText(row, text, (left + 22, _LINE - 5), *_TEXT, _BLACK, 1, cv2.LINE_AA)
        rows.append(row)
    return np.concatenate(rows)


def draw(source: datasets.Source, count: int = 12, side: int = 240) -> np.ndarray:
    """Draws `count` examples spread evenly over a split: image, overlay and labels of each.

    Args:
        source: The split.
        count: How many examples.
        side: Longer side of each picture, pixels.

    Returns:
        RGB uint8 `[H, W, 3]`, two examples in a row, a legend on top.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    tiles = []
    for index in chosen:
        example = source[int(index)]
        image, label = source.picture(example["image"]), source.slice_of(example["label"])
        pictures = (
            _fit(image, side, True),
            _fit(overlay(image, label, source.colors), side, True),
            _fit(paint(label, source.colors), side, False),
        )
        size = " x ".join(map(str, source.sizes[index]))
        text = f"{index}: {source.names[index]}  {size}"
        tiles.append(np.concatenate([_caption(text, 3 * side), np.concatenate(pictures, axis=1)]))
    rows = [_side_by_side(tiles[i : i + 2], 2) for i in range(0, len(tiles), 2)]
    head = legend(source.class_names, source.colors, rows[0].shape[1])
    return np.concatenate([head, *rows])


def write(source: datasets.Source, path: str | os.PathLike) -> pathlib.Path:
    """Writes the contact sheet of a split as PNG and returns its path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(draw(source)))
    return path
