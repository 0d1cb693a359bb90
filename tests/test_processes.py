"""What a process does that is one of several, shown without torchrun."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.envs import make_envs
from torch import distributed

import common
import runtime


def as_process(monkeypatch, rank, world, others=None):
    """Makes this process one of several, which hears the values of `others` beside its own."""
    for module in (common, runtime):
        monkeypatch.setattr(module, "RANK", rank)
        monkeypatch.setattr(module, "WORLD", world)

    def gather(values, value):
        values[:] = others or [value] * world
        values[rank] = value

    monkeypatch.setattr(distributed, "all_gather_object", gather)


def test_one_process_communicates_with_nobody():
    x = torch.ones(3, requires_grad=True)
    assert runtime.process_mean(x) is x
    assert runtime.all_gather("value") == ["value"]
    assert not distributed.is_initialized()
    assert (runtime.RANK, runtime.WORLD) == (0, 1)


@pytest.mark.parametrize(("world", "nodes", "command"), [
    (1, 1, Path(sys.executable).name), (2, 1, "torchrun --nproc-per-node 2"),
    (6, 3, "torchrun --nnodes 3 --rdzv-endpoint HOST:PORT --nproc-per-node 2"),
])  # fmt: skip
def test_the_command_to_go_on_starts_as_many_processes(monkeypatch, world, nodes, command):
    monkeypatch.setattr(runtime, "WORLD", world)
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world // nodes))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # as in an active environment
    assert runtime.launcher() == command


def flags_of(folder):
    return {"env_id": "CartPole-v1", "exp_name": "test", "seed": 1, "resume": str(folder)}


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_run_folder_has_a_part_for_each_process(rank, tmp_path, monkeypatch):
    args = flags_of(tmp_path / "run")
    as_process(monkeypatch, 0, 3)
    run, is_new = runtime.open_run(args, {}, 0)
    assert run == tmp_path / "run"
    assert is_new
    own = runtime.rank_folder(run, rank)
    assert own == (run / f"rank{rank}" if rank else run)
    assert list(own.glob("replay")) == [own / "replay"]
    (run / "checkpoint.pt").touch()
    as_process(monkeypatch, rank, 3)
    assert runtime.open_run(args, {}, 0) == (run, False)
    for world in (1, 4):
        as_process(monkeypatch, 0, world)
        text = f"{run} has replays for --nproc-per-node 3 in all, not for {world}"
        with pytest.raises(runtime.UserError, match=re.escape(text)):
            runtime.open_run(args, {}, 0)
    alone = flags_of(tmp_path / "alone")
    as_process(monkeypatch, 0, 1)
    runtime.open_run(alone, {}, 0)
    (tmp_path / "alone" / "checkpoint.pt").touch()
    as_process(monkeypatch, 1, 2)
    with pytest.raises(
        runtime.UserError, match="has replays for --nproc-per-node 1 in all, not for 2"
    ):
        runtime.open_run(alone, {}, 0)


def test_processes_with_different_flags_are_refused(tmp_path, monkeypatch):
    args = flags_of(tmp_path / "run")
    as_process(monkeypatch, 0, 2, others=[None, args | {"seed": 2}])
    with pytest.raises(runtime.UserError, match="have to be started with the same flags"):
        runtime.open_run(args, {}, 0)
    assert not list(tmp_path.iterdir())


def test_processes_that_read_different_checkpoints_are_refused(monkeypatch):
    replay = SimpleNamespace(start=3, end=20)
    counters = {"step": 200, "updates": 40, "last_report": 200}
    as_process(monkeypatch, 0, 2, others=[None, {"step": 100, "updates": 20, "last_report": 100}])
    with pytest.raises(runtime.UserError, match="cannot read the same checkpoint"):
        runtime.agree_on_checkpoint(counters, replay)
    runtime.agree_on_checkpoint(counters, None)  # as when a run is evaluated


def test_processes_go_on_with_replays_of_one_length(tmp_path, monkeypatch):
    """A ring that overwrote more rows than another after the checkpoint is the shortest."""
    shapes = {"reward": (), "is_first": ()}
    replay = common.Replay(tmp_path, 50, shapes, 1, torch.device("cpu"))
    for number in range(30):
        replay.add({"reward": np.full(1, number), "is_first": np.zeros(1, bool)})
    counters = {"step": 200, "updates": 40, "last_report": 200}
    for others, length in (([30, 30], 30), ([30, 7], 7)):
        answers = iter(([counters, counters], others))
        monkeypatch.setattr(runtime, "WORLD", 2)
        monkeypatch.setattr(runtime, "all_gather", lambda value, a=answers: next(a))
        runtime.agree_on_checkpoint(counters, replay)
        assert len(replay) == length
        batch = replay.sample(9, 7)["reward"]
        assert batch.min() >= 30 - length


def test_an_evaluation_is_shared_out(monkeypatch):
    """Each process plays the episodes of some environments, none is played twice."""
    played = {}
    right = torch.eye(2)[[1] * 5]
    for rank, world in ((0, 1), (0, 3), (1, 3), (2, 3)):
        as_process(monkeypatch, rank, world, others=[([], 0) for _ in range(world)])
        envs = make_envs(5, "CartPole-v1", first_index=10_000)
        returns, *_ = common.evaluate(envs, lambda row, state: (right, state), {}, 7)
        assert envs.indices == range(10_000, 10_005)
        played[rank, world] = returns.tolist()
        envs.close()
    shares = [played.pop((rank, 3)) for rank in (0, 1, 2)]
    assert [len(share) for share in shares] == [3, 3, 1]
    assert sorted(shares[0] + shares[1] + shares[2]) == sorted(played[0, 1])


class Part:
    """Something with a state."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_what_each_process_has_of_its_own_is_saved_by_the_first_one(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 3)
    generators = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    mine = {"generators": [generators[0]], "envs": {"episodes": [3]}}
    theirs = {"generators": [generators[1]], "envs": {"episodes": [4]}}
    with torch.random.fork_rng():
        for rank, own in ((1, theirs), (0, mine)):
            assert not list(tmp_path.iterdir())
            as_process(monkeypatch, rank, 2, others=[mine, theirs])
            torch.set_rng_state(own["generators"][0])
            parts = {"model": model, "envs": Part(own["envs"])}
            runtime.save_checkpoint(tmp_path, parts, {"step": 1})
        for rank, world, own in ((0, 2, mine), (1, 2, theirs), (0, 1, mine), (2, 3, mine)):
            as_process(monkeypatch, rank, world)
            parts = {"model": torch.nn.Linear(2, 3), "envs": Part()}
            assert runtime.load_checkpoint(tmp_path, parts) == {"step": 1}
            assert torch.equal(parts["model"].weight, model.weight)
            assert parts["envs"].state == own["envs"]
            assert torch.equal(torch.get_rng_state(), own["generators"][0])


