"""New images without labels: what each file's row says, whatever the file is, and what never comes out."""

import csv
import io
import json
import os
import re
import shutil
import struct
import zlib
from dataclasses import replace

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from test_dicom import NAME, as_bytes, made
from test_evaluate import ONE_THREAD, fails, run

import evaluate
import train
from anomaly.maps.overlays import GAP, TITLE_HEIGHT, overlay
from anomaly.predict import SOME_UNREADABLE_STATUS, picture_name
from anomaly.scoring import Case
from datasets import DataConfig, load_data, preparation
from distributed import launch
from distributions import Pixels
from model import load_model
from readers.images.decode import ImageLoader, from_size, to_size
from readers.parts import Preparation, Transform
from readers.paths import printable
from utils import UserError, read_flags, write_json

SCORES = ('reconstruction', 'nelbo', 'regret', 'kl_profile', 'llr_1')        # in the table's order
SETTINGS = ('--num_draws', '2', '--regret_steps', '1')
LOADER = ImageLoader(16, 1, 8)


@pytest.fixture(scope='module')
def trained(train_flags, tmp_path_factory):
    """The folder of a run of 8 steps, after an anomaly evaluation of 5 scores."""
    root = tmp_path_factory.mktemp('runs')
    args = train.parse_args([*train_flags, '--root', str(root), '--save', 'a'])
    assert launch.launch(train.work, args, read_flags(launch.LaunchConfig, args)) == 0
    run(root / 'eval-a', root / 'eval-a' / 'anomaly', 'anomaly', '--scores', *SCORES, *SETTINGS,
        '--num_bootstrap', '2', '--num_cases', '0')
    return root / 'eval-a'


