"""Curves (CSV) and their cards (YAML): how runs become records, and what a curve is judged by.

A curve has a row per training episode and per evaluation. A card has the command, every
hyperparameter, and for each seed its commit, device, versions and hours. Both of a task lie in
one folder under the name of the task; a seed that is recorded again replaces its earlier rows.

The losses and other metrics of a task's runs lie in a folder beside that of the curves, `metrics`,
in a CSV with a row for each time that a run wrote them.

A curve is judged by `held`, the mean of the evaluations in the last third of its frames, and by
`area`, the area under its training episodes. `worst`, the lowest of those evaluations, is shown.
"""

import csv
import fcntl
import functools
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
CURVES = ROOT / "benchmarks" / "curves"
COLUMNS = [
    "script", "commit", "env_id", "seed", "env_frames", "updates", "episode_return", "kind",
    "wall_hours",
]  # fmt: skip
METRICS = ("losses/", "model/", "imag/", "grad_norm")  # tags of what an update reports
PACKAGES = ["torch", "numpy", "gymnasium", "dm_control", "mujoco", "ale-py"]
THREADS = threading.Lock()  # for a lock on a file holds between processes alone


def tasks():
    """The tasks of tasks.yaml, by name, each with what is known of its environment."""
    plan = yaml.safe_load((ROOT / "benchmarks" / "tasks.yaml").read_text())
    found = {}
    for name, task in plan["tasks"].items():
        words = task["command"].split()
        task |= {"name": name, "script": words[0].removesuffix(".py")}
        task["env_id"] = words[words.index("--env-id") + 1]
        found[name] = plan["environments"].get(task["env_id"], {}) | task
    return found


def read_curve(path):
    """Rows of a CSV, by seed in rising order, each a dict with numbers as numbers."""
    curves = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            row |= {k: int(row[k]) for k in ("seed", "env_frames", "updates")}
            row |= {k: float(row[k]) for k in ("episode_return", "wall_hours")}
            curves.setdefault(row["seed"], []).append(row)
    return dict(sorted(curves.items()))


def read_log(run):
    """The rows of a run's metrics.jsonl; one that goes on may be writing its last line."""
    text = (Path(run) / "metrics.jsonl").read_text()
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def read_run(run):
    """Args and rows of a run folder; the rows have the keys of a curve but for the commit."""
    args = yaml.safe_load((Path(run) / "args.yaml").read_text())
    rows = []
    for logged in read_log(run):
        for kind, tag in (("train", "charts"), ("eval", "eval")):
            if (ret := logged.get(f"{tag}/episodic_return")) is not None:
                rows.append({
                    "env_id": args["env_id"], "seed": args["seed"],
                    "env_frames": logged["frames"], "updates": logged["updates"],
                    "episode_return": round(ret, 3), "kind": kind,
                    "wall_hours": round(logged["seconds"] / 3600, 4),
                })  # fmt: skip
    return args, rows


@dataclass
class Curve:
    """One seed, of a run folder or of a CSV file."""

    source: Path  # the folder or the file
    label: str  # what its seeds have in common, for people
    seed: int
    rows: list
    args: dict | None  # None for a CSV file without a card


def label_of_run(run, seed):
    """The name of a run folder without its seed.

    runs/mine-1 and runs/mine_1 are mine, runs/CartPole-v1__mine__1__1795859953000 is
    CartPole-v1__mine.
    """
    return re.sub(rf"[-_]+{seed}(__\d+)?$", "", Path(run).absolute().name)


def find_curves(paths):
    """The seeds in run folders, CSV files and folders with either -> list of Curve.

    Raises ValueError, a line for people, if there is nothing in one of the paths.
    """
    curves = []
    for path in map(Path, paths):
        if path.is_file():
            files, runs = [path], []
        elif (path / "args.yaml").exists():
            files, runs = [], [path]
        else:
            files = sorted(path.glob("*.csv"))
            runs = [args.parent for args in sorted(path.glob("seed-*/*/args.yaml"))]
        if not files and not runs:
            raise ValueError(f"{path} is no run folder, no CSV file, and no folder with either")
        known = len(curves)
        try:
            for file in files:
                curves += curves_of_file(file)
            for run in runs:
                args, rows = read_run(run)
                seed = args["seed"]
                curves.append(Curve(run, label_of_run(run, seed), seed, rows, args))
        except (KeyError, TypeError, ValueError, OSError, csv.Error, yaml.YAMLError) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{path} cannot be read, {text}") from None
        if len(curves) == known:
            raise ValueError(f"{path} has no finished episode yet")
    for curve in curves:
        if not curve.rows:
            raise ValueError(f"{curve.source} has no finished episode yet")
    return curves


