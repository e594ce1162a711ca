"""Data sets: the table, the flags, the split into parts, and the batches.

B images, C channels, *S = (H, W) pixels or (D, H, W) voxels; label 0 normal, 1 anomalous. Models train on
the normal images of the part `train`, choose thresholds on the normal images of `val`, and are judged on
`test`, normal and anomalous.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from distributions import Pixels
from readers.images.archive import unpacked
from readers.images.folder import FITS, read_folder
from readers.images.new_files import Preparation
from readers.lmdb.packed import is_packed, read_packed
from readers.lmdb.packed_volumes import read_packed_volumes
from readers.parts import Batch, Part
from readers.phantoms.brain import write_brain_phantoms
from readers.phantoms.chest import write_phantoms
from readers.published.cifar10 import read_cifar10
from readers.published.layouts import Layout, read_records
from readers.published.mnist import read_mnist, read_stacked_mnist
from readers.published.omniglot import read_omniglot
from readers.published.part_folders import read_part_folders
from readers.published.records import Decoding, Records
from readers.published.smallnorb import read_smallnorb
from readers.published.svhn import read_svhn
from readers.source import Entry, Source
from readers.split import (
    PARTS,
    count,
    count_table,
    find_duplicates,
    part_counts,
    some,
    split_by_name,
    split_given,
    split_parts,
    split_records,
    stored_parts,
    warnings,
    with_patients,
)
from readers.volumes.new_volumes import NewVolumes
from readers.volumes.volumes import VolumeConfig, VolumePreparation, check_volumes, read_volumes
from utils import UserError, flag, mix_seed

# ------------------------------------------------------------------------------------------------------ table

@dataclass(frozen=True)
class DataSet:
    """One row of DATASETS: what is true of a data set whatever the run."""
    read: Callable[['DataConfig', 'DataSet'], Source]
    size: int                                # along each of *S, as the model sees it, padding included
    dims: int = 2                            # of *S; 3 = volumes, which may have size 0: as large as they are
    channels: int = 1
    modalities: tuple[str, ...] = ()         # of volumes: names of the channels
    labels: str = ''                         # of volumes: name of the masks of lesions
    bits: int = 16                           # most bits a grey level can have
    likelihood: str = 'discretized'          # or 'bernoulli'
    padding: int = 0                         # border of zeros that belongs to `size`, not to the image
    normal: tuple[str, ...] = ()             # names a normal class may have; () = all that is not anomalous
    folder: Callable[['DataConfig'], str] | None = None      # its class folders; None = it is not in such
    masks: bool = False                      # a folder `masks` marks anomalies
    val_fraction: float = 0.15               # of the normal images that are not in a given test part
    test_fraction: float = 0.2
    split: Callable[[Sequence[Entry], float, float, int], dict[str, str]] = split_parts   # who goes where
    val_always: bool = True                  # False: a validation part only where there are anomalies to find
    flip: bool = False                       # trained on mirror images too
    num_train: int = 0                       # training images of the published set; 0 = any number
    parts: tuple[str, ...] = ('train', 'test')               # of a set with parts of its own: those to read
    layout: Layout | None = None             # of a set that is read as it is trained on
    where: str = ''                          # for errors: the layout, and where the data comes from


def _read_folder(config: 'DataConfig', row: DataSet) -> Source:
    return read_folder(row.folder(config), normal=row.normal, normal_wanted=config.normal_classes,
                       anomalous=config.anomalous_classes, size=config.image_size or row.size,
                       channels=config.channels or row.channels, depth=config.depth, fit=config.fit,
                       masks=row.masks, cache_dir=config.cache_dir, where=row.where)


def _read_volumes(config: 'DataConfig', row: DataSet) -> Source:
    return read_volumes(row.folder(config), config, modalities=config.modalities or row.modalities,
                        labels=config.labels or row.labels, normal=row.normal,
                        normal_wanted=config.normal_classes, anomalous=config.anomalous_classes,
                        side=config.image_size or row.size, depth=config.depth, cache_dir=config.cache_dir,
                        where=row.where)


def _data_folder(config: 'DataConfig') -> str:
    is_file = config.data and Path(config.data).is_file()
    return str(unpacked(config.data, config.cache_dir)) if is_file else config.data


def _phantom_folder(config: 'DataConfig') -> str:
    return str(write_phantoms(config.data or 'data/phantom', config.num_phantoms or 1200))


def _brain_phantom_folder(config: 'DataConfig') -> str:
    return str(write_brain_phantoms(config.data or 'data/brain_phantom', config.num_phantoms or 120))


def _read_arrays(read: Callable[..., Source], config: 'DataConfig', row: DataSet) -> Source:
    return read(config.data, parts=row.parts, normal=config.normal_classes,
                anomalous=config.anomalous_classes, size=config.image_size or row.size,
                channels=config.channels or row.channels, padding=_padding(config, row),
                cache_dir=config.cache_dir, where=row.where)


def _read_records(config: 'DataConfig', row: DataSet) -> Source:
    return read_records(config.data, row.layout, size=config.image_size or row.size,
                        channels=config.channels or row.channels, num_train=row.num_train,
                        normal=config.normal_classes, anomalous=config.anomalous_classes,
                        cache_dir=config.cache_dir, where=row.where)


def _read_packed(config: 'DataConfig', row: DataSet) -> Source:
    """Any row from an LMDB that scripts/create_lmdb.py made."""
    if row.dims == 3:
        return read_packed_volumes(config.data, config, image_size=config.image_size, normal=row.normal,
                                   normal_wanted=config.normal_classes, anomalous=config.anomalous_classes,
                                   depth=config.depth, cache_dir=config.cache_dir)
    border = _padding(config, row)
    return read_packed(config.data, normal=row.normal, normal_wanted=config.normal_classes,
                       anomalous=config.anomalous_classes, size=(config.image_size or row.size) - 2 * border,
                       border=border, channels=config.channels or row.channels, depth=config.depth,
                       fit=config.fit, masks=row.masks, cache_dir=config.cache_dir)


# Published 8-bit sets whose test part is given; validation during training watches it, as published.
PUBLISHED = {'bits': 8, 'val_fraction': 0.1, 'test_fraction': 0, 'val_always': False}
# Binary pictures of 28 x 28 in a frame of 2, which --image_size 28 takes off.
BINARY = PUBLISHED | {'size': 32, 'likelihood': 'bernoulli', 'padding': 2}
# Photographs: large, in colour, read as they are trained on, and mirrored.
PHOTOGRAPHS = PUBLISHED | {'read': _read_records, 'channels': 3, 'flip': True}
LSUN = Decoding(encoded=True, crop=True)
LSUN_WHERE = ('Expected the LMDBs {0}_train_lmdb and {0}_val_lmdb, unpacked as github.com/fyu/lsun gives '
              'them.')
LSUN_CHURCH = Layout(LSUN, 'church', 'church_outdoor_train_lmdb', 'church_outdoor_val_lmdb', listed=True)

DATASETS = {
    'mnist': DataSet(
        partial(_read_arrays, read_mnist), num_train=60_000,
        where='Get it with torchvision.datasets.MNIST(FOLDER, download=True), then --data FOLDER.',
        **BINARY),
    'fashion_mnist': DataSet(
        partial(_read_arrays, partial(read_mnist, name='FashionMNIST')), num_train=60_000,
        where='Get it with torchvision.datasets.FashionMNIST(FOLDER, download=True), then --data FOLDER.',
        **BINARY),
    'kmnist': DataSet(
        partial(_read_arrays, partial(read_mnist, name='KMNIST')), num_train=60_000,
        where='Get it with torchvision.datasets.KMNIST(FOLDER, download=True), then --data FOLDER.',
        **BINARY),
    'notmnist': DataSet(
        partial(_read_arrays, partial(read_part_folders, name='notMNIST', folders={
            'train': 'notMNIST_large', 'test': 'notMNIST_small'})), num_train=529_114,
        where='Expected the folders notMNIST_large and notMNIST_small, A to J in each, as their archives '
              'unpack (yaroslavvb.blogspot.com, notMNIST dataset).', **BINARY),
    'stacked_mnist': DataSet(
        partial(_read_arrays, read_stacked_mnist), size=32, channels=3, padding=2, num_train=120_000,
        where='It is made from MNIST: torchvision.datasets.MNIST(FOLDER, download=True), then --data FOLDER.',
        **PUBLISHED),
    'omniglot': DataSet(
        partial(_read_arrays, read_omniglot), num_train=24_345,
        where='Expected chardata.mat of github.com/yburda/iwae (datasets/OMNIGLOT).', **BINARY),
    'omniglot_py': DataSet(
        partial(_read_arrays, partial(read_part_folders, name='Omniglot', folders={
            'train': 'omniglot-py/images_background', 'test': 'omniglot-py/images_evaluation'})),
        size=28, num_train=19_280,
        where='Get it with torchvision.datasets.Omniglot(FOLDER, background, download=True) for background '
              'True and False, then --data FOLDER.', **PUBLISHED),
    'cifar10': DataSet(
        partial(_read_arrays, read_cifar10), size=32, channels=3, flip=True, num_train=50_000,
        where='Get it with torchvision.datasets.CIFAR10(FOLDER, download=True), then --data FOLDER.',
        **PUBLISHED),
    'svhn': DataSet(
        partial(_read_arrays, read_svhn), size=32, channels=3, num_train=73_257,
        where='Get it with torchvision.datasets.SVHN(FOLDER, split, download=True) for the splits train and '
              'test, then --data FOLDER.', **PUBLISHED),
    'smallnorb': DataSet(
        partial(_read_arrays, read_smallnorb), size=96, num_train=24_300,
        where='Expected the files of cs.nyu.edu/~ylclab/data/norb-v1.0-small.', **PUBLISHED),
    'celeba_64': DataSet(
        size=64, num_train=162_770,
        layout=Layout(Decoding(encoded=True, box=(15, 40, 163, 188)), 'face', celeba=True),
        where='Expected train.lmdb and validation.lmdb, made by scripts/create_celeba64_lmdb.py, or '
              'celeba/img_align_celeba and celeba/list_eval_partition.txt, as torchvision.datasets.CelebA '
              'leaves them.', **PHOTOGRAPHS),
    'celeba_256': DataSet(
        size=256, num_train=27_000, layout=Layout(class_name='face'),
        where='Expected train.lmdb and validation.lmdb: scripts/convert_tfrecord_to_lmdb.py --dataset celeba '
              'makes them of the CelebA-HQ TFRecords of github.com/openai/glow.', **PHOTOGRAPHS),
    'imagenet_32': DataSet(
        size=32, num_train=1_281_147, layout=Layout(),
        where='Expected train.lmdb and validation.lmdb: scripts/convert_tfrecord_to_lmdb.py --dataset '
              'imagenet-oord_32 makes them of the ImageNet TFRecords of github.com/openai/glow.',
        **PHOTOGRAPHS),
    'ffhq': DataSet(
        size=256, num_train=63_000, layout=Layout(class_name='face'),
        where='Expected train.lmdb and validation.lmdb: scripts/create_ffhq_lmdb.py makes them of the images '
              'of github.com/NVlabs/ffhq-dataset.', **PHOTOGRAPHS),
    'lsun_bedroom_128': DataSet(
        size=128, num_train=3_033_042,
        layout=Layout(LSUN, 'bedroom', 'bedroom_train_lmdb', 'bedroom_val_lmdb', listed=True),
        where=LSUN_WHERE.format('bedroom'), **PHOTOGRAPHS),
    'lsun_church_64': DataSet(
        size=64, num_train=126_227, layout=LSUN_CHURCH, where=LSUN_WHERE.format('church_outdoor'),
        **PHOTOGRAPHS),
    'lsun_church_128': DataSet(
        size=128, num_train=126_227, layout=LSUN_CHURCH, where=LSUN_WHERE.format('church_outdoor'),
        **PHOTOGRAPHS),
    'covid': DataSet(
        _read_folder, size=64, normal=('Normal',), folder=_data_folder,
        where='Expected Normal/images/*.png and beside it COVID, Lung_Opacity or "Viral Pneumonia", as in '
              'the COVID-19 Radiography Database '
              '(kaggle.com/datasets/tawsifurrahman/covid19-radiography-database).'),
    'mednist': DataSet(
        _read_folder, size=64, normal=('Hand',), folder=_data_folder, split=split_by_name, val_fraction=0.1,
        test_fraction=0.1,
        where='Expected MedNIST.tar.gz (github.com/Project-MONAI/MONAI-extra-test-data, release 0.8.1), or '
              'its folder: Hand/*.jpeg and beside it AbdomenCT, BreastMRI, CXR, ChestCT and HeadCT.'),
    'folder': DataSet(
        _read_folder, size=64, normal=('normal', 'good'), masks=True, folder=_data_folder,
        where='Expected a folder "normal" (or "good") and beside it one folder for each kind of anomaly.'),
    'phantom': DataSet(
        _read_folder, size=64, normal=('Normal',), masks=True, folder=_phantom_folder,
        where='Synthetic: it is made at the first run.'),
    'brain': DataSet(
        _read_volumes, size=0, dims=3, normal=('normal', 'healthy', 'control'), labels='label',
        folder=_data_folder, split=split_given,
        where='Expected NIfTI files, one a subject, or with --modalities t1 flair the folders t1 and flair, '
              'or files that end in _t1 and _flair; perhaps in class folders, one of them "normal".'),
    'brain_phantom': DataSet(
        _read_volumes, size=64, dims=3, channels=2, modalities=('t1', 'flair'), labels='lesions',
        normal=('normal',), folder=_brain_phantom_folder, split=split_given,
        where='Synthetic: it is made at the first run.'),
}


@dataclass(frozen=True)
class DataConfig(VolumeConfig):
    """Data: which images, at what size, in what parts"""
    dataset: str = flag('mnist', 'data set', choices=tuple(DATASETS))
    data: str = flag('', 'data folder, a tar of class folders, or an LMDB of scripts/create_lmdb.py '
                         '(phantoms: where to make them, default data/NAME)')
    image_size: int = flag(0, "height and width in pixels, of volumes all three; 0 = the data set's own")
    channels: int = flag(0, "1 grey, 3 colour; 0 = the data set's own; of volumes see --modalities",
                         choices=(0, 1, 3))
    num_x_bits: int = flag(8, 'bits per pixel, 1 to 16; above 8 keeps the depth of 16-bit files')
    fit: str = flag('pad', 'an image that is not square gets black borders, loses its ends, or is squeezed',
                    choices=FITS)
    normal_classes: tuple = flag((), "class names to train on; none given = the data set's own",
                                 aliases=('normal_class',))
    anomalous_classes: tuple = flag((), 'class names to detect; none given = all others (mnist: none)')
    val_fraction: float = flag(-1.0, "fraction of the normal images for validation; -1 = the data set's own")
    test_fraction: float = flag(-1.0, "fraction of the normal images for testing; -1 = the data set's own")
    split_seed: int = flag(0, 'which random split')
    flip: str = flag('auto', "train on mirror images too, each image at random; auto = as the data set's own "
                             "published runs", choices=('auto', 'on', 'off'))
    patient_pattern: str = flag('', "regular expression on the file name, group 1 = patient; '' = unknown")
    patient_metadata: str = flag('', "CSV file, as FILE:FILE_NAME_COLUMN:PATIENT_COLUMN; '' = unknown")
    skip_corrupt: bool = flag(False, 'leave out files that cannot be read, and report each; else stop')
    likelihood: str = flag('auto', "grey levels, or binary: a grey value is the chance of white; auto = the "
                                   "data set's own", choices=('auto', 'discretized', 'bernoulli'))
    binarize: str = flag('dynamic', 'binary and dequantized data: draw each pixel anew every epoch, or once '
                                    'for ever',
                         choices=('dynamic', 'static'))
    dequantize: bool = flag(False, 'grey levels: add noise, (level + u) / levels with u uniform in [0, 1)')
    invert: bool = flag(False, 'light for dark: 1 - x, before it is made binary or dequantized')
    num_phantoms: int = flag(0, 'phantoms: normal ones to make, a quarter as many abnormal ones; 0 = 1200 '
                                'images or 120 volumes')
    num_workers: int = flag(0, 'processes that prepare batches; 0 = none besides the program')
    cache_dir: str = flag('', "folder for decoded images; '' = a folder in $XDG_CACHE_HOME or ~/.cache")

    @property
    def depth(self) -> int:
        """Bits at which decoded images are kept; --num_x_bits takes its grey levels from these."""
        return 16 if self.num_x_bits > 8 else 8


def _padding(config: DataConfig, row: DataSet) -> int:
    """Border around the images at the wanted size; a row with padding keeps its images unscaled."""
    size, own = config.image_size or row.size, row.size - 2 * row.padding
    if row.padding and (size < own or (size - own) % 2):
        raise UserError(f"--image_size {size}: {config.dataset} images are {own} x {own} with an equal "
                        f"border around: give 0, {own} or a larger even number.")
    return (size - own) // 2 if row.padding else 0


def _pixels(config: DataConfig, row: DataSet) -> Pixels:
    """What a model must know of the pixels."""
    likelihood = row.likelihood if config.likelihood == 'auto' else config.likelihood
    return Pixels(likelihood, 1 if likelihood == 'bernoulli' else config.num_x_bits, _padding(config, row))


def volume_flags(config: DataConfig) -> dict[str, Any]:
    """The flags that say how volumes are prepared."""
    return {f.name: getattr(config, f.name) for f in fields(VolumeConfig)}


def flags_from_json(flags: dict[str, Any]) -> dict[str, Any]:
    """The same with tuples, as flags have them, for the lists that JSON makes of these."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}


