"""What the processes of a run do together, and how they end: torchrun, signals, one-line errors.

    torchrun --nproc-per-node 2 dreamerv2.py --env-id CartPole-v1

Each process that torchrun starts has environments and a replay of its own. It learns from its
share of the batch, with the mean of all gradients, so that the networks stay the same everywhere.
The first one, of rank 0, logs and saves for all. Without torchrun, nothing here communicates.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

JOB = os.environ.get("TORCHELASTIC_RUN_ID")  # of torchrun, the same after a restart
RANK, WORLD = (int(os.environ.get(k, d)) if JOB else d for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
LAUNCHER = "python"  # or what the user typed, but for the address
if WORLD > 1:
    nodes, count = os.environ["GROUP_WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
    several = f"--nnodes {nodes} --rdzv-endpoint HOST:PORT " if nodes != "1" else ""
    LAUNCHER = f"torchrun {several}--nproc-per-node {count}"


class UserError(Exception):
    """Something the user can mend, said in one line."""


class ElsewhereError(ChildProcessError):
    """The environments of another process failed, which has said so."""


@contextlib.contextmanager
def explain(text, *errors, kind=UserError):
    """Turns the errors into a UserError of one line that begins with the text."""
    try:
        yield
    except errors as error:
        raise kind(" ".join(f"{text}: {type(error).__name__}: {error}".split())) from None


@contextlib.contextmanager
def exit_on_error():
    """Says in one line what the user can mend (exit code 2) and what else ended the run (1)."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        tqdm.write("error: " + " ".join(str(error).split()), file=sys.stderr)
        if WORLD > 1 and isinstance(error, ConnectionError):
            os._exit(1)  # or a GPU would wait for the process that is gone
        sys.exit(2 if type(error) is UserError else 1)
    finally:
        if dist.is_initialized():  # or its threads may abort a process that ends
            dist.destroy_process_group()


class Interrupt(contextlib.AbstractContextManager):
    """Ends the loop after a step on Ctrl-C (130; again: at once), SIGTERM (143), a failure (1)."""

    def __init__(self):
        self.code = self.noted = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.noted = 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """The exit code if a process was told to end, for all of them end after the same step."""
        self.code = max(everyone(self.noted))
        return self.code

    def __exit__(self, kind, error, trace):
        if kind is ChildProcessError:
            if not self.noted:  # or the signal ended a process of its own
                tqdm.write(f"error: {error}", file=sys.stderr)
            everyone(None)  # the others end here as well
        failed = kind in (ChildProcessError, ElsewhereError)
        self.code = self.code or self.noted or int(failed)
        return failed


def setup(seed, cuda, deterministic, threads):
    """Seeds torch and returns the device; replay and environments have generators of their own."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads or torch.get_num_threads())
    for option, value in ((-1, -1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX: keep what is freed,
        ctypes.CDLL(None).mallopt(option, value)  # or asking anew costs page faults
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    torch.distributions.Distribution.set_default_validate_args(False)  # or they wait for the GPU
    device = torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")
    join(device)
    return device


def join(device):
    """Meets the other processes, through gloo on CPUs and nccl on GPUs; one per GPU."""
    if WORLD > 1:
        if device.type == "cuda":
            with explain("--nproc-per-node must not exceed the number of GPUs", RuntimeError):
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with explain("the processes cannot meet", RuntimeError, kind=ConnectionError):
            store = next(dist.rendezvous("env://"))[0]
            if os.environ["LOCAL_WORLD_SIZE"] == str(WORLD):  # several machines count differently
                # The store outlives a restart, with the addresses of the dead.
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout  # noqa: SIM115
        print(f"{WORLD} processes share each batch, its gradients, and the frames")


def lost():
    """What comes of a process that dies without a word: the others have to end, too."""
    hint = "another process is gone, go on from the last checkpoint with --resume"
    return explain(hint, RuntimeError, kind=ConnectionError)


def everyone(value):
    """The objects of all processes, by rank; None is that of one whose environments failed."""
    values = [value] * WORLD
    if WORLD > 1:
        with lost():
            dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other is None and value is not None:
                raise ElsewhereError(f"the environments of process {rank} failed")
    return values


def average(x):
    """The mean of a tensor over all processes, with the gradient of this one's x."""
    if WORLD == 1:
        return x
    mean = x.detach().clone()
    with lost():
        dist.all_reduce(mean)
    mean /= WORLD
    return x + (mean - x).detach() if x.requires_grad else mean


