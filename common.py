"""What neither Dreamer paper mentions: environments, replay, seeding, logging, evaluation, checkpoints.

Nothing in here knows about the algorithms: no network, no loss, no hyperparameter.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(f"error: Python {sys.version.split()[0]} is too old, this needs 3.11 or 3.12")

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import torch
import tyro
import yaml
from PIL import Image
from tqdm import tqdm

with contextlib.suppress(ImportError):
    import ale_py  # its import registers the Atari games

SIZE = 64  # images are SIZE x SIZE pixels, as in both papers


class UserError(Exception):
    """Something the user can mend, in one line; `exit_on_error` turns it into exit code 2."""

    code = 2


class NonFinite(UserError):
    """A loss or gradient became NaN or infinite; the run ends with exit code 1."""

    code = 1


@contextlib.contextmanager
def exit_on_error():
    """Prints a `UserError` as one line on stderr and exits with its code, without a traceback."""
    try:
        yield
    except UserError as error:
        print("error:", error, file=sys.stderr)
        raise SystemExit(error.code) from None


# Command line


HARMLESS = "total_frames eval_every eval_episodes log_every video_every checkpoint_every capture_video track cuda threads"


def parse_args(cls, presets, argv=None):
    """Fills the dataclass `cls` from the command line, over the preset of the environment id or a run's args.

    presets: dict of name -> dict of field values; names as `preset_name` returns them
    Raises UserError for a folder that is no run of this script, or for a changed arg that a run cannot change.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("env-id", "observation", "resume", "evaluate"):
        first.add_argument(f"--{name}", f"--{name.replace('-', '_')}", default=None)
    first.add_argument("--pixels", action="store_true")
    given, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    folder = given.resume or given.evaluate
    if folder:
        default = cls(**load_args(folder, cls))
    else:
        env_id = given.env_id or cls.env_id
        preset = preset_name(env_id, "pixels" if given.pixels else given.observation or "auto")
        default = cls(**{"env_id": env_id, **presets[preset]})
    args = tyro.cli(cls, default=default, args=argv)
    if given.resume:
        changed = {f for f, v in vars(args).items() if v != getattr(default, f)}
        if changed := changed - {"resume", *HARMLESS.split()}:
            flags = " ".join("--" + f.replace("_", "-") for f in sorted(changed))
            raise UserError(f"{flags} cannot change when a run is resumed; what can: {HARMLESS}")
    return args


def preset_name(env_id, observation):
    """The preset of an environment id: atari, dmc_pixels, dmc_vector or other."""
    if env_id.startswith(("dm_control/", "dmc/")):
        return "dmc_vector" if observation == "vector" else "dmc_pixels"
    return "atari" if is_atari(env_id) else "other"


