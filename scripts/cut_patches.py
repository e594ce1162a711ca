"""Cuts NIfTI volumes into patches, a data set of their own: training on healthy-looking tissue of people who
all have lesions.

    python scripts/cut_patches.py --data DATA --modalities flair --labels lesions --volume_mask brain \\
        --spacing 3 --size 16 --out patches
    python train.py --dataset brain --data patches --modalities flair --labels lesions \\
        --window 0 255 --volume_shape 16 16 16 ...

Leaves <out>/normal/<modality>/PERSON_X_Y_Z.nii.gz, patches that no labeled lesion reaches into;
<out>/lesion/<modality>/..., patches with labeled voxels, and <out>/lesion/<labels>/... beside them; and
train_keys.txt, val_keys.txt and test_keys.txt, which put all patches of a person into one part. People who
are trained on leave their lesions out. See docs/data.md, section Patches.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to be run from any folder

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import product
from typing import TypeVar

import numpy as np

from command_line.parser import parse_flags
from datasets import DATASETS, DataConfig
from readers.items import Item
from readers.parallel import attempt
from readers.paths import Passed, passed_line
from readers.source import Entry, is_among
from readers.split import LEFT_OUT, PARTS, count, left_out, noted, split_given, with_patients
from readers.volumes.nifti import Grid, resample, write_nifti
from readers.volumes.subjects import KEYS, NORMAL, find_subjects, with_classes, with_keys
from readers.volumes.volumes import LESION, MOST_THREADS, VolumeLoader, expect_one_spacing
from utils import UserError, flag, flags, read_flags, run_program, write_atomically

ROW = DATASETS['brain']
DEPTH = 8                          # bits of a voxel: 0 and 255 are the ends of --percentiles or --window
DATA_FLAGS = ('data', 'modalities', 'labels', 'volume_mask', 'crop', 'spacing', 'percentiles', 'window',
              'key_files', 'patient_pattern', 'split_seed', 'skip_corrupt')
T = TypeVar('T')
FEW, NEAR = 'with too little of the body', 'beside a lesion'


@flags
class PatchConfig(DataConfig):
    """Patches"""
    out: str = flag('', 'folder to make', basic=True)
    size: int = flag(32, 'voxels of a patch along each axis', least=1, basic=True)
    stride: int = flag(0, 'voxels between neighboring patches along each axis; 0 = --size, side by side',
                       least=0, basic=True)
    least_body: float = flag(0.5, 'smallest fraction of --volume_mask in a patch', least=0, most=1,
                             basic=True)
    val_fraction: float = flag(0.15, 'fraction of the people for validation: their normal patches', least=0,
                               below=1, basic=True)
    test_fraction: float = flag(0.2, 'fraction of the people for testing: all their patches', least=0,
                                below=1, basic=True)


def find_people(config: PatchConfig, labels: str, notes: list[str]) -> tuple[list[Item], dict[str, str]]:
    """The subjects of which it is known where they are ill, and the part of each. Raises UserError."""
    root = Path(config.data)
    if not config.data or not root.is_dir():
        raise UserError(f"--data: the folder {config.data!r} does not exist. {ROW.where}")
    passed: Passed = {}
    found, bad = find_subjects(root, config, config.modalities, labels, passed)
    notes += passed_line(passed) + left_out(bad, len(found), config.skip_corrupt, 'subject')
    subjects = with_keys(with_classes(found, ROW.normal, ROW.where), config, root, notes)
    if not any(s.masks for s in subjects):
        raise UserError(f"--labels {labels}: no subject in {root} has a file of it.")
    ill = lambda s: not is_among(s.class_name, ROW.normal)
    lost = [s.id for s in subjects if ill(s) and not s.masks]
    notes += noted(lost, 'subject', f'of a class that is not normal, without a file of {labels}', LEFT_OUT)
    subjects = [s for s in subjects if s.masks or not ill(s)]
    unknown = [s.id for s in subjects if not s.masks]
    notes += noted(unknown, 'subject', f'without a file of {labels} count as without lesion')
    entries = [Entry(s.id, '', s.class_name, '', 0, row, part=s.part, label=int(ill(s)))
               for row, s in enumerate(subjects)]
    entries = with_patients(entries, '', config.patient_pattern, notes)
    return subjects, split_given(entries, config.val_fraction, config.test_fraction, config.split_seed)


def corners(shape: tuple[int, ...], size: int, stride: int) -> Iterator[tuple[int, ...]]:
    """The first voxels (3,) of patches in a volume; what is left over lies half before, half behind them."""
    numbers = [(n - size) // stride + 1 for n in shape]
    first = [(n - size - (k - 1) * stride) // 2 for n, k in zip(shape, numbers, strict=True)]
    return product(*(range(f, f + k * stride, stride) for f, k in zip(first, numbers, strict=True)))


def cut(subject: Item, grid: Grid, loader: VolumeLoader, config: PatchConfig,
        with_lesions: bool) -> tuple[list[str], Counter]:
    """Writes the patches of a subject on `grid`; their ids, and how many there are of each kind. Raises
    Unreadable.
    """
    size = config.size
    grid = grid.centered(np.maximum(grid.shape, size))
    volume = loader.on_grid(subject, grid)
    # Where interpolation brought a lesion into the image, be it less than half a voxel of it.
    label = loader.marked(subject.masks, loader.first(subject))
    reached = resample(label[0].astype(np.float32), label[1], grid) > 0 if label else \
        np.zeros(grid.shape, bool)
    written, kinds = [], Counter()
    for corner in corners(grid.shape, size, config.stride or size):
        box = tuple(slice(i, i + size) for i in corner)
        is_kind = {FEW: volume.body[box].mean() < config.least_body,
                   LESION: label is not None and volume.mask[0][box].any(), NEAR: reached[box].any(),
                   NORMAL: True}
        kind = next(name for name, true in is_kind.items() if true)
        kinds[kind] += 1
        if kind not in (NORMAL, LESION) or (kind == LESION and not with_lesions):
            continue
        name = '_'.join([subject.id.replace('/', '-'), *map(str, corner)])
        affine = grid.box(corner, (size,) * 3).affine
        pixels = volume.pixels[:, *box]                                          # (C, size, size, size)
        files = dict(zip(config.modalities, pixels, strict=True)) if config.modalities else \
            {'': np.moveaxis(pixels, 0, -1)}
        files |= {loader.labels: volume.mask[0][box]} if kind == LESION else {}
        for folder, values in files.items():
            write_nifti(Path(config.out, kind, folder, f'{name}.nii.gz'), values, affine)
        written.append(f'{kind}/{name}')
    return written, kinds


def make(config: PatchConfig) -> None:
    """Makes the data set, and says what is in it. Raises UserError."""
    config.check_volumes(0)
    if not config.out:
        raise UserError("--out is missing: name the folder to make.")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already: choose another name, or delete it.")
    notes: list[str] = []
    labels = config.labels or ROW.labels
    subjects, parts = find_people(config, labels, notes)
    loader = VolumeLoader(config, config.modalities, labels, DEPTH)
    grids = whatever_works(loader.outline, subjects, 'measuring volumes', config, notes)
    if grids:
        expect_one_spacing({subject.id: grid for subject, grid in grids.items()})

    def work(subject: Item) -> tuple[list[str], Counter]:
        return cut(subject, grids[subject], loader, config, parts[subject.id] == 'test')

    done = whatever_works(work, list(grids), 'cutting volumes', config, notes)
    for part in PARTS:
        names = [name for s, (written, _) in done.items() if parts[s.id] == part for name in written]
        write_atomically(out / f'{part}{KEYS}', lambda p, names=names: p.write_text('\n'.join([*names, ''])))
    report(config, done, parts, notes)


def whatever_works(work: Callable[[Item], T], subjects: list[Item], title: str, config: PatchConfig,
                   notes: list[str]) -> dict[Item, T]:
    """What `work` makes of each subject. Raises UserError for those that cannot be used, or leaves them out.
    """
    results = dict(zip(subjects, attempt(work, subjects, title, MOST_THREADS), strict=True))
    bad = [(subject.id, result) for subject, result in results.items() if isinstance(result, str)]
    notes += left_out(bad, len(results) - len(bad), config.skip_corrupt, 'subject')
    return {subject: result for subject, result in results.items() if not isinstance(result, str)}


def report(config: PatchConfig, done: dict[Item, tuple[list[str], Counter]], parts: dict[str, str],
           notes: list[str]) -> None:
    """Prints what was made."""
    for note in notes:
        print(note)
    for part in PARTS:
        people = [s for s in done if parts[s.id] == part]
        kinds = sum((done[s][1] for s in people), Counter())
        written = Counter(name.split('/')[0] for s in people for name in done[s][0])
        left = {LESION: kinds[LESION] - written[LESION], FEW: kinds[FEW], NEAR: kinds[NEAR]}
        print(f"{part}: {count(len(people), 'subject')}, patches: {written[NORMAL]} normal, "
              f"{written[LESION]} with lesion; left out: "
              + ', '.join(f'{number} {kind}' for kind, number in left.items()))
    shape = ' '.join([str(config.size)] * 3)
    flags = ''.join(f' --{name} {" ".join(value) if isinstance(value, tuple) else value}'
                    for name in ('modalities', 'labels') if (value := getattr(config, name)))
    print(f'train with: --dataset brain --data {config.out}{flags} --window 0 255 --volume_shape {shape}')


def main() -> None:
    known = {*DATA_FLAGS, *PatchConfig.__annotations__}
    make(read_flags(PatchConfig, parse_flags(sys.argv[1:], __doc__, (PatchConfig,),
                                             without={f.name for f in fields(PatchConfig)} - known)))


if __name__ == '__main__':
    run_program(main)
