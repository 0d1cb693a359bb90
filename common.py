"""From a gymnasium id to rows, and from rows to batches: environments and replay."""

import contextlib
import fcntl
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
import warnings
import weakref
from functools import cache, partial
from pathlib import Path

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, flatdim, unflatten

from runtime import (
    RANK, WORLD, UserError, all_gather, explain, forked_rng, kept_rng, one_line, place_of,
    rank_folder, read_shapes,
)  # fmt: skip

gym.register_envs(ale_py)  # its games, under ALE/ and the older names
SIZE = 64  # height and width of images, as in the papers of V1 and V2


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
    """Whether it names a game of ale-py, with or without a module and a version."""
    name = env_id.split(":")[-1]
    games = [id for id, spec in gym.registry.items() if "ale_py" in str(spec.entry_point)]
    return "ALE/" in name or name in games or name in [id.rpartition("-v")[0] for id in games]


def make_env(args, index, render=False):
    """The environment of an index, with seeds of its own; UserError if it cannot be made.

    args has env_id, seed, observation, pixels, grayscale, action_repeat, time_limit (in frames,
    0 leaves that of the environment), sticky_prob, full_action_space and env_kwargs.
    """
    dm_control = is_dm_control(args.env_id)
    atari = is_atari(args.env_id)
    observation = "pixels" if args.pixels else args.observation
    if args.observation not in ("auto", observation):
        raise UserError(f"--pixels does not go with --observation {args.observation}")
    if dm_control and observation == "auto":
        observation = "pixels"
    # A game of Atari observes images by itself.
    draws = render or (observation in ("pixels", "both") and not atari)
    options = {"render_mode": "rgb_array"} if draws else {}
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
        if args.time_limit:
            options["max_num_frames_per_episode"] = -1  # without the emulator's own limit
        if args.sticky_prob is not None:
            options["repeat_action_probability"] = args.sticky_prob
    keywords = read_keywords(args.env_kwargs, taken=options)

    if "MUJOCO_GL" not in os.environ and (dm_control or (draws and not atari)):
        choose_gl(needed=dm_control and draws)
    asked = f"{env_id} with --env-kwargs {args.env_kwargs}" if keywords else env_id
    with explain(f"no {asked}", Exception, SystemExit):
        if draws and not render and not dm_control and gives_images(env_id, keywords):
            draws = False
            del options["render_mode"]
        name = f"shimmy:{env_id}" if dm_control else env_id
        if dm_control:
            # To import dm_control makes Python show every DeprecationWarning. This undoes it.
            with warnings.catch_warnings():
                import shimmy.dm_control_compatibility  # noqa: F401
        env = gym.make(name, disable_env_checker=True, **options, **keywords)
        if draws and not dm_control and "rgb_array" not in env.metadata.get("render_modes", ()):
            raise ValueError("it cannot be drawn")
    if atari:
        env = gym.wrappers.AtariPreprocessing(
            env, noop_max=30, frame_skip=args.action_repeat, screen_size=SIZE,
            grayscale_obs=args.grayscale,
        )  # fmt: skip
    elif args.action_repeat > 1:
        # A reward may be an array of one number, which RepeatAction cannot add up.
        env = gym.wrappers.TransformReward(env, lambda reward: np.asarray(reward).item())
        env = gym.wrappers.RepeatAction(env, args.action_repeat)
    limit = math.ceil(args.time_limit / args.action_repeat) if args.time_limit else math.inf
    return DreamerSpaces(env, observation, args.grayscale, args.seed, index, limit)


def read_keywords(text, taken):
    """The keywords of --env-kwargs, JSON, of which none may be among those taken."""
    try:
        keywords = json.loads(text)
    except ValueError:
        keywords = None
    if not isinstance(keywords, dict):
        raise UserError(f'--env-kwargs {text} is no JSON object such as {{"g": 5}}')
    both = [name for name in keywords if name in taken]
    if both:
        raise UserError(f"--env-kwargs cannot set {both[0]}, it is {taken[both[0]]}")
    return keywords


