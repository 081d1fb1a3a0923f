"""Bit depths and orientations of strangers' files: what each becomes, and what is refused."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from dilaff_jax.data import images
from dilaff_jax.data.images import DataError

COLORS, GREY = 2, 0


def png(values, depth, kind=GREY, orientation=None):
    """A PNG by its specification: rows without filter, samples of `depth` bits, high bits first."""
    values = np.asarray(values, np.int64)
    rows = values.reshape(len(values), -1)
    bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    packed = np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in packed)

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, kind, 0, 0, 0)
    exif = b""
    if orientation is not None:
        tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
        exif = chunk(b"eXIf", tiff)
    body = chunk(b"IHDR", header) + exif + chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def save_tiff(values, path, orientation=1):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = orientation
    Image.fromarray(values).save(path, tiffinfo=tags)
    return path


def loaded(path, **options):
    data, size = images.load_image(path, **options)
    pixels = images.decode_image(data)
    assert pixels.shape[:2] == size
    return pixels


def numbers(high, shape=(6, 7), seed=0):
    values = np.random.default_rng(seed).integers(0, high, shape)
    values.flat[:2] = 0, high - 1
    return values


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_deep_images_become_their_highest_8_bits(bits, channels, suffix, tmp_path):
    values = numbers(1 << bits, (6, 7) if channels == 1 else (6, 7, 3)).astype(np.uint16)
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), values if channels == 1 else values[..., ::-1])
    if bits == 16:
        expected = loaded(path)
    else:
        with pytest.raises(DataError, match=rf"a.{suffix}: 16 bits a channel and no .*={bits} or"):
            images.load_image(path)
        expected = loaded(path, bits=bits)
    high = values >> (bits - 8)
    np.testing.assert_array_equal(
        expected, high if channels == 3 else np.repeat(high[..., None], 3, axis=-1)
    )
    if bits == 16:
        with pytest.raises(DataError, match="has the value 65535, which does not fit"):
            images.load_image(path, bits=12)
    # A dark picture of 16 bits is one where that is said.
    assert loaded(path, bits=16).max() == (1 << bits) - 1 >> 8


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_shallow_grey_images_reach_from_black_to_white(bits, tmp_path):
    values = numbers(1 << bits)
    (tmp_path / "a.png").write_bytes(png(values, bits))
    np.testing.assert_array_equal(loaded(tmp_path / "a.png")[..., 0], values * 255 // (2**bits - 1))


def test_a_black_image_of_16_bits_is_black(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.zeros((4, 5)), 16))
    assert loaded(tmp_path / "a.png").max() == 0


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_masks_of_any_depth_give_their_values(bits, tmp_path):
    values = numbers(1 << bits)
    (tmp_path / "a.png").write_bytes(png(values, bits))
    np.testing.assert_array_equal(images.load_label(tmp_path / "a.png"), values)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int32])
def test_grey_tiff_masks_give_their_values(dtype, tmp_path):
    values = numbers(2 if dtype is bool else 200).astype(dtype)
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(images.load_label(tmp_path / "a.tif"), values)


def test_a_mask_of_three_equal_channels_is_one_of_its_values(tmp_path):
    values = numbers(30).astype(np.uint8)
    Image.fromarray(np.stack([values] * 3, axis=-1)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.load_label(tmp_path / "a.png"), values)
    (tmp_path / "deep.png").write_bytes(png(np.stack([values] * 3, axis=-1), 16, COLORS))
    with pytest.raises(DataError, match="not a label map"):
        images.load_label(tmp_path / "deep.png")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (numbers(9).astype(np.float32), "pixel format 'F' .* scale them to 8 or 16 bits"),
        (numbers(9).astype(np.float64), "TIFF of 1 channels of 64-bit floating-point numbers"),
        (numbers(9, (6, 7, 5)).astype(np.uint8), "TIFF of 5 channels of 8-bit unsigned numbers"),
    ],
)
def test_what_has_no_black_and_white_is_refused_by_its_kind(values, expected, tmp_path):
    path = tmp_path / "a.tif"
    if values.ndim == 3:
        write_bands(values, path)
    else:
        cv2.imwrite(str(path), values)
    with pytest.raises(DataError, match=expected):
        images.load_image(path)


def write_bands(values, path):
    """A TIFF of any number of 8-bit bands, by its specification."""
    height, width, bands = values.shape
    depths, entries = struct.pack(f"<{bands}H", *[8] * bands), []
    start = 8 + 2 + 12 * 9 + 4
    for tag, kind, count, value in (
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, bands, start), (259, 3, 1, 1),
        (262, 3, 1, 1), (273, 4, 1, start + len(depths)), (277, 3, 1, bands), (278, 4, 1, height),
        (279, 4, 1, values.size),
    ):  # fmt: skip
        entries.append(struct.pack("<HHII", tag, kind, count, value))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + depths + values.tobytes())


# As the EXIF specification describes where row 0 and column 0 of what is stored belong.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.swapaxes(x[::-1, ::-1], 0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_and_masks_are_turned_by_one_rule(orientation, tmp_path):
    grey = numbers(256)
    wide = numbers(1 << 16, (6, 7, 3))
    (tmp_path / "8.png").write_bytes(png(grey, 8, orientation=orientation))
    (tmp_path / "4.png").write_bytes(png(grey >> 4, 4, orientation=orientation))
    (tmp_path / "16.png").write_bytes(png(wide, 16, COLORS, orientation=orientation))
    save_tiff(grey.astype(np.uint8), tmp_path / "8.tif", orientation)
    palette = Image.fromarray((grey % 7).astype(np.uint8)).convert("P")
    palette.putdata((grey % 7).astype(np.uint8).ravel().tolist())
    exif = Image.Exif()
    exif[0x0112] = orientation
    palette.save(tmp_path / "palette.png", exif=exif)
    turn = UPRIGHT[orientation]
    np.testing.assert_array_equal(loaded(tmp_path / "8.png")[..., 0], turn(grey))
    np.testing.assert_array_equal(loaded(tmp_path / "16.png"), turn(wide) >> 8)
    np.testing.assert_array_equal(loaded(tmp_path / "8.tif")[..., 0], turn(grey))
    for name, values in (("8.png", grey), ("4.png", grey >> 4), ("8.tif", grey)):
        np.testing.assert_array_equal(images.load_label(tmp_path / name), turn(values))
    np.testing.assert_array_equal(images.load_label(tmp_path / "palette.png"), turn(grey % 7))


def test_jpeg_images_are_turned_as_masks_are(tmp_path):
    smooth = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)
    for orientation, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(smooth).save(tmp_path / "a.jpg", exif=exif, quality=95)
        found = loaded(tmp_path / "a.jpg")[..., 0].astype(int)
        assert np.abs(found - turn(smooth)).max() < 20
