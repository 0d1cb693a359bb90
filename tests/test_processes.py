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
from helpers.envs import make_envs
from processes import start
from torch import distributed

import common
import runtime

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dreamerv1.py", "dreamerv2.py"]
TINY = """--batch-size 4 --batch-length 7 --deter 16 --hidden 16 --units 16 --stoch 3 --threads 1
    --pretrain 2 --train-every 20 --prefill 100 --eval-episodes 2 --log-every 50 --eval-every 150
    --env-id CartPole-v1"""
FLAGS = {"dreamerv1.py": f"{TINY} --train-steps 1", "dreamerv2.py": f"{TINY} --classes 4"}


def finish(process, code=0, timeout=120):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out, err


def torchrun(script, count, flags, cwd, options="", root=ROOT):
    job = start(script, flags, cwd, root, torchrun=f"--nproc-per-node {count} {options}")
    jobs.append(job)
    return job


jobs = []


@pytest.fixture(autouse=True)
def end_jobs():
    """Ends what a test that fails leaves behind."""
    yield
    for job in jobs:
        job.terminate()
        job.communicate()
    jobs.clear()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def saved_step(folder):
    """Agent steps of the checkpoint, 0 if it is missing, as it is while a new one replaces it."""
    try:
        return checkpoint(folder)["counters"]["step"]
    except FileNotFoundError:
        return 0


def has_logged(cwd, text):
    """Whether the log of any run there has the text."""
    return any(text in path.read_text() for path in cwd.glob("runs/*/metrics.jsonl"))


def rows_in_replays(folder):
    """Rows that the replay of each process had at the checkpoint."""
    return [rank["replay"]["end"] for rank in checkpoint(folder)["ranks"]]


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
    ends = rows_in_replays(folder)
    assert len(ends) == count
    assert len(set(ends)) == 1
    terminal = 0
    first = 0
    vectors = []
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
    assert out.count("a new run begins in") == 1  # one of them speaks
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_resume_restores_every_replay(tmp_path):
    flags = f"{FLAGS['dreamerv2.py']} --num-envs 2 --async-envs --total-frames 100000"
    process = torchrun("dreamerv2.py", 2, flags, tmp_path)
    wait_until(lambda: has_logged(tmp_path, '"updates": 5'))
    process.send_signal(signal.SIGTERM)
    out, err = finish(process, 1)
    [folder] = tmp_path.glob("runs/*")
    [line] = [line for line in out.splitlines() if "--resume" in line]
    assert line.startswith("go on with: torchrun --nproc-per-node 2 ")
    assert f"--resume {folder.relative_to(tmp_path)}" in line
    assert "error: " not in err
    state = checkpoint(folder)
    step = state["counters"]["step"]
    updates = state["counters"]["updates"]
    assert updates >= 5
    ends = rows_in_replays(folder)
    replays = [folder / "replay", folder / "rank1" / "replay"]
    before = [np.load(r / "vector.npy")[:end] for r, end in zip(replays, ends, strict=True)]
    resume = f"--resume {folder} --total-frames {step + 60}"
    finish(torchrun("dreamerv2.py", 2, resume, tmp_path))
    rows = rows_of(folder)
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
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_is_queued_again_with_the_same_command_goes_on(script, tmp_path):
    flags = f"--resume runs/x {FLAGS[script]} --total-frames 2000"
    folder = tmp_path / "runs" / "x"
    job = torchrun(script, 2, flags, tmp_path)
    wait_until(lambda: has_logged(tmp_path, '"updates": 5'))
    job.send_signal(signal.SIGTERM)
    out, _ = finish(job, 1)
    assert out.startswith("a new run begins in runs/x\n")
    saved = checkpoint(folder)["counters"]
    assert 0 < saved["step"] < 2000
    out, _ = finish(torchrun(script, 2, flags, tmp_path))
    assert out.startswith("the run in runs/x goes on\n")
    rows = rows_of(folder)
    frames = [row["frames"] for row in rows]
    assert 2000 <= frames[-1] < 2002
    assert frames == sorted(frames)
    assert any(saved["step"] <= count < saved["step"] + 50 for count in frames)
    assert rows[-1]["updates"] > saved["updates"]
    out, _ = finish(torchrun(script, 2, flags, tmp_path))  # nothing is left to do
    assert out.startswith("the run in runs/x goes on\n")
    assert rows_of(folder) == rows
    assert list(tmp_path.glob("runs/*")) == [folder]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_of_them_with_a_line_and_torchrun_resumes_them(rank, tmp_path):
    """The command names a folder: the first start begins a run there, the second one goes on."""
    script = SCRIPTS[rank]
    flags = f"--resume runs/x {FLAGS[script]} --checkpoint-every 50 --total-frames 100000"
    folder = tmp_path / "runs" / "x"
    process = torchrun(script, 2, flags, tmp_path, "--max-restarts 1")
    wait_until(lambda: saved_step(folder) >= 150)
    first = workers(process)
    step = saved_step(folder)
    os.kill(first[rank], signal.SIGKILL)
    wait_until(lambda: saved_step(folder) >= step + 100)
    second = workers(process)
    assert not set(first) & set(second)
    os.kill(second[rank], signal.SIGKILL)
    began = time.monotonic()
    out, err = finish(process, 1)  # no restart is left
    assert time.monotonic() - began < 60
    starts = [line for line in out.splitlines() if "runs/x" in line]
    assert starts == ["a new run begins in runs/x", "the run in runs/x goes on"]
    line = "error: another process is gone, go on from the last checkpoint with --resume"
    assert err.count(line) == 2  # of the one that was left, each time
    assert list(tmp_path.glob("runs/*")) == [folder]
    rows = rows_of(folder)
    frames = [row["frames"] for row in rows]
    assert frames == sorted(frames)
    assert max(frames) >= step + 50


