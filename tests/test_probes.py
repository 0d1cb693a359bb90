"""A small agent, trained for seconds to a minute, on environments whose answer is known.

The value of a row holds the reward that came with it: with the reward r and the discount g,
V(row) = r + g V(next row), where nothing follows a terminal row.
"""

import importlib
from types import SimpleNamespace

import numpy as np
import probe_envs
import pytest
import torch

import common

SCRIPTS = ["dreamerv2.py"]
GAMMA = 0.8
FLAGS = f"""--gamma {GAMMA} --batch-length 8 --imag-horizon 5 --deter 32 --hidden 32 --stoch 4
    --units 32 --cnn-depth 4 --grayscale --num-envs 4
    --model-lr 3e-3 --actor-lr 2e-3 --critic-lr 3e-3"""
slow = pytest.mark.slow


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


def train(script, env_id, updates, folder, seed=1):
    """Random play, then a step and an update in turn -> how the agent plays and what it believes.

    All of it is (steps, environments): the rows, the greedy `answer` to each as x of probe_envs,
    `value`, `predicted_reward` and `discount` of the states, and `shown`, the row's first number.
    """
    dreamer = importlib.import_module(script.removesuffix(".py"))
    flags = f"--env-id {env_id} --seed {seed} {FLAGS}"
    flags += f" --batch-size {16 if 'Pixels' in env_id else 32}"
    args = common.parse_args(dreamer.Args, dreamer.PRESETS, flags.split())
    continuous = "Continuous" in env_id
    args.actor_dist = {"dreamerv1.py": "tanh_normal"}.get(script, "trunc_normal")
    if not continuous:
        args.actor_dist = "onehot"
    if args.actor_grad == "auto":
        args.actor_grad = "dynamics" if continuous else "reinforce"
    if hasattr(args, "slow_update"):
        args.slow_update = 10
    args.precision = "float32"
    common.setup(seed, cuda=False, deterministic=False, threads=1)
    envs = common.make_envs(args.num_envs, env_id=env_id, seed=seed, grayscale=args.grayscale)
    shapes = common.row_shapes(envs)
    agent = dreamer.make_agent({k: shape for k, (shape, _) in shapes.items()}, args)
    optimizers = dreamer.make_optimizers(agent, args)
    replay = common.Replay(folder, 101 + updates, shapes, args.num_envs, seed)

    row, done, state = common.reset_rows(envs), np.zeros(args.num_envs, bool), None
    replay.add(row)
    for i in range(-100, updates):
        action, state = dreamer.policy(agent, row, state)
        if i < 0:
            action = common.random_actions(envs, replay.rng)
        row, done, _ = common.step_rows(envs, action, done)
        replay.add(row)
        if i >= 0:
            batch = replay.sample(args.batch_size, args.batch_length)
            dreamer.update(agent, optimizers, batch, i, args)

    rows, world_model = [], agent["world_model"]
    row, done, state = common.reset_rows(envs), np.zeros(args.num_envs, bool), None
    for _ in range(4 * probe_envs.CONTINUING):
        action, state = dreamer.policy(agent, row, state, sample=False)
        with torch.no_grad():
            feat = world_model.rssm.feat(state)
            row["value"] = agent["critic"](feat).numpy()
            row["predicted_reward"] = world_model.reward(feat).numpy()
            row["discount"] = torch.sigmoid(world_model.discount(feat)).numpy()
        row["answer"] = (action[:, 0] + 1) / 2 if continuous else action.argmax(-1)
        row["shown"] = row.get("image", row.get("vector")).reshape(args.num_envs, -1)[:, 0]
        rows.append(row)
        row, done, _ = common.step_rows(envs, action, done)
    envs.close()
    play = SimpleNamespace(**{k: np.stack([row[k] for row in rows]) for k in rows[0]})
    play.first, play.terminal = play.is_first > 0, play.is_terminal > 0
    # DreamerV1 trains no critic on the states that imagination starts from, as reset rows are.
    play.judged = ~play.first if script == "dreamerv1.py" else np.ones_like(play.first)
    return play


