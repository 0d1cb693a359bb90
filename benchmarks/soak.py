"""Runs a script for a while and reports whether its memory or its open files grow.

    python benchmarks/soak.py --minutes 30 dreamerv2.py --env-id CartPole-v1 --total-frames 9000000

RssAnon is a process's own memory, without the pages of the replay's files. It and the number of
open files are summed over the process and its children, sampled every 5 seconds. Exits with 1 if
the median memory of the last 2 minutes exceeds that of minutes 5 to 7 by 2 % or more, or if there
are more open files.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def family(pid):
    """The process and all that descend from it."""
    children = [*Path(f"/proc/{pid}/task").glob("*/children")]
    below = [int(child) for path in children for child in path.read_text().split()]
    return [pid, *(process for child in below for process in family(child))]


def measure(pid):
    """RssAnon in KiB and open files, of the process and its children."""
    anonymous = files = 0
    for process in family(pid):
        status = Path(f"/proc/{process}/status").read_text()
        if "RssAnon:" not in status:  # it has ended, and nobody has waited for it yet
            continue
        anonymous += int(status.split("RssAnon:")[1].split()[0])
        files += len(os.listdir(f"/proc/{process}/fd"))
    return anonymous, files


SETTLE = 5.0  # minutes after which memory is first measured
WINDOW = 2.0  # minutes of which a median is taken, then and at the end


def soak(script, flags, minutes):
    """Runs and stops it -> a report as a dict."""
    cwd = tempfile.mkdtemp(prefix="soak_")
    samples = []
    began = time.monotonic()
    with open(Path(cwd) / "soak.log", "w") as log:
        command = [sys.executable, str(ROOT / script), *flags]
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log)
        while (minute := (time.monotonic() - began) / 60) < minutes:
            time.sleep(5)
            if process.poll() is not None:
                sys.exit(f"error: it ended by itself, see {cwd}/soak.log")
            try:
                samples.append((minute, *measure(process.pid)))
            except (FileNotFoundError, ProcessLookupError):
                continue  # a child ended in between, as the probe for OpenGL does
        process.send_signal(signal.SIGTERM)
        process.wait()
    first = [s for s in samples if SETTLE <= s[0] < SETTLE + WINDOW]
    last = [s for s in samples if s[0] >= minutes - WINDOW]
    memory = [statistics.median(s[1] for s in part) for part in (first, last)]
    [folder] = Path(cwd).glob("runs/*")
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "command": " ".join([script, *flags]),
        "minutes": minutes,
        "frames": row["frames"],
        "updates": row["updates"],
        "RssAnon MiB": [round(value / 1024, 1) for value in memory],
        "growth %": round(100 * (memory[1] / memory[0] - 1), 2),
        "peak MiB": round(max(s[1] for s in samples) / 1024, 1),
        "open files": [max(s[2] for s in part) for part in (first, last)],
        "exit code": process.returncode,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()
    if args.minutes < SETTLE + 2 * WINDOW:
        parser.error(f"--minutes is {args.minutes}, it must be at least {SETTLE + 2 * WINDOW:.0f}")
    report = soak(args.script, args.flags, args.minutes)
    print(json.dumps(report, indent=2))
    grew = report["growth %"] >= 2 or report["open files"][1] > report["open files"][0]
    sys.exit(int(grew or report["exit code"] != 143))
