"""Environments that fail, by raising an error or by dying: each is named in one line."""

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

ROOT = Path(__file__).parent.parent

FAILING = """
import os
import signal

import gymnasium as gym
import numpy as np


class Failing(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, moment, how):
        self.moment = moment
        self.how = how

    def reset(self, *, seed=None, options=None):
        self.fatal = seed == {fatal}
        self.time = 0
        self.fail("reset")
        return np.zeros(2, np.float32), {{}}

    def step(self, action):
        self.time += 1
        if self.time == 3:
            self.fail("step")
        return np.zeros(2, np.float32), 1.0, self.time == 4, False, {{}}

    def fail(self, moment):
        if self.fatal and self.moment == moment:
            if self.how == "raise":
                raise ZeroDivisionError("first\\n  second")
            os.kill(os.getpid(), signal.SIGKILL)


for moment in ("reset", "step"):
    for how in ("raise", "die"):
        kwargs = {{"moment": moment, "how": how}}
        gym.register(f"{{moment}}-{{how}}-v0", Failing, kwargs=kwargs)
"""


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Makes a vector of environments, of which one fails in episode 2: function of its index."""
    made = []

    def make(name, index, num_envs=3, parallel=False):
        fatal = int(np.random.SeedSequence([5, index, 2]).generate_state(1)[0]) >> 1
        (tmp_path / "failing.py").write_text(FAILING.format(fatal=fatal))
        made.append(make_envs(num_envs, f"failing:{name}", seed=5, parallel=parallel))
        return made[-1]

    monkeypatch.syspath_prepend(tmp_path)
    level = gym.logger.min_level
    yield make
    gym.logger.min_level = level
    sys.modules.pop("failing", None)
    for name in [name for name in gym.registry if name.endswith(("-raise-v0", "-die-v0"))]:
        del gym.registry[name]
    for envs in made:
        envs.close()
        for process in getattr(envs.vector, "processes", ()):
            process.kill()
            process.join()


def play_until_it_fails(envs):
    """Random play; it must end with a ChildProcessError -> its text, one line."""
    torch.manual_seed(0)
    try:
        for _ in range(50):
            step(envs, envs.random_actions())
    except ChildProcessError as error:
        return str(error)
    raise AssertionError("no environment failed")


@pytest.mark.parametrize("moment", ["reset", "step"])
@pytest.mark.parametrize("index", [0, 2])
def test_an_environment_that_fails_is_named(failing, moment, index):
    text = play_until_it_fails(failing(f"{moment}-raise-v0", index))
    which = f"environment {index} of {moment}-raise-v0 (seed 5, episode 2)"
    assert re.fullmatch(
        rf"{re.escape(which)} failed: ZeroDivisionError: first second \(.*/failing\.py:\d+\)", text
    )


def test_an_environment_that_fails_to_draw_is_named(monkeypatch):
    def draw(env):
        raise RuntimeError("no screen")

    envs = make_envs(2, "CartPole-v1", seed=5, observation="pixels")
    monkeypatch.setattr(type(envs.vector.envs[1].unwrapped), "render", draw)
    with pytest.raises(
        ChildProcessError, match=r"environment 0 of CartPole-v1 \(seed 5, episode 0"
    ):
        reset_rows(envs)
    envs.close()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["reset", "step"])
def test_an_environment_that_fails_in_a_process_of_its_own_is_named(failing, moment):
    envs = failing(f"{moment}-raise-v0", 1, 2, parallel=True)
    text = play_until_it_fails(envs)
    which = f"environment 1 of {moment}-raise-v0 (seed 5, episode 2)"
    assert re.fullmatch(
        rf"{re.escape(which)} failed: ZeroDivisionError: first second \(.*/failing\.py:\d+\)", text
    )
    envs.close()  # does not wait for the one that failed
    assert not any(process.is_alive() for process in envs.vector.processes)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "index"), [("reset", 1), ("step", 0), ("step", 1)])
def test_a_process_that_dies_is_named(failing, moment, index):
    envs = failing(f"{moment}-die-v0", index, 2, parallel=True)
    text = play_until_it_fails(envs)
    which = f"environment {index} of failing:{moment}-die-v0 (seed 5, episode 2)"
    assert text == f"{which} failed: ChildProcessError: its process died"
    began = time.monotonic()
    envs.close()  # does not wait for an answer of the dead
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_process_that_was_killed_between_steps_is_named(failing):
    envs = failing("step-raise-v0", 0, 2, parallel=True)
    reset_rows(envs)
    envs.vector.processes[1].kill()
    envs.vector.processes[1].join()
    with pytest.raises(ChildProcessError, match=r"environment 1 .*seed 5, episode 0.* died"):
        step(envs, np.eye(2, dtype=np.float32))
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
