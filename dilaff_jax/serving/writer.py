"""The files that prediction writes; `predict_files` says which is where."""

import concurrent.futures
import dataclasses
import pathlib
from collections import deque
from types import TracebackType
from typing import Literal, Self, TypeAlias

import cv2
import numpy as np

from dilaff_jax import affinity, visualize
from dilaff_jax.data import contact_sheet, images, volumes
from dilaff_jax.data.class_list import Classes
from dilaff_jax.runtime import files
from dilaff_jax.serving.predictor import Result

Propagation: TypeAlias = Literal["with", "without", "both"]

# Images whose files are still being written while the network is busy with later ones.
_PENDING = 4
_PANEL = 480


@dataclasses.dataclass(frozen=True)
class Options:
    """What is found, and what of it is written.

    Attributes:
        output: folder.
        propagation: "with", "without", "both"; None for "with" where there is an affinity head.
        overlays: write them.
        probs: write them.
        edges: write them.
        temporal: propagate videos in time too, see `clips`.
        chunk: frames of a video that are propagated at a time.
        tile: side of the tiles that images are cut into; 0 for whole images.
        margin: pixels around a tile that the network sees.
    """

    output: pathlib.Path
    propagation: Propagation | None = None
    overlays: bool = True
    probs: bool = False
    edges: bool = False
    temporal: bool = False
    chunk: int = 8
    tile: int = 0
    margin: int = 256

    @property
    def variants(self) -> dict[str, str]:
        """{what is appended to a folder's name: the field of a Result}."""
        plain = {"_plain": "plain"} if self.propagation == "both" else {}
        return {"": "labels", **plain}

    def folders(self) -> list[pathlib.Path]:
        """Every folder that is written to."""
        kinds = ["labels", *["overlays"] * self.overlays]
        names = [kind + suffix for kind in kinds for suffix in self.variants]
        names += ["probs"] * self.probs + ["edges"] * self.edges + ["tiles"] * bool(self.tile)
        return [self.output / name for name in names]


class Writer:
    """Writes the files of results, in threads, while the caller goes on.

    A file has its name only once it is whole.

    Args:
        options: what to write, and where.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._pool = concurrent.futures.ThreadPoolExecutor(2)
        self._pending: deque[concurrent.futures.Future[None]] = deque()

    def put(self, name: str, result: Result, overlays: bool = True) -> None:
        """Starts writing a result under this name; raises what an earlier one failed with.

        overlays: False where they go elsewhere.
        """
        self._pending.append(self._pool.submit(self._write, name, result, overlays))
        while len(self._pending) > _PENDING:
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        while self._pending and kind is None:
            self._pending.popleft().result()

    def _write(self, name: str, result: Result, overlays: bool) -> None:
        options = self._options
        for suffix, field in options.variants.items():
            labels = getattr(result, field)
            if result.place is None:
                write_png(options.output / f"labels{suffix}" / f"{name}.png", labels)
            else:
                folder = options.output / f"labels{suffix}"
                volumes.save_label(folder, name, labels, result.place)
            if options.overlays and overlays:
                picture = result.overlay(labels)
                write_png(options.output / f"overlays{suffix}" / f"{name}.png", picture)
        if options.probs:
            write_probs(options.output / "probs" / f"{name}.npz", result)
        if options.edges:
            write_png(options.output / "edges" / f"{name}.png", edge_panels(result))


def write_png(path: pathlib.Path, picture: np.ndarray) -> None:
    """Writes a label map or an RGB picture."""
    with files.replacing(path) as part:
        part.write_bytes(images.encode_png(picture))


def write_probs(path: pathlib.Path, result: Result) -> None:
    """Writes `probs`, float16 `[H, W, C]`, and `class_names`; numpy.load reads it unpickled."""
    with files.replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            probs=result.probs.astype(np.float16),
            class_names=np.array(result.classes.names),
        )


def write_classes(folder: pathlib.Path, classes: Classes) -> None:
    """Writes classes.json and legend.png."""
    classes.write(folder)
    least = 12 + 8 * (6 + max(map(len, classes.names)))
    write_png(
        folder / "legend.png",
        contact_sheet.legend(classes.names, classes.colors, max(480, least)),
    )


def edge_panels(result: Result) -> np.ndarray:
    """The class edges of each dilation as a titled panel, side by side: RGB uint8 `[h, w, 3]`."""
    assert result.edges is not None
    assert result.offsets is not None
    height, width = result.labels.shape
    factor = min(1.0, _PANEL / width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    panels = []
    for channel, dilation in enumerate(affinity.distinct_dilations(result.offsets)):
        grey = cv2.resize(result.edges[..., channel], size, interpolation=cv2.INTER_NEAREST)
        picture = np.repeat(grey[..., None], 3, axis=-1)
        panels.append(visualize.captioned(f"class edges, dilation {dilation}", picture))
    return np.concatenate(panels, axis=1)