def gives_images(env_id, keywords):
    """Whether an environment observes images without being drawn."""
    env = gym.make(env_id, disable_env_checker=True, **keywords)
    space = env.observation_space
    boxes = space.spaces.values() if isinstance(space, Dict) else [space]
    env.close()
    return any(is_image(box) for box in boxes)


def shape_text(space):
    """The shape of a box, as text."""
    return " x ".join(map(str, space.shape))


def but_are(space):
    """The end of a sentence that refuses a space."""
    old = type(space).__module__.startswith("gym.")
    return f", not {space}{', of gym and not of gymnasium' if old else ''}"


def is_image(space):
    return space.dtype == np.uint8 and len(space.shape) in (2, 3)


@cache
def find_gl():
    """What renders without a screen, EGL or OSMesa, or None; each try takes half a second."""
    probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
    for gl in ("egl", "osmesa"):
        environ = os.environ | {"MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl}
        if subprocess.run(probe, env=environ, capture_output=True).returncode == 0:
            return gl
    return None


def choose_gl(needed):
    """Sets MUJOCO_GL, which the user did not, to what renders without a screen."""
    if gl := find_gl():
        os.environ.update({"MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl})
    elif needed:
        hint = "apt-get install libegl1 libgl1, or libosmesa6"
        raise UserError(f"no OpenGL without a screen: {hint}")


def failure(env_id, seed, index, episode, reason):
    """The error that ends a run because an environment failed."""
    which = f"environment {index} of {env_id} (seed {seed}, episode {episode})"
    return ChildProcessError(f"{which} failed: {reason}")


class DreamerSpaces(gym.Wrapper):
    """Any Box or Dict of Boxes as a dict of image (C, 64, 64) uint8 and vector (V,) float32.

    Discrete actions are one-hot, others flat in [-1, 1] and scaled to finite bounds. The seed
    of an episode follows from the run's seed, the environment's index and the episode's number.
    Whatever goes wrong between the environment and a row is an error of the environment.
    """

    def __init__(self, env, observation, grayscale, seed, index, limit=math.inf):
        super().__init__(env)
        self.seed = seed
        self.index = index
        self.limit = limit  # of agent steps, after which an episode is truncated
        self.steps = 0  # of this episode
        self.episode = 0  # how many have begun
        self.actions = env.action_space
        space = env.observation_space
        boxes = space.spaces if isinstance(space, Dict) else {None: space}  # a Box has no key
        if not all(isinstance(box, Box) for box in boxes.values()):
            raise UserError(f"observations have to be a Box or a Dict of them{but_are(space)}")
        if not isinstance(self.actions, Discrete | Box):
            raise UserError(f"actions have to be Discrete or a Box{but_are(self.actions)}")

        self.boxes = boxes
        images = [k for k, box in boxes.items() if is_image(box)]
        vectors = [k for k in boxes if k not in images]
        self.image_keys = images if observation != "vector" else []
        self.vector_keys = vectors if observation != "pixels" else []
        spaces = {}
        if self.image_keys or observation in ("pixels", "both"):
            spaces["image"] = Box(0, 255, (1 if grayscale else 3, SIZE, SIZE), np.uint8)
        if self.vector_keys:
            size = sum(flatdim(boxes[k]) for k in self.vector_keys)
            spaces["vector"] = Box(-np.inf, np.inf, (size,), np.float32)
        empty = any(0 in box.shape for box in boxes.values())
        odd = any(boxes[k].shape[2:] not in ((), (1,), (3,)) for k in self.image_keys)
        if not spaces or len(self.image_keys) > 1 or odd or empty:
            wanted = "vectors"
            if observation != "vector":
                wanted = "at most one image, uint8 of shape (H, W), (H, W, 1) or (H, W, 3)"
            said = f"--observation {observation} does not fit observations {space}"
            raise UserError(f"{said}: it takes {wanted}")
        self.observation_space = Dict(spaces)

        if isinstance(self.actions, Discrete):
            self.action_space = MultiBinary(int(self.actions.n))
        else:
            self.action_space = Box(-1, 1, (flatdim(self.actions),), np.float32)
            self.low, self.high = action_bounds(self.actions)

    @property
    def summary(self):
        """What the agent sees and does, in a line."""
        parts = []
        spaces = self.observation_space.spaces
        if "image" in spaces:
            origin = ", drawn"
            if self.image_keys:
                origin = f" from {shape_text(self.boxes[self.image_keys[0]])}"
            parts.append(f"image {shape_text(spaces['image'])}{origin}")
        if "vector" in spaces:
            parts.append(f"vector {shape_text(spaces['vector'])}")
        kind = "discrete" if isinstance(self.actions, Discrete) else "continuous"
        parts.append(f"{self.action_space.shape[0]} {kind} actions")
        odd = [k for k in self.vector_keys if len(self.boxes[k].shape) == 3]
        if odd:
            names = ", ".join("the observation" if k is None else k for k in odd)
            parts.append(f"{names} taken as vector and not as image, since not of uint8")
        if not self.has_limit:
            parts.append("an episode that does not end by itself needs a --time-limit")
        return ", ".join(parts)

    @property
    def has_limit(self):
        """Whether something promises that an episode ends, as far as one can know."""
        if self.limit < math.inf:
            return True
        if self.spec is None:
            return False
        ends_by_itself = self.spec.namespace in ("dm_control", "ALE")
        return ends_by_itself or (self.spec.max_episode_steps or 0) > 0

    @contextlib.contextmanager
    def name_failures(self):
        """Whatever is raised inside becomes one line that names the environment."""
        try:
            yield
        except (Exception, SystemExit) as error:
            env_id = getattr(self.spec, "id", self.spec)
            reason = one_line(error) + place_of(error)
            raise failure(env_id, self.seed, self.index, self.episode - 1, reason) from None

    def reset(self, *, seed=None, options=None):
        sequence = np.random.SeedSequence([self.seed, self.index, self.episode])
        seed = int(sequence.generate_state(1)[0]) >> 1
        self.episode += 1
        self.steps = 0
        with self.name_failures():
            obs, _ = self.env.reset(seed=seed, options=options)
            return self.observe(obs), {}

    def step(self, action):
        self.steps += 1
        with self.name_failures():
            obs, reward, terminated, truncated, _ = self.env.step(self.to_action(action))
            number = np.asarray(reward, np.float64)
            # NaN is no number within the bounds of float32, in which a row has the reward.
            if number.size != 1 or not np.abs(number) <= np.finfo(np.float32).max:
                raise ValueError(f"the reward is {reward}")
            truncated = truncated or self.steps >= self.limit
            return self.observe(obs), number.item(), bool(terminated), bool(truncated), {}

    def to_action(self, action):
        """One-hot (A,) or in [-1, 1] (A,) -> an action that lies in the environment's space."""
        if isinstance(self.actions, Discrete):
            return unflatten(self.actions, action)
        action = np.clip(np.float64(action), -1, 1)
        share = (action.reshape(self.actions.shape) + 1) / 2
        action = self.low * (1 - share) + self.high * share
        low = self.actions.low
        high = self.actions.high
        if self.actions.dtype.kind == "f":
            return np.asarray(np.clip(action, low, high), self.actions.dtype)
        # In Python's whole numbers, since those of 64 bits have more digits than a float.
        inside = [
            min(max(round(x), int(least)), int(most))
            for x, least, most in zip(action.flat, low.flat, high.flat, strict=True)
        ]
        return np.array(inside, self.actions.dtype).reshape(self.actions.shape)

    def observe(self, obs):
        space = self.env.observation_space
        is_dict = isinstance(obs, dict)
        if is_dict != isinstance(space, Dict):
            kind = type(obs).__name__
            raise ValueError(f"the observation is a {kind}, its space says {space}")
        parts = obs if is_dict else {None: obs}
        if not parts.keys() >= self.boxes.keys():
            raise ValueError(f"the observation has keys {', '.join(parts)}, its space says {space}")
        parts = {k: self.check(k, parts[k]) for k in self.image_keys + self.vector_keys}
        out = {}
        if "image" in self.observation_space.spaces:
            image = parts[self.image_keys[0]] if self.image_keys else self.draw()
            out["image"] = self.resize(image)
        if self.vector_keys:
            vectors = [np.ravel(parts[k]) for k in self.vector_keys]
            with np.errstate(over="ignore"):
                out["vector"] = np.concatenate(vectors).astype(np.float32)
            if not np.isfinite(out["vector"]).all():
                raise ValueError(f"the observation is not finite: {out['vector']}")
        return out

    def check(self, key, value):
        """The part of an observation as its space promises it."""
        value = np.asarray(value)
        box = self.boxes[key]
        name = "the observation" if key is None else f"the observation's {key!r}"
        if value.shape != box.shape:
            raise ValueError(f"{name} has shape {value.shape}, its space says {box.shape}")
        numbers = value.dtype.kind in "fiub"  # which float32 can hold, as a vector
        if value.dtype != box.dtype and (key in self.image_keys or not numbers):
            raise ValueError(f"{name} is {value.dtype}, its space says {box.dtype}")
        return value

    def render(self):
        with self.name_failures():
            return self.draw()

    def draw(self):
        """What the environment draws, (H, W) or (H, W, 3) uint8."""
        image = np.asarray(self.env.render())
        if not is_image(image) or image.shape[2:] not in ((), (3,)):
            wanted = "uint8 of shape (H, W) or (H, W, 3)"
            raise ValueError(f"render() gives {image.dtype} of shape {image.shape}, not {wanted}")
        return image

    def resize(self, image):
        """(H, W) or (H, W, C) -> (1 or 3, 64, 64); each pixel is the mean of what it covers."""
        shape = self.observation_space["image"].shape
        image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        if image.ndim == 3 and shape[0] == 1:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return np.broadcast_to(np.atleast_3d(image).transpose(2, 0, 1), shape).copy()


def action_bounds(box):
    """What -1 and 1 stand for in a Box of actions: low, high, float64 of its shape."""
    low = np.float64(box.low)
    high = np.float64(box.high)
    if box.dtype.kind != "f":
        return low - 0.5, high + 0.5  # each whole number has an equal share
    ends_above = np.isfinite(high)
    begins_below = np.isfinite(low)
    both = begins_below & ends_above
    # With a bound on one side or none, [-1, 1] as it is, or moved if none of it lies inside.
    shift = np.where(begins_below & (low >= 1), low + 1, 0)
    shift = np.where(ends_above & (high <= -1), high - 1, shift)
    return np.where(both, low, shift - 1), np.where(both, high, shift + 1)


# Several environments


class Envs:
    """N environments that step together; the step after an episode's last one is a reset.

    `send` begins a step and `receive` ends it. Environments in processes of their own step in
    between, others inside `receive`; both give the same rows. At first every episode counts as
    ended, so that the first step resets all.
    """

    def __init__(self, args, num_envs, parallel=False, first_index=0, render=False):
        self.env_id = args.env_id
        self.seed = args.seed
        self.action_repeat = args.action_repeat
        self.num_envs = num_envs
        self.parallel = parallel
        self.indices = range(first_index, first_index + num_envs)
        makers = [partial(make_env, args, index, render) for index in self.indices]
        make_vector = start_processes if parallel else gym.vector.SyncVectorEnv
        with kept_rng():  # an environment may seed torch
            self.vector = make_vector(makers)
        space = self.vector.single_action_space
        self.discrete = isinstance(space, MultiBinary)  # actions are one-hot
        observations = self.vector.single_observation_space.items()
        self.shapes = {key: box.shape for key, box in observations}  # what a row holds
        self.shapes |= {"action": space.shape, "reward": (), "is_first": (), "is_terminal": ()}
        self.summary = self.vector.get_attr("summary")[0]
        # What nobody closes is closed when it is forgotten, or when Python ends.
        self.close = weakref.finalize(self, close_vector, self.vector, self.env_id)
        self.in_flight = False  # whether a step was sent and not received
        self.ended = np.ones(num_envs, bool)  # whether the last row ended an episode
        self.returns = np.zeros(num_envs)  # sum of the rewards of each episode
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

    @contextlib.contextmanager
    def evaluating(self):
        """Inside, the environments play episodes 0, 1, ... of their seeds, of bounded length.

        Afterwards each of them begins a new episode of training. A step in flight is dropped,
        and a reset is sent in its place.
        """
        training = self.state_dict()
        in_flight = self.in_flight
        try:
            with self.explain_dead_process():
                if in_flight:
                    self.receive()
                limits = self.vector.get_attr("limit")
                bound = math.ceil(EVAL_FRAMES / self.action_repeat)
                self.vector.set_attr("limit", [min(limit, bound) for limit in limits])
                self.load_state_dict({"episodes": [0] * self.num_envs})
                yield
                if self.in_flight:
                    self.receive()
                self.vector.set_attr("limit", list(limits))
                self.load_state_dict(training)
        except BaseException:
            self.episodes = np.array(training["episodes"])  # for the checkpoint that follows
            raise
        if in_flight:
            self.send(np.zeros(self.action.shape, np.float32))

    def random_actions(self):
        """Uniform actions (N, A), drawn from torch's generator."""
        noise = torch.rand(self.num_envs, *self.shapes["action"])
        if self.discrete:
            return F.one_hot(noise.argmax(1), noise.shape[1]).float()
        return 2 * noise - 1

    def send(self, action):
        """Begins a step with actions (N, A), which resets ignore."""
        self.in_flight = True
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
        self.in_flight = False
        self.episodes = self.episodes + is_first  # a reset that fails is not tried again
        with self.explain_dead_process(), kept_rng():
            obs, reward, terminated, truncated = self.end_step()
        self.ended = terminated | truncated
        self.returns = np.where(is_first, 0, self.returns + reward)
        self.lengths = np.where(is_first, 0, self.lengths + 1)
        row = {
            "action": self.action * ~is_first[:, None],  # a reset ignored it
            "reward": reward, "is_first": is_first, "is_terminal": terminated,
        }  # fmt: skip
        row = {k: v.astype(np.float32) for k, v in row.items()}
        episodes = [
            {
                "charts/episodic_return": float(self.returns[i]),
                "charts/episodic_length": float(self.lengths[i]),
            }
            for i in np.flatnonzero(self.ended)
        ]
        return obs | row, episodes

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
            # A sentinel is ready when its process dies, which may be before it has an exit code.
            sentinels = [process.sentinel for process in self.vector.processes]
            dead = multiprocessing.connection.wait(sentinels, timeout=10)  # seconds
            i = sentinels.index(dead[0]) if dead else 0
            which = self.env_id, self.seed, self.indices[i], self.episodes[i] - 1
            raise failure(*which, "its process died") from None

    def render(self):
        """The image (H, W, 3) of the first environment."""
        if self.parallel:  # all of them are asked
            return self.vector.render()[0]
        return self.vector.envs[0].render()


def close_vector(vector, env_id):
    """Closes the environments; a process that does not end within ten seconds is killed."""
    try:
        if isinstance(vector, gym.vector.SyncVectorEnv):
            vector.close()
            return
        vector.closed = True  # gymnasium would wait for a process that hangs
        for process in vector.processes:
            process.terminate()  # see make_in_process
        end = time.monotonic() + 10
        for process in vector.processes:
            process.join(max(0, end - time.monotonic()))
            process.kill()
            process.join()
    except Exception as error:  # nothing depends on it any more
        print(f"closing {env_id} failed: {error!r}{place_of(error)}", file=sys.stderr)


def make_envs(args):
    """Environments to train in (None with --evaluate) and to evaluate in, with seeds apart.

    With --eval-envs 0 they are the same.
    """
    shared = args.eval_envs == 0
    envs = None
    if shared or not args.evaluate:
        render = shared and args.capture_video
        envs = Envs(args, args.num_envs, args.async_envs, RANK * args.num_envs, render)
    if shared:
        return envs, envs
    count = min(args.eval_envs, args.eval_episodes)
    return envs, Envs(args, count, first_index=10_000, render=args.capture_video)


def make_in_process(maker):
    """Makes an environment in a process of its own, where Ctrl-C does nothing.

    What the environment starts would inherit an ignored signal, but not one that is handled.
    """
    if multiprocessing.parent_process():  # gymnasium makes one here too, to see its spaces
        signal.signal(signal.SIGINT, lambda number, frame: None)
        # SIGTERM comes from Envs.close. It would end the process before the environment is closed.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    return maker()


def start_processes(makers):
    """A vector of environments with a process each."""
    gym.logger.min_level = gym.logger.ERROR + 1  # name_failures says it
    # Ctrl-C in a terminal reaches the processes as well, which have to finish their steps. They
    # inherit that it is ignored, until make_in_process runs in them.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        makers = [partial(make_in_process, maker) for maker in makers]
        return gym.vector.AsyncVectorEnv(makers, context="spawn")
    finally:
        signal.signal(signal.SIGINT, handler)


EVAL_FRAMES = 108_000  # after which an evaluated episode is cut


def evaluate(envs, act, state, episodes, film=False, interrupt=None):
    """Plays whole episodes, the same ones with the same noise each time.

    act: function of a row and a state -> actions (N, A), state.
    interrupt: an Interrupt; a signal to this process breaks the evaluation off.
    -> returns, how many of the episodes were cut, a film of the first (at most 1000 images)
    """
    # Environment i plays the episodes i, i + N, i + 2N, ... Each process plays in all environments
    # and counts the episodes of every WORLD-th one.
    to_play = np.zeros(envs.num_envs, int)
    for i in range(RANK, envs.num_envs, WORLD):
        to_play[i] = len(range(i, episodes, envs.num_envs))
    returns = []
    cut = 0
    recorder = Film()
    with envs.evaluating(), forked_rng("evaluation", envs.seed):
        envs.send(envs.random_actions())  # a reset ignores them
        row, _ = envs.receive()
        while to_play.any() and not (interrupt and interrupt.received):
            if film and RANK == 0 and envs.episodes[0] == 1 and not envs.ended[0]:
                recorder.add(envs.render())
            action, state = act(row, state)
            envs.send(action)
            row, _ = envs.receive()
            for i in np.flatnonzero(envs.ended & (to_play > 0)):
                returns.append(float(envs.returns[i]))
                cut += int(envs.lengths[i] * envs.action_repeat >= EVAL_FRAMES)
                to_play[i] -= 1
    gathered = all_gather((returns, cut))
    returns = np.concatenate([returns for returns, _ in gathered])
    return returns, sum(cut for _, cut in gathered), recorder.images


class Film:
    """At most 1000 images of an episode, of one size; of a long one every second, fourth, ..."""

    def __init__(self):
        self.images = []
        self.every = 1
        self.seen = 0

    def add(self, image):
        fits = not self.images or image.shape == self.images[0].shape
        if fits and self.seen % self.every == 0:
            self.images.append(image)
        self.seen += 1
        if len(self.images) > 1000:
            self.images = self.images[::2]
            self.every *= 2


# Replay

DTYPES = {"image": np.uint8, "is_first": np.bool_}  # of what is kept; the rest is float32
# In written.npy: the most that `end` has ever been, the capacity, and `end`. After a resume MOST
# is above END if slots were overwritten by rows that the checkpoint does not know.
MOST, CAPACITY, END = range(3)


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
        self.fresh_taken = 0  # how many fresh windows were drawn or overwritten
        with explain(f"another process trains in {self.folder}, or it is missing", OSError):
            lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
            # This process holds the lock until it ends, however it does.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.is_new = not any(self.folder.glob("*.npy"))
        self.written = self.map("written", (1, 3), np.int64)[0]
        most, old_capacity, _ = self.written.tolist()
        self.capacity = max(capacity, old_capacity)
        if most > old_capacity:  # the ring came round: rows lie at r % old_capacity
            self.capacity = old_capacity
        self.data = {}
        for key, shape in shapes.items():
            dtype = DTYPES.get(key, np.float32)
            self.data[key] = self.map(key, (self.capacity, num_envs, *shape), dtype)
        self.written[CAPACITY] = self.capacity  # last: if the disk was full, the old capacity holds

    def map(self, name, shape, dtype):
        """Makes an array, or opens one and lets its file grow to the shape."""
        path = self.folder / f"{name}.npy"
        with explain(f"{path} holds no {shape} {np.dtype(dtype)}", Exception):
            if self.is_new:
                np.lib.format.open_memmap(path, "w+", dtype, shape)
            # For reading first: opened for writing, a file that was cut off would be filled up.
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
        return {"start": self.start, "end": self.end, "taken": self.fresh_taken}

    def load_state_dict(self, state):
        """Goes back to the rows of a checkpoint, less those that were overwritten since."""
        self.end = state["end"]
        self.fresh_taken = state["taken"]
        oldest = int(self.written[MOST]) - self.capacity
        self.start = min(self.end, max(state["start"], oldest))
        if self.written[MOST] < self.end:
            raise UserError(f"{self.folder} lacks rows that the checkpoint knows")
        self.written[END] = self.end

    def __len__(self):
        return self.end - self.start

    def add(self, row):
        """Appends a row, a dict of (N, ...)."""
        self.start = max(self.start, self.end + 1 - self.capacity)
        # Before the data, so that a row that was half overwritten counts as lost.
        self.written[MOST] = max(self.written[MOST], self.end + 1)
        for key, data in self.data.items():
            data[self.end % self.capacity] = row[key]
        self.end += 1
        self.written[END] = self.end

    def sample(self, batch_size, length, favor_ends=False, fresh_first=False):
        """Draws windows of rows -> dict of (T, B, ...) tensors, on the device.

        All windows of `length` rows between the oldest and the newest are equally likely; with
        favor_ends, those that end on an episode's last row count length + 1 times. With
        fresh_first, `fresh_windows` come first.
        """
        # Window w begins w // num_envs rows after the oldest one, in environment w % num_envs.
        windows = (len(self) - length + 1) * self.num_envs
        assert windows > 0, f"no {length} rows in a replay of {len(self)}"
        ends = self.windows_at_ends(length) if favor_ends else np.empty(0, int)
        window = torch.randint(windows + length * len(ends), (batch_size,)).numpy()
        # Numbers from `windows` on stand for the ends, `length` numbers for each of them.
        extra = window >= windows
        window[extra] = ends[(window[extra] - windows) // length]
        row = self.start + window // self.num_envs
        env = window % self.num_envs
        if fresh_first:
            fresh_row, fresh_env = self.fresh_windows(batch_size, length)
            row[: len(fresh_row)] = fresh_row
            env[: len(fresh_env)] = fresh_env
        index = (row + np.arange(length)[:, None]) % self.capacity  # (T, B)
        batch = {k: torch.from_numpy(v[index, env]) for k, v in self.data.items()}
        if self.device.type == "cuda":  # from pinned memory, nobody waits for it
            batch = {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}
        return batch

    def fresh_windows(self, count, length):
        """Takes the oldest windows never taken, `count` at most -> row, env, (n,) each.

        They lie end to end: the first `length` rows of every environment, then the next.
        """
        oldest = math.ceil(self.start / length) * self.num_envs
        self.fresh_taken = max(self.fresh_taken, oldest)
        complete = (self.end // length) * self.num_envs
        window = np.arange(self.fresh_taken, min(self.fresh_taken + count, complete))
        self.fresh_taken += len(window)
        return (window // self.num_envs) * length, window % self.num_envs

    def zeros(self, batch_size, length):
        """A batch like those of `sample`, all zero."""
        shape = (length, batch_size)
        batch = {k: np.zeros(shape + v.shape[2:], v.dtype) for k, v in self.data.items()}
        return {k: torch.from_numpy(v).to(self.device) for k, v in batch.items()}

    def windows_at_ends(self, length):
        """The numbers of the windows that end on an episode's last row, before a reset."""
        resets = np.flatnonzero(self.data["is_first"][: self.end])  # fast, since of one byte
        slot, env = np.divmod(resets, self.num_envs)
        age = (slot - self.start) % self.capacity  # rows since the oldest
        whole = (age >= length) & (age < len(self))
        return ((age - length) * self.num_envs + env)[whole]


def read_replay(run, rank=0):
    """The rows that a run wrote, the oldest first -> dict of (rows, N, ...) arrays.

    Without those that it wrote after the checkpoint from which it was resumed.
    """
    folder = rank_folder(run, rank) / "replay"
    most, capacity, end = np.load(folder / "written.npy")[0]
    order = np.arange(max(0, most - capacity), end) % capacity
    return {k: np.load(folder / f"{k}.npy", mmap_mode="r")[order] for k in read_shapes(run)}
