"""A trained network as an ONNX file, for one size of image: converted by jax2onnx.

    pip install -e '.[onnx]' && pip install --no-deps jax2onnx==0.17.1
    python -m dilaff_jax.export.onnx WORKDIR FILE.onnx --size=512,512
    python -m dilaff_jax.export.onnx WORKDIR FILE.onnx --size=512,512 --logits=64,64,19

(Without --no-deps, jax2onnx asks for an older Orbax than training uses; it runs without any.) The
file takes `images`, float32 RGB in [0, 255] or bands as in their files, [1, H, W, C], and gives
labels, probs, logits and affinity_logits as `dilaff_jax.export` does; batch and size are fixed.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax.errors import MissingPackageError, UserError
from dilaff_jax.export import stablehlo
from dilaff_jax.runtime import files
from dilaff_jax.serving.network import Network, from_run
from dilaff_jax.storage import mirror

# Primitives that only call: `jax.jit`, and functions with a gradient of their own.
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def write(
    network: Network,
    path: str | os.PathLike,
    size: Sequence[int],
    logits: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Writes an ONNX file for images of one size, and returns the metadata that is in it.

    Args:
        network: from `serving.network.from_run`.
        path: of the file.
        size: (height, width).
        logits: (h, w, C) of another network, which are then refined instead of its own: the file
            takes `images` and `logits` `[1, h, w, C]`.

    Raises:
        ImportError: jax2onnx is not installed.
        UserError: the network holds what jax2onnx cannot convert.
    """
    if network.ndim != 2:
        raise UserError("ONNX files are of images; of volumes dilaff_jax.export writes StableHLO")
    try:
        import jax2onnx
    except ImportError as e:
        raise MissingPackageError(
            f"{e}; pip install -e '.[onnx]' && pip install --no-deps jax2onnx==0.17.1"
        ) from e
    inputs = {"images": jax.ShapeDtypeStruct((1, *size, network.channels), jnp.float32)}
    if logits is not None:
        inputs["logits"] = jax.ShapeDtypeStruct((1, *logits), jnp.float32)
    names, function = flattened(network, *inputs.values())
    try:
        model = jax2onnx.to_onnx(function, list(inputs.values()), return_mode="proto")
    except Exception as e:  # it raises of many kinds
        raise UserError(f"jax2onnx cannot convert this network: {type(e).__name__}: {e}") from e
    _two_axes_of_pooling(model.graph)
    _rename(model.graph, list(inputs), names)
    metadata = stablehlo.describe(network, 1, 1, size)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    with files.replacing(pathlib.Path(path)) as part:
        part.write_bytes(model.SerializeToString())
    return metadata


def flattened(
    network: Network, *inputs: jax.ShapeDtypeStruct
) -> tuple[list[str], Callable[..., Any]]:
    """The exported program's outputs by name, and it as a function of plain JAX operations.

    jax2onnx replaces layers of Flax by its own, which know less (no explicit padding of a pool);
    once traced, no layer is left to be replaced. It knows no platforms either: layers are Flax's
    own, as for a TPU, and of what is written for one platform beside others the default is taken.
    """
    make = stablehlo.refinement if len(inputs) > 1 else stablehlo.program
    traced, shapes = jax.make_jaxpr(make(network, "tpu"), return_shape=True)(*inputs)
    return sorted(shapes), functools.partial(_run, traced.jaxpr, traced.consts)


