"""evaluate.py from end to end: what each mode says and leaves, and how it fails."""

import csv
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image

import evaluate
import train
from anomaly.maps.overlays import TITLE_HEIGHT
from distributed import launch
from evaluation import sampling
from evaluation.pictures import image_grid
from evaluation.run import Evaluation
from evaluation.sampling import readjust_batch_norm, samples
from model import load_model
from storage.checkpoint import save_checkpoint
from utils import UserError, read_flags

ONE_THREAD = ('--device', 'cpu', '--num_threads', '1')


@pytest.fixture(scope='module')
def trained(train_flags, tmp_path_factory):
    """The folder of a run of 8 steps: 32 images to train on, 8 to validate, 10 normal and 10 spotted ones."""
    root = tmp_path_factory.mktemp('runs')
    args = train.parse_args([*train_flags, '--root', str(root), '--save', 'a', '--ema_decay', '0.9'])
    assert launch.launch(train.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return root / 'eval-a'


def run(checkpoint, out, mode, *more):
    """Evaluates in this process; returns what metrics.json holds."""
    args = evaluate.parse_args(['--checkpoint', str(checkpoint), '--save', str(out), '--eval_mode', mode,
                                *ONE_THREAD, *map(str, more)])
    assert launch.launch(evaluate.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return json.loads((out / 'metrics.json').read_text())


def tiles(path, columns, rows):
    """Whether a picture shows a grid of 17-pixel tiles below its titles, enlarged by a whole factor."""
    width, height = Image.open(path).size
    times = width // (columns * 17)
    return (width, height) == (times * columns * 17, times * rows * 17 + TITLE_HEIGHT)


# ------------------------------------------------------------------------------------------------ likelihood

LIKELIHOOD = ('--num_iw_samples', '3', '--batch_size', '7')      # 20 test images: batches of 7, 7 and 6


@pytest.fixture(scope='module')
def likelihood(trained, tmp_path_factory):
    return run(trained, tmp_path_factory.mktemp('likelihood'), 'evaluate', *LIKELIHOOD)['likelihood']


def test_evaluate_counts_every_image_once_and_repeats_to_the_bit(trained, likelihood, tmp_path):
    assert [likelihood[key] for key in ('num_images', 'num_iw_samples', 'part')] == [20, 3, 'test']
    assert likelihood['neg_log_p_nats'] < likelihood['nelbo_nats'], "the tighter bound"
    assert likelihood['nelbo_bits_per_dim'] == pytest.approx(likelihood['nelbo_nats'] / (256 * np.log(2)))
    torch.rand(3)                                                    # noise drawn elsewhere changes nothing
    assert run(trained / 'checkpoint.pt', tmp_path, 'evaluate', *LIKELIHOOD)['likelihood'] == likelihood
    other = run(trained, tmp_path, 'evaluate', *LIKELIHOOD, '--seed', 2)['likelihood']
    assert other['nelbo_nats'] != likelihood['nelbo_nats']


def test_two_processes_give_the_numbers_of_one(trained, likelihood, tmp_path, capfd, forked_processes):
    """3 batches over 2 ranks: no image is dropped or counted twice."""
    result = run(trained, tmp_path, 'evaluate', *LIKELIHOOD, '--num_process_per_node', 2)
    assert result['likelihood'] == likelihood
    lines = capfd.readouterr().out.splitlines()
    assert sum(line.startswith('class ') for line in lines) == 1, "only the main process speaks"


def test_three_ranks_share_all_batches(trained, monkeypatch, tmp_path):
    """Batches and samples of rank 0, 1, 2 are together those of one process, and no two are alike."""
    seen, drawn = [], {}
    model = load_model(trained)
    for rank in range(3):
        monkeypatch.setattr(launch, '_here', launch.Environment(rank, 3))
        args = evaluate.parse_args(['--checkpoint', str(trained), '--eval_mode', 'latents', '--batch_size',
                                    '3', '--cache_dir', str(tmp_path)])
        monkeypatch.setattr(launch, 'barrier', lambda: None)
        task = Evaluation(args)
        seen += [name for _, batch in task.batches(task.data()) for name in batch.id]
        drawn |= dict(samples(model, 8, 3, 1.0, seed=1))
    assert len(seen) == len(set(seen)) == 20
    monkeypatch.setattr(launch, '_here', launch.Environment())
    together = dict(samples(model, 8, 3, 1.0, seed=1))
    assert drawn.keys() == together.keys() == {0, 1, 2} and [len(drawn[i]) for i in range(3)] == [3, 3, 2]
    assert all(torch.equal(drawn[i], together[i]) for i in range(3)) and not torch.equal(drawn[0], drawn[1])


def test_the_training_images_on_request(trained, tmp_path):
    result = run(trained, tmp_path, 'evaluate', '--eval_on_train', '--num_iw_samples', 1)['likelihood']
    assert (result['num_images'], result['part']) == (32, 'train')
    assert result['nelbo_nats_standard_error'] > 0


def test_the_average_of_the_weights_is_what_is_evaluated(trained, likelihood, tmp_path):
    last = run(trained, tmp_path, 'evaluate', *LIKELIHOOD, '--no_ema')['likelihood']
    assert last['nelbo_nats'] != likelihood['nelbo_nats']


# ---------------------------------------------------------------------------------------------------- images

def test_samples_are_seeded_and_temperature_matters(trained, tmp_path):
    def draw(name, *more):
        run(trained, tmp_path / name, 'sample', '--num_samples', 5, '--batch_size', 2, *more)
        return [np.load(path)['samples'] for path in sorted((tmp_path / name).glob('samples_*.npz'))]
    first, again = draw('a'), draw('b')
    seeded, cold = draw('c', '--seed', 2), draw('d', '--temp', '0.1')
    assert [x.shape for x in first] == [(2, 1, 16, 16), (2, 1, 16, 16), (1, 1, 16, 16)]
    x = np.concatenate(first)
    assert x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], seeded[0]) and not np.array_equal(first[0], cold[0])
    assert not np.array_equal(first[0], first[1])
    assert tiles(tmp_path / 'a' / 'samples.png', 2, 1)
    (tmp_path / 'a' / 'samples_old.npz').write_bytes(b'')
    assert len(list((tmp_path / 'a').glob('samples_?.npz'))) == 3
    run(trained, tmp_path / 'a', 'sample', '--num_samples', 2, '--batch_size', 2)
    assert sorted(path.name for path in (tmp_path / 'a').glob('samples_*.npz')) == \
        ['samples_0.npz', 'samples_old.npz'], "files of the earlier call are gone, those of others stay"


