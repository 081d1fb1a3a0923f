"""The modes of the command and their flags: each is a function of config and workdir."""

import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import ml_collections
from absl import app, flags

from dilaff_jax.errors import UserError

if TYPE_CHECKING:
    from dilaff_jax.runtime.refinement import Use
    from dilaff_jax.serving.foreign_files import Form
    from dilaff_jax.serving.predictor import Predictor
    from dilaff_jax.serving.writer import Options

Config: TypeAlias = ml_collections.ConfigDict | None
Workdir: TypeAlias = pathlib.Path | str  # the latter of one in a bucket
Mode: TypeAlias = Callable[[Config, Workdir], object]

TOPOLOGY = flags.DEFINE_string("topology", "auto", "preflight: a TPU slice such as v5e:4x4.")
INPUT = flags.DEFINE_string(
    "input",
    None,
    "predict, view: an image or a folder; or a video. refine, fit: an image or a folder.",
)
OUTPUT = flags.DEFINE_string(
    "output", None, "predict, refine: folder for labels, overlays and the rest."
)
MODEL = flags.DEFINE_string(
    "model",
    None,
    "predict, refine, view: an exported file or hf://OWNER/NAME, instead of --workdir.",
)
PROPAGATION = flags.DEFINE_enum(
    "propagation",
    None,
    ["with", "without", "both"],
    "predict, refine: refine along the affinities; by default with, where the model has them.",
)
OVERLAYS = flags.DEFINE_bool(
    "overlays", True, "predict, refine: write images with labels over them."
)
PROBS = flags.DEFINE_bool("probs", False, "predict, refine: write class probabilities, as .npz.")
EDGES = flags.DEFINE_bool(
    "edges", False, "predict, refine: write pictures of predicted class edges."
)
TEMPORAL = flags.DEFINE_bool("temporal", False, "predict: propagate videos in time too.")
CHUNK = flags.DEFINE_integer(
    "chunk", 8, "predict --temporal: frames refined at a time; changes memory, not results."
)
PAD = flags.DEFINE_integer(
    "pad",
    1,
    "predict, refine: pad images to multiples of this (such as 64), so that similar sizes share "
    "one compiled program; 1 for exact sizes.",
)
RESIZE = flags.DEFINE_float(
    "resize",
    None,
    "predict, refine: factor by which images are scaled first; by default the training's.",
)
TILE = flags.DEFINE_integer(
    "tile",
    0,
    "predict, refine: cut images into tiles of so many pixels, for those that do not fit into "
    "memory, and write GeoTIFF; 0 for whole images.",
)
TILE_MARGIN = flags.DEFINE_integer(
    "tile_margin", 256, "predict, refine --tile: pixels around a tile that the network sees."
)
LOGITS = flags.DEFINE_string(
    "logits",
    None,
    "refine, fit: folder with another network's result for each image: logits or probabilities "
    "as .npy or .npz, or label maps.",
)
LAYOUT = flags.DEFINE_enum(
    "layout",
    None,
    ["hwc", "chw"],
    "refine, fit: axes of the arrays, where the number of classes does not tell.",
)
ALIGN_CORNERS = flags.DEFINE_bool(
    "align_corners",
    False,
    "refine, fit: the other network enlarges its logits with corners aligned.",
)
CONFIDENCE = flags.DEFINE_float(
    "confidence", None, "refine, fit: of label maps, the probability of the class that they name."
)
TRUTH = flags.DEFINE_string(
    "truth", None, "refine, fit: folder with a true label map for each image, for figures."
)
REFINE = flags.DEFINE_enum(
    "refine",
    "fitted",
    ["fitted", "config", "none"],
    "eval, predict, refine, view: the refinement that --mode fit wrote, where it did; or the "
    "config's, or none.",
)
SPLIT = flags.DEFINE_string(
    "split", "", "fit: of the run's data; by default held_out, or the one that is evaluated."
)
CRITERION = flags.DEFINE_string("criterion", "", "fit: by default config.ablate.criterion.")
MAX_CLASS_LOSS = flags.DEFINE_float(
    "max_class_loss",
    None,
    "fit: points of IoU, such as 0.5, that a class may lose by the refinement; pixels are left as "
    "they are, by class and confidence, so that none loses more.",
)
PORT = flags.DEFINE_integer("port", 8080, "view: of the local page.")


