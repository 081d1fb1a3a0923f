"""Images and label maps as bytes: reading strangers' files, and decoding our own records.

`load_*` run once, in `prepare`: they look hard at a file and refuse what they cannot make certain.
`decode_*` run for every example of every epoch: they trust what `prepare` wrote.
"""

import io
import os
import pathlib
import struct
from collections.abc import Mapping

import cv2
import numpy as np
from PIL import Image, ImageOps

from dilaff_jax.errors import UserError

_ORIENTATION = 0x0112  # EXIF tag
_PLAIN_FORMATS = ("JPEG", "MPO", "PNG")  # MPO: a phone's JPEG with a second picture behind it
_GREY_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I;16N", "I")
_IMAGE_MODES = (*_GREY_MODES, "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa")


class DataError(UserError):
    """A file that cannot be used; the message names it, what was found and what to change."""


def _open(path: pathlib.Path, data: bytes) -> Image.Image:
    """Decodes a file completely; anything wrong with it becomes a DataError."""
    if not data:
        raise DataError(f"{path}: the file is empty (0 bytes); restore or remove it")
    try:
        picture = Image.open(io.BytesIO(data))
        frames = getattr(picture, "n_frames", 1)
        picture.load()
    except Image.DecompressionBombError as e:
        raise DataError(f"{path}: {e}; make the image smaller") from e
    except MemoryError:
        raise
    except Exception as e:  # Pillow's parsers raise nearly anything on broken files.
        raise DataError(
            f"{path}: not a readable image (truncated or damaged, {len(data)} bytes): {e}"
        ) from e
    if frames > 1 and picture.format != "MPO":
        raise DataError(f"{path}: holds {frames} pictures; save the one that is meant alone")
    return picture


def _bit_depth(data: bytes) -> int:
    """Bits per channel of a PNG (Pillow reads 16-bit RGB as 8-bit and does not say so), else 8."""
    return data[24] if data[:8] == b"\x89PNG\r\n\x1a\n" else 8


def _is_plain(picture: Image.Image, data: bytes) -> bool:
    """Whether the bytes decode to the same RGB image with any decoder."""
    return (
        picture.format in _PLAIN_FORMATS
        and picture.mode == "RGB"
        and _bit_depth(data) == 8
        and (picture.format != "PNG" or data[-8:-4] == b"IEND")  # Pillow does without, OpenCV warns
        and picture.getexif().get(_ORIENTATION, 1) == 1
    )


def _to_rgb8(picture: Image.Image, path: pathlib.Path) -> np.ndarray:
    """Any supported picture as RGB uint8: grey repeated, alpha dropped, 16 bits → the high byte."""
    if picture.mode not in _IMAGE_MODES:
        raise DataError(
            f"{path}: pixel format {picture.mode!r} is not supported; allowed are 8- and 16-bit "
            "grey, RGB, RGBA, palette and CMYK images"
        )
    picture = ImageOps.exif_transpose(picture)
    if not picture.mode.startswith("I"):
        return np.asarray(picture.convert("RGB"))
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"{path}: values {values.min()}..{values.max()} exceed 16 bits")
    return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1)


def load_image(path: str | os.PathLike) -> tuple[bytes, tuple[int, int]]:
    """Reads an image file as bytes that `decode_image` takes.

    8-bit RGB JPEG and PNG files are passed on byte for byte. Everything else is converted once and
    stored as PNG: EXIF rotation is applied, grey is repeated over the channels, alpha is dropped,
    CMYK and palettes become RGB, of 16 bits the high byte stays (what OpenCV does too).

    Args:
        path: A JPEG, PNG, BMP, TIFF, WebP, GIF (one frame) or PNM file.

    Returns:
        The encoded image and its (height, width).

    Raises:
        DataError: empty, truncated or damaged file, several frames, more than 179 megapixels, or a
            pixel format such as 32-bit float.
    """
    path = pathlib.Path(path)
    data = path.read_bytes()
    picture = _open(path, data)
    if _is_plain(picture, data) and _opens_again(data, (picture.height, picture.width)):
        return data, (picture.height, picture.width)
    pixels = _to_rgb8(picture, path)
    return encode_png(pixels), (pixels.shape[0], pixels.shape[1])


def _opens_again(data: bytes, size: tuple[int, int]) -> bool:
    """Whether OpenCV, which decodes the records, takes the file that Pillow took."""
    try:
        return decode_image(data).shape[:2] == size
    except DataError:
        return False