def test_a_failure_elsewhere_ends_the_loop_and_a_signal_elsewhere_too(monkeypatch, capsys):
    as_process(monkeypatch, 0, 2, others=[None, runtime.ENVIRONMENTS_FAILED])
    with runtime.Interrupt() as interrupt:
        runtime.all_gather("my value")
        raise AssertionError("not reached")
    assert interrupt.code == 1
    as_process(monkeypatch, 0, 2, others=[None, 143])
    with runtime.Interrupt() as interrupt:
        assert interrupt.agreed() == 143
    assert interrupt.code == 143
    told = []
    monkeypatch.setattr(distributed, "all_gather_object", lambda values, value: told.append(value))
    with runtime.Interrupt() as interrupt:
        raise ChildProcessError("mine failed")
    assert interrupt.code == 1
    assert told == [runtime.ENVIRONMENTS_FAILED]
    assert capsys.readouterr().err == "error: mine failed\n"


def test_the_first_process_logs_what_all_of_them_did(monkeypatch):
    row = {"is_first": np.array([0.0, 1.0, 0.0], np.float32)}
    mine = [
        {"charts/episodic_return": 5.0, "charts/episodic_length": 50.0},
        {"charts/episodic_return": 7.0, "charts/episodic_length": 70.0},
    ]
    theirs = [{"charts/episodic_return": 1.0, "charts/episodic_length": 9.0}]
    as_process(monkeypatch, 0, 2, others=[None, (3, theirs)])
    assert runtime.gather_steps(row, mine) == (2 + 3, mine + theirs)
    as_process(monkeypatch, 0, 2, others=[None, (3, [])])
    assert runtime.gather_steps(row, []) == (5, [])
