"""Masks of images: which files they are, which image each belongs to.

    masks/x.png   x_mask.png   masks/x_seg.png   ground_truth/x_mask.png   annotation/x_GT.png   x_mask_1.png
    ground_truth/x/000.png     ground_truth/x/001.png

Names are compared without regard to case, and é is é however it is written (NFC or NFD).
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from readers.items import Item
from readers.source import Unreadable, plain_name

WORD = r'(?:masks?|gts?|ground[ _-]?truths?|seg(?:mentation)?s?|annotations?|labels?)'
BESIDE = r'(?:lesions?|rois?|overlays?)'                # which are also names of classes and of images
LAST = rf'{BESIDE}(?=[ _.-]*\d*$)'
IN_IMAGES = re.compile('(?:images?|imgs?)$', re.IGNORECASE)
IN_CLASS = re.compile(rf'(?:images?|imgs?|{BESIDE})$', re.IGNORECASE)      # beside images, or of them
# Whether a folder of this name holds masks; or masks, perhaps of something else: `lung masks`, `masks_png`.
is_mask_folder = re.compile(f'{WORD}$', re.IGNORECASE).match
is_of_masks = re.compile(rf'(.*[ _.-])?{WORD}([ _.-].*)?$', re.IGNORECASE).match
ENDING = re.compile(rf'[ _.-]+(?:{WORD}|{LAST})(?P<rest>[ _.-]+.*|\d*)$', re.IGNORECASE)
NUMBER = re.compile(r'[ _.-]*\d+$')             # of one mask among several of an image
START = re.compile(rf'{WORD}[ _.-]+', re.IGNORECASE)              # mask_1.png of 1.png or image_1.png
OVERLAY = re.compile(r'overlays?(?:/[^/]*|[ _.-]*\d*\.\w+)$', re.IGNORECASE)   # overlay/x.png, x.overlay.png
CHANNEL = re.compile(r'(?:^|[ _.-])(?:image|img|flair|t1(?:ce|gd|n|c|w)?|t2(?:f|w)?)(?=$|[ _.-])',
                     re.IGNORECASE)


class Box(NamedTuple):
    """A rectangle of an image that is marked, in its pixels, from the upper left corner."""
    x: float
    y: float
    width: float
    height: float

    def marked(self, shape: Sequence[int]) -> np.ndarray:
        """The mask (H, W, 1) bool of an image (H, W, ...). Raises Unreadable if it is empty or outside."""
        edges = np.rint([self.y, self.y + self.height, self.x, self.x + self.width]).astype(int)
        mask = np.zeros((*shape[:2], 1), bool)
        mask[slice(*edges[:2].clip(0)), slice(*edges[2:].clip(0))] = True
        if not mask.any() or min(edges) < -1 or edges[1] > shape[0] + 1 or edges[3] > shape[1] + 1:
            raise Unreadable(f'is {shape[1]} x {shape[0]} pixels, its box of {self.width:g} x '
                             f'{self.height:g} at ({self.x:g}, {self.y:g}) is empty or reaches beyond')
        return mask


class Placed(NamedTuple):
    """An image or a mask, and where it stands: the folders from that of its class down, without those that
    only say what is in them, and its name without the suffix.
    """
    item: Item
    steps: tuple[str, ...]
    stem: str


@lru_cache
def are_of_masks(path: str) -> list[bool]:
    """Of each folder in a path that has a name of masks, whether it holds those of the images beside."""
    return [bool(is_mask_folder(name)) for name in path.split('/') if is_of_masks(name)]


def masks_beside(names: Iterable[str]) -> set[str]:
    """The files that are masks of others beside them: of `x.png` or `images/x.png` are `x_mask.png`,
    `x_mask_1.png`, `lesions/x.png` and `rois/x_roi.png`. `x_overlay.png`, a picture of both, is among them.
    """
    places = {name: fold(os.path.splitext(name)[0]).rpartition('/')[::2] for name in names}
    images = {(without_last(folder, IN_IMAGES), base) for folder, base in places.values()}

    def marked(folder: str, base: str) -> set[tuple[str, str]]:
        above = without_last(folder, IN_CLASS)
        return {(above, base), (above, without_ending(base))} - {(without_last(folder, IN_IMAGES), base)}
    return {name for name, place in places.items() if marked(*place) & images}


@lru_cache
def without_last(folder: str, words: re.Pattern) -> str:
    """The folder above, where the name of this one is one of `words`."""
    above, last = os.path.split(folder)
    return above if words.match(last) else folder


def without_ending(name: str) -> str:
    """'x' of 'x_mask' and of 'x_mask_1'; '' of a name that does not end like that of a mask."""
    ending = ENDING.search(name)
    return name[:ending.start()] if ending and NUMBER.fullmatch(ending['rest'] or '0') else ''


def fold(name: str) -> str:
    return (name if name.isascii() else unicodedata.normalize('NFC', name)).casefold()


def keys(stem: str) -> Iterator[str]:
    """The names that the image of a mask `stem` may have, the likeliest first."""
    yield stem
    if start := START.match(stem):
        yield stem[start.end():]
    for found in ENDING.finditer(stem):
        yield stem[:found.start()] + found['rest']
        if NUMBER.fullmatch(found['rest']):
            yield stem[:found.start()]


def with_masks(images: Sequence[Placed], masks: Sequence[Placed],
               is_normal: Callable[[str], bool]) -> tuple[list[Item], list[str]]:
    """The items of the images, each with its masks, and the ids of masks that belong to no image, or to
    several.

    The folders of a mask are the last ones of its image, without those of classes that it does not have; of
    several such images the anomalous one counts, then the one that is spelled alike.
    """
    if not masks:
        return [image.item for image in images], []
    by_name, by_rest = defaultdict(list), defaultdict(list)          # and by the last folder
    for image in images:
        rest = CHANNEL.sub('', image.stem).lstrip(' _.-')            # x_flair.png has the mask x_seg.png
        for last in (_last(image.steps), ''):
            by_name[last, fold(image.stem)].append(image)
            by_rest[last, fold(rest)].append(image)
    found, lost = defaultdict(list), []
    for mask in masks:
        names = [(_last(mask.steps), fold(key)) for key in keys(mask.stem)]
        places = [by_name.get(name, ()) for name in names] + [by_rest.get(name, ()) for name in names[1:]]
        owner = next((owner for images in places if (owner := _owner(mask, images, is_normal))), None)
        if mask.steps and not owner:                     # one of several in a folder of the image's name
            inside = mask._replace(steps=mask.steps[:-1], stem=mask.steps[-1])
            owner = _owner(inside, by_name.get((_last(inside.steps), fold(inside.stem)), ()), is_normal)
        if owner:
            found[owner.item.id].append(mask.item.path)
        else:
            lost.append(mask.item.id)
    return [replace(item, masks=tuple(found[item.id])) if item.id in found else item
            for item, *_ in images], lost


def _last(steps: Sequence[str]) -> str:
    return plain_name(steps[-1]) if steps else ''


def _owner(mask: Placed, images: Iterable[Placed], is_normal: Callable[[str], bool]) -> Placed | None:
    steps = [plain_name(step) for step in mask.steps]
    fitting = [image for image in images if mask.item.part in ('', image.item.part)
               and [plain_name(step) for step in image.steps[len(image.steps) - len(steps):]] == steps]

    def rank(image: Placed) -> tuple[bool, bool, bool]:
        spelled = unicodedata.normalize('NFC', mask.stem).startswith(unicodedata.normalize('NFC', image.stem))
        suffixes = {os.path.splitext(item.path)[1] for item in (image.item, mask.item)}
        return is_normal(image.item.class_name), not spelled, len(suffixes) > 1
    if len(fitting) > 1:
        best = min(map(rank, fitting))
        fitting = [image for image in fitting if rank(image) == best]
    return fitting[0] if len(fitting) == 1 else None
