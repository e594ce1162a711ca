"""HVAE, LVAE and BIVA: every variant, terms, skipped stages, schedules."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from small_hvae import (
    BLOCKS,
    FAMILIES,
    GREY,
    UNEQUAL,
    VARIANTS,
    build,
    conv,
    dense,
    images,
)

from distributions import Normal, Pixels
from families.hvae.config import HVAEConfig
from families.hvae.layers import GaussianLatent, ResBlock, centered, softplus_ln2
from families.hvae.model import BIVA, HVAE, LVAE, free_nats, kl_weight
from families.hvae.stages import draw
from utils import UserError


@pytest.mark.parametrize('variant', VARIANTS | UNEQUAL)
@pytest.mark.parametrize('family', FAMILIES)
def test_every_variant_trains_scores_samples_and_decodes(family, variant):
    options = (VARIANTS | UNEQUAL)[variant]
    model = build(FAMILIES[family], **options).train()
    x = images(model)
    loss, logs = model.objective(model(x), progress=0.3)
    loss.backward()
    assert torch.isfinite(loss) and all(math.isfinite(float(v)) for v in logs.values())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    with torch.no_grad():
        terms = model(x, skip=1)
        assert terms['recon'].shape == terms['log_q'].shape == terms['log_p'].shape == (3,)
        assert terms['kl'].shape == (3, model.num_groups) and (terms['kl'][:, -1] == 0).all()
        assert all(value.shape[0] == 3 for value in terms.values())
        for image in (model.reconstruct(x), model.sample(3, 0.7), model.sample(3, mean=True)):
            assert image.shape == x.shape and image.min() >= 0 and image.max() <= 1
        maps, means = model.maps(x), model(x, temperature=0.0)
        torch.testing.assert_close(maps['recon'].sum((1, 2, 3)), means['recon'].float())
        torch.testing.assert_close(maps['kl'].sum((2, 3)), means['kl'].float(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(means['kl_channels'].sum(2), means['kl'].float(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(means['kl_elements'].sum((1, 2)), means['kl'].sum(1).float(), rtol=1e-4,
                                   atol=1e-3)
        latents = model.latents(x)
        assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes
        assert len(latents) == model.num_groups
        torch.testing.assert_close(model.decode(latents), model.reconstruct(x))
        top = model.reconstruct(x, skip=model.num_groups - 1)
        torch.testing.assert_close(model.decode(latents[:1]), top)
    with pytest.raises(UserError, match='latents of shapes'):
        model.decode([latents[0][:, :1]])


# ---------------------------------------------------------------------------------------------------- latents

def test_standard_deviations_are_softplus_to_the_base_2():
    rho = torch.tensor([0.0, 1, 40, -200])
    assert softplus_ln2(rho).tolist() == approx([1, math.log(3) / math.log(2), 40, 0])
    latent = GaussianLatent(1, None, (1, 1, 1), None, 'Identity')
    latent.to_posterior.g.data.zero_()
    latent.to_posterior.bias.data = torch.tensor([3.0, -200])
    q = latent.posterior(torch.ones(1, 1, 1, 1))
    assert q.mean.item() == 3 and q.std.item() == approx(1e-6)
    p = latent.prior(None, 2)
    assert p.mean.flatten().tolist() == [0, 0] and p.std.flatten().tolist() == [1, 1]


def test_kl_of_draws_averages_to_the_analytic_one():
    torch.manual_seed(0)
    q = Normal(torch.full((20000, 1, 1, 1), 0.5), torch.full((20000, 1, 1, 1), 0.8))
    p = Normal(torch.full_like(q.mean, -0.3), torch.full_like(q.mean, 1.4))
    drawn = draw(p, (q, q.sample()), None, 1.0)
    kl = drawn.log_q - drawn.log_p
    assert kl.mean().item() == approx(q.kl(p)[0].item(), abs=4 * kl.std().item() / math.sqrt(20000))
    assert kl.min() < 0                                     # of single draws it may be negative


@pytest.mark.parametrize('family', FAMILIES)
def test_bounds_and_weights_in_float64(family):
    """The weight of each draw is its bound, to the last digits: the KL is that of the draws."""
    model = build(FAMILIES[family], train_samples=2).double()
    x = images(model).double()
    with torch.no_grad():
        for terms in (model(x), model(x, skip=1), model.train()(x)):
            bound = -terms['recon'] - terms['kl'].sum(1)
            weight = -terms['recon'] - terms['log_q'] + terms['log_p']
            assert bound.dtype == torch.float64
            torch.testing.assert_close(weight, bound, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize('family', FAMILIES)
def test_posterior_equal_to_the_prior_has_no_kl(family):
    model = build(FAMILIES[family])
    for module in model.modules():
        if isinstance(module, GaussianLatent):
            for head in (module.to_posterior, getattr(module, 'to_prior', module.to_posterior)):
                head.g.data.zero_()
                head.bias.data.zero_()
    with torch.no_grad():
        terms = model(images(model))
    assert (terms['kl'] == 0).all() and torch.equal(terms['log_q'], terms['log_p'])


def sensitivity(latent, merge, features, above):
    """Gradient of the posterior's mean with respect to the features above."""
    above = above.requires_grad_()
    latent.posterior(merge(features, above)).mean.sum().backward()
    return 0.0 if above.grad is None else above.grad.abs().max().item()


