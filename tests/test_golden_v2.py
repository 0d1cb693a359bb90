"""Parity with the authors' code on fixed weights: losses, states, rollouts, returns, gradients."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import dreamerv2

GOLDEN = Path(__file__).parent / "golden"
CASES = ["dreamerv2_discrete", "dreamerv2_continuous", "dreamerv2_vector_and_image"]


def our_name(name):
    """The authors' name of a weight, encoder.conv0.weight, as ours: encoder.conv.0.0.weight."""
    module, layer, kind = name.split(".")
    where = "" if module in ("actor", "critic", "slow_critic") else "world_model."
    index = re.search(r"\d*$", layer).group()
    if module == "rssm":
        layer = {
            "img_in": "img_in.0",
            "img_out": "img_out.0.0",
            "img_dist": "img_out.1",
            "obs_out": "obs_out.0.0",
            "obs_dist": "obs_out.1",
        }.get(layer, layer)
    elif module == "decoder":
        layer = {
            "conv0": "conv.0.0",
            "conv1": "conv.1.0",
            "conv2": "conv.2.0",
            "conv3": "conv.3",
            "mlp_out": "mlp.1",
        }.get(layer, layer if layer == "linear" else f"mlp.0.{index}.0")
    elif index:
        layer = f"conv.{index}.0" if "conv" in layer else f"mlp.{index}.0"
    return f"{where}{module}.{layer}.{kind}"


def mlp_of(inputs, sizes):
    pairs = zip([inputs, *sizes[:-1]], sizes, strict=True)
    return nn.Sequential(*(nn.Sequential(nn.Linear(i, o), nn.ELU()) for i, o in pairs))


def golden_agent(figures, config):
    """Our agent with the sizes and weights of a case; no preset has heads of such sizes."""
    data = {k: v for k, v in figures.items() if k.startswith("data/")}
    keys = ("image", "vector", "action")
    shapes = {k: data[f"data/{k}"].shape[2:] for k in keys if f"data/{k}" in data}
    c = SimpleNamespace(**config)
    same = """deter hidden stoch classes cnn_depth kl_scale kl_balance free_nats free_avg gamma
        discount_scale discount_lambda actor_entropy actor_dist actor_grad actor_grad_mix"""
    args = dreamerv2.Args(
        **{name: config[name] for name in same.split()},
        units=c.encoder_mlp[-1],
        layers=1,
        imag_horizon=c.horizon,
        discount_head="weight/discount.out.bias" in figures,
        reward_transform={"tanh": "tanh", "identity": "none"}[c.reward_transform],
    )
    agent = dreamerv2.make_agent(shapes, args)
    model, feat = agent["world_model"], agent["world_model"].rssm.feat_size
    if "vector" in shapes:
        size = shapes["vector"][0]
        model.encoder.mlp = mlp_of(size, c.encoder_mlp)
        model.decoder.mlp = nn.Sequential(
            mlp_of(feat, c.decoder_mlp), nn.Linear(c.decoder_mlp[-1], size)
        )
    heads = {
        "actor": agent["actor"],
        "critic": agent["critic"],
        "slow_critic": agent["slow_critic"],
    }
    heads |= {"reward": model.reward, "discount": model.discount}
    for name, head in heads.items():
        if head is not None:
            layers = getattr(c, f"{name.removeprefix('slow_')}_layers")
            units = getattr(c, f"{name.removeprefix('slow_')}_units")
            head.mlp = mlp_of(feat, [units] * layers)
            for out in {"out", "std"} & set(dict(head.named_children())):
                setattr(head, out, nn.Linear(units, getattr(head, out).out_features))
    weights = {
        our_name(k.removeprefix("weight/")): v
        for k, v in figures.items()
        if k.startswith("weight/")
    }
    agent.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=True)
    return agent, args


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """The figures of a case beside what our code computes, every sample replaced by the mode."""
    figures = dict(np.load(GOLDEN / f"{request.param}.npz", allow_pickle=False))
    agent, args = golden_agent(figures, json.loads(str(figures["config"])))
    monkeypatch.setattr(
        torch.Tensor, "exponential_", lambda x: x.fill_(1.0)
    )  # Gumbel noise 0: the argmax

    def trunc_normal_mode(self):
        return self.mode + (self.mode.clamp(-1 + 1e-6, 1 - 1e-6) - self.mode).detach()

    monkeypatch.setattr(dreamerv2.TruncNormal, "rsample", trunc_normal_mode)
    batch = {
        k.removeprefix("data/"): torch.from_numpy(v)
        for k, v in figures.items()
        if k.startswith("data/")
    }
    model, actor, critic, slow_critic = agent.values()
    ours = {}
    returns = dreamerv2.lambda_return
    imagine = model.rssm.imagine

    def keep_return(*a):
        ours["imag/reward"], ours["imag/slow_value"] = a[0], torch.cat([a[1], a[3][None]])
        ours["imag/discount"], ours["imag/target"] = a[2], returns(*a)
        return ours["imag/target"]

    def keep_imagined(*a):
        states, action = imagine(*a)
        ours["imag/feat"], ours["imag/action"] = model.rssm.feat(states), action
        return states, action

    monkeypatch.setattr(dreamerv2, "lambda_return", keep_return)
    monkeypatch.setattr(model.rssm, "imagine", keep_imagined)
    loss, post, metrics = model.loss(batch)
    loss.backward()
    actor_loss, critic_loss, more = dreamerv2.behavior_loss(
        model, actor, critic, slow_critic, post, batch["is_terminal"], args
    )
    (actor_loss + critic_loss).backward()
    first = torch.cat([torch.ones_like(batch["is_first"][:1]), batch["is_first"][1:]])
    with torch.no_grad():
        _, prior = model.rssm.observe(model.encoder(batch), batch["action"], first)
    ours |= {f"post/{k}": v for k, v in post.items()} | {f"prior/{k}": v for k, v in prior.items()}
    return SimpleNamespace(
        figures=figures, agent=agent, args=args, ours=ours, metrics=metrics | more
    )


