"""Memory traffic of a training step on a TPU v5e, compiled for it: no TPU is needed.

    pip install -e '.[preflight]' && python -m benchmarks.hbm_traffic [--only PART]

DeepLabv3 on ResNet-50, 513², bfloat16, 8 images a chip, auxiliary head, as in
configs/voc2012_deeplabv3_r50.py. Bytes are counted twice: to and from HBM in the schedule
(`dilaff_jax.preflight.hlo`), and as XLA's own "bytes accessed". Every run adds its rows, with
commit, to results/hbm_traffic.json, which docs/performance.md reads. The whole step takes minutes
to compile.
"""

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from dilaff_jax import losses, resize
from dilaff_jax.configs import voc2012_deeplabv3_r50
from dilaff_jax.models import geometry
from dilaff_jax.models.gpu import conv as gpu_conv
from dilaff_jax.preflight.footprint import Footprint, measure
from dilaff_jax.preflight.programs import Programs
from dilaff_jax.runtime import chips, reporting
from dilaff_jax.runtime.parallel import Devices

CLASSES, ROWS, SIZE = 21, 8, (513, 513)


def step(affinity: float) -> Callable[[Devices], Callable[[int], Any]]:
    """What lowers the training step; affinity 0 is the plain baseline."""

    def make(devices: Devices) -> Callable[[int], Any]:
        config = voc2012_deeplabv3_r50.get_config()
        config.data.crop_size = SIZE
        config.loss.affinity = affinity
        return Programs(config, CLASSES, SIZE, devices).train_step

    return make


def loss(
    function: Callable[[jax.Array, jax.Array], losses.LossSum],
) -> Callable[[Devices], Callable[[int], Any]]:
    """What lowers value and gradient of a loss of logits at stride 8."""

    def make(devices: Devices) -> Callable[[int], Any]:
        def program(logits: jax.Array, labels: jax.Array) -> Any:
            return jax.value_and_grad(lambda x: losses.finish(function(x, labels)))(logits)

        def lower(rows: int) -> Any:
            logits = jax.ShapeDtypeStruct((rows, 65, 65, CLASSES), jnp.float32)
            labels = jax.ShapeDtypeStruct((rows, *SIZE), jnp.uint8)
            placed = devices.abstract((logits, labels))
            return jax.jit(program).trace(*placed).lower(lowering_platforms=("tpu",))

        return lower

    return make


def backward(
    convolve: Callable[[jax.Array, jax.Array, geometry.Geometry], jax.Array],
    channels: int,
    features: int,
    rate: int,
) -> Callable[[Devices], Callable[[int], Any]]:
    """What lowers both gradients of one dilated 3×3 convolution of a map at stride 8."""
    at = geometry.Geometry((1, 1), ((rate, rate),) * 2, (rate, rate))

    def make(devices: Devices) -> Callable[[int], Any]:
        def program(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
            return jax.vjp(lambda x, w: convolve(x, w, at), x, kernel)[1](dy)

        def lower(rows: int) -> Any:
            shapes = (rows, 65, 65, channels), (3, 3, channels, features), (rows, 65, 65, features)
            arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
            placed = devices.abstract(arrays)
            return jax.jit(program).trace(*placed).lower(lowering_platforms=("tpu",))

        return lower

    return make


xla = functools.partial(geometry.native, depthwise=False)


def for_gpu(x: jax.Array, kernel: jax.Array, at: geometry.Geometry) -> jax.Array:
    """The form that GPUs get: matrix products for many channels, undilated maps else."""
    return gpu_conv.conv(x, kernel, at.strides, at.pads, rhs_dilation=at.rates)


PARTS = {
    "aspp_backward_xla": backward(xla, 2048, 256, 12),
    "aspp_backward_as_on_a_gpu": backward(for_gpu, 2048, 256, 12),
    "layer4_backward_xla": backward(xla, 512, 512, 4),
    "layer4_backward_as_on_a_gpu": backward(for_gpu, 512, 512, 4),
    "cross_entropy_at_once": loss(
        lambda x, y: losses.cross_entropy(resize.bilinear(x, y.shape[1:]), y)
    ),
    "cross_entropy_by_rows": loss(lambda x, y: losses.upsampled_loss(losses.cross_entropy, x, y)),
    "training_step": step(1.0),
    "training_step_without_affinity": step(0.0),
}


def row(name: str, found: Footprint) -> dict[str, Any]:
    """One line of the results."""
    return {
        "part": name,
        "hbm_gb_per_image": found.traffic / found.rows / 1e9,
        "xla_gb_per_image": found.xla_bytes / found.rows / 1e9,
        "gflop_per_image": found.flops / found.rows / 1e9,
        "temporaries_gb": found.temporaries / 1e9,
        "memory_gb": found.memory / 1e9,
        "compile_seconds": found.compile_seconds,
    }


def main() -> None:
    """Compiles the parts asked for, prints all rows so far, adds the new ones to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", choices=("", *PARTS), help="one part alone")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    path = timing.RESULTS / "hbm_traffic.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    devices = Devices("shard_map", compile_for=chips.devices("v5e:1x1"))
    about = timing.provenance("flax", "libtpu")
    for name in (args.only,) if args.only else PARTS:
        print(f"compiling the {name} ...", end=" ", flush=True)
        found = measure(PARTS[name](devices), ROWS, None)
        print(f"{found.compile_seconds:.0f} s", flush=True)
        new = row(name, found) | {"commit": about["commit"], "versions": about["versions"]}
        rows = [r for r in rows if (r["part"], r["commit"]) != (name, about["commit"])] + [new]
        timing.write(
            "hbm_traffic",
            {
                "command": "python -m benchmarks.hbm_traffic",
                "chip": "TPU v5e, compiled for, not run",
                "images_per_chip": ROWS,
                "size": SIZE,
                "rows": rows,
            },
        )
    keys = ("hbm_gb_per_image", "xla_gb_per_image", "gflop_per_image", "temporaries_gb")
    lines = [[r["part"], r["commit"][:7], *(f"{r[k]:.4g}" for k in keys)] for r in rows]
    print(reporting.table("memory traffic on a TPU v5e", ["part", "commit", *keys], lines))


if __name__ == "__main__":
    main()
