"""Exported files, see `export.stablehlo`, as networks."""

import json
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from dilaff_jax.data.bands import Bands
from dilaff_jax.data.class_list import Classes
from dilaff_jax.errors import UserError
from dilaff_jax.serving.network import Network

FORMAT = "dilaff_jax export 1"
PROGRAM, METADATA = "program.bin", "metadata.json"


def read(path: str | os.PathLike) -> Network:
    """The network of a file that `export.stablehlo.write` wrote.

    Its `apply` gives the logits before refinement, as that of a run does, so that everything that
    works with a run works with a file.

    Raises:
        UserError: the file is damaged, or no such export.
    """
    try:
        with zipfile.ZipFile(path) as file:
            metadata = json.loads(file.read(METADATA))
            if metadata.get("format") != FORMAT:
                raise UserError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            exported = jax_export.deserialize(bytearray(file.read(PROGRAM)))
    except (zipfile.BadZipFile, KeyError, ValueError) as e:
        raise UserError(f"{path} is no file that dilaff_jax.export wrote, or damaged: {e}") from e

    def apply(variables: tuple[()], images: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        if refiner:  # for its affinities alone, which do not depend on what is refined
            nothing = jnp.zeros(
                (images.shape[0], 1, 1, exported.in_avals[1].shape[-1]), jnp.float32
            )
            return None, exported.call(images, nothing)["affinity_logits"]
        outputs = exported.call(images)
        return outputs["logits"], outputs.get("affinity_logits")

    refiner = "logits" in metadata
    offsets, size = metadata["offsets"], metadata["size"]
    return Network(
        apply,
        (),
        None if offsets is None else np.array(offsets, np.int32),
        Classes.from_json(metadata["classes"]),
        metadata["refine"],
        not refiner,
        metadata["resize"],
        tuple(metadata["pad_rgb"]),
        metadata["multiple"],
        metadata["minimum"],
        None if size is None else tuple(size),
        Bands.from_json(metadata["bands"]) if metadata.get("bands") else None,
        metadata.get("ndim", 2),
        metadata.get("normalise", "none"),
    )
