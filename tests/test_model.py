"""What every family promises, and how a model comes back from a checkpoint."""

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

import train
from anomaly.outputs import passes
from distributions import Pixels, RowNoise
from families.autoencoder import config as autoencoder
from families.autoencoder.model import LOG_NORMALIZERS, LOSSES
from families.hvae import config as hvae
from families.hvae import layers, likelihoods
from families.score import config as score
from families.score import samplers, sde, unet
from families.spatial_msma import config as spatial_msma
from families.spatial_msma import flow
from model import MODELS, build_model, describe, family_config, load_model, place, restore
from neural_operations import activation_bytes
from storage.checkpoint import read_checkpoint, save_checkpoint
from utils import UserError, read_flags

SHAPE = (1, 16, 16)
HIERARCHY = {'config_deterministic': json.dumps([
                 [{'block': 'ResBlockConv2d', 'out_channels': 4, 'kernel_size': 3, 'stride': stride}]
                 for stride in (2, 2)]),
             'config_stochastic': json.dumps([{'block': 'GaussianConv2d', 'latent_features': 2},
                                              {'block': 'GaussianDense', 'latent_features': 3}])}
SCORE = {'nf': 8, 'blocks_down': (1, 1), 'blocks_up': (1,), 'norm_num_groups': 2, 'time_embedding_sz': 4,
         'num_scales': 4, 'init_scale': 1.0}
SMALL = {   # flags of a small model of each family; a family without a row is tested with its defaults
    'hvae': HIERARCHY, 'lvae': HIERARCHY, 'biva': HIERARCHY,
    'ae': {'latent_dim': 3, 'num_layers': 2, 'width': 4, 'input_noise': 0.1},
    'vae': {'latent_dim': 3, 'num_layers': 2, 'width': 4},
    'dae': {'widths': (8, 16)},
    'haar': {'levels': 2, 'width': 4},
    'nvae': {'num_channels_enc': 4, 'num_channels_dec': 4, 'num_preprocess_blocks': 1,
             'num_postprocess_blocks': 1, 'num_preprocess_cells': 1, 'num_postprocess_cells': 1,
             'num_latent_scales': 2, 'num_groups_per_scale': 1, 'num_latent_per_group': 2,
             'num_mixture_dec': 2, 'res_dist': True, 'weight_decay_norm': 1e-2},
    'score': SCORE,
    'spatial_msma': {'score_model': json.dumps(SCORE | {'image_size': SHAPE[1:]}),
                     'msma_levels': 3, 'num_blocks': 1, 'hidden_features': 8, 'global_embedding_size': 8,
                     'context_embedding_size': 6, 'patches_per_step': 20},
}


@pytest.mark.parametrize('name', [name for name in MODELS if hasattr(family_config(name), 'only_images')])
def test_volumes_are_refused_by_families_of_images(name):
    config = read_flags(family_config(name), SMALL.get(name, {}))
    with pytest.raises(UserError, match=f'--model {name} takes images, the data has volumes of 8 x 16 x 4'):
        build_model(name, (1, 8, 16, 4), config, GREY)


def test_names_and_flags_are_known_without_pytorch():
    """Help pages and wrong flags are answered before PyTorch is imported."""
    code = ('import sys, model; configs = [model.family_config(name) for name in model.MODELS]; '
            "print(len(configs), 'torch' in sys.modules, 'score' in model.MODELS, 'gan' in model.MODELS)")
    found = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(len(MODELS)), 'False', 'True', 'False']


@pytest.mark.parametrize('names, table', [
    (hvae.ACTIVATIONS, layers.ACTIVATIONS), (hvae.LIKELIHOODS, likelihoods.LIKELIHOODS),
    (autoencoder.LOSSES, LOSSES), (autoencoder.LIKELIHOODS, LOG_NORMALIZERS),
    (score.SDES, sde.SDES), (score.ACTIVATIONS, unet.ACTIVATIONS), (score.PREDICTORS, samplers.PREDICTORS),
    (score.CORRECTORS, samplers.CORRECTORS), (spatial_msma.BASES, flow.BASES)])
def test_names_that_flags_take_are_those_of_the_tables(names, table):
    assert names == tuple(table)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


GREY = Pixels(bits=5)


