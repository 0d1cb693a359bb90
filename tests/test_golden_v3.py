"""Parity of DreamerV3 with the authors' code on fixed weights: losses, states, dreams, returns,
gradients and three updates.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributions as td
from torch import nn

import dreamerv3

GOLDEN = Path(__file__).parent / "golden"
CASES = ["dreamerv3_discrete_image", "dreamerv3_continuous_vector", "dreamerv3_both"]
UNITS = dict(np.load(GOLDEN / "dreamerv3_units.npz"))
LAYERS = {  # the authors' layers and ours; a layer's norm lies one further
    "rssm": {
        "deter_in": "deter_in.0", "stoch_in": "stoch_in.0", "action_in": "action_in.0",
        "gru_in0": "gru_in.0", "gru": "gru", "img_out0": "img_out.0.0",
        "img_out1": "img_out.1.0", "img_dist": "img_out.2", "obs_out0": "obs_out.0.0",
        "obs_dist": "obs_out.1",
    },
    "decoder": {
        "deter": "deter_in", "stoch0": "stoch_in.0.0", "stoch1": "stoch_in.1",
        "space_norm": "norm.0", "conv4": "conv.4", "mlp_out": "mlp.1", "mlp0": "mlp.0.0.0",
        "mlp1": "mlp.0.1.0", "mlp2": "mlp.0.2.0",
    },
}  # fmt: skip


def our_name(name):
    """The authors' name of a weight, encoder.conv1.weight, as ours: encoder.conv.1.1.weight."""
    module, layer, kind = name.split(".")
    where = "" if module in ("actor", "critic", "slow_critic") else "world_model."
    norm = layer.endswith("_norm") and layer != "space_norm"
    layer = layer.removesuffix("_norm") if norm else layer
    index = re.search(r"\d*$", layer).group()
    known = LAYERS.get(module, {}).get(layer)
    if known is None and index:
        kind_of = "conv" if layer.startswith("conv") else "mlp"
        known = f"{kind_of}.{index}.0"
    layer = known or layer
    if norm:
        layer, _, last = layer.rpartition(".")
        layer = f"{layer}.{int(last) + 1}"
    return f"{where}{module.replace('cont', 'discount')}.{layer}.{kind}"


def starting_with(prefix, figures):
    """The figures whose name begins with the prefix, under the rest of the name."""
    return {k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)}


def golden_agent(figures, config):
    """Our agent with the sizes and weights of a case, its args and its optimizer."""
    data = starting_with("data/", figures)
    shapes = {k: data[k].shape[2:] for k in ("image", "vector", "action") if k in data}
    fields = set(vars(dreamerv3.Args()))
    args = dreamerv3.Args(**{k: v for k, v in config.items() if k in fields})
    c = SimpleNamespace(**config)
    args.layers = c.dense_layers
    args.gamma = 1 - 1 / c.horizon
    args.discount_lambda = c.return_lambda
    args.replay_critic = c.replay_critic_scale
    args.slow_scale = c.slow_reg
    args.return_rate = c.retnorm_rate
    assert (c.reward_layers, c.cont_layers, c.actor_layers, c.critic_layers) == (1, 1, 3, 3)
    assert (c.decoder_blocks, c.actor_unimix, c.bins) == (c.blocks, c.unimix, 255)
    agent = dreamerv3.make_agent(shapes, args)
    weights = starting_with("weight/", figures)
    state = agent.state_dict()
    given = {our_name(k): torch.from_numpy(v) for k, v in weights.items()}
    buffers = {k for k in state if k.endswith(("bins", "range"))}
    assert given.keys() == state.keys() - buffers
    agent.load_state_dict(state | given)
    agent["return_range"].range.copy_(torch.from_numpy(figures["retnorm/before"]))
    return agent, args


