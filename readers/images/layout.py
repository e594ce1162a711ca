"""What the files below a folder of images are: which class and part an image is of, and which are masks.

Names are relative to the root, with '/'.
"""

import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from readers.images.files import SUFFIXES, image_files
from readers.images.masks import IN_CLASS, Placed, is_mask_folder, is_of_masks, without_ending
from readers.items import Item
from readers.paths import MASKS, Passed, pass_over, subfolders
from readers.source import is_among, plain_name
from readers.split import noted
from utils import UserError

IMAGES = 'images'
PART_FOLDERS = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
                'test': 'test', 'testing': 'test'}
LOOSE, OUTSIDE = 'images in no class folder', f'images outside the folder {IMAGES} of their class'
APART = 'folders that are neither of a part nor of masks'


@dataclass
class Layout:
    """The images and masks below `root`, each in its place; folders of the names of classes are classes."""
    root: Path
    normal: Sequence[str] = ()
    anomalous: Sequence[str] = ()
    images: list[Placed] = field(default_factory=list)
    masks: list[Placed] = field(default_factory=list)
    flat: list[str] = field(default_factory=list)                # training images in no class folder
    classes: dict[str, str] = field(default_factory=dict)        # as they are spelled first, by plain_name
    notes: list[str] = field(default_factory=list)
    passed: Passed = field(default_factory=dict)

    def is_normal(self, class_name: str) -> bool:
        return is_among(class_name, self.normal)

    def read(self) -> None:
        """Finds all of it. Raises UserError for a class folder without images."""
        of_classes = any(self.is_normal(sub.name) for sub in subfolders(self.root))
        self.read_place('', '', {} if of_classes else PART_FOLDERS)
        if self.flat:
            normal = next(filter(self.is_normal, self.classes.values()), self.normal[0])
            self.images += self.placed(os.path.dirname(self.flat[0]), self.flat, 'train', normal)
            self.notes += noted(self.flat, 'image',
                                f'in no class folder of the training part count as {normal}')
        odd = [placed.item.id for placed in self.images if without_ending(placed.stem)]
        self.notes += noted(odd, 'image', 'with the name of a mask, of no image beside')

    def read_place(self, place: str, part: str, parts: Mapping[str, str]) -> None:
        """The folders and files in the folder `place`: it has the folders of `parts`, by their names in lower
        case, or those of the classes of one `part`; and either has folders of masks.
        """
        for sub in subfolders(self.root / place):
            name = posixpath.join(place, sub.name)
            named = not parts and is_among(sub.name, (*self.normal, *self.anomalous))
            if sub.name.lower() in parts:
                self.read_place(name, parts[sub.name.lower()], {})
            elif is_mask_folder(sub.name) and not named:
                for names in image_files(self.root, self.passed, name):
                    self.masks += self.placed(name, names, part, '')
            elif is_of_masks(sub.name) and not named:
                pass_over(self.passed, MASKS, name)
            elif parts:
                pass_over(self.passed, APART, name)
            else:
                self.read_class(name, sub.name, part)
        images, masks = image_files(self.root, self.passed, place, deep=False)
        pass_over(self.passed, MASKS, *masks)
        if part == 'train' and self.normal:
            self.flat += images
        else:
            pass_over(self.passed, LOOSE, *images)

    def read_class(self, place: str, name: str, part: str) -> None:
        images, masks = image_files(self.root, self.passed, place)
        folder = self.root / place
        if of_images := any(sub.name.lower() == IMAGES for sub in subfolders(folder)):
            inside = [image for image in images if image[len(place) + 1:].lower().startswith(f'{IMAGES}/')]
            pass_over(self.passed, OUTSIDE, *({*images} - {*inside}))
            images = inside
        if not images:
            if of_images or self.is_normal(name) or not any(folder.iterdir()):
                raise UserError(f"class folder {folder / IMAGES if of_images else folder} holds no image "
                                f"({', '.join(SUFFIXES)}): fill it or remove it.")
            self.notes.append(f"folder {place} holds no {', '.join(SUFFIXES)} file: it is not taken for a "
                              f"class")
        class_name = self.classes.setdefault(plain_name(name), name)
        self.images += self.placed(place, images, part, class_name)
        self.masks += self.placed(place, masks, part, class_name)

    def placed(self, place: str, names: Sequence[str], part: str, class_name: str) -> Iterator[Placed]:
        """Files below the folder `place` of a class, or of masks of no one class."""
        for name in names:
            folder, _, base = name[len(place) + 1:].rpartition('/')
            steps = steps_of(folder)
            own = PART_FOLDERS.get(steps[0].lower()) if steps and not (part or class_name) else None
            steps = steps[1:] if own else steps                               # of masks/test/<class>/x.png
            item = Item(name, class_name, own or part, path=f'{self.root}/{name}')
            yield Placed(item, (class_name, *steps) if class_name else steps, os.path.splitext(base)[0])


@lru_cache
def steps_of(folder: str) -> tuple[str, ...]:
    """The names in a path of folders, without those that only say what is in them."""
    return tuple(step for step in folder.split('/')
                 if step and not (IN_CLASS.match(step) or is_mask_folder(step)))
