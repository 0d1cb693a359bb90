"""The tools around the curves: run.py, check.py and plot.py."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import check
import numpy as np
import plot
import pytest
import records
import run
import yaml

import common
import dreamerv1
import dreamerv2
import runtime

SCRIPTS = {"dreamerv1": dreamerv1, "dreamerv2": dreamerv2}
ROOT = Path(__file__).parent.parent
TINY = [
    "--batch-size", "3", "--batch-length", "7", "--deter", "16", "--hidden", "16", "--units", "16",
    "--stoch", "3", "--cnn-depth", "2", "--imag-horizon", "3", "--prefill", "100",
    "--pretrain", "2", "--replay-size", "1000", "--eval-episodes", "1", "--threads", "1",
    "--log-every", "100",
]  # fmt: skip


def write_curve(path, seeds, frames=10_000, untrained=20.0):
    """A curve whose seeds, {seed: return}, play 100-frame episodes and are evaluated 10 times."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(records.COLUMNS)
        for seed, value in seeds.items():
            for frame in range(100, frames + 1, 100):
                ret = untrained if frame <= 1000 else value
                point = ("dreamerv2", "abc", "CartPole-v1", seed, frame, max(0, frame - 1000))
                writer.writerow((*point, ret, "train", 0.1))
                if frame % 1000 == 0:
                    writer.writerow((*point, ret, "eval", 0.1))
    return path


def curves_of(path):
    return [*records.read_curve(path).values()]


# Statistics


def test_the_tail_is_the_mean_of_the_evaluations_in_the_last_tenth():
    row = {"kind": "eval", "updates": 1}
    rows = [row | {"env_frames": f, "episode_return": f / 10} for f in range(0, 1001, 50)]
    train = [row | {"kind": "train", "env_frames": f, "episode_return": -9} for f in range(1000)]
    assert records.tail(rows + train, 1000) == np.mean([90, 95, 100])
    assert records.tail(rows + train, 500) == np.mean([45, 50])
    assert records.tail(rows + train, 495) == np.mean([45, 50])  # an episode late
    few = [row | {"env_frames": f, "episode_return": f / 10} for f in (500, 1000)]
    assert records.tail(few + train, 800) == 50  # the last one before
    assert records.tail(few + train, 800, "train") == -9
    assert records.evaluated(few, 500)
    assert not records.evaluated(few, 400)


def test_the_area_weighs_an_episode_by_its_frames():
    rows = [(10, 1.0, "train"), (40, 2.0, "train"), (40, 99.0, "eval"), (100, 3.0, "train")]
    keys = ["env_frames", "episode_return", "kind"]
    rows = [dict(zip(keys, row, strict=True)) for row in rows]
    assert records.area(rows, 100) == pytest.approx((10 * 1 + 30 * 2 + 60 * 3) / 100)
    assert records.area(rows, 50) == pytest.approx((10 * 1 + 30 * 2) / 40)


def test_the_limit_is_that_of_the_formula(tmp_path):
    pinned = curves_of(write_curve(tmp_path / "a.csv", {1: 300.0, 2: 400.0, 3: 500.0}))
    new = curves_of(write_curve(tmp_path / "b.csv", {1: 10.0, 2: 30.0}))
    tail, area = check.compare(pinned, new, alpha=0.1)
    assert (tail["pinned"], tail["spread"], tail["new"]) == (400, 100, 20)
    # Student's 95 % quantile for 2 degrees of freedom is 2.9200.
    assert tail["limit"] == pytest.approx(400 - 2.92 * 100 * (1 / 3 + 1 / 2) ** 0.5, abs=0.01)
    assert tail["short"]
    assert not tail["blind"]
    assert area["pinned"] == pytest.approx(0.9 * 400 + 0.1 * 20)


def test_the_spread_is_at_least_a_twentieth_of_what_was_gained(tmp_path):
    pinned = curves_of(write_curve(tmp_path / "a.csv", {1: 500.0, 2: 500.0, 3: 500.0}))
    tail, _ = check.compare(pinned, pinned)
    assert tail["spread"] == pytest.approx(0.05 * 480)


def test_a_shorter_curve_is_compared_with_the_beginning_of_the_pinned_ones(tmp_path):
    pinned = curves_of(write_curve(tmp_path / "a.csv", {1: 500.0, 2: 500.0}))
    new = curves_of(write_curve(tmp_path / "b.csv", {1: 0.0}, frames=1000))
    tail, area = check.compare(pinned, new)
    assert tail["frames"] == 1000
    assert tail["pinned"] == tail["new"] == area["pinned"] == 20


