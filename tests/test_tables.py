"""Data sets that one file describes: tables as they are published, made as small files, and npz arrays."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from layouts import LAYOUTS, SIDE, tree
from pydicom.dataset import FileDataset, FileMetaDataset
from standins import image
from test_layouts import HALF, counts, mask_pixels, read, said

from datasets import DataConfig, load_data
from readers.images.tables import read_table
from scripts.create_lmdb import FolderConfig, pack, plan
from storage.limits import VARIABLE
from utils import UserError, read_json


def write(path: Path, *lines: str, encoding: str = 'utf-8') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n', encoding=encoding)
    return path


def dicom(path: Path, seed: int) -> None:
    """A DICOM file of 16 x 16 gray pixels."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = '1.2.3'
    made = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    made.Rows = made.Columns = SIDE
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, 'MONOCHROME2', 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 8, 8, 7
    made.PixelData = image(seed, SIDE, SIDE, 1).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)


# ------------------------------------------------------------------------------------------ published tables

def test_rsna_dicom_files_with_several_rows_an_image(tmp_path):
    rows, boxes = [], []
    for i in range(14):
        dicom(tmp_path / 'data' / 'stage_2_train_images' / f'{i:04d}-ab.dcm', i)
        name = 'Normal' if i < 10 else 'Lung Opacity' if i < 13 else 'No Lung Opacity / Not Normal'
        rows += [f'{i:04d}-ab,{name}'] * (2 if name == 'Lung Opacity' else 1)       # one for each box
        ill = name == 'Lung Opacity'
        found = ['1.0,2.0,3.0,4.0,1', '10,12,6.0,4,1'] if ill else [',,,,0']
        boxes += [f'{i:04d}-ab,{box}' for box in found]
    table = write(tmp_path / 'data' / 'stage_2_detailed_class_info.csv', 'patientId,class', *rows)
    more = write(tmp_path / 'data' / 'stage_2_train_labels.csv', 'patientId,x,y,width,height,Target', *boxes)
    data = read(table, images=str(tmp_path / 'data' / 'stage_2_train_images'), columns=('path=patientId',),
                normal_classes=('Normal',), tables=(str(more),))
    assert set(mask_pixels(data).values()) == {3 * 4 + 6 * 4}, "both boxes, of 16 x 16 pixels"
    places = data.test.items([next(i for i, e in enumerate(data.test.entries) if e.mask_row >= 0)]).mask[0, 0]
    assert places[2:6, 1:4].all() and places[12:, 10:].all()
    packed = tmp_path / 'rsna.lmdb'
    pack(plan(FolderConfig(**vars(data.config))), packed, 1, False)
    assert mask_pixels(load_data(DataConfig(dataset='folder', data=str(packed), image_size=SIDE,
                                            normal_classes=('Normal',)))) == mask_pixels(data)
    assert counts(data) == {('Normal', 'train'): 6, ('Normal', 'val'): 2, ('Normal', 'test'): 2,
                            ('Lung Opacity', 'test'): 3, ('No Lung Opacity / Not Normal', 'test'): 1}
    assert data.split['files'][0]['id'] == '0000-ab.dcm' and not said(data, 'passed over')


def test_vindr_three_readers_an_image(tmp_path):
    rows = []
    for i in range(12):
        dicom(tmp_path / 'data' / 'train' / f'{i:04d}.dicom', i)
        rows += [f'{i:04d},No finding,R{k},nan,,,' if i < 9 or k == 0 else f'{i:04d},Mass,R{k},2,{k},7,9'
                 for k in range(3)]
    columns = 'image_id,class_name,rad_id,x_min,y_min,x_max,y_max'
    table = write(tmp_path / 'data' / 'train.csv', columns, *rows)
    data = read(table, columns=('path=image_id', 'class=class_name'), normal_classes=('No finding',))
    assert data.anomalous_classes == ('Mass',) and data.test.labels.sum() == 3
    assert set(mask_pixels(data).values()) == {5 * 8}, "the union of two readers' boxes"
    assert said(data, '3 images of several classes count as their first anomalous one: train/0009.dicom')


