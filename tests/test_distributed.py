"""Several processes, as torchrun starts them, do what one process does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import start

import common
import distributed

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dreamerv1.py", "dreamerv2.py"]
TINY = """--batch-size 4 --batch-length 7 --deter 16 --hidden 16 --units 16 --stoch 3 --threads 1
    --pretrain 2 --train-every 20 --prefill 100 --eval-episodes 2 --log-every 50 --eval-every 150
    --env-id CartPole-v1"""
FLAGS = {"dreamerv1.py": f"{TINY} --train-steps 1", "dreamerv2.py": f"{TINY} --classes 4"}
CLOCK = {"seconds", "charts/SPS", "time/updates_per_second"}


def finish(process, code=0, timeout=120):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out, err


def torchrun(script, count, flags, cwd, options=""):
    return start(script, flags, cwd, torchrun=f"--nproc-per-node {count} {options}")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def wait_until(ready, seconds=90):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def workers(process):
    """Process ids of the ranks that a torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    found = {int(re.search(rb"\0RANK=(\d+)", text)[1]): pid for pid, text in names.items()}
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_processes_with_a_share_of_the_batch_have_the_gradients_of_one_with_all_of_it(tmp_path):
    found = {}
    for count in (1, 2, 3):
        finish(torchrun("tests/share_of_a_batch.py", count, f"{count}.npz", tmp_path))
        found[count] = dict(np.load(tmp_path / f"{count}.npz"))
    names = [name for name in found[1] if ", below, " in name or ", above, " in name]
    assert len(names) > 200
    for count in (2, 3):
        for name in names:
            one, several = found[1][name], found[count][name]
            assert np.abs(several - one).max() <= 1e-5 * np.abs(one).max(), name
        for kind in {name.split(",")[0] for name in names}:
            # Free nats lie between the KLs of the shares, so that all must look at the whole batch.
            kl = found[1][f"{kind}, kl"]
            shares = kl.reshape(count, -1).mean(1)
            assert shares.min() < 0.98 * kl.mean() < 1.02 * kl.mean() < shares.max()
            prior = "world_model.rssm.img_out.1.weight"
            above, below = (found[count][f"{kind}, {side}, {prior}"] for side in ("above", "below"))
            assert below.any()
            if "each step" not in kind:  # the KL costs nothing then, and nothing else trains it
                assert not above.any()
            # The networks stay the same, though the noise differs.
            assert found[count][f"{kind}, same"].tolist() == [True] * count
            assert len(set(found[count][f"{kind}, noise"])) == count


