"""Files that cannot be used, and archives and weights that mean harm."""

import io
import pickle
import struct
import tarfile
import zipfile
import zlib

import cv2
import numpy as np
from PIL import Image

from tests.data_files import classes_map, picture


class Harm:
    """Creates the file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def harmful_pickle(path):
    """A pickle that would create the file."""
    return pickle.dumps({"fc.weight": Harm(path)}, protocol=2)


def torch_file(content):
    """The zip that torch.save writes, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb_png(side=60_000):
    """A PNG of a few bytes whose header claims side x side pixels."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 64)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def images():
    """{name: bytes} of valid images in every format and pixel format, 20 x 30."""
    rgb = picture()
    wide = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    alpha = np.dstack([rgb, np.full((20, 30), 7, np.uint8)])
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "rgb.png": encoded(Image.fromarray(rgb), "PNG"),
        "rgb.jpg": encoded(Image.fromarray(rgb), "JPEG", quality=95),
        "grey.png": encoded(Image.fromarray(rgb[..., 0]), "PNG"),
        "grey16.png": encoded(Image.fromarray(wide), "PNG"),
        "rgb16.png": cv2.imencode(".png", np.repeat(wide[..., None], 3, -1))[1].tobytes(),
        "rgba.png": encoded(Image.fromarray(alpha), "PNG"),
        "palette.png": encoded(Image.fromarray(rgb).quantize(16), "PNG"),
        "cmyk.jpg": encoded(Image.fromarray(rgb // 128 * 100).convert("CMYK"), "JPEG", quality=100),
        "turned.jpg": encoded(Image.fromarray(rgb), "JPEG", exif=turned, quality=95),
        "rgb.bmp": encoded(Image.fromarray(rgb), "BMP"),
        "rgb.tif": encoded(Image.fromarray(rgb), "TIFF", compression="tiff_lzw"),
        "rgb.webp": encoded(Image.fromarray(rgb), "WEBP", lossless=True),
        "rgb.gif": encoded(Image.fromarray(rgb).quantize(16), "GIF"),
        "rgb.ppm": encoded(Image.fromarray(rgb), "PPM"),
    }


def masks():
    """{name: bytes} of valid label maps, 20 x 30."""
    label = Image.fromarray(classes_map())
    coloured = label.copy()
    coloured.putpalette([(37 * i + 11) % 256 for i in range(768)])
    return {
        "grey.png": encoded(label, "PNG"),
        "palette.png": encoded(coloured, "PNG"),
        "bits.png": encoded(Image.fromarray(classes_map(classes=2).astype(bool)), "PNG"),
        "wide.png": encoded(Image.fromarray(classes_map().astype(np.uint16)), "PNG"),
        "mask.gif": encoded(coloured, "GIF"),
        "mask.tif": encoded(label, "TIFF"),
        "mask.bmp": encoded(label, "BMP"),
        "mask.pgm": encoded(label, "PPM"),
    }


def unusable_images():
    """{name: (bytes, what load_image says after the path, "..." for a library's words)}."""
    valid = images()
    noise = Image.fromarray(picture(200, 200))
    png, jpeg = encoded(noise, "PNG"), encoded(noise, "JPEG")
    damaged = "not a readable image (truncated or damaged, {} bytes): ..."
    film = [Image.fromarray(picture(seed=s)) for s in (0, 1)]
    gif = encoded(film[0], "GIF", save_all=True, append_images=film[1:])
    tiff = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    text = b"this is no image, whatever its name says\n"
    pixels = 60_000**2
    return {
        "nothing.png": (b"", "the file is empty (0 bytes); restore or remove it"),
        "half.png": (png[:4000], damaged.format(4000)),
        "half.jpg": (jpeg[:4000], damaged.format(4000)),
        "text.png": (text, damaged.format(len(text))),
        "header.tif": (valid["rgb.tif"][:8], damaged.format(8)),
        "bomb.png": (
            bomb_png(),
            f"Image size ({pixels} pixels) exceeds limit of 178956970 pixels, could be "
            "decompression bomb DOS attack.; make the image smaller (--mode predict takes it as it is, in "
            "tiles: --tile=1024)",
        ),
        "film.gif": (gif, "holds 2 pictures; save the one that is meant alone"),
        "float.tif": (
            tiff,
            "pixel format 'F' is not supported; allowed are 8- and 16-bit grey, RGB, RGBA, palette "
            "and CMYK images. Of other numbers nobody knows which are black and white: scale them "
            "to 8 or 16 bits, or prepare them as they are: --dataset band_folder",
        ),
    }


def tar(path, *members, kind="w"):
    """A tar of (name, content), or of (TarInfo, None)."""
    with tarfile.open(path, kind) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content or b"")
            archive.addfile(info, io.BytesIO(content or b""))
    return path


def tar_link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, str(target)
    return info


def zip_of(path, *members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path
