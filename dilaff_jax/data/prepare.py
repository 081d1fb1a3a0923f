r"""Checks a data set's files, every one of them, and writes them as ArrayRecord.

    python -m dilaff_jax.data.prepare --dataset shapes --data_dir data
    python -m dilaff_jax.data.prepare --dataset camvid --source ~/CamVid --data_dir data --inspect
    python -m dilaff_jax.data.prepare --dataset image_folder --name pets --source ~/pets \
        --data_dir data --mask_values 0:0,255:1
    python -m dilaff_jax.data.prepare --dataset shapes --help      # the options of one data set

It stops at the first file that cannot be used and says which, why and what to change. It may be
interrupted and repeated at any time: what is half written is never read, and is removed next time.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags, logging
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dilaff_jax.data import contact_sheet, data_config, datasets, location, source_record
from dilaff_jax.data.builder import Options, SegmentationBuilder
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import interrupts, locks
from dilaff_jax.storage import bucket, mirror

_DATASET = flags.DEFINE_string("dataset", None, "Which data set; see --help of each.")
_SOURCE = flags.DEFINE_string("source", None, "Folder with the data set's files or archives.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where prepared data sets are kept.")
_NAME = flags.DEFINE_string(
    "name", "", "Keep it as DATASET/NAME, to have it several times with different options."
)
_INSPECT = flags.DEFINE_bool("inspect", False, "Also write pictures of images with their labels.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what is prepared already.")


def prepare(
    dataset: str,
    data_dir: str | os.PathLike,
    source: str | os.PathLike | None = None,
    options: Options | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Prepares a data set unless it is there already.

    Args:
        dataset: `NAME` or `NAME/CONFIG`, as in `config.data.dataset`.
        data_dir: Where prepared data sets are kept; nothing is written elsewhere. In a bucket, the
            data set is prepared on this machine and brought there.
        source: Folder with the data set's files or archives.
        options: The data set's options, of the `Builder`'s `options_type`.
        overwrite: Replace what is there already.

    Returns:
        The folder of the prepared data set.

    Raises:
        UserError: unknown data set, missing source, prepared before with other options or from
            other files, or (DataError) a file that cannot be used. Nothing is left behind.
    """
    name, _, config_name = dataset.partition("/")
    cls = datasets.builder_class(name)
    _check_arguments(cls, config_name, source)
    options = options or cls.options_type()
    with (
        # Of the kind that readers fetch, so that this machine need not.
        mirror.written(
            location.home(cls, dataset, data_dir), "data_dir", alone=True, kind="read"
        ) as root,
        # Beside the folder of a config, so that one that could not be prepared leaves none.
        _alone(
            root.absolute().parent if config_name or cls.config_name else root.absolute()
        ) as scratch,
    ):
        target = root / str(cls.VERSION)
        if target.exists() and not overwrite:
            _check_same(target, options)
        with _quiet():
            builder = cls(
                data_dir=os.fspath(scratch / "new"),
                config_name=config_name or cls.config_name,
                options=options,
                source=pathlib.Path(source).absolute() if source else None,
                scratch=scratch / "unpacked",
            )
            if target.exists() and not overwrite:
                _check_source(target, builder)
                return target
            if builder.recognised:
                says = f"{source} is taken as an export of {builder.recognised}"
                print(says, file=sys.stderr)  # what goes to stdout is silenced here
            builder.download_and_prepare(file_format="array_record")
            if cls.needs_source:
                source_record.write(
                    pathlib.Path(builder.data_dir), builder.source, builder.source_files()
                )
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(scratch / "old")
        pathlib.Path(builder.data_dir).rename(target)
    return target


def _check_arguments(cls: type[SegmentationBuilder], config_name: str, source: Any) -> None:
    if cls.config_name and config_name not in ("", cls.config_name):
        raise UserError(f"{cls.name} is kept as {cls.name}/{cls.config_name}; leave out --name")
    if config_name and not config_name.replace("-", "_").isidentifier():
        raise UserError(f"--name={config_name!r}: want letters, digits, _ and -, no digit first")
    if cls.needs_source and source is None:
        raise UserError(f"{cls.name} needs --source, the folder with its files (see --help)")
    if cls.needs_source and not pathlib.Path(source).is_dir():
        raise UserError(f"--source={source}: no such folder")


