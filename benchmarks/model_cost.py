"""Parameters, FLOPs and memory of each network, with the affinity head, and with propagation.

    python -m benchmarks.model_cost

FLOPs of one forward pass, batch 1, as `dilaff_jax.runtime.cost` counts them; the propagation step
is held against the formula 2(K+1)·C·H·W. Memory is the compiled program's temporaries, forward and
with the backward pass, an image. Attention in parts (`models.transformer.attend`) is counted as if
it were in one, since XLA counts the body of a loop once; its memory is that of the program as it
runs, and for images of 1024×2048 beside that of attention in one part.
"""

import argparse
import functools
import math
import unittest.mock
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import tqdm

from benchmarks import timing
from dilaff_jax import propagate, resize
from dilaff_jax.configs import default
from dilaff_jax.models import segmenter, transformer
from dilaff_jax.runtime.cost import flops, gradient, parameters, temporaries

NUM_CLASSES = 21
STEPS = 3
LIGHT = {"width": 128, "low_level": 24, "separable": True}
MODELS: dict[str, dict[str, Any]] = {
    "resnet18 deeplabv3plus": {"output_stride": 16},
    "resnet34 unet": {"output_stride": 32},
    "resnet50 fcn": {"output_stride": 8},
    "resnet50 pspnet": {"output_stride": 8},
    "resnet50 unet": {"output_stride": 32},
    "resnet50 deeplabv3": {"output_stride": 8},
    "resnet50 deeplabv3plus": {"output_stride": 16},
    "resnet101 deeplabv3": {"output_stride": 8},
    "mobilenet_v2 deeplabv3plus": {"output_stride": 16, "decoder_options": LIGHT},
    "efficientnet_lite0 deeplabv3plus": {"output_stride": 16, "decoder_options": LIGHT},
    "efficientnet_lite1 deeplabv3plus": {"output_stride": 16, "decoder_options": LIGHT},
    "efficientnet_lite2 deeplabv3plus": {"output_stride": 16, "decoder_options": LIGHT},
    "mit_b0 segformer": {"output_stride": 32},
    "mit_b2 segformer": {"output_stride": 32, "decoder_options": {"width": 768}},
    "convnext_tiny upernet": {"output_stride": 32},
    "dinov2_vits14 linear": {"output_stride": 16},
    "dinov3_vits16 linear": {"output_stride": 16},
    "dinov2_vitb14 linear": {"output_stride": 16},
}
# Maps of patches alone keep no borders: there the head has a stem of its own on the image.
STEM = ("image", "decoder")
# Encoders whose memory is shown with attention in parts and in one, and sizes of images.
ATTENDING = ("mit_b2", "dinov3_vits16")
SIZES = ((512, 1024), (1024, 2048))
# As every config has it that does not say otherwise.
HEAD: dict[str, Any] = default.get_config().model.affinity.to_dict()
# Beside so light a base the default head is no minor expense; a narrower one is given too.
WIDTHS = {
    name: (64, 24) if config.get("decoder_options") == LIGHT else (64,)
    for name, config in MODELS.items()
}
# What may count as a minor additional expense, for DeepLabv3 on ResNet-50.
BAR = {"model": "resnet50 deeplabv3", "flops_percent": 5.0, "parameters_percent": 3.0}


def cost(name: str, size: int, affinity: dict[str, Any] | None) -> dict[str, float]:
    """Parameters, GFLOP and MB of one network; with affinity also those of propagation."""
    encoder, decoder = name.split()
    config = {"encoder": encoder, "decoder": decoder, "affinity": affinity} | MODELS[name]
    model = segmenter.build(config, NUM_CLASSES)
    variables = segmenter.abstract_variables(model)
    images, two = (jax.ShapeDtypeStruct((n, size, size, 3), jnp.uint8) for n in (1, 2))
    forward = functools.partial(run, model)
    with in_one_part():
        gflop = flops(forward, variables, images) / 1e9
    result = {
        "parameters": parameters(variables),
        "gflop": gflop,
        "memory_mb": temporaries(forward, variables, images) / 1e6,
        # Of two: BatchNorm cannot be trained on the mean of one image.
        "training_memory_mb": temporaries(gradient(model), variables, two) / 2e6,
    }
    if affinity is not None:
        walks = [functools.partial(run, model, steps=t) for t in (0, 1, STEPS)]
        with in_one_part():
            none, one = (flops(walk, variables, images) / 1e9 for walk in walks[:2])
        result["step_gflop"] = one - none
        result["propagated_gflop"] = none + STEPS * (one - none)
        result["propagated_memory_mb"] = temporaries(walks[2], variables, images) / 1e6
    return result


