"""Scores against a model whose likelihood, ELBO and LLR are known on paper."""

import math
from types import SimpleNamespace

import pytest
import torch

from anomaly.baselines import compressed_bits
from anomaly.choice import choose_map, choose_scores
from anomaly.config import Judging
from anomaly.outputs import Outputs, elbo, log_weight
from anomaly.scores import SCORES, Scoring, check_used
from distributions import Pixels, log_mean_exp
from utils import UserError


def log_normal(x, mean, var):
    return -0.5 * (math.log(2 * math.pi * var) + (x - mean) ** 2 / var)


class LinearGaussian(torch.nn.Module):
    """z1 ~ N(0, 1), z2 ~ N(z1, tau2), each of D pixels ~ N(z2, sigma2): every posterior is known.

    `spread` multiplies the standard deviation of the posteriors; at 1 they are exact and each log weight is
    log p(x).
    """
    num_groups, pixels = 2, Pixels()

    def __init__(self, tau2=0.5, sigma2=0.4, spread=1.0):
        super().__init__()
        self.tau2, self.sigma2, self.spread, self.calls, self.noises = tau2, sigma2, spread, [], []

    def posteriors(self, x):
        """Mean and variance of z1 given x, and of z2 given x as a function of z1."""
        d, mean = x[0].numel(), x.double().mean((1, 2, 3))
        noise = self.tau2 + self.sigma2 / d
        p1, p2 = 1 + 1 / noise, 1 / self.tau2 + d / self.sigma2
        return (mean / noise / p1, self.spread ** 2 / p1,
                lambda z1: (z1 / self.tau2 + d * mean / self.sigma2) / p2, self.spread ** 2 / p2)

    def forward(self, x, skip=0, temperature=1.0, prior_temperature=1.0):
        self.calls.append(skip)
        m1, v1, m2_of, v2 = self.posteriors(x)
        prior1, prior2 = skip > 1, skip > 0
        noise = torch.randn_like(m1)
        self.noises.append(noise)
        z1 = temperature * noise * (prior_temperature if prior1 else v1 ** 0.5) + (0 if prior1 else m1)
        m2 = z1 if prior2 else m2_of(z1)
        std2 = prior_temperature * self.tau2 ** 0.5 if prior2 else v2 ** 0.5
        z2 = m2 + temperature * torch.randn_like(m1) * std2
        kl1 = 0 * z1 if prior1 else 0.5 * (v1 + m1 ** 2 - 1 - math.log(v1))
        kl2 = 0 * z1 if prior2 else 0.5 * ((v2 + (m2 - z1) ** 2) / self.tau2 - 1 - math.log(v2 / self.tau2))
        keep1, keep2 = not prior1, not prior2
        return {'recon': -log_normal(x.double(), z2[:, None, None, None], self.sigma2).sum((1, 2, 3)),
                'kl': torch.stack([kl1, kl2], 1), 'logits': z2,
                'log_q': keep1 * log_normal(z1, m1, v1) + keep2 * log_normal(z2, m2, v2),
                'log_p': keep1 * log_normal(z1, 0 * z1, 1) + keep2 * log_normal(z2, z1, self.tau2)}

    def means(self, x, skip=0):
        m1, _, m2_of, _ = self.posteriors(x)
        z1 = 0 * m1 if skip > 1 else m1
        return (z1 if skip else m2_of(z1))[:, None, None, None]

    def reconstruct(self, x, skip=0):
        return self.means(x, skip).expand(x.shape).float()

    def maps(self, x, skip=0):
        pixels = x.shape[-2] * x.shape[-1]
        kl = self(x, skip=skip, temperature=0.0)['kl']
        return {'recon': -log_normal(x.double(), self.means(x, skip), self.sigma2).sum(1, keepdim=True),
                'kl': kl[:, :, None, None].expand(-1, -1, *x.shape[-2:]) / pixels}

    def log_prob(self, x):
        """log p(x) in closed form: pixels are N(0, (1 + tau2) 11' + sigma2 I)."""
        x = x.double().flatten(1)
        d = x.shape[1]
        covariance = (1 + self.tau2) * x.new_ones(d, d) + self.sigma2 * torch.eye(d, dtype=x.dtype)
        return torch.distributions.MultivariateNormal(x.new_zeros(d), covariance).log_prob(x)


class Autoencoder(torch.nn.Module):
    def reconstruct(self, x):
        return x.flip(-1)


