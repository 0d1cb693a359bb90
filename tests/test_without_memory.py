"""benchmarks/without_memory.py remembers nothing, and yet learns what an action does."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from without_memory import Forgetful

import dreamerv2

T, B, E, A = 5, 3, 4, 2


@pytest.fixture
def rssm():
    torch.manual_seed(1)
    sizes = {"deter": 8, "hidden": 8, "stoch": 3, "classes": 4}
    return Forgetful(E, A, dreamerv2.Args(**sizes))


def observed(rssm, embed, action):
    torch.manual_seed(2)  # the same samples where the distributions are the same
    return rssm.observe(embed, action, torch.zeros(T, B))


def test_a_state_follows_from_its_own_row_and_the_prior_from_the_row_before(rssm):
    embed = torch.randn(T, B, E)
    action = torch.randn(T, B, A)
    post, prior = observed(rssm, embed, action)
    changed = embed.clone()
    changed[2] += 10
    other_post, other_prior = observed(rssm, changed, action)
    same = (post["logit"] == other_post["logit"]).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True, True]
    same = (prior["logit"] == other_prior["logit"]).flatten(1).all(1)
    assert same.tolist() == [True, True, True, False, True]
    torch.testing.assert_close(post["deter"], post["deter"][0, 0].expand_as(post["deter"]))


def test_the_prior_sees_the_action_that_led_to_a_row_but_for_the_first(rssm):
    embed = torch.randn(T, B, E)
    action = torch.randn(T, B, A)
    _, prior = observed(rssm, embed, action)
    for row, seen in ((0, False), (2, True)):
        changed = action.clone()
        changed[row] += 1
        _, other = observed(rssm, embed, changed)
        assert (prior["logit"][row] != other["logit"][row]).any() == seen


def test_a_dream_predicts_as_the_prior_does_and_remembers_no_more(rssm):
    embed = torch.randn(T, B, E)
    action = torch.randn(T, B, A)
    post, prior = observed(rssm, embed, action)
    state = rssm.img_step({k: v[1] for k, v in post.items()}, action[2])
    torch.testing.assert_close(state["logit"], prior["logit"][2])
    torch.testing.assert_close(state["deter"], post["deter"][0])


def lengths(policies, episodes, seed):
    """Mean steps of networks (P, ...) that see the positions of cart and pole alone -> (P,)."""
    into, shift, out, bias = policies
    envs = gym.make_vec(
        "CartPole-v1", num_envs=len(bias) * episodes, vectorization_mode="vector_entry_point"
    )
    obs, _ = envs.reset(seed=seed)
    steps = np.zeros(envs.num_envs)
    playing = np.ones(envs.num_envs, bool)
    while playing.any():
        seen = obs[:, [0, 2]].reshape(len(bias), episodes, 2) * [1, 10]
        hidden = np.tanh(seen @ into + shift[:, None])
        right = (hidden * out[:, None]).sum(-1) + bias > 0
        obs, _, terminated, truncated, _ = envs.step(right.flatten().astype(int))
        steps += playing
        playing &= ~(terminated | truncated)
    return steps.reshape(len(bias), episodes).mean(1)


@pytest.mark.slow
def test_no_policy_of_positions_alone_that_a_search_finds_holds_the_pole():
    rng = np.random.default_rng(0)
    hidden = 8
    mean, std = np.zeros(4 * hidden + 1), 2 * np.ones(4 * hidden + 1)
    best = []
    for generation in range(20):  # the cross-entropy method
        x = mean + std * rng.standard_normal((200, len(mean)))
        into, shift, out, bias = np.split(x, np.cumsum([2 * hidden, hidden, hidden]), 1)
        policies = into.reshape(-1, 2, hidden), shift, out, bias
        steps = lengths(policies, 10, generation)
        elite = x[np.argsort(-steps)[:20]]
        mean, std = elite.mean(0), elite.std(0) + 0.05
        best.append(steps.max())
    assert 35 < np.mean(best[-5:]) < 80  # of 500; random play has 22
