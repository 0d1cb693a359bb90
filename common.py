"""What neither Dreamer paper mentions: environments, replay, seeds, logs and checkpoints.

Nothing in here knows about the algorithms: no network, no loss, no hyperparameter.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: Python {sys.version.split()[0]} is too old, use 3.11 or 3.12")

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import json
import math
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
    import ale_py  # noqa: F401  registers the Atari games

SIZE = 64  # height and width of images, as in both papers
CHANGEABLE = """resume total_frames log_every eval_every eval_episodes video_every checkpoint_every
    capture_video track cuda threads""".split()  # by --resume


class UserError(Exception):
    """Something the user can mend, said in one line."""

    exit_code = 2


class NonFiniteError(UserError):
    """A loss or gradient became NaN or infinite."""

    exit_code = 1


@contextlib.contextmanager
def exit_on_error():
    """Prints a `UserError` in one line, without a traceback, and exits with its code."""
    try:
        yield
    except UserError as error:
        tqdm.write("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)


# Command line
def parse_args(cls, presets, argv=None):
    """Fills the dataclass `cls` from the command line.

    What is not given comes from the run folder of --resume or --evaluate, else from the preset of
    the environment id; presets: dict of name -> dict of fields, see `preset_name`.
    """
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument("--env-id", "--env_id", default=cls.env_id)
    look.add_argument("--observation", default="auto")
    look.add_argument("--resume")
    look.add_argument("--evaluate")
    given, _ = look.parse_known_args(argv)
    default = {"env_id": given.env_id, **presets[preset_name(given.env_id, given.observation)]}
    if run := given.resume or given.evaluate:
        default = load_args(run, cls)
    args = tyro.cli(cls, default=cls(**default), args=argv)
    changed = [k for k, v in vars(args).items() if v != getattr(cls(**default), k)]
    if given.resume and (fixed := [k for k in changed if k not in CHANGEABLE]):
        raise UserError(f"--{fixed[0].replace('_', '-')} cannot change when a run is resumed")
    if args.track and not importlib.util.find_spec("wandb"):
        raise UserError("--track needs a package that is not installed: pip install wandb")
    return args


def check_positive(args, names):
    """Raises UserError for a negative number in the dataclass `args`, or a 0 among the names."""
    for name, value in vars(args).items():
        positive = name in names.split()
        if isinstance(value, int | float) and not (value > 0 or (value == 0 and not positive)):
            least = "above 0" if positive else "0 or more"
            raise UserError(f"--{name.replace('_', '-')} is {value}, it must be {least}")


# Environments
def preset_name(env_id, observation):
    """The preset of an environment: atari, dmc_pixels, dmc_vector or other."""
    if env_id.startswith(("dm_control/", "dmc/")):
        return "dmc_vector" if observation == "vector" else "dmc_pixels"
    spec = gym.registry.get(env_id)
    atari = env_id.startswith("ALE/") or (spec is not None and "ale_py" in str(spec.entry_point))
    return "atari" if atari else "other"


def make_env(env_id, seed, index, episode=0, observation="auto", grayscale=False, action_repeat=1,
             time_limit=0, sticky_prob=None, full_action_space=False, render=False):  # fmt: skip
    """One environment as `Standard` shows it; raises UserError if it cannot be made or shown.

    time_limit: agent steps, 0 leaves the environment's own; episode: number of the first one
    """
    kind = preset_name(env_id, observation)
    if observation == "auto" and kind == "dmc_pixels":
        observation = "pixels"
    kwargs = {"render_mode": "rgb_array"} if render or observation in ("pixels", "both") else {}
    if kind.startswith("dmc") or (kind == "other" and kwargs):
        choose_gl(needed=kind != "other" and bool(kwargs))
    try:
        if kind == "atari":
            if sticky_prob is not None:
                kwargs["repeat_action_probability"] = sticky_prob
            kwargs["full_action_space"] = full_action_space
            kwargs["obs_type"] = "grayscale" if grayscale else "rgb"
            # Frame skip and time limit are added outside, so that frames are counted once.
            kwargs |= {"frameskip": 1, "max_episode_steps": -1}
        if kind in ("atari", "other"):
            env = gym.make(env_id, disable_env_checker=True, **kwargs)
        else:
            env = make_dmc(env_id, **kwargs)
        if kind == "atari":
            options = {"frame_skip": action_repeat, "screen_size": SIZE, "grayscale_obs": grayscale}
            env, action_repeat = gym.wrappers.AtariPreprocessing(env, **options), 1
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        raise UserError(f"{env_id} needs a package that is not installed: {error}") from None
    except (gym.error.Error, TypeError) as error:
        raise UserError(f"no {env_id}{nearest(env_id, gym.registry)} ({error})") from None
    env = Standard(env, observation, grayscale, action_repeat, [seed, index, episode])
    if time_limit:
        env = gym.wrappers.TimeLimit(env, time_limit)
    return gym.wrappers.RecordEpisodeStatistics(env)


def nearest(name, names):
    """'; nearest: a, b' to go on with in an error message, or nothing."""
    found = difflib.get_close_matches(name, names, 3)
    return f"; nearest: {', '.join(found)}" if found else ""


def make_dmc(env_id, render_mode=None):
    """A dm_control task: dm_control/ball_in_cup-catch-v0 or dmc/ball_in_cup-catch.

    Terminated only where dm_control's discount is 0; its own limit of 1000 frames truncates.
    """
    from dm_control import suite
    from shimmy.dm_control_compatibility import DmControlCompatibilityV0

    tasks = {"-".join(task): task for task in suite.ALL_TASKS}
    name = env_id.split("/", 1)[1].removesuffix("-v0")
    if name not in tasks:
        raise UserError(f"no environment {env_id}{nearest(name, tasks)}")
    env = suite.load(*tasks[name])
    camera = min(2 if name.startswith("quadruped") else 0, env.physics.model.ncam - 1)
    options = {"width": SIZE, "height": SIZE, "camera_id": camera}
    return DmControlCompatibilityV0(env, render_mode, options)


def choose_gl(needed):
    """Sets MUJOCO_GL to what draws here without a screen: the user's choice, EGL or OSMesa."""
    if "MUJOCO_GL" in os.environ:
        return
    for gl in ("egl", "osmesa"):
        gl_env = {"MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl}
        probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
        if not subprocess.run(probe, env=os.environ | gl_env, capture_output=True).returncode:
            os.environ.update(gl_env)
            return
    if needed:
        raise UserError("no OpenGL without a screen: apt-get install libegl1 libgl1, or libosmesa6")


class Standard(gym.Wrapper):
    """Any Box or Dict of Boxes as a dict of image (C, 64, 64) uint8 and vector (V,) float32.

    Images are the environment's own or rendered. Discrete actions are one-hot; continuous ones are
    flat and scaled from [-1, 1] to the bounds that are finite. Each is taken `repeat` times. The
    episode key = [seed, index of the environment, episode] seeds it, so that a run can be resumed.
    """

    def __init__(self, env, observation, grayscale, repeat, key):
        super().__init__(env)
        self.repeat, self.key = repeat, key
        space, self.actions = env.observation_space, env.action_space
        parts = space.spaces if isinstance(space, gym.spaces.Dict) else {None: space}
        if not all(isinstance(part, gym.spaces.Box) for part in parts.values()):
            raise UserError(f"observations {space} are not supported, only Box and Dict of Box")
        images = [k for k, v in parts.items() if v.dtype == np.uint8 and len(v.shape) in (2, 3)]
        if any(parts[k].shape[2:] not in ((), (1,), (3,)) for k in images):
            raise UserError(f"images {space} are not supported, only (H, W), (H, W, 1), (H, W, 3)")
        self.images = images if observation != "vector" else []
        self.vectors = [k for k in parts if k not in images] if observation != "pixels" else []
        self.draws = observation in ("pixels", "both") and not images
        if len(self.images) > 1 or not (self.images or self.vectors or self.draws):
            raise UserError(f"--observation {observation} does not fit observations {space}")
        spaces = {}
        if self.images or self.draws:
            spaces["image"] = gym.spaces.Box(0, 255, (1 if grayscale else 3, SIZE, SIZE), np.uint8)
        if self.vectors:
            size = sum(math.prod(parts[k].shape) for k in self.vectors)
            spaces["vector"] = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.observation_space = gym.spaces.Dict(spaces)

        self.discrete = isinstance(self.actions, gym.spaces.Discrete)
        if self.discrete:
            self.action_space = gym.spaces.MultiBinary(int(self.actions.n))
        elif isinstance(self.actions, gym.spaces.Box):
            low, high = self.actions.low, self.actions.high
            finite = np.isfinite(low) & np.isfinite(high)
            self.low, self.high = np.where(finite, low, -1), np.where(finite, high, 1)
            self.action_space = gym.spaces.Box(-1, 1, (math.prod(low.shape),), np.float32)
        else:
            raise UserError(f"actions {self.actions} are not supported, only Discrete and Box")

    def reset(self, *, seed=None, options=None):
        seed = int(np.random.SeedSequence(self.key).generate_state(1)[0]) >> 1
        self.key[2] += 1
        obs, info = self.env.reset(seed=seed, options=options)
        return self.observe(obs), info

    def step(self, action):
        if self.discrete:
            action = int(np.argmax(action) + self.actions.start)
        else:
            share = (np.reshape(action, self.low.shape) + 1) / 2
            action = (self.low + share * (self.high - self.low)).astype(self.actions.dtype)
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return self.observe(obs), total, terminated, truncated, info

    def observe(self, obs):
        parts, out = obs if isinstance(obs, dict) else {None: obs}, {}
        if self.images or self.draws:
            out["image"] = self.image(self.env.render() if self.draws else parts[self.images[0]])
        if self.vectors:
            vector = np.concatenate([np.ravel(parts[k]) for k in self.vectors])
            out["vector"] = vector.astype(np.float32)
        return out

    def image(self, image):
        """(H, W) or (H, W, C) -> (1 or 3, 64, 64); a pixel is the mean of the area it covers."""
        shape = self.observation_space["image"].shape
        if image.shape[:2] != shape[1:]:
            image = cv2.resize(image, shape[1:], interpolation=cv2.INTER_AREA)
        if image.ndim == 3 and image.shape[2] == 3 and shape[0] == 1:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return np.broadcast_to(np.atleast_3d(image).transpose(2, 0, 1), shape).copy()


def make_envs(num_envs, parallel=False, first_index=0, episodes=None, **options):
    """A vector environment of `make_env`s, in processes of their own if parallel."""
    episodes = episodes or [0] * num_envs
    make = functools.partial(functools.partial, make_env, **options)
    fns = [make(index=first_index + i, episode=episodes[i]) for i in range(num_envs)]
    mode = gym.vector.AutoresetMode.NEXT_STEP
    if not parallel:
        return gym.vector.SyncVectorEnv(fns, autoreset_mode=mode)
    fns[0]().close()  # says here, not in a worker, what is wrong with the id
    return gym.vector.AsyncVectorEnv(fns, autoreset_mode=mode, context="spawn")


def is_discrete(envs):
    """Whether actions are one-hot."""
    return isinstance(envs.single_action_space, gym.spaces.MultiBinary)


def random_actions(envs, rng):
    """Uniform actions (N, A)."""
    num_envs, size = envs.action_space.shape
    if is_discrete(envs):
        return np.eye(size, dtype=np.float32)[rng.integers(size, size=num_envs)]
    return rng.uniform(-1, 1, (num_envs, size)).astype(np.float32)


def reset_rows(envs):
    """Resets all environments -> their rows: dict of (N, ...)."""
    zeros = np.zeros(envs.action_space.shape, np.float32)
    row = {"action": zeros, "reward": zeros[:, 0], "is_terminal": zeros[:, 0]}
    return {**envs.reset()[0], **row, "is_first": zeros[:, 0] + 1}


def step_rows(envs, action, done):
    """Steps all environments -> rows: dict of (N, ...), done (N,), info.

    Where done was set the row is a reset: the environment ignored the action, so it is stored as 0.
    """
    obs, reward, terminated, truncated, info = envs.step(action)
    row = {"reward": reward, "is_first": done, "is_terminal": terminated}
    row = {k: v.astype(np.float32) for k, v in row.items()}
    return {**obs, "action": action * ~done[:, None], **row}, terminated | truncated, info


def evaluate(envs, act, episodes, film=False):
    """Plays whole episodes, equally many in each environment, so that long ones count as well.

    act: rows, state -> action (N, A), state; state is None at the beginning
    -> returns (episodes,), and if film the first 1000 frames of an episode
    """
    quota = np.full(envs.num_envs, episodes // envs.num_envs)
    quota[: episodes % envs.num_envs] += 1
    returns, frames = [], []
    row, state, done = reset_rows(envs), None, np.zeros(envs.num_envs, bool)
    while quota.any():
        if film and not returns and len(frames) < 1000:
            frames.append(envs.render()[0])
        action, state = act(row, state)
        row, done, info = step_rows(envs, action, done)
        for i in np.flatnonzero(done & (quota > 0)):
            returns.append(info["episode"]["r"][i])
            quota[i] -= 1
    return np.array(returns), frames


# Replay
class Replay:
    """The last rows of N environments, memory-mapped from .npy files, each image stored once.

    Row r of environment n lies at [r % capacity, n]. All environments add a row at a time, so they
    share a write head, which no window crosses; a window stays in one environment's stream.
    """

    def __init__(self, folder, capacity, shapes, num_envs, seed):
        """capacity: rows per environment; shapes: see `row_shapes`"""
        self.folder, self.capacity, self.num_envs = Path(folder), capacity, num_envs
        self.folder.mkdir(exist_ok=True)
        self.data = {k: self.map(k, (capacity, num_envs, *s), t) for k, (s, t) in shapes.items()}
        self.capacity = len(self.data["action"])  # a resumed run has the size that it began with
        # Rows ever written: it tells which old ones a full ring has lost since the checkpoint.
        self.written = self.map("written", (1, 1), np.int64)
        self.rng = np.random.default_rng(seed)
        self.start = self.end = 0  # rows start..end - 1 can be drawn

    def map(self, name, shape, dtype):
        """A new file, or that of a resumed run."""
        path = self.folder / f"{name}.npy"
        if not path.exists():
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            with open(path, "r+b") as file:  # a sparse map would die of SIGBUS on a full disk
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        data = np.load(path, mmap_mode="r+")
        if (data.shape[1:], data.dtype) != (shape[1:], dtype):
            raise UserError(f"{path} is {data.shape} {data.dtype}, not {shape} {np.dtype(dtype)}")
        return data

    def state_dict(self):
        """Writes the maps to disk, so that a checkpoint never knows more rows than they hold."""
        for data in (*self.data.values(), self.written):
            data.flush()
        return {"start": self.start, "end": self.end, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        """Goes back to the rows of a checkpoint, less those that a full ring has overwritten."""
        self.end, self.rng.bit_generator.state = state["end"], state["rng"]
        kept = max(state["start"], int(self.written[0, 0]) - self.capacity)
        self.start = min(kept, self.end)

    def __str__(self):
        size = sum(data.nbytes for data in self.data.values()) / 2**30
        return f"replay {self.capacity * self.num_envs:,} rows, {size:.2f} GiB in {self.folder}"

    def add(self, row):
        """Appends a row, a dict of (N, ...)."""
        self.start = max(self.start, self.end + 1 - self.capacity)
        self.written[0] = max(self.written[0], self.end + 1)
        for key, data in self.data.items():
            data[self.end % self.capacity] = row[key]
        self.end += 1

    def sample(self, batch_size, length, favor_ends=False):
        """Draws windows uniformly -> dict of (T, B, ...) tensors.

        favor_ends: the window on an episode's last row has the weight of length + 1 others, as in
        the authors' sampler, which draws starts up to there and clips them to whole windows.
        """
        starts = (self.end - self.start - length + 1) * self.num_envs
        assert starts > 0, f"no {length} rows in a replay of {self.end - self.start}"
        ends = self.episode_ends(length) if favor_ends else ()
        draw = self.rng.integers(starts + length * len(ends), size=batch_size)
        row, env = self.start + draw // self.num_envs, draw % self.num_envs
        for i in np.flatnonzero(draw >= starts):
            last, env[i] = ends[(draw[i] - starts) // length]
            row[i] = last - length + 1
        index = (row + np.arange(length)[:, None]) % self.capacity  # (T, B)
        return {k: torch.from_numpy(data[index, env]) for k, data in self.data.items()}

    def episode_ends(self, length):
        """(row, env) of the last rows of episodes, before a reset row, that end a whole window."""
        slots = np.flatnonzero(self.data["is_first"][: self.end])
        age = (slots // self.num_envs - self.start) % self.capacity
        keep = (age >= length) & (age < self.end - self.start)
        return np.stack([self.start + age[keep] - 1, slots[keep] % self.num_envs], 1)


def row_shapes(envs):
    """What a row of one environment holds: dict of name -> (shape, dtype)."""
    shapes = {k: (space.shape, space.dtype) for k, space in envs.single_observation_space.items()}
    shapes["action"] = (envs.single_action_space.shape, np.float32)
    return shapes | dict.fromkeys(("reward", "is_first", "is_terminal"), ((), np.float32))


def check_disk(shapes, rows):
    """Raises UserError if the disk has no room for `rows` rows."""
    row = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
    size, free = rows * row / 2**30, shutil.disk_usage(".").free / 2**30
    if size > free:
        raise UserError(f"the replay takes {size:.1f} GiB of {free:.1f} free: lower --replay-size")


# Device and optimizer step
def setup(seed, cuda, deterministic, threads):
    """Seeds torch and returns the device; numpy's generators are seeded where they are made."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    return torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")


def get_rng():
    """The states of torch's generators, of the CPU and of each GPU."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_rng(states):
    torch.set_rng_state(states[0].cpu())
    if torch.cuda.device_count() == len(states) - 1:
        torch.cuda.set_rng_state_all([state.cpu() for state in states[1:]])


def stack(states):
    """A list of dicts of (...) -> a dict of (T, ...)."""
    return {k: torch.stack([state[k] for state in states]) for k in states[0]}


def detach(tensors):
    return {k: v.detach() for k, v in tensors.items()}


@contextlib.contextmanager
def frozen(module):
    """Gradients flow through the module, but not into its parameters."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def opt_step(optimizer, loss, clip):
    """One gradient step -> the gradient's global norm before it was clipped, ()."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return norm


class FiniteGuard:
    """Keeps on the device when each value first was not finite, so that no update waits for it."""

    first = None

    def watch(self, updates, values):
        """values: dict of (), the same names in every update"""
        bad = ~torch.isfinite(torch.stack([v.float() for v in values.values()]))
        if self.first is None:
            self.names, self.first = list(values), torch.full_like(bad, -1, dtype=torch.int64)
        self.first = torch.where(bad & (self.first < 0), updates, self.first)

    def check(self):
        """Raises NonFiniteError with the update and the names of the first bad values."""
        if self.first is not None and (self.first >= 0).any():
            update = int(self.first[self.first >= 0].min())
            names = [n for n, f in zip(self.names, self.first.tolist(), strict=True) if f == update]
            names = [n for n in names if n.startswith("losses/")] or names
            raise NonFiniteError(f"not finite at update {update}: {', '.join(names)}")


# Run folders
def new_run(args):
    """Makes runs/{env_id}__{exp_name}__{seed}__{time} and its args.yaml; args is a dict."""
    env_id = args["env_id"].replace("/", "-").replace(":", "-")
    run = Path("runs") / f"{env_id}__{args['exp_name']}__{args['seed']}__{time.time_ns() // 10**6}"
    run.mkdir(parents=True)
    (run / "args.yaml").write_text(yaml.safe_dump(args, sort_keys=False))
    return run


def load_args(run, cls):
    """The args of a run folder as a dict of the dataclass's fields."""
    try:
        args = yaml.safe_load((Path(run) / "args.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        raise UserError(f"{run} is no run folder: no args.yaml can be read in it") from None
    if not isinstance(args, dict) or set(args) != {f.name for f in dataclasses.fields(cls)}:
        raise UserError(f"{run} is a run of another script or version: its args.yaml differs")
    return args


def save_checkpoint(run, state):
    """Writes checkpoint.pt under another name first, so that there always is a whole one."""
    path = Path(run) / "checkpoint.pt"
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(run, device):
    """Reads checkpoint.pt; nothing in it is executed."""
    try:
        return torch.load(Path(run) / "checkpoint.pt", map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{run} has no checkpoint: the run ended before the first one") from None
    except Exception as error:
        raise UserError(f"{run}/checkpoint.pt cannot be read: {error}"[:200]) from None


class Interrupt:
    """Lets the step end on Ctrl-C (code 130) or SIGTERM (143); a second Ctrl-C stops at once."""

    code = 0

    def __init__(self):
        signal.signal(signal.SIGINT, self.note)
        signal.signal(signal.SIGTERM, self.note)

    def note(self, number, frame):
        self.code = 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def crossed(before, after, every):
    """Whether a multiple of `every` lies in (before, after]; 0 is never."""
    return every > 0 and before // every != after // every


class Logger:
    """The same numbers to TensorBoard, metrics.jsonl and Weights & Biases, and a progress bar."""

    def __init__(self, run, args, frames=0, updates=0, seconds=0.0):
        """args: dict; frames, updates and seconds: where a resumed run goes on"""
        if args["track"]:
            import wandb

            project = {"project": args["wandb_project_name"], "entity": args["wandb_entity"]}
            wandb.init(**project, name=run.name, config=args, sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.run, self.began, self.shown = run, time.time() - seconds, {}
        self.last = (seconds, frames, updates)
        # What a killed run logged after its last checkpoint will be logged again.
        self.writer, path = SummaryWriter(run, purge_step=frames or None), run / "metrics.jsonl"
        rows = path.read_text().splitlines(True) if frames else []
        rows = [r for r in rows if r.endswith("\n") and json.loads(r)["frames"] <= frames]
        path.write_text("".join(rows))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        table = "".join(f"|{k}|{v}|\n" for k, v in args.items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", frames)
        wait = {k: 0.5 if sys.stderr.isatty() else 60 for k in ("mininterval", "maxinterval")}  # s
        self.bar = tqdm(total=args["total_frames"], initial=frames, unit=" frames", **wait)

    def seconds(self):
        return time.time() - self.began

    def log(self, metrics, frames, updates):
        """Writes a row; metrics: dict of tag -> number or tensor ()"""
        metrics = {k: float(v) for k, v in metrics.items()}
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, frames)
        row = {"frames": frames, "updates": updates, "seconds": round(self.seconds(), 3)}
        self.file.write(json.dumps(row | metrics) + "\n")
        tags = {"charts/episodic_return": "return", "time/updates_per_second": "updates/s"}
        self.shown |= {tags[k]: f"{v:.4g}" for k, v in metrics.items() if k in tags}
        self.bar.set_postfix(self.shown, refresh=False)

    def speed(self, frames, updates):
        """Frames and updates per second since it was asked last."""
        now, last = (self.seconds(), frames, updates), self.last
        self.last, (seconds, *counts) = now, np.subtract(now, last)
        return {"charts/SPS": counts[0] / seconds, "time/updates_per_second": counts[1] / seconds}

    def gif(self, tag, video, frames):
        """video: (T, H, W) or (T, H, W, 3) uint8, to TensorBoard and the run folder's videos/."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        path = self.run / "videos" / f"{tag.replace('/', '_')}_{frames}.gif"
        save_gif(path, video)
        image = Summary.Image(encoded_image_string=path.read_bytes(), colorspace=3)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self.writer.file_writer.add_summary(summary, frames)

    def close(self):
        for closing in (self.bar, self.file, self.writer):
            closing.close()


def save_gif(path, video):
    """video: (T, H, W) or (T, H, W, 3) uint8, 20 frames per second."""
    first, *rest = [Image.fromarray(frame) for frame in video]
    path.parent.mkdir(exist_ok=True)
    first.save(path, save_all=True, append_images=rest, duration=50, loop=0)


def tile(video):
    """(T, B, C, H, W) in [0, 1] -> (T, H, B * W) or (T, H, B * W, 3) uint8, side by side."""
    video = (video.clamp(0, 1) * 255).byte().permute(0, 3, 1, 4, 2).flatten(2, 3).cpu().numpy()
    return video.squeeze(-1) if video.shape[-1] == 1 else video
