"""The recurrent model: observing, imagining, resets, and the steps of both GRUs by hand."""

import numpy as np
import pytest
import scipy.stats
import torch
from helpers.agents import (
    HIDDEN, HORIZON, UNITS, A, B, D, K, N, S, T, both_twins, close, close_gradients, copied,
    every_script, make, make_batch, observe, random_state, same,
)  # fmt: skip

import dreamerv1
import dreamerv2

STATISTICS = {dreamerv1: {"mean": (S,), "std": (S,)}, dreamerv2: {"logit": (S, K)}}


def imagined(x, start):
    """-> the start's features and those that followed, and the action that led to each."""
    feat, action = x.rssm.imagine(x.actor, start, HORIZON)
    if x.script is dreamerv1:  # whose imagined states leave out the start
        assert len(feat) == len(action) == HORIZON
        feat = torch.cat([x.rssm.feat(start)[None], feat])
        action = torch.cat([torch.zeros_like(action[:1]), action])
    assert len(feat) == len(action) == HORIZON + 1
    return feat, action


@both_twins
def test_states_have_the_shapes_of_the_docstring_and_features_are_stoch_then_deter(script):
    x, batch = make(script), make_batch()
    post, prior = observe(x, batch)
    stats, stoch_size = STATISTICS[script], x.rssm.stoch_size
    assert {k: v.shape[2:] for k, v in prior.items()} == stats
    sizes = stats | {"deter": (D,), "stoch": (stoch_size,)}
    assert {k: v.shape[2:] for k, v in post.items()} == sizes
    assert {v.shape[:2] for v in (*post.values(), *prior.values())} == {(T, B)}
    start = {k: v.flatten(0, 1) for k, v in post.items()}
    feat, action = imagined(x, start)
    assert feat.shape == (HORIZON + 1, N, x.rssm.feat_size)
    assert action.shape == (HORIZON + 1, N, A)
    assert x.rssm.feat_size == stoch_size + D
    assert torch.equal(feat[0], torch.cat([start["stoch"], start["deter"]], -1))
    if script is dreamerv2:
        for stoch in (post["stoch"], feat[..., :stoch_size]):
            assert (stoch.unflatten(-1, (S, K)).sum(-1) == 1).all()


# Observing


@every_script
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_is_first_forgets_both_state_and_action_of_its_row_only(script, dtype):
    x, embed = make(script), torch.randn(B, UNITS)
    state, action = random_state(x, B), torch.randn(B, A)
    first = torch.tensor([0, 1, 0, 1]).to(dtype)
    deter = x.rssm.obs_step(state, action, embed, first)["deter"]
    fresh = x.rssm.gru_step(x.rssm.initial(B), torch.zeros(B, A))
    kept = x.rssm.gru_step(state, action)
    close(deter, torch.where(first[:, None] == 1, fresh, kept))
    assert not any(v.any() for v in x.rssm.initial(B).values())


@every_script
@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_is_first_in_the_middle_of_a_window_equals_two_windows(script, dtype):
    x, batch, ends = make(script), make_batch(), (2, 4, 5, 3)
    batch["action"] += torch.randn(T, B, A)  # reset rows too: their actions must not matter
    batch["is_first"] = torch.zeros(T, B, dtype=dtype)
    for b, t in enumerate(ends):
        batch["is_first"][t, b] = 1
    whole = observe(x, batch)
    for b, t in enumerate(ends):
        for part in (slice(0, t), slice(t, T)):
            alone = observe(x, {k: v[part, b : b + 1] for k, v in batch.items()})
            for ours, theirs in zip(whole, alone, strict=True):
                for key in theirs:
                    close(ours[key][part, b : b + 1], theirs[key], atol=1e-5)


@every_script
@pytest.mark.usefixtures("no_noise")
def test_the_first_action_of_a_window_counts_in_dreamerv1_unless_its_row_is_a_reset(script):
    x, batch = make(script), make_batch()
    batch["is_first"][0] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    changed = batch | {"action": batch["action"].clone()}
    changed["action"][0] += 1
    (before, _), (after, _) = observe(x, batch), observe(x, changed)
    moved = (before["deter"] != after["deter"]).any(-1)  # (T, B)
    counts = [True, False, True, False] if script is dreamerv1 else [False] * B
    assert moved.all(0).tolist() == moved.any(0).tolist() == counts


@both_twins
def test_observing_equals_steps_by_hand_and_the_prior_is_that_of_imagined_steps(script):
    x, batch = make(script), make_batch()
    embed = x.world_model.encoder(batch)
    post, prior = observe(x, batch)
    state, keep = x.rssm.initial(B), 1 - batch["is_first"][..., None]
    if script is dreamerv2:  # what came before a window is not known
        keep[0] = 0
    for t in range(T):
        state = {k: v * keep[t] for k, v in state.items()}
        step = x.rssm.img_step(state, batch["action"][t] * keep[t])
        close(step["deter"], post["deter"][t])
        seen = x.rssm.stats(x.rssm.obs_out(torch.cat([step["deter"], embed[t]], -1)))
        for key in STATISTICS[script]:
            close(step[key], prior[key][t], atol=1e-5)
            close(seen[key], post[key][t], atol=1e-5)
        state = {k: post[k][t] for k in ("deter", "stoch")}


