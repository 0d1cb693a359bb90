"""Parity with the authors' code on fixed weights: losses, states, rollouts, returns, gradients."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import dreamerv1
import dreamerv2

GOLDEN = Path(__file__).parent / "golden"
CASES = ["dreamerv1_discrete", "dreamerv1_continuous"]
CASES += ["dreamerv2_discrete", "dreamerv2_continuous", "dreamerv2_vector_and_image"]
RSSM = {  # the authors' layers and ours
    "img_in": "img_in.0", "img_out": "img_out.0.0", "img_dist": "img_out.1",
    "obs_out": "obs_out.0.0", "obs_dist": "obs_out.1",
}  # fmt: skip
DECODER = {
    "linear": "linear", "mlp_out": "mlp.1",
    "conv0": "conv.0.0", "conv1": "conv.1.0", "conv2": "conv.2.0", "conv3": "conv.3",
}  # fmt: skip


def our_name(name):
    """The authors' name of a weight, encoder.conv0.weight, as ours: encoder.conv.0.0.weight."""
    module, layer, kind = name.split(".")
    where = "" if module in ("actor", "critic", "slow_critic") else "world_model."
    index = re.search(r"\d*$", layer).group()
    if module == "rssm":
        layer = RSSM.get(layer, layer)
    elif module == "decoder":
        layer = DECODER.get(layer, f"mlp.0.{index}.0")
    elif index:
        layer = f"conv.{index}.0" if "conv" in layer else f"mlp.{index}.0"
    return f"{where}{module}.{layer}.{kind}"


def mlp_of(inputs, sizes):
    pairs = zip([inputs, *sizes[:-1]], sizes, strict=True)
    return nn.Sequential(*(nn.Sequential(nn.Linear(i, o), nn.ELU()) for i, o in pairs))


def starting_with(prefix, figures):
    """The figures whose name begins with the prefix, under the rest of the name."""
    return {k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)}


def golden_agent(script, figures, config):
    """Our agent with the sizes and weights of a case; no preset has heads of such sizes."""
    data = starting_with("data/", figures)
    shapes = {k: data[k].shape[2:] for k in ("image", "vector", "action") if k in data}
    fields = set(vars(script.Args()))
    args = script.Args(**{k: v for k, v in config.items() if k in fields})
    c = SimpleNamespace(**config)
    args.imag_horizon = c.horizon
    args.discount_head = "weight/discount.out.bias" in figures
    args.reward_transform = {"tanh": "tanh", "identity": "none"}[c.reward_transform]
    if script is dreamerv2:
        args.units, args.layers = c.encoder_mlp[-1], 1
    agent = script.make_agent(shapes, args)
    model, feat = agent["world_model"], agent["world_model"].rssm.feat_size
    if script is dreamerv2:  # each head has a size of its own, which no flag can say
        if "vector" in shapes:
            size = shapes["vector"][0]
            model.encoder.mlp = mlp_of(size, c.encoder_mlp)
            model.decoder.mlp = nn.Sequential(
                mlp_of(feat, c.decoder_mlp), nn.Linear(c.decoder_mlp[-1], size)
            )
        heads = {k: v for k, v in agent.items() if k != "world_model"}
        heads |= {"reward": model.reward, "discount": model.discount}
        for name, head in heads.items():
            if head is not None:
                layers = getattr(c, f"{name.removeprefix('slow_')}_layers")
                units = getattr(c, f"{name.removeprefix('slow_')}_units")
                head.mlp = mlp_of(feat, [units] * layers)
                for out in {"out", "std"} & set(dict(head.named_children())):
                    setattr(head, out, nn.Linear(units, getattr(head, out).out_features))
    weights = starting_with("weight/", figures)
    agent.load_state_dict({our_name(k): torch.from_numpy(v) for k, v in weights.items()})
    return agent, args


