"""Makes LMDBs of the TFRecords that Glow publishes, for --dataset celeba_256 and imagenet_32: raw RGB.

    python scripts/convert_tfrecord_to_lmdb.py --dataset celeba --tfr_path celeba-tfr \
        --lmdb_path celeba/celeba-lmdb --split train
    python scripts/convert_tfrecord_to_lmdb.py --dataset imagenet-oord_32 --tfr_path imagenet-oord-tfr \
        --lmdb_path imagenet-oord/imagenet-oord-lmdb_32 --split validation

Expects <tfr_path>/<split>/<split>-r<level>-s-<shard>-of-<shards>.tfrecords, as in github.com/openai/glow,
with images 2^level pixels wide, or other *.tfrecords there. TensorFlow is not needed. All checksums are
verified. A stopped run goes on where it was.

A TFRecord file is a row of records: length (8 bytes), masked CRC of the length (4), data, masked CRC of the
data (4), all little-endian. The data of a record is a protobuf message, tf.train.Example, that maps the names
of features to lists. Formats: tensorflow.org/tutorials/load_data/tfrecord and
protobuf.dev/programming-guides/encoding; the CRC is that of RFC 3720.
"""

import argparse
import functools
import itertools
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to be run from any folder

import numpy as np

from readers.lmdb.file import make_lmdb
from utils import UserError, run_program

POLYNOMIAL = 0x82F63B78          # CRC-32C (Castagnoli), its bits reversed
MASK_DELTA = 0xA282EAD8          # a masked CRC is the CRC rotated by 15 bits, plus this
ALL_ONES = 0xFFFFFFFF
BLOCK = 1024                     # bytes whose CRC is found at once; their table, 1 MiB, stays in the cache
SIDES = {'imagenet-oord_32': 32, 'imagenet-oord_64': 64, 'celeba': 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dataset', default='imagenet-oord_32', choices=SIDES,
                        help='what is converted (default: imagenet-oord_32)')
    parser.add_argument('--tfr_path', required=True, help='folder that holds train/ and validation/')
    parser.add_argument('--lmdb_path', required=True, help='folder to write the LMDB to')
    parser.add_argument('--split', default='train', choices=('train', 'validation'),
                        help='part (default: train)')
    flags = parser.parse_args()
    side = SIDES[flags.dataset]
    files = find_files(Path(flags.tfr_path), flags.split, side)

    def values(first: int) -> Iterator[bytes]:
        return itertools.islice(images(files, side), first, None)

    make_lmdb(Path(flags.lmdb_path, f'{flags.split}.lmdb'), values)


def find_files(folder: Path, split: str, side: int) -> list[Path]:
    """The files of a part in the order of their names. Raises UserError if one is missing."""
    pattern = f'{split}-r{side.bit_length() - 1:02d}-s-*-of-*.tfrecords'
    files = sorted((folder / split).glob(pattern))
    if files and len(files) != int(total := files[0].stem.rsplit('-', 1)[-1]):
        raise UserError(f"{folder / split} has {len(files)} of the {int(total)} files {pattern}: fetch the "
                        f"others.")
    files = files or sorted((folder / split).glob('*.tfrecord*'))
    if not files:
        raise UserError(f"--tfr_path: {folder / split} has no {pattern} nor other TFRecords: expected the "
                        f"folder that holds train/ and validation/ of the unpacked archive.")
    return files


def images(files: list[Path], side: int) -> Iterator[bytes]:
    """The pixels of each record, `side` x `side` x 3 bytes."""
    for path in files:
        for number, record in enumerate(read_records(path)):
            try:
                found = features(record)
                data, = found['data']
                shape = tuple(found['shape'])
            except (ValueError, KeyError) as error:
                raise UserError(f"{path}: record {number} is not an example with `data` and `shape` "
                                f"({error}). Fetch the file again.") from None
            if shape != (side, side, 3) or len(data) != 3 * side * side:
                raise UserError(f"{path}: record {number} has the shape {shape} and {len(data):,} bytes, "
                                f"expected {side} x {side} x 3: check --dataset.")
            yield data


# ---------------------------------------------------------------------------------------------------- CRC-32C

@functools.cache
def _tables() -> np.ndarray:
    """(BLOCK, 256) uint32: what a byte adds to the CRC, by its distance from the end of a block.

    A CRC is linear over bits: that of a block is the sum (XOR) of what each byte would give among zeros.
    """
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = last >> 1 ^ np.where(last & 1, POLYNOMIAL, 0).astype(np.uint32)
    rows = [last]
    for _ in range(BLOCK - 1):                               # one zero byte more behind it
        rows.append(rows[-1] >> 8 ^ last[rows[-1] & 255])
    return np.stack(rows[::-1])


