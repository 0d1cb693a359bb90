"""Times whole runs from a cold start until an evaluation passes a return, and says what took it.

    python benchmarks/speed.py --run                                  # dreamerv2.py, seeds 1 to 5
    python benchmarks/speed.py --run dreamerv1.py --seeds 1 2 3 --precision bfloat16
    python benchmarks/speed.py --run --peer sheeprl --peer-python ENV/bin/python

The clock starts before Python does. Runs go one after another, each in a process of its own with
one thread. Every part is timed alone: an environment that steps, the policy, updates and so on;
within an evaluation all counts as evaluation. The peer makes as many environment frames and
updates of the same sizes, without any evaluation, right after each run.
"""

import collections
import functools
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
RUNS = {"CartPole-v1": 475.0, "Pendulum-v1": -200.0}  # the return that an evaluation has to reach
PEER = """
    env=gym env.num_envs=1 env.sync_env=True env.capture_video=False env.wrapper.id={env_id}
    env.id={env_id} seed={seed} fabric.accelerator=cpu metric.log_level=0 checkpoint.every=0
    checkpoint.save_last=False buffer.memmap=False algo.run_test=False algo.total_steps={frames}
    algo.learning_starts={prefill} algo.replay_ratio={ratio}
    algo.per_rank_pretrain_steps={pretrain} algo.per_rank_batch_size={batch_size}
    algo.per_rank_sequence_length={batch_length} algo.horizon={imag_horizon}
    algo.dense_units={units} algo.mlp_layers={layers} algo.world_model.use_continues=True
    algo.world_model.recurrent_model.recurrent_state_size={deter}
    algo.world_model.transition_model.hidden_size={hidden}
    algo.world_model.representation_model.hidden_size={hidden}
    algo.world_model.stochastic_size={stoch} algo.cnn_keys.encoder=[] algo.cnn_keys.decoder=[]
    algo.mlp_keys.encoder=[state] algo.mlp_keys.decoder=[state]
"""


