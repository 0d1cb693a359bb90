"""An environment that fails at a moment that a test chooses; in `helpers.failing:raise-v0`."""

import os
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np

STEPS = 25  # of an episode
FAILS_AT = 7  # the step, or the reset


class Failing(gym.Env):
    """Fails in the episodes whose seeds are in the file `fatal` of the working directory."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, how, moment):
        self.how = how
        self.moment = moment

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.fatal = Path("fatal").exists() and str(seed) in Path("fatal").read_text().split()
        self.time = 0
        self.fail_at("reset")
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        if self.time == FAILS_AT:
            self.fail_at("step")
        return self.observe(), 1.0, self.time == STEPS, False, {}

    def observe(self):
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def fail_at(self, moment):
        if self.fatal and self.moment == moment:
            if self.how == "raise":
                raise ZeroDivisionError("first\n  second")
            os.kill(os.getpid(), signal.SIGKILL)


def let_fail(cwd, seed, indices, episode):
    """Lets that episode of the environments with these indices fail, in a run of that seed."""
    sequences = [np.random.SeedSequence([seed, index, episode]) for index in indices]
    seeds = [int(sequence.generate_state(1)[0]) >> 1 for sequence in sequences]
    (Path(cwd) / "fatal").write_text(" ".join(map(str, seeds)))


for how in ("raise", "die"):
    for moment in ("reset", "step"):
        kwargs = {"how": how, "moment": moment}
        gym.register(f"{moment}-{how}-v0", Failing, kwargs=kwargs)