@pytest.mark.slow
@pytest.mark.parametrize(("script", "count"), [("dreamerv1.py", 2), ("dreamerv2.py", 3)])
def test_a_run_of_several_processes_counts_frames_updates_and_episodes_as_one_does(
    script, count, tmp_path
):
    flags = f"{FLAGS[script]} --total-frames 300 --num-envs 2 --checkpoint-every 100"
    out, err = finish(torchrun(script, count, flags, tmp_path))
    [folder] = tmp_path.glob("runs/*")
    rows = rows_of(folder)
    last = rows[-1]
    width = 2 * count
    assert 300 <= last["frames"] < 300 + width
    # 2 updates, then, from frame 100 on, one every 20 frames; V2 begins with one of these.
    due = 2 + (last["frames"] - 100) // 20 + (script == "dreamerv2.py")
    assert last["updates"] == due
    episodes = [row["charts/episodic_length"] for row in rows if "charts/episodic_length" in row]
    replays = [folder / "replay", *(folder / f"rank{i}" / "replay" for i in range(1, count))]
    state = checkpoint(folder)
    ends = [rank["replay"]["end"] for rank in state["ranks"]]
    assert len(ends) == count
    assert len(set(ends)) == 1
    terminal, first, vectors = 0, 0, []
    for replay, end in zip(replays, ends, strict=True):
        terminal += np.load(replay / "is_terminal.npy")[:end].sum()
        first += np.load(replay / "is_first.npy")[:end].sum()
        vectors.append(np.load(replay / "vector.npy")[:end])
    assert len(episodes) == terminal  # those of all processes are logged
    assert last["frames"] == width * ends[0] - first
    assert len({vector.tobytes() for vector in vectors}) == count  # each has its own episodes
    assert sum("eval/episodic_return" in row for row in rows) == 2
    assert not list(folder.glob("rank*/metrics.jsonl"))
    assert not list(folder.glob("rank*/*.tfevents*"))
    assert not list(folder.glob("rank*/*.pt"))
    assert out.count("run folder") == 1  # one of them speaks
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_resume_restores_every_replay(tmp_path):
    flags = f"{FLAGS['dreamerv2.py']} --num-envs 2 --async-envs --total-frames 100000"
    process = torchrun("dreamerv2.py", 2, flags, tmp_path)
    logs = tmp_path.glob
    wait_until(lambda: any('"updates": 5' in f.read_text() for f in logs("runs/*/metrics.jsonl")))
    process.send_signal(signal.SIGTERM)
    out, err = finish(process, 1)
    [folder] = tmp_path.glob("runs/*")
    [line] = [line for line in out.splitlines() if "--resume" in line]
    assert line.startswith("go on with: torchrun --nproc-per-node 2 ")
    assert f"--resume {folder.relative_to(tmp_path)}" in line
    assert "error: " not in err
    state = checkpoint(folder)
    step, updates = state["counters"][:2]
    assert updates >= 5
    ends = [rank["replay"]["end"] for rank in state["ranks"]]
    replays = [folder / "replay", folder / "rank1" / "replay"]
    before = [np.load(r / "vector.npy")[:end] for r, end in zip(replays, ends, strict=True)]
    resume = f"--resume {folder} --total-frames {step + 60}"
    finish(torchrun("dreamerv2.py", 2, resume, tmp_path))
    rows, state = rows_of(folder), checkpoint(folder)
    assert step + 60 <= rows[-1]["frames"] < step + 64
    assert rows[-1]["updates"] > updates
    frames = [row["frames"] for row in rows]
    assert frames == sorted(frames)
    for replay, vector, end in zip(replays, before, ends, strict=True):
        assert np.array_equal(np.load(replay / "vector.npy")[:end], vector)
        assert np.load(replay / "is_first.npy")[end].all()
    out, _ = finish(start("dreamerv2.py", f"--evaluate {folder}", tmp_path))
    assert "in 2 episodes" in out


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_of_them_with_a_line_and_torchrun_resumes_them(rank, tmp_path):
    script = SCRIPTS[rank]
    flags = f"{FLAGS[script]} --checkpoint-every 50 --total-frames 100000"
    process = torchrun(script, 2, flags, tmp_path, "--max-restarts 1")
    wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    [folder] = tmp_path.glob("runs/*")
    first, step = workers(process), checkpoint(folder)["counters"][0]
    os.kill(first[rank], signal.SIGKILL)
    wait_until(lambda: checkpoint(folder)["counters"][0] >= step + 100)
    second = workers(process)
    assert not set(first) & set(second)
    os.kill(second[rank], signal.SIGKILL)
    began = time.monotonic()
    _, err = finish(process, 1)  # no restart is left
    assert time.monotonic() - began < 60
    line = "error: another process is gone, go on from the last checkpoint with --resume"
    assert err.count(line) == 2  # of the one that was left, each time
    assert list(tmp_path.glob("runs/*")) == [folder]
    rows = rows_of(folder)
    frames = [row["frames"] for row in rows]
    assert frames == sorted(frames)
    assert max(frames) >= step + 50


ODD = """
import os
import gymnasium as gym
import numpy as np


class Odd(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes, self.time = getattr(self, "episodes", 0) + 1, 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        if self.episodes == 5 and self.time == 7 and os.environ.get("RANK") == "1":
            raise RuntimeError("no more power")
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), 1.0, self.time == 25, False, {}


gym.register("Odd-v0", Odd)
"""


@pytest.mark.slow
def test_an_environment_that_fails_in_one_process_lets_all_of_them_save(tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    flags = f"{FLAGS['dreamerv1.py']} --total-frames 1000 --eval-every 0 --env-id odd:Odd-v0"
    out, err = finish(torchrun("dreamerv1.py", 2, flags, tmp_path), 1)
    [line] = [line for line in err.splitlines() if "error: " in line]
    assert re.search("error: environment 1 of Odd-v0 .* failed: RuntimeError: no more power", line)
    [folder] = tmp_path.glob("runs/*")
    assert f"--resume {folder.relative_to(tmp_path)} --env-id odd:Odd-v0" in out
    state = checkpoint(folder)
    assert state["counters"][0] == 2 * (4 * 25 + 6)
    # Its own row is missing in the replay of the process that failed.
    assert [rank["replay"]["end"] for rank in state["ranks"]] == [4 * 26 + 8, 4 * 26 + 7]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("script", SCRIPTS)
def test_nccl_inside_the_captured_update_learns_as_outside_of_it(script, tmp_path):
    losses = {}
    for graph in ("graph", "no-graph"):
        (folder := tmp_path / graph).mkdir()
        flags = f"{FLAGS[script]} --precision float32 --total-frames 400 --log-every 20 --{graph}"
        finish(torchrun(script, 2, flags, folder))
        [run] = folder.glob("runs/*")
        losses[graph] = [row["losses/vector"] for row in rows_of(run) if "losses/vector" in row]
    assert len(losses["graph"]) > 10
    assert losses["graph"] == pytest.approx(losses["no-graph"], rel=0.2)


# Without torchrun
def as_process(monkeypatch, rank, world, job="job-7", others=None):
    """Makes this process one of several, which hears the values of `others` beside its own."""
    for module in (common, distributed):
        monkeypatch.setattr(module, "RANK", rank)
        monkeypatch.setattr(module, "WORLD", world)

    def gather(values, value):
        values[:] = others or [value] * world
        values[rank] = value

    monkeypatch.setattr(distributed, "JOB", job)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)


