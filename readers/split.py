"""Who goes to which part, and what may spoil a result: groups, patients, stored splits, duplicates.

Images that belong together (one patient, one content) are one group, and a group is never in two parts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from readers.source import CLASSES_SHOWN, Entry
from utils import UserError, mix_seed, read_json, strict_json

if TYPE_CHECKING:
    import numpy as np

    from readers.published.records import Records

PARTS = ('train', 'val', 'test')
SPLIT = {'dataset': str, 'split_seed': int, 'normal_classes': list, 'anomalous_classes': list}
FILE = dict.fromkeys(('id', 'class', 'part', 'sha256'), str)
LEFT_OUT = 'left out: '
SHOWN = 5          # files named in one line
FEW = 20           # normal validation images: below, a threshold of 5 % cannot be placed


# ------------------------------------------------------------------------------------------------------ split

def split_parts(entries: Sequence[Entry], val_fraction: float, test_fraction: float,
                seed: int) -> dict[str, str]:
    """The part of each image: {id: 'train', 'val' or 'test'}.

    Anomalous images are all in test. Images of one patient, and files of equal content, are never in two
    parts. A part that the data set itself gives stays; the fractions are those of the normal images without a
    given test part.
    """
    parts = {e.id: 'test' for e in entries if e.part == 'test'}
    free = [e for e in entries if e.part != 'test']
    normals = sum(e.label == 0 for e in free)
    wanted = {'test': round(test_fraction * normals), 'val': round(val_fraction * normals)}
    groups = _groups(free)
    if any(wanted.values()):                                   # else the order makes no difference
        groups.sort(key=lambda g: (mix_seed(seed, 'split', g[0].id), g[0].id))
    groups.sort(key=lambda g: not any(e.label for e in g))     # stable: those that must be in test come first
    for group in groups:
        part = next((p for p, n in wanted.items() if n > 0), 'train')
        part = 'test' if any(e.label for e in group) else part
        if part in wanted:
            wanted[part] -= sum(e.label == 0 for e in group)
        parts |= {e.id: part for e in group}
    return parts


def split_given(entries: Sequence[Entry], val_fraction: float, test_fraction: float,
                seed: int) -> dict[str, str]:
    """As `split_parts`, but a part `val` that entries name stays too, and none that they name is filled up.
    """
    named = {e.part for e in entries if not e.label}         # a part of anomalous images needs normal ones
    val = {e.id: 'val' for e in entries if e.part == 'val' and not e.label}
    others = [e for e in entries if e.id not in val]
    return val | split_parts(others, 0 if 'val' in named else val_fraction,
                             0 if 'test' in named else test_fraction, seed)


def as_asked(entries: Sequence[Entry], val_fraction: float, test_fraction: float) -> list[Entry]:
    """The entries with the parts that they have been given, where the flags ask for others; -1 = no flag.

    A fraction for validation is drawn from the given validation and training parts together. Raises UserError
    for a fraction for testing, where there is a test part.
    """
    if test_fraction > 0 and any(e.part == 'test' for e in entries):
        raise UserError(f"--test_fraction {test_fraction}: the data have a test part of their own. Leave it "
                        f"out.")
    return [replace(e, part='train') if e.part == 'val' and val_fraction >= 0 else e for e in entries]


def split_by_name(entries: Sequence[Entry], val_fraction: float, test_fraction: float,
                  seed: int) -> dict[str, str]:
    """The part of each image by the order of the ids: of the normal ones the first are train, then val, and
    the last test.

    Of the anomalous ones as many as test has normal ones, drawn by `seed`, are in test, the others in no
    part. Images of one patient or content are not kept together.
    """
    normal = sorted(e.id for e in entries if not e.label)
    val, test = round(val_fraction * len(normal)), round(test_fraction * len(normal))
    parts = ['train'] * (len(normal) - val - test) + ['val'] * val + ['test'] * test
    anomalous = sorted((e.id for e in entries if e.label),
                       key=lambda name: (mix_seed(seed, 'split', name), name))
    return dict(zip(normal, parts)) | dict.fromkeys(anomalous[:test], 'test')


def nothing_to_train_on(parts: Mapping[str, Sequence[Entry]], kind: str) -> str:
    """Why no image is left for training, and what to do."""
    number = sum(map(len, parts.values()))
    if any(not entry.label for entries in parts.values() for entry in entries):
        return (f"{count(number, kind)} leave none to train on: add normal {kind}s, or lower --val_fraction "
                f"and --test_fraction.")
    ways = (', raise --lesion_load (ml of lesion that still count as normal), or train on healthy patches, '
            'which scripts/cut_patches.py cuts out (docs/data.md, Patches)') if kind == 'subject' else ''
    return f"none of the {count(number, kind)} is normal, and models train on normal ones: add some{ways}."


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Images of one patient or content, directly or over others, sorted by id."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for e in entries:
        for kind, value in (('sha256', e.sha256), ('patient', e.patient)):
            if value:
                parent[root(('id', e.id))] = root((kind, value))
    groups = defaultdict(list)
    for e in sorted(entries, key=lambda e: e.id):
        groups[root(('id', e.id))].append(e)
    return list(groups.values())


def split_records(records: Records, val_fraction: float, test_fraction: float, seed: int,
                  stored: Mapping[str, int] | None) -> dict[str, np.ndarray]:
    """The places in `records` that go to each part: {part: (N,) sorted}.

    A given test part stays; of the others those with the smallest hashes of `seed` and id go to test and val,
    by the fractions, or as many as a stored split counts. Raises UserError if these are not the images that
    it counted.
    """
    import numpy as np
    given = records.in_test()
    free, test = np.flatnonzero(~given), np.flatnonzero(given)
    more_test, val = round(test_fraction * len(free)), round(val_fraction * len(free))
    if stored:
        more_test, val = stored['test'] - len(test), stored['val']
        if more_test < 0 or len(records) != sum(stored.values()):
            raise UserError(f"the run's split.json counts {sum(stored.values()):,} images and at least "
                            f"{stored['test']:,} for the test part, --data has {len(records):,} and "
                            f"{len(test):,}: give the data of the run, or train anew.")
    if more_test or val:
        hashes = (mix_seed(seed, 'split', name) for name in records.ids())
        free = free[np.argsort(np.fromiter(hashes, np.int64, len(records))[free], kind='stable')]
    bounds = more_test, more_test + val
    return {'train': np.sort(free[bounds[1]:]), 'val': np.sort(free[bounds[0]:bounds[1]]),
            'test': np.sort(np.concatenate([test, free[:bounds[0]]]))}


def read_split(path: Path) -> dict[str, Any] | None:
    """split.json of a run; None if there is none. Raises UserError if it is damaged."""
    if not path.exists():
        return None
    split = read_json(path)
    is_whole = has_fields(split, SPLIT) and (
        has_fields(split['records'], dict.fromkeys(PARTS, int)) if 'records' in split else
        isinstance(split.get('files'), list) and all(has_fields(file, FILE) for file in split['files']))
    if not is_whole:
        raise UserError(f"{path} is not the split of a run: restore it, or train anew.")
    return split


def has_fields(value: Any, kinds: Mapping[str, type]) -> bool:
    """Whether this is a dictionary, and its fields of these names of these kinds."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def split_digest(split: Mapping[str, Any]) -> str:
    """SHA-256 of a split, which checkpoints keep: of who is where, not of the flags that it was made with."""
    counted = {name: value for name, value in split.items() if name != 'made_of'}
    return hashlib.sha256(strict_json(counted, sort_keys=True).encode()).hexdigest()


