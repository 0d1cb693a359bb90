"""A run that was stopped, or killed, goes on as if nothing had happened."""

import itertools
import os
import signal

import numpy as np
import pytest
from helpers.processes import finish, start, wait_until
from helpers.runs import (
    EVERY_SCRIPT, TINY, TINY_V3, checkpoint, counters, metrics, module_of, play, run, signal_after,
    the_error, the_run, without_clock,
)  # fmt: skip
from helpers.users import Basic, register
from kill_often import kill_often

import common

pytestmark = pytest.mark.usefixtures("no_estimate")

TINY = f"{TINY} --imag-horizon 3 --train-every 50"
FLAGS = {"dreamerv1.py": f"{TINY} --train-steps 4", "dreamerv2.py": f"{TINY} --slow-update 3"}
FLAGS["dreamerv3.py"] = f"{TINY_V3} --imag-horizon 3"


def in_folder(name, monkeypatch, tmp_path):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)


STOPS = [
    ("dreamerv1.py", "MountainCar-v0", "update"),
    ("dreamerv1.py", "Pendulum-v1", "receive"),
    ("dreamerv2.py", "MountainCar-v0", "update"),
    ("dreamerv2.py", "Pendulum-v1", "receive"),
    pytest.param("dreamerv1.py", "MountainCar-v0 --pixels", "update", marks=pytest.mark.slow),
    pytest.param("dreamerv2.py", "Pendulum-v1 --pixels", "receive", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("script", "kind", "where"), STOPS)
def test_a_run_that_is_stopped_and_resumed_has_the_metrics_of_one_that_was_not(
    script, kind, where, tmp_path, monkeypatch
):
    """Both end their episodes as truncated after frame 300: one by its time limit of 50 frames."""
    flags = f"{FLAGS[script]} --env-id {kind} --time-limit 50 --log-every 50 --eval-every 100"
    flags += " --video-every 100 --total-frames 500"
    calls = itertools.count(1)
    if where == "update":
        # Ten updates are due after frame 300, and the ninth one is interrupted.
        stop = signal_after(module_of(script), "update", lambda *_: next(calls) == 9)
        updates = 9
        if script == "dreamerv2.py":  # it has bursts of several only when learning begins
            flags += " --prefill 300 --pretrain 9"
    else:
        # The row of frame 300, after six episodes with a reset and 50 steps each; evaluation
        # has two environments.
        stop = signal_after(
            common.Envs, "receive", lambda envs: envs.num_envs == 1 and next(calls) == 6 * 51
        )
        updates = 6 if script == "dreamerv1.py" else 4
    in_folder("whole", monkeypatch, tmp_path)
    whole = metrics(play(script, flags))
    in_folder("stopped", monkeypatch, tmp_path)
    with stop:
        folder = play(script, flags, 143)
    saved = {"step": 300, "updates": updates, "last_report": 299}
    assert checkpoint(folder)["counters"] == saved
    play(script, f"--resume {folder}")
    assert whole[-1]["frames"] == 500
    assert without_clock(metrics(folder)) == without_clock(whole)  # to the last bit


@pytest.mark.parametrize(
    ("script", "step"), [("dreamerv1.py", 120), ("dreamerv2.py", 134), ("dreamerv3.py", 134)]
)
def test_environments_that_a_stop_breaks_off_are_truncated_and_nothing_else_changes(
    script, step, tmp_path, monkeypatch
):
    """The reference run takes all of its three environments as done after that step."""
    receive = common.Envs.receive
    flags = f"{FLAGS[script]} --env-id CartPole-v1 --num-envs 3 --log-every 50"
    flags += " --eval-every 100 --checkpoint-every 130 --total-frames 600"
    rows = []

    def interfere(envs):
        row, episodes = receive(envs)
        if envs.num_envs == 3 and next(steps) == step:
            assert not envs.all_ended
            if name == "stopped":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                envs.ended = np.ones(3, bool)
        return row, episodes

    for name, code in (("whole", 0), ("stopped", 143)):
        steps = itertools.count(1)
        in_folder(name, monkeypatch, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(common.Envs, "receive", interfere)
            folder = play(script, flags, code)
        if name == "stopped":
            play(script, f"--resume {folder}")
        rows.append(without_clock(metrics(folder)))
    assert rows[0][-1]["frames"] >= 600
    assert rows[0] == rows[1]


@EVERY_SCRIPT
def test_however_often_a_run_is_stopped_its_log_has_each_row_once(script, place, monkeypatch):
    """Stops, a kill's lost rows, a failed evaluation, and resumes after the end."""
    evaluate = common.evaluate
    calls = itertools.count(1)
    flags = f"{FLAGS[script]} --env-id CartPole-v1 --log-every 50 --eval-every 100"

    def failing(*args, **kwargs):
        monkeypatch.setattr(common, "evaluate", evaluate)
        raise ChildProcessError("the environment failed")

    with signal_after(module_of(script), "update", lambda *_: next(calls) % 3 == 0):
        code = run(script, f"{flags} --total-frames 400")
        folder = the_run()
        for attempt in range(40):
            if code == 0:
                break
            assert code in (1, 143)
            with open(folder / "metrics.jsonl", "a") as file:
                file.write('{"frames": 999}\n{"fra')  # as if killed after a few more rows
            if attempt == 4:
                monkeypatch.setattr(common, "evaluate", failing)
            code = run(script, f"--resume {folder}")
    assert code == 0
    for _ in range(2):
        play(script, f"--resume {folder}")
    rows = [(row["frames"], row["updates"], *sorted(row)) for row in metrics(folder)]
    assert rows[-1][0] == 400
    assert len(set(rows)) == len(rows)
    assert rows == sorted(rows, key=lambda row: row[:2])
    assert len([row for row in rows if "losses/model" in row]) >= 4


def test_a_run_remembers_how_far_it_was_told_to_go(script, place):
    folder = play(script, f"{FLAGS[script]} --env-id CartPole-v1 --total-frames 210")
    calls = itertools.count(1)
    with signal_after(module_of(script), "update", lambda *_: next(calls) == 1):
        play(script, f"--resume {folder} --total-frames 300 --log-every 10", 143)
    play(script, f"--resume {folder}")
    rows = metrics(folder)
    assert rows[-1]["frames"] == 300
    assert len([row for row in rows if row["frames"] > 210 and "losses/kl" in row]) == 9


@EVERY_SCRIPT
def test_there_is_a_checkpoint_from_the_first_moment_on_and_one_that_is_due_precedes_an_evaluation(
    script, place, monkeypatch
):
    seen = {"update": [], "evaluate": []}

    def spy(owner, name):
        original = getattr(owner, name)

        def seeing(*args, **kwargs):
            seen[name].append(checkpoint(the_run())["counters"])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, seeing)

    spy(common, "evaluate")
    spy(module_of(script), "update")
    flags = f"{FLAGS[script]} --env-id {register(Basic)} --total-frames 80"
    if script != "dreamerv3.py":
        flags += " --prefill 40"
    play(script, f"{flags} --checkpoint-every 60 --eval-every 20")
    assert seen["update"][0] == {"step": 0, "updates": 0, "last_report": 0}
    assert [saved["step"] for saved in seen["evaluate"]][-3:] == [0, 60, 80]


# Kills
@pytest.mark.slow
@pytest.mark.parametrize("script", ["dreamerv2.py", "dreamerv3.py"])
def test_a_run_that_is_killed_at_random_moments_loses_nothing_that_it_saved(script, tmp_path):
    flags = f"{FLAGS[script]} --env-id CartPole-v1 --total-frames 3000 --replay-size 1200"
    flags += " --checkpoint-every 100 --eval-every 200 --log-every 100"
    folder, seen = kill_often(script, flags.split(), 4, tmp_path, steps=(310, 500))
    assert [phase for phase, *_ in seen] == ["receive", "update", "save_checkpoint", "evaluate"]
    assert seen[-1][2] > 0
    assert metrics(folder)[-1]["frames"] == 3000


@pytest.mark.slow
def test_a_second_process_in_a_run_folder_is_refused_until_the_first_one_is_dead(tmp_path):
    flags = f"{FLAGS['dreamerv2.py']} --env-id CartPole-v1 --checkpoint-every 210"
    first = start("dreamerv2.py", f"{flags} --total-frames 90000", tmp_path)
    try:
        wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
        folder = the_run(tmp_path)
        second = finish(start("dreamerv2.py", f"--resume {folder}", tmp_path), 2)
        said = f"error: another process trains in {folder}/replay"
        assert the_error(second.err).startswith(said)
        assert first.poll() is None
        evaluating = finish(start("dreamerv2.py", f"--evaluate {folder}", tmp_path))
        assert "in 2 episodes" in evaluating.out
    finally:
        first.kill()
        first.communicate()
    total = counters(folder)[0] + 5
    finish(start("dreamerv2.py", f"--resume {folder} --total-frames {total}", tmp_path))
