"""Makes LMDBs of the TFRecords that Glow publishes, for --dataset celeba_256 and imagenet_32: raw RGB.

    python scripts/convert_tfrecord_to_lmdb.py --dataset celeba --tfr_path celeba-tfr \
        --lmdb_path celeba/celeba-lmdb --split train
    python scripts/convert_tfrecord_to_lmdb.py --dataset imagenet-oord_32 --tfr_path imagenet-oord-tfr \
        --lmdb_path imagenet-oord/imagenet-oord-lmdb_32 --split validation

Expects <tfr_path>/<split>/<split>-r<level>-s-<shard>-of-<shards>.tfrecords, as in github.com/openai/glow,
with images 2^level pixels wide, or other *.tfrecords there. TensorFlow is not needed. All checksums are
verified. A stopped run goes on where it was.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to be run from any folder

from readers.lmdb.maker import make_lmdb
from readers.published.tfrecord import features, read_records
from utils import UserError, run_program

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


if __name__ == '__main__':
    run_program(main)
