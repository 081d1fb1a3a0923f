"""Refinement of files: images, and what another network says of them; better results come out.

OUTPUT holds what prediction writes (see `predict_files`), and refinement.json: what changed, and,
where the truth is at hand, the figures before and after.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dilaff_jax import metrics
from dilaff_jax.data import images
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.runtime import files, parallel, provenance, reporting
from dilaff_jax.serving import foreign_files, foreign_windows, predict_files, tile_files
from dilaff_jax.serving.foreign_files import ARRAYS, Form
from dilaff_jax.serving.network import Network
from dilaff_jax.serving.predictor import Predictor, Result
from dilaff_jax.serving.video import SUFFIXES
from dilaff_jax.serving.writer import Options, Writer, write_classes

PLAIN, REFINED = "before", "after"
MAP_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
RESULT_SUFFIXES = (*ARRAYS, *MAP_SUFFIXES)
# Of the table: the figures that a person asks for first.
_MAIN = {
    "miou": "mean IoU",
    "boundary_iou": "boundary IoU",
    "boundary_f": "boundary F",
    **{f"trimap_miou/{w:g}": f"trimap mIoU, {w:g} px" for w in metrics.WIDTHS},
}


@dataclasses.dataclass
class Summary:
    """images: that were refined. changed, pixels: how many. figures: {before, after}, or {}.

    unplaced: names of TIFFs in tiles without georeference.
    """

    images: int
    changed: int
    pixels: int
    figures: dict[str, dict[str, float]]
    transitions: dict[str, float]
    unplaced: Sequence[str] = ()

    def __str__(self) -> str:
        share = self.changed / max(self.pixels, 1)
        lines = [f"{self.images} images refined; {share:.2%} of {self.pixels:,} pixels changed"]
        if self.figures:
            rows = [
                [title, *(f"{100 * self.figures[v][name]:.2f}" for v in (PLAIN, REFINED))]
                for name, title in _MAIN.items()
                if all(name in self.figures[v] for v in (PLAIN, REFINED))
            ]
            lines.append(reporting.table("per cent", ["", PLAIN, REFINED], rows))
        if self.unplaced:
            lines.append(predict_files.without_georeference(self.unplaced))
        return "\n".join(lines)


def refine(
    predictor: Predictor,
    source: pathlib.Path,
    results: pathlib.Path,
    options: Options,
    form: Form,
    truth: pathlib.Path | None = None,
    tolerance: float = 2.0,
) -> Summary:
    """Refines every image's result and writes what comes out; see `predict_files`.

    Names and, for label maps, classes are compared before anything is written. Of several processes
    of one run each takes its share of the images; the summary is of all.

    Args:
        predictor: with affinities.
        source: an image, or a folder of images.
        results: a folder with a file of the same name for each; see `foreign_files`.
        options: what to write, and where.
        form: of the results; its number of classes is that of the model where that has a
            segmentation of its own.
        truth: a folder with a label map of the same name for each, for the figures.
        tolerance: of the boundary F-score, in pixels.

    Raises:
        FileNotFoundError: a folder does not exist.
        DataError: a file that cannot be used.
        UserError: names that do not match, options that cannot be; another process failed.
    """
    if not predictor.has_affinity:
        raise UserError("this model has no affinity head, so it cannot refine")
    if predictor.network.ndim == 3:
        raise UserError("this model is of volumes; --mode refine refines results of images")
    if options.propagation == "without":
        raise UserError("--mode refine refines: give --propagation=with or both")
    options = predict_files.settled(options, predictor)
    suffixes = predict_files.known(predictor.network)
    pictures = predict_files.find(source, options.output, suffixes)
    clips = [path.name for path in pictures.values() if path.suffix.lower() in SUFFIXES]
    if clips:
        raise UserError(f"{', '.join(clips[:3])}: a video; give its frames as images")
    names = by_result(source, pictures)
    given = foreign_files.find(results, names, "result", RESULT_SUFFIXES)
    masks = foreign_files.find(truth, names, "label map", MAP_SUFFIXES) if truth else {}
    predict_files.check_targets(pictures | {f"result {k}": v for k, v in given.items()}, options)
    if options.tile and truth:
        raise UserError("in tiles nothing is compared with a truth; leave --truth out")
    network = predictor.network
    if options.tile and not network.segmentation:
        number = foreign_windows.number_of_classes(next(iter(given.values())), form)
    else:
        number = num_classes(network, given, form)
    form = dataclasses.replace(form, num_classes=number)
    classes = network.classes_for(number)
    options.output.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        write_classes(options.output, classes)
    every = predict_files.by_size(pictures, network)
    todo = []
    for name, path in parallel.share(every):
        result = result_name(source, path)
        todo.append(_Item(name, path, given[result], masks.get(result)))
    failure, unplaced, counts = None, [], _nothing(number, truth is not None, tolerance)
    try:
        if options.tile:
            unplaced = _in_tiles(predictor, todo, options, form, counts)
        else:
            counts = _whole(predictor, todo, options, form, counts, tolerance)
    except (OSError, UserError) as error:  # the others must hear of it before it is raised
        failure = error
    parallel.agree(failure, str(options.output))
    summary = _summary(len(pictures), parallel.sum_over_processes(counts), classes.names)
    summary.unplaced = unplaced
    if jax.process_index() == 0:
        _note(summary, network, options.output)
    return summary


class _Item(NamedTuple):
    """An image, the name of what comes of it, another network's result, and maybe the truth."""

    name: str
    image: pathlib.Path
    result: pathlib.Path
    mask: pathlib.Path | None