def preparation(config: DataConfig, shape: Sequence[int], pixels: Pixels,
                spacing: Sequence[float] = ()) -> Preparation | NewVolumes:
    """What the run with these flags, and a model of this shape and these pixels, does to an image file, or to
    the files of a subject; `spacing` is that of the run's volumes in mm, which flags need not say.
    """
    row = DATASETS[config.dataset]
    if row.dims == 2:
        return Preparation(tuple(shape), pixels, config.depth, config.fit, config.dequantize, config.invert)
    names = config.modalities or row.modalities
    prepared = replace(VolumePreparation.of(config, names, config.depth), usual=tuple(spacing))
    return NewVolumes(tuple(shape), pixels, prepared, tuple(names), config.labels or row.labels,
                      config.dequantize, config.invert)


def check(config: DataConfig, row: DataSet) -> None:
    """Raises UserError for flags that make no sense on their own or for this data set."""
    if not 1 <= config.num_x_bits <= row.bits:
        raise UserError(f"--num_x_bits {config.num_x_bits}: {config.dataset} has 1 to {row.bits}.")
    if config.image_size < 0:
        raise UserError(f"--image_size {config.image_size}: expected pixels, or 0 for the data set's own "
                        f"{row.size}.")
    if config.num_phantoms < 0:
        raise UserError(f"--num_phantoms {config.num_phantoms}: expected 1 or more, or 0 for the data set's "
                        f"own.")
    # A flag that would do nothing is a mistake: those of volumes for images, and the other way round.
    foreign = ('channels', 'fit') if row.dims == 3 else [f.name for f in fields(VolumeConfig)]
    for name in foreign:
        if getattr(config, name) != getattr(DataConfig, name):
            raise UserError(f"--{name}: {config.dataset} has {'volumes' if row.dims == 3 else 'images'}, of "
                            f"which it says nothing. Leave it out.")
    if row.dims == 3:
        check_volumes(config, config.image_size)
    if row.likelihood == 'bernoulli' and config.channels not in (0, row.channels):
        raise UserError(f"--channels {config.channels}: the binary images of {config.dataset} have "
                        f"{row.channels}.")
    if config.dequantize and _pixels(config, row).likelihood == 'bernoulli':
        raise UserError(f"--dequantize: the pixels of {config.dataset} are binary here, without grey levels: "
                        f"add --likelihood discretized, or leave it out.")
    val, test = _fractions(config, row)
    for name, value in {'val_fraction': val, 'test_fraction': test}.items():
        if not 0 <= value < 1:
            raise UserError(f"--{name} {value}: expected 0 to 1, or -1 for the data set's own.")
    if val + test >= 1:
        raise UserError(f"--val_fraction {val} and --test_fraction {test} leave nothing to train on: "
                        f"their sum must be below 1.")


