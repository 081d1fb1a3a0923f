"""Which refinement a run's network is used with: that of its config, or one that was fitted."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import files

Use: TypeAlias = Literal["fitted", "config", "none"]

FILE = "refine.json"


def write(workdir: pathlib.Path, content: Mapping[str, Any]) -> pathlib.Path:
    """Writes WORKDIR/refine.json: `refine`, the `step` of the weights, and how it was chosen."""
    path = workdir / FILE
    files.write_text(path, files.json_text(content, indent=1) + "\n")
    return path


def chosen(
    workdir: pathlib.Path, of_config: Mapping[str, Any], step: int, use: Use = "fitted"
) -> dict[str, Any]:
    """Keyword arguments of `propagate.operator`.

    Args:
        workdir: of the run.
        of_config: `config.refine`.
        step: of the weights that are used.
        use: "fitted" for what `--mode fit` wrote, where it did, else the config's; "config" for the
            config's; "none" for none.

    Raises:
        UserError: refine.json is damaged, or was fitted to other weights.
    """
    if use == "none":
        return {"name": "identity"}
    path = workdir / FILE
    if use == "config" or not path.exists():
        return dict(of_config)
    try:
        content = json.loads(path.read_text())
        refine, fitted_to = dict(content["refine"]), int(content["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); --mode fit writes it anew, "
            "--refine=config does without"
        ) from error
    if fitted_to != step:
        raise UserError(
            f"{path} was fitted to the weights of step {fitted_to}, and those of step {step} are "
            "used; --mode fit fits it to them, --refine=config does without"
        )
    return refine
