"""Folders as they are found in the field: published parts, masks under many names, what is passed over."""

import io
import os
import time
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import LAYOUTS, SIDE, labels, tree
from PIL import Image

from datasets import DataConfig, load_data
from readers.images.decode import ImageLoader, decode_mask
from readers.images.masks import Placed, is_mask_folder, masks_beside, with_masks
from readers.items import Item
from utils import UserError

HALF = SIDE * SIDE // 2


def read(folder: Path, **flags):
    cache = folder.parent / 'cache'
    return load_data(DataConfig(**{'dataset': 'folder', 'image_size': SIDE, 'data': str(folder),
                                   'cache_dir': str(cache), **flags}))


def counts(data) -> dict:
    return dict(Counter((f['class'], f['part']) for f in data.split['files']))


def said(data, words: str) -> bool:
    return any(words in line for line in data.report)


def mask_pixels(data) -> dict:
    """The marked pixels of each anomalous image of the test part that has a mask."""
    batch, entries = data.test.items(range(len(data.test))), data.test.entries
    return {e.id: int(batch.mask[i].sum()) for i, e in enumerate(entries) if e.mask_row >= 0}


# ---------------------------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize('name', LAYOUTS)
def test_a_published_layout_keeps_its_parts_classes_masks_and_counts(name, tmp_path):
    published = LAYOUTS[name]
    data = read(tree(tmp_path / 'data', published.files), **published.flags)
    assert counts(data) == published.parts
    assert set(mask_pixels(data).values() if published.masks else ()) <= {HALF}
    assert sum(e.mask_row >= 0 for e in data.test.entries) == published.masks
    for words in published.said:
        assert said(data, words), data.report
    assert not said(data, 'not used, of no image') and not data.train.labels.any()


def test_a_fraction_that_is_asked_for_redraws_validation_but_never_the_test_part(tmp_path):
    root = tree(tmp_path / 'data', LAYOUTS['kermany'].files)
    asked = read(root, val_fraction=0.5)
    assert counts(asked) == {('NORMAL', 'train'): 11, ('NORMAL', 'val'): 11, ('NORMAL', 'test'): 5,
                             ('PNEUMONIA', 'test'): 7}
    with pytest.raises(UserError, match='the data have a test part of their own'):
        read(root, test_fraction=0.3)


# ------------------------------------------------------------------------------------------------------ masks

def as_png(pixels, mode=None, file_format='PNG', palette=None, **options) -> bytes:
    file = io.BytesIO()
    made = Image.fromarray(np.asarray(pixels))
    if palette:
        made = Image.new('P', made.size)
        made.putdata(np.asarray(pixels).ravel().tolist())
        made.putpalette(palette)
    (made.convert(mode) if mode else made).save(file, file_format, **options)
    return file.getvalue()


ROW = np.uint8([[0, 1, 2, 4]])
BLACK, RED, WHITE = (0, 0, 0), (255, 0, 0), (255, 255, 255)
HALVES = np.repeat(np.uint8([[0, 255]]), 16, 0).repeat(16, 1)
MASKS = {
    'labels': (as_png(ROW), 3),
    '16-bit labels': (as_png(ROW.astype(np.uint16)), 3),
    '32-bit labels': (as_png(ROW.astype(np.int32), file_format='TIFF'), 3),
    'negative labels': (as_png(np.int32([[0, -1, 2, 0]]), file_format='TIFF'), 2),
    'floats': (as_png(np.float32([[0, 0.25, 1, 0]]), file_format='TIFF'), 2),
    'one bit': (as_png(ROW * 255 > 0, '1'), 3),
    'colors': (as_png(np.uint8([[BLACK, RED, (0, 0, 1), WHITE]])), 3),
    'palette': (as_png(ROW, palette=[*BLACK, *RED, *WHITE, *BLACK, *RED]), 3),
    'palette of nothing but black': (as_png(ROW, palette=[0] * 15), 3),
    'palette on white': (as_png(ROW, palette=[*WHITE, *RED, *RED, *RED, *RED]), 3),
    'transparent ground': (as_png(np.uint8([[(*RED, 0), (*RED, 9), (*BLACK, 0), (*RED, 255)]])), 2),
    'black on transparent ground': (as_png(np.uint8([[(*BLACK, a) for a in (0, 255, 80, 0)]])), 2),
    'colors on opaque black': (as_png(np.uint8([[(*c, 255) for c in (BLACK, RED, BLACK, WHITE)]])), 2),
    'JPEG': (as_png(HALVES, file_format='JPEG', quality=60), 256),
    'nothing': (as_png(ROW * 0), 0),
}


