"""How an image that does not fit into memory is cut, and what is kept of its tiles meanwhile."""

import copy
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import files
from dilaff_jax.serving.network import Network
from dilaff_jax.serving.predictor import CELL, Predictor
from dilaff_jax.serving.reach import reach

LOGITS, AFFINITY = "logits", "affinity"


@dataclasses.dataclass(frozen=True)
class Span:
    """A tile on one axis, in pixels: [start, stop), and the window around it that is read."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def length(self) -> int:
        """Of the window."""
        return self.last - self.first


def spans(size: int, tile: int, margin: int) -> list[Span]:
    """The tiles of an axis. Windows are of one length, and moved inwards at the ends of the axis.

    Args:
        size: of the axis.
        tile: of a tile; the last may be shorter.
        margin: least number of pixels that a window has around its tile, unless the axis ends.
    """
    length = min(size, tile + 2 * margin)
    result = []
    for start in range(0, size, tile):
        first = min(max(start - margin, 0), size - length)
        result.append(Span(start, min(start + tile, size), first, first + length))
    return result


class Store:
    """Maps of tiles in a folder, a file for each; a file is whole or not there.

    Args:
        folder: made where it does not exist, and emptied where it is of something else.
        key: says what the maps are of; None where nobody can say, and nothing is taken up again.
    """

    def __init__(self, folder: pathlib.Path, key: Mapping[str, Any] | None) -> None:
        self.folder = folder
        text = None if key is None else json.dumps(key, sort_keys=True)
        note = folder / "key.json"
        if folder.exists() and (text is None or not note.exists() or note.read_text() != text):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if text is not None:
            files.write_text(note, text)

    def has(self, kind: str, tile: tuple[int, int]) -> bool:
        """Whether a map is there."""
        return self._path(kind, tile).exists()

    def write(self, kind: str, tile: tuple[int, int], values: np.ndarray) -> None:
        """Keeps a map, `[h, w, ...]`."""
        with files.replacing(self._path(kind, tile)) as part, part.open("wb") as file:
            np.save(file, values)

    def read(self, kind: str, tile: tuple[int, int]) -> np.ndarray:
        """A map, whose parts are read as they are used."""
        return np.load(self._path(kind, tile), mmap_mode="r", allow_pickle=False)

    def window(
        self, kind: str, rows: tuple[int, int], columns: tuple[int, int], side: int
    ) -> np.ndarray:
        """What the maps, each of side x side cells, hold of these cells together: `[h, w, C]`."""
        bands = []
        for i in range(rows[0] // side, -(-rows[1] // side)):
            parts = [
                self.read(kind, (i, j))[_within(rows, i * side), _within(columns, j * side)]
                for j in range(columns[0] // side, -(-columns[1] // side))
            ]
            bands.append(np.concatenate(parts, axis=1))
        return np.concatenate(bands)

    def remove(self) -> None:
        """Takes all of it away."""
        shutil.rmtree(self.folder)

    def _path(self, kind: str, tile: tuple[int, int]) -> pathlib.Path:
        return self.folder / f"{kind}-{tile[0]}-{tile[1]}.npy"


def _within(wanted: tuple[int, int], start: int) -> slice:
    """What of a map that starts there is wanted."""
    return slice(max(wanted[0] - start, 0), wanted[1] - start)


class Tiling:
    """How images are cut for a network, in pixels.

    Args:
        predictor: the network and its refinement.
        tile: side of a tile; rounded up to what the strides of the network divide.
        margin: of what the network sees around a tile; likewise.

    Attributes:
        unit: what all strides divide.
        strides: of the network's maps, by kind.

    Raises:
        UserError: a network that cannot be run on tiles, or a tile or margin out of range.
    """

    def __init__(self, predictor: Predictor, tile: int, margin: int) -> None:
        network = predictor.network
        if predictor.resize != 1:
            raise UserError(
                f"this model scales images by {predictor.resize:g} first, which tiles cannot be; "
                "scale the image itself (gdal_translate -outsize) and give --resize=1"
            )
        if tile < 1 or margin < 0:
            raise UserError(f"tile is {tile}, tile_margin {margin}; expected at least 1 and 0")
        self.strides = _strides(network)
        self.unit = math.lcm(CELL, network.multiple, *self.strides.values())
        self.tile, self.margin = (-(-n // self.unit) * self.unit for n in (tile, margin))
        largest = min(network.size) if network.size else None
        if largest is not None and self.tile + 2 * self.margin > largest:
            raise UserError(
                f"tiles of {self.tile} with {self.margin} around them are larger than the "
                f"{largest} for which this model was exported; lower --tile or --tile_margin"
            )
        self._cells = 0
        if predictor.has_affinity and network.offsets is not None:
            self._cells = reach(network.refine, network.offsets)

    @property
    def halo(self) -> int:
        """Margin that labels need, of what the maps say."""
        # A cell of each map on either side, between which is interpolated twice.
        pixels = 2 * max(self.strides.values())
        pixels += self._cells * self.strides.get(AFFINITY, 0)
        return -(-pixels // self.unit) * self.unit

    def with_logits_of(self, stride: int) -> "Tiling":
        """The same, where logits come from elsewhere, at another stride.

        Raises:
            UserError: tiles are not of whole cells of that stride.
        """
        if self.unit % stride:
            raise UserError(
                f"a value of the results stands for {stride} x {stride} pixels, and tiles are of "
                f"multiples of {self.unit}; enlarge the results to the image"
            )
        changed = copy.copy(self)
        changed.strides = self.strides | {LOGITS: stride}
        return changed

    def canvas(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the grid that covers an image."""
        rows, columns = (-(-n // self.unit) * self.unit for n in size)
        return rows, columns


def _strides(network: Network) -> dict[str, int]:
    # Of 14 and of all powers of two up to 64, so that it is a whole number of any stride.
    height, width = network.size or (448, 448)
    image = network.images(1, height, width)
    maps = dict(zip((LOGITS, AFFINITY), jax.eval_shape(network.apply, network.variables, image)))  # noqa: B905
    strides = {}
    for kind, shape in maps.items():
        if shape is None:
            continue
        rows, columns = shape.shape[1:3]
        if height % rows or height // rows != width / columns:
            raise UserError(
                f"the network's {kind} are of {rows} x {columns} cells for an image of {height} x "
                f"{width}; in tiles a cell has to be a whole number of pixels"
            )
        strides[kind] = height // rows
    return strides
