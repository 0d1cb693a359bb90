"""What environments of one's own do to a run, and what servers do to it."""

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from helpers.envs import env_args
from gymnasium.spaces import Box, Dict, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import common
import runtime

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dreamerv1", "dreamerv2"]
TINY = """--batch-size 3 --batch-length 7 --deter 16 --hidden 16 --units 16 --stoch 3 --cnn-depth 2
    --pretrain 2 --train-every 20 --prefill 40 --total-frames 80 --eval-episodes 2 --threads 1
    --log-every 20"""
BOX = Box(-1, 1, (3,), np.float32)


class Basic(gym.Env):
    """Pays 1 for each of 20 steps; a subclass changes what a user got wrong."""

    observation_space = BOX
    action_space = Discrete(2)
    length = 20

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        return self.observe(), 1.0, False, self.time >= self.length, {}

    def observe(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)


@pytest.fixture
def user_env():
    """Registers a class of an environment -> its id."""
    names = []

    def register(cls, name="Mine-v0", **options):
        gym.registry.pop(name, None)
        gym.register(name, entry_point=cls, **options)
        names.append(name)
        return name

    yield register
    for name in names:
        gym.registry.pop(name, None)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory of one's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def play(script, flags, code=0):
    """A run in this process, as from the command line, that must end with the exit code."""
    module = importlib.import_module(script)
    handlers = {number: signal.getsignal(number) for number in runtime.SIGNALS}
    hook = threading.excepthook
    try:
        with runtime.exit_on_error():
            args = runtime.parse_args(
                module.Args, module.PRESETS, common.choose_preset, flags.split()
            )
            ended = module.main(args)
    except SystemExit as exit_:
        ended = exit_.code
    finally:
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended == code


