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
    """RGB uint8 `[H, W, 3]`, labels uint8 `[H, W]` if they are known, what the network takes.

    Of a volume the middle slice, labels `[D, H, W]`, and the size of a voxel along each axis.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray | None
    pixels: np.ndarray
    spacing: Sequence[float] = (1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sliders: which picture, operator and its options, what is shown and how strongly.

    Attributes:
        bias: added to `fitted`, what was fitted for each dilation, where something was.
        others: options of the run's own operator that have no slider.
        axis: of a volume, across which its slice is shown.
        position: of that slice along it, from 0 to 1.
    """

    index: int = 0
    operator: str = "signed"
    steps: int = 5
    strength: float = 0.1
    sharpness: float = 1.0
    bias: float = 0.0
    fitted: tuple[float, ...] = ()
    others: tuple[str, tuple[tuple[str, Any], ...]] = ("", ())
    axis: int = 2
    position: float = 0.5
    layer: str = "after"
    opacity: float = 0.5

    def refinement(self) -> dict[str, Any]:
        """Keyword arguments of `propagate.operator`."""
        if self.operator == "identity":
            return {"name": "identity"}
        option = "strength" if self.operator == "signed" else "sharpness"
        own, others = self.others
        return {
            "name": self.operator,
            "steps": self.steps,
            "bias": [b + self.bias for b in self.fitted] if self.fitted else self.bias,
            option: getattr(self, option),
            **(dict(others) if own == self.operator else {}),
        }


