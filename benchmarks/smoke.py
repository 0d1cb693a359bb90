"""Trains a script on CartPole for about a minute on one core; exit code 0 if it learned.

    python benchmarks/smoke.py              # dreamerv2.py
    python benchmarks/smoke.py mine.py

For the CI of a project that has a copied script: a loss or a gradient of the wrong sign lowers
its losses as well, and only the return shows it. The networks have 64 units in one layer.
The best evaluation is judged. With seed 1 it was 329, 447 and 421 (dreamerv1.py,
dreamerv2.py and dreamerv3.py); with the actor's loss negated all three fail.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = "--env-id CartPole-v1 --threads 1 --batch-size 16 --batch-length 10 --deter 64"
FLAGS += " --hidden 64 --units 64 --layers 1 --eval-every 500 --eval-episodes 10"
FLAGS += " --video-every 0 --log-every 1000"
LENGTH = " --total-frames 6000 --prefill 500 --train-every 4"  # 1475 updates
LENGTH_V3 = " --total-frames 3000 --train-ratio 40 --lr 1e-3"  # 739 updates
THRESHOLD = 80  # of the best evaluation; random play has about 22, the most is 500


def smoke(script, flags=()):
    """Runs the script, or a copy of one -> exit code: its own, or 1 if it did not learn."""
    with tempfile.TemporaryDirectory() as folder:
        length = LENGTH_V3 if "train_ratio:" in Path(script).read_text() else LENGTH
        command = [sys.executable, script, "--resume", "run", *(FLAGS + length).split(), *flags]
        code = subprocess.run(command, cwd=folder).returncode
        if code:
            print(f"{script} ended with exit code {code}")
            return code
        rows = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    tag = "eval/episodic_return"
    returns = [row[tag] for row in map(json.loads, rows) if tag in row]
    learned = max(returns) >= THRESHOLD
    verdict = "learned" if learned else "has NOT learned"
    print(f"evaluations: {', '.join(f'{x:.1f}' for x in returns)}")
    print(f"{script} {verdict}: the best is {max(returns):.1f}, the threshold {THRESHOLD}")
    return 0 if learned else 1


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", nargs="?", type=Path, default=ROOT / "dreamerv2.py")
    parser.add_argument("flags", nargs="*", help="more flags for the script, after --")
    args = parser.parse_args(argv)
    return smoke(str(args.script.resolve()), args.flags)


if __name__ == "__main__":
    sys.exit(main())
