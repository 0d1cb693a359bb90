"""Environments that fail, by an error, a wrong row or by dying: named in one line, nothing lost."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.envs import make_envs, reset_rows, step
from gymnasium.spaces import Dict
from helpers.failing import FAILS_AT, STEPS, let_fail
from helpers.processes import ROOT, finish, start
from helpers.runs import (
    EVERY_SCRIPT, TINY, UNCLOSED, checkpoint, metrics, play, the_error, the_run, tiny,
)  # fmt: skip
from helpers.users import BOX, Basic, register

SHORT = f"{TINY} --train-every 20 --prefill 40 --total-frames 80"


# Several environments
@pytest.fixture
def failing(place):
    """Makes environments, of which one fails in episode 2: function of its index."""
    made = []

    def make(name, index, num_envs=3, parallel=False):
        let_fail(place, 5, [index], episode=2)
        made.append(make_envs(num_envs, f"helpers.failing:{name}", seed=5, parallel=parallel))
        return made[-1]

    level = gym.logger.min_level
    yield make
    gym.logger.min_level = level
    for envs in made:
        envs.close()
        for process in getattr(envs.vector, "processes", ()):
            process.kill()
            process.join()


def play_until_it_fails(envs):
    """Random play; it must end with a ChildProcessError -> its text, one line."""
    torch.manual_seed(0)
    try:
        for _ in range(3 * (STEPS + 1)):
            step(envs, envs.random_actions())
    except ChildProcessError as error:
        return str(error)
    raise AssertionError("no environment failed")


@pytest.mark.parametrize("moment", ["reset", "step"])
@pytest.mark.parametrize(("index", "parallel"), [
    (0, False), (2, False), pytest.param(1, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_an_environment_that_fails_is_named(failing, moment, index, parallel):
    envs = failing(f"{moment}-raise-v0", index, parallel=parallel)
    text = play_until_it_fails(envs)
    which = re.escape(f"environment {index} of {moment}-raise-v0 (seed 5, episode 2)")
    error = r"ZeroDivisionError: first second \(.*/failing\.py:\d+\)"
    assert re.fullmatch(f"{which} failed: {error}", text)
    envs.close()  # does not wait for the one that failed
    assert not parallel or not any(process.is_alive() for process in envs.vector.processes)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "index"), [("reset", 1), ("step", 0), ("step", 1)])
def test_a_process_that_dies_is_named(failing, moment, index):
    envs = failing(f"{moment}-die-v0", index, 2, parallel=True)
    text = play_until_it_fails(envs)
    which = f"environment {index} of helpers.failing:{moment}-die-v0 (seed 5, episode 2)"
    assert text == f"{which} failed: its process died"
    began = time.monotonic()
    envs.close()  # does not wait for an answer of the dead
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_process_that_was_killed_between_steps_is_named(failing):
    envs = failing("step-raise-v0", 0, 2, parallel=True)
    reset_rows(envs)
    envs.vector.processes[1].kill()
    envs.vector.processes[1].join()
    with pytest.raises(ChildProcessError, match=r"environment 1 .*seed 5, episode 0.* died"):
        step(envs, np.eye(2, dtype=np.float32))
    envs.close()


def test_an_environment_that_fails_to_draw_is_named(monkeypatch):
    def draw(env):
        raise RuntimeError("no screen")

    envs = make_envs(2, "CartPole-v1", seed=5, observation="pixels")
    monkeypatch.setattr(type(envs.vector.envs[1].unwrapped), "render", draw)
    which = r"environment 0 of CartPole-v1 \(seed 5, episode 0"
    with pytest.raises(ChildProcessError, match=which):
        reset_rows(envs)
    envs.close()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["raise SystemExit", "os.kill(os.getpid(), 9)"])
def test_a_process_that_ends_leaves_no_orphans(tmp_path, end):
    code = f"""
import os
from helpers.envs import make_envs, step
if __name__ == "__main__":
    envs = make_envs(2, "CartPole-v1", seed=1, parallel=True)
    step(envs, envs.random_actions())
    print(*[process.pid for process in envs.vector.processes], flush=True)
    if "9" not in {end!r}:
        envs.vector.processes[0].kill()
        envs.vector.processes[0].join()
        try:
            step(envs, envs.random_actions())
        except ChildProcessError:
            print("failed", flush=True)
    {end}
