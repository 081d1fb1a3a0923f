"""Videos: frames in and out, and propagation in time as well as in the image.

Propagation in time is our choice throughout. A clip is a volume [T, H, W]; within a frame its edges
are those of the affinity head, and each pixel has 18 more, to the 3 x 3 cells around it in the
frames before and after: the part of the 3-D neighbourhood of dilation 1 that leaves the frame.
"""

import pathlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax import affinity, propagate
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.serving.predictor import Predictor, Raw, Result

SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
# At which distance in RGB, of [0, 255] each, two cells are taken for one thing no longer.
COLOR_SCALE = 10.0
# The affinity of two cells of one colour in neighbouring frames.
SAME_COLOR = 0.9


class Video:
    """The frames of a video file, RGB uint8 `[H, W, 3]`, upright.

    Attributes:
        rate: frames a second.
        count: frames that its header promises; 0 if it does not say.
        read: frames that were decoded.

    Raises:
        DataError: the file is no video that OpenCV can decode.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self._capture = path, cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise DataError(f"{path}: not a readable video (no decoder takes it)")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else 25.0
        self.read = 0
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            has_frame, frame = self._capture.read()
            if not has_frame:
                break
            self.read += 1
            yield np.ascontiguousarray(frame[..., ::-1])
        if not self.read:
            raise DataError(f"{self._path}: not one frame can be decoded")

    def close(self) -> None:
        """Releases the file."""
        self._capture.release()


class VideoWriter:
    """Writes RGB frames as FILE.mp4 (MPEG-4); only files named whole are finished.

    Raises:
        OSError: OpenCV cannot write there.
    """

    def __init__(self, path: pathlib.Path, rate: float) -> None:
        self._path, self._part = path, path.with_name(f"{path.stem}.part.mp4")
        self._rate, self._writer = rate, cv2.VideoWriter()

    def write(self, frame: np.ndarray) -> None:
        """Appends a frame, RGB uint8 `[H, W, 3]`."""
        if not self._writer.isOpened():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            size = (frame.shape[1], frame.shape[0])
            self._writer.open(str(self._part), cv2.VideoWriter.fourcc(*"mp4v"), self._rate, size)
            if not self._writer.isOpened():
                raise OSError(f"{self._path}: cannot write a video of {size[0]} x {size[1]} there")
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.release()
        if kind is None and self._part.exists():
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)


def propagate_in_time(
    predictor: Predictor, frames: Iterator[np.ndarray], chunk: int = 8
) -> Iterator[Result]:
    """Segments the frames of a clip, refined by propagation through space and time.

    Memory is bounded: `chunk` frames are refined at a time, with as many before and after them as
    the operator has steps. A step reaches one frame further, so the results are exactly those of
    the whole clip at once.

    Args:
        predictor: of a model with an affinity head.
        frames: RGB uint8 `[H, W, 3]`, all of one size.
        chunk: frames at a time, at least 1.

    Raises:
        UserError: no affinity head, or `chunk` is below 1.
    """
    if not predictor.has_affinity:
        raise UserError("propagation in time needs a model with an affinity head")
    if chunk < 1:
        raise UserError(f"chunk is {chunk}; expected 1 frame or more")
    # An operator of one's own may have another name for its steps; then it gets ample room.
    reach = int(predictor.network.refine.get("steps", 5))
    held: list[tuple[np.ndarray, Raw]] = []
    done, more = 0, True  # how many of the held frames have been given out already
    while more or done < len(held):
        while more and len(held) < done + chunk + reach:
            frame = next(frames, None)
            more = frame is not None
            if frame is not None:
                held.append((frame, predictor.infer(frame)))
        if done == len(held):
            return
        change = clip_correction(predictor, held)
        stop = min(done + chunk, len(held)) if more else len(held)
        for i in range(done, stop):
            yield predictor.finish(*held[i], change[i : i + 1])
        cut = max(0, stop - reach)
        held, done = held[cut:], stop - cut


def clip_correction(predictor: Predictor, held: list[tuple[np.ndarray, Raw]]) -> jax.Array:
    """The correction of consecutive frames, `[T, *cells, C]`; see `Predictor.correction`."""
    offsets = predictor.network.offsets
    raws = [raw for _, raw in held]
    affinity_logits = [raw.affinity_logits for raw in raws if raw.affinity_logits is not None]
    assert offsets is not None
    grid, geometry = affinity_logits[0].shape[1:3], raws[0].geometry
    cells = geometry.cells(grid)
    between = between_frames()
    within = jnp.concatenate(affinity_logits)[:, : cells[0], : cells[1]]
    colors = [cv2.resize(f, cells[::-1], interpolation=cv2.INTER_AREA) for f, _ in held]
    across = cross_logits(np.stack(colors), between, predictor.network.refine)
    options = dict(predictor.network.refine)
    if options["name"] != "identity":
        own = propagate.per_offset(options.get("bias", 0.0), offsets)
        options["bias"] = jnp.concatenate([own, jnp.zeros(len(between))])
    # The logits cover the canvas and the affinities now only the image: bring them together first.
    scores = propagate.resize.bilinear(
        jnp.concatenate([r.logits for r in raws if r.logits is not None]), grid
    )
    return propagate.correction(
        scores[None, :, : cells[0], : cells[1]],
        jnp.concatenate([within, across], axis=-1)[None],
        np.concatenate([np.pad(offsets, [(0, 0), (1, 0)]), between]),
        propagate.operator(**options),
        finite=True,
    )[0]


def between_frames() -> np.ndarray:
    """The offsets of the 3-D neighbourhood of dilation 1 that lead to another frame, `[18, 3]`."""
    offsets = affinity.offsets((1,), ndim=3)
    return offsets[offsets[:, 0] != 0]


def cross_logits(
    colors: np.ndarray,
    offsets: np.ndarray,
    refine: Mapping[str, Any],
    scale: float = COLOR_SCALE,
) -> jax.Array:
    """Affinity logits across frames, from colour: float32 `[T, h, w, len(offsets)]`.

    With e = exp(-|c[i] - c[i+o]|² / (2·scale²)), an equal colour says that both are one thing, and
    an unequal one says nothing, since things move and light changes. For the random walk a = 0.9·e,
    so that nothing flows where e = 0; for `signed`, and operators of its kind, the logit is
    logit(0.9)·e, so that no vote is cast there.

    Args:
        colors: RGB of the cells, `[T, h, w, 3]`, in [0, 255].
        offsets: `[*, 3]`.
        refine: names the operator.
        scale: of the distance.
    """
    cells = jnp.asarray(colors, jnp.float32)
    far = [jnp.sum((cells - affinity.shift(cells, o)) ** 2, axis=-1) for o in offsets]
    evidence = jnp.exp(-jnp.stack(far, axis=-1) / (2 * scale**2))
    if refine["name"] == "random_walk":
        a = jnp.maximum(SAME_COLOR * evidence, 1e-6)
        return jnp.log(a / (1 - a))
    return np.log(SAME_COLOR / (1 - SAME_COLOR)) * evidence