def distance(ours, theirs):
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(a.reshape(b.shape) - b) / max(np.linalg.norm(b), 1e-12)


def test_losses_equal_the_authors(case):
    figures, metrics = case.figures, {k: float(v) for k, v in case.metrics.items()}
    constant = 0.5 * np.log(2 * np.pi)
    sizes = (
        sum(
            np.prod(figures[f"data/{k}"].shape[2:])
            for k in ("image", "vector")
            if f"data/{k}" in figures
        )
        + 1
    )
    assert distance(metrics["losses/model"] + sizes * constant, figures["loss/model"]) < 1e-5
    for name in ("reward", "image", "vector"):
        if f"loss/{name}_minus_constant" in figures:
            assert (
                distance(metrics[f"losses/{name}"], figures[f"loss/{name}_minus_constant"]) < 1e-5
            ), name
    for name in ("kl", "discount", "actor"):
        if f"loss/{name}" in figures:
            assert distance(metrics[f"losses/{name}"], figures[f"loss/{name}"]) < 1e-5, name
    weight = figures["imag/weight"][:-1].mean()
    assert distance(metrics["losses/critic"] + constant * weight, figures["loss/critic"]) < 1e-5
    assert distance(metrics["model/kl"], figures["loss/kl_value"]) < 1e-5
    assert distance(metrics["imag/actor_entropy"], figures["imag/actor_entropy_mean"]) < 1e-5


def test_latent_states_equal_the_authors(case):
    for name in ("post/deter", "post/logit", "post/stoch", "prior/logit"):
        assert distance(case.ours[name].detach(), case.figures[name]) < 1e-5, name


def test_imagined_rollouts_and_returns_equal_the_authors(case):
    for name in ("imag/feat", "imag/action", "imag/slow_value", "imag/target"):
        assert distance(case.ours[name].detach(), case.figures[name]) < 1e-5, name
    for name in ("imag/reward", "imag/discount"):  # the last one is never used
        assert distance(case.ours[name].detach(), case.figures[name][:-1]) < 1e-5, name


def test_every_gradient_equals_the_authors(case):
    parameters = dict(case.agent.named_parameters())
    names = [k for k in case.figures if k.startswith("grad/")]
    assert len(names) == len([k for k in parameters if not k.startswith("slow_critic")])
    for name in names:
        ours = parameters[our_name(name.removeprefix("grad/"))].grad
        assert distance(ours, case.figures[name]) < 1e-4, name


def test_gradient_norms_equal_the_authors(case):
    for key, name in (("world_model", "model"), ("actor", "actor"), ("critic", "critic")):
        norm = torch.linalg.vector_norm(
            torch.stack([p.grad.norm() for p in case.agent[key].parameters()])
        )
        assert distance(norm, case.figures[f"grad_norm/{name}"]) < 1e-5, name