@functools.cache
def _last() -> list[int]:
    return _tables()[-1].tolist()


@functools.cache
def _next_block() -> tuple[list[int], ...]:
    """Four tables that move a CRC behind BLOCK zero bytes: one for each of its bytes."""
    return tuple(_tables()[i].tolist() for i in range(4))


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`: 0xE3069283 for b'123456789'."""
    if len(data) < 16:                                       # not worth a block
        return _short_crc32c(data)
    padded = np.zeros(-(-len(data) // BLOCK) * BLOCK, np.uint8)
    start = len(padded) - len(data)                          # zeros before the data add nothing
    padded[start:] = np.frombuffer(data, np.uint8)
    padded[start:start + 4] ^= 255                           # the register begins with 32 ones
    blocks = padded.reshape(-1, BLOCK)
    places = 256 * np.arange(BLOCK)
    sums = np.bitwise_xor.reduce(_tables().ravel().take(places + blocks), axis=1).tolist()
    value, (a, b, c, d) = 0, _next_block()
    for block in sums:
        value = a[value & 255] ^ b[value >> 8 & 255] ^ c[value >> 16 & 255] ^ d[value >> 24] ^ block
    return value ^ ALL_ONES


def _short_crc32c(data: bytes) -> int:
    table, value = _last(), ALL_ONES
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 255]
    return value ^ ALL_ONES


def _mask(value: int) -> int:
    return ((value >> 15 | value << 17) + MASK_DELTA) & ALL_ONES


# ---------------------------------------------------------------------------------------------------- records

def read_records(path: str | Path) -> Iterator[bytes]:
    """The data of each record. Raises UserError naming file, record and first byte of a damaged one."""
    number, start = 0, 0

    def broken(reason: str) -> UserError:
        return UserError(f"{path}: record {number} at byte {start:,} {reason}. Fetch the file again.")

    try:
        with open(path, 'rb') as file:
            while head := file.read(12):
                if len(head) < 12:
                    raise broken('is cut off in its header')
                length, checksum = struct.unpack('<QI', head)
                if _mask(crc32c(head[:8])) != checksum:
                    raise broken('has a header with a wrong checksum')
                data, tail = file.read(length), file.read(4)
                if len(tail) < 4:
                    raise broken(f'is cut off: {len(data) + len(tail):,} of {length + 4:,} bytes are there')
                if _mask(crc32c(data)) != struct.unpack('<I', tail)[0]:
                    raise broken('has data with a wrong checksum')
                yield data
                number, start = number + 1, file.tell()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None


# ------------------------------------------------------------------------------------------- tf.train.Example

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5                     # protobuf's types of a field


def features(data: bytes) -> Mapping[str, list]:
    """The features of an Example: lists of bytes or of int; float lists are left out.

    Raises ValueError if `data` is no such message.
    """
    found = {}
    for group in _members(data, 1):                                    # Example.features
        for entry in _members(group, 1):                               # an item of the map Features.feature
            name, = _members(entry, 1)
            for feature in _members(entry, 2):
                for values in _members(feature, 1):                    # Feature.bytes_list
                    found[bytes(name).decode()] = [bytes(v) for v in _members(values, 1)]
                for values in _members(feature, 3):                    # Feature.int64_list
                    found[bytes(name).decode()] = _integers(values)
    return found


def _members(data: bytes | memoryview, number: int) -> list[memoryview]:
    """The bytes of each field `number`."""
    return [value for n, kind, value in _fields(data) if n == number and kind == BYTES]


def _integers(data: memoryview) -> list[int]:
    """The values of an Int64List, packed into one field or each in its own."""
    values = []
    for number, kind, value in _fields(data):
        if number == 1 and kind == VARINT:
            values.append(value)
        elif number == 1 and kind == BYTES:
            place = 0
            while place < len(value):
                one, place = _varint(value, place)
                values.append(one)
    return [v - 2 ** 64 if v >= 2 ** 63 else v for v in values]


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """(number, type, value) of each field of a message. Raises ValueError if it is no message."""
    data, place = memoryview(data), 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = _varint(data, place)
        else:
            if kind not in (EIGHT_BYTES, BYTES, FOUR_BYTES):
                raise ValueError(f'it has a field of the unknown type {kind}')
            length = {EIGHT_BYTES: 8, FOUR_BYTES: 4}.get(kind)
            if length is None:
                length, place = _varint(data, place)
            if place + length > len(data):
                raise ValueError('a field goes beyond its end')
            value, place = data[place:place + length], place + length
        yield number, kind, value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """The number at `place`, 7 bits a byte from the lowest, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError('it ends within a number')
        byte, place = data[place], place + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError('a number has more than 10 bytes')


if __name__ == '__main__':
    run_program(main)
