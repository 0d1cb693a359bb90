"""Times what a Dreamer does: updates and their parts, acting, replay, environments.

    python benchmarks/speed.py                          # the five CPU workloads, ours alone
    python benchmarks/speed.py --workloads W3 --repeats 30 --precision bfloat16
    python benchmarks/speed.py --peer sheeprl --peer-python ENV/bin/python
    python benchmarks/speed.py --scaling W3             # the cost of longer, wider, deeper
    python benchmarks/speed.py --gpu --json gpu.json    # all that a GPU is judged by
    python benchmarks/speed.py --gpu --mode graph --precision bfloat16
    python benchmarks/speed.py --run                    # seconds to a solved task, speed_run.py

With a peer, both run in processes of their own with the same number of threads and take turns, so
that what else the machine does meets both alike; the ratio is that of the medians. The peer is
sheeprl 0.8.4 as shipped, in an environment of its own:

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 && ENV/bin/pip install sheeprl==0.8.4

The limit of an update is the time that its floating-point operations, counted by torch, would take
at the rate of a large matrix product, measured on the same machine at the same precision.
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
from functools import partial
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
        "env_id": "dm_control/walker-walk-v0",
        "sheeprl": {"horizon": 15}, "updates": 1,
    },
    "W2": {
        "what": "V2, 64 x 64 x 1, 6 discrete actions, batch 16 x 50, horizon 15",
        "script": "dreamerv2", "preset": "atari", "changes": {},
        "shapes": {"image": [1, 64, 64]}, "actions": 6, "discrete": True,
        "env_id": "PongNoFrameskip-v4",
        "sheeprl": {"horizon": 15, "world_model.use_continues": True}, "updates": 1,
    },
    "W3": {
        "what": "V2, vector of 4, 2 discrete actions, batch 16 x 32, small networks, horizon 10",
        "script": "dreamerv2", "preset": "other",
        # The networks and the horizon of the peer.
        "changes": {"batch_size": 16, "norm": "none", "act": "elu", "imag_horizon": 10},
        "shapes": {"vector": [4]}, "actions": 2, "discrete": True,
        "env_id": "CartPole-v1",
        "sheeprl": dict(word.split("=") for word in SMALL.split()), "updates": 10,
    },
    "W4": {
        "what": "V3, vector of 4, 2 discrete actions, batch 8 x 32, tiny networks, horizon 15",
        "script": "dreamerv3", "preset": "other", "changes": {},
        "shapes": {"vector": [4]}, "actions": 2, "discrete": True,
        "env_id": "CartPole-v1", "updates": 10,
    },
    "W5": {
        "what": "V3, 64 x 64 x 3, 6 discrete actions, batch 16 x 64, size 12m, horizon 15",
        "script": "dreamerv3", "preset": "atari", "changes": {"size": "12m"},
        "shapes": {"image": [3, 64, 64]}, "actions": 6, "discrete": True,
        "env_id": "PongNoFrameskip-v4", "updates": 1,
    },
    "atari50": {
        "what": "V2, 64 x 64 x 1, 6 discrete actions, batch 50 x 50, horizon 15",
        "script": "dreamerv2", "preset": "atari", "changes": {"batch_size": 50},
        "shapes": {"image": [1, 64, 64]}, "actions": 6, "discrete": True, "updates": 1,
    },
    "dmc2": {
        "what": "V2, 64 x 64 x 3, 6 continuous actions, batch 16 x 50, horizon 15",
        "script": "dreamerv2", "preset": "dmc_pixels", "changes": {},
        "shapes": {"image": [3, 64, 64]}, "actions": 6, "discrete": False, "updates": 1,
    },
}  # fmt: skip
SCALING = {
    "batch_size": (8, 16, 32, 64), "batch_length": (16, 32, 64), "imag_horizon": (5, 10, 20, 40),
    "deter": (128, 256, 512, 1024),
}  # fmt: skip


def prepare(work, folder):
    """The agent of a workload and a batch -> dict of name -> function to be timed, parameters.

    folder: for its replay.
    """
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    import common
    import runtime

    module = importlib.import_module(work["script"])
    device = runtime.setup(1, work["device"] == "cuda", False, work["threads"])
    changes = module.PRESETS[work["preset"]] | work["changes"] | {"precision": work["precision"]}
    args = module.Args(**changes, compile=work["mode"] == "compile")
    module.resolve_auto(args, device, work["discrete"])
    size = work["actions"]
    shapes = {k: tuple(v) for k, v in work["shapes"].items()} | {"action": (size,)}
    agent = module.make_agent(shapes, args).to(device)
    make = getattr(module, "make_optimizers", None) or module.make_optimizer  # V3 has one
    optimizers = make(agent, args)
    model = agent["world_model"]
    record = partial(runtime.Captured, device=device, enabled=work["mode"] != "eager")

    rows = shapes | {"reward": (), "is_first": (), "is_terminal": ()}
    rng = np.random.default_rng(1)
    replay = common.Replay(folder, 2000, rows, num_envs=1, device=device)
    for step in range(2000):
        row = {"reward": rng.normal(size=1), "is_first": np.zeros(1), "is_terminal": np.zeros(1)}
        action = np.eye(size)[[step % size]] if work["discrete"] else rng.uniform(-1, 1, size)
        row["action"] = action
        if "image" in shapes:
            row["image"] = rng.integers(256, size=(1, *shapes["image"]))
        if "vector" in shapes:
            row["vector"] = rng.normal(size=(1, *shapes["vector"]))
        replay.add(row)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    # How the script draws a batch.
    if work["script"] == "dreamerv3":
        draw = {"fresh_first": True}
    else:
        draw = {"favor_ends": getattr(args, "favor_ends", False)}

    def sample():
        batch = replay.sample(args.batch_size, args.batch_length, **draw)
        wait()
        return batch

    plain = partial(module.update, agent, optimizers, args=args)
    learn = record(plain)
    batch = sample()

    def update():
        metrics = learn(batch)
        wait()
        return metrics

    def sample_and_update():
        learn(replay.sample(args.batch_size, args.batch_length, **draw))  # waits for nothing

    def model_forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
            loss = model.loss(batch)[0]
        wait()
        return loss

    def model_all():
        model_forward().backward()
        agent.zero_grad()
        wait()

    def acting(num_envs):
        act = record(partial(module.policy, agent))
        row = {k: np.repeat(v[0, :1].cpu().numpy(), num_envs, 0) for k, v in batch.items()}
        state = model.rssm.initial(num_envs)

        def policy():
            nonlocal state
            action, state = act(row, state)
            return action.cpu().numpy()

        return policy

    def environment():
        args = module.Args(env_id=work["env_id"], **module.PRESETS[work["preset"]])
        envs = common.Envs(args, 1)

        def step():
            envs.send(envs.random_actions())
            envs.receive()

        return step

    functions = {
        "captured": lambda: learn.graph is not None,  # False on a CPU
        "plain update": lambda: plain(batch),
        "update": update,
        "model": model_all,
        "model forward": model_forward,
    }
    functions |= {"policy": acting(1), "sample": sample, "sample and update": sample_and_update}
    if device.type == "cuda":
        functions |= {"policy 8": acting(8), "policy 16": acting(16)}
    if "env_id" in work:
        functions["environment"] = environment()
    counts = [sum(p.numel() for p in v.parameters()) for v in agent.values()][:3]
    return functions, counts


def limit(work, functions):
    """Floating-point operations of an update, and the rate of a large matrix product."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        functions["plain update"]()  # a replayed graph would count nothing
    dtype = getattr(torch, work["precision"])
    size = 8192 if work["device"] == "cuda" else 2048
    x, y = (torch.randn(size, size, dtype=dtype, device=work["device"]) for _ in range(2))
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        (x @ y)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return {"flop": counter.get_total_flops(), "flop/s": 2 * size**3 / statistics.median(seconds)}


