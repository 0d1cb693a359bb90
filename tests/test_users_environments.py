"""Environments that users make: what they may do to a run, and spaces and actions of all kinds."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.envs import env_args, reset_rows
from gymnasium.spaces import Box, Dict, Discrete
from helpers.command_lines import bounded
from helpers.runs import EVERY_SCRIPT, TINY, checkpoint, counters, play, run, the_run, tiny, values
from helpers.users import BOX, Basic, Endless, register
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import common
import runtime

SHORT = f"{TINY} --prefill 40 --total-frames 80 --train-every 20 --log-every 40"


# What they do to a run
def test_an_evaluated_episode_has_a_bound_and_its_return_so_far_counts(place, monkeypatch, capsys):
    monkeypatch.setattr(common, "EVAL_FRAMES", 30)
    folder = play("dreamerv2.py", f"{SHORT} --env-id {register(Endless)}")
    assert values(folder, "eval/episodic_return") == [(80, 30)]
    assert values(folder, "eval/cut_episodes") == [(80, 2)]
    capsys.readouterr()
    play("dreamerv2.py", f"--evaluate {folder}")
    out = capsys.readouterr().out
    assert out.startswith("return 30.0 +- 0.0 in 2 episodes, 2 of them cut short, runs/")


@pytest.mark.parametrize(("options", "flags", "limited"), [
    ({}, {}, False), ({"max_episode_steps": 500}, {}, True), ({}, {"time_limit": 500}, True),
])  # fmt: skip
def test_an_environment_without_a_time_limit_is_pointed_out(options, flags, limited):
    env = common.make_env(env_args(register(Basic, **options), **flags), 0)
    assert ("--time-limit" in env.summary) != limited


class Moving(Basic):
    """Changes the working directory at each reset."""

    def reset(self, **kwargs):
        os.chdir("/")
        return super().reset(**kwargs)


def test_an_environment_may_change_the_working_directory(script, place):
    assert run(script, f"{SHORT} --env-id {register(Moving)}") == 0
    assert counters(the_run(place))[0] == 80
    assert not Path("runs").exists()


class Odd(Basic):
    """Unusual, but no mistake."""

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0], None

    def step(self, action):
        obs, reward, *ends, _ = super().step(action)
        return np.float64(obs), np.array([reward]), *map(np.bool_, ends), {"episode": 3}


def recorded():
    return gym.wrappers.RecordEpisodeStatistics(Basic())


@pytest.mark.parametrize(("entry", "flags"), [
    (Odd, ""), (Odd, "--action-repeat 2"), (recorded, ""),
])  # fmt: skip
def test_what_is_unusual_but_clear_is_taken(entry, flags, place):
    folder = play("dreamerv2.py", f"{SHORT} --env-id {register(entry)} --num-envs 2 {flags}")
    assert {value for _, value in values(folder, "charts/episodic_return")} == {20}


class Once(Basic):
    """Exists once: a second one finds the port taken."""

    living = 0

    def __init__(self):
        assert Once.living == 0, "the port is taken"
        Once.living += 1

    def close(self):
        Once.living -= 1


@EVERY_SCRIPT
def test_an_environment_that_can_exist_once_trains_and_is_evaluated(script, place, monkeypatch):
    monkeypatch.setattr(Once, "living", 0)
    flags = f"{tiny(script, 40)} --env-id {register(Once)} --eval-envs 0 --eval-every 30"
    folder = play(script, f"{flags} --total-frames 100")
    assert Once.living == 0
    assert values(folder, "eval/episodic_return")[-3:] == [(60, 20), (90, 20), (100, 20)]
    first = np.load(folder / "replay" / "is_first.npy")[:, 0]
    saved = checkpoint(folder)
    end = saved["replay"]["end"]
    # Evaluations at frames 60 and 90 cut the episode there: a reset comes next.
    steps = np.cumsum(~first[:end])
    assert steps[-1] == 100
    for frame in (60, 90):
        assert first[np.flatnonzero(steps == frame)[0] + 1]
    assert saved["envs"]["episodes"] == [int(first[:end].sum())]
    play(script, f"--evaluate {folder}")


def test_eval_envs_bounds_the_environments_of_an_evaluation():
    for count, episodes, made in ((10, 2, 2), (3, 20, 3), (10, 20, 10)):
        args = env_args(register(Basic), eval_envs=count, eval_episodes=episodes, evaluate="",
                        num_envs=1, async_envs=False, capture_video=False)  # fmt: skip
        envs, eval_envs = common.make_envs(args)
        assert (envs.num_envs, eval_envs.num_envs) == (1, made)
        assert not set(envs.indices) & set(eval_envs.indices)


@pytest.mark.parametrize("parallel", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("forgotten", [False, True])
def test_environments_are_closed_at_the_latest_when_nobody_has_them(forgotten, parallel, tmp_path):
    mark = tmp_path / "closed"
    keywords = json.dumps({"path": str(mark)})
    args = env_args("helpers.users:Closing-v0", env_kwargs=keywords)
    envs = common.Envs(args, 1, parallel)
    reset_rows(envs)
    mark.unlink(missing_ok=True)  # of the one that gymnasium makes here to see its spaces
    if not forgotten:
        envs.close()
    del envs
    gc.collect()
    assert mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["sys.exit(2)", "raise ZeroDivisionError"])
def test_environments_are_closed_when_python_ends(ends, tmp_path):
    keywords = json.dumps({"path": "closed"})
    program = f"""if True:
        import sys
        from helpers.envs import env_args
        import common
        args = env_args("helpers.users:Closing-v0", env_kwargs={keywords!r})
        envs = common.Envs(args, 1)
        {ends}
    """
    (tmp_path / "program.py").write_text(program)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True)
    assert done.returncode == (2 if "2" in ends else 1)
    assert (tmp_path / "closed").exists()


@pytest.mark.slow
def test_an_environment_that_does_not_end_is_killed():
    envs = common.Envs(env_args("helpers.users:Hanging-v0"), 1, parallel=True)
    reset_rows(envs)
    envs.send(envs.random_actions())
    envs.close()
    assert not envs.vector.processes[0].is_alive()


class Reseeding(Basic):
    def reset(self, **kwargs):
        torch.manual_seed(0)
        return super().reset(**kwargs)

    def step(self, action):
        torch.rand(5)
        return super().step(action)


def test_an_environment_that_seeds_torch_leaves_the_draws_of_the_run_alone():
    envs = common.Envs(env_args(register(Reseeding)), 2)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for _ in range(30):
        with runtime.forked_rng("test"):
            envs.send(envs.random_actions())
        envs.receive()
        assert torch.equal(torch.get_rng_state(), state)
    envs.close()


# Spaces and actions
def dreamer_spaces(obs, actions):
    class Spaces(gym.Env):
        observation_space = obs
        action_space = actions

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            assert self.action_space.contains(action), action
            return self.observation_space.sample(), 0.0, False, False, {}

    env = Spaces()
    env.observation_space.seed(0)
    return common.DreamerSpaces(env, "auto", False, 1, 0)


@st.composite
def boxes(draw):
    """Boxes of any shape, type and bounds, infinite ones too."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=3))
    dtype = np.dtype(draw(st.sampled_from(["float16", "float32", "float64", "int8", "int32",
                                           "int64", "uint8"])))  # fmt: skip
    if dtype.kind == "f":
        limit = float(np.finfo(dtype).max)
        numbers = st.floats(-limit, limit, width=8 * dtype.itemsize)
    else:
        numbers = st.integers(np.iinfo(dtype).min, np.iinfo(dtype).max)
    ends = [np.sort(draw(hnp.arrays(dtype, (2, *shape), elements=numbers)), 0)]
    low, high = ends[0]
    if dtype.kind == "f":
        low = np.where(draw(hnp.arrays(bool, shape)), low, -np.inf).astype(dtype)
        high = np.where(draw(hnp.arrays(bool, shape)), high, np.inf).astype(dtype)
    return Box(low, high, shape, dtype)


