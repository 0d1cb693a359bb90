"""Probe environments after Andy Jones: each needs one thing more to be learnt, and no other.

Importing registers Probe{Name}{,Continuous}{,Pixels}-v0 for every probe, so that a script plays it:

    PYTHONPATH=tests python dreamerv2.py --env-id helpers.probe_envs:ProbeAction-v0

An action is x in [0, 1]: 0 or 1 if discrete, (a + 1) / 2 of a in [-1, 1] if continuous.
An observation is two numbers in [-1, 1], or in pixels the two halves of an image in gray levels.
"""

import gymnasium as gym
import numpy as np

CONTINUING = 10  # steps until the time limit of probes without another end


class Probe(gym.Env):
    """A probe says what it begins with, and what follows an action."""

    def __init__(self, continuous=False, pixels=False, render_mode=None):
        self.continuous = continuous
        self.pixels = pixels
        self.render_mode = render_mode
        self.action_space = gym.spaces.Discrete(2)
        if continuous:
            self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        if pixels:
            self.observation_space = gym.spaces.Box(0, 255, (64, 64, 1), np.uint8)

    def show(self, first, second):
        if not self.pixels:
            return np.array([first, second], np.float32)
        image = np.empty((64, 64, 1), np.uint8)
        image[:, :32] = 255 * (first + 1) / 2
        image[:, 32:] = 255 * (second + 1) / 2
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.show(*self.begin()), {}

    def step(self, action):
        self.time += 1
        x = (float(action[0]) + 1) / 2 if self.continuous else int(action)
        obs, reward, terminated = self.follow(x)
        return self.show(*obs), float(reward), terminated, self.time == CONTINUING, {}

    def begin(self):
        """-> the two numbers of the reset observation, which no other looks like

        A window that begins within an episode begins without memory too, so memory cannot tell.
        """
        return 1, 1

    def follow(self, x):
        """-> the two numbers of the observation, reward, terminated"""
        raise NotImplementedError


class Constant(Probe):
    """Every step gives 1, and only the time limit ends an episode."""

    def follow(self, x):
        return (0, 0), 1, False


class Observation(Probe):
    """The one step gives what the first observation showed, 1 or -1; the last one shows nothing."""

    def begin(self):
        self.sign = int(self.np_random.integers(2)) * 2 - 1
        return self.sign, 1

    def follow(self, x):
        return (0, 0), self.sign, True


class Action(Observation):
    """The one step gives 1 for the action that the first observation asks for, less for others."""

    def follow(self, x):
        want = 0.5 + (0.25 if self.continuous else 0.5) * self.sign
        return (0, 0), 1 - 4 * (x - want) ** 2 if self.continuous else x == want, True


class Delayed(Probe):
    """The first of two actions costs 0.3 x at once and pays x a step later, which nothing shows."""

    def follow(self, x):
        if self.time == 1:
            self.debt = x
            return (0, 1), -0.3 * x, False
        return (0, 0), self.debt, True


class Terminal(Probe):
    """x < 1/2 gives 1 and ends the episode for good, any other 0.5 and the next step."""

    def follow(self, x):
        return (0, 0), 1 if x < 0.5 else 0.5, x < 0.5


for probe in (Constant, Observation, Action, Delayed, Terminal):
    for continuous in (False, True):
        for pixels in (False, True):
            name = f"Probe{probe.__name__}{'Continuous' * continuous}{'Pixels' * pixels}-v0"
            gym.register(name, probe, kwargs={"continuous": continuous, "pixels": pixels})
