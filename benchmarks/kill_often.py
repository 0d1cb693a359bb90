"""Kills a run with SIGKILL again and again, resumes it each time, and checks what must survive.

    python benchmarks/kill_often.py dreamerv2.py --kills 20 -- --env-id CartPole-v1 --total-frames 8000

Rows of the replay from before a checkpoint have to be the same bytes ever after, as long as the ring
has not overwritten them; counters never fall; the log has no row twice; the run ends.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent


def start(script, flags, cwd):
    command = [sys.executable, str(ROOT / script), *flags]
    return subprocess.Popen(command, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"})


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
    written = np.load(folder / "replay" / "written.npy").item()
    capacity = len(np.load(folder / "replay" / "action.npy", mmap_mode="r"))
    first = max(state["start"], written - capacity)
    if known is not None:
        assert step >= known["step"], (step, known["step"])
        assert updates >= known["updates"]
        kept = max(first, known["first"])
        for name, rows in rows_of(folder, kept, known["end"]).items():
            assert np.array_equal(rows, known["rows"][name][kept - known["first"] :]), name
    rows = rows_of(folder, first, state["end"])
    return {"step": step, "updates": updates, "first": first, "end": state["end"], "rows": rows}


def kill_often(script, flags, kills, cwd, seed=0, longest=10.0):
    """Runs, kills and resumes -> run folder, updates at each kill."""
    rng, known, seen = random.Random(seed), None, []
    process = start(script, flags, cwd)
    for _ in range(kills):
        try:
            process.wait(rng.uniform(2.5, longest))
            break  # it ended by itself
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        folders = list(Path(cwd).glob("runs/*"))
        known = check(folders[0], known) if folders else None
        seen.append(known and known["updates"])
        # Without a checkpoint there is nothing to resume: the run begins anew.
        if known is None:
            for folder in folders:
                folder.rename(Path(cwd) / f"lost_{len(seen)}")
            process = start(script, flags, cwd)
        else:
            process = start(script, ["--resume", str(folders[0].relative_to(cwd))], cwd)
    assert process.wait() == 0, process.returncode
    [folder] = Path(cwd).glob("runs/*")
    check(folder, known)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = [(row["frames"], *sorted(row)) for row in rows]
    assert len(set(keys)) == len(keys), "a row was logged twice"
    assert all(a["frames"] <= b["frames"] for a, b in zip(rows, rows[1:], strict=False))
    return folder, seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="of the script, after --")
    args = parser.parse_args()
    cwd = Path(f"killed_{int(time.time())}")
    cwd.mkdir()
    folder, seen = kill_often(args.script, args.flags, args.kills, cwd, args.seed)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    returns = [row["eval/episodic_return"] for row in rows if "eval/episodic_return" in row]
    print(f"{len(seen)} kills, at updates {seen}; final return {returns[-1]:.1f}; {folder}")
