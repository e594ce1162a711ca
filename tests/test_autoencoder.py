"""AE and VAE: the published networks layer by layer, their bounds worked by hand, and the programs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from standins import make_standin

import evaluate
import train
from anomaly.choice import choose_primary, choose_scores
from anomaly.outputs import Outputs, elbo, log_weight
from anomaly.scores import SCORES, Scoring
from distributed import launch
from distributions import Pixels
from families.autoencoder.config import AEConfig, VAEConfig
from families.autoencoder.model import AE, VAE
from model import load_model
from utils import UserError, read_flags, read_json

SMALL = {'latent_dim': 3, 'num_layers': 2, 'width': 4}
CONFIGS = {AE: AEConfig, VAE: VAEConfig}
GREY = Pixels()


def build(family, shape=(1, 16, 16), pixels=GREY, **flags):
    torch.manual_seed(0)
    return family(shape, CONFIGS[family](**SMALL | flags), pixels).eval()


def images(n=5, shape=(1, 16, 16), seed=1):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def seeded(function, seed=2):
    torch.manual_seed(seed)
    return function()


def fixed(model, y=None, code=None):
    """The model with a decoder that puts out y, or an encoder that gives this code, whatever comes in."""
    if y is not None:
        model._decode = lambda z: y.expand(len(z), *model.shape)
    if code is not None:
        model._encode = lambda x: code.expand(len(x), -1)
    return model


# ---------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize('family, number, codes', [(AE, 2_291_712, 128), (VAE, 3_340_288, 256)])
def test_published_layers_and_parameters(family, number, codes):
    model = family((1, 64, 64), CONFIGS[family]())
    assert sum(p.numel() for p in model.parameters()) == number
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        'encoder.0.0.weight': (32, 1, 3, 3), 'encoder.0.1.weight': (32,), 'encoder.0.1.bias': (32,),
        'encoder.1.0.weight': (64, 32, 3, 3), 'encoder.1.1.weight': (64,), 'encoder.1.1.bias': (64,),
        'encoder.2.0.weight': (128, 64, 3, 3), 'encoder.2.1.weight': (128,), 'encoder.2.1.bias': (128,),
        'encoder.4.weight': (codes, 8192), 'decoder.0.weight': (8192, 128),
        'decoder.2.0.weight': (128, 64, 3, 3), 'decoder.2.1.weight': (64,), 'decoder.2.1.bias': (64,),
        'decoder.3.0.weight': (64, 32, 3, 3), 'decoder.3.1.weight': (32,), 'decoder.3.1.bias': (32,),
        'decoder.4.0.weight': (32, 32, 3, 3), 'decoder.4.1.weight': (32,), 'decoder.4.1.bias': (32,),
        'decoder.5.weight': (1, 32, 1, 1)}


def batch_norm(state, name, x):
    return F.batch_norm(x, *(state[f'{name}.{part}'] for part in ('running_mean', 'running_var', 'weight',
                                                                  'bias')), eps=1e-5)


def encoded(state, x, last):
    for i in range(last):
        x = F.conv2d(x, state[f'encoder.{i}.0.weight'], stride=2, padding=1)
        x = F.leaky_relu(batch_norm(state, f'encoder.{i}.1', x), 0.01)
    return x.flatten(1) @ state[f'encoder.{last + 1}.weight'].T


def decoded(state, z, smallest, last):
    x = (z @ state['decoder.0.weight'].T).reshape(len(z), *smallest)
    for i in range(2, last + 2):
        x = F.conv_transpose2d(x, state[f'decoder.{i}.0.weight'], stride=2, padding=1, output_padding=1)
        x = F.leaky_relu(batch_norm(state, f'decoder.{i}.1', x), 0.01)
    return F.conv2d(x, state[f'decoder.{last + 2}.weight'])


@torch.no_grad()
@pytest.mark.parametrize('family', CONFIGS)
@pytest.mark.parametrize('shape, layers, smallest', [
    ((1, 16, 16), 2, (8, 4, 4)), ((3, 16, 24), 3, (16, 2, 3)), ((2, 8, 8), 1, (4, 4, 4))])
def test_networks_are_those_of_the_specification(family, shape, layers, smallest):
    """Computed anew from the weights, with running statistics that are not those of the start."""
    model, x = build(family, shape, num_layers=layers).train(), images(shape=shape)
    seeded(lambda: model(x))                                                          # moves the statistics
    state, terms = model.eval().state_dict(), model(x, temperature=0.0)
    z = encoded(state, x, layers)[:, :3]                                    # of a VAE the first are the means
    y = decoded(state, z, smallest, layers)
    torch.testing.assert_close(terms['logits'], y)
    torch.testing.assert_close(terms['error'], ((x - y) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(model.latents(x)[0], z[..., None, None])
    torch.testing.assert_close(model.decode([z[..., None, None]]), y.clamp(0, 1))
    torch.testing.assert_close(model.reconstruct(x), y.clamp(0, 1))


@pytest.mark.parametrize('family', CONFIGS)
def test_training_is_the_same_to_the_bit(family):
    def trained():
        model = build(family, input_noise=0.1).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model.objective(model(images(seed=step)), 0.0)[0].backward()
            optimizer.step()
        return model.state_dict()
    a, b = trained(), trained()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a['decoder.0.weight'], build(family).state_dict()['decoder.0.weight'])


# ----------------------------------------------------------------------------------------------------- noise

@torch.no_grad()
@pytest.mark.parametrize('family', CONFIGS)
def test_the_input_is_noisy_in_training_alone_and_the_target_never(family):
    model, x, seen = build(family, input_noise=0.1), images(50), []
    model.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(x)
    assert torch.equal(seen.pop(), x)
    terms = seeded(lambda: model.train()(x))
    noise = seen.pop() - x
    assert noise.std().item() == approx(0.1, rel=0.03) and noise.mean().item() == approx(0, abs=0.005)
    torch.testing.assert_close(terms['error'], ((x - terms['logits']) ** 2).mean((1, 2, 3)))
    clean = build(family)
    clean.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    clean.train()(x)
    assert torch.equal(seen.pop(), x)


@torch.no_grad()
def test_an_autoencoder_draws_nothing():
    model, x = build(AE), images()
    assert torch.equal(seeded(lambda: model(x)['logits'], 1), seeded(lambda: model(x)['logits'], 2))


@torch.no_grad()
def test_the_mean_of_the_log_weights_is_the_elbo():
    """And they differ by log q - log p alone, whose mean is the KL."""
    model = build(VAE)
    terms = seeded(lambda: model(images(1).expand(4000, -1, -1, -1)))
    drawn = terms['log_q'] - terms['log_p']
    assert drawn.mean().item() == approx(terms['kl'][0, 0].item(), abs=4 * drawn.std().item() / 4000 ** 0.5)
    torch.testing.assert_close(log_weight(terms) - elbo(terms), terms['kl'][:, 0] - drawn, rtol=0, atol=1e-2)


@torch.no_grad()
def test_a_skipped_group_is_drawn_from_the_prior():
    model, x = build(VAE), images()
    terms, noise = seeded(lambda: model(x, skip=1, temperature=0.5)), seeded(lambda: torch.randn(5, 3))
    assert all((terms[name] == 0).all() for name in ('kl', 'kl_channels', 'log_q', 'log_p'))
    torch.testing.assert_close(terms['logits'], model._decode(0.5 * noise))
    torch.testing.assert_close(seeded(lambda: model.sample(5, 0.5)), model._decode(0.5 * noise).clamp(0, 1))
    assert torch.equal(model.sample(2, 0.0), model.decode([torch.zeros(2, 3, 1, 1)]))


def test_encoder_parameters_are_those_of_the_posterior():
    model, x = build(VAE), images()
    with torch.no_grad():
        decoded, kl = model.decode([torch.ones(1, 3, 1, 1)]), model(x)['kl']
        for parameter in model.encoder_parameters():
            parameter.mul_(1.5)
        assert torch.equal(decoded, model.decode([torch.ones(1, 3, 1, 1)]))
        assert not torch.allclose(kl, model(x)['kl'])
    inference = {id(p) for p in model.encoder_parameters()}
    assert all((id(p) in inference) == name.startswith('encoder') for name, p in model.named_parameters())


def test_bfloat16_leaves_losses_in_float32():
    for family, loss in ((AE, 'l2'), (AE, 'ssim'), (VAE, 'l2')):
        model, x = build(family, loss=loss), images()
        exact = model(x, temperature=0.0)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            terms = model(x, temperature=0.0)
        assert all(value.dtype == torch.float32 for value in terms.values())
        torch.testing.assert_close(terms['error'], exact['error'], rtol=0.05, atol=0.01)


# ----------------------------------------------------------------------------------------------------- scores

def test_the_residual_is_that_of_the_linear_output():
    """Published: mean |x - y| with y as it is. The image of y is within [0, 1]."""
    model = fixed(build(AE, (1, 2, 2), num_layers=1), torch.tensor([[-1.0, 0.5], [2.0, 1.0]]))
    x = torch.tensor([[0.0, 0.5], [1.0, 0.0]]).view(1, 1, 2, 2)
    score, = SCORES['reconstruction'](0)
    outputs = Outputs(model, x)
    assert score.image(outputs).tolist() == approx([(1 + 0 + 1 + 1) / 4])
    assert score.map(outputs).flatten().tolist() == [1, 0, 1, 1]
    assert model.reconstruct(x).flatten().tolist() == [0, 0.5, 1, 1]
    plain = SimpleNamespace(reconstruct=model.reconstruct)                   # a model without a residual
    assert score.image(Outputs(plain, x)).tolist() == approx([1 / 4])


def test_an_ae_gets_scores_of_its_reconstruction_and_a_vae_all():
    chosen, lines = choose_scores(('all',), build(AE))
    errors = ['reconstruction', 'residual_top', 'residual_top5', 'residual_mean']
    assert [score.name for score in chosen] == errors
    others = ('dose, dose_mahalanobis (need statistics); msma_gmm, msma_knn, msma_kde, msma_pca_gmm, '
              'msma_flow (need score norms); voxel_nll, voxel_nll_mean (need voxel densities)')
    assert lines == ['scores that AE cannot give: recon_nll, nelbo, iw, complexity, typicality (need '
                     f'likelihood terms); {others}']
    model, x = build(VAE), images()
    chosen, lines = choose_scores(('all', 'regret'), model)
    outputs = Outputs(model, x, Scoring(num_draws=2, num_iw_samples=2, regret_steps=2))
    names = {score.name for score in chosen if score.density is None}
    assert names == {*errors, 'recon_nll', 'nelbo', 'iw', 'complexity', 'regret', 'kl'}
    assert lines == [f'scores that VAE cannot give: {others}']
    for score in chosen:
        if score.name in names:
            values = score.image(outputs)
            assert values.shape == (5,) and values.isfinite().all()
            assert score.map is None or score.map(outputs).shape == x.shape


@pytest.mark.parametrize('name, published, computed, primary', [
    ('', 'kl', ['reconstruction', 'nelbo', 'kl'], 'kl'), ('', '', ['reconstruction', 'nelbo'], 'nelbo'),
    ('', 'kl', ['iw', 'nelbo'], 'nelbo'), ('', 'kl', ['iw', 'recon_nll'], 'iw'),
    ('iw', 'kl', ['iw', 'kl'], 'iw'), ('', 'reconstruction', ['reconstruction'], 'reconstruction')])
def test_the_primary_score_is_the_published_one(name, published, computed, primary):
    assert choose_primary(name, published, computed) == primary


def test_each_family_names_a_score_that_it_has():
    assert (AE.primary_score, VAE.primary_score) == ('reconstruction', 'kl')
    for family in CONFIGS:
        assert family.primary_score in [score.name for score in choose_scores((), build(family))[0]]


# --------------------------------------------------------------------------------------------------- programs

@pytest.fixture(scope='module', params=['ae', 'vae'])
def trained(request, tmp_path_factory):
    """The run folder of 8 steps on stand-ins of MedNIST, and the flags of its device."""
    folder = tmp_path_factory.mktemp(request.param)
    alone = ['--device', 'cpu', '--num_threads', '1', '--cache_dir', str(folder / 'cache')]
    args = train.parse_args([
        '--model', request.param, '--dataset', 'mednist', '--root', str(folder),
        '--data', str(make_standin('mednist', folder / 'data')), '--save', 'a', '--batch_size', '5',
        '--epochs', '2', '--width', '4', '--latent_dim', '3', '--log_every', '4', '--image_every', '4',
        '--keep_best', *alone])
    assert launch.launch(train.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return folder / 'eval-a', alone[:4]


def mode(trained, out, name, *more):
    args = evaluate.parse_args(['--checkpoint', str(trained[0]), '--save', str(out), '--eval_mode', name,
                                *trained[1], *more])
    assert launch.launch(evaluate.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return read_json(out / 'metrics.json')


def test_a_run_logs_its_loss_and_keeps_the_best(trained):
    model = load_model(trained[0])
    logs = [json.loads(line) for line in (trained[0] / 'metrics.jsonl').read_text().splitlines()]
    steps = [line for line in logs if 'train/loss_iter' in line]
    assert [line['step'] for line in steps] == [4, 8] and all(line['train/lr'] == 1e-3 for line in steps)
    validated = [line['val/nelbo' if hasattr(model, 'num_groups') else 'val/loss'] for line in logs
                 if 'val/nelbo' in line or 'val/loss' in line]
    assert len(validated) == 2
    for line in (line for line in logs if 'val/kl_per_latent' in line):
        loss = line['val/error'] + model.config.kl_weight * line['val/kl_per_latent']
        assert line['val/loss'] == approx(loss) and hasattr(model, 'num_groups')
    best = torch.load(trained[0] / 'best.pt', weights_only=True)
    assert best['validation'] == approx(min(validated)) and best['args']['optimizer'] == 'adam'
    assert load_model(trained[0] / 'best.pt').config == model.config


def test_modes_that_need_no_likelihood(trained, tmp_path):
    kept = tmp_path / 'latents'
    assert mode(trained, kept, 'latents')['latents']['groups'] == [[3, 1, 1]]
    for name, flags, file in (('reconstruct', ('--num_samples', '4'), 'reconstructions.png'),
                              ('decode', ('--latents', str(kept)), 'decoded.png'),
                              ('interpolate', ('--num_samples', '1', '--num_frames', '3'),
                               'interpolation.gif')):
        assert mode(trained, tmp_path, name, *flags)[name] and (tmp_path / file).exists()


def test_modes_that_need_one_say_so(trained, tmp_path):
    is_vae = hasattr(load_model(trained[0]), 'num_groups')
    for name, flags, told in (('evaluate', ('--num_iw_samples', '2'), 'no likelihood and no latent groups'),
                              ('traverse', ('--num_samples', '1', '--num_frames', '3'), 'no likelihood'),
                              ('sample', ('--num_samples', '2'), 'no `sample`'),
                              ('reconstruct', ('--num_samples', '1', '--keep_groups', '1'), 'has 0 latent')):
        if is_vae:
            assert mode(trained, tmp_path, name, *flags)
        else:
            with pytest.raises(UserError, match=told):
                mode(trained, tmp_path, name, *flags)


# --------------------------------------------------------------------------------------------------- volumes

@pytest.mark.parametrize('family', [AE, VAE])
def test_volumes_have_the_capabilities_of_images(family):
    model, x = build(family, (2, 8, 12, 16)), images(3, (2, 8, 12, 16))
    terms = model(x, temperature=0.0)
    y = terms['logits']
    assert y.shape == x.shape
    assert terms['error'].tolist() == approx(((x - y) ** 2).flatten(1).mean(1).tolist())
    torch.testing.assert_close(model.residual(x), x - y)
    torch.testing.assert_close(model.decode(model.latents(x)), y.clamp(0, 1))
    if family is VAE:
        maps = model.maps(x)
        for name, per_image in (('recon', terms['recon']), ('kl', terms['kl'][:, 0])):
            assert maps[name].shape == (3, 1, 8, 12, 16)
            torch.testing.assert_close(maps[name].flatten(1).sum(1), per_image)
        assert model.sample(2).shape == (2, 2, 8, 12, 16)


def test_an_ae_learns_a_volume():
    torch.manual_seed(0)
    model, x = AE((1, 8, 8, 8), AEConfig(**SMALL)), images(4, (1, 8, 8, 8))
    optimizer, errors = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(150):
        loss = model.objective(model(x), 0.0)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.8 * x.var() < errors[0]


# --------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize('make, told', [
    (lambda: build(AE, (1, 28, 28), num_layers=3), r'28 x 28 cannot be halved 3 times.*multiples of 8'),
    (lambda: build(VAE, (1, 16, 18)), '16 x 18'), (lambda: build(AE, (1, 8)), r'\(C, D, H, W\)'),
    (lambda: build(VAE, (1, 8, 6, 8)), '8 x 6 x 8 cannot be halved 2 times'),
    (lambda: build(AE, (1, 12, 12), Pixels(padding=2), loss='ssim'),
     '11 pixels along each axis, the images have 8 x 8'),
    (lambda: AEConfig(latent_dim=0), '--latent_dim 0'), (lambda: AEConfig(num_layers=0), '--num_layers 0'),
    (lambda: VAEConfig(width=0), '--width 0'), (lambda: AEConfig(input_noise=-0.1), '--input_noise -0.1'),
    (lambda: AEConfig(input_noise=math.nan), '--input_noise nan'),
    (lambda: VAEConfig(kl_weight=0), '--kl_weight 0: it must be above 0'),
    (lambda: VAEConfig(loss='ssim'), 'choose one of l2, l1'),
    (lambda: build(AE)(images(shape=(1, 8, 8))), r'\(1, 8, 8\): this model is for \(1, 16, 16\)'),
    (lambda: build(VAE)(images(), skip=2), 'skip 2: give 0 or 1'),
    (lambda: build(AE)(images(), skip=1), 'skip 1'),
    (lambda: build(AE).decode([torch.zeros(1, 4, 1, 1)]), 'shapes'),
])
def test_mistakes_are_one_line(make, told):
    with pytest.raises(UserError, match=told) as error:
        make()
    assert '\n' not in str(error.value)