@pytest.mark.parametrize("count", [1, 3])
def test_an_unchanged_algorithm_is_accused_in_no_more_than_alpha_of_the_tasks(count, tmp_path):
    random, accused, tasks = np.random.default_rng(count), 0, 2000
    rows = curves_of(write_curve(tmp_path / "a.csv", {1: 0.0}, frames=2000, untrained=0.0))[0]

    def seeds(number):
        for _ in range(number):
            value = random.normal(400, 60)
            yield [row | {"episode_return": value * (row["updates"] > 0)} for row in rows]

    for _ in range(tasks):
        results = check.compare([*seeds(3)], [*seeds(count)], alpha=0.05)
        accused += any(r["short"] for r in results)
    # The two statistics go together here, so that the rate is alpha / 2; 4 standard errors.
    assert 0.025 - 0.014 < accused / tasks < 0.025 + 0.014


def test_check_ends_with_1_and_names_the_task_that_fell_short_and_by_how_much(tmp_path, capsys):
    for name in ("good", "bad"):
        write_curve(tmp_path / "pinned" / f"{name}.csv", {1: 490.0, 2: 500.0, 3: 495.0})
        value = {"good": 492.0, "bad": 25.0}[name]
        write_curve(tmp_path / "new" / f"{name}.csv", {1: value, 2: value})
    pinned = ["--pinned", str(tmp_path / "pinned")]
    assert check.main([str(tmp_path / "new" / "good.csv"), *pinned]) == 0
    assert check.main([str(tmp_path / "new"), *pinned]) == 1
    out, err = capsys.readouterr()
    assert err.strip() == "fell short: bad"
    (line,) = [line for line in out.splitlines() if line.startswith("bad") and "tail" in line]
    limit = float(line.split("limit ")[1].split(":")[0])
    assert float(line.split("SHORT by ")[1]) == pytest.approx(limit - 25, abs=0.11)


def test_check_says_where_it_cannot_tell(tmp_path, capsys):
    write_curve(tmp_path / "pinned" / "a.csv", {1: 100.0, 2: 500.0})
    new = write_curve(tmp_path / "a.csv", {1: 20.0})
    assert check.main([str(new), "--pinned", str(tmp_path / "pinned")]) == 0
    assert "cannot tell, random play with 20.0 would pass" in capsys.readouterr().out


def test_curves_are_cut_to_the_shortest_and_like_is_compared_with_like(tmp_path):
    pinned = curves_of(write_curve(tmp_path / "a.csv", {1: 500.0, 2: 500.0}))
    long = curves_of(write_curve(tmp_path / "b.csv", {1: 400.0}, frames=30_000))
    assert check.compare(pinned, long)[0]["frames"] == 10_000
    without = [[row for row in rows if row["kind"] == "train"] for rows in long]
    for row in (row for rows in pinned for row in rows if row["kind"] == "eval"):
        row["episode_return"] = 9999.0  # which no training episode has
    assert check.compare(pinned, long)[0]["pinned"] == 9999
    assert check.compare(pinned, without)[0]["pinned"] == 500


def test_what_cannot_be_compared_is_named_and_the_rest_is_checked(tmp_path, capsys):
    write_curve(tmp_path / "pinned" / "a.csv", {1: 490.0})
    write_curve(tmp_path / "pinned" / "c.csv", {1: 490.0, 2: 491.0})
    for name in "abc":
        write_curve(tmp_path / "new" / f"{name}.csv", {1: 490.0})
    assert check.main([str(tmp_path / "new"), "--pinned", str(tmp_path / "pinned")]) == 2
    out, err = capsys.readouterr()
    assert "a.csv cannot be checked: 1 pinned seeds" in err
    assert "b.csv cannot be checked: there is no pinned curve" in err
    assert [line[:2] for line in out.splitlines()] == ["c ", "c "]
    assert check.main(["--pinned", str(tmp_path / "new" / "nowhere")]) == 1


@pytest.mark.parametrize("what", ["missing.csv", "."])
def test_check_of_nothing_is_refused_in_one_line(what, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "check.py"), str(tmp_path / what)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr


# What is pinned


def test_the_pinned_curves_are_whole_and_as_their_cards_say(tmp_path):
    assert check.main([]) == 0
    for path in records.CURVES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "dreamerv2-CartPole-v1"
    card = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    card["runs"][1]["final_eval_return"] += 1
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(card))
    (tmp_path / "dreamerv1-CartPole-v1.yaml").unlink()
    wrong = check.check_pinned(tmp_path)
    assert len(wrong) == 2
    assert "dreamerv1-CartPole-v1: a curve or a card is missing" in wrong
    assert f"{name} seed 2: the curve ends with" in wrong[1]