def the_run(place):
    [folder] = (place / "runs").iterdir()
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def counters(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["counters"]


def fails(cls, user_env, place, capsys, script="dreamerv2"):
    """A run whose environment fails -> the line that says so; it is saved and can go on."""
    play(script, f"{TINY} --env-id {user_env(cls)}", 1)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "go on with: " in out
    assert counters(the_run(place))
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "environment 0 of Mine-v0 (seed 1, episode " in line
    return line


# Evaluations that do not end


class Endless(Basic):
    """Never ends; at some step of all its instances together it may send a signal."""

    steps = 0
    signal_at = None

    def step(self, action):
        Endless.steps += 1
        if Endless.steps == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        obs, reward, *_ = super().step(action)
        return obs, reward, False, False, {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_breaks_off_an_evaluation_which_a_resumed_run_repeats(
    script, user_env, place, monkeypatch
):
    monkeypatch.setattr(Endless, "steps", 0)
    monkeypatch.setattr(Endless, "signal_at", 100)
    flags = f"{TINY} --env-id {user_env(Endless)} --eval-every 60"
    play(script, flags, 143)
    folder = the_run(place)
    assert counters(folder)["step"] == 60
    assert counters(folder)["last_report"] == 59
    assert not any("eval/episodic_return" in row for row in rows_of(folder))
    monkeypatch.setattr(common, "EVAL_FRAMES", 30)
    play(script, f"--resume {folder}")
    evaluations = [row for row in rows_of(folder) if "eval/episodic_return" in row]
    assert [row["frames"] for row in evaluations] == [60, 80]


def test_an_evaluated_episode_has_a_bound_and_its_return_so_far_counts(
    user_env, place, monkeypatch, capsys
):
    monkeypatch.setattr(common, "EVAL_FRAMES", 30)
    play("dreamerv2", f"{TINY} --env-id {user_env(Endless)}")
    [row] = [row for row in rows_of(the_run(place)) if "eval/episodic_return" in row]
    assert row["eval/episodic_return"] == 30
    assert row["eval/cut_episodes"] == 2
    capsys.readouterr()
    play("dreamerv2", f"--evaluate {the_run(place)}")
    out = capsys.readouterr().out
    assert out == "return 30.0 +- 0.0 in 2 episodes, 2 of them cut short\n"


@pytest.mark.parametrize(("cls", "options", "flags", "warned"), [
    (Endless, {}, "", True), (Endless, {"max_episode_steps": 500}, "", False),
    (Endless, {}, "--time-limit 500", False), (Basic, {}, "", False),
])  # fmt: skip
def test_an_environment_that_may_never_end_is_warned_of(
    cls, options, flags, warned, user_env, place, monkeypatch, capsys
):
    monkeypatch.setattr(common, "EVAL_FRAMES", 30)
    play("dreamerv2", f"{TINY} --env-id {user_env(cls, **options)} {flags}")
    said = "no episode of Mine-v0 ended in 40 steps, consider --time-limit"
    assert (said in capsys.readouterr().out) == warned


def test_a_signal_says_at_once_what_will_happen(capfd):
    handlers = {number: signal.getsignal(number) for number in runtime.SIGNALS}
    try:
        with runtime.Interrupt():
            signal.raise_signal(signal.SIGINT)
            assert "saves and ends after this step; Ctrl-C ends at once" in capfd.readouterr().err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Signals and places


def test_a_process_that_an_environment_starts_ends_of_a_signal():
    handlers = {number: signal.getsignal(number) for number in runtime.SIGNALS}
    try:
        with runtime.Interrupt():
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            process.start()
            time.sleep(0.2)
            process.terminate()
            process.join(20)
            assert process.exitcode == -signal.SIGTERM
    finally:
        process.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)


STARTING = """
import subprocess

import gymnasium as gym
import numpy as np


class Starting(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        text = open("/proc/self/status").read()
        child = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
        masks = [int(t.split("SigIgn:")[1].split()[0], 16) for t in (text, child)]
        self.ignores = [mask >> 1 & 1 for mask in masks]  # SIGINT is number 2
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


gym.register("Starting-v0", Starting)
"""


@pytest.mark.slow
def test_what_an_environment_in_a_process_starts_can_be_interrupted(tmp_path, monkeypatch):
    (tmp_path / "starting.py").write_text(STARTING)
    monkeypatch.syspath_prepend(tmp_path)
    envs = common.Envs(env_args("starting:Starting-v0"), 1, parallel=True)
    envs.send(envs.random_actions())
    envs.receive()
    assert envs.vector.get_attr("ignores")[0] == [0, 0]
    os.kill(envs.vector.processes[0].pid, signal.SIGINT)
    envs.send(envs.random_actions())
    envs.receive()  # it was not disturbed
    envs.close()


class Moving(Basic):
    """Changes the working directory at each reset."""

    def reset(self, **kwargs):
        os.chdir("/")
        return super().reset(**kwargs)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_environment_may_change_the_working_directory(script, user_env, place):
    play(script, f"{TINY} --env-id {user_env(Moving)}")
    assert counters(the_run(place))["step"] == 80
    assert not Path("runs").exists()


def test_the_room_is_measured_on_the_disk_of_the_run(place, monkeypatch):
    asked = []
    usage = runtime.shutil.disk_usage
    monkeypatch.setattr(
        runtime.shutil, "disk_usage", lambda path: asked.append(path) or usage(path)
    )
    (place / "elsewhere").mkdir()
    (place / "runs").symlink_to(place / "elsewhere")
    runtime.open_run({"env_id": "X", "exp_name": "y", "seed": 1, "resume": ""}, 0)
    assert asked == [place / "runs"]


def test_a_dropped_terminal_lets_a_run_save_itself(tmp_path):
    command = [sys.executable, str(ROOT / "dreamerv2.py"), "--env-id", "CartPole-v1"]
    command += [*TINY.split(), "--total-frames", "100000", "--eval-every", "0"]
    reader, writer = os.pipe()
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=writer, stderr=writer,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    os.close(writer)
    end = time.monotonic() + 90
    while not any("losses/model" in path.read_text() for path in tmp_path.glob("runs/*/*.jsonl")):
        assert time.monotonic() < end
        time.sleep(0.05)
    os.close(reader)  # from now on nothing that is printed arrives
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    assert counters(the_run(tmp_path))["updates"] > 0


@pytest.mark.slow
def test_a_run_needs_no_stderr(tmp_path):
    command = f"{sys.executable} {ROOT / 'dreamerv2.py'} --env-id CartPole-v1 {TINY} 2>&-"
    command = " ".join(command.split())
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False).returncode == 0
    assert counters(the_run(tmp_path))["step"] == 80


class BadClose(Basic):
    def close(self):
        raise OSError("port is gone")


def test_an_environment_that_fails_to_close_spoils_no_finished_run(user_env, place, capsys):
    play("dreamerv2", f"{TINY} --env-id {user_env(BadClose)}")
    assert counters(the_run(place))["last_report"] == 80
    assert "closing Mine-v0 failed: OSError('port is gone')" in capsys.readouterr().err


class Exits(Basic):
    def step(self, action):
        if self.time == 15:
            sys.exit()
        return super().step(action)


