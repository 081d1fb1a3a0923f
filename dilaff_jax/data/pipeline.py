"""Batches for training and evaluation.

A batch is a pure function of its step: `batch_at(step)` works out which examples belong to it,
reads and augments them. From that follows all that is promised here:

* Order and augmentation depend on (seed, epoch, index) only. Not on workers, devices or processes:
  with the same *global* batch size, process p of P makes the p-th contiguous block of every global
  batch, so the rows of P processes one after the other are the rows of one.
* The saved position is the step, `{"step": 12, ...}`: a restored run continues exactly, also with
  another number of workers or processes.
* A process reads only the examples of its rows.

`batches.Batches` has Grain run the function in worker processes (or threads), ahead and in order.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from dilaff_jax.data import datasets
from dilaff_jax.data.augment import Augmentation, blank, pad, padding
from dilaff_jax.data.augment_volume import VolumeAugmentation
from dilaff_jax.data.batch_iterator import ENDLESS, Batch, Batches
from dilaff_jax.errors import UserError


def place(seed: int, position: int, length: int) -> tuple[int, int]:
    """Which example stands at a position of the endless training stream.

    Every epoch is a permutation of all examples, drawn from (seed, epoch); epochs follow each other
    without a gap, so no example is ever dropped.

    Args:
        seed: Seed of the run.
        position: 0, 1, ...: number of examples before this one, over all processes.
        length: Number of examples in the split.

    Returns:
        (epoch, index).
    """
    epoch, rank = divmod(position, length)
    return epoch, int(_order(seed, epoch, length)[rank])


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    # By sorting raw bits: NumPy promises that these, unlike its permutations, never change.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(length)
    return np.argsort(bits, kind="stable")


@dataclasses.dataclass(frozen=True)
class TrainBatchAt:
    """Makes the rows of this process of the global batch of a step."""

    source: datasets.Source
    augmentation: Augmentation | VolumeAugmentation
    seed: int
    batch_size: int
    num_batches: int
    process_index: int = 0
    process_count: int = 1

    def __call__(self, step: int) -> Batch:
        """`{"image": [b, H, W, C], "label": uint8 [b, H, W]}`, b = batch_size / processes."""
        rows = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * rows
        shape = (rows, *self.augmentation.crop_size)
        image = np.empty((*shape, self.source.channels), self.source.dtype)
        label = np.empty(shape, np.uint8)
        for row in range(rows):
            image[row], label[row] = self.example(first + row)
        return {"image": image, "label": label}

    def example(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The augmented example at a position of the stream."""
        epoch, index = place(self.seed, position, len(self.source))
        rng = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.seed, epoch, index]))
        )
        example = self.source[index]
        if isinstance(self.augmentation, VolumeAugmentation):
            assert self.source.spacings is not None
            spacing = self.source.spacings[index]
            return self.augmentation(example["image"], example["label"], rng, spacing)
        return self.augmentation(example["image"], example["label"], rng)

    def identity(self) -> dict[str, int]:
        """Seed, batch size and number of examples."""
        return {"seed": self.seed, "batch_size": self.batch_size, "examples": len(self.source)}

    def nbytes(self) -> int:
        """Size of a batch."""
        pixels = self.batch_size // self.process_count * math.prod(self.augmentation.crop_size)
        return pixels * (self.source.channels * self.source.dtype.itemsize + 1)