@pytest.mark.parametrize('family, name', [('lvae', 'latent'), ('biva', 'td_latent')])
def test_only_the_repaired_ladder_is_one(family, name):
    """q_i depends on d_{i+1}; published, it does not."""
    for compat in (False, True):
        model = build(FAMILIES[family], compat_official=compat)
        for stage in model.stages[:-1]:
            features, above = torch.randn(2, *stage.spec.shape), torch.randn(2, *stage.spec.above)
            found = sensitivity(getattr(stage, name), stage.merge, features, above)
            assert found == 0 if compat else found > 1e-3


def aux_layers(module):
    return [b.aux is not None for b in module.modules() if isinstance(b, ResBlock)]


def test_which_skips_are_alive():
    alive = lambda compat, family=HVAE, **more: aux_layers(build(family, compat_official=compat, **more))
    assert alive(True) == [False] * 2 + [False, True] + [False] * 2 + [False, True] + [False] * 4
    assert alive(False) == [False] * 2 + [True] * 2 + [True] * 2 + [True] * 2 + [True] * 2 + [False] * 2
    assert not any(alive(False, skip_stochastic=False))
    biva = build(BIVA, compat_official=True)
    assert [aux_layers(stage.bottom_up) for stage in biva.stages] == [[False] * 2] * 2 + [[True] * 2]
    assert not any(any(aux_layers(stage.generate)) for stage in biva.stages)
    biva = build(BIVA)
    assert [aux_layers(stage.bottom_up) for stage in biva.stages] == [[False] * 2] + [[True] * 2] * 2
    assert [aux_layers(stage.generate) for stage in biva.stages] == [[True] * 2] * 2 + [[False] * 2]
    assert [b.grows for b in biva.stages[0].generate] == [True, False]     # the list is reversed
    assert [b.grows for b in build(BIVA, compat_official=True).stages[0].generate] == [False, True]


@pytest.mark.parametrize('family', FAMILIES)
def test_which_blocks_are_residual(family):
    """Not the first of inference in stage 1, nor the first of generation in any stage."""
    stages = build(FAMILIES[family]).stages
    for i, stage in enumerate(stages):
        assert [b.residual for b in stage.generate] == [False, True]
        for chain in (getattr(stage, n) for n in ('encode', 'bottom_up', 'top_down') if hasattr(stage, n)):
            assert [b.residual for b in chain] == [i > 0, True]


def test_top_down_latents_come_before_bottom_up_ones():
    model = build(BIVA)
    x, stage = images(model), model.stages[0]
    with torch.no_grad():
        _, (inferred, _) = stage.up((x, x, None), False, 0.0)
        top_down, bottom_up = model.latents(x)[-1].chunk(2, dim=1)
    torch.testing.assert_close(bottom_up, inferred[0].mean)
    assert not torch.allclose(top_down, inferred[0].mean)


def test_activation_before_the_latents_of_biva():
    for compat, wanted in ((True, torch.nn.ELU), (False, torch.nn.Tanh)):
        stage = build(BIVA, compat_official=compat, activation='Tanh').stages[0]
        assert all(isinstance(z.activation, wanted) for z in (stage.td_latent, stage.bu_latent))
        assert isinstance(stage.generate[0].activation_mid, torch.nn.Tanh)


# ---------------------------------------------------------------------------------------------- skip, padding