def test_an_environment_that_exits_has_failed(user_env, place, capsys):
    assert "failed: SystemExit" in fails(Exits, user_env, place, capsys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_there_is_a_checkpoint_before_the_first_update_and_before_each_evaluation(
    script, user_env, place, monkeypatch
):
    seen, evaluate = [], common.evaluate

    def spy_evaluate(*args, **kwargs):
        seen.append(counters(the_run(place)))
        return evaluate(*args, **kwargs)

    module = importlib.import_module(script)
    update, updates = module.update, []

    def spy_update(*args, **kwargs):
        updates.append(counters(the_run(place)))
        return update(*args, **kwargs)

    monkeypatch.setattr(common, "evaluate", spy_evaluate)
    monkeypatch.setattr(module, "update", spy_update)
    flags = f"{TINY} --env-id {user_env(Basic)} --checkpoint-every 20 --eval-every 20"
    play(script, flags)
    assert updates[0] == {"step": 40, "updates": 0, "last_report": 39}
    assert [saved["step"] for saved in seen] == [40, 60, 80]


def test_the_command_to_go_on_is_quoted(place):
    run = place / "runs" / "with a space"
    command = runtime.resume_command(run, "Mine-v0")
    assert "--resume 'runs/with a space' --env-id Mine-v0" in command


# Actions


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
def boxes(draw, images=False):
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


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(boxes(), st.data())
def test_every_action_that_is_sent_lies_in_the_space(box, data):
    env = dreamer_spaces(BOX, box)
    env.reset()
    size = int(np.prod(box.shape))
    elements = st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-1, 1, width=32)
    action = data.draw(hnp.arrays(np.float32, (size,), elements=elements))
    env.step(action)  # asserts it


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 9), st.integers(-5, 5), st.data())
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


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from("abc"), boxes(), min_size=1))
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


# Noise


class Reseeding(Basic):
    def reset(self, **kwargs):
        torch.manual_seed(0)
        return super().reset(**kwargs)

    def step(self, action):
        torch.rand(5)
        return super().step(action)


def test_an_environment_that_seeds_torch_leaves_the_draws_of_the_run_alone(user_env):
    envs = common.Envs(env_args(user_env(Reseeding)), 2)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for _ in range(30):
        with runtime.forked_rng("test"):
            envs.send(envs.random_actions())
        envs.receive()
        assert torch.equal(torch.get_rng_state(), state)
    envs.close()


# Ids


@pytest.mark.parametrize(("env_id", "preset"), [
    ("Pong", "atari"), ("PongNoFrameskip", "atari"), ("ale_py:PongNoFrameskip-v4", "atari"),
    ("ale_py:ALE/Pong-v5", "atari"), ("ALE/Pong", "atari"), ("PongNoFrameskip-v4", "atari"),
    ("CartPole-v1", "other"), ("CartPole", "other"), ("mine:Pong2-v0", "other"),
])  # fmt: skip
def test_an_atari_id_is_known_without_version_and_with_module(env_id, preset):
    args = types.SimpleNamespace(env_id=env_id, preset="auto", observation="auto")
    assert common.choose_preset(args) == preset


# Rows that are none


class NanObservation(Basic):
    def observe(self):
        obs = super().observe()
        if self.time == 15:
            obs[1] = np.nan
        return obs


class NanReward(Basic):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.nan if self.time == 15 else reward, *rest


@pytest.mark.parametrize(("cls", "said"), [
    (NanObservation, "the observation is not finite: "), (NanReward, "the reward is nan"),
])  # fmt: skip
def test_a_number_that_is_none_fails_the_environment_and_enters_no_replay(
    cls, said, user_env, place, capsys
):
    line = fails(cls, user_env, place, capsys)
    assert said in line
    folder = the_run(place)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["replay"]["end"] == 15
    assert saved["counters"]["step"] == 14
    for name in ("vector", "reward"):
        assert np.isfinite(np.load(folder / "replay" / f"{name}.npy")).all()


class FourValues(Basic):
    def step(self, action):
        return super().step(action)[:4]


class Grows(Basic):
    def observe(self):
        return np.zeros(3 + (self.time > 5), np.float32)


class WrongKey(Basic):
    observation_space = Dict(a=BOX, b=BOX)

    def observe(self):
        return {"a": super().observe()}


class Words(Basic):
    def observe(self):
        return np.array(["one", "two", "six"])


class TwoRewards(Basic):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, np.ones(2), *rest


class Asserts(Basic):
    def step(self, action):
        assert self.time < 15
        return super().step(action)


