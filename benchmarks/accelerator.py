"""Everything that a GPU or TPU has to show, in a few minutes, without data or network.

    pip install -e '.[bench,torch,dev]' && python -m benchmarks.accelerator --minutes 6

The most telling first, and each result in results/accelerator_DEVICE.json the moment it is there,
so that a run that is cut off leaves what it has. torch runs in a second process, which compiles
while we do; a clock runs only while the other process waits. A time is that of a call among n that
were issued before the last was waited for; contenders take turns, and the median of the rounds
counts.
"""

import argparse
import functools
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
import rich.table

from benchmarks import timing, train_step
from benchmarks.rival import Rival
from dilaff_jax import affinity, propagate, resize
from dilaff_jax.configs import voc2012_deeplabv3_r50
from dilaff_jax.models import geometry, segmenter
from dilaff_jax.models.gpu import conv as gpu_conv

OFFSETS = affinity.offsets()
STEPS = 4
Timed = Callable[[int], float]

FULL: dict[str, Any] = {
    "walk": [[8, 129, 129, 21], [1, 513, 513, 21], [1, 1024, 2048, 19], [1, 129, 129, 21]],
    # Images, rows, columns of the map; channels, features, rate.
    "convolution": [
        [16, 65, 65, 2048, 256, 12],
        [16, 65, 65, 2048, 256, 36],
        [16, 65, 65, 512, 512, 4],
        [16, 65, 65, 256, 256, 2],
    ],
    "step": [16, 513, 513, 21],
    "inference": [1, 1024, 2048, 19],
    "encoder": "resnet50",
}
SMOKE: dict[str, Any] = {
    "walk": [[1, 17, 19, 5]],
    "convolution": [[1, 9, 9, 16, 4, 3], [1, 9, 9, 8, 8, 2]],
    "step": [2, 33, 33, 21],
    "inference": [1, 33, 65, 19],
    "encoder": "resnet18",
}
# What each of our own forms is worth: the step with it and without.
OPTIONS = {
    "with XLA's own convolutions": {"model.convolution": "xla"},
    "with the loss in blocks of rows": {"loss.blocks": "rows"},
    "with XLA's own convolutions and blocks of rows": {
        "model.convolution": "xla",
        "loss.blocks": "rows",
    },
}


