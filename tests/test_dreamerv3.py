"""What only DreamerV3 has: networks, losses, schedule and optimizer, beyond the parity tests."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.agents import (
    A, B, C, D, K, N, S, T, close, copied, make, make_batch, make_optimizers, observe,
    one_update, random_state, update,
)  # fmt: skip
from torch import nn

import common
import dreamerv3

BOTH = ("image", "vector")


def v3(keys=("vector",), discrete=True, **options):
    return make(dreamerv3, keys, discrete, **options)


# Networks


def sized(size, shapes, discrete):
    args = dreamerv3.Args(size=size)
    dreamerv3.resolve_auto(args, torch.device("cpu"), discrete)
    with torch.device("meta"):
        agent = dreamerv3.make_agent(shapes, args)

    def count(part):
        return sum(p.numel() for p in part.parameters() if p.requires_grad)

    model = agent["world_model"]
    counts = [count(part) for part in (model.encoder, model.rssm, model.decoder, agent["actor"])]
    heads = [count(part) for part in (model.reward, model.discount, agent["critic"])]
    return counts, heads, count(agent)


@pytest.mark.parametrize(("size", "shapes", "discrete", "counts", "total"), [
    ("1m", {"vector": (24,), "action": (6,)}, False, [10112, 364416, 51096, 50316], 640_867),
    ("1m", {"image": (3, 64, 64), "action": (17,)}, True, [14812, 377408, 81103, 50641], 688_891),
    ("1m", {"vector": (4,), "action": (2,)}, True, [8832, 364160, 49796, 49666], 637_381),
    ("12m", {"vector": (24,), "action": (6,)}, False,
     [138752, 5783040, 794136, 791052], 9_738_019),
    ("12m", {"image": (3, 64, 64), "action": (6,)}, False,
     [232048, 5979648, 1283635, 791052], 10_517_422),
    ("12m", {"image": (3, 64, 64), "action": (17,)}, True,
     [232048, 5982464, 1283635, 792337], 10_521_523),
    ("200m", {"image": (3, 64, 64), "action": (18,)}, True,
     [3692992, 95496192, 20482243, 12607506], 166_367_380),
])  # fmt: skip
def test_the_networks_have_as_many_parameters_as_the_authors(size, shapes, discrete, counts, total):
    ours, heads, all_of_them = sized(size, shapes, discrete)
    assert ours == counts
    assert heads == {
        "1m": [57663, 41153, 66111], "12m": [721407, 656129, 853503],
        "200m": [10749183, 10488833, 12850431],
    }[size]  # fmt: skip
    assert all_of_them == total


def test_weights_have_the_variance_of_one_over_the_inputs_and_some_outputs_begin_small():
    x = v3(BOTH, discrete=False, deter=64, hidden=48, units=96, cnn_depth=8, blocks=4)
    zero = {"world_model.reward.out", "critic.out", "slow_critic.out"}
    small = {"actor.out": 0.01, "actor.std": 0.01, "world_model.decoder.mlp.1": 0.1}
    checked = 0
    for name, layer in x.agent.named_modules():
        if not hasattr(layer, "bias") or layer.bias is None:
            continue
        assert not layer.bias.any(), name
        if name in zero:
            assert not layer.weight.any(), name
            continue
        weight = layer.weight.detach()
        inputs = weight[0].numel()  # of Linear and Conv2d
        if isinstance(layer, nn.ConvTranspose2d):
            inputs = weight.shape[0] * 25
        if isinstance(layer, dreamerv3.BlockLinear):
            inputs = weight.shape[0] * weight.shape[2]
        std = small.get(name, 1.0) / math.sqrt(inputs)
        assert weight.abs().max() <= 2.274 * std, name
        if weight.numel() > 1500:
            assert weight.std() == pytest.approx(std, rel=0.06), name
            checked += 1
    assert checked > 10
    norms = [m for m in x.agent.modules() if isinstance(m, dreamerv3.RMSNorm)]
    assert all((norm.weight == 1).all() for norm in norms)


def test_the_encoder_halves_images_and_the_decoder_doubles_them():
    x = v3(BOTH)
    batch = make_batch(BOTH, discrete=True)
    sizes = []
    for layer in x.world_model.encoder.conv:
        layer.register_forward_hook(lambda m, i, out: sizes.append(out.shape[-1]))
    for layer in x.world_model.decoder.conv:
        layer.register_forward_hook(lambda m, i, out: sizes.append(out.shape[-1]))
    post, _ = observe(x, batch)
    recon = x.world_model.decoder(x.rssm.feat(post))
    assert sizes == [64, 32, 16, 8, 4, 8, 16, 32, 64, 64]
    assert recon["image"].shape == (T, B, C, 64, 64)
    assert recon["image"].min() > -0.5
    assert recon["image"].max() < 0.5


def test_a_norm_is_that_of_the_root_mean_square_over_units_or_channels():
    dense = dreamerv3.RMSNorm(5, channels_first=False)
    dense.weight.data = torch.arange(1.0, 6)
    x = torch.randn(3, 5)
    close(dense(x), x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * dense.weight)
    images = dreamerv3.RMSNorm(5, channels_first=True)
    x = torch.randn(3, 5, 4, 2)
    close(images(x), x / (x.square().mean(1, keepdim=True) + 1e-4).sqrt())


def test_each_block_of_a_block_linear_sees_its_slice_alone():
    layer = dreamerv3.BlockLinear(6, 4, 2)
    dreamerv3.init(layer)
    x = torch.randn(7, 3, 6)
    out = layer(x)
    assert out.shape == (7, 3, 4)
    for g in range(2):
        part = x[..., 3 * g : 3 * g + 3] @ layer.weight[g].T
        close(out[..., 2 * g : 2 * g + 2], part)


# States


def test_features_are_deter_then_stoch_and_no_class_is_impossible():
    x = v3()
    post, prior = observe(x, make_batch(discrete=True))
    assert post["deter"].shape == (T, B, D)
    assert post["stoch"].shape == (T, B, S * K)
    feat = x.rssm.feat(post)
    assert torch.equal(feat[..., :D], post["deter"])
    assert torch.equal(feat[..., D:], post["stoch"])
    for stats in (post, prior):
        assert stats["logit"].exp().min() >= 0.01 / K - 1e-6
        close(stats["logit"].exp().sum(-1), torch.ones(T, B, S))
    x.actor.out.bias.data[0] = 100.0
    assert x.actor(feat).probs.min() >= 0.01 / A - 1e-6


def test_large_actions_are_scaled_down_for_the_model_and_stored_as_they_are():
    x = v3(discrete=False)
    state = random_state(x, B)
    one = torch.tensor([1.0, -1.0, 0.5]).expand(B, A)
    many = torch.tensor([7.0, -1.5, 0.5]).expand(B, A)
    close(x.rssm.gru_step(state, one), x.rssm.gru_step(state, many))


def test_a_window_goes_on_from_a_state_or_begins_with_zeros():
    x = v3()
    batch = make_batch(discrete=True)
    embed = x.world_model.encoder(batch)
    begun = {"deter": torch.zeros(B, D), "stoch": torch.zeros(B, S * K)}
    torch.manual_seed(0)
    without, _ = x.rssm.observe(embed, batch["action"], batch["is_first"])
    first = batch["is_first"].clone()
    first[0] = 1
    start = random_state(x, B)
    torch.manual_seed(0)
    zeros, _ = x.rssm.observe(embed, batch["action"], first, start)
    assert torch.equal(without["deter"], zeros["deter"])
    torch.manual_seed(0)
    given, _ = x.rssm.observe(embed, batch["action"], batch["is_first"], begun)
    assert not torch.equal(given["deter"][0], without["deter"][0])  # the first action counts


# Losses


def losses_of(x, batch):
    """Model, actor, critic and replay critic loss."""
    agent, args = x.agent, x.args
    model_loss, post, _ = x.world_model.loss(batch)
    actor_loss, critic_loss, ret, _ = dreamerv3.behavior_loss(
        x.world_model, x.actor, x.critic, x.slow_critic, agent["return_range"], post,
        batch["is_terminal"], args,
    )  # fmt: skip
    replay = dreamerv3.replay_critic_loss(
        x.rssm, x.critic, x.slow_critic, post, ret, batch, args
    )  # fmt: skip
    return SimpleNamespace(model=model_loss, actor=actor_loss, critic=critic_loss, replay=replay)


def trained_by(loss, agent):
    """The networks to which a loss has a gradient."""
    agent.zero_grad()
    loss.backward(retain_graph=True)
    return {
        name for name, part in agent.items()
        if any(p.grad is not None and p.grad.any() for p in part.parameters())
    }  # fmt: skip


@pytest.mark.parametrize("discrete", [True, False])
def test_each_loss_trains_its_own_networks_and_the_replay_critic_the_model_too(discrete):
    x = v3(discrete=discrete)
    for layer in (x.critic.out, x.slow_critic.out, x.world_model.reward.out):
        nn.init.normal_(layer.weight, std=0.1)
    losses = losses_of(x, make_batch(discrete=discrete))
    assert trained_by(losses.model, x.agent) == {"world_model"}
    assert trained_by(losses.actor, x.agent) == {"actor"}
    assert trained_by(losses.critic, x.agent) == {"critic"}
    assert trained_by(losses.replay, x.agent) == {"critic", "world_model"}


def test_an_update_adds_all_losses_and_moves_all_that_is_trained():
    x = v3(BOTH, lr=0.01, warmup=1)
    batch = make_batch(BOTH, discrete=True)
    optimizer = make_optimizers(x)
    before = copied(x.agent.state_dict())
    torch.manual_seed(1)
    metrics = update(x, batch, optimizer)
    after = x.agent.state_dict()
    still = [k for k in before if torch.equal(before[k], after[k])]
    assert set(before) - set(still) <= {"return_range.range"}  # the first step has rate 0
    total = metrics["losses/model"] + metrics["losses/actor"] + metrics["losses/critic"]
    close(metrics["losses/total"], total + 0.3 * metrics["losses/replay_critic"])
    update(x, batch, optimizer)
    update(x, batch, optimizer)
    still = [k for k in before if torch.equal(before[k], x.agent.state_dict()[k])]
    assert still
    assert all(k.startswith("slow_critic") or k.endswith("bins") for k in still), still


def test_a_kl_of_less_than_the_free_nats_in_a_step_has_no_gradient():
    x = v3(free_nats=1.0)
    batch = make_batch(discrete=True)
    post, prior = observe(x, batch)
    kl = x.rssm.kl(post, prior)
    assert (kl < 1).any()
    loss, _, metrics = x.world_model.loss(batch)
    assert metrics["losses/dyn"] >= 1
    x.args.free_nats = kl.max().item() + 10
    loss, _, metrics = x.world_model.loss(batch)
    assert metrics["losses/dyn"] == pytest.approx(x.args.free_nats)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in x.rssm.img_out.parameters())


def test_without_a_share_of_the_uniform_a_probability_may_vanish():
    logit = torch.tensor([0.0, 200.0, -300.0], requires_grad=True)
    dist = dreamerv3.OneHot(dreamerv3.unimix(logit, 0.0))
    dist.entropy().backward()
    assert dist.entropy() == 0
    assert logit.grad.isfinite().all()


def test_the_return_is_normalised_by_a_range_of_at_least_one():
    for rate, low, high, scale in ((1.0, 0, 0.5, 1), (1.0, -100, 100, 180), (0.01, 0, 1000, 9)):
        returns = dreamerv3.ReturnRange(rate)
        returns.update(torch.linspace(low, high, 101))
        assert returns.scale() == pytest.approx(scale)


def test_the_replay_critic_learns_nothing_from_the_last_row_of_an_episode(monkeypatch):
    x = v3()
    batch = make_batch(discrete=True)  # an episode ends in row 2 of sequence 1
    post, _ = observe(x, batch)
    errors = torch.zeros(T - 1, B, requires_grad=True)
    seen = {}

    def error(critic, feat, ret, slow_value, args):
        seen["ret"] = ret
        return errors

    monkeypatch.setattr(dreamerv3, "critic_error", error)
    ret = torch.arange(float(N))
    loss = dreamerv3.replay_critic_loss(
        x.rssm, x.critic, x.slow_critic, post, ret, batch, x.args
    )  # fmt: skip
    loss.backward()
    weights = errors.grad * errors.numel()
    assert weights[2, 1] == 0
    assert weights.sum() == errors.numel() - 1
    # Row 1 of that sequence gets the reward of the terminal row and nothing of what follows it.
    assert seen["ret"][1, 1] == batch["reward"][2, 1]


@pytest.mark.usefixtures("smooth")
@pytest.mark.parametrize("discrete", [True, False])
def test_losses_in_bfloat16_are_close_and_statistics_in_float32(discrete):
    full = one_update(dreamerv3, discrete)
    half = one_update(dreamerv3, discrete, precision="bfloat16")
    assert half != full
    for key in ("model", "vector", "reward", "discount", "dyn", "critic", "replay_critic"):
        assert math.isclose(half[f"losses/{key}"], full[f"losses/{key}"], rel_tol=0.03), key
    x = v3(BOTH, discrete=discrete)
    batch = make_batch(BOTH, discrete=discrete)
    with torch.autocast("cpu", torch.bfloat16):
        loss, post, metrics = x.world_model.loss(batch)
        feat = x.rssm.feat(post)
        policy = x.actor(feat)
        spread = policy.logp if discrete else policy.stddev
        values = (loss, spread, x.critic(feat), *post.values(), *metrics.values())
    assert all(value.dtype == torch.float32 for value in values)


@pytest.mark.parametrize("discrete", [True, False])
def test_last_layers_of_heads_and_actor_are_in_float32_under_bfloat16(discrete):
    x = v3(discrete=discrete)
    nn.init.normal_(x.critic.out.weight)
    nn.init.normal_(x.actor.out.weight)
    feat = torch.randn(5, x.rssm.feat_size)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = x.critic.mlp(feat), x.actor.mlp(feat)
        logits = x.critic.logits(feat)
        policy = x.actor(feat)
    assert torch.equal(logits, x.critic.out(hidden[0].float()))
    out = x.actor.out(hidden[1].float())
    if discrete:
        assert torch.equal(policy.logit, dreamerv3.unimix(out, x.args.unimix))
    else:
        assert torch.equal(policy.mean, torch.tanh(out))


def test_a_resumed_optimizer_keeps_its_count_where_the_weights_are():
    weight = nn.Parameter(torch.ones(3, device="meta"))
    saved = {"step": torch.tensor(7.0), "square": torch.ones(3), "momentum": torch.ones(3)}
    optimizer = dreamerv3.LaProp([weight], 1e-3, 0.3, 10)
    state = optimizer.state_dict() | {"state": {0: saved}}
    optimizer.load_state_dict(state)
    assert {value.device.type for value in optimizer.state[weight].values()} == {"meta"}


# Acting and schedule


@pytest.mark.parametrize(("num_envs", "batch", "length"), [(1, 8, 32), (16, 16, 64), (3, 8, 5)])
def test_learning_begins_with_as_many_windows_as_a_batch_has(num_envs, batch, length, tmp_path):
    args = dreamerv3.Args(num_envs=num_envs, batch_size=batch, batch_length=length)
    rows = dreamerv3.first_update(args) // num_envs
    assert (rows - length + 1) * num_envs >= batch
    assert (rows - length) * num_envs < batch
    assert dreamerv3.updates_owed(dreamerv3.first_update(args) - 1, args) == 0
    assert dreamerv3.updates_owed(dreamerv3.first_update(args), args) == 1


def test_the_ratio_counts_the_replayed_steps_per_step():
    args = dreamerv3.Args(num_envs=1, train_ratio=32)  # batches of 1024 steps
    first = dreamerv3.first_update(args)
    assert [dreamerv3.updates_owed(first + n, args) for n in (31, 32, 63, 64)] == [1, 2, 2, 3]
    args.train_ratio = 2048
    assert [dreamerv3.updates_owed(first + n, args) for n in (1, 2, 3)] == [3, 5, 7]


def test_sizes_follow_from_one_flag_and_from_those_that_are_given():
    args = dreamerv3.Args(size="12m", units=100)
    dreamerv3.resolve_auto(args, torch.device("cpu"), discrete=True)
    assert (args.deter, args.hidden, args.units, args.classes, args.cnn_depth) == (
        2048, 256, 100, 16, 16,
    )  # fmt: skip
    assert args.actor_dist == "onehot"


@pytest.mark.parametrize(
    ("device", "native", "precision"),
    [("cpu", None, "float32"), ("cuda", True, "bfloat16"), ("cuda", False, "float32")],
)
def test_auto_is_bfloat16_where_a_gpu_has_it(device, native, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    args = dreamerv3.Args()
    dreamerv3.resolve_auto(args, torch.device(device), discrete=False)
    assert (args.precision, args.actor_dist) == (precision, "normal")


def test_the_slow_critic_begins_as_a_copy_and_goes_a_share_of_the_way_in_each_update():
    x = v3(BOTH, lr=0.01, warmup=1, slow_rate=0.1)
    batch = make_batch(BOTH, discrete=True)
    optimizer = make_optimizers(x)
    slow = nn.utils.parameters_to_vector(x.slow_critic.parameters())
    assert torch.equal(slow, nn.utils.parameters_to_vector(x.critic.parameters()))
    for _ in range(3):
        update(x, batch, optimizer)
        critic = nn.utils.parameters_to_vector(x.critic.parameters()).detach()
        slow = 0.9 * slow + 0.1 * critic
        close(nn.utils.parameters_to_vector(x.slow_critic.parameters()), slow)
    assert (slow - critic).abs().max() > 1e-3


# Fresh windows


def numbered(num_envs, rows, folder, capacity=1000):
    """A replay whose rewards say row and environment: 100 * row + environment."""
    shapes = {"reward": (), "is_first": ()}
    folder.mkdir(exist_ok=True)
    replay = common.Replay(folder, capacity, shapes, num_envs, torch.device("cpu"))
    fill(replay, range(rows))
    return replay


def fill(replay, rows):
    for row in rows:
        reward = 100.0 * row + np.arange(replay.num_envs)
        replay.add({"reward": reward, "is_first": np.zeros(replay.num_envs)})


def test_fresh_windows_come_first_each_once(tmp_path):
    replay = numbered(2, 17, tmp_path)
    first = replay.sample(4, 5, fresh_first=True)["reward"][0].tolist()
    assert first == [0, 1, 500, 501]
    second = replay.sample(4, 5, fresh_first=True)["reward"][0].tolist()
    assert second[:2] == [1000, 1001]  # the last two are drawn from all
    fill(replay, range(17, 20))
    assert replay.sample(2, 5, fresh_first=True)["reward"][0].tolist() == [1500, 1501]
    assert replay.state_dict()["taken"] == 8
    assert replay.sample(2, 5)["reward"].shape == (5, 2)


def test_fresh_windows_that_were_overwritten_are_left_out(tmp_path):
    replay = numbered(1, 57, tmp_path, capacity=20)
    assert replay.sample(2, 5, fresh_first=True)["reward"][0].tolist() == [4000, 4500]
    assert replay.sample(2, 5, fresh_first=True)["reward"][0, 0] == 5000


def test_a_resumed_replay_goes_on_with_the_fresh_windows(tmp_path):
    replay = numbered(1, 23, tmp_path / "a")
    replay.sample(2, 5, fresh_first=True)
    state = replay.state_dict()
    again = numbered(1, 23, tmp_path / "b")
    again.load_state_dict(state)
    assert again.sample(1, 5, fresh_first=True)["reward"][0, 0] == 1000