def opt_step(optimizer, loss, clip):
    """One gradient step -> the gradient's global norm before it was clipped, ()."""
    parameters = [p for p in optimizer.param_groups[0]["params"] if p.requires_grad]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)  # passes through the other networks, but leaves none there
    if WORLD > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        vector_to_parameters(average(parameters_to_vector(grads)), grads)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return norm


class FiniteGuard:
    """Keeps on the device when each value first was not finite, so that no update waits for it."""

    names, first = (), torch.tensor(torch.inf)  # update at which each value went bad

    def watch(self, updates, values):
        self.names, self.values = list(values), torch.stack([*values.values()])
        self.first = torch.where(self.values.isfinite(), torch.inf, updates).minimum(self.first)

    def check(self):
        """The last values, means over processes, or FloatingPointError with the first bad ones."""
        if (when := self.first.min().item()) < torch.inf:
            bad = [self.names[i] for i in (self.first == when).nonzero()]
            raise FloatingPointError(f"not finite at update {when:.0f}: {', '.join(bad)}")
        values = everyone(self.values.tolist() if self.names else [])
        return dict(zip(self.names, np.mean(values, 0).tolist(), strict=True))


def tally(row, done, info):
    """Agent steps just taken, a reset being none, and the episodes that ended: of all processes."""
    ended = [
        {f"charts/episodic_{k}": float(info["episode"][k[0]][i]) for k in ("return", "length")}
        for i in np.flatnonzero(done)
    ]
    steps, ended = zip(*everyone((int((1 - row["is_first"]).sum()), ended)), strict=True)
    return sum(steps), itertools.chain(*ended)


def begun():
    """The run folder of a job that torchrun starts again, if it has left a checkpoint, or ""."""
    if JOB == "none" and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        raise UserError("torchrun's restarts need --rdzv-id, for jobs without one are all alike")
    if JOB in (None, "none"):
        return ""
    runs = [path.parent for path in Path("runs").glob("*/job") if path.read_text() == JOB]
    saved = [run for run in runs for k in ("", ".old") if (run / f"checkpoint{k}.pt").exists()]
    return str(max(saved, default=""))


def make_folders(run, args):
    """Makes RUN and, for other processes, RUN/rank1, RUN/rank2, ... -> RUN, the same for all."""
    if any(other != args for other in everyone(args)):
        raise UserError("the processes have to be started with the same flags")
    if RANK == 0:
        for folder in (run, *(run / f"rank{rank}" for rank in range(1, WORLD))):
            (folder / "replay").mkdir(parents=True)
        if JOB not in (None, "none"):
            (run / "job").write_text(JOB)
    return everyone(run)[0]


def own_folder(run):
    """The part of a run folder that is this process's, or UserError if they are not as many."""
    count = 1 + len([*Path(run).glob("rank[1-9]*")])
    if count != WORLD:
        raise UserError(f"{run} has replays for --nproc-per-node {count} in all, not for {WORLD}")
    return Path(run) / f"rank{RANK}" if RANK else Path(run)


def gather_state(state, own):
    """Adds to a checkpoint what the others have of their own, under the same names."""
    return state | {"ranks": everyone({k: state[k] for k in own if k in state})}


def agree(state, replay):
    """Checks that all went back to the same checkpoint, with as many rows of their replays."""
    if replay and WORLD > 1:
        if len({tuple(counters[:2]) for counters in everyone(state["counters"])}) > 1:
            raise UserError("the processes cannot read the same checkpoint")
        replay.start = replay.end - min(everyone(len(replay)))  # a full ring may have lost some
    return state


def own_state(state):
    """A checkpoint as this process had it; when others evaluate, any will do."""
    return state | (state.get("ranks", [{}]) * WORLD)[RANK]
