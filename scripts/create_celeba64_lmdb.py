"""Makes the LMDB of one part of CelebA, for --dataset celeba_64: the files as they are, under '0', '1', ...

    python scripts/create_celeba64_lmdb.py --img_path data --lmdb_path data/celeba64_lmdb --split train
    python scripts/create_celeba64_lmdb.py --img_path data --lmdb_path data/celeba64_lmdb --split valid

Expects celeba/img_align_celeba/*.jpg and celeba/list_eval_partition.txt below --img_path, as
torchvision.datasets.CelebA leaves them. Each file is decoded once, so that a damaged one is found here. A
stopped run goes on where it was.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to be run from any folder

from readers.lmdb.file import make_lmdb
from readers.parallel import in_order
from readers.published.layouts import LAYOUT, celeba_store, find_celeba
from readers.published.records import Decoding, LazyImages
from utils import UserError, run_program

NAMES = {'train': 'train.lmdb', 'valid': 'validation.lmdb', 'test': 'test.lmdb'}       # the published ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--img_path', required=True, help='folder that holds celeba/')
    parser.add_argument('--lmdb_path', required=True, help='folder to write the LMDB to')
    parser.add_argument('--split', default='train', choices=NAMES, help='part (default: train)')
    flags = parser.parse_args()
    folder = find_celeba(flags.img_path)
    if folder is None:
        raise UserError(f"--img_path {flags.img_path} has no {LAYOUT}.")
    store = celeba_store(flags.split, folder, flags.split)
    images = LazyImages([store], Decoding(encoded=True), channels=3, size=1)

    def read(index: int) -> bytes:
        images[[index]]                                        # raises UserError if it cannot be decoded
        return store.read(index)

    def values(first: int) -> Iterator[bytes]:
        return in_order(read, range(first, len(store)))

    make_lmdb(Path(flags.lmdb_path, NAMES[flags.split]), values, len(store))


if __name__ == '__main__':
    run_program(main)
