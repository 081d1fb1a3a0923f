"""A trained network as a TensorFlow SavedModel, by JAX's own jax2tf.

    pip install -e '.[tensorflow]'
    python -m dilaff_jax.export.saved_model WORKDIR FOLDER

The signature is that of `dilaff_jax.export`, batch and size open as there: uint8 images to labels,
probs, logits and affinity_logits. metadata.json in the folder says the rest.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from dilaff_jax.errors import MissingPackageError, UserError
from dilaff_jax.export import stablehlo
from dilaff_jax.serving.network import Network, from_run
from dilaff_jax.storage import mirror


def write(network: Network, folder: str | os.PathLike) -> dict[str, Any]:
    """Writes a SavedModel and returns its metadata.

    Args:
        network: from `serving.network.from_run`.
        folder: of the SavedModel.

    Raises:
        ImportError: TensorFlow is not installed.
        UserError: the size of this network's images cannot stay open.
    """
    if network.ndim != 2:
        raise UserError("SavedModels are of images; of volumes dilaff_jax.export writes StableHLO")
    try:
        import tensorflow as tf
        from jax.experimental import jax2tf
    except ImportError as e:
        raise MissingPackageError(f"{e}; pip install -e '.[tensorflow]'") from e
    function = stablehlo.program(network)
    multiple, minimum = stablehlo.constraints(network, function)
    least = max(1, minimum // multiple)
    converted = jax2tf.convert(
        function,
        polymorphic_shapes=[f"(b, {multiple}*h, {multiple}*w, {network.channels})"],
        polymorphic_constraints=[f"h >= {least}", f"w >= {least}"],
        with_gradient=False,
    )
    module = tf.Module()
    shape = (None, None, None, network.channels)
    images = tf.TensorSpec(shape, tf.as_dtype(network.dtype), "images")
    module.segment = tf.function(converted, autograph=False, input_signature=[images])
    tf.saved_model.save(module, os.fspath(folder), signatures=module.segment)
    metadata = stablehlo.describe(network, multiple, minimum)
    (pathlib.Path(folder) / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return metadata


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=mirror.argument, help="of a training")
    parser.add_argument("folder", type=pathlib.Path, help="to write")
    given = parser.parse_args(arguments)
    try:
        network, _, step = from_run(given.workdir)
        metadata = write(network, given.folder)
    except (UserError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(
        f"step {step} of {given.workdir} in {given.folder}: heights and widths that are multiples "
        f"of {metadata['multiple']}, at least {metadata['minimum']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
