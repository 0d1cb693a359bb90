"""Tries every world of docs/environments.md: 2,000 frames with updates, and how fast it steps.

    python benchmarks/environments.py                       # those whose packages are there
    python benchmarks/environments.py Crafter Procgen --json benchmarks/environments.json

A row is tried with small networks, for it is the world that is on trial: it has to reach its last
frame with finite losses, and to say how its episodes end. With --json the rows replace those of
the same names in the file. Frames include action repeat; actions are random where speed is
measured: one environment, eight in turn, and eight in processes, which is what --async-envs takes.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dreamerv2  # noqa: E402
import runtime  # noqa: E402

TINY = [
    "--total-frames=2000", "--prefill=400", "--pretrain=5", "--batch-size=4", "--batch-length=16",
    "--deter=64", "--hidden=64", "--units=64", "--cnn-depth=8", "--stoch=8", "--classes=8",
    "--imag-horizon=5", "--log-every=500", "--eval-every=0", "--eval-episodes=1",
    "--video-every=0", "--threads=1",
]  # fmt: skip
WORLDS = {  # name: id, flags, packages of its own
    "Atari": ("ALE/Pong-v5", "--sticky-prob 0.25", "ale-py"),
    "dm_control, pixels": ("dm_control/walker-walk-v0", "", "dm_control"),
    "dm_control, vectors": ("dm_control/walker-walk-v0", "--observation vector", "dm_control"),
    "Classic control": ("CartPole-v1", "", ""),
    "MuJoCo, Humanoid": ("Humanoid-v5", "", "mujoco"),
    "MuJoCo, HalfCheetah": ("HalfCheetah-v5", "", "mujoco"),
    "Crafter": ("benchmarks.recipes:Crafter-v0", "", "crafter"),
    "MiniGrid": ("benchmarks.recipes:minigrid-Empty-5x5-v0", "", "minigrid"),
    "MinAtar": ("benchmarks.recipes:minatar-breakout-v1", "", "minatar"),
    "Memory Maze": ("benchmarks.recipes:MemoryMaze-9x9-v0", "", "memory-maze"),
    "Procgen": ("benchmarks.recipes:procgen-coinrun-v0", "", "procgen-mirror"),
    "Brax": ("benchmarks.recipes:brax-inverted_pendulum-v0", "", "brax"),
}


def installed(package):
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return None


def train(env_id, flags):
    """A run of 2,000 frames -> what its log says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "dreamerv2.py"), "--env-id", env_id]
        command += [*TINY, *flags.split()]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1][:300]}
        (log,) = Path(folder).glob("runs/*/metrics.jsonl")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [v for row in rows for k, v in row.items() if k.startswith("losses/")]
    assert losses, "no update was made"
    assert all(map(math.isfinite, losses)), losses
    lengths = [row["charts/episodic_length"] for row in rows if "charts/episodic_length" in row]
    last = rows[-1]
    return {"frames": last["frames"], "updates": last["updates"], "episodes": len(lengths)}


def stepping(env_id, flags, count, parallel, seconds):
    """Frames per second of random actions, resets included; in turn or in processes."""
    argv = ["--env-id", env_id, *flags.split()]
    args = runtime.parse_args(dreamerv2.Args, dreamerv2.PRESETS, common.choose_preset, argv)
    envs = common.Envs(args, count, parallel)

    def step():
        envs.send(envs.random_actions())
        row, _ = envs.receive()
        return args.action_repeat * int((1 - row["is_first"]).sum())

    try:
        for _ in range(2):  # the first is a reset, and either may compile
            step()
        frames = 0
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            frames += step()
        return round(frames / (time.perf_counter() - began))
    finally:
        envs.close()


def table(record):
    """The rows as a Markdown table."""
    lines = [
        "| world | `--env-id` | pip install | tried: frames, updates, episodes | frames/s: one | "
        "eight in turn | eight in processes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in record["worlds"].items():
        env_id, _, package = WORLDS[name]
        given = package and f"{package} {row['version']}"
        extra = "" if package in ("ale-py", "dm_control", "mujoco", "") else given
        speeds = [row["frames_per_second"].get(k) for k in ("one", "eight", "processes")]
        speeds = " | ".join("-" if x is None else f"{x:,}" for x in speeds)
        tried = f"{row['frames']:,}, {row['updates']:,}, {row['episodes']:,}"
        lines.append(f"| {name} | `{env_id}` | {extra or '-'} | {tried} | {speeds} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(WORLDS)}")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of speed")
    parser.add_argument("--json", type=Path, help="file that keeps the rows")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(WORLDS):
        sys.exit(f"error: no world {', '.join(sorted(unknown))}, there are {', '.join(WORLDS)}")
    record = {"worlds": {}}

    def keep():
        record["worlds"] = {k: record["worlds"][k] for k in WORLDS if k in record["worlds"]}
        record["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        record["python"] = platform.python_version()
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")

    if args.json and args.json.exists():
        record = json.loads(args.json.read_text())
    failed = []
    for name in args.names or WORLDS:
        env_id, flags, package = WORLDS[name]
        if (found := installed(package)) is None:
            print(f"{name}: pip install {package}")
            continue
        row = {"version": found, **train(env_id, flags)}
        if "failed" in row:
            failed.append(name)
            print(f"{name}: {row['failed']}")
            continue
        options = {"one": (1, False), "eight": (8, False), "processes": (8, True)}
        if name == "Brax":
            del options["processes"]  # each would compile for itself, minutes
        row["frames_per_second"] = {
            key: stepping(env_id, flags, count, parallel, args.seconds)
            for key, (count, parallel) in options.items()
        }
        print(name, row, flush=True)
        record["worlds"][name] = row
        keep()
    print(table(record))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
