"""From a gymnasium id to rows, and from rows to batches: environments and replay."""

import contextlib
import fcntl
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, flatdim, flatten_space, unflatten

from runtime import RANK, WORLD, UserError, all_gather, explain, forked_rng

gym.register_envs(ale_py)  # its games, under ALE/ and the older names
SIZE = 64  # height and width of images, as in both papers


# From an id to an environment


def choose_preset(args):
    """The preset of --preset, or else of the id: atari, dmc_pixels, dmc_vector or other."""
    if args.preset != "auto":
        return args.preset
    if is_dm_control(args.env_id):
        return "dmc_vector" if args.observation == "vector" else "dmc_pixels"
    return "atari" if is_atari(args.env_id) else "other"


def is_dm_control(env_id):
    return env_id.startswith(("dm_control/", "dmc/"))


def is_atari(env_id):
    return "ALE/" in env_id or "ale_py" in str(gym.registry.get(env_id))


def make_env(args, index, render=False):
    """The environment of an index, with seeds of its own; UserError if it cannot be made.

    args has env_id, seed, observation, pixels, grayscale, action_repeat, time_limit (in frames,
    0 leaves that of the environment), sticky_prob and full_action_space.
    """
    dm_control = is_dm_control(args.env_id)
    atari = is_atari(args.env_id)
    observation = "pixels" if args.pixels else args.observation
    if dm_control and observation == "auto":
        observation = "pixels"
    renders = render or observation in ("pixels", "both")
    options = {"render_mode": "rgb_array"} if renders else {}
    env_id = args.env_id
    if dm_control:
        env_id = f"dm_control/{env_id.split('/', 1)[1].removesuffix('-v0')}-v0"
        camera = 2 if "quadruped" in env_id else 0
        options["render_kwargs"] = {"width": SIZE, "height": SIZE, "camera_id": camera}
    if atari:
        options["full_action_space"] = args.full_action_space
        options["obs_type"] = "grayscale" if args.grayscale else "rgb"
        # Frame skip and time limit follow below, so that frames are counted once.
        options["frameskip"] = 1
        options["max_episode_steps"] = -1
        if args.sticky_prob is not None:
            options["repeat_action_probability"] = args.sticky_prob

    if "MUJOCO_GL" not in os.environ and (dm_control or (renders and not atari)):
        choose_gl(needed=dm_control and renders)
    with explain(f"no {env_id}", Exception, SystemExit):
        if dm_control:
            env = gym.make(f"shimmy:{env_id}", disable_env_checker=True, **options)
        else:
            env = gym.make(env_id, disable_env_checker=True, **options)
        if renders and "rgb_array" not in env.metadata.get("render_modes", ()):
            raise ValueError("it cannot be drawn")
    if atari:
        env = gym.wrappers.AtariPreprocessing(
            env, noop_max=30, frame_skip=args.action_repeat, screen_size=SIZE,
            grayscale_obs=args.grayscale,
        )  # fmt: skip
    elif args.action_repeat > 1:
        env = gym.wrappers.RepeatAction(env, args.action_repeat)
    env = DreamerSpaces(env, observation, args.grayscale, args.seed, index)
    if args.time_limit:
        env = gym.wrappers.TimeLimit(env, math.ceil(args.time_limit / args.action_repeat))
    return env


