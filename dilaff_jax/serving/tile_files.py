"""Images that do not fit into memory: labels tile by tile, without seams.

The network sees a tile with a margin around it, as context; what it says of the tile itself goes to
disk. Propagation then reads, for each tile, these maps as far around it as it reaches, which makes
what it would make of all of them at once. Memory depends on the tile, not on the image.
"""

import hashlib
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dilaff_jax import resize
from dilaff_jax.data import contact_sheet
from dilaff_jax.data.augment import blank
from dilaff_jax.data.class_list import Classes
from dilaff_jax.data.raster import label_file
from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.serving import foreign, inputs, tiles
from dilaff_jax.serving.foreign_files import Form
from dilaff_jax.serving.foreign_windows import Scores
from dilaff_jax.serving.geometry import Geometry
from dilaff_jax.serving.inputs import Windows
from dilaff_jax.serving.predictor import Predictor, Raw
from dilaff_jax.serving.writer import Options, write_png

# The longer side of the picture that shows the whole.
_PICTURE = 2048
_LABELS, _PLAIN = "labels", "plain"


class InTiles:
    """A model that takes files tile by tile; what was interrupted goes on where it was.

    Writes labels/NAME.tif with the georeference of the file and 255 where it has no data, and a
    small picture of the whole.

    Args:
        predictor: the model.
        options: `tile` and `margin`, and what is written where.

    Attributes:
        unplaced: names of TIFFs that lie nowhere on earth, and so do their labels.

    Raises:
        UserError: see `tiles.Tiling`.
    """

    def __init__(self, predictor: Predictor, options: Options) -> None:
        self._predictor, self._options = predictor, options
        self._tiling = tiles.Tiling(predictor, options.tile, options.margin)
        self._weights = _digest(predictor.network.variables)
        self.unplaced: list[str] = []

    def predict(self, name: str, path: pathlib.Path) -> None:
        """Segments one file.

        Args:
            name: of the results.
            path: of the image.

        Raises:
            DataError: the file cannot be read.
            UserError: the disk has too little space.
        """
        with inputs.windows(path, self._predictor.network.bands) as raster:
            self._make(name, [path], self._tiling, raster, None)

    def refine(
        self, name: str, path: pathlib.Path, result: pathlib.Path, form: Form
    ) -> tuple[int, int]:
        """Refines what another network says of one file.

        Args:
            name: of the results.
            path: of the image.
            result: of the other network, see `foreign_windows.Scores`.
            form: of the result.

        Returns:
            How many pixels changed, and how many there are.

        Raises:
            DataError: a file cannot be read, or they do not belong together.
            UserError: the disk has too little space, or tiles are not of whole values.
        """
        with (
            inputs.windows(path, self._predictor.network.bands) as raster,
            Scores(result, form, raster.size) as scores,
        ):
            tiling = self._tiling.with_logits_of(scores.stride)
            return self._make(name, [path, result], tiling, raster, scores)

    def _make(
        self,
        name: str,
        paths: Sequence[pathlib.Path],
        tiling: tiles.Tiling,
        raster: Windows,
        scores: Scores | None,
    ) -> tuple[int, int]:
        options = self._options
        if paths[0].suffix.lower() in (".tif", ".tiff") and not raster.georeference():
            self.unplaced.append(paths[0].name)
        store = tiles.Store(options.output / "tiles" / name, self._key(paths, tiling))
        job = _Job(self._predictor, tiling, raster, store, options, scores)
        job.check_space()
        job.infer()
        job.refine()
        counts = job.write(name)
        store.remove()
        for left in store.folder.parents:
            if left == options.output or any(left.iterdir()):
                break
            left.rmdir()
        return counts

    def _key(self, paths: Sequence[pathlib.Path], tiling: tiles.Tiling) -> dict[str, Any] | None:
        """What the maps of a file depend on; None where nobody knows the weights."""
        if self._weights is None:
            return None
        return {
            "weights": self._weights,
            "refine": repr(sorted(self._predictor.network.refine.items())),
            "tile": [tiling.tile, tiling.margin, tiling.halo],
            "files": [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths],
            "propagation": self._options.propagation,
        }