def test_one_process_communicates_with_nobody():
    x = torch.ones(3, requires_grad=True)
    assert distributed.average(x) is x
    assert distributed.everyone("value") == ["value"]
    assert not torch.distributed.is_initialized()
    assert (distributed.RANK, distributed.WORLD) == (0, 1)


@pytest.mark.parametrize(
    ("environ", "command"),
    [
        ({}, "python"),
        ({"WORLD_SIZE": "2"}, "torchrun --nproc-per-node 2"),
        (
            {"WORLD_SIZE": "6", "GROUP_WORLD_SIZE": "3"},
            "torchrun --nnodes 3 --rdzv-endpoint HOST:PORT --nproc-per-node 2",
        ),
    ],
)
def test_the_command_to_go_on_starts_as_many_processes(environ, command):
    base = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "GROUP_WORLD_SIZE": "1"}
    environ = base | {"LOCAL_WORLD_SIZE": "2"} | environ if environ else {}
    code = "import distributed; print(distributed.LAUNCHER)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environ,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout == command + "\n"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_run_folder_has_a_part_for_each_process(rank, tmp_path, monkeypatch):
    as_process(monkeypatch, 0, 3)
    run = distributed.make_folders(tmp_path / "run", {})
    as_process(monkeypatch, rank, 3)
    own = distributed.own_folder(run)
    assert own == (run / f"rank{rank}" if rank else run)
    assert list(own.glob("replay")) == [own / "replay"]
    for world in (1, 4):
        as_process(monkeypatch, 0, world)
        text = f"{run} has replays for --nproc-per-node 3 in all, not for {world}"
        with pytest.raises(common.UserError, match=re.escape(text)):
            distributed.own_folder(run)
    (alone := tmp_path / "alone").mkdir()
    as_process(monkeypatch, 1, 2)
    with pytest.raises(
        common.UserError, match="has replays for --nproc-per-node 1 in all, not for 2"
    ):
        distributed.own_folder(alone)