def check_positive(**values):
    """Raises UserError unless every value is above zero."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be above 0")


# Environments


def is_atari(env_id):
    spec = gym.registry.get(env_id)
    return env_id.startswith("ALE/") or (spec is not None and "ale_py" in str(spec.entry_point))


def make_env(
    env_id,
    seed=0,
    index=0,
    episode=0,
    observation="auto",
    grayscale=False,
    action_repeat=1,
    time_limit=0,
    sticky_prob=None,
    full_action_space=False,
    render=False,
):
    """One environment with the interface that the scripts know.

    Observations are a dict with `image` (C, 64, 64) uint8 and/or `vector` (V,) float32; actions are
    Discrete from 0, or a Box of [-1, 1]. `time_limit` is in frames, 0 leaves the environment's own.
    Raises UserError for an id, package or space that cannot be used.
    """
    if observation == "auto" and env_id.startswith(("dm_control/", "dmc/")):
        observation = "pixels"
    if env_id.startswith(("dm_control/", "dmc/")):
        env = DMC(env_id, use_gl=render or observation != "vector")
    else:
        env = make_gym(env_id, observation, grayscale, action_repeat, sticky_prob, full_action_space, render)
    if action_repeat > 1 and not is_atari(env_id):
        env = ActionRepeat(env, action_repeat)
    if time_limit:
        env = gym.wrappers.TimeLimit(env, max(1, time_limit // action_repeat))
    env = Actions(Observations(env, env_id, observation, grayscale), env_id)
    return gym.wrappers.RecordEpisodeStatistics(EpisodeSeed(env, seed, index, episode))


def make_gym(env_id, observation, grayscale, action_repeat, sticky_prob, full_action_space, render):
    """A gymnasium environment; Atari with the usual preprocessing (no-ops, max of two frames, area resize)."""
    kwargs = dict(render_mode="rgb_array") if render or observation in ("pixels", "both") else {}
    try:
        if not is_atari(env_id):
            return gym.make(env_id, disable_env_checker=True, **kwargs)
        if sticky_prob is not None:
            kwargs["repeat_action_probability"] = sticky_prob
        env = gym.make(
            env_id,
            disable_env_checker=True,
            frameskip=1,  # AtariPreprocessing repeats the action, so that frames are counted once
            obs_type="grayscale" if grayscale else "rgb",
            full_action_space=full_action_space,
            max_episode_steps=-1,  # our limit counts the same frames as the x axis
            **kwargs,
        )
        return gym.wrappers.AtariPreprocessing(
            env, frame_skip=action_repeat, screen_size=SIZE, grayscale_obs=grayscale
        )
    except (gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        raise UserError(f"{env_id} needs a package that is not installed: {' '.join(str(error).split())}") from None
    except gym.error.Error as error:
        if env_id.startswith("ALE/") and "ale_py" not in sys.modules:
            raise UserError(f"{env_id} needs a package that is not installed: pip install ale-py") from None
        raise UserError(f"no environment {env_id}{nearest(env_id, gym.registry)} ({error})") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{env_id} cannot be made: {' '.join(str(error).split())}") from None


def nearest(name, names):
    """'; nearest: a, b' for an error message, or nothing."""
    found = difflib.get_close_matches(name, names, 3, 0.5)
    return f"; nearest: {', '.join(found)}" if found else ""


def choose_gl():
    """Sets MUJOCO_GL to what can draw on this machine: the user's choice, else EGL, else OSMesa."""
    if "MUJOCO_GL" in os.environ:
        return
    for backend in ("egl", "osmesa"):
        env = os.environ | dict(MUJOCO_GL=backend, PYOPENGL_PLATFORM=backend)
        probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
        if subprocess.run(probe, env=env, capture_output=True).returncode == 0:
            os.environ.update(MUJOCO_GL=backend, PYOPENGL_PLATFORM=backend)
            return
    raise UserError("no headless OpenGL for MuJoCo: apt-get install libegl1 (or libosmesa6), or set MUJOCO_GL=glfw")


