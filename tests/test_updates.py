"""An update: which weights it moves, by how much, and from which gradients."""

import copy

import pytest
import torch
from helpers.agents import (
    SHAPES, both_twins, close, copied, every_gradient, every_script, make, make_batch,
    one_update, same, update,
)  # fmt: skip
from torch import nn

import dreamerv1
import dreamerv2
import runtime

LEARNERS = {"world_model": "model", "actor": "actor", "critic": "critic"}  # and their metrics


def norm(gradients):
    return nn.utils.get_total_norm(gradients)


# Which weights move


@both_twins
@pytest.mark.parametrize("learner", LEARNERS)
def test_an_update_moves_every_parameter_of_an_optimizer_and_no_other(script, learner):
    x, batch = make(script, SHAPES), make_batch(SHAPES)
    optimizers = script.make_optimizers(x.agent, x.args)
    assert optimizers.keys() == LEARNERS.keys()
    for name, optimizer in optimizers.items():
        lr = 1e-2 if name == learner else 0.0
        optimizer.param_groups[0].update(lr=lr, weight_decay=0.0)
    before = copied(x.agent.state_dict())
    update(x, batch, optimizers)
    moved = {k for k, v in x.agent.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith(f"{learner}.")}


def test_the_slow_critic_has_the_critics_form_and_never_learns():
    x, batch = make(dreamerv2, slow_update=1, critic_lr=1e-2), make_batch()
    slow = copied(x.slow_critic.state_dict())
    assert list(slow) == list(x.critic.state_dict())
    for name, network in x.agent.items():
        assert all(p.requires_grad == (name != "slow_critic") for p in network.parameters())
    optimizers = dreamerv2.make_optimizers(x.agent, x.args)
    for _ in range(3):
        before = copied(x.critic.state_dict())
        update(x, batch, optimizers)
        assert not same(x.critic.state_dict(), before)
        assert same(x.slow_critic.state_dict(), slow)


# From which gradients


@every_gradient
@pytest.mark.parametrize("discrete", [True, False])
def test_gradients_are_those_of_the_losses_and_dreamerv2_imagines_in_the_model_after_its_step(
    script, grad, discrete
):
    options = {"actor_grad": grad, "clip": 1e9, "model_lr": 0.1, "actor_lr": 0.1, "critic_lr": 0.1}
    x, batch = make(script, discrete=discrete, **options), make_batch(discrete=discrete)
    old = copy.deepcopy(x.agent)
    torch.manual_seed(7)
    metrics = update(x, batch)
    torch.manual_seed(7)
    model_loss, post, _ = old["world_model"].loss(batch)
    parameters = {name: list(old[name].parameters()) for name in LEARNERS}
    gradients = {"world_model": torch.autograd.grad(model_loss, parameters["world_model"])}
    if script is dreamerv2:
        old["world_model"].load_state_dict(x.world_model.state_dict())
    losses = script.behavior_loss(*old.values(), post, batch["is_terminal"], x.args)
    losses = {"world_model": model_loss, "actor": losses[0], "critic": losses[1]}
    for name in ("actor", "critic"):
        gradients[name] = torch.autograd.grad(losses[name], parameters[name])
    for name, short in LEARNERS.items():
        close(metrics[f"losses/{short}"], losses[name].detach())
        for p, g in zip(x.agent[name].parameters(), gradients[name], strict=True):
            close(p.grad, g, rtol=1e-3, atol=1e-6)
        close(metrics[f"grad_norm/{short}"], norm(gradients[name]))


@both_twins
def test_each_optimizer_clips_the_norm_of_its_own_gradient(script):
    x, batch = make(script, reward_transform="none", clip=50.0), make_batch()
    x.world_model.reward.out.weight.data *= 1e5
    batch["reward"] *= 1e4
    metrics = update(x, batch)
    for name, short in LEARNERS.items():
        assert metrics[f"grad_norm/{short}"] > 200  # the norm before
        gradients = [p.grad for p in x.agent[name].parameters()]
        close(norm(gradients), torch.tensor(50.0), rtol=1e-3)


@both_twins
def test_small_gradients_are_not_clipped(script):
    x, batch = make(script), make_batch()
    metrics = update(x, batch)
    for name, short in LEARNERS.items():
        assert metrics[f"grad_norm/{short}"] < 100
        gradients = [p.grad for p in x.agent[name].parameters()]
        close(norm(gradients), metrics[f"grad_norm/{short}"])


@every_script
def test_the_same_seed_gives_the_same_update(script):
    assert one_update(script) == one_update(script)


# By how much


@both_twins
@pytest.mark.parametrize("eps", [1e-7, 0.5])
def test_optimizers_are_adam_with_the_rates_and_epsilon_of_the_args(script, eps):
    rates = {"world_model": 1e-2, "actor": 2e-3, "critic": 3e-4}
    options = {"weight_decay": 0.0} if script is dreamerv2 else {}
    x = make(script, model_lr=1e-2, actor_lr=2e-3, critic_lr=3e-4, adam_eps=eps, **options)
    for name, optimizer in script.make_optimizers(x.agent, x.args).items():
        p, other = optimizer.param_groups[0]["params"][:2]
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        before, scale = p.data.clone(), 2e-7 if eps == 1e-7 else 2.0
        other.data.fill_(1.0)
        p.grad, other.grad = torch.full_like(p, scale), torch.zeros_like(other)
        optimizer.step()
        moved = torch.full_like(p, rates[name] * scale / (scale + eps))
        close(before - p.data, moved, rtol=1e-2)
        assert (other == 1).all()  # nothing decays


@pytest.mark.parametrize("decay", [1e-6, 0.1])
def test_weight_decay_takes_the_same_share_whatever_the_learning_rate(decay):
    x = make(dreamerv2, model_lr=3e-2, actor_lr=1e-4, critic_lr=1e-6, weight_decay=decay)
    for optimizer in dreamerv2.make_optimizers(x.agent, x.args).values():
        for p in optimizer.param_groups[0]["params"]:
            p.data.fill_(1.0)
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p in optimizer.param_groups[0]["params"]:
            close(p.data, torch.full_like(p, 1 - decay), rtol=0, atol=1e-7)


# What "auto" stands for


@pytest.mark.parametrize(("discrete", "dists", "grads"), [
    (True, {dreamerv1: "onehot", dreamerv2: "onehot"},
     {dreamerv1: "dynamics", dreamerv2: "reinforce"}),
    (False, {dreamerv1: "tanh_normal", dreamerv2: "trunc_normal"},
     {dreamerv1: "dynamics", dreamerv2: "dynamics"}),
])  # fmt: skip
@both_twins
def test_auto_is_resolved_by_device_and_actions(script, discrete, dists, grads, monkeypatch):
    # An older GPU only emulates bfloat16, which is slower than float32.
    for device, native, precision in (
        ("cpu", None, "float32"), ("cuda", True, "bfloat16"), ("cuda", False, "float32"),
    ):  # fmt: skip
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        args = script.Args()
        script.resolve_auto(args, torch.device(device), discrete)
        resolved = args.precision, args.actor_dist, args.actor_grad
        assert resolved == (precision, dists[script], grads[script])
    wrong = script.Args(actor_dist="tanh_normal" if discrete else "onehot")
    with pytest.raises(runtime.UserError, match=f"--actor-dist {wrong.actor_dist} is not for"):
        script.resolve_auto(wrong, torch.device("cpu"), discrete)
