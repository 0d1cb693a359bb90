"""Times what a Dreamer does: updates and their parts, policy steps, replay, environments.

    python benchmarks/speed.py                          # the three workloads, ours alone
    python benchmarks/speed.py --workloads W3 --repeats 30 --precision bfloat16
    python benchmarks/speed.py --peer sheeprl --peer-python ENV/bin/python

With a peer, both run in processes of their own with the same number of threads and take turns, so
that what else the machine does meets both alike; the ratio is that of the medians. The peer is
sheeprl 0.8.4 as shipped, in an environment of its own:

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 && ENV/bin/pip install sheeprl==0.8.4
"""

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = "dense_units=128 mlp_layers=2 world_model.recurrent_model.recurrent_state_size=128"
SMALL += " world_model.stochastic_size=8 world_model.discrete_size=8 horizon=10"
SMALL += " world_model.transition_model.hidden_size=128"
SMALL += " world_model.representation_model.hidden_size=128 world_model.use_continues=True"
WORKLOADS = {
    "W1": {
        "what": "V1, 64 x 64 x 3, 6 continuous actions, batch 50 x 50, horizon 15",
        "script": "dreamerv1", "preset": "dmc_pixels", "changes": {},
        "shapes": {"image": [3, 64, 64]}, "actions": 6, "discrete": False,
        "sheeprl": {"horizon": 15}, "updates": 1,
    },
    "W2": {
        "what": "V2, 64 x 64 x 1, 6 discrete actions, batch 16 x 50, horizon 15",
        "script": "dreamerv2", "preset": "atari", "changes": {},
        "shapes": {"image": [1, 64, 64]}, "actions": 6, "discrete": True,
        "sheeprl": {"horizon": 15, "world_model.use_continues": True}, "updates": 1,
    },
    "W3": {
        "what": "V2, vector of 4, 2 discrete actions, batch 16 x 32, small networks, horizon 10",
        "script": "dreamerv2", "preset": "other",
        "changes": {"batch_size": 16, "norm": "none", "act": "elu"},  # the networks of the peer
        "shapes": {"vector": [4]}, "actions": 2, "discrete": True,
        "sheeprl": dict(word.split("=") for word in SMALL.split()), "updates": 10,
    },
}  # fmt: skip


def prepare(work, precision, threads):
    """The agent of a workload and a batch -> dict of name -> function to be timed."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import torch

    import common

    module = importlib.import_module(work["script"])
    common.setup(1, False, False, threads)
    changes = module.PRESETS[work["preset"]] | work["changes"] | {"precision": precision}
    args = module.Args(**changes)
    args.actor_dist = "onehot" if work["discrete"] else "tanh_normal"
    if work["script"] == "dreamerv2":
        args.actor_grad = "reinforce" if work["discrete"] else "dynamics"
    size = work["actions"]
    shapes = {k: tuple(v) for k, v in work["shapes"].items()} | {"action": (size,)}
    agent = module.make_agent(shapes, args)
    optimizers = module.make_optimizers(agent, args)
    parts = {"agent": agent, **optimizers} if work["script"] == "dreamerv1" else optimizers
    rows = {k: (v, np.uint8 if k == "image" else np.float32) for k, v in shapes.items()}
    rows |= dict.fromkeys(("reward", "is_first", "is_terminal"), ((), np.float32))
    folder, rng = tempfile.mkdtemp(prefix="speed_"), np.random.default_rng(1)
    replay = common.Replay(folder, 2000, rows, 1, 1)
    for step in range(2000):
        row = {"reward": rng.normal(size=1), "is_first": np.zeros(1), "is_terminal": np.zeros(1)}
        row["action"] = (
            np.eye(size)[[step % size]] if work["discrete"] else rng.uniform(-1, 1, size)
        )
        if "image" in shapes:
            row["image"] = rng.integers(256, size=(1, *shapes["image"]))
        if "vector" in shapes:
            row["vector"] = rng.normal(size=(1, *shapes["vector"]))
        replay.add(row)
    state, updates = None, 0

    def sample():
        return replay.sample(args.batch_size, args.batch_length)

    batch = sample()

    def update():
        nonlocal updates
        updates += 1
        if work["script"] == "dreamerv1":
            return module.update(agent, parts, batch, args)
        return module.update(agent, parts, batch, updates, args)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")

    def model_forward():
        with autocast():
            return agent["world_model"].loss(batch)

    def model():
        model_forward()[0].backward()
        agent.zero_grad()

    def policy():
        nonlocal state
        first = {k: v[0, :1].numpy() for k, v in batch.items()}
        _, state = module.policy(agent, first, state)

    counts = {k: sum(p.numel() for p in v.parameters()) for k, v in agent.items()}
    functions = {"update": update, "model": model, "model forward": model_forward}
    return functions | {"policy": policy, "sample": sample}, counts


def work_on(work, precision, threads):
    """Answers commands from stdin, `update 3`, as the peer's process does."""
    functions, counts = prepare(work, precision, threads)
    print(json.dumps({"parameters": list(counts.values())[:3]}), flush=True)
    for line in sys.stdin:
        what, times = line.rsplit(" ", 1)
        seconds = []
        for _ in range(int(times)):
            began = time.perf_counter()
            functions[what]()
            seconds.append(time.perf_counter() - began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak MiB": peak}), flush=True)


class Worker:
    """A process that is told what to do and says how long it took."""

    def __init__(self, command, threads):
        environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environ, cwd=tempfile.gettempdir(), **pipes)
        self.parameters, self.seconds, self.peak = self.read()["parameters"], {}, 0.0

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"error: a process ended: {self.process.args}")

    def run(self, what, times, keep=True):
        print(what, times, file=self.process.stdin, flush=True)
        answer = self.read()
        if keep:
            self.seconds.setdefault(what, []).extend(answer["seconds"])
        self.peak = answer["peak MiB"]

    def medians(self):
        return {k: round(1000 * statistics.median(v), 3) for k, v in self.seconds.items()}  # ms


