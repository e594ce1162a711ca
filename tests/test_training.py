"""What a training step can do besides: accumulate batches, batch norms of averaged weights, the dry run."""

import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from ranks import as_rank
from torch import nn

import train
from distributed import launch
from distributions import Pixels
from evaluation.sampling import recalibrate_batch_norm
from families.nvae.config import NVAEConfig
from families.nvae.model import NVAE
from neural_operations import activation_bytes, checkpoint_activations
from readers.batches import train_batches
from storage.checkpoint import read_checkpoint
from training.config import DECAYS, Schedule, TrainConfig
from training.dry_run import Memory, advice
from training.optimization import OPTIMIZERS, average_decay, average_of, check_graph
from training.run_folder import begun_mark
from training.trainer import Trainer
from utils import UserError, read_flags


def run(flags, root, name, *more):
    args = train.parse_args([*flags, '--root', str(root), '--save', name, *more])
    assert launch.launch(train.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return root / f'eval-{name}'


# ----------------------------------------------------------------------------------------------- accumulation

def gradient(monkeypatch, train_flags, root, *flags, rank=0, world=1):
    """The gradient of the second step of process `rank` of `world`: its own, before ranks are averaged."""
    args = train.parse_args([*train_flags, '--root', str(root), '--save', 'a', '--batch_size', '4',
                             '--weight_decay_norm', '0', *flags])
    trainer = Trainer(args)
    trainer.optimization.step, trainer.schedule = 1, replace(trainer.schedule, steps=4)
    trainer.optimization.update = dict
    accumulate = trainer.config.accumulate
    with as_rank(rank, world):
        batches = train_batches(trainer.data.train, 4, seed=1, accumulate=accumulate, first_step=1)
    monkeypatch.setattr(launch, 'rank', lambda: rank)
    train.train_step(trainer, [batch.x for batch in islice(batches, accumulate)])
    monkeypatch.undo()
    return [p.grad for p in trainer.model.parameters()]


def test_accumulated_batches_are_those_of_as_many_processes(monkeypatch, train_flags, tmp_path):
    """Same images, same noise: the accumulated gradient is the mean of what two ranks would compute."""
    accumulated = gradient(monkeypatch, train_flags, tmp_path, '--accumulate', '2')
    ranks = [gradient(monkeypatch, train_flags, tmp_path, rank=rank, world=2) for rank in (0, 1)]
    assert (ranks[0][0] - ranks[1][0]).abs().max() > 1e-3, 'ranks see other images'
    for a, b, c in zip(accumulated, *ranks):
        assert (a - (b + c) / 2).norm() <= 1e-4 * b.norm(), 'rounding aside'


def test_resume_with_accumulation_is_exact(train_flags, tmp_path, same_weights):
    flags = [*train_flags, '--batch_size', '4', '--accumulate', '2']
    whole = run(flags, tmp_path, 'whole')
    run(flags, tmp_path, 'part', '--max_steps', '3')
    part = run(flags, tmp_path, 'part', '--cont_training')
    assert same_weights(whole / 'checkpoint.pt', part / 'checkpoint.pt')


# ------------------------------------------------------------------------------- rates, averages, updates

def test_schedules():
    """A warm-up of 10 of 100 steps, then nothing, a cosine, or a factor of 0.3 after every 40 % of them."""
    def rates(schedule, lowest):
        config = TrainConfig(epochs=10, warmup_epochs=1, learning_rate=1.0, learning_rate_min=lowest,
                             lr_schedule=schedule)
        return [Schedule(config, 10).learning_rate(step) for step in (5, 10, 39, 40, 79, 80, 99)]
    assert rates('constant', 0.1) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1])
    assert rates('cosine_by_step', 0.1) == pytest.approx(
        [0.5, *(0.1 + 0.45 * (1 + math.cos(math.pi * step / 90)) for step in (0, 29, 30, 69, 70, 89))])
    assert rates('step', 0.0) == pytest.approx([0.5, 1, 1, 0.3, 0.3, 0.09, 0.09])
    assert rates('step', 0.1) == pytest.approx([0.5, 1, 1, 0.37, 0.37, 0.181, 0.181])


