"""Where prepared data sets are: DATA_DIR/NAME[/CONFIG]/VERSION, on a disk or in a bucket."""

import os
import pathlib

from dilaff_jax.data.builder import SegmentationBuilder
from dilaff_jax.runtime import files
from dilaff_jax.storage import bucket, mirror


def home(
    builder: type[SegmentationBuilder], dataset: str, data_dir: str | os.PathLike
) -> str | pathlib.Path:
    """DATA_DIR/NAME[/CONFIG], which holds the versions of a data set; in a bucket its address.

    Args:
        builder: of the data set.
        dataset: `NAME` or `NAME/CONFIG`.
        data_dir: a folder, gs://... or s3://...
    """
    name, _, config_name = dataset.partition("/")
    within = [part for part in (name, config_name or builder.config_name) if part]
    if bucket.is_address(data_dir):
        return "/".join([os.fspath(data_dir).rstrip("/"), *within])
    return files.local(data_dir, "data_dir").joinpath(*within)


def directory(
    builder: type[SegmentationBuilder], dataset: str, data_dir: str | os.PathLike
) -> pathlib.Path | None:
    """The folder of a data set's files, see `home` and the module.

    What is in a bucket is fetched now, once a machine; None where there is nothing.
    """
    try:
        return mirror.local(home(builder, dataset, data_dir), "data_dir") / str(builder.VERSION)
    except mirror.Nothing:
        return None
