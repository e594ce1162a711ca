"""The training loop: schedule, resume to the bit, kills, several processes, what a run leaves behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from pytest import approx
from torch.nn.parallel import DistributedDataParallel

import train
from distributed import launch
from training.config import Schedule, TrainConfig
from training.optimization import Optimization
from utils import UserError


def run(flags, root, name, *more):
    """Trains in this process; returns the run folder."""
    args = train.parse_args([*flags, '--root', str(root), '--save', name, *more])
    assert launch.launch(train.work, args, train.read_flags(launch.LaunchConfig, args)) == 0
    return root / f'eval-{name}'


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *launch.ENDING)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope='module')
def whole(train_flags, tmp_path_factory):
    """A run that was never interrupted, with an average of the weights."""
    return run(train_flags, tmp_path_factory.mktemp('runs'), 'whole', '--ema_decay', '0.9')


def test_what_a_run_leaves_behind(whole):
    assert {'checkpoint.pt', 'args.json', 'split.json', 'log.txt', 'metrics.jsonl'} <= {
        p.name for p in whole.iterdir()
    }
    lines = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
    names = set().union(*lines)
    for tag in (
        'train/nelbo',
        'train/nelbo_avg',
        'train/nelbo_iter',
        'train/recon_iter',
        'train/kl_iter',
        'train/lr',
        'train/norm_loss',
        'train/bn_loss',
        'train/norm_coeff',
        'kl_coeff/coeff',
        'kl_coeff/layer_0',
        'kl_vals/layer_1',
        'kl/active_0',
        'kl/total_active',
        'val/neg_log_p',
        'val/nelbo',
        'val/bpd_log_p',
        'val/bpd_elbo',
        'train/skipped',
    ):
        assert tag in names, tag
    assert any(p.name.startswith('events.out.tfevents') for p in whole.iterdir())
    assert json.loads((whole / 'args.json').read_text())['batch_size'] == 8
    parts = [
        f['part'] for f in json.loads((whole / 'split.json').read_text())['files'] if f['class'] == 'normal'
    ]
    assert {part: parts.count(part) for part in set(parts)} == {'train': 32, 'val': 8, 'test': 10}


def test_training_lowers_the_loss(whole):
    values = [
        json.loads(line).get('train/nelbo_iter')
        for line in (whole / 'metrics.jsonl').read_text().splitlines()
    ]
    values = [v for v in values if v is not None]
    assert len(values) == 8 and values[-1] < 0.98 * values[0]


@pytest.mark.parametrize('stop', [1, 4, 7])
def test_resume_equals_the_uninterrupted_run_bit_by_bit(train_flags, whole, tmp_path, same_weights, stop):
    more = ('--ema_decay', '0.9', '--cont_training')
    run(train_flags, tmp_path, 'parts', *more, '--max_steps', str(stop))
    folder = run(train_flags, tmp_path, 'parts', *more)
    assert torch.load(folder / 'checkpoint.pt', weights_only=True)['step'] == 8
    assert same_weights(folder / 'checkpoint.pt', whole / 'checkpoint.pt')


def test_another_seed_gives_another_run(train_flags, whole, tmp_path, same_weights):
    """The comparison above can fail."""
    other = run(train_flags, tmp_path, 'seed', '--ema_decay', '0.9', '--seed', '2')
    assert not same_weights(other / 'checkpoint.pt', whole / 'checkpoint.pt')


def test_weight_average(train_flags, tmp_path):
    """With decay d, after one step the average is d w0 + (1 - d) w1."""
    start = run(train_flags, tmp_path, 'a', '--ema_decay', '0.75', '--max_steps', '1')
    state = torch.load(start / 'checkpoint.pt', weights_only=True)
    later = run(train_flags, tmp_path, 'a', '--ema_decay', '0.75', '--max_steps', '2', '--cont_training')
    after = torch.load(later / 'checkpoint.pt', weights_only=True)
    name = 'stem.weight'
    torch.testing.assert_close(after['ema'][name], 0.75 * state['ema'][name] + 0.25 * after['weights'][name])
    assert not torch.equal(after['ema'][name], after['weights'][name])


def start(flags, root, name, *more):
    return subprocess.Popen(
        [sys.executable, 'train.py', *flags, '--root', str(root), '--save', name, *more],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, process, seconds=60):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, f'no {path.name} after {seconds} s'
        time.sleep(0.02)


def test_killed_at_once_and_resumed_ends_with_the_same_weights(train_flags, tmp_path, same_weights):
    flags = [*train_flags, '--epochs', '6', '--val_every', '100']
    process = start([*flags, '--save_every', '1'], tmp_path, 'killed')
    wait_for(tmp_path / 'eval-killed' / 'checkpoint.pt', process)
    time.sleep(0.2)
    process.kill()
    process.communicate()
    step = torch.load(tmp_path / 'eval-killed' / 'checkpoint.pt', weights_only=True)['step']
    assert 0 < step < 24
    resumed = run(flags, tmp_path, 'killed', '--cont_training')
    unbroken = run(flags, tmp_path, 'unbroken')
    assert same_weights(resumed / 'checkpoint.pt', unbroken / 'checkpoint.pt')


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(train_flags, tmp_path):
    process = start(
        [*train_flags, '--epochs', '4000', '--val_every', '5000', '--save_every', '1000000'], tmp_path, 'term'
    )
    wait_for(tmp_path / 'eval-term' / 'metrics.jsonl', process)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and '--cont_training' in output, output
    saved = torch.load(tmp_path / 'eval-term' / 'checkpoint.pt', weights_only=True)
    assert saved['step'] == len((tmp_path / 'eval-term' / 'metrics.jsonl').read_text().splitlines())


# ------------------------------------------------------------------------------------------ several processes


def test_two_processes_train_as_one(train_flags, tmp_path, capfd, forked_processes):
    """Over gloo: both see their half of each batch, and leave one checkpoint."""
    folder = run(train_flags, tmp_path, 'two', '--batch_size', '4', '--num_process_per_node', '2')
    saved = torch.load(folder / 'checkpoint.pt', weights_only=True)
    assert saved['joint_batch'] == 8 and saved['step'] == 8
    said = capfd.readouterr().out
    assert '2 process(es) on cpu' in said and said.count('done: 8 steps') == 1


def gradients(args):
    """One backward pass without noise in each process; rank 0 keeps gradients and everybody's noise."""
    path, flags, world = args
    parsed = train.parse_args(flags)
    torch.set_default_dtype(torch.float64)
    from families.nvae.config import NVAEConfig
    from families.nvae.model import NVAE

    torch.manual_seed(0)
    model = NVAE((1, 16, 16), train.read_flags(NVAEConfig, parsed))
    x = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    share = 8 // world
    ddp = DistributedDataParallel(model) if world > 1 else model
    own = x[launch.rank() * share : (launch.rank() + 1) * share]
    loss, _ = model.objective(ddp(own, temperature=0.0), progress=1.0)
    loss.backward()
    train.seed_noise(1, 'train', 0, launch.rank())
    noise = launch.gather([torch.randn(4)])
    if launch.is_main():
        torch.save({'gradients': {n: p.grad for n, p in model.named_parameters()}, 'noise': noise}, path)
    torch.set_default_dtype(torch.float32)


