"""Reads one field of a struct from a MATLAB 5 file, with every size held to what is there.

scipy's reader trusts the sizes that a file states: over damaged ones it loops for hours, takes any
amount of memory, or crashes the process. This one takes no more than the file holds, and unpacks
`MOST` bytes at most. Format: "MAT-File Format", MathWorks, level 5.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dilaff_jax.errors import UserError

MOST = 64 * 2**20  # bytes; SBD's label maps have at most 500 x 500
_MOST_AXES = 32

_MATRIX, _COMPRESSED = 14, 15
_STRUCT = 2
# Codes of stored numbers, and classes of arrays, which may be stored in a smaller type.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
_STORED |= {12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4"}
_CLASSES |= {14: "i8", 15: "u8"}


class _Matrix(NamedTuple):
    """A variable or field: class, dimensions, name, and the elements that follow."""

    kind: int
    shape: tuple[int, ...]
    name: bytes
    rest: Iterator[tuple[int, memoryview]]


def read_field(data: bytes, variable: str, field: str) -> np.ndarray:
    """The numeric array VARIABLE.FIELD, of a 1 x 1 struct.

    Raises:
        UserError: no such file, variable or field; it is damaged; it takes more than `MOST` bytes.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None:
        raise UserError("no MATLAB 5 file")
    room = MOST
    for code, content in _elements(memoryview(data)[128:], order):
        if code == _COMPRESSED:
            content = memoryview(_inflated(content, room))
            room -= len(content)
            code, content = next(_elements(content, order), (0, content))
        if code == _MATRIX:
            matrix = _matrix(content, order)
            if matrix.name == variable.encode():
                return _numbers(_field(matrix, variable, field, order), order)
    raise UserError(f"no variable {variable}")


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of the elements that stand one after the other."""
    at = 0
    while at + 8 <= len(data):
        code, size = struct.unpack_from(f"{order}II", data, at)
        start, step = at + 8, 8 + size + (-size % 8 if code != _COMPRESSED else 0)
        if code >> 16:  # a small element keeps up to four bytes in its tag
            code, size, start, step = code & 0xFFFF, code >> 16, at + 4, 8
            if size > 4:
                raise UserError(f"a small element of {size} bytes")
        if start + size > len(data):
            raise UserError(f"an element of {size} bytes where {len(data) - start} are left")
        yield code, data[start : start + size]
        at += step


def _inflated(content: memoryview, room: int) -> bytes:
    machine = zlib.decompressobj()
    try:
        data = machine.decompress(content, room + 1)
    except zlib.error as e:
        raise UserError(str(e)) from e
    if len(data) > room:
        raise UserError(f"it unpacks to more than {MOST} bytes")
    if not machine.eof:
        raise UserError("a compressed variable has no end")
    return data


def _matrix(content: memoryview, order: str) -> _Matrix:
    rest = _elements(content, order)
    flags, shape, name = (next(rest, (0, memoryview(b"")))[1] for _ in range(3))
    if len(flags) != 8 or len(shape) % 4 or len(shape) > 4 * _MOST_AXES:
        raise UserError("an array without flags or dimensions")
    kind = struct.unpack_from(f"{order}I", flags)[0] & 0xFF
    return _Matrix(kind, struct.unpack(f"{order}{len(shape) // 4}i", shape), bytes(name), rest)


def _field(matrix: _Matrix, variable: str, field: str, order: str) -> _Matrix:
    if matrix.kind != _STRUCT or matrix.shape != (1, 1):
        raise UserError(f"{variable} is no struct of 1 x 1")
    length, names = (next(matrix.rest, (0, memoryview(b"")))[1] for _ in range(2))
    width = struct.unpack(f"{order}i", length)[0] if len(length) == 4 else 0
    if width < 1:
        raise UserError(f"{variable} has no fields")
    field_names = (bytes(names[i : i + width]).split(b"\0")[0] for i in range(0, len(names), width))
    for name, (code, content) in zip(field_names, matrix.rest, strict=False):
        if name == field.encode() and code == _MATRIX:
            return _matrix(content, order)
    raise UserError(f"{variable} has no field {field}")


def _numbers(matrix: _Matrix, order: str) -> np.ndarray:
    code, content = next(matrix.rest, (0, memoryview(b"")))
    if matrix.kind not in _CLASSES or code not in _STORED:
        raise UserError(f"an array of class {matrix.kind} and type {code}, not of numbers")
    values = np.dtype(order + _STORED[code])
    # In Python's own numbers, which do not overflow: the shape is the file's word alone.
    count = 1
    for n in matrix.shape:
        count *= n
    if min(matrix.shape, default=-1) < 0 or count * values.itemsize != len(content):
        raise UserError(f"an array of shape {matrix.shape} in {len(content)} bytes")
    numbers = np.frombuffer(content, values).reshape(matrix.shape, order="F")
    return np.ascontiguousarray(numbers.astype(_CLASSES[matrix.kind]))
