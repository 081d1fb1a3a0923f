"""A trained network as one file that runs without this package: StableHLO, weights inside.

    python -m dilaff_jax.export WORKDIR FILE

The file is a zip of program.bin, which `jax.export.deserialize` takes, and metadata.json, which
says what goes in and comes out: classes, colours, offsets, sizes. Refinement is part of the
program. Nothing in it is pickled. It runs on CPU, CUDA and TPU, with JAX of this and (as JAX
promises, https://docs.jax.dev/en/latest/export/export.html) of the six months to come.
"""

import argparse
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

import dilaff_jax
from dilaff_jax import network as network_lib
from dilaff_jax import propagate, resize
from dilaff_jax.data.classes import Classes
from dilaff_jax.network import Network

FORMAT = "dilaff_jax export 1"
PLATFORMS = ("cpu", "cuda", "tpu")
_PROGRAM, _METADATA = "program.bin", "metadata.json"
# Of which height and width are tried to be multiples, until the network's shapes are certain.
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)


def write(
    network: Network,
    path: str | os.PathLike,
    *,
    size: Sequence[int] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
    """Writes a network to a file and returns its metadata.

    Batch, height and width stay open: any batch, and heights and widths that are multiples of
    metadata["multiple"], at least metadata["minimum"]. The multiple is the least for which the
    network's layers are certain to fit together; a residual network's is its output stride.

    Args:
        network: from `network.from_run`.
        path: of the file.
        size: (height, width), if they are not to stay open, as a network needs that computes with
            its sizes outside of XLA: pooling into a grid (PSPNet), sliding windows, scales.
        platforms: on which it is to run.

    Raises:
        ValueError: the network needs a `size`.
    """
    function = program(network)
    multiple, minimum = (1, 1) if size else constraints(network, function)
    exported = jax_export.export(jax.jit(function), platforms=tuple(platforms))(
        _images(multiple, minimum, size)
    )
    metadata = _signature(exported) | describe(network, multiple, minimum, size)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:
        file.writestr(_METADATA, json.dumps(metadata, indent=1) + "\n")
        file.writestr(_PROGRAM, bytes(exported.serialize()))
    part.replace(path)
    return metadata


def read(path: str | os.PathLike) -> Network:
    """The network of a file that `write` wrote.

    Its `apply` gives the logits before refinement, as that of a run does, so that everything that
    works with a run works with a file.

    Raises:
        ValueError: the file is damaged, or no such export.
    """
    try:
        with zipfile.ZipFile(path) as file:
            metadata = json.loads(file.read(_METADATA))
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            exported = jax_export.deserialize(bytearray(file.read(_PROGRAM)))
    except (zipfile.BadZipFile, KeyError, ValueError) as e:
        raise ValueError(f"{path} is no file that dilaff_jax.export wrote, or damaged: {e}") from e

    def apply(variables: tuple[()], images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        outputs = exported.call(images)
        return outputs["logits"], outputs.get("affinity_logits")

    offsets, size = metadata["offsets"], metadata["size"]
    return Network(
        apply,
        (),
        None if offsets is None else np.array(offsets, np.int32),
        Classes.from_json(metadata["classes"]),
        metadata["refine"],
        metadata["resize"],
        tuple(metadata["pad_rgb"]),
        metadata["multiple"],
        metadata["minimum"],
        None if size is None else (size[0], size[1]),
    )


def program(network: Network) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """What is exported: images `[b, H, W, 3]` to labels, probs, logits, affinity_logits.

    labels uint8 `[b, H, W]` and probs float32 `[b, H, W, C]` are refined, where there is a head;
    logits `[b, h, w, C]` and affinity_logits `[b, h', w', K]` are the network's own.
    """
    refine = propagate.operator(**network.refine)

    def run(images: jax.Array) -> dict[str, jax.Array]:
        logits, edges = network.apply(network.variables, images)
        size = images.shape[1:3]
        if edges is None or network.offsets is None:
            full = resize.bilinear(logits, size)
            labels, probs = jnp.argmax(full, axis=-1), jax.nn.softmax(full)
        else:
            labels, probs = propagate.refine_logits(logits, edges, network.offsets, size, refine)
        outputs = {"labels": labels.astype(jnp.uint8), "probs": probs, "logits": logits}
        return outputs if edges is None else outputs | {"affinity_logits": edges}

    return run


def constraints(network: Network, function: Callable[..., Any]) -> tuple[int, int]:
    """The least multiple, and the least size, for which all shapes can be decided symbolically."""
    failure: Exception | None = None
    for multiple in _MULTIPLES:
        minimum = _minimum(network, multiple)
        try:
            jax.eval_shape(function, _images(multiple, minimum, None))
        except Exception as e:  # JAX raises of many kinds where a shape stays open
            failure = e
        else:
            return multiple, minimum
    reason = str(failure).strip().splitlines()[0]
    raise ValueError(
        "this network computes with its sizes in a way that cannot stay open; export it for one "
        f"size, --size=HEIGHT,WIDTH (found: {type(failure).__name__}: {reason})"
    )


def _minimum(network: Network, multiple: int) -> int:
    """The least multiple at which the longest offset still has a neighbour inside."""
    if network.offsets is None:
        return multiple
    sample = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.uint8)
    _, edges = jax.eval_shape(network.apply, network.variables, sample)
    assert edges is not None
    pixels = 256 // edges.shape[1] * (int(np.abs(network.offsets).max()) + 1)
    return -(-pixels // multiple) * multiple


def _images(multiple: int, minimum: int, size: Sequence[int] | None) -> jax.ShapeDtypeStruct:
    """The input: open in batch, and in height and width unless `size` is given."""
    if size is not None:
        (batch,) = jax_export.symbolic_shape("b")
        return jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8)
    factor = "" if multiple == 1 else f"{multiple}*"
    least = max(1, minimum // multiple)
    shape = jax_export.symbolic_shape(
        f"b, {factor}h, {factor}w, 3", constraints=[f"h >= {least}", f"w >= {least}"]
    )
    return jax.ShapeDtypeStruct(shape, jnp.uint8)


def describe(
    network: Network, multiple: int, minimum: int, size: Sequence[int] | None = None
) -> dict[str, Any]:
    """What must be known beside the program: sizes, scale, classes, offsets, refinement."""
    return {
        "made_with": {"dilaff_jax": dilaff_jax.__version__, "jax": jax.__version__},
        "multiple": multiple,
        "minimum": minimum,
        "size": None if size is None else [int(n) for n in size],
        "pad_rgb": list(network.pad_rgb),
        "resize": network.resize,
        "classes": network.classes.to_json(),
        "offsets": None if network.offsets is None else network.offsets.tolist(),
        "refine": dict(network.refine),
    }


def _signature(exported: jax_export.Exported) -> dict[str, Any]:
    names = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "format": FORMAT,
        "platforms": list(exported.platforms),
        "input": f"images, uint8 {exported.in_avals[0].shape}: RGB; normalised inside",
        "outputs": {name: f"{aval.dtype} {aval.shape}" for name, aval in names.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=pathlib.Path, help="of a training")
    parser.add_argument("file", type=pathlib.Path, help="to write")
    parser.add_argument(
        "--size", type=parse_size, help="HEIGHT,WIDTH, if they are not to stay open"
    )
    parser.add_argument("--platforms", default=",".join(PLATFORMS), help="separated by commas")
    given = parser.parse_args(arguments)
    try:
        network, _, step = network_lib.from_run(given.workdir)
        platforms = given.platforms.split(",")
        metadata = write(network, given.file, size=given.size, platforms=platforms)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(
        f"step {step} of {given.workdir} in {given.file}, {given.file.stat().st_size / 1e6:.1f} MB"
    )
    print(f"input: {metadata['input']}, height and width at least {metadata['minimum']}")
    for name, description in metadata["outputs"].items():
        print(f"output: {name}, {description}")
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """HEIGHT,WIDTH as numbers."""
    height, width = (int(n) for n in text.split(","))
    return height, width


if __name__ == "__main__":
    sys.exit(main())
