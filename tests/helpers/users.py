"""Environments as users write them, with and without mistakes."""

import contextlib
import subprocess
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

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


class Endless(Basic):
    length = np.inf


def register(cls, name="Mine-v0", **options):
    """Makes gymnasium know a class of an environment -> its id."""
    gym.registry.pop(name, None)
    gym.register(name, entry_point=cls, **options)
    return name


class Starting(Basic):
    """Notes whether it, and a process that it starts, ignore Ctrl-C."""

    def reset(self, **kwargs):
        command = ["cat", "/proc/self/status"]
        child = subprocess.run(command, capture_output=True, text=True).stdout
        texts = [Path("/proc/self/status").read_text(), child]
        masks = [int(text.split("SigIgn:")[1].split()[0], 16) for text in texts]
        self.ignores = [mask >> 1 & 1 for mask in masks]  # SIGINT is number 2
        return super().reset(**kwargs)


class Closing(Basic):
    """Makes a file when it is closed, as others end a server."""

    def __init__(self, path):
        self.path = Path(path)

    def close(self):
        self.path.touch()


class Hanging(Basic):
    """Its steps do not end, whatever is raised in them."""

    def step(self, action):
        while True:
            with contextlib.suppress(SystemExit):
                time.sleep(60)


register(Starting, "Starting-v0")
register(Closing, "Closing-v0")
register(Hanging, "Hanging-v0")