def rows_of(path):
    with path.open(encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def predict(checkpoint, data, out, *more):
    """Runs the mode in this process: (exit status, rows by id)."""
    args = evaluate.parse_args(['--checkpoint', str(checkpoint), '--save', str(out), '--eval_mode', 'predict',
                                '--data', str(data), *ONE_THREAD, *map(str, more)])
    status = launch.launch(evaluate.work, args, read_flags(launch.LaunchConfig, args))
    rows = rows_of(out / 'scores.csv')
    assert len({row['id'] for row in rows}) == len(rows)
    return status, {row['id']: row for row in rows}


@pytest.fixture(scope='module')
def predicted(trained, data_folder, tmp_path_factory):
    """All images of the run predicted, and the folder of the results."""
    out = tmp_path_factory.mktemp('predicted')
    return out, *predict(trained, data_folder, out, '--num_overlays', 3, '--batch_size', 7)


# ----------------------------------------------------------------------------------------------------- scores

def test_a_file_has_the_score_percentile_and_call_that_it_had_in_the_run(predicted, trained):
    _, status, rows = predicted
    assert status == 0 and len(rows) == 60
    names = ('nelbo', *(name for name in SCORES if name != 'nelbo'))             # the primary score first
    assert list(rows['normal/000.png']) == ['id', *(c for name in names for c in (
        name, f'{name}_percentile', f'{name}_flagged')), 'map', 'segmentation', 'overlay', 'part', 'error']
    known = {row['id']: row for row in rows_of(trained / 'anomaly' / 'scores.csv') if row['part'] == 'test'}
    assert len(known) == 20
    for name, row in known.items():
        assert rows[name]['error'] == ''
        rounding = 3e-8 * float(row['nelbo'])          # of the likelihoods whose difference LLR>k is
        for score in SCORES:
            assert float(rows[name][score]) == pytest.approx(float(row[score]), rel=1e-5, abs=rounding)
            assert rows[name][f'{score}_flagged'] == row[f'{score}_flagged']


def test_images_that_the_run_has_learned_from_are_named(predicted, trained, data_folder, tmp_path, capfd):
    out, _, rows = predicted
    split = {file['id']: file['part'] for file in json.loads((trained / 'split.json').read_text())['files']}
    assert {name: row['part'] for name, row in rows.items()} == split
    assert f"{sum(part != 'test' for part in split.values())} of these files" in (
        out / 'predictions.html').read_text()
    one, another = (next(name for name in split if split[name] == part) for part in ('train', 'test'))
    (tmp_path / 'new').mkdir()
    shutil.copy(data_folder / one, tmp_path / 'new' / 'renamed.png')
    shutil.copy(data_folder / another, tmp_path / 'new' / 'b.png')
    Image.open(data_folder / another).rotate(90).save(tmp_path / 'new' / 'c.png')
    _, found = predict(trained, tmp_path / 'new', tmp_path / 'out')
    assert [found[name]['part'] for name in ('renamed.png', 'b.png', 'c.png')] == ['train', 'test', '']
    assert '1 file of them is in the training or validation part' in capfd.readouterr().out


def test_scores_do_not_depend_on_neighbours_or_batches(predicted, trained, data_folder, tmp_path):
    """Three files alone, under other names."""
    _, _, rows = predicted
    few = ('spot/003.png', 'normal/010.png', 'normal/049.png')
    (tmp_path / 'few').mkdir()
    for i, name in enumerate(few):
        shutil.copy(data_folder / name, tmp_path / 'few' / f'{i}.png')
    _, alone = predict(trained, tmp_path / 'few', tmp_path / 'out')
    for i, name in enumerate(few):
        for score in SCORES:
            value = float(alone[f'{i}.png'][score])
            assert value == pytest.approx(float(rows[name][score]), rel=1e-5, abs=1e-6)


def test_two_processes_share_the_batches(predicted, trained, data_folder, tmp_path, capfd, forked_processes):
    (tmp_path / 'data').mkdir()
    shutil.copytree(data_folder / 'spot', tmp_path / 'data' / 'spot')
    (tmp_path / 'data' / 'broken.png').write_bytes(b'')
    flags = ('--batch_size', 3, '--num_overlays', 4, '--scores', 'nelbo', 'kl_profile')
    results = []
    for number in (1, 2):
        status, rows = predict(trained, tmp_path / 'data', tmp_path / str(number), *flags,
                               '--num_process_per_node', number)
        assert status == SOME_UNREADABLE_STATUS
        pictures = {p.name: p.read_bytes() for p in (tmp_path / str(number) / 'overlays').iterdir()}
        results.append((rows, pictures))
    assert results[0] == results[1] and len(results[0][1]) == 4
    said = capfd.readouterr().out.splitlines()
    assert sum(line.startswith('10 scored, 1 could not be read: see ') for line in said) == 2


def test_chosen_scores_are_all_that_is_computed(trained, data_folder, tmp_path):
    _, rows = predict(trained, data_folder / 'spot' / '003.png', tmp_path, '--scores', 'llr_1')
    assert list(rows) == ['003.png'] and list(rows['003.png'])[1:4] == ['llr_1', 'llr_1_percentile',
                                                                       'llr_1_flagged']
    assert json.loads((tmp_path / 'metrics.json').read_text())['predict']['primary_score'] == 'llr_1'


# ------------------------------------------------------------------------------------------------ preparation

@pytest.mark.parametrize('flags', [
    {}, {'num_x_bits': 12}, {'num_x_bits': 5, 'invert': True}, {'likelihood': 'bernoulli', 'invert': True},
    {'dequantize': True}, {'channels': 3, 'fit': 'crop', 'image_size': 12}])
def test_a_file_becomes_the_x_that_it_is_in_the_run(data_folder, cache, flags):
    data = load_data(DataConfig(**{'dataset': 'folder', 'data': str(data_folder), 'image_size': 16,
                                   'cache_dir': str(cache)} | flags))
    prepared = preparation(data.config, data.shape, data.pixels)
    files = LOADER.find(data_folder).files
    wanted = data.test.items(range(len(data.test)))
    batch = prepared.batch([prepared.loader.load(files[name]) for name in wanted.id], wanted.id)
    assert torch.equal(batch.x, wanted.x) and batch.id == wanted.id and batch.x.std() > 0


@pytest.mark.parametrize('bits', [1, 5, 8, 12, 16])
def test_an_image_from_python_has_the_very_pixels_of_training_at_every_depth(bits, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (20, 13)).astype(np.uint16)
    for folder, name in (('normal', 'a.png'), ('normal', 'b.png'), ('ill', 'c.png')):
        path = tmp_path / 'data' / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values + np.uint16(ord(name[0]))).save(path)
    config = DataConfig(dataset='folder', data=str(tmp_path / 'data'), image_size=12, num_x_bits=bits,
                        cache_dir=str(tmp_path / 'cache'), val_fraction=0.0, test_fraction=0.5)
    data = load_data(config)
    prepared = preparation(config, data.shape, data.pixels)
    for part in (data.train, data.test):
        for i, entry in enumerate(part.entries):
            assert torch.equal(prepared.images([entry.path]).x[0], part[i][0])
    levels = data.train[0][0] * (2 ** bits - 1)
    assert torch.equal(levels.round(), levels) if bits < 12 else torch.allclose(levels.round(), levels)