def test_gradients_of_two_processes_equal_those_of_one_and_noise_differs(tmp_path, forked_processes):
    flags = [
        '--arch_instance',
        'res_elu',
        '--num_channels_enc',
        '4',
        '--num_channels_dec',
        '4',
        '--num_latent_scales',
        '2',
        '--num_groups_per_scale',
        '1',
        '--num_latent_per_group',
        '2',
        '--num_preprocess_cells',
        '1',
        '--num_postprocess_cells',
        '1',
        '--weight_decay_norm',
        '1e-2',
        '--device',
        'cpu',
        '--num_threads',
        '1',
    ]
    for world in (1, 2):
        config = train.read_flags(
            launch.LaunchConfig, train.parse_args([*flags, '--num_process_per_node', str(world)])
        )
        assert launch.launch(gradients, (str(tmp_path / f'{world}.pt'), flags, world), config) == 0
    one, two = (torch.load(tmp_path / f'{world}.pt', weights_only=True) for world in (1, 2))
    for name, expected in one['gradients'].items():
        torch.testing.assert_close(two['gradients'][name], expected, rtol=1e-9, atol=1e-11, msg=name)
    assert not torch.equal(two['noise'][0], two['noise'][1])


# ------------------------------------------------------------------------------------------- single functions


def test_learning_rate_of_the_published_schedule():
    config = TrainConfig(epochs=10, warmup_epochs=2, learning_rate=1e-2, learning_rate_min=1e-4)
    rates = [Schedule(config, 5).learning_rate(step) for step in range(50)]
    assert rates[0] == 0 and rates[5] == approx(5e-3) and rates[10] == rates[14] == approx(1e-2)
    cosine = 1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * 3 / 7)) / 2
    assert rates[25] == rates[29] == approx(cosine)  # epoch 5 is 3 of 7 steps down
    assert rates[45] == rates[49] == approx(1e-4)


