"""Distributions of latents and actions, and the head whose outputs are bins."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as td
import torch.nn.functional as F
from helpers.agents import (
    A, B, K, S, T, both_twins, close, close_gradients, every_script, make,
)  # fmt: skip

import dreamerv1
import dreamerv2

CONTINUOUS = [(dreamerv1, "tanh_normal"), (dreamerv2, "tanh_normal"), (dreamerv2, "trunc_normal")]
LEAST_AND_GREATEST = [0.0, 1 - 2**-24]  # of torch's uniform numbers


def is_one_hot(x):
    return ((x == 0) | (x == 1)).all() and (x.sum(-1) == 1).all()


# OneHot


@every_script
def test_one_hot_samples_are_one_hot_and_as_frequent_as_their_probabilities(script):
    logit = 2 * torch.randn(S, K)
    sample = script.OneHot(logit.expand(20_000, S, K)).rsample()
    assert is_one_hot(sample)
    close(sample.mean(0), logit.softmax(-1), rtol=0, atol=0.02)  # 5 standard deviations and more


@every_script
def test_a_one_hot_sample_takes_one_uniform_number_per_class(script, monkeypatch):
    dist, drawn, rand_like = script.OneHot(torch.randn(B, S, K)), [], torch.rand_like

    def record(x):
        drawn.append(rand_like(x))
        return drawn[-1]

    monkeypatch.setattr(torch, "rand_like", record)
    torch.manual_seed(4)
    sample, after = dist.rsample(), torch.get_rng_state()
    (uniform,) = drawn
    assert uniform.shape == (B, S, K)
    assert "probs" not in vars(dist)  # which only a gradient needs
    # The first of exponential times with the probabilities as rates.
    first = (-uniform.log() / dist.probs).argmin(-1)
    assert torch.equal(sample, F.one_hot(first, K).float())
    torch.manual_seed(4)
    rand_like(dist.probs)
    assert torch.equal(torch.get_rng_state(), after)  # and nothing else is drawn


@every_script
@pytest.mark.parametrize("u", LEAST_AND_GREATEST)
def test_one_hot_samples_are_one_hot_for_extreme_uniform_numbers(script, u, monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, u))
    assert is_one_hot(script.OneHot(100 * torch.randn(B, S, K)).rsample())


@every_script
def test_one_hot_gradient_is_straight_through_that_of_the_probabilities(script):
    logit, weight = torch.randn(B, S, K, requires_grad=True), torch.randn(B, S, K)
    sample = script.OneHot(logit).rsample()
    (grad,) = close_gradients((sample * weight).sum(), (logit.softmax(-1) * weight).sum(), [logit])
    assert grad.any()


@every_script
def test_one_hot_log_prob_entropy_and_mode_equal_torch(script):
    logit = 3 * torch.randn(B, S, K)
    ours, theirs = script.OneHot(logit), td.OneHotCategorical(logits=logit)
    sample = theirs.sample()
    close(ours.log_prob(sample), theirs.log_prob(sample))
    close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode, theirs.mode)


@every_script
def test_one_hot_is_in_float32_and_finite_for_extreme_logits(script):
    logit = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4]], dtype=torch.bfloat16)
    dist = script.OneHot(logit.requires_grad_())
    other = script.OneHot(logit.flip(0))
    terms = (dist.rsample(), dist.entropy(), other.entropy())
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in terms)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in terms), logit)
    assert grad.isfinite().all()


# TruncNormal

MEAN_STD = itertools.product([-0.9999, -0.7, 0.0, 0.4, 0.9999], [0.1, 0.6, 2.0])
every_truncnorm = pytest.mark.parametrize(("mean", "std"), list(MEAN_STD))


def truncnorm(mean, std):
    return scipy.stats.truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)


@every_truncnorm
def test_trunc_normal_density_entropy_and_samples_equal_scipy(mean, std):
    theirs = truncnorm(mean, std)
    dist = dreamerv2.TruncNormal(torch.tensor([mean]), torch.tensor([std]))
    x = np.linspace(-0.999, 0.999, 41)
    ours = dist.log_prob(torch.tensor(x, dtype=torch.float32)[:, None])
    close(ours, torch.tensor(theirs.logpdf(x)), rtol=1e-4, atol=1e-3)
    assert math.isclose(dist.entropy(), theirs.entropy(), abs_tol=1e-4)
    many = dreamerv2.TruncNormal(torch.full((5000, 1), mean), torch.full((5000, 1), std))
    sample = many.rsample()[:, 0]
    assert sample.abs().max() < 1
    assert scipy.stats.kstest(sample.numpy(), theirs.cdf).pvalue > 1e-3


def test_trunc_normal_sums_log_prob_and_entropy_over_the_actions():
    mean, std = torch.tensor([[-0.3, 0.8, 0.1]] * 4), torch.tensor([[0.2, 0.5, 1.5]] * 4)
    dist, x = dreamerv2.TruncNormal(mean, std), torch.rand(4, 3) * 2 - 1
    single = [truncnorm(m, s) for m, s in zip(mean[0].tolist(), std[0].tolist(), strict=True)]
    close(dist.log_prob(x), sum(torch.tensor(d.logpdf(x[:, i])) for i, d in enumerate(single)))
    close(dist.entropy(), torch.full((4,), float(sum(d.entropy() for d in single))))
    assert torch.equal(dist.mode, mean)


@every_truncnorm
def test_trunc_normal_gradient_is_that_of_the_inverse_distribution_function(mean, std, monkeypatch):
    u, eps = np.linspace(0.02, 0.98, 25), 1e-5
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.tensor(u)[:, None].to(x))
    m = torch.full((25, 1), mean, dtype=torch.float64, requires_grad=True)
    s = torch.full((25, 1), std, dtype=torch.float64, requires_grad=True)
    x = dreamerv2.TruncNormal(m, s).rsample()
    close(x[:, 0], torch.tensor(truncnorm(mean, std).ppf(u)))
    for_mean, for_std = torch.autograd.grad(x.sum(), [m, s])
    up, down = truncnorm(mean + eps, std), truncnorm(mean - eps, std)
    close(for_mean[:, 0], torch.tensor(up.ppf(u) - down.ppf(u)) / (2 * eps), atol=1e-4)
    up, down = truncnorm(mean, std + eps), truncnorm(mean, std - eps)
    close(for_std[:, 0], torch.tensor(up.ppf(u) - down.ppf(u)) / (2 * eps), atol=1e-4)


def test_trunc_normal_clips_with_straight_through_gradient(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    monkeypatch.setattr(torch.special, "ndtri", lambda p: torch.full_like(p, 9.0))
    mean, std = torch.zeros(B, A, requires_grad=True), torch.ones(B, A)
    x = dreamerv2.TruncNormal(mean, std).rsample()
    close(x, torch.full((B, A), 1 - 1e-6), rtol=0, atol=1e-7)
    assert (torch.autograd.grad(x.sum(), mean)[0] == 1).all()


# TanhNormal


@both_twins
def test_tanh_normal_log_prob_equals_the_change_of_variables(script):
    mean, std = torch.randn(B, A), torch.rand(B, A) + 0.1
    theirs = td.Independent(td.TransformedDistribution(td.Normal(mean, std), td.TanhTransform()), 1)
    ours, x = script.TanhNormal(mean, std), torch.tanh(mean + 0.3)
    close(ours.log_prob(x), theirs.log_prob(x), atol=1e-4)
    assert ours.log_prob(x).shape == ours.entropy().shape == (B,)


@both_twins
def test_tanh_normal_mode_is_the_likeliest_of_100_samples_of_each_batch_element(script):
    dist = script.TanhNormal(torch.randn(T, B, A), torch.full((T, B, A), 0.2))
    torch.manual_seed(4)
    samples = dist.rsample((100,))
    log_prob, best = dist.log_prob(samples), set()
    torch.manual_seed(4)
    mode = dist.mode
    for t, b in np.ndindex(T, B):
        best.add(i := int(log_prob[:, t, b].argmax()))
        close(mode[t, b], samples[i, t, b], rtol=0, atol=0)
    assert len(best) > 10


@both_twins
def test_tanh_normal_entropy_is_exact_for_samples_that_are_rounded_to_the_bounds(script):
    leaves = [torch.randn(B, A).requires_grad_(), torch.full((B, A), 5.0).requires_grad_()]
    dist = script.TanhNormal(*leaves)
    torch.manual_seed(4)
    z = dist.base_dist.base_dist.rsample((100,))
    assert (torch.tanh(z).abs() == 1).any()
    torch.manual_seed(4)
    entropy = dist.entropy()
    slope = -2 * torch.log(torch.cosh(z.double()))  # log of tanh's derivative, finite at 20 too
    expected = (slope.sum(-1) - dist.base_dist.log_prob(z)).mean(0)
    close(entropy, expected, atol=1e-4)
    close_gradients(entropy.sum(), expected.sum(), leaves, 1e-4)


# Actors


@pytest.mark.parametrize(
    ("script", "kind"), [*CONTINUOUS, (dreamerv1, "onehot"), (dreamerv2, "onehot")]
)
def test_actors_map_their_outputs_as_the_authors_do(script, kind):
    x = make(script, discrete=kind == "onehot", actor_dist=kind)
    feat = 3 * torch.randn(T, B, x.rssm.feat_size)
    hidden, dist = x.actor.mlp(feat), x.actor(feat)
    out, action = x.actor.out(hidden), torch.rand(T, B, A) * 1.8 - 0.9
    if kind == "onehot":
        assert not hasattr(x.actor, "std")
        action, expected = torch.eye(A)[0], td.OneHotCategorical(logits=out)
    elif kind == "trunc_normal":
        std = 2 / (1 + torch.exp(-x.actor.std(hidden) / 2)) + 0.1
        expected = script.TruncNormal(torch.tanh(out), std)
        close(dist.mode, torch.tanh(out))
    else:
        raw = x.actor.std(hidden)
        std = torch.log1p(raw.exp()) + 0.1
        if script is dreamerv1:
            std = torch.log1p((raw + math.log(math.exp(5) - 1)).exp()) + 1e-4
        expected = script.TanhNormal(5 * torch.tanh(out / 5), std)
    close(dist.log_prob(action), expected.log_prob(action), atol=1e-4)


@pytest.mark.parametrize("u", LEAST_AND_GREATEST)
@pytest.mark.parametrize(("script", "kind"), CONTINUOUS)
def test_continuous_actors_stay_inside_with_finite_gradients_for_extreme_inputs(
    script, kind, u, monkeypatch
):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, u))
    x = make(script, actor_dist=kind)
    stds = (-1e3, 0.0, 1e3) if kind == "trunc_normal" else (-50.0, 0.0, 10.0)
    for bias, std in itertools.product((-1e3, -5.0, 0.0, 5.0, 1e3), stds):
        x.actor.out.bias.data.fill_(bias)
        x.actor.std.bias.data.fill_(std)
        dist = x.actor(torch.randn(T, B, x.rssm.feat_size))
        action = dist.rsample()
        assert action.abs().max() <= 1
        assert dist.mode.abs().max() <= 1
        terms = (action, dist.log_prob(action.detach()), dist.entropy())
        grads = torch.autograd.grad(sum(v.sum() for v in terms), list(x.actor.parameters()))
        assert all(v.isfinite().all() for v in (*terms, *grads)), (bias, std)


# TwoHotHead


def two_hot_head():
    x = make(dreamerv2, reward_head="twohot")
    return x.world_model.reward, torch.randn(T, B, x.rssm.feat_size)


def test_two_hot_head_starts_at_exactly_zero():
    head, feat = two_hot_head()
    assert isinstance(head, dreamerv2.TwoHotHead)
    assert len(head.bins) == 255
    assert (head(100 * feat) == 0).all()


@pytest.mark.parametrize(
    "target", ["bin 0", "bin 1", "bin 127", "bin 140", "bin 254", -1e3, -0.5, 0.003, 1.0, 7.7, 2e8]
)
def test_two_hot_loss_is_least_where_the_head_gives_back_the_target(target):
    head, feat = two_hot_head()
    if isinstance(target, str):
        target = head.bins[int(target.split()[1])].item()
    wanted = torch.full((T, B), target)
    head.loss(feat, wanted).mean().backward()
    two_hot = 1 / 255 - head.out.bias.grad  # the gradient of a cross-entropy is softmax - target
    assert (two_hot > 1e-6).sum() <= 2
    head.out.bias.data = two_hot.clamp(min=1e-35).log()
    head.zero_grad()
    head.loss(feat, wanted).mean().backward()
    assert head.out.bias.grad.abs().max() < 1e-4  # a minimum of a convex loss
    close(head(feat), wanted, rtol=1e-3, atol=1e-3)


def test_two_hot_gradient_is_finite_beyond_the_outer_bins():
    head, feat = two_hot_head()
    target = torch.tensor([-1e12, -5e8, 0.0, 1e12]).repeat(T, 1)
    loss = head.loss(feat, target).sum() + head(feat).sum()
    assert loss.isfinite()
    for grad in torch.autograd.grad(loss, [*head.out.parameters(), head.mlp[0][0].weight]):
        assert grad.isfinite().all()
