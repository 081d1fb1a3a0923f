"""What the page of `view` shows, without the page: layers of an image, weights of a pixel."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np

from dilaff_jax import affinity, propagate, visualize
from dilaff_jax.data import contact_sheet
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.serving.predictor import Predictor, Raw, Result


class Picture(NamedTuple):
    """RGB uint8 `[H, W, 3]`, labels uint8 `[H, W]` if they are known, what the network takes."""

    name: str
    image: np.ndarray
    truth: np.ndarray | None
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sliders: which picture, operator and its options, what is shown and how strongly."""

    index: int = 0
    operator: str = "signed"
    steps: int = 5
    strength: float = 0.1
    sharpness: float = 1.0
    bias: float = 0.0
    layer: str = "after"
    opacity: float = 0.5

    def refinement(self) -> dict[str, Any]:
        """Keyword arguments of `propagate.operator`."""
        if self.operator == "identity":
            return {"name": "identity"}
        option = "strength" if self.operator == "signed" else "sharpness"
        return {
            "name": self.operator,
            "steps": self.steps,
            "bias": self.bias,
            option: getattr(self, option),
        }


class Weight(NamedTuple):
    """A neighbour of a cell: its offset, where its centre lies, and a = sigmoid(logit - bias).

    x, y: in pixels. size: of a cell, pixels.
    """

    offset: tuple[int, int]
    x: float
    y: float
    size: float
    affinity: float


class Viewer:
    """Pictures and what a model says of them; the network runs once a picture.

    Args:
        predictor: the model.
        names: of the pictures.
        open_picture: gives the picture of an index.
    """

    def __init__(
        self, predictor: Predictor, names: Sequence[str], open_picture: Callable[[int], Picture]
    ) -> None:
        self.predictor, self.names = predictor, list(names)
        self._seen = functools.lru_cache(maxsize=8)(lambda index: self._infer(open_picture(index)))

    @property
    def layers(self) -> list[str]:
        """Names of what can be shown."""
        layers = ["image", "truth", "before"]
        if self.predictor.network.offsets is None:
            return layers
        dilations = affinity.distinct_dilations(self.predictor.network.offsets)
        return [*layers, "after", "changes", *(f"edges, dilation {d}" for d in dilations)]

    def initial(self) -> Settings:
        """The settings that the model was trained for."""
        settings = Settings(layer="after" if self.predictor.has_affinity else "before")
        refine = self.predictor.network.refine
        known = {f.name for f in dataclasses.fields(Settings)}
        given = {k: v for k, v in refine.items() if k in known and np.ndim(v) == 0}
        return dataclasses.replace(settings, operator=refine["name"], **given)

    def result(self, settings: Settings) -> Result:
        """The segmentation under these settings."""
        picture, raw = self._seen(settings.index)
        change = None
        if self.predictor.has_affinity:
            change = self.predictor.correction(raw, propagate.operator(**settings.refinement()))
        return self.predictor.finish(picture.image, raw, change)

    def render(self, settings: Settings) -> tuple[np.ndarray, str]:
        """The layer as RGB uint8 `[H, W, 3]`, and a line of figures."""
        picture = self._seen(settings.index)[0]
        result = self.result(settings)
        return self._layer(settings, picture, result), figures(result, picture.truth)

    def weights(self, settings: Settings, x: float, y: float) -> list[Weight]:
        """The neighbours, inside the image, of the affinity cell that holds pixel (x, y)."""
        picture, raw = self._seen(settings.index)
        offsets, affinity_logits = self.predictor.network.offsets, raw.affinity_logits
        if offsets is None or affinity_logits is None:
            return []
        grid = raw.geometry.cells(affinity_logits.shape[1:3])
        cell = [picture.image.shape[i] / grid[i] for i in (0, 1)]
        row, column = int(y // cell[0]), int(x // cell[1])
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            return []
        a = np.asarray(jax.nn.sigmoid(affinity_logits[0, row, column] - settings.bias))
        return [
            Weight(
                (int(v), int(u)),
                (column + u + 0.5) * cell[1],
                (row + v + 0.5) * cell[0],
                min(cell),
                float(w),
            )
            for (v, u), w in zip(offsets, a, strict=True)
            if 0 <= row + v < grid[0] and 0 <= column + u < grid[1]
        ]

    def _infer(self, picture: Picture) -> tuple[Picture, Raw]:
        return picture, self.predictor.infer(picture.pixels)

    def _layer(self, settings: Settings, picture: Picture, result: Result) -> np.ndarray:
        layer, colors = settings.layer, result.classes.colors
        if layer.startswith("edges"):
            assert result.edges is not None
            channel = [x for x in self.layers if x.startswith("edges")].index(layer)
            size = result.labels.shape[::-1]
            grey = cv2.resize(result.edges[..., channel], size, interpolation=cv2.INTER_NEAREST)
            return np.repeat(grey[..., None], 3, axis=-1)
        if layer == "changes":
            return visualize.paint_changes(result.image, picture.truth, result.plain, result.labels)
        maps = {"truth": picture.truth, "before": result.plain, "after": result.labels}
        labels = maps.get(layer)
        if labels is None:
            return picture.image
        painted = contact_sheet.paint(labels, colors)
        return cv2.addWeighted(picture.image, 1 - settings.opacity, painted, settings.opacity, 0)


def figures(result: Result, truth: np.ndarray | None) -> str:
    """Shares of pixels: changed, and right before and after."""
    text = f"{np.mean(result.labels != result.plain):.1%} of the pixels changed"
    known = None if truth is None else truth != IGNORE_LABEL
    if truth is None or known is None or not known.any():
        return text
    before, after = (np.mean(x[known] == truth[known]) for x in (result.plain, result.labels))
    return f"{text}; right before {before:.1%}, after {after:.1%}"