@pytest.fixture(params=CASES)
def case(request, no_noise, monkeypatch):
    """The figures of a case and our agent; one-hots are the mode, actions mean + 0.5 std."""
    monkeypatch.setattr(td.Normal, "rsample", lambda self, shape=(): self.loc + 0.5 * self.scale)
    figures = dict(np.load(GOLDEN / f"{request.param}.npz", allow_pickle=False))
    agent, args = golden_agent(figures, json.loads(str(figures["config"])))
    data = starting_with("data/", figures)
    batch = {k: torch.from_numpy(v) for k, v in data.items() if not k.startswith("context_")}
    batch.pop("is_last")  # follows from is_first
    start = {"deter": data["context_deter"], "stoch": data["context_stoch"]}
    start = {k: torch.from_numpy(v) for k, v in start.items()}
    start["stoch"] = start["stoch"].flatten(1)
    return SimpleNamespace(figures=figures, agent=agent, args=args, batch=batch, start=start)


@pytest.fixture
def learned(case, monkeypatch):
    """What an update computes before its step, with gradients and what the losses saw."""
    agent, args, batch = case.agent, case.args, case.batch
    seen = {"returns": []}
    returns = dreamerv3.lambda_return
    error = dreamerv3.critic_error
    imagine = agent["world_model"].rssm.imagine

    def keep_return(reward, next_value, disc, lambda_):
        seen["returns"].append(returns(reward, next_value, disc, lambda_))
        seen.setdefault("reward", reward)
        seen.setdefault("next_value", next_value)
        seen.setdefault("cont", disc)
        return seen["returns"][-1]

    def keep_imagined(*inputs):
        seen["feat"], seen["action"] = imagine(*inputs)
        return seen["feat"], seen["action"]

    def keep_error(*inputs):
        seen.setdefault("errors", []).append(error(*inputs))
        return seen["errors"][-1]

    monkeypatch.setattr(dreamerv3, "lambda_return", keep_return)
    monkeypatch.setattr(dreamerv3, "critic_error", keep_error)
    monkeypatch.setattr(agent["world_model"].rssm, "imagine", keep_imagined)
    with torch.no_grad():
        model = agent["world_model"]
        inputs = model.encoder(batch), batch["action"], batch["is_first"], case.start
        seen["post"], seen["prior"] = model.rssm.observe(*inputs)
        feat = model.rssm.feat(seen["post"])
        seen["recon"] = model.decoder(feat)
        seen["replay_value"] = agent["critic"](feat)
        seen["pred"] = {"reward": model.reward(feat), "cont": model.discount(feat).sigmoid()}
    optimizer = dreamerv3.make_optimizer(agent, args)
    seen["metrics"] = dreamerv3.update(agent, optimizer, batch, args, case.start)
    return SimpleNamespace(**vars(case), **seen)


def distance(ours, theirs):
    a = np.asarray(ours, np.float64)
    b = np.asarray(theirs, np.float64)
    return np.linalg.norm(a.reshape(b.shape) - b) / max(np.linalg.norm(b), 1e-12)


def test_losses_equal_the_authors(learned):
    figures = learned.figures
    names = {"cont": "discount"}
    losses = starting_with("loss/", figures)
    assert {"reward", "cont", "dyn", "rep", "actor", "critic", "replay_critic"} < set(losses)
    for name, theirs in losses.items():
        ours = float(learned.metrics[f"losses/{names.get(name, name)}"])
        if name == "actor":  # a signed mean may be near zero
            assert abs(ours - theirs) < 1e-5 * np.abs(figures["loss_each/actor"]).mean()
        else:
            assert distance(ours, theirs) < 1e-5, name


