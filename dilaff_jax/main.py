"""The command: python -m dilaff_jax.main --config configs/NAME.py --workdir DIR [--mode MODE]."""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from dilaff_jax import commands

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, such as configs/shapes_quickstart.py.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and pictures of this run go; it is resumed."
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "ablate", "study", "preflight", *commands.MODES],
    "train: train and evaluate. eval: evaluate the best state. ablate: compare arms over seeds. "
    "study: compare changes of the config. "
    "predict: segment files. preflight: compile for a slice, say what it needs.",
)
TOPOLOGY = flags.DEFINE_string("topology", "auto", "preflight: a TPU slice such as v5e:4x4.")

# What a person can mend; these end in one line instead of a traceback.
EXPECTED = (ValueError, FloatingPointError, OSError)


def main(arguments: Sequence[str]) -> None:
    """Starts devices and processes, then hands over to the mode."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}; options begin with --")
    import jax

    from dilaff_jax import evaluate, parallel, preflight, train

    config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value or "")
    try:
        if WORKDIR.value:
            cache = workdir / "compilation_cache"
            jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))
        if MODE.value in commands.MODES:
            commands.run(MODE.value, config, workdir)
            return
        if config is None or not WORKDIR.value:
            raise app.UsageError(f"--mode {MODE.value} needs --config and --workdir")
        parallel.initialize(**{key: config.parallel[key] for key in parallel.PROCESS_KEYS})
        match MODE.value:
            case "train":
                train.train_and_evaluate(config, workdir)
            case "eval":
                evaluate.evaluate_run(config, workdir)
            case "preflight":
                preflight.run(config, workdir, TOPOLOGY.value)
            case "ablate" | "study":
                from dilaff_jax.ablation import run, study

                {"ablate": run.ablate, "study": study.study}[MODE.value](config, workdir)
    except train.Preempted as stop:
        logging.warning("%s", stop)
        sys.exit(128 + 15)  # as after SIGTERM, so that a scheduler starts it again
    except EXPECTED as error:
        logging.debug("traceback", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")


def run() -> None:
    """The entry point of the installed command."""
    # The libraries' own steps are for those who ask: --verbosity=0. (A default would not do: absl
    # raises it to INFO.)
    flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
    app.run(main, flags_parser=commands.parser(CONFIG))


if __name__ == "__main__":
    run()