def build(name, pixels=GREY, seed=0):
    torch.manual_seed(seed)
    return build_model(name, SHAPE, read_flags(family_config(name), SMALL.get(name, {})), pixels).eval()


def images(n=3, bits=5):
    levels = torch.randint(2 ** bits, (n, *SHAPE), generator=torch.Generator().manual_seed(1))
    return levels / (2 ** bits - 1)


def noisy(function, seed=2):
    torch.manual_seed(seed)
    return function()


def content(model, **more):
    return {'description': describe(model), 'weights': model.state_dict(), 'ema': None,
            'args': {'batch_size': 8}, **more}


def test_published_settings_are_flags_of_the_training(name):
    given = vars(train.parse_args(['--model', name]))
    defaults = getattr(family_config(name), 'defaults', {})
    assert {flag: given[flag] for flag in defaults} == defaults


@torch.no_grad()
def test_contract(name):
    model, x = build(name), images()
    assert model.Config is family_config(name) and model.Config.__dataclass_params__.frozen
    assert tuple(model.shape) == SHAPE and isinstance(model.config, model.Config)
    terms = noisy(lambda: model(x))
    assert all(value.shape[0] == 3 for value in terms.values()), "terms are per image, never averaged"
    loss, logs = model.objective(terms, progress=0.5)
    assert loss.shape == () and loss.isfinite() and logs.keys().isdisjoint({'train/loss_iter'})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    again = noisy(lambda: model(x))
    assert all(torch.equal(value, again[key]) for key, value in terms.items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_logs_are_numbers_and_hold_the_bound(name):
    """Of the batch, without gradient; the training loop shows the bound, or the loss that it adds itself."""
    model = build(name)
    terms = noisy(lambda: model(images()))
    _, logs = model.objective(terms, progress=0.5)
    for value in logs.values():
        assert value.numel() == 1 and not value.requires_grad
    if hasattr(model, 'num_groups'):
        bound = terms['recon'] + terms['kl'].sum(1)
        torch.testing.assert_close(logs['train/nelbo_iter'], bound.mean().detach())


@pytest.mark.parametrize('training', [True, False])
def test_forward_runs_on_the_meta_device(name, training):
    """There the memory of a training step is estimated. Terms have the shapes of real ones."""
    model = build(name).train(training)
    real, empty = model(images()), model.to('meta')(torch.zeros(3, *SHAPE, device='meta'))
    assert {key: value.shape for key, value in empty.items()} == {k: v.shape for k, v in real.items()}
    assert all(value.is_meta for value in empty.values())
    if training:
        assert all(activation_bytes(build(name), SHAPE, recomputed) > 0 for recomputed in (False, True))


SCORED = ('forward', 'reconstruct', 'residual', 'maps', 'latents', 'score_norms', 'score_maps',
          'log_likelihood', 'statistics', 'inpainting_map', 'restoration_map', 'voxel_nll')


def results(model, x, seeds):
    """All that a score may ask of a model, by name: (B, ...); rows of its noise follow from the seeds."""
    found = {}
    for capability in SCORED:
        if hasattr(model, capability):
            torch.seed()                                                 # of no effect on what is drawn
            with RowNoise(seeds):
                values = getattr(model, capability)(x)
            values = values if isinstance(values, dict) else dict(enumerate(values)) \
                if isinstance(values, list) else {'': values}
            found |= {f'{capability} {key}': value for key, value in values.items()}
    return found


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch(name):
    """In float64, where the kernels of other batch sizes differ in digits that do not count."""
    model, x, seeds = build(name).double(), images(7).double(), range(10, 17)
    together = results(model, x, seeds)
    assert all(value.isfinite().all() for value in together.values())
    for rows in (slice(3, 4), slice(3, 5)):
        alone = results(model, x[rows], seeds[rows])
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            torch.testing.assert_close(value, together[key][rows], rtol=1e-6, atol=1e-6,
                                       msg=lambda told, key=key: f'{key}: {told}')


@torch.no_grad()
@pytest.mark.parametrize('skip', [0, 1])
def test_several_draws_at_once_are_those_of_several_passes(name, skip):
    model, x = build(name).double(), images().double()
    if not getattr(model, 'takes_draws', False):
        pytest.skip(f'{name} takes one draw at a time')
    assert model.num_groups
    seeds = [[10, 11, 12], [20, 21, 22]]
    one_by_one = list(passes(model, x, seeds, most=3, skip=skip))
    for alone, together in zip(one_by_one, passes(model, x, seeds, most=6, skip=skip), strict=True):
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-6, atol=1e-6)
    assert not torch.equal(one_by_one[0]['recon'], one_by_one[1]['recon'])


