"""Environments: rows, Atari, dm_control, any other gymnasium id, and evaluation."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from helpers import envs as tiny

import common
import runtime

ROOT = Path(__file__).parent.parent
every_way = pytest.mark.parametrize(
    "parallel", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in turn", "processes"]
)


@pytest.fixture
def make_envs():
    """tiny.make_envs, whose environments are closed after the test."""
    made = []

    def make(*args, **options):
        made.append(tiny.make_envs(*args, **options))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


@pytest.fixture(scope="module")
def gl():
    """Skips where nothing draws without a screen, which is probed apart from choose_gl."""
    if "MUJOCO_GL" not in os.environ:
        code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
        tries = [
            subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | {"MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl},
                capture_output=True,
            ).returncode
            for gl in ("egl", "osmesa")
        ]
        if all(tries):
            pytest.skip("no OpenGL without a screen")


def run_python(code):
    """Runs code as a user would, in a process without our MUJOCO_GL -> (exit code, output)."""
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    env["PYTHONPATH"] = str(ROOT / "tests")
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout + result.stderr


def play(envs, steps, seed=0):
    """Random play -> rows: dict of (steps + 1, N, ...), dones (steps + 1, N)."""
    torch.manual_seed(seed)
    rows = [tiny.reset_rows(envs)]
    dones = [envs.ended]
    for _ in range(steps):
        row, _ = tiny.step(envs, envs.random_actions())
        rows.append(row)
        dones.append(envs.ended)
    return {k: np.stack([row[k] for row in rows]) for k in rows[0]}, np.stack(dones)


def episode_of(env, action):
    """The rewards of an episode in which one action is taken all the time."""
    env.reset()
    rewards, done = [], False
    while not done:
        _, reward, terminated, truncated, _ = env.step(action)
        rewards.append(reward)
        done = terminated or truncated
    return rewards


def assert_same_rows(rows, others):
    assert rows.keys() == others.keys()
    for key in rows:
        np.testing.assert_array_equal(rows[key], others[key], key)
        assert rows[key].dtype == others[key].dtype


def play_both(envs, others, steps):
    """Random play in two sets of environments, which give the same -> rows, dones."""
    rows, dones = play(envs, steps)
    same, same_dones = play(others, steps)
    assert_same_rows(rows, same)
    np.testing.assert_array_equal(dones, same_dones)
    for name in ("returns", "lengths", "episodes"):
        np.testing.assert_array_equal(getattr(envs, name), getattr(others, name), name)
    return rows, dones


def preset(env_id, observation="auto", preset="auto"):
    return common.choose_preset(tiny.env_args(env_id, observation=observation, preset=preset))


def check_alignment(rows, dones, codes):
    """Asserts that counting environments' rows fit together; codes: (T, N) from the actions."""
    time, code = rows["vector"][..., 0], rows["vector"][..., 1]
    first = rows["is_first"] == 1
    assert first[1:].sum(0).min() >= 2  # every environment began anew
    assert len({tuple(column) for column in first.T}) > 1  # at different times
    np.testing.assert_array_equal(first[1:], dones[:-1])  # the row after a last row is a reset
    for key in ("action", "reward", "is_terminal"):
        assert not rows[key][first].any(), key
    assert (time[first] == 0).all()
    assert (code[first] == -1).all()
    np.testing.assert_array_equal(time[1:][~first[1:]], (time[:-1] + 1)[~first[1:]])
    np.testing.assert_allclose(code[~first], codes[~first], rtol=1e-5)
    np.testing.assert_allclose(rows["reward"][~first], (time + codes / 8)[~first], rtol=1e-5)
    terminal = rows["is_terminal"] == 1
    assert terminal.any()  # and some episodes ended without it
    assert (dones & ~terminal).any()
    assert not (terminal & ~dones).any()


# Rows
def test_observation_action_and_reward_of_a_row_belong_together(make_envs):
    rows, dones = play(make_envs(3, "Counting-v0", seed=5), 61)
    check_alignment(rows, dones, rows["action"].argmax(-1))
    assert rows["action"].shape == (62, 3, 3)
    for key in ("action", "reward", "is_first", "is_terminal"):
        assert rows[key].dtype == np.float32
    rows, dones = play(make_envs(4, "CountingContinuous-v0", seed=6), 53)
    taken = (rows["action"] + 1) / 2 * np.array([6, 1]) + np.array([-2, 0])
    check_alignment(rows, dones, taken.sum(-1))


@pytest.mark.slow
def test_environments_in_processes_of_their_own_give_the_same_rows(make_envs):
    sync = make_envs(2, "helpers.envs:Counting-v0", seed=5)
    parallel = make_envs(2, "helpers.envs:Counting-v0", seed=5, parallel=True)
    assert isinstance(parallel.vector, gym.vector.AsyncVectorEnv)
    rows, dones = play_both(sync, parallel, 41)
    check_alignment(rows, dones, rows["action"].argmax(-1))
    taken = [env.unwrapped.taken for env in sync.vector.envs]
    assert taken == list(parallel.vector.get_attr("taken"))