class Amortised(torch.nn.Module):
    """z ~ N(0, 1), each of D pixels ~ N(z + shift, 0.4); q = N(slope mean(x) + offset, exp(log_std)^2)."""
    num_groups, variance = 1, 0.4

    def __init__(self, dims=6, offset=0.0):
        """With `offset` 0 the posterior is exact."""
        super().__init__()
        self.precision = 1 + dims / self.variance                # of the posterior
        parameter = lambda value: torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))
        self.slope, self.offset = parameter(dims / self.variance / self.precision), parameter(offset)
        self.log_std, self.shift = parameter(-0.5 * math.log(self.precision)), parameter(0.0)
        self.norm = torch.nn.BatchNorm1d(1, affine=False, dtype=torch.float64)

    def encoder_parameters(self):
        return [self.slope, self.offset, self.log_std]

    def forward(self, x, skip=0, temperature=1.0):
        self.norm(torch.ones(len(x), 1, dtype=torch.float64))    # in training mode it would learn
        mean, std = self.slope * x.double().mean((1, 2, 3)) + self.offset, self.log_std.exp()
        z = mean + std * torch.randn(len(x), dtype=torch.float64)
        kl = 0.5 * (std ** 2 + mean ** 2 - 1) - self.log_std
        recon = -log_normal(x.double(), (z + self.shift)[:, None, None, None], self.variance).sum((1, 2, 3))
        return {'recon': recon, 'kl': kl[:, None], 'log_q': recon * 0, 'log_p': recon * 0}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images(number=3):
    return torch.rand(number, 1, 2, 3, generator=seeded(0))


def outputs_of(model, x, ids=None, bits=8, file_bytes=None, **scoring):
    """Outputs whose images all have noise of their own, also where they are equal."""
    return Outputs(model, x, Scoring(**scoring), bits, file_bytes, ids=ids or list(map(str, range(len(x)))))


def find(name):
    return next(s for row in SCORES.values() for s in row(2) if s.name == name)


def image(name, outputs):
    return find(name).image(outputs)


def score_map(name, outputs):
    return find(name).map(outputs)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def test_functions_of_the_terms_worked_by_hand():
    terms = {'recon': torch.tensor([10.0]), 'kl': torch.tensor([[1.0, 2.5]]), 'log_q': torch.tensor([-3.0]),
             'log_p': torch.tensor([-7.0])}
    assert elbo(terms).item() == -13.5
    assert log_weight(terms).item() == -14.0
    weights = torch.tensor([[1.0], [2.0], [6.0]]).log()
    assert log_mean_exp(weights).item() == pytest.approx(math.log(3))


def test_with_the_exact_posterior_every_log_weight_is_log_p_of_x():
    model, x = LinearGaussian(), images()
    outputs = outputs_of(model, x, num_draws=2, num_iw_samples=3)
    for number in range(3):
        torch.testing.assert_close(outputs.log_weights([number])[0], model.log_prob(x), rtol=0, atol=1e-9)
    torch.testing.assert_close(image('iw', outputs), -model.log_prob(x))


def test_iw_bound_of_a_wrong_posterior_converges_from_below():
    model, x = LinearGaussian(spread=2.0), images()
    truth = model.log_prob(x)
    outputs = outputs_of(model, x.repeat(300, 1, 1, 1))
    weights = outputs.log_weights(range(10)).view(-1, 3)
    assert (log_mean_exp(weights) - truth).abs().max() < 0.1
    assert (weights.mean(0) < truth - 0.3).all()                          # the ELBO is far below
    assert log_mean_exp(weights[:5]).mean() < log_mean_exp(weights).mean()


def bound_without_group_2(model, x):
    """L>1 in closed form: z1 from its posterior N(m, v), z2 from N(z1, tau2): z2 is N(m, v + tau2)."""
    m, v, _, _ = model.posteriors(x)
    square = ((x.double() - m[:, None, None, None]) ** 2 + v + model.tau2).sum((1, 2, 3))
    kl1 = 0.5 * (v + m ** 2 - 1 - math.log(v))
    return -x[0].numel() / 2 * math.log(2 * math.pi * model.sigma2) - square / (2 * model.sigma2) - kl1


