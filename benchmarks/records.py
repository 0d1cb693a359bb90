"""Curves (CSV) and their cards (YAML): how runs become records, and what a curve is judged by.

A curve has a row per training episode and per evaluation. A card has the command, every
hyperparameter, and for each seed its commit, device, versions and hours. Both of a task lie in
one folder under the name of the task; a seed that is recorded again replaces its earlier rows.
"""

import csv
import fcntl
import io
import json
import os
import platform
import subprocess
import sys
import threading
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml

ROOT = Path(__file__).parent.parent
CURVES = ROOT / "benchmarks" / "curves"
COLUMNS = [
    "script", "commit", "env_id", "seed", "env_frames", "updates", "episode_return", "kind",
    "wall_hours",
]  # fmt: skip
PACKAGES = ["torch", "numpy", "gymnasium", "dm_control", "mujoco", "ale-py"]
SCRIPTS = ["dreamerv1.py", "dreamerv2.py", "common.py", "runtime.py"]
THREADS = threading.Lock()  # for a lock on a file holds between processes alone


def tasks():
    """The tasks of tasks.yaml, by name, each with what is known of its environment."""
    plan = yaml.safe_load((ROOT / "benchmarks" / "tasks.yaml").read_text())
    for name, task in plan["tasks"].items():
        words = task["command"].split()
        task |= {"name": name, "script": words[0].removesuffix(".py")}
        task["env_id"] = words[words.index("--env-id") + 1]
        task = plan["tasks"][name] = plan["environments"].get(task["env_id"], {}) | task
    return plan["tasks"]


def read_curve(path):
    """Rows of a CSV, by seed in rising order, each a dict with numbers as numbers."""
    curves = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            row |= {k: int(row[k]) for k in ("seed", "env_frames", "updates")}
            row |= {k: float(row[k]) for k in ("episode_return", "wall_hours")}
            curves.setdefault(row["seed"], []).append(row)
    return dict(sorted(curves.items()))


def commit():
    """The commit of the scripts, with a plus if they have been changed since."""

    def git(*words):
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout
        except FileNotFoundError:
            return ""

    changed = git("status", "--porcelain", "--", *SCRIPTS)
    head = git("rev-parse", "--short", "HEAD").strip() or "unknown"
    return head + "+" * bool(changed.strip())


def device(cuda=True):
    """The name of the GPU, if there is one to use, or else of the CPU and its cores."""
    import torch

    if cuda and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    name = models[0].split(":")[1].strip() if models else platform.machine()
    return f"{os.cpu_count()} cores of {name}"


def launcher(processes):
    """What stands between python and the script to start several processes of it."""
    if processes == 1:
        return []
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]


def command(script, args, processes=1):
    """The command line of a run: its id and what differs from the preset, without the seed."""
    sys.path.insert(0, str(ROOT))
    module = import_module(script)
    chosen = import_module("common").choose_preset(SimpleNamespace(**args))
    default = asdict(module.Args()) | module.PRESETS[chosen]
    default |= {k: args[k] for k in ("env_id", "seed")}
    words = ["python", *launcher(processes), f"{script}.py --env-id {args['env_id']}"]
    for key, value in args.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool) and value != default[key]:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != default[key]:
            words.append(f"--{flag} {value}")
    return " ".join(words)


def record(run, name, script, folder, commits):
    """Adds a finished run folder to the curve and the card of a task -> path of the curve."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with THREADS, open(folder / ".lock", "w") as lock:  # runs that end together wait for each other
        fcntl.lockf(lock, fcntl.LOCK_EX)
        return add(run, name, script, folder, commits)


def add(run, name, script, folder, commits):
    path = folder / f"{name}.csv"
    args = yaml.safe_load((Path(run) / "args.yaml").read_text())
    log = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    seed = args["seed"]
    rows = []
    for row in log:
        for kind, tag in (("train", "charts"), ("eval", "eval")):
            if (ret := row.get(f"{tag}/episodic_return")) is not None:
                point = (row["frames"], row["updates"], round(ret, 3), kind)
                point = (script, commits[-1], args["env_id"], seed, *point)
                rows.append((*point, round(row["seconds"] / 3600, 4)))
    curves = read_curve(path) if path.exists() else {}
    curves[seed] = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for key in sorted(curves):
        writer.writerows(curves[key])

    path = path.with_suffix(".yaml")
    card = yaml.safe_load(path.read_text()) if path.exists() else {"runs": []}
    told = card.get("args", {})
    processes = 1 + len([*Path(run).glob("rank*")])
    others = [k for k in told.keys() & args.keys() if k != "seed" and told[k] != args[k]]
    if others and list(card["runs"]) != [r for r in card["runs"] if r["seed"] == seed]:
        raise ValueError(f"{path} is of runs with another {', '.join(others)}")
    runs = {run["seed"]: run for run in card["runs"]}
    versions = {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
    runs[seed] = {
        "seed": seed, "commit": ", ".join(dict.fromkeys(commits)), "device": device(args["cuda"]),
        "versions": versions, "wall_hours": round(log[-1]["seconds"] / 3600, 3),
        "env_frames": log[-1]["frames"], "updates": log[-1]["updates"],
        "final_eval_return": rounded(round(final(log), 3)),
    }  # fmt: skip
    card = {
        "command": f"{command(script, args, processes)} --seed SEED",
        "runs": [runs[key] for key in sorted(runs)],
        "args": {k: v for k, v in args.items() if k != "seed"},
    }
    write(path, yaml.safe_dump(card, sort_keys=False, width=100))
    write(path.with_suffix(".csv"), text.getvalue())
    return path.with_suffix(".csv")


def write(path, text):
    """The whole text or, if something comes between, the old one."""
    new = path.with_suffix(f"{path.suffix}.new")
    new.write_text(text)
    new.replace(path)


def final(log):
    return [r["eval/episodic_return"] for r in log if "eval/episodic_return" in r][-1]


def digits(ret):
    """Decimal places of a return: one, or three where returns are small, as those of MiniGrid."""
    return 1 if abs(ret) >= 10 else 3


def rounded(ret):
    return round(ret, digits(ret))


def shown(ret):
    return f"{ret:.{digits(ret)}f}"


def last_frame(rows):
    return max(row["env_frames"] for row in rows)


def evaluated(rows, frames):
    """Whether there is an evaluation up to `frames`; the last one may be an episode late."""
    return any(row["kind"] == "eval" and row["env_frames"] <= 1.02 * frames for row in rows)


def tail(rows, frames, kind="eval"):
    """Mean return in the last tenth of `frames`, or of the last row before if it has none."""
    rows = [row for row in rows if row["kind"] == kind and row["env_frames"] <= 1.02 * frames]
    late = [row for row in rows if row["env_frames"] >= 0.9 * frames] or rows[-1:]
    return float(np.mean([row["episode_return"] for row in late]))


def area(rows, frames, kind="train"):
    """Area under the curve of training episodes up to `frames`, divided by the frames.

    An episode counts as many frames as went by since the one before it ended.
    """
    rows = [r for r in rows if r["kind"] == kind and r["env_frames"] <= frames]
    weights = np.diff([0, *(row["env_frames"] for row in rows)])
    return float(np.average([row["episode_return"] for row in rows], weights=weights))


def untrained(rows):
    """Mean return of the episodes before the first update; nan if there was none."""
    early = [r["episode_return"] for r in rows if r["kind"] == "train" and r["updates"] == 0]
    return float(np.mean(early)) if early else float("nan")