def test_medianomaly_lists_files_by_part_and_label(tmp_path):
    root = tree(tmp_path / 'data', {'images/n{}.png': 24, 'images/a{}.png': 5, 'images/spare{}.png': 1})
    (root / 'data.json').write_text(json.dumps({
        'train': {'0': [f'n{i}.png' for i in range(20)], '1': []},
        'test': {'0': [f'n{i}.png' for i in range(20, 24)], '1': [f'a{i}.png' for i in range(5)]}}))
    data = read(root / 'data.json')
    assert counts(data) == {('normal', 'train'): 17, ('normal', 'val'): 3, ('normal', 'test'): 4,
                            ('anomalous', 'test'): 5}
    assert said(data, 'passed over: images that the table does not name (1, such as images/spare0.png)')


def test_isic_has_a_column_for_each_class(tmp_path):
    root = tree(tmp_path / 'data', {'Input/ISIC_{:07d}.jpg': 12})
    kinds = ['0.0,1.0,0.0'] * 9 + ['1.0,0.0,0.0'] * 2 + ['0.0,0.0,0.0']
    rows = [f'ISIC_{i:07d},{kind}' for i, kind in enumerate(kinds)]
    table = write(root / 'GroundTruth.csv', 'image,MEL,NV,BCC', *rows)
    data = read(table, images=str(root / 'Input'), columns=('path=image',),
                class_columns=('MEL', 'NV', 'BCC'), normal_classes=('NV',))
    assert data.anomalous_classes == ('MEL',) and len(data.split['files']) == 11
    assert said(data, 'left out: 1 row without an image or a class: row 12')


def test_chexpert_names_folders_above_and_leaves_uncertain_findings(tmp_path):
    root = tree(tmp_path / 'CheXpert-v1.0-small', {'train/patient{:05d}/study1/view1_frontal.jpg': 10})
    rows = [f'CheXpert-v1.0-small/train/patient{i:05d}/study1/view1_frontal.jpg,'
            + ('1.0,,' if i < 8 else ',-1.0,1.0') for i in range(10)]
    table = write(root / 'train.csv', 'Path,No Finding,Edema,Pneumonia', *rows)
    data = read(table, class_columns=('No Finding', 'Edema', 'Pneumonia'), normal_classes=('No Finding',))
    assert data.anomalous_classes == ('Pneumonia',) and data.test.labels.sum() == 2
    patients = load_data(replace(data.config, patient_pattern=r'(patient\d+)/'))
    assert patients.split['files'][3]['patient'] == 'patient00003'


def test_nih_takes_the_first_of_several_findings(tmp_path):
    root = tree(tmp_path / 'data', {'images_001/images/{:08d}_000.png': 6,
                                    'images_002/images/1{:07d}_000.png': 4})
    rows = [f'{i:08d}_000.png,No Finding,{i // 2}' for i in range(6)]
    rows += [f'1{i:07d}_000.png,Mass|Nodule,{9 + i}' for i in range(4)]
    table = write(root / 'Data_Entry_2017.csv', 'Image Index,Finding Labels,Patient ID', *rows)
    data = read(table, columns=('path=Image Index', 'class=Finding Labels', 'patient=Patient ID'),
                normal_classes=('No Finding',), val_fraction=0.3, test_fraction=0.3)
    assert data.anomalous_classes == ('Mass',)
    places = {}
    for file in data.split['files']:
        places.setdefault(file['patient'], set()).add(file['part'])
    assert len(places) == 7 and all(len(parts) == 1 for parts in places.values())