@pytest.mark.parametrize('name', MASKS)
def test_every_value_of_a_mask_that_is_not_background_counts(name):
    data, marked = MASKS[name]
    mask = decode_mask(data)
    assert mask.dtype == bool and mask.ndim == 3 and mask.shape[2] == 1 and mask.sum() == marked


NAMES = {'x': 'x', 'x_mask': 'x', 'x_seg': 'x', 'X_LABEL': 'x', 'x_GT': 'x', 'x-segmentation': 'x',
         'x mask': 'x', 'x_ground_truth': 'x', 'x_seg_7': 'x_7', 'x_mask_2': 'x', 'x_flair_7': 'x_seg_7',
         'x_lesion': 'x', 'x.ROI2': 'x', 'x_lesion_mask': 'x_lesion', 'mask_x': 'x', 'mask_9': 'image_9',
         unicodedata.normalize('NFD', 'é_mask'): unicodedata.normalize('NFC', 'é')}


@pytest.mark.parametrize('mask', NAMES)
@pytest.mark.parametrize('folder', ['sick/masks/{}.png', 'ground_truth/sick/{}.png',
                                    'sick/Segmentation/{}.png', 'annotation/{}.PNG'])
def test_masks_are_found_by_the_usual_names(mask, folder, tmp_path):
    image = NAMES[mask]
    if 'flair' in mask:
        mask, image = image, mask
    root = tree(tmp_path / 'data', {'normal/{}.png': 8, f'sick/images/{image}.png': 1})
    path = root / folder.format(mask)
    path.parent.mkdir(parents=True)
    Image.fromarray(labels()).save(path)
    assert list(mask_pixels(read(root)).values()) == [HALF]


def test_a_mask_of_no_image_or_of_several_is_said(tmp_path):
    root = tree(tmp_path / 'data', {'normal/{}.png': 8, 'sick/{}.png': 2, 'ill/{}.png': 2,
                                    'masks/sick/{}.png': 1, 'masks/{}.png': 2, 'masks/other{}.png': 1})
    data = read(root)
    assert list(mask_pixels(data)) == ['sick/0.png']
    assert said(data, '3 masks not used, of no image or of several: masks/0.png; masks/1.png; masks/other0')
    assert said(data, '3 anomalous images without a mask count in no pixel metric')
    assert ('masks', 'test') not in counts(data)


def test_masks_that_mark_nothing_or_the_background_are_said(tmp_path):
    root = tree(tmp_path / 'data', {'normal/{}.png': 8, 'sick/{}.png': 2})
    (root / 'masks').mkdir()
    for name, value in (('0', 0), ('1', 255)):
        mask = np.full((SIDE, SIDE), value, np.uint8)
        mask[2:6, 3:7] = 0                                          # a lesion, if the background were white
        Image.fromarray(mask).save(root / 'masks' / f'{name}.png')
    data = read(root)
    assert said(data, '1 image with a mask that marks nothing at this size: sick/0.png')
    assert said(data, '1 image with a mask that marks all four corners (is its background 0?): sick/1.png')


def test_masks_of_many_images_of_one_name_are_found_at_once():
    images, masks = ([Placed(Item(name, 'sick', path=name), ('sick', f'p{i}'), 'scan')
                      for i in range(4000) for name in [f'sick/p{i}/{of}scan.png']] for of in ('', 'masks/'))
    began = time.process_time()
    items, lost = with_masks(images, masks, lambda name: False)
    assert not lost and items[7].masks == ('sick/p7/masks/scan.png',) and time.process_time() - began < 5


def test_what_counts_as_a_mask_by_its_name():
    assert all(map(is_mask_folder, ('masks', 'Mask', 'ground_truth', 'Ground Truth', 'annotation', 'labels')))
    assert not any(map(is_mask_folder, ('masked', 'images', 'normal', 'gtx', 'segments of lung')))
    names = ['a/x.png', 'a/x_mask.png', 'a/x_mask_1.jpg', 'b/x_mask.png', 'a/with_mask_7.png', 'a/x_2.png']
    assert masks_beside(names) == {'a/x_mask.png', 'a/x_mask_1.jpg'}


# ------------------------------------------------------------------------------------------------ passed over

