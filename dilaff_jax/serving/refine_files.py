"""Refinement of files: images, and what another network says of them; better results come out.

OUTPUT holds what prediction writes (see `predict_files`), and refinement.json: what changed, and,
where the truth is at hand, the figures before and after.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from dilaff_jax import metrics
from dilaff_jax.data import images
from dilaff_jax.data.class_list import Classes
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.runtime import files, provenance, reporting
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

    Names and, for label maps, classes are compared before anything is written.

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
        UserError: names that do not match, options that cannot be.
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
    if options.tile:
        if truth:
            raise UserError("in tiles nothing is compared with a truth; leave --truth out")
        summary = _in_tiles(predictor, source, pictures, given, options, form)
        _note(summary, predictor.network, options.output)
        return summary
    form = dataclasses.replace(form, num_classes=num_classes(predictor.network, given, form))
    options.output.mkdir(parents=True, exist_ok=True)
    counts, changed, pixels, classes = None, 0, 0, None
    with Writer(options) as writer:
        for name, path in tqdm(predict_files.by_size(pictures, predictor.network), unit="image"):
            own = result_name(source, path)
            result = _refined(predictor, path, given[own], form)
            if classes is None:
                classes = result.classes
                write_classes(options.output, classes)
            writer.put(name, result)
            changed += int((result.labels != result.plain).sum())
            pixels += result.labels.size
            if truth:
                new = _counts(result, masks[own], tolerance)
                counts = metrics.add(new, *([counts] if counts else []))
    figures, transitions = {}, {}
    if counts and classes:
        figures = {v: _figures(counts[v], classes.names) for v in (PLAIN, REFINED)}
        transitions = metrics.transition_summary(counts["transitions"], class_names=classes.names)
    summary = Summary(len(pictures), changed, pixels, figures, transitions)
    _note(summary, predictor.network, options.output)
    return summary


def _in_tiles(
    predictor: Predictor,
    source: pathlib.Path,
    pictures: Mapping[str, pathlib.Path],
    given: Mapping[str, pathlib.Path],
    options: Options,
    form: Form,
) -> Summary:
    network, first = predictor.network, next(iter(given.values()))
    classes = network.classes
    if not network.segmentation:
        number = foreign_windows.number_of_classes(first, form)
        classes = classes if number == len(classes.names) else Classes.numbered(number)
    form = dataclasses.replace(form, num_classes=len(classes.names))
    in_tiles = tile_files.InTiles(predictor, options)
    options.output.mkdir(parents=True, exist_ok=True)
    write_classes(options.output, classes)
    changed = pixels = 0
    for name, path in tqdm(pictures.items(), unit="image"):
        result = given[result_name(source, path)]
        counts = in_tiles.refine(name, path, result, form)
        changed, pixels = changed + counts[0], pixels + counts[1]
    return Summary(len(pictures), changed, pixels, {}, {}, in_tiles.unplaced)


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


def _counts(result: Result, mask: pathlib.Path, tolerance: float) -> dict[str, Any]:
    """What is counted of one image, in the form of `metrics`."""
    plain, labels, number = result.plain, result.labels, len(result.classes.names)
    truth = foreign_files.read_labels(mask, number, labels.shape)
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