def args_of(task):
    script = SCRIPTS[task["script"]]
    argv = task["command"].split()[1:]
    return runtime.parse_args(script.Args, script.PRESETS, common.choose_preset, argv)


def test_each_card_has_the_hyperparameters_of_its_task():
    for task in plot.pinned(records.CURVES):
        told, args = task["card"]["args"], vars(args_of(task))
        told["env_id"] = told["env_id"].replace("benchmarks.worlds:", "benchmarks.recipes:")
        assert len(set(told) & set(args)) > 50  # of older commits, some flags are gone or lacking
        differing = {k for k in set(told) & set(args) if told[k] != args[k]}
        assert not differing, task["name"]
        words = ["python", *records.launcher(task.get("processes", 1)), f"{task['script']}.py "]
        assert task["card"]["command"].startswith(" ".join(words))


def test_the_tables_of_results_are_those_of_the_curves():
    tasks = list(plot.pinned(records.CURVES))
    assert len(tasks) >= 5
    main = [task for task in tasks if task["group"] in ("cpu", "gpu")]
    results = (ROOT / "docs" / "results.md").read_text()
    assert plot.between(results, "results") == plot.table(main, "../benchmarks/") + "\n"
    assert (ROOT / "benchmarks" / "README.md").read_text() == plot.report(tasks)


def test_every_plot_that_is_shown_is_drawn_and_committed(tmp_path):
    tasks = list(plot.pinned(records.CURVES))
    plot.main(["--out", str(tmp_path), "--curves", str(records.CURVES)])
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn >= {f"{task['name']}.png" for task in tasks} | {"overview.png"}
    shown = {line.split("plots/")[1][:-1] for line in plot.report(tasks).splitlines()
             if line.startswith("![")}  # fmt: skip
    assert shown == drawn
    assert all((ROOT / "benchmarks" / "plots" / name).exists() for name in shown)