def losses(functions):
    """Losses of 50 updates from the same seed, to compare ways of computing them."""
    import torch

    torch.manual_seed(1)
    rows = []
    for _ in range(50):  # a graph overwrites its outputs, so that each is read at once
        metrics = functions["update"]()
        rows.append({k: v.item() for k, v in metrics.items() if k.startswith("losses/")})
    return {k: [row[k] for row in rows] for k in rows[0]}


def kernels(functions):
    """Where the GPU's time of 10 updates goes -> name, ms and calls per update of all kernels
    together and of the 25 largest.
    """
    from torch.profiler import ProfilerActivity, profile

    functions["update"]()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(10):
            functions["update"]()
    events = profiler.key_averages()
    rows = [(e.key[:100], e.self_device_time_total / 1e4, e.count / 10) for e in events]
    together = ("all kernels", sum(row[1] for row in rows), sum(row[2] for row in rows))
    return [together, *sorted(rows, key=lambda row: -row[1])[:25]]


def work_on(work):
    """Answers commands from stdin, `update 3`, as the peer's process does."""
    with tempfile.TemporaryDirectory(prefix="speed_") as folder:
        answer_commands(work, *prepare(work, folder))


def answer_commands(work, functions, counts):
    print(json.dumps({"parameters": counts}), flush=True)
    for line in sys.stdin:
        what, times = line.rsplit(" ", 1)
        answer = {}
        ask = {"limit": partial(limit, work), "losses": losses, "kernels": kernels}
        ask["captured"] = lambda functions: functions["captured"]()
        if what in ask:
            answer[what] = ask[what](functions)
        else:
            answer["seconds"] = []
            for _ in range(int(times)):
                began = time.perf_counter()
                functions[what]()
                answer["seconds"].append(time.perf_counter() - began)
        answer["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if work["device"] == "cuda":
            import torch

            answer["peak MiB"] = torch.cuda.max_memory_reserved() / 2**20
        print(json.dumps(answer), flush=True)


class Worker:
    """A process that is told what to do and says how long it took."""

    def __init__(self, command, threads):
        environ = os.environ | {"OMP_NUM_THREADS": str(threads)} if threads else os.environ
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environ, cwd=tempfile.gettempdir(), **pipes)
        self.parameters, self.seconds, self.peak = self.read()["parameters"], {}, 0.0

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise ChildProcessError("the process of a workload ended, as said above")

    def ask(self, what, times=1):
        print(what, times, file=self.process.stdin, flush=True)
        return self.read()

    def run(self, what, times, keep=True):
        answer = self.ask(what, times)
        if keep:
            self.seconds.setdefault(what, []).extend(answer["seconds"])
        return answer["peak MiB"]

    def medians(self):
        return {k: round(1000 * statistics.median(v), 3) for k, v in self.seconds.items()}  # ms

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def ours(name, args, **options):
    """A worker of ours."""
    work = WORKLOADS[name] | {"device": "cuda" if args.gpu else "cpu", "threads": args.threads}
    work |= {"precision": args.precision, "mode": args.mode} | options
    return Worker([sys.executable, __file__, "--worker", json.dumps(work)], args.threads)


