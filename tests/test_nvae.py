"""NVAE: every architecture and option, its terms, and its schedules."""

import math
from dataclasses import replace

import pytest
import torch
from pytest import approx

from distributions import EIGHT_BITS, Pixels
from families.nvae.config import ARCHITECTURES, NVAEConfig
from families.nvae.model import (
    NVAE,
    balance_coefficients,
    balanced_kl,
    groups_per_scale,
    kl_weight,
)
from families.nvae.official import official_names, read_official, to_official
from utils import UserError

SMALL = NVAEConfig(
    num_channels_enc=8,
    num_channels_dec=8,
    num_latent_per_group=3,
    num_preprocess_blocks=1,
    num_postprocess_blocks=1,
    num_preprocess_cells=2,
    num_postprocess_cells=2,
    num_latent_scales=2,
    num_groups_per_scale=2,
    use_se=True,
    res_dist=True,
)
VARIANTS = {
    'plain': {'use_se': False, 'res_dist': False},
    'flows': {'num_nf': 2},
    'vanilla': {'num_latent_scales': 1, 'num_groups_per_scale': 1},
    'vanilla_flow': {'num_latent_scales': 1, 'num_groups_per_scale': 1, 'num_nf': 1},
    'three_scales': {'num_latent_scales': 3, 'num_groups_per_scale': 4, 'ada_groups': True},
    'two_cells': {'num_cell_per_cond_enc': 2, 'num_cell_per_cond_dec': 2},
    'two_blocks': {'num_preprocess_blocks': 2, 'num_postprocess_blocks': 2},
    'normal_decoder': {'num_mixture_dec': 1},
    'regularized': {'weight_decay_norm': 1e-2, 'weight_decay_norm_anneal': True},
    'official': {'compat_official': True},
    'wider_encoder': {'num_channels_enc': 16},
} | {name: {'arch_instance': name} for name in ARCHITECTURES}


def build(shape=(1, 16, 16), pixels=EIGHT_BITS, **changes):
    torch.manual_seed(0)
    return NVAE(shape, replace(SMALL, **changes), pixels)


def images(model, n=2):
    x = torch.rand(n, *model.shape, generator=torch.Generator().manual_seed(1))
    return (x > 0.5).float() if model.pixels.likelihood == 'bernoulli' else (x * 255).round() / 255


@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_trains_scores_samples_and_reconstructs(name):
    model = build(**VARIANTS[name])
    x = images(model)
    model.initialize(x)
    loss, logs = model.objective(model(x), progress=0.1)
    loss.backward()
    assert torch.isfinite(loss) and all(math.isfinite(float(v)) for v in logs.values())
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        terms = model(x, skip=1)
        assert terms['recon'].shape == terms['log_q'].shape == terms['log_p'].shape == (2,)
        assert terms['kl'].shape == (2, model.num_groups) and terms['kl'][:, -1].abs().max() == 0
        assert model.reconstruct(x).shape == model.sample(2).shape == x.shape
        for image in (model.reconstruct(x), model.sample(3, temperature=0.7)):
            assert image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize(
    'shape, pixels',
    [
        ((3, 16, 16), Pixels(bits=5)),
        ((1, 16, 32), Pixels(bits=16)),
        ((1, 16, 16), Pixels('bernoulli', 1, padding=2)),
    ],
)
def test_colour_oblong_deep_and_binary_images(shape, pixels):
    model = build(shape, pixels).eval()
    with torch.no_grad():
        assert torch.isfinite(model(images(model))['recon']).all()
        assert model.sample(2).shape == (2, *shape)


def test_padding_is_left_out_of_the_likelihood():
    model = build(pixels=Pixels('bernoulli', 1, padding=2)).eval()
    x = images(model)
    with torch.no_grad():
        terms = model(x, temperature=0.0)
        inner = model.likelihood.log_prob(terms['logits'], x)[..., 2:-2, 2:-2].sum((1, 2, 3))
    torch.testing.assert_close(terms['recon'].float(), -inner)


def test_posterior_equal_to_the_prior_has_no_kl():
    """With residual posteriors and a head of zero, q = p: KL is 0 and log q = log p for every draw."""
    model = build().eval()
    with torch.no_grad():
        for group in model.groups:
            group.posterior.log_weight_norm.fill_(-100)
            group.posterior.bias.zero_()
        terms = model(images(model))
    assert terms['kl'].abs().max().item() < 1e-5
    torch.testing.assert_close(terms['log_q'], terms['log_p'])