class _Job:
    """One image in tiles."""

    def __init__(
        self,
        predictor: Predictor,
        tiling: tiles.Tiling,
        raster: Windows,
        store: tiles.Store,
        options: Options,
        scores: Scores | None,
    ) -> None:
        self._predictor, self._tiling, self._raster = predictor, tiling, raster
        self._store, self._options, self._scores = store, options, scores
        network = predictor.network
        self._classes = network.classes
        if scores is not None and scores.num_classes != len(network.classes.names):
            self._classes = Classes.numbered(scores.num_classes)
        # What the network says and is kept; the logits are another's where there are any.
        self._own = [k for k in tiling.strides if scores is None or k == tiles.AFFINITY]
        self._kinds = [_LABELS]
        if options.propagation == "both" or scores is not None:
            self._kinds.append(_PLAIN)

    def check_space(self) -> None:
        """Raises UserError if what is kept meanwhile does not fit on the disk."""
        channels = {tiles.LOGITS: len(self._classes.names)}
        if self._predictor.network.offsets is not None:
            channels[tiles.AFFINITY] = len(self._predictor.network.offsets)
        size, folder = self._raster.size, self._options.output
        rows, columns = self._tiling.canvas(size)
        needed = 4 * rows * columns  # labels, twice, in two places
        for kind in self._own:
            stride = self._tiling.strides[kind]
            needed += 4 * channels[kind] * (rows // stride) * (columns // stride)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"an image of {size[0]} x {size[1]} pixels needs {needed / 1e9:.1f} GB in {folder} "
                f"for what the network says of its tiles, and {free / 1e9:.1f} GB are free; give "
                "another --output"
            )

    def infer(self) -> None:
        """Keeps what the network says of every tile."""
        for tile, rows, columns in self._grid(self._tiling.margin, "network"):
            if all(self._store.has(kind, tile) for kind in self._own):
                continue
            raw = self._predictor.infer(self._pixels(rows, columns))
            maps = {tiles.LOGITS: raw.logits, tiles.AFFINITY: raw.affinity_logits}
            for kind in self._own:
                stride, values = self._tiling.strides[kind], maps[kind]
                assert values is not None
                y, x = (
                    slice((s.start - s.first) // stride, (s.stop - s.first) // stride)
                    for s in (rows, columns)
                )
                self._store.write(kind, tile, np.asarray(values[0, y, x]))

    def refine(self) -> None:
        """Keeps the labels of every tile."""
        refined = self._options.propagation != "without"
        for tile, rows, columns in self._grid(self._tiling.halo, "labels"):
            if all(self._store.has(kind, tile) for kind in self._kinds):
                continue
            (height, width), (y, x) = self._within(rows, columns)
            geometry = Geometry((height, width), (height, width), (rows.length, columns.length))
            maps = {kind: self._window(kind, rows, columns) for kind in self._own}
            raw = Raw(geometry, maps.get(tiles.LOGITS), maps.get(tiles.AFFINITY))
            if self._scores is None:
                change = self._predictor.correction(raw) if refined else None
                result = self._predictor.finish(np.empty(0), raw, change)
            else:
                scores, placed = self._foreign(rows, columns, geometry)
                change = self._predictor.correction(raw._replace(logits=placed), finite=False)
                result = self._predictor.finish(
                    np.empty(0), raw._replace(logits=scores), change, own=False
                )
            there = self._there(rows, columns)
            for kind in self._kinds:
                labels = np.where(there, getattr(result, kind)[y, x], IGNORE_LABEL)
                self._store.write(kind, tile, labels.astype(np.uint8))

    def write(self, name: str) -> tuple[int, int]:
        """Joins the labels in files, and draws the whole; how many changed, and how many are."""
        raster, options = self._raster, self._options
        picture = raster.small(_PICTURE) if options.overlays else None
        colours = np.asarray(self._classes.colors, np.uint8)
        for suffix, kind in options.variants.items():
            target = options.output / f"labels{suffix}" / f"{name}.tif"
            small = None if picture is None else np.empty(picture.shape[:2], np.uint8)
            with label_file(target, raster.size, colours, raster.georeference()) as write:
                for tile, rows, columns in self._grid(0):
                    labels = self._store.read(kind, tile)
                    write(rows.start, columns.start, labels)
                    if small is not None:
                        _pick(small, labels, raster.size, (rows, columns))
            if picture is not None and small is not None:
                drawn = contact_sheet.overlay(picture, small, self._classes.colors)
                write_png(options.output / f"overlays{suffix}" / f"{name}.png", drawn)
        changed = pixels = 0
        for tile, *_ in self._grid(0) if _PLAIN in self._kinds else ():
            labels = self._store.read(_LABELS, tile)
            changed += int((labels != self._store.read(_PLAIN, tile)).sum())
            pixels += labels.size
        return changed, pixels

    def _grid(
        self, margin: int, progress: str = ""
    ) -> Iterator[tuple[tuple[int, int], tiles.Span, tiles.Span]]:
        rows, columns = (
            tiles.spans(n, self._tiling.tile, margin)
            for n in self._tiling.canvas(self._raster.size)
        )
        grid = [((i, j), y, x) for i, y in enumerate(rows) for j, x in enumerate(columns)]
        yield from tqdm(grid, desc=progress, unit="tile", disable=not progress)

    def _pixels(self, rows: tiles.Span, columns: tiles.Span) -> np.ndarray:
        """A window of the image; filled beyond it and where it has no data."""
        network = self._predictor.network
        shape = (rows.length, columns.length, network.channels)
        window = blank(shape, network.dtype, network.fill)
        height, width = self._raster.size
        inner = (rows.first, min(rows.last, height)), (columns.first, min(columns.last, width))
        pixels, there = self._raster.read(*inner), self._raster.is_there(*inner)
        part = window[: pixels.shape[0], : pixels.shape[1]]
        part[there] = pixels[there]
        return window

    def _within(
        self, rows: tiles.Span, columns: tiles.Span
    ) -> tuple[tuple[int, int], tuple[slice, slice]]:
        """Height and width of the image in a window, and where the tile lies in it."""
        height, width = (
            min(s.last, n) - s.first
            for s, n in zip((rows, columns), self._raster.size, strict=True)
        )
        y, x = (
            slice(s.start - s.first, min(s.stop, n) - s.first)
            for s, n in zip((rows, columns), self._raster.size, strict=True)
        )
        return (height, width), (y, x)

    def _there(self, rows: tiles.Span, columns: tiles.Span) -> np.ndarray:
        """Where a tile has data."""
        height, width = self._raster.size
        return self._raster.is_there(
            (rows.start, min(rows.stop, height)), (columns.start, min(columns.stop, width))
        )

    def _window(self, kind: str, rows: tiles.Span, columns: tiles.Span) -> jax.Array:
        stride = self._tiling.strides[kind]
        (top, bottom), (left, right) = (
            (s.first // stride, s.last // stride) for s in (rows, columns)
        )
        side = self._tiling.tile // stride
        return jnp.asarray(self._store.window(kind, (top, bottom), (left, right), side))[None]

    def _foreign(
        self, rows: tiles.Span, columns: tiles.Span, geometry: Geometry
    ) -> tuple[jax.Array, jax.Array]:
        """The other network's logits of a window, and placed on the canvas."""
        assert self._scores is not None
        stride = self._scores.stride
        (top, bottom), (left, right) = (
            (s.first // stride, (s.first + n) // stride)
            for s, n in zip((rows, columns), geometry.scaled, strict=True)
        )
        scores = jnp.asarray(self._scores.read((top, bottom), (left, right)))[None]
        if self._tiling.canvas(self._raster.size) == self._raster.size:
            return scores, scores
        # As in a whole image, whose canvas is larger: at the size of the image first.
        full = resize.bilinear_logits(scores, geometry.scaled)
        return scores, foreign.on_canvas(full, geometry.scaled, geometry.canvas)


def _pick(
    small: np.ndarray,
    labels: np.ndarray,
    size: tuple[int, int],
    tile: tuple[tiles.Span, tiles.Span],
) -> None:
    """Takes what a small picture of the whole shows of a tile."""
    places, sources = [], []
    for n, full, span in zip(small.shape, size, tile, strict=True):
        at = (2 * np.arange(n) + 1) * full // (2 * n)
        inside = np.flatnonzero((at >= span.start) & (at < span.stop))
        places.append(inside)
        sources.append(at[inside] - span.start)
    small[np.ix_(*places)] = labels[np.ix_(*sources)]


def _digest(variables: Any) -> str | None:
    """Of all weights; None for an exported network, which has them inside."""
    leaves = jax.tree.leaves(variables)
    if not leaves:
        return None
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