def test_states_and_predictions_equal_the_authors(learned):
    figures = learned.figures
    assert distance(learned.post["deter"], figures["post/deter"]) < 1e-5
    assert distance(learned.post["stoch"], figures["post/stoch"]) < 1e-5
    assert distance(learned.post["logit"], figures["post/logit"]) < 1e-5
    assert distance(learned.prior["logit"], figures["prior/logit"]) < 1e-5
    kl = learned.agent["world_model"].rssm.kl(learned.post, learned.prior)
    assert distance(kl, figures["kl"]) < 1e-5
    for name, recon in learned.recon.items():
        theirs = figures[f"recon/{name}"]
        ours = recon[: len(theirs)] + (0.5 if name == "image" else 0)  # theirs lie in [0, 1]
        assert distance(ours, theirs) < 1e-5, name
    for name, pred in learned.pred.items():
        assert distance(pred, figures[f"pred/{name}"]) < 1e-5, name
    assert distance(learned.replay_value, figures["replay/value"]) < 1e-5


def test_dreams_and_returns_equal_the_authors(learned):
    figures = learned.figures
    assert distance(learned.feat, figures["imag/feat"]) < 1e-5
    assert distance(learned.action[1:], figures["imag/action"][:-1]) < 1e-5
    assert distance(learned.reward, figures["imag/reward"][1:]) < 1e-5
    assert distance(learned.cont, figures["imag/cont"][1:]) < 1e-5
    assert distance(learned.next_value, figures["imag/value"][1:]) < 1e-5
    assert distance(learned.returns[0], figures["imag/return"]) < 1e-5
    assert distance(learned.returns[1], figures["replay/return"]) < 1e-5
    weight = torch.from_numpy(figures["imag/weight"][:-1])
    assert distance((weight * learned.errors[0]).detach(), figures["loss_each/critic"]) < 1e-5
    is_last = torch.from_numpy(figures["data/is_last"][:-1])
    replay = ((1 - is_last) * learned.errors[1]).detach()
    assert distance(replay, figures["loss_each/replay_critic"]) < 1e-5
    assert distance(learned.agent["return_range"].range, figures["retnorm/after"]) < 1e-5


def test_every_gradient_equals_the_authors(learned):
    parameters = dict(learned.agent.named_parameters())
    gradients = starting_with("grad/", learned.figures)
    assert len(gradients) == len([k for k in parameters if not k.startswith("slow_critic")])
    for name, theirs in gradients.items():
        assert distance(parameters[our_name(name)].grad, theirs) < 1e-4, name


def test_three_updates_equal_the_authors(case):
    figures, agent, args = case.figures, case.agent, case.args
    optimizer = dreamerv3.make_optimizer(agent, args)
    before = starting_with("weight/", figures)
    ours_before = {k: v.clone() for k, v in agent.state_dict().items()}
    for i in range(3):
        metrics = dreamerv3.update(agent, optimizer, case.batch, args, case.start)
        if i == 0:  # the authors' slow critic becomes a copy here, ours begins as one
            dreamerv3.follow(agent["slow_critic"], agent["critic"], 1.0)
        assert distance(float(metrics["losses/total"]), figures["updates/loss"][i]) < 1e-5
        assert distance(float(metrics["grad_norm"]), figures["updates/grad_norm"][i]) < 1e-4
        ours = {k: v.clone() for k, v in agent.state_dict().items()}
        after = before | starting_with(f"after{i + 1}/", figures)
        for name, theirs in after.items():
            mine = ours[our_name(name)]
            assert distance(mine, theirs) < 2e-5, (i, name)
            step = theirs - before[name]
            if np.abs(step).max() > 0 and not name.startswith("slow_critic"):
                assert distance(mine - ours_before[our_name(name)], step) < 2e-3, (i, name)
        before, ours_before = after, ours
        assert distance(agent["return_range"].range, figures["updates/retnorm"][i]) < 1e-5


def test_acting_equals_the_authors(case):
    figures, agent = case.figures, case.agent
    rssm = agent["world_model"].rssm
    state = rssm.initial(figures["data/reward"].shape[1])
    action = torch.zeros(figures["data/action"].shape[1:])
    for t in range(len(figures["data/reward"])):
        row = {k: v[t] for k, v in case.batch.items()} | {"action": action}
        row["is_first"] = torch.ones_like(row["is_first"]) if t == 0 else row["is_first"]
        action, state = dreamerv3.policy(agent, row, state)
        assert distance(action, figures["policy/action"][t]) < 1e-5
        assert distance(state["deter"], figures["policy/deter"][t]) < 1e-5
        stoch = state["stoch"].unflatten(-1, (rssm.stoch, rssm.classes)).argmax(-1)
        assert (stoch.numpy() == figures["policy/stoch"][t]).all()


