"""Makes the LMDB of one part of FFHQ at 256 x 256, for --dataset ffhq: raw RGB under '0', '1', ...

    python scripts/create_ffhq_lmdb.py --ffhq_img_path images1024x1024 --ffhq_lmdb_path ffhq/ffhq-lmdb \
        --split train                                        (then again with --split validation)

The images below --ffhq_img_path, sorted by name, are shuffled: nine of ten (63,000 of 70,000) train, the rest
validates. Which ones the published run took is unknown. The first call writes its choice, a function of
--seed, to train_test_ind.pt beside the LMDBs; later calls use it, and so they do with one that is there, in
this or in the image folder, from elsewhere: indices {'train': (63000,), 'test': (7000,)}. A stopped run goes
on where it was.
"""

import argparse
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to be run from any folder

import torch
from PIL import Image

from readers.lmdb.file import make_lmdb
from readers.parallel import in_order
from utils import UserError, mix_seed, run_program, write_atomically

SIZE = 256
TRAIN_FRACTION = 0.9
SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')
INDICES = 'train_test_ind.pt'
PARTS = {'train': ('train', 'train.lmdb'), 'validation': ('test', 'validation.lmdb')}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ffhq_img_path', required=True, help='folder that holds the images, at any depth')
    parser.add_argument('--ffhq_lmdb_path', required=True, help='folder to write the LMDB to')
    parser.add_argument('--split', default='train', choices=PARTS, help='part (default: train)')
    parser.add_argument('--seed', default=0, type=int, help='which random choice of parts (default: 0)')
    flags = parser.parse_args()
    source, target = Path(flags.ffhq_img_path), Path(flags.ffhq_lmdb_path)
    files = sorted((p for p in source.rglob('*') if p.suffix.lower() in SUFFIXES), key=lambda p: p.name)
    if len(files) < 2:
        raise UserError(f"--ffhq_img_path {source} holds {len(files)} images ({', '.join(SUFFIXES)}): "
                        f"expected the 70,000 of FFHQ.")
    part, name = PARTS[flags.split]
    chosen = choose(len(files), flags.seed, source, target)[part]

    def values(first: int) -> Iterator[bytes]:
        return in_order(read, (files[i] for i in chosen[first:].tolist()))

    make_lmdb(target / name, values, len(chosen))


def choose(number: int, seed: int, source: Path, target: Path) -> dict[str, torch.Tensor]:
    """Which of `number` images are in 'train' and in 'test': from a file, else drawn and written to one."""
    path = next((p for p in (target / INDICES, source / INDICES) if p.is_file()), None)
    if path is None:
        order = torch.randperm(number, generator=torch.Generator().manual_seed(mix_seed(seed, 'ffhq')))
        train = round(TRAIN_FRACTION * number)
        chosen = {'train': order[:train].clone(), 'test': order[train:].clone()}
        write_atomically(target / INDICES, lambda p: torch.save(chosen, p))
        return chosen
    print(f'parts as in {path}')
    try:
        loaded = torch.load(path, weights_only=True)
        chosen = {part: torch.as_tensor(loaded[part]).long() for part in ('train', 'test')}
        every = torch.cat([chosen['train'], chosen['test']])
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError,
            pickle.UnpicklingError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f"{path} cannot be used ({reason}): expected a dict of index tensors 'train' and "
                        f"'test'. Remove it to draw the parts anew.") from None
    if not torch.equal(every.sort().values, torch.arange(number)):
        raise UserError(f"{path} does not name each of the {number:,} images of {source} once: it has "
                        f"{len(every):,} indices. Complete the images, or remove the file and the LMDBs made "
                        f"with it.")
    return chosen


def read(path: Path) -> bytes:
    """An image file as 256 x 256 x 3 bytes, resized bilinearly with antialiasing."""
    try:
        with Image.open(path) as image:
            return image.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BILINEAR).tobytes()
    except Exception as error:                              # on damaged bytes decoders raise anything
        reason = ' '.join(str(error).split())
        raise UserError(f"{path} cannot be decoded ({reason}). Fetch it again.") from None


if __name__ == '__main__':
    run_program(main)