def refuse_repeated_seeds(curves):
    """Raises ValueError, a line for people, if a seed is there twice."""
    known = {}
    for curve in curves:
        if curve.seed in known:
            sources = f"{known[curve.seed].source}, {curve.source}"
            raise ValueError(f"seed {curve.seed} of {curve.label} is there twice: {sources}")
        known[curve.seed] = curve


def curves_of_file(path):
    """The seeds of a CSV file, with the hyperparameters of its card if it has one."""
    card = path.with_suffix(".yaml")
    args = yaml.safe_load(card.read_text())["args"] if card.exists() else None
    return [Curve(path, path.stem, seed, rows, args) for seed, rows in read_curve(path).items()]


def find_script(name):
    """Path of a script, from where the command was typed or else in this repository."""
    name = name if name.endswith(".py") else f"{name}.py"
    for path in (Path(name).resolve(), ROOT / name):
        if path.is_file():
            return path
    raise ValueError(f"there is no script {name}, neither here nor in {ROOT}")


@functools.cache
def load_script(path):
    """Imports a script from its path; ValueError, a line for people, if it is not of our kind."""
    sys.path.insert(0, str(path.parent))  # where it finds common and runtime
    spec = spec_from_file_location(str(path), path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} cannot be imported, {text}") from None
    if not hasattr(module, "Args") or not hasattr(module, "PRESETS"):
        raise ValueError(f"{path} has no Args and PRESETS, as a copy of dreamerv2.py does")
    return module


