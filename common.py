"""What neither Dreamer paper mentions: environments, replay, logs and checkpoints."""

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
import zipfile
from importlib import import_module
from pathlib import Path

import cv2
import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import torch
import typeguard
import tyro
import yaml
from ale_py.vector_env import AtariVectorEnv  # importing ale_py registers the games
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, flatdim, flatten_space, unflatten
from gymnasium.vector.utils import batch_space
from torch.utils.tensorboard import SummaryWriter, summary
from tqdm import tqdm

from distributed import (  # noqa: F401  some for the scripts
    LAUNCHER, RANK, WORLD, FiniteGuard, Interrupt, UserError, agree, average, begun,
    everyone, exit_on_error, explain, gather_state, make_folders, opt_step, own_folder,
    own_state, setup, tally
)  # fmt: skip

Count, Share = typing.Annotated[int, 1, 2**31 - 1], typing.Annotated[float, 0, 1]  # least, most
Rate = typing.Annotated[float, 1e-30, 2**31 - 1]
SIZE = 64  # height and width of images, as in both papers
CHANGEABLE = """resume evaluate total_frames log_every eval_every eval_episodes video_every track
    diagnose_every checkpoint_every capture_video cuda threads graph compile""".split()


def explain_env(spec, seed, index, begun):
    which = f"environment {index} of {getattr(spec, 'id', spec)} (seed {seed}, episode {begun - 1})"
    return explain(f"{which} failed", Exception, kind=ChildProcessError)


def parse_args(cls, presets, argv=None):
    """Fills the dataclass `cls` from argv, else the run folder given, else the preset of the id."""
    argv = sys.argv[1:] if argv is None else argv
    if (run := begun()) and not any(f.startswith(("--resume", "--evaluate")) for f in argv):
        argv = [*argv, "--resume", run]
    given = tyro.cli(cls, args=[flag for flag in argv if flag not in ("-h", "--help")])
    default = {"env_id": given.env_id, **presets[preset_name(given.env_id, given.observation)]}
    if run := given.resume or given.evaluate:
        with explain(f"{run} is no run folder of this script", Exception):
            default = yaml.safe_load((Path(run) / "args.yaml").read_text())
            typeguard.check_type(default, typing.TypedDict("Args", typing.get_type_hints(cls)))
        if ":" in default["env_id"] and given.env_id != default["env_id"]:
            raise UserError(f"add --env-id {default['env_id']} if {run} may import that module")
    if sum(flag.startswith(("--resume", "--evaluate")) for flag in argv) != bool(run):
        raise UserError("--resume and --evaluate take a run folder, and do not go together")
    args = tyro.cli(cls, default=cls(**default | {"resume": "", "evaluate": ""}), args=argv)
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        least, most = getattr(hint, "__metadata__", (0, 2**31 - 1))
        if isinstance(value, int | float) and not least <= value <= most:
            raise UserError(f"{flag} is {value}, it must be from {least} to {most}")
        if run and value != default[name] and name not in (*CHANGEABLE, given.evaluate and "seed"):
            raise UserError(f"{flag} cannot change in a run that exists")
    with explain("--track needs pip install wandb", ImportError):
        import_module("wandb") if args.track else None
    return args


def new_run(args, size):
    """Makes runs/{env_id}__{exp_name}__{seed}__{time}, or UserError if `size` GiB are not free."""
    if (size := size * WORLD) > (free := shutil.disk_usage(".").free / 2**30):
        raise UserError(f"the replay takes {size:.1f} GiB of {free:.1f} free: lower --replay-size")
    name = f"{args['env_id']}__{args['exp_name']}__{args['seed']}__{time.time_ns() // 10**6}"
    if RANK:
        torch.manual_seed(args["seed"] + 2**32 * RANK)  # after the same first weights for all
    return make_folders(Path("runs") / name.replace("/", "-").replace(":", "-"), args)


def preset_name(env_id, observation):
    """The preset of an environment: atari, dmc_pixels, dmc_vector or other."""
    if env_id.startswith(("dm_control/", "dmc/")):
        return "dmc_vector" if observation == "vector" else "dmc_pixels"
    return "atari" if "ALE/" in env_id or "ale_py" in str(gym.registry.get(env_id)) else "other"