def _fractions(config: DataConfig, row: DataSet) -> tuple[float, float]:
    val = config.val_fraction
    if val == -1:
        val = row.val_fraction if row.val_always or config.anomalous_classes else 0.0
    return val, row.test_fraction if config.test_fraction == -1 else config.test_fraction


# ------------------------------------------------------------------------------------------------------- load

@dataclass(frozen=True)
class Data:
    """A data set, ready: `split` is JSON for split.json, `report` lines for the user."""
    train: Part
    val: Part
    test: Part
    shape: tuple[int, ...]                   # (C, *S)
    pixels: Pixels
    normal_classes: tuple[str, ...]
    anomalous_classes: tuple[str, ...]
    split: dict[str, Any]
    report: list[str]
    config: DataConfig


def load_data(config: DataConfig, split: dict[str, Any] | None = None) -> Data:
    """Reads and splits the data set that `config` names.

    Given the `split` that a run stored, the same files go to the same parts. Anomalous classes that it does
    not know join `test`; other new files are left out. Raises UserError for files that are unreadable,
    missing or changed.
    """
    if config.dataset not in DATASETS:
        raise UserError(f"--dataset {config.dataset!r} is unknown: choose one of {', '.join(DATASETS)}.")
    row = DATASETS[config.dataset]
    check(config, row)
    if split and not config.normal_classes:
        config = replace(config, normal_classes=tuple(split['normal_classes']))
    source = (_read_packed if is_packed(config.data) else row.read)(config, row)
    report = list(source.notes) + left_out(source, config.skip_corrupt)
    are_records = isinstance(source.entries, Records)
    if split and are_records != ('records' in split):
        raise UserError(f"{config.data} is kept in another form than the data that the run's split.json "
                        f"knows: give the data of the run, or train anew.")
    entries, stored = (_part_records if are_records else _part_files)(config, row, source, split, report)
    if not len(entries['train']):
        raise UserError(f"{count(sum(map(len, entries.values())), 'image')} leave none to train on: add "
                        f"normal images, or lower --val_fraction and --test_fraction.")
    config = replace(config, **flags_from_json(source.flags))
    pixels = _pixels(config, row)
    flip = {'auto': row.flip, 'on': True, 'off': False}[config.flip]
    made = {part: Part(entries[part], source, pixels, config.depth, static=config.binarize == 'static',
                       flip=flip, dequantize=config.dequantize, invert=config.invert, augment=config.augment)
            for part in PARTS}
    stored = {'dataset': config.dataset, 'split_seed': config.split_seed,
              'normal_classes': list(source.normal_classes),
              'anomalous_classes': list(source.anomalous_classes), **stored}
    return Data(**made, shape=tuple(source.pixels.shape[1:]), pixels=pixels,
                normal_classes=source.normal_classes, anomalous_classes=source.anomalous_classes,
                split=stored, report=report, config=config)