class DMC(gym.Env):
    """A task of the dm_control suite; `dm_control/ball_in_cup-catch-v0` and `dmc/ball_in_cup-catch` are the same.

    Terminated only when dm_control's discount is 0: the suite's 1000-frame limit truncates.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}
    render_mode = "rgb_array"

    def __init__(self, env_id, use_gl):
        if use_gl:
            choose_gl()
        try:
            suite = importlib.import_module("dm_control.suite")
        except ImportError as error:
            raise UserError(f"{env_id} needs a package that is not installed: pip install dm_control ({error})") from None
        tasks = {f"{domain}-{task}": (domain, task) for domain, task in suite.ALL_TASKS}
        name = env_id.split("/", 1)[1].removesuffix("-v0")
        if name not in tasks:
            raise UserError(f"no environment {env_id}{nearest(name, tasks)}")
        self.env = suite.load(*tasks[name])
        self.camera = 2 if name.startswith("quadruped") else 0
        if self.env.physics.model.ncam == 0:
            self.camera = -1  # lqr has no camera of its own
        spec = self.env.action_spec()
        low, high = (np.broadcast_to(x, spec.shape).astype(np.float32) for x in (spec.minimum, spec.maximum))
        self.action_space = gym.spaces.Box(low, high)
        size = sum(int(np.prod(s.shape)) for s in self.env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def vector(self, observation):
        return np.concatenate([np.ravel(x) for x in observation.values()]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task.random.seed(seed)
        return self.vector(self.env.reset().observation), {}

    def step(self, action):
        step = self.env.step(action)
        terminated = step.last() and step.discount == 0
        return self.vector(step.observation), step.reward, terminated, step.last() and not terminated, {}

    def render(self):
        return self.env.physics.render(SIZE, SIZE, camera_id=self.camera)

    def close(self):
        self.env.close()


class ActionRepeat(gym.Wrapper):
    """Takes each action `repeat` times and adds the rewards up."""

    def __init__(self, env, repeat):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class Observations(gym.ObservationWrapper):
    """Turns a Box, or a Dict of Boxes, into a dict of `image` and/or `vector`; images may be rendered."""

    def __init__(self, env, env_id, observation, grayscale):
        super().__init__(env)
        space = env.observation_space
        parts = dict(sorted(space.items())) if isinstance(space, gym.spaces.Dict) else {"": space}
        for key, part in parts.items():
            if not isinstance(part, gym.spaces.Box):
                raise UserError(f"{env_id} observes {key} {part}, but only Box and Dict of Box are supported")
        images = [k for k, v in parts.items() if v.dtype == np.uint8 and len(v.shape) in (2, 3)]
        self.images = images if observation != "vector" else []
        self.vectors = [k for k in parts if k not in images] if observation != "pixels" else []
        self.draws = observation in ("pixels", "both") and not images
        self.nested, self.gray = isinstance(space, gym.spaces.Dict), grayscale
        if len(self.images) > 1 or not (self.images or self.vectors or self.draws):
            raise UserError(f"{env_id} observes {space}, of which --observation {observation} cannot be made")
        spaces = {}
        if self.images or self.draws:
            spaces["image"] = gym.spaces.Box(0, 255, (1 if grayscale else 3, SIZE, SIZE), np.uint8)
        if self.vectors:
            size = sum(int(np.prod(parts[k].shape)) for k in self.vectors)
            spaces["vector"] = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.observation_space = gym.spaces.Dict(spaces)

    def observation(self, obs):
        parts, out = obs if self.nested else {"": obs}, {}
        if self.images or self.draws:
            out["image"] = self.image(self.env.render() if self.draws else parts[self.images[0]])
        if self.vectors:
            out["vector"] = np.concatenate([np.ravel(parts[k]) for k in self.vectors]).astype(np.float32)
        return out

    def image(self, image):
        """(H, W) or (H, W, C) -> (C, 64, 64), gray or RGB, each pixel the mean of the area it covers."""
        if image.ndim == 3 and image.shape[-1] == 1:
            image = image[..., 0]
        if image.shape[:2] != (SIZE, SIZE):
            image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        if self.gray and image.ndim == 3:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if not self.gray and image.ndim == 2:
            image = np.repeat(image[..., None], 3, -1)
        return np.ascontiguousarray(image.reshape(SIZE, SIZE, -1).transpose(2, 0, 1))


class Actions(gym.ActionWrapper):
    """Discrete actions from 0; continuous ones flat, finite bounds mapped to [-1, 1], infinite ones left as they are."""

    def __init__(self, env, env_id):
        super().__init__(env)
        self.space = space = env.action_space
        if isinstance(space, gym.spaces.Discrete):
            self.action_space = gym.spaces.Discrete(space.n)
        elif isinstance(space, gym.spaces.Box):
            finite = np.isfinite(space.low) & np.isfinite(space.high)
            self.low, self.high = np.where(finite, space.low, -1), np.where(finite, space.high, 1)
            self.action_space = gym.spaces.Box(-1, 1, (int(np.prod(space.shape)),), np.float32)
        else:
            raise UserError(f"{env_id} acts in {space}, but only Discrete and Box are supported")

    def action(self, action):
        if isinstance(self.space, gym.spaces.Discrete):
            return int(action) + self.space.start
        scaled = self.low + (action.reshape(self.space.shape) + 1) / 2 * (self.high - self.low)
        return scaled.astype(self.space.dtype)


class EpisodeSeed(gym.Wrapper):
    """Seeds episode k of environment i from (seed, i, k), so that a resumed run goes on with the next one."""

    def __init__(self, env, seed, index, episode):
        super().__init__(env)
        self.seed, self.index, self.episode = seed, index, episode

    def reset(self, *, seed=None, options=None):
        state = np.random.SeedSequence([self.seed, self.index, self.episode]).generate_state(1)
        self.episode += 1
        return self.env.reset(seed=int(state[0] >> 1), options=options)


def make_envs(num_envs, asynchronous=False, first_index=0, episodes=None, **kwargs):
    """`num_envs` environments as one gymnasium vector environment; a done one resets at the next step."""
    fns = [
        functools.partial(make_env, index=first_index + i, episode=0 if episodes is None else int(episodes[i]), **kwargs)
        for i in range(num_envs)
    ]
    mode = gym.vector.AutoresetMode.NEXT_STEP
    if asynchronous:
        fns[0]().close()  # what is wrong with the id is said here, not by a worker
        return gym.vector.AsyncVectorEnv(fns, autoreset_mode=mode, context="spawn")
    return gym.vector.SyncVectorEnv(fns, autoreset_mode=mode)


def num_actions(envs):
    """A, the length of an action, and whether actions are discrete (stored one-hot)."""
    space = envs.single_action_space
    discrete = isinstance(space, gym.spaces.Discrete)
    return (int(space.n) if discrete else space.shape[0]), discrete


def random_actions(envs, rng):
    """Uniform actions (N, A), one-hot if discrete."""
    size, discrete = num_actions(envs)
    if discrete:
        return np.eye(size, dtype=np.float32)[rng.integers(size, size=envs.num_envs)]
    return rng.uniform(-1, 1, (envs.num_envs, size)).astype(np.float32)


def reset_rows(envs):
    """Resets all environments -> row: dict of (N, ...), with action and reward 0 and is_first 1."""
    obs, _ = envs.reset()
    flags = {k: np.zeros(envs.num_envs, np.float32) for k in ("reward", "is_first", "is_terminal")}
    flags["is_first"] += 1
    return {**obs, "action": np.zeros((envs.num_envs, num_actions(envs)[0]), np.float32), **flags}


def step_rows(envs, action, done):
    """Steps all environments -> row: dict of (N, ...), done (N,) bool, info.

    The row after a done row is a reset: the environment ignored its action, which is stored as 0.
    """
    discrete = num_actions(envs)[1]
    obs, reward, terminated, truncated, info = envs.step(action.argmax(-1) if discrete else action)
    row = dict(
        obs,
        action=action * ~done[:, None],
        reward=reward.astype(np.float32),
        is_first=done.astype(np.float32),
        is_terminal=terminated.astype(np.float32),
    )
    return row, terminated | truncated, info


def finished(info):
    """The (return, length) of the episodes that ended in this step."""
    if "episode" not in info:
        return []
    ended = np.flatnonzero(info["_episode"])
    return [(float(info["episode"]["r"][i]), int(info["episode"]["l"][i])) for i in ended]


def evaluate(envs, act, episodes, film=False):
    """Plays whole episodes, the same number in every environment, so that long ones are not left out.

    act: (row, state) -> action (N, A), state
    -> returns and lengths of `episodes` episodes, frames of environment 0's first episode if `film`
    """
    quota = np.full(envs.num_envs, episodes // envs.num_envs)
    quota[: episodes % envs.num_envs] += 1
    results, frames = [], []
    row, state, done = reset_rows(envs), None, np.zeros(envs.num_envs, bool)
    while quota.any():
        if film and not results:
            frames.append(envs.render()[0])
        action, state = act(row, state)
        row, done, info = step_rows(envs, action, done)
        for i in np.flatnonzero(done):
            if quota[i]:
                results.append((float(info["episode"]["r"][i]), int(info["episode"]["l"][i])))
                quota[i] -= 1
    returns, lengths = zip(*results, strict=True)
    return np.array(returns), np.array(lengths), frames


# Replay


class Replay:
    """The last `capacity` rows of N environments, memory-mapped from .npy files, each image stored once.

    Row r of environment n lies at [r % capacity, n]. All environments add a row at a time, so they share
    one write head; a window of T rows stays in one environment's stream and never crosses the head.
    """

    def __init__(self, folder, capacity, shapes, num_envs, seed, resume=None):
        """shapes: dict of name -> (shape, dtype) of one row; capacity: rows per environment"""
        self.folder, self.capacity, self.num_envs = Path(folder), capacity, num_envs
        self.rng = np.random.default_rng(seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = {k: self.map(k, (capacity, num_envs, *shape), dtype) for k, (shape, dtype) in shapes.items()}
        # Rows written in all, also on disk: it says which old rows a wrapped ring has lost after a checkpoint.
        self.head = self.map("head", (1,), np.int64)
        self.end, self.start = 0, 0  # rows start..end - 1 can be sampled
        if resume:
            self.end, self.start = resume["end"], max(resume["start"], int(self.head[0]) - capacity)
            self.rng.bit_generator.state = resume["rng"]

    def map(self, name, shape, dtype):
        path = self.folder / f"{name}.npy"
        if path.exists():
            data = np.load(path, mmap_mode="r+")
            if data.shape != shape or data.dtype != dtype:
                raise UserError(f"{path} holds {data.shape} {data.dtype}, but this run needs {shape} {np.dtype(dtype)}")
            return data
        data = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "r+b") as file:  # a sparse map would die of SIGBUS on a full disk
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return data

    def state_dict(self):
        return dict(end=self.end, start=self.start, rng=self.rng.bit_generator.state)

    def flush(self):
        for data in (*self.data.values(), self.head):
            data.flush()

    def add(self, row):
        """Appends a row, a dict of (N, ...)."""
        for key, data in self.data.items():
            data[self.end % self.capacity] = row[key]
        self.end += 1
        self.head[0] = max(self.head[0], self.end)
        self.start = max(self.start, self.end - self.capacity)

    def __len__(self):
        return (self.end - self.start) * self.num_envs

    def sample(self, batch_size, length, favor_ends=False):
        """Draws windows uniformly -> dict of (T, B, ...) tensors.

        favor_ends: a window on an episode's last row gets the weight of length + 1 others, as where the
        authors' sampler draws a start up to the episode's end and clips it to the last whole window.
        """
        starts = self.end - self.start - length + 1  # possible first rows in each stream
        assert starts > 0, f"replay holds {self.end - self.start} rows, but a window has {length}"
        ends = self.episode_ends(length) if favor_ends else np.zeros((0, 2), np.int64)
        draw = self.rng.integers(starts * self.num_envs + length * len(ends), size=batch_size)
        row, env = self.start + draw // self.num_envs, draw % self.num_envs
        if len(ends):
            favored = draw >= starts * self.num_envs
            which = (draw[favored] - starts * self.num_envs) // length
            row[favored], env[favored] = ends[which, 0] - length + 1, ends[which, 1]
        index = (row + np.arange(length)[:, None]) % self.capacity  # (T, B)
        return {k: torch.from_numpy(data[index, env]) for k, data in self.data.items()}

    def episode_ends(self, length):
        """(row, env) of every episode's last row that ends a whole window; the next row is a reset."""
        slots = np.flatnonzero(self.data["is_first"][: self.end])
        slot, env = slots // self.num_envs, slots % self.num_envs
        offset = (slot - self.start) % self.capacity - 1
        keep = (offset >= length - 1) & (offset < self.end - self.start - 1)
        return np.stack([self.start + offset[keep], env[keep]], 1)


