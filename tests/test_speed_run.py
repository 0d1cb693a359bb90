"""How whole runs are timed, part by part; a plan of workloads."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import speed
import speed_run

ROOT = Path(__file__).parent.parent


def test_seconds_count_for_the_innermost_part_but_an_evaluation_keeps_its_own(monkeypatch):
    clock = iter(range(0, 1000, 1))
    monkeypatch.setattr(time, "time", lambda: next(clock))  # each look at the clock takes a second
    owner = SimpleNamespace(step=lambda: None)
    owner.learn = lambda: owner.step()
    owner.evaluate = lambda: owner.step()
    shares = speed_run.Shares(began=0)
    shares.switch("else")
    shares.wrap(owner, "step", "environment")
    shares.wrap(owner, "learn", "learning")
    shares.wrap(owner, "evaluate", "evaluation")
    owner.learn()
    owner.evaluate()
    shares.switch("else")
    assert shares.seconds == {
        "import": 0, "else": 3, "learning": 2, "environment": 1, "evaluation": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_is_timed_from_its_cold_start_until_it_has_solved_its_task(monkeypatch):
    monkeypatch.setitem(speed_run.RUNS, "CartPole-v1", 5.0)  # the first evaluation passes it
    began = time.time()
    run = speed_run.time_ours(ROOT / "dreamerv2.py", "CartPole-v1", 1)
    took = time.time() - began
    assert run["return"] >= 5
    assert run["frames"] == 1000
    assert run["updates"] == 101
    assert run["parts"].keys() >= {"import", "environment", "learning", "evaluation", "logs"}
    # The parts leave nothing out: it is solved before its last save, and Python exits after it.
    assert run["seconds"] - 0.1 < sum(run["parts"].values()) < took
    assert run["parts"]["learning"] > run["parts"]["environment"]


def test_seeds_that_never_solve_a_task_are_named_beside_the_times_of_the_others(monkeypatch):
    def time_ours(script, env_id, seed, precision):
        solved = {"seconds": 10.0 * seed} if env_id == "CartPole-v1" and seed < 3 else {}
        return {"parts": {"evaluation": 1.0}, "args": {}} | solved

    monkeypatch.setattr(speed_run, "time_ours", time_ours)
    [report] = speed_run.measure(ROOT / "dreamerv3.py", [1, 2, 3], "float32")
    assert report["env_id"] == "CartPole-v1"
    assert report["unsolved"] == [3]
    assert report["median seconds"] == 15


def test_a_workload_whose_process_ends_is_reported_and_the_others_are_measured(
    monkeypatch, tmp_path, capsys
):
    def measure(name, args, **options):
        if name == "W1" and options["mode"] == "graph":
            raise ChildProcessError("a process ended: it cannot record")
        return {"workload": name} | options

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "show", lambda report: None)
    file = tmp_path / "gpu.json"
    args = SimpleNamespace(
        run=None, threads=1, mode=None, precision=None, scaling=None, gpu=True,
        workloads=["W1", "W2"], json=file,
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        speed.main(args)
    assert stop.value.code == 1
    reports = json.loads(file.read_text())["reports"]
    assert len(reports) == 2 * len(speed.GPU_MODES)
    failed = [report for report in reports if "error" in report]
    assert [(r["workload"], r["mode"], r["precision"]) for r in failed] == [
        ("W1", "graph", "bfloat16"), ("W1", "graph", "float32"),
    ]  # fmt: skip
    assert capsys.readouterr().out.count("it cannot record") == 2


def test_on_a_gpu_one_mode_or_precision_is_measured_alone_if_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "measure", lambda name, args, **options: options)
    monkeypatch.setattr(speed, "show", lambda report: None)
    file = tmp_path / "gpu.json"

    def measured(mode, precision):
        speed.main(SimpleNamespace(
            run=None, threads=1, mode=mode, precision=precision, scaling=None, gpu=True,
            workloads=["W1"], json=file,
        ))  # fmt: skip
        reports = json.loads(file.read_text())["reports"]
        return [(report["mode"], report["precision"]) for report in reports]

    assert measured("graph", None) == [("graph", "bfloat16"), ("graph", "float32")]
    assert measured("eager", "float32") == [("eager", "float32")]
    with pytest.raises(SystemExit, match="no --mode compile in float32"):
        measured("compile", "float32")