def _nothing(number: int, with_truth: bool, tolerance: float) -> dict[str, Any]:
    """The counts of no image."""
    any_, unknown = np.zeros((1, 1), np.uint8), np.full((1, 1), IGNORE_LABEL, np.uint8)
    compared = _counts(any_, any_, unknown, number, tolerance) if with_truth else {}
    return metrics.add({"changed": 0, "pixels": 0, "compared": compared})


def _whole(
    predictor: Predictor,
    todo: Sequence[_Item],
    options: Options,
    form: Form,
    counts: dict[str, Any],
    tolerance: float,
) -> dict[str, Any]:
    with Writer(options) as writer:
        for item in tqdm(todo, unit="image", disable=jax.process_index() > 0):
            result = _refined(predictor, item.image, item.result, form)
            plain, labels, number = result.plain, result.labels, form.num_classes
            writer.put(item.name, result)
            compared = {}
            if item.mask is not None:
                truth = foreign_files.read_labels(item.mask, number, labels.shape)
                compared = _counts(plain, labels, truth, number, tolerance)
            changed = int((labels != plain).sum())
            new = {"changed": changed, "pixels": labels.size, "compared": compared}
            counts = metrics.add(counts, new)
    return counts


def _in_tiles(
    predictor: Predictor,
    todo: Sequence[_Item],
    options: Options,
    form: Form,
    counts: dict[str, Any],
) -> list[str]:
    """Adds to `counts`; names of TIFFs without georeference come out."""
    in_tiles = tile_files.InTiles(predictor, options)
    for item in tqdm(todo, unit="image", disable=jax.process_index() > 0):
        changed, pixels = in_tiles.refine(item.name, item.image, item.result, form)
        counts["changed"] += changed
        counts["pixels"] += pixels
    return in_tiles.unplaced


def _summary(images: int, counts: Mapping[str, Any], names: tuple[str, ...]) -> Summary:
    figures, transitions, compared = {}, {}, counts["compared"]
    if compared:
        figures = {v: _figures(compared[v], names) for v in (PLAIN, REFINED)}
        transitions = metrics.transition_summary(compared["transitions"], class_names=names)
    return Summary(images, int(counts["changed"]), int(counts["pixels"]), figures, transitions)


def _note(summary: Summary, network: Network, folder: pathlib.Path) -> None:
    """Writes refinement.json."""
    content = dataclasses.asdict(summary) | {
        "operator": dict(network.refine),
        "provenance": provenance.provenance("flax", "numpy"),
    }
    files.write_text(folder / "refinement.json", files.json_text(content, indent=1) + "\n")


def result_name(source: pathlib.Path, image: pathlib.Path) -> str:
    """The name of an image's result: its path within the source, without suffix."""
    within = pathlib.Path(image.name) if source.is_file() else image.relative_to(source)
    return within.with_suffix("").as_posix()


def by_result(
    source: pathlib.Path, pictures: Mapping[str, pathlib.Path]
) -> dict[str, pathlib.Path]:
    """Images by the names of their results. Raises UserError for two of one name."""
    names: dict[str, pathlib.Path] = {}
    for path in pictures.values():
        first = names.setdefault(result_name(source, path), path)
        if first != path:
            raise UserError(f"{first} and {path} have one name; rename one of them")
    return names


def num_classes(network: Network, given: Mapping[str, pathlib.Path], form: Form) -> int:
    """Classes of the results.

    An affinity network by itself takes any: as many as the first array has, where its layout is
    known. Of label maps nobody says how many classes there are: those of the network, or as many as
    the highest value of all asks for.
    """
    own = len(network.classes.names)
    if network.segmentation:
        return own
    maps = [path for path in given.values() if path.suffix.lower() not in ARRAYS]
    if not maps:
        return foreign_files.count_classes(next(iter(given.values())), form) or own
    highest = -1
    for path in tqdm(maps, desc="classes of the label maps", unit="file", leave=False):
        values = np.unique(images.load_label(path))
        highest = max(highest, *values[values < 255].tolist(), -1)
    return max(own, highest + 1)


def _refined(predictor: Predictor, image: pathlib.Path, result: pathlib.Path, form: Form) -> Result:
    seen = predictor.read(image)
    logits = foreign_files.read(result, form, seen.pixels.shape[:2])
    try:
        return predictor.refine(seen, logits, align_corners=form.align_corners)
    except UserError as error:
        raise DataError(f"{result}: {error}") from error


def _counts(
    plain: np.ndarray, labels: np.ndarray, truth: np.ndarray, number: int, tolerance: float
) -> dict[str, Any]:
    """What is counted of one image, in the form of `metrics`."""
    counts: dict[str, Any] = {
        name: {
            "confusion": metrics.host_confusion(found, truth, number, truth != IGNORE_LABEL),
            **metrics.boundary_counts(found, truth, number, tolerance),
        }
        for name, found in ((PLAIN, plain), (REFINED, labels))
    }
    return counts | {"transitions": metrics.transitions(plain, labels, truth, number)}


def _figures(counts: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    own = dict(counts)
    regions = metrics.segmentation_summary(own.pop("confusion"), names)
    return regions | metrics.boundary_summary(**own)
