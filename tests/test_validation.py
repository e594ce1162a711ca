"""What a family may choose of the loop: its optimizer, its figure; and the best model of the validations."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from test_train import run
from torch import nn

import model
import train
from evaluation.likelihood import mean_objective
from model import load_model
from storage.checkpoint import read_checkpoint
from storage.run_log import RunLog
from training import trainer
from utils import UserError, flag, flags


@flags
class MeanConfig:
    """Flags of the mean"""
    defaults = {'optimizer': 'adam', 'learning_rate': 0.02, 'learning_rate_min': 0.02, 'keep_best': True}

    start: float = flag(0.0, 'gray level before training')


class Mean(nn.Module):
    """The smallest family without a likelihood: it learns the mean gray level."""

    Config = MeanConfig

    def __init__(self, shape, config, pixels):
        super().__init__()
        self.shape, self.config, self.pixels = shape, config, pixels
        self.level = nn.Parameter(torch.tensor(config.start))

    def forward(self, x, skip=0, temperature=1.0, prior_temperature=1.0):
        return {'loss': ((x - self.level) ** 2).flatten(1).mean(1)}

    def objective(self, terms, progress):
        return terms['loss'].mean(), {}


def metrics(folder, name):
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.fixture
def mean_flags(train_flags, monkeypatch):
    monkeypatch.setitem(model.MODELS.rows, 'mean', ('mean', 'Mean', 'MeanConfig'))
    for part in ('model', 'config'):
        monkeypatch.setitem(sys.modules, f'families.mean.{part}', sys.modules[__name__])
    at = train_flags.index('--dataset')                        # before it are flags of NVAE
    return ['--model', 'mean', *train_flags[at:]]


def test_the_objective_of_a_short_last_batch_counts_by_its_images():
    images = torch.zeros(3, 1, 2, 2), torch.ones(1, 1, 2, 2)
    batches = [(i, SimpleNamespace(x=x)) for i, x in enumerate(images)]
    assert mean_objective(Mean((1, 2, 2), Mean.Config(), None), batches, 0) == approx(1 / 4)


def test_a_family_without_likelihood_trains_in_the_same_loop(mean_flags, tmp_path):
    folder = run(mean_flags, tmp_path, 'mean', '--epochs', '6', '--start', '0.9')
    losses = metrics(folder, 'val/loss')
    assert len(losses) == 6 and losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
    assert len(metrics(folder, 'train/loss_avg')) == 24 and not metrics(folder, 'train/nelbo_avg')
    assert load_model(folder).level.item() < 0.9


def test_the_defaults_of_a_family_are_those_of_its_flags(mean_flags):
    args = train.parse_args(mean_flags)
    assert (args.optimizer, args.learning_rate, args.keep_best) == ('adam', 0.02, True)
    assert args.weight_decay == 3e-4, "the flag's own"
    assert not train.parse_args([*mean_flags, '--no-keep_best']).keep_best
    assert train.parse_args([]).optimizer == 'adamax', 'the published NVAE'


def test_the_first_step_of_adam_is_the_learning_rate(mean_flags, tmp_path):
    """Adam's first update is -rate * sign(gradient) (Kingma and Ba 2015, section 2)."""
    folder = run(mean_flags, tmp_path, 'one', '--max_steps', '1', '--start', '0.9', '--warmup_epochs', '0',
                 '--weight_decay', '0')
    assert load_model(folder).level.item() == approx(0.9 - 0.02, abs=1e-5)


def test_the_best_model_is_kept_and_resuming_does_not_forget_it(mean_flags, tmp_path):
    """At this rate the level swings: the last model is not the best one."""
    flags = [*mean_flags, '--epochs', '7', '--start', '0.9', '--warmup_epochs', '0',
             '--learning_rate', '0.3']
    whole = run(flags, tmp_path, 'whole')
    best, losses = read_checkpoint(whole / 'best.pt'), metrics(whole, 'val/loss')
    assert best['validation'] == min(losses) < losses[-1]
    assert best['step'] == 4 * (1 + losses.index(min(losses))), 'validated every 4 steps'
    assert load_model(whole / 'best.pt').level != load_model(whole).level

    run(flags, tmp_path, 'parts', '--max_steps', str(best['step'] + 4))
    parts = run(flags, tmp_path, 'parts', '--cont_training')
    assert torch.equal(load_model(parts / 'best.pt').level, load_model(whole / 'best.pt').level)


@pytest.mark.parametrize('moment', ['before the validation', 'before its line'])
def test_an_end_between_checkpoint_and_validation_does_not_lose_the_best_model(mean_flags, tmp_path, moment,
                                                                              monkeypatch):
    flags = [*mean_flags, '--epochs', '4', '--start', '0.9', '--warmup_epochs', '0', '--learning_rate', '0.3']
    whole = run(flags, tmp_path, 'whole')
    best = read_checkpoint(whole / 'best.pt')
    target = (trainer.Trainer, 'validate') if moment == 'before the validation' else (RunLog, 'metrics')
    real = getattr(*target)

    def killed(self, *args):
        step = args[0] if args else self.optimization.step
        if step == best['step'] and (not args or 'val/loss' in args[1]):
            raise KeyboardInterrupt
        return real(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(*target, killed)
        with pytest.raises(KeyboardInterrupt):
            run(flags, tmp_path, 'parts')
    assert read_checkpoint(tmp_path / 'eval-parts')['step'] == best['step']
    parts = run(flags, tmp_path, 'parts', '--cont_training')
    assert torch.equal(load_model(parts / 'best.pt').level, load_model(whole / 'best.pt').level)
    assert metrics(parts, 'val/loss') == metrics(whole, 'val/loss')


def test_what_is_chosen_is_not_chosen_on_the_test_part(mean_flags, tmp_path):
    with pytest.raises(UserError, match='--val_fraction'):
        run(mean_flags, tmp_path, 'none', '--val_fraction', '0')


def test_another_optimizer_cannot_go_on(mean_flags, tmp_path):
    run(mean_flags, tmp_path, 'a', '--max_steps', '2')
    with pytest.raises(UserError, match='--optimizer adam then, adamax now'):
        run(mean_flags, tmp_path, 'a', '--cont_training', '--optimizer', 'adamax')
