"""A run's card for others, and its way to the hub.

    python -m dilaff_jax.report.model_card WORKDIR --license apache-2.0
    python -m dilaff_jax.report.model_card WORKDIR --license apache-2.0 --push hf://OWNER/NAME

Writes WORKDIR/README.md: what the network is, on what it was trained and with what result, under
which licence its weights are, how to load it. The form is that of Hugging Face's model cards
(https://huggingface.co/docs/hub/model-cards). A card that somebody has changed is kept: its last
line holds a checksum of the rest.
"""

import argparse
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dilaff_jax import evaluate
from dilaff_jax.errors import UserError
from dilaff_jax.interop import hub
from dilaff_jax.report import compare_runs, run_summary
from dilaff_jax.runtime import files
from dilaff_jax.serving import network

_NAME = "README.md"
_UNKNOWN = "unknown"
_SEAL = "<!-- written by dilaff_jax.report.model_card, {} -->\n"


def write(workdir: pathlib.Path, license_id: str = _UNKNOWN, address: str = "") -> int:
    """Writes the card of a run; returns the step of the state that is used.

    Args:
        workdir: of the run.
        license_id: of the weights, as the hub names licences, such as "apache-2.0".
        address: hf://OWNER/NAME, where others find it; "" if nowhere.

    Raises:
        FileNotFoundError: there is no run, or none that was evaluated.
        UserError: somebody has changed the card.
    """
    path = workdir / _NAME
    if path.exists() and not _is_ours(path.read_text()):
        raise UserError(
            f"{path} was changed by hand and stays; rename it, then the card is written anew"
        )
    trained, _, step = network.from_run(workdir)
    count = sum(x.size for x in jax.tree.leaves(trained.variables["params"]))
    body = text(workdir, trained, step, count, license_id, address)
    files.write_text(path, body + _SEAL.format(_checksum(body)))
    return step


def text(
    workdir: pathlib.Path,
    trained: network.Network,
    step: int,
    parameters: int,
    license_id: str,
    address: str,
) -> str:
    """The card, Markdown under a head in YAML."""
    config = network.read_config(workdir)
    results = evaluate.read_results(workdir, step) or evaluate.last_results(workdir)
    model, data = config.model, config.data
    title = address.rsplit("/", 1)[-1] or workdir.resolve().name
    task = "segments images" if trained.segmentation else "refines what other networks segment"
    affinity = "" if trained.offsets is None else f", {len(trained.offsets)} affinities a pixel"
    head = {
        "license": license_id,
        "library_name": "dilaff_jax",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", "jax", "flax", "dilated-affinity"],
        "model-index": [{"name": title, "results": [_index(data.dataset, results)]}],
    }
    lines = "\n".join(f"{k}: {json.dumps(v)}" for k, v in head.items())
    return f"""---
{lines}
---

# {title}

A network that {task}, trained with dilated affinity (https://arxiv.org/abs/1907.07011):
encoder `{model.encoder}`, decoder `{model.decoder}`, {parameters / 1e6:.2f} million \
parameters{affinity}.

## Use

```python
import dilaff_jax

model = dilaff_jax.load("{address or workdir.name}")
result = model("photo.jpg")  # or RGB uint8 [H, W, 3]
result.labels, result.overlay()
```

{"hf:// needs the extra `hub`. " if address else ""}Its classes: \
{", ".join(trained.classes.names)}.

## Figures

State of step {step}. On `{data.eval_split}` of {data.dataset}, evaluated at step {results.step}:

```text
{results.table.strip()}
```

## Training

On `{data.train_split}` of {data.dataset}{_held_out(data.hold_out)}, {config.num_steps} steps of \
{config.batch_size} crops of {" × ".join(map(str, data.crop_size))} pixels, {config.optim.name}, \
seed {config.seed}. `config.json` has every setting, `starts.jsonl` versions and hardware.

{_started(run_summary.starts(workdir))}

## Licence

{_licence(license_id, config.init)}
"""  # noqa: RUF001 - a size is written with the sign


def _index(dataset: str, results: evaluate.Results) -> dict[str, Any]:
    """The figures as the hub's tables want them."""
    figures = [
        {"type": name, "name": f"{title} ({variant})", "value": round(100 * value, 2)}
        for name, title in compare_runs.ROWS.items()
        for variant in (evaluate.PLAIN, evaluate.REFINED)
        if (value := results.scalars.get(f"{variant}/{name}")) is not None and value == value
    ]
    return {
        "task": {"type": "image-segmentation"},
        "dataset": {"name": dataset, "type": dataset},
        "metrics": figures,
    }


def _held_out(patterns: Sequence[str]) -> str:
    return f" without {', '.join(patterns)}" if patterns else ""


def _started(starts: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"| {s['step']} | {s['time'][:10]} | {s.get('processor', '')}, {', '.join(s['devices'])} "
        f"| {', '.join(f'{k} {v}' for k, v in s['versions'].items())} |"
        for s in starts
    ]
    return "\n".join(["| from step | date | on | with |", "|---|---|---|---|", *rows])


def _licence(license_id: str, init: Mapping[str, Any]) -> str:
    stated = (
        "Not stated by whoever trained it."
        if license_id == _UNKNOWN
        else f"The weights: {license_id}, stated by whoever trained them."
    )
    begun = [f"`{init[k]}`" for k in ("workdir", "model", "encoder") if init.get(k)]
    if begun:
        stated += f" They began as {' and '.join(begun)}, whose own licence goes on to hold."
    return stated + " The terms of the training data are those of its publishers."


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _is_ours(content: str) -> bool:
    body, found, seal = content.rpartition("<!-- written by dilaff_jax")
    return bool(found) and found + seal == _SEAL.format(_checksum(body))


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the card, and uploads the run where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--license", default=_UNKNOWN, help="of the weights, such as apache-2.0")
    parser.add_argument("--push", default="", metavar="hf://OWNER/NAME", help="upload the run")
    parser.add_argument("--private", action="store_true", help="of a repository that is made anew")
    options = parser.parse_args(arguments)
    try:
        if options.push:
            hub.address(options.push)
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", options.license):
            raise UserError(f"--license is {options.license!r}; give its short name: apache-2.0")
        step = write(options.workdir, options.license, options.push)
        print(f"written: {options.workdir / _NAME}")
        if options.push:
            done = hub.upload(options.workdir, options.push, step, private=options.private)
            print(f"uploaded: {done}")
    except (UserError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