def make_env(env_id, seed, index, episode=0, observation="auto", grayscale=False, action_repeat=1,
             time_limit=0, sticky_prob=None, full_action_space=False, render=False):  # fmt: skip
    """A `Standard` environment, or UserError; time_limit: frames, 0 leaves its own."""
    kind = preset_name(env_id, observation)
    observation = "pixels" if kind == "dmc_pixels" and observation == "auto" else observation
    kwargs = {"render_mode": "rgb_array"} if render or observation in ("pixels", "both") else {}
    if "MUJOCO_GL" not in os.environ and (kind.startswith("dmc") or (kind == "other" and kwargs)):
        choose_gl(needed=kind != "other" and bool(kwargs))
    if kind.startswith("dmc"):
        env_id = f"shimmy:dm_control/{env_id.split('/', 1)[1].removesuffix('-v0')}-v0"
        camera = {"camera_id": 2 if "quadruped" in env_id else 0}
        kwargs["render_kwargs"] = {"width": SIZE, "height": SIZE} | camera
    if kind == "atari":  # frame skip and time limit follow below, so that frames are counted once
        kwargs |= {"frameskip": 1, "max_episode_steps": -1, "full_action_space": full_action_space}
        kwargs |= {"obs_type": "grayscale" if grayscale else "rgb"}
        kwargs |= {} if sticky_prob is None else {"repeat_action_probability": sticky_prob}
    with explain(f"no {env_id.removeprefix('shimmy:')}", Exception, SystemExit):
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
        if kwargs.get("render_mode") not in (None, *env.metadata.get("render_modes", ())):
            raise ValueError("it cannot be drawn")
    if kind == "atari":
        env = gym.wrappers.AtariPreprocessing(env, 30, action_repeat, SIZE, grayscale_obs=grayscale)
    elif action_repeat > 1:
        env = gym.wrappers.RepeatAction(env, action_repeat)
    env = Standard(env, observation, grayscale, [seed, index, episode])
    env = gym.wrappers.TimeLimit(env, -(-time_limit // action_repeat) or sys.maxsize)
    return gym.wrappers.RecordEpisodeStatistics(env)


def choose_gl(needed):
    """Sets MUJOCO_GL, if the user did not, to what draws here without a screen: EGL or OSMesa."""
    probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
    for gl in ("egl", "osmesa"):
        environ = os.environ | {"MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl}
        if not subprocess.run(probe, env=environ, capture_output=True).returncode:
            return os.environ.update(environ)
    if needed:
        raise UserError("no OpenGL without a screen: apt-get install libegl1 libgl1, or libosmesa6")


class Standard(gym.Wrapper):
    """Any Box or Dict of Boxes as a dict of image (C, 64, 64) uint8 and vector (V,) float32.

    Discrete actions are one-hot, others flat in [-1, 1] and scaled to finite bounds.
    """

    def __init__(self, env, observation, grayscale, key):
        super().__init__(env)
        space, self.actions, self.key = env.observation_space, env.action_space, key
        boxes = space.spaces if isinstance(space, Dict) else {None: space}
        boxed = all(isinstance(box, Box) for box in boxes.values())
        if not (boxed and isinstance(self.actions, Discrete | Box)):
            raise UserError(f"only Box, Dict of Box, Discrete fit, not {space} and {self.actions}")
        images = [k for k, v in boxes.items() if v.dtype == np.uint8 and len(v.shape) in (2, 3)]
        self.images = images if observation != "vector" else []
        self.vectors = [k for k in boxes if k not in images] if observation != "pixels" else []
        image = Box(0, 255, (1 if grayscale else 3, SIZE, SIZE), np.uint8)
        vector = Box(-np.inf, np.inf, (sum(flatdim(boxes[k]) for k in self.vectors),), np.float32)
        spaces = {"image": image} if self.images or observation in ("pixels", "both") else {}
        spaces |= {"vector": vector} if self.vectors else {}
        channels = [boxes[k].shape[2:] for k in self.images]
        if not spaces or channels not in ([], [()], [(1,)], [(3,)]):
            raise UserError(f"--observation {observation} does not fit observations {space}")
        self.observation_space = Dict(spaces)
        flat, box = flatten_space(self.actions), isinstance(self.actions, Box)
        scaled = np.isfinite(flat.low) & np.isfinite(flat.high) & box
        self.low, self.high = np.where(scaled, flat.low, -1), np.where(scaled, flat.high, 1)
        self.action_space = Box(-1, 1, flat.shape, np.float32) if box else MultiBinary(*flat.shape)

    def reset(self, *, seed=None, options=None):
        seed = int(np.random.SeedSequence(self.key).generate_state(1)[0]) >> 1
        self.key[2] += 1
        with explain_env(self.spec, *self.key):
            obs, info = self.env.reset(seed=seed, options=options)
            return self.observe(obs), info

    def step(self, action):
        action = self.low + (action + 1) / 2 * (self.high - self.low)
        with explain_env(self.spec, *self.key):
            obs, *rest = self.env.step(unflatten(self.actions, action))
            return self.observe(obs), *rest

    def observe(self, obs):
        parts, out = obs if isinstance(obs, dict) else {None: obs}, {}
        if "image" in self.observation_space.spaces:
            # (H, W) or (H, W, C) -> (1 or 3, 64, 64); a pixel is the mean of the area it covers
            image = parts[self.images[0]] if self.images else self.env.render()
            shape = self.observation_space["image"].shape
            image = cv2.resize(image, shape[1:], interpolation=cv2.INTER_AREA)
            if image.ndim == 3 and shape[0] == 1:
                image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
            out["image"] = np.broadcast_to(np.atleast_3d(image).transpose(2, 0, 1), shape).copy()
        if self.vectors:
            out["vector"] = np.hstack([np.ravel(parts[k]) for k in self.vectors], dtype=np.float32)
        return out


class Games(gym.vector.VectorWrapper):
    """Atari games in threads of ale-py: what `Standard` makes of them, from faster code.

    Apart from no-ops, 0 to 29, seeds of later episodes, which follow from that of the first, and
    the last image when time runs out, where one frame is missing in the maximum of two.
    """

    @staticmethod
    def fit(env_id):
        """Whether ale-py registered the id, as a game without options that threads do not know."""
        spec = gym.registry.get(env_id.split(":")[-1])
        known = "frameskip full_action_space game max_num_frames_per_episode".split()
        known = {*known, "repeat_action_probability"}
        return spec and spec.entry_point == "ale_py.env:AtariEnv" and spec.kwargs.keys() == known

    def __init__(self, keys, env_id, seed, observation="auto", grayscale=False, action_repeat=1,
                 time_limit=0, sticky_prob=None, full_action_space=False):  # fmt: skip
        self.keys, known = keys, gym.spec(env_id.split(":")[-1]).kwargs
        sticky = known["repeat_action_probability"] if sticky_prob is None else sticky_prob
        frames = -(-time_limit // action_repeat) * action_repeat or 2**30
        super().__init__(AtariVectorEnv(
            known["game"], len(keys), img_height=SIZE, img_width=SIZE, grayscale=grayscale,
            stack_num=1, frameskip=action_repeat, maxpool=action_repeat > 1, use_fire_reset=False,
            reward_clipping=False, repeat_action_probability=sticky,
            full_action_space=full_action_space, max_num_frames_per_episode=frames,
        ))  # fmt: skip
        shape = (1 if grayscale else 3, SIZE, SIZE)
        self.single_observation_space = Dict({"image": Box(0, 255, shape, np.uint8)})
        self.single_action_space = MultiBinary(int(self.env.single_action_space.n))
        self.action_space = batch_space(self.single_action_space, len(keys))

    def reset(self, *, seed=None, options=None):
        seeds = [np.random.SeedSequence(key).generate_state(1)[0] >> 1 for key in self.keys]
        with explain("ale-py failed", Exception, kind=ChildProcessError):
            obs, info = self.env.reset(seed=np.array(seeds, np.int32))
        return self.observe(obs), info

    def step(self, action):
        with explain("ale-py failed", Exception, kind=ChildProcessError):
            obs, *rest = self.env.step(action.argmax(-1))
        return self.observe(obs), *rest

    def close(self, **kwargs):
        self.env.close()

    def observe(self, obs):  # (N, 1, 64, 64) or (N, 1, 64, 64, 3)
        return {"image": obs if obs.ndim == 4 else obs[:, 0].transpose(0, 3, 1, 2)}


def make_envs(num_envs, parallel=False, first_index=0, episodes=None, **options):
    """A vector of `make_env`s, reset by the step after their last; `shapes`: what a row holds."""
    first_index = first_index or RANK * num_envs
    keys = [(options["seed"], *key) for key in enumerate(episodes or [0] * num_envs, first_index)]
    fns = [lambda i=i, k=k: make_env(index=i, episode=k, **options) for _, i, k in keys]
    table = np.array(keys)
    if parallel and Games.fit(options["env_id"]) and options.get("observation") != "vector":
        envs = gym.wrappers.vector.RecordEpisodeStatistics(Games(table, **options))
    elif parallel:
        gym.logger.min_level = gym.logger.ERROR + 1  # explain_env says it
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers as well
        envs = gym.vector.AsyncVectorEnv(fns, context="spawn")
        signal.signal(signal.SIGINT, handler)
    else:
        envs = gym.vector.SyncVectorEnv(fns)
    envs.env_id, envs.keys = options["env_id"], table
    envs.discrete = isinstance(envs.single_action_space, MultiBinary)  # actions are one-hot
    envs.shapes = {k: (v.shape, v.dtype) for k, v in envs.single_observation_space.items()}
    envs.shapes |= {"action": (envs.single_action_space.shape, np.float32), "is_first": ((), bool)}
    envs.shapes |= dict.fromkeys(("reward", "is_terminal"), ((), np.float32))
    return envs


def random_actions(envs, rng):
    """Uniform actions (N, A)."""
    action = rng.uniform(-1, 1, envs.action_space.shape)
    return np.float32(action == action.max(1, keepdims=True) if envs.discrete else action)


def step_rows(envs, action, done):
    """Steps all environments, or resets them if all are done -> rows, done (N,), info."""
    envs.keys[:, 2] += done
    try:
        out = (envs.reset()[0], *[done & False] * 3, {}) if done.all() else envs.step(action)
    except (EOFError, ConnectionError):  # a process died; one that only failed says why
        dead = next(i for i, p in enumerate(envs.processes) if p.join(1) or p.exitcode is not None)
        envs.closed = True  # gymnasium would wait for it
        with explain_env(envs.env_id, *envs.keys[dead]):
            raise ChildProcessError("its process died") from None
    obs, reward, terminated, truncated, info = out
    action = action * ~done[:, None]  # the row after a done row is a reset, which ignores it
    row = {"action": action, "reward": reward, "is_first": done, "is_terminal": terminated}
    return obs | {k: v.astype(np.float32) for k, v in row.items()}, terminated | truncated, info


def evaluate(envs, act, state, episodes, film=False):
    """Plays whole episodes, the same ones each time -> returns, 1000 frames if film."""
    quota = np.bincount(np.arange(episodes) % envs.num_envs, minlength=envs.num_envs)
    quota *= np.arange(envs.num_envs) % WORLD == RANK  # each process plays some of them
    for key in envs.get_attr("key"):
        key[2] = 0
    row, done, _ = step_rows(envs, np.zeros(envs.action_space.shape), np.ones(envs.num_envs, bool))
    returns, frames = [], []
    while quota.any():
        if film and not (RANK or returns) and len(frames) < 1000:
            frames.append(envs.render()[0])
        action, state = act(row, state)
        row, done, info = step_rows(envs, action.cpu().numpy(), done)
        for i in np.flatnonzero(done & (quota > 0)):
            returns.append(info["episode"]["r"][i])
            quota[i] -= 1
    return np.concatenate(everyone(returns)), frames


class Replay:
    """The last rows of N environments in .npy files; row r of the n-th is at [r % capacity, n]."""

    def __init__(self, folder, capacity, shapes, num_envs, seed, device):
        self.folder, self.num_envs, self.device = Path(folder), num_envs, device
        with explain(f"another process trains in {self.folder}, or it is missing", OSError):
            lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this one ends, however it does
        fresh = not any(self.folder.glob("*.npy"))
        self.rng, self.start, self.end = np.random.default_rng(seed + 2**32 * RANK), 0, 0
        self.written = self.map("written", (1, 2), np.int64, fresh)[0]  # rows ever, capacity
        grows = self.written[0] <= self.written[1]  # a ring that has come round keeps its size
        rows = self.capacity = int(max(self.written[1], capacity * grows))
        self.data = {k: self.map(k, (rows, num_envs, *s), t, fresh) for k, (s, t) in shapes.items()}
        self.written[1] = self.capacity  # at last, so that growth on a full disk can be given up

    def map(self, name, shape, dtype, fresh):
        """Makes an array, or opens one and lets its file grow to the shape."""
        path = self.folder / f"{name}.npy"
        with explain(f"{path} holds no {shape} {np.dtype(dtype)}", Exception):
            if fresh:
                np.lib.format.open_memmap(path, "w+", dtype, shape)
            data = np.lib.format.open_memmap(path, "r")  # r+ would fill up a file that was cut off
            if (data.shape[1:], data.dtype) != (shape[1:], dtype):
                raise ValueError(f"it has {data.shape} {data.dtype}")
            header = {"descr": data.dtype.str, "fortran_order": False, "shape": shape}
            with open(path, "r+b") as file:  # a sparse map would die of SIGBUS on a full disk
                os.posix_fallocate(file.fileno(), 0, data.offset + shape[0] * data[:1].nbytes)
                np.lib.format.write_array_header_1_0(file, header)
            return np.load(path, mmap_mode="r+")

    def state_dict(self):
        """Writes the maps to disk, so that a checkpoint never knows more rows than they hold."""
        for data in (*self.data.values(), self.written):
            data.flush()
        return {"start": self.start, "end": self.end, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        """Goes back to the rows of a checkpoint, less those that a full ring has overwritten."""
        self.end, self.rng.bit_generator.state = state["end"], state["rng"]
        self.start = min(self.end, max(state["start"], int(self.written[0]) - self.capacity))
        if self.written[0] < self.end:
            raise UserError(f"{self.folder} lacks rows that the checkpoint knows")

    def __len__(self):
        return self.end - self.start

    def add(self, row):
        """Appends a row, a dict of (N, ...)."""
        self.start = max(self.start, self.end + 1 - self.capacity)
        self.written[0] = max(self.written[0], self.end + 1)
        for key, data in self.data.items():
            data[self.end % self.capacity] = row[key]
        self.end += 1

    def sample(self, batch_size, length, favor_ends=False):
        """Draws windows uniformly, none across the oldest row -> dict of (T, B, ...) tensors."""
        starts = (len(self) - length + 1) * self.num_envs
        assert starts > 0, f"no {length} rows in a replay of {len(self)}"
        ends = np.empty(0, int)
        if favor_ends:  # windows on an episode's last row have the weight of length + 1 others
            resets = np.flatnonzero(self.data["is_first"][: self.end])  # fast, since of one byte
            age = (resets // self.num_envs - self.start) % self.capacity
            whole = (age >= length) & (age < len(self))
            ends = ((age - length) * self.num_envs + resets % self.num_envs)[whole]
        draw = self.rng.integers(starts + length * len(ends), size=batch_size)
        extra = draw >= starts
        draw[extra] = ends[(draw[extra] - starts) // length]
        row, env = self.start + draw // self.num_envs, draw % self.num_envs
        index = (row + np.arange(length)[:, None]) % self.capacity  # (T, B)
        batch = {k: torch.from_numpy(v[index, env]) for k, v in self.data.items()}
        if self.device.type == "cuda":  # from pinned memory, nobody waits for it
            batch = {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}
        return batch


def detach(tensors):
    return {k: v.detach() for k, v in tensors.items()}


class Captured:
    """A function of dicts of tensors; a GPU replays its fourth call, into the same outputs."""

    def __init__(self, function, device, enabled):
        self.function, self.device, self.calls = function, device, 0
        self.graph = torch.cuda.CUDAGraph() if enabled and device.type == "cuda" else None

    def __call__(self, *inputs):
        inputs = [{k: torch.as_tensor(v, device=self.device) for k, v in x.items()} for x in inputs]
        if self.graph is None:
            return self.function(*inputs)
        if self.calls == 0:  # the graph reads these, wherever later ones lie
            self.inputs = [{k: v.clone() for k, v in x.items()} for x in inputs]
            self.side = torch.cuda.Stream()  # a capture needs another stream than the usual one
        for mine, given in zip(self.inputs, inputs, strict=True):
            torch._foreach_copy_([*mine.values()], [given[k] for k in mine])
        self.calls += 1
        if self.calls <= 4:  # three to warm up
            self.side.wait_stream(torch.cuda.current_stream())
            record = torch.cuda.graph(self.graph, stream=self.side)
            with record if self.calls == 4 else torch.cuda.stream(self.side):
                self.outputs = self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.side)
        if self.calls >= 4:
            self.graph.replay()
        return self.outputs


def save_checkpoint(run, parts, more):
    """Writes torch's, the parts' and `more` state; the last file becomes checkpoint.old.pt."""
    path, new, data = Path(run) / "checkpoint.pt", Path(run) / "checkpoint.new.pt", io.BytesIO()
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    rng = {"rng": [torch.get_rng_state(), *gpu]}
    state = {k: part.state_dict() for k, part in parts.items()} | rng | more
    state = gather_state(state, own=("rng", "replay", "counters"))
    if RANK:
        return everyone("rank 0 has saved")
    torch.save(state, data)
    new.write_bytes(data.getbuffer())
    with open(new, "rb") as file:
        os.fsync(file.fileno())
    if path.exists():
        path.replace(path.with_name("checkpoint.old.pt"))
    new.replace(path)
    everyone("rank 0 has saved")


def load_checkpoint(run, parts):
    """Gives torch and the parts their states from the last whole checkpoint -> all in it."""
    for path in (Path(run) / f"checkpoint{name}.pt" for name in ("", ".new", ".old")):
        try:
            if bad := zipfile.ZipFile(path).testzip():  # checks its CRC-32s
                raise ValueError(f"{bad} is damaged")
            state = torch.load(path, map_location="cpu", weights_only=True)  # executes nothing
            state = own_state(state)
            for key, part in parts.items():
                part.load_state_dict(state[key])
            torch.set_rng_state(state["rng"][0])
            for gpu in state["rng"][1 : 1 + torch.cuda.is_available()]:
                torch.cuda.set_rng_state(gpu)
        except Exception as error:  # whatever a file from someone else may hold
            if path.exists():
                print(f"{path} cannot be used, trying another: {error!r}"[:200], file=sys.stderr)
        else:
            return agree(state, parts.get("replay"))
    raise UserError(f"no checkpoint can be read in {run}")


def crossed(before, after, every):
    return every > 0 and before // every != after // every  # is a multiple in (before, after]?


class Logger:
    """The same numbers to TensorBoard, metrics.jsonl and Weights & Biases, and a progress bar."""

    def __init__(self, run, args, frames=0, seconds=0.0, size=0):
        self.run, self.began = run, time.time() - seconds
        wait = {k: 0.5 if sys.stderr.isatty() else 60 for k in ("mininterval", "maxinterval")}  # s
        wait |= {"total": args["total_frames"], "initial": frames, "disable": RANK > 0}
        self.bar = tqdm(unit=" frames", **wait)
        self.file = open(os.devnull if RANK else run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        if RANK:
            return
        self.file.seek(self.file.truncate(min(size, self.file.tell())))  # later rows come again
        if args["track"]:
            names = {"project": args["wandb_project_name"], "entity": args["wandb_entity"]}
            sys.modules["wandb"].init(**names, name=run.name, config=args, sync_tensorboard=True)
        (new := run / "args.new.yaml").write_text(yaml.safe_dump(args, sort_keys=False))
        new.replace(run / "args.yaml")
        self.writer = SummaryWriter(run, purge_step=frames + 1)
        threading.excepthook = lambda thread: None  # the writer raises what its thread does

    def log(self, metrics, frames, updates):
        """Writes a row; metrics: dict of tag -> number; losses get the speed of the whole run."""
        if RANK:
            return
        took = time.time() - self.began
        if "losses/model" in metrics:
            metrics |= {"charts/SPS": frames / took, "time/updates_per_second": updates / took}
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, frames)
        row = {"frames": frames, "updates": updates, "seconds": round(took, 3)}
        self.file.write(json.dumps(row | metrics, default=float) + "\n")
        if "charts/episodic_return" in metrics:
            self.bar.set_postfix({"return": metrics["charts/episodic_return"]}, refresh=False)

    def diagnose(self, frames, updates, *inputs):
        """Logs what benchmarks/instruments.py sees, unless a copied script left it behind."""
        if RANK:
            return
        with contextlib.suppress(ModuleNotFoundError):
            self.log(import_module("benchmarks.instruments").diagnose(*inputs), frames, updates)

    def close(self):
        for closing in (self.bar, self.file, *([] if RANK else [self.writer])):
            closing.close()

    def gif(self, tag, film, frames):
        """To TensorBoard and the run folder's videos/; film as in `save_gif`."""
        if RANK:
            return
        path = self.run / "videos" / f"{tag.replace('/', '_')}_{frames}.gif"
        save_gif(path, film)
        image = summary.Summary.Image(encoded_image_string=path.read_bytes(), colorspace=3)
        value = [summary.Summary.Value(tag=tag, image=image)]
        self.writer.file_writer.add_summary(summary.Summary(value=value), frames)


def save_gif(path, film):
    """film: (T, H, W) or (T, H, W, 3) uint8, or (T, B, C, H, W) in [0, 1], B side by side."""
    if torch.is_tensor(film):
        film = (255 * film.clamp(0, 1)).byte().cpu().permute(0, 3, 1, 4, 2).flatten(2, 3).squeeze(3)
    path.parent.mkdir(exist_ok=True)
    imageio.imwrite(path, np.asarray(film), duration=50, loop=0)  # ms
