"""Turns finished run folders into a curve (CSV) and a run card (YAML) under benchmarks/curves.

python benchmarks/card.py runs/CartPole-v1__dreamerv2__*
"""

import csv
import importlib
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

PACKAGES = "torch numpy gymnasium dm_control mujoco ale-py".split()
COLUMNS = "script commit env_id seed env_frames updates episode_return kind wall_hours".split()


def git(*command):
    return subprocess.run(
        ["git", *command], capture_output=True, text=True, check=True
    ).stdout.strip()


def command(script, args):
    """The command line of a run: its id and what differs from the preset."""
    module, words = importlib.import_module(script), []
    preset = module.PRESETS[common.preset_name(args["env_id"], args["observation"])]
    default = asdict(module.Args()) | preset | {k: args[k] for k in ("env_id", "exp_name", "seed")}
    for name, value in args.items():
        if value != default[name]:
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words.append(f"--{flag} {value}")
    return " ".join([f"python {script}.py --env-id {args['env_id']}", *words])


def main(folders):
    commit, groups = git("rev-parse", "--short", "HEAD"), {}
    for folder in map(Path, folders):
        args = yaml.safe_load((folder / "args.yaml").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        groups.setdefault((args["exp_name"], args["env_id"]), []).append((args, rows))
    for (script, env_id), runs in groups.items():
        runs.sort(key=lambda run: run[0]["seed"])
        path = Path(__file__).parent / "curves" / f"{script}-{env_id.replace('/', '-')}"
        path.parent.mkdir(exist_ok=True)
        with open(path.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for args, rows in runs:
                for row in rows:
                    for kind, tag in (("train", "charts"), ("eval", "eval")):
                        if (ret := row.get(f"{tag}/episodic_return")) is not None:
                            point = (row["frames"], row["updates"], round(ret, 3), kind)
                            hours = round(row["seconds"] / 3600, 4)
                            writer.writerow((script, commit, env_id, args["seed"], *point, hours))
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        card = {
            "command": f"{command(script, runs[0][0])} --seed SEED",
            "commit": commit,
            "device": gpu or f"CPU, {platform.machine()}, {torch.get_num_threads()} cores",
            "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
            "seeds": [args["seed"] for args, _ in runs],
            "wall_hours": [round(rows[-1]["seconds"] / 3600, 3) for _, rows in runs],
            "final_eval_return": [
                round(
                    [r["eval/episodic_return"] for r in rows if "eval/episodic_return" in r][-1], 1
                )
                for _, rows in runs
            ],
            "args": {k: v for k, v in runs[0][0].items() if k != "seed"},
        }
        path.with_suffix(".yaml").write_text(yaml.safe_dump(card, sort_keys=False))
        print(path.with_suffix(".csv"), card["seeds"], card["final_eval_return"])


if __name__ == "__main__":
    main(sys.argv[1:])