def test_what_is_passed_over_is_counted_with_an_example(tmp_path):
    root = tree(tmp_path / 'data', {'normal/{}.png': 8, 'normal/{}.jfif': 2, 'normal/images/{}.png': 3,
                                    'sick/{}.png': 1, 'lost{}.png': 2, 'store/{}.png': 3})
    (root / 'store').rename(tmp_path / 'store')
    os.symlink(tmp_path / 'store', root / 'sick' / 'site2')
    (root / 'sick' / 'notes.txt').write_text('x')
    (root / 'normal' / '.DS_Store').write_text('x')
    (root / '__MACOSX').mkdir()
    (root / 'sick' / 'IM0001').write_bytes(bytes(128) + b'DICM')                    # cut off, and named
    with pytest.raises(UserError, match='sick/IM0001 is a DICOM file'):
        read(root)
    data = read(root, skip_corrupt=True)
    line = next(line for line in data.report if line.startswith('passed over'))
    for words in ('links to folders (1, such as sick/site2)',
                  'files of other kinds (1, such as sick/notes.txt)',
                  'hidden files and folders (2, such as __MACOSX)',
                  'images in no class folder (2, such as lost0.png)',
                  'images outside the folder images of their class (10, such as normal/0.jfif)'):
        assert words in line
    assert counts(data)[('normal', 'train')] == 2 and len(data.split['files']) == 4


def test_predictions_pass_over_masks_too(tmp_path):
    root = tree(tmp_path / 'data', {'a{}.png': 2, 'a{}_mask.png': 1, 'a{}_lesion.png': 1,
                                    'ground_truth/{}.png': 2})
    found = ImageLoader(SIDE, 1, 8).find(root)
    assert list(found.files) == ['a0.png', 'a1.png']
    (root / 'DICOMDIR').write_bytes(bytes(128) + b'DICM')
    assert list(ImageLoader(SIDE, 1, 8).find(root).files) == list(found.files), "it lists a medium"
    assert {kind: sorted(names) for kind, names in found.passed_over.items()} == {
        'masks and folders of masks': ['a0_lesion.png', 'a0_mask.png', 'ground_truth/0.png',
                                       'ground_truth/1.png']}


def test_folders_of_lesions_hold_masks_where_images_of_their_names_are_beside(tmp_path):
    root = tree(tmp_path / 'data', {'normal/{}.png': 8, 'sick/images/{}.png': 2, 'sick/lesions/{}.png': 1,
                                    'sick/rois/{}_roi_2.png': 2, 'ill/{}.png': 2, 'ill/{}.overlay.png': 2,
                                    'ill/overlay/{}.png': 1, 'lesion/rois/{}.png': 3})
    data = read(root)
    assert counts(data)[('sick', 'test')] == counts(data)[('ill', 'test')] == 2
    assert counts(data)[('lesion', 'test')] == 3, "of no image beside: images"
    assert list(mask_pixels(data)) == ['sick/images/0.png', 'sick/images/1.png']
    assert said(data, 'pictures laid over images (3, such as ill/0.overlay.png)')
    found = ImageLoader(SIDE, 1, 8).find(root).passed_over
    assert len(found['masks and folders of masks']) == len(found['pictures laid over images']) == 3


def test_suffixes_do_not_decide_what_a_file_is(tmp_path):
    root = tree(tmp_path / 'data', {'normal/{}.jfif': 8, 'sick/{}.JPE': 1})
    assert len(read(root).split['files']) == 9
    data = read(root, normal_classes=('normal',))
    assert torch.equal(data.test.items([0]).y, torch.tensor([0]))


def test_folders_of_other_masks_and_lone_masks_are_neither_images_nor_used(tmp_path):
    root = tree(tmp_path / 'data', {'normal/{}.png': 8, 'sick/{}.png': 2, 'sick/lung masks/{}.png': 2,
                                    'masks_png/sick/{}.png': 2, 'sick/odd_seg{}.png': 1})
    data = read(root)
    assert counts(data)[('sick', 'test')] == 3 and not mask_pixels(data)
    assert said(data, 'masks and folders of masks (3, such as masks_png)')
    assert said(data, '1 image with the name of a mask, of no image beside: sick/odd_seg0.png')
    named = read(root, normal_classes=('normal',), anomalous_classes=('masks_png',))
    assert counts(named)[('masks_png', 'test')] == 2, 'a class by its flag'


def test_a_test_part_without_normal_images_gets_some(tmp_path):
    root = tree(tmp_path / 'data', {'train/normal/{}.png': 20, 'test/sick/{}.png': 3})
    assert counts(read(root)) == {('normal', 'train'): 13, ('normal', 'val'): 3, ('normal', 'test'): 4,
                                  ('sick', 'test'): 3}


def test_links_to_class_folders_are_followed(tmp_path):
    root = tree(tmp_path / 'data', {'normal/{}.png': 8, 'sick/{}.png': 1})
    (root / 'normal').rename(tmp_path / 'elsewhere')
    os.symlink(tmp_path / 'elsewhere', root / 'normal')
    assert len(read(root).split['files']) == 9


def test_a_replaced_config_reads_the_same_files(tmp_path):
    data = read(tree(tmp_path / 'data', LAYOUTS['mvtec'].files))
    again = load_data(replace(data.config, split_seed=5), data.split)
    assert counts(again) == counts(data)
