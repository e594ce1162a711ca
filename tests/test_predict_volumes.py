"""New volumes without labels: as the run treated its own, and maps on the grid of each file."""

import gzip
import json
from dataclasses import asdict
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import ONE_THREAD, fails
from test_predict import predict, rows_of

import evaluate
from anomaly.choice import choose_scores
from anomaly.maps.nifti import file_names, remove_maps, write_map
from anomaly.predict import SOME_UNREADABLE_STATUS, NewFiles
from anomaly.scores import Scoring
from anomaly.scoring import score_images
from datasets import DataConfig, load_data, preparation
from distributed import launch
from readers.out_of_distribution import Changed, parse
from readers.source import Entry
from readers.volumes.nifti import Grid, entry_grids, to_input_grid
from utils import UserError, read_flags

SECRET = b'Doe^Jane 1970'
SHAPE, MM = (12, 10, 8), (2.0, 2.5, 3.0)              # of the run's files: front to back, down, to the right
SPOT = np.array([2.0, -3.0, 3.0])                     # mm


def affine(codes, mm, turn=0.0, shape=SHAPE):
    """Axes that run as the letters say, turned about the patient's axis, the middle of the volume at 0 mm."""
    found = np.zeros((4, 4))
    for axis, (to, sign) in enumerate(nib.orientations.axcodes2ornt(codes)):
        found[int(to), axis] = sign * mm[axis]
    c, s = np.cos(turn), np.sin(turn)
    found[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ found[:3, :3]
    found[:3, 3] = -found[:3, :3] @ ((np.array(shape) - 1) / 2)
    found[3, 3] = 1
    return found


OWN = affine('PIR', MM, turn=0.1)


def head(grid, seed=0, spot=0.0):
    """A dim ball around 0 mm on `grid`, with a little noise; `spot`: brightness of a larger one at SPOT."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing='ij'), -1)
    place = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]                             # (X, Y, Z, 3), mm
    values = 40 * np.exp(-(place ** 2).sum(-1) / (2 * 4 ** 2))
    values += spot * np.exp(-((place - SPOT) ** 2).sum(-1) / (2 * 6 ** 2))
    return (values + np.random.default_rng(seed).uniform(0, 1, grid.shape)).astype(np.float32)


def save(path, values, where=OWN):
    """A file with a name in every field of its header that can hold one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, where)
    for field in ('descrip', 'aux_file', 'intent_name', 'db_name'):
        image.header[field] = SECRET
    image.header.extensions.append(nib.nifti1.Nifti1Extension('comment', SECRET))
    nib.save(image, path)


def save_subject(folder, name, grid=None, **options):
    grid = grid or Grid(SHAPE, OWN)
    for channel, modality in enumerate(('t1', 'flair')):
        save(folder / modality / f'{name}.nii.gz', head(grid, **options) * (1 + channel), grid.affine)