@pytest.mark.parametrize('llr_noise', ['separate', 'shared'])
def test_nelbo_lk_and_llr_are_the_closed_forms(llr_noise):
    model, x = LinearGaussian(), images()
    outputs = outputs_of(model, x.repeat(3000, 1, 1, 1), num_draws=4, llr_noise=llr_noise,    # 12,000 draws
                         llr_prior='draw')
    mean_of = lambda name: image(name, outputs).view(-1, 3).mean(0)
    l1 = bound_without_group_2(model, x)
    torch.testing.assert_close(mean_of('nelbo'), -model.log_prob(x), rtol=0, atol=0.05)
    torch.testing.assert_close(mean_of('lk_1'), -l1, rtol=0, atol=0.3)
    torch.testing.assert_close(mean_of('llr_1'), model.log_prob(x) - l1, rtol=0, atol=0.3)
    assert (mean_of('llr_1') > 1).all()                          # what group 2 explains is not nothing


def test_importance_samples_lift_both_bounds_to_log_p_of_x():
    """Skipped groups are proposed by the prior: L>k from many samples is log p(x) too, and LLR>k vanishes."""
    model, x = LinearGaussian(spread=2.0), images()
    truth, repeated = model.log_prob(x), x.repeat(50, 1, 1, 1)
    bounds = {samples: outputs_of(model, repeated, iw_samples_elbo=samples, iw_samples_lk=samples,
                                  llr_prior='draw', num_draws=draws)
              for samples, draws in ((1, 4), (10, 4), (300, 1))}
    mean_of = lambda values: values.view(-1, 3).mean(0)
    for skip in (0, 1):
        one, ten, many = (mean_of(outputs.bound(skip)) for outputs in bounds.values())
        assert (one < ten - 0.05).all() and (one < truth - 0.2).all() and ((many - truth).abs() < 0.1).all()
    assert (mean_of(image('llr_1', bounds[300])).abs() < 0.1).all()
    # the two numbers of samples are apart: 300 for L, 1 for L>1
    apart = outputs_of(model, x.repeat(500, 1, 1, 1), num_draws=4, iw_samples_elbo=50, iw_samples_lk=1,
                       llr_prior='draw')
    expected = truth - bound_without_group_2(model, x)
    torch.testing.assert_close(mean_of(image('llr_1', apart)), expected, rtol=0, atol=0.8)
    assert (expected > 4).all()


def test_one_sample_of_a_bound_is_the_elbo_and_several_are_log_weights():
    model, x = LinearGaussian(spread=1.5), images()
    outputs = outputs_of(model, x, num_draws=2, iw_samples_elbo=3, iw_samples_lk=1)
    assert torch.equal(outputs.bound(1), outputs.mean(elbo, 1))
    weights = torch.stack([log_weight(terms) for terms in outputs.forward(range(6))])
    # draws 0 and 1 have samples 0, 2, 4 and 1, 3, 5: each draw is among its own samples
    expected = (log_mean_exp(weights[::2]) + log_mean_exp(weights[1::2])) / 2
    torch.testing.assert_close(outputs.bound(), expected)


def test_separate_noise_is_separate_and_shared_noise_is_shared():
    def noises(llr_noise):
        """The first noise of pass 1 that skips 0, 1 and 2 groups."""
        model = LinearGaussian()
        outputs = outputs_of(model, images(), llr_noise=llr_noise)
        for skip in (0, 1, 2):
            assert outputs.terms([1], skip)[0].keys() == {'recon', 'kl', 'log_q', 'log_p'}       # no logits
        return model.noises
    full, one, two = noises('shared')
    assert torch.equal(full, one) and torch.equal(full, two)
    same, one, two = noises('separate')
    assert not torch.equal(full, one) and not torch.equal(full, two) and not torch.equal(one, two)
    assert torch.equal(full, same)                               # L itself does not change
    # so that separate bounds vary independently: Var(L - L>1) = Var L + Var L>1
    outputs = outputs_of(LinearGaussian(spread=1.5), images(1).repeat(4000, 1, 1, 1))
    difference = outputs.bound() - outputs.bound(1)
    alone = outputs.bound().var() + outputs.bound(1).var()
    assert difference.var().item() == pytest.approx(alone.item(), rel=0.1)


