"""Several processes, as torchrun starts them, do what one process does."""

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.failing import FAILS_AT, STEPS, let_fail
from helpers.processes import ROOT, finish, has_logged, start, wait_until
from helpers.runs import EVERY_SCRIPT, SCRIPTS, checkpoint, counters, metrics, the_run, values

TINY = """--batch-size 4 --batch-length 7 --deter 16 --hidden 16 --units 16 --stoch 3 --threads 1
    --eval-episodes 2 --log-every 50 --eval-every 150 --env-id CartPole-v1"""
TWIN = f"{TINY} --pretrain 2 --train-every 20 --prefill 100"
FLAGS = {"dreamerv1.py": f"{TWIN} --train-steps 1", "dreamerv2.py": f"{TWIN} --classes 4"}
FLAGS["dreamerv3.py"] = f"{TINY} --classes 4 --blocks 2 --train-ratio 6"


@pytest.fixture
def torchrun(tmp_path):
    """Starts a script with so many processes."""

    def run(script, count, flags, options="", root=ROOT, cwd=tmp_path):
        options = f"--nproc-per-node {count} {options}"
        return start(script, flags, cwd, root, torchrun=options)

    return run


def saved_step(folder):
    """Agent steps of the checkpoint, 0 if it is missing, as it is while a new one replaces it."""
    try:
        return counters(folder)[0]
    except FileNotFoundError:
        return 0


def replays_of(folder, count=2):
    return [folder / "replay", *(folder / f"rank{rank}" / "replay" for rank in range(1, count))]


def rows_in_replays(folder):
    """Rows that the replay of each process had at the checkpoint."""
    return [rank["replay"]["end"] for rank in checkpoint(folder)["ranks"]]


