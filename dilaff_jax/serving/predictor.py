"""A trained network at work: an image of any size in, labels of that size out.

model = dilaff_jax.load("workdirs/camvid")
result = model("street.jpg")
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, overload

import cv2
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dilaff_jax import gate, propagate, resize, visualize
from dilaff_jax.data import bands, contact_sheet, volumes
from dilaff_jax.data.augment import blank
from dilaff_jax.data.class_list import Classes
from dilaff_jax.errors import UserError
from dilaff_jax.interop import hub
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.runtime.refinement import Use
from dilaff_jax.serving import foreign, inputs, volume_slabs
from dilaff_jax.serving.geometry import Geometry, enlarge
from dilaff_jax.serving.inputs import ImageLike, Seen
from dilaff_jax.serving.network import Network, from_run

# Compiled programs that are kept; each belongs to one size of image.
PROGRAMS = 8
# The coarsest stride of any encoder: on multiples of it all grids of a network coincide.
CELL = 32


class Raw(NamedTuple):
    """What the network says of one image, before anything is refined or enlarged.

    logits `[1, h, w, C]` (None without a segmentation) and affinity_logits `[1, h', w', K]` (None
    without a head) cover the geometry's canvas.
    """

    geometry: Geometry
    logits: jax.Array | None
    affinity_logits: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What was found in one image of H x W pixels.

    Attributes:
        image: RGB uint8 `[H, W, 3]`; of bands a picture of them.
        labels: class indices, uint8 `[H, W]`; refined, where the model has an affinity head.
        plain: the same without refinement.
        classes: names and colours.
        offsets: of the affinities, `[K, 2]`, in cells of their grid (row, column); None without.
        affinity_logits: float32 `[h', w', K]` on the affinity head's grid; None without a head, and
            of a volume that is too large for them.
        place: of a volume, where it lies; then maps are `[D, H, W]`, the image its middle slice.
    """

    image: np.ndarray
    labels: np.ndarray
    plain: np.ndarray
    classes: Classes
    offsets: np.ndarray | None
    affinity_logits: np.ndarray | None
    _probs: jax.Array | np.ndarray = dataclasses.field(repr=False)
    place: volumes.Place | None = None

    @functools.cached_property
    def probs(self) -> np.ndarray:
        """Class probabilities, float32 `[H, W, C]`; refined as `labels`."""
        return np.asarray(self._probs)

    @functools.cached_property
    def affinity(self) -> np.ndarray | None:
        """Probability that a pixel and its neighbour are of one class, float32 `[h', w', K]`."""
        logits = self.affinity_logits
        return None if logits is None else np.asarray(jax.nn.sigmoid(logits))

    @functools.cached_property
    def edges(self) -> np.ndarray | None:
        """The strongest class edge at each pixel by dilation, uint8 `[h', w', D]`, 255 certain."""
        if self.affinity_logits is None or self.offsets is None:
            return None
        return np.asarray(
            visualize.edge_strength(jnp.asarray(self.affinity_logits)[None], self.offsets)[0]
        )

    def overlay(self, labels: np.ndarray | None = None) -> np.ndarray:
        """The image with labels (by default these) over it, RGB uint8 `[H, W, 3]`.

        Of a volume its middle slice, see `volumes.middle`.
        """
        shown = self.labels if labels is None else labels
        shown = volumes.middle(shown) if shown.ndim == 3 else shown
        return contact_sheet.overlay(self.image, shown, self.classes.colors)


