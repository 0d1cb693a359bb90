"""Runs of DreamerV3: that it learns, goes on where it stopped, and shares its work.

What is of runtime.py and common.py alone is tested with the other scripts.
"""

import math

import pytest
import torch
from helpers.processes import finish, start
from helpers.runs import (
    TINY_V3, UNCLOSED, checkpoint, counters, metrics, module_of, parse, play, run, signal_after,
    the_error, the_run, values, without_clock,
)  # fmt: skip

import common
import dreamerv3

pytestmark = pytest.mark.usefixtures("no_estimate")

SCRIPT = "dreamerv3.py"
TINY = f"{TINY_V3} --imag-horizon 3 --total-frames 300 --log-every 50 --eval-every 100"
TINY += " --video-every 150"


@pytest.mark.parametrize("flags", [
    "--env-id CartPole-v1", "--env-id Pendulum-v1 --time-limit 60",
    "--env-id CartPole-v1 --num-envs 3",
    pytest.param("--env-id CartPole-v1 --pixels", marks=pytest.mark.slow),
    pytest.param("--env-id Pendulum-v1 --precision bfloat16", marks=pytest.mark.slow),
    pytest.param("--env-id CartPole-v1 --observation both --async-envs --num-envs 2",
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_makes_updates_with_finite_losses_from_the_first_batch_on(flags, place):
    folder = play(SCRIPT, f"{TINY} {flags}")
    rows = metrics(folder)
    tags = set().union(*rows)
    parts = ("model", "reward", "discount", "dyn", "rep", "actor", "critic", "replay_critic")
    assert tags >= {f"losses/{part}" for part in parts} | {"eval/episodic_return"}
    assert all(math.isfinite(value) for row in rows for value in row.values())
    args = parse(SCRIPT, f"{TINY} {flags}")
    step, updates = counters(folder)
    assert updates == dreamerv3.updates_owed(step, args) > 10
    first = min(row["frames"] for row in rows if row["updates"])
    assert dreamerv3.first_update(args) <= first <= 50
    windows = step // args.num_envs // args.batch_length * args.num_envs
    assert (
        windows - 3 <= checkpoint(folder)["replay"]["taken"] <= windows + 1
    )  # each came first once


@pytest.mark.parametrize(
    ("env_id", "where"), [("MountainCar-v0", "update"), ("Pendulum-v1", "receive")]
)
def test_a_run_that_is_stopped_and_resumed_has_the_metrics_of_one_that_was_not(
    env_id, where, tmp_path, monkeypatch
):
    """Both end their episodes as truncated after frame 24, by a time limit of 8 frames."""
    flags = f"{TINY} --env-id {env_id} --time-limit 8 --train-ratio 42 --total-frames 32"
    flags += " --log-every 4 --eval-every 20"
    count = iter(range(1, 10_000))
    if where == "update":
        args = parse(SCRIPT, flags)
        last = dreamerv3.updates_owed(24, args) - 1  # two are due after each step
        stop = signal_after(module_of(SCRIPT), "update", lambda *_: next(count) == last)
    else:
        stop = signal_after(
            common.Envs, "receive", lambda envs: envs.num_envs == 1 and next(count) == 3 * 9
        )
    folders = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "whole":
            folders.append(play(SCRIPT, flags).resolve())
            continue
        with stop:
            folder = play(SCRIPT, flags, 143)
        assert counters(folder)[0] == 24
        play(SCRIPT, f"--resume {folder}")
        folders.append(folder.resolve())
    whole, stopped = (without_clock(metrics(folder)) for folder in folders)
    assert whole[-1]["frames"] == 32
    assert stopped == whole  # to the last bit
    weights = [checkpoint(folder)["agent"] for folder in folders]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_an_agent_is_evaluated_with_samples_or_the_mode(place, capsys):
    folder = play(SCRIPT, f"{TINY} --env-id Pendulum-v1 --time-limit 60")
    results = []
    for flags in ("", "--no-eval-sample"):
        capsys.readouterr()
        assert run(SCRIPT, f"--evaluate {folder} {flags}") == 0
        results.append(capsys.readouterr().out)
    assert results[0] != results[1]
    last = values(folder, "eval/episodic_return")[-1][1]
    assert float(results[0].split()[1]) == pytest.approx(last, abs=0.06)


@UNCLOSED
def test_a_loss_that_is_not_finite_stops_the_run_before_the_next_checkpoint(place, capsys):
    """The second update moves the weights by 1e9, and the gradients of the third have no number."""
    flags = "--env-id CartPole-v1 --lr 1e9 --warmup 1 --checkpoint-every 20 --eval-every 0"
    folder = play(SCRIPT, f"{TINY} {flags}", 1)
    saved = checkpoint(folder)
    assert saved["counters"]["step"] == 40
    assert all(torch.isfinite(weight).all() for weight in saved["agent"].values())
    assert the_error(capsys.readouterr().err).startswith("error: not finite at update 2: ")


@pytest.mark.slow
def test_two_processes_count_steps_and_updates_together(tmp_path):
    flags = f"{TINY} --env-id CartPole-v1 --batch-size 4"
    finish(start(SCRIPT, flags, tmp_path, torchrun="--nproc-per-node 2"))
    folder = the_run(tmp_path)
    step, updates = counters(folder)
    assert step >= 300
    args = parse(SCRIPT, f"{flags} --num-envs 2")
    assert abs(updates - dreamerv3.updates_owed(step, args)) <= 1
    assert {"rank1", "replay"} <= {path.name for path in folder.iterdir()}