def test_the_border_of_the_run_is_black_and_around_the_image(tmp_path):
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(tmp_path / 'a.png')
    prepared = Preparation(ImageLoader(4, 1, 8, border=2), Transform(Pixels('bernoulli', 1, padding=2)))
    x = prepared.batch([prepared.loader.load(str(tmp_path / 'a.png'))], ['a.png']).x
    assert x[0, 0, 2:6, 2:6].all() and x.sum() == 16
    inverted = Preparation(prepared.loader, replace(prepared.transform, invert=True))
    assert not inverted.batch([prepared.loader.load(str(tmp_path / 'a.png'))], ['a.png']).x.any()


# --------------------------------------------------------------------------------------------- broken files

def png(width, height, data=b'', colour=0):
    """A PNG file that says so of its size, whatever its pixels are."""
    head = struct.pack('>IIBBBBB', width, height, 8, colour, 0, 0, 0)
    chunks = [b'IHDR' + head, b'IDAT' + zlib.compress(data), b'IEND']
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(c) - 4) + c + struct.pack('>I', zlib.crc32(c)) for c in chunks)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (20, 20)).astype(np.uint8)
GREY = Image.fromarray(NOISE)
NOT_A_NUMBER = Image.fromarray(np.array([[0, np.nan], [1, 2]], np.float32))
BROKEN = {      # name -> content, words of the reason
    'empty.png': (b'', 'is empty'),
    'cut.png': (saved(GREY, 'PNG')[:-60], 'cannot be decoded'),
    'cut.jpg': (saved(GREY, 'JPEG')[:-100], 'cannot be decoded'),
    'text.png': (b'not a picture', 'is not a PNG, JPEG, TIFF, BMP or DICOM image'),
    'bomb.png': (png(60_000, 60_000), 'has 3,600,000,000 pixels and claims'),
    'flat.png': (png(0, 5), 'is not a PNG'),
    'nan.tif': (saved(NOT_A_NUMBER, 'TIFF'), 'has pixels that are not finite'),
    'cut.dcm': (as_bytes(made(np.zeros((30, 30))))[:-99], 'is a DICOM file that is damaged or cut off'),
    'frames': (as_bytes(made(np.zeros((4, 3)), NumberOfFrames=2, Rows=2)), 'of 2 frames'),
    'gif.png': (saved(GREY, 'GIF'), 'is not a PNG'),
}
WHOLE = {
    'grey.png': saved(GREY, 'PNG'), 'bit.png': saved(GREY.convert('1'), 'PNG'),
    'deep.png': saved(Image.fromarray(NOISE.astype(np.uint16) * 256), 'PNG'),
    'ink.jpg': saved(GREY.convert('CMYK'), 'JPEG'),
    'pages.tif': saved(GREY, 'TIFF', save_all=True, append_images=[GREY.rotate(90)]),
    'ward 1/scan.dcm': as_bytes(made(NOISE, WindowCenter=128, WindowWidth=256)),
    'ward 1/IM0001': as_bytes(made(NOISE)),                                  # DICOM without a suffix
    'bracket, "quoted".png': saved(GREY, 'PNG'),
}


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    """Files whole and broken, and what has no content: links, a folder with an image's name, a pipe."""
    folder = tmp_path_factory.mktemp('mixed')
    for name, content in (WHOLE | {name: content for name, (content, _) in BROKEN.items()}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / 'notes.txt').write_text('hello')
    with open(os.fsencode(folder) + b'/caf\xe9.png', 'wb') as file:                # Latin-1, not UTF-8
        file.write(WHOLE['grey.png'])
    os.symlink('loop.png', folder / 'loop.png')
    os.symlink('nowhere', folder / 'dangling.png')
    os.mkfifo(folder / 'pipe.png')
    (folder / 'folder.png').mkdir()
    (folder / 'folder.png' / 'inside.png').write_bytes(WHOLE['grey.png'])
    (folder / 'masks').mkdir()
    (folder / 'masks' / 'grey.png').write_bytes(WHOLE['grey.png'])
    (folder / '.hidden.png').write_bytes(WHOLE['grey.png'])
    os.symlink(folder, folder / 'again')
    return folder


