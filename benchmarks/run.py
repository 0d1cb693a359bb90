"""Runs tasks x seeds, N at a time, each a process with a log of its own, and records their curves.

    python benchmarks/run.py cpu --seeds 1 2 3 --jobs 2         # a group of benchmarks/tasks.yaml
    python benchmarks/run.py dreamerv2-CartPole-v1 --seeds 4    # one task
    python benchmarks/run.py --scripts mine.py dreamerv2.py --env-ids CartPole-v1 -- --threads 2
    python benchmarks/run.py cpu --cluster slurm --cluster-options slurm_partition=a timeout_min=60

What follows -- goes to every run. The same command again goes on where it stopped: finished runs
are skipped, the others go on from their last checkpoint. An interrupt lets every run save itself.
Each has OUT/TASK/seed-N with its log and its run folder, OUT/TASK/seed-N/TASK-N.
Curves go to OUT/curves, or with --pin to benchmarks/curves. Exit code 1 if a run failed.

--scripts takes any script that has Args and PRESETS, as a changed copy of ours does: a path from
where the command is typed, or else the name of a file in this repository. A copy of it as it ran
stays in OUT/TASK/seed-N. Once it is changed, its runs need another OUT.
"""

import argparse
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import records

OWN = [records.ROOT / f"dreamerv{version}.py" for version in (1, 2, 3)]
OWN += [records.ROOT / "benchmarks" / "without_memory.py"]