def workers(process):
    """Process ids of the ranks that a torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    found = {int(re.search(rb"\0RANK=(\d+)", text)[1]): pid for pid, text in names.items()}
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_processes_with_a_share_of_the_batch_have_the_gradients_of_one_with_all_of_it(
    tmp_path, torchrun
):
    found = []
    for count in (1, 3):
        finish(torchrun("tests/share_of_a_batch.py", count, f"{count}.npz"))
        found.append(dict(np.load(tmp_path / f"{count}.npz")))
    one, three = found
    names = [name for name in one if ", below, " in name or ", above, " in name]
    assert len(names) > 200
    for name in names:
        assert np.abs(three[name] - one[name]).max() <= 1e-4 * np.abs(one[name]).max(), name
    for kind in {name.split(",")[0] for name in names}:
        # Free nats lie between the KLs of the shares, so that all must look at the whole batch.
        kl = one[f"{kind}, kl"]
        shares = kl.reshape(3, -1).mean(1)
        assert shares.min() < 0.98 * kl.mean() < 1.02 * kl.mean() < shares.max()
        layer = 2 if kind.startswith("v3") else 1
        prior = f"world_model.rssm.img_out.{layer}.weight"
        assert three[f"{kind}, below, {prior}"].any()
        if "each step" not in kind:  # the KL costs nothing then, and nothing else trains it
            assert not three[f"{kind}, above, {prior}"].any()
        # The networks stay the same, though the noise differs.
        assert three[f"{kind}, same"].tolist() == [True] * 3
        assert len(set(three[f"{kind}, noise"])) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("script", "count"), [("dreamerv1.py", 2), ("dreamerv2.py", 3)])
def test_a_run_of_several_processes_counts_frames_updates_and_episodes_as_one_does(
    script, count, tmp_path, torchrun
):
    flags = f"{FLAGS[script]} --total-frames 300 --num-envs 2 --checkpoint-every 100"
    done = finish(torchrun(script, count, flags))
    folder = the_run(tmp_path)
    last = metrics(folder)[-1]
    width = 2 * count
    assert 300 <= last["frames"] < 300 + width
    # 2 updates, then, from frame 100 on, one every 20 frames; V2 begins with one of these.
    assert last["updates"] == 2 + (last["frames"] - 100) // 20 + (script == "dreamerv2.py")
    ends = rows_in_replays(folder)
    assert len(ends) == count
    assert len(set(ends)) == 1
    arrays = {
        name: [np.load(replay / f"{name}.npy")[: ends[0]] for replay in replays_of(folder, count)]
        for name in ("is_terminal", "is_first", "vector")
    }
    # The episodes of all processes are logged, and each has episodes of its own.
    assert len(values(folder, "charts/episodic_length")) == np.sum(arrays["is_terminal"])
    assert last["frames"] == width * ends[0] - np.sum(arrays["is_first"])
    assert len({vector.tobytes() for vector in arrays["vector"]}) == count
    assert len(values(folder, "eval/episodic_return")) == 2
    for files in ("metrics.jsonl", "*.tfevents*", "*.pt"):
        assert not list(folder.glob(f"rank*/{files}"))
    assert done.out.count("a new run begins in") == 1  # one of them speaks
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_resume_restores_every_replay(tmp_path, torchrun):
    flags = f"{FLAGS['dreamerv2.py']} --num-envs 2 --async-envs --total-frames 100000"
    process = torchrun("dreamerv2.py", 2, flags)
    wait_until(lambda: has_logged(tmp_path, '"updates": 5'))
    process.send_signal(signal.SIGTERM)
    done = finish(process, 1)
    folder = the_run(tmp_path)
    [line] = [line for line in done.out.splitlines() if "--resume" in line]
    assert line.startswith("go on with: torchrun --nproc-per-node 2 ")
    assert f"--resume {folder.relative_to(tmp_path)}" in line
    assert "error: " not in done.err
    step, updates = counters(folder)
    assert updates >= 5
    ends = rows_in_replays(folder)
    replays = replays_of(folder)
    before = [np.load(r / "vector.npy")[:end] for r, end in zip(replays, ends, strict=True)]
    finish(torchrun("dreamerv2.py", 2, f"--resume {folder} --total-frames {step + 60}"))
    rows = metrics(folder)
    assert step + 60 <= rows[-1]["frames"] < step + 64
    assert rows[-1]["updates"] > updates
    frames = [row["frames"] for row in rows]
    assert frames == sorted(frames)
    for replay, vector, end in zip(replays, before, ends, strict=True):
        assert np.array_equal(np.load(replay / "vector.npy")[:end], vector)
        assert np.load(replay / "is_first.npy")[end].all()
    assert "in 2 episodes" in finish(start("dreamerv2.py", f"--evaluate {folder}", tmp_path)).out


@pytest.mark.slow
def test_a_job_that_is_queued_again_with_the_same_command_goes_on(tmp_path, torchrun):
    script = "dreamerv2.py"
    flags = f"--resume runs/x {FLAGS[script]} --total-frames 2000"
    folder = tmp_path / "runs" / "x"
    job = torchrun(script, 2, flags)
    wait_until(lambda: has_logged(tmp_path, '"updates": 5'))
    job.send_signal(signal.SIGTERM)
    assert finish(job, 1).out.startswith("a new run begins in runs/x\n")
    step, updates = counters(folder)
    assert 0 < step < 2000
    assert finish(torchrun(script, 2, flags)).out.startswith("the run in runs/x goes on\n")
    rows = metrics(folder)
    frames = [row["frames"] for row in rows]
    assert 2000 <= frames[-1] < 2002
    assert frames == sorted(frames)
    assert any(step <= count < step + 50 for count in frames)
    assert rows[-1]["updates"] > updates
    done = finish(torchrun(script, 2, flags))  # nothing is left to do
    assert done.out.startswith("the run in runs/x goes on\n")
    assert metrics(folder) == rows
    assert the_run(tmp_path) == folder


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_of_them_with_a_line_and_torchrun_resumes_them(
    rank, tmp_path, torchrun
):
    """The command names a folder: the first start begins a run there, the second one goes on."""
    script = SCRIPTS[rank]
    flags = f"--resume runs/x {FLAGS[script]} --checkpoint-every 50 --total-frames 100000"
    folder = tmp_path / "runs" / "x"
    process = torchrun(script, 2, flags, "--max-restarts 1")
    wait_until(lambda: saved_step(folder) >= 150)
    first = workers(process)
    step = saved_step(folder)
    os.kill(first[rank], signal.SIGKILL)
    wait_until(lambda: saved_step(folder) >= step + 100)
    second = workers(process)
    assert not set(first) & set(second)
    os.kill(second[rank], signal.SIGKILL)
    done = finish(process, 1)  # no restart is left
    starts = [line for line in done.out.splitlines() if "runs/x" in line]
    assert starts == ["a new run begins in runs/x", "the run in runs/x goes on"]
    line = "error: another process is gone, go on from the last checkpoint with --resume"
    assert done.err.count(line) == 2  # of the one that was left, each time
    assert the_run(tmp_path) == folder
    frames = [row["frames"] for row in metrics(folder)]
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
runtime.print_estimate = lambda *inputs: None  # all updates are the run's own
with runtime.exit_on_error():
    args = runtime.parse_args(script.Args, script.PRESETS, common.choose_preset)
    code = script.main(args)
np.savez(f"rank{{runtime.RANK}}.npz", windows=windows, noise=noise, weights=weights)
sys.exit(code)
"""