def test_readjusted_batch_norm(trained):
    """Only layers of the decoder change; the published number of passes forgets the old statistics."""
    before, model = load_model(trained).state_dict(), load_model(trained)
    readjust_batch_norm(model, 0.7, seed=1, passes=20)
    assert not model.training
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any('running_mean' in name for name in changed)
    assert all('running_' in name or 'num_batches' in name for name in changed), changed
    encoder = ('pre_process', 'stem', 'down', 'top_features')
    assert not any(name.startswith(encoder) or '.encode.' in name for name in changed), changed
    assert all(after[name].isfinite().all() for name in changed)
    with pytest.raises(ValueError, match='at least 16'):
        readjust_batch_norm(model, 0.7, seed=1, batch_size=8)


def test_statistics_that_are_not_finite_are_refused(trained):
    model = load_model(trained)
    with torch.no_grad():
        model.groups[1].into_decoder.bias.fill_(torch.nan)
    with pytest.raises(UserError, match='without --readjust_bn'):
        readjust_batch_norm(model, 0.7, seed=1, passes=1)


def test_sampling_with_readjusted_batch_norm(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, 'readjust_batch_norm', partial(readjust_batch_norm, passes=2))
    assert run(trained, tmp_path, 'sample', '--num_samples', 2, '--readjust_bn')['sample']['readjust_bn']
    with np.load(tmp_path / 'samples_0.npz') as stored:
        assert np.isfinite(stored['samples']).all()


def test_reconstructions(trained, tmp_path):
    result = run(trained, tmp_path, 'reconstruct', '--num_samples', 5, '--batch_size', 3)['reconstruct']
    with np.load(tmp_path / 'reconstructions.npz') as stored:
        x, y, ids = (stored[key] for key in ('x', 'reconstruction', 'id'))
    assert x.shape == y.shape == (5, 1, 16, 16) and len(set(ids)) == 5
    error = pytest.approx(np.abs(x - y).mean())
    assert result == {'num_images': 5, 'part': 'test', 'mean_absolute_error': error}
    with torch.no_grad():
        expected = load_model(trained).reconstruct(torch.from_numpy(x))
    assert np.allclose(y, expected, atol=1e-5)
    assert tiles(tmp_path / 'reconstructions.png', 8, 2)


def test_a_grid_of_images_by_hand():
    grid = image_grid(torch.tensor([0.0, 0.25, 0.5]).view(3, 1, 1, 1))
    assert grid.tolist() == [[[0, 1, 0.25, 1], [1, 1, 1, 1], [0.5, 1, 1, 1], [1, 1, 1, 1]]]


# ---------------------------------------------------------------------------------------------------- anomaly

