"""Published run folders of HVAE, LVAE and BIVA, and known answers where they are at hand: see PARITY."""

import json
import math
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from small_hvae import VARIANTS, build, images

from distributions import Pixels
from families.hvae.model import BIVA, HVAE, LVAE
from families.hvae.official import official_folder, read_official, to_official
from model import load_model
from utils import UserError

PARITY = Path(os.environ.get('PARITY_DIR', Path(__file__).parents[2] / 'shared' / 'parity'))
published = pytest.mark.skipif(not (PARITY / 'hvae_binary').exists(),
                               reason=f'no known answers in {PARITY}: set PARITY_DIR')


def write_folder(folder, model, name, **changes):
    """The model as a published run folder."""
    c = model.config
    kwargs = {'input_shape': torch.Size(model.shape), 'likelihood_module': 'BernoulliLikelihoodConv2d',
              'config_deterministic': json.loads(c.config_deterministic),
              'config_stochastic': json.loads(c.config_stochastic), 'q_dropout': c.q_dropout,
              'p_dropout': c.p_dropout, 'activation': c.activation, 'skip_stochastic': c.skip_stochastic,
              'padded_shape': list(c.padded_shape) or None}
    weights = OrderedDict(to_official(model))
    for key in list(weights):                                # what the published system writes besides
        if key.endswith('.bias'):
            weights[key.rsplit('.', 2)[0] + '.initialized'] = torch.tensor(True)
    weights['stages.0.stochastic.std_activation_inverse.beta'] = torch.tensor([math.log(2)])
    folder.mkdir(exist_ok=True)
    for file, content in (('model_class_name', name), ('model_kwargs', {'kwargs': kwargs}),
                          ('model_state_dict', weights | changes)):
        torch.save(content, folder / f'{file}.pt')
    return folder


ROUND_TRIPS = [name for name, options in VARIANTS.items()
               if not {'pixels', 'learn_prior', 'train_samples'} & options.keys()]


@pytest.mark.parametrize('variant', ROUND_TRIPS)
@pytest.mark.parametrize('name, family', [('VAE', HVAE), ('LVAE', LVAE), ('BIVA', BIVA)])
def test_models_go_through_the_published_format(name, family, variant, tmp_path):
    model = build(family, **VARIANTS[variant] | {'compat_official': True})
    read, _ = read_official(write_folder(tmp_path, model, name))
    assert type(read) is family and not read.training and read.shape == model.shape and read.data_initialized
    with torch.no_grad():
        ours, theirs = (each(images(model), temperature=0.0) for each in (model, read))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        before = read.stages[0].generate[0].conv1.bias.clone()
        read.initialize(images(model, 16))                   # what it has learned stays
        assert torch.equal(before, read.stages[0].generate[0].conv1.bias)


def test_a_published_run_on_mnist_takes_our_framed_images(tmp_path):
    folder = write_folder(tmp_path, build(compat_official=True), 'VAE')
    assert read_official(folder)[0].shape == (1, 8, 8) and read_official(folder)[1] == {}
    torch.save({'train_datasets': {'MNISTBinarized': {'split': 'train', 'dynamic': True}}, 'batch_size': 128},
               folder / 'datamodule_config.pt')
    model, args = read_official(folder)
    assert model.shape == (1, 12, 12) and model.pixels == Pixels('bernoulli', 1, padding=2)
    assert args == {'dataset': 'mnist', 'batch_size': 128}
    torch.save({'train_datasets': {'FashionMNISTBinarized': {}}}, folder / 'datamodule_config.pt')
    assert read_official(folder)[0].shape == (1, 8, 8) and read_official(folder)[1] == {}


def test_published_folders_are_recognised(tmp_path):
    folder = write_folder(tmp_path / 'run', build(compat_official=True), 'VAE')
    assert official_folder(folder) == official_folder(folder / 'model_state_dict.pt') == folder
    assert official_folder(tmp_path) is official_folder(tmp_path / 'none') is None
    assert official_folder(folder / 'checkpoint.pt') is None


def test_a_published_folder_loads_like_a_run_of_ours(tmp_path):
    folder = write_folder(tmp_path / 'run', build(LVAE, compat_official=True), 'LVAE')
    assert type(load_model(folder)) is type(load_model(folder / 'model_kwargs.pt')) is LVAE