class Predictor:
    """A network that takes images of any size, one at a time.

    A program is compiled for each new size of image, so that no padding touches a result; the last
    `PROGRAMS` are kept. Where most images differ in size, `pad` lets those of nearly one size share
    a program: the network then sees the margin (as in the padded batches of evaluation), but
    propagation never does. Our choice.

    Args:
        network: what to run.
        pad: 1, or a multiple of 32 to which height and width are padded, with `network.pad_rgb`,
            below and at the right.
        resize: factor by which images are scaled first; None for that of the training.

    Raises:
        UserError: `pad` or `resize` is out of range.
    """

    def __init__(self, network: Network, *, pad: int = 1, resize: float | None = None) -> None:
        if pad != 1 and (pad < 1 or pad % CELL):
            raise UserError(
                f"pad is {pad}; expected 1 for exact sizes, or a multiple of {CELL} such as 64"
            )
        factor = network.resize if resize is None else resize
        if not 0 < factor <= 8:
            raise UserError(f"resize is {factor}; expected a factor above 0, up to 8")
        self.network = network
        self.resize = factor
        self._multiple = max(pad, network.multiple)
        self.operator = propagate.operator(**network.refine)
        self._programs = functools.lru_cache(maxsize=PROGRAMS)(self._compile)

    @property
    def classes(self) -> Classes:
        """Names and colours of the classes."""
        return self.network.classes

    @property
    def has_affinity(self) -> bool:
        """Whether there is an affinity head, and hence refinement."""
        return self.network.offsets is not None

    @overload
    def __call__(self, image: ImageLike, *, refine: bool = True) -> Result: ...

    @overload
    def __call__(
        self, image: list[ImageLike] | tuple[ImageLike, ...], *, refine: bool = True
    ) -> list[Result]: ...

    def __call__(self, image: Any, *, refine: bool = True) -> Result | list[Result]:
        """Segments one image, or each of a list.

        Args:
            image: a file, or RGB uint8 `[H, W, 3]`; of a model of bands, `[H, W, C]` of any numbers
                in the units of the images it was trained on, NaN for no data (255 in the result);
                or a list or tuple of such.
            refine: propagate along the affinities, where there is a head.

        Returns:
            A result; for a list or tuple, a list of results in its order.

        Raises:
            DataError: the file is not a readable image.
            UserError: the array is no such image; the model has no segmentation.
        """
        if not self.network.segmentation:
            raise UserError(
                "this model is an affinity network by itself, without a segmentation; give it that "
                "of another network: .refine(image, logits), --mode refine"
            )
        if isinstance(image, list | tuple):
            return [self(one, refine=refine) for one in image]
        seen = self.read(image)
        network = self.network
        if volume_slabs.are_needed(network, seen.pixels.shape[:-1]) and self.resize == 1:
            labels, plain, probs = volume_slabs.predict(network, seen.pixels, refine=refine)
            about = self.classes, network.offsets, None, probs
            return _where_seen(Result(seen.picture, labels, plain, *about), seen)
        raw = self.infer(seen.pixels)
        change = self.correction(raw) if refine and self.has_affinity else None
        return _where_seen(self.finish(seen.picture, raw, change), seen)

    def read(self, image: ImageLike) -> Seen:
        """The image of a file or an array, as the network takes it; see `inputs.read`."""
        return inputs.read(image, self.network)

    def refine(
        self,
        image: ImageLike,
        logits: Any,
        *,
        channels_first: bool = False,
        align_corners: bool = False,
    ) -> Result:
        """Refines what another network says of an image, along the affinities of this one.

        Args:
            image: as for a call.
            logits: of the other network, `[h, w, C]` of any stride, floating point; NumPy, JAX or
                torch; -inf where a class is never. (Probabilities p: their logarithm.)
            channels_first: they are `[C, h, w]`.
            align_corners: the other network enlarges them with corners aligned.

        Returns:
            The refined result; its `plain` is the other network's.

        Raises:
            DataError: the file is not a readable image.
            UserError: logits that do not fit, or a model without affinities.
        """
        if not self.has_affinity:
            raise UserError("this model has no affinity head, so it cannot refine")
        if self.network.ndim == 3:
            raise UserError(
                "this model is of volumes, of which others' results are not refined from files; "
                "dilaff_jax.propagate.refine_logits takes arrays of three dimensions"
            )
        seen = self.read(image)
        scores = foreign.one_image(logits, channels_first)
        classes = foreign.classes(scores, self.network)
        raw = self.infer(seen.pixels)
        if align_corners:
            size = raw.geometry.original
            scores = resize.bilinear_logits(scores, size, align_corners=True)
        placed = foreign.on_canvas(scores, raw.geometry.scaled, raw.geometry.canvas)
        change = self.correction(raw._replace(logits=placed), finite=False)
        result = self.finish(seen.picture, raw._replace(logits=scores), change, own=False)
        return _where_seen(dataclasses.replace(result, classes=classes), seen)

    def infer(self, image: np.ndarray) -> Raw:
        """Runs the network alone on `Seen.pixels`, `[H, W, C]`."""
        geometry = self.geometry(image.shape[:-1])
        if geometry.scaled != geometry.original:
            if len(geometry.scaled) == 3:
                raise UserError("volumes are not scaled; leave resize at 1, or resample the files")
            rows, columns = geometry.scaled
            image = bands.resized(image, (rows, columns), cv2.INTER_AREA)
        network = self.network
        canvas = blank((*geometry.canvas, network.channels), network.dtype, network.fill)
        canvas[tuple(map(slice, geometry.scaled))] = image
        logits, affinity_logits = self._programs(geometry.canvas)(
            self.network.variables, canvas[None]
        )
        return Raw(geometry, logits, affinity_logits)

    def correction(
        self, raw: Raw, refine: propagate.Operator | None = None, *, finite: bool = True
    ) -> jax.Array:
        """What propagation adds to the logits, `[1, *cells, C]` on the affinities' grid.

        refine: an operator in place of the model's own. finite: see `propagate.refine_logits`.
        """
        assert raw.logits is not None
        assert raw.affinity_logits is not None
        assert self.network.offsets is not None
        return propagate.correction(
            raw.logits,
            raw.affinity_logits,
            self.network.offsets,
            self.operator if refine is None else refine,
            raw.geometry.cells(raw.affinity_logits.shape[1:-1]),
            finite=finite,
        )

    def finish(
        self,
        image: np.ndarray,
        raw: Raw,
        change: jax.Array | None,
        refine: propagate.Operator | None = None,
        *,
        own: bool = True,
    ) -> Result:
        """Enlarges logits and correction to the image, and takes the likeliest class.

        refine: as for `correction`, for its gate. own: the logits cover the canvas, as the
        network's own do; else the image.
        """
        affinity_logits = raw.affinity_logits
        assert raw.logits is not None
        grid = () if affinity_logits is None else affinity_logits.shape[1:-1]
        keep = gate.limits(self.operator if refine is None else refine)
        labels, plain, probs = enlarge(raw.logits, change, keep, raw.geometry, grid, own)
        if affinity_logits is not None:
            affinity_logits = affinity_logits[0, *map(slice, raw.geometry.cells(grid))]
        return Result(
            image=image,
            labels=np.array(labels[0]),
            plain=np.array(plain[0]),
            classes=self.classes,
            offsets=self.network.offsets,
            affinity_logits=None if affinity_logits is None else np.asarray(affinity_logits),
            _probs=probs[0],
        )

    def geometry(self, size: tuple[int, ...]) -> Geometry:
        """How an image of this height and width is scaled and padded."""
        # Rounded as the training data are.
        scaled = [max(1, int(n * self.resize + 0.5)) for n in size]
        least, multiple = self.network.minimum, self._multiple
        canvas = [-(-max(n, least) // multiple) * multiple for n in scaled]
        if self.network.size is not None:
            if any(n > m for n, m in zip(scaled, self.network.size, strict=True)):
                found, made = (" x ".join(map(str, n)) for n in (scaled, self.network.size))
                raise UserError(
                    f"an image is of {found} pixels, and this model was exported for {made}; lower "
                    "resize, or export it for a larger size"
                )
            canvas = list(self.network.size)
        return Geometry(tuple(size), tuple(scaled), tuple(canvas))

    def _compile(self, canvas: tuple[int, ...]) -> Any:
        images = self.network.images(1, *canvas)
        return jax.jit(self.network.apply).lower(self.network.variables, images).compile()


def load(
    path: str | os.PathLike,
    *,
    config: ml_collections.ConfigDict | None = None,
    refine: Mapping[str, Any] | Use = "fitted",
    pad: int = 1,
    resize: float | None = None,
) -> Predictor:
    """Loads the best (else latest) state of a run, or an exported file.

    Args:
        path: a run's workdir, hf://OWNER/NAME of one on the hub, or a file that
            `dilaff_jax.export` wrote.
        config: in place of the workdir's config.json.
        refine: "fitted" for what `--mode fit` wrote, where it did, else the config's; "config" for
            the config's; "none"; or keyword arguments of `propagate.operator`.
        pad: see `Predictor`.
        resize: see `Predictor`.

    Raises:
        FileNotFoundError: there is no such run or file.
        UserError: it is damaged, or of another model than `config`.
    """
    path = hub.local(path, "the run or exported file")
    if path.is_file():
        from dilaff_jax.serving import exported

        network = exported.read(path)
    elif path.is_dir():
        # Arguments of one's own need nothing that was fitted.
        network = from_run(path, config, refine if isinstance(refine, str) else "config")[0]
    else:
        raise FileNotFoundError(f"{path} does not exist; give a run's workdir or an exported file")
    if refine == "none":
        refine = {"name": "identity"}
    if not isinstance(refine, str):
        network = dataclasses.replace(network, refine=dict(refine))
    return Predictor(network, pad=pad, resize=resize)


def _where_seen(result: Result, seen: Seen) -> Result:
    """The result in its place, ignored where the image has no data."""
    if seen.there is not None:
        for labels in (result.labels, result.plain):
            labels[~seen.there] = IGNORE_LABEL
    return dataclasses.replace(result, place=seen.place)
