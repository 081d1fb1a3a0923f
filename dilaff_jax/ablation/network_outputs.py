"""What a trained network says of every image of a split, computed once and kept on disk.

Operators, biases and rivals are chosen and compared on these, so the network runs once a split.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tqdm import tqdm

from dilaff_jax import resize, resume
from dilaff_jax.ablation import arms, cache
from dilaff_jax.data import datasets, pipeline
from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.models import segmenter, test_time
from dilaff_jax.runtime import checkpoint
from dilaff_jax.runtime.parallel import AXIS, Devices


@dataclasses.dataclass
class Outputs:
    """Outputs of one run on one split, in the order of its images.

    Attributes:
        source: the split.
        size: (height, width) to which its images were padded; of volumes three sides.
        logits: float32 `[N, *spatial, C]`.
        affinity_logits: float16 `[N, *spatial', K]`, None without head. (Half precision costs
            them nothing that can be seen and halves gigabytes; logits decide ties, so they keep
            theirs.)
        offsets: `[K, ndim]`, None without head.
        about: which weights and images these are, for what is kept of them.
        folder: where results that follow from them are kept.
        own: indices of the images that this process has outputs of; of the others there are none.
    """

    source: datasets.Source
    size: tuple[int, ...]
    logits: np.ndarray
    affinity_logits: np.ndarray | None
    offsets: np.ndarray | None
    about: dict[str, Any]
    folder: pathlib.Path
    own: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def cut(self, maps: np.ndarray, index: int) -> np.ndarray:
        """The part of a padded `[..., *spatial]` map that is the image."""
        own: Any = (..., *(slice(int(n)) for n in self.source.sizes[index]))
        return maps[own]

    def batches(self, rows: int, indices: np.ndarray | None = None) -> Iterator["Batch"]:
        """Batches of one shape; the last is filled with repetitions, which are not counted."""
        every = self.own if indices is None else indices
        for start in range(0, len(every), rows):
            own = every[start : start + rows]
            filled = np.resize(own, rows)
            affinity_logits = None if self.affinity_logits is None else self.affinity_logits[filled]
            yield Batch(own, self.logits[filled], affinity_logits)


@dataclasses.dataclass
class Batch:
    """Rows of `Outputs`; `indices` are those of its first rows, the others repeat them."""

    indices: np.ndarray
    logits: np.ndarray
    affinity_logits: np.ndarray | None


def compute(run: arms.Run, split: str, *, best: bool = False) -> Outputs:
    """Reads the outputs of a run on a split, or computes and keeps them.

    Of several processes each computes those of its share of the images, anew each time.

    Args:
        run: that is complete.
        split: of its data set.
        best: of its best state, as prediction takes it, instead of its last.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        UserError: its checkpoint is of another model.
    """
    config = run.config
    source = _source(ml_collections.FrozenConfigDict(config.data), split)
    size = pipeline.eval_size(config.data, source)
    model = segmenter.build(segmenter.config_of_run(config), source.num_classes, axis_name=AXIS)
    many = jax.process_count() > 1
    name = split.replace("/", "_") + "-best" * best + f"-process-{jax.process_index()}" * many
    folder, own = run.workdir / "analysis" / name, np.arange(len(source))
    about = _about(run, split, source, size)
    variables = None
    if best:
        about["step"], variables = _variables(run, model, best=True)
    if many or cache.read(folder / "about.json", about) is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        own = fill(folder, run, split, model, source, variables or _variables(run, model)[1])
        cache.write(folder / "about.json", about, True)
    file = folder / "edges.npy"
    return Outputs(
        source=source,
        size=size,
        logits=np.load(folder / "logits.npy", mmap_mode="r"),
        affinity_logits=np.load(file, mmap_mode="r") if file.exists() else None,
        offsets=model.offsets,
        about=about,
        folder=folder,
        own=own,
    )


@functools.lru_cache(maxsize=4)
def _source(config: ml_collections.FrozenConfigDict, split: str) -> datasets.Source:
    """One for all runs, as it may hold its images in memory."""
    return datasets.load(config, split)


def _about(
    run: arms.Run, split: str, source: datasets.Source, size: tuple[int, ...]
) -> dict[str, Any]:
    config = resume.as_json(run.config)
    return {
        "weights": resume.deciding(config),
        "inference": config["inference"],
        "split": split,
        "images": len(source),
        "first": source.names[0],
        "size": list(size),
    }


def fill(
    folder: pathlib.Path,
    run: arms.Run,
    split: str,
    model: segmenter.Segmenter,
    source: datasets.Source,
    variables: Mapping[str, Any],
) -> np.ndarray:
    """Runs the network over the split, writing as it goes; returns which images it has."""
    config = run.config
    devices = Devices.of(config.parallel)
    program = devices.map(_program(model, config.inference), out="sharded")
    variables = devices.place(dict(variables))
    rows = -(-config.eval.batch_size // devices.total) * devices.total
    files: dict[str, np.ndarray] = {}
    first, every = jax.process_index(), jax.process_count()
    bar = tqdm(
        total=len(source) // every,
        desc=f"outputs of {run} on {split}",
        unit="image",
        disable=first > 0,
    )
    own = np.zeros(len(source), bool)
    batches_of = functools.partial(pipeline.eval_batches, process_index=first, process_count=every)
    with bar, batches_of(config.data, source, batch_size=rows) as batches:
        for batch in batches:
            results = program(variables, devices.shard({"image": batch["image"]}))
            mask = batch["mask"]
            for name, x in results.items():
                values = devices.local_rows(x)[mask]
                if name not in files:
                    shape = (len(source), *values.shape[1:])
                    path = folder / f"{name}.npy"
                    files[name] = np.lib.format.open_memmap(path, "w+", values.dtype, shape)
                files[name][batch["index"][mask]] = values
            own[batch["index"][mask]] = True
            bar.update(int(mask.sum()))
    for file in files.values():
        file.flush()  # type: ignore[attr-defined]
    jax.clear_caches()  # the network's program is done with
    return np.flatnonzero(own)


def _variables(
    run: arms.Run, model: segmenter.Segmenter, *, best: bool = False
) -> tuple[int, dict[str, Any]]:
    like = segmenter.abstract_variables(model, run.config.data.crop_size)
    step, variables = checkpoint.read_variables(run.workdir, like, latest=not best)
    if not best and step != run.config.num_steps:
        raise UserError(f"{run.workdir} ends at step {step} of {run.config.num_steps}; train it")
    return step, variables


def _program(
    model: segmenter.Segmenter, config: ml_collections.ConfigDict
) -> Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    def program(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        def apply(x: jax.Array) -> Mapping[str, Any]:
            return model.apply(variables, x, train=False)  # type: ignore[return-value]

        logits, affinity_logits = test_time.infer(apply, batch["image"], model.offsets, config)
        assert logits is not None
        results = {"logits": logits.astype(jnp.float32)}
        return (
            results
            if affinity_logits is None
            else results | {"edges": affinity_logits.astype(jnp.float16)}
        )

    return program


@functools.partial(jax.jit, static_argnames=("size",))
def plain_labels(logits: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Classes without refinement, uint8 `[B, *size]`."""
    return jnp.argmax(resize.bilinear(logits, size), axis=-1).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("size",))
def probabilities(logits: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Class probabilities at full size, float32 `[B, *size, C]`: what rivals refine."""
    return jax.nn.softmax(resize.bilinear(logits, size))


def padded_labels(outputs: Outputs, indices: np.ndarray, rows: int) -> np.ndarray:
    """Labels at the size of the padded images, 255 where there is no image: `[rows, *size]`."""
    result = np.full((rows, *outputs.size), IGNORE_LABEL, np.uint8)
    for row, index in enumerate(indices):
        label = outputs.source[int(index)]["label"]
        own: Any = (row, *(slice(n) for n in label.shape))
        result[own] = label
    return result