class Group(NamedTuple):
    """Images of like size: their indices, the size that they are padded to, rows of a batch.

    The rows are those of all processes together.
    """

    indices: tuple[int, ...]
    size: tuple[int, ...]
    rows: int

    @property
    def batches(self) -> int:
        """Batches that hold every image once."""
        return -(-len(self.indices) // self.rows)


@dataclasses.dataclass(frozen=True)
class EvalBatchAt:
    """Makes the rows of this process of an evaluation batch; see `eval_batches`."""

    source: datasets.Source
    groups: tuple[Group, ...]
    fill: tuple[float, ...]
    batch_size: int
    process_index: int = 0
    process_count: int = 1

    @property
    def num_batches(self) -> int:
        """Batches that hold every example once."""
        return sum(group.batches for group in self.groups)

    def __call__(self, step: int) -> Batch:
        """Rows beyond the last example are padding: mask False, index -1, size (0, 0)."""
        group = self.groups[0]
        for group in self.groups:
            if step < group.batches:
                break
            step -= group.batches
        rows = group.rows // self.process_count
        first = step * group.rows + self.process_index * rows
        batch = {
            "image": blank((rows, *group.size, self.source.channels), self.source.dtype, self.fill),
            "label": np.full((rows, *group.size), 255, np.uint8),
            "mask": np.zeros(rows, bool),
            "size": np.zeros((rows, len(group.size)), np.int32),
            "index": np.full(rows, -1, np.int32),
        }
        for row, index in enumerate(group.indices[first : first + rows]):
            example = self.source[index]
            batch["image"][row], batch["label"][row] = pad(
                example["image"], example["label"], group.size, self.fill
            )
            batch["mask"][row], batch["index"][row] = True, index
            batch["size"][row] = example["label"].shape
        return batch

    def identity(self) -> dict[str, int]:
        """Batch size and number of examples."""
        return {"batch_size": self.batch_size, "examples": len(self.source)}

    def nbytes(self) -> int:
        """Size of the largest batch, but for a few bytes."""
        pixels = max(g.rows * math.prod(g.size) for g in self.groups) // self.process_count
        return pixels * (self.source.channels * self.source.dtype.itemsize + 1)


def train_batches(
    config: Any,
    source: datasets.Source,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """The training stream of this process, shuffled anew every epoch.

    Args:
        config: `config.data`.
        source: Its training split, from `datasets.load`.
        batch_size: Size of the *global* batch, over all processes.
        seed: Seed of order and augmentation.
        num_epochs: End after so many passes; the examples of the last, partial batch are left out.
            None: endless.
        process_index: Which process this is (`jax.process_index()`).
        process_count: Of how many.

    Returns:
        Iterator over `{"image": [b, *crop_size, C], "label": uint8 [b, *crop_size]}` with
        b = batch_size / process_count; images are uint8 RGB, or of the source's bands and dtype.

    Raises:
        UserError: a batch size that is no multiple of process_count.
    """
    _check_batch(batch_size, process_index, process_count)
    if seed < 0:
        raise UserError(f"seed={seed}: want 0 or more")
    num_batches = ENDLESS if num_epochs is None else num_epochs * len(source) // batch_size
    if num_batches < 1:
        raise UserError(
            f"{source.title} has {len(source)} examples: {num_epochs} epochs do not fill one batch "
            f"of {batch_size}; lower the batch size"
        )
    if len(config.crop_size) != source.ndim:
        raise UserError(
            f"config.data.crop_size is {tuple(config.crop_size)}, and {source.title} holds "
            f"{'volumes' if source.ndim == 3 else 'images'}; give {source.ndim} sides"
        )
    augmentation: Augmentation | VolumeAugmentation
    if source.ndim == 3:
        assert source.bands is not None
        augmentation = VolumeAugmentation.from_config(config, source.bands)
    else:
        augmentation = Augmentation.from_config(config, source.bands)
    batch_at = TrainBatchAt(
        source,
        augmentation,
        seed,
        batch_size,
        num_batches,
        process_index,
        process_count,
    )
    return Batches(batch_at, workers=config.workers, prefetch=config.prefetch)


def eval_batches(
    config: Any,
    source: datasets.Source,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    unit: int = 0,
) -> Batches:
    """Every example of a split exactly once, in batches of one static shape, or of a few.

    Args:
        config: `config.data`.
        source: The split to read, from `datasets.load`.
        batch_size: Size of the *global* batch.
        process_index: Which process this is.
        process_count: Of how many; all get equally many batches.
        unit: 0 for one shape, and the examples in order. Else images of like size come together,
            see `like_sizes`, in batches whose rows are a multiple of this, the number of devices.

    Returns:
        Iterator over `{"image": [b, H, W, C], "label": uint8 [b, H, W], "mask": bool [b],
        "size": int32 [b, 2], "index": int32 [b]}`: the image lies at the top left, `size` is its
        height and width; the rest is `pad_rgb` (of bands their means) and 255. Rows with mask
        False are padding.

    Raises:
        UserError: a batch size that is no multiple of process_count; an image
            larger than `config.eval_size`.
    """
    _check_batch(batch_size, process_index, process_count)
    size = eval_size(config, source)
    groups: tuple[Group, ...] = (Group(tuple(range(len(source))), size, batch_size),)
    if unit and config.eval_size is None:
        groups = like_sizes(source.sizes, batch_size, unit)
    batch_at = EvalBatchAt(
        source,
        groups,
        padding(config.pad_rgb, source.bands),
        batch_size,
        process_index,
        process_count,
    )
    # Workers end with their batches, and what they keep in memory with them.
    workers = 0 if source.cache else config.workers
    return Batches(batch_at, workers=workers, prefetch=config.prefetch)


def like_sizes(sizes: np.ndarray, batch_size: int, unit: int) -> tuple[Group, ...]:
    """Few groups of images, so that one large image costs memory and time once, not in every batch.

    From the largest image down, a group holds areas to a quarter of its first; it joins the one
    before where it would be padded to more than half of that one's area (tall images and wide ones
    together need a box that is larger than each). Batches of larger images have fewer rows, so that
    none has more pixels than `batch_size` images of the group of the median. Images of one size are
    one group, in order. Our choice.

    Args:
        sizes: (height, width) of each image, `[N, 2]`; of volumes `[N, 3]`.
        batch_size: the most rows.
        unit: what rows are a multiple of.
    """
    sizes = np.asarray(sizes, np.int64)
    areas = np.prod(sizes, axis=1)
    order = np.argsort(-areas, kind="stable")
    levels = np.floor(np.log(areas[order[0]] / areas[order]) / np.log(4) + 1e-9).astype(int)
    members: list[np.ndarray] = []
    for level in np.unique(levels):
        group = order[levels == level]
        if members and 2 * _box(sizes[group]).prod() > _box(sizes[members[-1]]).prod():
            members[-1] = np.concatenate([members[-1], group])
        else:
            members.append(group)
    boxes = [_box(sizes[group]) for group in members]
    middle = next(i for i, group in enumerate(members) if order[len(order) // 2] in group)
    budget = batch_size * int(np.prod(boxes[middle]))
    groups = []
    for group, box in zip(members, boxes, strict=True):
        rows = min(batch_size, budget // int(np.prod(box)), -(-len(group) // unit) * unit)
        rows = max(unit, rows // unit * unit)
        indices = tuple(int(i) for i in np.sort(group))
        groups.append(Group(indices, tuple(map(int, box)), rows))
    return tuple(groups)


def _box(sizes: np.ndarray) -> np.ndarray:
    return sizes.max(axis=0)


def eval_size(config: Any, source: datasets.Source) -> tuple[int, ...]:
    """The (height, width) of all evaluation images: `config.eval_size`, or what the split needs.

    It is not rounded up: padding changes predictions next to it, so sets of one size get none.

    Raises:
        UserError: an image is larger than `config.eval_size`.
    """
    largest = source.sizes.max(axis=0)
    if config.eval_size is None:
        return tuple(map(int, largest))
    if len(config.eval_size) != source.ndim:
        raise UserError(
            f"config.data.eval_size is {tuple(config.eval_size)}; {source.title} needs "
            f"{source.ndim} sides"
        )
    size = tuple(config.eval_size)
    too_large = np.flatnonzero((source.sizes > np.array(size)).any(axis=1))
    if len(too_large):
        name, its_size = source.names[too_large[0]], tuple(map(int, source.sizes[too_large[0]]))
        raise UserError(
            f"config.data.eval_size={size} is smaller than {len(too_large)} images of "
            f"{source.title}, such as {name!r} {its_size}; want at least "
            f"{tuple(map(int, largest))}, or None, or a smaller config.data.resize"
        )
    return size


def _check_batch(batch_size: int, process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index={process_index} is not in 0..{process_count - 1}")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"global batch size {batch_size} is no positive multiple of {process_count} processes"
        )