def test_a_job_that_torchrun_starts_again_finds_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    as_process(monkeypatch, 0, 2)
    assert distributed.begun() == ""
    for name, job in (("a", "job-7"), ("b", "job-7"), ("c", "job-8"), ("d", "none")):
        monkeypatch.setattr(distributed, "JOB", job)
        distributed.make_folders(Path("runs") / name, {})
        assert distributed.begun() == ""  # it has nothing to go on from
    (Path("runs/b") / "checkpoint.new.pt").touch()  # which may be torn
    assert distributed.begun() == ""
    for name in "acd":
        (Path("runs") / name / "checkpoint.old.pt").touch()
    found = {"job-7": "runs/a", "job-8": "runs/c", "job-9": "", "none": "", None: ""}
    for job, run in found.items():
        monkeypatch.setattr(distributed, "JOB", job)
        assert distributed.begun() == run
    (Path("runs/b") / "checkpoint.pt").touch()
    monkeypatch.setattr(distributed, "JOB", "job-7")
    assert distributed.begun() == "runs/b"
    monkeypatch.setattr(distributed, "JOB", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(common.UserError, match="torchrun's restarts need --rdzv-id"):
        distributed.begun()


def test_processes_with_different_flags_are_refused(tmp_path, monkeypatch):
    as_process(monkeypatch, 0, 2, others=[None, {"num_envs": 2}])
    with pytest.raises(common.UserError, match="have to be started with the same flags"):
        distributed.make_folders(tmp_path / "run", {"num_envs": 1})


def test_processes_that_read_different_checkpoints_are_refused(monkeypatch):
    replay = SimpleNamespace(start=3, end=20, __len__=None)
    as_process(monkeypatch, 0, 2, others=[None, [100, 20, 5.0]])
    with pytest.raises(common.UserError, match="cannot read the same checkpoint"):
        distributed.agree({"counters": [200, 40, 9.0]}, replay)
    state = {"counters": [200, 40, 9.0]}
    as_process(monkeypatch, 1, 2)
    assert distributed.agree(state, None) is state  # as when a run is evaluated


def test_processes_go_on_with_replays_of_one_length(tmp_path, monkeypatch):
    """A ring that overwrote more rows than another after the checkpoint is the shortest."""
    shapes = {"reward": ((), np.float32), "is_first": ((), bool)}
    replay = common.Replay(tmp_path, 50, shapes, 1, 0, torch.device("cpu"))
    for number in range(30):
        replay.add({"reward": np.full(1, number), "is_first": np.zeros(1, bool)})
    counters = [200, 40, 9.0]
    for others, length in (([30, 30], 30), ([30, 7], 7)):
        answers = iter(([counters, counters], others))
        monkeypatch.setattr(distributed, "WORLD", 2)
        monkeypatch.setattr(distributed, "everyone", lambda value, a=answers: next(a))
        distributed.agree({"counters": counters}, replay)
        assert len(replay) == length
        batch = replay.sample(9, 7)["reward"]
        assert batch.min() >= 30 - length


def test_an_evaluation_is_shared_out(monkeypatch):
    """Each process plays the episodes of some environments, none is played twice."""
    played, episodes, right = {}, 7, torch.eye(2)[[1] * 5]
    for rank in (0, 1, 2):
        as_process(monkeypatch, rank, 3, others=[[], [], []])
        envs = common.make_envs(5, first_index=10_000, env_id="CartPole-v1", seed=1)
        returns, _ = common.evaluate(envs, lambda row, state: (right, state), {}, episodes)
        played[rank] = len(returns)
        assert np.array_equal(envs.keys[:, 1], range(10_000, 10_005))
        envs.close()
    assert played == {0: 3, 1: 3, 2: 1}


def test_what_each_process_has_of_its_own_is_saved_by_the_first_one(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 3)
    mine = {"counters": [1], "rng": [torch.get_rng_state()]}
    theirs = mine | {"counters": [2]}
    as_process(monkeypatch, 1, 2, others=[mine, theirs])
    common.save_checkpoint(tmp_path, {"model": model}, {"counters": [2], "metrics": {}})
    assert not list(tmp_path.iterdir())
    as_process(monkeypatch, 0, 2, others=[mine, theirs])
    common.save_checkpoint(tmp_path, {"model": model}, {"counters": [1], "metrics": {}})
    for rank, world, counters in ((0, 2, [1]), (1, 2, [2]), (0, 1, [1]), (2, 3, [1])):
        as_process(monkeypatch, rank, world)
        state = common.load_checkpoint(tmp_path, {"model": torch.nn.Linear(2, 3)})
        assert state["counters"] == counters


def test_a_failure_elsewhere_ends_the_loop_and_a_signal_elsewhere_too(monkeypatch, capsys):
    as_process(monkeypatch, 0, 2, others=[None, None])
    with common.Interrupt() as interrupt:
        distributed.everyone("my value")
        raise AssertionError("not reached")
    assert interrupt.code == 1
    as_process(monkeypatch, 0, 2, others=[None, 143])
    with common.Interrupt() as interrupt:
        assert interrupt.agreed() == 143
    assert interrupt.code == 143
    as_process(monkeypatch, 0, 2, others=[None, None])
    with common.Interrupt() as interrupt:
        raise ChildProcessError("mine failed")
    assert interrupt.code == 1
    assert capsys.readouterr().err == "error: mine failed\n"


def test_the_first_process_logs_what_all_of_them_did(monkeypatch):
    row = {"is_first": np.array([0.0, 1.0, 0.0], np.float32)}
    info = {"episode": {"r": np.array([5.0, 0.0, 7.0]), "l": np.array([50, 0, 70])}}
    done = np.array([True, False, True])
    other = (3, [{"charts/episodic_return": 1.0, "charts/episodic_length": 9.0}])
    as_process(monkeypatch, 0, 2, others=[None, other])
    steps, ended = common.tally(row, done, info)
    assert steps == 2 + 3
    assert [e["charts/episodic_return"] for e in ended] == [5.0, 7.0, 1.0]
    assert common.tally(row, done & False, {})[0] == 5


def test_a_checkpoint_of_one_process_from_before_there_were_several_is_taken(tmp_path):
    state = {"rng": [torch.get_rng_state()], "counters": [3], "metrics": {}}
    torch.save(state, tmp_path / "checkpoint.pt")
    assert common.load_checkpoint(tmp_path, {})["counters"] == [3]
