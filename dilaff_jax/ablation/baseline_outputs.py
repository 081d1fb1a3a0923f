"""The rivals that are guided by colour, DenseCRF and PAMR, run over a network's outputs."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from dilaff_jax import baselines
from dilaff_jax.ablation import network_outputs
from dilaff_jax.ablation.network_outputs import Outputs
from dilaff_jax.ablation.operators import Candidate

Pool: TypeAlias = concurrent.futures.Executor


def missing(names: Sequence[str]) -> dict[str, str]:
    """{rival: why it cannot be run here}, of those named."""
    if "dense_crf" not in names:
        return {}
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        return {"dense_crf": "needs the package pydensecrf2: pip install 'dilaff-jax[crf]'"}
    return {}


@contextlib.contextmanager
def pool(processes: int) -> Iterator[Pool]:
    """Processes for DenseCRF, which holds Python's lock; 0 for one a core, 1 for a thread here."""
    count = processes or len(os.sched_getaffinity(0))
    if count == 1:
        executor: Pool = concurrent.futures.ThreadPoolExecutor(1)
    else:
        # Spawned: a fork of a process in which JAX runs its threads may hang.
        context = multiprocessing.get_context("spawn")
        executor = concurrent.futures.ProcessPoolExecutor(count, context, _init_worker)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def refined_labels(
    outputs: Outputs, candidate: Candidate, indices: np.ndarray, executor: Pool
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each image's index and classes after a rival, uint8 `[h, w]`."""
    if candidate.operator == "dense_crf":
        # A few ahead, so that workers never wait and memory stays bounded.
        ahead: list[tuple[int, Any]] = []
        for index in map(int, indices):
            task = executor.submit(_dense_crf, *_input(outputs, index), dict(candidate.options))
            ahead.append((index, task))
            if len(ahead) > 8:
                first, done = ahead.pop(0)
                yield first, done.result()
        for first, done in ahead:
            yield first, done.result()
        return
    for index in map(int, indices):
        probs, image = _input(outputs, index)
        if candidate.operator == "pamr":
            probs = np.asarray(baselines.pamr(probs[None], image[None], **dict(candidate.options)))[
                0
            ]
        yield index, probs.argmax(axis=-1).astype(np.uint8)


def _input(outputs: Outputs, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[h, w, C]` at full size and the image, without padding."""
    probs = network_outputs.probabilities(outputs.logits[index][None], outputs.size)
    height, width = outputs.source.sizes[index]
    # Of bands, what people see of them: these rivals go by colours.
    image = outputs.source.picture(outputs.source[index]["image"])
    return np.asarray(probs)[0, :height, :width], image


def _dense_crf(probs: np.ndarray, image: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
    return (
        baselines.dense_crf(probs[None], image[None], **options)[0].argmax(axis=-1).astype(np.uint8)
    )


def _init_worker() -> None:
    """Workers leave signals to their parent, which decides when they end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
