"""Data sets: the table, the data flags, the split into parts.

B images, C channels, *S = (H, W) pixels or (D, H, W) voxels; label 0 normal, 1 anomalous. Models train on
the normal images of the part `train`, thresholds come from the normal images of `val`, and `test` has normal
and anomalous images. Readers, PyTorch and Pillow are imported when data are read: --help does without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from readers.config import (
    ClassConfig,
    ColorConfig,
    ConfoundConfig,
    DataSet,
    FileConfig,
    FitConfig,
    FrameConfig,
    PatientConfig,
    PhantomConfig,
    PixelConfig,
    ReaderConfig,
    TableConfig,
    VolumeConfig,
    data_folder,
    phantom_folder,
)
from readers.split import (
    PARTS,
    as_asked,
    count,
    count_table,
    find_duplicates,
    left_out,
    nothing_to_train_on,
    part_counts,
    split_by_name,
    split_given,
    split_records,
    stored_parts,
    warnings,
    with_patients,
)
from utils import UserError, flag, flags, read_flags

if TYPE_CHECKING:
    from distributions import Pixels
    from readers.parts import Part, Preparation
    from readers.published.records import Records
    from readers.source import Entry, Source

# ------------------------------------------------------------------------------------------------------ table

def reader(place: str, **options: Any) -> Callable[[ReaderConfig, DataSet], Source]:
    """A reader 'module:function' of readers/ with its options, imported when a data set is read."""
    return lambda config, row: resolve_name(f'readers.{place}')(config, row, **options)


FOLDER = reader('images.folder:read_folder')
VOLUMES = reader('volumes.volumes:read_volumes')
ARRAYS = partial(reader, 'published.arrays:read_arrays')
PART_FOLDERS = partial(reader, 'images.folder:read_part_folders')
# Published 8-bit sets whose test part is given; validation during training watches it, as published.
PUBLISHED = {'bits': 8, 'val_fraction': 0.1, 'test_fraction': 0, 'val_always': False}
# Binary pictures of 28 x 28 in a frame of 2, which --image_size 28 takes off.
BINARY = PUBLISHED | {'size': 32, 'likelihood': 'bernoulli', 'padding': 2}
# Photographs: large, in color, decoded when they are used, and mirrored; all of one class.
PHOTOGRAPHS = PUBLISHED | {'channels': 3, 'flip': True, 'classes': False}
LSUN_WHERE = ('Expected the LMDBs {0}_train_lmdb and {0}_val_lmdb, unpacked as github.com/fyu/lsun gives '
              'them.')
RECORDS = 'published.layouts:read_records'
LSUN = partial(reader, RECORDS, encoded=True, crop=True, listed=True)
LSUN_CHURCH = LSUN(class_name='church', train='church_outdoor_train_lmdb', test='church_outdoor_val_lmdb')

DATASETS = {
    'mnist': DataSet(
        ARRAYS(name='MNIST'), num_train=60_000,
        where='Get it with torchvision.datasets.MNIST(FOLDER, download=True), then --data FOLDER.',
        **BINARY),
    'fashion_mnist': DataSet(
        ARRAYS(name='FashionMNIST'), num_train=60_000,
        where='Get it with torchvision.datasets.FashionMNIST(FOLDER, download=True), then --data FOLDER.',
        **BINARY),
    'kmnist': DataSet(
        ARRAYS(name='KMNIST'), num_train=60_000,
        where='Get it with torchvision.datasets.KMNIST(FOLDER, download=True), then --data FOLDER.',
        **BINARY),
    'notmnist': DataSet(
        PART_FOLDERS(folders={
            'train': 'notMNIST_large', 'test': 'notMNIST_small'}), num_train=529_114,
        where='Expected the folders notMNIST_large and notMNIST_small, A to J in each, as their archives '
              'unpack (yaroslavvb.blogspot.com, notMNIST dataset).', **BINARY),
    'stacked_mnist': DataSet(
        ARRAYS(name='StackedMNIST'), size=32, channels=3, padding=2,
        num_train=120_000,
        where='It is made from MNIST: torchvision.datasets.MNIST(FOLDER, download=True), then --data FOLDER.',
        **PUBLISHED),
    'omniglot': DataSet(
        ARRAYS(name='OMNIGLOT'), num_train=24_345,
        where='Expected chardata.mat of github.com/yburda/iwae (datasets/OMNIGLOT).', **BINARY),
    'omniglot_py': DataSet(
        PART_FOLDERS(folders={
            'train': 'omniglot-py/images_background', 'test': 'omniglot-py/images_evaluation'}),
        size=28, num_train=19_280,
        where='Get it with torchvision.datasets.Omniglot(FOLDER, background, download=True) for background '
              'True and False, then --data FOLDER.', **PUBLISHED),
    'cifar10': DataSet(
        ARRAYS(name='CIFAR-10'), size=32, channels=3, flip=True,
        num_train=50_000,
        where='Get it with torchvision.datasets.CIFAR10(FOLDER, download=True), then --data FOLDER.',
        **PUBLISHED),
    'svhn': DataSet(
        ARRAYS(name='SVHN'), size=32, channels=3, num_train=73_257,
        where='Get it with torchvision.datasets.SVHN(FOLDER, split, download=True) for the splits train and '
              'test, then --data FOLDER.', **PUBLISHED),
    'smallnorb': DataSet(
        ARRAYS(name='smallNORB'), size=96, num_train=24_300,
        where='Expected the files of cs.nyu.edu/~ylclab/data/norb-v1.0-small.', **PUBLISHED),
    'celeba_64': DataSet(
        reader(RECORDS, encoded=True, box=(15, 40, 163, 188), class_name='face', celeba=True),
        size=64, num_train=162_770,
        where='Expected train.lmdb and validation.lmdb, made by scripts/create_celeba64_lmdb.py, or '
              'celeba/img_align_celeba and celeba/list_eval_partition.txt, as torchvision.datasets.CelebA '
              'leaves them.', **PHOTOGRAPHS),
    'celeba_256': DataSet(
        reader(RECORDS, class_name='face'), size=256, num_train=27_000,
        where='Expected train.lmdb and validation.lmdb: scripts/convert_tfrecord_to_lmdb.py --dataset celeba '
              'makes them of the CelebA-HQ TFRecords of github.com/openai/glow.', **PHOTOGRAPHS),
    'imagenet_32': DataSet(
        reader(RECORDS), size=32, num_train=1_281_147,
        where='Expected train.lmdb and validation.lmdb: scripts/convert_tfrecord_to_lmdb.py --dataset '
              'imagenet-oord_32 makes them of the ImageNet TFRecords of github.com/openai/glow.',
        **PHOTOGRAPHS),
    'ffhq': DataSet(
        reader(RECORDS, class_name='face'), size=256, num_train=63_000,
        where='Expected train.lmdb and validation.lmdb: scripts/create_ffhq_lmdb.py makes them of the images '
              'of github.com/NVlabs/ffhq-dataset.', **PHOTOGRAPHS),
    'lsun_bedroom_128': DataSet(
        LSUN(class_name='bedroom', train='bedroom_train_lmdb', test='bedroom_val_lmdb'),
        size=128, num_train=3_033_042, where=LSUN_WHERE.format('bedroom'), **PHOTOGRAPHS),
    'lsun_church_64': DataSet(
        LSUN_CHURCH, size=64, num_train=126_227,
        where=LSUN_WHERE.format('church_outdoor'), **PHOTOGRAPHS),
    'lsun_church_128': DataSet(
        LSUN_CHURCH, size=128, num_train=126_227, where=LSUN_WHERE.format('church_outdoor'),
        **PHOTOGRAPHS),
    'covid': DataSet(
        FOLDER, size=64, normal=('Normal',), folder=data_folder, split=split_given,
        primary_scores={'nvae': 'latent_knn', 'dae': 'residual_mean', 'haar': 'dose'},   # see docs/results.md
        where='Expected Normal/images/*.png and beside it COVID, Lung_Opacity or "Viral Pneumonia", as in '
              'the COVID-19 Radiography Database '
              '(kaggle.com/datasets/tawsifurrahman/covid19-radiography-database).'),
    'mednist': DataSet(
        FOLDER, size=64, normal=('Hand',), folder=data_folder, split=split_by_name, val_fraction=0.1,
        test_fraction=0.1,
        where='Expected MedNIST.tar.gz (github.com/Project-MONAI/MONAI-extra-test-data, release 0.8.1), or '
              'its folder: Hand/*.jpeg and beside it AbdomenCT, BreastMRI, CXR, ChestCT and HeadCT.'),
    'folder': DataSet(
        FOLDER, size=64, normal=('normal', 'good'), masks=True, tables=True, folder=data_folder,
        split=split_given, defaults={'model': 'dae', 'epochs': 60},
        where='Expected a folder "normal" (or "good") and beside it one folder for each kind of anomaly.'),
    'phantom': DataSet(
        FOLDER, size=64, normal=('Normal',), masks=True, phantoms=1200, confounds=True,
        folder=phantom_folder('phantom', 'phantoms.chest:write_phantoms'),
        where='Synthetic: it is made at the first run.'),
    'brain': DataSet(
        VOLUMES, size=0, dims=3, normal=('normal', 'healthy', 'control'), labels='label',
        folder=data_folder, split=split_given,
        where='Expected NIfTI files, one a subject, or with --modalities t1 flair the folders t1 and flair, '
              'or files that end in _t1 and _flair; perhaps in class folders, one of them "normal".'),
    'brain_phantom': DataSet(
        VOLUMES, size=64, dims=3, channels=2, modalities=('t1', 'flair'), labels='lesions',
        normal=('normal',), phantoms=120, split=split_given,
        folder=phantom_folder('brain_phantom', 'phantoms.brain:write_brain_phantoms'),
        where='Synthetic: it is made at the first run.'),
}


@flags
class SplitConfig:
    """Data set and split"""
    dataset: str = flag('mnist', 'data set', choices=tuple(DATASETS), basic=True)
    val_fraction: float = flag(-1.0, "fraction of the normal images for validation; -1 = the data set's own",
                               least=-1, below=1)
    test_fraction: float = flag(-1.0, "fraction of the normal images for testing; -1 = the data set's own",
                                least=-1, below=1)
    split_seed: int = flag(0, 'seed of the random split')
    num_workers: int = flag(0, 'processes that prepare batches; 0 = the program itself, which is faster '
                               'for all that is in the cache; published LMDBs are not', least=0)


@flags
class DataConfig(PixelConfig, ReaderConfig, SplitConfig):
    """All data flags, as a run stores them; one data set takes those of `data_flags`."""


def data_flags(dataset: str) -> tuple[type, ...]:
    """The classes of flags that do something for a data set: those that its help page shows and it takes."""
    row = DATASETS[dataset]
    images = row.dims == 2
    useful = {
        SplitConfig: True, FileConfig: True, ClassConfig: row.classes,
        ColorConfig: images and row.likelihood != 'bernoulli', FitConfig: images and row.folder is not None,
        FrameConfig: images and row.folder is not None,
        PixelConfig: True, PatientConfig: row.folder is not None, PhantomConfig: row.phantoms > 0,
        TableConfig: row.tables,
        ConfoundConfig: row.confounds, VolumeConfig: not images,
    }
    return tuple(group for group, does_something in useful.items() if does_something)


def _likelihood(config: DataConfig, row: DataSet) -> str:
    return row.likelihood if config.likelihood == 'auto' else config.likelihood


def _pixels(config: DataConfig, row: DataSet) -> Pixels:
    """What a model must know of the pixels."""
    from distributions import Pixels
    likelihood = _likelihood(config, row)
    return Pixels(likelihood, 1 if likelihood == 'bernoulli' else config.num_x_bits, row.border(config))


def preparation(config: DataConfig, shape: Sequence[int], pixels: Pixels,
                spacing: Sequence[float] = ()) -> Preparation:
    """What the run with these flags, and a model of this shape and these pixels, does to an image file or to
    the files of a subject; `spacing` is that of the run's volumes in mm, which flags need not say.
    """
    from readers.images.decode import ImageLoader
    from readers.parts import Preparation, Transform
    from readers.volumes.volumes import VolumeLoader
    row = DATASETS[config.dataset]
    channels, *sides = shape
    if row.dims == 3:
        loader = replace(VolumeLoader.of(config, row), shape=tuple(sides), usual=tuple(spacing))
    else:
        border = pixels.padding
        loader = ImageLoader(sides[0] - 2 * border, channels, config.depth, config.fit, border, config.frames)
    return Preparation(loader, Transform(pixels, config.depth, dequantize=config.dequantize,
                                         invert=config.invert))


def check(config: DataConfig, row: DataSet) -> None:
    """Raises UserError for flags that make no sense together, or that would do nothing for this data set."""
    taken = {field.name for group in data_flags(config.dataset) for field in fields(group)}
    for field in fields(ReaderConfig):
        if field.name not in taken and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name}: it does nothing for --dataset {config.dataset}. Leave it out.")
    if config.num_x_bits > row.bits:
        raise UserError(f"--num_x_bits {config.num_x_bits}: {config.dataset} has 1 to {row.bits}.")
    if row.dims == 3:
        config.check_volumes(config.image_size)
    binary = _likelihood(config, row) == 'bernoulli'
    if config.dequantize and binary:
        raise UserError(f"--dequantize: the pixels of {config.dataset} are binary here, without gray levels: "
                        f"add --likelihood discretized, or leave it out.")
    if config.binarize != PixelConfig.binarize and not (binary or config.dequantize):
        raise UserError(f"--binarize {config.binarize} does nothing for gray levels, which are not drawn at "
                        f"random: add --likelihood bernoulli or --dequantize, or leave it out.")
    val, test = _fractions(config, row)
    for name, value in {'val_fraction': val, 'test_fraction': test}.items():
        if value < 0:
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
    not know join `test`; other new files are left out. Raises UserError for unreadable or changed files.
    """
    from readers.lmdb.packed import is_packed, read_packed
    from readers.parts import Part, Transform
    from readers.published.records import Records
    row = DATASETS[config.dataset]
    check(config, row)
    if split and not config.normal_classes:
        config = replace(config, normal_classes=tuple(split['normal_classes']))
    source = (read_packed if is_packed(config.data) else row.read)(config, row)
    file, image = ('subject', 'subject') if row.dims == 3 else ('file', 'image')
    report = list(source.notes) + left_out(source.bad, len(source.entries), config.skip_corrupt, file)
    are_records = isinstance(source.entries, Records)
    if split and are_records != ('records' in split):
        raise UserError(f"{config.data} is kept in another form than the data that the run's split.json "
                        f"knows: give the data of the run, or train anew.")
    entries, stored = (_part_records if are_records else _part_files)(config, row, source, split, report)
    if not len(entries['train']):
        raise UserError(nothing_to_train_on(entries, image))
    config = read_flags(DataConfig, vars(config) | source.flags)
    pixels = _pixels(config, row)
    flip = {'auto': row.flip, 'on': True, 'off': False}[config.flip]
    transform = Transform(pixels, config.depth, static=config.binarize == 'static', flip=flip,
                          dequantize=config.dequantize, invert=config.invert, augment=config.augment)
    made = {part: Part(entries[part], source, transform) for part in PARTS}
    given = {f.name: value for f in fields(ReaderConfig)
             if (value := getattr(config, f.name)) != f.default and f.name != 'cache_dir'}
    stored = {'dataset': config.dataset, 'split_seed': config.split_seed,
              'made_of': (split or {}).get('made_of') or {
                  'flags': given, 'unreadable': len(source.bad), 'notes': source.notes},
              'normal_classes': list(source.normal_classes),
              'anomalous_classes': list(source.anomalous_classes), **stored}
    return Data(**made, shape=tuple(source.pixels.shape[1:]), pixels=pixels,
                normal_classes=source.normal_classes, anomalous_classes=source.anomalous_classes,
                split=stored, report=report, config=config)


