"""What a run needs and no reader of a paper: flags, run folders, checkpoints, logs, processes.

With torchrun, each process has environments and a replay of its own. It learns from its share
of the batch with the mean of all gradients, so that the networks stay the same everywhere. The
first process, of rank 0, logs and saves for all.

    torchrun --nproc-per-node 2 dreamerv2.py --env-id CartPole-v1
"""

import contextlib
import copy
import ctypes
import datetime
import hashlib
import importlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
import traceback
import typing
import zipfile
from functools import cached_property
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.distributed as dist
import typeguard
import tyro
import yaml
from torch.utils.tensorboard import SummaryWriter, summary
from tqdm import tqdm

STARTED_IN = None  # where the command was typed; an environment may change the directory
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
ENVIRONMENTS_FAILED = "the environments of this process failed"  # what it tells the others

# Types of flags with the least and the most that they may be; plain numbers have no bounds.
Count = typing.Annotated[int, 1, 2**31 - 1]
Whole = typing.Annotated[int, 0, 2**31 - 1]
Share = typing.Annotated[float, 0, 1]
Weight = typing.Annotated[float, 0, 2**31 - 1]
Rate = typing.Annotated[float, 1e-30, 2**31 - 1]

# Flags that may change when a run goes on or is evaluated. They change nothing that is learned,
# but for --eval-every with --eval-envs 0, where each evaluation cuts the training's episodes.
MAY_CHANGE = {
    "resume", "evaluate", "total_frames", "log_every", "eval_every", "eval_episodes",
    "video_every", "checkpoint_every", "capture_video", "track", "wandb_project_name",
    "wandb_entity", "cuda", "threads", "graph", "compile",
}  # fmt: skip
# Flags that may change when a run is evaluated: other episodes, another environment.
ENVIRONMENT_FLAGS = ("env_id", "env_kwargs", "time_limit", "sticky_prob")
MAY_CHANGE_IN_EVALUATION = {"seed", "eval_envs", "eval_sample", *ENVIRONMENT_FLAGS}


# Errors that take one line


class UserError(Exception):
    """Something the user can mend, said in one line."""


class ElsewhereError(ChildProcessError):
    """The environments of another process failed, which has said so."""


class DeviceError(Exception):
    """The GPU can no longer be used in this process."""


@contextlib.contextmanager
def explain(text, *errors, kind=UserError):
    """Turns the errors into one of the kind, a line that begins with the text."""
    try:
        yield
    except errors as error:
        place = place_of(error, in_packages=False)
        raise kind(f"{text}: {one_line(error)}{place}") from None


def one_line(error):
    """An error's type and text, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def place_of(error, in_packages=True):
    """Where an error was raised, " (file:line)": in the user's code, or else in a package."""
    ours = (__file__, str(Path(__file__).with_name("common.py")))
    cause = error.__cause__ or error  # gymnasium raises a TypeError anew
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename not in ours]
    of_others = ("site-packages", sysconfig.get_path("stdlib"), "<frozen")
    own = [f for f in frames if not any(place in f.filename for place in of_others)]
    found = own or (frames if in_packages else [])
    return f" ({found[-1].filename}:{found[-1].lineno})" if found else ""