@torch.no_grad()
def test_latents_cannot_be_skipped_where_there_are_none(name):
    model = build(name)
    if getattr(model, 'num_groups', 0):
        pytest.skip(f'{name} has latent groups')
    with pytest.raises(UserError, match='skip 1'):
        model(images(), skip=1)


@torch.no_grad()
def test_likelihood_terms(name):
    model, x = build(name), images()
    if not hasattr(model, 'num_groups'):
        pytest.skip(f'{name} is no likelihood family')
    terms = noisy(lambda: model(x))
    assert terms['recon'].shape == terms['log_q'].shape == terms['log_p'].shape == (3,)
    assert terms['kl'].shape == (3, model.num_groups) and (terms['recon'] > 0).all()
    skipped = noisy(lambda: model(x, skip=model.num_groups))
    assert (skipped['kl'] == 0).all(), "all latents from the prior cost nothing"
    assert not torch.equal(noisy(lambda: model(x), seed=3)['recon'], terms['recon'])
    # at the posterior means, which take no noise, maps sum to the terms
    maps, means = model.maps(x), model(x, temperature=0.0)
    assert torch.equal(means['recon'], noisy(lambda: model(x, temperature=0.0))['recon'])
    assert torch.allclose(maps['recon'].flatten(1).sum(1), means['recon'].float(), rtol=1e-4, atol=1e-2)
    assert torch.allclose(maps['kl'].flatten(2).sum(2), means['kl'].float(), rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_images_that_a_model_makes_are_images(name):
    model, x = build(name), images()
    made = [model.reconstruct(x)] if hasattr(model, 'reconstruct') else []
    made += [noisy(lambda: model.sample(3, 0.7))] if hasattr(model, 'sample') else []
    for y in made:
        assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1 and y.dtype == torch.float32


def test_every_weight_learns(name):
    """DDP waits for the gradient of every weight."""
    model = build(name).train()
    loss, _ = model.objective(model(images(8)), progress=1.0)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad] == []


@torch.no_grad()
def test_a_restored_model_gives_the_same_numbers(name, tmp_path):
    """From the file and from its folder, whatever is drawn in between; for every kind of pixels."""
    for pixels in (Pixels(bits=5), Pixels('bernoulli', 1, padding=2)):
        model, x = place(build(name, pixels), 'cpu'), images(bits=pixels.bits)
        save_checkpoint(tmp_path / 'checkpoint.pt', content(model))
        for path in (tmp_path, str(tmp_path / 'checkpoint.pt')):
            loaded = load_model(path)
            assert not loaded.training and loaded.pixels == pixels and loaded.config == model.config
            ours, theirs = (noisy(partial(each, x)) for each in (model, loaded))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert restore(read_checkpoint(tmp_path))[1] == {'batch_size': 8}


def test_the_averaged_weights_are_taken_where_there_are_any(name, tmp_path):
    last, average = build(name), build(name, seed=1)
    save_checkpoint(tmp_path / 'checkpoint.pt', content(last, ema=average.state_dict()))
    key = next(n for n, _ in last.named_parameters())
    assert torch.equal(load_model(tmp_path).state_dict()[key], average.state_dict()[key])
    assert torch.equal(load_model(tmp_path, ema=False).state_dict()[key], last.state_dict()[key])
    assert not torch.equal(last.state_dict()[key], average.state_dict()[key])


def test_what_is_not_a_checkpoint_of_ours_is_said(tmp_path):
    good = content(build('nvae'))
    for bad, told in (({'net': 1, 'epoch': 2}, r"keys are \['epoch', 'net'\]"),
                      (good | {'description': good['description'] | {'model': 'gan'}}, "'gan'; known are"),
                      (good | {'description': good['description'] | {'shape': [1, math.inf]}}, 'Overflow'),
                      (good | {'weights': {}}, 'do not fit')):
        with pytest.raises(UserError, match=told) as error:
            restore(bad)
        assert '\n' not in str(error.value)
