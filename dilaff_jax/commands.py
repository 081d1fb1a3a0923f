"""The modes of the command that use a trained network, and their flags: predict, view."""

import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import ml_collections
from absl import app, flags

if TYPE_CHECKING:
    from dilaff_jax.predictor import Predictor

MODES = ("predict", "view")

INPUT = flags.DEFINE_string("input", None, "predict, view: an image or a folder; or a video.")
OUTPUT = flags.DEFINE_string("output", None, "predict: folder for what is found.")
MODEL = flags.DEFINE_string(
    "model", None, "predict, view: an exported file, in place of --workdir."
)
PROPAGATION = flags.DEFINE_enum(
    "propagation",
    None,
    ["with", "without", "both"],
    "predict: refine along the affinities; by default with, where the model has them.",
)
OVERLAYS = flags.DEFINE_bool("overlays", True, "predict: write images with labels over them.")
PROBS = flags.DEFINE_bool("probs", False, "predict: write class probabilities, as .npz.")
EDGES = flags.DEFINE_bool("edges", False, "predict: write pictures of predicted class edges.")
TEMPORAL = flags.DEFINE_bool("temporal", False, "predict: propagate videos in time too.")
CHUNK = flags.DEFINE_integer(
    "chunk", 8, "predict --temporal: frames refined at a time; changes memory, not results."
)
PAD = flags.DEFINE_integer(
    "pad",
    1,
    "predict: pad images to multiples of this (such as 64), so that similar sizes share one "
    "compiled program; 1 for exact sizes.",
)
RESIZE = flags.DEFINE_float(
    "resize", None, "predict: factor by which images are scaled first; by default the training's."
)
PORT = flags.DEFINE_integer("port", 8080, "view: of the local page.")


def parser(config: flags.FlagHolder) -> Callable[[Sequence[str]], list[str]]:
    """The parser of absl, whose traceback ends in one line where `config`, --config, is wrong.

    An error that a config file raises itself keeps its traceback.
    """

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            rest = app.parse_flags_with_usage(list(arguments))
            getattr(config.value, "seed", None)  # a file that is missing shows when it is used
        except (KeyError, AttributeError, TypeError, ValueError, OSError) as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if "ml_collections" not in pathlib.Path(frame.f_code.co_filename).parts:
                raise
            first, *hints = str(error.args[0] if error.args else error).splitlines()
            if isinstance(error, KeyError | AttributeError):
                key = first.strip("\"'")
                first = f"the config has no key {key!r}"
            print(
                "FATAL Flags parsing error: --config:", first, *hints, sep="\n  ", file=sys.stderr
            )
            sys.exit(1)
        return rest

    return parse


def run(mode: str, config: ml_collections.ConfigDict | None, workdir: pathlib.Path) -> None:
    """Runs one of `MODES`."""
    match mode:
        case "predict":
            _predict(config, workdir)
        case "view":
            _view(config, workdir)


def load(
    config: ml_collections.ConfigDict | None,
    workdir: pathlib.Path,
    resize: float | None = None,
) -> "Predictor":
    """The model that --model or --workdir names; `resize` where --resize is not given.

    Raises:
        ValueError: neither or both are given.
    """
    from dilaff_jax import predictor

    if bool(MODEL.value) == (workdir != pathlib.Path()):
        raise ValueError("give either --workdir, a run, or --model, an exported file")
    path = pathlib.Path(MODEL.value) if MODEL.value else workdir
    factor = resize if RESIZE.value is None else RESIZE.value
    return predictor.load(path, config=config, pad=PAD.value, resize=factor)


def _predict(config: ml_collections.ConfigDict | None, workdir: pathlib.Path) -> None:
    from dilaff_jax import predict
    from dilaff_jax.prediction_files import Options, Propagation

    if not INPUT.value or not OUTPUT.value:
        raise ValueError("--mode predict needs --input and --output")
    options = Options(
        pathlib.Path(OUTPUT.value),
        cast(Propagation | None, PROPAGATION.value),
        OVERLAYS.value,
        PROBS.value,
        EDGES.value,
        TEMPORAL.value,
        CHUNK.value,
    )
    summary = predict.predict(load(config, workdir), pathlib.Path(INPUT.value), options)
    print(summary)
    if not summary.images:
        sys.exit(1)


def _view(config: ml_collections.ConfigDict | None, workdir: pathlib.Path) -> None:
    from dilaff_jax import network, view
    from dilaff_jax.data import datasets

    view.check_port(PORT.value)  # before the time that a network takes
    if INPUT.value:
        viewer = view.of_files(load(config, workdir), pathlib.Path(INPUT.value))
    elif workdir == pathlib.Path():
        raise ValueError("--mode view needs --workdir, or --model and --input")
    else:
        config = network.read_config(workdir) if config is None else config
        source = datasets.load(config.data, config.data.eval_split)
        viewer = view.of_source(load(config, workdir, resize=1.0), source)
    view.serve(viewer, PORT.value)
