"""A trained network as what runs and exported files have in common: images in, logits out."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import ml_collections
import numpy as np

from dilaff_jax.data import augment, bands, data_config, volumes
from dilaff_jax.data.bands import Bands
from dilaff_jax.data.class_list import Classes, read_classes
from dilaff_jax.errors import UserError
from dilaff_jax.models import segmenter, test_time
from dilaff_jax.runtime import checkpoint
from dilaff_jax.runtime import refinement as refinement_lib

# (variables, images [B, H, W, 3]) to logits [B, h, w, C] and affinity logits [B, h', w', K]; None
# for what the network has not.
Apply: TypeAlias = Callable[[Any, jax.Array], tuple[jax.Array | None, jax.Array | None]]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """How a network goes over a volume that is larger than what it sees at once.

    Attributes:
        apply: `(variables, volumes)` of a window's size to logits and affinity logits.
        size: of a window, three sides.
        stride: as a share of it.
    """

    apply: Apply
    size: tuple[int, ...]
    stride: float


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A function from images to logits, and what must be known to use it.

    Attributes:
        apply: `(variables, images)` to logits and affinity logits, each at its own stride.
        variables: of the network; () where `apply` holds them.
        offsets: of the affinity channels, `[K, 2]`; None without such a head.
        classes: names and colours.
        refine: keyword arguments of `propagate.operator`.
        segmentation: whether there are logits; else it refines those of others alone.
        resize: factor by which images are scaled (by area) before the network sees them.
        pad_rgb: what fills an image outside its content, in [0, 255].
        multiple: of which height and width must be; 1 for any size.
        minimum: the least height and width.
        size: the only (height, width), or sides of volumes, that it takes; None for others too.
        bands: of images that are not RGB of 8 bits but float32 of these; None for RGB.
        ndim: spatial dimensions, 2 of images, 3 of volumes.
        normalise: of volumes, see `volumes.normalised`.
        windows: of volumes that are larger than what is seen at once; None where a volume is always
            seen whole, at several scales or mirrored, or the affinities are not of its size.
    """

    apply: Apply
    variables: Any
    offsets: np.ndarray | None
    classes: Classes
    refine: Mapping[str, Any]
    segmentation: bool = True
    resize: float = 1.0
    pad_rgb: tuple[int, ...] = (124, 116, 104)
    multiple: int = 1
    minimum: int = 1
    size: tuple[int, ...] | None = None
    bands: Bands | None = None
    ndim: int = 2
    normalise: volumes.Normalisation = "none"
    windows: Windows | None = None

    @property
    def channels(self) -> int:
        """Of images."""
        return 3 if self.bands is None else self.bands.count

    @property
    def dtype(self) -> np.dtype:
        """Of images."""
        return np.dtype(np.uint8 if self.bands is None else np.float32)

    @property
    def fill(self) -> tuple[float, ...]:
        """What an image has outside its content, `[C]`."""
        return augment.padding(self.pad_rgb, self.bands)

    def classes_for(self, count: int) -> Classes:
        """Those of another network's results of `count` classes: its own, or numbered ones."""
        own = count == len(self.classes.names)
        return self.classes if own else Classes.numbered(count)

    def images(self, *shape: int) -> jax.ShapeDtypeStruct:
        """A batch of images of (batch, *spatial)."""
        return jax.ShapeDtypeStruct((*shape, self.channels), self.dtype)


def from_run(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict | None = None,
    refinement: refinement_lib.Use = "fitted",
) -> tuple[Network, segmenter.Segmenter, int]:
    """Returns the network of a run's best (else latest) state, its model, and the step.

    Args:
        workdir: of the run.
        config: None for the one the run was made with, WORKDIR/config.json.
        refinement: which is used, see `runtime.refinement.chosen`.

    Raises:
        FileNotFoundError: `workdir` holds no run.
        UserError: the config is of another model than the checkpoint.
    """
    config = read_config(workdir) if config is None else _of_same_bands(config, workdir)
    test_time.check(config.inference)
    classes = classes_of(workdir, config)
    model = segmenter.build(segmenter.config_of_run(config), len(classes.names))
    like = segmenter.abstract_variables(model, config.data.crop_size)
    step, variables = checkpoint.read_variables(workdir, like)

    def apply(variables: Any, images: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        def network(x: jax.Array) -> Mapping[str, Any]:
            return model.apply(variables, x, train=False)  # type: ignore[return-value]

        return test_time.infer(network, images, model.offsets, config.inference)

    network = Network(
        apply,
        variables,
        model.offsets,
        classes,
        refinement_lib.chosen(workdir, config.refine, step, refinement),
        model.segmentation,
        config.data.resize,
        tuple(config.data.pad_rgb),
        bands=_bands(config, model),
        ndim=model.encoder.style.ndim,
        normalise=config.data.get("normalise", "none"),
        windows=_windows(config.inference, model),
    )
    return network, model, step


def _windows(config: ml_collections.ConfigDict, model: segmenter.Segmenter) -> Windows | None:
    head: Any = model.affinity_head
    whole = config.window is None or config.flip or tuple(config.scales) != (1.0,)
    if whole or model.encoder.style.ndim != 3 or head is None or head.stride != 1:
        return None

    def apply(variables: Any, volumes: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        outputs: Any = model.apply(variables, volumes, train=False)
        return outputs["logits"], outputs["affinity_logits"]

    return Windows(apply, tuple(config.window), config.stride)


def _of_same_bands(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> ml_collections.ConfigDict:
    """The config with the bands that the run in `workdir` found in its data set."""
    if config.data.get("bands", 0) or not (workdir / "config.json").is_file():
        return config
    trained = read_config(workdir)
    if not trained.data.get("bands", 0):
        return config
    options = trained.model.encoder_options
    return bands.with_bands(config, options.mean, options.std, trained.model.get("ndim", 2))


def _bands(config: ml_collections.ConfigDict, model: segmenter.Segmenter) -> Bands | None:
    if not config.data.get("bands", 0):  # as in runs of before there were any
        return None
    encoder: Any = model.encoder
    return Bands.of(encoder.mean, encoder.std, config.data.shown_bands)


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The config that a run was made with; keys of `data` that are newer are at their default.

    Raises:
        FileNotFoundError: `workdir` holds no config.json.
        UserError: it is damaged.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} is no run: {path} does not exist; give the --workdir of a training, or "
            "the --config it was made with"
        )
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise UserError(f"it holds a {type(content).__name__}")
    except ValueError as e:
        raise UserError(
            f"{path} is damaged: {e}; train on in its folder, which rewrites it, or give --config"
        ) from e
    config = ml_collections.ConfigDict(_tuples(content))
    if "data" in config:
        config.data = data_config.with_defaults(config.data)
    return config


def classes_of(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Classes:
    """Names and colours of a run's classes: WORKDIR/classes.json, else those of its data set.

    Raises:
        UserError: neither is there.
    """
    classes = read_classes(workdir)
    if classes is not None:
        return classes
    from dilaff_jax.data import datasets  # only runs without classes.json need it

    source = datasets.load(config.data, config.data.eval_split)
    return Classes(source.class_names, source.colors)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that the config had."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