@contextlib.contextmanager
def _alone(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Holds the data set's lock, with a scratch folder that is removed in any case.

    Everything is written there and renamed when complete, so what a killed run left is only this
    folder, and the next run removes it.
    """
    root.mkdir(parents=True, exist_ok=True)
    scratch = root / ".scratch"
    with locks.held(root / ".lock") as mine:
        if not mine:
            raise UserError(f"{root}: another process is preparing this; wait for it")
        _remove(scratch)
        try:
            yield scratch
        finally:
            _remove(scratch)


def _remove(folder: pathlib.Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _check_same(target: pathlib.Path, options: Options) -> None:
    file = target / "metadata.json"
    stored = json.loads(file.read_text()).get("options", {}) if file.is_file() else {}
    wanted = json.loads(json.dumps(dataclasses.asdict(options)))
    differing = [f"{k}={v!r}, now {wanted[k]!r}" for k, v in stored.items() if v != wanted.get(k)]
    if differing:
        raise UserError(
            f"{target} was prepared with {'; '.join(differing)}: use --overwrite to replace it, or "
            "--name to keep both"
        )


def _check_source(target: pathlib.Path, builder: SegmentationBuilder) -> None:
    """Raises UserError if the source's files are not those that `target` was prepared from."""
    if not builder.needs_source:
        return
    if not source_record.exists(target):
        print(
            f"{target} was prepared by a version that did not record its files, so whether they "
            "are still the same is not known; --overwrite prepares it anew",
            file=sys.stderr,
        )
        return
    listed = builder.source_files() if builder.lists_sources else None
    differing = source_record.differences(target, builder.source, listed)
    if differing:
        raise UserError(
            f"{target} was prepared from other files; in {builder.source} there are "
            f"{', '.join(differing)}: use --overwrite to prepare it anew, or --name to keep both"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what tfds says about downloads and custom configs, which does not apply here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()  # the builder has one that knows the number of images
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()


# The command.


def _title(source: datasets.Source) -> str:
    low, high = source.sizes.min(axis=0), source.sizes.max(axis=0)
    sizes = " to ".join(dict.fromkeys(" x ".join(map(str, size)) for size in (low, high)))
    if source.ndim == 2:
        return f"{source.title}: {len(source)} images, {sizes} (height x width)"
    assert source.spacings is not None
    voxels = " to ".join(
        dict.fromkeys(" x ".join(f"{n:g}" for n in v) for v in np.unique(source.spacings, axis=0))
    )
    return f"{source.title}: {len(source)} volumes, {sizes} voxels of {voxels} mm"


def _histogram(
    source: datasets.Source, pixels: Sequence[int], containing: Sequence[int], ignored: int
) -> Table:
    """Pixels and images of every class, as a table."""
    total = max(1, sum(pixels) + ignored)
    table = Table()
    for heading in ("id", "class", "pixels", "%", "images"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for i, name in enumerate(source.class_names):
        share = f"{100 * pixels[i] / total:.2f}" if pixels[i] else "[red]never[/red]"
        table.add_row(str(i), escape(name), f"{pixels[i]:,}", share, f"{containing[i]:,}")
    table.add_row("255", "[dim]ignored[/dim]", f"{ignored:,}", f"{100 * ignored / total:.2f}", "")
    return table


def _report(dataset: str, data_dir: str, target: pathlib.Path) -> None:
    """Prints a table for every split, and with --inspect draws a contact sheet of it."""
    console = Console()
    builder = datasets.builder_class(dataset.partition("/")[0])
    metadata = json.loads((target / "metadata.json").read_text())
    described = metadata["splits"]
    for split, counts in described.items():
        config = data_config.default(dataset=dataset, data_dir=data_dir)
        source = datasets.load(config, split)
        console.print(_title(source), soft_wrap=True, markup=False)
        numbers = (counts[key] for key in ("class_pixels", "class_images", "ignored_pixels"))
        console.print(_histogram(source, *numbers))
        if _INSPECT.value:
            name = f"{dataset.replace('/', '_')}_{split}.png"
            beside = "" if bucket.is_address(data_dir) else data_dir
            sheet = pathlib.Path(beside).expanduser() / "inspect" / name
            path = contact_sheet.write(source, sheet)
            console.print(f"look at {path}", soft_wrap=True)
    unused: list[str] = metadata.get("unused", [])
    if unused:
        console.print(f"not used: {source_record.listed(unused)}", soft_wrap=True, markup=False)
    hint = f'config.data.dataset = "{dataset}", config.data.data_dir = "{data_dir}"'
    where = location.home(builder, dataset, data_dir) if bucket.is_address(data_dir) else target
    console.print(f"{builder.name} is ready in {where}: {hint}", soft_wrap=True, markup=False)


def _define_options(cls: type[SegmentationBuilder]) -> None:
    """Makes the data set's options flags of this command."""
    types = typing.get_type_hints(cls.options_type)
    define: dict[Any, Any] = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
        tuple[int, ...]: lambda n, v, h: flags.DEFINE_list(n, list(map(str, v)), h),
    }
    for field in dataclasses.fields(cls.options_type):
        define[types[field.name]](field.name, field.default, field.metadata["help"])


def _options(cls: type[SegmentationBuilder]) -> Options:
    """The data set's options from the flags."""
    types = typing.get_type_hints(cls.options_type)
    values: dict[str, Any] = {
        f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(cls.options_type)
    }
    for name, value in values.items():
        if types[name] == tuple[int, ...]:
            values[name] = tuple(map(int, value))
    return cls.options_type(**values)


def _parse(argv: Sequence[str]) -> list[str]:
    """The parser of absl, told first which data set's options there are."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--dataset", "-dataset")
    dataset = finder.parse_known_args(argv[1:])[0].dataset
    if dataset is not None:
        try:
            cls = datasets.builder_class(dataset.partition("/")[0])
        except ValueError as e:
            sys.exit(f"error: {e}")
        _define_options(cls)
        # --help prints the docstring of the main module: that of the data set says more.
        sys.modules["__main__"].__doc__ = sys.modules[cls.__module__].__doc__
    return app.parse_flags_with_usage(list(argv))


def main(argv: Sequence[str]) -> None:
    """Prepares the data set that the flags name, and prints what is in it."""
    if len(argv) > 1 or not _DATASET.value or not _DATA_DIR.value:
        extra = f"unexpected {' '.join(argv[1:])}; " if len(argv) > 1 else ""
        sys.exit(
            f"error: {extra}want --dataset NAME --data_dir DIR [--source DIR] [options of the data "
            f"set]; data sets: {', '.join(datasets.names())}"
        )
    name, _, config_name = _DATASET.value.partition("/")
    cls = datasets.builder_class(name)
    config_name = _NAME.value or config_name or (cls.config_name or "")
    dataset = f"{name}/{config_name}" if config_name else name
    try:
        target = prepare(dataset, _DATA_DIR.value, _SOURCE.value, _options(cls), _OVERWRITE.value)
    except ValueError as e:
        sys.exit(f"error: {e}")
    _report(dataset, _DATA_DIR.value, target)


def run() -> None:
    """Entry point."""
    interrupts.listen()
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