def spoiled(folder, file, content=None):
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, bytes):
        (folder / file).write_bytes(content)
    else:
        torch.save(content, folder / file)


@pytest.mark.parametrize('file, content, told', [
    ('model_kwargs.pt', None, 'there is no .*model_kwargs.pt: a published run folder holds'),
    ('model_class_name.pt', 'GAN', "'GAN': known are VAE, LVAE, BIVA"),
    ('model_kwargs.pt', {'kwargs': {'input_shape': (1, 8, 8)}},
     'lacks config_deterministic, config_stochastic'),
    ('model_kwargs.pt', [1], 'lacks config_deterministic'),
    ('model_state_dict.pt', [1], 'holds a list, not weights'),
    ('model_state_dict.pt', b'', 'cannot be read|is damaged'),
    ('model_state_dict.pt', b'PK\x03\x04 truncated', 'cannot be read|is damaged'),
    ('model_state_dict.pt', {'a': 1, 'b': Path('x')}, 'which is code and not data'),
])
def test_a_spoiled_folder_is_one_clear_line(file, content, told, tmp_path):
    folder = write_folder(tmp_path, build(compat_official=True), 'VAE')
    spoiled(folder, file, content)
    with pytest.raises(UserError, match=told) as error:
        read_official(folder)
    assert '\n' not in str(error.value)


def test_weights_that_are_missing_left_over_or_of_another_size_are_refused(tmp_path):
    model = build(compat_official=True)
    bias = {'likelihood.parameter_net.conv.bias': torch.zeros(7)}
    for changes, told in (({'extra.w': torch.zeros(1)}, r"0 missing \[\], 1 left over \['extra.w'\]"),
                          (bias, r'has the shape \(7,\), not \(1,\)')):
        with pytest.raises(UserError, match=told):
            read_official(write_folder(tmp_path, model, 'VAE', **changes))
    with pytest.raises(UserError, match='do not fit their own configuration'):
        read_official(write_folder(tmp_path, model, 'LVAE'))


# ---------------------------------------------------------------------------------------------- known answers

NAMES = {'hvae_binary': HVAE, 'hvae_rgb': HVAE, 'lvae_binary_gated': LVAE, 'biva_binary': BIVA}


def agrees(value, expected):
    """The largest difference is at most 1e-4 of the largest magnitude."""
    return ((value - expected).abs().max() / expected.abs().max()).item() <= 1e-4


def answers(name):
    return torch.load(PARITY / name / 'expected.pt', weights_only=True)


def kl_by_latent(model, terms):
    """The KL of each latent, bottom first: (B, Z) summed over space."""
    shapes = model.variable_shapes
    parts = terms['kl_elements'][:, 0].split([math.prod(shape) for shape in shapes], dim=1)
    return [part.unflatten(1, shape).flatten(2).sum(2) for part, shape in zip(parts, shapes)][::-1]


@published
@pytest.mark.parametrize('skip', [0, 1, 2])
@pytest.mark.parametrize('name', NAMES)
def test_every_term_of_the_published_system(name, skip):
    (model, _), expected = read_official(PARITY / name), answers(name)
    assert type(model) is NAMES[name]
    with torch.no_grad():
        terms = model(expected['x'], skip=skip, temperature=0.0)
    assert agrees(-terms['recon'], expected[f'likelihood>{skip}'])
    assert agrees(-terms['recon'] - terms['kl'].sum(1), expected[f'L>{skip}'])
    kl = kl_by_latent(model, terms)
    assert len(kl) == len(expected[f'kl_per_latent>{skip}'])
    for ours, theirs in zip(kl, expected[f'kl_per_latent>{skip}']):
        assert (ours == 0).all() if theirs is None else agrees(ours, theirs)


@published
@pytest.mark.parametrize('name', [name for name in NAMES if name != 'lvae_binary_gated'])
def test_stochastic_bound_of_the_published_system(name):
    (model, _), expected = read_official(PARITY / name), answers(name)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = [model(expected['x']) for _ in range(8)]
    mean = sum((-t['recon'] - t['kl'].sum(1)).mean().item() for t in draws) / 8
    # Both means are over 8 draws, each with this spread.
    spread = expected['stochastic_elbo']['draw_std_of_mean']
    assert abs(mean - expected['stochastic_elbo']['mean']) <= 3 * spread * math.sqrt(2 / 8)
