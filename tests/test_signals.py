"""Ctrl-C, SIGTERM, SIGHUP and a terminal that goes away: a run saves itself, or ends at once."""

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers.envs import env_args, reset_rows, step
from helpers.processes import ROOT, finish, has_logged, start, wait_until
from helpers.runs import (
    EVERY_SCRIPT, ONE_SCRIPT, UNCLOSED, checkpoint, counters, metrics, module_of, play,
    signal_after, the_run, tiny, values,
)  # fmt: skip
from helpers.users import Endless, register

import common
import runtime

LONG = "--env-id CartPole-v1 --total-frames 100000 --log-every 50"


# The loop
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_a_second_ctrl_c_does_not(number, code):
    with runtime.Interrupt() as interrupt:
        assert interrupt.code == 0
        signal.raise_signal(number)
        assert interrupt.agreed() == interrupt.code == code
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_hangup_is_ignored_where_nohup_said_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with runtime.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGHUP)
        assert interrupt.agreed() == 0


def test_a_signal_says_at_once_what_will_happen(capfd):
    with runtime.Interrupt():
        signal.raise_signal(signal.SIGINT)
        said = capfd.readouterr().err
        assert "saves and ends after this step; one more Ctrl-C ends at once" in said


def test_a_failed_environment_ends_the_loop_with_a_line_and_code_1(capsys):
    with runtime.Interrupt() as interrupt:
        raise ChildProcessError("environment 3 failed")
    assert interrupt.code == 1
    assert capsys.readouterr().err == "error: environment 3 failed\n"
    with runtime.Interrupt() as interrupt:
        pass
    assert interrupt.code == 0
    for kind in (runtime.UserError, ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(kind), runtime.Interrupt():
            raise kind


def test_a_signal_that_ends_the_processes_of_environments_too_keeps_its_code(capfd):
    with runtime.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        raise ChildProcessError("its process died")
    assert interrupt.code == 143
    assert "error" not in capfd.readouterr().err


def test_a_process_that_an_environment_starts_ends_of_a_signal():
    with runtime.Interrupt():
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
        time.sleep(0.2)
        process.terminate()
        process.join(20)
        code = process.exitcode
        process.kill()
    assert code == -signal.SIGTERM


@pytest.mark.slow
def test_what_an_environment_in_a_process_starts_can_be_interrupted():
    envs = common.Envs(env_args("helpers.users:Starting-v0"), 1, parallel=True)
    reset_rows(envs)
    assert envs.vector.get_attr("ignores")[0] == [0, 0]
    os.kill(envs.vector.processes[0].pid, signal.SIGINT)
    step(envs, envs.random_actions())  # it was not disturbed
    envs.close()


# A run
@pytest.mark.parametrize(("script", "number", "code"), [
    ("dreamerv1.py", signal.SIGTERM, 143), ("dreamerv2.py", signal.SIGTERM, 143),
    ("dreamerv3.py", signal.SIGTERM, 143), ("dreamerv2.py", signal.SIGINT, 130),
])  # fmt: skip
def test_a_signal_ends_a_run_with_a_checkpoint_and_says_how_to_go_on(
    script, place, capsys, no_estimate, number, code
):
    calls = itertools.count(1)
    with signal_after(module_of(script), "update", lambda *_: next(calls) == 5, number):
        folder = play(script, f"{tiny(script)} {LONG} --eval-every 0", code)
    step, updates = counters(folder)
    assert updates == 5
    assert step - 50 < metrics(folder)[-1]["frames"] <= step
    [line] = [line for line in capsys.readouterr().out.splitlines() if "--resume" in line]
    assert f"--resume {folder}" in line


@pytest.mark.slow
@ONE_SCRIPT
def test_ctrl_c_in_a_terminal_lets_processes_of_environments_finish(script, tmp_path):
    flags = f"{tiny(script)} {LONG} --num-envs 2 --async-envs"
    process = start(script, flags, tmp_path, start_new_session=True)
    wait_until(lambda: has_logged(tmp_path, '"updates": 5'))
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process of the group
    finish(process, 130)
    assert counters(the_run(tmp_path))[1] >= 5


@UNCLOSED
@EVERY_SCRIPT
def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(script, place, monkeypatch, capsys):
    module = module_of(script)
    update = module.update
    calls = []

    def stop_at_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            calls.append("the first one lets the update go on")
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the update went on")
        return update(*args, **kwargs)

    monkeypatch.setattr(module, "update", stop_at_once)
    folder = play(script, f"{tiny(script)} {LONG}", 130)
    assert len(calls) == 5
    assert [path.name for path in folder.glob("checkpoint*")] == ["checkpoint.pt"]
    assert counters(folder) == (0, 0)
    assert "Traceback" not in capsys.readouterr().err


@EVERY_SCRIPT
def test_a_signal_breaks_off_an_evaluation_which_a_resumed_run_repeats(script, place, monkeypatch):
    flags = f"{tiny(script, 40)} --env-id {register(Endless)} --total-frames 80 --eval-every 60"
    steps = itertools.count(1)
    with signal_after(Endless, "step", lambda *_: next(steps) == 100):
        folder = play(script, flags, 143)
    saved = checkpoint(folder)["counters"]
    assert (saved["step"], saved["last_report"]) == (60, 59)
    assert not values(folder, "eval/episodic_return")
    monkeypatch.setattr(common, "EVAL_FRAMES", 30)
    play(script, f"--resume {folder}")
    assert [frames for frames, _ in values(folder, "eval/episodic_return")] == [60, 80]


def test_a_dropped_terminal_lets_a_run_save_itself(tmp_path):
    reader, writer = os.pipe()
    flags = f"{tiny('dreamerv2.py')} {LONG} --eval-every 0"
    process = start(
        "dreamerv2.py", flags, tmp_path, stdout=writer, stderr=writer,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    os.close(writer)
    wait_until(lambda: has_logged(tmp_path, "losses/model"))
    os.close(reader)  # from now on nothing that is printed arrives
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    assert counters(the_run(tmp_path))[1] > 0


@pytest.mark.slow
def test_a_run_needs_no_stderr(tmp_path):
    flags = f"{tiny('dreamerv2.py')} {LONG} --total-frames 210"
    command = f"{sys.executable} {ROOT / 'dreamerv2.py'} {flags} 2>&-"
    command = re.sub(r"\s+", " ", command)
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False).returncode == 0
    assert counters(the_run(tmp_path))[0] == 210