def test_what_is_due_after_which_step():
    """3 epochs of 4 steps, cut after 10: pictures every 5 steps, validation every 2 epochs, logs every 3."""
    config = TrainConfig(epochs=3, max_steps=10, image_every=5, val_every=2, log_every=3)
    due = {step: Schedule(config, 4).due(step) for step in range(1, 11)}
    assert {step: names for step, names in due.items() if names} == {
        3: {'log'}, 4: {'epoch', 'save'}, 5: {'show'}, 6: {'log'}, 8: {'epoch', 'save', 'validate'},
        9: {'log'}, 10: {'log', 'save'}}
    assert 'save' not in Schedule(TrainConfig(epochs=3, save_every=3), 4).due(4)
    often = Schedule(TrainConfig(epochs=3, val_steps=3), 4)
    assert [step for step in range(1, 13) if 'validate' in often.due(step)] == [3, 6, 9]


def test_what_averages_keep():
    decays = [average_decay(n, TrainConfig(ema_decay=0.9)) for n in (1, 2, 99)]
    assert decays == [0, 0.9, 0.9]
    decays = [average_decay(n, TrainConfig(ema_decay=0.9, ema_ramp=True)) for n in (1, 2, 10 ** 6)]
    assert decays == pytest.approx([2 / 11, 3 / 12, 0.9])
    config = TrainConfig(ema_halflife_kimg=1.0)
    assert average_decay(3, config, images=100) ** 10 == pytest.approx(0.5), '1000 images are 10 updates'
    config = TrainConfig(ema_halflife_kimg=1.0, ema_rampup_ratio=0.5)   # after 4 updates, half of 400 images
    assert [average_decay(n, config, images=100) for n in (4, 20, 50)] == pytest.approx(
        [0.5 ** 0.5, 0.5 ** 0.1, 0.5 ** 0.1])
    assert average_decay(7, TrainConfig(ema_halflife_kimg=1.0, reptile_steps=5), 100) == pytest.approx(
        0.5 ** 0.5), 'updates every 5 steps'


def test_an_average_copies_whole_numbers_and_leaves_what_does_not_change():
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer('order', torch.arange(50))
    model.register_parameter('frozen', nn.Parameter(torch.rand(50), requires_grad=False))
    frozen, average = model.frozen.clone(), average_of(model, TrainConfig(ema_decay=0.9))
    for value in (1.0, 2.0, 3.0):
        model.weight.data.fill_(value)
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx((1 * 0.9 + 2 * 0.1) * 0.9 + 3 * 0.1)
    assert torch.equal(average.module.order, torch.arange(50)) and torch.equal(average.module.frozen, frozen)


@pytest.mark.parametrize('name, first', [('adamw', 0.9), ('radam', 0.0)])
def test_first_steps_of_optimizers(name, first):
    """At a rate of 1: AdamW takes the decay off the weight and moves by the rate; RAdam, before it knows the
    variance, by the gradient, to which the decay is added: 2 - (0.1 * 2 + 1.8)."""
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = OPTIMIZERS[name]([weight], lr=1.0, weight_decay=0.05 if name == 'adamw' else 0.1,
                                       betas=(0.9, 0.999), foreach=False)
    weight.grad = torch.tensor([1.8])
    optimizer.step()
    assert weight.item() == pytest.approx(first, abs=1e-5)


def test_two_averages_at_once_are_refused():
    with pytest.raises(UserError, match='set one of them to 0'):
        TrainConfig(ema_decay=0.9, ema_halflife_kimg=1.0)


def test_choices_known_without_pytorch_are_the_tables():
    choices = {field.name: field.metadata.get('choices') for field in fields(TrainConfig)}
    assert choices['optimizer'] == tuple(OPTIMIZERS) and choices['lr_schedule'] == tuple(DECAYS)


# -------------------------------------------------------------------------------------- averaged batch norms

def test_recalibrated_statistics_are_those_of_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, momentum=0.05))
    batches = [torch.randn(8, 1, 4, 4) * 3 + 1 for _ in range(5)]
    recalibrate_batch_norm(model, batches, seed=1)
    with torch.no_grad():
        seen = [model[0](x) for x in batches]
    mean = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert model[1].momentum == 0.05 and not model.training


