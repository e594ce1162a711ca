"""On a GPU: the numbers of the CPU, the same bits twice, every mode, one line when memory runs out."""

import copy
import json

import pytest
import torch
from standins import make_standin
from test_model import SHAPE, SMALL, build, images, name, noisy  # noqa: F401  (name is a fixture)
from test_parity import PARITY, agrees
from test_recipes import FEW_SCORES, ONE_STEP, TINY_SCORES, TINY_VOLUMES

import evaluate
import train
from distributed import launch
from model import load_model
from utils import read_flags, read_json

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
ON_GPU = ('--device', 'cuda', '--num_threads', '1')


@pytest.fixture(autouse=True)
def exact():
    """As launch leaves it for a program that evaluates."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def take(program, *words):
    """Runs a program in this process, on the GPU."""
    args = program.parse_args([*map(str, words), *ON_GPU])
    assert launch.launch(program.work, args, read_flags(launch.LaunchConfig, args)) == 0


def loss_and_gradients(model, x):
    """Of a pass without noise, and the terms of every image; all on the CPU."""
    terms = model(x, temperature=0.0)
    loss, _ = model.objective(terms, progress=1.0)
    model.zero_grad()
    loss.backward()
    return ({key: value.detach().cpu() for key, value in terms.items()}, loss.item(),
            {key: p.grad.cpu() for key, p in model.named_parameters() if p.grad is not None})


def close(ours, theirs, limit=1e-4):
    """The largest difference is at most `limit` of the largest magnitude."""
    return (ours - theirs).abs().max() <= limit * theirs.abs().max() + 1e-7


def test_terms_and_gradients_are_those_of_the_cpu(name):  # noqa: F811
    model, x = build(name), images(8)
    terms, loss, gradients = loss_and_gradients(copy.deepcopy(model), x)        # regularizers keep a state
    there, loss_there, gradients_there = loss_and_gradients(model.to('cuda'), x.to('cuda'))
    assert loss_there == pytest.approx(loss, rel=1e-5)
    assert terms.keys() == there.keys() and gradients.keys() == gradients_there.keys()
    assert [key for key in terms if not close(there[key], terms[key])] == []
    assert [key for key in gradients if not close(gradients_there[key], gradients[key], 1e-3)] == []


def test_bfloat16_is_near_float32_and_terms_stay_in_it(name):  # noqa: F811
    model, x = build(name).to('cuda'), images(8).to('cuda')
    with torch.no_grad():
        loss, _ = model.objective(noisy(lambda: model(x)), progress=1.0)
        with torch.autocast('cuda', dtype=torch.bfloat16):
            terms = noisy(lambda: model(x))
            half, _ = model.objective(terms, progress=1.0)
    assert half.dtype == torch.float32 and all(value.dtype == torch.float32 for key, value in terms.items()
                                               if key in ('recon', 'kl', 'log_q', 'log_p'))
    assert half.item() == pytest.approx(loss.item(), rel=0.05)


@pytest.mark.skipif(not PARITY.exists(), reason=f'no known answers in {PARITY}: set PARITY_DIR')
@pytest.mark.parametrize('published', ['nvae_binary', 'nvae_rgb_flow'])
def test_a_published_network_gives_its_known_answers(published):
    answers = torch.load(PARITY / f'{published}.expected.pt', weights_only=True)
    model = load_model(PARITY / f'{published}.checkpoint.pt', device='cuda').eval()
    with torch.no_grad():
        terms = model(answers['x'].to('cuda'), temperature=0.0)
    for ours, theirs in (('logits', 'logits'), ('recon', 'recon'), ('kl', 'kl_per_group')):
        assert agrees(terms[ours].cpu(), answers['eval'][theirs]), theirs


@pytest.fixture(scope='module')
def brains(tmp_path_factory):
    return make_standin('brain_phantom', tmp_path_factory.mktemp('brains') / 'phantom', 30, 4)


def on_volumes(model, data, cache):
    """Flags of a short training."""
    return ['--model', model, *TINY_SCORES[model], '--dataset', 'brain_phantom', '--data', data,
            *TINY_VOLUMES['brain_phantom'], *ONE_STEP, '--max_steps', '6', '--epochs', '3',
            '--cache_dir', cache]


@pytest.mark.parametrize('amp', ['off', 'bf16'])
@pytest.mark.parametrize('model', ['nvae', 'score', 'ae'])
def test_the_same_command_and_a_resumed_run_give_the_same_bits(model, amp, train_flags, brains, tmp_path,
                                                               cache, same_weights):
    flags = [*(train_flags if model == 'nvae' else on_volumes(model, brains, cache)),
             '--root', tmp_path, '--amp', amp, '--deterministic']
    take(train, *flags, '--save', 'whole')
    take(train, *flags, '--save', 'again')
    take(train, *flags, '--save', 'parts', '--max_steps', '3')
    take(train, *flags, '--save', 'parts', '--cont_training')
    whole, *others = (tmp_path / f'eval-{run}' / 'checkpoint.pt' for run in ('whole', 'again', 'parts'))
    assert all(same_weights(whole, other) for other in others)


FAMILIES = {'nvae': [], 'vae': TINY_SCORES['ae'], 'lvae': [word for flag, value in SMALL['lvae'].items()
                                                             for word in (f'--{flag}', value)]}


@pytest.mark.parametrize('amp', ['off', 'bf16'])
@pytest.mark.parametrize('model', [*FAMILIES, 'score'])
def test_a_graph_of_the_passes_trains_as_they_do(model, amp, train_flags, brains, tmp_path, cache):
    """With the noise of the eager run, and running statistics that the warm-up left alone.

    Losses are compared: a bias before a second batch norm has no gradient but rounding, which moves it.
    """
    flags = on_volumes(model, brains, cache) if model == 'score' else \
        [*FAMILIES[model], *(train_flags if model == 'nvae' else
                             ['--model', model, *train_flags[train_flags.index('--dataset'):]])]
    flags += ['--root', tmp_path, '--amp', amp]
    take(train, *flags, '--save', 'eager')
    take(train, *flags, '--save', 'graph', '--cuda_graph')
    eager, graph = ([line['train/loss_iter'] for line in map(json.loads, (
        tmp_path / f'eval-{run}' / 'metrics.jsonl').read_text().splitlines()) if 'train/loss_iter' in line]
        for run in ('eager', 'graph'))
    assert eager and graph == pytest.approx(eager, rel=1e-3 if amp == 'off' else 0.02)


@pytest.fixture(scope='module')
def trained(train_flags, tmp_path_factory):
    root = tmp_path_factory.mktemp('gpu')
    take(train, *train_flags, '--root', root, '--ema_decay', '0.9', '--image_every', '4')
    assert 'on cuda' in (root / 'eval-exp' / 'log.txt').read_text()
    return root / 'eval-exp'


@pytest.mark.parametrize('mode, more', [
    ('evaluate', ('--num_iw_samples', '3')), ('sample', ('--num_samples', '4', '--readjust_bn')),
    ('reconstruct', ()), ('latents', ()), ('interpolate', ('--num_samples', '2')), ('traverse', ()),
    ('anomaly', ('--scores', 'all', 'regret', *FEW_SCORES, '--regret_steps', '2')),
    ('evaluate_fid', ('--num_samples', '20', '--fid_features', 'features.pt'))])
def test_every_mode(trained, mode, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())).save('features.pt')
    take(evaluate, '--checkpoint', trained, '--save', 'out', '--eval_mode', mode, *more)
    assert any((tmp_path / 'out').iterdir())


def test_new_images_are_predicted(trained, data_folder, tmp_path):
    scored = [*FEW_SCORES, '--scores', 'nelbo', 'llr_1']
    take(evaluate, '--checkpoint', trained, '--eval_mode', 'anomaly', *scored)
    take(evaluate, '--checkpoint', trained, '--eval_mode', 'predict', '--data', data_folder,
         '--save', tmp_path)
    assert len((tmp_path / 'scores.csv').read_text().splitlines()) == 61


def test_a_model_trained_here_is_scored_alike_on_the_cpu(trained, tmp_path):
    """Noise differs between devices: by what a pass without noise gives."""
    x = torch.rand(4, *load_model(trained).shape)
    with torch.no_grad():
        here, there = (load_model(trained, device=device)(x.to(device), temperature=0.0)
                       for device in ('cuda', 'cpu'))
    assert all(close(here[key].cpu(), there[key]) for key in there)


def test_volumes_are_trained_on_and_scored(brains, tmp_path, cache):
    """A score network, the density of its voxels, an autoencoder."""
    score = tmp_path / 'eval-score'
    for model in ('score', 'spatial_msma', 'ae'):
        above = ['--score_model', score] if model == 'spatial_msma' else []
        take(train, *on_volumes(model, brains, cache), '--root', tmp_path, '--save', model, *above)
        slow = ['inpainting', 'restoration', 'ode_nll'] if model == 'score' else []
        take(evaluate, '--checkpoint', tmp_path / f'eval-{model}', '--eval_mode', 'anomaly', *FEW_SCORES,
             '--num_cases', '1', '--msma_levels', '3', '--scores', 'all', *slow, '--cache_dir', cache)
        result = read_json(tmp_path / f'eval-{model}' / 'anomaly' / 'metrics.json')['anomaly']
        assert result['scores'] and 'segmentation' in str(result)
    take(evaluate, '--checkpoint', score, '--eval_mode', 'sample', '--num_samples', '2', '--temp', '1')


def test_what_does_not_fit_is_said_in_one_line(train_flags, tmp_path, program):
    done = program('train.py', *train_flags, '--root', tmp_path, *ON_GPU, '--batch_size', '32',
                   '--image_size', '1024', '--num_channels_dec', '256', '--num_channels_enc', '256',
                   '--checkpoint_activations', 'off', '--amp', 'off', check=False)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: the GPU has not enough memory'), done.stderr