def replay_shapes(envs):
    """What a replay row of these environments holds: dict of name -> (shape, dtype)."""
    shapes = {k: (space.shape, space.dtype) for k, space in envs.single_observation_space.items()}
    scalars = {k: ((), np.float32) for k in ("reward", "is_first", "is_terminal")}
    return {**shapes, "action": ((num_actions(envs)[0],), np.float32), **scalars}


def check_disk(folder, shapes, rows):
    """Bytes that a replay of this size takes; raises UserError if the disk has less."""
    size = rows * sum(int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
    folder = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"the replay needs {size / 2**30:.1f} GiB in {folder}, which has {free / 2**30:.1f}: lower --replay-size")
    return size


# Devices, seeds and the optimiser step


def setup(seed, cuda, deterministic, threads):
    """Seeds torch and chooses the device; numpy generators are seeded where they are made."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def frozen(*modules):
    """Gradients flow through these modules, but not into their parameters."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def opt_step(optimizer, loss, clip):
    """One clipped gradient step -> the gradient's global norm before clipping, ()."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    return norm


class FiniteGuard:
    """Remembers on the device which value first was not finite, so that no update waits for the answer."""

    def __init__(self):
        self.names, self.bad = [], None

    def watch(self, step, values):
        """values: dict of scalars (); the same names each time"""
        flags = ~torch.isfinite(torch.stack([v.detach().float() for v in values.values()]))
        if self.bad is None:
            self.names, self.bad = list(values), torch.full_like(flags, -1, dtype=torch.int64)
        self.bad = torch.where((self.bad < 0) & flags, step, self.bad)

    def check(self):
        """Raises NonFinite with the names and the step of the first bad values."""
        if self.bad is not None and (self.bad >= 0).any():
            steps = {n: s for n, s in zip(self.names, self.bad.tolist(), strict=True) if s >= 0}
            first = min(steps.values())
            raise NonFinite(f"{', '.join(n for n, s in steps.items() if s == first)} not finite at update {first}")


# Run folders, logs and checkpoints


def crossed(before, after, every):
    """Whether a multiple of `every` lies in (before, after]; never, if `every` is 0."""
    return bool(every) and before // every != after // every


def count(number):
    """12345678 -> '12.3M'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def new_run(args, runs="runs"):
    """Makes runs/{env_id}__{exp_name}__{seed}__{time} with args.yaml in it."""
    name = f"{args['env_id'].replace('/', '-').replace(':', '-')}__{args['exp_name']}__{args['seed']}__{time.time_ns() // 10**6}"
    folder = Path(runs) / name
    folder.mkdir(parents=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(args, sort_keys=False))
    return folder