def measure(name, args, **options):
    """Times a workload -> a report as a dict."""
    work = WORKLOADS[name] | {"threads": args.threads}
    workers = {"ours": ours(name, args, **options)}
    if args.peer and "sheeprl" in work:
        sizes = {"W1": (50, 50), "W2": (16, 50), "W3": (16, 32)}[name]
        work["sizes"] = dict(zip(("batch_size", "batch_length"), sizes, strict=True))
        peer = [args.peer_python, str(ROOT / "benchmarks" / "speed_sheeprl.py"), json.dumps(work)]
        workers["sheeprl"] = Worker(peer, args.threads)
    report = {"workload": name, "what": work["what"], "precision": args.precision} | options
    mine = workers["ours"]
    if args.gpu:
        report["losses"] = mine.ask("losses")["losses"]  # first, from the same weights
    for worker in workers.values():  # to touch the memory, warm the caches and capture graphs
        calls = args.warm_up * work["updates"]
        if args.gpu:
            calls = max(5, calls)  # it records a graph at the fourth
        worker.run("update", calls, keep=False)
        worker.run("policy", 20, keep=False)
    for _ in range(args.repeats):
        for worker in workers.values():
            worker.run("update", work["updates"])
            worker.peak = worker.run("policy", 20)
    for what in args.parts:
        if what == "environment" and "env_id" not in work:
            continue
        quick = what in ("environment", "sample") or "policy" in what
        if quick or args.gpu:
            mine.run(what, 5, keep=False)
        mine.run(what, 100 if quick else 10 if args.gpu else 3)
    report["limit"] = mine.ask("limit")["limit"]
    for key, worker in workers.items():
        report[key] = {"ms": worker.medians(), "peak MiB": round(worker.peak)}
        report[key]["parameters"] = worker.parameters
    if args.gpu:
        report["captured"] = mine.ask("captured")["captured"]
        report["kernels"] = mine.ask("kernels")["kernels"]
    for worker in workers.values():
        worker.close()
    report["limit"]["ms"] = 1000 * report["limit"]["flop"] / report["limit"]["flop/s"]
    report["limit"]["reached"] = round(report["limit"]["ms"] / report["ours"]["ms"]["update"], 3)
    if "sheeprl" in workers:
        mine, theirs = (report[key]["ms"] for key in workers)
        report["ratio"] = {k: round(mine[k] / theirs[k], 3) for k in ("update", "policy")}
        report["ratio"]["peak memory"] = round(workers["ours"].peak / workers["sheeprl"].peak, 3)
    return report


