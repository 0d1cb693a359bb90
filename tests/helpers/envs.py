"""Tiny environments that say what happened to them; `helpers.envs:Counting-v0` registers them."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np

import common


def env_args(env_id, seed=1, **changes):
    """What common.make_env asks of args; by default nothing is repeated, cut off or made gray."""
    options = {
        "observation": "auto", "pixels": False, "grayscale": False, "action_repeat": 1,
        "time_limit": 0, "sticky_prob": None, "full_action_space": False, "env_kwargs": "{}",
    }  # fmt: skip
    return SimpleNamespace(env_id=env_id, seed=seed, **options | changes)


def make_env(env_id, seed=1, index=0, render=False, **options):
    return common.make_env(env_args(env_id, seed, **options), index, render)


def make_envs(
    num_envs, env_id, seed=1, parallel=False, first_index=0, episodes=None, render=False,
    **options,
):  # fmt: skip
    """Environments that go on after so many episodes of each."""
    args = env_args(env_id, seed, **options)
    envs = common.Envs(args, num_envs, parallel, first_index, render)
    if episodes:
        envs.load_state_dict({"episodes": episodes})
    return envs


def step(envs, action):
    """A whole step -> row, the episodes that ended."""
    envs.send(action)
    return envs.receive()


def reset_rows(envs):
    """The row with which all environments begin."""
    assert envs.all_ended
    return step(envs, np.zeros((envs.num_envs, *envs.shapes["action"]), np.float32))[0]


class Counting(gym.Env):
    """Observes its clock, the action just taken and its seed, which sets all else.

    An episode lasts 3 to 9 steps and ends in a terminal state or not. `taken` has the actions that
    were really taken, over all episodes.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, continuous=False, render_mode=None):
        self.continuous, self.render_mode, self.taken = continuous, render_mode, []
        box = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([4, 1], np.float32))
        self.action_space = box if continuous else gym.spaces.Discrete(3)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.time = seed, 0
        self.length = int(self.np_random.integers(3, 10))
        self.terminates = bool(self.np_random.integers(2))
        return self.observe(-1), {}

    def observe(self, action):
        # A seed has 31 bits, a float32 is exact up to 24.
        return np.array([self.time, action, self.seed % 2**16, self.seed // 2**16], np.float64)

    def step(self, action):
        self.time += 1
        self.taken.append(action)
        code = float(np.sum(action))
        end = self.time == self.length
        done = (end and self.terminates, end and not self.terminates)
        return self.observe(code), self.time + code / 8, *done, {}

    def render(self):
        return np.full((32, 48, 3), self.time, np.uint8)


class Still(gym.Env):
    """Observes the same thing forever, pays 1 per step and notes the actions that it took."""

    metadata = {"render_modes": [], "render_fps": 20}  # noqa: RUF012

    def __init__(self, obs, observation_space, action_space=None):
        self.obs, self.observation_space, self.taken = obs, observation_space, []
        self.action_space = action_space or gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.obs, {}

    def step(self, action):
        self.taken.append(action)
        return self.obs, 1.0, False, False, {}


def register_still(name, obs, observation_space, action_space=None):
    """Makes gymnasium know a `Still` under a name of its own -> the name."""
    gym.registry.pop(name, None)
    kwargs = {"obs": obs, "observation_space": observation_space, "action_space": action_space}
    gym.register(name, entry_point=Still, kwargs=kwargs)
    return name


if "Counting-v0" not in gym.registry:
    gym.register("Counting-v0", entry_point=Counting)
    gym.register("CountingContinuous-v0", entry_point=Counting, kwargs={"continuous": True})
    gym.register("CountingShort-v0", entry_point=Counting, max_episode_steps=4)
