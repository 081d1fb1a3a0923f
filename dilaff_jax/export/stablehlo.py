"""A trained network as one file that runs without this package: StableHLO, weights inside.

    python -m dilaff_jax.export WORKDIR FILE
    python -m dilaff_jax.export WORKDIR FILE --refiner=21

With --refiner it is a function of images and of another network's logits; of an affinity network
by itself it always is. The file is a zip of program.bin, which `jax.export.deserialize` takes, and
metadata.json, which says what goes in and comes out: classes, colours, offsets, sizes. Refinement
is part of the program. Nothing in it is pickled. It runs on CPU, CUDA and TPU, with JAX of this and
(as JAX promises, https://docs.jax.dev/en/latest/export/export.html) of the six months to come.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from dilaff_jax import propagate, resize
from dilaff_jax.errors import UserError
from dilaff_jax.models import dispatch
from dilaff_jax.numerics import NEVER
from dilaff_jax.runtime import files
from dilaff_jax.serving.exported import FORMAT, METADATA, PROGRAM
from dilaff_jax.serving.network import Network, from_run
from dilaff_jax.storage import mirror

PLATFORMS = ("cpu", "cuda", "tpu")
# Of which height and width are tried to be multiples, until the network's shapes are certain.
# Of strides, and of patches of 14 pixels with the affinity head's grid.
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 14, 28, 56)


def write(
    network: Network,
    path: str | os.PathLike,
    *,
    size: Sequence[int] | None = None,
    platforms: Sequence[str] = PLATFORMS,
    refiner: int = 0,
) -> dict[str, Any]:
    """Writes a network to a file and returns its metadata.

    Batch, height and width stay open: any batch, and heights and widths that are multiples of
    metadata["multiple"], at least metadata["minimum"]. The multiple is the least for which the
    network's layers are certain to fit together; a residual network's is its output stride.

    Args:
        network: from `serving.network.from_run`.
        path: of the file.
        size: (height, width), or the three sides of volumes, if they are not to stay open, as a
            network needs that computes with its sizes outside of XLA: pooling into a grid (PSPNet),
            sliding windows, scales.
        platforms: on which it is to run.
        refiner: number of classes of another network's logits, of any size, that are refined
            instead of its own; 0 for its own. An affinity network by itself refines as many as it
            was trained with where nothing is said.

    Raises:
        UserError: the network needs a `size`, or has no affinities to refine by.
    """
    if size and len(size) != network.ndim:
        raise UserError(f"--size has {len(size)} sides; this model needs {network.ndim}")
    if refiner and network.ndim == 3:
        raise UserError("a refiner is of images; of volumes a network with its own logits")
    if not network.segmentation:
        refiner = refiner or len(network.classes.names)
    function = refinement(network) if refiner else program(network)
    multiple, minimum = (1, 1) if size else constraints(network, function, refiner)
    exported = jax_export.export(jax.jit(function), platforms=tuple(platforms))(
        *_inputs(network, multiple, minimum, size, refiner)
    )
    metadata = _signature(exported) | describe(network, multiple, minimum, size)
    with (
        files.replacing(pathlib.Path(path)) as part,
        zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file,
    ):
        file.writestr(METADATA, json.dumps(metadata, indent=1) + "\n")
        file.writestr(PROGRAM, bytes(exported.serialize()))
    return metadata


def program(network: Network, platform: str = "any") -> Callable[[jax.Array], dict[str, jax.Array]]:
    """What is exported: images `[b, H, W, C]` to labels, probs, logits, affinity_logits.

    For one platform, "cpu", "gpu" or "tpu", its layers are those that it is fast at; "any"
    holds those of all.

    labels uint8 `[b, H, W]` and probs float32 `[b, H, W, C]` are refined, where there is a head;
    logits `[b, h, w, C]` and affinity_logits `[b, h', w', K]` are the network's own.

    Raises:
        UserError: the network has no logits of its own.
    """
    if not network.segmentation:
        raise UserError(
            "this is an affinity network by itself, which has no logits of its own; as a refiner "
            "of another network's it can be exported to StableHLO and ONNX (--logits)"
        )
    refine = propagate.operator(**network.refine)

    def run(images: jax.Array) -> dict[str, jax.Array]:
        with dispatch.made_for(platform):
            logits, affinity_logits = network.apply(network.variables, images)
        assert logits is not None
        size = images.shape[1:-1]
        if affinity_logits is None or network.offsets is None:
            full = resize.bilinear(logits, size)
            labels, probs = jnp.argmax(full, axis=-1), jax.nn.softmax(full)
        else:
            labels, probs = propagate.refine_logits(
                logits, affinity_logits, network.offsets, size, refine, finite=True
            )
        outputs = {"labels": labels.astype(jnp.uint8), "probs": probs, "logits": logits}
        return (
            outputs if affinity_logits is None else outputs | {"affinity_logits": affinity_logits}
        )

    return run


def refinement(
    network: Network, platform: str = "any"
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    """What is exported of a refiner: images and logits to labels, probs, affinity_logits.

    images `[b, H, W, C]` and another network's logits `[b, h, w, C]`, which cover them at any
    stride, without aligned corners; labels uint8 `[b, H, W]` and probs float32 `[b, H, W, C]` are
    refined. A logit of -inf, a class that is switched off, is taken as -10,000.

    Raises:
        UserError: the network has no affinities.
    """
    offsets = network.offsets
    if offsets is None:
        raise UserError("this network has no affinity head, so it cannot refine")
    refine = propagate.operator(**network.refine)

    def run(images: jax.Array, logits: jax.Array) -> dict[str, jax.Array]:
        with dispatch.made_for(platform):
            _, affinity_logits = network.apply(network.variables, images)
        assert affinity_logits is not None
        logits = jnp.maximum(logits, NEVER)
        labels, probs = propagate.refine_logits(
            logits, affinity_logits, offsets, images.shape[1:-1], refine, finite=True
        )
        return {
            "labels": labels.astype(jnp.uint8),
            "probs": probs,
            "affinity_logits": affinity_logits,
        }

    return run


def constraints(
    network: Network, function: Callable[..., Any], refiner: int = 0
) -> tuple[int, int]:
    """The least multiple, and the least size, for which all shapes can be decided symbolically."""
    failure: Exception | None = None
    for multiple in _MULTIPLES:
        minimum = _minimum(network, multiple)
        try:
            jax.eval_shape(function, *_inputs(network, multiple, minimum, None, refiner))
        except Exception as e:  # JAX raises of many kinds where a shape stays open
            failure = e
        else:
            return multiple, minimum
    reason = str(failure).strip().splitlines()[0]
    raise UserError(
        "this network computes with its sizes in a way that cannot stay open; export it for one "
        f"size, --size=HEIGHT,WIDTH (found: {type(failure).__name__}: {reason})"
    )


def _minimum(network: Network, multiple: int) -> int:
    """The least multiple at which the longest offset still has a neighbour inside."""
    if network.offsets is None:
        return multiple
    sample = network.images(1, *(256,) * network.ndim)
    _, affinity_logits = jax.eval_shape(network.apply, network.variables, sample)
    assert affinity_logits is not None
    pixels = 256 // affinity_logits.shape[1] * (int(np.abs(network.offsets).max()) + 1)
    return -(-pixels // multiple) * multiple


def _inputs(
    network: Network, multiple: int, minimum: int, size: Sequence[int] | None, refiner: int
) -> list[jax.ShapeDtypeStruct]:
    """The images, open in batch, and in height and width unless `size` is given; logits, open."""
    factor = "" if multiple == 1 else f"{multiple}*"
    least = max(1, minimum // multiple)
    names = "dhw"[-network.ndim :]
    bounds = [] if size else [f"{n} >= {least}" for n in names]
    scope = jax_export.SymbolicScope(bounds)
    sides = [f"{factor}{n}" for n in names] if size is None else list(map(str, size))
    area = ", ".join(sides)
    shape = jax_export.symbolic_shape(f"b, {area}, {network.channels}", scope=scope)
    inputs = [jax.ShapeDtypeStruct(shape, network.dtype)]
    if refiner:
        logits = jax_export.symbolic_shape(f"b, p, q, {refiner}", scope=scope)
        inputs.append(jax.ShapeDtypeStruct(logits, jnp.float32))
    return inputs


def describe(
    network: Network, multiple: int, minimum: int, size: Sequence[int] | None = None
) -> dict[str, Any]:
    """What must be known beside the program: sizes, scale, classes, offsets, refinement."""
    return {
        "made_with": {
            "dilaff_jax": importlib.metadata.version("dilaff-jax"),
            "jax": jax.__version__,
        },
        "multiple": multiple,
        "minimum": minimum,
        "size": None if size is None else [int(n) for n in size],
        "pad_rgb": list(network.pad_rgb),
        "bands": network.bands and network.bands.to_json(),
        "resize": network.resize,
        "ndim": network.ndim,
        "normalise": network.normalise,
        "classes": network.classes.to_json(),
        "offsets": None if network.offsets is None else network.offsets.tolist(),
        "refine": dict(network.refine),
    }


def _signature(exported: jax_export.Exported) -> dict[str, Any]:
    names = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    images = exported.in_avals[0]
    kind = "RGB" if images.dtype == jnp.uint8 else "bands as in the files"
    return {
        "format": FORMAT,
        "platforms": list(exported.platforms),
        "input": f"images, {images.dtype} {images.shape}: {kind}; normalised inside",
        **(
            {"logits": f"float32 {exported.in_avals[1].shape}: another network's"}
            if len(exported.in_avals) > 1
            else {}
        ),
        "outputs": {name: f"{aval.dtype} {aval.shape}" for name, aval in names.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=mirror.argument, help="of a training")
    parser.add_argument("file", type=pathlib.Path, help="to write")
    parser.add_argument(
        "--size", type=parse_size, help="HEIGHT,WIDTH, if they are not to stay open"
    )
    parser.add_argument(
        "--refiner", type=int, default=0, help="CLASSES of another network's logits, to be refined"
    )
    parser.add_argument("--platforms", default=",".join(PLATFORMS), help="separated by commas")
    given = parser.parse_args(arguments)
    try:
        network, _, step = from_run(given.workdir)
        platforms = given.platforms.split(",")
        metadata = write(
            network, given.file, size=given.size, platforms=platforms, refiner=given.refiner
        )
    except (UserError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(
        f"step {step} of {given.workdir} in {given.file}, {given.file.stat().st_size / 1e6:.1f} MB"
    )
    print(f"input: {metadata['input']}, height and width at least {metadata['minimum']}")
    if "logits" in metadata:
        print(f"input: logits, {metadata['logits']}")
    for name, description in metadata["outputs"].items():
        print(f"output: {name}, {description}")
    return 0


def parse_size(text: str) -> tuple[int, ...]:
    """HEIGHT,WIDTH, or three sides of volumes, as numbers."""
    return tuple(int(n) for n in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