def test_medmnist_keeps_its_three_parts(tmp_path):
    def images(first, number):
        return np.stack([image(first + i, 28, 28, 1)[..., 0] for i in range(number)])

    labels = {'train': np.uint8([[0]] * 12 + [[1]] * 5), 'val': np.uint8([[0], [0], [1]]),
              'test': np.uint8([[0]] * 4 + [[1]] * 6)}
    path = tmp_path / 'pneumoniamnist.npz'
    np.savez_compressed(path, **{f'{part}_labels': y for part, y in labels.items()},
                        train_images=images(0, 17), val_images=images(100, 3), test_images=images(200, 10))
    data = read(path, normal_classes=('0',), image_size=28)
    assert counts(data) == {('0', 'train'): 12, ('0', 'val'): 2, ('0', 'test'): 4, ('1', 'test'): 6}
    assert said(data, '6 images of anomalous classes in a published part')
    assert np.array_equal(np.rint(data.train.items([5]).x[0, 0].numpy() * 255), image(5, 28, 28, 1)[..., 0])
    many = tmp_path / 'chestmnist.npz'
    np.savez(many, train_images=images(0, 8), train_labels=np.uint8([[0, 0]] * 8), test_images=images(50, 2),
             test_labels=np.uint8([[0, 1], [1, 1]]))
    assert read(many, normal_classes=('none',)).anomalous_classes == ('0', '1')
    np.savez(many, train_images=np.zeros((2, 8, 8, 8), np.uint8), train_labels=np.zeros(2, np.uint8))
    with pytest.raises(UserError, match='expected images in 2D'):
        read(many, normal_classes=('0',))
    for shape, words in {(0, 8, 8): "class '0' is not in", (2, 0, 8): 'train/00000 has no pixels'}.items():
        np.savez(many, train_images=np.zeros(shape, np.uint8), train_labels=np.zeros(shape[0], np.uint8))
        with pytest.raises(UserError, match=words):
            read(many, normal_classes=('0',))


# ---------------------------------------------------------------------------------------------- own manifests

@pytest.fixture
def listed(tmp_path):
    """24 normal and 6 anomalous images in one folder, masks in another, and the rows of a table of them."""
    root = tree(tmp_path / 'data', {'all/{}.png': 30, 'masks/{}_mask.png': 30})
    parts = ['train'] * 16 + ['val'] * 4 + ['test'] * 10
    return root, [{'path': f'all/{i}.png', 'class': 'good' if i < 24 else 'crack', 'part': parts[i],
                   'mask': f'masks/{i}_mask.png' if i >= 24 else '', 'patient': f'p{i // 2}'}
                  for i in range(30)]


@pytest.mark.parametrize('found', [{'test': {'0': 5}}, {'test': {'0': 'a.png'}}, {'test': ['a.png']}, 5, [5]],
                         ids=str)
def test_json_of_another_kind_is_named(found, tmp_path):
    (tmp_path / 'data.json').write_text(json.dumps(found))
    with pytest.raises(UserError, match=r'data.json cannot be read \(expected a list of rows'):
        read(tmp_path / 'data.json')


@pytest.mark.parametrize('kind', ['csv', 'semicolon.csv', 'tsv', 'utf-16.csv', 'json'])
def test_a_manifest_says_class_part_mask_and_patient(listed, kind):
    root, rows = listed
    delimiter = {'tsv': '\t', 'semicolon.csv': ';'}.get(kind, ',')
    table = root / f'table.{kind}'
    if kind == 'json':
        table.write_text(json.dumps(rows))
    else:
        write(table, *(delimiter.join(row) for row in [list(rows[0]), *(row.values() for row in rows)]),
              encoding='utf-16' if 'utf-16' in kind else 'utf-8-sig')
    data = read(table)
    assert counts(data) == {('good', 'train'): 16, ('good', 'val'): 4, ('good', 'test'): 4,
                            ('crack', 'test'): 6}
    assert list(mask_pixels(data).values()) == [HALF] * 6
    assert data.train.entries[0].patient == 'p0' and data.split['made_of']['flags']['data'] == str(table)


