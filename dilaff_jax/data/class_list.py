"""Names and colours of the classes that a network tells apart: what outlives its data set."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import files

_FILE = "classes.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
    """Names and RGB colours of C classes.

    Attributes:
        names: C names.
        colors: uint8 `[C, 3]`.
    """

    names: tuple[str, ...]
    colors: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return {"names": list(self.names), "colors": self.colors.tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Classes":
        """From what `to_json` gave. Raises UserError if names and colours do not match."""
        names: Sequence[str] = content.get("names", ())
        colors = np.array(content.get("colors", ()))
        if colors.size and colors.dtype.kind not in "iu":
            raise UserError(f"colours of type {colors.dtype}; expected whole numbers, 0 to 255")
        if not names or colors.shape != (len(names), 3) or colors.min() < 0 or colors.max() > 255:
            raise UserError(
                f"{len(names)} class names and colours of shape {colors.shape}; expected as many "
                "RGB colours, 0 to 255, as names"
            )
        return cls(tuple(map(str, names)), colors.astype(np.uint8))

    @classmethod
    def numbered(cls, count: int) -> "Classes":
        """Of classes that nobody has named: their indices, in the colours of PASCAL VOC."""
        return cls(tuple(map(str, range(count))), np.array(colormap(count), np.uint8))

    def write(self, folder: pathlib.Path) -> None:
        """Writes FOLDER/classes.json."""
        files.write_text(folder / _FILE, json.dumps(self.to_json(), indent=1) + "\n")


def colormap(count: int) -> tuple[tuple[int, int, int], ...]:
    """The PASCAL VOC colour map: class index bits spread over the channels, [count] × RGB."""
    colors = []
    for index in range(count):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colors.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colors)


def read_classes(folder: pathlib.Path) -> Classes | None:
    """What `Classes.write` left in `folder`, or None. Raises UserError if it is damaged."""
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        return Classes.from_json(json.loads(path.read_text()))
    except (ValueError, AttributeError) as e:
        raise UserError(f"{path} is damaged: {e}; train on in its folder, which rewrites it") from e