def _run(jaxpr: Any, consts: Sequence[Any], *arguments: Any) -> list[Any]:
    """Runs a jaxpr; of `lax.platform_dependent` the default, calls in line."""
    from jax.extend.core import Literal

    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":
            continue
        if name == "cond" and params.get("branches_platforms"):
            inner = params["branches"][params["branches_platforms"].index(None)]
            results = _run(inner.jaxpr, inner.consts, *map(read, equation.invars[1:]))
        elif name in _CALLS:
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            results = _run(inner.jaxpr, inner.consts, *map(read, equation.invars))
        else:
            results = equation.primitive.bind(*map(read, equation.invars), **params)
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _two_axes_of_pooling(graph: Any) -> None:
    """Makes max pooling over [N, H, W, C] as four axes, which onnxruntime lacks, one over H and W.

    jax2onnx writes Unsqueeze, Unsqueeze, MaxPool over four axes, Squeeze.
    """
    from onnx import helper

    made_by = {name: node for node in graph.node for name in node.output}
    read_by = {name: node for node in graph.node for name in node.input}
    for node in [n for n in graph.node if n.op_type == "MaxPool"]:
        given = {a.name: list(a.ints) for a in node.attribute}
        window, strides, pads = given["kernel_shape"], given["strides"], given["pads"]
        if len(window) != 4 or window[0] != 1 or window[3] != 1:
            continue
        source = made_by[made_by[node.input[0]].input[0]].input[0]
        squeeze = read_by[node.output[0]]
        first, pooled = f"{source}_channels_first", f"{source}_pooled"
        replacement = [
            helper.make_node("Transpose", [source], [first], perm=[0, 3, 1, 2]),
            helper.make_node(
                "MaxPool",
                [first],
                [pooled],
                kernel_shape=window[1:3],
                strides=strides[1:3],
                pads=[pads[i] for i in (1, 2, 5, 6)],
            ),
            helper.make_node("Transpose", [pooled], [squeeze.output[0]], perm=[0, 2, 3, 1]),
        ]
        at = list(graph.node).index(node)
        graph.node.remove(node)
        graph.node.remove(squeeze)
        for step, new in enumerate(replacement):
            graph.node.insert(at + step, new)


def _rename(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives the graph's inputs and outputs their names."""
    values = [*graph.input, *graph.output]
    new = {v.name: name for v, name in zip(values, [*inputs, *outputs], strict=True)}
    for value in values:
        value.name = new[value.name]
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports a run, and compares the file with the model on noise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=mirror.argument, help="of a training")
    parser.add_argument("file", type=pathlib.Path, help="to write")
    parser.add_argument("--size", type=stablehlo.parse_size, required=True, help="HEIGHT,WIDTH")
    parser.add_argument(
        "--logits",
        type=_three,
        help="HEIGHT,WIDTH,CLASSES of another network's, to be refined instead of its own",
    )
    given = parser.parse_args(arguments)
    try:
        network, _, step = from_run(given.workdir)
        print("converting; this takes a minute or two", flush=True)
        write(network, given.file, given.size, given.logits)
        worst = compare(network, given.file, given.size, given.logits)
    except (UserError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(
        f"step {step} of {given.workdir} in {given.file}, {given.file.stat().st_size / 1e6:.1f} MB"
    )
    for name, difference in worst.items():
        print(f"{name}: differs from the model by at most {difference:.1e}")
    return 0


def _three(text: str) -> tuple[int, int, int]:
    """HEIGHT,WIDTH,CLASSES as numbers."""
    height, width, classes = (int(n) for n in text.split(","))
    return height, width, classes


def compare(
    network: Network,
    path: str | os.PathLike,
    size: Sequence[int],
    logits: Sequence[int] | None = None,
) -> dict[str, float]:
    """The largest difference of each output, file by onnxruntime against network, on noise."""
    import onnxruntime

    rng = np.random.default_rng(0)
    inputs = {"images": rng.integers(0, 256, (1, *size, 3)).astype(np.float32)}
    if logits is not None:
        inputs["logits"] = rng.normal(0, 3, (1, *logits)).astype(np.float32)
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, inputs), strict=True))
    function = stablehlo.program if logits is None else stablehlo.refinement
    wanted = jax.jit(function(network))(*inputs.values())
    return {
        k: float(np.abs(outputs[k].astype(np.float32) - np.asarray(v, np.float32)).max())
        for k, v in wanted.items()
    }


if __name__ == "__main__":
    sys.exit(main())