def test_an_unreadable_file_is_a_row_with_its_reason_and_the_rest_go_on(trained, mixed, tmp_path, capfd):
    reasons = {name: words for name, (_, words) in BROKEN.items()} | {
        'loop.png': 'Too many levels of symbolic links', 'dangling.png': 'No such file', 'pipe.png': 'a pipe'}
    whole = [*WHOLE, 'caf\\xe9.png', 'folder.png/inside.png']
    status, rows = predict(trained, mixed, tmp_path, '--batch_size', 4, '--num_overlays', -1)
    assert status == SOME_UNREADABLE_STATUS == 3
    assert sorted(rows) == list(rows) == sorted([*whole, *reasons]), "in order; no masks, nothing hidden"
    for name in whole:
        assert rows[name]['error'] == '' and float(rows[name]['nelbo']) > 0, name
        assert 0 <= float(rows[name]['nelbo_percentile']) <= 100 and rows[name]['nelbo_flagged'] in '01'
        assert (tmp_path / rows[name]['overlay']).is_file()
    for name, words in reasons.items():
        row = rows[name]
        assert words in row.pop('error'), name
        assert row.pop('id') == name and not any(row.values()), "no score, no percentile, no call, no picture"
    said = capfd.readouterr().out.splitlines()
    assert said[-1].endswith(f"13 could not be read: see {tmp_path / 'predictions.html'} and scores.csv")
    assert said[0].startswith('1 image of several pages') and said[0].endswith(': pages.tif')
    assert said[1] == ('passed over: hidden files and folders (1, such as .hidden.png); links to folders (1, '
                       'such as again); files of other kinds (1, such as notes.txt); masks and folders of '
                       'masks (1, such as masks/grey.png)')
    kept = json.loads((tmp_path / 'metrics.json').read_text())['predict']
    assert (kept['num_files'], kept['num_scored'], kept['num_unreadable']) == (23, 10, 13)


def test_nothing_of_a_patient_is_in_what_is_written_or_said(trained, mixed, tmp_path, capfd):
    predict(trained, mixed, tmp_path, '--num_overlays', -1)
    written = [p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()]
    said = capfd.readouterr()
    assert len(written) == 33
    for text in (*written, said.out.encode(), said.err.encode()):
        for secret in (NAME, 'Doe', 'SECRET-17', '19700101', '1.2.3.4'):
            assert secret.encode() not in text


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / 'a.png'
    path.write_bytes(WHOLE['grey.png'])
    prepared = Preparation(ImageLoader(8, 1, 8), Transform(Pixels()))

    def refuse(self):
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('pathlib.Path.read_bytes', refuse)
    with pytest.raises(ValueError, match=r'cannot be opened \(Permission denied\)'):
        prepared.loader.load(str(path))


def test_the_results_in_the_folder_itself_are_not_taken_for_images(tmp_path):
    (tmp_path / 'out' / 'overlays').mkdir(parents=True)
    (tmp_path / 'out' / 'overlays' / '1_a.png').write_bytes(b'x')
    (tmp_path / 'a.png').write_bytes(b'x')
    assert LOADER.find(tmp_path, without=tmp_path / 'out') == ({'a.png': str(tmp_path / 'a.png')},
                                                              {'folders of results': ['out']})
    assert list(LOADER.find(tmp_path).files) == ['a.png', 'out/overlays/1_a.png']
    assert printable(os.fsdecode(b'caf\xe9 \xc3\xa9')) == 'caf\\xe9 é'


# --------------------------------------------------------------------------------------------------- overlays