def _part_files(config: DataConfig, row: DataSet, source: Source, split: dict[str, Any] | None,
                report: list[str]) -> tuple[dict[str, list[Entry]], dict[str, Any]]:
    """The entries of each part, and what split.json keeps of them: each file."""
    labels = dict.fromkeys(source.anomalous_classes, 1)
    entries = [e if e.label == labels.get(e.class_name, 0) else replace(e, label=1 - e.label)
               for e in source.entries]
    ask = row.tables and not split
    entries = with_patients(entries, config.patient_metadata, config.patient_pattern, report, ask)
    if split:
        parts = stored_parts(entries, split, report)
    else:
        if row.split is split_given:
            entries = as_asked(entries, config.val_fraction, config.test_fraction)
        parts = row.split(entries, *_fractions(config, row), config.split_seed)
        if left := len(entries) - len(parts):
            report.append(f"left out: {count(left, 'anomalous image')} that --split_seed did not draw")
    entries = [e for e in entries if e.id in parts]
    duplicates = find_duplicates(entries, source.near_duplicates, parts)
    report += part_counts(entries, parts) + warnings(entries, parts, duplicates)
    files = [{'id': e.id, 'class': e.class_name, 'part': parts[e.id], 'sha256': e.sha256}
             | ({'patient': e.patient} if e.patient else {}) for e in entries]
    made = {part: [e for e in entries if parts[e.id] == part] for part in PARTS}
    return made, {'duplicates': duplicates, 'files': files}