def test_the_authors_figures_have_a_source_and_lie_between_their_extremes():
    with open(ROOT / "benchmarks" / "published.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(r["min"]) <= float(r["median"]) <= float(r["max"]) for r in rows)
    assert all(r["source"].startswith("danijar/") and ".json" in r["source"] for r in rows)
    known = {(r["script"], r["env_id"]) for r in rows}
    for task in records.tasks().values():
        assert not task.get("published") or (task["script"], task["env_id"]) in known, task["name"]


# Runs


def test_a_dry_run_prints_scripts_times_ids_times_seeds(tmp_path, capsys):
    ids = ["CartPole-v1", "dm_control/walker-walk-v0"]
    argv = ["--scripts", "dreamerv1", "dreamerv2", "--env-ids", *ids, "--seeds", "1", "5"]
    argv += ["--dry-run"]
    assert run.main([*argv, "--out", str(tmp_path), "--", "--units", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert len(set(lines)) == 8
    assert all(line.endswith(("--units 32 --seed 1", "--units 32 --seed 5")) for line in lines)
    assert not list(tmp_path.iterdir())


def test_each_task_is_a_command_that_its_script_accepts():
    for task in records.tasks().values():
        assert args_of(task).env_id == task["env_id"]
        assert task["group"] in plot.GROUPS
        assert not (base := task.get("horizon_of")) or base in records.tasks()


def grid(tmp_path, *more, seeds=("1", "2"), env="CartPole-v1", frames=400):
    argv = ["--scripts", "dreamerv2", "--env-ids", env, "--seeds", *seeds, "--jobs", "2"]
    argv += ["--out", str(tmp_path), *more, "--", *TINY, "--total-frames", str(frames)]
    return [sys.executable, str(ROOT / "benchmarks" / "run.py"), *argv]


@pytest.mark.slow
def test_a_grid_runs_once_and_records_a_curve_and_a_card_of_all_seeds(tmp_path):
    first = subprocess.run(grid(tmp_path), capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    path = tmp_path / "curves" / "dreamerv2-CartPole-v1.csv"
    curves, card = records.read_curve(path), yaml.safe_load(path.with_suffix(".yaml").read_text())
    assert list(curves) == [1, 2] == [entry["seed"] for entry in card["runs"]]
    for entry, rows in zip(card["runs"], curves.values(), strict=True):
        last = [row for row in rows if row["kind"] == "eval"][-1]
        assert last["env_frames"] == entry["env_frames"] == 400
        assert records.rounded(last["episode_return"]) == entry["final_eval_return"]
        assert entry["commit"].rstrip("+") == records.commit().rstrip("+")
    assert card["command"].startswith("python dreamerv2.py --env-id CartPole-v1 --total-frames 400")
    assert card["command"].endswith("--seed SEED")
    assert "--units 16" in card["command"]
    before = path.read_bytes()
    again = subprocess.run(grid(tmp_path), capture_output=True, text=True)
    assert again.returncode == 0
    assert "2 of 2 runs are finished" in again.stdout
    assert "begins" not in again.stdout
    assert path.read_bytes() == before
    for file in path.parent.iterdir():
        file.unlink()
    assert subprocess.run(grid(tmp_path), capture_output=True).returncode == 0
    assert path.read_bytes() == before  # recorded from the run folders, without a run
    other = subprocess.run(grid(tmp_path, frames=500), capture_output=True, text=True)
    assert other.returncode == 1
    assert "--total-frames 400 --seed 1, choose another --out" in other.stderr


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_log_and_the_others_go_on(tmp_path):
    command = grid(tmp_path, seeds=("1",))
    command.insert(command.index("CartPole-v1") + 1, "NoSuch-v7")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("failed: dreamerv2-NoSuch-v7 seed 1 (2), log ")
    assert "no NoSuch-v7" in Path(line.split("log ")[1]).read_text()
    assert (tmp_path / "curves" / "dreamerv2-CartPole-v1.csv").exists()


@pytest.mark.slow
def test_an_interrupted_grid_saves_its_runs_and_goes_on_where_it_stopped(tmp_path):
    command = grid(tmp_path, seeds=("3",), frames=1500)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "dreamerv2-CartPole-v1" / "seed-3"
    deadline = time.monotonic() + 120
    while not any("losses" in path.read_text() for path in log.glob("run/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "seed 3" in err
    assert (log / "run" / "checkpoint.pt").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    lines = (log / "log.txt").read_text().splitlines()
    began = [line for line in lines if line.startswith("$")]
    assert len(began) == 2
    assert began[0] == began[1]  # one command begins the run and goes on with it
    assert "a new run begins in run" in lines
    assert "the run in run goes on" in lines
    curves = records.read_curve(tmp_path / "curves" / "dreamerv2-CartPole-v1.csv")
    assert records.last_frame(curves[3]) == 1500
    frames = [row["env_frames"] for row in curves[3] if row["kind"] == "train"]
    assert frames == sorted(set(frames))


@pytest.mark.slow
def test_submitit_launches_the_same_grid(tmp_path):
    command = grid(tmp_path, "--cluster", "local", "--cluster-options", "timeout_min=5")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "submitit").glob("*_log.out"))
    curves = records.read_curve(tmp_path / "curves" / "dreamerv2-CartPole-v1.csv")
    assert list(curves) == [1, 2]


def job_of(tmp_path, command):
    args = SimpleNamespace(curves=tmp_path, out=tmp_path, jobs=1, cluster=None)
    job = run.Job("a", ["dreamerv2.py", "--env-id", "CartPole-v1"], 1, args)
    job.command = lambda: command
    return job


def test_a_job_that_submitit_stops_from_a_signal_handler_is_queued_again(tmp_path):
    job, again = job_of(tmp_path, ["sleep", "60"]), []
    handler = signal.signal(signal.SIGUSR2, lambda *_: again.append(job.checkpoint()))
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    began = time.monotonic()
    try:
        assert job() != 0
    finally:
        signal.signal(signal.SIGUSR2, handler)
    assert time.monotonic() - began < 30
    assert again[0].function is job
    assert (job.process, job.stopped) == (None, False)


def test_a_stop_before_the_process_has_begun_is_not_lost(tmp_path):
    job = job_of(tmp_path, ["sleep", "60"])
    job.stop()
    began = time.monotonic()
    assert job() != 0
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("saved", ["checkpoint.pt", "checkpoint.old.pt", None])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path, saved):
    job = job_of(tmp_path, ["true"])
    job.record = lambda: None
    job.run.mkdir(parents=True)
    (job.run / "args.yaml").touch()
    (job.run / "checkpoint.new.pt").touch()  # half written
    if saved:
        (job.run / saved).touch()
    assert job() == 0
    assert job.run.exists() == (saved is not None)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["nonsense"], "no task nonsense"),
        ([], "name a task, a group"),
        (["cpu", "--jobs", "0"], "--jobs is 0"),
        (["--scripts", "dreamerv1", "--env-ids", "dm_control/cartpole-balance-v0"], "of its own"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(argv, text, capsys):
    with pytest.raises(SystemExit) as exit_:
        run.main(argv)
    assert text in str(exit_.value)
    assert "\n" not in str(exit_.value)