def test_the_most_anomalous_are_drawn_in_their_order(predicted, trained, data_folder, tmp_path):
    out, _, rows = predicted
    by_score = sorted(rows.values(), key=lambda row: -float(row['nelbo']))
    assert [row['overlay'] for row in by_score[:3]] == [
        f"overlays/{i}_{row['id'].replace('/', '_')}" for i, row in enumerate(by_score[:3], 1)]
    assert not any(row['overlay'] for row in by_score[3:])
    assert len(list((out / 'overlays').iterdir())) == 3
    picture = Image.open(out / by_score[0]['overlay'])
    assert picture.size == (3 * 256 + 2 * GAP, 256 + TITLE_HEIGHT) and picture.info == {}
    picture = picture.crop((0, TITLE_HEIGHT, *picture.size))
    original = np.asarray(Image.open(data_folder / by_score[0]['id']))
    assert np.array_equal(np.asarray(picture)[8:256:16, 8:256:16, 0], original), "the input"
    shutil.copytree(out / 'overlays', tmp_path / 'overlays')
    _, rows = predict(trained, data_folder / 'spot', tmp_path, '--num_overlays', 1, '--scores', 'nelbo')
    assert [p.name for p in (tmp_path / 'overlays').iterdir()] == [
        row['overlay'].removeprefix('overlays/') for row in rows.values() if row['overlay']], "no old one"


@pytest.mark.parametrize('fit', ['pad', 'crop', 'stretch'])
def test_a_map_goes_back_to_the_grid_of_its_file(fit):
    """A square of the file, brought to the size of the model and back."""
    height, width = 60, 36
    file = np.zeros((height, width), np.float32)
    file[24:36, 12:24] = 1
    back = from_size(to_size(file[..., None], 12, fit)[0], height, width, fit)
    assert back.shape == file.shape and back[26:34, 14:22].min() > 0.5 and back[:18].max() < 0.1
    assert back[42:].max() < 0.1 and back[:, :6].max() < 0.1 and back[:, 30:].max() < 0.1


def test_maps_and_segmentations_lie_on_the_grid_of_the_file(predicted, data_folder):
    out, _, rows = predicted
    drawn = [row for row in rows.values() if row['overlay']]
    for row in drawn:
        where, found = (np.asarray(Image.open(out / row[kind])) for kind in ('map', 'segmentation'))
        assert where.shape == found.shape == (16, 16) and where.dtype == np.uint16
        assert {*np.unique(found)} <= {0, 255}
    assert max(np.asarray(Image.open(out / row['map'])).max() for row in drawn) > 300         # of 1/100 SD


def test_a_picture_by_hand():
    """Map 0 shows the black image, the largest value covers 4/5 of it; a line is inside what is above."""
    image, anomaly_map = np.zeros((1, 2, 2), np.float32), np.array([[0, 1], [0, 0]], np.float32)
    look = {'cmap': 'inferno', 'vmin': 0, 'vmax': 1}
    pale = [202, 204, 132]                            # 4/5 of the last colour, (0.988, 0.998, 0.645)
    case = Case(0, image, None, anomaly_map, None)
    x = np.asarray(overlay(case, look))
    assert x.shape == (256, 2 * 256 + GAP, 3)
    assert (x[:, :256] == 0).all() and (x[:, 256:256 + GAP] == 255).all()
    panel = x[:, 256 + GAP:]
    assert (panel[:128, 128:] == pale).all() and (panel[:, :128] == 0).all() and (panel[128:] == 0).all()
    lined = np.asarray(overlay(case._replace(above=anomaly_map > 0.5), look))[:, 256 + GAP:]
    assert (lined[:126, 130:] == pale).all() and (lined[126:128, 128:] == 255).all(), "inside the region"
    assert (lined[:128, 128:130] == 255).all() and (lined[128:] == 0).all()
    red = np.ones((3, 2, 2)) * np.array([1, 0.2, 0])[:, None, None]
    colour = np.asarray(overlay(Case(0, red, None, None, None), look))
    assert colour.shape == (256, 256, 3) and (colour == [255, 51, 0]).all()


def test_names_of_pictures():
    assert picture_name(7, 120, 'ward 1/scan.dcm') == '007_ward_1_scan.png'
    assert picture_name(1, 2, 'ä/' + 'b' * 300) == f"1_{'b' * 80}.png"


# -------------------------------------------------------------------------------------------- users' mistakes

@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'copy')


