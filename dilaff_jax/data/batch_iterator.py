"""Iterators over batches: made ahead by Grain's workers, and ahead on the device."""

import collections
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import cv2
import grain
import numpy as np
from absl import flags

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import machine

ENDLESS = 1 << 62
Batch = dict[str, np.ndarray]


class BatchAt(Protocol):
    """What `Batches` iterates over: a picklable pure function from step to batch."""

    @property
    def num_batches(self) -> int:
        """Number of batches, or `ENDLESS`."""

    def __call__(self, step: int, /) -> Batch:
        """Makes the batch of a step."""

    def identity(self) -> dict[str, int]:
        """What a saved position must agree on for the step to mean the same."""

    def nbytes(self) -> int:
        """Size of a batch."""


class Batches(grain.DatasetIterator):
    """Iterator over `batch_at(0)`, `batch_at(1)`, ..., made ahead by Grain.

    A grain.DatasetIterator: `grain.checkpoint.CheckpointSave(batches)` stores its position in an
    Orbax checkpoint. Close it (or use `with`) to end its workers at once.
    """

    def __init__(self, batch_at: BatchAt, *, workers: int = 0, prefetch: int = 2) -> None:
        super().__init__()
        self.batch_at = batch_at
        self._workers = workers
        self._prefetch = prefetch
        self._step = 0
        self._running: list[grain.DatasetIterator] = []
        # Also when the interpreter exits, before the modules that closing needs are gone.
        weakref.finalize(self, _close, self._running)
        _check_shared_memory(batch_at, workers, prefetch)

    def __len__(self) -> int:
        """Number of batches from the beginning. Raises TypeError if the stream is endless."""
        if self.batch_at.num_batches >= ENDLESS:
            raise TypeError("an endless stream of batches has no length")
        return self.batch_at.num_batches

    def __next__(self) -> Batch:
        if not self._running:
            ahead = _start(self.batch_at, self._step, self._workers, self._prefetch)
            self._running.append(ahead)
        batch = next(self._running[0])
        self._step += 1
        # Plain views: Grain's shared-memory arrays free themselves when the last view is gone.
        return {key: np.asarray(value) for key, value in batch.items()}

    def get_state(self) -> dict[str, int]:
        """Position: the number of batches taken, and what the stream depends on."""
        return {"step": self._step, **self.batch_at.identity()}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues behind the batch after which `state` was saved.

        Raises:
            UserError: the state is of a stream with another seed, batch size or number of
                examples, in which the position would mean other examples.
        """
        own = self.get_state()
        differing = [k for k in own if k != "step" and state.get(k) != own[k]]
        if differing or "step" not in state:
            raise UserError(
                f"saved data position {state} does not fit this run {own}: "
                f"{', '.join(differing) or 'step'} differ, so it would continue with other "
                "examples; restore those settings, or start in a new workdir"
            )
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Ends the workers; the next batch starts them again."""
        # Not by `_close`: Grain calls this at exit too, when the names of this module are gone.
        while self._running:
            self._running.pop().close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def _start(batch_at: BatchAt, step: int, workers: int, prefetch: int) -> grain.DatasetIterator:
    """Grain's iterator over the batches from `step` on."""
    if not flags.FLAGS.is_parsed():
        # Grain reads absl flags; notebooks and tests have none, and the defaults are meant.
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.range(step, batch_at.num_batches).map(batch_at)
    if not workers:
        read = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
        return iter(dataset.to_iter_dataset(read))
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(read).mp_prefetch(options, _init_worker))


def _init_worker(index: int, count: int) -> None:
    """One core a worker; it leaves signals to its parent, and does not outlive it."""
    del index, count
    cv2.setNumThreads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    machine.end_with_parent()


def _check_shared_memory(batch_at: BatchAt, workers: int, prefetch: int) -> None:
    """Containers often have 64 MiB of it; running out would kill a worker with a bus error."""
    if not workers or not os.path.isdir("/dev/shm"):
        return
    needed = batch_at.nbytes() * workers * (prefetch + 2)
    free = shutil.disk_usage("/dev/shm").free
    if needed > free:
        raise UserError(
            f"workers={workers}, prefetch={prefetch} and batches of {batch_at.nbytes() >> 20} MiB "
            f"need {needed >> 20} MiB of shared memory, /dev/shm has {free >> 20} MiB free; lower "
            "config.data.workers or prefetch, or start the container with a larger --shm-size"
        )


class DevicePrefetch(grain.DatasetIterator):
    """Keeps batches ahead on the device: transfers run while the device computes.

    Its saved position is that of the last batch it *returned*; the ones ahead are made again after
    a restore. No threads: transfers are asynchronous, and batches are made ahead by `Batches`.
    """

    def __init__(self, batches: Batches, put: Callable[[Batch], Any], depth: int = 2) -> None:
        """Wraps `batches`.

        Args:
            batches: The iterator on the host, owned by this one from here on.
            put: Starts the transfer of a batch, such as `lambda b: jax.device_put(b, sharding)`.
            depth: Batches kept on the device besides the one that is being computed on.
        """
        super().__init__()
        self._batches = batches
        self._put = put
        self._depth = depth
        self._ahead: collections.deque[tuple[Any, dict[str, int]]] = collections.deque()
        self._state = batches.get_state()
        if depth < 1:
            raise UserError(f"depth={depth}: want at least 1")

    def __next__(self) -> Any:
        while len(self._ahead) <= self._depth:
            try:
                batch = next(self._batches)
            except StopIteration:
                break
            self._ahead.append((self._put(batch), self._batches.get_state()))
        if not self._ahead:
            raise StopIteration
        on_device, self._state = self._ahead.popleft()
        return on_device

    def get_state(self) -> dict[str, int]:
        """Position behind the last batch returned."""
        return dict(self._state)

    def set_state(self, state: dict[str, int]) -> None:
        """Continues behind the batch after which `state` was saved."""
        self._batches.set_state(state)
        self._ahead.clear()
        self._state = self._batches.get_state()

    def close(self) -> None:
        """Ends the workers."""
        self._batches.close()
        self._ahead.clear()
