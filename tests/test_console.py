"""What a run says while it goes on: how long it takes, and how it ended."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import (
    EVERY_SCRIPT, TINY, TINY_V3, checkpoint, metrics, play, run, without_clock,
)  # fmt: skip

import runtime

ELSEWHERE = """import gymnasium as gym
gym.register("Short-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=5)
"""
CARTPOLE = f"--env-id CartPole-v1 {TINY} --total-frames 300 --eval-every 100 --log-every 50"
IN = {"dreamerv1.py": CARTPOLE, "dreamerv2.py": CARTPOLE}
IN["dreamerv3.py"] = CARTPOLE.replace(TINY, TINY_V3)


@EVERY_SCRIPT
def test_the_estimate_changes_no_weight_and_no_later_number(script, tmp_path, monkeypatch, capsys):
    folders = []
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        folders.append(play(script, IN[script]).resolve())
        monkeypatch.setattr(runtime, "print_estimate", lambda *inputs: None)
    assert capsys.readouterr().out.count(" updates to come, about ") == 1
    rows = [without_clock(metrics(folder)) for folder in folders]
    assert rows[0] == rows[1]
    weights = [checkpoint(folder)["agent"] for folder in folders]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@EVERY_SCRIPT
def test_the_estimate_counts_the_updates_that_the_run_then_makes(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = play(script, IN[script])
    said = [line for line in capsys.readouterr().out.splitlines() if "updates to come" in line]
    assert said[0].split()[0] == str(metrics(folder)[-1]["updates"])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (7, "about 7 seconds"), (119, "about 119 seconds"), (310, "about 5 minutes"),
        (6000, "about 100 minutes"), (7200, "about 2 hours"), (40 * 3600, "about 40 hours"),
        (50 * 86_400, "about 50 days"), (100 * 86_400, "about 3 months"),
        (800 * 86_400, "about 2 years"),
    ],
)  # fmt: skip
def test_a_duration_is_said_in_the_largest_unit_of_which_there_are_two(seconds, words):
    assert runtime.duration(seconds) == words


def test_the_bar_says_random_play_and_then_the_time_of_the_updates_to_come(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(runtime.time, "time", lambda: clock[0])
    args = {"track": False, "total_frames": 400}
    logger = runtime.Logger(tmp_path, args, total_updates=50)

    def bar(seconds, frames, updates):
        clock[0] = 1000.0 + seconds
        logger.progress(frames, updates)
        return str(logger.bar)

    assert "<?, " in bar(1, 100, 0)
    assert "<?, 100 frames/s, 0 updates, before learning]" in bar(2, 200, 0)
    assert "<?, 0 frames/s, 1 updates]" in bar(10, 200, 1)
    # It took 8 s for 4 updates, and 45 are to come.
    assert "<01:30, 0 frames/s, 5 updates]" in bar(18, 200, 5)
    assert "<01:28, 10 frames/s, 6 updates]" in bar(20, 300, 6)
    assert "<00:00, 2 frames/s, 50 updates]" in bar(110, 400, 50)
    assert "400/400" in bar(110, 407, 50)  # several environments step past the end
    logger.close()


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        ([499.0, 500.0], "return 499.5 +- 0.5 in 2 episodes, "),
        ([0.955, 0.945], "return 0.950 +- 0.005 in 2 episodes, "),
        ([-130.04, -150.0], "return -140.0 +- 10.0 in 2 episodes, "),
    ],
)
def test_small_returns_are_printed_with_more_digits(returns, said, tmp_path, capsys):
    runtime.print_evaluation(tmp_path / "run", np.array(returns), cut=0)
    assert capsys.readouterr().out.startswith(said)


def test_a_run_and_its_evaluation_end_with_return_episodes_and_folder(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = play("dreamerv2.py", CARTPOLE)
    ended = capsys.readouterr().out.splitlines()[-1]
    last = [r["eval/episodic_return"] for r in metrics(folder) if "eval/episodic_return" in r][-1]
    digits = 1 if last >= 10 else 3
    assert ended.startswith(f"return {last:.{digits}f} +- ")
    assert ended.endswith(f" in 2 episodes, {folder}")
    assert run("dreamerv2.py", f"--evaluate {folder}") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" in 2 episodes, {folder}")


@EVERY_SCRIPT
def test_an_evaluation_elsewhere_stands_beside_that_of_the_training(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    monkeypatch.syspath_prepend(tmp_path)
    folder = play(script, IN[script])
    returns = [r["eval/episodic_return"] for r in metrics(folder) if "eval/episodic_return" in r]
    capsys.readouterr()
    for flags in (
        ["--env-id", "elsewhere:Short-v0"],
        ["--env-kwargs", '{"sutton_barto_reward": true}'],
    ):
        evaluate = ["--evaluate", str(folder), "--eval-episodes", "3", *flags]
        assert run(script, evaluate) == 0
        line, head, first, second = capsys.readouterr().out.splitlines()
        assert line.endswith(f" in 3 episodes, {folder}")
        assert head.split() == ["return", "episodes"]
        was = {"--env-id": "CartPole-v1", "--env-kwargs": "{}"}[flags[0]]
        assert first.split() == ["learned", flags[0], was, f"{returns[-1]:.3f}", "2"]
        assert second.startswith(f"played    {flags[0]} {flags[1]} ")
        mean, episodes = second.split()[-2:]
        assert float(mean) == pytest.approx(float(line.split()[1]), abs=0.05)
        assert float(mean) == {"--env-id": 5, "--env-kwargs": -1}[flags[0]]
        assert episodes == "3"
    assert run(script, ["--evaluate", str(folder), "--env-id", "CartPole-v1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_lines_of_a_log_that_cannot_be_read_count_for_nothing(tmp_path):
    assert runtime.read_log(tmp_path) == []
    good = b'{"frames": 10, "eval/episodic_return": 4.5}'
    bad = [b"\xe4\xff", b"[1]", b"7", b'{"eval/epis']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*bad[:3], good, *bad[3:]]))
    assert runtime.read_log(tmp_path) == [{"frames": 10, "eval/episodic_return": 4.5}]


@pytest.mark.parametrize(("env_id", "said"), [
    ("Acrobot-v1", r"learned from vector \(4,\), Acrobot-v1 has vector \(6,\)"),
    ("Pendulum-v1", "--actor-dist onehot is not for Pendulum-v1's actions"),
])  # fmt: skip
def test_an_agent_is_not_played_where_its_observations_or_actions_do_not_fit(
    env_id, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = play("dreamerv2.py", CARTPOLE)
    capsys.readouterr()
    assert run("dreamerv2.py", ["--evaluate", str(folder), "--env-id", env_id]) == 2
    assert re.search(f"^error: .*{said}\n$", capsys.readouterr().err)


def test_the_command_to_go_on_names_the_interpreter_as_a_shell_would_find_it(monkeypatch):
    python = Path(sys.executable)
    monkeypatch.setenv("PATH", str(python.parent))
    assert runtime.resume_command(Path("runs/1"), "CartPole-v1").split()[0] == python.name
    monkeypatch.setenv("PATH", "/nowhere")
    assert runtime.resume_command(Path("runs/1"), "CartPole-v1").split()[0] == str(python)