def choose_gl(needed):
    """Sets MUJOCO_GL, if the user did not, to what renders without a screen: EGL or OSMesa."""
    probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
    for gl in ("egl", "osmesa"):
        environ = os.environ | {"MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl}
        if subprocess.run(probe, env=environ, capture_output=True).returncode == 0:
            os.environ.update(environ)
            return
    if needed:
        hint = "apt-get install libegl1 libgl1, or libosmesa6"
        raise UserError(f"no OpenGL without a screen: {hint}")


def explain_failure(env_id, seed, index, episode):
    """Turns any exception into a ChildProcessError of one line that names the environment."""
    which = f"environment {index} of {env_id} (seed {seed}, episode {episode})"
    return explain(f"{which} failed", Exception, kind=ChildProcessError)


class DreamerSpaces(gym.Wrapper):
    """Any Box or Dict of Boxes as a dict of image (C, 64, 64) uint8 and vector (V,) float32.

    Discrete actions are one-hot, others flat in [-1, 1] and scaled to finite bounds. The seed of
    an episode follows from those of the run, the environment's index and the episode's number.
    """

    def __init__(self, env, observation, grayscale, seed, index):
        super().__init__(env)
        self.seed = seed
        self.index = index
        self.episode = 0  # how many have begun
        self.actions = env.action_space
        space = env.observation_space
        boxes = space.spaces if isinstance(space, Dict) else {None: space}  # a Box has no key
        boxed = all(isinstance(box, Box) for box in boxes.values())
        if not (boxed and isinstance(self.actions, Discrete | Box)):
            both = f"{space} and {self.actions}"
            raise UserError(f"only Box, Dict of Box, Discrete fit, not {both}")

        images = [k for k, v in boxes.items() if v.dtype == np.uint8 and len(v.shape) in (2, 3)]
        vectors = [k for k in boxes if k not in images]
        self.image_keys = images if observation != "vector" else []
        self.vector_keys = vectors if observation != "pixels" else []
        spaces = {}
        if self.image_keys or observation in ("pixels", "both"):
            spaces["image"] = Box(0, 255, (1 if grayscale else 3, SIZE, SIZE), np.uint8)
        if self.vector_keys:
            size = sum(flatdim(boxes[k]) for k in self.vector_keys)
            spaces["vector"] = Box(-np.inf, np.inf, (size,), np.float32)
        # At most one image, of shape (H, W), (H, W, 1) or (H, W, 3).
        channels = [boxes[k].shape[2:] for k in self.image_keys]
        if not spaces or channels not in ([], [()], [(1,)], [(3,)]):
            raise UserError(f"--observation {observation} does not fit observations {space}")
        self.observation_space = Dict(spaces)

        flat = flatten_space(self.actions)
        if isinstance(self.actions, Discrete):
            self.action_space = MultiBinary(int(self.actions.n))
            scaled = np.zeros(flat.shape, bool)  # `step` leaves one-hot actions as they are
        else:
            self.action_space = Box(-1, 1, flat.shape, np.float32)
            scaled = np.isfinite(flat.low) & np.isfinite(flat.high)
        self.low = np.where(scaled, flat.low, -1)
        self.high = np.where(scaled, flat.high, 1)

    def explain_failure(self):
        env_id = getattr(self.spec, "id", self.spec)
        return explain_failure(env_id, self.seed, self.index, self.episode - 1)

    def reset(self, *, seed=None, options=None):
        sequence = np.random.SeedSequence([self.seed, self.index, self.episode])
        seed = int(sequence.generate_state(1)[0]) >> 1
        self.episode += 1
        with self.explain_failure():
            obs, _ = self.env.reset(seed=seed, options=options)
            return self.observe(obs), {}

    def step(self, action):
        action = self.low + (action + 1) / 2 * (self.high - self.low)
        action = unflatten(self.actions, action)
        with self.explain_failure():
            obs, reward, terminated, truncated, _ = self.env.step(action)
            return self.observe(obs), reward, terminated, truncated, {}

    def observe(self, obs):
        parts = obs if isinstance(obs, dict) else {None: obs}
        out = {}
        if "image" in self.observation_space.spaces:
            image = parts[self.image_keys[0]] if self.image_keys else self.env.render()
            out["image"] = self.resize(image)
        if self.vector_keys:
            vectors = [np.ravel(parts[k]) for k in self.vector_keys]
            out["vector"] = np.concatenate(vectors).astype(np.float32)
        return out

    def resize(self, image):
        """(H, W) or (H, W, C) -> (1 or 3, 64, 64); each pixel is the mean of what it covers."""
        shape = self.observation_space["image"].shape
        image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        if image.ndim == 3 and shape[0] == 1:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return np.broadcast_to(np.atleast_3d(image).transpose(2, 0, 1), shape).copy()


# Several environments


class Envs:
    """N environments that step together; the step after an episode's last one is a reset.

    `send` begins a step and `receive` ends it. Environments in processes of their own step in
    between, others inside `receive`; their numbers are the same. At first all have ended.
    """

    def __init__(self, args, num_envs, parallel=False, first_index=None, render=False):
        first = RANK * num_envs if first_index is None else first_index
        self.env_id = args.env_id
        self.seed = args.seed
        self.num_envs = num_envs
        self.parallel = parallel
        self.indices = range(first, first + num_envs)
        makers = [partial(make_env, args, index, render) for index in self.indices]
        self.vector = start_processes(makers) if parallel else gym.vector.SyncVectorEnv(makers)
        space = self.vector.single_action_space
        self.discrete = isinstance(space, MultiBinary)  # actions are one-hot
        observations = self.vector.single_observation_space.items()
        self.shapes = {key: box.shape for key, box in observations}  # what a row holds
        self.shapes |= {"action": space.shape, "reward": (), "is_first": (), "is_terminal": ()}
        self.ended = np.ones(num_envs, bool)
        self.returns = np.zeros(num_envs)  # of each episode, so far or at its end
        self.lengths = np.zeros(num_envs, int)  # in agent steps
        self.episodes = np.zeros(num_envs, int)  # how many have begun

    @property
    def all_ended(self):
        return self.ended.all()

    def state_dict(self):
        return {"episodes": self.episodes.tolist()}

    def load_state_dict(self, state):
        """Goes on with the episodes after those that had begun; the next step resets all."""
        self.vector.set_attr("episode", state["episodes"])
        self.episodes = np.array(state["episodes"])
        self.ended = np.ones(self.num_envs, bool)

    def random_actions(self):
        """Uniform actions (N, A), drawn from torch's generator."""
        noise = torch.rand(self.num_envs, *self.shapes["action"])
        if self.discrete:
            return F.one_hot(noise.argmax(1), noise.shape[1]).float()
        return 2 * noise - 1

    def send(self, action):
        """Begins a step with actions (N, A), which resets ignore."""
        self.action = torch.as_tensor(action).cpu().numpy()
        if self.parallel:
            with self.explain_dead_process():
                if self.all_ended:
                    self.vector.reset_async()
                else:
                    self.vector.step_async(self.action)

    def receive(self):
        """Ends a step -> row, a dict of (N, ...) float32 or uint8, and the episodes that ended.

        An episode is a dict of charts/episodic_return and charts/episodic_length.
        """
        is_first = self.ended
        with self.explain_dead_process():
            obs, reward, terminated, truncated = self.end_step()
        self.ended = terminated | truncated
        self.returns = np.where(is_first, 0, self.returns + reward)
        self.lengths = np.where(is_first, 0, self.lengths + 1)
        self.episodes = self.episodes + is_first
        action = self.action * ~is_first[:, None]  # a reset ignored it
        row = {"action": action, "reward": reward}
        row |= {"is_first": is_first, "is_terminal": terminated}
        episodes = [
            {
                "charts/episodic_return": float(self.returns[i]),
                "charts/episodic_length": float(self.lengths[i]),
            }
            for i in np.flatnonzero(self.ended)
        ]
        return obs | {k: v.astype(np.float32) for k, v in row.items()}, episodes

    def end_step(self):
        """-> obs, a dict of (N, ...), reward, terminated, truncated (N,)."""
        if self.all_ended:  # if only some have, gymnasium resets these in its step
            obs, _ = self.vector.reset_wait() if self.parallel else self.vector.reset()
            no = np.zeros(self.num_envs, bool)
            return obs, np.zeros(self.num_envs), no, no
        if self.parallel:
            return self.vector.step_wait()[:4]
        return self.vector.step(self.action)[:4]

    @contextlib.contextmanager
    def explain_dead_process(self):
        """Names the environment whose process died; one that only failed has said so itself."""
        try:
            yield
        except (EOFError, ConnectionError):
            self.vector.closed = True  # gymnasium would wait for its answer
            for process in self.vector.processes:
                process.join(timeout=1)  # seconds
            dead = [process.exitcode is not None for process in self.vector.processes]
            i = dead.index(True)
            episode = self.episodes[i] - 1 + self.ended[i]
            with explain_failure(self.env_id, self.seed, self.indices[i], episode):
                raise ChildProcessError("its process died") from None

    def restart(self):
        """Lets all begin again with their first episodes."""
        self.load_state_dict({"episodes": [0] * self.num_envs})

    def render(self):
        """The images (H, W, 3) of all environments; not of those in processes of their own."""
        return self.vector.render()

    def close(self):
        if self.parallel:
            self.vector.close(terminate=True)  # asks nothing of a process that may be dead
        else:
            self.vector.close()


def start_processes(makers):
    """A vector of environments with a process each."""
    gym.logger.min_level = gym.logger.ERROR + 1  # explain_failure says it
    # Ctrl-C in a terminal reaches the processes as well, which have to finish their steps.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return gym.vector.AsyncVectorEnv(makers, context="spawn")
    finally:
        signal.signal(signal.SIGINT, handler)


def evaluate(envs, act, state, episodes, film=False):
    """Plays whole episodes, the same ones with the same noise each time -> returns, film.

    act: function of a row and a state -> actions (N, A), state. The film, at most 1000 frames,
    shows the first environment until an episode ends.
    """
    # How many episodes each environment has to play; each process plays those of some.
    to_play = np.zeros(envs.num_envs, int)
    for i in range(RANK, envs.num_envs, WORLD):
        to_play[i] = len(range(i, episodes, envs.num_envs))
    returns = []
    frames = []
    envs.restart()
    with forked_rng("evaluation", envs.seed):
        envs.send(envs.random_actions())  # a reset ignores them
        row, _ = envs.receive()
        while to_play.any():
            if film and RANK == 0 and not returns and len(frames) < 1000:
                frames.append(envs.render()[0])
            action, state = act(row, state)
            envs.send(action)
            row, _ = envs.receive()
            for i in np.flatnonzero(envs.ended & (to_play > 0)):
                returns.append(float(envs.returns[i]))
                to_play[i] -= 1
    return np.concatenate(all_gather(returns)), frames


# Replay

DTYPES = {"image": np.uint8, "is_first": np.bool_}  # of what is kept; the rest is float32


def row_bytes(shapes):
    """Bytes that a row of one environment takes in the replay."""
    sizes = {k: np.dtype(DTYPES.get(k, np.float32)).itemsize for k in shapes}
    return sum(sizes[k] * math.prod(shape) for k, shape in shapes.items())


class Replay:
    """The last rows of N environments in .npy files; row r of the n-th is at [r % capacity, n].

    shapes: what a row of one environment holds, a dict of name -> shape.
    """

    def __init__(self, folder, capacity, shapes, num_envs, device):
        self.folder = Path(folder)
        self.num_envs = num_envs
        self.device = device
        self.start = 0  # the oldest row
        self.end = 0  # the row after the newest
        with explain(f"another process trains in {self.folder}, or it is missing", OSError):
            lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
            # This process holds the lock until it ends, however it does.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.fresh = not any(self.folder.glob("*.npy"))
        self.written = self.map("written", (1, 2), np.int64)[0]  # rows ever written, capacity
        rows_written, old_capacity = self.written.tolist()
        self.capacity = max(capacity, old_capacity)
        if rows_written > old_capacity:  # rows were overwritten, by places that depend on it
            self.capacity = old_capacity
        self.data = {}
        for key, shape in shapes.items():
            dtype = DTYPES.get(key, np.float32)
            self.data[key] = self.map(key, (self.capacity, num_envs, *shape), dtype)
        self.written[1] = self.capacity  # last: if the disk was full, the old capacity holds

    def map(self, name, shape, dtype):
        """Makes an array, or opens one and lets its file grow to the shape."""
        path = self.folder / f"{name}.npy"
        with explain(f"{path} holds no {shape} {np.dtype(dtype)}", Exception):
            if self.fresh:
                np.lib.format.open_memmap(path, "w+", dtype, shape)
            # To read alone, for to write would fill up a file that was cut off.
            data = np.lib.format.open_memmap(path, "r")
            if (data.shape[1:], data.dtype) != (shape[1:], dtype):
                raise ValueError(f"it has {data.shape} {data.dtype}")
            header = {"descr": data.dtype.str, "fortran_order": False, "shape": shape}
            with open(path, "r+b") as file:  # a sparse map would die of SIGBUS on a full disk
                os.posix_fallocate(file.fileno(), 0, data.offset + shape[0] * data[:1].nbytes)
                np.lib.format.write_array_header_1_0(file, header)
            return np.load(path, mmap_mode="r+")

    def state_dict(self):
        """Writes the maps to disk: a checkpoint must not know more rows than they hold."""
        for data in (*self.data.values(), self.written):
            data.flush()
        return {"start": self.start, "end": self.end}

    def load_state_dict(self, state):
        """Goes back to the rows of a checkpoint, less those that were overwritten since."""
        self.end = state["end"]
        oldest = int(self.written[0]) - self.capacity
        self.start = min(self.end, max(state["start"], oldest))
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
        """Draws windows of rows -> dict of (T, B, ...) tensors, on the device.

        All windows of `length` rows between the oldest and the newest are equally likely; with
        favor_ends, those that end on an episode's last row count length + 1 times.
        """
        # Window w begins w // num_envs rows after the oldest one, in environment w % num_envs.
        windows = (len(self) - length + 1) * self.num_envs
        assert windows > 0, f"no {length} rows in a replay of {len(self)}"
        ends = self.windows_at_ends(length) if favor_ends else np.empty(0, int)
        ticket = torch.randint(windows + length * len(ends), (batch_size,)).numpy()
        extra = ticket >= windows
        window = ticket.copy()
        window[extra] = ends[(ticket[extra] - windows) // length]
        row = self.start + window // self.num_envs
        env = window % self.num_envs
        index = (row + np.arange(length)[:, None]) % self.capacity  # (T, B)
        batch = {k: torch.from_numpy(v[index, env]) for k, v in self.data.items()}
        if self.device.type == "cuda":  # from pinned memory, nobody waits for it
            batch = {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}
        return batch

    def windows_at_ends(self, length):
        """The numbers of the windows that end on an episode's last row, before a reset."""
        resets = np.flatnonzero(self.data["is_first"][: self.end])  # fast, since of one byte
        slot, env = np.divmod(resets, self.num_envs)
        age = (slot - self.start) % self.capacity  # rows since the oldest
        whole = (age >= length) & (age < len(self))
        return ((age - length) * self.num_envs + env)[whole]