@pytest.mark.parametrize(("cls", "said"), [
    (FourValues, "ValueError: not enough values to unpack"),
    (Grows, "the observation has shape (4,), its space says (3,)"),
    (WrongKey, "KeyError: 'b'"),
    (Words, "the observation is <U3, its space says float32"),
    (TwoRewards, "the reward is [1. 1.]"),
    (Asserts, "failed: AssertionError: "),
])  # fmt: skip
def test_a_first_environments_mistakes_are_named(cls, said, user_env, place, capsys):
    assert said in fails(cls, user_env, place, capsys)


def test_an_error_says_in_which_line_it_was_raised(user_env, place, capsys):
    line = fails(Asserts, user_env, place, capsys)
    number = Asserts.step.__code__.co_firstlineno + 1
    assert line.endswith(f"({__file__}:{number})")


class Odd(Basic):
    """Unusual, but no mistake."""

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0], None

    def step(self, action):
        obs, reward, *ends, _ = super().step(action)
        return np.float64(obs), np.array([reward]), *map(np.bool_, ends), {"episode": 3}


def recorded():
    return gym.wrappers.RecordEpisodeStatistics(Basic())


@pytest.mark.parametrize("entry", [Odd, recorded])
def test_what_is_unusual_but_clear_is_taken(entry, user_env, place):
    play("dreamerv2", f"{TINY} --env-id {user_env(entry)} --num-envs 2")
    returns = [row.get("charts/episodic_return", 20) for row in rows_of(the_run(place))]
    assert set(returns) == {20}


# Images


def image_env(space):
    class Images(Basic):
        observation_space = space

        def observe(self):
            return self.observation_space.sample()

    return Images


def test_an_image_of_another_shape_says_which_are_taken(user_env):
    for shape in ((3, 16, 16), (84, 84, 4)):
        env_id = user_env(image_env(Box(0, 255, shape, np.uint8)))
        with pytest.raises(runtime.UserError, match=r"uint8 of shape \(H, W\), \(H, W, 1\) or"):
            common.make_env(env_args(env_id), 0)


def test_spaces_of_old_gym_are_said_to_be_such(user_env):
    OldBox = type("Box", (), {"__module__": "gym.spaces.box", "shape": (3,), "dtype": np.float32})

    class Old(Basic):
        observation_space = OldBox()

    with pytest.raises(runtime.UserError, match=r"they are of gym, not of gymnasium"):
        common.DreamerSpaces(Old(), "auto", False, 1, 0)


def test_a_run_says_what_the_agent_sees(user_env):
    seen = {}
    for name, space in {
        "floats": Box(0, 1, (16, 16, 3), np.float32),
        "image": Box(0, 255, (16, 16, 3), np.uint8),
        "both": Dict(a=Box(0, 255, (16, 16), np.uint8), b=BOX),
    }.items():
        seen[name] = common.make_env(env_args(user_env(image_env(space))), 0).summary
    assert seen["image"] == "image 3 x 64 x 64 from 16 x 16 x 3, 2 discrete actions"
    assert seen["both"] == "image 3 x 64 x 64 from 16 x 16, vector 3, 2 discrete actions"
    assert "vector 768" in seen["floats"]
    assert "the observation taken as vector and not as image, since not of uint8" in seen["floats"]


@pytest.mark.parametrize("observation", ["pixels", "both"])
def test_an_environment_of_images_is_not_drawn_for_pixels(observation, user_env):
    space = Dict(a=Box(0, 255, (16, 16, 3), np.uint8), b=BOX)
    env_id = user_env(image_env(space))  # without any render mode
    env = common.make_env(env_args(env_id, observation=observation), 0)
    assert env.reset()[0]["image"].shape == (3, 64, 64)


# Films


def test_a_long_film_has_at_most_1000_images_from_beginning_to_end():
    film = common.Film()
    for number in range(5300):
        film.add(number)
    assert 500 < len(film.images) <= 1000
    assert film.images[0] == 0
    assert film.images[-1] > 5300 - 10
    assert len(set(np.diff(film.images))) == 1


# Threads, flags, metrics, tracking


def test_errors_in_the_users_threads_are_shown():
    shown = []
    hook = runtime.except_for_writers(shown.append)
    mine = threading.ExceptHookArgs((ValueError, ValueError("mine"), None, threading.Thread()))
    hook(mine)
    writer = type("_AsyncWriterThread", (threading.Thread,), {})()
    hook(threading.ExceptHookArgs((ValueError, ValueError("TensorBoard's"), None, writer)))
    assert shown == [mine]


@dataclass
class Flags:
    env_id: str = "CartPole-v1"
    resume: str = ""
    evaluate: str = ""
    track: bool = False
    shift: float = -0.5
    offset: int = -3
    sizes: tuple[int, ...] = (3, 4)
    pair: tuple[float, str] = (1.0, "x")


