"""Reads mutated files, in a process of its own: python -m tests.reliability.readers FOLDER COUNT.

The process takes no more than `MEMORY` beside what it has when it begins, and is killed by a file
that takes longer than `SECONDS`; FOLDER/current is then that file. Prints JSON: of each reader how
many files it read and refused, and what it did otherwise.
"""

import io
import json
import pathlib
import resource
import signal
import struct
import sys
import traceback
import zlib

import numpy as np
import scipy.io

from dilaff_jax.data import folders, images, voc2012_seg
from dilaff_jax.data.images import DataError
from dilaff_jax.interop import files
from tests.data_files import classes_map
from tests.reliability import bad_files

MEMORY = (
    3 * 2**30
)  # 179 megapixels of RGB, which are allowed, are half a GiB, and stand there twice
SECONDS = 60  # on a machine that does much else too; what is valid takes milliseconds


def sbd_files():
    """Annotations as SBD has them, plain and compressed, in either byte order."""
    fields = ("Boundaries", "Segmentation", "CategoriesPresent")
    content = np.zeros((1, 1), [(name, object) for name in fields])
    content["Boundaries"][0, 0] = np.array([[np.eye(4)], [np.eye(5)]], object)
    content["Segmentation"][0, 0] = classes_map(classes=21)
    content["CategoriesPresent"][0, 0] = np.arange(3, dtype=np.uint8)
    found = []
    for compressed in (False, True):
        file = io.BytesIO()
        scipy.io.savemat(file, {"GTcls": content}, do_compression=compressed)
        found.append(file.getvalue())
    return found


def archives(folder):
    made = [
        bad_files.tar(folder / "a.tar", ("a/b", b"x" * 300), ("a/c", b"y" * 900)),
        bad_files.tar(folder / "b.tgz", ("a/b", b"x" * 300), ("a/c", b"y" * 900), kind="w:gz"),
        bad_files.zip_of(folder / "c.zip", ("a/b", b"x" * 300), ("a/c", b"y" * 900)),
    ]
    return [path.read_bytes() for path in made]


def weights():
    import safetensors.numpy

    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(3, np.float32)}
    return [bad_files.npz(**arrays)], [safetensors.numpy.save(arrays)]


def mutated(seeds, rng):
    """One seed with wrong bytes, cut, or with parts left out, repeated or taken from another."""
    data = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(rng.choice([1, 1, 2, 4])):
        # Where the sizes stand, most formats have their beginning.
        at = int(rng.integers(max(1, min(len(data), int(rng.choice([64, 400, 10**6]))))))
        size = int(rng.choice([1, 4, 8, 40]))
        match rng.integers(6):
            case 0:
                data = data[:at]
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size] * int(rng.choice([1, 3]))
            case 3:
                other = seeds[rng.integers(len(seeds))]
                data[at:] = other[int(rng.integers(len(other))) :]
            case 4:
                special = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
                data[at : at + 4] = bytes([special]) * len(data[at : at + 4])
            case _:
                for place in rng.integers(at, max(at + 1, min(len(data), at + size)), 3):
                    data[place : place + 1] = bytes([rng.integers(256)])
    return repaired(bytes(data)) if rng.integers(2) else bytes(data)


def repaired(data):
    """A PNG with the checksums that its chunks should have: else most mutations stop there."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    data, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack_from(">I", data, at)[0]
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def read_image(path):
    data, size = images.load_image(path)
    pixels = images.decode_image(data)
    assert pixels.shape == (*size, 3), (pixels.shape, size)
    assert pixels.dtype == np.uint8


def read_label(path):
    label = images.load_label(path)
    assert label.ndim == 2, label.shape
    assert label.dtype == np.int32


def read_sbd(path):
    label = voc2012_seg.load_sbd(path)
    assert label.ndim == 2, label.shape
    assert label.dtype == np.int32


def read_record(path):
    data = path.read_bytes()
    label = images.decode_label(data)
    assert label.ndim == 2, label.shape
    assert label.dtype == np.uint8


def read_archive(path):
    target = path.parent / "unpacked"
    try:
        folders.extract(path, target)
    finally:
        around = {p.name for p in path.parent.iterdir()}
        assert around <= {"current", "unpacked"}, around


def read_weights(path):
    assert all(isinstance(array, np.ndarray) for array in files.read(path).values())


def main(folder, count):
    folder = pathlib.Path(folder)
    own = folder / "own"
    own.mkdir()
    numpy_files, safetensors_files = weights()
    pngs = [data for name, data in bad_files.masks().items() if name.endswith(".png")]
    readers = {
        "image": (read_image, list(bad_files.images().values()), DataError, ""),
        "label": (read_label, list(bad_files.masks().values()), DataError, ""),
        "sbd": (read_sbd, sbd_files(), DataError, ".mat"),
        "record": (read_record, pngs[:-1], DataError, ""),
        "archive": (read_archive, archives(folder), DataError, ""),
        "npz": (read_weights, numpy_files, ValueError, ".npz"),
        "safetensors": (read_weights, safetensors_files, ValueError, ".safetensors"),
    }
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    result = {}
    for number, (name, (read, seeds, refusal, suffix)) in enumerate(readers.items()):
        rng = np.random.default_rng(number)
        path = own / f"current{suffix}"
        found = result[name] = {"read": 0, "refused": 0, "otherwise": []}
        for index in range(count + len(seeds)):
            valid = index < len(seeds)
            path.write_bytes(seeds[index] if valid else mutated(seeds, rng))
            signal.alarm(SECONDS)
            try:
                read(path)
                found["read"] += 1
            except refusal as error:
                found["refused"] += 1
                if valid or (name != "record" and str(path) not in str(error)):
                    found["otherwise"].append(f"{index}: {error}")
            except BaseException:
                found["otherwise"].append(f"{index}: {traceback.format_exc()}")
            signal.alarm(0)
        path.unlink()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