@pytest.mark.figures
def test_anomaly_leaves_scores_metrics_and_a_report(trained, tmp_path):
    kept = run(trained, tmp_path, 'sample', '--num_samples', 1)['sample']
    result = run(trained, tmp_path, 'anomaly', '--num_iw_samples', 2, '--num_draws', 1, '--num_bootstrap', 9)
    assert result['sample'] == kept, "what another mode wrote stays"
    assert result['anomaly']['counts']['test'] == {'normal': 10, 'spot': 10}
    assert any(line.startswith('Serious:') and 'spot' in line for line in result['anomaly']['findings'])
    more = ('--num_draws', 1, '--num_bootstrap', 2, '--scores', 'nelbo', '--audit_images', 0)
    assert run(trained, tmp_path / 'again', 'anomaly', *more)['anomaly']['findings'] == []
    assert {'scores.csv', 'metrics.json', 'report.html', 'thresholds.json', 'figures'} <= \
        {path.name for path in tmp_path.iterdir()}
    assert (trained / 'thresholds.json').exists(), "the threshold is kept with the run"
    with (tmp_path / 'scores.csv').open() as f:
        rows = list(csv.DictReader(f))
    assert [row['part'] for row in rows].count('test') == 20 and {'nelbo', 'iw', 'llr_1'} <= rows[0].keys()


# -------------------------------------------------------------------------------------------- users' mistakes

class Trap:
    def __reduce__(self):
        return print, ('sprung',)


@pytest.fixture
def copy(trained, tmp_path):
    """A run folder to spoil."""
    return Path(shutil.copytree(trained, tmp_path / 'copy'))


def fails(monkeypatch, capsys, *flags):
    """The one line of a call that ends with status 2."""
    monkeypatch.setattr('sys.argv', ['evaluate.py', *map(str, flags), *ONE_THREAD])
    with pytest.raises(SystemExit) as end:
        evaluate.run_program(evaluate.main)
    output, errors = capsys.readouterr()
    assert end.value.code == 2 and len(errors.splitlines()) == 1 and errors.startswith('error: '), errors
    assert 'sprung' not in output
    return errors


def test_wrong_checkpoints(copy, monkeypatch, capsys):
    path = copy / 'checkpoint.pt'
    assert 'there is no checkpoint /no/where' in fails(monkeypatch, capsys, '--checkpoint', '/no/where')
    (copy / 'checkpoint-1.pt').unlink()
    path.write_bytes(path.read_bytes()[:999])
    assert 'damaged' in fails(monkeypatch, capsys, '--checkpoint', copy)
    torch.save({'weights': {}, 'description': Trap()}, path)
    assert 'code and not data' in fails(monkeypatch, capsys, '--checkpoint', copy)
    save_checkpoint(path, {'epoch': 3})
    assert "its keys are ['epoch']" in fails(monkeypatch, capsys, '--checkpoint', path)


@pytest.mark.parametrize('flags, told', [
    (('--image_size', 32), r'images of shape (1, 16, 16), the data have (1, 32, 32)'),
    (('--num_x_bits', 5), '--num_x_bits'),
    (('--eval_mode', 'sample', '--num_samples', -1), '--num_samples -1'),
    (('--eval_mode', 'sample', '--temp', -1), '--temp -1'),
    (('--data', '/no/where'), '/no/where'),
    (('--save', '/proc/no'), '--save'),
    (('--eval_mode', 'anomaly', '--target_fpr', 2), '--target_fpr 2'),
])
def test_wrong_flags(trained, flags, told, monkeypatch, capsys, tmp_path):
    more = () if '--save' in flags else ('--save', tmp_path)
    more += () if '--eval_mode' in flags else ('--eval_mode', 'evaluate')
    assert told in fails(monkeypatch, capsys, '--checkpoint', trained, *more, *flags)


def test_a_part_without_images(copy, monkeypatch, capsys, tmp_path):
    make_images(tmp_path / 'only' / 'normal', 20, seed=3)
    (copy / 'split.json').unlink()
    told = fails(monkeypatch, capsys, '--checkpoint', copy, '--eval_mode', 'evaluate', '--test_fraction', 0,
                 '--data', tmp_path / 'only')
    assert 'the test part has no images' in told


def test_a_model_without_the_capability(trained, monkeypatch, tmp_path):
    from families.nvae.model import NVAE
    monkeypatch.delattr(NVAE, 'sample')
    with pytest.raises(UserError, match='no `sample`'):
        run(trained, tmp_path, 'sample', '--readjust_bn')


def test_help_shows_the_modes_and_that_the_runs_data_are_the_default(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(['--eval_mode', 'evaluate', '--help_all'])
    text = ' '.join(capsys.readouterr().out.split())
    shown = re.search(r'--eval_mode MODE what to do, one of the modes: ([\w, ]+) \(', text)[1].split(', ')
    assert set(shown) == set(evaluate.MODES) and "(default: the run's)" in text