def load_args(folder, cls):
    """The args of a run folder; raises UserError if it is none, or one of another script."""
    try:
        args = yaml.safe_load((Path(folder) / "args.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        raise UserError(f"{folder} is no run folder: it has no readable args.yaml") from None
    fields = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(args, dict) or set(args) != fields:
        raise UserError(f"{folder} was made by another script or version: its args.yaml has other fields")
    return args


def save_checkpoint(folder, state):
    """Writes folder/checkpoint.pt so that there is always a whole one."""
    path = Path(folder) / "checkpoint.pt"
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(folder, device):
    """Reads folder/checkpoint.pt without running anything that it may contain."""
    path = Path(folder) / "checkpoint.pt"
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{folder} has no checkpoint.pt: the run ended before the first one was saved") from None
    except Exception as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


class Interrupt:
    """Ctrl-C and SIGTERM let the running step finish; a second Ctrl-C stops at once."""

    def __init__(self):
        self.code = 0  # 130 for Ctrl-C, 143 for SIGTERM
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = 128 + number


class Logger:
    """Writes the same numbers to TensorBoard and metrics.jsonl, and keeps one progress bar."""

    def __init__(self, folder, args, total_frames, frames=0, seconds=0.0, track=False):
        from torch.utils.tensorboard import SummaryWriter

        if track:
            try:
                import wandb
            except ImportError:
                raise UserError("--track needs a package that is not installed: pip install wandb") from None
            wandb.init(project=args["wandb_project_name"], entity=args["wandb_entity"], config=args, name=folder.name, sync_tensorboard=True)
        self.folder, self.start = folder, time.time() - seconds
        self.writer = SummaryWriter(folder)
        if not frames:
            table = "\n".join(f"|{k}|{v}|" for k, v in args.items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        self.file = open(folder / "metrics.jsonl", "a", buffering=1)
        interval = 0.5 if sys.stderr.isatty() else 60  # seconds; a log file gets a line a minute
        self.bar = tqdm(total=total_frames, initial=frames, unit="frames", unit_scale=True, mininterval=interval, maxinterval=interval)
        self.shown = {}

    @property
    def seconds(self):
        return time.time() - self.start

    def log(self, metrics, frames, updates):
        """metrics: dict of tag -> number or tensor ()"""
        metrics = {k: float(v) for k, v in metrics.items()}
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, frames)
        row = dict(frames=frames, updates=updates, seconds=round(self.seconds, 2), **metrics)
        self.file.write(json.dumps(row) + "\n")

    def progress(self, frames, **shown):
        """Moves the bar; shown: numbers to keep beside it."""
        self.shown |= {k: f"{v:.1f}" for k, v in shown.items()}
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(frames - self.bar.n)

    def gif(self, tag, video, frames, fps=20):
        """video: (T, H, W) or (T, H, W, 3) uint8; goes to TensorBoard and to videos/ in the run folder."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        images = [Image.fromarray(frame) for frame in video]
        buffer = io.BytesIO()
        images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=1000 // fps, loop=0)
        path = self.folder / "videos" / f"{tag.replace('/', '_')}_{frames}.gif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue())
        image = Summary.Image(encoded_image_string=buffer.getvalue(), height=video.shape[1], width=video.shape[2], colorspace=3)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), frames)

    def close(self):
        self.bar.close()
        self.file.close()
        self.writer.close()


def tile(video):
    """(T, B, C, H, W) in [0, 1] -> (T, H, B * W) or (T, H, B * W, 3) uint8, the sequences side by side."""
    video = (video.clamp(0, 1) * 255).byte().cpu().numpy()
    steps, batch, channels, height, width = video.shape
    video = video.transpose(0, 3, 1, 4, 2).reshape(steps, height, batch * width, channels)
    return video[..., 0] if channels == 1 else video
