"""Latents out and back in, kept groups, interpolation, traversal, readjusted batch norms that are kept."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import tiles

import evaluate
import train
from distributed import launch
from distributions import Pixels
from evaluation import sampling
from evaluation.latent_space import interpolate, traverse
from families.nvae.config import NVAEConfig
from families.nvae.model import NVAE
from model import load_model
from storage.checkpoint import read_checkpoint
from training.trainer import Trainer
from utils import UserError, read_flags

ONE_THREAD = ('--device', 'cpu', '--num_threads', '1')
SMALL = NVAEConfig(num_channels_enc=4, num_channels_dec=4, num_preprocess_blocks=1, num_postprocess_blocks=1,
                   num_preprocess_cells=1, num_postprocess_cells=1, num_latent_scales=2,
                   num_groups_per_scale=2, num_latent_per_group=3, num_mixture_dec=2, res_dist=True)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return NVAE((1, 16, 16), SMALL, Pixels(bits=5)).eval()


@pytest.fixture(scope='module')
def x():
    return torch.randint(32, (4, 1, 16, 16), generator=torch.Generator().manual_seed(1)) / 31


@pytest.fixture(scope='module')
def trained(train_flags, tmp_path_factory):
    root = tmp_path_factory.mktemp('runs')
    args = train.parse_args([*train_flags, '--root', str(root), '--save', 'a', '--max_steps', '3'])
    assert launch.launch(train.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return root / 'eval-a'


def run(checkpoint, out, mode, *more):
    args = evaluate.parse_args(['--checkpoint', str(checkpoint), '--save', str(out), '--eval_mode', mode,
                                *ONE_THREAD, *map(str, more)])
    assert launch.launch(evaluate.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return json.loads((out / 'metrics.json').read_text())


# ----------------------------------------------------------------------------------------------------- models

@torch.no_grad()
@pytest.mark.parametrize('num_nf', [0, 1])
def test_decoded_latents_are_the_reconstruction(x, num_nf):
    torch.manual_seed(0)
    model = NVAE((1, 16, 16), SMALL.__class__(**vars(SMALL) | {'num_nf': num_nf}), Pixels(bits=5)).eval()
    latents = model.latents(x)
    assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes == [(3, 4, 4)] * 2 + [(3, 8, 8)] * 2
    torch.testing.assert_close(model.decode(latents), model.reconstruct(x))
    # Without the two lowest groups: these come from the prior, as in a reconstruction that skips them.
    torch.testing.assert_close(model.decode(latents[:2]), model.reconstruct(x, skip=2))
    assert (model.decode(latents[:2]) - model.reconstruct(x)).abs().max() > 1e-4


@torch.no_grad()
def test_latents_at_a_temperature_are_drawn_from_the_posterior(model, x):
    torch.manual_seed(3)
    a = model.latents(x, temperature=1.0)
    torch.manual_seed(3)
    terms, again = model(x), model.latents(x, temperature=1.0)
    assert not torch.equal(a[0], model.latents(x)[0]) and terms['kl'].shape == (4, 4)
    torch.manual_seed(3)
    assert all(torch.equal(z, w) for z, w in zip(a, model.latents(x, temperature=1.0)))
    assert not torch.equal(a[0], again[0])


def test_latents_of_another_shape_are_refused(model, x):
    latents = model.latents(x)
    for wrong in ([], latents[1:3], [latents[0], latents[1][:2]], [latents[0][:, :2]]):
        with pytest.raises(UserError, match='latents of shapes'):
            model.decode(wrong)


def test_interpolation_begins_and_ends_at_the_reconstructions(model, x):
    frames = interpolate(model, x[:2], x[2:], 5)
    assert frames.shape == (5, 2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(frames[0], model.reconstruct(x[:2]))
        torch.testing.assert_close(frames[-1], model.reconstruct(x[2:]))
        halves = [(a + b) / 2 for a, b in zip(model.latents(x[:2]), model.latents(x[2:]))]
        torch.testing.assert_close(frames[2], model.decode(halves))


def test_traversal_moves_one_channel_of_one_group(model, x):
    frames, channels = traverse(model, x, [0, 3], -1, [-2.0, 0.0, 2.0])
    assert frames.shape == (3, 2, 4, 1, 16, 16)
    with torch.no_grad():
        for group in (0, 1):
            torch.testing.assert_close(frames[1, group], model.reconstruct(x))      # no shift, no change
            assert (frames[0, group] - frames[2, group]).abs().max() > 1e-5
        information = model(x, temperature=0.0)['kl_channels'].mean(0)
        assert channels == [int(information[0].argmax()), int(information[3].argmax())]
        edited = model.latents(x)
        edited[3][:, channels[1]] += 2
        torch.testing.assert_close(frames[2, 1], model.decode(edited))


# ------------------------------------------------------------------------------------------------------ modes

def test_latents_come_out_and_go_back_in(trained, tmp_path):
    said = run(trained, tmp_path / 'out', 'latents')['latents']
    assert said == {'num_images': 20, 'part': 'test', 'groups': [[2, 4, 4], [2, 8, 8]]}
    files = sorted((tmp_path / 'out').glob('latents_*.npz'))
    first = np.load(files[0])
    assert len(files) == 3 and first['group_1'].shape == (8, 2, 8, 8)
    assert sum(len(np.load(f)['id']) for f in files) == 20 and set(first['label']) <= {0, 1}
    run(trained, tmp_path / 'all', 'decode', '--latents', tmp_path / 'out')
    run(trained, tmp_path / 'seen', 'reconstruct', '--num_samples', 20)
    decoded = np.concatenate([np.load(tmp_path / 'all' / f'decoded_{f.stem}.npz')['images'] for f in files])
    np.testing.assert_allclose(decoded, np.load(tmp_path / 'seen' / 'reconstructions.npz')['reconstruction'],
                               atol=1e-6)
    edited = {name: first[name].copy() for name in ('group_0', 'group_1')}
    edited['group_0'][:] += 3
    np.savez(tmp_path / 'edited.npz', **edited)
    run(trained, tmp_path / 'edited', 'decode', '--latents', tmp_path / 'edited.npz')
    other = np.load(tmp_path / 'edited' / 'decoded_edited.npz')['images']
    assert other.shape == (8, 1, 16, 16) and np.abs(other - decoded[:8]).max() > 1e-3
    assert tiles(tmp_path / 'edited' / 'decoded.png', 3, 3)                          # 8 images in 3 x 3


def test_latents_are_the_same_on_two_processes(trained, tmp_path, forked_processes):
    run(trained, tmp_path / 'one', 'latents')
    run(trained, tmp_path / 'two', 'latents', '--num_process_per_node', 2)
    files = sorted(p.name for p in (tmp_path / 'one').glob('*.npz'))
    assert files == sorted(p.name for p in (tmp_path / 'two').glob('*.npz'))
    for name in files:
        one, two = np.load(tmp_path / 'one' / name), np.load(tmp_path / 'two' / name)
        assert all(np.array_equal(one[key], two[key]) for key in one.files)


@pytest.mark.parametrize(('content', 'message'), [
    ({'group_1': np.zeros((2, 2, 8, 8))}, 'holds 1 groups'),
    ({'group_0': np.zeros((2, 2, 5, 4))}, r'expects group_0'),
    ({'group_0': np.zeros((2, 2, 4, 4)), 'group_1': np.zeros((3, 2, 8, 8))}, 'for the same images'),
    (None, 'cannot be read'),
])
def test_files_that_hold_no_latents_are_named(trained, tmp_path, content, message):
    path = tmp_path / 'bad.npz'
    np.savez(path, **content) if content else path.write_bytes(b'nothing')
    with pytest.raises(UserError, match=message):
        run(trained, tmp_path, 'decode', '--latents', path)


def test_kept_groups(trained, tmp_path):
    said = run(trained, tmp_path, 'reconstruct', '--num_samples', 6, '--keep_groups', 0, 1, 2)['reconstruct']
    arrays = np.load(tmp_path / 'reconstructions.npz')
    run(trained, tmp_path / 'all', 'reconstruct', '--num_samples', 6)
    whole = np.load(tmp_path / 'all' / 'reconstructions.npz')['reconstruction']
    assert np.array_equal(arrays['reconstruction_2'], whole)
    model, x = load_model(trained), torch.from_numpy(arrays['x'])
    with torch.no_grad():
        np.testing.assert_allclose(arrays['reconstruction_1'], model.decode(model.latents(x)[:1]), atol=1e-6)
    assert np.ptp(arrays['reconstruction_0'], axis=0).max() < 1e-6, 'no group kept: the same for all images'
    assert said['mean_absolute_error'].keys() == {'0', '1', '2'}
    assert tiles(tmp_path / 'reconstructions.png', 8, 3)     # 2 sets of 4 in a row
    with pytest.raises(UserError, match='--keep_groups 3: this model has 2'):
        run(trained, tmp_path, 'reconstruct', '--keep_groups', 3)


def test_strips_and_films(trained, tmp_path):
    said = run(trained, tmp_path, 'interpolate', '--num_samples', 3, '--num_frames', 5)['interpolate']
    assert len(said['pairs']) == 3 and len({name for pair in said['pairs'] for name in pair}) == 6
    assert tiles(tmp_path / 'interpolation.png', 5, 3)
    assert Image.open(tmp_path / 'interpolation.gif').n_frames == 8      # there and back
    said = run(trained, tmp_path, 'traverse', '--num_samples', 2, '--num_frames', 3, '--channel', 1,
               '--reach', 2)['traverse']
    assert said['groups'] == [0, 1] and said['channels'] == [1, 1] and said['shifts'] == [-2, 0, 2]
    arrays = np.load(tmp_path / 'traversal_1.npz')
    assert arrays['images'].shape == (2, 3, 1, 16, 16) and str(arrays['id']) == said['id'][1]
    assert tiles(tmp_path / 'traversal_0.png', 3, 2)
    assert Image.open(tmp_path / 'traversal_0.gif').n_frames == 4


@pytest.mark.parametrize(('mode', 'flags', 'message'), [
    ('traverse', ('--channel', 2), '--channel 2: a group has 2, give 0 to 1'),
    ('traverse', ('--groups', 0, 2), '--groups 2: this model has 2'),
    ('interpolate', ('--num_samples', 11), '22 images are wanted, the test part has 20'),
    ('interpolate', ('--num_frames', 1), '--num_frames 1'),
    ('decode', (), 'decode needs the file'),
    ('sample', ('--latents', 'x.npz'), '--latents is a flag of --eval_mode decode, not of sample'),
    ('sample', ('--save_bn',), '--save_bn does nothing without --readjust_bn'),
])
def test_mistakes_are_said_in_a_line(trained, tmp_path, mode, flags, message):
    with pytest.raises(UserError, match=message):
        run(trained, tmp_path, mode, *flags)


def test_readjusted_batch_norms_are_kept(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, 'readjust_batch_norm', partial(sampling.readjust_batch_norm, passes=5))
    run(trained, tmp_path / 'a', 'sample', '--num_samples', 3, '--readjust_bn', '--save_bn', '--temp', 0.5)
    kept = read_checkpoint(tmp_path / 'a' / 'checkpoint.pt')
    assert kept['readjusted_to'] == 0.5
    before, after = read_checkpoint(trained)['weights'], kept['weights']
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all('running_' in name or 'num_batches' in name for name in changed)
    # The kept checkpoint draws without readjusting what the first call drew with it.
    run(tmp_path / 'a', tmp_path / 'b', 'sample', '--num_samples', 3, '--temp', 0.5)
    a, b = (np.load(tmp_path / name / 'samples_0.npz')['samples'] for name in 'ab')
    assert np.array_equal(a, b)
    args = train.parse_args(['--root', str(tmp_path), '--save', 'a', '--cont_training'])
    (tmp_path / 'a').rename(tmp_path / 'eval-a')
    with pytest.raises(UserError, match='not a checkpoint of a run'):
        Trainer(args)
