"""Images that do not fit into memory: labels tile by tile, without seams.

The network sees a tile with a margin around it, as context; what it says of the tile itself goes to
disk. Propagation then reads, for each tile, these maps as far around it as it reaches, which makes
what it would make of all of them at once. Memory depends on the tile, not on the image.
"""

import hashlib
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dilaff_jax.data import contact_sheet
from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.serving import tiles
from dilaff_jax.serving.predictor import Geometry, Predictor, Raw
from dilaff_jax.serving.raster import Raster, label_file
from dilaff_jax.serving.writer import Options, write_png

# The longer side of the picture that shows the whole.
_PICTURE = 2048
_LABELS, _PLAIN = "labels", "plain"


def predict(predictor: Predictor, name: str, path: pathlib.Path, options: Options) -> None:
    """Segments one file tile by tile; what was interrupted goes on where it was.

    Writes labels/NAME.tif with the georeference of the file and 255 where it has no data, and a
    small picture of the whole.

    Args:
        predictor: with a segmentation.
        name: of the results.
        path: of the image.
        options: `tile` and `margin`, and what is written where.

    Raises:
        DataError: the file cannot be read.
        UserError: see `tiles.Tiling`; the disk has too little space.
    """
    tiling = tiles.Tiling(predictor, options.tile, options.margin)
    with Raster(path) as raster:
        _check_space(predictor, tiling, raster.size, options.output)
        store = tiles.Store(options.output / "tiles" / name, _key(predictor, tiling, path, options))
        _infer(predictor, tiling, raster, store)
        _refine(predictor, tiling, raster, store, options)
        _write(predictor, tiling, raster, store, name, options)
        store.remove()
    folder = options.output / "tiles"
    for left in (*(folder / name).parents,):
        if left == options.output or any(left.iterdir()):
            break
        left.rmdir()


def _grid(
    tiling: tiles.Tiling, size: Sequence[int], margin: int
) -> list[tuple[tuple[int, int], tiles.Span, tiles.Span]]:
    rows, columns = (tiles.spans(n, tiling.tile, margin) for n in tiling.canvas(size))
    return [((i, j), y, x) for i, y in enumerate(rows) for j, x in enumerate(columns)]