def constant(**flags):
    return Schedule(TrainConfig(lr_schedule='constant', warmup_epochs=0, **flags), steps=1)


def test_a_step_that_is_not_finite_changes_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimization = Optimization(model, constant(learning_rate=0.1))
    good, bad = torch.randn(4, 2), torch.full((4, 2), math.nan)
    model(good).sum().backward()
    optimization.update()
    before = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    model(bad).sum().backward()
    assert optimization.update()['train/skipped'] == 1
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_too_many_steps_in_a_row_that_are_not_finite_are_a_divergence():
    model = torch.nn.Linear(1, 1)
    optimization = Optimization(model, constant(learning_rate=0.1))

    def update(value):
        model.weight.grad = torch.tensor([[value]])
        optimization.update()
        return optimization.diverged

    assert not any(map(update, [math.nan] * 99 + [1.0] + [math.nan] * 99)) and update(math.nan)


def test_gradient_clipping_bounds_the_update():
    weight = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        weight.weight.fill_(0)
    optimization = Optimization(weight, constant(learning_rate=1.0, grad_clip=2.0))
    optimization.optimizer = torch.optim.SGD(weight.parameters(), lr=1.0)
    (100 * weight(torch.ones(1, 1)).sum()).backward()
    norm = optimization.update()['train/grad_norm']
    assert norm.item() == approx(100) and weight.weight.item() == approx(-2, rel=1e-4)


# -------------------------------------------------------------------------------------------- users' mistakes


def test_a_finished_run_is_not_overwritten(train_flags, whole):
    with pytest.raises(UserError, match='--cont_training'):
        run(train_flags, whole.parent, 'whole')


def test_other_flags_on_resume_are_named(train_flags, whole):
    with pytest.raises(UserError, match='--num_latent_per_group 2 then, 3 now'):
        run(
            train_flags,
            whole.parent,
            'whole',
            '--ema_decay',
            '0.9',
            '--cont_training',
            '--num_latent_per_group',
            '3',
        )


def test_a_batch_larger_than_the_data_is_cut_down(train_flags, tmp_path, capsys):
    run(train_flags, tmp_path, 'large', '--batch_size', '200', '--max_steps', '1')
    assert 'batches of 32 are used' in capsys.readouterr().out


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--dataset', 'folder', '--data', '/nowhere/at/all'], '/nowhere/at/all'),
        (['--num_process_per_node', '0'], 'at least 1'),
    ],
)
def test_mistakes_are_one_line_and_status_2(program, tmp_path, flags, message):
    done = program('train.py', *flags, '--root', tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_flags_are_parsed_strictly_and_a_flag_of_another_program_is_refused(program):
    for wrong, told in ((['--epoch', '3'], 'did you mean --epochs?'),
                        (['--temp', '0.7'], 'unknown flag --temp')):
        done = program('train.py', *wrong, check=False)
        assert done.returncode == 2 and told in done.stderr


PUBLISHED = {  # every flag of the published train.py with its default
    'save': 'exp',
    'dataset': 'mnist',
    'batch_size': 200,
    'learning_rate': 1e-2,
    'learning_rate_min': 1e-4,
    'weight_decay': 3e-4,
    'weight_decay_norm': 0.0,
    'weight_decay_norm_init': 10.0,
    'weight_decay_norm_anneal': False,
    'epochs': 200,
    'warmup_epochs': 5,
    'fast_adamax': False,
    'arch_instance': 'res_mbconv',
    'kl_anneal_portion': 0.3,
    'kl_const_portion': 1e-4,
    'kl_const_coeff': 1e-4,
    'num_nf': 0,
    'num_x_bits': 8,
    'num_latent_scales': 1,
    'num_groups_per_scale': 10,
    'num_latent_per_group': 20,
    'ada_groups': False,
    'min_groups_per_scale': 1,
    'num_channels_enc': 32,
    'num_preprocess_blocks': 2,
    'num_preprocess_cells': 3,
    'num_cell_per_cond_enc': 1,
    'num_channels_dec': 32,
    'num_postprocess_blocks': 2,
    'num_postprocess_cells': 3,
    'num_cell_per_cond_dec': 1,
    'num_mixture_dec': 10,
    'use_se': False,
    'res_dist': False,
    'cont_training': False,
    'num_proc_node': 1,
    'node_rank': 0,
    'local_rank': 0,
    'global_rank': 0,
    'num_process_per_node': 1,
    'master_address': '127.0.0.1',
    'seed': 1,
}


def test_published_flags_keep_name_and_default():
    args = vars(train.parse_args([]))
    assert {name: args.get(name) for name in PUBLISHED} == PUBLISHED
    assert {'root', 'data'} <= args.keys()
