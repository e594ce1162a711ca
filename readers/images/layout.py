"""What the files below a folder of images are: which class and part an image is of, and which are masks.

B images; names are relative to the root, with '/'.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from readers.images.decode import SUFFIXES, is_image_file
from readers.images.masks import Placed, is_mask_folder, is_of_masks, masks_beside, without_ending
from readers.items import Item
from readers.paths import FOREIGN, HIDDEN, MASKS, UNSEEN, Passed, files_below, pass_over, subfolders
from readers.source import plain_name, same_name
from readers.split import count, some
from utils import UserError

IMAGES = 'images'
IMAGE_FOLDERS = (IMAGES, 'image', 'imgs', 'img')            # say what is in them, and are no class
PART_FOLDERS = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
                'test': 'test', 'testing': 'test'}
LOOSE, OUTSIDE = 'images in no class folder', f'images outside the folder {IMAGES} of their class'
APART = 'folders that are neither of a part nor of masks'


def image_files(folder: Path, passed: Passed) -> tuple[list[str], list[str]]:
    """The images and the masks below a folder, at any depth, each as sorted paths relative to it with '/';
    other files go to `passed`. Raises UserError for a folder that cannot be read.
    """
    found = files_below(folder, is_image_file, passed,
                        lambda name: is_of_masks(name) and not is_mask_folder(name))
    beside = masks_beside(found)
    masks = {name for name in found
             if name in beside or any(map(is_mask_folder, name.split('/')[:-1]))}
    return [name for name in found if name not in masks], sorted(masks)


@dataclass
class Layout:
    """The images and masks below `root`, each in its place; folders of the names of classes are classes."""
    root: Path
    normal: Sequence[str]
    anomalous: Sequence[str]
    images: list[Placed] = field(default_factory=list)
    masks: list[Placed] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)        # as they are spelled first, by plain_name
    notes: list[str] = field(default_factory=list)
    passed: Passed = field(default_factory=dict)

    def is_normal(self, class_name: str) -> bool:
        return any(same_name(class_name, name) for name in self.normal)

    def read(self) -> None:
        """Finds all of it. Raises UserError for a class folder without images."""
        self.read_parts()
        if odd := [placed.item.id for placed in self.images if without_ending(placed.stem)]:
            self.notes.append(f'{count(len(odd), "image")} with the name of a mask, of no image beside: '
                              f'{some(odd)}')

    def read_parts(self) -> None:
        subs = subfolders(self.root)
        if any(self.is_normal(sub.name) for sub in subs):
            self.read_classes(self.root, '')
            return
        flat = []
        for sub in subs:
            if part := PART_FOLDERS.get(sub.name.lower()):
                flat += self.read_classes(sub, part)
            elif is_mask_folder(sub.name):
                self.add_masks(sub, '')
            else:
                pass_over(self.passed, MASKS if is_of_masks(sub.name) else APART, sub.name)
        self.read_loose(self.root, '')
        if flat:
            normal = next(filter(self.is_normal, self.classes.values()), self.normal[0])
            self.images += self.placed(self.root, flat, 'train', normal)
            self.notes.append(f'{count(len(flat), "image")} in no class folder of the training part count as '
                              f'{normal}: {some(flat)}')

    def read_classes(self, place: Path, part: str) -> list[str]:
        """The class folders of a part, or of the root; returns training images that lie in none."""
        for sub in subfolders(place):
            named = any(same_name(sub.name, name) for name in (*self.normal, *self.anomalous))
            if named or not is_of_masks(sub.name):
                self.read_class(sub, part)
            elif is_mask_folder(sub.name):
                self.add_masks(sub, part)
            else:
                pass_over(self.passed, MASKS, self.named(sub))
        return self.read_loose(place, part)

    def read_class(self, folder: Path, part: str) -> None:
        images, masks = self.files(folder)
        of_images = any(sub.name.lower() == IMAGES for sub in subfolders(folder))
        if of_images:
            apart = [name for name in images if name.split('/')[0].lower() != IMAGES]
            pass_over(self.passed, OUTSIDE, *(self.named(folder, name) for name in apart))
            images = [name for name in images if name.split('/')[0].lower() == IMAGES]
        if not images:
            if of_images or self.is_normal(folder.name) or not any(folder.iterdir()):
                raise UserError(f"class folder {folder / IMAGES if of_images else folder} holds no image "
                                f"({', '.join(SUFFIXES)}): fill it or remove it.")
            self.notes.append(f"folder {self.named(folder)} holds no {', '.join(SUFFIXES)} file: it is not "
                              f"taken for a class")
        class_name = self.classes.setdefault(plain_name(folder.name), folder.name)
        self.images += self.placed(folder, images, part, class_name)
        self.masks += self.placed(folder, masks, part, class_name)

    def add_masks(self, folder: Path, part: str) -> None:
        """All images in a folder of masks that stands beside the classes or the parts."""
        for names in self.files(folder):
            self.masks += self.placed(folder, names, part, '')

    def read_loose(self, place: Path, part: str) -> list[str]:
        """Files that lie in no class folder; returns the images if they are of the training part."""
        everything = sorted(place.iterdir())
        hidden = [p for p in everything if p.name.startswith(UNSEEN)]
        loose = [p for p in everything if p.is_file() and p not in hidden]
        images = [p for p in loose if is_image_file(str(p))]
        pass_over(self.passed, HIDDEN, *map(self.named, hidden))
        pass_over(self.passed, FOREIGN, *map(self.named, sorted({*loose} - {*images})))
        if part == 'train':
            return [self.named(p) for p in images]
        pass_over(self.passed, LOOSE, *(self.named(p) for p in images))
        return []

    def files(self, folder: Path) -> tuple[list[str], list[str]]:
        passed: Passed = {}
        found = image_files(folder, passed)
        for kind, names in passed.items():
            pass_over(self.passed, kind, *(self.named(folder, name) for name in names))
        return found

    def named(self, folder: Path, name: str = '') -> str:
        return '/'.join(step for step in (folder.relative_to(self.root).as_posix(), name)
                        if step not in ('', '.'))

    def placed(self, folder: Path, names: Sequence[str], part: str, class_name: str) -> Iterator[Placed]:
        """Files below a class folder, or below a folder of masks of no one class."""
        above, place, first = self.named(folder), os.path.join(folder, ''), [class_name] * bool(class_name)
        for name in names:
            *folders, base = name.split('/')
            own = PART_FOLDERS.get(folders[0].lower()) if folders and not (part or class_name) else None
            steps = [step for step in folders[bool(own):]                     # of masks/test/<class>/x.png
                     if step.lower() not in IMAGE_FOLDERS and not is_mask_folder(step)]
            item = Item(f'{above}/{name}' if above else name, class_name, own or part, path=place + name)
            yield Placed(item, item.part, (*first, *steps), os.path.splitext(base)[0])
