"""Published data sets of medical anomaly detection, a few images large, in the folders in which they come.

    tree(folder, LAYOUTS['kermany'].files)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from standins import image

SIDE = 16


def tree(folder: Path, files: Mapping[str, int]) -> Path:
    """`number` images of each name with a {} in it; those of masks have labels 1, 2 and 4 in 8 rows of 16."""
    for place, (name, number) in enumerate(files.items()):
        for i in range(number):
            path = folder / name.format(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = labels() if is_mask(name) else image(1000 * place + i, SIDE, SIDE, 1)[..., 0]
            Image.fromarray(pixels).save(path, 'JPEG' if path.suffix == '.jpeg' else 'PNG')
    return folder


def is_mask(name: str) -> bool:
    return any(word in name for word in ('mask', 'label', 'ground_truth', 'annotation'))


def labels() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:2], mask[2:4], mask[4:8] = 1, 2, 4
    return mask


@dataclass(frozen=True)
class Published:
    """The files; the images of each (class, part) after training on it; anomalous images with masks."""
    files: dict[str, int]
    parts: dict[tuple[str, str], int]
    masks: int = 0
    said: tuple[str, ...] = ()
    flags: dict = field(default_factory=dict)


LAYOUTS = {
    'mvtec': Published(
        {'bottle/train/good/{:03d}.png': 20, 'bottle/test/good/{:03d}.png': 4,
         'bottle/test/crack/{:03d}.png': 3, 'bottle/test/hole/{:03d}.png': 2,
         'bottle/ground_truth/crack/{:03d}_mask.png': 3,
         'bottle/ground_truth/hole/{:03d}_mask.png': 2},
        {('good', 'train'): 17, ('good', 'val'): 3, ('good', 'test'): 4, ('crack', 'test'): 3,
         ('hole', 'test'): 2}, masks=5),
    'mvtec_loco': Published(
        {'bag/train/good/{:03d}.png': 20, 'bag/validation/good/{:03d}.png': 4, 'bag/test/good/{:03d}.png': 5,
         'bag/test/logical_anomalies/{:03d}.png': 3, 'bag/test/structural_anomalies/{:03d}.png': 2,
         'bag/ground_truth/logical_anomalies/{:03d}/000.png': 3,
         'bag/ground_truth/logical_anomalies/000/{:03d}.png': 2,
         'bag/ground_truth/structural_anomalies/{:03d}/000.png': 2},
        {('good', 'train'): 20, ('good', 'val'): 4, ('good', 'test'): 5, ('logical_anomalies', 'test'): 3,
         ('structural_anomalies', 'test'): 2}, masks=5),
    'bmad_brain': Published(
        {'Brain/train/good/img/{:05d}_60.png': 20, 'Brain/valid/good/img/{:05d}_61.png': 5,
         'Brain/valid/Ungood/img/{:05d}_62.png': 4, 'Brain/valid/Ungood/label/{:05d}_62.png': 4,
         'Brain/test/good/img/{:05d}_63.png': 6, 'Brain/test/Ungood/img/{:05d}_64.png': 7,
         'Brain/test/good/label/{:05d}_63.png': 6, 'Brain/test/Ungood/label/{:05d}_64.png': 7},
        {('good', 'train'): 20, ('good', 'val'): 5, ('good', 'test'): 6, ('Ungood', 'test'): 7}, masks=7,
        said=('4 images of anomalous classes in a published part for training or validation left out',
              '6 images of normal classes with a mask, which is not used')),
    'bmad_histology': Published(
        {'camelyon16/train/good/{}.png': 20, 'camelyon16/valid/good/{}.png': 5,
         'camelyon16/valid/Ungood/{}.png': 4, 'camelyon16/test/good/{}.png': 6,
         'camelyon16/test/Ungood/{}.png': 7},
        {('good', 'train'): 20, ('good', 'val'): 5, ('good', 'test'): 6, ('Ungood', 'test'): 7}),
    'kermany': Published(
        {'chest_xray/train/NORMAL/IM-{:04d}-0001.jpeg': 20, 'chest_xray/val/NORMAL/NORMAL2-{}.jpeg': 2,
         'chest_xray/train/PNEUMONIA/person{}_bacteria_1.jpeg': 9,
         'chest_xray/val/PNEUMONIA/person19{}_virus.jpeg': 2, 'chest_xray/test/NORMAL/IM-{:04d}.jpeg': 5,
         'chest_xray/test/PNEUMONIA/person{}_virus_6.jpeg': 7,
         'chest_xray/chest_xray/test/NORMAL/{}.jpeg': 2},
        {('NORMAL', 'train'): 20, ('NORMAL', 'val'): 2, ('NORMAL', 'test'): 5, ('PNEUMONIA', 'test'): 7},
        said=('11 images of anomalous classes in a published part for training or validation left out',
              'passed over: folders that are neither of a part nor of masks (1, such as chest_xray)',
              'the given validation part has 2 normal images: thresholds are coarse')),
    'oct2017': Published(
        {'OCT2017 /train/NORMAL/NORMAL-{}-1.jpeg': 20, 'OCT2017 /train/CNV/CNV-{}-1.jpeg': 3,
         **{f'OCT2017 /test/{name}/{name}-{{}}-2.jpeg': 2 for name in ('NORMAL', 'CNV', 'DME', 'DRUSEN')}},
        {('NORMAL', 'train'): 17, ('NORMAL', 'val'): 3, ('NORMAL', 'test'): 2, ('CNV', 'test'): 2,
         ('DME', 'test'): 2, ('DRUSEN', 'test'): 2}),
    'brats_slices': Published(
        {'BraTS2021/train/BraTS2021_{:05d}_flair_80.png': 20,
         'BraTS2021/test/normal/BraTS2021_{:05d}_flair_90.png': 4,
         'BraTS2021/test/tumor/BraTS2021_{:05d}_flair_95.png': 5,
         'BraTS2021/test/annotation/BraTS2021_{:05d}_seg_95.png': 5},
        {('normal', 'train'): 17, ('normal', 'val'): 3, ('normal', 'test'): 4, ('tumor', 'test'): 5}, masks=5,
        said=('20 images in no class folder of the training part count as normal',)),
    'brain_tumor_mri': Published(
        {'Training/notumor/Tr-no_{:04d}.jpg': 20, 'Training/glioma/Tr-gl_{:04d}.jpg': 3,
         'Testing/notumor/Te-no_{:04d}.jpg': 4, 'Testing/glioma/Te-gl_{:04d}.jpg': 5},
        {('notumor', 'train'): 17, ('notumor', 'val'): 3, ('notumor', 'test'): 4, ('glioma', 'test'): 5},
        flags={'normal_classes': ('notumor',)}),
    'busi': Published(
        {'normal/normal ({}).png': 20, 'normal/normal ({})_mask.png': 20, 'benign/benign ({}).png': 5,
         'benign/benign ({})_mask.png': 5, 'benign/benign ({})_mask_1.png': 2,
         'malignant/malignant ({}).png': 3, 'malignant/malignant ({})_mask.png': 3},
        {('normal', 'train'): 13, ('normal', 'val'): 3, ('normal', 'test'): 4, ('benign', 'test'): 5,
         ('malignant', 'test'): 3}, masks=8, said=('20 images of normal classes with a mask',)),
}
