"""Parameters, FLOPs and memory of a program, from XLA, and its time beside that of others.

FLOPs are of the program as written, before a backend replaces parts of it by library calls that are
not counted; a multiply-add is two, taps that fall on padding are not counted. XLA counts the body
of a loop once, so propagation is counted as (no step) + steps · (one step - no step).
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import tqdm

PAUSE_SECONDS = 0.3


def parameters(variables: Any) -> int:
    """Number of trained parameters."""
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


def gradient(model: nn.Module) -> Callable[[Any, jax.Array], Any]:
    """The backward pass of a stand-in loss that reads all outputs."""

    def loss(params: Any, statistics: Any, images: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        dropout = {"dropout": jax.random.key(0)}
        out, state = model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs=dropout
        )
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(out)), state

    return lambda variables, images: jax.grad(loss, has_aux=True)(
        variables["params"], variables["batch_stats"], images
    )


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Of the program before a backend changes it, the same on every machine.

    Counted by JAX's CPU, as GPUs count no program that is not compiled; where JAX was told to do
    without (JAX_PLATFORMS=cuda), of the compiled one.

    Args:
        function: what is counted.
        arguments: arrays, or their shapes and dtypes.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    with jax.default_device(device):
        lowered = jax.jit(function).lower(*shapes)
        analysis: Any = lowered.cost_analysis() or lowered.compile().cost_analysis()
    return float(analysis["flops"])


def temporaries(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that the compiled program needs beside arguments and results."""
    analysis: Any = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], repeats: int = 7, title: str = ""
) -> dict[str, list[float]]:
    """Runs every contender once to warm up, then all in turn `repeats` times; seconds of each run.

    Interleaved, so that a slow spell of a shared machine falls on all. A pause before each lets the
    threads of the library that ran before it stop spinning (OpenMP's wait actively for 0.2 s). A
    contender must return only when its work is done (`jax.block_until_ready`).
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with tqdm.tqdm(total=(repeats + 1) * len(contenders), desc=title, leave=False) as bar:
        for repeat in range(repeats + 1):
            for name, run in contenders.items():
                bar.set_postfix_str(name)
                time.sleep(PAUSE_SECONDS)
                start = time.perf_counter()
                run()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


def median(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns the median seconds of each contender."""
    return {name: statistics.median(runs) for name, runs in seconds.items()}
