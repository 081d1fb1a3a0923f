"""What a fresh run starts from: another run, a file of weights, or chance."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dilaff_jax import references, schema
from dilaff_jax.data.datasets import Source
from dilaff_jax.errors import UserError
from dilaff_jax.interop import hub
from dilaff_jax.models.frozen import Frozen
from dilaff_jax.models.segmenter import Segmenter
from dilaff_jax.runtime import checkpoint, files
from dilaff_jax.schema import Key
from dilaff_jax.step import TrainState, TrainStep, seed_of
from dilaff_jax.storage import bucket, mirror

# Images on which the BatchNorm of folded weights is calibrated.
CALIBRATION_IMAGES = 32


# At most one of workdir, model and encoder may be given.
KEYS: schema.Section = {
    "workdir": Key(
        "",
        schema.TEXT,
        "Another run, or hf://OWNER/NAME, whose best (else latest) weights are taken.",
    ),
    "model": Key(
        "", schema.TEXT, "File of a whole network, in torch's layout, or hf://OWNER/NAME."
    ),
    "encoder": Key(
        "",
        schema.TEXT,
        "File of an ImageNet classification network or of a pretrained transformer (`.pth`, "
        "`.bin`, `.safetensors`, `.npz`), hf://OWNER/NAME, or `module:function` of a package that "
        "returns its path.",
    ),
    "entry": Key("", schema.TEXT, "Key in the file that holds the weights."),
    "folded": Key(
        False,
        schema.SWITCH,
        "The file's BatchNorm is folded into its convolutions; where it is not frozen, it is "
        "calibrated on training images.",
    ),
    "drop": Key(
        (),
        schema.PATTERNS,
        "Patterns of names in the file, or of the other run, that are not used.",
    ),
    "keep": Key(
        (),
        schema.PATTERNS,
        "Patterns of names that stay as initialised. Another number of classes, from a run: "
        "`drop=keep=('decoder/logits/*',)`.",
    ),
}


def fresh(
    config: ml_collections.ConfigDict,
    train_step: TrainStep,
    model: Segmenter,
    source: Source,
    image_shape: tuple[int, ...],
) -> TrainState:
    """Returns the state at step 0, with the weights that `config.init` names.

    Raises:
        UserError: more than one origin is given, or the weights do not fit the model.
        FileNotFoundError: a file or run does not exist.
    """
    init = config.init
    given = [name for name in ("workdir", "model", "encoder") if init[name]]
    if len(given) > 1:
        raise UserError(f"config.init has {' and '.join(given)}; give one of them")
    state = jax.jit(train_step.init, static_argnums=0)(image_shape, seed_of(config))
    variables: dict[str, Any] = {"params": state.params, "batch_stats": state.batch_stats}
    if not given:
        return state
    if init.workdir:
        _, variables = checkpoint.read_variables(
            hub.local(init.workdir, "config.init.workdir"),
            variables,
            drop=init.drop,
            keep=init.keep,
        )
    else:
        variables = _from_file(config, model, variables, source)
    # A copy each: restored arrays may share memory, and the state's is given away in every step.
    fresh_copy = jax.tree.map(jnp.array, variables)
    return train_step.start(fresh_copy["params"], fresh_copy.get("batch_stats", {}))


def weight_file(name: str) -> pathlib.Path:
    """The path that `config.init.encoder` or `.model` names.

    A file, on a disk or in a bucket, hf://OWNER/NAME, or a package's function.
    """
    if hub.is_address(name):
        return hub.weights(name)
    if bucket.is_address(name):
        return mirror.local(name, "config.init")
    if ":" not in name or pathlib.Path(name).exists():
        return pathlib.Path(name)
    files.local(name, "config.init")
    return pathlib.Path(references.resolve(name, "config.init", "give the path of a file")())


def _from_file(
    config: ml_collections.ConfigDict, model: Segmenter, variables: dict[str, Any], source: Source
) -> dict[str, Any]:
    from dilaff_jax.interop import pretrained  # only runs that bring weights need it

    init = config.init
    options: dict[str, Any] = {"drop": init.drop, "keep": init.keep, "entry": init.entry or None}
    options["folded"] = init.folded
    changing, _ = Frozen(variables["params"], config.optim.frozen).split(variables)
    loaded = ("encoder", "decoder") if init.model else ("encoder",)
    if init.folded and any(part in changing["batch_stats"] for part in loaded):
        options["calibration_images"] = _calibration_images(config, source)
    load = pretrained.load_model if init.model else pretrained.load_backbone
    return load(model, variables, weight_file(init.model or init.encoder), **options)


def _calibration_images(config: ml_collections.ConfigDict, source: Source) -> jax.Array:
    """Centre crops of images spread evenly over the training split, of the training crop's size."""
    height, width = config.data.crop_size
    crops = []
    for index in np.linspace(0, len(source) - 1, min(CALIBRATION_IMAGES, len(source))).astype(int):
        image = source[index]["image"]
        top, left = max(0, image.shape[0] - height) // 2, max(0, image.shape[1] - width) // 2
        crop = image[top : top + height, left : left + width]
        room = [(0, height - crop.shape[0]), (0, width - crop.shape[1]), (0, 0)]
        crops.append(np.pad(crop, room, mode="reflect"))
    return jnp.asarray(np.stack(crops))