@pytest.mark.parametrize('flags, told', [
    ((), '--eval_mode predict needs --data'),
    (('--data', '/no/where'), '--data: /no/where does not exist'),
    (('--data', 'SPOT', '--image_size', 32), '--image_size is a flag of .*, not of predict'),
    (('--data', 'SPOT', '--invert'), '--invert is a flag of .*, not of predict'),
    (('--data', 'SPOT', '--num_draws', 3), '--num_draws is a flag of .*, not of predict'),
    (('--data', 'SPOT', '--scores', 'iw'), '--scores iw: the evaluation set no threshold for it'),
    (('--data', 'SPOT', '--num_overlays', -2), '--num_overlays -2'),
    (('--data', 'SPOT', '--thresholds', '/no/thresholds.json'), 'there is no /no/thresholds.json'),
])
def test_wrong_flags(trained, data_folder, flags, told, monkeypatch, capsys, tmp_path):
    flags = [data_folder / 'spot' if flag == 'SPOT' else flag for flag in flags]
    line = fails(monkeypatch, capsys, '--checkpoint', trained, '--eval_mode', 'predict', '--save', tmp_path,
                 *flags)
    assert re.search(told, line), line


def test_thresholds_that_are_missing_or_of_something_else(copy, data_folder, monkeypatch, capsys):
    path = copy / 'thresholds.json'
    kept = json.loads(path.read_text())
    command = ('--checkpoint', copy, '--eval_mode', 'predict', '--data', data_folder)
    for content, told in (({**kept, 'weights': '0' * 16}, 'belongs to other weights'),
                          ({'scores': {}}, 'another version wrote it'),
                          ([], 'another version wrote it')):
        write_json(path, content)
        line = fails(monkeypatch, capsys, *command)
        assert told in line and f'evaluate.py --checkpoint {copy} --eval_mode anomaly' in line
    path.unlink()
    assert 'which holds the thresholds' in fails(monkeypatch, capsys, *command)
    (copy / 'empty').mkdir()
    with pytest.raises(UserError, match='no file below'):
        LOADER.find(copy / 'empty')


def test_infinite_thresholds_are_null_and_pixels_above_theirs_are_outlined(copy, data_folder, tmp_path):
    """A validation score that was not finite makes a threshold infinite: nothing is flagged."""
    path, image = copy / 'thresholds.json', data_folder / 'spot' / '000.png'
    kept = json.loads(path.read_text())
    x = torch.from_numpy(ImageLoader(16, 1, 8).load(image).pixels / np.float32(255))[None]
    with torch.no_grad():
        maps = load_model(copy).maps(x)
    middle = float((maps['recon'] + maps['kl'].sum(1, keepdim=True)).median())
    known = kept['scores']['nelbo']['normal_validation'][1:]
    white = []
    for pixel_threshold in (None, middle):
        kept['scores']['nelbo'] = {'threshold': None, 'pixel_threshold': pixel_threshold,
                                   'normal_validation': [None, *known]}
        write_json(path, kept)
        _, rows = predict(copy, image, tmp_path / 'out', '--scores', 'nelbo')
        picture = np.asarray(Image.open(tmp_path / 'out' / rows['000.png']['overlay']))
        white.append((picture[TITLE_HEIGHT:, -256:] == 255).all(-1).mean())
    assert white[0] == 0 and white[1] > 0.05
    assert {row['nelbo_flagged'] for row in rows.values()} == {'0'}
    below = sum(value < float(rows['000.png']['nelbo']) for value in known)
    assert below > 0 and float(rows['000.png']['nelbo_percentile']) == 100 * below / 8


def test_predictions_of_dicom_images_may_have_a_dicom_segmentation(trained, tmp_path, capfd):
    data, out = tmp_path / 'data', tmp_path / 'out'
    data.mkdir()
    study = {'StudyInstanceUID': '1.2.3', 'SeriesInstanceUID': '1.2.3.1', 'Modality': 'DX'}
    (data / 'complete.dcm').write_bytes(as_bytes(made(NOISE, **study)))
    (data / 'anonymous.dcm').write_bytes(as_bytes(made(NOISE.T.copy())))
    status, rows = predict(trained, data, out, '--dicom_seg')
    assert status == 0 and rows['anonymous.dcm']['dicom_seg'] == ''
    segmentation = pydicom.dcmread(out / rows['complete.dcm']['dicom_seg'])
    assert segmentation.pixel_array.shape == NOISE.shape and segmentation.StudyInstanceUID == '1.2.3'
    assert 'no DICOM segmentation of 1 image, as each is a DICOM file without StudyInstanceUID, which a ' \
           'segmentation needs: anonymous.dcm' in capfd.readouterr().out
    assert 'dicom_seg' not in predict(trained, data, out)[1]['complete.dcm']
    assert not [*out.rglob('*.dcm')]                                     # that of the earlier call is gone