# scores asked for -> outputs that skip nothing, and that skip group 2; D = 2, K = 5, S = 3, S' = 4
PASSES = {
    'nelbo': (2, 0), 'recon_nll': (2, 0), 'kl': (2, 0), 'kl_1': (2, 0), 'complexity': (2, 0), 'iw': (5, 0),
    'typicality': (1, 0), 'kl_gmm': (1, 0), 'reconstruction': (0, 0), 'lk': (0, 8), 'llr': (6, 8),
    'lk llr': (6, 8), 'llr nelbo iw': (6, 8), 'all': (7, 8)}


@pytest.mark.parametrize('names', PASSES)
def test_only_the_forward_passes_that_a_chosen_score_needs_are_made_and_scores_share_them(names):
    model, x = LinearGaussian(tau2=0.01, sigma2=0.01), images()
    chosen, lines = choose_scores(names.split(), model)
    outputs = outputs_of(model, x, num_draws=2, num_iw_samples=5, iw_samples_elbo=3, iw_samples_lk=4)
    for one in chosen:
        (one.image or one.features)(outputs)
    full, skipping = PASSES[names]
    assert sorted(model.calls) == [0] * full + [1] * skipping
    said = ['scores that LinearGaussian cannot give: latent_knn (needs latents); dose, dose_mahalanobis '
            '(need statistics); msma_gmm, msma_knn, msma_kde, msma_pca_gmm, msma_flow (need score norms); '
            'voxel_nll, voxel_nll_mean (need voxel densities)']
    assert lines == (said if names == 'all' else [])


def test_the_kl_of_channels_is_kept_of_the_draws_alone():
    outputs = outputs_of(LinearGaussian(), images(), num_draws=2)
    outputs.forward = lambda numbers, skip: [{'kl_channels': torch.zeros(2, 1, 3)} for _ in numbers]
    assert ['kl_channels' in terms for terms in outputs.terms(range(4))] == [True, True, False, False]


def test_noise_depends_on_the_seed_the_pass_and_the_image_alone():
    model, x = LinearGaussian(), images()
    first = outputs_of(model, x, num_draws=2, seed=1)
    torch.rand(7)
    again = outputs_of(model, x, num_draws=2, seed=1)
    again.terms([1])                                                      # another order of outputs
    assert torch.equal(image('nelbo', first), image('nelbo', again))
    other = outputs_of(model, x, num_draws=2, seed=2)
    assert not torch.equal(image('nelbo', first), image('nelbo', other))


