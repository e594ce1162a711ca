"""Every recipe: its flags are known, the published ones build the published networks and take a step."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from standins import make_standin, volumes

import evaluate
import train
from datasets import DATASETS, DataConfig, stand_in
from distributed import launch
from model import build_model, family_config
from training.trainer import Trainer
from utils import read_flags, read_json, write_json

FOLDER = ROOT / 'scripts' / 'recipes'
RECIPES = sorted(path.stem for names in ('*ae_*.sh', 'haar_*.sh') for path in FOLDER.glob(names))
PUBLISHED = {   # millions of parameters, latent groups (NVAE, and its chest X-ray variant)
    'nvae_mnist': (33.36, 15), 'nvae_cifar10': (130.85, 30), 'nvae_celeba64': (153.28, 35),
    'nvae_imagenet32': (268.51, 28), 'nvae_celebahq256': (330.80, 36), 'nvae_ffhq256': (330.80, 36),
    'nvae_chest_xray_published': (33.38, 15)}
PUBLISHED_HVAE = {'hvae_mnist': 2_620_258, 'hvae_fashion_mnist': 2_620_258,            # parameters
                  'hvae_cifar10': 37_013_064, 'hvae_svhn': 37_013_064}
SMALL = '''--num_channels_enc 4 --num_channels_dec 4 --num_process_per_node 1 --num_proc_node 1 --node_rank 0
    --batch_size 2 --max_steps 1 --epochs 1 --val_iw_samples 1 --image_every 0 --save_every 1 --device cpu
    --num_threads 1 --num_latent_per_group 2 --num_mixture_dec 2 --num_groups_per_scale 2
    --min_groups_per_scale 1 --checkpoint_activations off'''.split()
PUBLISHED_SCORES = {'score_toy': 172_770, 'score_biggan': 43_986_722,              # parameters
                    'score_biggan_highres': 43_986_722}
TINY_VOLUMES = {'brain': '--crop 0 0 0 16 16 16 --spacing 0 --volume_shape 8 8 8 --val_fraction 0.3'.split(),
                'brain_phantom': '--num_phantoms 120 --spacing 24 --image_size 8 --val_fraction 0.3'.split()}
TINY_SCORES = {
    'score': '''--nf 8 --norm_num_groups 2 --blocks_down 1 1 --blocks_up 1 --num_scales 2'''.split(),
    'spatial_msma': '''--num_blocks 1 --hidden_features 8 --context_embedding_size 8 --global_embedding_size 8
        --global_patch_kernel 3 --global_patch_stride 2 --msma_levels 2 --patches_per_step 8
        --patch_batch_size 512'''.split(),
    'ae': '--latent_dim 4 --num_layers 2 --width 4'.split()}
SCORE = {'score': 'msma_knn', 'spatial_msma': 'voxel_nll', 'ae_': 'reconstruction'}    # by the run's name
ONE_STEP = '--batch_size 4 --max_steps 1 --epochs 1 --image_every 0'.split()
FEW_SCORES = '--num_bootstrap 10 --num_cases 0 --num_gallery 0 --batch_size 4 --audit_images 0'.split()


@pytest.fixture(scope='module')
def recorder(tmp_path_factory):
    """A python that writes down its arguments instead of running."""
    path = tmp_path_factory.mktemp('bin') / 'python'
    line = 'import json, os, sys; os.write(1, (json.dumps(sys.argv[1:]) + chr(10)).encode())'       # at once
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{line}" "$@"\n')
    path.chmod(0o755)
    return path


def commands(name, recorder, *flags, **env):
    """The argument lists of the commands that a recipe runs when it is given these flags."""
    done = subprocess.run(['bash', str(FOLDER / f'{name}.sh'), *flags], capture_output=True, text=True,
                          check=True, cwd='/',
                          env={**os.environ, 'PYTHON': str(recorder), 'DATA': 'somewhere', **env})
    return [json.loads(line) for line in done.stdout.splitlines()]


def network(argv):
    """The model that these flags build, without memory, and the arguments."""
    args = train.parse_args(argv)
    data = stand_in(read_flags(DataConfig, args), 1)
    with torch.device('meta'):
        return build_model(args.model, data.shape, read_flags(family_config(args.model), args),
                           data.pixels), args


def take(program, argv, cache):
    """Runs a command in this process, on one thread."""
    args = program.parse_args([*argv, '--cache_dir', str(cache), '--device', 'cpu', '--num_threads', '1'])
    assert launch.launch(program.work, args, read_flags(launch.LaunchConfig, args)) == 0


@pytest.mark.parametrize('name', RECIPES)
def test_flags_are_known_and_build_the_model(name, recorder):
    program, *argv = commands(name, recorder)[0]
    assert Path(program) == ROOT / 'train.py'
    model, args = network(argv)
    if name in PUBLISHED:
        number = sum(p.numel() for p in model.parameters())
        assert (round(number / 1e6, 2), model.num_groups) == PUBLISHED[name]
    assert args.data == 'somewhere' and args.root == 'runs' and args.save != 'exp'


@pytest.mark.parametrize('name', PUBLISHED_HVAE)
def test_published_networks_are_those_of_the_official_code(name, recorder):
    """With its dead skips: the number of parameters is the published one. And what is trained is scored."""
    training, scoring = commands(name, recorder, OTHER='elsewhere', IW='7')
    model, args = network([*training[1:], '--compat_official'])
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_HVAE[name]
    scored = evaluate.parse_args(scoring[1:])
    assert Path(scored.checkpoint) == Path('runs', f'eval-{args.save}', 'best.pt')
    (ood,) = scored.ood
    assert ood.endswith('=elsewhere') and ood.split('=')[0] in DATASETS and scored.iw_samples_elbo == 7


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_commands_take_a_step(name, recorder, tmp_path, cache, monkeypatch):
    """On a stand-in in the published layout on disk, narrow and shallow, and of large images at a quarter."""
    monkeypatch.chdir(tmp_path)
    (_, *argv), *_ = commands(name, recorder, *SMALL, NODES='1')
    dataset = train.parse_args(argv).dataset
    size = ['--image_size', '64'] if DATASETS[dataset].size == 256 else []
    take(train, [*argv, '--data', str(make_standin(dataset, tmp_path / 'data')), *size], cache)
    run, = (tmp_path / 'runs').iterdir()
    assert 'done: 1 steps, 0 skipped' in (run / 'log.txt').read_text()
    first = json.loads((run / 'metrics.jsonl').read_text().splitlines()[0])
    assert first['step'] == 1 and first['train/nelbo_iter'] > 0


@pytest.mark.page
@pytest.mark.parametrize('model, number, scores', [('ae', 2_291_712, ['reconstruction']),
                                                   ('vae', 3_340_288, ['reconstruction', 'nelbo', 'kl'])])
def test_autoencoders_train_as_published_and_are_scored(model, number, scores, recorder, tmp_path, cache,
                                                        monkeypatch):
    """The published network, optimizer and number of iterations; and a step on a stand-in, to the scores."""
    monkeypatch.chdir(tmp_path)
    (_, *to_train), (_, *to_score) = commands(f'{model}_mednist', recorder,
                                              DATA=str(make_standin('mednist', tmp_path / 'data', count=100)))
    built, args = network(to_train)
    assert sum(p.numel() for p in built.parameters()) == number
    assert (args.optimizer, args.learning_rate, args.learning_rate_min, args.warmup_epochs, args.weight_decay,
            args.batch_size, args.max_steps, args.grad_clip) == ('adam', 1e-3, 1e-3, 0, 0, 128, 1000, 0)
    small = ['--max_steps', '2', '--width', '4', '--batch_size', '8', '--image_every', '0']
    few = ['--scores', *scores, '--num_bootstrap', '20', '--num_cases', '0']
    take(train, [*to_train, *small], cache)
    take(evaluate, [*to_score, *few], cache)
    run = tmp_path / 'runs' / f'eval-{model}_mednist'
    assert 'done: 2 steps, 0 skipped' in (run / 'log.txt').read_text()
    result = read_json(run / 'anomaly' / 'metrics.json')['anomaly']
    assert result['primary_score'] == scores[-1] and (run / 'anomaly' / 'report.html').exists()
    assert result['counts']['test'] == {'CXR': 9, 'Hand': 10}


@pytest.fixture(scope='module')
def score_run(recorder, tmp_path_factory, cache):
    """score_run(recipe, *flags, **env): the folders of its runs on small volumes, after a step and scored."""
    root = tmp_path_factory.mktemp('scores')
    data = {'brain': volumes(16, 'label', ('t1', 't2'))(root / 'brain', 30, 4),
            'brain_phantom': make_standin('brain_phantom', root / 'phantom', 30, 4)}

    @functools.cache
    def run(name, *words, **env):
        folders, (recipe, *configuration) = [], name.split()
        for program, *argv in commands(recipe, recorder, *configuration, ROOT=str(root), **env):
            if Path(program).name == 'evaluate.py':
                run_name = argv[1].rpartition('eval-')[2]
                score = next(score for model, score in SCORE.items() if model in run_name)
                take(evaluate, [*argv, *FEW_SCORES, '--scores', score], cache)
                continue
            args = train.parse_args(argv)
            take(train, [*argv, '--data', str(data[args.dataset]), *TINY_VOLUMES[args.dataset],
                         *TINY_SCORES[args.model], *ONE_STEP, *words], cache)
            folders.append(root / f'eval-{args.save}')
        return folders

    return run


@pytest.mark.parametrize('name, number', PUBLISHED_SCORES.items())
def test_published_score_networks(name, number, recorder):
    """Their size, their data and their noise."""
    model, args = network(commands(name, recorder)[0][1:])
    assert sum(p.numel() for p in model.parameters()) == number
    assert args.modalities == ['t1', 't2'] and args.data == 'somewhere' and args.augment
    assert model.shape[1:] == tuple(-(-n // args.spacing // 16) * 16 for n in (161, 196, 152))


@pytest.mark.parametrize('name, env', [
    ('score_biggan', {}), ('score_toy', {}), ('score_biggan_highres', {}), ('score_finetune', {}),
    ('score_matryoshka', {}), ('score_phantom_cpu', {}),
    pytest.param('score_matryoshka', {'FROZEN': '1'}, marks=pytest.mark.slow), ('spatial_msma gmm', {}),
    ('spatial_msma v2', {}), ('spatial_msma ve', {}),
    ('spatial_msma matryoshka_gmm', {})])
def test_score_models_take_a_step_and_are_scored(name, env, score_run):
    base, = score_run('score_biggan')
    others = {'INIT': str(base), 'INNER': str(base), 'SCORE_MODEL': str(base)}           # what stands on it
    larger = ('--volume_shape', '16', '16', '16') if name == 'score_matryoshka' else ()
    runs = score_run(name, *larger, **(others if name != 'score_biggan' else {}), **env)
    assert all('done: 1 steps, 0 skipped' in (run / 'log.txt').read_text() for run in runs)
    scored = [run / 'anomaly' / 'metrics.json' for run in runs if (run / 'anomaly').exists()]
    assert len(scored) == (2 if name == 'score_phantom_cpu' else 1)
    assert all(read_json(file)['anomaly']['counts']['test'] == {'normal': 6, 'tumour': 4} for file in scored)


DRY = """images         1 x 64 x 64, discretized, {} to train on
speed          88.02 images/s a process, {} s a step"""


@pytest.mark.parametrize('images, seconds, epochs, size', [
    ('1,195', '0.18', 21, 0), ('1,195', '0.01', 21, 128), ('1,195', '2.34', 6, 0), ('46', '0.18', 200, 0)])
def test_own_images_are_sized_to_the_machine(images, seconds, epochs, size, recorder, tmp_path):
    """About 1,500 steps, or as many as fit into 15 minutes, 200 epochs of few images; larger images on a fast
    machine.
    """
    python = tmp_path / 'python'
    python.write_text('#!/bin/bash\n'
                      f'[[ $* == *dry_run* ]] && echo "{DRY.format(images, seconds)}" || {recorder} "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(['bash', str(FOLDER / 'own_images.sh'), str(tmp_path), '--normal_classes', 'good'],
                          capture_output=True, text=True, check=True, cwd='/',
                          env={**os.environ, 'PYTHON': str(python), 'ROOT': 'there'})
    training, scoring = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('['))
    args, scored = train.parse_args(training[1:]), evaluate.parse_args(scoring[1:])
    assert (args.model, args.data, args.epochs, args.image_size) == ('dae', str(tmp_path), epochs, size)
    assert args.normal_classes == ['good'] and f"{images.replace(',', '')} normal images" in done.stdout
    assert f'images are resized to {size or 64} x {size or 64} pixels' in done.stdout
    assert (scored.checkpoint, scored.save) == ('there/eval-own_images', 'there/eval-own_images/anomaly')


@pytest.mark.parametrize('words, told', [
    ((), 'which images? bash'), (('nowhere',), 'nowhere does not exist'),
    (('other', '--save', 'x'), 'this script names its run itself: SAVE=name'),
    (('other', '--root=x'), 'this script names its run itself: SAVE=name'),
    (('other',), 'runs/eval-own_images was trained on images. Choose another name for this run: SAVE=name')])
def test_own_images_refuse_what_would_evaluate_another_run(words, told, tmp_path):
    run = tmp_path / 'runs' / 'eval-own_images'
    for folder in (run, tmp_path / 'images', tmp_path / 'other'):
        folder.mkdir(parents=True)
    (run / 'checkpoint.pt').touch()
    write_json(run / 'args.json', {'data': 'images'})
    done = subprocess.run(['bash', str(FOLDER / 'own_images.sh'), *words], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, 'PYTHON': sys.executable})
    assert done.returncode == 2 and done.stderr.startswith(f'error: {told}') and not done.stdout


def test_folders_of_own_images_have_defaults_for_a_laptop_unless_a_model_is_named():
    chosen = lambda *words: train.parse_args(['--dataset', 'folder', '--data', 'X', *words])
    args = chosen()
    assert (args.model, args.epochs, args.batch_size) == ('dae', 60, 16)
    assert (chosen('--model', 'nvae').epochs, chosen('--epochs', '3').epochs) == (200, 3)
    assert chosen('--num_latent_scales', '2').model == 'nvae'              # a command as published ones
    assert train.parse_args(['--dataset', 'covid', '--data', 'X']).model == 'nvae'


def test_three_nodes_need_an_address(recorder):
    argv = commands('nvae_ffhq256', recorder, IP_ADDR='10.1.2.3', NODE_RANK='2')[0]
    args = train.parse_args(argv[1:])
    assert (args.num_proc_node, args.node_rank, args.master_address) == (3, 2, '10.1.2.3')


@pytest.mark.parametrize('dataset', [name for name, row in DATASETS.items() if row.dims == 2])
def test_every_data_set_trains_a_step(dataset, tmp_path, cache):
    """Rows that no published recipe covers too: LSUN, Omniglot, stacked MNIST, folders."""
    data = make_standin(dataset, tmp_path / 'data')
    args = train.parse_args(['--dataset', dataset, '--data', str(data), '--root', str(tmp_path),
                             '--cache_dir', str(cache), *SMALL, '--num_groups_per_scale', '1',
                             '--num_preprocess_blocks', '1', '--num_postprocess_blocks', '1',
                             '--num_preprocess_cells', '1', '--num_postprocess_cells', '1'])
    trainer = Trainer(args)
    assert trainer.data.shape[0] == DATASETS[dataset].channels
    train.train_step(trainer, next(trainer.steps(0, 1)))
    assert trainer.optimization.step == 1 and trainer.optimization.skipped == 0


def test_the_demo_trains_two_models_at_once_and_compares_them(recorder):
    done = subprocess.run(['bash', str(FOLDER / 'demo.sh'), '--epochs', '3'], capture_output=True, text=True,
                          check=True, cwd='/', env={**os.environ, 'PYTHON': str(recorder), 'ROOT': 'there'})
    found = [json.loads(argv) for argv in re.findall(r'\[.*?\]', done.stdout)]
    trained = {args.model: args for args in (train.parse_args(argv) for program, *argv in found[:2])}
    assert set(trained) == {'dae', 'nvae'} and all(args.epochs == 3 for args in trained.values())
    runs = {name: f'there/eval-{args.save}' for name, args in trained.items()}
    scored = [evaluate.parse_args(argv) for program, *argv in found[2:]]
    compared, = (args for args in scored if args.eval_mode == 'compare')
    judged, = (args for args in scored if args.eval_mode == 'anomaly')
    assert compared.compare == [runs['dae'], runs['nvae']]
    assert judged.checkpoint == f"{runs['dae']}/checkpoint.pt" and judged.save == f"{runs['dae']}/anomaly"


@pytest.mark.parametrize('broken', ['dae', 'nvae'])
def test_a_training_of_the_demo_that_fails_ends_it(broken, recorder, tmp_path):
    """Nothing is evaluated, and the other training, where it is still at work, is told to end."""
    python = tmp_path / 'python'
    python.write_text(f'''#!/bin/bash
        [[ $* == *"--model {broken}"* ]] && {{ echo "error: broken" >&2; exit 3; }}
        [[ $* == *evaluate* ]] && touch {tmp_path}/evaluated
        [[ $* == *"--model dae"* ]] || exec sleep 60''')
    python.chmod(0o755)
    done = subprocess.run(['bash', str(FOLDER / 'demo.sh')], capture_output=True, text=True, timeout=20,
                          env={**os.environ, 'PYTHON': str(python), 'ROOT': str(tmp_path)})
    assert done.returncode == 3 and 'error: broken' in done.stdout + done.stderr
    assert not (tmp_path / 'evaluated').exists()


def test_the_demo_ends_its_trainings_when_it_is_interrupted(tmp_path):
    """Each gets SIGTERM, as jobs in the background of a script ignore Ctrl-C at first."""
    python = tmp_path / 'python'
    python.write_text('#!/bin/bash\ntrap "echo ended; kill %1; exit 143" TERM\necho began\nsleep 60 & wait\n')
    python.chmod(0o755)
    demo = subprocess.Popen(['bash', str(FOLDER / 'demo.sh')], stdout=subprocess.PIPE, text=True,
                            start_new_session=True, env={**os.environ, 'PYTHON': str(python)},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert 'began' in demo.stdout.readline() + demo.stdout.readline()
    os.killpg(demo.pid, signal.SIGINT)
    assert demo.communicate(timeout=20)[0].count('ended') == 2 and demo.returncode != 0