def test_averaged_weights_get_statistics_of_their_own(train_flags, tmp_path, same_weights):
    """Of what the average itself computes; and a resumed run is the same to the bit."""
    flags = [*train_flags, '--ema_decay', '0.9', '--ema_bn_batches', '4']
    whole = run(flags, tmp_path, 'whole')
    averaged = run(flags[:-2], tmp_path, 'averaged')
    a, b = read_checkpoint(whole)['ema'], read_checkpoint(averaged)['ema']
    differing = {name.rsplit('.', 1)[1] for name in a if not torch.equal(a[name], b[name])}
    assert differing <= {'running_mean', 'running_var', 'num_batches_tracked'} | {
        n for n in differing if re.fullmatch(r'[uv]\d+', n)}
    assert 'running_mean' in differing
    run(flags, tmp_path, 'part', '--max_steps', '3')
    part = run(flags, tmp_path, 'part', '--cont_training')
    assert same_weights(whole / 'checkpoint.pt', part / 'checkpoint.pt')
    # By hand: the first batch norm sees what the stem of the averaged weights puts out, over these batches.
    args = train.parse_args([*flags, '--root', str(tmp_path), '--save', 'whole', '--cont_training'])
    trainer = Trainer(args)
    norm = next(m for m in trainer.optimization.average.module.modules() if isinstance(m, nn.BatchNorm2d))
    stored, seen = norm.running_mean.clone(), []
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    trainer.recalibrate()
    handle.remove()
    assert len(seen) == 4
    torch.testing.assert_close(stored, torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('flags, needed', [
    (['--ema_bn_batches', '3'], '--ema_decay or --ema_halflife_kimg'), (['--ema_ramp'], '--ema_decay'),
    (['--reptile_steps', '2'], '--ema_decay or --ema_halflife_kimg'),
    (['--ema_decay', '0.9', '--ema_rampup_ratio', '0.1'], '--ema_halflife_kimg')])
def test_flags_of_an_average_that_is_not_kept_are_refused(flags, needed):
    with pytest.raises(UserError, match=f'{flags[-1] if len(flags) == 1 else flags[-2]} does nothing without '
                                        f'{needed}:'):
        train.parse_args(flags)


# ------------------------------------------------------------------------------------------------ the dry run

MNIST = '''--dataset mnist --batch_size 3 --epochs 400 --num_latent_scales 2 --num_groups_per_scale 4
    --ada_groups --num_channels_enc 8 --num_channels_dec 8 --use_se --res_dist --weight_decay_norm 1e-2
    --num_process_per_node 2 --device cpu --num_threads 1'''.split()


def test_a_dry_run_needs_no_data_and_leaves_nothing(program, tmp_path):
    done = program('train.py', '--dry_run', *MNIST, '--root', tmp_path / 'runs')
    model = NVAE((1, 32, 32), read_flags(NVAEConfig, train.parse_args(MNIST)), Pixels('bernoulli'))
    number = sum(p.numel() for p in model.parameters())
    assert f'{number / 1e6:.2f} M ({number:,})' in done.stdout
    assert model.num_groups == 6 and re.search(r'latent groups +6\n', done.stdout)
    assert re.search(r'images +1 x 32 x 32, bernoulli, 60,000 to train on', done.stdout)
    assert re.search(r'memory +[\d.]+ GB at most of [\d.]+ GB free on cpu', done.stdout)
    speed = float(re.search(r'speed +([\d.]+) images/s', done.stdout)[1])
    time = r'time +(\d+) days?, (\d+):\d\d:\d\d for 4,000,000 steps of 6 images on 2 processes'
    days, hours = map(int, re.search(time, done.stdout).groups())
    assert 24 * days + hours == pytest.approx(4e6 * 3 / speed / 3600, rel=0.05)
    assert not (tmp_path / 'runs').exists()


def test_a_dry_run_with_data_counts_their_images(train_flags, tmp_path, capsys):
    assert train.dry_run(train.parse_args([*train_flags, '--root', str(tmp_path / 'runs')])) == 0
    told = capsys.readouterr().out
    assert '32 to train on' in told and '8 steps of 8 images' in told
    assert not (tmp_path / 'runs').exists()


def test_a_dry_run_that_does_not_fit_says_what_to_change(capsys):
    flags = '''--dry_run --dataset ffhq --num_preprocess_blocks 1 --num_postprocess_blocks 1
        --num_groups_per_scale 1 --batch_size 5000 --checkpoint_activations off --device cpu
        --num_threads 1'''.split()
    assert train.dry_run(train.parse_args(flags)) == 1
    told = capsys.readouterr().out
    assert 'does not fit' in told and re.search(r'--batch_size \d+ --accumulate \d+', told)


def test_advice():
    memory = Memory(fixed=1000, image=100, image_recomputed=10)
    assert memory.need(10, recomputed=False) == 1000 + 10 * 1.3 * 100
    assert memory.largest_batch(2400, recomputed=False) == 10
    assert advice(memory, 2400, 20, 1, recomputed=False) == [
        '--checkpoint_activations on: the same numbers, about a third slower',
        '--batch_size 10 --accumulate 2: the joint batch stays as it is']
    assert advice(memory, 1200, 20, 2, recomputed=True) == [
        '--batch_size 15 --accumulate 3: the joint batch stays as it is']
    assert 'fewer --num_channels_enc' in advice(memory, 900, 20, 1, recomputed=False)[0]


def test_estimated_activations_are_what_autograd_keeps():
    """Against the storages that a real forward pass saves, with and without recomputation."""
    torch.manual_seed(0)
    model = NVAE((1, 32, 32), NVAEConfig(num_channels_enc=8, num_channels_dec=8, use_se=True), Pixels())

    def kept(images):
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        model.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            terms = model(torch.rand(images, 1, 32, 32))
        del terms
        return sum(storage.nbytes() for storage in storages.values())

    plain, recomputed = (activation_bytes(model, (1, 32, 32), on) for on in (False, True))
    assert plain == pytest.approx((kept(4) - kept(2)) / 2, rel=0.02)
    checkpoint_activations(model)
    assert activation_bytes(model, (1, 32, 32)) == plain and model.training
    inputs = (kept(4) - kept(2)) / 2
    assert inputs < recomputed < 0.35 * plain, 'the inputs of the cells, and one cell'


@pytest.mark.parametrize('changes, told', [
    ({}, 'is for a GPU: this run is on the CPU'),
    ({'device': 'cuda', 'world': 2}, 'is for one process'),
    ({'device': 'cuda', 'accumulate': 2}, 'and --accumulate exclude each other'),
    ({'device': 'cuda', 'recomputes': True}, 'and --checkpoint_activations exclude each other'),
    ({'device': 'cuda', 'capturable': False}, 'is not for Linear')])
def test_passes_that_cannot_be_a_graph(changes, told, monkeypatch):
    case = {'device': 'cpu', 'world': 1, 'accumulate': 1, 'recomputes': False, 'capturable': True} | changes
    monkeypatch.setattr(launch, 'device', lambda: torch.device(case['device']))
    monkeypatch.setattr(launch, 'world', lambda: case['world'])
    model = torch.nn.Linear(1, 1)
    model.capturable = case['capturable']
    with pytest.raises(UserError, match=f'--cuda_graph {told}'):
        check_graph(model, case['accumulate'], case['recomputes'])


def test_the_mark_of_a_run_under_way_is_that_of_one_torchrun(monkeypatch):
    """It stands beside the logs of all attempts, so a restart finds it, and another torchrun does not."""
    marks = []
    for attempt in ('none_abc/attempt_0/1', 'none_abc/attempt_1/0', 'none_xyz/attempt_0/0'):
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', f'/logs/{attempt}/error.json')
        marks.append(begun_mark())
    assert marks[0] == marks[1] == Path('/logs/none_abc/begun') != marks[2]
    monkeypatch.delenv('TORCHELASTIC_ERROR_FILE')
    assert begun_mark() is None


def test_a_start_imports_nothing_of_evaluations_and_collects_garbage_afterwards(tmp_path):
    code = ("import gc, sys, train, training.trainer\n"
            "found = {'scipy', 'sklearn', 'matplotlib', 'torchvision', 'pandas'} & sys.modules.keys()\n"
            "assert not found, found\n"
            "gc.disable()\n"
            "training.trainer.Trainer = lambda args: sys.exit(str(gc.isenabled()))\n"
            f"train.work(train.parse_args(['--root', {str(tmp_path)!r}]))")
    ended = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr == 'True\n'