# Single functions


def unit(name):
    return torch.from_numpy(UNITS[name])


def test_symlog_and_symexp_equal_the_authors():
    assert distance(dreamerv3.symlog(unit("symlog/x")), UNITS["symlog/symlog"]) < 1e-6
    x = unit("symlog/x").clamp(-20, 20)  # as far as the bins reach, the authors go no further
    assert distance(dreamerv3.symexp(x), UNITS["symlog/symexp"]) < 1e-5


def test_two_hot_predictions_equal_the_authors_for_extreme_targets():
    args = SimpleNamespace(units=3)
    head = dreamerv3.TwoHotHead(5, 1, args)
    assert distance(head.bins, UNITS["twohot/bins"]) < 1e-6
    logits = unit("twohot/logits").requires_grad_()
    loss = head.loss(logits, unit("twohot/target"))
    assert distance(loss.detach(), UNITS["twohot/loss"]) < 1e-5
    assert distance(head.mean(logits).detach(), UNITS["twohot/mean"]) < 1e-5
    loss.sum().backward()
    assert distance(logits.grad, UNITS["twohot/grad"]) < 1e-5


def test_mixed_categoricals_equal_the_authors():
    mixed = dreamerv3.unimix(unit("onehot/logit"), 0.01)
    assert distance(mixed, UNITS["onehot/mixed"]) < 1e-5
    p = dreamerv3.OneHot(mixed)
    q = dreamerv3.OneHot(dreamerv3.unimix(unit("onehot/other"), 0.01))
    assert distance(p.log_prob(unit("onehot/x")).sum(-1), UNITS["onehot/log_prob"]) < 1e-5
    assert distance(p.entropy().sum(-1), UNITS["onehot/entropy"]) < 1e-5
    kl = (p.probs * (p.logp - q.logp)).sum((-2, -1))
    assert distance(kl, UNITS["onehot/kl"]) < 1e-5


def test_gaussians_equal_the_authors():
    raw_mean, raw_std = unit("normal/raw_mean"), unit("normal/raw_std")
    args = dreamerv3.Args(units=3, layers=1, actor_dist="normal")
    actor = dreamerv3.Actor(4, raw_mean.shape[-1], args)
    actor.out.forward = lambda x: raw_mean
    actor.std.forward = lambda x: raw_std
    dist = actor(torch.zeros(*raw_mean.shape[:-1], 4))
    assert distance(dist.log_prob(unit("normal/x")), UNITS["normal/log_prob"]) < 1e-5
    assert distance(dist.entropy(), UNITS["normal/entropy"]) < 1e-5


def test_the_range_of_returns_equals_the_authors():
    returns = dreamerv3.ReturnRange(float(UNITS["norm/rate"]))
    for i, x in enumerate(unit("norm/x")):
        returns.update(x)
        assert distance(returns.scale(), UNITS["norm/scale"][i]) < 1e-5
        assert distance(returns.range, [UNITS["norm/low"][i], UNITS["norm/high"][i]]) < 1e-5


@pytest.mark.parametrize("name", ["big", "small", "plain", "blocks", "dead"])
def test_steps_of_the_optimizer_equal_the_authors(name):
    settings = json.loads(str(UNITS["opt/settings"]))
    weight = nn.Parameter(unit(f"opt/{name}/start"))
    optimizer = dreamerv3.LaProp([weight], settings["lr"], settings["agc"], settings["warmup"])
    for grad, after in zip(unit(f"opt/{name}/grad"), UNITS[f"opt/{name}/after"], strict=True):
        weight.grad = grad
        optimizer.step()
        assert distance(weight.detach(), after) < 1e-5