def _part_records(config: DataConfig, row: DataSet, source: Source, split: dict[str, Any] | None,
                  report: list[str]) -> tuple[dict[str, Records], dict[str, Any]]:
    """The entries of each part, and for split.json their numbers and the seed, from which parts follow."""
    seed = split['split_seed'] if split else config.split_seed
    counted = split['records'] if split else None
    chosen = split_records(source.entries, *_fractions(config, row), seed, counted)
    made = {part: source.entries.at(indices) for part, indices in chosen.items()}
    counts = {part: len(entries) for part, entries in made.items()}
    name = source.entries.class_name
    report += count_table({(name, part): number for part, number in counts.items()}, {name: 0})
    return made, {'split_seed': seed, 'duplicates': [], 'records': counts}


# -------------------------------------------------------------------------------------------------- stand-in

def stand_in(config: DataConfig, number: int) -> Data:
    """`number` training images of the shape and pixels that `config` asks for, of noise: nothing is read."""
    import numpy as np

    from readers.parts import Part, Transform
    from readers.source import DTYPES, Entry, Source
    row = DATASETS[config.dataset]
    check(config, row)
    shape = (config.channels or len(config.modalities) or row.channels,
             *(config.volume_shape or (config.image_size or row.size,) * row.dims))
    if not all(shape):
        raise UserError(f"--dry_run: how large the volumes of {config.dataset} are follows from them: add "
                        f"--data, or --volume_shape.")
    entries = [Entry(f'noise/{i}', '', 'noise', '', 0, i) for i in range(number)]
    noise = np.random.default_rng(0).integers(2 ** config.depth, size=(number, *shape),
                                              dtype=DTYPES[config.depth])
    source = Source(entries, noise, None, ('noise',), ())
    pixels = _pixels(config, row)
    transform = Transform(pixels, config.depth)
    parts = {part: Part(entries if part == 'train' else [], source, transform) for part in PARTS}
    return Data(**parts, shape=shape, pixels=pixels, normal_classes=('noise',), anomalous_classes=(),
                split={}, report=[], config=config)
