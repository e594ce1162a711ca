"""Which files are whose: the channels, labels and masks of each subject among NIfTI files.

    <data>/<subject>.nii.gz                                    one channel, or as many as --modalities names
    <data>/t1/<subject>.nii.gz      <data>/flair/<subject>.nii.gz                     --modalities t1 flair
    <data>/<subject>/t1.nii.gz      <data>/<subject>/<subject>_t1.nii.gz              the same
    <data>/<class>/...              any of these, in class folders
    <data>/<subject>/t1/*.dcm                                  the same, with --dicom_series: slices or frames
    <data>/imagesTr/<subject>.nii.gz      <data>/labelsTr/<subject>.nii.gz            --labels labelsTr
    <data>/train_keys.txt           subjects of the part `train`, one a line; val_keys.txt, test_keys.txt; the
                                    same of NAME-train.txt, NAME-val.txt and NAME-test.txt

A file that is named as one of labels or masks is never a subject.

Labels of lesions and masks of the body are found as the modalities are.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from readers.config import VolumeConfig
from readers.images.masks import WORD
from readers.items import Item
from readers.paths import FOREIGN, Passed, files_below, pass_over
from readers.source import is_among
from readers.split import LEFT_OUT, PARTS, noted, some
from readers.volumes.nifti import SUFFIXES, stem
from readers.volumes.series import series_in
from utils import UserError, read_text

NORMAL = 'normal'                   # the class of a subject of which no folder and no key file says more
KEYS = '_keys.txt'
LABELS, CHANNELS = 'labels or masks that no flag names', 'volumes that are no channel of these subjects'
AUTO = 'auto'                       # a mask that is made, not found
IMAGES = 'imagestr'                 # a folder that is no part of a subject's name, as labels are elsewhere
LABEL_FOLDER = re.compile(f'({WORD}|rois?|[da]seg)(tr|ts)?$', re.IGNORECASE)
LABEL_FILE = re.compile(f'(.*[-_.])?({WORD}|rois?|[da]seg|lesions?)$', re.IGNORECASE)


def owner(path: str, names: Iterable[str]) -> tuple[str, str]:
    """The subject and the one of `names` that a file belongs to, '' if to none of them.

    ('ill/s1', 't1') of ill/t1/s1.nii.gz, of ill/s1_t1.nii.gz and of ill/s1/t1.nii.gz.
    """
    steps = [step for step in stem(path).split('/') if step.casefold() != IMAGES]
    for name in names:
        others = [step for step in steps if step.casefold() != name.casefold()]
        if len(others) < len(steps):
            return '/'.join(others), name
        if ending := re.search(rf'.[-_.]{re.escape(name)}$', steps[-1], re.IGNORECASE):
            return '/'.join([*steps[:-1], steps[-1][:ending.start() + 1]]), name
    return '/'.join(steps), ''


def is_label(path: str) -> bool:
    """Whether a file, or a folder that it lies in, has the name of labels or masks."""
    *folders, name = stem(path).split('/')
    return LABEL_FILE.match(name) is not None or any(LABEL_FOLDER.match(folder) for folder in folders)


def volume_files(root: Path, names: Sequence[str], passed: Passed, without: str | Path,
                 dicom: bool) -> list[str]:
    """The volumes below `root` but for the folder `without`, as paths relative to it: files, and with `dicom`
    folders of slices; `names` are those of channels and masks. What is passed over goes to `passed`.
    """
    names_below = files_below(root, passed, without=without)
    found = [name for name in names_below if name.lower().endswith(SUFFIXES)]
    others = {*names_below} - {*found}
    series, slices = series_in(root, others) if dicom else ([], set())
    pass_over(passed, FOREIGN, *(others - slices - {file.name for file in key_files(root)}))
    return sorted([*found, *named_by_folder(series, slices, names)])


def named_by_folder(series: Iterable[str], slices: Collection[str], names: Sequence[str]) -> list[str]:
    """The volumes among the DICOM files `slices`, where each file of several frames is the only one of its
    folder and no flag names any: its folder, as of slices, for devices call such a file 1.2.840.7.dcm.
    """
    crowd = Counter(map(os.path.dirname, slices))
    files = {name: os.path.dirname(name) for name in series if name in slices and not is_label(name)}
    alone = all(crowd[folder] == 1 and owner(folder, names)[0]
                and owner(folder, names)[1] == owner(file, names)[1] for file, folder in files.items())
    return [files.get(name, name) if alone else name for name in series]


def find_subjects(root: Path, config: VolumeConfig, modalities: Sequence[str], labels: str, passed: Passed,
                  without: str | Path = '') -> tuple[list[Item], list[tuple[str, str]]]:
    """The subjects below `root`, and (id, reason) of those that lack a file; `passed` and `without` as in
    `volume_files`. Raises UserError if there are none.
    """
    body = '' if config.volume_mask == AUTO else config.volume_mask
    names = [*filter(None, (*modalities, labels, body))]
    table: dict[str, dict[str, str]] = {}
    for path in volume_files(root, names, passed, without, config.dicom_series):
        subject, name = owner(path, names)
        subject = subject or root.resolve().name                  # of its own folder
        if not name and is_label(path):
            pass_over(passed, LABELS, path)
            continue
        files = table.setdefault(subject, {})
        if name in files:
            raise UserError(f"--data: {path} and {files[name]} are both {name or 'the volume'} of the "
                            f"subject {subject}: remove one.")
        files[name] = path
    apart = len(modalities) == 1 or any(name in files for files in table.values() for name in modalities)
    channels = list(modalities) if apart else ['']                # else the channels are in one file
    subjects, bad = [], []
    for subject, files in sorted(table.items()):
        if not any(channel in files for channel in channels):
            pass_over(passed, CHANNELS, *files.values())
            continue
        wanted = channels + [body] * bool(body)
        if lacking := [name for name in wanted if name not in files]:
            bad.append((subject, f'has no file of {lacking[0] or "the volume"}'))
            continue
        paths = {name: str(root / path) for name, path in files.items()}
        first, *others = (paths[channel] for channel in channels)
        subjects.append(Item(subject, NORMAL, path=first, others=(*others,),
                             masks=(paths[labels],) if labels and labels in paths else (),
                             body=(paths[body],) if body else ()))
    if not subjects and bad:
        raise UserError(f"--data: no subject in {root} is complete: {bad[0][0]} {bad[0][1]}.")
    if not subjects:
        found = ', '.join(sorted(p.name for p in root.iterdir() if p.is_dir())[:10]) or 'no folders'
        raise UserError(f"--data: {root} holds no {', '.join(SUFFIXES)} file of "
                        f"{', '.join(modalities) or 'a volume'}: found {found}."
                        + ' --dicom_series reads DICOM too.' * (not config.dicom_series))
    return subjects, bad


def key_files(folder: Path) -> dict[Path, str]:
    """The key files in a folder, each with the part or class that it gives."""
    found = {}
    for file in sorted(folder.glob('*.txt')):
        name = file.name.removesuffix(KEYS)
        part = re.split('[-_]', name.removesuffix('.txt'))[-1].lower()
        if part in PARTS or name != file.name:
            found[file] = part if part in PARTS else name
    return found


def with_keys(subjects: list[Item], config: VolumeConfig, root: Path, notes: list[str]) -> list[Item]:
    """The subjects that the key files in --key_files or `root` name, with their part or class; all if there
    is none in `root`. Raises UserError for a name that no subject has, or several, or that is there twice.
    """
    named: dict[str, tuple[Item, Path]] = {}
    by_name = defaultdict(list)
    for subject in subjects:
        for name in {subject.id, subject.id.rsplit('/', 1)[-1]}:
            by_name[name].append(subject)
    folder = Path(config.key_files or root)
    files = key_files(folder)
    if config.key_files and not files:
        raise UserError(f"--key_files {folder}: there is no file NAME{KEYS} or NAME-train.txt in it.")
    for file, group in files.items():
        for key in map(stem, filter(None, map(str.strip, read_text(file).splitlines()))):
            found = by_name.get(key) or by_name.get(key.replace('_', ''), [])        # SADE's key files have _
            if len(found) != 1:
                raise UserError(f"{file} names {key!r}, which {len(found) or 'no'} "
                                f"subject{'s have' if found else ' has'}: correct it, or check --data.")
            subject = found[0]
            if subject.id in named:
                raise UserError(f"{file} names {key!r}, and so does {named[subject.id][1]}: a subject can be "
                                f"in one alone.")
            what = {'part' if group in PARTS else 'class_name': group}
            named[subject.id] = replace(subject, **what), file
    left = [s.id for s in subjects if files and s.id not in named]
    notes += noted(left, 'subject', f'that no key file in {folder} names', LEFT_OUT)
    return [named[s.id][0] for s in subjects if s.id in named] if files else subjects


def with_classes(subjects: list[Item], normal: Sequence[str], where: str) -> list[Item]:
    """The subjects with their class, if one of the topmost folders has the name of a normal one."""
    tops = {s.id.split('/')[0] for s in subjects if '/' in s.id}
    if not any(is_among(top, normal) for top in tops):
        return subjects
    if loose := [s.id for s in subjects if '/' not in s.id]:
        raise UserError(f"--data: {loose[0]} lies in no class folder, others lie in {some(sorted(tops))}: "
                        f"move it to one. {where}")
    return [replace(s, class_name=s.id.split('/')[0]) for s in subjects]
