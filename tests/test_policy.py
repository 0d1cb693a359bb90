"""Acting, exploring and dreaming with the eyes closed."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from helpers.agents import (
    SHAPES, A, B, C, D, T, V, both_twins, close, every_script, make, make_batch, observe,
    row_of,
)  # fmt: skip

import dreamerv1
import dreamerv2

COUNT = 20_000  # samples of a frequency, which then errs by less than 0.02
EVERY_ACTOR = [(dreamerv1, "onehot"), (dreamerv1, "tanh_normal")]
EVERY_ACTOR += [(dreamerv2, "onehot"), (dreamerv2, "trunc_normal"), (dreamerv2, "tanh_normal")]

# policy


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize(("script", "dist"), EVERY_ACTOR)
def test_actions_are_one_hot_or_between_minus_one_and_one(script, dist, sample):
    discrete = dist == "onehot"
    x = make(script, SHAPES, discrete=discrete, actor_dist=dist)
    row = row_of(make_batch(SHAPES, discrete), 0)
    x.actor.out.weight.data *= 100
    action, state = script.policy(x.agent, row, x.rssm.initial(B), sample)
    assert action.shape == (B, A)
    assert action.dtype == torch.float32
    assert action.abs().max() <= 1
    if discrete:
        assert ((action == 0) | (action == 1)).all()
        assert (action.sum(-1) == 1).all()
    sizes = {"deter": (B, D), "stoch": (B, x.rssm.stoch_size)}
    assert {k: v.shape for k, v in state.items()} == sizes
    assert not any(v.requires_grad for v in (action, *state.values()))


@every_script
@pytest.mark.parametrize(("options", "wanted"), [({}, 0.2), ({"sample": False}, 0.7)])
def test_actions_are_sampled_or_the_mode_and_the_latent_is_sampled_in_both(
    script, options, wanted, monkeypatch
):
    x, row, stochs = make(script), row_of(make_batch(), 0), set()
    dist = SimpleNamespace(rsample=lambda: torch.full((B, A), 0.2), mode=torch.full((B, A), 0.7))
    monkeypatch.setattr(x.actor, "forward", lambda feat: dist)
    for _ in range(5):
        action, state = script.policy(x.agent, row, x.rssm.initial(B), **options)
        assert (action == wanted).all()
        stochs.add(tuple(state["stoch"].flatten().tolist()))
    assert len(stochs) > 1


@both_twins
def test_sampled_actions_follow_the_policy(script):
    x, count = make(script, discrete=True), 3000
    row = {"vector": torch.randn(count, V), "action": torch.zeros(count, A)}
    row |= {"reward": torch.zeros(count), "is_first": torch.ones(count)}
    action, state = script.policy(x.agent, row, x.rssm.initial(count))
    prob = x.actor(x.rssm.feat(state)).log_prob(torch.eye(A)[0]).exp()
    likely = prob > prob.median()
    for part in (likely, ~likely):  # 5 standard deviations and more
        assert abs(action[part, 0].mean() - prob[part].mean()) < 0.05
    assert prob[likely].mean() - prob[~likely].mean() > 0.1


@every_script
@pytest.mark.usefixtures("no_noise")
def test_acting_row_by_row_gives_the_states_of_learning_and_is_first_resets_them(script):
    x, batch = make(script, SHAPES), make_batch(SHAPES)
    batch["is_first"][0] = 1
    state = {k: torch.randn(v.shape) for k, v in x.rssm.initial(B).items()}  # to be forgotten
    post, _ = observe(x, batch)  # sequence 1 has a reset at row 3
    for t in range(T):
        _, state = script.policy(x.agent, row_of(batch, t), state)
        for key in ("deter", "stoch"):
            close(state[key], post[key][t].detach(), atol=1e-5)
    fresh = {k: v[1:2] for k, v in row_of(batch, 3).items()}
    _, reset = script.policy(x.agent, fresh, x.rssm.initial(1))
    close(reset["deter"], post["deter"][3, 1:2].detach(), atol=1e-5)


# DreamerV1's exploration


@pytest.mark.parametrize("scale", [0.3, 0.1])
def test_continuous_exploration_adds_gaussian_noise_and_clips(scale):
    args = make(dreamerv1, expl_noise=scale).args
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
    below = action < center
    assert np.abs(below.mean(0) - 0.5).max() < 0.02
    assert abs(below.all(1).mean() - 0.25) < 0.02  # each action has noise of its own


@pytest.mark.parametrize(("first", "last"), [(0.4, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("updates", [0, 50, 100, 200, 1000])
def test_random_actions_decay_linearly_and_then_stay_among_one_hot_ones(updates, first, last):
    options = {"expl_epsilon": first, "expl_min": last, "expl_decay": 200}
    args = make(dreamerv1, discrete=True, **options).args
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


# open_loop


@every_script
def test_open_loop_shows_truth_model_and_error(script):
    steps, context = 8, 3
    x, batch = make(script, SHAPES), make_batch(SHAPES, steps=steps)
    video = x.world_model.open_loop(batch, context)
    assert video.shape == (steps, B, C, 3 * 64, 64)
    assert not video.requires_grad
    truth, model, error = video.split(64, -2)
    close(truth, batch["image"] / 255)
    close(error, (model - truth + 1) / 2)


@both_twins
@pytest.mark.usefixtures("no_noise")
def test_open_loop_sees_five_images_and_dreams_the_rest(script):
    x, batch = make(script, ("image",)), make_batch(("image",), steps=8)
    model = x.world_model.open_loop(batch)[..., 64:128, :]
    post, _ = observe(x, batch)
    states = [{k: v[t] for k, v in post.items()} for t in range(5)]
    for t in range(5, 8):
        states.append(x.rssm.img_step(states[-1], batch["action"][t]))
    for t, state in enumerate(states):
        image = x.world_model.decoder(x.rssm.feat(state))["image"] + 0.5
        close(model[t], image, atol=1e-5)


@every_script
@pytest.mark.usefixtures("smooth")
def test_open_loop_does_not_look_ahead(script):
    x, batch = make(script, ("image",)), make_batch(("image",), steps=8)

    def changed(key, t):
        """Which of the 8 steps of the dream change with a key from step t on."""
        value = batch[key].clone()
        value[t:] = 1 - value[t:]
        moved = x.world_model.open_loop(batch | {key: value})[..., 64:128, :] != before
        return moved.flatten(1).any(1).tolist()

    before = x.world_model.open_loop(batch)[..., 64:128, :]
    assert not any(changed("image", 5))
    assert changed("image", 4) == [False] * 4 + [True] * 4
    assert changed("action", 6) == [False] * 6 + [True] * 2
