"""Prediction on files: an image, a folder of them, or videos; labels, overlays and more come out.

    OUTPUT/labels/NAME.png      class indices, 8 bit, one channel, the size of the (upright) image
    OUTPUT/overlays/NAME.png    the image with them over it; of a video NAME.mp4
    OUTPUT/probs/NAME.npz       if asked for: probs, float16 [H, W, C], and class_names
    OUTPUT/edges/NAME.png       if asked for: predicted class edges, a panel a dilation
    OUTPUT/classes.json, legend.png    what the indices and colours mean

NAME is the path within the input folder, without suffix. Of a video, each frame is one
NAME/000000.png. With propagation="both" the unrefined results are in labels_plain, overlays_plain.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from dilaff_jax.data import bands, folders, source_record, volumes
from dilaff_jax.data.bands import ARRAY_SUFFIXES
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import parallel
from dilaff_jax.serving import tile_files
from dilaff_jax.serving.network import Network
from dilaff_jax.serving.predictor import PROGRAMS, Predictor, Result
from dilaff_jax.serving.video import SUFFIXES, Video, VideoWriter, propagate_in_time
from dilaff_jax.serving.writer import Options, Writer, write_classes


@dataclasses.dataclass
class Summary:
    """images: and frames that were segmented. failed: {file: why}. unused: no image or video.

    unplaced: names of TIFFs in tiles without georeference.
    """

    images: int
    failed: dict[pathlib.Path, str]
    unused: Sequence[pathlib.Path] = ()
    unplaced: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [f"  {reason}" for reason in self.failed.values()]
        if lines:
            lines.insert(0, "1 file failed:" if len(lines) == 1 else f"{len(lines)} files failed:")
        if self.unused:
            names = [path.name for path in self.unused]
            lines.append(f"no image or video, not used: {source_record.listed(names)}")
        if self.unplaced:
            lines.append(without_georeference(self.unplaced))
        return "\n".join([f"{self.images} images segmented", *lines])


def without_georeference(names: Sequence[str]) -> str:
    """A line that names TIFFs which lie nowhere on earth."""
    return (
        f"no georeference, and so none in the labels: {source_record.listed(list(names))}; "
        "gdal_edit -a_srs and -a_ullr give one"
    )


def predict(predictor: Predictor, source: pathlib.Path, options: Options) -> Summary:
    """Segments a file, or all images and videos below a folder; a broken one stops nothing.

    Of several processes of one run each takes its share of the files, and sums up that.

    Raises:
        FileNotFoundError: `source` does not exist.
        UserError: no image or video in it; options that the model cannot fulfil; the output would
            overwrite an input.
    """
    options = settled(options, predictor)
    if options.tile and not predictor.network.segmentation:
        raise UserError(
            "this model is an affinity network by itself, without a segmentation; give it that of "
            "another network: --mode refine"
        )
    suffixes = known(predictor.network)
    files = find(source, options.output, suffixes)
    check_targets(files, options)
    movies = {n: p for n, p in files.items() if p.suffix.lower() in SUFFIXES}
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"the output {options.output} is a file; give a folder")
    if options.temporal and not movies:
        raise UserError(f"temporal propagation was asked for, but {source} holds no video")
    in_tiles = tile_files.InTiles(predictor, options) if options.tile else None
    options.output.mkdir(parents=True, exist_ok=True)
    first = jax.process_index() == 0
    if first:
        write_classes(options.output, predictor.classes)
    summary = Summary(0, {}, unused(source, options.output, suffixes) if first else ())
    stills = by_size({n: p for n, p in files.items() if n not in movies}, predictor.network)
    stills, clips = parallel.share(stills), parallel.share(list(movies.items()))
    if in_tiles is not None:
        summary.unplaced = in_tiles.unplaced
    with Writer(options) as writer:
        for name, path in tqdm(stills, unit="image", disable=not (stills and first)):
            with _reported(path, summary):
                if in_tiles is not None:
                    in_tiles.predict(name, path)
                else:
                    writer.put(name, predictor(path, refine=options.propagation != "without"))
                summary.images += 1
        for name, path in clips:
            with _reported(path, summary):
                _movie(predictor, name, path, options, writer, summary)
    return summary


def known(network: Network) -> Sequence[str]:
    """Suffixes of what a network takes: images and videos; of bands, images and arrays."""
    if network.ndim == 3:
        return volumes.SUFFIXES
    own = SUFFIXES if network.bands is None else ARRAY_SUFFIXES
    return (*folders.IMAGE_SUFFIXES, *own)


def find(
    source: pathlib.Path, output: pathlib.Path, suffixes: Sequence[str]
) -> dict[str, pathlib.Path]:
    """{name: file} of a file, or of the images and videos below a folder, in order of names.

    What is in `output` is passed over, and so are hidden files. A file keeps its suffix in its name
    where two differ in it alone, or where the name without is that of a folder or of another file:
    results never overwrite one another.

    Raises:
        FileNotFoundError: `source` does not exist.
        UserError: there is nothing to segment.
    """
    if source.is_file():
        return {_stem(source.name, suffixes): source}
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist; give an image, a video or a folder")
    if source.resolve() == output.resolve():
        raise UserError(f"input and output are both {source}; give another folder as output")
    paths = [p for p in _walk(source, output) if p.name.lower().endswith(tuple(suffixes))]
    if not paths:
        raise UserError(f"{source} holds no image or video; known are {', '.join(suffixes)}")
    full = {p.relative_to(source).as_posix(): p for p in paths}
    stems = [_stem(name, suffixes) for name in full]
    times = collections.Counter(stems)
    # Frames of clip.mp4 go where images of a folder clip/ go.
    parents = {str(parent) for name in full for parent in pathlib.PurePosixPath(name).parents}
    return {
        stem if times[stem] == 1 and stem not in full and stem not in parents else name: path
        for stem, (name, path) in zip(stems, full.items(), strict=True)
    }


def _stem(name: str, suffixes: Sequence[str]) -> str:
    """The name without its suffix, which may be none of these where a file is named itself."""
    found = folders.suffix_of(name, suffixes) or pathlib.PurePosixPath(name).suffix
    return name.removesuffix(found)


def unused(
    source: pathlib.Path, output: pathlib.Path, suffixes: Sequence[str]
) -> list[pathlib.Path]:
    """The files below a folder that are neither images nor videos, hidden ones left out."""
    if source.is_file():
        return []
    return [p for p in _walk(source, output) if not p.name.lower().endswith(tuple(suffixes))]


def _walk(source: pathlib.Path, output: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files but those in `output`, sorted; links are followed, each folder once."""
    skip = output.resolve() if source.resolve() in output.resolve().parents else None
    visited: set[pathlib.Path] = set()
    for parent, below, files in os.walk(source, followlinks=True):
        real = pathlib.Path(parent).resolve()
        if real in visited or real == skip:
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if not folders.hidden(name))
        yield from (pathlib.Path(parent, f) for f in sorted(files) if not folders.hidden(f))


