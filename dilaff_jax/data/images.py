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
from PIL import Image, ImageOps, TiffImagePlugin

from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL

_ORIENTATION = 0x0112  # EXIF tag
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _SAMPLE_FORMAT = 258, 277, 339  # TIFF tags
_NODATA = 42113  # GDAL's: the value of pixels without data, as text
_PNG = b"\x89PNG\r\n\x1a\n"
_DARK = 1 << 14  # 16-bit images below may well be of a camera with 10, 12 or 14 bits
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
        raise DataError(
            f"{path}: {e}; make the image smaller (--mode predict takes it as it is, in tiles: "
            "--tile=1024)"
        ) from e
    except MemoryError:
        raise
    except Exception as e:  # Pillow's parsers raise nearly anything on broken files.
        kind = _tiff_kind(data)
        if kind:
            raise DataError(
                f"{path}: a TIFF of {kind}, which is no photograph; save it as 8- or 16-bit grey "
                "or RGB, or prepare all its bands as they are: --dataset band_folder"
            ) from e
        raise DataError(
            f"{path}: not a readable image (truncated or damaged, {len(data)} bytes): {e}"
        ) from e
    if frames > 1 and picture.format != "MPO":
        raise DataError(f"{path}: holds {frames} pictures; save the one that is meant alone")
    return picture