def measure(name, args):
    """Times a workload -> a report as a dict."""
    work = WORKLOADS[name] | {"threads": args.threads}
    # The sizes that the peer needs come from our script's preset.
    command = [sys.executable, __file__, "--worker", name, "--precision", args.precision]
    workers = {"ours": Worker([*command, "--threads", str(args.threads)], args.threads)}
    if args.peer:
        sizes = {"W1": (50, 50), "W2": (16, 50), "W3": (16, 32)}[name]
        work["sizes"] = dict(zip(("batch_size", "batch_length"), sizes, strict=True))
        peer = [args.peer_python, str(ROOT / "benchmarks" / "speed_sheeprl.py"), json.dumps(work)]
        workers["sheeprl"] = Worker(peer, args.threads)
    for worker in workers.values():  # to touch the memory and warm the caches
        worker.run("update", args.warm_up * work["updates"], keep=False)
        worker.run("policy", 20, keep=False)
    for _ in range(args.repeats):
        for worker in workers.values():
            worker.run("update", work["updates"])
            worker.run("policy", 20)
    for what in ("model", "model forward", "sample"):
        workers["ours"].run(what, 3)
    report = {"workload": name, "what": work["what"], "precision": args.precision}
    for key, worker in workers.items():
        worker.process.stdin.close()
        worker.process.wait()
        report[key] = {"ms": worker.medians(), "peak MiB": round(worker.peak)}
        report[key]["parameters"] = worker.parameters
    if args.peer:
        ours, theirs = (report[key]["ms"] for key in workers)
        report["ratio"] = {k: round(ours[k] / theirs[k], 3) for k in ("update", "policy")}
        report["ratio"]["peak memory"] = round(workers["ours"].peak / workers["sheeprl"].peak, 3)
    return report


def machine():
    import torch

    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line]  # noqa: SIM115
    return {
        "cpu": f"{len(cpu)} x {cpu[0]}" if cpu else platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--peer", choices=["sheeprl"])
    parser.add_argument("--peer-python", default="python")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--worker", choices=WORKLOADS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work_on(WORKLOADS[args.worker], args.precision, args.threads)
        sys.exit()
    about = machine() | {"threads": args.threads}
    print(json.dumps(about))
    reports = []
    for name in args.workloads:
        reports.append(report := measure(name, args))
        print(f"{name}  {report['what']}, {args.precision}")
        for key in ("ours", "sheeprl"):
            if key in report:
                print(f"    {key:8} {report[key]['peak MiB']:6} MiB  {report[key]['ms']}")
        print(f"    ratio {report['ratio']}" if args.peer else "")
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": about, "reports": reports}, indent=2))
