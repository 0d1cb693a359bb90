"""Runs in this process, and what they leave in their folders."""

import contextlib
import importlib
import json
import os
import shlex
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

import common
import runtime

SCRIPTS = ["dreamerv1.py", "dreamerv2.py"]
# For what each does in code of its own, as the turn of acting, learning and reporting.
EVERY_SCRIPT = pytest.mark.parametrize("script", [*SCRIPTS, "dreamerv3.py"])
# For what all do in shared code: one shows it.
ONE_SCRIPT = pytest.mark.parametrize("script", ["dreamerv2.py"], scope="module")
UNCLOSED = pytest.mark.filterwarnings(  # a process that ends closes its files by itself
    "ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"
)
TINY = """--batch-size 3 --batch-length 7 --deter 16 --hidden 16 --units 16 --stoch 3 --cnn-depth 2
    --pretrain 2 --prefill 200 --eval-episodes 2 --threads 1"""
TINY_V3 = """--batch-size 3 --batch-length 7 --deter 16 --hidden 16 --units 16 --stoch 3 --classes 4
    --blocks 2 --cnn-depth 2 --train-ratio 1 --eval-episodes 2 --threads 1"""
CLOCK = {"seconds", "charts/SPS", "time/updates_per_second"}  # differ from run to run


def tiny(script, prefill=200):
    """Flags of a small run of a script, an update every twenty steps; V3's begin at once."""
    return TINY_V3 if script == "dreamerv3.py" else f"{TINY} --train-every 20 --prefill {prefill}"


@contextlib.contextmanager
def kept_process():
    """Puts back what a run changes for its whole process."""
    handlers = {number: signal.getsignal(number) for number in runtime.SIGNALS}
    streams = sys.stdout, sys.stderr
    hook = threading.excepthook
    deterministic = torch.are_deterministic_algorithms_enabled()
    started_in = runtime.STARTED_IN
    runtime.STARTED_IN = None
    try:
        yield
    finally:
        runtime.STARTED_IN = started_in
        torch.use_deterministic_algorithms(deterministic)
        threading.excepthook = hook
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)


def module_of(script):
    return importlib.import_module(Path(script).stem)


def parse(script, flags):
    """What the flags, a line or a list, mean to the script."""
    module = module_of(script)
    flags = shlex.split(flags) if isinstance(flags, str) else flags
    return runtime.parse_args(module.Args, module.PRESETS, common.choose_preset, flags)


def run(script, flags, whole=True):
    """Runs a script, or only reads its flags, in this process and folder -> its exit code."""
    with kept_process():
        try:
            with runtime.exit_on_error():
                args = parse(script, flags)
                return module_of(script).main(args) if whole else 0
        except SystemExit as stop:
            return stop.code


def play(script, flags, code=0):
    """A run that has to end with the exit code -> the one run folder that there is."""
    assert run(script, flags) == code
    return the_run()


def the_run(cwd="."):
    [folder] = Path(cwd).glob("runs/*")
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def values(folder, tag):
    """(frames, value) of each row that has the tag."""
    return [(row["frames"], row[tag]) for row in metrics(folder) if tag in row]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def counters(folder):
    """Agent steps and updates of the checkpoint."""
    saved = checkpoint(folder)["counters"]
    return saved["step"], saved["updates"]


def contents(folder):
    """All that lies below a folder -> path from there: bytes; folders have none."""
    paths = sorted(Path(folder).rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
    }


def the_error(text):
    """The one line of an error that the text, of stderr, has."""
    assert "Traceback" not in text
    [line] = [line for line in text.splitlines() if "error: " in line]
    return line[line.index("error: ") :]


@contextlib.contextmanager
def signal_after(owner, name, when, number=signal.SIGTERM):
    """Inside, this process gets a signal after the calls of owner.name of which `when` says so."""
    original = getattr(owner, name)

    def calling(*args, **kwargs):
        result = original(*args, **kwargs)
        if when(*args):
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, calling)
    try:
        yield
    finally:
        setattr(owner, name, original)
