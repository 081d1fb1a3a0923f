"""Pictures of results: image, truth, prediction, refined prediction, class edges."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax import affinity
from dilaff_jax.data import contact_sheet, images
from dilaff_jax.labels import IGNORE_LABEL

_CAPTION = 18
# What became of a pixel. Told apart by those who do not see red and green as two colours, too.
CHANGES = {
    "wrong → right": (33, 102, 172),
    "right → wrong": (217, 95, 2),
    "wrong → wrong": (117, 112, 140),
}


@dataclasses.dataclass
class View:
    """One image and what was predicted for it, without the padding of its batch.

    Attributes:
        index: in its split.
        image: RGB uint8 `[h, w, 3]`; of bands as the batch has it, `[h, w, C]`.
        label: uint8 `[h, w]`, 255 = ignored.
        predictions: {variant: uint8 `[h, w]`}.
        edges: strength of class edges by dilation, uint8 `[h', w', D]`, D = 0 without such a head.
    """

    index: int
    image: np.ndarray
    label: np.ndarray
    predictions: dict[str, np.ndarray]
    edges: np.ndarray


def view(
    batch: Mapping[str, np.ndarray], maps: Mapping[str, np.ndarray], edges: np.ndarray, row: int
) -> View:
    """Cuts one row of an evaluation batch to its original size."""
    size = [int(n) for n in batch["size"][row]]
    part: tuple[Any, ...] = (row, *map(slice, size))
    # The grid of the affinities covers the padded image; its part of the image is rounded up.
    grids = batch["label"].shape[1:], edges.shape[1:-1]
    strides = [-(-n // m) for n, m in zip(*grids, strict=True)]
    cells: tuple[Any, ...] = (
        row,
        *(slice(-(-n // s)) for n, s in zip(size, strides, strict=True)),
    )
    return View(
        index=int(batch["index"][row]),
        image=batch["image"][part],
        label=batch["label"][part],
        predictions={name: x[part] for name, x in maps.items()},
        edges=edges[cells],
    )


def edge_strength(affinity_logits: jax.Array, offsets: np.ndarray) -> jax.Array:
    """The strongest predicted class edge of each pixel, by dilation: uint8 `[B, h, w, D]`.

    255·max over the offsets o of a dilation with i+o inside of (1 - a[i,o]).
    """
    inside = affinity.inside(affinity_logits.shape[1:-1], offsets)
    other = jnp.where(inside, jax.nn.sigmoid(-affinity_logits), 0)
    dilations = affinity.dilation_of(offsets)
    strongest = [
        other[..., dilations == d].max(axis=-1) for d in affinity.distinct_dilations(offsets)
    ]
    return jnp.round(255 * jnp.stack(strongest, axis=-1)).astype(jnp.uint8)


def paint_changes(
    image: np.ndarray, truth: np.ndarray | None, before: np.ndarray, after: np.ndarray
) -> np.ndarray:
    """The pixels that refinement changed, in the colours of `CHANGES` over the pale image.

    Args:
        image: RGB uint8 `[H, W, 3]`.
        truth: uint8 `[H, W]`; ignored pixels are not painted. None where it is not known: every
            change then has the last colour.
        before: classes without refinement, uint8 `[H, W]`.
        after: classes with it.

    Returns:
        RGB uint8 `[H, W, 3]`.
    """
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    painted = np.repeat((160 + grey * (80 / 255)).astype(np.uint8)[..., None], 3, axis=-1)
    changed = before != after
    if truth is not None:
        changed = changed & (truth != IGNORE_LABEL)
    painted[changed] = CHANGES["wrong → wrong"]
    if truth is not None:
        painted[changed & (after == truth)] = CHANGES["wrong → right"]
        painted[changed & (before == truth)] = CHANGES["right → wrong"]
    return painted


def flat(
    shown: View,
    slice_of: Callable[[np.ndarray], np.ndarray],
    picture: Callable[[np.ndarray], np.ndarray],
) -> View:
    """What is drawn of a view: of a volume the slice that `slice_of` takes of a map of any grid.

    picture: of an image, RGB uint8 `[h, w, 3]`.
    """
    return View(
        shown.index,
        picture(shown.image),
        slice_of(shown.label),
        {name: slice_of(x) for name, x in shown.predictions.items()},
        slice_of(shown.edges),
    )


def strip(shown: View, colors: np.ndarray) -> np.ndarray:
    """Image, truth, each prediction, class edges of the first dilation, side by side with names."""
    tiles = {"image": shown.image, "truth": contact_sheet.paint(shown.label, colors)}
    tiles |= {k: contact_sheet.paint(v, colors) for k, v in shown.predictions.items()}
    if shown.edges.shape[-1]:
        height, width = shown.label.shape
        edges = cv2.resize(shown.edges[..., 0], (width, height), interpolation=cv2.INTER_NEAREST)
        tiles["class edges"] = np.repeat(edges[..., None], 3, axis=-1)
    return np.concatenate([captioned(name, tile) for name, tile in tiles.items()], axis=1)


def write(folder: pathlib.Path, pictures: Mapping[str, np.ndarray]) -> None:
    """Writes RGB pictures as FOLDER/NAME.png."""
    for name, picture in pictures.items():
        _write_png(folder, name, picture)


def write_predictions(
    folder: pathlib.Path, name: str, predictions: Mapping[str, np.ndarray]
) -> None:
    """Writes class indices as FOLDER/VARIANT/NAME.png, 8 bit, one channel; of volumes NAME.npy."""
    for variant, prediction in predictions.items():
        if prediction.ndim == 2:
            _write_png(folder / variant, name, prediction)
            continue
        (folder / variant).mkdir(parents=True, exist_ok=True)
        np.save(folder / variant / f"{name.replace('/', '_')}.npy", prediction)


def _write_png(folder: pathlib.Path, name: str, picture: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Names of examples may hold folders of their own; here each is one file.
    (folder / f"{name.replace('/', '_')}.png").write_bytes(images.encode_png(picture))


def captioned(text: str, tile: np.ndarray) -> np.ndarray:
    """A picture under a line of text, RGB uint8."""
    head = np.full((_CAPTION, tile.shape[1], 3), 255, np.uint8)
    cv2.putText(head, text, (3, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    framed = np.concatenate([head, tile])
    framed[:, -1] = 255
    return framed
