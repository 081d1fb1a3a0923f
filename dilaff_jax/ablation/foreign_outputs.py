"""What another network says of images in files, with the affinities of a run here: as `Outputs`."""

import dataclasses
import pathlib
from collections.abc import Iterator

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dilaff_jax import resize
from dilaff_jax.ablation.network_outputs import Batch, Outputs
from dilaff_jax.data import bands
from dilaff_jax.data.augment import blank
from dilaff_jax.errors import UserError
from dilaff_jax.numerics import NEVER
from dilaff_jax.runtime import parallel
from dilaff_jax.serving import foreign_files, network, predict_files, refine_files
from dilaff_jax.serving.foreign_files import Form
from dilaff_jax.serving.inputs import read
from dilaff_jax.serving.predictor import CELL


@dataclasses.dataclass(frozen=True)
class Inputs:
    """images: a folder of them. results, truth: folders with a file of each image's name."""

    images: pathlib.Path
    results: pathlib.Path
    truth: pathlib.Path


class _Files:
    """Images, results and labels by index, in the form of a `datasets.Source`."""

    def __init__(self, inputs: Inputs, form: Form, net: network.Network) -> None:
        suffixes = predict_files.known(net)
        pictures = predict_files.find(inputs.images, inputs.images / ".no_output", suffixes)
        named = refine_files.by_result(inputs.images, pictures)
        self.names = list(named)
        self.results = foreign_files.find(
            inputs.results, named, "result", refine_files.RESULT_SUFFIXES
        )
        masks = foreign_files.find(inputs.truth, named, "label map", refine_files.MAP_SUFFIXES)
        self._images, self._masks, self._network = named, masks, net
        self.num_classes = refine_files.num_classes(net, self.results, form)
        self.class_names = net.classes_for(self.num_classes).names
        self.form = dataclasses.replace(form, num_classes=self.num_classes)
        every = tqdm(range(len(named)), desc="images")
        self.sizes = [self.image(index).shape[:2] for index in every]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        mask = self._masks[self.names[index]]
        return {"label": foreign_files.read_labels(mask, self.num_classes, self.sizes[index])}

    def image(self, index: int) -> np.ndarray:
        """As the network takes it, `[H, W, C]`."""
        return read(self._images[self.names[index]], self._network).pixels

    def logits(self, index: int) -> np.ndarray:
        """At the size of the image, finite."""
        size = self.sizes[index]
        given = foreign_files.read(self.results[self.names[index]], self.form, size)
        full = resize.bilinear_logits(
            jnp.asarray(given), size, align_corners=self.form.align_corners
        )
        return np.maximum(np.asarray(full), NEVER)


@dataclasses.dataclass
class ForeignOutputs(Outputs):
    """`Outputs` whose logits are read from files, batch by batch."""

    source: _Files  # type: ignore[assignment]

    def batches(self, rows: int, indices: np.ndarray | None = None) -> Iterator[Batch]:
        """As those of `Outputs`; beyond an image its last row and column are repeated."""
        assert self.affinity_logits is not None
        every = self.own if indices is None else indices
        for start in range(0, len(every), rows):
            own = every[start : start + rows]
            filled = np.resize(own, rows)
            logits = {int(i): self._padded(self.source.logits(int(i))) for i in own}
            yield Batch(
                own, np.stack([logits[int(i)] for i in filled]), self.affinity_logits[filled]
            )

    def _padded(self, logits: np.ndarray) -> np.ndarray:
        margins = [(0, n - m) for n, m in zip(self.size, logits.shape[:2], strict=True)]
        return np.pad(logits, [*margins, (0, 0)], mode="edge")


def compute(
    workdir: pathlib.Path, inputs: Inputs, form: Form, rows: int, folder: pathlib.Path
) -> tuple[ForeignOutputs, int]:
    """Runs a run's network over the images for its affinities; also returns the step.

    All images are padded to one size, so that one program serves them. Of several processes each
    has those of its share.

    Args:
        workdir: of the run.
        inputs: images, results and labels.
        form: of the results.
        rows: images at a time.
        folder: for what follows from the outputs.

    Raises:
        FileNotFoundError: no such run or folder.
        DataError: a file that cannot be used.
        UserError: no affinities; names that do not match.
    """
    net, model, step = network.from_run(workdir, refinement="config")
    if net.offsets is None:
        raise UserError(f"{workdir} has no affinity head, so there is nothing to refine with")
    source = _Files(inputs, form, net)
    unit = CELL * 2
    size = [-(-int(n) // unit) * unit for n in np.max(source.sizes, axis=0)]
    scaled = [round(n * net.resize) for n in size]
    program = jax.jit(lambda variables, x: net.apply(variables, x)[1])
    maps: np.ndarray | None = None
    every = parallel.share(np.arange(len(source)))
    bar = tqdm(total=len(every), desc="affinities", unit="image", disable=jax.process_index() > 0)
    with bar:
        for start in range(0, len(every), rows):
            own = every[start : start + rows]
            canvas = blank((rows, *size, net.channels), net.dtype, net.fill)
            for row, index in enumerate(own):
                image = source.image(int(index))
                canvas[row, : image.shape[0], : image.shape[1]] = image
            if scaled != size:
                to = scaled[0], scaled[1]
                canvas = np.stack([bands.resized(x, to, cv2.INTER_AREA) for x in canvas])
            found = np.asarray(program(net.variables, canvas).astype(jnp.float16))
            if maps is None:  # of which only what is written takes memory
                maps = np.zeros((len(source), *found.shape[1:]), found.dtype)
            maps[own] = found[: len(own)]
            bar.update(len(own))
    jax.clear_caches()
    outputs = ForeignOutputs(
        source=source,
        size=(size[0], size[1]),
        logits=np.empty((len(source), 0)),
        affinity_logits=maps,
        offsets=model.offsets,
        about={"files": str(inputs.images), "step": step},
        folder=folder,
        own=every,
    )
    return outputs, step