def test_a_label_of_0_makes_an_image_normal(listed):
    root, rows = listed
    table = write(root / 'table.csv', 'Path,Label,class', *(f"{row['path']},{int(i >= 24)},{i % 2}"
                                                             for i, row in enumerate(rows)))
    data = read(table, columns=('class=class',))
    assert data.normal_classes == ('normal',) and set(data.anomalous_classes) == {'0', '1'}
    assert len(data.test.labels) == 5 + 6


@pytest.mark.parametrize('lines, flags, words', [
    (['path,class', 'all/0.png,good', 'gone.png,good'], {}, '1 row of images that are not below .*gone.png'),
    (['file,class', 'all/0.png,good'], {}, 'has no column of paths: found file, class. Say which'),
    (['path,kind', 'all/0.png,good'], {}, 'has no column of a class'),
    (['path,class', 'all/0.png,good'], {'columns': ('path=file',)}, "no column 'file': found path, class"),
    (['path,class', 'all/0.png,good'], {'columns': ('image=path',)}, 'expected NAME=COLUMN'),
    (['path,class,part', 'all/0.png,good,fold 3'], {}, "row 1: the part 'fold 3' is none of train"),
    (['path,label', 'all/0.png,maybe'], {}, "row 1: the label 'maybe' is none of 0"),
    (['path,class,mask', 'all/0.png,good,no.png'], {}, "there is no mask 'no.png'"),
    (['path,class,mask,x,y,width,height', 'all/0.png,good,no.png,1,2,3,4'], {}, "there is no mask 'no.png'"),
    (['path,class,label', 'all/0.png,good,1'], {}, "label '1' says anomalous, the class 'good' is normal"),
    (['path,class', 'all/0.png,good', 'b/0.png,crack'], {}, r'1 row of images that are not below .*b/0\.png'),
    (['path,class', '1/0.png,good', '11/0.png,crack'], {'images': 'all'}, "'11/0.png' and .* would both be"),
    (['path,kind', 'all/0.png,good'], {'data': './table.csv'}, 'has no column of a class'),
    (['path,class,part', 'all/0.png,good,train', 'all/0.png,good,test'], {}, 'rows of different parts'),
    (['path,class,x,y,width,height', 'all/0.png,good,1,2,3,'], {}, "width, height are '1', '2', '3', ''"),
    (['path,class', 'all/0.png,good'], {'tables': ('fold=a.csv',)}, 'with train, val or test'),
])
def test_a_mistake_in_a_table_is_one_clear_line(listed, lines, flags, words, monkeypatch):
    monkeypatch.chdir(listed[0])
    with pytest.raises(UserError, match=words) as error:
        read(write(listed[0] / 'table.csv', *lines), **flags)
    assert '\n' not in str(error.value)


def test_a_box_beyond_the_image_is_of_another_size(listed):
    root, rows = listed
    table = write(root / 'table.csv', 'path,class,x,y,width,height,part',
                  *(f"{row['path']},good,,,,,train" for row in rows[:20]),
                  f"{rows[24]['path']},crack,4,4,20,4,test")
    with pytest.raises(UserError, match=r'is 16 x 16 pixels, its box of 20 x 4 at \(4, 4\) is empty'):
        read(table)


def test_tables_of_the_parts(listed):
    root, rows = listed
    first = write(root / 'train.csv', 'path,class,width,height',
                  *(f"{r['path']},good,9,9" for r in rows[:20]))
    last = write(root / 'last.csv', 'path,class', *(f"{r['path']},{r['class']}" for r in rows[20:]))
    data = read(first, tables=(f'test={last}',))
    assert counts(data) == {('good', 'train'): 17, ('good', 'val'): 3, ('good', 'test'): 4,
                            ('crack', 'test'): 6}
    assert not mask_pixels(data), "a width and a height without a place are no box"


