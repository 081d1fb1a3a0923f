"""The command: python -m dilaff_jax.main --config configs/NAME.py --workdir DIR [--mode MODE].

Installed, the package has it as `dilaff`, too.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from dilaff_jax import commands
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import interrupts

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, such as configs/shapes_quickstart.py.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints, metrics and pictures of this run go; it is resumed. A folder, gs://... or "
    "s3://...",
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(commands.MODES),
    "train: train and evaluate. eval: evaluate the best state. ablate: compare arms over seeds. "
    "study: compare changes of the config. "
    "predict: segment files. refine: refine what another network says of files. "
    "fit: choose the refinement on a split. preflight: compile for a slice, say what it needs. "
    "view: a page of what a network sees. doctor: what this machine has, and what is wrong.",
)


def main(arguments: Sequence[str]) -> None:
    """Starts devices and processes, then hands over to the mode."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}; options begin with --")
    import jax

    from dilaff_jax.runtime import files
    from dilaff_jax.runtime.preemption import Preempted
    from dilaff_jax.storage import bucket

    try:
        workdir: commands.Workdir = WORKDIR.value or ""
        if not bucket.is_address(workdir):  # whose copy brings its own cache
            workdir = files.local(workdir, "--workdir")
        if isinstance(workdir, pathlib.Path) and WORKDIR.value:
            cache = (workdir / "compilation_cache").absolute()
            jax.config.update("jax_compilation_cache_dir", str(cache))
        commands.MODES[MODE.value](CONFIG.value, workdir)
    except Preempted as stop:
        logging.warning("%s", stop)
        sys.exit(128 + 15)  # as after SIGTERM, so that a scheduler starts it again
    except (UserError, OSError) as error:  # they say what to change; all else is a fault of ours
        logging.debug("traceback", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")


def run() -> None:
    """The entry point of the installed command."""
    interrupts.listen()
    # The libraries' own steps are for those who ask: --verbosity=0. (A default would not do: absl
    # raises it to INFO.)
    flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
    app.run(main, flags_parser=commands.parser(CONFIG))


if __name__ == "__main__":
    run()