@both_twins
@pytest.mark.usefixtures("no_noise")
def test_states_depend_on_the_past_of_their_own_sequence_only(script):
    x = make(script)
    embed = torch.randn(T, B, UNITS, requires_grad=True)
    action = torch.randn(T, B, A, requires_grad=True)
    first = torch.zeros(T, B)
    first[0] = 1
    post, prior = x.rssm.observe(embed, action, first)
    t, b = 3, 1
    for stats, seen in ((post, t), (prior, t - 1)):
        outs = [stats[key][t, b] for key in STATISTICS[script]]
        out = sum((v * torch.randn(v.shape)).sum() for v in outs)
        for_embed, for_action = torch.autograd.grad(out, [embed, action], retain_graph=True)
        assert for_embed.any(-1).nonzero().tolist() == [[i, b] for i in range(seen + 1)]
        assert for_action.any(-1).nonzero().tolist() == [[i, b] for i in range(1, t + 1)]


@every_script
def test_observing_and_losses_leave_their_inputs_unchanged(script):
    x, batch = make(script), make_batch()
    state = random_state(x, B)
    copies = copied(batch), copied(state)
    x.rssm.obs_step(state, batch["action"][1], torch.randn(B, UNITS), torch.ones(B))
    x.world_model.loss(batch)
    assert same(copies[0], batch)
    assert same(copies[1], state)


# Imagining


@both_twins
@pytest.mark.usefixtures("no_noise")
def test_imagined_state_i_follows_from_the_one_before_and_from_the_action_chosen_there(script):
    x = make(script)
    start = random_state(x, N)
    feat, action = imagined(x, start)
    assert torch.equal(feat[0], x.rssm.feat(start))
    assert not action[0].any()
    for i in range(HORIZON):
        stoch, deter = feat[i].split([x.rssm.stoch_size, D], -1)
        close(x.actor(feat[i]).rsample(), action[i + 1])
        step = x.rssm.img_step({"deter": deter, "stoch": stoch}, action[i + 1])
        close(x.rssm.feat(step), feat[i + 1])


@both_twins
def test_imagined_actions_pull_on_the_actor_but_not_on_the_states_it_sees(script):
    x = make(script)
    start = {k: v.requires_grad_() for k, v in random_state(x, N).items()}
    feat, action = imagined(x, start)
    for leaves, reached in ((list(start.values()), False), (list(x.actor.parameters()), True)):
        grads = torch.autograd.grad(action[2].sum(), leaves, retain_graph=True, allow_unused=True)
        assert all((g is not None and g.any()) == reached for g in grads)
    last = feat[-1, :, -D:].sum()  # it follows from the actions and from the start
    for leaf in (*x.actor.parameters(), *start.values()):
        assert torch.autograd.grad(last, leaf, retain_graph=True)[0].any()


# DreamerV1's GRU and Gaussians


def test_gru_step_of_dreamerv1_equals_the_formula_of_keras():
    x = make(dreamerv1)
    gru = x.rssm.gru
    for p in gru.parameters():
        p.data.normal_()
    state, action = random_state(x, B), torch.randn(B, A)
    h, inputs = state["deter"], x.rssm.img_in(torch.cat([state["stoch"], action], -1))
    assert inputs.shape == (B, HIDDEN)
    gates = inputs @ gru.weight_ih.T + gru.bias_ih
    inner = h @ gru.weight_hh.T + gru.bias_hh
    reset = 1 / (1 + torch.exp(-gates[:, :D] - inner[:, :D]))
    update = 1 / (1 + torch.exp(-gates[:, D : 2 * D] - inner[:, D : 2 * D]))
    cand = torch.tanh(gates[:, 2 * D :] + reset * inner[:, 2 * D :])  # reset after the product
    close(x.rssm.gru_step(state, action), update * h + (1 - update) * cand, atol=1e-5)


def test_latents_are_samples_with_a_std_of_softplus_plus_a_tenth_that_carry_the_gradient():
    rssm, count = make(dreamerv1).rssm, 10_000
    x, deter = 2 * torch.randn(2 * S), torch.randn(count, D)
    x.requires_grad_()
    state = rssm.state(deter, x.expand(count, 2 * S))
    close(state["mean"], x[:S].expand(count, S))
    close(state["std"], (torch.log1p(x[S:].exp()) + 0.1).expand(count, S))
    assert state["deter"] is deter
    mean, std, stoch = (state[k] for k in ("mean", "std", "stoch"))
    noise = ((stoch - mean) / std).detach()
    for s in range(S):
        assert scipy.stats.kstest(noise[:, s].numpy(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T.numpy()) - np.eye(S)).max() < 0.05
    weight = torch.randn(count, S)
    close_gradients((weight * stoch).sum(), (weight * (mean + std * noise)).sum(), [x], 1e-3)


# DreamerV2's GRU


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_gru_step_of_dreamerv2_equals_its_formula(norm):
    x = make(dreamerv2, norm=norm)
    gru, gru_norm = x.rssm.gru, x.rssm.gru_norm
    gru_norm.weight.data.normal_(1)
    gru_norm.bias.data.normal_()
    state, action = random_state(x, B), torch.randn(B, A)
    inputs = x.rssm.img_in(torch.cat([state["stoch"], action], -1))
    assert inputs.shape == (B, HIDDEN)
    parts = torch.cat([inputs, state["deter"]], -1) @ gru.weight.T + gru.bias
    mean, var = parts.mean(-1, keepdim=True), parts.var(-1, correction=0, keepdim=True)
    parts = (parts - mean) / (var + 1e-3).sqrt() * gru_norm.weight + gru_norm.bias
    reset, cand, update = parts[:, :D], parts[:, D : 2 * D], parts[:, 2 * D :]
    update = 1 / (1 + torch.exp(1 - update))
    cand = torch.tanh(cand / (1 + torch.exp(-reset)))
    new = update * cand + (1 - update) * state["deter"]
    close(x.rssm.gru_step(state, action), new, atol=1e-5)