def run(
    model: segmenter.Segmenter, variables: Any, images: jax.Array, steps: int | None = None
) -> tuple[jax.Array | None, ...]:
    """The forward pass; with `steps`, and the walk on the affinity's grid."""
    out: Any = model.apply(variables, images, train=False)
    if steps is None:
        return out["logits"], out["affinity_logits"]
    affinity_logits = out["affinity_logits"]
    probs = jax.nn.softmax(resize.bilinear(out["logits"], affinity_logits.shape[1:3]))
    offsets: Any = model.offsets
    return (propagate.random_walk(probs, jax.nn.sigmoid(affinity_logits), offsets, steps=steps),)


def table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """One line a network and head: the base, and what the head and propagation add."""
    result = rich.table.Table()
    result.add_column("network", no_wrap=True)
    for heading in (
        "head",
        "M param.",
        "+ head",
        "GFLOP",
        "+ head",
        f"+ {STEPS} steps",
        "forward MB",
        "+ head",
        "+ steps",
        "training MB",
        "+ head",
    ):
        result.add_column(heading, justify="right")
    for row in rows:
        base, head = row["base"], row["head"]
        result.add_row(
            row["model"],
            str(row["width"]),
            f"{base['parameters'] / 1e6:.2f}",
            f"+{row['parameters_percent']:.2f} %",
            f"{base['gflop']:.2f}",
            f"+{row['head_flops_percent']:.2f} %",
            f"+{row['flops_percent']:.2f} %",
            *(f"{x:.0f}" for x in (base["memory_mb"], head["memory_mb"])),
            f"{head['propagated_memory_mb']:.0f}",
            *(f"{x['training_memory_mb']:.0f}" for x in (base, head)),
        )
    return result


def compare(name: str, size: int) -> list[dict[str, Any]]:
    """Costs without and with each head, and what head and propagation add in per cent."""
    base = cost(name, size, None)
    rows = []
    for width in WIDTHS[name]:
        sources = STEM if name.startswith("dino") else HEAD["sources"]
        head = cost(name, size, HEAD | {"width": width, "sources": sources})
        percent = {
            "parameters_percent": 100 * (head["parameters"] / base["parameters"] - 1),
            "head_flops_percent": 100 * (head["gflop"] / base["gflop"] - 1),
            "flops_percent": 100 * (head["propagated_gflop"] / base["gflop"] - 1),
        }
        rows.append({"model": name, "width": width, "base": base, "head": head} | percent)
    return rows


def in_one_part() -> Any:
    """Within it attention is not cut into parts."""
    return unittest.mock.patch.object(transformer, "SCORE_BYTES", math.inf)


def attention(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """MB of an encoder's forward pass with attention in parts, and in one."""
    encoder = segmenter.build_encoder(name, output_stride=16 if name.startswith("dino") else 32)
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, False), images)

    def memory() -> float:
        return temporaries(lambda v, x: encoder.apply(v, x, False), variables, images) / 1e6

    row = {"encoder": name, "height": size[0], "width": size[1], "memory_mb": memory()}
    with in_one_part():
        return row | {"in_one_part_mb": memory()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table and writes results/model_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=513)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args(arguments)
    names = tqdm.tqdm(options.only, desc="networks")
    rows = [row for name in names for row in compare(name, options.size)]
    rich.console.Console(width=150).print(table(rows))
    grid = -(-options.size // 4)
    content: dict[str, Any] = {
        "config": {"size": options.size, "classes": NUM_CLASSES, "batch": 1, "steps": STEPS}
        | {"head": HEAD, "affinity_stride": 4, "K": 32, "models": MODELS},
        "provenance": timing.provenance("flax"),
        "step_gflop_by_formula": 2 * 33 * NUM_CLASSES * grid**2 / 1e9,
        "rows": rows,
        "attention": [attention(name, size) for name in ATTENDING for size in SIZES],
    }
    bar = next((row for row in rows if row["model"] == BAR["model"]), None)
    if bar:
        met = all(bar[k] <= v for k, v in BAR.items() if isinstance(v, float))
        content["bar"] = BAR | {"met": met}
        print(
            f"{BAR['model']}: head and {STEPS} steps add {bar['flops_percent']:.2f} % FLOPs (bar "
            f"{BAR['flops_percent']} %) and {bar['parameters_percent']:.2f} % parameters (bar "
            f"{BAR['parameters_percent']} %): {'met' if met else 'NOT met'}"
        )
    print("written:", timing.write("model_cost", content))


if __name__ == "__main__":
    main()