def test_flags_of_ones_own_may_be_negative_or_tuples_and_can_be_resumed(place):
    def parse(line):
        return runtime.parse_args(Flags, {"other": {}}, lambda args: "other", line.split())

    args = parse("--shift -2.5 --sizes 5 6 7")
    assert (args.shift, args.offset, args.sizes) == (-2.5, -3, (5, 6, 7))
    run, _ = runtime.open_run(vars(args) | {"exp_name": "x", "seed": 1}, 0)
    saved = yaml.safe_load((run / "args.yaml").read_text())
    del saved["exp_name"], saved["seed"]
    (run / "args.yaml").write_text(yaml.safe_dump(saved))
    again = parse(f"--resume {run}")
    assert (again.sizes, again.pair, again.shift) == ((5, 6, 7), (1.0, "x"), -2.5)


def test_a_metric_may_be_a_number_and_must_be_a_scalar():
    metrics = runtime.Metrics()
    metrics.record({"loss": torch.tensor(2.0), "mine": 0.5, "count": 3}, 0)
    assert metrics.read() == {"loss": 2.0, "mine": 0.5, "count": 3.0}
    with pytest.raises(TypeError, match=r"^metric mine has shape \(4,\), not \(\)$"):
        metrics.record({"loss": torch.tensor(2.0), "mine": torch.ones(4)}, 0)


def test_a_resumed_run_goes_on_in_its_run_of_weights_and_biases(place, monkeypatch):
    calls = []
    init = types.SimpleNamespace(init=lambda **options: calls.append(options))
    monkeypatch.setitem(sys.modules, "wandb", init)
    args = {"track": True, "wandb_project_name": "some", "wandb_entity": None, "total_frames": 9}
    hook = threading.excepthook
    for _ in range(2):
        runtime.Logger(place, args).close()
        threading.excepthook = hook
    assert [(call["id"], call["resume"]) for call in calls] == [(place.name, "allow")] * 2


def test_a_run_that_cannot_be_tracked_says_so_and_has_its_arguments(place, monkeypatch, capsys):
    def no_login(**options):
        raise RuntimeError("no login")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=no_login))
    play("dreamerv2", f"{TINY} --env-id CartPole-v1 --track", 2)
    assert "error: --track: RuntimeError: no login\n" in capsys.readouterr().err
    assert (the_run(place) / "args.yaml").exists()


# Environments that can exist once


class Once(Basic):
    living = 0

    def __init__(self):
        assert Once.living == 0, "the port is taken"
        Once.living += 1

    def close(self):
        Once.living -= 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_environment_that_can_exist_once_trains_and_is_evaluated(
    script, user_env, place, monkeypatch
):
    monkeypatch.setattr(Once, "living", 0)
    env_id = user_env(Once)
    flags = f"{TINY} --env-id {env_id} --eval-envs 0 --eval-every 30 --total-frames 100"
    play(script, flags)
    assert Once.living == 0
    folder = the_run(place)
    rows = rows_of(folder)
    assert [row["frames"] for row in rows if "eval/episodic_return" in row] == [60, 90, 100]
    assert {row["eval/episodic_return"] for row in rows if "eval/episodic_return" in row} == {20}
    first = np.load(folder / "replay" / "is_first.npy")[:, 0]
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    end = saved["replay"]["end"]
    # Evaluations at frames 60 and 90 cut the episode there: a reset comes next.
    steps = np.cumsum(~first[:end])
    assert steps[-1] == 100
    for frame in (60, 90):
        assert first[np.flatnonzero(steps == frame)[0] + 1]
    assert saved["envs"]["episodes"] == [int(first[:end].sum())]
    play(script, f"--evaluate {folder}")


def test_eval_envs_bounds_the_environments_of_an_evaluation(user_env):
    for count, episodes, made in ((10, 2, 2), (3, 20, 3), (10, 20, 10)):
        args = env_args(user_env(Basic), eval_envs=count, eval_episodes=episodes, evaluate="",
                        num_envs=1, async_envs=False, capture_video=False)  # fmt: skip
        envs, eval_envs = common.make_envs(args)
        assert (envs.num_envs, eval_envs.num_envs) == (1, made)
        assert not set(envs.indices) & set(eval_envs.indices)


def test_every_number_of_the_scripts_has_bounds():
    for script in SCRIPTS:
        hints = typing.get_type_hints(importlib.import_module(script).Args, include_extras=True)
        for name, hint in hints.items():
            if hint in (int, float):
                raise AssertionError(f"{script}: {name} has no bounds")