@given(boxes(), st.data())
@bounded(300)
def test_every_action_that_is_sent_lies_in_the_space(box, data):
    env = dreamer_spaces(BOX, box)
    env.reset()
    size = int(np.prod(box.shape))
    elements = st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-1, 1, width=32)
    action = data.draw(hnp.arrays(np.float32, (size,), elements=elements))
    env.step(action)  # asserts it


@given(st.integers(1, 9), st.integers(-5, 5), st.data())
@bounded(50)
def test_every_discrete_action_is_sent_as_it_counts(count, start, data):
    env = dreamer_spaces(BOX, Discrete(count, start=start))
    env.reset()
    env.step(np.eye(count, dtype=np.float32)[data.draw(st.integers(0, count - 1))])


def test_one_decimal_bounds_are_never_passed():
    for low in range(-30, 30, 3):
        for high in range(low + 1, 31, 3):
            env = dreamer_spaces(BOX, Box(low / 10, high / 10, (1,), np.float32))
            env.reset()
            env.step(np.ones(1, np.float32))
            env.step(-np.ones(1, np.float32))


def test_whole_numbers_have_equal_shares_of_the_range():
    env = dreamer_spaces(BOX, Box(0, 3, (1,), np.int32))
    taken = [env.to_action(np.float32([a])).item() for a in np.linspace(-0.999, 0.999, 400)]
    assert np.bincount(taken).tolist() == [100, 100, 100, 100]