def test_each_table_names_the_images_beside_it_first(tmp_path):
    rows = {}
    for place, (part, name) in enumerate((('a', 'normal'), ('b', 'sick'))):
        tree(tmp_path / 'data' / part, {'imgs/{}.png': 9})
        rows[part] = write(tmp_path / 'data' / part / 'table.csv', 'path,class',
                           *(f'imgs/{i + 3 * place}.png,{name}' for i in range(6)))
    data = read(rows['a'], tables=(f"test={rows['b']}",))
    own = {e.id: Path(e.path).relative_to(tmp_path / 'data').parts[0]
           for part in (data.train, data.val, data.test) for e in part.entries}
    assert own == {f'imgs/{i}.png': 'a' for i in range(6)} | {f'b/imgs/{i}.png': 'b' for i in range(3, 9)}


def test_flags_of_tables_do_nothing_for_folders_and_arrays(tmp_path):
    root = tree(tmp_path / 'data', {'normal/{}.png': 8, 'sick/{}.png': 2})
    np.savez(tmp_path / 'a.npz', train_images=np.zeros((9, 8, 8), np.uint8), train_labels=np.zeros(9, int))
    with pytest.raises(UserError, match='--columns: it says how to read a table'):
        read(tmp_path / 'a.npz', normal_classes=('0',), columns=('path=file',))
    with pytest.raises(UserError, match='--images: it says how to read a table'):
        read(root, images=str(root))


def test_images_that_are_not_there_are_counted_once(listed):
    root, rows = listed
    table = write(root / 'table.csv', 'path,class', *(f"{row['path']},{row['class']}" for row in rows),
                  *(f'gone{i}.png,good' for i in range(9)))
    assert said(read(table, skip_corrupt=True), 'left out: 9 rows of images that are not there: gone0.png')


# --------------------------------------------------------------------------------------- packed, and replaced

@pytest.mark.parametrize('name', ['mvtec', 'busi', 'brats_slices'])
def test_an_lmdb_keeps_parts_and_masks(name, tmp_path):
    root = tree(tmp_path / 'data', LAYOUTS[name].files)
    folder = read(root)
    pack(plan(FolderConfig(data=str(root))), tmp_path / 'all.lmdb', 1, False)
    packed = read(tmp_path / 'all.lmdb')
    assert counts(packed) == counts(folder) == LAYOUTS[name].parts
    assert mask_pixels(packed) == mask_pixels(folder) and len(mask_pixels(folder)) == LAYOUTS[name].masks


def test_an_lmdb_is_made_of_a_table(listed):
    root, rows = listed
    table = write(root / 'table.csv', *(','.join(row) for row in [[*rows[0]], *(r.values() for r in rows)]))
    pack(plan(FolderConfig(data=str(table))), root / 'all.lmdb', 1, False)
    assert counts(read(root / 'all.lmdb')) == counts(read(table))


def test_an_lmdb_is_made_of_arrays(tmp_path):
    path, labels = tmp_path / 'a.npz', np.uint8([0, 0, 0, 0, 1])
    pixels = np.stack([image(i, 28, 28, 1)[..., 0] for i in range(5)])
    np.savez(path, train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)
    flags = {'normal_classes': ('0',), 'image_size': 28}
    pack(plan(FolderConfig(data=str(path), **flags)), tmp_path / 'a.lmdb', 1, False)
    assert counts(read(tmp_path / 'a.lmdb', **flags)) == counts(read(path, **flags))