@pytest.mark.parametrize('family', FAMILIES)
def test_skipped_stages_come_from_the_prior(family):
    model = build(FAMILIES[family])
    x, L = images(model), model.num_groups
    with torch.no_grad():
        first, second = (model(y, skip=L, temperature=0.0) for y in (x, 1 - x))
        torch.testing.assert_close(first['logits'], second['logits'])
        torch.testing.assert_close(first['logits'], model.prior_logits(3, temperature=0.0))
        assert (first['kl'] == 0).all()
        torch.manual_seed(0)
        full = model(x)
        for k in range(L + 1):
            torch.manual_seed(0)
            terms = model(x, skip=k)
            assert (terms['kl'][:, L - k:] == 0).all() and (terms['kl'][:, :L - k] != 0).all()
            assert k == 0 or not torch.equal(terms['recon'], full['recon'])
            torch.manual_seed(1)
            again = model(x, skip=k)               # a draw from the prior, not its mean
            assert not torch.equal(again['recon'], terms['recon'])
    with pytest.raises(UserError, match=f'skip {L + 1}: give 0 to {L}'):
        model(x, skip=L + 1)


def test_passes_that_skip_share_the_noise_of_the_stages_above():
    model = build(LVAE)
    x = images(model)
    with torch.no_grad():
        passes = []
        for k in (0, 1, 2):
            torch.manual_seed(0)
            passes.append(model(x, skip=k)['kl'][:, 0])
    torch.testing.assert_close(passes[0], passes[1])
    torch.testing.assert_close(passes[0], passes[2])


def test_stages_that_are_not_skipped_are_drawn():
    model = build()
    x = images(model)
    with torch.no_grad():
        draws = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            draws.append(model.latents(x, temperature=1.0))
    assert not any(torch.equal(a, b) for a, b in zip(*draws))


def test_a_skipped_stage_hands_up_the_mean_of_its_posterior():
    model = build()
    stage, x = model.stages[0], images(model)
    with torch.no_grad():
        (u, _), (q, z) = stage.up((x, None), True, 1.0)
        assert torch.equal(z, q.mean) and torch.equal(u, z)
        assert not torch.equal(stage.up((x, None), False, 1.0)[1][1], q.mean)


def test_a_border_is_no_business_of_the_network():
    framed, bare = build(shape=(1, 12, 12), pixels=Pixels('bernoulli', 1, padding=2)), build()
    framed.load_state_dict(bare.state_dict())
    x = images(bare)
    with torch.no_grad():
        noisy = F.pad(x, (2,) * 4, value=0.5)
        ours, theirs = framed(noisy, temperature=0.0), bare(x, temperature=0.0)
        for key in theirs:         # not to the bit: a frame that is cut off leaves another layout in memory
            torch.testing.assert_close(ours[key], theirs[key], msg=key)
        torch.testing.assert_close(framed.reconstruct(noisy), F.pad(bare.reconstruct(x), (2,) * 4))


def test_padding_is_cut_off_before_the_likelihood():
    assert centered((4, 6), (8, 8)) == [1, 1, 2, 2]
    model = build(padded_shape=(12, 16))
    x = images(model)
    with torch.no_grad():
        terms = model(x, temperature=0.0)
    assert terms['logits'].shape == x.shape and model.latent_shapes[-1] == (2, 6, 8)
    expected = F.binary_cross_entropy_with_logits(terms['logits'], x, reduction='none').sum((1, 2, 3))
    torch.testing.assert_close(terms['recon'].float(), expected)
    with pytest.raises(UserError, match='larger by even'):
        build(padded_shape=(9, 9))


@pytest.mark.parametrize('family', FAMILIES)
def test_encoder_parameters_serve_inference_alone(family):
    model = build(FAMILIES[family], activation='PSwish')
    encoder = {id(p) for p in model.encoder_parameters()}
    model.prior_logits(2).sum().backward()
    assert all(p.grad is None for p in model.parameters() if id(p) in encoder)
    x = images(model)
    with torch.no_grad():
        prior, bound = model.prior_logits(2, temperature=0.0), model(x, temperature=0.0)['recon']
        for p in model.encoder_parameters():
            p.mul_(1.1)
        assert torch.equal(prior, model.prior_logits(2, temperature=0.0))
        assert not torch.equal(bound, model(x, temperature=0.0)['recon'])


