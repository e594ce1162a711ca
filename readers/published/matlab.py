"""Matrices of numbers in MATLAB files of version 5 (MATLAB 5 to 7.2, not the HDF5 of 7.3).

SciPy reads more kinds of files, but damaged ones end the process. A file is a header and elements, packed by
zlib or not. The parts of a matrix are its class, its shape, its name, and its values column by column, each
after a tag of their type and size (MathWorks, "MAT-File Format", chapter 1).
"""

import math
import struct
import zlib
from collections.abc import Iterator
from itertools import islice

import numpy as np

from storage.limits import FREE_UNPACKED, excess, unpack

ORDERS = {b'IM': '<', b'MI': '>'}                  # of the bytes in a number, at the end of the header
HEADER, MATRIX, PACKED = 128, 14, 15               # bytes of the header; types of elements
HEAD = 4096                                        # bytes in which the class and the shape of a matrix are
TYPES = {1: 'i1', 2: 'u1', 3: 'i2', 4: 'u2', 5: 'i4', 6: 'u4', 7: 'f4', 9: 'f8', 12: 'i8', 13: 'u8'}
CLASSES = {6: 'f8', 7: 'f4', 8: 'i1', 9: 'u1', 10: 'i2', 11: 'u2', 12: 'i4', 13: 'u4', 14: 'i8', 15: 'u8'}
OTHERS = {1: 'cell', 2: 'struct', 3: 'object', 4: 'text', 5: 'sparse matrix'}
COMPLEX = 0x800                                    # flag beside the class


def matrices(data: bytes, *names: str) -> list[np.ndarray]:
    """The matrices of these names. Raises ValueError, zlib.error or EOFError for a damaged file and for one
    that is too large, KeyError for a name that is not there.
    """
    order, found = ORDERS.get(bytes(data[HEADER - 2:HEADER])), {}
    if not order:
        raise ValueError('it is no MATLAB file of version 5')
    for kind, content in parts(memoryview(data)[HEADER:], order):
        if kind == PACKED:
            head = memoryview(zlib.decompressobj().decompress(content, HEAD))
            kind, content = next(parts(unpack(bytes(content), claim(head[8:], order)), order), (0, content))
        if kind == MATRIX:
            _, _, (_, name) = islice(parts(content, order), 3)
            if (known := bytes(name).decode('latin-1')) in names:
                found[known] = numbers(content, order)
    return [found[name] for name in names]


def parts(data: bytes | memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """The type and the content of each element, or part of one. Raises ValueError if one is cut off."""
    view, place = memoryview(data), 0
    while place + 8 <= len(view):
        kind, length = struct.unpack_from(f'{order}2I', view, place)
        start, most = place + 8, len(view)
        if kind >> 16:                                  # a small part, which lies in its tag
            kind, length, start, most = kind & 0xffff, kind >> 16, place + 4, place + 8
        if start + length > most:
            raise ValueError('a part of it is cut off')
        yield kind, view[start:start + length]
        size = start - place + length
        place += size if kind == PACKED else -(-size // 8) * 8       # only packed ones are not padded


def claim(matrix: memoryview, order: str) -> int:
    """The most bytes to which a packed matrix may unpack, by the shape at its beginning and 8 bytes a value.
    Raises ValueError if the shape claims too much memory.
    """
    _, (_, shape) = islice(parts(matrix, order), 2)
    sides = np.frombuffer(shape, f'{order}i4').tolist()
    if min(sides, default=-1) < 0:
        raise ValueError(f'it has a matrix of shape {tuple(sides)}')
    if words := excess(8 * math.prod(sides)):
        raise ValueError(f'it {words}')
    return 8 * math.prod(sides) + FREE_UNPACKED


def numbers(matrix: memoryview, order: str) -> np.ndarray:
    """The matrix of an element, in the type of its class. Raises ValueError."""
    (_, flags), (_, shape), _, *values = parts(matrix, order)
    claim(matrix, order)
    flag, = struct.unpack_from(f'{order}I', flags)
    kind = flag & 0xff
    if kind not in CLASSES or flag & COMPLEX or len(values) != 1 or values[0][0] not in TYPES:
        what = 'complex matrix' if flag & COMPLEX else OTHERS.get(kind, 'part of an unknown type')
        raise ValueError(f'it holds a {what} where numbers are expected')
    found = np.frombuffer(values[0][1], order + TYPES[values[0][0]])
    return found.astype(CLASSES[kind]).reshape(np.frombuffer(shape, f'{order}i4').tolist(), order='F')