class Report:
    """The file of results, written anew with each of them, and what is left of the time."""

    def __init__(self, minutes: float, calls: int, rounds: int, name: str) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._calls, self._rounds, self._name = calls, rounds, name
        self._console = rich.console.Console()
        self._content: dict[str, Any] = {
            "command": f"python -m benchmarks.accelerator --minutes {minutes:g}",
            **timing.provenance("jaxlib", "flax"),
            "platform_version": jax.devices()[0].client.platform_version.splitlines(),
            "results": [],
            "left_out": [],
        }

    def note(self, **facts: Any) -> None:
        """Adds facts to the head of the file."""
        self._content |= facts
        self._write()

    def left_out(self, what: str, reason: str) -> None:
        """Says what is not there, and why."""
        self._content["left_out"].append({"what": what, "reason": reason})
        self._write()
        self._console.print(f"left out: {what}: {reason}")

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; else says what is left out."""
        left = self._end - time.monotonic()
        if left < seconds:
            self.left_out(what, f"{left:.0f} s were left, about {seconds:.0f} are needed")
        return left >= seconds

    def measure(
        self, what: str, contenders: Mapping[str, Timed], *, repeat: int = 1, **facts: Any
    ) -> None:
        """Times contenders in turns, `repeat` times as many calls; seconds of one, written."""
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(self._rounds):
            for name, run in contenders.items():
                seconds[name].append(run(repeat * self._calls))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        record = {"what": what, **facts, "median_seconds": medians, "seconds": seconds}
        self._content["results"].append(record)
        self._write()
        table = rich.table.Table(title=f"{what} {facts or ''}", title_justify="left")
        table.add_column("")
        table.add_column("ms", justify="right")
        for name, median in sorted(medians.items(), key=lambda item: item[1]):
            table.add_row(name, f"{1e3 * median:.3f}")
        self._console.print(table)

    def _write(self) -> None:
        self._content["seconds_left"] = self._end - time.monotonic()
        timing.write(self._name, self._content)


def clocked(run: Callable[[], Any]) -> Timed:
    """Seconds of a call, over n calls that are waited for once; runs once to compile."""
    jax.block_until_ready(run())

    def seconds(calls: int) -> float:
        jax.block_until_ready(run())
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    return seconds


def ceilings(report: Report, smoke: bool) -> None:
    """What the card does at most: bytes copied, and a large product in bfloat16."""
    n, side = (2**16, 256) if smoke else (2**28, 8192)
    buffer = jnp.zeros(n, jnp.float32)
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    copy, product = jax.jit(jnp.add), jax.jit(jnp.matmul)
    runs = {
        "copy": clocked(lambda: copy(buffer, 1.0)),
        "product": clocked(lambda: product(matrix, matrix)),
    }
    report.measure("ceilings", runs, bytes_copied=8 * n, product_flops=2 * side**3)


def propagation(report: Report, size: list[int], rival: Rival) -> None:
    """Both operators, kernel and XLA, against torch and a copy of inputs and result."""
    rival.prepare("walk", size, steps=STEPS)
    rng = np.random.default_rng(0)
    probs = rng.random(size, dtype=np.float32) + 0.01
    probs /= probs.sum(axis=-1, keepdims=True)
    weights = rng.random((*size[:-1], len(OFFSETS)), dtype=np.float32)
    arrays, logits = (jnp.asarray(probs), jnp.asarray(weights)), jnp.asarray(6 * weights - 3)

    def walk(backend: propagate.Backend) -> Callable[[], jax.Array]:
        run = jax.jit(
            lambda p, a: propagate.random_walk(p, a, OFFSETS, steps=STEPS, backend=backend)
        )
        return lambda: run(*arrays)

    def signed(backend: propagate.Backend) -> Callable[[], jax.Array]:
        run = jax.jit(lambda p, a: propagate.signed(p, a, OFFSETS, steps=STEPS, backend=backend))
        return lambda: run(arrays[0], logits)

    moved = 2 * probs.nbytes + weights.nbytes
    buffer, copy = jnp.zeros(moved // 8, jnp.float32), jax.jit(jnp.add)
    runs, differences = {"copy": clocked(lambda: copy(buffer, 1.0))}, {}
    # A CPU has no kernel, and interprets that for a TPU.
    kernel: propagate.Backend = "auto" if jax.default_backend() == "cpu" else "pallas"
    for name, made in (("random_walk", walk), ("signed", signed)):
        ours, xla = made(kernel), made("xla")
        differences[name] = float(jnp.abs(ours() - xla()).max())
        if differences[name] > 1e-5:
            raise RuntimeError(f"{name} at {size}: kernel and XLA differ by {differences[name]}")
        runs |= {f"{name}, kernel": clocked(ours), f"{name}, xla": clocked(xla)}
    runs |= rival.timed()
    # Many calls, as some are shorter than what waiting for the last one takes.
    facts = {"size": size, "bytes": moved, "differences": differences}
    report.measure("propagation", runs, repeat=5, **facts)


def convolution(report: Report, shape: list[int]) -> None:
    """One dilated 3×3 convolution, forward and both gradients, our form and XLA's."""
    batch, height, width, channels, features, rate = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, height, width, channels), jnp.bfloat16)
    filters = jax.random.normal(keys[1], (3, 3, channels, features), jnp.bfloat16)
    dy = jax.random.normal(keys[2], (batch, height, width, features), jnp.bfloat16)
    at = geometry.Geometry((1, 1), ((rate, rate), (rate, rate)), (rate, rate))
    forms = {
        "ours": lambda x, w: gpu_conv.conv(x, w, (1, 1), at.pads, rhs_dilation=at.rates),
        "xla": lambda x, w: geometry.native(x, w, at, depthwise=False),
    }

    def programs(form: Callable[..., jax.Array]) -> dict[str, Callable[..., jax.Array]]:
        return {
            "forward": lambda x, w, dy: form(x, w),
            "input gradient": lambda x, w, dy: jax.vjp(lambda x: form(x, w), x)[1](dy)[0],
            "filter gradient": lambda x, w, dy: jax.vjp(lambda w: form(x, w), w)[1](dy)[0],
        }

    runs = {}
    for name, form in forms.items():
        for direction, program in programs(form).items():
            compiled = jax.jit(program)
            runs[f"{direction}, {name}"] = clocked(functools.partial(compiled, x, filters, dy))
    report.measure("convolution", runs, shape=shape)


def step_config(sizes: Mapping[str, Any], weight: float, **changed: str) -> Any:
    """The config of VOC's DeepLabv3-R50 with these options, in bfloat16."""
    config = voc2012_deeplabv3_r50.get_config()
    config.model.encoder = sizes["encoder"]
    config.loss.affinity = weight
    for path, value in changed.items():
        part, name = path.split(".")
        config[part][name] = value
    return config