def load_label(
    path: str | os.PathLike, colors: Mapping[int, int] | None = None, other: int | None = None
) -> np.ndarray:
    """Reads a label map as the values that its author wrote.

    Palette images give their indices, never the palette's colours; grey images of 1 to 16 bits
    give their values.

    Args:
        path: A lossless image file: PNG, BMP, TIFF, GIF or PNM.
        colors: For colour-coded masks: 0xRRGGBB → value.
        other: Value for colours that are not in `colors`; by default they become
            `UNKNOWN_COLOR + 0xRRGGBB`, so that the caller's check of values can name them.

    Returns:
        int32 `[H, W]`.

    Raises:
        DataError: as `load_image`; a lossy file; an RGB mask without `colors`; a grey or palette
            mask with `colors`.
    """
    path = pathlib.Path(path)
    picture = _open(path, path.read_bytes())
    if picture.format in ("JPEG", "MPO") or picture.format == "WEBP":
        raise DataError(
            f"{path}: {picture.format} is lossy and blurs class values; save label maps as PNG"
        )
    if colors is not None:
        return _label_of_colors(picture, path, colors, other)
    if picture.mode not in _GREY_MODES:
        raise DataError(
            f"{path}: a {picture.mode} picture is not a label map: want one channel of class "
            "values or a palette PNG. If its colours stand for classes, use `--dataset "
            "image_folder --color_masks` with a class list that states the colours"
        )
    return np.asarray(picture).astype(np.int32)


UNKNOWN_COLOR = 1 << 24


def _label_of_colors(
    picture: Image.Image, path: pathlib.Path, colors: Mapping[int, int], other: int | None
) -> np.ndarray:
    if picture.mode not in ("RGB", "RGBA", "RGBX", "P", "PA"):
        raise DataError(
            f"{path}: a {picture.mode} picture has no colours, but colours were expected"
        )
    rgb = np.asarray(picture.convert("RGB")).astype(np.int32)
    code = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    distinct, inverse = np.unique(code, return_inverse=True)
    values = [
        colors.get(int(c), UNKNOWN_COLOR + int(c) if other is None else other) for c in distinct
    ]
    return np.asarray(values, np.int32)[inverse].reshape(code.shape)


# Label maps: without PNG's filters, which suit photographs, they are smaller and decode faster.
# Level 9 would make them smaller still, but takes much longer to encode.
_LABEL_PNG = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE, cv2.IMWRITE_PNG_COMPRESSION, 6]


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes a label map uint8 `[H, W]` or an RGB image uint8 `[H, W, 3]` as PNG, losslessly."""
    is_label = pixels.ndim == 2
    bgr = pixels if is_label else pixels[..., ::-1]
    done, data = cv2.imencode(".png", bgr, _LABEL_PNG if is_label else [])
    if not done:
        raise DataError(f"cannot encode an array of shape {pixels.shape} as PNG")
    return data.tobytes()


def decode_image(data: bytes) -> np.ndarray:
    """Decodes JPEG or PNG bytes to RGB uint8 `[H, W, 3]`. Raises DataError if they are damaged."""
    # EXIF rotation was applied by `load_image`; tfds itself keeps pixels as stored.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return _decode(data, flags)


def decode_label(data: bytes) -> np.ndarray:
    """Decodes a one-channel PNG to uint8 `[H, W]`: values or palette indices, never colours.

    Raises DataError if they are damaged.
    """
    if len(data) > 25 and data[25] == 3:  # PNG colour type "palette": OpenCV would give colours.
        try:
            label = np.asarray(Image.open(io.BytesIO(data)))
        except MemoryError:
            raise
        except Exception as e:  # Pillow's parsers raise nearly anything on broken files.
            raise DataError(f"damaged record: {len(data)} bytes are not an image: {e}") from e
    else:
        label = _decode(data, cv2.IMREAD_UNCHANGED)
    if label.ndim != 2 or label.dtype != np.uint8:
        raise DataError(f"a label map of shape {label.shape}, {label.dtype}: want uint8 [H, W]")
    return label


def _decode(data: bytes, flags: int) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if pixels is None:
        raise DataError(f"damaged record: {len(data)} bytes are not an image")
    return pixels


def encoded_size(data: bytes) -> tuple[int, int]:
    """(height, width) of JPEG or PNG bytes from the header alone."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    with Image.open(io.BytesIO(data)) as picture:
        return picture.height, picture.width
