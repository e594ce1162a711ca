"""What a reader is told: the data flags, and the row of a data set in `datasets.DATASETS`.

Flags stand in groups, so that a data set shows and takes only those that do something for it
(`datasets.data_flags`). Nothing here imports PyTorch, SciPy or Pillow: --help answers without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from readers.split import PARTS, split_parts
from utils import UserError, flag, flags

if TYPE_CHECKING:
    from readers.source import Entry, Source


@flags
class FileConfig:
    """Files"""
    data: str = flag('', 'folder, tar, table or LMDB of the images; of phantoms, where to draw them',
                     basic=True)
    image_size: int = flag(0, "height and width in pixels, and depth of volumes; 0 = the data set's own",
                           least=0, basic=True)
    num_x_bits: int = flag(8, 'bits per pixel; more than 8 keep the precision of 16-bit files',
                           least=1, most=16)
    skip_corrupt: bool = flag(False, 'leave out and report files that cannot be read, instead of stopping')
    cache_dir: str = flag('', "folder for decoded images; '' = a folder in $XDG_CACHE_HOME or ~/.cache")

    @property
    def depth(self) -> int:
        """Bits at which decoded images are kept; --num_x_bits takes its gray levels from these."""
        return 16 if self.num_x_bits > 8 else 8


@flags
class ClassConfig:
    """Classes"""
    normal_classes: tuple = flag((), "classes to train on; none given = the data set's own", basic=True,
                                 aliases=('normal_class',))
    anomalous_classes: tuple = flag((), 'classes to detect; none given = all others of class folders, none '
                                        'of published data sets', basic=True)


@flags
class ColorConfig:
    """Color"""
    channels: int = flag(0, "1 gray, 3 color; 0 = the data set's own", choices=(0, 1, 3))


@flags
class FitConfig:
    """Shape"""
    fit: str = flag('pad', 'how to make non-square images square: pad, center-crop or stretch',
                    choices=('pad', 'crop', 'stretch'))


@flags
class FrameConfig:
    """Frames"""
    frames: str = flag('refuse', 'DICOM files of several frames, TIFF of several pages, animated PNG: refuse '
                                 'them (of TIFF and PNG, take the first), take each as an image, all of a '
                                 'file in one part, or take the middle one',
                       choices=('refuse', 'each', 'middle'))


@flags
class PixelConfig:
    """Pixels"""
    likelihood: str = flag('auto', 'gray levels, or binary pixels that are white with the gray value as '
                                   "probability; auto = the data set's own",
                           choices=('auto', 'discretized', 'bernoulli'))
    binarize: str = flag('dynamic', 'binary and dequantized pixels: draw them anew in every epoch, or once',
                         choices=('dynamic', 'static'))
    dequantize: bool = flag(False, 'gray levels: add noise, (level + u) / levels with u uniform in [0, 1)')
    invert: bool = flag(False, 'invert images, 1 - x, before they are binarized or dequantized')
    flip: str = flag('auto', 'train on mirror images too, each with probability 1/2; auto = as published '
                             'for the data set', choices=('auto', 'on', 'off'))


@flags
class PatientConfig:
    """Patients"""
    patient_pattern: str = flag('', 'regular expression that finds the patient in a file name, or with a / '
                                    "in it in a path, as its group 1; '' = patients are unknown")
    patient_metadata: str = flag('', 'CSV file that lists the patients, as '
                                     "FILE:FILE_NAME_COLUMN:PATIENT_COLUMN; '' = patients are unknown")


BOXES = (('x', 'y', 'width', 'height'), ('x_min', 'y_min', 'x_max', 'y_max'))      # columns of a box
COLUMNS = ('path', 'class', 'part', 'mask', 'patient', 'label', *BOXES[0], *BOXES[1])


@flags
class TableConfig:
    """Tables"""
    columns: tuple = flag((), 'columns of the table --data that have other names than path, class, part, '
                              'mask, patient, label, x, y, width, height, x_min, y_min, x_max or y_max, as '
                              'NAME=COLUMN')
    tables: tuple = flag((), 'further tables, as FILE, or as PART=FILE with the part of their images; those '
                             'of --data are then of the part train')
    class_columns: tuple = flag((), 'columns of 0 and 1, one a class: the first that is 1 is the class of an '
                                    'image; none given = one column names it')
    images: str = flag('', "folder of the images that the table names; '' = that of the table")

    def check_table(self, is_table: bool) -> None:
        """Raises UserError for flags that say nothing, as all do where --data is no table."""
        for one in fields(TableConfig):
            if not is_table and getattr(self, one.name):
                raise UserError(f"--{one.name}: it says how to read a table, and --data is none: leave it "
                                f"out.")
        for pair in self.tables:
            if '=' in pair and pair.split('=')[0] not in PARTS:
                raise UserError(f"--tables {pair}: expected FILE, or PART=FILE with train, val or test.")
        for pair in self.columns:
            name, _, column = pair.partition('=')
            if name not in COLUMNS or not column:
                raise UserError(f"--columns {pair}: expected NAME=COLUMN, and as NAME one of "
                                f"{', '.join(COLUMNS)}.")


@flags
class PhantomConfig:
    """Phantoms"""
    num_phantoms: int = flag(0, 'normal phantoms to draw, and a fraction of that number with lesions; 0 = '
                                "the data set's own", least=0)


@flags
class ConfoundConfig:
    """Confounds of phantoms"""
    phantom_confound: str = flag('none', 'acquisition that differs between chest phantoms with and without '
                                         'lesions: nothing, brighter exposure, or more noise',
                                 choices=('none', 'exposure', 'noise'))


@flags
class VolumeConfig:
    """Volumes"""
    modalities: tuple = flag((), 'channels, in order: names of folders, or endings of file names after _ or '
                                 "-; none given = the data set's own (brain: one file per subject)")
    labels: str = flag('', "name of the lesion masks, found like modalities; voxels above 0 are lesion; '' = "
                           "the data set's own (brain: label)")
    lesion_load: float = flag(0.0, 'lesion volume in ml above which a subject counts as anomalous, where no '
                                   'class folders say who is', least=0, below=float('inf'))
    volume_mask: str = flag('', 'what to keep; the rest becomes black and is cut off: the name of masks '
                                "found like modalities, auto = what is brighter than air, '' = everything")
    crop: tuple = flag((), 'voxels to keep after reorientation to RAS: the first ones to the right, front '
                           'and top, then the ends; none given = all',
                       type=int, nargs=6, metavar='VOXEL', least=0)
    spacing: float = flag(0.0, 'distance between voxels in mm; 0 = that of the files, which must agree',
                          least=0, below=float('inf'))
    volume_shape: tuple = flag((), 'voxels to the right, front and top, cropped and padded around the '
                                   'center; none given = a cube of --image_size or, if that is 0, the '
                                   'largest volume', type=int, nargs=3, metavar='VOXELS', least=1)
    pad_multiple: int = flag(16, 'the shape of the largest volume is rounded up to a multiple of this',
                             least=1)
    percentiles: tuple = flag((0.01, 99.9), 'intensities that become 0 and 1, as percentiles of the voxels '
                                            'of each volume and channel',
                              type=float, nargs=2, metavar='PERCENT', least=0, most=100)
    window: tuple = flag((), 'intensities that become 0 and 1 in all volumes, such as -100 400 in CT; none '
                             'given = --percentiles', type=float, nargs=2, metavar='INTENSITY')
    dicom_series: bool = flag(False, 'read DICOM too: the slices in a folder are one volume, and so are the '
                                     'frames of a file')
    augment: bool = flag(False, 'augment training volumes: intensity shift and scale, histogram shift, '
                                'rotation and translation, spike, Rician noise, Gibbs ringing, each with '
                                'probability 0.1')
    key_files: str = flag('', 'folder of NAME_keys.txt files with a subject on each line; a NAME that ends '
                              'in train, val or test is a part (NAME.txt will do for these), any other a '
                              "class; '' = the data folder")

    def check_volumes(self, image_size: int) -> None:
        """Raises UserError for flags that contradict each other."""
        low, high = self.percentiles
        if not low < high:
            raise UserError(f"--percentiles {low} {high}: the first must be smaller than the second.")
        if self.window and not self.window[0] < self.window[1]:
            raise UserError(f"--window {' '.join(map(str, self.window))}: the first intensity must be "
                            f"smaller than the second.")
        if self.window and self.percentiles != VolumeConfig.percentiles:
            raise UserError("--window and --percentiles both say what becomes 0 and 1: leave one out.")
        if self.volume_shape and image_size:
            raise UserError("--volume_shape and --image_size both say how large volumes are: leave one out.")
        if not all(a < b for a, b in zip(self.crop[:3], self.crop[3:], strict=True)):
            raise UserError(f"--crop {' '.join(map(str, self.crop))}: expected the first voxel along three "
                            f"axes, then ends beyond it.")


def volume_flags(config: VolumeConfig, *without: str) -> dict[str, Any]:
    """The flags that say how volumes are prepared, but for those that are named."""
    return {f.name: getattr(config, f.name) for f in fields(VolumeConfig) if f.name not in without}


@flags
class ReaderConfig(VolumeConfig, ConfoundConfig, PhantomConfig, TableConfig, PatientConfig, FrameConfig,
                   FitConfig, ColorConfig, ClassConfig, FileConfig):
    """All flags that readers look at."""


@dataclass(frozen=True)
class DataSet:
    """One row of DATASETS: what is true of a data set in every run."""
    read: Callable[[ReaderConfig, DataSet], Source]
    size: int                                # along each of *S, as the model sees it, padding included
    dims: int = 2                            # of *S; 3 = volumes, which may have size 0: as large as they are
    channels: int = 1
    modalities: tuple[str, ...] = ()         # of volumes: names of the channels
    labels: str = ''                         # of volumes: name of the lesion masks
    bits: int = 16                           # most bits of a gray level
    likelihood: str = 'discretized'          # or 'bernoulli'
    padding: int = 0                         # border of zeros that belongs to `size`, not to the image
    normal: tuple[str, ...] = ()             # names of normal classes; () = all that are not anomalous
    folder: Callable[[ReaderConfig, DataSet], str] | None = None      # its class folders; None = it has none
    classes: bool = True                     # False: all images are of one class
    tables: bool = False                     # a table may describe it in place of class folders
    masks: bool = False                      # masks mark anomalies (masks of covid mark lungs)
    val_fraction: float = 0.15               # of the normal images that are not in a given test part
    test_fraction: float = 0.2
    split: Callable[[Sequence[Entry], float, float, int], dict[str, str]] = split_parts
    val_always: bool = True                  # False: a validation part only where there are anomalies to find
    flip: bool = False                       # train on mirror images too
    num_train: int = 0                       # training images of the published set; 0 = any number
    parts: tuple[str, ...] = ('train', 'test')               # which of its own parts to read
    phantoms: int = 0                        # normal phantoms drawn by default; 0 = it is not synthetic
    confounds: bool = False                  # the phantoms come with confounds too
    primary_scores: Mapping[str, str] = field(default_factory=dict)   # family -> what development data chose
    defaults: Mapping[str, Any] = field(default_factory=dict)         # of a training that names no model
    where: str = ''                          # for errors: the expected layout, and where the data comes from

    def border(self, config: ReaderConfig) -> int:
        """Border around the images at the wanted size; a row with padding keeps its images unscaled."""
        if not self.padding:
            return 0
        size, own = config.image_size or self.size, self.size - 2 * self.padding
        if size < own or (size - own) % 2:
            raise UserError(f"--image_size {size}: these images are {own} x {own} with an equal border "
                            f"around: give 0, {own} or a larger even number.")
        return (size - own) // 2


# ---------------------------------------------------------------------------------- readers and their folders

def data_folder(config: ReaderConfig, row: DataSet) -> str:
    """The folder --data, or that of an unpacked tar file."""
    is_file = config.data and Path(config.data).is_file()
    unpacked = resolve_name('readers.images.archive:unpacked')
    return str(unpacked(config.data, config.cache_dir)) if is_file else config.data


FINISHED = 'finished.json'          # in a folder of phantoms, written last: without it they are incomplete


def phantom_folder(name: str, draw: str) -> Callable[[ReaderConfig, DataSet], str]:
    """The folder of the phantoms `name`, which the function `draw` makes at the first run."""
    def folder(config: ReaderConfig, row: DataSet) -> str:
        options = {'confound': config.phantom_confound} if row.confounds else {}
        return str(resolve_name(draw)(phantom_place(config.data, name), config.num_phantoms or row.phantoms,
                                  **options))
    return folder


def phantom_place(data: str, name: str) -> Path:
    """Where the phantoms `name` are drawn, given --data."""
    return Path(data or f'data/{name}')