def test_skipping_everything_ignores_the_image_and_skip_is_checked():
    model = build().eval()
    a = images(model)
    with torch.no_grad():
        first, second = (model(x, skip=model.num_groups, temperature=0.0) for x in (a, 1 - a))
        torch.testing.assert_close(first['logits'], second['logits'])
        assert first['kl'].abs().max() == 0
        torch.testing.assert_close(first['logits'], model.prior_logits(2, temperature=0.0))
    with pytest.raises(UserError, match='skip 5'):
        model(a, skip=5)


def test_kl_terms_average_to_the_log_ratio():
    model = build().eval()
    x = images(model, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        first = [model(x) for _ in range(400)]
    # The KL of later groups depends on the drawn earlier ones, so both sides are averages over draws.
    kl = torch.stack([t['kl'].sum(1) for t in first])
    ratio = torch.stack([t['log_q'] - t['log_p'] for t in first])
    assert (kl - ratio).mean().item() == approx(0, abs=4 * (kl - ratio).std().item() / 20)


def test_maps_sum_to_the_terms():
    model = build(num_latent_scales=2).eval()
    x = images(model)
    with torch.no_grad():
        maps, terms = model.maps(x), model(x, temperature=0.0)
    torch.testing.assert_close(maps['recon'].sum((1, 2, 3)), terms['recon'].float())
    torch.testing.assert_close(maps['kl'].sum((2, 3)), terms['kl'])


def test_bfloat16_changes_the_bound_little_and_leaves_it_in_full_precision():
    model = build().eval()
    x = images(model)
    with torch.no_grad():
        full = model(x, temperature=0.0)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            half = model(x, temperature=0.0)
    precise = (torch.float32, torch.float64)
    assert all(half[name].dtype in precise for name in ('recon', 'kl', 'log_q', 'log_p', 'logits'))
    torch.testing.assert_close(half['recon'], full['recon'], rtol=0.02, atol=1)


# -------------------------------------------------------------------------------------------------- schedules


def test_groups_per_scale():
    config = replace(SMALL, num_latent_scales=3, num_groups_per_scale=10)
    assert groups_per_scale(config) == [10, 10, 10]
    assert groups_per_scale(replace(config, ada_groups=True)) == [10, 5, 2]
    assert groups_per_scale(replace(config, ada_groups=True, min_groups_per_scale=4)) == [10, 5, 4]


def test_kl_weight_is_constant_then_linear_then_one():
    config = replace(SMALL, kl_anneal_portion=0.3, kl_const_portion=0.1, kl_const_coeff=0.01)
    assert [kl_weight(p, config) for p in (0, 0.1, 0.25, 0.4, 1.0)] == approx([0.01, 0.01, 0.5, 1, 1])
    assert kl_weight(0, replace(config, kl_anneal_portion=0.0)) == 1


def test_balancing_worked_by_hand():
    # Two scales of 1 (coarse) and 2 (fine) groups: 4^0 / 1 = 1, 4^1 / 2 = 2 each.
    alpha = balance_coefficients(replace(SMALL, num_groups_per_scale=2, ada_groups=True))
    assert alpha.tolist() == [1, 2, 2]
    kl = torch.tensor([[0.99, 3.99, 7.99]])
    gamma = torch.tensor([1.0, 2.0, 4.0]) * 3 / 7  # (KL + 0.01) / alpha, scaled to mean 1
    value, factors = balanced_kl(kl, alpha, weight=0.5)
    assert factors.tolist() == approx(gamma.tolist())
    assert value.item() == approx(0.5 * (kl[0] * gamma).sum().item())
    assert balanced_kl(kl, alpha, weight=1.0)[0].item() == approx(12.97)


def test_regularizer_strength_falls_geometrically():
    model = build(
        weight_decay_norm=1e-2,
        weight_decay_norm_init=1.0,
        weight_decay_norm_anneal=True,
        kl_anneal_portion=0.5,
        kl_const_portion=0.0,
    )
    terms = model(images(model))
    strengths = [float(model.objective(terms, p)[1]['train/norm_coeff']) for p in (0.25, 0.5, 1.0)]
    assert strengths == approx([0.1, 0.01, 0.01])  # weight 0.5 is half way in the logarithm


# -------------------------------------------------------------------------------- initialization, checkpoints


def test_data_dependent_initialization_happens_once_ever():
    model = build(arch_instance='res_elu')
    x = images(model)
    model.initialize(x)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.initialize(1 - x)
    loaded = build(arch_instance='res_elu')
    loaded.load_state_dict(after)
    loaded.initialize(1 - x)
    loaded(x)
    for state in (model.state_dict(), loaded.state_dict()):
        assert all(torch.equal(state[k], after[k]) for k in after)


@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_goes_through_the_published_format(name):
    """Written under published names and read back, the model says the same."""
    model = build(**VARIANTS[name]).eval()
    from argparse import Namespace
    from dataclasses import asdict

    weights = to_official(model)
    weights |= {f'{k}_normalized': v for k, v in weights.items() if k.endswith('conv.0.weight')}
    size = 16 // 2 ** (model.config.num_preprocess_blocks + model.config.num_latent_scales - 1)
    weights.setdefault('prior_ftr0', torch.zeros(8, size, size))
    args = Namespace(**asdict(model.config), dataset='cifar10', num_x_bits=8, batch_size=2)
    read, _ = read_official({'state_dict': weights, 'args': args, 'arch_instance': args.arch_instance})
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(read(x, temperature=0.0)['logits'], model(x, temperature=0.0)['logits'])
    assert len(set(dict(official_names(model)).values())) == len(weights) - (
        'initial_state' not in model.state_dict()
    ) - sum(k.endswith('weight_normalized') for k in weights)


def test_a_published_checkpoint_that_lacks_a_weight_is_refused():
    from argparse import Namespace
    from dataclasses import asdict

    model = build()
    weights = to_official(model)
    del weights['stem.bias']
    args = Namespace(**asdict(model.config), dataset='cifar10', num_x_bits=8)
    with pytest.raises(UserError, match=r"1 weights missing \['stem.bias'\]"):
        read_official({'state_dict': weights, 'args': args, 'arch_instance': 'res_mbconv'})


@pytest.mark.parametrize(
    'shape, changes, message',
    [
        ((1, 20, 20), {'num_latent_scales': 3}, 'multiple of 8'),
        ((1, 16, 16), {'num_postprocess_blocks': 2}, 'they must agree'),
        ((1, 8, 16, 16), {}, 'reads images'),
    ],
)
def test_impossible_sizes_are_explained(shape, changes, message):
    with pytest.raises(UserError, match=message):
        build(shape, **changes)


@pytest.mark.parametrize(
    'millions, groups, config',
    [
        (
            33.36,
            15,
            NVAEConfig(
                num_latent_scales=2,
                num_groups_per_scale=10,
                ada_groups=True,
                num_cell_per_cond_enc=2,
                num_cell_per_cond_dec=2,
                use_se=True,
                res_dist=True,
            ),
        )
    ],
)
def test_published_number_of_parameters_for_mnist(millions, groups, config):
    with torch.device('meta'):
        model = NVAE((1, 32, 32), config, Pixels('bernoulli', 1, 2))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == approx(millions, abs=0.005)
    assert model.num_groups == groups


def test_only_the_posteriors_depend_on_the_encoder_parameters():
    """Other encoder weights give other posteriors; what is drawn from the prior stays."""
    torch.manual_seed(0)
    model = NVAE((1, 16, 16), NVAEConfig(num_channels_enc=4, num_channels_dec=4, num_latent_scales=2,
                                         num_groups_per_scale=2, num_latent_per_group=2, num_nf=1)).eval()
    x = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        prior, seen = model.prior_logits(2, temperature=0.0), model(x, temperature=0.0)['kl']
        for parameter in model.encoder_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert torch.equal(prior, model.prior_logits(2, temperature=0.0))
        assert (model(x, temperature=0.0)['kl'] - seen).abs().min() > 0
    chosen = {id(parameter) for parameter in model.encoder_parameters()}
    rest = [name for name, p in model.named_parameters() if id(p) not in chosen]
    parts = ('prior.', 'decode.', 'into_decoder.', 'up.', 'post_process.', 'image_head.', 'initial_state')
    assert all(any(part in name for part in parts) for name in rest), rest