class Terminal:
    """A stream that may go away, as a terminal does; what cannot be written is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115  None if it was closed

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __eq__(self, other):  # so that tqdm knows it for the stream of a bar, and clears that
        return self.stream is getattr(other, "stream", other)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def exit_on_error():
    """Says in one line what the user can mend (exit code 2) and what else ended the run (1)."""
    expected = (UserError, DeviceError, FloatingPointError, OSError, torch.OutOfMemoryError)
    sys.stdout = Terminal(sys.stdout)
    sys.stderr = Terminal(sys.stderr)
    try:
        yield
    except KeyboardInterrupt as error:
        leave(130, error)
    except expected as error:
        tqdm.write("error: " + " ".join(str(error).split()), file=sys.stderr)
        leave(2 if isinstance(error, UserError) else 1, error)
    except Exception as error:
        if WORLD == 1:
            raise
        traceback.print_exc()
        leave(1, error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # its threads may otherwise abort a process that ends


def leave(code, error):
    """Ends a process after an error.

    At once on GPUs and where a process is gone. To take leave of the others would wait for those
    that are gone or busy, and for recorded graphs, which the error's frames keep alive.
    """
    if WORLD > 1 and (isinstance(error, ConnectionError) or torch.cuda.is_initialized()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt(contextlib.AbstractContextManager):
    """Lets a loop end between two steps: on Ctrl-C (code 130; a second one ends at once), on
    SIGTERM (143) or SIGHUP (129), or because an environment failed (1). What follows the loop
    still runs.
    """

    def __init__(self):
        self.code = 0  # the exit code on which all processes agreed
        self.received = 0  # the exit code of a signal to this process
        self.process = os.getpid()
        for number in SIGNALS:
            by_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not by_nohup:
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        if os.getpid() != self.process:  # one that an environment forked ends as it would have
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if RANK == 0:
            with contextlib.suppress(OSError):
                os.write(2, b"\nsaves and ends after this step; one more Ctrl-C ends at once\n")

    def agreed(self):
        """Asks all processes whether any was told to end -> code, or 0; also in self.code."""
        self.code = max(all_gather(self.received))
        return self.code

    def __exit__(self, kind, error, trace):
        if not isinstance(error, ChildProcessError):
            return False
        self.code = self.code or self.received or 1
        if not isinstance(error, ElsewhereError):  # it was here
            if not self.received:  # a signal to a process group ends those of environments, too
                tqdm.write(f"error: {error}", file=sys.stderr)
            all_gather(ENVIRONMENTS_FAILED)
        return True


# Devices and processes


def setup(seed, cuda, deterministic, threads):
    """Seeds torch, the same in every process, meets the others -> the device."""
    global STARTED_IN
    STARTED_IN = Path.cwd()
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if threads:
        torch.set_num_threads(min(threads, os.cpu_count() or threads))  # very many crash it
    keep_freed_memory()
    choose_matmul_precision()
    torch.distributions.Distribution.set_default_validate_args(False)  # checks wait for the GPU
    device = torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")
    if WORLD > 1:
        join_processes(device)
    return device


def keep_freed_memory():
    """Tells malloc to keep what is freed, since asking the system anew costs page faults."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks


def choose_matmul_precision():
    """How float32 matrices are multiplied: in TF32 on GPUs that have it, in float32 on CPUs.

    On AMD processors oneDNN takes half of MKL's time. torch hands it float32 matrices only if it
    is allowed to round them to bfloat16. Whether it does depends on the processor, so one product
    is compared with the exact one, and MKL stays if it was rounded.
    """
    torch.set_float32_matmul_precision("high")
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and "AuthenticAMD" in cpu.read_text():
        x = torch.linspace(-1, 1, 64 * 64).view(64, 64).sin()
        exact = x.double() @ x.double()
        torch.set_float32_matmul_precision("medium")  # a GPU does as before
        if not torch.allclose((x @ x).double(), exact, rtol=1e-5, atol=1e-5):
            torch.set_float32_matmul_precision("high")


def join_processes(device):
    """Meets the other processes, through gloo on CPUs and nccl on GPUs; one process per GPU."""
    if device.type == "cuda":
        with explain("--nproc-per-node must not exceed the number of GPUs", RuntimeError):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with explain("the processes cannot meet", RuntimeError, kind=ConnectionError):
        store = next(dist.rendezvous("env://"))[0]
        if os.environ["LOCAL_WORLD_SIZE"] == str(WORLD):  # several machines count differently
            # The store outlives a restart, with the addresses of the dead.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        # One process may play a long evaluation while the others wait.
        day = datetime.timedelta(days=1)
        dist.init_process_group(
            backend, store=store, rank=RANK, world_size=WORLD, timeout=day
        )  # fmt: skip
    if RANK:  # only the first process prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def launcher():
    """What starts a script as this one was started, but for the address."""
    if WORLD == 1:
        return program(Path(sys.executable).name)
    nodes = os.environ["GROUP_WORLD_SIZE"]
    several = f"--nnodes {nodes} --rdzv-endpoint HOST:PORT " if nodes != "1" else ""
    return f"{program('torchrun')} {several}--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"


def program(name):
    """How to type a program of this environment: its name if a shell finds it, else its path."""
    path = Path(sys.executable).with_name(name)
    return name if shutil.which(name) == str(path) else str(shown(path))


def explain_lost_process():
    """Turns what comes of a process that died without a word into one line."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return contextlib.nullcontext()  # what the recording forbids has other causes
    hint = "another process is gone, go on from the last checkpoint with --resume"
    return explain(hint, RuntimeError, kind=ConnectionError)


def all_gather(value):
    """The objects of all processes, by rank.

    One whose environments failed sends ENVIRONMENTS_FAILED; the others raise ElsewhereError.
    """
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    with explain_lost_process():
        dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if other == ENVIRONMENTS_FAILED and value != ENVIRONMENTS_FAILED:
            raise ElsewhereError(f"the environments of process {rank} failed")
    return values


def wait_for_all():
    """Returns when every process has come here."""
    all_gather(None)


def process_mean(x):
    """The mean of a tensor over all processes; its gradient is that of this process's x."""
    if WORLD == 1:
        return x
    mean = x.detach().clone()
    with explain_lost_process():
        dist.all_reduce(mean)
    mean /= WORLD
    return x + (mean - x).detach() if x.requires_grad else mean


