"""Images from elsewhere, or changed ones of the run, as classes of its test: `--ood NAME=PATH[:CHANGE]`."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from datasets import DATASETS, Data, DataConfig
from readers import out_of_distribution as ood
from readers.images.decode import ImageLoader
from readers.lmdb.packed import is_packed, read_packed
from readers.parts import Part, Selection, SomeOf
from readers.published.records import Records
from readers.source import Source
from readers.split import count, left_out, some
from readers.volumes.nifti import entry_grids
from readers.volumes.volumes import apart, in_mm
from utils import UserError, naming


def with_ood(data: Data, sets: Sequence[str], most: int = 0, seed: int = 0) -> Data:
    """The same with more anomalous images in the part `test`, a class for each of `sets`: NAME=PATH[:CHANGE].
    Sets of inliers take the place of the run's own normal images.

    They are brought to the shape, the bits and the likelihood of `data`. At most `most` images of each set,
    drawn by `seed`; 0 = all. Raises UserError. What the run stores of its split does not change.
    """
    wanted, report = [ood.parse(text) for text in sets], list(data.report)
    parts = {'': data.test}
    for one in wanted:
        if one.name in parts or one.name in {*data.normal_classes, *data.anomalous_classes}:
            raise UserError(f"--ood {one.name}: there is a class of this name already. Take another name.")
        read = _own_part if one.path == ood.OWN else _foreign_part
        parts[one.name] = part = read(data, one, most, seed, report)
        if not len(part):
            raise UserError(f"--ood {one.name}: there is no image in {one.path} to take.")
        changed = f", {', '.join(one.changes)}" if one.changes else ''
        report.append(f'out of distribution: {one.name}, {count(len(part), "image")} of {one.path}{changed}')
    if not all(one.label for one in wanted):
        parts[''] = SomeOf(data.test, [e.id for e in data.test.entries if e.label])
    anomalous, normal = ([one.name for one in wanted if one.label == label] for label in (1, 0))
    return replace(data, test=Selection([(part, range(len(part))) for part in parts.values()]), report=report,
                   normal_classes=(*data.normal_classes, *normal),
                   anomalous_classes=(*data.anomalous_classes, *anomalous))


def _own_part(data: Data, wanted: ood.Wanted, most: int, seed: int, report: list[str]) -> Part:
    """The run's own normal test images, changed; or those with known lesions, if these are to be changed.

    Their border is the same on all sides and turns with them.
    """
    part, of_lesions = data.test, ood.ENHANCED in wanted.changes
    entries = ood.drawn([e for e in part.entries if bool(e.label) == of_lesions and
                     (e.mask_row >= 0 or not of_lesions)], most, seed)
    if not wanted.gives_masks:                       # a turned image is odd everywhere, not in its lesions
        entries = [replace(e, mask_row=-1) for e in entries]
    images = ood.Changed(part.images, entries, wanted, part.masks, depth=part.transform.depth, seed=seed)
    return _ood_part(data, wanted, images, data.config.invert != wanted.inverted)


def _foreign_part(data: Data, wanted: ood.Wanted, most: int, seed: int, report: list[str]) -> Part:
    """Images that the run does not know; of a published data set its test part."""
    border, config = data.pixels.padding, replace(data.config, data=wanted.path, image_size=0, channels=0,
                                                  normal_classes=(), anomalous_classes=())
    if len(data.shape) == 4:
        source = _foreign_volumes(data, wanted, config)
    else:
        source = _foreign_images(data, wanted, config, most, seed)
    lines = left_out(source.bad, len(source.entries), config.skip_corrupt)
    report += [f'{wanted.name}: {line}' for line in (*source.notes, *lines)]
    entries = source.entries
    if isinstance(entries, Records):
        entries = entries.at(np.flatnonzero(entries.in_test()))
    elif any(e.part for e in entries):
        entries = [e for e in entries if e.part == 'test']
    entries = ood.drawn(entries, most, seed)
    if wanted.name in DATASETS and not is_packed(wanted.path):
        # The size as a PNG of the published size and colors would give a set away.
        entries = [e if e.path else replace(e, file_bytes=0) for e in entries]
    known = {file['sha256'] for file in data.split.get('files', ()) if file['sha256']}
    if same := [e.id for e in entries if e.sha256 in known]:
        report.append(f"{count(len(same), 'image')} of {wanted.name} are images of the run's own data: "
                      f"{some(same)}")
    images = ood.Changed(source.pixels, entries, wanted, source.masks, depth=config.depth, border=border,
                     seed=seed)
    return _ood_part(data, wanted, images, wanted.inverted)


def _foreign_images(data: Data, wanted: ood.Wanted, config: DataConfig, most: int, seed: int) -> Source:
    """From an LMDB, from the files of a published data set, or from any folder; without a border."""
    published, size = DATASETS.get(wanted.name), data.shape[1] - 2 * data.pixels.padding
    row = replace(published or DATASETS[config.dataset], size=size, channels=data.shape[0], padding=0,
                  normal=(), masks=False, parts=('test',))
    if is_packed(wanted.path):
        return read_packed(config, row)
    if not published or published.folder:
        return ood.read_folder(wanted, most, seed, ImageLoader.of(config, row), config)
    with naming(f'--ood {wanted.name}'):
        return published.read(config, row)


def _foreign_volumes(data: Data, wanted: ood.Wanted, config: DataConfig) -> Source:
    """All subjects of a folder by the run's flags, in its shape, with the masks of their lesions."""
    files = DATASETS['brain']               # read from files, also where the run's own volumes are drawn
    row = replace(DATASETS[config.dataset], size=0, folder=files.folder)
    with naming(f'--ood {wanted.name}'):
        source = files.read(replace(config, volume_shape=data.shape[1:], key_files=''), row)
    if not source.entries:
        return source
    ours, theirs = (entry_grids(entries[0])[0].spacing for entries in (data.train.entries, source.entries))
    if apart(theirs, ours):
        raise UserError(f"--ood {wanted.name}: voxels of {in_mm(theirs)} mm, the run's are of {in_mm(ours)}: "
                        f"train with --spacing, which then holds for both.")
    return source


def _ood_part(data: Data, wanted: ood.Wanted, images: ood.Changed, invert: bool) -> Part:
    # A size that only one side has would be a perfect baseline.
    known = len(data.test) and data.test.entries[0].file_bytes
    source = Source(images.as_class(bool(known)), images, images.masks, (), (wanted.name,))
    return Part(source.entries, source, replace(data.test.transform, invert=invert))