def why_other_split(stored: Mapping[str, Any] | None, made: Mapping[str, Any], digest: str) -> list[str]:
    """Lines on split.json, if it is not that of the checkpoint (`digest`); `made` is that of the data."""
    if stored is not None and split_digest(stored) != digest:
        return ["the run's split.json was changed since the checkpoint: images of its training may be in "
                "other parts now. Restore it."]
    if stored is None and split_digest(made) == digest:
        return ["the run's split.json is lost; made anew from the data it is the same."]
    if stored is None:
        return ["the run's split.json is lost, and made anew from these data it is another one: images of "
                "its training may be in the test part. Restore it, or give the data and flags of the run."]
    return []


def stored_parts(entries: Sequence[Entry], split: dict[str, Any], report: list[str]) -> dict[str, str]:
    """The parts of a stored split, for the classes that are in use."""
    here = {e.id: e for e in entries}
    classes = {e.class_name for e in entries} | set(split['normal_classes'])
    known = {f['class'] for f in split['files']}
    stored = [f for f in split['files'] if f['class'] in classes]
    if lost := [f['id'] for f in stored if f['id'] not in here]:
        raise UserError(f"{count(len(lost), 'file')} of the run's split.json cannot be found or read: "
                        f"{some(lost)}. "
                        f"Restore them, check --data, or train anew.")
    if changed := [f['id'] for f in stored if here[f['id']].sha256 != f['sha256']]:
        raise UserError(f"{count(len(changed), 'file')} changed since the run's split.json: {some(changed)}. "
                        f"Restore them, or train anew.")
    parts = {f['id']: f['part'] for f in stored}
    if wrong := [i for i, part in parts.items() if here[i].label and part != 'test']:
        raise UserError(f"{some(wrong)} took part in training as normal: "
                        f"choose other --anomalous_classes, or train anew.")
    added = [e for e in entries if e.id not in parts]
    fresh = [e for e in added if e.label and e.class_name not in known]
    if len(added) > len(fresh):
        report.append(f"left out: {count(len(added) - len(fresh), 'file')} that the run's split.json does "
                      f"not know")
    return parts | {e.id: 'test' for e in fresh}