class Job:
    """A task with a seed, in a folder of its own; called, it runs and returns the exit code."""

    def __init__(self, name, script, flags, seed, args):
        self.name = name
        self.script = script
        self.seed = seed
        self.curves = args.curves
        self.flags = [*flags, "--seed", str(seed)]
        self.folder = args.out / name / f"seed-{seed}"
        self.run = self.folder / f"{name}-{seed}"  # a name that no other run has, for W&B
        self.machine = self.folder / "machine.yaml"
        # The scripts are told how many cores are theirs; presets of small networks take one.
        threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
        self.environ = {} if args.cluster else {"OMP_NUM_THREADS": threads}
        self.process = None
        self.stopped = False

    def __str__(self):
        return f"{self.name} seed {self.seed}"

    def command(self):
        """Begins the run or goes on with it, whichever it takes."""
        return [sys.executable, str(self.script), "--resume", self.run.name, *self.flags]

    def what(self):
        """The script and its flags, as a line."""
        script = self.script.name if self.script in OWN else str(self.script)
        return shlex.join([script, *self.flags])

    def finished(self):
        return (self.folder / "finished").exists()

    def check(self):
        """Ends with one line if a seed of the task ran another script or had other flags.

        A card holds the hyperparameters of all of its seeds.
        """
        own = self.what().rpartition(" --seed ")[0]
        for path in sorted(self.folder.parent.glob("seed-*/flags")):
            if path.read_text().rpartition(" --seed ")[0] != own:
                sys.exit(f"error: {path.parent} ran {path.read_text()}, choose another --out")
        copy = self.folder / self.script.name
        changed = copy.exists() and copy.read_bytes() != self.script.read_bytes()
        if changed and self.script not in OWN:
            sys.exit(
                f"error: {self.folder} ran another {copy.name}, remove it or choose another --out"
            )

    def record(self):
        """Adds the run to the curve of its task, in place of an earlier one of its seed."""
        commits = (self.folder / "commits").read_text().split()
        if not self.machine.exists():  # an earlier version wrote none
            self.note_machine()
        machine = yaml.safe_load(self.machine.read_text())
        records.record(self.run, self.name, self.script, self.curves, commits, machine)

    def note_machine(self):
        """Keeps where the run is made, since its card may be written elsewhere, or later."""
        machine = records.machine("--no-cuda" not in self.flags)
        self.machine.write_text(yaml.safe_dump(machine, sort_keys=False))

    def recorded(self):
        path = self.curves / f"{self.name}.csv"
        return path.exists() and self.seed in records.read_curve(path)

    def discard_unsaved(self):
        """Removes a run that ended before its first checkpoint, which nobody can go on with."""
        saved = [self.run / name for name in ("checkpoint.pt", "checkpoint.old.pt")]
        if self.run.exists() and not any(path.exists() for path in saved):
            shutil.rmtree(self.run)

    def __call__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.discard_unsaved()
        (self.folder / "flags").write_text(self.what())
        shutil.copy(self.script, self.folder)
        self.note_machine()
        with open(self.folder / "commits", "a") as file:
            file.write(records.commit(self.script) + "\n")
        with open(self.folder / "log.txt", "a") as log:
            print("$", shlex.join(self.command()), file=log, flush=True)
            environ = os.environ | self.environ
            self.process = subprocess.Popen(
                self.command(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=environ, start_new_session=True,
            )  # fmt: skip
            if self.stopped:  # by a signal that came before there was a process
                self.process.terminate()
            if code := self.process.wait():
                return code
        self.record()
        (self.folder / "finished").touch()
        return 0

    def stop(self, *_):
        """Asks the run to save itself and end."""
        self.stopped = True
        if self.process and self.process.poll() is None:
            self.process.terminate()

    def checkpoint(self):
        """What submitit calls before a job is preempted or out of time, to queue it again."""
        import submitit

        self.stop()
        # Called from a signal handler, while `__call__` holds the lock of Popen.wait.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        self.process = None
        self.stopped = False
        return submitit.helpers.DelayedSubmission(self)


def plan(args):
    """The jobs that the command line asks for."""
    known = records.tasks()
    groups = sorted({task["group"] for task in known.values()})
    chosen = {}  # name: script and flags
    for name in args.tasks:
        found = [task for k, task in known.items() if name in (k, task["group"])]
        if not found:
            sys.exit(f"error: no task {name}, there are {', '.join([*groups, *known])}")
        chosen |= {task["name"]: of_task(task) for task in found}
    for script, env_id in itertools.product(find_scripts(args.scripts), args.env_ids):
        name = f"{script.stem}-{env_id.replace('/', '-').replace(':', '-')}"
        chosen[name] = (script, ["--env-id", env_id])
        if script in OWN and name in known and chosen[name] != of_task(known[name]):
            sys.exit(f"error: {name} is a task with flags of its own, name it to run it")
    if not chosen:
        sys.exit(f"error: name a task, a group ({', '.join(groups)}) or --scripts and --env-ids")
    # Seeds outside, so that every task has a first curve before any has a second.
    return [
        Job(name, script, flags + args.flags, seed, args)
        for seed in args.seeds
        for name, (script, flags) in chosen.items()
    ]


def of_task(task):
    """The script of a task, which is the repository's own, and its flags."""
    script, *flags = shlex.split(task["command"])
    return records.ROOT / script, flags


def find_scripts(names):
    """Paths of scripts that can be run and recorded; ends with one line if one cannot."""
    scripts = []
    for name in names:
        try:
            scripts.append(records.find_script(name))
            records.load_script(scripts[-1])
        except ValueError as error:
            sys.exit(f"error: {error}")
    stems = [script.stem for script in scripts]
    if len(set(stems)) < len(stems):
        sys.exit(f"error: two of {', '.join(map(str, scripts))} have the same name")
    return scripts


def run_here(jobs, count):
    """Runs the jobs in processes, `count` at a time -> their exit codes."""
    stopping = threading.Event()

    def run(job):
        if stopping.is_set():
            return "not started"
        print(f"{job} begins, log {job.folder / 'log.txt'}", flush=True)
        code = job()
        print(f"{job} ended with exit code {code}", flush=True)
        return code

    def interrupt(*_):
        stopping.set()
        for job in jobs:
            job.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        return [result(future.result) for future in futures]


def run_on_cluster(jobs, args):
    """Hands the jobs to submitit -> their exit codes."""
    try:
        import submitit
    except ImportError:
        sys.exit("error: --cluster needs pip install submitit")
    # The jobs begin in processes that must find `records` as well.
    found = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(found)
    executor = submitit.AutoExecutor(args.out / "submitit", cluster=args.cluster)
    options = dict(option.split("=", 1) for option in args.cluster_options)
    options = {k: int(v) if v.isdecimal() else v for k, v in options.items()}
    executor.update_parameters(name="dreamer", **{"slurm_array_parallelism": args.jobs} | options)
    with executor.batch():
        handles = [executor.submit(job) for job in jobs]
    for job, handle in zip(jobs, handles, strict=True):
        print(f"{job} is job {handle.job_id}, logs {handle.paths.folder}", flush=True)
    return [result(handle.result) for handle in handles]


def result(get):
    """A job's exit code, or the exception that ended it."""
    try:
        return get()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", help="tasks or groups of benchmarks/tasks.yaml")
    parser.add_argument("--scripts", nargs="+", default=[], metavar="FILE.py")
    parser.add_argument("--env-ids", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--pin", action="store_true", help="record in benchmarks/curves")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    parser.add_argument("--cluster", choices=["slurm", "local"], help="launch through submitit")
    parser.add_argument("--cluster-options", nargs="+", default=[], metavar="KEY=VALUE")
    argv = sys.argv[1:] if argv is None else argv
    mine = list(itertools.takewhile(lambda word: word != "--", argv))
    args = parser.parse_args(mine)
    args.flags = argv[len(mine) + 1 :]
    args.out = args.out.resolve()
    args.curves = records.CURVES if args.pin else args.out / "curves"
    if len(set(args.seeds)) < len(args.seeds):
        sys.exit(f"error: --seeds {' '.join(map(str, args.seeds))} has one twice")
    if wrong := [option for option in args.cluster_options if "=" not in option]:
        sys.exit(f"error: --cluster-options {wrong[0]} is not KEY=VALUE")
    if args.out.exists() and not args.out.is_dir():
        sys.exit(f"error: --out {args.out} is no folder")
    if args.jobs < 1:
        sys.exit(f"error: --jobs is {args.jobs}, it must be at least 1")

    jobs = plan(args)
    for job in jobs:
        job.check()
    todo = [job for job in jobs if not job.finished()]
    if args.dry_run:
        for job in todo:
            print(f"cd {job.folder} && {shlex.join(job.command())}")
        return 0
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        if job.finished() and (args.pin or not job.recorded()):
            try:
                job.record()  # --pin puts it in place of an earlier run of its seed
            except ValueError as error:
                sys.exit(f"error: {error}")
    codes = run_on_cluster(todo, args) if args.cluster else run_here(todo, args.jobs)
    failed = [(job, code) for job, code in zip(todo, codes, strict=True) if code != 0]
    for job, code in failed:
        print(f"failed: {job} ({code}), log {job.folder / 'log.txt'}", file=sys.stderr)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs are finished, curves in {args.curves}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