def left_out(source: Source, skip_corrupt: bool) -> list[str]:
    """A line for each unreadable file. Raises UserError if there is one and none may be left out."""
    lines = [f'{name} {reason}' for name, reason in source.bad]
    if lines and not skip_corrupt:
        total = len(lines) + len(source.entries)
        raise UserError(f"{count(len(lines), 'file')} of {total} cannot be used: {some(lines)}. Replace "
                        f"or remove them, or pass --skip_corrupt to leave them out.")
    return [f'left out: {line}' for line in lines]


def _part_files(config: DataConfig, row: DataSet, source: Source, split: dict[str, Any] | None,
                report: list[str]) -> tuple[dict[str, list[Entry]], dict[str, Any]]:
    """The entries of each part, and what split.json keeps of them: each file."""
    entries = [replace(e, label=int(e.class_name in source.anomalous_classes)) for e in source.entries]
    entries = with_patients(entries, config.patient_metadata, config.patient_pattern, report)
    if split:
        parts = stored_parts(entries, split, report)
    else:
        parts = row.split(entries, *_fractions(config, row), config.split_seed)
        if left := len(entries) - len(parts):
            report.append(f"left out: {count(left, 'anomalous image')} that --split_seed did not draw")
    entries = [e for e in entries if e.id in parts]
    duplicates = find_duplicates(entries, source.twins, parts)
    report += part_counts(entries, parts) + warnings(entries, parts, duplicates)
    files = [{'id': e.id, 'class': e.class_name, 'part': parts[e.id], 'sha256': e.sha256}
             | ({'patient': e.patient} if e.patient else {}) for e in entries]
    made = {part: [e for e in entries if parts[e.id] == part] for part in PARTS}
    return made, {'duplicates': duplicates, 'files': files}