@pytest.mark.slow
@EVERY_SCRIPT
def test_each_process_draws_noise_of_its_own_and_still_has_the_networks_of_the_others(
    script, tmp_path, torchrun
):
    """Their environments show the same, so that only the draws can make a difference."""
    text = CLOCK_AND_NOISE.format(root=ROOT, module=Path(script).stem)
    (tmp_path / "job.py").write_text(text)
    folder = tmp_path / "runs" / "x"
    flags = f"{FLAGS[script]} --env-id Clock-v0 --batch-size 16 --resume runs/x"
    # The second job goes on with the first one's run, by code that the scripts share.
    for total in (200, 300) if script == "dreamerv2.py" else (200,):
        finish(torchrun("job.py", 2, f"{flags} --total-frames {total}", root=tmp_path))
        one, other = (np.load(tmp_path / f"rank{rank}.npz") for rank in (0, 1))
        assert len(one["windows"]) == len(other["windows"]) >= 5
        for name in ("windows", "noise"):  # of each update
            assert (one[name] != other[name]).any(1).all(), name
            assert len(np.unique(one[name], axis=0)) == len(one[name]), name
        assert np.array_equal(one["weights"], other["weights"])
        mine, theirs = (rank["generators"][0] for rank in checkpoint(folder)["ranks"])
        assert not torch.equal(mine, theirs)
        [rows] = set(rows_in_replays(folder))
        replays = replays_of(folder)
        vectors = [np.load(replay / "vector.npy")[:rows, 0, 0] for replay in replays]
        assert np.array_equal(vectors[0], vectors[1])
        actions = [np.load(replay / "action.npy")[:rows, 0] for replay in replays]
        differ = (actions[0] != actions[1]).any(1)
        # Four of five random actions differ, and of learned ones, which come last, hardly fewer.
        assert differ[:50].mean() > 0.5
        assert differ[-50:].mean() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_environment_that_fails_in_one_process_leaves_replays_of_one_length(
    rank, tmp_path, torchrun
):
    script = SCRIPTS[rank]
    let_fail(tmp_path, 1, [rank], episode=4)
    env_id = "helpers.failing:step-raise-v0"
    flags = f"{FLAGS[script]} --total-frames 300 --eval-every 0 --env-id {env_id}"
    done = finish(torchrun(script, 2, flags), 1)
    [line] = [line for line in done.err.splitlines() if "error: " in line]
    failed = (
        f"error: environment {rank} of step-raise-v0 .* failed: ZeroDivisionError: first second"
    )
    assert re.search(failed, line)
    folder = the_run(tmp_path)
    go_on = f"--resume {folder.relative_to(tmp_path)} --env-id {env_id}"
    assert go_on in done.out
    assert saved_step(folder) == 2 * (4 * STEPS + FAILS_AT - 1)
    # The step that failed is missing everywhere, also where it did not fail.
    rows = 4 * (STEPS + 1) + FAILS_AT
    replays = replays_of(folder)
    assert rows_in_replays(folder) == [rows] * 2
    assert [np.load(replay / "written.npy")[0, 0] for replay in replays] == [rows] * 2
    finish(torchrun(script, 2, go_on))
    assert metrics(folder)[-1]["frames"] == 300
    [end] = set(rows_in_replays(folder))
    first = [np.load(replay / "is_first.npy")[:end, 0] for replay in replays]
    assert np.array_equal(first[0], first[1])
    assert first[0][rows]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@EVERY_SCRIPT
def test_nccl_inside_the_captured_update_learns_as_outside_of_it(script, tmp_path, torchrun):
    losses = {}
    for graph in ("graph", "no-graph"):
        (folder := tmp_path / graph).mkdir()
        flags = f"{FLAGS[script]} --precision float32 --total-frames 400 --log-every 20 --{graph}"
        finish(torchrun(script, 2, flags, cwd=folder))
        losses[graph] = [loss for _, loss in values(the_run(folder), "losses/vector")]
    assert len(losses["graph"]) > 10
    assert losses["graph"] == pytest.approx(losses["no-graph"], rel=0.2)