@pytest.fixture(params=CASES)
def case(request, no_noise, monkeypatch):
    """The figures of a case beside what our code computes, every sample replaced by the mode."""
    script = dreamerv1 if "dreamerv1" in request.param else dreamerv2
    figures = dict(np.load(GOLDEN / f"{request.param}.npz", allow_pickle=False))
    if request.param == "dreamerv1_continuous":  # mean and std are one layer of the authors'
        for key in [k for k in figures if "/actor.out." in k]:
            figures[key], figures[key.replace("out", "std")] = np.split(figures[key], 2)
    agent, args = golden_agent(script, figures, json.loads(str(figures["config"])))

    def trunc_normal_mode(self):
        return self.mode + (self.mode.clamp(-1 + 1e-6, 1 - 1e-6) - self.mode).detach()

    monkeypatch.setattr(dreamerv2.TruncNormal, "rsample", trunc_normal_mode)
    batch = {k: torch.from_numpy(v) for k, v in starting_with("data/", figures).items()}
    batch.setdefault("is_first", torch.zeros_like(batch["reward"]))  # V1 has no resets
    model, *behavior = agent.values()
    ours = {}
    returns = script.lambda_return
    imagine = model.rssm.imagine

    def keep_return(*a):
        value = "imag/value" if script is dreamerv1 else "imag/slow_value"
        target = "imag/return" if script is dreamerv1 else "imag/target"
        ours["imag/reward"], ours[value] = a[0], a[1]
        ours["imag/discount"], ours[target] = a[2], returns(*a)
        return ours[target]

    def keep_imagined(*a):
        ours["imag/feat"], ours["imag/action"] = imagine(*a)
        return ours["imag/feat"], ours["imag/action"]

    monkeypatch.setattr(script, "lambda_return", keep_return)
    monkeypatch.setattr(model.rssm, "imagine", keep_imagined)
    loss, post, metrics = model.loss(batch)
    loss.backward(inputs=[*model.parameters()])  # as in opt_step
    losses = script.behavior_loss(model, *behavior, post, batch["is_terminal"], args)
    actor_loss, critic_loss, more = losses
    actor_loss.backward(inputs=[*agent["actor"].parameters()])
    critic_loss.backward(inputs=[*agent["critic"].parameters()])
    with torch.no_grad():
        _, prior = model.rssm.observe(model.encoder(batch), batch["action"], batch["is_first"])
    ours |= {f"post/{k}": v for k, v in post.items()} | {f"prior/{k}": v for k, v in prior.items()}
    return SimpleNamespace(figures=figures, agent=agent, ours=ours, metrics=metrics | more)


def distance(ours, theirs):
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(a.reshape(b.shape) - b) / max(np.linalg.norm(b), 1e-12)


def test_losses_equal_the_authors(case):
    figures, metrics = case.figures, {k: float(v) for k, v in case.metrics.items()}
    constant = 0.5 * np.log(2 * np.pi)
    data = starting_with("data/", figures)
    numbers = 1 + sum(np.prod(data[k].shape[2:]) for k in ("image", "vector") if k in data)
    assert distance(metrics["losses/model"] + numbers * constant, figures["loss/model"]) < 1e-5
    for name in ("reward", "image", "vector"):
        if f"loss/{name}_minus_constant" in figures:
            theirs = figures[f"loss/{name}_minus_constant"]
            assert distance(metrics[f"losses/{name}"], theirs) < 1e-5, name
    for name in ("kl", "discount", "actor"):
        if f"loss/{name}" in figures and not (name == "kl" and "loss/kl_value" not in figures):
            assert distance(metrics[f"losses/{name}"], figures[f"loss/{name}"]) < 1e-5, name
    if "loss/discount_times_scale" in figures:
        theirs = figures["loss/discount_times_scale"]
        assert distance(10 * metrics["losses/discount"], theirs) < 1e-5
    target = figures["imag/return" if "imag/return" in figures else "imag/target"]
    weight = figures["imag/weight"][: len(target)].mean()
    assert distance(metrics["losses/critic"] + constant * weight, figures["loss/critic"]) < 1e-5
    kl = figures.get("loss/kl_value", figures["loss/kl"])
    assert distance(metrics["model/kl"], kl) < 1e-5
    if "imag/actor_entropy_mean" in figures:
        assert distance(metrics["imag/actor_entropy"], figures["imag/actor_entropy_mean"]) < 1e-5


def test_latent_states_equal_the_authors(case):
    names = [k for k in case.figures if k.startswith(("post/", "prior/"))]
    assert {"post/deter"} < set(names)
    for name in set(names) & set(case.ours):
        assert distance(case.ours[name].detach(), case.figures[name]) < 1e-5, name


def test_imagined_rollouts_and_returns_equal_the_authors(case):
    names = [k for k in case.figures if k.startswith("imag/") and k in case.ours]
    assert {"imag/feat", "imag/action", "imag/reward", "imag/discount"} < set(names)
    for name in names:
        ours = case.ours[name].detach()  # the last reward and discount are never used
        first = 1 if "value" in name else 0  # nor is the first value
        assert distance(ours, case.figures[name][first : first + len(ours)]) < 1e-5, name


def test_every_gradient_equals_the_authors(case):
    parameters = dict(case.agent.named_parameters())
    gradients = starting_with("grad/", case.figures)
    assert len(gradients) == len([k for k in parameters if not k.startswith("slow_critic")])
    for name, theirs in gradients.items():
        assert distance(parameters[our_name(name)].grad, theirs) < 1e-4, name


def test_gradient_norms_equal_the_authors(case):
    for key, name in (("world_model", "model"), ("actor", "actor"), ("critic", "critic")):
        norm = nn.utils.get_total_norm([p.grad for p in case.agent[key].parameters()])
        assert distance(norm, case.figures[f"grad_norm/{name}"]) < 1e-5, name
