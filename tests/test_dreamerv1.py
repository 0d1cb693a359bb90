"""DreamerV1's maths where it differs from DreamerV2's, on sizes that are all different."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import nn

import dreamerv1

T, B, N, A, C, V = 8, 4, 32, 3, 1, 12
D, S, HIDDEN, UNITS, DEPTH, HORIZON = 9, 5, 13, 11, 2, 6
FEAT = S + D
COUNT = 20_000  # samples of a frequency, which then errs by less than 0.02
SHAPES = {"image": (C, 64, 64), "vector": (V,)}
SIZES = {
    "deter": D, "hidden": HIDDEN, "stoch": S, "units": UNITS, "cnn_depth": DEPTH, "layers": 2,
    "reward_layers": 1, "discount_layers": 3, "critic_layers": 4, "imag_horizon": HORIZON,
    "free_nats": 0.0,
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

    def gaussian(self, shape=()):
        return self.mean.expand(*shape, *self.mean.shape)

    monkeypatch.setattr(dreamerv1.OneHot, "rsample", one_hot)
    monkeypatch.setattr(td.Normal, "rsample", gaussian)


def make(keys=("vector",), discrete=False, **options):
    """A small agent with its args: agent, world_model, actor, critic, args."""
    kind = {"actor_dist": "onehot" if discrete else "tanh_normal"}
    args = dreamerv1.Args(**SIZES | kind | options)
    agent = dreamerv1.make_agent({k: SHAPES[k] for k in keys} | {"action": (A,)}, args)
    return SimpleNamespace(agent=agent, args=args, **dict(agent.items()))


def make_batch(keys=("vector",), discrete=False):
    """An episode ends in the middle of sequence 1, another at the end of sequence 3."""
    batch = {
        "image": torch.randint(0, 256, (T, B, C, 64, 64), dtype=torch.uint8),
        "vector": torch.randn(T, B, V),
        "action": torch.tanh(torch.randn(T, B, A)),
        "reward": 3 * torch.randn(T, B),
        "is_first": torch.zeros(T, B),
        "is_terminal": torch.zeros(T, B),
    }
    if discrete:
        batch["action"] = F.one_hot(torch.randint(A, (T, B)), A).float()
    batch["is_terminal"][4, 1] = batch["is_first"][5, 1] = batch["is_terminal"][-1, 3] = 1
    batch["action"][5, 1] = batch["reward"][5, 1] = 0
    return {k: v for k, v in batch.items() if k in keys or k not in SHAPES}


def observe(x, batch):
    embed = x.world_model.encoder(batch)
    return x.world_model.rssm.observe(embed, batch["action"], batch["is_first"])


def behave(x, batch):
    """The posterior of the batch and the behavior losses on it, from a seed of their own."""
    post = x.world_model.loss(batch)[1]
    torch.manual_seed(9)
    models = (x.world_model, x.actor, x.critic)
    return post, dreamerv1.behavior_loss(*models, post, batch["is_terminal"], x.args)


def update(x, batch, optimizers=None):
    optimizers = optimizers or dreamerv1.make_optimizers(x.agent, x.args)
    return dreamerv1.update(x.agent, optimizers, batch, x.args)


def one_update(discrete=False, **options):
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


def random_state(*size):
    return {"deter": torch.randn(*size, D), "stoch": torch.randn(*size, S)}


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def close(a, b, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, check_dtype=False)


def close_gradients(a, b, leaves, atol=1e-6):
    """Two scalars have the same gradients at the leaves -> these gradients."""
    zeros = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    ours, theirs = (torch.autograd.grad(x, leaves, **zeros) for x in (a, b))
    for x, y in zip(ours, theirs, strict=True):
        close(x, y, rtol=1e-3, atol=atol)
    return ours


# Sizes, weights and presets

COUNTS = {  # encoder, RSSM, decoder, world model, actor, critic
    "dmc_pixels": (690_144, 557_920, 3_795_555, 5_296_820, 578_412, 413_601),
    "atari": (690_144, 557_920, 3_795_555, 5_710_421, 576_006, 413_601),
}


def full_size(preset, shapes):
    kind = {"actor_dist": "onehot" if preset == "atari" else "tanh_normal"}
    args = dreamerv1.Args(**dreamerv1.PRESETS[preset] | kind)
    with torch.device("meta"):
        return dreamerv1.make_agent(shapes | {"action": (6,)}, args)


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts_equal_the_authors(preset):
    agent = full_size(preset, {"image": (3, 64, 64)})
    model = agent["world_model"]
    modules = (model.encoder, model.rssm, model.decoder, model, agent["actor"], agent["critic"])
    assert tuple(sum(p.numel() for p in m.parameters()) for m in modules) == COUNTS[preset]


def test_each_head_has_its_number_of_layers_with_relu_in_convolutions_and_elu_elsewhere():
    agent = full_size("atari", SHAPES)
    model, rssm = agent["world_model"], agent["world_model"].rssm
    heads = {
        model.reward.mlp: 2, model.discount.mlp: 3, agent["critic"].mlp: 3, agent["actor"].mlp: 4,
        model.encoder.mlp: 4, model.decoder.mlp[0]: 4,
    }  # fmt: skip
    for mlp, layers in heads.items():
        assert [layer.out_features for layer, _ in mlp] == [400] * layers
    dense = [*(block for mlp in heads for block in mlp), rssm.img_in, rssm.img_out[0]]
    dense.append(rssm.obs_out[0])
    convolutions = [*model.encoder.conv, *model.decoder.conv[:-1]]
    assert len(convolutions) == 7
    for blocks, kind in ((dense, nn.ELU), (convolutions, nn.ReLU)):
        assert all(len(block) == 2 and type(block[1]) is kind for block in blocks)
    assert sum(isinstance(m, nn.ELU | nn.ReLU) for m in agent.modules()) == len(dense) + 7


ACTIVATIONS = {"elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU}


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize(("act", "cnn_act"), [("relu", "silu"), ("elu", "relu"), ("silu", "elu")])
def test_act_is_for_dense_layers_and_cnn_act_for_convolutions(act, cnn_act, norm):
    agent = make(SHAPES, act=act, cnn_act=cnn_act, norm=norm).agent
    hidden = [m for m in agent.modules() if isinstance(m, nn.Sequential) and len(m) > 1]
    hidden = [m for m in hidden if isinstance(m[-1], tuple(ACTIVATIONS.values()))]
    # 3 of the RSSM, 2 in encoder, decoder and actor, 1 + 3 + 4 of reward, discount and critic
    assert sum(isinstance(m[0], nn.Linear) for m in hidden) == 3 + 3 * 2 + 1 + 3 + 4
    assert sum(not isinstance(m[0], nn.Linear) for m in hidden) == 4 + 3
    for layer, *norms, activation in hidden:
        dense = isinstance(layer, nn.Linear)
        assert type(activation) is ACTIVATIONS[act if dense else cnn_act]
        assert [m.channels_first for m in norms] == ([not dense] if norm == "layer" else [])
        assert all(isinstance(m, nn.LayerNorm) for m in norms)
        assert all(m.eps == 1e-3 and m.normalized_shape == layer.bias.shape for m in norms)


def check_glorot(weight, fans):
    limit, slack = math.sqrt(6 / fans), 6 / math.sqrt(weight.numel())
    assert limit * (1 - slack) < weight.abs().max() <= limit
    assert abs(weight.mean()) < slack * limit
    assert abs(weight.std() * math.sqrt(3) / limit - 1) < slack


def test_weights_are_glorot_uniform_and_biases_zero():
    agent, kinds = make(SHAPES, units=60, cnn_depth=8).agent, set()
    for layer in agent.modules():
        if isinstance(layer, nn.Linear):
            fans = layer.in_features + layer.out_features
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            fans = (layer.in_channels + layer.out_channels) * math.prod(layer.kernel_size)
        else:
            continue
        kinds.add(type(layer))
        check_glorot(layer.weight.detach(), fans)
        assert not layer.bias.any()
    assert kinds == {nn.Linear, nn.Conv2d, nn.ConvTranspose2d, dreamerv1.PixelDeconv}


def test_gru_starts_glorot_uniform_from_its_input_and_orthogonal_from_its_state():
    gru = make(hidden=80, deter=50).world_model.rssm.gru
    check_glorot(gru.weight_ih.detach(), 80 + 3 * 50)  # Keras has the three gates in one matrix
    close(gru.weight_hh.T @ gru.weight_hh, torch.eye(50), atol=1e-5)
    assert gru.weight_hh.shape == (150, 50)
    assert not gru.bias_ih.any()
    assert not gru.bias_hh.any()


V1 = {  # what both published settings share
    "grayscale": False, "observation": "auto", "num_envs": 1, "batch_size": 50, "batch_length": 50,
    "deter": 200, "hidden": 200, "stoch": 30, "cnn_depth": 32, "units": 400, "layers": 4,
    "reward_layers": 2, "discount_layers": 3, "critic_layers": 3, "act": "elu", "cnn_act": "relu",
    "norm": "none", "free_nats": 3, "gamma": 0.99, "discount_lambda": 0.95, "actor_dist": "auto",
    "actor_grad": "dynamics", "actor_entropy": 0, "expl_noise": 0.3, "expl_epsilon": 0.4,
    "expl_min": 0.1, "expl_decay": 200_000, "prefill": 5000, "pretrain": 100, "train_every": 1000,
    "train_steps": 100, "model_lr": 6e-4, "actor_lr": 8e-5, "critic_lr": 8e-5, "adam_eps": 1e-7,
    "clip": 100, "eval_episodes": 1,
}  # fmt: skip
DMC = V1 | {
    "action_repeat": 2, "time_limit": 1000, "reward_transform": "none", "discount_head": False,
    "kl_scale": 1, "imag_horizon": 15, "eval_every": 10_000,
}  # fmt: skip
ATARI = V1 | {
    "action_repeat": 4, "time_limit": 108_000, "reward_transform": "tanh", "discount_head": True,
    "discount_scale": 10, "kl_scale": 0.1, "imag_horizon": 10, "sticky_prob": None,
    "full_action_space": False,
}  # fmt: skip
OTHER = {"action_repeat": 1, "discount_head": True, "reward_transform": "none"}
TABLE = {"atari": ATARI, "dmc_pixels": DMC, "dmc_vector": DMC, "other": OTHER}


@pytest.mark.parametrize("name", TABLE)
def test_presets_equal_the_published_hyperparameters(name):
    args = vars(dreamerv1.Args(**dreamerv1.PRESETS[name]))
    assert {k: args[k] for k in TABLE[name]} == TABLE[name]
    assert dreamerv1.PRESETS.keys() == TABLE.keys()
    if name != "atari":  # whose replay would be too large
        assert args["replay_size"] >= args["total_frames"] // args["action_repeat"]


# RSSM


def test_gru_step_equals_the_formula_of_keras():
    rssm = make().world_model.rssm
    for p in rssm.gru.parameters():
        p.data.normal_()
    state, action = random_state(B), torch.randn(B, A)
    h, x = state["deter"], rssm.img_in(torch.cat([state["stoch"], action], -1))
    assert x.shape == (B, HIDDEN)
    gates = x @ rssm.gru.weight_ih.T + rssm.gru.bias_ih
    inner = h @ rssm.gru.weight_hh.T + rssm.gru.bias_hh
    reset = 1 / (1 + torch.exp(-gates[:, :D] - inner[:, :D]))
    update = 1 / (1 + torch.exp(-gates[:, D : 2 * D] - inner[:, D : 2 * D]))
    cand = torch.tanh(gates[:, 2 * D :] + reset * inner[:, 2 * D :])  # reset after the product
    close(rssm.gru_step(state, action), update * h + (1 - update) * cand, atol=1e-5)


def test_latents_are_samples_with_a_std_of_softplus_plus_a_tenth_that_carry_the_gradient():
    rssm, count = make().world_model.rssm, 10_000
    x, deter = 2 * torch.randn(2 * S), torch.randn(count, D)
    x.requires_grad_()
    state = rssm.state(deter, x.expand(count, 2 * S))
    close(state["mean"], x[:S].expand(count, S))
    close(state["std"], (torch.log1p(x[S:].exp()) + 0.1).expand(count, S))
    assert all(v.dtype == torch.float32 for v in rssm.stats(x.bfloat16()).values())
    assert state["deter"] is deter
    mean, std, stoch = (state[k] for k in ("mean", "std", "stoch"))
    noise = ((stoch - mean) / std).detach()
    for s in range(S):
        assert scipy.stats.kstest(noise[:, s].numpy(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T.numpy()) - np.eye(S)).max() < 0.05
    weight = torch.randn(count, S)
    close_gradients((weight * stoch).sum(), (weight * (mean + std * noise)).sum(), [x], 1e-3)


def test_kl_of_the_posterior_from_the_prior_is_summed_over_latents_and_trains_both():
    rssm = make().world_model.rssm
    leaves = [torch.randn(T, B, 2 * S).requires_grad_() for _ in range(2)]
    post, prior = (rssm.stats(leaf) for leaf in leaves)
    ratio = (post["std"] / prior["std"]).square()
    distance = ((post["mean"] - prior["mean"]) / prior["std"]).square()
    expected = 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)
    kl = rssm.kl(post, prior)
    assert kl.shape == (T, B)
    close(kl, expected)
    weight = torch.randn(T, B)
    grads = close_gradients((weight * kl).sum(), (weight * expected).sum(), leaves, 1e-5)
    assert all(g.any() for g in grads)


def test_states_have_the_shapes_of_the_docstring():
    x, batch = make(), make_batch()
    post, prior = observe(x, batch)
    sizes = {"deter": D, "stoch": S, "mean": S, "std": S}
    assert {k: v.shape for k, v in post.items()} == {k: (T, B, v) for k, v in sizes.items()}
    assert {k: v.shape for k, v in prior.items()} == {"mean": (T, B, S), "std": (T, B, S)}
    start = {k: v.flatten(0, 1) for k, v in post.items()}
    feat, action = x.world_model.rssm.imagine(x.actor, start, HORIZON)
    assert feat.shape == (HORIZON, N, FEAT)
    assert action.shape == (HORIZON, N, A)
    feat = x.world_model.rssm.feat(post)
    assert torch.equal(feat, torch.cat([post["stoch"], post["deter"]], -1))
    assert feat.shape[-1] == x.world_model.rssm.feat_size == FEAT


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_is_first_in_the_middle_of_a_window_equals_two_windows(dtype):
    x, batch = make(), make_batch()
    batch["action"] += torch.randn(T, B, A)  # reset rows too: their actions must not matter
    batch["is_first"] = torch.zeros(T, B, dtype=dtype)
    ends = (2, 4, 7, 3)
    for b, t in enumerate(ends):
        batch["is_first"][t, b] = 1
    whole = observe(x, batch)
    for b, t in enumerate(ends):
        for part in (slice(0, t), slice(t, T)):
            alone = observe(x, {k: v[part, b : b + 1] for k, v in batch.items()})
            for ours, theirs in zip(whole, alone, strict=True):
                for key in theirs:
                    close(ours[key][part, b : b + 1], theirs[key], atol=1e-5)


@pytest.mark.usefixtures("no_noise")
def test_the_first_action_of_a_window_counts_unless_its_row_is_a_reset():
    x, batch = make(), make_batch()
    batch["is_first"][0] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    changed = batch | {"action": batch["action"].clone()}
    changed["action"][0] += 1
    (before, _), (after, _) = observe(x, batch), observe(x, changed)
    moved = (before["deter"] != after["deter"]).any(-1).all(0)  # (B,)
    assert moved.tolist() == [True, False, True, False]


def test_observing_by_hand_from_the_zero_state_and_the_prior_is_that_of_imagined_steps():
    x, batch = make(), make_batch()
    rssm, embed = x.world_model.rssm, x.world_model.encoder(batch)
    post, prior = observe(x, batch)
    state = {"deter": torch.zeros(B, D), "stoch": torch.zeros(B, S)}
    for t in range(T):
        keep = 1 - batch["is_first"][t][:, None]
        state = {k: v * keep for k, v in state.items()}
        step = rssm.img_step(state, batch["action"][t] * keep)
        close(step["deter"], post["deter"][t])
        for key in ("mean", "std"):
            close(step[key], prior[key][t], atol=1e-5)
        raw = rssm.obs_out(torch.cat([step["deter"], embed[t]], -1))
        close(raw[:, :S], post["mean"][t], atol=1e-5)
        state = {k: post[k][t] for k in ("deter", "stoch")}


def test_imagined_states_follow_the_start_and_action_i_leads_to_state_i(monkeypatch):
    rssm = make().world_model.rssm

    def actor(feat):  # ten times what the last number of deter counts
        return SimpleNamespace(rsample=lambda: 10 * feat[:, -1:].expand(-1, A))

    def step(prev, action):
        stoch = prev["stoch"] + action[:, :1] if len(prev) == 2 else None
        return {"deter": prev["deter"] + 1, "stoch": stoch}

    monkeypatch.setattr(rssm, "img_step", step)
    start = {"deter": torch.full((N, D), 5.0), "stoch": torch.zeros(N, S)}
    feat, action = rssm.imagine(actor, start, 4)
    stoch, deter = feat.split([S, D], -1)
    assert deter[:, 0, 0].tolist() == [6, 7, 8, 9]
    assert action[:, 0, 0].tolist() == [50, 60, 70, 80]
    assert stoch[:, 0, 0].tolist() == [50, 110, 180, 260]


def test_imagined_actions_pull_on_the_actor_but_not_on_the_states_it_sees():
    x = make()
    start = {k: v.requires_grad_() for k, v in random_state(N).items()}
    feat, action = x.world_model.rssm.imagine(x.actor, start, HORIZON)
    for leaves, reached in ((list(start.values()), False), (list(x.actor.parameters()), True)):
        grads = torch.autograd.grad(action[1].sum(), leaves, retain_graph=True, allow_unused=True)
        assert all((g is not None and g.any()) == reached for g in grads)
    last = feat[-1, :, -D:].sum()  # it follows from the actions and from the start
    for leaf in (*x.actor.parameters(), *start.values()):
        assert torch.autograd.grad(last, leaf, retain_graph=True)[0].any()


# World model loss


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("transform", ["tanh", "none"])
def test_model_loss_is_the_sum_of_its_scaled_parts(transform, head):
    options = {"kl_scale": 0.3, "discount_scale": 4.0, "gamma": 0.9, "discount_head": head}
    x, batch = make(SHAPES, reward_transform=transform, **options), make_batch(SHAPES)
    model = x.world_model
    loss, post, metrics = model.loss(batch)
    feat = model.rssm.feat(post)
    prior = model.rssm.stats(model.rssm.img_out(post["deter"]))
    recon, steps = model.decoder(feat), T * B
    reward = batch["reward"].tanh() if transform == "tanh" else batch["reward"]
    p, q = (td.Normal(stats["mean"], stats["std"]) for stats in (post, prior))
    kl = td.kl_divergence(p, q).sum() / steps
    expected = {
        "image": 0.5 * (recon["image"] - (batch["image"] / 255 - 0.5)).square().sum() / steps,
        "vector": 0.5 * (recon["vector"] - batch["vector"]).square().sum() / steps,
        "reward": 0.5 * (model.reward(feat) - reward).square().sum() / steps,
        "kl": kl,
    }
    scaled = expected | {"kl": 0.3 * kl}
    if head:
        prob, target = model.discount(feat).sigmoid(), 0.9 * (1 - batch["is_terminal"])
        entropy = -(target * prob.log() + (1 - target) * (1 - prob).log()).mean()
        expected["discount"], scaled["discount"] = entropy, 4 * entropy
    entropies = {
        f"model/{k}_entropy": v.entropy().sum() / steps for k, v in (("post", p), ("prior", q))
    }
    wanted = {f"losses/{k}": v for k, v in expected.items()} | entropies
    wanted |= {"losses/model": sum(scaled.values()), "model/kl": kl}
    assert metrics.keys() == wanted.keys()
    for key, value in wanted.items():
        close(metrics[key], value.detach())
        assert not metrics[key].requires_grad
    assert (model.discount is not None) == head
    close_gradients(loss, sum(scaled.values()), list(model.parameters()), 1e-4)


@pytest.mark.parametrize("free", [2.0, 5.0])
def test_free_nats_are_for_the_mean_of_the_batch_and_not_for_each_step(free, monkeypatch):
    x, batch = make(free_nats=free, kl_scale=0.7), make_batch()
    kl = torch.linspace(0, 8, T * B).reshape(T, B).requires_grad_()  # mean 4, ends on both sides
    monkeypatch.setattr(x.world_model.rssm, "kl", lambda post, prior: kl)
    loss, _, metrics = x.world_model.loss(batch)
    close(metrics["losses/kl"], torch.tensor(max(4.0, free)))
    close(metrics["model/kl"], torch.tensor(4.0))
    assert kl.detach().clamp(min=free).mean() > max(4.0, free) + 0.1  # what each step would give
    pull = 0.7 / (T * B) if free < 4 else 0.0
    close(torch.autograd.grad(loss, kl)[0], torch.full((T, B), pull))


# Actor


def test_tanh_normal_actor_has_the_mean_std_and_density_of_the_authors():
    actor, feat = make().actor, 3 * torch.randn(T, B, FEAT)
    dist, hidden = actor(feat), actor.mlp(feat)
    mean = 5 * torch.tanh(actor.out(hidden) / 5)
    std = torch.log1p((actor.std(hidden) + math.log(math.exp(5) - 1)).exp()) + 1e-4
    normal = dist.base_dist.base_dist
    close(normal.mean, mean)
    close(normal.stddev, std)
    x = torch.rand(T, B, A) * 1.9 - 0.95
    theirs = scipy.stats.norm(mean.detach().numpy(), std.detach().numpy())
    theirs = torch.tensor(theirs.logpdf(np.arctanh(x.numpy()))) - torch.log(1 - x.square())
    close(dist.log_prob(x), theirs.sum(-1), atol=1e-4)
    assert dist.log_prob(x).shape == dist.entropy().shape == (T, B)
    actor.std.weight.data.zero_()
    for raw, wanted in ((0.0, 5 + 1e-4), (-100.0, 1e-4)):  # the widest policy and the narrowest
        actor.std.bias.data.fill_(raw)
        std = actor(feat).base_dist.base_dist.stddev
        close(std, torch.full_like(std, wanted), rtol=1e-5)


def test_the_mode_is_the_likeliest_of_100_samples_of_each_batch_element():
    actor = make().actor
    actor.std.bias.data.fill_(-7.0)  # narrow enough that no tanh is rounded to 1
    dist = actor(torch.randn(T, B, FEAT))
    torch.manual_seed(4)
    samples = dist.rsample((100,))
    log_prob, best = dist.log_prob(samples), set()
    torch.manual_seed(4)
    mode = dist.mode
    for t, b in np.ndindex(T, B):
        best.add(i := int(log_prob[:, t, b].argmax()))
        close(mode[t, b], samples[i, t, b], rtol=0, atol=0)
    assert len(best) > 10


def test_entropy_is_exact_for_samples_that_tanh_rounds_to_the_bounds():
    actor = make().actor
    dist = actor(torch.randn(B, FEAT))
    torch.manual_seed(4)
    z = dist.base_dist.base_dist.rsample((100,))
    torch.manual_seed(4)
    entropy = dist.entropy()
    slope = -2 * torch.log(torch.cosh(z.double()))  # log of tanh's derivative, finite at 20 too
    expected = (slope.sum(-1) - dist.base_dist.log_prob(z)).mean(0)
    close(entropy, expected, atol=1e-4)
    leaves = [actor.out.bias, actor.std.bias]
    close_gradients(entropy.sum(), expected.sum(), leaves, 1e-4)


def test_actions_stay_inside_the_bounds_with_finite_gradients_for_extreme_outputs():
    actor = make().actor
    for bias, std in ((b, s) for b in (-1e3, 0.0, 1e3) for s in (-50.0, 0.0, 10.0)):
        actor.out.bias.data.fill_(bias)
        actor.std.bias.data.fill_(std)
        dist = actor(torch.randn(T, B, FEAT))
        x = dist.rsample()
        assert max(x.abs().max(), dist.mode.abs().max()) <= 1
        terms = (x, dist.log_prob(x.detach()), dist.entropy())
        grads = torch.autograd.grad(sum(v.sum() for v in terms), list(actor.parameters()))
        assert all(v.isfinite().all() for v in (*terms, *grads)), (bias, std)


def test_one_hot_actor_samples_by_its_softmax_and_has_its_straight_through_gradient():
    actor, feat, weight = make(discrete=True).actor, torch.randn(FEAT), torch.randn(COUNT, A)
    logit = 2 * actor.out(actor.mlp(feat))
    actor.out.weight.data *= 2
    sample = actor(feat.expand(COUNT, FEAT)).rsample()
    assert ((sample == 0) | (sample == 1)).all()
    assert (sample.sum(-1) == 1).all()
    close(sample.mean(0).detach(), logit.softmax(-1).detach(), rtol=0, atol=0.02)
    prob = actor.out(actor.mlp(feat)).softmax(-1)
    (grad,) = close_gradients(
        (sample * weight).sum(), (prob * weight).sum(), [actor.out.bias], 1e-3
    )
    assert grad.any()
    assert not hasattr(actor, "std")


# behavior_loss

GRADS = [(discrete, grad) for discrete in (True, False) for grad in ("reinforce", "dynamics")]


def recorded(x, monkeypatch, discrete, steps):
    """Replaces imagination by random states and actions that collect gradients -> them, calls."""
    states = random_state(HORIZON, steps * B)
    action = torch.rand(HORIZON, steps * B, A) * 1.8 - 0.9
    if discrete:
        action = F.one_hot(torch.randint(A, (HORIZON, steps * B)), A).float()
    calls = []
    for leaf in (*states.values(), action):
        leaf.requires_grad_()

    def imagine(actor, *args):
        calls.append((*args, torch.is_grad_enabled()))
        return x.world_model.rssm.feat(states), action

    monkeypatch.setattr(x.world_model.rssm, "imagine", imagine)
    return states, action, calls


@pytest.mark.parametrize("entropy_scale", [0.0, 0.2])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(("discrete", "grad"), GRADS)
def test_actor_and_critic_losses_by_brute_force(discrete, grad, head, entropy_scale, monkeypatch):
    x = make(
        discrete=discrete, actor_grad=grad, actor_entropy=entropy_scale, gamma=0.9,
        discount_lambda=0.8, discount_head=head,
    )  # fmt: skip
    model, steps, batch = x.world_model, T - head, make_batch(discrete=discrete)
    states, action, calls = recorded(x, monkeypatch, discrete, steps)
    post, (actor_loss, critic_loss, metrics) = behave(x, batch)
    ((start, horizon, graph),) = calls
    assert horizon == HORIZON
    assert graph == (grad == "dynamics")  # reinforce needs none through the imagination
    for key in ("deter", "stoch"):  # every step of the batch, but the last one with a head
        assert torch.equal(start[key], post[key].detach().reshape(T * B, -1)[: steps * B])

    feat = torch.cat([states["stoch"], states["deter"]], -1)
    prev = torch.cat([torch.cat([start["stoch"], start["deter"]], -1)[None], feat[:-2].detach()])
    reward, value, prediction = model.reward(feat), x.critic(feat), x.critic(feat.detach())
    torch.manual_seed(9)
    policy = x.actor(prev if entropy_scale or grad == "reinforce" else prev[:1])
    entropy = policy.entropy()
    log_prob = x.actor(prev).log_prob(action[:-1].detach())
    baseline = x.critic(prev).detach()
    actor_sum = critic_sum = return_sum = disc_sum = 0
    for n in range(steps * B):
        disc, weight = [torch.tensor(0.9)] * HORIZON, 1.0
        if head:
            disc = list(torch.sigmoid(model.discount(feat[:, n])))
            weight = 1 - batch["is_terminal"][n // B, n % B]
        disc_sum = disc_sum + sum(disc)
        ret = {HORIZON - 1: value[HORIZON - 1, n]}
        for i in reversed(range(HORIZON - 1)):
            ret[i] = reward[i, n] + disc[i] * (0.2 * value[i + 1, n] + 0.8 * ret[i + 1])
        for i in range(HORIZON - 1):
            critic_sum = critic_sum + weight * 0.5 * (prediction[i, n] - ret[i].detach()) ** 2
            objective = ret[i]
            if grad == "reinforce":
                objective = log_prob[i, n] * (ret[i] - baseline[i, n]).detach()
            if entropy_scale:
                objective = objective + entropy_scale * entropy[i, n]
            actor_sum = actor_sum - weight * objective
            return_sum = return_sum + ret[i]
            weight = weight * disc[i].detach()
    count = steps * B * (HORIZON - 1)
    expected = actor_sum / count, critic_sum / count
    close(actor_loss, expected[0])
    close(critic_loss, expected[1])
    wanted = {
        "losses/actor": expected[0], "losses/critic": expected[1], "imag/reward": reward.mean(),
        "imag/actor_entropy": entropy.mean(), "imag/return": return_sum / count,
        "imag/value": prediction[:-1].mean(), "imag/discount": disc_sum / (steps * B * HORIZON),
    }  # fmt: skip
    assert metrics.keys() == wanted.keys()
    for key, number in wanted.items():
        close(metrics[key], number.detach())
        assert not metrics[key].requires_grad

    leaves = [*states.values(), action, *x.actor.parameters()]
    *reached, through_action = close_gradients(actor_loss, expected[0], leaves)[:3]
    assert all(g.any() == (grad == "dynamics") for g in reached)
    assert not through_action.any()  # log pi sees the action, but pulls it nowhere
    close_gradients(critic_loss, expected[1], [*leaves, *x.critic.parameters()])


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(("discrete", "grad"), GRADS)
def test_behavior_losses_train_actor_and_critic_alone_and_each_its_own(discrete, grad, head):
    x = make(discrete=discrete, actor_grad=grad, discount_head=head)
    post, (actor_loss, critic_loss, _) = behave(x, make_batch(discrete=discrete))
    actor, critic = list(x.actor.parameters()), list(x.critic.parameters())
    latents = [v for v in post.values() if v.requires_grad]
    assert latents
    for loss, parameters in ((actor_loss, latents), (critic_loss, actor + latents)):
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        assert all(g is None for g in grads)
    for loss, parameters in ((actor_loss, actor), (critic_loss, critic)):
        dreamerv1.opt_step(torch.optim.SGD(parameters, 0.0), loss, 100.0)
        others = {*x.agent.parameters()} - {*actor, *critic}
        assert all(p.grad is None for p in others)
        assert all(p.grad is not None and p.grad.any() for p in parameters)


def test_terminal_starts_train_nothing_with_a_discount_head_but_count_in_the_mean():
    for head in (True, False):
        x, batch = make(discount_head=head), make_batch()
        losses = []  # of actor and critic
        for ends in ([], [1], [1, 2, 0, 3]):  # the sequences whose every step is terminal
            batch["is_terminal"].zero_()
            batch["is_terminal"][:, ends] = 1
            torch.manual_seed(5)
            losses.append([v.item() for v in behave(x, batch)[1][:2]])
        assert (losses[0] != losses[1]) == head
        assert (losses[2] == [0.0, 0.0]) == head


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("source", ["reward", "critic"])
def test_dynamics_gradient_equals_finite_differences_of_the_imagined_returns(source):
    x, batch = make(discount_head=False, gamma=0.9), make_batch()
    heads, bias = {"reward": x.world_model.reward, "critic": x.critic}, x.actor.out.bias
    x.actor.out.weight.data.zero_()  # one action everywhere: no gradient is cut at the actor
    bias.data = torch.tensor([0.3, -0.4, 0.1])
    for name, head in heads.items():
        head.out.weight.data *= 10 if name == source else 0
    (grad,) = torch.autograd.grad(behave(x, batch)[1][0], bias)
    for i in range(A):
        sides = []
        for step in (0.02, -0.02):
            bias.data[i] += step
            sides.append(behave(x, batch)[1][0].item())
            bias.data[i] -= step
        numerical = (sides[0] - sides[1]) / 0.04
        assert abs(numerical) > 1e-3
        assert math.isclose(grad[i], numerical, rel_tol=0.02)


# update


@pytest.mark.parametrize(("discrete", "grad"), GRADS)
def test_all_gradients_are_taken_at_the_weights_before_any_step(discrete, grad):
    x = make(
        discrete=discrete, actor_grad=grad, clip=1e9, model_lr=0.1, actor_lr=0.1, critic_lr=0.1
    )
    batch, old = make_batch(discrete=discrete), copy.deepcopy(x)
    torch.manual_seed(7)
    metrics = update(x, batch)
    torch.manual_seed(7)
    model_loss, post, _ = old.world_model.loss(batch)
    models = (old.world_model, old.actor, old.critic)
    losses = dreamerv1.behavior_loss(*models, post, batch["is_terminal"], old.args)
    names = {"world_model": "model", "actor": "actor", "critic": "critic"}
    for (name, short), loss in zip(names.items(), (model_loss, *losses[:2]), strict=True):
        close(metrics[f"losses/{short}"], loss.detach())
        expected = torch.autograd.grad(loss, list(old.agent[name].parameters()), retain_graph=True)
        for p, g in zip(x.agent[name].parameters(), expected, strict=True):
            close(p.grad, g, rtol=1e-3, atol=1e-6)
        close(metrics[f"grad_norm/{short}"], nn.utils.get_total_norm(expected))


@pytest.mark.parametrize("learner", ["world_model", "actor", "critic"])
def test_an_update_moves_every_parameter_of_an_optimizer_and_no_other(learner):
    x, batch = make(SHAPES, cnn_act="elu"), make_batch(SHAPES)
    optimizers = dreamerv1.make_optimizers(x.agent, x.args)
    assert optimizers.keys() == {"world_model", "actor", "critic"}
    for name, optimizer in optimizers.items():
        optimizer.param_groups[0]["lr"] = 1e-2 if name == learner else 0.0
    before = snapshot(x.agent)
    update(x, batch, optimizers)
    moved = {k for k, v in x.agent.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith(f"{learner}.")}


@pytest.mark.parametrize("eps", [1e-7, 0.5])
def test_optimizers_are_adam_with_the_rates_and_epsilon_of_the_args_and_no_decay(eps):
    rates = {"world_model": 1e-2, "actor": 2e-3, "critic": 3e-4}
    x = make(model_lr=1e-2, actor_lr=2e-3, critic_lr=3e-4, adam_eps=eps)
    for name, optimizer in dreamerv1.make_optimizers(x.agent, x.args).items():
        p, other = optimizer.param_groups[0]["params"][:2]
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        before, scale = p.data.clone(), 2e-7 if eps == 1e-7 else 2.0
        other.data.fill_(1.0)
        p.grad, other.grad = torch.full_like(p, scale), torch.zeros_like(other)
        optimizer.step()
        moved = torch.full_like(p, rates[name] * scale / (scale + eps))
        close(before - p.data, moved, rtol=1e-2)
        assert (other == 1).all()


def test_each_optimizer_clips_the_norm_of_its_own_gradient():
    x, batch = make(reward_transform="none"), make_batch()
    x.world_model.reward.out.weight.data *= 1e5
    batch["reward"] *= 1e4
    metrics = update(x, batch)
    for name, key in (("world_model", "model"), ("actor", "actor"), ("critic", "critic")):
        grads = [p.grad for p in x.agent[name].parameters()]
        assert metrics[f"grad_norm/{key}"] > 200  # the norm before
        close(nn.utils.get_total_norm(grads), torch.tensor(100.0), rtol=1e-3)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("discrete", [True, False])
def test_bfloat16_losses_are_close_to_float32_on_the_cpu(discrete):
    full = one_update(discrete, norm="layer", kl_scale=1.0)
    half = one_update(discrete, norm="layer", kl_scale=1.0, precision="bfloat16")
    assert half != full
    for key in ("losses/model", "losses/vector", "losses/reward", "losses/discount"):
        assert math.isclose(half[key], full[key], rel_tol=0.03), key
    for key in ("losses/kl", "losses/actor", "losses/critic", "imag/return"):
        assert math.isclose(half[key], full[key], rel_tol=0.2, abs_tol=0.02), key


def test_states_statistics_and_losses_are_float32_under_bfloat16():
    x, batch = make(SHAPES), make_batch(SHAPES)
    with torch.autocast("cpu", torch.bfloat16):
        loss, post, metrics = x.world_model.loss(batch)
        normal = x.actor(x.world_model.rssm.feat(post)).base_dist.base_dist
        rssm = x.world_model.rssm
        rssm.gru.forward = lambda x, deter: deter.bfloat16()  # as autocast has it on a GPU
        assert rssm.gru_step(random_state(B), torch.randn(B, A)).dtype == torch.float32
    for value in (loss, *post.values(), *metrics.values(), normal.mean, normal.stddev):
        assert value.dtype == torch.float32


# explore


@pytest.mark.parametrize("scale", [0.3, 0.1])
def test_continuous_exploration_adds_gaussian_noise_and_clips(scale):
    args = make(expl_noise=scale).args
    torch.manual_seed(0)
    center = np.float32([[0.1, 0.95]]).repeat(COUNT, 0)
    action = dreamerv1.explore(torch.from_numpy(center), 0, args).numpy()
    assert action.dtype == np.float32
    assert action.shape == center.shape
    noise = (action - center) / scale
    assert action.max() == 1
    assert action.min() >= -1
    assert dreamerv1.explore(torch.from_numpy(-center), 0, args).min() == -1
    assert abs((action[:, 1] == 1).mean() - scipy.stats.norm.sf(0.05 / scale)) < 0.02
    inside = noise[np.abs(noise[:, 0]) < 0.9 / scale, 0]
    truncated = scipy.stats.truncnorm(-0.9 / scale, 0.9 / scale)
    assert scipy.stats.kstest(inside, truncated.cdf).pvalue > 1e-3
    below = (action < center).mean(0)
    assert np.abs(below - 0.5).max() < 0.02
    both = ((action < center).all(1)).mean()  # each action has noise of its own
    assert abs(both - 0.25) < 0.02


@pytest.mark.parametrize(("first", "last"), [(0.4, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("updates", [0, 50, 100, 200, 1000])
def test_random_actions_decay_linearly_and_then_stay_among_one_hot_ones(updates, first, last):
    options = {"expl_epsilon": first, "expl_min": last, "expl_decay": 200}
    args = make(discrete=True, **options).args
    torch.manual_seed(0)
    epsilon = first + (last - first) * min(updates / 200, 1)
    greedy = np.eye(3, dtype=np.float32)[np.arange(COUNT) % 2]  # never action 2
    action = dreamerv1.explore(torch.from_numpy(greedy), updates, args).numpy()
    assert action.dtype == np.float32
    assert action.shape == (COUNT, 3)
    assert sorted(np.unique(action)) == [0, 1]
    assert (action.sum(-1) == 1).all()
    # 5 standard deviations and more; a third of the random actions is the greedy one
    for taken in (0, 1):
        share = action[greedy[:, taken] == 1].mean(0)
        expected = np.full(3, epsilon / 3)
        expected[taken] += 1 - epsilon
        assert np.abs(share - expected).max() < 0.025


# policy


def row_of(batch, t):
    return {k: v[t] for k, v in batch.items()}


@pytest.mark.parametrize("sample", [True, False])
def test_actions_are_sampled_or_the_mode_and_the_latent_is_sampled_in_both(sample, monkeypatch):
    x, batch, stochs = make(), make_batch(), set()
    row, start = row_of(batch, 0), x.world_model.rssm.initial(B)
    monkeypatch.setattr(dreamerv1.TanhNormal, "rsample", lambda self: torch.full((B, A), 0.2))
    monkeypatch.setattr(dreamerv1.TanhNormal, "mode", torch.full((B, A), 0.7))
    for _ in range(5):
        action, state = dreamerv1.policy(x.agent, row, start, sample)
        assert (action == (0.2 if sample else 0.7)).all()
        stochs.add(tuple(state["stoch"].flatten().tolist()))
        assert action.dtype == torch.float32
        assert {k: v.shape for k, v in state.items()} == {"deter": (B, D), "stoch": (B, S)}
        assert not any(v.requires_grad for v in state.values())
    assert len(stochs) == 5
    assert (dreamerv1.policy(x.agent, row, start)[0] == 0.2).all()


@pytest.mark.usefixtures("no_noise")
def test_acting_row_by_row_gives_the_states_of_learning_and_is_first_resets_them():
    x, batch = make(SHAPES), make_batch(SHAPES)
    state = x.world_model.rssm.initial(B)
    post, _ = observe(x, batch)  # sequence 1 has a reset at row 5
    for t in range(T):
        action, state = dreamerv1.policy(x.agent, row_of(batch, t), state)
        for key in ("deter", "stoch"):
            close(state[key], post[key][t].detach(), atol=1e-5)
        dist = x.actor(x.world_model.rssm.feat(state)).base_dist.base_dist
        close(action, torch.tanh(dist.mean).detach(), atol=1e-5)
    fresh = {k: v[1:2] for k, v in row_of(batch, 5).items()}
    _, reset = dreamerv1.policy(x.agent, fresh, x.world_model.rssm.initial(1))
    close(reset["deter"], post["deter"][5, 1:2].detach(), atol=1e-5)