def show(report):
    options = ", ".join(f"{k} {report[k]}" for k in ("mode", "changes") if k in report)
    if report.get("mode") == "graph":
        options += " recorded" if report["captured"] else " that could not be recorded"
    print(f"{report['workload']}  {report['what']}, {report['precision']} {options}")
    for key in ("ours", "sheeprl"):
        if key in report:
            print(f"    {key:8} {report[key]['peak MiB']:6} MiB  {report[key]['ms']}")
    bound = report["limit"]
    print(f"    limit {bound['ms']:.2f} ms ({bound['flop'] / 1e9:.1f} GFLOP), ", end="")
    print(f"{100 * bound['reached']:.0f} % of it reached", flush=True)
    if "ratio" in report:
        print(f"    ratio {report['ratio']}", flush=True)


def machine():
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": f"{len(cpu)} x {cpu[0]}" if cpu else platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(args):
    about = machine() | {"threads": 1 if args.run else args.threads, "mode": args.mode}
    print(json.dumps(about))
    if args.run:
        import records
        import speed_run

        try:
            script = records.find_script(args.run)
        except ValueError as error:
            sys.exit(f"error: {error}")
        peer_python = args.peer and args.peer_python
        reports = speed_run.measure(script, args.seeds, args.precision, peer_python)
        if args.json:
            Path(args.json).write_text(json.dumps({"machine": about, "reports": reports}, indent=1))
        return
    reports = []
    plan = []
    if args.scaling:
        plan += [(args.scaling, {})]
        for key, values in SCALING.items():
            changes = WORKLOADS[args.scaling]["changes"]
            plan += [(args.scaling, {"changes": changes | {key: v}}) for v in values]
    elif args.gpu:
        names = args.workloads or ["W2", "W1", "W5", "atari50", "dmc2"]
        for mode, precision in GPU_MODES:
            if args.mode in (None, mode) and args.precision in (None, precision):
                plan += [(name, {"mode": mode, "precision": precision}) for name in names]
        if not plan:
            sys.exit(f"error: --gpu measures no --mode {args.mode} in {args.precision}")
    else:
        plan += [(name, {}) for name in args.workloads or [f"W{i}" for i in range(1, 6)]]
    for name, options in plan:
        try:
            reports.append(measure(name, args, **options))
            show(reports[-1])
        # A worker that died does not keep the others of the plan from being measured.
        except (ChildProcessError, BrokenPipeError) as error:
            reports.append({"workload": name, "error": str(error)} | options)
            print(f"error: {error}", flush=True)
        if args.json:  # after each, so that a lost machine loses little
            Path(args.json).write_text(json.dumps({"machine": about, "reports": reports}, indent=1))
    if any("error" in report for report in reports):
        sys.exit(1)


GPU_MODES = [
    ("graph", "bfloat16"), ("eager", "bfloat16"), ("graph", "float32"), ("eager", "float32"),
    ("compile", "bfloat16"),
]  # fmt: skip
PARTS = ["model", "model forward", "sample", "sample and update", "environment"]
POLICIES = ["policy 8", "policy 16"]  # with so many environments

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], help="without it --gpu measures both"
    )
    parser.add_argument(
        "--mode", choices=["graph", "eager", "compile"], help="without it --gpu measures all"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--parts", nargs="*", choices=[*PARTS, *POLICIES], help="what else to time")
    parser.add_argument("--scaling", choices=WORKLOADS, help="a workload to enlarge")
    parser.add_argument("--run", nargs="?", const="dreamerv2.py", help="time runs of a script")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="of --run")
    parser.add_argument("--gpu", action="store_true", help="all modes on a GPU")
    parser.add_argument("--peer", choices=["sheeprl"], help="of W1 to W3")
    parser.add_argument("--peer-python", default="python")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.parts is None:
        args.parts = [] if args.scaling else PARTS + POLICIES * args.gpu
    if not args.gpu or args.scaling or args.run:
        args.precision = args.precision or "float32"
        args.mode = args.mode or "graph"
    if args.worker:
        work_on(json.loads(args.worker))
    else:
        main(args)
