"""Numbers that are not finite never reach a checkpoint; a run that cannot go on says so and fails."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_train import run
from torch.nn import Linear

import train
from distributed import launch
from model import load_model
from storage.checkpoint import copies, fingerprint, not_finite, read_checkpoint
from training import optimization as update
from training.recovery import EVIDENCE, first_not_finite
from training.trainer import Trainer
from utils import UserError

WEIGHT = 'stem.weight'


def planted(patch, where, at, once=True, rank=0):
    """From step `at` on, `once` or ever again, a number that is not finite, in the process of this rank."""
    real, done = train.train_step, []

    def step(trainer, images):
        here = trainer.optimization.step >= at and launch.rank() == rank and not (once and done)
        done.extend([1] * here)
        if here and where == 'data':
            images[0][0] = math.nan
        if here and where == 'weight':
            dict(trainer.model.named_parameters())[WEIGHT].data[0] = math.inf
        if here and where == 'gradient':
            trainer.model.stem.weight.register_hook(lambda g: g * math.nan)
        logs = real(trainer, images)
        if here and where == 'average':
            trainer.optimization.average.module.state_dict()[WEIGHT][0] = math.nan
        return logs
    patch.setattr(train, 'train_step', step)
    patch.setattr(update, 'MOST_SKIPPED', 3)


@pytest.fixture
def plant(monkeypatch):
    return partial(planted, monkeypatch)


def finite(folder):
    states = [read_checkpoint(path) for path in copies(folder / 'checkpoint.pt')]
    return states[0]['step'] if not any(not_finite(state) for state in states) else None


def test_one_batch_that_is_not_finite_costs_one_step_and_no_save(train_flags, tmp_path, plant, capsys):
    plant('data', 3)
    folder = run(train_flags, tmp_path, 'a', '--save_every', '4')      # step 4 is skipped: 5 is saved
    assert finite(folder) == 8 and read_checkpoint(folder / 'checkpoint-1.pt')['step'] == 5
    assert 'done: 8 steps, 1 skipped' in capsys.readouterr().out


@pytest.mark.parametrize('where, told', [
    ('weight', f'3 steps in a row .* the weight {WEIGHT}'), ('average', 'there is a weight')])
def test_weights_go_back_to_the_last_checkpoint_at_half_the_rate(where, told, train_flags, tmp_path, plant,
                                                                capsys):
    plant(where, 5)
    folder = run(train_flags, tmp_path, 'a', '--save_every', '2', '--ema_decay', '0.9')
    assert finite(folder) == 8 and read_checkpoint(folder)['returns'] == 1
    said = capsys.readouterr().out
    assert 'back to step 4, at 1/2 of the learning rate' in said and 'done: 8 steps' in said
    assert re.search(told, said), said
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    steps = [line['step'] for line in lines if 'train/lr' in line]
    assert steps == list(range(1, 9)), 'each step is logged once'
    rates = {line['step']: line['train/lr'] for line in lines if 'train/lr' in line}
    assert rates[6] == pytest.approx(0.5e-2)
    evidence = read_checkpoint(folder / EVIDENCE)
    assert evidence['images'][0].shape == (8, 1, 16, 16) and evidence['step'] in (6, 8)
    assert load_model(folder).stem.weight.isfinite().all()


@pytest.mark.parametrize('where, told', [('data', 'the images'), ('gradient', f'the gradient of {WEIGHT}')])
def test_a_run_that_diverges_again_and_again_ends_with_an_error(where, told, train_flags, tmp_path, plant):
    plant(where, 5, once=False)
    with pytest.raises(UserError, match=f'first such number is in {told} .*after 3 returns to a checkpoint'):
        run(train_flags, tmp_path, 'a', '--save_every', '2')
    assert finite(tmp_path / 'eval-a') == 4


def test_the_best_model_is_finite_too(train_flags, tmp_path, plant):
    """The planted number is far from the loss: validations stay finite."""
    build = Trainer._build_model

    def with_idle(self, initial):
        model = build(self, initial)
        model.register_buffer('idle', torch.tensor(math.nan))
        return model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, '_build_model', with_idle)
        with pytest.raises(UserError, match='The run has diverged: there is no checkpoint'):
            run(train_flags, tmp_path, 'a', '--keep_best', '--save_every', '100')
    assert not copies(tmp_path / 'eval-a' / 'best.pt')


def test_no_process_looks_for_the_layer_where_one_knows_the_cause(monkeypatch):
    """Batch norms of several GPUs wait for all processes in each pass."""
    model, passes = Linear(2, 2), []
    model.register_forward_hook(lambda *_: passes.append(1))
    optimization, images = SimpleNamespace(model=model, step=1), [torch.zeros(1, 2)]
    assert first_not_finite(optimization, images, 0) == '' and passes == [1]
    monkeypatch.setattr(launch, 'any_rank', lambda here: True)                # another process has one
    assert first_not_finite(optimization, images, 0) == '' and passes == [1]
    assert first_not_finite(optimization, [images[0] / 0], 0) == 'the images' and passes == [1]


# ------------------------------------------------------------------------------------- one process of two

SURVIVED = {'data': 'done: 8 steps, 1 skipped', 'average': 'there is a weight that is not finite; .* back to',
            'weight': f'in a row had a gradient that is not finite; .* in the weight {WEIGHT} .* back to'}
LOST = {'data': 'in the images .* after 3 returns',
        'gradient': f'in the gradient of {WEIGHT} .*after 3 returns'}


def train_each(args):
    """Trains with each of these in process 1, which is not the one that writes files."""
    root, announce = args.root, Trainer.announce
    for once, where in [(True, where) for where in SURVIVED] + [(False, where) for where in LOST]:
        args.root, trainers, error = f'{root}/{where}-{once}', [], None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, 'announce',
                          lambda self, seen=trainers: (seen.append(self), announce(self)))
            planted(patch, where, 5, once, rank=1)
            try:
                train.work(args)
            except UserError as raised:
                error = raised
        ends = launch.gather([(fingerprint(trainers[0].optimization.evaluated), str(error))])
        assert ends[0] == ends[1], f'{where}: the processes went different ways'
        assert error is None if once else re.search(LOST[where], ends[0][1]), ends
    raise error


def test_on_one_process_of_two_it_is_survived_said_and_agreed_on(train_flags, tmp_path, forked_processes):
    args = train.parse_args([*train_flags, '--root', str(tmp_path), '--batch_size', '4', '--save_every', '2',
                             '--ema_decay', '0.9', '--num_process_per_node', '2', '--weight_decay_norm', '0'])
    with pytest.raises(UserError, match=LOST['gradient']):
        launch.launch(train_each, args, train.read_flags(launch.LaunchConfig, args))
    for where, told in SURVIVED.items():
        folder = tmp_path / f'{where}-True' / 'eval-exp'
        assert finite(folder) == 8 and re.search(told, (folder / 'log.txt').read_text()), where
    for where in LOST:
        folder = tmp_path / f'{where}-False' / 'eval-exp'
        assert finite(folder) == 4, where
        assert (folder / 'log.txt').read_text().count('of the learning rate') == 3, where
    images, = read_checkpoint(tmp_path / 'data-False' / 'eval-exp' / EVIDENCE)['images']
    assert images.isnan().any(), 'those of the process that met the number'


# -------------------------------------------------------------------------------------------------- the end

def test_a_run_without_a_checkpoint_has_nothing_to_go_back_to(train_flags, tmp_path, plant):
    plant('weight', 0)
    with pytest.raises(UserError, match='The run has diverged: there is no checkpoint'):
        run(train_flags, tmp_path, 'a')
    assert not copies(tmp_path / 'eval-a' / 'checkpoint.pt')


def test_a_layer_is_named_by_its_output(train_flags, tmp_path, plant, monkeypatch):
    plant('none', 0)
    build = Trainer._build_model

    def broken(self, initial):
        model = build(self, initial)
        model.stem.register_forward_hook(lambda _, inputs, output: output * math.inf)
        return model
    monkeypatch.setattr(Trainer, '_build_model', broken)
    with pytest.raises(UserError, match='first such number is in the output of layer stem'):
        run(train_flags, tmp_path, 'a')


def test_an_evaluation_of_weights_that_are_not_finite_is_refused(train_flags, tmp_path):
    folder = run(train_flags, tmp_path, 'a', '--max_steps', '1')
    content = torch.load(folder / 'checkpoint.pt', weights_only=True)
    content['weights'][WEIGHT][0] = math.nan
    torch.save(content, folder / 'checkpoint.pt')
    with pytest.raises(UserError, match=f'numbers that are not finite, first in {WEIGHT}'):
        load_model(folder)
