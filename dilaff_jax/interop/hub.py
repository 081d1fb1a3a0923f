"""Runs and weights on the Hugging Face Hub: hf://OWNER/NAME[@REVISION] is a path of one.

    python -m dilaff_jax.interop.hub hf://OWNER/NAME FOLDER    # into a folder of one's own

Needs the extra `hub`. Only what `FILES` names is up- or downloaded: numbers, JSON and text. Nothing
of it is ever unpickled or run, nor does it choose what is run: a config that names somebody's own
encoder is used only from a folder that the user has fetched it to. HF_ENDPOINT says where the hub
is, HF_TOKEN who asks.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dilaff_jax.errors import UserError
from dilaff_jax.storage import mirror

PREFIX = "hf://"
# Of a workdir, once; and of a step: the state that is used, and its figures.
_OF_A_RUN = (
    *("README.md", "config.json", "classes.json", "refine.json", "train_data.json"),
    "starts.jsonl",
)
_OF_A_STEP = ("checkpoints/{}/**", "evaluation/{}/results.json")
FILES = (*_OF_A_RUN, *(pattern.format("*") for pattern in _OF_A_STEP))
# What is fetched of a network, and the files that then may hold its weights, best first.
_WEIGHTS = (
    (
        ("model*.safetensors", "model.safetensors.index.json"),
        ("model.safetensors", "model.safetensors.index.json"),
    ),
    (("pytorch_model.bin",), ("pytorch_model.bin",)),
)
_URL = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?/?")


class Address(NamedTuple):
    """A repository of the hub: OWNER/NAME, and a branch, tag or commit; None for the newest."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")


def is_address(path: Any) -> bool:
    """Whether a path is one of the hub."""
    return isinstance(path, str) and path.startswith(PREFIX)


def address(url: str) -> Address:
    """Parses hf://OWNER/NAME[@REVISION]. Raises UserError where it is something else."""
    match = _URL.fullmatch(url)
    if match is None:
        raise UserError(f"{url!r} is no repository of the hub; give hf://OWNER/NAME[@REVISION]")
    return Address(match["name"], match["revision"])


def local(path: str | os.PathLike, what: str) -> pathlib.Path:
    """As `mirror.local`, where a run may be on the hub, too: hf://OWNER/NAME is then fetched."""
    return download(str(path)) if is_address(path) else mirror.local(path, what)


def download(url: str, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Fetches a run; returns its folder, which can be used as a workdir.

    Args:
        url: hf://OWNER/NAME[@REVISION].
        folder: where to; None for the hub's own cache, where what is there is not fetched again.

    Raises:
        UserError: `url` is no such path, the hub has no such run or lets nobody in, `folder` holds
            a run already, or, without `folder`, the run asks for code ("module:name") that is not
            this package's.
        OSError: the hub cannot be reached.
    """
    wanted = address(url)
    if folder is not None and (folder / "config.json").exists():
        raise UserError(f"{folder} holds a run already; give another folder")
    with _asking(wanted) as hub:
        found = hub.snapshot_download(
            wanted.name,
            revision=wanted.revision,
            allow_patterns=[*FILES],
            local_dir=None if folder is None else str(folder),
        )
    path = pathlib.Path(found)
    if not (path / "config.json").is_file():
        raise UserError(f"{wanted} holds no run of this project: it has no config.json")
    if folder is None:
        _refuse_code(path, wanted)
    return path


def weights(url: str) -> pathlib.Path:
    """Fetches the weights of a network into the hub's own cache; returns their file.

    model.safetensors; where they are in several files, the index that names them; where there are
    none of that kind, pytorch_model.bin, of which no code is run (see `files.read`).

    Args:
        url: hf://OWNER/NAME[@REVISION].

    Raises:
        UserError: `url` is no such path, the hub has no weights there or lets nobody in.
        OSError: the hub cannot be reached.
    """
    wanted = address(url)
    for patterns, names in _WEIGHTS:
        with _asking(wanted) as hub:
            found = hub.snapshot_download(
                wanted.name, revision=wanted.revision, allow_patterns=list(patterns)
            )
        for name in names:
            if (pathlib.Path(found) / name).is_file():
                return pathlib.Path(found) / name
    listed = ", ".join(name for _, names in _WEIGHTS for name in names)
    raise UserError(f"{wanted} holds no weights; looked for {listed}")


def _refuse_code(path: pathlib.Path, wanted: Address) -> None:
    """Raises UserError where a run would have code of this machine called that its author names."""
    for name, sections in (("config.json", ("model", "refine")), ("refine.json", ("refine",))):
        try:
            content = json.loads((path / name).read_text())
        except (OSError, ValueError):
            continue  # missing, or damaged: whoever reads it says so
        if not isinstance(content, dict):
            continue
        found = [text for key in sections for text in _references(content.get(key))]
        if found:
            raise UserError(
                f"{wanted} asks for code that is not this package's: {', '.join(found)}. If you "
                f"trust its author, fetch it (python -m dilaff_jax.interop.hub {wanted} FOLDER), "
                "look at its config.json, and load FOLDER"
            )


def _references(value: Any) -> list[str]:
    """All texts of the form "module:attribute" within JSON."""
    if isinstance(value, dict):
        return [text for v in value.values() for text in _references(v)]
    if isinstance(value, list):
        return [text for v in value for text in _references(v)]
    return [value] if isinstance(value, str) and ":" in value else []


def upload(workdir: pathlib.Path, url: str, step: int, *, private: bool = False) -> str:
    """Makes the repository if there is none, and puts a run there; returns the commit's address.

    Args:
        workdir: of the run.
        url: hf://OWNER/NAME[@BRANCH].
        step: of the checkpoint that goes there.
        private: whom a new repository is shown to.

    Raises:
        UserError: `url` is no such path, or the hub lets nobody in.
        OSError: the hub cannot be reached.
    """
    wanted = address(url)
    with _asking(wanted) as hub:
        client = hub.HfApi()
        client.create_repo(wanted.name, private=private, exist_ok=True)
        done = client.upload_folder(
            repo_id=wanted.name,
            folder_path=workdir,
            allow_patterns=[*_OF_A_RUN, *(pattern.format(step) for pattern in _OF_A_STEP)],
            revision=wanted.revision,
            commit_message=f"Step {step}",
        )
    return str(done.commit_url)


@contextlib.contextmanager
def _asking(wanted: Address) -> Iterator[Any]:
    """Yields the library; says in our words what it raises."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(
            f"{PREFIX} needs the package huggingface_hub: pip install 'dilaff-jax[hub]'"
        ) from error
    errors = huggingface_hub.errors
    try:
        yield huggingface_hub
    except Exception as error:  # its own, or whatever its library of the network raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        refused = isinstance(error, errors.HfHubHTTPError | errors.HFValidationError)
        answer = getattr(error, "response", None)
        if refused and (answer is None or answer.status_code < 500):
            raise UserError(
                f"{wanted}: {first}. Is the name right? For a private one, or to write, log in: "
                "hf auth login, or HF_TOKEN"
            ) from error
        raise OSError(f"{wanted}: the hub cannot be reached, or failed: {first}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Downloads a run into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s hf://OWNER/NAME FOLDER")
    parser.add_argument("url")
    parser.add_argument("folder", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        print(f"{options.url} is in {download(options.url, options.folder)}")
    except (UserError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
