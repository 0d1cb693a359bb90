"""Lambda returns, and the losses of actor and critic on imagined states."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.agents import (
    HORIZON, A, B, N, T, behave, both_twins, close, close_gradients, every_gradient,
    every_script, make, make_batch, random_state,
)  # fmt: skip

import dreamerv1
import dreamerv2

# lambda_return


@every_script
def test_lambda_return_equals_the_brute_force_double_sum(script):
    reward, value, disc = torch.randn(T, N), torch.randn(T + 1, N), torch.rand(T, N)
    lambda_ = 0.9
    ret = script.lambda_return(reward, value[1:], disc, lambda_)
    for t in range(T):
        n_step = []  # returns of 1, 2, ... rewards and the value after them
        for n in range(1, T - t + 1):
            total = sum(disc[t : t + k].prod(0) * reward[t + k] for k in range(n))
            n_step.append(total + disc[t : t + n].prod(0) * value[t + n])
        mixed = sum((1 - lambda_) * lambda_**n * g for n, g in enumerate(n_step[:-1]))
        close(ret[t], mixed + lambda_ ** (T - t - 1) * n_step[-1], atol=1e-5)


@every_script
def test_lambda_return_of_a_case_by_hand(script):
    reward, next_value = torch.tensor([[0.7], [0.5], [0.4]]), torch.tensor([[1.0], [0.8], [0.6]])
    disc = torch.full((3, 1), 0.99)
    ret = script.lambda_return(reward, next_value, disc, 0.95)
    # .4 + .99 * .6; .5 + .99 * (.05 * .8 + .95 * .994); .7 + .99 * (.05 * 1 + .95 * 1.474)
    close(ret[:, 0], torch.tensor([2.136227, 1.474457, 0.994]))


# The losses by brute force


def recorded(x, monkeypatch, discrete, starts=N):
    """Replaces imagination by random states and actions that collect gradients -> them, calls."""
    count = HORIZON if x.script is dreamerv1 else HORIZON + 1
    states = random_state(x, count, starts)
    action = torch.rand(count, starts, A) * 1.8 - 0.9
    if discrete:
        action = F.one_hot(torch.randint(A, (count, starts)), A).float()
    calls = []
    for leaf in (*states.values(), action):
        leaf.requires_grad_()

    def imagine(actor, *args):
        calls.append((*args, torch.is_grad_enabled()))
        return x.rssm.feat(states), action

    monkeypatch.setattr(x.rssm, "imagine", imagine)
    return states, action, calls


def returns_by_hand(reward, value, disc):
    """The returns of one start: lists of a number for each state, lambda 0.8."""
    ret = {len(reward) - 1: value[-1]}
    for i in reversed(range(len(reward) - 1)):
        ret[i] = reward[i] + disc[i] * (0.2 * value[i + 1] + 0.8 * ret[i + 1])
    return ret


def check_losses(x, states, action, losses, expected, metrics, dynamics):
    """Losses, metrics and gradients; `dynamics`: whether the actor learns through the states."""
    (actor_loss, critic_loss, ours), (actor_wanted, critic_wanted) = losses, expected
    wanted = {"losses/actor": actor_wanted, "losses/critic": critic_wanted}
    wanted |= {f"imag/{k}": v for k, v in metrics.items()}
    assert ours.keys() == wanted.keys()
    for key, value in wanted.items():
        close(ours[key], value.detach())
        assert not ours[key].requires_grad
    close(actor_loss, actor_wanted)
    close(critic_loss, critic_wanted)
    leaves = [*states.values(), action]
    grads = close_gradients(actor_loss, actor_wanted, [*leaves, *x.actor.parameters()])
    *through_states, through_action = grads[:3]
    assert all(g.any() == dynamics for g in through_states)
    assert not through_action.any()  # log pi sees the action, but pulls it nowhere
    close_gradients(critic_loss, critic_wanted, [*leaves, *x.critic.parameters()])


@pytest.mark.parametrize("entropy_scale", [0.0, 0.2])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("grad", ["reinforce", "dynamics"])
@pytest.mark.parametrize("discrete", [True, False])
def test_losses_of_dreamerv1_by_brute_force(discrete, grad, head, entropy_scale, monkeypatch):
    x = make(
        dreamerv1, discrete=discrete, actor_grad=grad, actor_entropy=entropy_scale, gamma=0.9,
        discount_lambda=0.8, discount_head=head,
    )  # fmt: skip
    model, steps, batch = x.world_model, T - head, make_batch(discrete=discrete)
    states, action, calls = recorded(x, monkeypatch, discrete, steps * B)
    post, losses = behave(x, batch, seed=9)
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
        ret = returns_by_hand(reward[:, n], value[:, n], disc)
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
    metrics = {
        "reward": reward.mean(), "actor_entropy": entropy.mean(), "return": return_sum / count,
        "value": prediction[:-1].mean(), "discount": disc_sum / (steps * B * HORIZON),
    }  # fmt: skip
    expected = actor_sum / count, critic_sum / count
    check_losses(x, states, action, losses, expected, metrics, grad == "dynamics")


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("grad", ["reinforce", "dynamics", "both"])
@pytest.mark.parametrize("dist", ["onehot", "trunc_normal", "tanh_normal"])
def test_losses_of_dreamerv2_by_brute_force(dist, grad, head, monkeypatch):
    mix, discrete = {"reinforce": 0.0, "dynamics": 1.0, "both": 0.3}[grad], dist == "onehot"
    x = make(
        dreamerv2, discrete=discrete, actor_dist=dist, actor_grad=grad, actor_grad_mix=0.3,
        actor_entropy=0.2, gamma=0.9, discount_lambda=0.8, discount_head=head,
    )  # fmt: skip
    model, batch = x.world_model, make_batch(discrete=discrete)
    batch["is_terminal"][4:, 2:] = 1
    states, action, calls = recorded(x, monkeypatch, discrete)
    post, losses = behave(x, batch, seed=9)
    ((start, horizon, graph),) = calls
    assert horizon == HORIZON
    assert graph == (grad != "reinforce")  # which needs none through the imagination
    for key in ("deter", "stoch"):
        assert torch.equal(start[key], post[key].detach().reshape(N, -1))

    feat = torch.cat([states["stoch"], states["deter"]], -1)
    reward, value, prediction = model.reward(feat), x.slow_critic(feat), x.critic(feat.detach())
    torch.manual_seed(9)
    policy = x.actor(feat[:-2].detach())
    entropy = policy.entropy()
    log_prob = policy.log_prob(action[1:-1].detach())
    terminal = batch["is_terminal"].flatten()
    actor_sum = critic_sum = return_sum = disc_sum = 0
    for n in range(N):
        disc = [torch.tensor(0.9)] * (HORIZON + 1)
        if head:
            disc = list(torch.sigmoid(model.discount(feat[:, n])))
            disc[0] = 0.9 * (1 - terminal[n])
        disc_sum = disc_sum + sum(disc)
        ret, weight = returns_by_hand(reward[:, n], value[:, n], disc), 1.0
        for i in range(HORIZON):
            critic_sum = critic_sum + weight * 0.5 * (prediction[i, n] - ret[i].detach()) ** 2
            if i + 1 < HORIZON:
                reinforce = log_prob[i, n] * (ret[i + 1] - value[i, n]).detach()
                objective = mix * ret[i + 1] + (1 - mix) * reinforce
                actor_sum = actor_sum - weight * (objective + 0.2 * entropy[i, n])
            return_sum = return_sum + ret[i]
            weight = weight * disc[i].detach()
    metrics = {
        "reward": reward.mean(), "actor_entropy": entropy.mean(), "slow_value": value.mean(),
        "return": return_sum / (N * HORIZON), "value": prediction[:-1].mean(),
        "discount": disc_sum / (N * (HORIZON + 1)),
    }  # fmt: skip
    expected = actor_sum / (N * (HORIZON - 1)), critic_sum / (N * HORIZON)
    check_losses(x, states, action, losses, expected, metrics, mix > 0)


# What is left out, what is trained, and which way


def test_terminal_starts_of_dreamerv1_train_nothing_with_a_discount_head_but_count_in_the_mean():
    for head in (True, False):
        x, batch = make(dreamerv1, discount_head=head), make_batch()
        losses = []  # of actor and critic
        for ends in ([], [1], [1, 2, 0, 3]):  # the sequences whose every step is terminal
            batch["is_terminal"].zero_()
            batch["is_terminal"][:, ends] = 1
            losses.append([v.item() for v in behave(x, batch)[1][:2]])
        assert (losses[0] != losses[1]) == head
        assert (losses[2] == [0.0, 0.0]) == head


def test_terminal_starts_of_dreamerv2_count_only_at_their_first_state(monkeypatch):
    x = make(dreamerv2, discrete=True, actor_entropy=0.2, discount_lambda=0.8)
    states, action, _ = recorded(x, monkeypatch, discrete=True)
    batch = make_batch(discrete=True)
    batch["is_terminal"].fill_(1)
    _, (actor_loss, critic_loss, _) = behave(x, batch)
    model, feat = x.world_model, x.rssm.feat(states).detach()
    error = x.critic(feat[0]) - model.reward(feat[0])  # no value follows the end
    close(critic_loss, 0.5 * error.square().mean() / HORIZON)
    reward, value, disc = model.reward(feat), x.slow_critic(feat), model.discount(feat).sigmoid()
    policy, ret = x.actor(feat[0]), returns_by_hand(reward, value, disc)
    advantage = (ret[1] - value[0]).detach()
    objective = policy.log_prob(action[1].detach()) * advantage + 0.2 * policy.entropy()
    close(actor_loss, -objective.mean() / (HORIZON - 1))


@every_gradient
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("discrete", [True, False])
def test_behavior_losses_train_actor_and_critic_alone_and_each_its_own(
    script, grad, discrete, head
):
    x = make(script, discrete=discrete, actor_grad=grad, discount_head=head)
    post, (actor_loss, critic_loss, _) = behave(x, make_batch(discrete=discrete))
    actor, critic = list(x.actor.parameters()), list(x.critic.parameters())
    latents = [v for v in post.values() if v.requires_grad]
    assert latents
    for loss, parameters in ((actor_loss, latents), (critic_loss, actor + latents)):
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        assert all(g is None for g in grads)
    if script is dreamerv2:  # the returns are those of the slow critic
        grads = torch.autograd.grad(actor_loss, critic, retain_graph=True, allow_unused=True)
        assert all(g is None for g in grads)
    for loss, parameters in ((actor_loss, actor), (critic_loss, critic)):
        script.opt_step(torch.optim.SGD(parameters, 0.0), loss, 100.0)
    others = {*x.agent.parameters()} - {*actor, *critic}
    assert all(p.grad is None for p in others)
    assert all(p.grad is not None and p.grad.any() for p in actor + critic)


@pytest.mark.usefixtures("smooth")
@pytest.mark.parametrize("source", ["reward", "value"])
@both_twins
def test_dynamics_gradient_equals_finite_differences_of_the_imagined_returns(script, source):
    x = make(script, discount_head=False, gamma=0.9, actor_entropy=0.0)
    batch, bias = make_batch(), x.actor.out.bias
    value = x.critic if script is dreamerv1 else x.slow_critic
    for layer in (x.actor.out, x.actor.std):
        layer.weight.data.zero_()  # one action everywhere: no gradient is cut at the actor
    bias.data = torch.tensor([0.3, -0.4, 0.1])
    for name, head in (("reward", x.world_model.reward), ("value", value)):
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


@both_twins
def test_reinforce_makes_actions_with_advantage_more_likely(script, monkeypatch):
    x = make(script, discrete=True, actor_grad="reinforce", actor_entropy=0.0, discount_head=False)
    states, action, _ = recorded(x, monkeypatch, discrete=True)
    returns = action.detach()[:-1, :, 0]  # action 0 is worth 1 more than the others
    monkeypatch.setattr(script, "lambda_return", lambda *a: returns)
    baseline = x.critic if script is dreamerv1 else x.slow_critic
    baseline.out.weight.data.zero_()
    baseline.out.bias.data.fill_(0.5)
    feat, wanted = x.rssm.feat(states), torch.eye(A)[0]
    before = x.actor(feat).log_prob(wanted).mean()
    _, (actor_loss, _, _) = behave(x, make_batch(discrete=True))
    actor_loss.backward()
    for p in x.actor.parameters():
        p.data -= 0.1 * p.grad
    assert x.actor(feat).log_prob(wanted).mean() > before
