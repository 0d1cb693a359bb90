"""benchmarks/without_memory.py remembers nothing, and yet learns what an action does."""

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
    assert (post["deter"] == post["deter"][0, 0]).all()


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