def settled(options: Options, predictor: Predictor) -> Options:
    """The options with the default that suits the model."""
    if not predictor.has_affinity:
        asked = {
            "propagation": options.propagation in ("with", "both"),
            "edges": options.edges,
            "temporal": options.temporal,
        }
        for name, wanted in asked.items():
            if wanted:
                raise UserError(f"{name} was asked for, but this model has no affinity head")
    if predictor.network.ndim == 3 and (options.tile or options.edges):
        raise UserError(
            "tile and edges are of images; a volume that is too large goes through windows "
            "(config.inference.window)"
        )
    if options.tile and (options.probs or options.edges or options.temporal):
        raise UserError("in tiles labels are written; probs, edges and temporal need whole images")
    if options.temporal and options.propagation == "without":
        raise UserError("temporal propagation was asked for, and propagation='without'")
    chosen = options.propagation or ("with" if predictor.has_affinity else "without")
    return dataclasses.replace(options, propagation=chosen)


def check_targets(files: dict[str, pathlib.Path], options: Options) -> None:
    """Raises UserError if an input lies where outputs go, and might be overwritten."""
    for path in files.values():
        for folder in options.folders():
            if path.resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"the input {path} is in {folder}, where output goes; give another folder "
                    "as output"
                )


def by_size(files: dict[str, pathlib.Path], network: Network) -> list[tuple[str, pathlib.Path]]:
    """Files of one size behind one another, so that each program is compiled once."""
    if network.ndim == 3:
        return sorted(files.items())  # their sizes are not known without reading them
    sizes = {name: _size(path, network.bands is not None) for name, path in files.items()}
    different = len(set(sizes.values()))
    if different > PROGRAMS:
        tqdm.write(
            f"{len(files)} images of {different} sizes, and a program is compiled for each; "
            "--pad=64 lets images of similar size share one"
        )
    return sorted(files.items(), key=lambda item: sizes[item[0]])


def _size(path: pathlib.Path, has_bands: bool = False) -> tuple[int, int]:
    """Width and height from the header; (0, 0) if there is none, which is reported later."""
    try:
        if has_bands:
            return bands.size_of(path)[::-1]
        with Image.open(path) as picture:
            return picture.size
    except Exception:  # Pillow's parsers raise nearly anything on broken files
        return 0, 0


@contextlib.contextmanager
def _reported(path: pathlib.Path, summary: Summary) -> Iterator[None]:
    """Turns what makes one file unusable into an entry of the summary."""
    try:
        yield
    except (DataError, PermissionError, FileNotFoundError) as error:
        text = str(error)
        summary.failed[path] = text if str(path) in text else f"{path}: {text}"
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            width, height = _size(path)
            size = f" of {height} x {width} pixels" if width else ""
            summary.failed[path] = (
                f"{path}: an image{size} does not fit into memory; --resize=0.5 segments it "
                "at half the size"
            )
            return
        raise


def _movie(
    predictor: Predictor,
    name: str,
    path: pathlib.Path,
    options: Options,
    writer: Writer,
    summary: Summary,
) -> None:
    """Segments the frames of one video."""
    with contextlib.closing(Video(path)) as video, contextlib.ExitStack() as open_files:
        overlays = {
            field: open_files.enter_context(
                VideoWriter(options.output / f"overlays{suffix}" / f"{name}.mp4", video.rate)
            )
            for suffix, field in options.variants.items()
            if options.overlays
        }
        frames = tqdm(video, total=video.count or None, desc=name, unit="frame")
        for number, result in enumerate(_frames(predictor, frames, options)):
            writer.put(f"{name}/{number:06d}", result, overlays=False)
            for field, file in overlays.items():
                file.write(result.overlay(getattr(result, field)))
            summary.images += 1
    if video.read < video.count:
        raise DataError(
            f"{path}: only {video.read} of {video.count} frames can be decoded, those before the "
            "first that is damaged; the results are of these"
        )


def _frames(
    predictor: Predictor, frames: Iterable[np.ndarray], options: Options
) -> Iterator[Result]:
    if options.temporal:
        return propagate_in_time(predictor, iter(frames), options.chunk)
    refine = options.propagation != "without"
    return (predictor(frame, refine=refine) for frame in frames)