def test_a_parallel_environment_that_cannot_be_made_is_a_user_error(make_envs):
    with pytest.raises(runtime.UserError, match="no NoSuchThing-v0"):
        make_envs(2, "NoSuchThing-v0", seed=5, parallel=True)


def test_frames_are_counted_without_reset_rows(make_envs):
    envs = make_envs(3, "Counting-v0", seed=8, action_repeat=2)
    steps = 0
    for _ in range(32):
        row, episodes = tiny.step(envs, envs.random_actions())
        taken, _ = runtime.gather_steps(row, episodes)
        steps += taken
    frames = sum(len(env.unwrapped.taken) for env in envs.vector.envs)
    odd = 2 * steps - frames  # repeats that the end of an episode broke off count whole
    assert 0 < odd < 20
    assert steps < 3 * 31


@pytest.mark.parametrize("repeat", [1, 2])
def test_returns_and_lengths_are_the_sums_over_the_rows_of_each_episode(make_envs, repeat):
    envs = make_envs(3, "Counting-v0", seed=5, action_repeat=repeat)
    rewards = [[], [], []]  # of the episode so far
    ends = [[], [], []]  # the steps with which episodes ended
    for t in range(60):
        row, episodes = tiny.step(envs, envs.random_actions())
        ended = []
        for i, env in enumerate(envs.vector.envs):
            if row["is_first"][i]:
                rewards[i] = []
            else:
                rewards[i].append(float(row["reward"][i]))
            if envs.ended[i]:
                ends[i].append(t)
                assert -(-env.unwrapped.length // repeat) == len(rewards[i])
                total = {"charts/episodic_return": sum(rewards[i])}
                ended.append(total | {"charts/episodic_length": len(rewards[i])})
        assert episodes == ended
        assert envs.returns.tolist() == [sum(rewards[i]) for i in range(3)]
        assert envs.lengths.tolist() == [len(rewards[i]) for i in range(3)]
    assert min(len(steps) for steps in ends) > 5
    assert len({tuple(steps) for steps in ends}) == 3  # at different times


def test_environments_that_all_ended_are_reset(make_envs):
    envs = make_envs(2, "Counting-v0", seed=5)
    dtypes = dict.fromkeys(envs.shapes, np.float32)
    for episode in (0, 1, 2):  # whether or not the episodes have really ended
        envs.load_state_dict({"episodes": [episode, episode]})
        assert envs.all_ended
        row, episodes = tiny.step(envs, np.eye(3)[[1, 2]])
        assert not envs.ended.any()
        assert episodes == []
        assert row["is_first"].tolist() == [1, 1]
        assert not any(row[key].any() for key in ("action", "reward", "is_terminal"))
        assert row["vector"][:, :2].tolist() == [[0, -1], [0, -1]]
        assert envs.episodes.tolist() == [episode + 1, episode + 1]
        assert {k: v.dtype for k, v in row.items()} == dtypes
        assert {k: v.shape[1:] for k, v in row.items()} == envs.shapes
        kept = {k: v.copy() for k, v in row.items()}
        after, _ = tiny.step(envs, np.eye(3)[[1, 2]])
        assert after["vector"][:, :2].tolist() == [[1, 1], [1, 2]]
        assert_same_rows(row, kept)  # its values stay when the environment goes on


def test_an_environment_alone_gives_the_rows_that_it_gives_among_others(make_envs):
    streams = []
    for num_envs in (1, 3):  # alone it is reset, among others by the step after its last
        envs = make_envs(num_envs, "Counting-v0", seed=5)
        rows = [tiny.reset_rows(envs)]
        for step in range(50):
            action = np.eye(3, dtype=np.float32)[[step % 3] * num_envs]
            rows.append(tiny.step(envs, action)[0])
        streams.append({k: np.stack([row[k][0] for row in rows]) for k in rows[0]})
    assert streams[0]["is_first"].sum() > 5
    assert_same_rows(*streams)


@pytest.mark.parametrize("env_id", ["Counting-v0", "CountingContinuous-v0"])
def test_random_actions_are_uniform_and_follow_from_torchs_seed(make_envs, env_id):
    envs, draws = make_envs(3, env_id, seed=1), []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        draws.append(torch.cat([envs.random_actions() for _ in range(500)]))
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    actions = draws[0].numpy()
    assert actions.dtype == np.float32
    assert envs.discrete == (env_id == "Counting-v0")
    if envs.discrete:
        assert set(actions.sum(-1)) == {1.0}
        assert abs(actions.mean(0) - 1 / 3).max() < 0.04
    else:
        assert abs(actions.mean(0)).max() < 0.05
        assert abs(actions.std(0) - 1 / np.sqrt(3)).max() < 0.03
        assert abs(actions).max() <= 1


# Seeds and episodes
def seeds(rows, env):
    """The seeds of the episodes in an environment's rows."""
    vector = rows["vector"][rows["is_first"][:, env] == 1, env]
    return [int(high) * 2**16 + int(low) for low, high in vector[:, 2:]]


def seed_of_episode(seed, index, episode):
    return int(np.random.SeedSequence([seed, index, episode]).generate_state(1)[0]) >> 1


def test_episodes_have_seeds_that_follow_from_run_environment_and_number(make_envs):
    rows, _ = play(make_envs(2, "Counting-v0", seed=3), 60)
    drawn = [seeds(rows, i)[:5] for i in (0, 1)]
    assert drawn == [[seed_of_episode(3, i, k) for k in range(5)] for i in (0, 1)]
    assert len({*drawn[0], *drawn[1]}) == 10  # all differ
    shifted = make_envs(1, "Counting-v0", seed=3, first_index=1)
    assert seeds(play(shifted, 60)[0], 0)[:5] == drawn[1]


@every_way
@pytest.mark.parametrize("time_limit", [0, 5])  # with a limit, one more wrapper
def test_environments_go_on_with_the_episodes_after_those_of_a_state(
    make_envs, parallel, time_limit
):
    made = {"seed": 3, "parallel": parallel, "time_limit": time_limit}
    envs = make_envs(2, "helpers.envs:Counting-v0", episodes=[0, 2], **made)
    rows, _ = play(envs, 36)
    assert not envs.all_ended  # the state is taken amid an episode
    begun = (rows["is_first"].sum(0) + np.array([0, 2])).tolist()  # episodes that have
    assert list(envs.vector.get_attr("episode")) == envs.episodes.tolist() == begun
    state = envs.state_dict()
    assert state == {"episodes": begun}
    assert begun[0] != begun[1]
    resumed = make_envs(2, "helpers.envs:Counting-v0", **made)
    resumed.load_state_dict(state)
    again = {"episodes": [4, 0]}
    envs.load_state_dict(again)  # of environments that are amid an episode
    for later, begun in ((resumed, state["episodes"]), (envs, again["episodes"])):
        rows, _ = play(later, 30)
        assert (rows["is_first"][0] == 1).all()
        for i in (0, 1):
            drawn = seeds(rows, i)
            assert drawn == [seed_of_episode(3, i, begun[i] + k) for k in range(len(drawn))]
            assert len(drawn) > 2
            assert later.state_dict()["episodes"][i] == begun[i] + len(drawn)


class Talking(tiny.Counting):
    """Says something else in info at each step, which gymnasium cannot put side by side."""

    def reset(self, **kwargs):
        obs, _ = super().reset(**kwargs)
        return obs, self.info()

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, self.info()

    def info(self):
        count = (self.time + self.seed) % 5
        return {"seen": np.zeros(count), "score": None if count % 2 else count, "episode": count}


gym.register("Talking-v0", Talking)


@every_way
def test_info_that_differs_from_step_to_step_disturbs_nothing(make_envs, parallel):
    with pytest.raises(ValueError, match="could not broadcast"):  # what would happen otherwise
        gym.vector.SyncVectorEnv([Talking, Talking]).reset(seed=[1, 2])
    quiet = make_envs(3, "Counting-v0", seed=5)
    envs = make_envs(3, "test_environments:Talking-v0", seed=5, parallel=parallel)
    rows, dones = play_both(quiet, envs, 41)
    check_alignment(rows, dones, rows["action"].argmax(-1))


# Time limits
@pytest.mark.parametrize(
    ("frames", "repeat", "steps"), [(7, 1, 7), (8, 2, 4), (7, 2, 4), (3, 4, 1)]
)
def test_a_time_limit_in_frames_truncates_after_the_agent_step_that_reaches_it(
    frames, repeat, steps
):
    env = tiny.make_env("Pendulum-v1", time_limit=frames, action_repeat=repeat)
    for _ in range(2):
        env.reset()
        ends = [env.step(np.zeros(1))[2:4] for _ in range(steps)]
        assert ends == [(False, False)] * (steps - 1) + [(False, True)]


def test_the_limit_of_the_environment_itself_holds_without_a_time_limit(make_envs):
    rows, dones = play(make_envs(1, "CountingShort-v0", seed=2), 60)
    assert rows["vector"][..., 0].max() == 4
    assert (dones & (rows["vector"][..., 0] == 4) & (rows["is_terminal"] == 0)).any()


# Atari
@pytest.mark.parametrize("env_id", ["PongNoFrameskip-v4", "ALE/Pong-v5"])
def test_atari_frames_are_counted_once(env_id):
    env = tiny.make_env(env_id, grayscale=True, action_repeat=4, sticky_prob=0.0)
    env.reset()
    ale = env.unwrapped.ale
    for _ in range(5):
        before = ale.getEpisodeFrameNumber()
        env.step(np.eye(6)[2])
        assert ale.getEpisodeFrameNumber() - before == 4


@pytest.mark.parametrize(("grayscale", "channels"), [(True, 1), (False, 3)])
@pytest.mark.parametrize("env_id", ["PongNoFrameskip-v4", "ALE/Pong-v5"])
def test_atari_images_are_the_screen_in_gray_or_rgb(env_id, grayscale, channels):
    assert preset(env_id) == "atari"
    env = tiny.make_env(env_id, grayscale=grayscale)
    assert env.observation_space["image"].shape == (channels, 64, 64)
    env.reset()
    for _ in range(4):
        image = env.step(np.eye(6)[3])[0]["image"]
    assert image.dtype == np.uint8
    ale = env.unwrapped.ale
    screen = ale.getScreenGrayscale()[..., None] if grayscale else ale.getScreenRGB()
    small = np.atleast_3d(cv2.resize(screen, (64, 64), interpolation=cv2.INTER_AREA))
    np.testing.assert_array_equal(image, small.transpose(2, 0, 1))
    assert image.std() > 1


def test_atari_image_is_the_maximum_of_the_last_two_frames():
    pair = [tiny.make_env("PongNoFrameskip-v4", grayscale=True, action_repeat=r) for r in (1, 4)]
    for env in pair:
        env.reset()
    single, repeated = pair
    for _ in range(20):
        screens = []
        for _ in range(4):
            single.step(np.eye(6)[2])
            screens.append(single.unwrapped.ale.getScreenGrayscale())
        image = repeated.step(np.eye(6)[2])[0]["image"][0]
        both = np.maximum(*screens[2:])
        np.testing.assert_array_equal(image, cv2.resize(both, (64, 64), interpolation=3))
    assert (screens[2] != screens[3]).any()


@pytest.mark.parametrize(("env_id", "options", "actions", "sticky"), [
    ("PongNoFrameskip-v4", {}, 6, 0.0), ("ALE/Pong-v5", {}, 6, 0.25),
    ("PongNoFrameskip-v4", {"sticky_prob": 0.25}, 6, 0.25),
    ("ALE/Pong-v5", {"sticky_prob": 0.0}, 6, 0.0),
    ("PongNoFrameskip-v4", {"full_action_space": True}, 18, 0.0),
])  # fmt: skip
def test_sticky_actions_and_all_actions_follow_the_flags_and_else_the_id(
    env_id, options, actions, sticky
):
    for observation in ("auto", "pixels", "both"):  # all three are what a game shows anyhow
        options["observation"] = observation
        env = tiny.make_env(env_id, grayscale=True, action_repeat=4, **options)
        assert env.action_space.n == actions
        assert env.unwrapped.ale.getFloat("repeat_action_probability") == sticky
        assert env.observation_space["image"].shape == (1, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env_id", "grayscale"), [("PongNoFrameskip-v4", True), ("ale_py:ALE/Breakout-v5", False)]
)
def test_atari_games_in_processes_of_their_own_give_the_rows_of_those_in_turn(
    make_envs, env_id, grayscale
):
    options = {"seed": 5, "grayscale": grayscale, "action_repeat": 4, "time_limit": 100}
    sync, parallel = (make_envs(2, env_id, parallel=where, **options) for where in (False, True))
    assert sync.shapes == parallel.shapes
    assert sync.discrete is parallel.discrete is True
    _, dones = play_both(sync, parallel, 60)
    assert dones.sum() == 4  # after 25 steps each time


def test_atari_episodes_begin_with_up_to_30_no_ops():
    env = tiny.make_env("PongNoFrameskip-v4", grayscale=True, action_repeat=4)
    noops = []
    for _ in range(12):
        env.reset()
        noops.append(env.unwrapped.ale.getEpisodeFrameNumber())
    assert min(noops) >= 1
    assert max(noops) <= 30
    assert len(set(noops)) >= 5


def test_losing_a_life_ends_nothing():
    env = tiny.make_env("BreakoutNoFrameskip-v4", grayscale=True, action_repeat=4)
    env.reset()
    lives = [5]
    terminated = False
    while not terminated and len(lives) < 2000:
        _, _, terminated, truncated, _ = env.step(np.eye(4)[1])  # FIRE throws each ball
        lives.append(env.unwrapped.ale.lives())
        assert not truncated
        assert terminated == (lives[-1] == 0)
    assert set(lives) == set(range(6))


def test_a_time_limit_truncates_an_atari_game():
    options = {"grayscale": True, "action_repeat": 4, "time_limit": 18, "sticky_prob": 0.0}
    env = tiny.make_env("ALE/Pong-v5", **options)
    env.reset()
    ends = [env.step(np.eye(6)[0])[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(False, True)]


@pytest.mark.parametrize(("time_limit", "frames"), [(0, 108_000), (108_000, -1), (200_000, -1)])
def test_the_emulators_own_limit_holds_only_without_a_time_limit(time_limit, frames):
    env = tiny.make_env("ALE/Pong-v5", time_limit=time_limit)
    assert env.unwrapped.ale.getInt("max_num_frames_per_episode") == frames


# dm_control
@pytest.mark.slow
def test_every_task_of_the_suite_can_be_made_from_vectors(gl):
    tiny.make_env("dmc/walker-walk", observation="vector")  # chooses OpenGL first
    from dm_control import suite

    assert len(suite.ALL_TASKS) > 40
    for domain, task in suite.ALL_TASKS:
        env_id = f"dm_control/{domain}-{task}-v0"
        env = tiny.make_env(env_id, observation="vector", action_repeat=2)
        obs, _ = env.reset()
        assert obs["vector"].shape == env.observation_space["vector"].shape, env_id
        obs, _, terminated, truncated, _ = env.step(env.action_space.high)
        assert np.isfinite(obs["vector"]).all(), env_id
        assert (terminated, truncated) == (False, False), env_id
        env.close()


def test_dmc_is_short_for_dm_control():
    begins = []
    for env_id in ("dm_control/ball_in_cup-catch-v0", "dmc/ball_in_cup-catch"):
        assert preset(env_id, "vector") == "dmc_vector"
        assert preset(env_id) == "dmc_pixels"
        env = tiny.make_env(env_id, 3, 1, observation="vector")
        begins.append(env.reset()[0]["vector"])
    np.testing.assert_array_equal(*begins)


def noted(owner, monkeypatch):
    """The actions and results of an environment's step from here on."""
    steps, step = [], owner.step

    def noting(action):
        steps.append((action, step(action)))
        return steps[-1][1]

    monkeypatch.setattr(owner, "step", noting)
    return steps


def test_1000_frames_of_dm_control_are_500_agent_steps_with_the_rewards_summed(
    make_envs, monkeypatch
):
    options = {"observation": "vector", "action_repeat": 2}
    envs = make_envs(1, "dm_control/cartpole-balance-v0", **options)
    steps = noted(envs.vector.envs[0].unwrapped, monkeypatch)
    tiny.reset_rows(envs)
    for k in range(1, 501):
        row, episodes = tiny.step(envs, np.full((1, 1), 0.5))
        rewards = [result[1] for _, result in steps]
        assert len(rewards) == 2 * k
        assert row["reward"][0] == pytest.approx(sum(rewards[-2:]))
        assert row["is_terminal"] == [0]
        assert envs.ended == [k == 500]
    (episode,) = episodes
    assert episode["charts/episodic_length"] == 500
    assert episode["charts/episodic_return"] == pytest.approx(sum(rewards), rel=1e-5)
    assert 0 < row["reward"][0] < 2


def test_only_a_discount_of_0_terminates_dm_control(monkeypatch):
    env = tiny.make_env("dm_control/lqr-lqr_2_1-v0", observation="vector", action_repeat=2)
    raw = env.unwrapped._env
    steps = noted(raw, monkeypatch)
    env.reset()
    assert env.step(np.zeros(1))[2:4] == (False, False)
    assert 0 not in [timestep.discount for _, timestep in steps]
    physics = raw.physics
    with physics.reset_context():  # at rest at the target the task is done
        physics.data.qpos[:] = 0
        physics.data.qvel[:] = 0
    assert env.step(np.zeros(1))[2:4] == (True, False)
    assert steps[-1][1].discount == 0


def test_after_dm_control_python_shows_no_more_warnings_than_before():
    code = """
import warnings
from helpers.envs import make_env
make_env("dmc/cartpole-balance", observation="vector")
assert not [f for f in warnings.filters if f[:3] == ("always", None, DeprecationWarning)]
"""
    returncode, output = run_python(code)
    assert (returncode, output) == (0, "")


# OpenGL
def test_vectors_and_pixels_of_dm_control_in_one_process_without_any_setting(gl):
    code = """
import os
from helpers.envs import make_env
def make(env_id, **options):
    return make_env(env_id, action_repeat=2, **options)
make("dmc/ball_in_cup-catch", observation="vector").reset()
both = make("dmc/ball_in_cup-catch", observation="both").reset()[0]
assert {k: v.shape for k, v in both.items()} == {"image": (3, 64, 64), "vector": (8,)}, both
for env_id, channels in (("dm_control/ball_in_cup-catch-v0", 3), ("dmc/quadruped-walk", 1)):
    env = make(env_id, grayscale=channels == 1)
    assert list(env.observation_space) == ["image"], env.observation_space
    first = env.reset()[0]["image"]
    for _ in range(5):
        image = env.step(env.action_space.high)[0]["image"]
    assert image.shape == (channels, 64, 64) and image.dtype == "uint8"
    assert image.std() > 5 and (image != first).any()
    env.close()
assert env.unwrapped.render_kwargs["camera_id"] == 2
print("gl is", os.environ["MUJOCO_GL"])
"""
    returncode, output = run_python(code)
    assert returncode == 0, output
    assert re.fullmatch(r"gl is (egl|osmesa)\n", output)  # and no warning of a missing screen


@pytest.mark.parametrize(("num_envs", "env_id", "parallel"), [
    (1, "InvertedPendulum-v5", False),
    pytest.param(2, "dmc/ball_in_cup-catch", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_mujoco_is_drawn_without_any_setting_and_in_processes_too(gl, num_envs, env_id, parallel):
    code = f"""
from helpers.envs import make_envs, reset_rows
envs = make_envs({num_envs}, "{env_id}", parallel={parallel}, observation="pixels")
print("std", *reset_rows(envs)["image"].std((1, 2, 3)))
envs.close()
"""
    returncode, output = run_python(code)
    assert returncode == 0, output
    assert min(map(float, output.split("std")[1].split()[:num_envs])) > 5


@pytest.fixture
def fake_probe(monkeypatch):
    """Lets choose_gl find only what works -> the names that it tries; os.environ is another."""

    def fake(works, **environ):
        tried = []

        def run(command, env, **options):
            tried.append(env["MUJOCO_GL"])
            assert env["PYOPENGL_PLATFORM"] == env["MUJOCO_GL"]
            return subprocess.CompletedProcess(command, 0 if env["MUJOCO_GL"] in works else 1)

        monkeypatch.setattr(common.subprocess, "run", run)
        monkeypatch.setattr(common.os, "environ", {"PATH": "", **environ})
        monkeypatch.setattr(common, "find_gl", functools.cache(common.find_gl.__wrapped__))
        return tried

    return fake


@pytest.mark.parametrize(
    ("works", "tries"), [(["egl", "osmesa"], ["egl"]), (["osmesa"], ["egl", "osmesa"])]
)
def test_opengl_is_egl_or_else_osmesa_and_looked_for_once(fake_probe, works, tries):
    tried = fake_probe(works)
    for _ in range(3):
        tiny.make_env("CartPole-v1", observation="pixels")
        assert tried == tries
        assert common.os.environ["MUJOCO_GL"] == tries[-1]
        assert common.os.environ["PYOPENGL_PLATFORM"] == tries[-1]


@pytest.mark.parametrize(("env_id", "observation", "environ"), [
    ("CartPole-v1", "pixels", {"MUJOCO_GL": "glfw"}),
    ("CartPole-v1", "both", {"MUJOCO_GL": "osmesa"}),
    ("dmc/ball_in_cup-catch", "vector", {"MUJOCO_GL": "disable"}),
    ("CartPole-v1", "auto", {}), ("Pendulum-v1", "auto", {}), ("PongNoFrameskip-v4", "auto", {}),
])  # fmt: skip
def test_no_opengl_is_looked_for_if_the_user_chose_or_nothing_is_drawn(
    fake_probe, env_id, observation, environ
):
    tried = fake_probe(["egl", "osmesa"], **environ)
    before = dict(common.os.environ)
    tiny.make_env(env_id, observation=observation).reset()
    assert common.os.environ == before
    assert tried == []


def test_no_opengl_is_no_error_where_none_is_needed(fake_probe):
    tried = fake_probe([])
    env = tiny.make_env("CartPole-v1", observation="pixels")
    assert tried == ["egl", "osmesa"]
    assert "MUJOCO_GL" not in common.os.environ
    assert env.reset()[0]["image"].std() > 5
    env = tiny.make_env("dmc/ball_in_cup-catch", observation="vector")
    assert env.reset()[0]["vector"].shape == (8,)
    assert tried == ["egl", "osmesa"]  # once for all environments


@pytest.mark.parametrize("observation", ["auto", "pixels", "both"])
def test_pixels_without_any_opengl_name_the_package_to_install(fake_probe, observation):
    tried = fake_probe([])
    with pytest.raises(runtime.UserError, match="apt-get install libegl1"):
        tiny.make_env("dmc/ball_in_cup-catch", observation=observation)
    assert tried == ["egl", "osmesa"]


# Observations of any other id

NUMBERS = {"obs": np.zeros(2, np.float32), "space": Box(-1, 1, (2,))}  # where they don't matter


def make_still(name, obs, space, actions=None, **options):
    tiny.register_still(name, obs, space, actions)
    env = tiny.make_env(name, **options)
    return env, env.reset()[0]


def random_image(*shape):
    image = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    return image, Box(0, 255, shape, np.uint8)


def test_cartpole_is_a_vector_with_one_hot_actions():
    env = tiny.make_env("CartPole-v1")
    assert preset("CartPole-v1") == "other"
    assert env.observation_space == Dict({"vector": Box(-np.inf, np.inf, (4,), np.float32)})
    assert env.action_space == MultiBinary(2)
    for i, velocity in ((0, -1), (1, 1)):
        env.reset()
        assert np.sign(env.step(np.eye(2)[i])[0]["vector"][1]) == velocity


def test_a_dict_of_boxes_is_flattened_by_key():
    space = {"b": Box(-1, 1, (2, 2)), "a": Box(-1, 1, (3,), np.float64), "c": Box(-1, 1, ())}
    obs = {
        "c": np.float32(0.9),
        "b": np.array([[1, 2], [3, 4]], np.float32) / 10,
        "a": np.array([0.5, 0.6, 0.7]),
    }
    env, out = make_still("Parts-v0", obs, Dict(space))
    assert list(out) == ["vector"]
    assert out["vector"].dtype == np.float32
    assert out["vector"].shape == env.observation_space["vector"].shape == (8,)
    order = list(env.unwrapped.observation_space)
    expected = np.concatenate([np.ravel(obs[k]) for k in order]).astype(np.float32)
    np.testing.assert_array_equal(out["vector"], expected)


def test_an_image_of_odd_size_is_resized_by_area():
    image, space = random_image(97, 131, 3)
    _, rgb = make_still("Odd-v0", image, space)
    _, gray = make_still("Odd-v0", image, space, grayscale=True)
    assert rgb["image"].shape == (3, 64, 64)
    assert gray["image"].shape == (1, 64, 64)
    small = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(rgb["image"], small.transpose(2, 0, 1))
    luma = small @ np.array([0.299, 0.587, 0.114])
    assert abs(gray["image"][0] - luma).max() < 1


@pytest.mark.parametrize(("grayscale", "channels"), [(True, 1), (False, 3)])
@pytest.mark.parametrize("shape", [(64, 64), (80, 50), (80, 50, 1), (64, 64, 1)])
def test_an_image_of_one_channel_fits_gray_and_rgb(shape, grayscale, channels):
    image, space = random_image(*shape)
    _, out = make_still("OneChannel-v0", image, space, grayscale=grayscale)
    assert out["image"].shape == (channels, 64, 64)
    assert (out["image"] == out["image"][:1]).all()
    if shape[:2] == (64, 64):
        np.testing.assert_array_equal(out["image"][0], image.reshape(64, 64))


@pytest.mark.parametrize(("observation", "keys"), [
    ("auto", ["image", "vector"]), ("both", ["image", "vector"]), ("pixels", ["image"]),
    ("vector", ["vector"]),
])  # fmt: skip
def test_an_image_and_vectors_in_a_dict_can_be_chosen(observation, keys):
    image, box = random_image(64, 64, 3)
    obs = {"camera": image, "speed": np.ones(2, np.float32), "touch": np.zeros(3, np.float32)}
    space = Dict(camera=box, speed=Box(-1, 1, (2,)), touch=Box(-1, 1, (3,)))
    # Only what has no image of its own has to be drawn, and this one cannot be.
    env = common.DreamerSpaces(tiny.Still(obs, space), observation, False, 1, 0)
    out, _ = env.reset()
    assert sorted(out) == sorted(env.observation_space) == keys
    if "image" in keys:
        np.testing.assert_array_equal(out["image"], image.transpose(2, 0, 1))
    if "vector" in keys:
        np.testing.assert_array_equal(out["vector"], [1, 1, 0, 0, 0])


def test_cartpole_is_drawn_for_pixels():
    env = tiny.make_env("CartPole-v1", observation="pixels")
    out, _ = env.reset()
    assert list(out) == ["image"]
    screen = cv2.resize(env.render(), (64, 64), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(out["image"], screen.transpose(2, 0, 1))
    assert out["image"].std() > 5
    for _ in range(8):
        moved = env.step(np.eye(2)[1])[0]["image"]
    assert (moved != out["image"]).any()
    env.close()
    short = tiny.make_env("CartPole-v1", pixels=True).reset()[0]
    assert list(short) == ["image"]
    np.testing.assert_array_equal(short["image"], out["image"])
    both = tiny.make_env("CartPole-v1", observation="both", grayscale=True).reset()[0]
    assert {k: v.shape for k, v in both.items()} == {"image": (1, 64, 64), "vector": (4,)}


# Actions of any other id
def test_discrete_actions_may_start_above_0():
    env, _ = make_still("Start-v0", **NUMBERS, actions=Discrete(4, start=3))
    assert env.action_space == MultiBinary(4)
    for i in (0, 3, 1):
        env.step(np.eye(4)[i])
    assert env.unwrapped.taken == [3, 6, 4]


def test_bounds_that_are_infinite_leave_an_action_unscaled():
    low, high = np.array([-np.inf, -2, 0, -np.inf]), np.array([np.inf, 6, np.inf, 5])
    actions = Box(low.astype(np.float32), high.astype(np.float32))
    env, _ = make_still("Unbounded-v0", **NUMBERS, actions=actions)
    assert env.action_space == Box(-1, 1, (4,), np.float32)
    env.step(np.array([-1, -1, 0.5, 1], np.float32))
    np.testing.assert_allclose(env.unwrapped.taken[0], [-1, -2, 0.5, 1])


def test_actions_of_several_dimensions_are_flat_outside():
    low = np.arange(6, dtype=np.float32).reshape(2, 3)
    env, _ = make_still("Matrix-v0", **NUMBERS, actions=Box(low, low + 2))
    assert env.action_space.shape == (6,)
    env.step(np.array([-1, 0, 1, -1, 0, 1], np.float32))
    (taken,) = env.unwrapped.taken
    assert taken.shape == (2, 3)
    assert taken.dtype == np.float32
    np.testing.assert_allclose(taken - low, [[0, 1, 2], [0, 1, 2]], atol=1e-6)


def test_an_action_is_repeated_until_the_episode_ends():
    env = tiny.make_env("Counting-v0", action_repeat=4)
    total = sum(episode_of(env, np.eye(3)[2]))
    length = env.unwrapped.length
    assert len(env.unwrapped.taken) == length
    assert length % 4 != 0  # so that a repeat was broken off
    assert total == sum(range(1, length + 1)) + length * 2 / 8


# Ids
def test_an_id_may_name_the_module_that_registers_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    monkeypatch.delitem(sys.modules, "helpers.envs")
    for name in [k for k in gym.registry if k.startswith("Counting")]:
        monkeypatch.delitem(gym.registry, name)
    env = tiny.make_env("helpers.envs:Counting-v0")
    assert env.reset()[0]["vector"].shape == (4,)


@pytest.mark.parametrize(("env_id", "keywords", "has"), [
    ("Pendulum-v1", '{"g": 5}', lambda env: env.g == 5),
    ("CartPole-v1", '{"sutton_barto_reward": true}', lambda env: env._sutton_barto_reward),
    ("PongNoFrameskip-v4", '{"mode": 1}', lambda env: env._game_mode == 1),
    ("dmc/cartpole-balance", '{"task_kwargs": {"time_limit": 2}}',
     lambda env: env._env._step_limit == 200),
])  # fmt: skip
def test_keywords_reach_the_environment(env_id, keywords, has):
    options = {"observation": "vector"} if "dmc" in env_id else {}
    assert has(tiny.make_env(env_id, env_kwargs=keywords, **options).unwrapped)
    assert not has(tiny.make_env(env_id, **options).unwrapped)


def test_keywords_reach_the_environment_with_images_of_its_own():
    tiny.register_still("KeywordStill-v0", *random_image(9, 7))
    with pytest.raises(runtime.UserError, match="unexpected keyword argument 'color'"):
        tiny.make_env("KeywordStill-v0", pixels=True, env_kwargs='{"color": 1}')


# Evaluation
def returns_of(index, episodes, seed=11):
    """What the first episodes of an environment give to an agent that always takes action 1."""
    env = tiny.make_env("Counting-v0", seed, index)
    return [sum(episode_of(env, np.eye(3)[1])) for _ in range(episodes)]


def ones(row, state):
    return torch.eye(3)[torch.ones(len(row["reward"]), dtype=torch.int)], state


def evaluate(envs, episodes, **options):
    """Plays an agent that always takes action 1 and has no state."""
    return common.evaluate(envs, ones, {}, episodes, **options)


def test_evaluation_plays_whole_episodes_and_equally_many_in_each_environment(make_envs):
    envs = make_envs(3, "Counting-v0", seed=11)
    returns, cut, frames = evaluate(envs, 8)
    expected = returns_of(0, 3) + returns_of(1, 3) + returns_of(2, 2)
    np.testing.assert_allclose(sorted(returns), sorted(expected))
    assert cut == 0
    assert frames == []
    assert len({env.unwrapped.length for env in envs.vector.envs}) > 1


@pytest.mark.parametrize("episodes", [2, 5])
def test_every_evaluation_plays_the_same_episodes(make_envs, episodes):
    envs = make_envs(2, "Counting-v0", seed=11)
    first, *_ = evaluate(envs, episodes)
    evaluate(envs, 3)
    for _ in range(4):
        tiny.step(envs, envs.random_actions())
    assert not envs.all_ended  # the next evaluation breaks an episode off
    again, *_ = evaluate(envs, episodes)
    assert again.tolist() == first.tolist()
    expected = returns_of(0, -(-episodes // 2)) + returns_of(1, episodes // 2)
    np.testing.assert_allclose(sorted(first), sorted(expected))


def test_evaluation_has_the_same_noise_each_time_and_leaves_that_of_training_alone(make_envs):
    envs, noise = make_envs(2, "Counting-v0", seed=11), {1: [], 2: []}
    for seed in noise:
        torch.manual_seed(seed)
        before = torch.get_rng_state()

        def act(row, state, drawn=noise[seed]):
            drawn.append(float(torch.rand(())))
            return ones(row, state)

        common.evaluate(envs, act, {}, 3)
        assert torch.get_rng_state().equal(before)
    assert len(set(noise[1])) == len(noise[1]) > 5
    assert noise[1] == noise[2]


def test_evaluation_gives_the_agent_aligned_rows_and_its_own_state(make_envs):
    rows, states = [], []

    def act(row, state):
        rows.append(row)
        states.append(state)
        return ones(row, None)[0], {"calls": len(states)}

    start = {"calls": 0}
    common.evaluate(make_envs(2, "Counting-v0", seed=11), act, start, 6)
    assert states[0] is start
    assert [state["calls"] for state in states] == list(range(len(states)))
    for row in rows:
        np.testing.assert_array_equal(row["vector"][:, 0] == 0, row["is_first"] == 1)
        np.testing.assert_array_equal(row["action"][:, 1], 1 - row["is_first"])


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_the_film_of_an_evaluation_shows_one_whole_episode_of_the_first_environment(
    make_envs, seed
):
    *_, frames = evaluate(make_envs(2, "Counting-v0", seed=seed, render=True), 4, film=True)
    length = int(np.random.default_rng(seed_of_episode(seed, 0, 0)).integers(3, 10))
    assert [int(frame[0, 0, 0]) for frame in frames] == list(range(length))
    assert frames[0].shape == (32, 48, 3)