CLOCK_AND_NOISE = """
import sys

import gymnasium as gym
import numpy as np
import torch
from torch.nn.utils import parameters_to_vector

sys.path.insert(0, "{root}")
import common
import runtime
import {module} as script


class Clock(gym.Env):
    observation_space = gym.spaces.Box(0, 1e6, (1,))
    action_space = gym.spaces.Discrete(5)
    rows = -1  # the number of the last row, the same whatever the seed and the actions

    def observe(self):
        self.rows += 1
        return np.array([self.rows], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {{}}

    def step(self, action):
        obs = self.observe()
        return obs, 1.0, False, self.rows % 25 == 24, {{}}


gym.register("Clock-v0", Clock)
update = script.update
windows = []
noise = []


def watched_update(agent, optimizers, batch, args):
    windows.append(batch["vector"][0, :, 0].numpy())  # the rows with which they begin
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    noise.append(torch.rand(5, generator=generator).numpy())  # what the update is about to draw
    metrics = update(agent, optimizers, batch, args)
    global weights
    weights = parameters_to_vector(agent.parameters()).detach().numpy()
    return metrics


script.update = watched_update
with runtime.exit_on_error():
    args = runtime.parse_args(script.Args, script.PRESETS, common.choose_preset)
    code = script.main(args)
np.savez(f"rank{{runtime.RANK}}.npz", windows=windows, noise=noise, weights=weights)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_process_draws_noise_of_its_own_and_still_has_the_networks_of_the_others(
    script, tmp_path
):
    """Their environments show the same, so that only the draws can make a difference."""
    text = CLOCK_AND_NOISE.format(root=ROOT, module=Path(script).stem)
    (tmp_path / "job.py").write_text(text)
    folder = tmp_path / "runs" / "x"
    replays = [folder / "replay", folder / "rank1" / "replay"]
    flags = f"{FLAGS[script]} --env-id Clock-v0 --batch-size 16 --resume runs/x"
    for total in (200, 300):  # the second job goes on with the first one's run
        finish(torchrun("job.py", 2, f"{flags} --total-frames {total}", tmp_path, root=tmp_path))
        one, other = (np.load(tmp_path / f"rank{rank}.npz") for rank in (0, 1))
        assert len(one["windows"]) == len(other["windows"]) >= 5
        for name in ("windows", "noise"):  # of each update
            assert (one[name] != other[name]).any(1).all(), name
            assert len(np.unique(one[name], axis=0)) == len(one[name]), name
        assert np.array_equal(one["weights"], other["weights"])
        mine, theirs = (rank["generators"][0] for rank in checkpoint(folder)["ranks"])
        assert not torch.equal(mine, theirs)
        [rows] = set(rows_in_replays(folder))
        vectors = [np.load(replay / "vector.npy")[:rows, 0, 0] for replay in replays]
        assert np.array_equal(vectors[0], vectors[1])
        actions = [np.load(replay / "action.npy")[:rows, 0] for replay in replays]
        differ = (actions[0] != actions[1]).any(1)
        # Four of five random actions differ, and of learned ones, which come last, hardly fewer.
        assert differ[:50].mean() > 0.5
        assert differ[-50:].mean() > 0.3


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
        here = os.path.exists(f"failing{os.environ.get('RANK')}")
        if here and self.episodes == 5 and self.time == 7:
            raise RuntimeError("no more power")
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), 1.0, self.time == 25, False, {}


gym.register("Odd-v0", Odd)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_environment_that_fails_in_one_process_leaves_replays_of_one_length(rank, tmp_path):
    script = SCRIPTS[rank]
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / f"failing{rank}").touch()
    flags = f"{FLAGS[script]} --total-frames 300 --eval-every 0 --env-id odd:Odd-v0"
    out, err = finish(torchrun(script, 2, flags, tmp_path), 1)
    [line] = [line for line in err.splitlines() if "error: " in line]
    failed = f"error: environment {rank} of Odd-v0 .* failed: RuntimeError: no more power"
    assert re.search(failed, line)
    [folder] = tmp_path.glob("runs/*")
    go_on = f"--resume {folder.relative_to(tmp_path)} --env-id odd:Odd-v0"
    assert go_on in out
    assert saved_step(folder) == 2 * (4 * 25 + 6)
    # The step that failed is missing everywhere, also where it did not fail.
    assert rows_in_replays(folder) == [4 * 26 + 7] * 2
    replays = [folder / "replay", folder / "rank1" / "replay"]
    assert [np.load(replay / "written.npy")[0, 0] for replay in replays] == [4 * 26 + 7] * 2
    (tmp_path / f"failing{rank}").unlink()
    finish(torchrun(script, 2, go_on, tmp_path))
    assert rows_of(folder)[-1]["frames"] == 300
    rows, others = rows_in_replays(folder)
    assert rows == others
    first = [np.load(replay / "is_first.npy")[:rows, 0] for replay in replays]
    assert np.array_equal(first[0], first[1])
    assert first[0][4 * 26 + 7]


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
    code = "import runtime; print(runtime.launcher())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environ,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout == command + "\n"


def flags_of(folder):
    return {"env_id": "CartPole-v1", "exp_name": "test", "seed": 1, "resume": str(folder)}


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_run_folder_has_a_part_for_each_process(rank, tmp_path, monkeypatch):
    args = flags_of(tmp_path / "run")
    as_process(monkeypatch, 0, 3)
    run, is_new = runtime.open_run(args, 0)
    assert run == tmp_path / "run"
    assert is_new
    own = runtime.rank_folder(run, rank)
    assert own == (run / f"rank{rank}" if rank else run)
    assert list(own.glob("replay")) == [own / "replay"]
    (run / "checkpoint.pt").touch()
    as_process(monkeypatch, rank, 3)
    assert runtime.open_run(args, 0) == (run, False)
    for world in (1, 4):
        as_process(monkeypatch, 0, world)
        text = f"{run} has replays for --nproc-per-node 3 in all, not for {world}"
        with pytest.raises(runtime.UserError, match=re.escape(text)):
            runtime.open_run(args, 0)
    alone = flags_of(tmp_path / "alone")
    as_process(monkeypatch, 0, 1)
    runtime.open_run(alone, 0)
    (tmp_path / "alone" / "checkpoint.pt").touch()
    as_process(monkeypatch, 1, 2)
    with pytest.raises(
        runtime.UserError, match="has replays for --nproc-per-node 1 in all, not for 2"
    ):
        runtime.open_run(alone, 0)


def test_processes_with_different_flags_are_refused(tmp_path, monkeypatch):
    args = flags_of(tmp_path / "run")
    as_process(monkeypatch, 0, 2, others=[None, args | {"seed": 2}])
    with pytest.raises(runtime.UserError, match="have to be started with the same flags"):
        runtime.open_run(args, 0)
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


@pytest.fixture
def signals():
    """Gives the handlers of signals back at the end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
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


def test_seeds_follow_from_the_key_and_the_process(monkeypatch):
    """Torch's generator of a CPU looks at the lower 32 bits of a seed only."""
    seeds = []
    for rank in range(50):
        as_process(monkeypatch, rank, 50)
        seeds.append(runtime.seed_of("process", 1))
        seeds.append(runtime.seed_of("process", 2))
        assert seeds[-2:] == [runtime.seed_of("process", seed) for seed in (1, 2)]
    assert len({seed % 2**32 for seed in seeds}) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    with torch.random.fork_rng():
        drawn = set()
        for rank in range(50):
            as_process(monkeypatch, rank, 50)
            runtime.seed_process(1)
            drawn.add(torch.rand(()).item())
    assert len(drawn) == 50
