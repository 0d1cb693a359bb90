"""DreamerV2's maths, networks, losses and updates, on sizes that are all different."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import nn

import dreamerv2

T, B, N, A, D, S, K, V, C = 6, 4, 24, 2, 10, 3, 5, 12, 1
HIDDEN, UNITS, LAYERS, DEPTH, HORIZON = 13, 11, 2, 2, 8
STATES, FEAT = HORIZON + 1, S * K + D
SHAPES = {"image": (C, 64, 64), "vector": (V,)}
SIZES = {
    "deter": D, "hidden": HIDDEN, "stoch": S, "classes": K, "units": UNITS, "layers": LAYERS,
    "cnn_depth": DEPTH, "imag_horizon": HORIZON,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def no_noise(monkeypatch):
    """Every sample is the mode, with the gradient that a sample has."""

    def one_hot(self):
        prob = self.probs
        return self.mode + (prob - prob.detach())

    monkeypatch.setattr(dreamerv2.OneHot, "rsample", one_hot)
    monkeypatch.setattr(dreamerv2.TruncNormal, "rsample", lambda self: self.mode)


@pytest.fixture
def smooth(monkeypatch):
    """Every sample is a smooth function of the statistics: probabilities, or the mode."""
    monkeypatch.setattr(dreamerv2.OneHot, "rsample", lambda self: self.probs)
    monkeypatch.setattr(dreamerv2.TruncNormal, "rsample", lambda self: self.mode)


def make_args(discrete=True, **options):
    actor = ("onehot", "reinforce") if discrete else ("trunc_normal", "dynamics")
    return dreamerv2.Args(
        **SIZES | dict(zip(("actor_dist", "actor_grad"), actor, strict=True)) | options
    )


def make(keys=("vector",), **options):
    """A small agent with its args: agent, world_model, actor, critic, slow_critic, args."""
    args = make_args(**options)
    agent = dreamerv2.make_agent({k: SHAPES[k] for k in keys} | {"action": (A,)}, args)
    return SimpleNamespace(agent=agent, args=args, **dict(agent.items()))


def make_batch(keys=("vector",), discrete=True, steps=T):
    batch = {
        "image": torch.randint(0, 256, (steps, B, C, 64, 64), dtype=torch.uint8),
        "vector": torch.randn(steps, B, V),
        "action": torch.tanh(torch.randn(steps, B, A)),
        "reward": 3 * torch.randn(steps, B),
        "is_first": torch.zeros(steps, B),
        "is_terminal": torch.zeros(steps, B),
    }
    if discrete:
        batch["action"] = F.one_hot(torch.randint(A, (steps, B)), A).float()
    batch["is_terminal"][2, 1] = batch["is_first"][3, 1] = 1
    batch["action"][3, 1] = batch["reward"][3, 1] = 0
    return {k: v for k, v in batch.items() if k in keys or k not in SHAPES}


def random_state(rssm, *size):
    return {"deter": torch.randn(*size, D), "stoch": torch.randn(*size, rssm.stoch_size)}


def random_stats(rssm, scale=1.0):
    """Statistics of (T, B) latents as leaves, and those leaves."""
    leaf = (scale * torch.randn(T, B, S * K)).requires_grad_()
    return rssm.stats(leaf), leaf


def update(x, batch, optimizers=None):
    optimizers = optimizers or dreamerv2.make_optimizers(x.agent, x.args)
    return dreamerv2.update(x.agent, optimizers, batch, x.args)


def one_update(discrete=True, **options):
    """The metrics of a first update, from the same seed whatever the options."""
    torch.manual_seed(1)
    batch = make_batch(discrete=discrete)
    torch.manual_seed(2)
    x = make(discrete=discrete, **options)
    torch.manual_seed(3)
    metrics = {k: float(v) for k, v in update(x, batch).items()}
    assert all(math.isfinite(v) for v in metrics.values()), metrics
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in x.agent.parameters())
    return metrics


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, check_dtype=False)


# lambda_return


def test_lambda_return_equals_the_brute_force_double_sum():
    reward, value, disc = torch.randn(T, N), torch.randn(T, N), torch.rand(T, N)
    bootstrap, lambda_ = torch.randn(N), 0.9
    ret = dreamerv2.lambda_return(reward, value, disc, bootstrap, lambda_)
    values = torch.cat([value, bootstrap[None]])
    for t in range(T):
        n_step = []  # returns of 1, 2, ... rewards and the value after them
        for n in range(1, T - t + 1):
            total = sum(disc[t : t + k].prod(0) * reward[t + k] for k in range(n))
            n_step.append(total + disc[t : t + n].prod(0) * values[t + n])
        mixed = sum((1 - lambda_) * lambda_**n * g for n, g in enumerate(n_step[:-1]))
        close(ret[t], mixed + lambda_ ** (T - t - 1) * n_step[-1], atol=1e-5)


def test_lambda_return_of_a_case_by_hand():
    reward, value = torch.tensor([[0.7], [0.5], [0.4]]), torch.tensor([[1.2], [1.0], [0.8]])
    disc = torch.full((3, 1), 0.99)
    ret = dreamerv2.lambda_return(reward, value, disc, torch.tensor([0.6]), 0.95)
    # .4 + .99 * .6; .5 + .99 * (.05 * .8 + .95 * .994); .7 + .99 * (.05 * 1 + .95 * 1.474)
    close(ret[:, 0], torch.tensor([2.136227, 1.474457, 0.994]))


# KL


def test_kl_equals_torch_and_is_summed_over_the_latents():
    rssm = make().world_model.rssm
    post, prior = random_stats(rssm)[0], random_stats(rssm)[0]
    p, q = (td.OneHotCategorical(logits=x["logit"]) for x in (post, prior))
    kl = rssm.kl(post, prior)
    assert kl.shape == (T, B)
    close(kl, sum(td.kl_divergence(p, q)[..., s] for s in range(S)))


@pytest.mark.parametrize("balance", [0.8, 0.3])
def test_kl_balance_is_the_share_that_trains_the_prior(balance):
    model = make(kl_balance=balance).world_model
    (post, post_leaf), (prior, prior_leaf) = random_stats(model.rssm), random_stats(model.rssm)
    loss, kl = model.kl_loss(post, prior)
    close(loss, kl.mean())
    plain, leaves = model.rssm.kl(post, prior).mean(), [post_leaf, prior_leaf]
    plain = torch.autograd.grad(plain, leaves, retain_graph=True)
    for_post, for_prior = torch.autograd.grad(loss, leaves)
    close(for_prior, balance * plain[1])
    close(for_post, (1 - balance) * plain[0])


@pytest.mark.parametrize("free_avg", [True, False])
def test_even_kl_balance_is_the_plain_kl_with_free_nats_per_step(free_avg):
    model = make(kl_balance=0.5, free_nats=2.0, free_avg=free_avg).world_model
    (post, post_leaf), (prior, prior_leaf) = random_stats(model.rssm), random_stats(model.rssm)
    kl = model.rssm.kl(post, prior)
    assert 0 < (kl < 2).sum() < T * B  # some steps are free and some are not
    expected = torch.maximum(kl, torch.tensor(2.0)).mean()
    loss, _ = model.kl_loss(post, prior)
    close(loss, expected)
    leaves = [post_leaf, prior_leaf]
    theirs = torch.autograd.grad(expected, leaves, retain_graph=True)
    for ours, wanted in zip(torch.autograd.grad(loss, leaves), theirs, strict=True):
        close(ours, wanted)


def test_free_nats_are_for_the_mean_or_for_each_step():
    losses = {}
    for free_avg in (True, False):
        model = make(free_nats=1.0, free_avg=free_avg).world_model
        torch.manual_seed(5)
        post, prior = random_stats(model.rssm)[0], random_stats(model.rssm)[0]
        kl = model.rssm.kl(post, prior)
        losses[free_avg], _ = model.kl_loss(post, prior)
        assert kl.min() < 1 < kl.mean()
    close(losses[True], kl.mean())
    close(losses[False], kl.clamp(min=1).mean())
    assert losses[False] > losses[True]


@pytest.mark.parametrize("free_avg", [True, False])
def test_kl_below_the_free_nats_trains_nothing(free_avg):
    model = make(free_nats=50.0, free_avg=free_avg).world_model
    (post, post_leaf), (prior, prior_leaf) = random_stats(model.rssm), random_stats(model.rssm)
    loss, kl = model.kl_loss(post, prior)
    assert loss == 50 > kl.max()
    for grad in torch.autograd.grad(loss, [post_leaf, prior_leaf]):
        assert not grad.any()


# OneHot


def test_one_hot_samples_are_exactly_one_hot_and_as_frequent_as_their_probabilities():
    logit = 2 * torch.randn(S, K)
    sample = dreamerv2.OneHot(logit.expand(20_000, S, K)).rsample()
    assert ((sample == 0) | (sample == 1)).all()
    assert (sample.sum(-1) == 1).all()
    close(sample.mean(0), logit.softmax(-1), rtol=0, atol=0.02)  # 5 standard deviations and more


def test_a_one_hot_sample_takes_one_uniform_number_per_class(monkeypatch):
    dist, drawn, rand_like = dreamerv2.OneHot(torch.randn(B, S, K)), [], torch.rand_like

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


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_a_one_hot_sample_is_one_hot_for_the_least_and_the_greatest_uniform_number(u, monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, u))
    sample = dreamerv2.OneHot(100 * torch.randn(B, S, K)).rsample()
    assert ((sample == 0) | (sample == 1)).all()
    assert (sample.sum(-1) == 1).all()


def test_one_hot_gradient_is_straight_through_that_of_the_probabilities():
    logit, weight = torch.randn(B, S, K, requires_grad=True), torch.randn(B, S, K)
    (ours,) = torch.autograd.grad((dreamerv2.OneHot(logit).rsample() * weight).sum(), logit)
    (theirs,) = torch.autograd.grad((logit.softmax(-1) * weight).sum(), logit)
    close(ours, theirs)
    assert ours.any()


def test_one_hot_log_prob_entropy_and_mode_equal_torch():
    logit = 3 * torch.randn(B, S, K)
    ours, theirs = dreamerv2.OneHot(logit), td.OneHotCategorical(logits=logit)
    sample = theirs.sample()
    close(ours.log_prob(sample), theirs.log_prob(sample))
    close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode, theirs.mode)
    assert ours.entropy().shape == (B, S)


def test_one_hot_is_in_float32_and_finite_for_extreme_logits():
    logit = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4]], dtype=torch.bfloat16)
    dist = dreamerv2.OneHot(logit.requires_grad_())
    other = dreamerv2.OneHot(logit.flip(0))
    terms = (dist.rsample(), dist.entropy(), other.entropy())
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in terms)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in terms), logit)
    assert grad.isfinite().all()


# TruncNormal

MEANS = [-0.9999, -0.7, 0.0, 0.4, 0.9999]
MEAN_STD = list(itertools.product(MEANS, [0.1, 0.6, 2.0]))


def truncnorm(mean, std):
    return scipy.stats.truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)


@pytest.mark.parametrize(("mean", "std"), MEAN_STD)
def test_trunc_normal_density_and_entropy_equal_scipy(mean, std):
    dist = dreamerv2.TruncNormal(torch.tensor([mean]), torch.tensor([std]))
    x = np.linspace(-0.999, 0.999, 41)
    ours = dist.log_prob(torch.tensor(x, dtype=torch.float32)[:, None])
    close(ours, torch.tensor(truncnorm(mean, std).logpdf(x)), rtol=1e-4, atol=1e-3)
    assert math.isclose(dist.entropy(), truncnorm(mean, std).entropy(), abs_tol=1e-4)


def test_trunc_normal_sums_log_prob_and_entropy_over_the_actions():
    mean, std = torch.tensor([[-0.3, 0.8, 0.1]] * 4), torch.tensor([[0.2, 0.5, 1.5]] * 4)
    dist, x = dreamerv2.TruncNormal(mean, std), torch.rand(4, 3) * 2 - 1
    single = [truncnorm(m, s) for m, s in zip(mean[0].tolist(), std[0].tolist(), strict=True)]
    close(dist.log_prob(x), sum(torch.tensor(d.logpdf(x[:, i])) for i, d in enumerate(single)))
    close(dist.entropy(), torch.full((4,), float(sum(d.entropy() for d in single))))
    assert torch.equal(dist.mode, mean)


@pytest.mark.parametrize(("mean", "std"), MEAN_STD)
def test_trunc_normal_samples_follow_scipy_and_stay_inside(mean, std):
    count = 5000
    dist = dreamerv2.TruncNormal(torch.full((count, 1), mean), torch.full((count, 1), std))
    x = dist.rsample()[:, 0]
    assert x.abs().max() < 1
    assert scipy.stats.kstest(x.numpy(), truncnorm(mean, std).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("mean", "std"), MEAN_STD)
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


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-24])
@pytest.mark.parametrize("kind", ["trunc_normal", "tanh_normal"])
def test_continuous_actors_stay_inside_with_finite_gradients_for_extreme_inputs(
    kind, u, monkeypatch
):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, u))
    actor = make(discrete=False, actor_dist=kind).actor
    for bias, std in itertools.product((-1e3, -5.0, 0.0, 5.0, 1e3), (-1e3, 0.0, 1e3)):
        actor.out.bias.data.fill_(bias)
        actor.std.bias.data.fill_(std if kind == "trunc_normal" else std / 100)
        dist = actor(torch.randn(T, B, FEAT))
        x = dist.rsample()
        assert x.abs().max() <= 1
        assert dist.mode.abs().max() <= 1
        terms = (x, dist.log_prob(x.detach()), dist.entropy())
        grads = torch.autograd.grad(sum(v.sum() for v in terms), list(actor.parameters()))
        assert all(v.isfinite().all() for v in (*terms, *grads)), (bias, std)


def test_trunc_normal_clips_with_straight_through_gradient(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    monkeypatch.setattr(torch.special, "ndtri", lambda p: torch.full_like(p, 9.0))
    mean, std = torch.zeros(B, A, requires_grad=True), torch.ones(B, A)
    x = dreamerv2.TruncNormal(mean, std).rsample()
    close(x, torch.full((B, A), 1 - 1e-6), rtol=0, atol=1e-7)
    assert (torch.autograd.grad(x.sum(), mean)[0] == 1).all()


# TanhNormal


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.4), (-1.5, 0.3), (2.0, 0.2)])
def test_tanh_normal_density_integrates_to_one_and_entropy_equals_its_integral(mean, std):
    dist = dreamerv2.TanhNormal(
        torch.full((4000, 1), mean, dtype=torch.float64),
        torch.full((4000, 1), std, dtype=torch.float64),
    )
    z = torch.linspace(-6, 6, 4000, dtype=torch.float64)[:, None]
    x = torch.tanh(z)
    log_prob, slope = dist.log_prob(x), (1 - x.square())[:, 0]
    assert math.isclose(torch.trapezoid(log_prob.exp() * slope, z[:, 0]), 1, abs_tol=1e-4)
    entropy = -torch.trapezoid(log_prob.exp() * log_prob * slope, z[:, 0])
    assert math.isclose(dist.entropy().mean(), entropy, abs_tol=0.01)


def test_tanh_normal_log_prob_equals_the_change_of_variables():
    mean, std = torch.randn(B, A), torch.rand(B, A) + 0.1
    theirs = td.Independent(td.TransformedDistribution(td.Normal(mean, std), td.TanhTransform()), 1)
    ours, x = dreamerv2.TanhNormal(mean, std), torch.tanh(mean + 0.3)
    close(ours.log_prob(x), theirs.log_prob(x), atol=1e-4)
    assert ours.log_prob(x).shape == ours.entropy().shape == (B,)


def test_tanh_normal_mode_is_the_likeliest_sample_of_each_batch_element():
    mean = torch.tensor([[-2.0] * A, [0.1] * A, [1.5] * A])
    dist = dreamerv2.TanhNormal(mean, torch.full((3, A), 0.2))
    mode = dist.mode
    assert mode.shape == (3, A)
    assert (torch.atanh(mode) - mean).abs().max() < 0.8
    samples = torch.stack([dist.log_prob(dist.rsample()) for _ in range(1000)])
    assert (dist.log_prob(mode) > samples.quantile(0.85, 0)).all()


def test_actors_map_their_outputs_as_the_authors_do():
    feat = 3 * torch.randn(T, B, FEAT)
    for kind in ("onehot", "trunc_normal", "tanh_normal"):
        actor = make(discrete=kind == "onehot", actor_dist=kind).actor
        hidden, dist = actor.mlp(feat), actor(feat)
        out, x = actor.out(hidden), torch.rand(T, B, A) * 1.8 - 0.9
        if kind == "onehot":
            x, expected = torch.eye(A)[0], td.OneHotCategorical(logits=out)
        elif kind == "trunc_normal":
            std = 2 / (1 + torch.exp(-actor.std(hidden) / 2)) + 0.1
            expected = dreamerv2.TruncNormal(torch.tanh(out), std)
            close(dist.mode, torch.tanh(out))
        else:
            std = torch.log1p(actor.std(hidden).exp()) + 0.1
            expected = dreamerv2.TanhNormal(5 * torch.tanh(out / 5), std)
        close(dist.log_prob(x), expected.log_prob(x))


# TwoHotHead


def test_two_hot_head_starts_at_exactly_zero():
    head = make(reward_head="twohot").world_model.reward
    assert isinstance(head, dreamerv2.TwoHotHead)
    assert len(head.bins) == 255
    assert (head(100 * torch.randn(T, B, FEAT)) == 0).all()


@pytest.mark.parametrize(
    "target", ["bin 0", "bin 1", "bin 127", "bin 140", "bin 254", -1e3, -0.5, 0.003, 1.0, 7.7, 2e8]
)
def test_two_hot_loss_is_least_where_the_head_gives_back_the_target(target):
    head = make(reward_head="twohot").world_model.reward
    if isinstance(target, str):
        target = head.bins[int(target.split()[1])].item()
    feat, wanted = torch.randn(B, FEAT), torch.full((B,), target)
    head.loss(feat, wanted).mean().backward()
    two_hot = 1 / 255 - head.out.bias.grad  # the gradient of a cross-entropy is softmax - target
    assert (two_hot > 1e-6).sum() <= 2
    head.out.bias.data = two_hot.clamp(min=1e-35).log()
    head.zero_grad()
    loss = head.loss(feat, wanted).mean()
    loss.backward()
    assert head.out.bias.grad.abs().max() < 1e-4  # a minimum of a convex loss
    close(head(feat), wanted, rtol=1e-3, atol=1e-3)


def test_two_hot_gradient_is_finite_beyond_the_outer_bins():
    head = make(reward_head="twohot").world_model.reward
    target = torch.tensor([-1e12, -5e8, 0.0, 1e12])
    loss = head.loss(torch.randn(4, FEAT), target).sum() + head(torch.randn(4, FEAT)).sum()
    assert loss.isfinite()
    for grad in torch.autograd.grad(loss, [*head.out.parameters(), head.mlp[0][0].weight]):
        assert grad.isfinite().all()


# Sizes, weights and presets

COUNTS = {  # preset, image channels, actions -> encoder, RSSM, decoder, world model, actor, critic
    ("atari", 1, 18): (1_549_776, 5_664_848, 10_497_553, 19_975_379, 1_138_418, 1_131_601),
    ("atari", 1, 6): (1_549_776, 5_657_648, 10_497_553, 19_968_179, 1_133_606, 1_131_601),
    ("dmc_pixels", 3, 6): (1_551_312, 1_247_248, 9_886_611, 13_656_772, 976_012, 971_601),
}


@pytest.mark.parametrize(("setting", "counts"), COUNTS.items())
def test_parameter_counts_equal_the_authors(setting, counts):
    preset, channels, actions = setting
    kind = "onehot" if preset == "atari" else "trunc_normal"
    args = dreamerv2.Args(**dreamerv2.PRESETS[preset] | {"actor_dist": kind})
    assert args.grayscale == (channels == 1)
    with torch.device("meta"):
        agent = dreamerv2.make_agent({"image": (channels, 64, 64), "action": (actions,)}, args)
    model = agent["world_model"]
    modules = (model.encoder, model.rssm, model.decoder, model, agent["actor"], agent["critic"])
    assert tuple(sum(p.numel() for p in m.parameters()) for m in modules) == counts


def test_weights_are_glorot_uniform_and_biases_zero():
    x, kinds = make(SHAPES, discrete=False, norm="layer", units=60, cnn_depth=8), set()
    for name, layer in x.agent.named_modules():
        if isinstance(layer, nn.Linear):
            fans = layer.in_features + layer.out_features
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            fans = (layer.in_channels + layer.out_channels) * math.prod(layer.kernel_size)
        else:
            continue
        kinds.add(type(layer))
        limit, weight = math.sqrt(6 / fans), layer.weight.detach()
        slack = 6 / math.sqrt(weight.numel())
        assert limit * (1 - slack) < weight.abs().max() <= limit, name
        assert abs(weight.mean()) < slack * limit, name
        assert abs(weight.std() * math.sqrt(3) / limit - 1) < slack, name
        assert not layer.bias.any(), name
    assert kinds == {nn.Linear, nn.Conv2d, nn.ConvTranspose2d, dreamerv2.PixelDeconv}


def test_layer_norms_start_as_the_identity_with_the_epsilon_of_keras():
    agent = make(SHAPES, norm="layer").agent
    norms = [m for m in agent.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) > 1
    for norm in norms:
        assert norm.eps == 1e-3
        assert (norm.weight == 1).all()
        assert not norm.bias.any()


def test_slow_critic_has_the_critics_form_and_never_learns():
    x = make()
    assert list(snapshot(x.slow_critic)) == list(snapshot(x.critic))
    assert not any(p.requires_grad for p in x.slow_critic.parameters())
    for module in (x.world_model, x.actor, x.critic):
        assert all(p.requires_grad for p in module.parameters())


V2 = {  # what all published settings share
    "batch_size": 16, "batch_length": 50, "replay_size": 2_000_000, "stoch": 32, "classes": 32,
    "cnn_depth": 48, "units": 400, "layers": 4, "act": "elu", "norm": "none",
    "reward_head": "normal", "kl_balance": 0.8, "free_avg": True, "discount_lambda": 0.95,
    "imag_horizon": 15, "actor_dist": "auto", "actor_grad": "auto", "slow_update": 100,
    "adam_eps": 1e-5, "weight_decay": 1e-6, "clip": 100,
}  # fmt: skip
ATARI = V2 | {
    "action_repeat": 4, "time_limit": 108_000, "grayscale": True, "favor_ends": True,
    "sticky_prob": None, "full_action_space": False, "deter": 600, "hidden": 600, "free_nats": 0,
    "kl_scale": 0.1, "discount_head": True, "discount_scale": 5, "reward_transform": "tanh",
    "model_lr": 2e-4, "actor_lr": 4e-5, "critic_lr": 1e-4, "gamma": 0.999, "actor_entropy": 1e-3,
    "prefill": 50_000, "pretrain": 1, "train_every": 16,
}  # fmt: skip
DMC = V2 | {
    "action_repeat": 2, "time_limit": 1000, "grayscale": False, "favor_ends": False, "deter": 200,
    "hidden": 200, "free_nats": 1, "kl_scale": 1, "discount_head": False,
    "reward_transform": "none", "model_lr": 3e-4, "actor_lr": 8e-5, "critic_lr": 8e-5,
    "gamma": 0.99, "actor_entropy": 1e-4, "prefill": 1000, "pretrain": 100, "train_every": 5,
}  # fmt: skip
OTHER = {"action_repeat": 1, "discount_head": True, "reward_transform": "none"}
TABLE = {"atari": ATARI, "dmc_pixels": DMC, "dmc_vector": DMC, "other": OTHER}


@pytest.mark.parametrize("name", TABLE)
def test_presets_equal_the_published_hyperparameters(name):
    args = vars(dreamerv2.Args(**dreamerv2.PRESETS[name]))
    assert {k: args[k] for k in TABLE[name]} == TABLE[name]


def test_there_is_a_preset_for_every_domain():
    assert dreamerv2.PRESETS.keys() == TABLE.keys()


# Networks


def shapes_through(module, x):
    """The output shape of every layer of a Sequential."""
    shapes = []
    for layer in module:
        x = layer(x)
        shapes.append(tuple(x.shape))
    return shapes


def test_encoder_halves_images_four_times_to_32_numbers_per_channel():
    encoder = make(("image",)).world_model.encoder
    shapes = shapes_through(encoder.conv, torch.randn(3, C, 64, 64))
    assert shapes == [(3, DEPTH, 31, 31), (3, 4, 14, 14), (3, 8, 6, 6), (3, 16, 2, 2)]
    assert encoder.size == 32 * DEPTH


def test_decoder_grows_images_from_one_pixel_of_32_numbers_per_channel():
    decoder = make(("image",)).world_model.decoder
    assert decoder.linear.out_features == 32 * DEPTH
    shapes = shapes_through(decoder.conv, torch.randn(3, 32 * DEPTH, 1, 1))
    assert shapes == [(3, 8, 5, 5), (3, 4, 13, 13), (3, DEPTH, 30, 30), (3, C, 64, 64)]


def test_decoder_has_no_activation_after_its_linear_layer():
    decoder, feat = make(("image",)).world_model.decoder, torch.randn(T, B, FEAT)
    image = decoder.conv(decoder.linear(feat).reshape(T * B, 32 * DEPTH, 1, 1))
    close(decoder(feat)["image"], image.reshape(T, B, C, 64, 64))


@pytest.mark.parametrize(
    ("keys", "size"), [(("image",), 64), (("vector",), UNITS), (tuple(SHAPES), 64 + UNITS)]
)
def test_images_vectors_or_both_are_encoded_and_decoded(keys, size):
    model, batch = make(keys).world_model, make_batch(keys)
    embed, recon = model.encoder(batch), model.decoder(torch.randn(T, B, FEAT))
    assert embed.shape == (T, B, size)
    assert model.encoder.size == size
    assert {k: v.shape[2:] for k, v in recon.items()} == {k: SHAPES[k] for k in keys}
    for key in keys:  # every part is seen, by its own row only
        changed = batch | {key: batch[key].clone()}
        changed[key][2, 1] = 0
        moved = (model.encoder(changed) != embed).any(-1)
        assert moved.nonzero().tolist() == [[2, 1]]


def test_encoder_takes_rows_as_well_as_windows():
    model, batch = make(SHAPES).world_model, make_batch(SHAPES)
    close(model.encoder({k: v[4] for k, v in batch.items()}), model.encoder(batch)[4])


def test_pixels_are_centered_at_zero():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8)
    close(dreamerv2.pixels(image), torch.tensor([-0.5, -0.3, 0.5]))
    assert dreamerv2.pixels(image).dtype == torch.float32


def test_acting_and_learning_scale_pixels_by_the_same_function(monkeypatch):
    x, batch, calls = make(("image",)), make_batch(("image",)), []

    def record(image):
        calls.append(image.shape)
        return image.float() / 255 - 0.5

    monkeypatch.setattr(dreamerv2, "pixels", record)
    dreamerv2.policy(x.agent, row_of(batch, 0), x.world_model.rssm.initial(B))
    assert calls == [(B, C, 64, 64)]
    x.world_model.loss(batch)
    assert calls[1:] == [(T, B, C, 64, 64)] * 2  # what it sees and what it predicts


ACTIVATIONS = {"elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU}


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_act_and_norm_apply_to_every_hidden_layer_and_to_no_output(act, norm):
    agent = make(SHAPES, act=act, norm=norm).agent
    modules = list(agent.modules())
    count = sum(isinstance(m, ACTIVATIONS[act]) for m in modules)
    heads = 5  # reward, discount, actor, critic, slow critic
    # 4 + 3 convolutions, 3 of the RSSM, and the dense layers of encoder, decoder and heads
    assert count == 4 + 3 + 3 + (2 + heads) * LAYERS
    others = tuple(v for k, v in ACTIVATIONS.items() if k != act)
    assert not any(isinstance(m, others) for m in modules)
    norms = sum(isinstance(m, nn.LayerNorm) for m in modules)
    assert norms == 1 + (count if norm == "layer" else 0)  # the GRU has its own
    model = agent["world_model"]
    for layer in (*model.encoder.conv, *model.encoder.mlp, *model.decoder.conv[:-1]):
        kinds = [type(m) for m in layer]
        assert kinds[-1] == ACTIVATIONS[act]
        assert len(kinds) == (3 if norm == "layer" else 2)
    for out in (model.decoder.conv[-1], model.decoder.mlp[-1], model.rssm.img_out[-1]):
        assert isinstance(out, nn.Linear | nn.ConvTranspose2d)


def test_the_norm_of_a_convolution_is_over_the_channels_of_each_pixel():
    conv = dreamerv2.block(nn.Conv2d(3, 5, 4), dreamerv2.Args(norm="layer"))
    norm, x = conv[1], 4 * torch.randn(3, 5, 2, 7) + 1
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    y = norm(x)
    assert y.shape == x.shape
    for n, h, w in itertools.product(range(3), range(2), range(7)):
        pixel = x[n, :, h, w]
        scaled = (pixel - pixel.mean()) / (pixel.var(correction=0) + 1e-3).sqrt()
        close(y[n, :, h, w], scaled * norm.weight + norm.bias, atol=1e-5)


# RSSM


def observe(x, batch):
    first = batch["is_first"].clone()
    first[0] = 1
    rssm = x.world_model.rssm
    return rssm.observe(x.world_model.encoder(batch), batch["action"], first)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_is_first_in_the_middle_of_a_window_equals_two_windows(dtype):
    x, batch = make(), make_batch()
    batch["action"] += torch.randn(T, B, A)  # reset rows too: their actions must not matter
    batch["is_first"] = torch.zeros(T, B, dtype=dtype)
    for b, t in enumerate((2, 4, 5, 3)):
        batch["is_first"][t, b] = 1
    post, prior = observe(x, batch)
    for b, t in enumerate((2, 4, 5, 3)):
        for part in (slice(0, t), slice(t, T)):
            window = {k: v[part, b : b + 1] for k, v in batch.items()}
            alone = observe(x, window)
            start = {k: v[-1] for k, v in alone[0].items()}
            dreamed, _ = x.world_model.rssm.imagine(x.actor, start, HORIZON)
            end = {k: v[part][-1, b : b + 1] for k, v in post.items()}
            for ours, theirs in zip((post, prior), alone, strict=True):
                for key in theirs:
                    close(ours[key][part, b : b + 1], theirs[key], atol=1e-5)
            again, _ = x.world_model.rssm.imagine(x.actor, end, HORIZON)
            close(again, dreamed, atol=1e-4)


def test_observing_and_losses_leave_their_inputs_unchanged():
    x, batch = make(), make_batch()
    rssm, state, embed = (
        x.world_model.rssm,
        random_state(x.world_model.rssm, B),
        torch.randn(B, UNITS),
    )
    copies = snapshot_of(batch), snapshot_of(state)
    rssm.obs_step(state, batch["action"][1], embed, torch.ones(B))
    observe(x, batch)
    x.world_model.loss(batch)
    assert same(copies[0], batch)
    assert same(copies[1], state)


def snapshot_of(tensors):
    return {k: v.clone() for k, v in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_is_first_forgets_both_state_and_action_of_its_row_only(dtype):
    rssm, embed = make().world_model.rssm, torch.randn(B, UNITS)
    state, action = random_state(rssm, B), torch.randn(B, A)
    first = torch.tensor([0, 1, 0, 1]).to(dtype)
    deter = rssm.obs_step(state, action, embed, first)["deter"]
    fresh = rssm.gru_step(rssm.initial(B), torch.zeros(B, A))
    kept = rssm.gru_step(state, action)
    close(deter, torch.where(first[:, None] == 1, fresh, kept))
    assert not any(v.any() for v in rssm.initial(B).values())


@pytest.mark.usefixtures("no_noise")
def test_training_windows_start_from_zero_whatever_the_first_action():
    x, batch = make(), make_batch()
    loss = x.world_model.loss(batch)[0]
    for row in range(2):
        changed = batch | {"action": batch["action"].clone()}
        changed["action"][row] += 1
        assert (x.world_model.loss(changed)[0] == loss) == (row == 0)


def test_prior_statistics_equal_those_of_imagined_steps():
    x, batch = make(), make_batch()
    rssm = x.world_model.rssm
    post, prior = observe(x, batch)
    state, keep = rssm.initial(B), 1 - batch["is_first"]
    keep[0] = 0
    for t in range(T):
        state = {k: v * keep[t][:, None] for k, v in state.items()}
        step = rssm.img_step(state, batch["action"][t] * keep[t][:, None])
        close(step["deter"], post["deter"][t])
        for key in prior:
            close(step[key], prior[key][t], atol=1e-5)
        state = {k: post[k][t] for k in ("deter", "stoch")}


def test_features_are_stoch_then_deter():
    rssm = make().world_model.rssm
    feat = rssm.feat({"stoch": torch.full((T, B, S * K), 2.0), "deter": torch.full((T, B, D), 3.0)})
    assert feat[0, 0].tolist() == [2.0] * (S * K) + [3.0] * D
    assert rssm.feat_size == FEAT


def test_states_have_the_shapes_of_the_docstring():
    x, batch = make(), make_batch()
    post, prior = observe(x, batch)
    shapes = {"deter": (T, B, D), "stoch": (T, B, S * K), "logit": (T, B, S, K)}
    assert {k: v.shape for k, v in post.items()} == shapes
    assert {k: v.shape for k, v in prior.items()} == {"logit": (T, B, S, K)}
    assert (post["stoch"].unflatten(-1, (S, K)).sum(-1) == 1).all()
    start = {k: v.flatten(0, 1) for k, v in post.items()}
    feat, action = x.world_model.rssm.imagine(x.actor, start, HORIZON)
    assert feat.shape == (STATES, N, FEAT)
    assert (feat[..., : S * K].unflatten(-1, (S, K)).sum(-1) == 1).all()
    assert action.shape == (STATES, N, A)
    assert not action[0].any()
    assert (action[1:].sum(-1) == 1).all()
    assert torch.equal(feat[0], x.world_model.rssm.feat(start))


def test_imagined_state_i_follows_from_state_before_it_and_action_i():
    x = make(discrete=False)
    rssm = x.world_model.rssm
    feat, action = rssm.imagine(x.actor, random_state(rssm, N), HORIZON)
    stoch, deter = feat.split([S * K, D], -1)
    for i in range(1, STATES):
        prev = {"deter": deter[i - 1], "stoch": stoch[i - 1]}
        close(rssm.gru_step(prev, action[i]), deter[i])


def test_imagined_actions_pull_on_the_actor_but_not_on_the_states_it_sees():
    x = make(discrete=False)
    start = {k: v.requires_grad_() for k, v in random_state(x.world_model.rssm, N).items()}
    feat, action = x.world_model.rssm.imagine(x.actor, start, HORIZON)
    for leaves, reached in ((list(start.values()), False), (list(x.actor.parameters()), True)):
        grads = torch.autograd.grad(action[1].sum(), leaves, retain_graph=True, allow_unused=True)
        assert all((g is not None and g.any()) == reached for g in grads)
    last = feat[-1, :, -D:].sum()  # it follows from the actions and from the start
    for leaf in (*x.actor.parameters(), *start.values()):
        assert torch.autograd.grad(last, leaf, retain_graph=True)[0].any()


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_gru_by_hand(norm):
    rssm = make(norm=norm).world_model.rssm
    rssm.gru_norm.weight.data.normal_(1)
    rssm.gru_norm.bias.data.normal_()
    state, action = random_state(rssm, B), torch.randn(B, A)
    x = rssm.img_in(torch.cat([state["stoch"], action], -1))
    assert x.shape == (B, HIDDEN)
    parts = torch.cat([x, state["deter"]], -1) @ rssm.gru.weight.T + rssm.gru.bias
    mean, var = parts.mean(-1, keepdim=True), parts.var(-1, correction=0, keepdim=True)
    parts = (parts - mean) / (var + 1e-3).sqrt() * rssm.gru_norm.weight + rssm.gru_norm.bias
    reset, cand, update = parts[:, :D], parts[:, D : 2 * D], parts[:, 2 * D :]
    update = 1 / (1 + torch.exp(1 - update))
    cand = torch.tanh(cand / (1 + torch.exp(-reset)))
    close(rssm.gru_step(state, action), update * cand + (1 - update) * state["deter"], atol=1e-5)


@pytest.mark.usefixtures("no_noise")
def test_states_depend_on_the_past_of_their_own_sequence_only():
    rssm = make().world_model.rssm
    embed = torch.randn(T, B, UNITS, requires_grad=True)
    action = torch.randn(T, B, A, requires_grad=True)
    first = torch.zeros(T, B)
    first[0] = 1
    post, prior = rssm.observe(embed, action, first)
    weight = torch.randn(S, K)
    t, b = 3, 1
    for stats, seen in ((post, t), (prior, t - 1)):
        out = (stats["logit"][t, b] * weight).sum()
        for_embed, for_action = torch.autograd.grad(out, [embed, action], retain_graph=True)
        assert for_embed.any(-1).nonzero().tolist() == [[i, b] for i in range(seen + 1)]
        assert for_action.any(-1).nonzero().tolist() == [[i, b] for i in range(1, t + 1)]


# WorldModel.loss


@pytest.mark.parametrize("transform", ["tanh", "none"])
def test_model_loss_is_the_sum_of_its_scaled_parts(transform):
    options = {"kl_scale": 0.3, "discount_scale": 4.0, "gamma": 0.9}
    x, batch = make(SHAPES, reward_transform=transform, **options), make_batch(SHAPES)
    model = x.world_model
    loss, post, metrics = model.loss(batch)
    feat = model.rssm.feat(post)
    prior = model.rssm.stats(model.rssm.img_out(post["deter"]))
    recon, steps = model.decoder(feat), T * B
    reward = batch["reward"].tanh() if transform == "tanh" else batch["reward"]
    logit, target = model.discount(feat).sigmoid(), 0.9 * (1 - batch["is_terminal"])
    expected = {
        "image": 0.5 * (recon["image"] - (batch["image"] / 255 - 0.5)).square().sum() / steps,
        "vector": 0.5 * (recon["vector"] - batch["vector"]).square().sum() / steps,
        "reward": 0.5 * (model.reward(feat) - reward).square().sum() / steps,
        "discount": -(target * logit.log() + (1 - target) * (1 - logit).log()).mean(),
        "kl": model.rssm.kl(post, prior).mean(),
    }
    for key, value in expected.items():
        close(metrics[f"losses/{key}"], value.detach())
    scaled = expected | {"kl": 0.3 * expected["kl"], "discount": 4 * expected["discount"]}
    close(loss, sum(scaled.values()))
    close(metrics["losses/model"], loss.detach())
    assert not any(v.requires_grad for v in metrics.values())


def test_a_world_model_without_discount_head_has_no_discount_loss():
    x, batch = make(discount_head=False), make_batch()
    assert x.world_model.discount is None
    assert "losses/discount" not in x.world_model.loss(batch)[2]


# behavior_loss


def behave(x, batch, **options):
    _, post, _ = x.world_model.loss(batch)
    x.args.__dict__.update(options)
    return post, dreamerv2.behavior_loss(
        x.world_model, x.actor, x.critic, x.slow_critic, post, batch["is_terminal"], x.args
    )


GRADS = [
    (discrete, grad) for discrete in (True, False) for grad in ("reinforce", "dynamics", "both")
]


@pytest.mark.parametrize(("discrete", "grad"), GRADS)
def test_behavior_losses_train_actor_and_critic_alone_and_each_its_own(discrete, grad):
    x, batch = make(discrete=discrete, actor_grad=grad), make_batch(discrete=discrete)
    post, (actor_loss, critic_loss, _) = behave(x, batch)
    assert not any(p.requires_grad for p in x.slow_critic.parameters())
    actor, critic = list(x.actor.parameters()), list(x.critic.parameters())
    latents = [v for v in post.values() if v.requires_grad]
    assert latents
    wrong = {actor_loss: critic + latents, critic_loss: actor + latents}
    for loss, parameters in wrong.items():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        assert all(g is None for g in grads)
    for loss, parameters in ((actor_loss, actor), (critic_loss, critic)):
        dreamerv2.opt_step(torch.optim.SGD(parameters, 0.0), loss, 100.0)
    assert all(p.grad is None for p in x.world_model.parameters())
    assert all(p.grad is None for p in x.slow_critic.parameters())
    assert all(p.grad is not None and p.grad.any() for p in actor + critic)


def returns_call(monkeypatch):
    """Records the arguments of lambda_return."""
    calls, original = [], dreamerv2.lambda_return

    def record(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(dreamerv2, "lambda_return", record)
    return calls


def test_replay_tells_the_discount_of_the_start_and_the_head_that_of_the_rest(monkeypatch):
    x, batch, calls = make(gamma=0.9), make_batch(), returns_call(monkeypatch)
    seen = []
    imagine = x.world_model.rssm.imagine
    monkeypatch.setattr(
        x.world_model.rssm, "imagine", lambda *a: seen.append(imagine(*a)) or seen[-1]
    )
    behave(x, batch)
    (reward, value, disc, bootstrap, lambda_), feat = calls[0], seen[0][0]
    assert reward.shape == value.shape == disc.shape == (STATES - 1, N)
    close(disc[0], 0.9 * (1 - batch["is_terminal"].flatten()))
    close(disc[1:], x.world_model.discount(feat)[1:-1].sigmoid())
    close(reward, x.world_model.reward(feat)[:-1])
    close(torch.cat([value, bootstrap[None]]), x.slow_critic(feat))
    assert lambda_ == 0.95


def test_without_a_discount_head_the_discount_is_gamma_at_terminal_starts_too(monkeypatch):
    x, batch, calls = make(discount_head=False, gamma=0.9), make_batch(), returns_call(monkeypatch)
    behave(x, batch)
    assert (calls[0][2] == 0.9).all()


def recorded(x, monkeypatch, discrete=True):
    """Replaces imagination by random states and actions that collect gradients."""
    states = random_state(x.world_model.rssm, STATES, N)
    action = torch.rand(STATES, N, A) * 1.8 - 0.9
    if discrete:
        action = F.one_hot(torch.randint(A, (STATES, N)), A).float()
    for leaf in (*states.values(), action):
        leaf.requires_grad_()
    rssm = x.world_model.rssm
    monkeypatch.setattr(rssm, "imagine", lambda *a: (rssm.feat(states), action))
    return states, action


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(("discrete", "grad"), GRADS)
def test_actor_and_critic_losses_by_brute_force(discrete, grad, head, monkeypatch):
    mix = {"reinforce": 0.0, "dynamics": 1.0, "both": 0.3}[grad]
    x = make(
        discrete=discrete, actor_grad=grad, actor_grad_mix=0.3, actor_entropy=0.2, gamma=0.9,
        discount_head=head,
    )  # fmt: skip
    model, args = x.world_model, x.args
    states, action = recorded(x, monkeypatch, discrete)
    batch = make_batch(discrete=discrete)
    batch["is_terminal"][4:, 2:] = 1
    _, (actor_loss, critic_loss, metrics) = behave(x, batch)

    feat = torch.cat([states["stoch"], states["deter"]], -1)
    reward, value, prediction = model.reward(feat), x.slow_critic(feat), x.critic(feat.detach())
    policy = x.actor(feat.detach())
    log_prob = x.actor(feat[:-1].detach()).log_prob(action[1:].detach())
    entropy, terminal = policy.entropy(), batch["is_terminal"].flatten()
    actor_sum = critic_sum = 0
    for n in range(N):
        disc = [torch.tensor(0.9)] * STATES
        if head:
            disc = list(torch.sigmoid(model.discount(feat))[:, n])
            disc[0] = 0.9 * (1 - terminal[n])
        ret, weight = {HORIZON: value[HORIZON, n]}, 1.0
        for i in reversed(range(HORIZON)):
            ahead = 0.05 * value[i + 1, n] + 0.95 * ret[i + 1]
            ret[i] = reward[i, n] + disc[i] * ahead
        for i in range(HORIZON):
            critic_sum = critic_sum + weight * 0.5 * (prediction[i, n] - ret[i].detach()) ** 2
            if i + 1 < HORIZON:
                reinforce = log_prob[i, n] * (ret[i + 1] - value[i, n]).detach()
                objective = mix * ret[i + 1] + (1 - mix) * reinforce
                actor_sum = actor_sum - weight * (objective + args.actor_entropy * entropy[i, n])
            weight = weight * disc[i].detach()
    expected = actor_sum / (N * (HORIZON - 1)), critic_sum / (N * HORIZON)
    close(actor_loss, expected[0])
    close(critic_loss, expected[1])
    close(metrics["losses/actor"], actor_loss.detach())
    close(metrics["losses/critic"], critic_loss.detach())

    wanted = [*x.actor.parameters(), *states.values(), action]
    zeros = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    for ours, theirs, leaves in (
        (actor_loss, expected[0], wanted),
        (critic_loss, expected[1], [*x.critic.parameters(), *states.values(), action]),
    ):
        pairs = (torch.autograd.grad(loss, leaves, **zeros) for loss in (ours, theirs))
        for a, b in zip(*pairs, strict=True):
            close(a, b, rtol=1e-3, atol=1e-6)
    through_states, through_action = torch.autograd.grad(
        actor_loss, [states["deter"], action], **zeros
    )
    assert through_states.any() == (mix > 0)
    assert not through_action.any()  # log pi sees the action, but pulls it nowhere


def test_terminal_starts_count_only_at_their_first_state(monkeypatch):
    x = make(actor_entropy=0.2)
    states, action = recorded(x, monkeypatch)
    batch = make_batch()
    batch["is_terminal"].fill_(1)
    calls = returns_call(monkeypatch)
    _, (actor_loss, critic_loss, _) = behave(x, batch)
    feat = x.world_model.rssm.feat(states).detach()
    ret, policy = dreamerv2.lambda_return(*calls[0]), x.actor(feat[0])
    error = x.critic(feat[0]) - x.world_model.reward(feat[0])  # no value follows the end
    close(critic_loss, 0.5 * error.square().mean() / (STATES - 1))
    advantage = (ret[1] - x.slow_critic(feat[0])).detach()
    objective = policy.log_prob(action[1].detach()) * advantage + 0.2 * policy.entropy()
    close(actor_loss, -objective.mean() / (STATES - 2))


@pytest.mark.usefixtures("smooth")
def test_dynamics_gradient_equals_finite_differences_of_the_imagined_returns():
    x = make(discrete=False, discount_head=False, actor_entropy=0.0, gamma=0.9)
    batch, bias = make_batch(discrete=False), x.actor.out.bias
    x.actor.out.weight.data.zero_()  # one action everywhere: no gradient is cut at the actor
    bias.data = torch.tensor([0.3, -0.4])
    x.world_model.reward.out.weight.data *= 10
    _, post, _ = x.world_model.loss(batch)

    def loss():
        models = (x.world_model, x.actor, x.critic, x.slow_critic)
        return dreamerv2.behavior_loss(*models, post, batch["is_terminal"], x.args)[0]

    (grad,) = torch.autograd.grad(loss(), bias)
    for i in range(A):
        sides = []
        for step in (0.02, -0.02):
            bias.data[i] += step
            sides.append(loss().item())
            bias.data[i] -= step
        numerical = (sides[0] - sides[1]) / 0.04
        assert abs(numerical) > 1e-3
        assert math.isclose(grad[i], numerical, rel_tol=0.02)


def test_reinforce_makes_actions_with_advantage_more_likely(monkeypatch):
    x = make(actor_entropy=0.0)
    states, action = recorded(x, monkeypatch)
    returns = action.detach()[:-1, :, 0]  # action 0 is worth 1 more than action 1
    monkeypatch.setattr(dreamerv2, "lambda_return", lambda *a: returns)
    x.slow_critic.out.weight.data.zero_()
    x.slow_critic.out.bias.data.fill_(0.5)
    feat, wanted = x.world_model.rssm.feat(states), torch.eye(A)[0]
    before = x.actor(feat).log_prob(wanted).mean()
    _, (actor_loss, _, _) = behave(x, make_batch())
    actor_loss.backward()
    for p in x.actor.parameters():
        p.data -= 0.1 * p.grad
    assert x.actor(feat).log_prob(wanted).mean() > before


# update


@pytest.mark.parametrize("learner", ["world_model", "actor", "critic"])
def test_an_update_moves_every_parameter_of_an_optimizer_and_no_other(learner):
    x, batch = make(SHAPES), make_batch(SHAPES)
    optimizers = dreamerv2.make_optimizers(x.agent, x.args)
    assert optimizers.keys() == {"world_model", "actor", "critic"}
    for name, optimizer in optimizers.items():
        lr = 1e-2 if name == learner else 0.0
        optimizer.param_groups[0].update(lr=lr, weight_decay=0.0)
    before = snapshot(x.agent)
    update(x, batch, optimizers)
    moved = {k for k, v in x.agent.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith(f"{learner}.")}


def test_updates_leave_the_slow_critic_as_it_is():
    x, batch = make(slow_update=1, critic_lr=1e-2), make_batch()
    optimizers, slow = dreamerv2.make_optimizers(x.agent, x.args), snapshot(x.slow_critic)
    for _ in range(3):
        before = snapshot(x.critic)
        update(x, batch, optimizers)
        assert not same(snapshot(x.critic), before)
        assert same(snapshot(x.slow_critic), slow)


@pytest.mark.parametrize("decay", [1e-6, 0.1])
def test_weight_decay_takes_the_same_share_whatever_the_learning_rate(decay):
    x = make(model_lr=3e-2, actor_lr=1e-4, critic_lr=1e-6, weight_decay=decay)
    optimizers = dreamerv2.make_optimizers(x.agent, x.args)
    for optimizer in optimizers.values():
        for p in optimizer.param_groups[0]["params"]:
            p.data.fill_(1.0)
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for name in optimizers:
        for p in x.agent[name].parameters():
            close(p.data, torch.full_like(p, 1 - decay), rtol=0, atol=1e-7)


def test_optimizers_are_adam_with_the_rates_and_epsilon_of_the_args():
    x = make(model_lr=1e-2, actor_lr=2e-3, critic_lr=3e-4, adam_eps=0.5, weight_decay=0.0)
    for name, optimizer in dreamerv2.make_optimizers(x.agent, x.args).items():
        lr = {"world_model": 1e-2, "actor": 2e-3, "critic": 3e-4}[name]
        p = optimizer.param_groups[0]["params"][0]
        before = p.data.clone()
        p.grad = torch.full_like(p, 2.0)
        optimizer.step()
        close(before - p.data, torch.full_like(p, lr * 2 / (2 + 0.5)), rtol=1e-2)


def test_each_optimizer_clips_the_norm_of_its_own_gradient():
    x, batch = make(discrete=False, reward_transform="none"), make_batch(discrete=False)
    x.world_model.reward.out.weight.data *= 1e5
    batch["reward"] *= 1e4
    metrics = update(x, batch)
    for name, key in (("world_model", "model"), ("actor", "actor"), ("critic", "critic")):
        grads = [p.grad for p in x.agent[name].parameters()]
        assert metrics[f"grad_norm/{key}"] > 200  # the norm before
        close(torch.nn.utils.get_total_norm(grads), torch.tensor(100.0), rtol=1e-3)


def test_small_gradients_are_not_clipped():
    x, batch = make(), make_batch()
    metrics = update(x, batch)
    for name, key in (("world_model", "model"), ("actor", "actor"), ("critic", "critic")):
        grads = [p.grad for p in x.agent[name].parameters()]
        assert metrics[f"grad_norm/{key}"] < 100
        close(torch.nn.utils.get_total_norm(grads), metrics[f"grad_norm/{key}"])


def test_imagination_starts_at_the_losses_posterior_in_the_model_after_its_step(monkeypatch):
    x, batch = make(), make_batch()
    original, seen, posts = dreamerv2.behavior_loss, [], []
    model_loss = x.world_model.loss

    def record_loss(batch):
        out = model_loss(batch)
        posts.append(out[1])
        return out

    def record(world_model, actor, critic, slow_critic, post, *rest):
        posts.append(post)
        seen.extend(snapshot(m) for m in (world_model, actor, critic))
        return original(world_model, actor, critic, slow_critic, post, *rest)

    monkeypatch.setattr(x.world_model, "loss", record_loss)
    monkeypatch.setattr(dreamerv2, "behavior_loss", record)
    before = [snapshot(m) for m in (x.world_model, x.actor, x.critic)]
    update(x, batch)
    assert posts[0] is posts[1]
    assert not same(seen[0], before[0])
    assert same(seen[0], snapshot(x.world_model))
    assert same(seen[1], before[1])
    assert same(seen[2], before[2])


def test_the_same_seed_gives_the_same_update():
    assert one_update() == one_update()


# Options, each with one update

OPTIONS = [
    ({"act": "silu", "norm": "layer"}, "losses/model"),
    ({"act": "relu"}, "losses/model"),
    ({"reward_head": "twohot"}, "losses/reward"),
    ({"classes": 4}, "losses/kl"),
    ({"reward_transform": "none"}, "losses/reward"),
    ({"discount_scale": 10.0}, "losses/model"),
    ({"free_nats": 5.0}, "losses/kl"),
    ({"kl_scale": 1.0}, "losses/model"),
    ({"gamma": 0.9}, "losses/discount"),
    ({"discount_lambda": 0.5}, "imag/return"),
    ({"imag_horizon": 3}, "losses/critic"),
    ({"actor_entropy": 0.5}, "losses/actor"),
    ({"clip": 1e-3, "model_lr": 0.1}, "losses/actor"),
]


@pytest.mark.parametrize(("options", "key"), OPTIONS, ids=lambda x: str(x))
def test_an_option_changes_its_loss_which_stays_finite(options, key):
    assert one_update(**options)[key] != one_update()[key]


DISTS = [
    (dist, grad)
    for dist in ("onehot", "trunc_normal", "tanh_normal")
    for grad in ("reinforce", "dynamics", "both")
]


@pytest.mark.parametrize(("dist", "grad"), DISTS)
def test_every_actor_learns_by_every_gradient(dist, grad):
    options = {"discrete": dist == "onehot", "actor_dist": dist}
    loss = one_update(**options, actor_grad=grad)["losses/actor"]
    others = {"reinforce", "dynamics", "both"} - {grad}
    assert all(loss != one_update(**options, actor_grad=g)["losses/actor"] for g in others)


def test_the_mix_of_both_weighs_dynamics():
    losses = {
        mix: one_update(actor_grad="both", actor_grad_mix=mix)["losses/actor"]
        for mix in (0.0, 0.25, 1.0)
    }
    assert math.isclose(losses[0.0], one_update(actor_grad="reinforce")["losses/actor"])
    assert math.isclose(losses[1.0], one_update(actor_grad="dynamics")["losses/actor"])
    between = 0.75 * losses[0.0] + 0.25 * losses[1.0]
    assert math.isclose(losses[0.25], between, rel_tol=1e-4)


def test_an_agent_without_discount_head_learns():
    metrics = one_update(discount_head=False, gamma=0.9)
    assert "losses/discount" not in metrics
    assert math.isclose(metrics["imag/discount"], 0.9, rel_tol=1e-6)


def test_free_nats_per_step_change_the_kl_loss():
    losses = []
    for free_avg in (True, False):
        torch.manual_seed(1)
        x, batch = make(free_nats=0.2, free_avg=free_avg), make_batch()
        losses.append(x.world_model.loss(batch)[2])
    assert losses[0]["model/kl"] == losses[1]["model/kl"]
    assert losses[1]["losses/kl"] > losses[0]["losses/kl"]


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("discrete", [True, False])
def test_bfloat16_losses_are_close_to_float32_on_the_cpu(discrete):
    full = one_update(discrete=discrete, norm="layer")
    half = one_update(discrete=discrete, norm="layer", precision="bfloat16")
    assert half != full
    for key in ("losses/model", "losses/vector", "losses/reward", "losses/discount"):
        assert math.isclose(half[key], full[key], rel_tol=0.03), key
    for key in ("losses/kl", "losses/actor", "losses/critic", "imag/return"):
        assert math.isclose(half[key], full[key], rel_tol=0.2, abs_tol=0.02), key


# open_loop


def test_open_loop_shows_truth_model_and_error():
    steps, context = 8, 3
    x, batch = make(SHAPES), make_batch(SHAPES, steps=steps)
    video = x.world_model.open_loop(batch, context)
    assert video.shape == (steps, B, C, 3 * 64, 64)
    assert not video.requires_grad
    truth, model, error = video.split(64, -2)
    close(truth, batch["image"] / 255)
    close(error, (model - truth + 1) / 2)


@pytest.mark.usefixtures("no_noise")
def test_open_loop_sees_five_images_and_dreams_the_rest():
    x, batch = make(("image",)), make_batch(("image",), steps=8)
    batch["is_first"].zero_()
    batch["is_first"][0] = 1
    model = x.world_model.open_loop(batch)[..., 64:128, :]
    post, _ = observe(x, batch)
    recon = x.world_model.decoder(x.world_model.rssm.feat(post))["image"] + 0.5
    close(model[:5], recon[:5], atol=1e-5)
    state = {k: v[4] for k, v in post.items()}
    for t in range(5, 8):
        state = x.world_model.rssm.img_step(state, batch["action"][t])
        image = x.world_model.decoder(x.world_model.rssm.feat(state))["image"] + 0.5
        close(model[t], image, atol=1e-5)


@pytest.mark.usefixtures("smooth")
def test_open_loop_does_not_look_ahead():
    x, batch = make(("image",)), make_batch(("image",), steps=8)

    def model_part(**changes):
        torch.manual_seed(3)
        return x.world_model.open_loop(batch | changes)[..., 64:128, :]

    def changed(key, t):
        value = batch[key].clone()
        value[t:] = 1 - value[t:]
        moved = model_part(**{key: value}) != before
        return moved.flatten(1).any(1).tolist()

    before = model_part()
    assert not any(changed("image", 5))
    assert changed("image", 4) == [False] * 4 + [True] * 4
    assert changed("action", 6) == [False] * 6 + [True] * 2


# policy


def row_of(batch, t):
    return {k: v[t] for k, v in batch.items()}


def act(x, batch, sample=True):
    """Acts on the first row, after no other."""
    return dreamerv2.policy(x.agent, row_of(batch, 0), x.world_model.rssm.initial(B), sample)


@pytest.mark.parametrize("sample", [True, False])
def test_discrete_actions_are_one_hot(sample):
    action, state = act(make(SHAPES), make_batch(SHAPES), sample)
    assert action.shape == (B, A)
    assert action.unique().tolist() == [0, 1]
    assert (action.sum(-1) == 1).all()
    assert {k: v.shape for k, v in state.items()} == {"deter": (B, D), "stoch": (B, S * K)}
    assert not any(v.requires_grad for v in (action, *state.values()))


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("dist", ["trunc_normal", "tanh_normal"])
def test_continuous_actions_lie_between_minus_one_and_one(dist, sample):
    x, batch = make(discrete=False, actor_dist=dist), make_batch(discrete=False)
    x.actor.out.weight.data *= 100
    action, _ = act(x, batch, sample)
    assert action.shape == (B, A)
    assert action.dtype == torch.float32
    assert action.abs().max() <= 1


@pytest.mark.parametrize("discrete", [True, False])
def test_evaluation_takes_the_mode_given_a_latent_that_is_still_sampled(discrete):
    x, batch, stochs = make(discrete=discrete), make_batch(discrete=discrete), set()
    for _ in range(5):
        action, state = act(x, batch, sample=False)
        mode = x.actor(x.world_model.rssm.feat(state)).mode
        close(action, mode.detach())
        stochs.add(tuple(state["stoch"].flatten().tolist()))
    assert len(stochs) > 1


def test_sampled_actions_follow_the_policy():
    x, count = make(), 3000
    row = {"vector": torch.randn(count, V), "action": torch.zeros(count, A)}
    row |= {"reward": torch.zeros(count), "is_first": torch.ones(count)}
    action, state = dreamerv2.policy(x.agent, row, x.world_model.rssm.initial(count))
    prob = x.actor(x.world_model.rssm.feat(state)).log_prob(torch.eye(A)[0]).exp()
    likely = prob > prob.median()
    for part in (likely, ~likely):  # 5 standard deviations and more
        assert abs(action[part, 0].mean() - prob[part].mean()) < 0.05
    assert prob[likely].mean() - prob[~likely].mean() > 0.1


@pytest.mark.usefixtures("no_noise")
def test_acting_row_by_row_gives_the_states_of_learning_from_the_window():
    x, batch = make(SHAPES), make_batch(SHAPES)
    batch["is_first"][0] = 1
    state = random_state(x.world_model.rssm, B)
    post, _ = observe(x, batch)
    for t in range(T):
        _, state = dreamerv2.policy(x.agent, row_of(batch, t), state)
        for key in ("deter", "stoch"):
            close(state[key], post[key][t].detach(), atol=1e-5)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_is_first_resets_the_state_of_its_environment_and_the_others_carry_theirs(dtype):
    x, batch = make(), make_batch()
    start = x.world_model.rssm.initial(B)
    _, state = dreamerv2.policy(x.agent, row_of(batch, 0), start)
    row = row_of(batch, 1) | {"is_first": torch.tensor([0, 1, 0, 0]).to(dtype)}
    _, after = dreamerv2.policy(x.agent, row, state)
    fresh = row | {"is_first": torch.ones(B, dtype=dtype), "action": torch.zeros(B, A)}
    _, reset = dreamerv2.policy(x.agent, fresh, start)
    equal = (after["deter"] == reset["deter"]).all(-1)
    assert equal.tolist() == [False, True, False, False]