def _tiff_kind(data: bytes) -> str:
    """Channels, bits and kind of numbers of a TIFF, "" if it is none, or an ordinary one."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return ""
    try:
        header = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        stream = io.BytesIO(data)
        stream.seek(header.next)
        header.load(stream)
    except Exception:  # damaged
        return ""
    bits, numbers = header.get(_BITS_PER_SAMPLE, (1,)), header.get(_SAMPLE_FORMAT, (1,))
    channels = header.get(_SAMPLES_PER_PIXEL, 1)
    if channels <= 4 and max(bits) <= 16 and max(numbers) == 1:
        return ""
    kinds = {1: "unsigned", 2: "signed", 3: "floating-point"}
    kind = kinds.get(numbers[0], "other")
    return f"{channels} channels of {max(bits)}-bit {kind} numbers"


def _bit_depth(picture: Image.Image, data: bytes) -> int:
    """Bits per channel in the file: Pillow reads 16-bit RGB as 8-bit and does not say so."""
    if data[:8] == _PNG:
        return data[24]
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return max(picture.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    return 16 if picture.mode.startswith("I") else 8


def _is_plain(picture: Image.Image, data: bytes) -> bool:
    """Whether the bytes decode to the same RGB image with any decoder."""
    return (
        picture.format in _PLAIN_FORMATS
        and picture.mode == "RGB"
        and _bit_depth(picture, data) == 8
        and (picture.format != "PNG" or data[-8:-4] == b"IEND")  # Pillow does without, OpenCV warns
        and picture.getexif().get(_ORIENTATION, 1) == 1
    )


def _to_rgb8(picture: Image.Image, data: bytes, path: pathlib.Path, bits: int) -> np.ndarray:
    """Any supported picture as RGB uint8: grey repeated, alpha dropped, deep ones shifted."""
    if picture.mode not in _IMAGE_MODES:
        raise DataError(
            f"{path}: pixel format {picture.mode!r} is not supported; allowed are 8- and 16-bit "
            "grey, RGB, RGBA, palette and CMYK images. Of other numbers nobody knows which are "
            "black and white: scale them to 8 or 16 bits, or prepare them as they are: --dataset "
            "band_folder"
        )
    depth = _bit_depth(picture, data)
    upright = ImageOps.exif_transpose(picture)
    if depth <= 8:
        return np.asarray(upright.convert("RGB"))
    values = np.asarray(upright).astype(np.int64)
    if not picture.mode.startswith("I"):
        values = _deep_colors(np.asarray(upright.convert("RGB")), picture, data, path)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(f"{path}: values {low}..{high} exceed 16 bits")
    bits = bits or (depth if depth < 16 else 0)
    if not bits and 0 < high < _DARK:
        raise DataError(
            f"{path}: 16 bits a channel and no value above {high}, nearly black if all 16 count. "
            f"Say how many do, where a data set is prepared: --image_bits={high.bit_length()} or "
            "what the camera has, 16 if it is that dark; elsewhere save the image with 8 bits"
        )
    bits = bits or 16
    if high >> bits:
        raise DataError(f"{path}: has the value {high}, which does not fit --image_bits={bits}")
    values = (values >> (bits - 8)).astype(np.uint8)
    return values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=-1)


def _deep_colors(
    shallow: np.ndarray, picture: Image.Image, data: bytes, path: pathlib.Path
) -> np.ndarray:
    """RGB of 16 bits, `[H, W, 3]`, by OpenCV; `shallow` is what Pillow makes of it, upright."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is not None and pixels.dtype == np.uint16 and pixels.ndim == 3:
        deep = pixels[..., 2::-1].astype(np.int64)
        # Which of the two turns a picture by its tag depends on the format.
        for candidate in (deep, _turned(deep, picture.getexif().get(_ORIENTATION, 1))):
            if candidate.shape == shallow.shape and np.array_equal(candidate >> 8, shallow):
                return candidate
    raise DataError(f"{path}: 16-bit colours that cannot be read with certainty; save it as PNG")


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rows and columns as the EXIF orientation (1 to 8) says, upright; others change nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def load_image(path: str | os.PathLike, bits: int = 0) -> tuple[bytes, tuple[int, int]]:
    """Reads an image file as bytes that `decode_image` takes.

    8-bit RGB JPEG and PNG files are passed on byte for byte. Everything else is converted once and
    stored as PNG: EXIF rotation is applied, grey is repeated over the channels, alpha is dropped,
    CMYK and palettes become RGB, of 16 bits the high byte stays (what OpenCV does too), of `bits`
    bits the highest 8.

    Args:
        path: A JPEG, PNG, BMP, TIFF, WebP, GIF (one frame) or PNM file.
        bits: How many bits count in files with more than 8, 9 to 16. 0: those that the file has;
            16-bit files that leave the highest two unused are refused, for cameras of 10, 12 and 14
            bits write such.

    Returns:
        The encoded image and its (height, width).

    Raises:
        DataError: empty, truncated or damaged file, several frames, more than 179 megapixels, a
            pixel format such as 32-bit float, or values that do not fit `bits`.
    """
    path = pathlib.Path(path)
    data = path.read_bytes()
    picture = _open(path, data)
    if _is_plain(picture, data) and _opens_again(data, (picture.height, picture.width)):
        return data, (picture.height, picture.width)
    pixels = _to_rgb8(picture, data, path, bits)
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
    give their values, and so do pictures of three equal channels. EXIF rotation is applied, as to
    images. Pixels that a
    GeoTIFF says to be without data are `IGNORE_LABEL`.

    Args:
        path: A lossless image file: PNG, BMP, TIFF, GIF or PNM.
        colors: For colour-coded masks: 0xRRGGBB → value.
        other: Value for colours that are not in `colors`; by default they become
            `UNKNOWN_COLOR + 0xRRGGBB`, so that the caller's check of values can name them.

    Returns:
        int32 `[H, W]`.

    Raises:
        DataError: as `load_image`; a lossy file; a mask of colours without `colors`; a grey mask
            with `colors`.
    """
    path = pathlib.Path(path)
    data = path.read_bytes()
    picture = _open(path, data)
    depth = _bit_depth(picture, data)
    if picture.format in ("JPEG", "MPO") or picture.format == "WEBP":
        raise DataError(
            f"{path}: {picture.format} is lossy and blurs class values; save label maps as PNG"
        )
    nothing = _no_data(picture, path)
    picture = ImageOps.exif_transpose(picture)
    if colors is not None:
        return _label_of_colors(picture, path, colors, other)
    if picture.mode in ("RGB", "RGBA", "RGBX") and depth <= 8:
        channels = np.asarray(picture.convert("RGB")).astype(np.int32)
        if (channels == channels[..., :1]).all():
            return channels[..., 0]
    if picture.mode not in _GREY_MODES:
        raise DataError(
            f"{path}: a {picture.mode} picture is not a label map: want one channel of class "
            "values or a palette PNG. If its colours stand for classes, use `--dataset "
            "image_folder --color_masks` with a class list that states the colours"
        )
    values = np.asarray(picture).astype(np.int32)
    if nothing is not None:
        values = np.where(values == nothing, IGNORE_LABEL, values)
    # Pillow spreads grey of 2 and 4 bits over 0..255.
    return values // (255 // (2**depth - 1)) if picture.mode == "L" and depth in (2, 4) else values


def _no_data(picture: Image.Image, path: pathlib.Path) -> float | None:
    """The value of pixels without data, where a TIFF names one."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return None
    text = str(picture.tag_v2.get(_NODATA, "")).strip("\0 ")
    try:
        return float(text) if text else None
    except ValueError as e:
        raise DataError(f"{path}: its value for `no data` is {text!r}; expected a number") from e


def has_data(path: str | os.PathLike) -> np.ndarray | None:
    """Where an image has data: bool `[H, W]`; None where it says nothing of it.

    A GeoTIFF may name a value of pixels without data; they are those of which all bands have it.

    Raises:
        DataError: the value is no number.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() not in (".tif", ".tiff"):
        return None
    picture = _open(path, path.read_bytes())
    nothing = _no_data(picture, path)
    if nothing is None:
        return None
    values = np.asarray(ImageOps.exif_transpose(picture))
    there = values != nothing
    return there.any(axis=-1) if there.ndim == 3 else there


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
    if data[:8] == _PNG:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    with Image.open(io.BytesIO(data)) as picture:
        return picture.height, picture.width