"""
    (tmp_path / "main.py").write_text(code)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, tmp_path / "main.py"], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    pids, *failed = result.stdout.splitlines()
    assert failed == ([] if "kill" in end else ["failed"])
    assert "kill" in end or "Traceback" not in result.stderr
    wait = time.monotonic() + 60
    while alive := [pid for pid in pids.split() if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < wait, alive
        time.sleep(0.1)


# A run
def check_broken_off(folder, script, how, envs, out, err, go_on):
    """A run of which an environment failed in episode 4 says which, is saved, and goes on."""
    env_id = f"helpers.failing:step-{how}-v0"
    line = the_error(err)
    which = rf"environment [01] of (helpers.failing:)?step-{how}-v0 \(seed 1, episode 4\) failed: "
    assert re.search(which, line)
    assert ("first second" if how == "raise" else "its process died") in line
    [resume] = [line for line in out.splitlines() if "--resume" in line]
    where = f"--resume runs/{folder.name} --env-id {env_id}"
    assert resume.endswith(where)
    saved = checkpoint(folder)
    assert saved["counters"]["step"] == (4 * STEPS + FAILS_AT - 1) * (2 if envs else 1)
    go_on(where)
    assert metrics(folder)[-1]["frames"] == 400
    terminal, first = (np.load(folder / "replay" / f"is_{k}.npy") for k in ("terminal", "first"))
    broke_off = saved["replay"]["end"]
    assert broke_off == 4 * (STEPS + 1) + FAILS_AT
    assert (terminal[:broke_off].sum(0) == 4).all()  # it was truncated
    assert first[broke_off].all()


LONGER = "--total-frames 400 --eval-every 0"


@EVERY_SCRIPT
def test_an_environment_that_fails_is_named_and_nothing_else_is_lost(script, place, capsys):
    let_fail(place, 1, [0], episode=4)
    flags = f"{tiny(script, 50)} {LONGER}"
    folder = play(script, f"{flags} --env-id helpers.failing:step-raise-v0", 1)
    out, err = capsys.readouterr()
    check_broken_off(folder, script, "raise", "", out, err, lambda flags: play(script, flags))


@pytest.mark.slow
@pytest.mark.parametrize(("script", "how"), [("dreamerv1.py", "raise"), ("dreamerv2.py", "die")])
def test_an_environment_in_a_process_that_fails_is_named_and_nothing_else_is_lost(
    script, how, tmp_path
):
    let_fail(tmp_path, 1, [0, 1], episode=4)
    envs = "--num-envs 2 --async-envs"
    flags = f"{tiny(script, 50)} {LONGER} --env-id helpers.failing:step-{how}-v0 {envs}"
    process = start(script, flags, tmp_path)
    done = finish(process, 1)  # it does not wait for the environment

    def go_on(flags):
        finish(start(script, flags, tmp_path))

    check_broken_off(the_run(tmp_path), script, how, envs, done.out, done.err, go_on)


def fails(cls, place, capsys):
    """A run whose environment fails -> the line that says so; it is saved and can go on."""
    folder = play("dreamerv2.py", f"{SHORT} --env-id {register(cls)}", 1)
    out, err = capsys.readouterr()
    assert "go on with: " in out
    assert checkpoint(folder)["counters"]
    line = the_error(err)
    assert "environment 0 of Mine-v0 (seed 1, episode " in line
    return line


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


class HugeReward(Basic):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, 1e39 if self.time == 15 else reward, *rest


@pytest.mark.parametrize(("cls", "said"), [
    (NanObservation, "the observation is not finite: "), (NanReward, "the reward is nan"),
    (HugeReward, "the reward is 1e+39"),
])  # fmt: skip
def test_a_number_that_is_none_fails_the_environment_and_enters_no_replay(cls, said, place, capsys):
    assert said in fails(cls, place, capsys)
    folder = the_run(place)
    saved = checkpoint(folder)
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
    (WrongKey, "ValueError: the observation has keys a, its space says Dict("),
    (Words, "the observation is <U3, its space says float32"),
    (TwoRewards, "the reward is [1. 1.]"),
])  # fmt: skip
def test_a_first_environments_mistakes_are_named(cls, said, place, capsys):
    assert said in fails(cls, place, capsys)


def test_an_error_says_in_which_line_it_was_raised(place, capsys):
    line = fails(Asserts, place, capsys)
    assert "failed: AssertionError: " in line
    number = Asserts.step.__code__.co_firstlineno + 1
    assert line.endswith(f"({__file__}:{number})")


class Exits(Basic):
    def step(self, action):
        if self.time == 15:
            sys.exit()
        return super().step(action)


def test_an_environment_that_exits_has_failed(place, capsys):
    assert "failed: SystemExit" in fails(Exits, place, capsys)


class BadClose(Basic):
    def close(self):
        raise OSError("port is gone")


def test_an_environment_that_fails_to_close_spoils_no_finished_run(place, capsys):
    folder = play("dreamerv2.py", f"{SHORT} --env-id {register(BadClose)}")
    assert checkpoint(folder)["counters"]["last_report"] == 80
    assert "closing Mine-v0 failed: OSError('port is gone')" in capsys.readouterr().err


class Huge(Basic):
    """Pays so much from some step on that the loss of the reward has no number."""

    steps = 0

    def step(self, action):
        Huge.steps += 1
        obs, _, *rest = super().step(action)
        return obs, 1e30 if Huge.steps > 50 else 0.0, *rest


@UNCLOSED
def test_a_loss_that_is_not_finite_stops_the_run_before_the_next_checkpoint(
    script, place, monkeypatch, capsys
):
    monkeypatch.setattr(Huge, "steps", 0)
    flags = f"--env-id {register(Huge)} --total-frames 1000 --checkpoint-every 48 --train-every 4"
    folder = play(script, f"{SHORT} {flags}", 1)
    saved = checkpoint(folder)
    assert saved["counters"]["step"] == 48
    assert all(torch.isfinite(weight).all() for weight in saved["agent"].values())
    line = the_error(capsys.readouterr().err)
    assert re.match(r"error: .*update \d+.*losses/reward", line)