def _part_records(config: DataConfig, row: DataSet, source: Source, split: dict[str, Any] | None,
                  report: list[str]) -> tuple[dict[str, Records], dict[str, Any]]:
    """The entries of each part, and what split.json keeps of them: their numbers and the seed, from which the
    parts follow. A million lines would be read in every command and by nobody.
    """
    if config.patient_metadata or config.patient_pattern:
        raise UserError(f"--patient_metadata and --patient_pattern: nothing is known of the patients of "
                        f"{config.dataset}. Leave them out.")
    seed = split['split_seed'] if split else config.split_seed
    counted = split['records'] if split else None
    chosen = split_records(source.entries, *_fractions(config, row), seed, counted)
    made = {part: source.entries.at(indices) for part, indices in chosen.items()}
    counts = {part: len(entries) for part, entries in made.items()}
    name = source.entries.class_name
    report += count_table({(name, part): number for part, number in counts.items()}, {name: 0})
    return made, {'split_seed': seed, 'duplicates': [], 'records': counts}


# -------------------------------------------------------------------------------------------------- stand-in

class _Noise:
    """Grey levels drawn at random where images would be: `pixels[rows]` is (B, *shape) uint8 or uint16."""

    def __init__(self, shape: tuple[int, ...], depth: int):
        self.shape, self.type = (1, *shape), {8: np.uint8, 16: np.uint16}[depth]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        shape = (len(rows), *self.shape[1:])
        return np.random.default_rng(0).integers(np.iinfo(self.type).max, size=shape, dtype=self.type)