def process_cat(x):
    """The tensors of all processes, one after another along the first axis."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    with explain_lost_process():
        dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def average_gradients(parameters):
    """Puts the mean over all processes in place of each gradient."""
    if WORLD == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    mean = process_mean(torch.cat([grad.flatten() for grad in grads]))
    parts = mean.split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view(grad.shape))  # keeps its layout, which fused optimizers rely on


def softmax(x):
    """Over the last dimension. Over few columns a CPU takes ten times as long as over rows."""
    if x.device.type == "cpu" and x.shape[-1] < 16:
        return torch.softmax(x.mT, -2).mT
    return torch.softmax(x, -1)


def gather_steps(row, episodes):
    """A row's agent steps, of which a reset is none, and ended episodes -> of all processes."""
    taken = int((1 - row["is_first"]).sum())
    gathered = all_gather((taken, episodes))
    return sum(n for n, _ in gathered), [episode for _, ended in gathered for episode in ended]


# Random numbers


def generators():
    """Torch's generators: the CPU's and that of the GPU in use, if there is one."""
    if not torch.cuda.is_initialized():
        return [torch.default_generator]
    return [torch.default_generator, torch.cuda.default_generators[torch.cuda.current_device()]]


def seed_of(*key):
    """A seed that follows from the key and the process."""
    digest = hashlib.sha256(repr((*key, RANK)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_process(seed):
    """Gives each process noise of its own, after all had the same weights."""
    torch.manual_seed(seed_of("process", seed))


@contextlib.contextmanager
def kept_rng():
    """Leaves torch's generators as they were before."""
    states = [generator.get_state() for generator in generators()]
    try:
        yield
    finally:
        for generator, state in zip(generators(), states, strict=False):
            generator.set_state(state)


@contextlib.contextmanager
def forked_rng(*key):
    """Inside, torch's draws follow from key and process; those outside do not notice."""
    with kept_rng():
        for generator in generators():
            generator.manual_seed(seed_of(*key))
        yield


# Command line


def parse_args(cls, presets, choose_preset, argv=None):
    """Fills the dataclass `cls` from argv, else the run folder given, else a preset.

    choose_preset: function of the args given -> key of presets.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(cls, args=[flag for flag in argv if flag not in ("-h", "--help")])
    run = given.resume or given.evaluate
    named = [flag for flag in argv if flag.startswith(("--resume", "--evaluate"))]
    if len(named) > 1 or (named and not run):
        raise UserError("--resume and --evaluate take a run folder, and do not go together")
    names_id = any(flag.startswith(("--env-id", "--env_id")) for flag in argv)
    begins = given.resume and is_free(run)
    if begins and not names_id:
        raise UserError(f"there is no run in {run}; add --env-id to begin one there")

    exists = run and not begins
    if exists:
        default = read_args(cls, run)
        # A module that the folder names is imported only if the user names it too.
        plays_another = given.evaluate and names_id
        if ":" in default["env_id"] and given.env_id != default["env_id"] and not plays_another:
            raise UserError(f"add --env-id {default['env_id']} if {run} may import that module")
    else:
        default = {"env_id": given.env_id, **presets[choose_preset(given)]}

    args = tyro.cli(cls, default=cls(**default | {"resume": "", "evaluate": ""}), args=argv)
    check_bounds(args)
    if exists:
        changeable = MAY_CHANGE | (MAY_CHANGE_IN_EVALUATION if given.evaluate else set())
        for name, value in vars(args).items():
            if value == "auto":  # what it stood for when the run began
                setattr(args, name, default[name])
            elif not same_flag(name, value, default[name]) and name not in changeable:
                raise UserError(f"{flag_name(name)} cannot change in a run that exists")
    if args.track:
        with explain("--track needs pip install wandb", ImportError):
            importlib.import_module("wandb")
    return args


def same_flag(name, value, other):
    """Whether two values of a flag mean the same: of --env-kwargs, the same JSON."""
    if name == "env_kwargs":
        with contextlib.suppress(ValueError):
            return json.loads(value) == json.loads(other)
    return value == other


def flag_name(name):
    return f"--{name.replace('_', '-')}"


def check_bounds(args):
    """UserError for the first number that is not between the bounds of its type."""
    for name, hint in typing.get_type_hints(type(args), include_extras=True).items():
        least, most = getattr(hint, "__metadata__", (-math.inf, math.inf))
        value = getattr(args, name)
        if isinstance(value, int | float) and not least <= value <= most:
            raise UserError(f"{flag_name(name)} is {value}, it must be from {least} to {most}")


def read_args(cls, run):
    """What args.yaml of a run folder holds, checked against the types of `cls`."""
    path = Path(run) / "args.yaml"
    with explain(f"{run} is no run folder", OSError):
        if not path.exists():
            raise UserError(f"{run} is no run folder, it has no args.yaml")
    refusal = f"{run} is no run folder of this script"
    with explain(refusal, Exception):
        args = yaml.safe_load(path.read_text())
    if isinstance(args, dict) and "exp_name" in args:
        own = args["exp_name"] == cls.exp_name
        refusal += " as it is now" if own else f" but of {args['exp_name']}"
    with explain(refusal, Exception):
        for name, hint in typing.get_type_hints(cls).items():
            if typing.get_origin(hint) is tuple and isinstance(args[name], list):
                args[name] = tuple(args[name])  # YAML knows lists alone
        typeguard.check_type(args, typing.TypedDict("Args", typing.get_type_hints(cls)))
    return args


def read_shapes(run):
    """What a row of a run holds: a dict of name -> shape."""
    with explain(f"{run} is no run folder", Exception):
        shapes = yaml.safe_load((Path(run) / "shapes.yaml").read_text())
        return {name: tuple(shape) for name, shape in shapes.items()}


def check_shapes(run, shapes, env_id):
    """UserError if an environment's rows are not as those that the agent of a run has seen."""
    run = from_start(run)
    if not (run / "shapes.yaml").exists():
        return  # it has no checkpoint either, which is said when that is read
    learned = read_shapes(run)
    for name in [*learned, *shapes]:
        if learned.get(name) != shapes.get(name):
            had = f"{name} {learned.get(name, 'none')}"
            has = f"{name} {shapes.get(name, 'none')}"
            raise UserError(f"{shown(run)} learned from {had}, {env_id} has {has}")


# Run folders


def is_free(run):
    """Whether a new run may begin in this folder: it is missing or empty."""
    run = Path(run)
    try:
        return not run.exists() or not any(run.iterdir())
    except OSError:  # it is a file, or has no possible name
        return False


def checkpoint_bytes(agent):
    """Room for checkpoints: weights and two averages of each, three times while one is written."""
    return 3 * 12 * sum(p.numel() for p in agent.parameters())


def open_run(args, shapes, replay_bytes, checkpoint_bytes=0):
    """Finds the folder of --resume, or makes that of a new run -> run, whether it is new.

    args: a dict; shapes: of what a row holds, a dict; replay_bytes: room that the replay of this
    process needs on the disk; checkpoint_bytes: that of the run. UserError if there is not enough.
    """
    if any(other != args for other in all_gather(args)):
        raise UserError("the processes have to be started with the same flags")
    name = f"{args['env_id']}__{args['exp_name']}__{args['seed']}__{time.time_ns() // 10**6}"
    run = from_start(args["resume"] or Path("runs") / name.replace("/", "-").replace(":", "-"))
    run, is_new = all_gather((run, is_free(run)))[0]
    if is_new:
        needed = (replay_bytes * WORLD + checkpoint_bytes) / 2**30
        disk = next(folder for folder in (run, *run.parents) if folder.exists())
        free = shutil.disk_usage(disk).free / 2**30
        if needed > free:
            lower = "--replay-size or --size" if "size" in args else "--replay-size"
            raise UserError(f"replay and checkpoints take {needed:.3g} GiB of {free:.3g} free: "
                            f"lower {lower}")  # fmt: skip
        with explain(f"no run can begin in {shown(run)}", OSError):
            if RANK == 0:
                for rank in range(WORLD):
                    (rank_folder(run, rank) / "replay").mkdir(parents=True)
                (run / "shapes.yaml").write_text(yaml.safe_dump(shapes, sort_keys=False))
            write_args(run, args)
    wait_for_all()
    if not is_new and not any((run / name).exists() for name in CHECKPOINTS):
        hint = "nothing was saved yet, remove the folder to begin again"
        raise UserError(f"no checkpoint can be read in {shown(run)}: {hint}")
    count = 1 + len([*run.glob("rank[1-9]*")])
    if count != WORLD:
        told = f"{shown(run)} has replays for --nproc-per-node {count} in all, not for {WORLD}"
        raise UserError(told)
    print(f"a new run begins in {shown(run)}" if is_new else f"the run in {shown(run)} goes on")
    return run, is_new


def from_start(path):
    """An absolute path, from one that was meant from where the command was typed."""
    return (STARTED_IN or Path.cwd()) / path


def shown(path):
    """A path as seen from where the command was typed."""
    here = STARTED_IN or Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def rank_folder(run, rank=RANK):
    """Where a process keeps what is its own: RUN, or RUN/rank1, RUN/rank2, ..."""
    return Path(run) / f"rank{rank}" if rank else Path(run)


def write_args(run, args):
    """Puts args, a dict, into args.yaml; neither flag that names a run folder is part of it."""
    if RANK:
        return
    new = run / "args.new.yaml"
    new.write_text(yaml.safe_dump(args | {"resume": "", "evaluate": ""}, sort_keys=False))
    new.replace(run / "args.yaml")


def describe(args, device, agent, replay, spaces, updates):
    """Prints what a run consists of; spaces: a line of text; updates: of the whole run."""
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in agent.items()}
    sizes = ", ".join(f"{name} {size:,}" for name, size in sizes.items() if size)
    gib = sum(data.nbytes for data in replay.data.values()) / 2**30
    rows = replay.capacity * replay.num_envs
    of_each = " in each process" if WORLD > 1 else ""
    processes = f", {WORLD} processes share batches and frames" if WORLD > 1 else ""
    print(f"{args.env_id} on {device} in {args.precision}{processes}: {spaces}")
    print(f"parameters: {sizes}; replay {rows:,} rows, {gib:.2f} GiB{of_each}")
    steps = args.total_frames // args.action_repeat
    print(f"{updates:,} updates in {steps:,} agent steps, {updates / max(steps, 1):.3g} per step")


def print_estimate(update, agent, optimizers, updates):
    """Prints how long so many updates take on this CPU, by one or two of a copy of the agent.

    update: function of agent and optimizers.
    """
    if updates <= 0:
        tqdm.write("no updates to come up to --total-frames, a larger one makes the run longer")
        return
    agent, optimizers = copy.deepcopy((agent, optimizers))
    with forked_rng("estimate"):
        seconds = timed(update, agent, optimizers)
        # The first one also takes the time to get ready. An update is one of all processes.
        if max(all_gather(seconds)) < 1:
            seconds = timed(update, agent, optimizers)
    day = 24 * 60 * 60
    hint = "; --env-id CartPole-v1 takes minutes" if updates * seconds > day else ""
    tqdm.write(f"{updates:,} updates to come, {duration(updates * seconds)} on this CPU{hint}")


def timed(function, *inputs):
    """Seconds of a call."""
    began = time.perf_counter()
    function(*inputs)
    return time.perf_counter() - began


def duration(seconds):
    """In words, as "about 3 hours"."""
    day = 24 * 60 * 60
    units = {"years": 365 * day, "months": 30 * day, "days": day, "hours": 3600, "minutes": 60}
    for unit, length in units.items():
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return f"about {seconds:.0f} seconds"


def print_evaluation(run, returns, cut, film=None):
    """Prints mean and standard deviation of returns and how many of the episodes were cut."""
    said = f", {cut} of them cut short" if cut else ""
    digits = 1 if abs(returns.mean()) >= 10 else 3  # some tasks pay less than 1 in all
    result = f"return {returns.mean():.{digits}f} +- {returns.std():.{digits}f}"
    tqdm.write(f"{result} in {len(returns)} episodes{said}, {shown(from_start(run))}")
    if film:
        save_gif(from_start(run) / "videos" / "evaluate.gif", film)


def print_variation(args, returns):
    """If the environment of an evaluation is not that of the training, prints both returns.

    The training's is that of its last evaluation, in metrics.jsonl.
    """
    if RANK:
        return
    run = from_start(args.evaluate)
    trained = yaml.safe_load((run / "args.yaml").read_text())
    changed = [name for name in ENVIRONMENT_FLAGS if getattr(args, name) != trained[name]]
    tag = "eval/episodic_return"
    evaluated = [row[tag] for row in read_log(run) if isinstance(row.get(tag), float)]
    if not changed or not evaluated:
        return
    learned = " ".join(f"{flag_name(name)} {trained[name]}" for name in changed)
    played = " ".join(f"{flag_name(name)} {getattr(args, name)}" for name in changed)
    width = max(len(learned), len(played))
    tqdm.write(f"{'':{width + 10}}    return  episodes")
    tqdm.write(f"learned   {learned:{width}}{evaluated[-1]:10.3f}{trained['eval_episodes']:10}")
    tqdm.write(f"played    {played:{width}}{returns.mean():10.3f}{len(returns):10}")


def read_log(run):
    """The rows of metrics.jsonl, dicts, without lines that are half written or damaged."""
    path = Path(run) / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def resume_command(run, env_id):
    """What to type to go on with a run."""
    command = [sys.argv[0], "--resume", str(shown(run)), "--env-id", env_id]
    return f"{launcher()} {shlex.join(command)}"


# Checkpoints

# In the order of trying; the second is whole and the first missing after a crash between renames.
CHECKPOINTS = ("checkpoint.pt", "checkpoint.new.pt", "checkpoint.old.pt")


def save_checkpoint(run, parts, counters):
    """Writes the states of all parts and of torch's generators, and the counters, a dict.

    parts: dict of name -> part, or a dict of several, with state_dict and load_state_dict.
    The file before becomes checkpoint.old.pt; after any crash one of them can be read.
    """
    state = {"counters": counters, "generators": [g.get_state() for g in generators()]}
    for name, part in parts.items():
        if isinstance(part, dict):
            state[name] = {key: inner.state_dict() for key, inner in part.items()}
        else:
            state[name] = part.state_dict()
    own = ("generators", "replay", "envs")  # what every process has of its own
    state["ranks"] = all_gather({name: state[name] for name in own if name in state})
    if RANK == 0:
        replace_checkpoint(Path(run), state)
    wait_for_all()


def replace_checkpoint(run, state):
    path = run / "checkpoint.pt"
    new = run / "checkpoint.new.pt"
    data = io.BytesIO()  # into a file torch.save would hide a full disk behind another error
    torch.save(state, data)
    data.seek(0)
    # To load runs no code. So these types could not be read, and what was learned would be lost.
    unreadable = torch.serialization.get_unsafe_globals_in_checkpoint(data)
    if unreadable:
        raise TypeError(f"a checkpoint holds tensors and Python's own types, no {unreadable[-1]}")
    data.seek(0)
    with open(new, "wb") as file:  # a view of all bytes crashes Python 3.12.1 if the disk is full
        shutil.copyfileobj(data, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        path.replace(run / "checkpoint.old.pt")
    new.replace(path)


def load_checkpoint(run, parts):
    """Gives parts and generators the states of the last whole checkpoint -> its counters."""
    for name in CHECKPOINTS:
        path = from_start(run) / name
        try:
            counters = read_checkpoint(path, parts)
        except Exception as error:  # whatever a file from someone else may hold
            if path.exists():
                reason = one_line(error)[:300]
                tqdm.write(f"{path} cannot be used, trying another: {reason}", file=sys.stderr)
        else:
            agree_on_checkpoint(counters, parts.get("replay"))
            return counters
    hint = "was it made by another script, or before a change of this one?"
    raise UserError(f"no checkpoint can be read in {run}: {hint}")


def read_checkpoint(path, parts):
    damaged = zipfile.ZipFile(path).testzip()  # checks its CRC-32s
    if damaged:
        raise ValueError(f"{damaged} is damaged")
    state = torch.load(path, map_location="cpu", weights_only=True)  # executes nothing
    if len(state["ranks"]) > RANK:  # an evaluation may have more processes than the run
        state |= state["ranks"][RANK]
    for name, part in parts.items():
        if isinstance(part, dict):
            for key, inner in part.items():
                load_part(inner, state[name][key])
        else:
            load_part(part, state[name])
    for generator, saved in zip(generators(), state["generators"], strict=False):
        generator.set_state(saved)  # a run may have moved to a machine with or without a GPU
    return state["counters"]


def load_part(part, state):
    part.load_state_dict(state)
    if isinstance(part, torch.optim.Optimizer):
        # A fused step does not look at strides: averages have to lie in memory as their weights
        # do, even if weights lay otherwise when they were saved.
        for weight, averages in part.state.items():
            for key, value in averages.items():
                if value.shape == weight.shape:
                    averages[key] = torch.empty_like(weight).copy_(value)


def load_agent(script, run):
    """The trained agent of a run folder -> agent, on the CPU, and its args.

    script: the module that made the run, as `import dreamerv2` gives it.
    """
    run = Path(run).absolute()  # of the directory that Python is in now, for all that is read
    args = script.Args(**read_args(script.Args, run) | {"compile": False})
    with kept_rng():  # a checkpoint has states of torch's generators too
        agent = script.make_agent(read_shapes(run), args)
        load_checkpoint(run, {"agent": agent})
    return agent, args


def agree_on_checkpoint(counters, replay):
    """Checks that all processes read the same one, and gives their replays as many rows."""
    if replay is not None and WORLD > 1:
        if any(other != counters for other in all_gather(counters)):
            raise UserError("the processes cannot read the same checkpoint")
        rows = min(all_gather(len(replay)))  # a full ring may have overwritten some
        replay.start = replay.end - rows


# Logs


class Metrics:
    """The numbers of the last update, left on the device so that no update waits for them.

    Each value that is not finite is noted with the first update that gave it.
    """

    def __init__(self):
        self.recorded = False  # whether this process has seen an update
        self.names = []
        self.values = torch.zeros(0)  # of the last update
        self.first_bad = torch.tensor(torch.inf)  # the first update whose value was not finite

    def record(self, metrics, updates):
        """Keeps a dict of scalar tensors or numbers."""
        device = next(v.device for v in metrics.values() if torch.is_tensor(v))
        values = {k: torch.as_tensor(v, device=device).float() for k, v in metrics.items()}
        for name, value in values.items():
            if value.shape != ():
                raise TypeError(f"metric {name} has shape {tuple(value.shape)}, not ()")
        if self.recorded and list(values) != self.names:
            other = ", ".join(sorted(set(values) ^ set(self.names)))
            raise TypeError(f"every update has to report the same metrics, not at times: {other}")
        self.recorded = True
        self.names = list(values)
        self.values = torch.stack(list(values.values()))
        bad_now = torch.where(self.values.isfinite(), torch.inf, updates)
        self.first_bad = bad_now.minimum(self.first_bad)

    def read(self):
        """Means over processes, a dict of floats; FloatingPointError names the first bad."""
        when = self.first_bad.min().item()
        if when < torch.inf:
            bad = [self.names[i] for i in (self.first_bad == when).nonzero()]
            raise FloatingPointError(f"not finite at update {when:.0f}: {', '.join(bad)}")
        means = np.mean(all_gather(self.values.tolist()), 0)
        return dict(zip(self.names, means.tolist(), strict=True))

    def state_dict(self):
        """Raises FloatingPointError as `read` does: no checkpoint follows a bad update.

        Every process has to call it.
        """
        return self.read()

    def load_state_dict(self, state):
        self.names = list(state)
        self.values = torch.tensor(list(state.values()))


def except_for_writers(hook):
    """A hook for errors of threads, without TensorBoard's: its writer raises them itself."""

    def filtered(args):
        if type(args.thread).__name__ != "_AsyncWriterThread":
            hook(args)

    return filtered


BAR_BEGIN = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<"  # as tqdm draws it
BAR_END = "{postfix}]"


class Logger:
    """The same numbers to TensorBoard, metrics.jsonl and Weights & Biases, and a progress bar.

    Only the first process logs; for the others all of this does nothing.
    """

    def __init__(self, run, args, total_updates):
        self.run = run
        self.total_updates = total_updates
        self.frames = 0
        self.first_frame = 0  # frames with which the run began, or goes on
        self.learning = None  # whether it has begun
        self.since = None  # time, frames and updates when that began, or the run went on
        self.began = time.time()  # a resumed run began earlier by the seconds that it took
        if args["track"] and RANK == 0:
            import wandb

            with explain("--track", Exception):
                wandb.init(
                    project=args["wandb_project_name"], entity=args["wandb_entity"],
                    name=run.name, id=run.name, resume="allow", config=args, sync_tensorboard=True,
                )  # fmt: skip
        wait = 0.5 if sys.stderr.isatty() else 60.0  # seconds between two states of the bar
        self.bar = tqdm(
            total=args["total_frames"], disable=RANK > 0,
            mininterval=wait, maxinterval=wait, miniters=0,
            bar_format=f"{BAR_BEGIN}?, 0 frames/s, 0 updates{BAR_END}",
        )  # fmt: skip
        if RANK:
            return
        self.file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        threading.excepthook = except_for_writers(threading.excepthook)

    @cached_property
    def writer(self):
        """Of TensorBoard, which forgets what a resumed run logs again, but for its first frame."""
        return SummaryWriter(self.run, purge_step=self.first_frame + 1)

    def state_dict(self):
        seconds = time.time() - self.began
        size = 0 if RANK else self.file.tell()
        return {"frames": self.frames, "seconds": seconds, "bytes": size}

    def load_state_dict(self, state):
        """Goes back to the log of a checkpoint; rows that came after it come again."""
        self.began = time.time() - state["seconds"]
        self.frames = self.first_frame = state["frames"]
        self.bar.n = self.bar.initial = min(self.frames, self.bar.total)
        if RANK == 0:
            size = min(state["bytes"], self.file.tell())
            self.file.truncate(size)
            self.file.seek(size)

    def progress(self, frames, updates):
        """Moves the bar. Its speed is that since learning began, or the run went on; the time
        left is what the updates to come take at the pace since then.
        """
        if self.learning != (updates > 0):
            self.learning = updates > 0
            self.since = (time.time(), frames, updates)
            self.bar.set_postfix_str("" if self.learning else "before learning", refresh=False)
        began, old_frames, old_updates = self.since
        seconds = time.time() - began
        speed = (frames - old_frames) / max(seconds, 1e-3)
        left = "?"
        if updates > old_updates:
            per_update = seconds / (updates - old_updates)
            left = tqdm.format_interval(max(0, self.total_updates - updates) * per_update)
        said = f"{left}, {speed:.0f} frames/s, {updates} updates"
        self.bar.bar_format = BAR_BEGIN + said + BAR_END
        self.frames = frames
        # Several environments may step past the end, of which tqdm would lose its total.
        self.bar.update(min(frames, self.bar.total) - self.bar.n)

    def log(self, metrics, frames, updates):
        """Writes a row; metrics: dict of tag -> number. The speed is that of the whole run."""
        if RANK:
            return
        seconds = time.time() - self.began
        if "losses/model" in metrics:
            metrics = metrics | {
                "charts/SPS": frames / seconds,  # environment frames
                "time/updates_per_second": updates / seconds,
            }
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, frames)
        row = {"frames": frames, "updates": updates, "seconds": round(seconds, 3)}
        self.file.write(json.dumps(row | metrics, default=float) + "\n")
        if "charts/episodic_return" in metrics and updates:
            self.bar.set_postfix({"return": metrics["charts/episodic_return"]}, refresh=False)

    def gif(self, tag, film, frames):
        """To TensorBoard and the run folder's videos/; film as in `save_gif`."""
        if RANK:
            return
        path = self.run / "videos" / f"{tag.replace('/', '_')}_{frames}.gif"
        save_gif(path, film)
        image = summary.Summary.Image(encoded_image_string=path.read_bytes(), colorspace=3)
        value = summary.Summary.Value(tag=tag, image=image)
        self.writer.file_writer.add_summary(summary.Summary(value=[value]), frames)

    def close(self):
        self.bar.close()
        if RANK == 0:
            self.file.close()
            self.writer.close()


def save_gif(path, film):
    """film: (T, H, W) or (T, H, W, 3) uint8, or (T, B, C, H, W) in [0, 1], B side by side."""
    if torch.is_tensor(film):
        film = (255 * film.clamp(0, 1)).byte().cpu()
        film = film.permute(0, 3, 1, 4, 2).flatten(2, 3)  # (T, H, B * W, C)
        film = film.squeeze(3)  # of gray images
    path.parent.mkdir(exist_ok=True)
    imageio.imwrite(path, np.asarray(film), duration=50, loop=0)  # ms per frame


# Recording on a GPU

WARM_UP_CALLS = 3  # before a function is recorded
UNUSABLE = "CUDA cannot be used after a failed recording: --resume with --no-graph"


class Captured:
    """A function of dicts of tensors, which a GPU records at the fourth call and then replays.

    Inputs, numpy arrays too, are moved to the device; keys and shapes stay those of the first
    call. The outputs are written over by the next one. A function that cannot be recorded, and
    any function on a CPU, is called each time.
    """

    def __init__(self, function, device, enabled):
        self.function = function
        self.device = device
        self.graph = torch.cuda.CUDAGraph() if enabled and device.type == "cuda" else None
        self.calls = 0

    def __call__(self, *inputs):
        inputs = [self.to_device(x) for x in inputs]
        if self.graph is None:
            return self.function(*inputs)
        self.copy_in(inputs)
        self.calls += 1
        if self.calls <= WARM_UP_CALLS:
            self.warm_up()
            return self.outputs
        if self.calls == WARM_UP_CALLS + 1 and not self.record():
            return self.function(*self.inputs)
        self.graph.replay()
        return self.outputs

    def to_device(self, tensors):
        return {k: torch.as_tensor(v, device=self.device) for k, v in tensors.items()}

    def copy_in(self, inputs):
        """Puts inputs where the graph will read them."""
        if self.calls == 0:
            self.inputs = [{k: v.clone() for k, v in x.items()} for x in inputs]
            self.side = torch.cuda.Stream()  # a capture needs another stream than the usual one
        for mine, given in zip(self.inputs, inputs, strict=True):
            for name, tensor in mine.items():
                tensor.copy_(given[name])

    def warm_up(self):
        """Calls the function on the side stream, as capture demands of the first calls."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.outputs = self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(self.side)

    def record(self):
        """Captures the function, which computes nothing yet -> whether that worked."""
        usual_stream = torch.cuda.current_stream()
        states = [generator.get_state() for generator in generators()]
        self.side.wait_stream(usual_stream)
        try:
            with torch.cuda.graph(self.graph, stream=self.side):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # to end the recording fails too, and hides it
            said = one_line(cause)[:200] + place_of(cause)
            with explain(f"{UNUSABLE}, after {said}", RuntimeError, kind=DeviceError):
                torch.cuda.set_stream(usual_stream)  # the capture may have left another one
                torch.rand(1, device=self.device)
                torch.cuda.synchronize()
            for generator, state in zip(generators(), states, strict=True):
                generator.set_state(state)
            self.graph = None
            tqdm.write(f"this GPU cannot record, the run goes on step by step: {said}")
            return False
        usual_stream.wait_stream(self.side)
        return True