def distance(ours, truth, where):
    """Mean absolute error in the rows of a mask (steps, environments)."""
    assert where.any()
    return np.abs(ours - truth)[where].mean()


def returns(play):
    """What followed each row until a terminal one, discounted; NaN where play ended before."""
    ret, following = np.empty_like(play.reward), np.full_like(play.reward[0], np.nan)
    for t in reversed(range(len(ret))):
        following = np.where(play.terminal[t], 0, GAMMA * following)
        ret[t] = following = play.reward[t] + following
    return ret


def assert_model_knows(play):
    """The reward of each row, and which rows are terminal."""
    everywhere = np.ones_like(play.first)
    assert distance(play.predicted_reward, play.reward, everywhere) < 0.1
    assert distance(play.discount, GAMMA * (1 - play.is_terminal), everywhere) < 0.05


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=slow) for kind in ("", "Continuous")])
def test_the_value_of_a_constant_reward_goes_on_past_the_time_limit(script, tmp_path, kind):
    play = train(script, f"ProbeConstant{kind}-v0", 400, tmp_path)
    assert_model_knows(play)
    assert not play.terminal.any()
    value = 1 / (1 - GAMMA) - play.first  # a reset row comes without the reward
    assert distance(play.value, value, play.judged) < 0.3


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=slow) for kind in ("", "Continuous", "Pixels")]
)
def test_a_reward_that_the_observation_foretold_is_remembered_and_valued(script, tmp_path, kind):
    play = train(script, f"ProbeObservation{kind}-v0", 400, tmp_path)
    assert_model_knows(play)
    ret = returns(play)
    known = np.isfinite(ret)
    assert set(ret[known & play.terminal]) == {-1, 1}
    assert distance(play.value, ret, known & ~play.first) < 0.2
    if play.judged[play.first].any():
        assert distance(play.value, ret, known & play.first) < 0.2


@pytest.mark.parametrize(
    ("kind", "updates"),
    [
        ("", 400),
        pytest.param("Continuous", 600, marks=slow),
        pytest.param("ContinuousPixels", 600, marks=slow),
    ],
)
def test_the_action_that_the_observation_asks_for_is_learnt(script, tmp_path, kind, updates):
    play = train(script, f"ProbeAction{kind}-v0", updates, tmp_path)
    assert_model_knows(play)
    high = play.shown > (127 if "Pixels" in kind else 0)
    assert high[play.first].any()
    assert not high[play.first].all()
    if "Continuous" in kind:
        assert distance(play.answer, np.where(high, 0.75, 0.25), play.first) < 0.15
    else:
        assert distance(play.answer, high, play.first) < 0.05
    ret = returns(play)
    known = np.isfinite(ret)
    assert ret[known & play.terminal].mean() > 0.8  # of 1
    assert distance(play.value, ret, known & play.judged) < 0.2


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=slow) for kind in ("", "Continuous")])
def test_an_action_that_costs_now_and_pays_later_is_learnt(script, tmp_path, kind):
    play = train(script, f"ProbeDelayed{kind}-v0", 400, tmp_path)
    assert_model_knows(play)
    assert play.answer[play.first].mean() > 0.9
    second = ~play.first & ~play.terminal
    assert distance(play.value, -0.3 + GAMMA, second) < 0.2
    if play.judged[play.first].any():
        assert distance(play.value, GAMMA * (-0.3 + GAMMA), play.first) < 0.2


@pytest.mark.parametrize(
    "kind", ["", pytest.param("Continuous", marks=slow), pytest.param("Pixels", marks=slow)]
)
def test_going_on_is_preferred_to_more_reward_and_a_true_end(script, tmp_path, kind):
    play = train(script, f"ProbeTerminal{kind}-v0", 400, tmp_path)
    assert_model_knows(play)
    assert (play.answer > 0.5).mean() > 0.95
    value = 0.5 / (1 - GAMMA) - 0.5 * play.first  # the other action has GAMMA * 1 and no more
    assert distance(play.value, value, play.judged & ~play.terminal) < 0.3