def stand_in(config: DataConfig, number: int) -> Data:
    """`number` training images of the shape and pixels that `config` asks for, of noise: nothing is read."""
    row = DATASETS[config.dataset]
    check(config, row)
    shape = (config.channels or len(config.modalities) or row.channels,
             *(config.volume_shape or (config.image_size or row.size,) * row.dims))
    if not all(shape):
        raise UserError(f"--dry_run: how large the volumes of {config.dataset} are follows from them: add "
                        f"--data, or --volume_shape.")
    entries = [Entry(f'noise/{i}', '', 'noise', '', 0, i) for i in range(number)]
    source = Source(entries, _Noise(shape, config.depth), None, ('noise',), ())
    pixels = _pixels(config, row)
    parts = {part: Part(entries if part == 'train' else [], source, pixels, config.depth) for part in PARTS}
    return Data(**parts, shape=shape, pixels=pixels, normal_classes=('noise',), anomalous_classes=(),
                split={}, report=[], config=config)


# ---------------------------------------------------------------------------------------------------- batches

def steps_per_epoch(part: Part, batch_size: int, world: int = 1) -> int:
    """Joint batches, of batch_size images on each of `world` ranks, in an epoch; it drops what is left over.

    Raises UserError if there is not one.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: expected 1 or more.")
    if len(part) < batch_size * world:
        fits = len(part) // world
        todo = f'--batch_size that fits is {fits}' if fits else f'number of processes is {len(part)}'
        raise UserError(f"{count(len(part), 'image')} cannot fill a batch of {batch_size} on each of "
                        f"{world} process{'es' if world > 1 else ''}: the largest {todo}.")
    return len(part) // (batch_size * world)


def train_batches(part: Part, batch_size: int, *, seed: int, rank: int = 0, world: int = 1,
                  accumulate: int = 1, first_step: int = 0, workers: int = 0) -> Iterator[Batch]:
    """Shuffled batches for ever, `accumulate` of them a step, from step `first_step` on.

    A batch depends on (seed, step, rank, world) alone, so a run resumes at any step. The batches of all
    ranks, one after the other, are the batch of one process with batch_size * world; and `accumulate` of
    them on one rank are those of as many ranks.
    """
    joint = batch_size * world * accumulate
    steps = steps_per_epoch(part, batch_size, world * accumulate)
    mine = slice(rank * accumulate, (rank + 1) * accumulate)

    def keys() -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(first_step, steps)
        while True:
            generator = torch.Generator().manual_seed(mix_seed(seed, 'order', epoch))
            order = torch.randperm(len(part), generator=generator)[:steps * joint]
            order = order.view(steps, world * accumulate, batch_size)
            draw = mix_seed(seed, 'draw', epoch)
            for indices in order[first:, mine].flatten(0, 1).numpy():    # one list of all would be 0.1 GB
                yield [(draw, index) for index in indices.tolist()]
            epoch, first = epoch + 1, 0

    return _load(part, keys, workers)


def eval_batches(part: Part, batch_size: int, *, rank: int = 0, world: int = 1,
                 workers: int = 0, only: Collection[int] | None = None) -> Iterator[tuple[int, Batch]]:
    """(number, batch): the images in order, batch i for rank i % world, each image once; the last short.

    `only` names the batches that are wanted; None = all.
    """
    numbers = [i for i in range(rank, -(-len(part) // batch_size), world) if only is None or i in only]

    def keys() -> Iterator[list[tuple[int, int]]]:
        for i in numbers:
            yield [(0, index) for index in range(i * batch_size, min((i + 1) * batch_size, len(part)))]

    return zip(numbers, _load(part, keys, workers), strict=True)


class _Keys:
    """A batch sampler from a function that makes an iterator."""

    def __init__(self, make: Callable[[], Iterator[list[tuple[int, int]]]]):
        self.make = make

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.make()


class _Telling(Dataset):
    """A part for other processes: it returns a UserError, which they would wrap into many lines if raised."""

    def __init__(self, part: Part):
        self.part = part

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch | UserError:
        try:
            return self.part.__getitems__(keys)
        except UserError as error:
            return error


def _as_is(batch: Batch | UserError) -> Batch | UserError:
    return batch


def _or_raise(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _load(part: Part, keys: Callable[[], Iterator[list[tuple[int, int]]]], workers: int) -> Iterator[Batch]:
    if workers == 0:
        return map(part.__getitems__, keys())
    loader = DataLoader(_Telling(part), batch_sampler=_Keys(keys), num_workers=workers, collate_fn=_as_is)
    return map(_or_raise, loader)