def with_patients(entries: list[Entry], metadata: str, name_pattern: str, report: list[str],
                  ask: bool = False) -> list[Entry]:
    """The entries with their patients, from a table or from file names; `ask` reports that none is known."""
    if metadata:
        patient, flag_name = _patient_column(metadata), '--patient_metadata'
    elif name_pattern:
        try:
            pattern = re.compile(name_pattern)
        except re.error as error:
            raise UserError(f"--patient_pattern {name_pattern!r} is no regular expression: "
                            f"{error}.") from None
        if pattern.groups < 1:
            raise UserError(f"--patient_pattern {name_pattern!r} has no group: put the patient in "
                            f"parentheses.")
        flag_name = '--patient_pattern'

        def patient(name: str) -> str:
            match = pattern.search(name if '/' in name_pattern else name.rsplit('/', 1)[-1])
            return (match[1] or '') if match else ''
    else:
        if ask and not any(e.patient for e in entries):
            report.append("patients are not known: if some have several images, name them with "
                          "--patient_pattern or --patient_metadata, so that none is in two parts")
        return entries
    entries = [replace(e, patient=patient(re.sub(r'#\d+$', '', e.id))) for e in entries]     # of any frame
    unknown = [e.id for e in entries if not e.patient]
    if len(unknown) == len(entries):
        raise UserError(f"{flag_name} finds a patient for no file, for example not for {unknown[0]}: "
                        f"correct it.")
    people = len({e.patient for e in entries} - {''})
    report.append(f"{count(people, 'patient')} in {count(len(entries) - len(unknown), 'image')}"
                  + (f"; {count(len(unknown), 'image')} without one, such as "
                     f"{unknown[0]}" if unknown else ''))
    return entries


def _patient_column(text: str) -> Callable[[str], str]:
    """The patient of an id by a table, FILE:FILE_NAME_COLUMN:PATIENT_COLUMN; '' where it is not listed."""
    if text.count(':') < 2:
        raise UserError(f"--patient_metadata {text!r}: expected FILE:FILE_NAME_COLUMN:PATIENT_COLUMN.")
    path, name_column, patient_column = text.rsplit(':', 2)
    from readers.images.tables import cell, read_table
    rows, found = read_table(Path(path))
    for column in (name_column, patient_column):
        if column not in found:
            raise UserError(f"--patient_metadata: {path} has no column {column!r}: found "
                            f"{', '.join(found) or 'none'}.")
    patients = {str(row.get(name_column)): cell(row.get(patient_column)) for row in rows}

    def patient(name: str) -> str:
        file = name.rsplit('/', 1)[-1]
        return next((patients[key] for key in (name, file, os.path.splitext(file)[0]) if key in patients), '')

    return patient


# ----------------------------------------------------------------------------------------------------- report

def left_out(bad: Sequence[tuple[str, str]], used: int, skip_corrupt: bool, kind: str = 'file') -> list[str]:
    """A line for each (id, reason) of `bad`. Raises UserError if there is one and none may be left out."""
    lines = [f'{name} {reason}' for name, reason in bad]
    if lines and not skip_corrupt:
        raise UserError(f"{count(len(lines), kind)} of {len(lines) + used} cannot be used: {some(lines)}. "
                        f"Replace or remove them, or pass --skip_corrupt to leave them out.")
    return [LEFT_OUT + line for line in lines]