def _infer(predictor: Predictor, tiling: tiles.Tiling, raster: Raster, store: tiles.Store) -> None:
    """Keeps what the network says of every tile."""
    for tile, rows, columns in tqdm(
        _grid(tiling, raster.size, tiling.margin), desc="network", unit="tile"
    ):
        if all(store.has(kind, tile) for kind in tiling.strides):
            continue
        raw = predictor.infer(_pixels(raster, rows, columns, predictor.network.pad_rgb))
        for kind, values in ((tiles.LOGITS, raw.logits), (tiles.AFFINITY, raw.affinity_logits)):
            if values is not None:
                stride = tiling.strides[kind]
                y, x = (
                    slice((s.start - s.first) // stride, (s.stop - s.first) // stride)
                    for s in (rows, columns)
                )
                store.write(kind, tile, np.asarray(values[0, y, x]))


def _pixels(
    raster: Raster, rows: tiles.Span, columns: tiles.Span, fill: tuple[int, ...]
) -> np.ndarray:
    """A window of the image; `fill` beyond it and where it has no data."""
    window = np.empty((rows.length, columns.length, 3), np.uint8)
    window[:] = fill
    height, width = raster.size
    inner = (rows.first, min(rows.last, height)), (columns.first, min(columns.last, width))
    pixels, there = raster.read(*inner), raster.is_there(*inner)
    part = window[: pixels.shape[0], : pixels.shape[1]]
    part[there] = pixels[there]
    return window


def _refine(
    predictor: Predictor, tiling: tiles.Tiling, raster: Raster, store: tiles.Store, options: Options
) -> None:
    """Keeps the labels of every tile."""
    kinds = [_LABELS, *([_PLAIN] if options.propagation == "both" else [])]
    refined = options.propagation != "without"
    height, width = raster.size
    for tile, rows, columns in tqdm(
        _grid(tiling, raster.size, tiling.halo), desc="labels", unit="tile"
    ):
        if all(store.has(kind, tile) for kind in kinds):
            continue
        maps = {
            kind: jnp.asarray(
                store.window(
                    kind,
                    (rows.first // stride, rows.last // stride),
                    (columns.first // stride, columns.last // stride),
                    tiling.tile // stride,
                )
            )[None]
            for kind, stride in tiling.strides.items()
        }
        size = min(rows.last, height) - rows.first, min(columns.last, width) - columns.first
        geometry = Geometry(size, size, (rows.length, columns.length))
        raw = Raw(geometry, maps[tiles.LOGITS], maps.get(tiles.AFFINITY))
        change = predictor.correction(raw) if refined else None
        result = predictor.finish(np.empty(0), raw, change)
        y = slice(rows.start - rows.first, min(rows.stop, height) - rows.first)
        x = slice(columns.start - columns.first, min(columns.stop, width) - columns.first)
        there = raster.is_there(
            (rows.start, min(rows.stop, height)), (columns.start, min(columns.stop, width))
        )
        for kind in kinds:
            labels = getattr(result, kind)[y, x]
            store.write(kind, tile, np.where(there, labels, IGNORE_LABEL).astype(np.uint8))


def _write(
    predictor: Predictor,
    tiling: tiles.Tiling,
    raster: Raster,
    store: tiles.Store,
    name: str,
    options: Options,
) -> None:
    """Joins the labels in files, and draws the whole."""
    picture = raster.small(_PICTURE) if options.overlays else None
    colours = np.asarray(predictor.classes.colors, np.uint8)
    for suffix, kind in options.variants.items():
        target = options.output / f"labels{suffix}" / f"{name}.tif"
        shape = raster.size if picture is None else picture.shape[:2]
        at = [(np.arange(n) * 2 + 1) * full // (2 * n) for n, full in zip(shape, raster.size)]  # noqa: B905
        small = np.empty(shape, np.uint8) if picture is not None else None
        with label_file(target, raster.size, colours, raster.georeference()) as write:
            for tile, rows, columns in _grid(tiling, raster.size, 0):
                labels = store.read(kind, tile)
                write(rows.start, columns.start, labels)
                if small is not None:
                    y, x = (
                        np.flatnonzero((a >= s.start) & (a < s.stop))
                        for a, s in zip(at, (rows, columns), strict=True)
                    )
                    source = np.ix_(at[0][y] - rows.start, at[1][x] - columns.start)
                    small[np.ix_(y, x)] = labels[source]
        if picture is not None and small is not None:
            drawn = contact_sheet.overlay(picture, small, predictor.classes.colors)
            write_png(options.output / f"overlays{suffix}" / f"{name}.png", drawn)


def _check_space(
    predictor: Predictor, tiling: tiles.Tiling, size: tuple[int, int], folder: pathlib.Path
) -> None:
    """Raises UserError if what is kept meanwhile does not fit."""
    channels = {tiles.LOGITS: len(predictor.classes.names)}
    if predictor.network.offsets is not None:
        channels[tiles.AFFINITY] = len(predictor.network.offsets)
    rows, columns = tiling.canvas(size)
    needed = 4 * rows * columns  # labels, twice, in two places
    for kind, stride in tiling.strides.items():
        needed += 4 * channels[kind] * (rows // stride) * (columns // stride)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"an image of {size[0]} x {size[1]} pixels needs {needed / 1e9:.1f} GB in {folder} for "
            f"what the network says of its tiles, and {free / 1e9:.1f} GB are free; give another "
            "--output"
        )


def _key(
    predictor: Predictor, tiling: tiles.Tiling, path: pathlib.Path, options: Options
) -> dict[str, Any] | None:
    """What the maps of a file depend on; None for an exported network, whose weights are inside."""
    leaves = jax.tree.leaves(predictor.network.variables)
    if not leaves:
        return None
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(np.ascontiguousarray(leaf).tobytes())
    status = path.stat()
    return {
        "weights": digest.hexdigest(),
        "refine": repr(sorted(predictor.network.refine.items())),
        "tile": [tiling.tile, tiling.margin, tiling.halo],
        "image": [str(path.resolve()), status.st_size, status.st_mtime_ns],
        "propagation": options.propagation,
    }