class Shares:
    """Seconds of this process by what it was doing."""

    def __init__(self, began):
        self.seconds = collections.Counter()
        self.doing = "import"
        self.since = began

    def switch(self, what):
        """Begins to count for `what` -> what it counted for until now."""
        before, now = self.doing, time.time()
        self.seconds[before] += now - self.since
        self.doing, self.since = what, now
        return before

    def wrap(self, owner, name, what):
        """Lets the calls of a function count for `what`, unless they are part of an evaluation."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*args, **kwargs):
            if self.doing == "evaluation":
                return plain(*args, **kwargs)
            before = self.switch(what)
            try:
                return plain(*args, **kwargs)
            finally:
                self.switch(before)

        setattr(owner, name, timed)


def work_on(work):
    """Runs a script until it has solved its task, and prints what took how long as JSON."""
    shares = Shares(work["began"])
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
    import records

    import common
    import runtime

    script = records.load_script(Path(work["script"]))
    shares.switch("else")
    result = {}
    progress, evaluate = runtime.Logger.progress, common.evaluate

    def noted(logger, frames, updates):
        result.update(frames=frames, updates=updates)
        progress(logger, frames, updates)

    def judged(*args, **kwargs):
        returns, cut, film = evaluate(*args, **kwargs)
        if returns.mean() >= work["solved"]:
            result.update({"return": float(returns.mean()), "seconds": time.time() - work["began"]})
            os.kill(os.getpid(), signal.SIGINT)  # the run saves itself and ends
        return returns, cut, film

    runtime.Logger.progress, common.evaluate = noted, judged
    for owner, name, what in (
        (common, "evaluate", "evaluation"), (common.Envs, "send", "environment"),
        (common.Envs, "receive", "environment"), (script, "policy", "acting"),
        (script, "update", "learning"), (common.Replay, "sample", "replay"),
        (common.Replay, "add", "replay"), (runtime.Logger, "log", "logs"),
        (runtime.Logger, "progress", "logs"), (runtime, "save_checkpoint", "checkpoints"),
    ):  # fmt: skip
        shares.wrap(owner, name, what)
    argv = ["--env-id", work["env_id"], "--seed", str(work["seed"]), "--resume", "run"]
    argv += ["--precision", work["precision"]]
    args = runtime.parse_args(script.Args, script.PRESETS, common.choose_preset, argv)
    script.main(args)
    shares.switch("else")
    result |= {"parts": {k: round(v, 2) for k, v in shares.seconds.items()}}
    result["args"] = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
    print(json.dumps(result), flush=True)


def time_ours(script, env_id, seed, precision="float32"):
    """A run in a process of its own -> what it says of itself."""
    work = {"script": str(script), "env_id": env_id, "seed": seed, "precision": precision}
    work["solved"] = RUNS[env_id]
    with tempfile.TemporaryDirectory() as folder:
        work["began"] = time.time()
        command = [sys.executable, __file__, json.dumps(work)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=one_thread())
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(f"error: the run ended with exit code {done.returncode}: {done.stderr[-500:]}")
    return json.loads(lines[-1])


def one_thread():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def time_peer(python, script, env_id, seed, ours):
    """The seconds of sheeprl's run with the frames, updates and sizes of ours."""
    args = ours["args"]
    words = PEER.format(
        **args | {"env_id": env_id, "seed": seed}, frames=ours["frames"],
        ratio=1 / args["train_every"],
    ).split()  # fmt: skip
    if script.stem == "dreamerv2":
        words.append(f"algo.world_model.discrete_size={args['classes']}")
    main = "from sheeprl.cli import run; run()"
    version = script.stem.removeprefix("dreamer_").removeprefix("dreamer")
    command = [python, "-c", main, f"exp=dreamer_{version}", *words]
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=one_thread())
        seconds = time.time() - began
    if done.returncode:
        sys.exit(f"error: the peer ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return seconds


def without_evaluation(run):
    """Seconds of a whole run of ours, less those of evaluations, of which the peer makes none."""
    return sum(run["parts"].values()) - run["parts"]["evaluation"]


def measure(script, seeds, precision, peer_python=None):
    """Times runs on all tasks -> a list of reports, which are printed as they come."""
    if peer_python and script.stem not in ("dreamerv1", "dreamerv2"):
        sys.exit(f"error: the peer is compared with DreamerV1 and DreamerV2, not {script.name}")
    reports = []
    for env_id, solved in RUNS.items():
        runs = []
        for seed in seeds:
            run = time_ours(script, env_id, seed, precision) | {"seed": seed}
            if peer_python:
                run["peer seconds"] = round(time_peer(peer_python, script, env_id, seed, run), 1)
            del run["args"]
            runs.append(run)
            print(f"{env_id} seed {seed}: {json.dumps(run)}", flush=True)
        unsolved = [run["seed"] for run in runs if "seconds" not in run]
        if unsolved:
            print(f"error: {env_id} was not solved by seeds {unsolved}", file=sys.stderr)
        runs = [run for run in runs if "seconds" in run]
        if not runs:
            continue
        seconds = statistics.median(run["seconds"] for run in runs)
        evaluation = statistics.median(run["parts"]["evaluation"] for run in runs)
        report = {"script": script.name, "precision": precision, "env_id": env_id}
        report |= {"solved at": solved, "runs": runs, "unsolved": unsolved}
        report |= {"median seconds": seconds, "of which evaluation": evaluation}
        if peer_python:
            ratios = [without_evaluation(run) / run["peer seconds"] for run in runs]
            report["ratio to the peer"] = round(statistics.median(ratios), 3)
        print(f"{env_id}: {json.dumps({k: v for k, v in report.items() if k != 'runs'})}")
        reports.append(report)
    return reports


if __name__ == "__main__":
    work_on(json.loads(sys.argv[1]))