def parser(config: flags.FlagHolder) -> Callable[[Sequence[str]], list[str]]:
    """The parser of absl, whose traceback ends in one line where `config`, --config, is wrong.

    An error that a config file raises itself keeps its traceback. A config that is not where
    --config says, but comes with the package, is taken from there. The first argument may be a
    mode.
    """

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            rest = app.parse_flags_with_usage([_shipped(a) for a in _with_mode(arguments)])
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


def _with_mode(arguments: Sequence[str]) -> list[str]:
    """`dilaff MODE ...` as `dilaff --mode MODE ...`."""
    program, *rest = arguments
    if rest and rest[0] in MODES:
        rest[:1] = ["--mode", rest[0]]
    return [program, *rest]


def _shipped(argument: str) -> str:
    """`configs/NAME.py` of the package, where an argument names it and no such file is at hand."""
    path = pathlib.Path(argument.removeprefix("--config="))
    installed = pathlib.Path(__file__).parent / "configs" / path.name
    if path.parts != ("configs", path.name) or path.exists() or not installed.is_file():
        return argument
    print(f"{path} is taken from {installed}", file=sys.stderr)
    return argument.replace(str(path), str(installed))


def _start(config: Config, workdir: Workdir) -> ml_collections.ConfigDict:
    """Joins the other processes of a run, if there are any."""
    if config is None or workdir == pathlib.Path():
        raise app.UsageError(f"--mode {flags.FLAGS.mode} needs --config and --workdir")
    _join(config)
    return config


def _join(config: Config) -> None:
    from dilaff_jax.runtime import parallel

    given = {key: config.parallel[key] for key in parallel.PROCESS_KEYS} if config else {}
    parallel.initialize(**given)


def train(config: Config, workdir: Workdir) -> None:
    """Trains and evaluates; resumes what the workdir holds."""
    config = _start(config, workdir)
    from dilaff_jax import train

    train.train_and_evaluate(config, workdir)


def evaluate(config: Config, workdir: Workdir) -> None:
    """Evaluates the best state of a run."""
    config = _start(config, workdir)
    from dilaff_jax import evaluate

    evaluate.evaluate_run(config, workdir, _refinement())


def ablate(config: Config, workdir: Workdir) -> None:
    """Compares arms over seeds."""
    config = _start(config, workdir)
    from dilaff_jax.ablation import run

    run.ablate(config, workdir)


def study(config: Config, workdir: Workdir) -> None:
    """Compares changes of the config."""
    config = _start(config, workdir)
    from dilaff_jax.ablation import config_study

    config_study.study(config, workdir)


def preflight(config: Config, workdir: Workdir) -> None:
    """Compiles for a slice and says what it needs."""
    config = _start(config, workdir)
    from dilaff_jax.preflight import run
    from dilaff_jax.storage import mirror

    with mirror.written(workdir, "--workdir", kind="results") as folder:
        run.run(config, folder, TOPOLOGY.value)


def predict(config: Config, workdir: Workdir) -> None:
    """Segments files."""
    if not INPUT.value or not OUTPUT.value:
        raise UserError("--mode predict needs --input and --output")
    _join(config)
    import jax

    from dilaff_jax.serving import predict_files
    from dilaff_jax.storage import mirror

    given = mirror.local(INPUT.value, "--input")
    with mirror.written(OUTPUT.value, "--output", each=True) as output:
        summary = predict_files.predict(load(config, workdir), given, _what_to_write(output))
    print(summary)
    if not summary.images and (summary.failed or jax.process_count() == 1):
        sys.exit(1)


def refine(config: Config, workdir: Workdir) -> None:
    """Refines what another network says of files."""
    if not INPUT.value or not LOGITS.value or not OUTPUT.value:
        raise UserError("--mode refine needs --input, --logits and --output")
    _join(config)
    import jax

    from dilaff_jax.serving import predict_files, refine_files
    from dilaff_jax.storage import mirror

    truth = mirror.local(TRUTH.value, "--truth") if TRUTH.value else None
    given = mirror.local(INPUT.value, "--input"), mirror.local(LOGITS.value, "--logits")
    with mirror.written(OUTPUT.value, "--output", each=True) as output:
        options = _what_to_write(output)
        summary = refine_files.refine(load(config, workdir), *given, options, _form(), truth)
    if jax.process_index() == 0:
        print(summary)
    elif summary.unplaced:  # which the first has of its own images
        print(predict_files.without_georeference(summary.unplaced))


