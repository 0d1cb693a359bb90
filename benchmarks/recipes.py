"""Recipes for worlds that do not come as gymnasium environments of this project's kind.

    python dreamerv2.py --env-id benchmarks.recipes:Crafter-v0

Importing this module registers ids and nothing else: a package is imported when its id is made, and
one that is missing names its pip line. A world of your own takes the same few lines, in a module of
your own: `--env-id my_module:MyWorld-v0`.
"""

import functools
import importlib

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


def needs(module, pip):
    """Imports a module, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"pip install {pip} ({error})") from None


class World(gym.Env):
    """What the worlds below share: they are drawn by their last image."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  as in gymnasium

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.image = None

    def render(self):
        return self.image


class Crafter(World):
    """Open-world survival (Hafner, arXiv 2109.06780), 64x64x3, 17 actions."""

    def __init__(self, reward=True, **kwargs):
        super().__init__(**kwargs)
        self.crafter = needs("crafter", "crafter")
        self.reward = reward
        self.observation_space = Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = Discrete(17)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2**31))
        self.env = self.crafter.Env(reward=self.reward, seed=seed)
        self.image = self.env.reset()
        return self.image, {}

    def step(self, action):
        self.image, reward, over, info = self.env.step(int(action))
        died = info["discount"] == 0  # else the 10,000 steps are over
        return self.image, float(reward), died, over and not died, info


class MemoryMaze(World):
    """Find colored balls and remember where they are (arXiv 2210.13383), 64x64x3, 6 actions."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.make = getattr(needs("memory_maze.tasks", "memory-maze"), f"memory_maze_{size}")
        image = Box(0, 255, (64, 64, 3), np.uint8)
        color = Box(0, 1, (3,), np.float64)
        self.observation_space = Dict({"image": image, "target_color": color})
        self.action_space = Discrete(6)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env = self.make(seed=seed)
        return self.observe(self.env.reset()), {}

    def step(self, action):
        step = self.env.step(int(action))
        ends = (step.last() and step.discount == 0, step.last() and step.discount != 0)
        return self.observe(step), float(step.reward), *ends, {}

    def observe(self, step):
        self.image = step.observation["image"]
        return {k: step.observation[k] for k in self.observation_space.spaces}


class Procgen(World):
    """Sixteen games with a new level each episode (arXiv 1912.01588), 64x64x3, 15 actions."""

    def __init__(self, game, levels=0, **kwargs):
        super().__init__(**kwargs)
        procgen = needs("procgen", "procgen-mirror")
        self.make = functools.partial(
            procgen.ProcgenGym3Env, num=1, env_name=game, num_levels=levels
        )
        self.observation_space = Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = Discrete(15)
        self.env = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.env is None or seed is not None:
            self.env = self.make(rand_seed=seed or 0)
        self.image = self.env.observe()[1]["rgb"][0]
        return self.image, {}

    def step(self, action):
        self.env.act(np.array([action], np.int32))
        reward, obs, first = self.env.observe()
        if not first[0]:  # else it shows the next level already: the last image stays
            self.image = obs["rgb"][0]
        # A game that ran out of its 1,000 steps cannot be told from one that was lost or won.
        return self.image, float(reward[0]), bool(first[0]), False, {}


@functools.cache
def brax_functions(name, backend):
    """An environment of Brax with reset and step, compiled once for all of its instances."""
    jax = needs("jax", "brax")
    env = needs("brax.envs", "brax").get_environment(name, backend=backend)
    return jax, env, jax.jit(env.reset), jax.jit(env.step)


class Brax(World):
    """Rigid bodies in JAX (arXiv 2106.13281); an observation vector, actions in [-1, 1]."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, name, backend="spring", **kwargs):
        super().__init__(**kwargs)
        self.jax, env, self.first, self.next = brax_functions(name, backend)
        self.observation_space = Box(-np.inf, np.inf, (env.observation_size,), np.float32)
        self.action_space = Box(-1, 1, (env.action_size,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.first(self.jax.random.PRNGKey(int(self.np_random.integers(2**31))))
        return np.asarray(self.state.obs), {}

    def step(self, action):
        self.state = self.next(self.state, np.float32(action))
        obs, reward, done = map(np.asarray, (self.state.obs, self.state.reward, self.state.done))
        return obs, float(reward), bool(done), False, {}


def minigrid(grid, render_mode=None):
    """A MiniGrid of what the agent sees, as an image; its mission, a text, is left out."""
    wrappers = needs("minigrid.wrappers", "minigrid")
    env = gym.make(grid, render_mode=render_mode, disable_env_checker=True).unwrapped
    return wrappers.ImgObsWrapper(wrappers.RGBImgPartialObsWrapper(env))


def minatar(game, render_mode=None):
    """A game of MinAtar (arXiv 1903.03176): 10x10 cells of several kinds, as one vector of bits."""
    module = needs("minatar.gym", "minatar")
    env = module.BaseEnv(game=game, render_mode=render_mode, use_minimal_action_set=True)
    return gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)


def blind_cartpole(render_mode=None):
    """CartPole without velocities, which the agent has to remember positions for."""
    env = gym.make("CartPole-v1", render_mode=render_mode).unwrapped
    seen = [0, 2]  # of the cart and of the pole's angle
    space = Box(env.observation_space.low[seen], env.observation_space.high[seen])
    return gym.wrappers.TransformObservation(env, lambda obs: obs[seen], space)


def scaled_cartpole(scale, render_mode=None):
    """CartPole with rewards of another size, which DreamerV3 is to learn all the same."""
    env = gym.make("CartPole-v1", render_mode=render_mode).unwrapped
    return gym.wrappers.TransformReward(env, lambda reward: scale * reward)


PROCGEN = [
    "bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot",
    "heist", "jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot",
]  # fmt: skip
BRAX = [
    "ant", "halfcheetah", "hopper", "humanoid", "inverted_pendulum", "inverted_double_pendulum",
    "reacher", "swimmer", "walker2d",
]  # fmt: skip
MINIGRID = [
    "Empty-5x5", "Empty-8x8", "DoorKey-5x5", "DoorKey-6x6", "FourRooms", "MemoryS7", "LavaGapS5",
    "LavaGapS7", "KeyCorridorS3R3", "Dynamic-Obstacles-5x5",
]  # fmt: skip
MINATAR = ["asterix", "breakout", "freeway", "seaquest", "space_invaders"]
MAZES = {"9x9": 1000, "11x11": 2000, "13x13": 3000, "15x15": 4000}  # steps of an episode


def register(env_id, make, steps=None, **kwargs):
    if env_id not in gym.registry:
        gym.register(env_id, make, max_episode_steps=steps, kwargs=kwargs)


register("CartPoleBlind-v0", blind_cartpole, steps=500)
register("CartPoleTimes1000-v0", scaled_cartpole, steps=500, scale=1000)
register("CartPoleBy1000-v0", scaled_cartpole, steps=500, scale=0.001)
register("Crafter-v0", Crafter)
register("CrafterNoReward-v0", Crafter, reward=False)
for size, steps in MAZES.items():
    register(f"MemoryMaze-{size}-v0", MemoryMaze, steps, size=size)
for game in PROCGEN:
    register(f"procgen-{game}-v0", Procgen, game=game)
for name in BRAX:
    register(f"brax-{name}-v0", Brax, 1000, name=name)
for grid in MINIGRID:
    register(f"minigrid-{grid}-v0", minigrid, grid=f"minigrid:MiniGrid-{grid}-v0")
for game in MINATAR:
    register(f"minatar-{game}-v1", minatar, 5000, game=game)