class Weight(NamedTuple):
    """A neighbour of a cell: its offset, where its centre lies, and a = sigmoid(logit - bias).

    x, y: in pixels. size: of a cell, pixels. step: where it is shown, rows and columns in -1, 0, 1.
    """

    offset: tuple[int, ...]
    x: float
    y: float
    size: float
    affinity: float
    dilation: int
    step: tuple[int, int]


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
        # So that another slice or layer of a result does not propagate anew.
        self._refined = functools.lru_cache(maxsize=2)(self._refine)

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
        if np.ndim(refine.get("bias", 0.0)):
            given["fitted"] = tuple(map(float, np.asarray(refine["bias"])))
        others = tuple(
            # Results are kept by their settings, so these have to be hashable.
            (k, tuple(v) if np.ndim(v) else v)
            for k, v in refine.items()
            if k not in known | {"name"}
        )
        return dataclasses.replace(
            settings, operator=refine["name"], others=(refine["name"], others), **given
        )

    def result(self, settings: Settings) -> Result:
        """The segmentation under these settings."""
        # What is shown of a result does not change it.
        return self._refined(dataclasses.replace(settings, layer="", opacity=0, axis=0, position=0))

    def _refine(self, settings: Settings) -> Result:
        picture, raw = self._seen(settings.index)
        change, refine = None, propagate.operator(**settings.refinement())
        if self.predictor.has_affinity:
            change = self.predictor.correction(raw, refine)
        return self.predictor.finish(picture.image, raw, change, refine)

    def render(self, settings: Settings) -> tuple[np.ndarray, str]:
        """The layer as RGB uint8 `[H, W, 3]`, and a line of figures."""
        picture = self._seen(settings.index)[0]
        result = self.result(settings)
        return self._layer(settings, picture, result), figures(result, picture.truth)

    def weights(self, settings: Settings, x: float, y: float) -> list[Weight]:
        """The neighbours, inside the image, of the affinity cell that holds pixel (x, y)."""
        raw = self._seen(settings.index)[1]
        offsets, affinity_logits = self.predictor.network.offsets, raw.affinity_logits
        if offsets is None or affinity_logits is None:
            return []
        grid = raw.geometry.cells(affinity_logits.shape[1:-1])
        # Of a volume the cells of the slice: where each stands, laid out as the slice is.
        cells = self._shown(np.moveaxis(np.indices(grid), 0, -1), settings)
        size = [n / m for n, m in zip(self._size(settings), cells.shape[:2], strict=True)]
        row, column = int(y // size[0]), int(x // size[1])
        if not (0 <= row < cells.shape[0] and 0 <= column < cells.shape[1]):
            return []
        own = cells[row, column]
        near = (np.abs(cells - own) <= np.abs(offsets).max()).all(axis=-1)
        places = {tuple(cells[i, j].tolist()): (i, j) for i, j in np.argwhere(near).tolist()}
        bias = propagate.per_offset(settings.refinement().get("bias", 0.0), offsets)
        a = np.asarray(jax.nn.sigmoid(affinity_logits[(0, *own)] - bias))
        found = []
        for offset, d, w in zip(
            offsets.tolist(), affinity.dilation_of(offsets).tolist(), a, strict=True
        ):
            place = places.get(tuple((own + offset).tolist()))
            if place is None:  # outside the image, or in another slice
                continue
            x_there, y_there = (place[1] + 0.5) * size[1], (place[0] + 0.5) * size[0]
            step = int(np.sign(place[0] - row)), int(np.sign(place[1] - column))
            found.append(Weight(tuple(offset), x_there, y_there, min(size), float(w), d, step))
        return found

    def _infer(self, picture: Picture) -> tuple[Picture, Raw]:
        return picture, self.predictor.infer(picture.pixels)

    def _layer(self, settings: Settings, picture: Picture, result: Result) -> np.ndarray:
        drawn = self._drawn(settings, picture, result)
        size = self._size(settings)[::-1]
        return cv2.resize(drawn, size, interpolation=cv2.INTER_NEAREST)

    def _drawn(self, settings: Settings, picture: Picture, result: Result) -> np.ndarray:
        """The layer, a pixel for each pixel or voxel."""
        layer, colors = settings.layer, result.classes.colors
        image, truth = picture.image, picture.truth
        if self.is_of_volumes:
            bands = self.predictor.network.bands
            assert bands is not None
            image = bands.picture(self._shown(picture.pixels, settings))
        if truth is not None:
            truth = self._shown(truth, settings)
        plain, labels = (self._shown(x, settings) for x in (result.plain, result.labels))
        if layer.startswith("edges"):
            assert result.edges is not None
            channel = [x for x in self.layers if x.startswith("edges")].index(layer)
            edges = self._shown(result.edges[..., channel], settings)
            grey = cv2.resize(edges, labels.shape[::-1], interpolation=cv2.INTER_NEAREST)
            return np.repeat(grey[..., None], 3, axis=-1)
        if layer == "changes":
            return visualize.paint_changes(image, truth, plain, labels)
        shown = {"truth": truth, "before": plain, "after": labels}.get(layer)
        if shown is None:
            return image
        painted = contact_sheet.paint(shown, colors)
        return cv2.addWeighted(image, 1 - settings.opacity, painted, settings.opacity, 0)

    @property
    def is_of_volumes(self) -> bool:
        """Whether slices are shown."""
        return self.predictor.network.ndim == 3

    def _shown(self, x: np.ndarray, settings: Settings) -> np.ndarray:
        """What is shown of `[*spatial, ...]`: of a volume a slice, upright, as `volumes.middle`."""
        if not self.is_of_volumes:
            return x
        last = x.shape[settings.axis] - 1
        index = min(int(settings.position * (last + 1)), last)
        return np.ascontiguousarray(np.rot90(np.take(x, index, axis=settings.axis)))

    def _size(self, settings: Settings) -> tuple[int, int]:
        """Height and width at which a picture is shown, so that lengths are as they are."""
        picture = self._seen(settings.index)[0]
        sides = picture.pixels.shape[:-1]
        if not self.is_of_volumes:
            return sides[0], sides[1]
        # A slice is turned, so that its rows are the second of the axes that are left.
        left = [a for a in range(3) if a != settings.axis][::-1]
        least = min(picture.spacing[a] for a in left)
        rows, columns = (round(sides[a] * picture.spacing[a] / least) for a in left)
        return rows, columns


def figures(result: Result, truth: np.ndarray | None) -> str:
    """Shares of pixels: changed, and right before and after."""
    text = f"{np.mean(result.labels != result.plain):.1%} of the pixels changed"
    known = None if truth is None else truth != IGNORE_LABEL
    if truth is None or known is None or not known.any():
        return text
    before, after = (np.mean(x[known] == truth[known]) for x in (result.plain, result.labels))
    return f"{text}; right before {before:.1%}, after {after:.1%}"