def _what_to_write(output: pathlib.Path) -> "Options":
    from dilaff_jax.serving.writer import Options, Propagation

    return Options(
        output,
        cast(Propagation | None, PROPAGATION.value),
        OVERLAYS.value,
        PROBS.value,
        EDGES.value,
        TEMPORAL.value,
        CHUNK.value,
        TILE.value,
        TILE_MARGIN.value,
    )


def fit(config: Config, workdir: Workdir) -> None:
    """Chooses the refinement on images that were not trained on."""
    if workdir == pathlib.Path():
        raise UserError("--mode fit needs --workdir, a run")
    _join(config)
    from dilaff_jax.ablation import fit, foreign_outputs
    from dilaff_jax.storage import mirror

    how = CRITERION.value, MAX_CLASS_LOSS.value
    with mirror.written(workdir, "--workdir", kind="results") as folder:
        if not fit.has_inputs(INPUT.value, LOGITS.value, TRUTH.value):
            fit.fit_run(config, folder, SPLIT.value, *how)
            return
        flagged = {"--input": INPUT.value, "--logits": LOGITS.value, "--truth": TRUTH.value}
        paths = [mirror.local(value or "", flag) for flag, value in flagged.items()]
        fit.fit_files(config, folder, foreign_outputs.Inputs(*paths), _form(), *how)


def _form() -> "Form":
    from dilaff_jax.serving.foreign_files import Form, Layout

    layout = cast(Layout | None, LAYOUT.value)
    return Form(layout, ALIGN_CORNERS.value, CONFIDENCE.value)


def view(config: Config, workdir: Workdir) -> None:
    """Serves a local page."""
    from dilaff_jax.data import datasets
    from dilaff_jax.serving import network, view_page
    from dilaff_jax.storage import mirror

    view_page.check_port(PORT.value)  # before the time that a network takes
    if INPUT.value:
        viewer = view_page.of_files(load(config, workdir), mirror.local(INPUT.value, "--input"))
    elif workdir == pathlib.Path():
        raise UserError("--mode view needs --workdir, or --model and --input")
    else:
        workdir = mirror.local(workdir, "--workdir")
        config = network.read_config(workdir) if config is None else config
        source = datasets.load(config.data, config.data.eval_split)
        viewer = view_page.of_source(load(config, workdir, resize=1.0), source)
    view_page.serve(viewer, PORT.value)


def doctor(config: Config, workdir: Workdir) -> None:
    """Says what this machine has, and what is wrong with it."""
    from dilaff_jax.runtime import doctor
    from dilaff_jax.storage import bucket, mirror

    # What is written to a bucket lies on this machine first.
    if bucket.is_address(workdir):
        print(f"{workdir}: {len(bucket.Bucket(str(workdir)).list())} objects")
        workdir = mirror.cache()
    if not doctor.report(pathlib.Path(workdir)):
        sys.exit(1)


MODES: Mapping[str, Mode] = {
    "train": train,
    "eval": evaluate,
    "ablate": ablate,
    "study": study,
    "preflight": preflight,
    "predict": predict,
    "refine": refine,
    "fit": fit,
    "view": view,
    "doctor": doctor,
}


def _refinement() -> "Use":
    return cast("Use", REFINE.value)


def load(config: Config, workdir: Workdir, resize: float | None = None) -> "Predictor":
    """The model that --model or --workdir names; `resize` where --resize is not given.

    Raises:
        UserError: neither or both are given.
    """
    from dilaff_jax.runtime import parallel
    from dilaff_jax.serving import predictor

    if bool(MODEL.value) == (workdir != pathlib.Path()):
        raise UserError("give either --workdir, a run, or --model, an exported file or hf://...")
    path = MODEL.value or workdir
    parallel.local_devices()  # before anything else asks JAX, which says less
    factor = resize if RESIZE.value is None else RESIZE.value
    return predictor.load(path, config=config, refine=_refinement(), pad=PAD.value, resize=factor)