def test_a_file_replaced_with_the_same_size_and_time_is_noticed(tmp_path):
    root = tree(tmp_path / 'data', {'normal/{}.bmp': 8, 'sick/{}.bmp': 2})
    data = read(root)
    path = root / 'normal' / '0.bmp'
    before, old = path.stat(), path.read_bytes()
    path.write_bytes(old[:-4] + bytes(255 - value for value in old[-4:]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(UserError, match=r'1 file changed since the run.*normal/0\.bmp'):
        load_data(data.config, data.split)


def test_patients_that_a_table_changes_are_noticed(listed):
    root, rows = listed
    for patients in (range(30), [0] * 4 + [*range(1, 27)]):
        table = write(root / 'table.csv', 'path,class,patient',
                      *(f"{row['path']},{row['class']},p{patient}" for row, patient in zip(rows, patients)))
        data = read(table)
        assert {e.patient for e in data.test.entries} <= {f'p{patient}' for patient in patients}
    assert len({part for file, part in ((f['patient'], f['part']) for f in data.split['files'])
                if file == 'p0'}) == 1


def test_a_file_that_can_be_read_now_is_no_longer_left_out(tmp_path, monkeypatch):
    root = tree(tmp_path / 'data', {'normal/{}.png': 8, 'sick/{}.png': 2})
    monkeypatch.setenv(VARIABLE, '0.000001')
    with pytest.raises(UserError, match=r'10 files of 10 cannot be used: .*Raise --max_gb'):
        read(root)
    monkeypatch.setenv(VARIABLE, '1')
    assert len(read(root).split['files']) == 10


def test_cache_and_split_say_what_they_were_made_of(tmp_path):
    root = tree(tmp_path / 'data', {'normal/{}.png': 8, 'sick/{}.png': 2, 'lost.png': 1})
    data = read(root)
    assert data.split['made_of'] == {
        'flags': {'data': str(root), 'image_size': SIDE}, 'unreadable': 0,
        'notes': ['passed over: images in no class folder (1, such as lost.png)']}
    (made,) = (read_json(path) for path in (tmp_path / 'cache').glob('*/made_of.json'))
    assert made['images'] == str(root) and made['size'] == SIDE and len(made['files']) == 10
    assert isinstance(data.config, DataConfig)


def test_missing_values_are_no_classes_unless_named(tmp_path):
    """'nan' and the like are what programs write for an empty cell; None may be the name of a class."""
    root = tree(tmp_path / 'data', {'a{}.png': 10})
    words = ['nan', 'NA', 'None', 'null'] + ['normal'] * 4 + ['sick'] * 2
    rows = [f'a{i}.png,{word},nan' for i, word in enumerate(words)]
    table = write(root / 'table.csv', 'path,class,patient', *rows)
    data = read(table)
    assert data.anomalous_classes == ('sick',) and said(data, 'left out: 4 rows without an image or a class')
    assert not any(entry.patient for entry in data.train.entries)
    assert read(table, normal_classes=('None', 'normal')).normal_classes == ('None', 'normal')


@pytest.mark.parametrize('start', [b'PK\3\4', b'\xd0\xcf\x11\xe0'])
def test_a_spreadsheet_is_called_one(tmp_path, start):
    (tmp_path / 'table.xlsx').write_bytes(start + bytes(100))
    with pytest.raises(UserError, match=r'table.xlsx is a spreadsheet or an archive.*as CSV'):
        read(tmp_path / 'table.xlsx')


@pytest.mark.parametrize('header, extra, words', [
    (' Path , class', ',', ''), ('path,class,class', ',sick', "two columns 'class'"),
    ('path,class', ', of the left lung', 'row 1 has more cells')])
def test_cells_that_no_column_is_known_of_are_refused(header, extra, words, tmp_path):
    root = tree(tmp_path / 'data', {'a{}.png': 6})
    table = write(root / 'table.csv', header, *(f'a{i}.png,normal{extra}' for i in range(6)))
    if words:
        with pytest.raises(UserError, match=words):
            read(table)
    else:
        assert len(read(table).split['files']) == 6


def test_a_table_of_very_many_columns_is_read_at_once(tmp_path):
    table = write(tmp_path / 'wide.csv', ','.join(f'c{i}' for i in range(40_000)))
    began = time.process_time()
    assert read_table(table) == ([], []) and time.process_time() - began < 5
