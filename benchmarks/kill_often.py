"""Kills a run with SIGKILL again and again, resumes it each time, and checks what must survive.

    python benchmarks/kill_often.py --kills 20 dreamerv2.py --env-id CartPole-v1 \
        --checkpoint-every 500 --eval-every 2000

The kills take turns: in a step of the environments, an update, a checkpoint, an evaluation. Rows of
the replay from before a checkpoint have to be the same bytes ever after, as long as the ring has
not overwritten them; counters never fall; the log has no row twice; the run ends.
"""

import argparse
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
PHASES = ["receive", "update", "save_checkpoint", "evaluate"]


def play(script, phase, after, flags):
    """Runs the script in this process, which kills itself in a phase, after so many steps."""
    sys.path.insert(0, str(ROOT))
    import common
    import runtime

    module = importlib.import_module(Path(script).stem)
    steps = []

    def tell(owner, name):
        original = getattr(owner, name)

        def told(*args, **kwargs):
            if name == "receive":
                steps.append(1)
            if name == phase and len(steps) >= after:
                if name == "receive":  # takes less than a millisecond
                    os.kill(os.getpid(), signal.SIGKILL)
                seconds = random.SystemRandom().random() * 0.01
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return original(*args, **kwargs)

        setattr(owner, name, told)

    tell(common.Envs, "receive")
    tell(module, "update")
    tell(runtime, "save_checkpoint")
    tell(common, "evaluate")
    with runtime.exit_on_error():
        choose = common.choose_preset
        args = runtime.parse_args(module.Args, module.PRESETS, choose, flags)
        sys.exit(module.main(args))


def rows_of(folder, first, last):
    """The rows first..last - 1 of every array of the replay, wherever the ring keeps them."""
    data = {p.stem: np.load(p, mmap_mode="r") for p in (folder / "replay").glob("*.npy")}
    del data["written"]
    rows = np.arange(first, last)
    return {name: array[rows % len(array)].copy() for name, array in data.items()}


def checkpoint(folder):
    """The newest whole checkpoint of a killed run, or None."""
    for name in ("checkpoint.pt", "checkpoint.new.pt", "checkpoint.old.pt"):
        try:
            return torch.load(folder / name, weights_only=True)
        except (OSError, RuntimeError):
            continue
    return None


def check(folder, known):
    """Compares with what was known at the kill before -> what is known now."""
    saved = checkpoint(folder)
    if saved is None:
        assert known is None, "a checkpoint got lost"
        return None
    step = saved["counters"]["step"]
    updates = saved["counters"]["updates"]
    state = saved["replay"]
    written, capacity, _ = np.load(folder / "replay" / "written.npy")[0]
    first = max(state["start"], written - capacity)
    if known is not None:
        assert step >= known["step"], (step, known["step"])
        assert updates >= known["updates"]
        kept = max(first, known["first"])
        for name, rows in rows_of(folder, kept, known["end"]).items():
            assert np.array_equal(rows, known["rows"][name][kept - known["first"] :]), name
    rows = rows_of(folder, first, state["end"])
    return {"step": step, "updates": updates, "first": first, "end": state["end"], "rows": rows}


def kill_often(script, flags, kills, cwd, seed=0, steps=(200, 2000)):
    """Runs, kills and resumes -> run folder, a (phase, step, updates) for each kill."""
    rng = random.Random(seed)
    known = None
    seen = []
    environ = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(kill, flags):
        phase = PHASES[kill % 4] if kill < kills else "never"
        command = [sys.executable, __file__, "--play", phase, str(rng.randint(*steps))]
        return subprocess.Popen([*command, script, *flags], cwd=cwd, env=environ)

    process = start(0, flags)
    for kill in range(kills):
        if process.wait() != -signal.SIGKILL:
            break  # it ended by itself
        folders = list(Path(cwd).glob("runs/*"))
        known = check(folders[0], known) if folders else None
        counted = (known["step"], known["updates"]) if known else (0, 0)
        seen.append((PHASES[kill % 4], *counted))
        if known is None:  # killed before its first checkpoint: the run begins anew
            for folder in folders:
                folder.rename(Path(cwd) / f"lost_{kill}")
            process = start(kill + 1, flags)
        else:
            process = start(kill + 1, ["--resume", str(folders[0].relative_to(cwd))])
    if code := process.wait():
        sys.exit(f"error: the run ended with exit code {code}")
    [folder] = Path(cwd).glob("runs/*")
    check(folder, known)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = [(row["frames"], *sorted(row)) for row in rows]
    assert len(set(keys)) == len(keys), "a row was logged twice"
    assert all(a["frames"] <= b["frames"] for a, b in pairwise(rows))
    return folder, seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--play", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=(200, 2000), help="apart")
    parser.add_argument("script")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()
    if args.play:
        play(args.script, args.play[0], int(args.play[1]), args.flags)
        sys.exit()
    cwd = tempfile.mkdtemp(prefix="killed_")
    folder, seen = kill_often(args.script, args.flags, args.kills, cwd, args.seed, args.steps)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    returns = [row["eval/episodic_return"] for row in rows if "eval/episodic_return" in row]
    for phase, step, updates in seen:
        print(f"killed in: {phase}; the last checkpoint had {step} steps, {updates} updates")
    print(f"{len(seen)} kills: {dict(Counter(phase for phase, *_ in seen))}")
    print(f"it ended with a return of {returns[-1]:.1f} in {folder}")
