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
PHASES = ["step_rows", "update", "save_checkpoint", "evaluate"]


def play(script, kill_file, flags):
    """Runs the script in this process, which kills itself in the phase that the file asks for."""
    sys.path.insert(0, str(ROOT))
    import common

    module, wanted = importlib.import_module(Path(script).stem), np.memmap(kill_file, np.uint8)

    def tell(owner, name, number):
        original = getattr(owner, name)

        def told(*args, **kwargs):
            if wanted[0] == number:  # in an instant; the steps of an evaluation are in it too
                moment = random.SystemRandom().random() * (0 if number == 1 else 0.01)  # s
                kill = (os.getpid(), signal.SIGKILL)
                os.kill(*kill) if not moment else threading.Timer(moment, os.kill, kill).start()
            return original(*args, **kwargs)

        setattr(owner, name, told)

    for number, name in enumerate(PHASES, 1):
        tell(module if name == "update" else common, name, number)
    with common.exit_on_error():
        module.main(common.parse_args(module.Args, module.PRESETS, flags))


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
    step, updates = saved["counters"][:2]
    state = saved["replay"]
    [[written, capacity]] = np.load(folder / "replay" / "written.npy")
    first = max(state["start"], written - capacity)
    if known is not None:
        assert step >= known["step"], (step, known["step"])
        assert updates >= known["updates"]
        kept = max(first, known["first"])
        for name, rows in rows_of(folder, kept, known["end"]).items():
            assert np.array_equal(rows, known["rows"][name][kept - known["first"] :]), name
    rows = rows_of(folder, first, state["end"])
    return {"step": step, "updates": updates, "first": first, "end": state["end"], "rows": rows}


def kill_often(script, flags, kills, cwd, seed=0, seconds=(3.0, 10.0)):
    """Runs, kills and resumes -> run folder, a (phase, step, updates) for each kill."""
    rng, known, seen, kill_file = random.Random(seed), None, [], Path(cwd) / "kill"
    environ = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(flags):
        np.zeros(1, np.uint8).tofile(kill_file)
        command = [sys.executable, __file__, "--play", str(kill_file), script, *flags]
        return subprocess.Popen(command, cwd=cwd, env=environ)

    process = start(flags)
    for kill in range(kills):
        try:
            process.wait(rng.uniform(*seconds))
        except subprocess.TimeoutExpired:
            np.memmap(kill_file, np.uint8)[0] = 1 + kill % 4
        if process.wait() != -signal.SIGKILL:
            break  # it ended by itself
        folders = list(Path(cwd).glob("runs/*"))
        known = check(folders[0], known) if folders else None
        counted = (known["step"], known["updates"]) if known else (0, 0)
        seen.append((PHASES[kill % 4], *counted))
        if known is None:  # nothing to resume: the run begins anew
            for folder in folders:
                folder.rename(Path(cwd) / f"lost_{kill}")
            process = start(flags)
        else:
            process = start(["--resume", str(folders[0].relative_to(cwd))])
    assert process.wait() == 0, process.returncode
    [folder] = Path(cwd).glob("runs/*")
    check(folder, known)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = [(row["frames"], *sorted(row)) for row in rows]
    assert len(set(keys)) == len(keys), "a row was logged twice"
    assert all(a["frames"] <= b["frames"] for a, b in pairwise(rows))
    return folder, seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--play", help=argparse.SUPPRESS)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=(10, 30), help="from kill to kill"
    )
    parser.add_argument("script")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()
    if args.play:
        play(args.script, args.play, args.flags)
        sys.exit()
    cwd = tempfile.mkdtemp(prefix="killed_")
    folder, seen = kill_often(args.script, args.flags, args.kills, cwd, args.seed, args.seconds)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    returns = [row["eval/episodic_return"] for row in rows if "eval/episodic_return" in row]
    for phase, step, updates in seen:
        print(f"killed in: {phase}; the last checkpoint had {step} steps, {updates} updates")
    print(f"{len(seen)} kills: {dict(Counter(phase for phase, *_ in seen))}")
    print(f"it ended with a return of {returns[-1]:.1f} in {folder}")