def find_duplicates(entries: Sequence[Entry], near: Sequence[tuple[str, str, float]],
                    parts: dict[str, str]) -> list[dict[str, Any]]:
    """Pairs of images in two different parts that are the same file ('exact') or look the same ('near')."""
    pairs, same = [], defaultdict(list)
    for e in entries:
        if e.sha256:
            same[e.sha256].append(e.id)
    content = {e.id: e.sha256 for e in entries}
    for ids in same.values():
        pairs += [('exact', ids[0], other, 1.0) for other in ids[1:]]
    pairs += [('near', a, b, c) for a, b, c in near
              if a in content and b in content and content[a] != content[b]]
    return [{'kind': kind, 'ids': [a, b], 'parts': [parts[a], parts[b]], 'correlation': c}
            for kind, a, b, c in pairs if parts[a] != parts[b]]


def part_counts(entries: Sequence[Entry], parts: Mapping[str, str]) -> list[str]:
    """How many images of each class are in each part: a table, one line a class, or one for all normal and
    one for all anomalous classes where they are many.
    """
    many = len({e.class_name for e in entries}) > CLASSES_SHOWN
    names = {e.class_name: ('anomalous classes' if e.label else 'normal classes') if many else e.class_name
             for e in entries}
    return count_table(Counter((names[e.class_name], parts[e.id]) for e in entries),
                       {names[e.class_name]: e.label for e in entries})


def count_table(counts: Mapping[tuple[str, str], int], labels: Mapping[str, int]) -> list[str]:
    """The table of {(class, part): images}, given the label of each class."""
    lines = [f"{'class':24}{'':10}" + ''.join(f'{part:>8}' for part in PARTS)]
    for name in sorted(labels, key=lambda n: (labels[n], n)):
        kind = 'anomalous' if labels[name] else 'normal'
        lines.append(f'{name:24}{kind:10}' + ''.join(f'{counts.get((name, part), 0):8d}' for part in PARTS))
    return lines


def warnings(entries: Sequence[Entry], parts: Mapping[str, str],
             duplicates: list[dict[str, Any]]) -> list[str]:
    """What may spoil a result."""
    lines = []
    for kind, words in (('exact', 'the same file'), ('near', 'near-duplicates')):
        pairs = [f"{d['ids'][0]} ({d['parts'][0]}) and {d['ids'][1]} ({d['parts'][1]})"
                 for d in duplicates if d['kind'] == kind]
        lines += noted(pairs, 'pair', f'of images are {words}', 'duplicates across parts: ')
    val = [e.id for e in entries if parts[e.id] == 'val' and e.part == 'val' and not e.label]
    if 0 < len(val) < FEW:
        lines.append(f"the given validation part has {count(len(val), 'normal image')}: thresholds are "
                     f"coarse. --val_fraction draws more, from the training part too")
    masked = any(e.mask_row >= 0 for e in entries)
    unmarked = [e.id for e in entries if masked and not e.has_mask]
    return [*lines,
            *noted(contradictions(entries), 'file', 'of the same content are labeled normal and anomalous'),
            *noted(spread_patients(entries, parts), 'patient', 'in more than one part as given'),
            *noted(unmarked, 'anomalous image', 'without a mask count in no pixel metric')]


def contradictions(entries: Sequence[Entry]) -> list[str]:
    """The ids of files of equal content, of which one is normal and another anomalous."""
    if len({e.label for e in entries}) < 2:
        return []
    labels = defaultdict(set)
    for e in entries:
        labels[e.sha256 or e.id].add(e.label)
    return [e.id for e in entries if len(labels[e.sha256 or e.id]) > 1]


def spread_patients(entries: Sequence[Entry], parts: Mapping[str, str]) -> list[str]:
    """The known patients who are in more than one part."""
    places = defaultdict(set)
    for e in entries:
        if e.patient:
            places[e.patient].add(parts[e.id])
    return sorted(p for p, found in places.items() if len(found) > 1)


def noted(names: Sequence[str], kind: str, words: str, before: str = '') -> list[str]:
    """One line of the report that counts some files and names a few of them; none if there is nothing."""
    return [f'{before}{count(len(names), kind)} {words}: {some(names)}'] if names else []


def count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return '; '.join(names[:SHOWN]) + (f'; and {len(names) - SHOWN:,} more' if len(names) > SHOWN else '')