def commit(script):
    """The commit of a script's repository.

    A plus says that the script, or what it imports of ours, is not as committed there.
    """
    imported = [script.with_name(name) for name in ("common.py", "runtime.py")]
    if script.is_relative_to(ROOT / "benchmarks"):  # without_memory.py imports a script as well
        imported = [*ROOT.glob("dreamerv?.py"), ROOT / "common.py", ROOT / "runtime.py"]

    def git(*words):
        command = ["git", "-C", str(script.parent), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout
        except FileNotFoundError:
            return ""

    # What is untracked counts as changed, also if git is told to ignore it.
    changed = git("status", "--porcelain", "--ignored", "--", script, *imported)
    head = git("rev-parse", "--short", "HEAD").strip() or "unknown"
    return f"{head}+" if changed.strip() else head


def device(cuda):
    """The name of the GPU, if there is one to use, or else of the CPU and its cores."""
    import torch

    if cuda and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    name = models[0].split(":")[1].strip() if models else platform.machine()
    return f"{os.cpu_count()} cores of {name}"


def machine(cuda):
    """Where a run is made, as its card tells it."""
    versions = {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
    return {"device": device(cuda), "versions": versions}


def command(script, args):
    """The command line of a run: its id and what differs from the preset, without the seed."""
    import torch

    module = load_script(script)
    chosen = import_module("common").choose_preset(SimpleNamespace(**args))
    default = SimpleNamespace(**asdict(module.Args()) | module.PRESETS[chosen])
    # A run's args keep the precision as given, and V3's widths beside the size that they follow.
    preset = {k: v for k, v in vars(default).items() if k in ("precision", "size")}
    if "size" in preset:
        default.size = args["size"]
    module.resolve_auto(default, torch.device("cpu"), args["actor_dist"] == "onehot")
    default = vars(default) | {k: args[k] for k in ("env_id", "seed")} | preset
    own = script.resolve().is_relative_to(ROOT)
    name = script.resolve().relative_to(ROOT) if own else script.name
    words = [f"python {name} --env-id {args['env_id']}"]
    for key, value in args.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool) and value != default[key]:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != default[key]:
            words.append(f"--{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def record(run, name, script, folder, commits, machine):
    """Adds a finished run folder to the curve and the card of a task -> path of the curve."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with THREADS, open(folder / ".lock", "w") as lock:  # runs that end together wait for each other
        fcntl.lockf(lock, fcntl.LOCK_EX)
        return add(run, name, script, folder, commits, machine)


def add(run, name, script, folder, commits, machine):
    curve_path, card_path = folder / f"{name}.csv", folder / f"{name}.yaml"
    args, rows = read_run(run)
    log = read_log(run)
    seed = args["seed"]
    curves = read_curve(curve_path) if curve_path.exists() else {}
    curves[seed] = [row | {"script": script.stem, "commit": commits[-1]} for row in rows]

    card = yaml.safe_load(card_path.read_text()) if card_path.exists() else {"runs": []}
    told = card.get("args", {})
    others = [k for k in told.keys() & args.keys() if k != "seed" and told[k] != args[k]]
    if others and any(r["seed"] != seed for r in card["runs"]):
        raise ValueError(f"{card_path} is of runs with another {', '.join(others)}")
    runs = {run["seed"]: run for run in card["runs"]}
    runs[seed] = {
        "seed": seed, "commit": ", ".join(dict.fromkeys(commits)), **machine,
        "wall_hours": round(log[-1]["seconds"] / 3600, 3), "env_frames": log[-1]["frames"],
        "updates": log[-1]["updates"], "final_eval_return": rounded(round(final(log), 3)),
    }  # fmt: skip
    card = {
        "command": f"{command(script, args)} --seed SEED",
        "runs": [runs[key] for key in sorted(runs)],
        "args": {k: v for k, v in args.items() if k != "seed"},
    }
    write(card_path, yaml.safe_dump(card, sort_keys=False, width=100))
    add_metrics(log, seed, folder.parent / "metrics" / f"{name}.csv")
    write_csv(curve_path, curves, COLUMNS)
    return curve_path


def add_metrics(log, seed, path):
    """Adds what a run logged of its updates, to four digits, to the CSV of its task."""
    seeds = read_metrics(path) if path.exists() else {}
    seeds[seed] = []
    for logged in log:
        values = {k: f"{v:.4g}" for k, v in logged.items() if k.startswith(METRICS)}
        if values:
            at = {"seed": seed, "env_frames": logged["frames"], "updates": logged["updates"]}
            seeds[seed].append(at | values)
    at = ["seed", "env_frames", "updates"]
    tags = {tag for rows in seeds.values() for row in rows for tag in row} - {*at}
    write_csv(path, seeds, at + sorted(tags))


def read_metrics(path):
    """Rows of a CSV of metrics, by seed in rising order, each a dict with numbers as numbers."""
    seeds = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            row = {k: float(v) for k, v in row.items() if v}
            row |= {k: int(row[k]) for k in ("seed", "env_frames", "updates")}
            seeds.setdefault(row["seed"], []).append(row)
    return dict(sorted(seeds.items()))


def write_csv(path, seeds, columns):
    """Rows by seed, in rising order of the seeds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for seed in sorted(seeds):
        writer.writerows(seeds[seed])
    write(path, text.getvalue())


def write(path, text):
    """Replaces a file; after a crash it holds the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
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


def shown(ret, like=None):
    """A return as text, with the decimal places of another one if that is given."""
    return f"{ret:.{digits(ret if like is None else like)}f}"


def last_frame(rows):
    return max(row["env_frames"] for row in rows)


def evaluated(rows, frames):
    """Whether there is an evaluation up to `frames`; the last one may be an episode late."""
    return any(row["kind"] == "eval" and row["env_frames"] <= 1.02 * frames for row in rows)


def late(rows, frames, kind="eval"):
    """The rows in the last third of `frames`, or the last one before if there is none.

    A row may come up to 2 % after `frames`, as an evaluation that waits for its episode does.
    """
    rows = [row for row in rows if row["kind"] == kind and row["env_frames"] <= 1.02 * frames]
    if not rows:
        raise ValueError(f"a seed has no row of {kind} in the first {frames:,} frames")
    return [row for row in rows if row["env_frames"] > 2 / 3 * frames] or rows[-1:]


def held(rows, frames, kind="eval"):
    """Mean return in the last third of `frames`."""
    return float(np.mean([row["episode_return"] for row in late(rows, frames, kind)]))


def worst(rows, frames, kind="eval"):
    """Lowest return in the last third of `frames`."""
    return float(min(row["episode_return"] for row in late(rows, frames, kind)))


def area(rows, frames, kind="train"):
    """Area under the curve of training episodes up to `frames`, divided by the frames.

    An episode counts as many frames as went by since the one before it ended; those that end at
    the same frame, in several environments, count as one with their mean return.
    """
    rows = [r for r in rows if r["kind"] == kind and r["env_frames"] <= frames]
    if not rows:
        raise ValueError(f"a seed has no row of {kind} in the first {frames:,} frames")
    ends, episode = np.unique([row["env_frames"] for row in rows], return_inverse=True)
    returns = np.bincount(episode, [row["episode_return"] for row in rows])
    returns = returns / np.bincount(episode)
    return float(np.average(returns, weights=np.diff([0, *ends])))


def untrained(rows):
    """Mean return of the episodes before the first update; nan if there was none."""
    early = [r["episode_return"] for r in rows if r["kind"] == "train" and r["updates"] == 0]
    return float(np.mean(early)) if early else float("nan")