def batch_of(sizes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The images and labels of a training step."""
    images, height, width, classes = sizes["step"]
    return train_step.batch_of((images, height, width), classes)


def first_step(
    report: Report, config: ml_collections.ConfigDict, batch: dict[str, np.ndarray], cache: str
) -> Callable[[], Any]:
    """The step, ready; notes how long the first one took, and took again with the cache."""
    seconds = {}
    for name in ("nothing is cached", "compiled before"):
        jax.clear_caches()
        start = time.perf_counter()
        run = train_step.step_of(config, batch)
        jax.block_until_ready(run())
        seconds[name] = time.perf_counter() - start
    report.note(seconds_to_first_step=seconds, cache_bytes=_bytes_in(cache))
    return run


def steps(report: Report, sizes: Mapping[str, Any], rival: Rival, cache: str) -> Timed:
    """A training step: ours, with affinity, and torch's; returns the clock of ours."""
    size = sizes["step"]
    rival.prepare("step", size)
    batch = batch_of(sizes)
    run = first_step(report, step_config(sizes, 0.0), batch, cache)
    runs = {"dilaff_jax": clocked(run)}
    runs["dilaff_jax, with affinity"] = clocked(train_step.step_of(step_config(sizes, 1.0), batch))
    report.measure("training step", {**runs, **rival.timed()}, size=size)
    return runs["dilaff_jax"]


def option(report: Report, sizes: Mapping[str, Any], ours: Timed, name: str) -> None:
    """The step without some of our own forms, beside the step with all of them."""
    varied = train_step.step_of(step_config(sizes, 0.0, **OPTIONS[name]), batch_of(sizes))
    contenders = {"dilaff_jax": ours, name: clocked(varied)}
    report.measure("option of the step", contenders, size=sizes["step"])


def inference(report: Report, sizes: Mapping[str, Any], rival: Rival) -> None:
    """Labels of one image at its full size: the network alone, with its head, and propagated."""
    size = sizes["inference"]
    rival.prepare("inference", size)
    image = jax.random.randint(jax.random.key(0), (*size[:3], 3), 0, 256).astype(jnp.uint8)
    config = step_config(sizes, 1.0)
    config.model.aux = False
    model = segmenter.build(segmenter.config_of_run(config), size[3])
    variables = jax.jit(lambda: model.init(jax.random.key(0), image[:, :65, :65], train=False))()
    refine = propagate.operator("signed", steps=STEPS)
    keep = propagate.operator("identity")

    def labels(operator: propagate.Operator) -> Callable[[], jax.Array]:
        @jax.jit
        def run(variables: Any, image: jax.Array) -> jax.Array:
            out: Any = model.apply(variables, image, train=False)
            logits, affinity_logits = out["logits"], out["affinity_logits"]
            return propagate.refine_logits(
                logits, affinity_logits, OFFSETS, size[1:3], operator, finite=True
            )[0]

        return lambda: run(variables, image)

    @jax.jit
    def alone(variables: Any, image: jax.Array) -> jax.Array:
        out: Any = model.apply(variables, image, train=False)
        return jnp.argmax(resize.bilinear(out["logits"], size[1:3]), axis=-1)

    runs = {
        "dilaff_jax, no affinity": clocked(lambda: alone(variables, image)),
        "dilaff_jax, not propagated": clocked(labels(keep)),
        "dilaff_jax, propagated": clocked(labels(refine)),
    }
    report.measure("inference", {**runs, **rival.timed()}, size=size)


def _bytes_in(folder: str) -> int:
    return sum(p.stat().st_size for p in pathlib.Path(folder).rglob("*") if p.is_file())


def main() -> None:
    """Measures in the order of what tells most, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that all runs")
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="", help="name of the file in results/")
    args = parser.parse_args()
    # The other half of the card's memory is for torch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    if jax.default_backend() == "cpu" and not args.smoke:
        parser.error("found a CPU only; --smoke runs tiny sizes there, to see that all works")
    sizes = SMOKE if args.smoke else FULL
    calls, rounds = (1, 1) if args.smoke else (args.calls, args.rounds)
    device = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower()).strip("_")
    output = args.output or f"accelerator_{device}{'_smoke' if args.smoke else ''}"
    report = Report(args.minutes, calls, rounds, output)
    with tempfile.TemporaryDirectory() as cache, Rival(report.left_out) as rival:
        report.note(torch=rival.hello())
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        ceilings(report, args.smoke)
        ours = steps(report, sizes, rival, cache)
        for size in sizes["walk"]:
            if report.has_time(f"propagation {size}", 15):
                propagation(report, size, rival)
        *apart, together = OPTIONS
        for name in [] if args.smoke else apart:
            if report.has_time(f"training step {name}", 60):
                option(report, sizes, ours, name)
        if report.has_time("inference", 40):
            inference(report, sizes, rival)
        for shape in sizes["convolution"]:
            if report.has_time(f"convolution {shape}", 20):
                convolution(report, shape)
        if report.has_time(f"training step {together}", 60):
            option(report, sizes, ours, together)
    print(f"written: {timing.RESULTS / output}.json")


if __name__ == "__main__":
    main()
