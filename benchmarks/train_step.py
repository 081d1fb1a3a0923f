"""Times a training step of DeepLabv3-R50: ours, with and without affinity, against torchvision's.

    pip install -e '.[bench,torch,dev]' && python -m benchmarks.train_step

Forward, losses (the auxiliary one too), backward, SGD; float32 on a CPU against torch eager, in one
process, runs interleaved. (For a GPU: benchmarks.accelerator.)
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import torch

from benchmarks import timing
from dilaff_jax import optim, step
from dilaff_jax.configs import voc2012_deeplabv3_r50
from dilaff_jax.interop.torchvision_import import torchvision
from dilaff_jax.models import segmenter
from dilaff_jax.runtime.parallel import AXIS, Devices

CLASSES = 21
BASELINE, JOINT = "dilaff_jax, baseline", "dilaff_jax, with affinity"


def batch_of(shape: tuple[int, int, int], classes: int = CLASSES) -> dict[str, np.ndarray]:
    """Random images and labels, `shape` is (B, H, W)."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (*shape, 3)).astype(np.uint8),
        "label": rng.integers(0, classes, shape).astype(np.uint8),
    }


def ours(affinity: float, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """Our step on one device; returns what runs it once more, state carried on, and waits."""
    config = voc2012_deeplabv3_r50.get_config()
    config.model.dtype = "float32"
    config.loss.affinity = affinity
    run = step_of(config, batch)
    return lambda: jax.block_until_ready(run())


def step_of(
    config: ml_collections.ConfigDict, batch: dict[str, np.ndarray], classes: int = CLASSES
) -> Callable[[], Any]:
    """The training step of a config on one device; what it returns runs it once more."""
    model = segmenter.build(segmenter.config_of_run(config), classes, axis_name=AXIS)
    tx, _ = optim.optimiser(config.optim, config.num_steps)
    train_step = step.TrainStep(config, model, classes, tx)
    devices = Devices("pmap", 1)
    seed = devices.replicate(step.seed_of(config))
    state = [devices.replicate(jax.jit(train_step.init, static_argnums=0)((1, 65, 65, 3), seed))]
    program = devices.map(train_step, out="replicated", donate=True, shared=1)
    # On the device before the clock starts, as torch's are.
    placed = jax.tree.map(jax.numpy.asarray, devices.shard(batch))

    def run() -> Any:
        state[0] = program(state[0], placed, seed)
        return state[0].params

    return run


def torchs(compiled: bool, device: str, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """The step of torchvision's DeepLabv3-R50 with the same losses and optimiser."""
    gpu = device == "cuda"
    make = torchvision().models.segmentation.deeplabv3_resnet50
    model = make(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    model = model.to(device).train()
    images = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2).float() / 255
    if gpu:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(batch["label"]).to(device).long()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    criterion = torch.nn.CrossEntropyLoss(ignore_index=255)
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            out = forward(images)
            loss = criterion(out["out"].float(), labels) + 0.4 * criterion(
                out["aux"].float(), labels
            )
        loss.backward()
        optimiser.step()

    return run


def measure(size: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Times all contenders at one size, and prints a table."""
    batch = batch_of((batch_size, size, size))
    runs = {
        BASELINE: ours(0.0, batch),
        JOINT: ours(1.0, batch),
        "torchvision eager": torchs(False, "cpu", batch),
    }
    seconds = timing.interleaved(runs, repeats, f"train step, {size}")
    medians = timing.median(seconds)
    title = f"DeepLabv3-R50, batch {batch_size}, {size}², float32"
    timing.print_steps(title, medians, batch_size, BASELINE)
    return {
        "dtype": "float32",
        "batch": batch_size,
        "size": size,
        "median_seconds": medians,
        "images_per_second": {n: batch_size / s for n, s in medians.items()},
        "ratio_to_baseline": {n: s / medians[BASELINE] for n, s in medians.items()},
        "seconds": seconds,
    }


def main() -> None:
    """Times the steps, prints tables, writes results/train_step_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", type=int, nargs="+", default=[129, 257])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if jax.default_backend() != "cpu":
        parser.error("this is for a CPU; for an accelerator: python -m benchmarks.accelerator")
    path = timing.write(
        "train_step_cpu",
        {
            "command": "python -m benchmarks.train_step",
            **timing.provenance("flax", "optax", "torch", "torchvision"),
            "results": [measure(size, args.batch, args.repeats) for size in args.size],
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