class Toy(torch.nn.Module):
    """Reconstructs nothing at all, so that its map is the image."""
    primary_score = 'reconstruction'

    def __init__(self, data):
        super().__init__()
        self.shape, self.pixels, self.config = data.shape, data.pixels, None
        self.weight = torch.nn.Parameter(torch.ones(1))

    def reconstruct(self, x):
        return torch.zeros_like(x)

    def score_norms(self, x, number, **_):
        return torch.stack([x.flatten(1).norm(p, dim=1) for p in range(1, number + 1)], 1)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """The folder of a run, after an anomaly evaluation of a toy on 12 normal heads and 2 with a spot."""
    root = tmp_path_factory.mktemp('world')
    for i in range(12):
        save_subject(root / 'data' / 'normal', f'n{i}', seed=i)
    for i in range(2):
        save_subject(root / 'data' / 'tumour', f'ill{i}', seed=20 + i, spot=300)
        lesion = (head(Grid(SHAPE, OWN), spot=300) > 150).astype(np.uint8)
        save(root / 'data' / 'tumour' / 'label' / f'ill{i}.nii.gz', lesion)
    flags = DataConfig(dataset='brain', data=str(root / 'data'), modalities=('t1', 'flair'), pad_multiple=4,
                       val_fraction=0.5, test_fraction=0.2, cache_dir=str(root / 'cache'))
    toy, run_args = Toy(load_data(flags)), asdict(flags) | {'batch_size': 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('evaluation.run.open_model', lambda path, ema: (toy, run_args))
        args = evaluate.parse_args([
            '--checkpoint', str(root), '--eval_mode', 'anomaly', *ONE_THREAD, '--msma_levels', '3',
            '--scores', 'reconstruction', 'msma_knn', '--audit_images', '0', '--num_bootstrap', '2',
            '--num_cases', '1', '--num_gallery', '0', '--target_pixel_fpr', '0.05', '--seg_erosion', '1'])
        assert launch.launch(evaluate.work, args, read_flags(launch.LaunchConfig, args)) == 0
        yield SimpleNamespace(root=root, toy=toy, flags=flags, data=root / 'data')


def peak(path):
    """The place of the largest value, mm."""
    image = nib.load(path)
    values = image.get_fdata()
    return image.affine[:3] @ [*np.unravel_index(values.argmax(), values.shape), 1]


# ----------------------------------------------------------------------------------------------------- scores

def test_a_volume_has_the_scores_that_it_had_in_the_run(world, tmp_path):
    status, rows = predict(world.root, world.data, tmp_path, '--num_overlays', 2)
    known = rows_of(world.root / 'anomaly' / 'scores.csv')
    known = {row['id']: row for row in known if row['part'] == 'test'}
    assert status == 0 and len(rows) == 14 and len(known) == 4, "labels are no subjects"
    scores = ('reconstruction', 'msma_knn')
    assert list(rows['normal/n0']) == ['id', *(column for score in scores for column in (
        score, f'{score}_percentile', f'{score}_flagged')), 'map', 'segmentation', 'overlay', 'part', 'error']
    for name, row in known.items():
        for score in scores:
            assert float(rows[name][score]) == pytest.approx(float(row[score]), rel=1e-5)
            assert rows[name][f'{score}_flagged'] == row[f'{score}_flagged']
    assert [name for name, row in rows.items() if row['map']] == ['tumour/ill0', 'tumour/ill1']
    kept = json.loads((tmp_path / 'metrics.json').read_text())['predict']
    assert (kept['num_files'], kept['num_unreadable'], kept['passed_over']) == (14, 0, 0)


@pytest.mark.parametrize('flags', [
    {}, {'volume_mask': 'auto'}, {'volume_mask': 'brain'},
    {'spacing': 4.0, 'crop': (1, 1, 1, 7, 9, 11), 'num_x_bits': 12, 'invert': True},
    {'volume_shape': (6, 20, 8), 'percentiles': (5.0, 90.0), 'dequantize': True}])
def test_a_subject_becomes_the_x_that_it_is_in_the_run(flags, world, tmp_path):
    for i in range(4):
        save_subject(tmp_path / 'data', f's{i}', seed=i, spot=100 * i)
        save(tmp_path / 'data' / 'brain' / f's{i}.nii.gz', (head(Grid(SHAPE, OWN)) > 20) * 1.0)
    config = DataConfig(dataset='brain', data=str(tmp_path / 'data'), modalities=('t1', 'flair'),
                        val_fraction=0, test_fraction=0, cache_dir=str(tmp_path / 'cache'), **flags)
    data = load_data(config)
    prepared = preparation(config, data.shape, data.pixels, [])
    found = prepared.loader.find(tmp_path / 'data')
    wanted = data.train.items(range(4))
    batch = prepared.batch([prepared.loader.load(subject) for subject in found.files.values()],
                           list(found.files))
    assert list(found.files) == wanted.id and torch.equal(batch.x, wanted.x) and batch.x.std() > 0


def test_ranks_share_the_volumes(world, monkeypatch):
    prepared = preparation(world.flags, world.toy.shape, world.toy.pixels)
    found = prepared.loader.find(world.data)
    scores, _ = choose_scores(['reconstruction'], world.toy)
    values = []
    monkeypatch.setattr(launch, 'gather', lambda rows: rows)
    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(launch, 'rank', lambda rank=rank: rank)
        monkeypatch.setattr(launch, 'world', lambda ranks=ranks: ranks)
        files = NewFiles(prepared, found, batch_size=3, parts={})
        table = score_images(world.toy, files.batches(files.ids, 'predict'), scores, Scoring())
        ids = [entry.id for entry in table.entries]
        values.append(dict(zip(ids, table.values['reconstruction'].tolist())))
    assert values[1] | values[2] == values[0] and len(values[0]) == len(values[1]) + len(values[2])


# ------------------------------------------------------------------------------------------------------- maps

@pytest.mark.parametrize('grid', [
    Grid(SHAPE, OWN), Grid((30, 24, 26), affine('LPS', (1.0, 1.2, 0.9), -0.15, (30, 24, 26)))])
def test_a_map_lies_on_the_grid_of_its_file(grid, world, tmp_path):
    """Turned about an axis, not cubic, not RAS; the second file has a spacing that no file of the run has."""
    save_subject(tmp_path / 'new', 'jane', grid, seed=7, spot=300)
    _, rows = predict(world.root, tmp_path / 'new', tmp_path / 'out')
    path = tmp_path / 'out' / rows['jane']['map']
    assert path.name == 'jane_reconstruction.nii.gz'
    written = nib.load(path)
    assert written.shape == grid.shape and written.affine == pytest.approx(grid.affine, abs=1e-5)
    assert np.linalg.norm(peak(path) - SPOT) < 2.5, "within the voxels of the run"
    x = nib.load(tmp_path / 'new' / 't1' / 'jane.nii.gz').get_fdata()
    assert np.corrcoef(x.ravel(), written.get_fdata().ravel())[0, 1] > 0.85
    lesion = nib.load(tmp_path / 'out' / 'segmentations' / 'jane.nii.gz')
    assert lesion.shape == grid.shape and lesion.affine == pytest.approx(grid.affine, abs=1e-5)
    flagged = np.asarray(lesion.dataobj)
    assert flagged.dtype == np.uint8 and set(np.unique(flagged)) == {0, 1}
    centre = lesion.affine[:3] @ [*np.argwhere(flagged).mean(0), 1]
    assert np.linalg.norm(centre - SPOT) < 2.5, "the ball around the spot, and nothing else"
    picture = Image.open(tmp_path / 'out' / rows['jane']['overlay'])
    assert picture.info == {} and picture.width > picture.height / 2


def test_nothing_of_a_header_comes_along(world, tmp_path, capfd):
    save_subject(tmp_path / 'new', 'a', spot=300)
    predict(world.root, tmp_path / 'new', tmp_path / 'out')
    said = capfd.readouterr()
    written = [gzip.decompress(p.read_bytes()) for p in (tmp_path / 'out').rglob('*.nii.gz')]
    texts = [*written, said.out.encode(), said.err.encode(),
             *(p.read_bytes() for p in (tmp_path / 'out').rglob('*.*'))]
    assert len(written) == 2 and not any(SECRET[:3] in text for text in texts)


def test_the_anomaly_mode_writes_the_maps_of_the_cases_that_it_shows(world):
    files = sorted((world.root / 'anomaly' / 'maps').iterdir())
    rows = [row for row in rows_of(world.root / 'anomaly' / 'scores.csv') if row['part'] == 'test']
    rows.sort(key=lambda row: float(row['reconstruction']))
    assert [p.name for p in files] == sorted(
        f"{row['id'].replace('/', '_')}_reconstruction.nii.gz" for row in (rows[0], rows[-1]))
    assert np.linalg.norm(peak(files[-1]) - SPOT) < 2.5
    assert nib.load(files[-1]).affine == pytest.approx(OWN, abs=1e-5)


@pytest.mark.parametrize('change', ['rot90', 'rot180', 'rot270', 'flip'])
def test_maps_of_turned_sets_go_back_to_the_file(change):
    """As the map of an image out of distribution, the turned volume itself: voxel by voxel the file again."""
    grid = Grid((5, 5, 3), affine('LPS', MM, 0.3))
    values = head(grid)
    entry = Entry('a', '', '', '', 0, 0, grids=(grid.as_json(), grid.as_json()))
    images = Changed(values[None, None], [entry], parse(f'turned=test:{change}'))
    back = to_input_grid(images[[0]][0, 0], *entry_grids(images.entries[0])).get_fdata()
    assert not np.array_equal(images[[0]][0, 0], values) and back == pytest.approx(values, abs=1e-3)


def test_names_of_maps_are_safe_and_apart():
    names = file_names(['ward 1/a', 'ward/1/a', 'WARD_1_a_2', 'b/' + 'é' * 300, '../c', 'd' * 300])
    assert names == ['ward_1_a', 'ward_1_a_2', 'WARD_1_a_2_2', 'b_', '.._c', 'd' * 80]


def test_results_in_the_folder_itself_are_no_subjects_and_only_our_maps_are_removed(world, tmp_path):
    save_subject(tmp_path, 'a', spot=300)
    for name in ('mine', 'other'):
        save(tmp_path / 'out' / 'maps' / f'{name}.nii.gz', np.ones((2, 2, 2), np.float32))
    (tmp_path / 'out' / 'maps' / 'no.nii.gz').write_bytes(b'no NIfTI')
    grid = Grid((2, 2, 2), np.eye(4))
    write_map(tmp_path / 'out' / 'maps' / 'old.nii.gz', np.ones((2, 2, 2)), grid, grid)
    for _ in range(2):
        _, rows = predict(world.root, tmp_path, tmp_path / 'out')
        assert list(rows) == ['a']
    left = sorted(p.name for p in (tmp_path / 'out' / 'maps').iterdir())
    assert left == ['a_reconstruction.nii.gz', 'mine.nii.gz', 'no.nii.gz', 'other.nii.gz']
    remove_maps(tmp_path / 'nowhere')


# ----------------------------------------------------------------------------------------------- a new file

def test_another_spacing_comes_to_that_of_the_run_and_nearly_the_same_stays(world, tmp_path):
    spacing = json.loads((world.root / 'thresholds.json').read_text())['preparation']['spacing']
    assert spacing == pytest.approx([3, 2, 2.5]), "of the axes right, front, up"
    prepared = preparation(world.flags, world.toy.shape, world.toy.pixels, spacing)
    for name, mm in (('fine', (1.0, 1.0, 1.0)), ('near', tuple(1.005 * m for m in MM))):
        save_subject(tmp_path, name, Grid(SHAPE, affine('PIR', mm)))
    fine, near = (prepared.loader.load(subject) for subject in prepared.loader.find(tmp_path).files.values())
    assert fine.grids[0].spacing == pytest.approx(spacing) and fine.grids[1].spacing == pytest.approx(1)
    assert near.grids[0].spacing == pytest.approx(1.005 * np.array(spacing))
    assert fine.pixels.shape == near.pixels.shape == tuple(world.toy.shape)


def test_what_cannot_be_read_is_a_row_and_what_was_put_right_is_said(world, tmp_path, capfd):
    data, grid = tmp_path / 'new', Grid(SHAPE, OWN)
    for name in ('whole', 'cut', 'times', 'nan', 'placeless', 'wide'):
        save_subject(data, name, Grid((12, 10, 30), OWN) if name == 'wide' else None)
    (data / 't1' / 'cut.nii.gz').write_bytes((data / 't1' / 'cut.nii.gz').read_bytes()[:-40])
    save(data / 't1' / 'times.nii.gz', np.stack([head(grid), head(grid)], -1))
    save(data / 't1' / 'text.nii', head(grid))
    (data / 't1' / 'text.nii').write_bytes(b'hello')
    save(data / 'flair' / 'text.nii', head(grid))
    save(data / 't1' / 'alone.nii.gz', head(grid))
    save(data / 't2' / 'whole.nii.gz', head(grid))
    values = head(grid)
    values[3, 3, 3] = np.nan
    save(data / 'flair' / 'nan.nii.gz', values)
    for modality in ('t1', 'flair'):
        image = nib.Nifti1Image(head(grid), None)
        nib.save(image, data / modality / 'placeless.nii.gz')
    status, rows = predict(world.root, data, tmp_path / 'out', '--batch_size', 2)
    assert status == SOME_UNREADABLE_STATUS
    reasons = {'alone': 'has no file of flair', 'cut': 'has a file cut.nii.gz that is cut off or damaged',
               'times': 'has 3 channels, 2 expected', 'text': 'has a file text.nii that is not a NIfTI file'}
    assert list(rows) == sorted([*reasons, 'nan', 'placeless', 'whole', 'wide'])
    for name, row in rows.items():
        assert row['error'].startswith(reasons.get(name, '')) and bool(row['error']) == (name in reasons)
        assert bool(row['reconstruction']) == bool(row['map']) == (name not in reasons)
    said = capfd.readouterr().out
    for words in ('volumes that are no channel of these subjects',
                  '1 subject had voxels that were not finite: they are 0: nan',
                  '1 subject larger than the model sees lose their ends: wide',
                  'without a place in mm (neither sform nor qform)', '4 scored, 4 could not be read'):
        assert words in said


def test_one_file(world, tmp_path, monkeypatch, capsys):
    grid = Grid(SHAPE, OWN)
    save(tmp_path / 'jane_t1.nii.gz', head(grid))
    save(tmp_path / 'both.nii.gz', np.stack([head(grid), 2 * head(grid)], -1))
    save_subject(tmp_path / 'apart', 'both')
    _, rows = predict(world.root, tmp_path / 'both.nii.gz', tmp_path / 'out', '--num_overlays', 0)
    _, apart = predict(world.root, tmp_path / 'apart', tmp_path / 'other', '--num_overlays', 0)
    assert rows['both']['map'] == rows['both']['segmentation'] == ''
    assert not (tmp_path / 'out' / 'maps').exists()
    assert float(rows['both']['reconstruction']) == pytest.approx(float(apart['both']['reconstruction']))
    command = ('--checkpoint', world.root, '--eval_mode', 'predict', '--save', tmp_path / 'out')
    status, rows = predict(world.root, tmp_path / 'jane_t1.nii.gz', tmp_path / 'out')
    assert status == 3 and 'has 1 channel, 2 expected (t1, flair): as many' in rows['jane']['error']
    assert 'Give a folder of NIfTI files' in fails(monkeypatch, capsys, *command, '--data', '/no/where')
    one = DataConfig(dataset='brain', volume_mask='brain', modalities=('t1',))
    with pytest.raises(UserError, match=r"inside the mask 'brain' of each subject .* folder that holds both"):
        preparation(one, (1, 8, 8, 8), world.toy.pixels).loader.find(tmp_path / 'jane_t1.nii.gz')
    one = preparation(DataConfig(dataset='brain', modalities=('t1',)), (1, 8, 8, 8), world.toy.pixels)
    found = one.loader.find(tmp_path / 'jane_t1.nii.gz')
    assert [*found.files] == ['jane'], "as in a folder"
    (tmp_path / 'jane').mkdir()
    (tmp_path / 'jane_t1.nii.gz').rename(tmp_path / 'jane' / 't1.nii.gz')
    assert [*one.loader.find(tmp_path / 'jane').files] == ['jane'], "as is her own folder"