def test_a_bound_on_one_side_leaves_room_for_actions():
    for low, high in ((0, np.inf), (5, np.inf), (-np.inf, -5), (-np.inf, 0)):
        env = dreamer_spaces(BOX, Box(low, high, (1,), np.float64))
        taken = {env.to_action(np.float32([a])).item() for a in (-1.0, 0.0, 0.5, 1.0)}
        assert len(taken) >= (2 if 0 in (low, high) else 3), (low, high)


@given(st.dictionaries(st.sampled_from("abc"), boxes(), min_size=1))
@bounded(60)
def test_every_row_has_the_declared_shapes(parts):
    space = Dict({k: box for k, box in parts.items() if len(box.shape) < 2 or box.dtype != "uint8"})
    if not space.spaces:
        return
    env = dreamer_spaces(space, Discrete(2))
    for value in (-1, 1):
        obs = {k: np.clip(np.full(box.shape, value), box.low, box.high).astype(box.dtype)
               for k, box in space.spaces.items()}  # fmt: skip
        with np.errstate(over="ignore"):
            fits = all(np.isfinite(np.float32(part)).all() for part in obs.values())
        if fits:
            row = env.observe(obs)
            assert {k: v.shape for k, v in row.items()} == {
                k: v.shape for k, v in env.observation_space.spaces.items()
            }


# Images
def image_env(space):
    class Images(Basic):
        observation_space = space

        def observe(self):
            return self.observation_space.sample()

    return Images


def test_an_image_of_another_shape_says_which_are_taken():
    for shape in ((3, 16, 16), (84, 84, 4)):
        env_id = register(image_env(Box(0, 255, shape, np.uint8)))
        with pytest.raises(runtime.UserError, match=r"uint8 of shape \(H, W\), \(H, W, 1\) or"):
            common.make_env(env_args(env_id), 0)


def test_spaces_of_old_gym_are_said_to_be_such():
    OldBox = type("Box", (), {"__module__": "gym.spaces.box", "shape": (3,), "dtype": np.float32})

    class Old(Basic):
        observation_space = OldBox()

    with pytest.raises(
        runtime.UserError, match=r"Dict of them, not .*, of gym and not of gymnasium"
    ):
        common.DreamerSpaces(Old(), "auto", False, 1, 0)


def test_a_run_says_what_the_agent_sees():
    seen = {}
    for name, space in {
        "floats": Box(0, 1, (16, 16, 3), np.float32),
        "image": Box(0, 255, (16, 16, 3), np.uint8),
        "both": Dict(a=Box(0, 255, (16, 16), np.uint8), b=BOX),
    }.items():
        env_id = register(image_env(space), max_episode_steps=10)
        seen[name] = common.make_env(env_args(env_id), 0).summary
    assert seen["image"] == "image 3 x 64 x 64 from 16 x 16 x 3, 2 discrete actions"
    assert seen["both"] == "image 3 x 64 x 64 from 16 x 16, vector 3, 2 discrete actions"
    assert "vector 768" in seen["floats"]
    assert "the observation taken as vector and not as image, since not of uint8" in seen["floats"]


@pytest.mark.parametrize("observation", ["pixels", "both"])
def test_an_environment_of_images_is_not_drawn_for_pixels(observation):
    space = Dict(a=Box(0, 255, (16, 16, 3), np.uint8), b=BOX)
    env_id = register(image_env(space))  # without any render mode
    env = common.make_env(env_args(env_id, observation=observation), 0)
    assert env.reset()[0]["image"].shape == (3, 64, 64)


@pytest.mark.parametrize("drawing", [
    None, [np.zeros((9, 7, 3), np.uint8)], np.zeros((9, 7, 3)), np.zeros((9, 7, 4), np.uint8),
])  # fmt: skip
def test_what_an_environment_draws_has_to_be_an_image(drawing):
    class Drawn(Basic):
        metadata: ClassVar = {"render_modes": ["rgb_array"]}
        render_mode = "rgb_array"

        def __init__(self, render_mode=None):
            pass

        def render(self):
            return drawing

    env = common.make_env(env_args(register(Drawn), observation="pixels"), 0)
    with pytest.raises(ChildProcessError, match=r"Mine-v0 .* failed: ValueError: render\(\) gives"):
        env.reset()
    with pytest.raises(ChildProcessError, match=r"gives .*, not uint8 of shape \(H, W\) or"):
        env.render()


# Films
def test_a_long_film_has_at_most_1000_images_from_beginning_to_end():
    film = common.Film()
    for number in range(5300):
        film.add(np.array(number))
    assert 500 < len(film.images) <= 1000
    assert film.images[0] == 0
    assert film.images[-1] > 5300 - 10
    assert len(set(np.diff(film.images))) == 1


def test_a_film_has_images_of_one_size():
    film = common.Film()
    for height in (4, 4, 8, 4):
        film.add(np.zeros((height, 4, 3), np.uint8))
    assert [image.shape for image in film.images] == [(4, 4, 3)] * 3