def test_bfloat16_changes_the_bound_little_and_no_term_is_in_half_precision():
    model = build(BIVA, shape=(3, 8, 8), pixels=GREY)
    x = images(model)
    with torch.no_grad():
        full = model(x, temperature=0.0)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            half = model(x, temperature=0.0)
    assert all(value.dtype in (torch.float32, torch.float64) for value in half.values())
    torch.testing.assert_close(half['recon'], full['recon'], rtol=0.03, atol=1)


# ---------------------------------------------------------------------------------------------- the objective

def test_schedules_worked_by_hand():
    """Published: 200 of 1000 epochs of warm-up; 2 free nats for 200 epochs, and fewer for 200 more."""
    recipe = HVAEConfig()
    table = {0: (0, 2), 0.1: (0.5, 2), 0.2: (1, 2), 0.25: (1, 1.5), 0.3: (1, 1), 0.4: (1, 0), 1.0: (1, 0)}
    for progress, (weight, free) in table.items():
        assert kl_weight(progress, recipe) == approx(weight) and free_nats(progress, recipe) == approx(free)
    for_ever = replace(recipe, free_nats_portion=0.0, kl_anneal_portion=0.0)
    assert [free_nats(p, for_ever) for p in (0, 0.5, 1)] == [2, 2, 2] and kl_weight(0, for_ever) == 1


def test_free_nats_worked_by_hand():
    """3 nats: of a dense latent with 2 channels 1.5 each; of 1 channel at 4 positions 3 each."""
    model = build(blocks=BLOCKS[:2], latents=[conv(1), dense(2)], shape=(1, 4, 4), free_nats=3.0,
                  free_nats_portion=0.5, kl_anneal_portion=0.5)
    assert model.free_share.tolist() == [0.5] * 2 + [1] * 4
    kl = torch.tensor([[[-1.0, 4, 2, 3, 5, -2]]])
    terms = {'recon': torch.tensor([10.0]), 'recon_draws': torch.tensor([[10.0]]), 'kl_elements': kl,
             'kl': torch.tensor([[3.0, 8]])}
    wanted = {0.25: 10 + 0.5 * (1.5 + 4 + 3 + 3 + 5 + 3),            # all free nats, half the weight
              0.375: 10 + 0.75 * (0.75 + 4 + 2 + 3 + 5 + 1.5),       # 1.5 free nats: 0.75 and 1.5
              0.5: 10 + 11}                                          # none, and no least value
    for progress, loss in wanted.items():
        assert model.objective(terms, progress)[0].item() == approx(loss)
    logs = model.objective(terms, 0.25)[1]
    assert float(logs['train/nelbo_iter']) == 21 and float(logs['kl_coeff/coeff']) == 0.5
    assert float(logs['kl_coeff/free_nats']) == 3 and float(logs['kl_vals/layer_1']) == 8


def test_importance_weighting_in_closed_form():
    losses = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    terms = {'recon': losses.mean(1), 'recon_draws': losses, 'kl_elements': torch.zeros(2, 2, 12),
             'kl': torch.zeros(2, 2)}
    options = {'blocks': BLOCKS[:1], 'latents': [dense(12)], 'free_nats': 0.0, 'train_samples': 2}
    assert build(**options).objective(terms, 1.0)[0].item() == approx(2)
    weighted = build(**options, train_importance_weighted=True).objective(terms, 1.0)[0].item()
    assert weighted == approx((-math.log((math.exp(-1) + math.exp(-3)) / 2) + 2) / 2)


def test_several_draws_are_averaged_for_each_image():
    model = build(train_samples=3).train()
    x = images(model)
    terms = model(x)
    assert terms['recon_draws'].shape == (3, 3) and terms['kl_elements'].shape[:2] == (3, 3)
    torch.testing.assert_close(terms['recon'], terms['recon_draws'].mean(1))
    torch.testing.assert_close(terms['kl'].sum(1), terms['kl_elements'].sum(2).mean(1), rtol=1e-4, atol=1e-3)
    assert terms['recon_draws'].std(1).min() > 0
    means = model(x, temperature=0.0)                       # the draws of an image belong to it
    torch.testing.assert_close(means['recon_draws'], means['recon'][:, None].expand(-1, 3))
    torch.testing.assert_close(means['recon'], model.eval()(x, temperature=0.0)['recon'].to(means['recon']))
    assert model(x)['recon_draws'].shape == (3, 1)          # in an evaluation one draw is one pass