def test_regret_is_what_an_optimal_posterior_of_the_image_gains():
    x, options = images(1), {'num_draws': 300, 'regret_steps': 100, 'regret_learning_rate': 0.03}
    regret = lambda model, **changes: image('regret', outputs_of(model, x, **options | changes)).item()
    assert abs(regret(Amortised(), regret_learning_rate=0.003)) < 0.1                      # nothing to gain
    model = Amortised(offset=1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # KL of two normals whose means are 1 apart; a decoder that learned along would gain more
    assert regret(model) == pytest.approx(1.0 ** 2 * model.precision / 2, abs=0.6)
    assert 0 < regret(model, regret_steps=5, num_draws=4) < 4
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_regret_follows_from_the_noise_and_an_image_from_its_own_steps():
    model, x = Amortised(offset=0.5), images()
    regret = lambda x, seed: image('regret', Outputs(model.train(), x, Scoring(
        num_draws=2, seed=seed, regret_learning_rate=0.1)))
    assert torch.equal(regret(x, 1), regret(x, 1)) and not torch.equal(regret(x, 1), regret(x, 2))
    # each image starts from the trained encoder, whatever came before; and batch norms are left alone
    torch.testing.assert_close(regret(x[[2, 1]], 1)[1], regret(x, 1)[1])
    assert model.norm.num_batches_tracked == 0


def test_regret_is_made_only_if_asked_for_by_name():
    model = Amortised()
    names = lambda *asked: [s.name for s in choose_scores(asked, model)[0]]
    assert 'regret' not in names('all') and 'regret' in names('all', 'regret')
    assert names('regret') == ['regret']


OUTLIER_SCORES = ['reconstruction', 'residual_top', 'residual_top5', 'residual_mean', 'recon_nll', 'nelbo',
                  'iw', 'kl_1', 'typicality', 'kl_profile', 'kl_knn', 'kl_gmm']


@pytest.mark.parametrize('name', OUTLIER_SCORES)
def test_an_outlier_scores_higher_than_normal_images(name):
    model = LinearGaussian(tau2=0.01, sigma2=0.01)
    normal = (0.3 + 0.05 * torch.randn(40, 1, 2, 3, generator=seeded(1))).clamp(0, 1)
    outlier = torch.tensor([0.9, 1, 0.95, 0.6, 1, 1]).reshape(1, 1, 2, 3)
    one = find(name)
    values = one.image
    if one.density is not None:
        density = one.density.fit(one.features(outputs_of(model, normal)).numpy())
        values = lambda outputs: torch.from_numpy(density.score(one.features(outputs).numpy()))
    usual = values(outputs_of(model, normal))
    assert values(outputs_of(model, outlier)).item() > usual.mean() + 2 * usual.std()


def test_maps_sum_to_their_scores_at_posterior_means():
    model, x = LinearGaussian(), images()
    outputs, means = outputs_of(model, x), model(x, temperature=0.0)
    close(score_map('recon_nll', outputs).sum((1, 2, 3)), means['recon'])
    close(score_map('nelbo', outputs).sum((1, 2, 3)), -elbo(means))
    close(score_map('kl_2', outputs).sum((1, 2, 3)), means['kl'][:, 1])
    assert score_map('reconstruction', outputs).shape == (3, 1, 2, 3)
    without = model(x, skip=1, temperature=0.0)
    close(score_map('lk_1', outputs).sum((1, 2, 3)), -elbo(without))
    # the map of LLR>1 is log p(x|z posterior) - log p(x|z prior), pixel by pixel; here it sums to > 0
    close(score_map('llr_1', outputs).sum((1, 2, 3)), without['recon'] - means['recon'])
    log_p = {skip: log_normal(x.double(), model.means(x, skip), model.sigma2) for skip in (0, 1)}
    close(score_map('llr_1', outputs), log_p[0] - log_p[1])
    assert (score_map('llr_1', outputs).sum((1, 2, 3)) > 0).all()
    assert find('complexity').map is None and find('iw').map is None


def test_complexity_is_nelbo_in_bits_minus_compressed_bits():
    outputs = outputs_of(LinearGaussian(), images(), num_draws=2, bits=5)
    nelbo = image('nelbo', outputs)
    close(image('complexity', outputs), nelbo / math.log(2) - compressed_bits(outputs.x, 5))


def test_a_model_without_the_capability_is_told_which():
    model = Autoencoder()
    chosen, lines = choose_scores(('all',), model)
    assert [s.name for s in chosen] == ['reconstruction', 'residual_top', 'residual_top5', 'residual_mean']
    assert any('nelbo' in line and 'likelihood terms' in line for line in lines)
    with pytest.raises(UserError, match='nelbo needs a model with likelihood terms'):
        choose_scores(('nelbo',), model)
    with pytest.raises(UserError, match='reconstruct'):
        choose_scores(('reconstruction',), torch.nn.Identity())
    with pytest.raises(UserError, match='regret needs a model with encoder parameters, which LinearGaussian'):
        choose_scores(('regret',), LinearGaussian())


def test_scores_are_chosen_by_row_or_by_member():
    model = LinearGaussian()
    assert [s.name for s in choose_scores(('kl',), model)[0]] == ['kl', 'kl_1', 'kl_2']
    assert [s.name for s in choose_scores(('llr_1', 'nelbo'), model)[0]] == ['nelbo', 'llr_1']
    several = [s.name for row in ('lk', 'llr') for s in SCORES[row](11)]
    assert several[8:12] == ['lk_9', 'lk_10', 'llr_1', 'llr_2']
    with pytest.raises(UserError, match=r'llr_2: no such score.* kl_1 to kl_2, lk_1, llr_1'):
        choose_scores(('llr_2',), model)
    for wrong in ({'target_fpr': 1.5}, {'iw_samples_lk': 0}, {'regret_steps': 0},
                  {'regret_learning_rate': 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            (Judging if 'target_fpr' in wrong else Scoring)(**wrong)


def test_skipped_groups_are_at_the_mode_of_the_prior_or_drawn_from_it():
    model, x = LinearGaussian(), images(1).repeat(2000, 1, 1, 1)
    # with both groups at their modes z is 0, and L>2 is log N(x; 0, sigma2) without any noise
    exact = log_normal(x.double(), torch.zeros(()), model.sigma2).sum((1, 2, 3))
    torch.testing.assert_close(outputs_of(model, x, num_draws=1).bound(2), exact)
    # drawn from N(0, 1 + tau2), its mean over z is lower by D (1 + tau2) / 2 sigma2
    drawn = outputs_of(model, x, num_draws=1, llr_prior='draw').bound(2)
    lower = x[0].numel() * (1 + model.tau2) / (2 * model.sigma2)
    assert (exact - drawn).mean().item() == pytest.approx(lower, rel=0.1)


def test_densities_learn_from_posterior_means_or_from_draws():
    model, x = LinearGaussian(), images()
    at_means = model(x, temperature=0.0)
    expected = torch.cat([at_means['recon'][:, None], at_means['kl']], 1)
    assert torch.equal(outputs_of(model, x).likelihood_features(), expected)
    drawn = outputs_of(model, x, num_draws=2, density_features='draws')
    mean = sum(terms['recon'] for terms in drawn.terms(range(2))) / 2
    assert torch.equal(drawn.likelihood_features()[:, 0], mean)


def test_latent_channels_are_described_by_the_logarithms_of_their_kl_and_of_their_spread():
    class Model(LinearGaussian):
        def forward(self, *args, **options):
            kl = torch.tensor([[[1.0, 0.5], [0.0, 4.0]]]).expand(len(args[0]), -1, -1)
            return super().forward(*args, **options) | {'kl': kl.sum(2), 'kl_channels': kl}

        def latents(self, x):
            coarse = torch.tensor([[[[2.0, 6.0]], [[3.0, 3.0]]]])                # (1, Z, 1, 2)
            return [z.expand(len(x), -1, -1, -1) for z in (coarse, coarse[..., :1])]

    outputs = outputs_of(Model(), images(2))
    spread = [math.log(value + 0.01) for value in (2.0, 0.0, 0.0, 0.0)]
    log_kl = [math.log(value) for value in (1.0, 0.5, 0.01, 4.0)]                # 0 counts as 0.01 nats
    close(find('latent_knn').features(outputs), torch.tensor([log_kl + spread] * 2))
    close(find('kl_knn').features(outputs), torch.tensor([log_kl] * 2))
    close(find('kl_profile').features(outputs), torch.tensor([[math.log(1.5), math.log(4.0)]] * 2))


def test_a_sum_of_scores_follows_its_terms():
    chosen, _ = choose_scores(('kl_knn+llr_1', 'nelbo'), LinearGaussian())
    assert [score.name for score in chosen] == ['nelbo', 'kl_knn', 'llr_1', 'kl_knn+llr_1']
    assert chosen[-1].terms == ('kl_knn', 'llr_1')
    for wrong in ('kl_knn+llr', 'kl_knn+nothing'):
        with pytest.raises(UserError, match=r'llr|nothing'):
            choose_scores((wrong,), LinearGaussian())


def test_the_map_of_a_sum_is_that_of_a_term():
    model = LinearGaussian()
    chosen, _ = choose_scores(('kl_knn+recon_nll', 'nelbo'), model)
    shown = lambda primary: choose_map(primary, chosen, model, Scoring()).name
    assert shown('kl_knn+recon_nll') == 'recon_nll' and shown('nelbo') == 'nelbo'
    assert shown('kl_knn') == 'recon_nll', "the first that has one"
    norms = SimpleNamespace(score_norms=1, score_norm=1, statistics=1)
    chosen, _ = choose_scores(('dose', 'msma_gmm'), norms)
    assert choose_map('dose', chosen, norms, Scoring()) is None
    assert choose_map('dose', chosen, norms, Scoring(msma_map='gradient')).name == 'msma_gmm'


def test_a_score_is_explained_with_its_flags():
    scoring = Scoring(residual_shift=2, msma_levels=5)
    assert find('residual_top').explained(None, scoring).endswith(
        'highest 1 % (residual_smoothing 1.0, residual_shift 2)')
    assert find('nelbo').explained(None, scoring) == 'negative ELBO, nats (num_draws 4)'
    assert find('reconstruction').explained(None, scoring) == 'mean |x - reconstruction|'
    norms, other = SimpleNamespace(score_norms=1), SimpleNamespace()
    assert 'msma_levels 5' in find('dose').explained(norms, scoring)
    check_used(scoring, ['residual_top', *find('dose').flag_names(norms)])
    with pytest.raises(UserError, match='--msma_levels does nothing'):
        check_used(scoring, ['residual_top', *find('dose').flag_names(other)])
