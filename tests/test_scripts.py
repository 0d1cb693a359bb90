"""The scripts as a user runs them: what a run leaves, how it stops and goes on, what it refuses.

Most runs are subprocesses in a folder of their own, small enough for a few seconds each.
"""

import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import start
from torch import nn

import common
import runtime
from common import Replay

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dreamerv1.py", "dreamerv2.py"]
TINY = """--batch-size 3 --batch-length 7 --deter 16 --hidden 16 --units 16 --stoch 3 --cnn-depth 2
    --pretrain 2 --train-every 20 --prefill 200 --eval-episodes 2 --threads 1"""
SIZES = {"dreamerv1.py": f"{TINY} --train-steps 1", "dreamerv2.py": TINY}
SMALL = {script: f"--total-frames 300 {SIZES[script]}" for script in SCRIPTS}
CLOCK = {"seconds", "charts/SPS", "time/updates_per_second"}

ENVS = """
import gymnasium as gym
import numpy as np

box = gym.spaces.Box(-1, 1, (2,))
SPACES = {
    "MultiDiscrete": (box, gym.spaces.MultiDiscrete([2, 3])),
    "Tuple": (gym.spaces.Tuple([box, box]), gym.spaces.Discrete(2)),
    "Huge": (box, gym.spaces.Discrete(2)),
}


class Env(gym.Env):
    steps = 0

    def __init__(self, kind, render_mode=None):
        self.observation_space, self.action_space = SPACES[kind]

    def reset(self, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        Env.steps += 1
        return np.zeros(2, np.float32), 1e30 if Env.steps > 250 else 0.0, False, False, {}


for kind in SPACES:
    gym.register(f"{kind}-v0", Env, kwargs={"kind": kind}, max_episode_steps=30)
"""


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


def finish(process, code=0, timeout=300):
    """Waits for the process -> its code, out and err; none of them may hold a traceback."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "Traceback" not in out + err
    return SimpleNamespace(out=out, err=err)


def play(script, flags, cwd, root=ROOT):
    """A whole run -> its folder, its rows of metrics, what it printed."""
    done = finish(start(script, flags, cwd, root))
    [folder] = (cwd / "runs").iterdir()
    return SimpleNamespace(cwd=cwd, folder=folder, rows=metrics(folder), **vars(done))


def parse(module, flags):
    return runtime.parse_args(module.Args, module.PRESETS, common.choose_preset, flags.split())


def play_here(script, flags, code=0):
    """A whole run in this process and folder -> its rows of metrics."""
    module = importlib.import_module(Path(script).stem)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert module.main(parse(module, flags)) == code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    [folder] = Path("runs").iterdir()
    return metrics(folder)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def counters(folder):
    """Agent steps and updates of the checkpoint."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["counters"]
    return saved["step"], saved["updates"]


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def assert_learnt(rows):
    """Updates beyond those of pretraining, losses of all three, evaluation, nothing infinite."""
    tags = set().union(*rows)
    assert tags >= {"losses/model", "losses/kl", "losses/reward", "losses/actor", "losses/critic"}
    assert tags >= {"eval/episodic_return", "replay/rows"}
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(list(row)[:3] == ["frames", "updates", "seconds"] for row in rows)
    for key in ("frames", "updates", "seconds"):
        assert all(a[key] <= b[key] for a, b in pairwise(rows)), key
    assert rows[-1]["updates"] > 2


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small(script, tmp_path_factory):
    """A run that the tests below look at; those that change it take a copy."""
    return play(script, f"--env-id CartPole-v1 {SMALL[script]}", tmp_path_factory.mktemp("small"))


@pytest.fixture
def copied(small, tmp_path):
    shutil.copytree(small.cwd, tmp_path, dirs_exist_ok=True)
    return tmp_path / small.folder.relative_to(small.cwd)


@pytest.fixture(scope="module")
def mine(script, tmp_path_factory):
    """The same run by a copy of the script under another name."""
    root = tmp_path_factory.mktemp("mine")
    for name in ("common.py", "runtime.py"):
        shutil.copy(ROOT / name, root)
    shutil.copy(ROOT / script, root / "mine.py")
    return play("mine.py", f"--env-id CartPole-v1 {SMALL[script]}", root, root)


# A run
def test_a_run_learns_with_finite_losses(small):
    assert_learnt(small.rows)
    assert small.rows[-1]["frames"] == 300
    assert {"charts/episodic_return", "charts/episodic_length"} < set().union(*small.rows)


def test_a_run_says_at_the_start_what_it_runs_on(small):
    for word in ("CartPole-v1", "cpu", "float32", str(small.folder.name), "parameters", "replay"):
        assert word in small.out


def test_a_run_folder_can_be_read_without_our_code(small, script):
    args = yaml.safe_load((small.folder / "args.yaml").read_text())
    assert args["env_id"] == "CartPole-v1"
    assert args["deter"] == 16
    name = f"CartPole-v1__{Path(script).stem}__1__"
    assert small.folder.name.startswith(name)
    assert list(small.folder.glob("events.out.tfevents.*"))
    rows = small.rows[-1]["replay/rows"]
    replay = {path.stem: np.load(path) for path in (small.folder / "replay").glob("*.npy")}
    assert set(replay) >= {"vector", "action", "reward", "is_first", "is_terminal"}
    assert replay["vector"].shape[1:] == (1, 4)
    assert replay["reward"].sum() == 300  # CartPole gives 1 for every step
    assert replay["is_first"].sum() == rows - 300
    assert counters(small.folder) == (300, small.rows[-1]["updates"])


def test_tensorboard_holds_the_numbers_of_metrics_jsonl(small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(small.folder)).Reload()
    for tag in ("losses/model", "eval/episodic_return", "charts/episodic_return"):
        ours = [(row["frames"], row[tag]) for row in small.rows if tag in row]
        theirs = [(event.step, event.value) for event in events.Scalars(tag)]
        assert np.array(theirs) == pytest.approx(np.array(ours)), tag


def test_a_copy_of_the_script_runs_and_logs_under_its_own_name(mine):
    assert mine.folder.name.startswith("CartPole-v1__mine__1__")
    assert_learnt(mine.rows)


def test_the_same_seed_gives_the_same_metrics(small, mine):
    assert without_clock(mine.rows) == without_clock(small.rows)


def test_another_seed_gives_other_metrics(script, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = play_here(script, f"--env-id CartPole-v1 {SMALL[script]} --seed 2")
    for tag in ("charts/episodic_return", "losses/model"):
        ours, theirs = ([row[tag] for row in rows if tag in row] for rows in (small.rows, other))
        assert ours
        assert ours != theirs, tag


SCHEDULES = {  # flags, random actions, updates after an agent step (of 2 frames)
    "dreamerv1.py": (  # in env frames
        "--prefill 81 --train-every 30 --train-steps 3 --pretrain 4",
        41,
        lambda step: 4 + 3 * ((2 * step - 81) // 30),
    ),
    "dreamerv2.py": (  # in agent steps
        "--prefill 61 --train-every 15 --pretrain 4",
        61,
        lambda step: 5 + (step - 61) // 15,
    ),
}


def test_random_play_and_updates_are_counted_in_the_units_of_the_paper(
    script, tmp_path, monkeypatch
):
    flags, prefill, updates = SCHEDULES[script]
    played, random_actions = [], common.Envs.random_actions

    def spy_random_actions(envs):
        if envs.num_envs == 1:  # not the reset of an evaluation
            played.append(1)
        return random_actions(envs)

    monkeypatch.setattr(common.Envs, "random_actions", spy_random_actions)
    monkeypatch.chdir(tmp_path)
    flags = f"--env-id Pendulum-v1 {SMALL[script]} --action-repeat 2 --total-frames 190 {flags}"
    rows = play_here(script, f"{flags} --log-every 1")
    assert len(played) == 1 + prefill  # the first step is the reset, which ignores it
    learnt = {row["frames"]: row["updates"] for row in rows if "losses/model" in row}
    assert learnt == {2 * step: updates(step) for step in range(prefill, 96)}


def test_a_turn_acts_then_learns_and_then_observes(script, tmp_path, monkeypatch):
    module = importlib.import_module(Path(script).stem)
    events = []

    def spy(owner, name, event):
        function = getattr(owner, name)

        def noting(*args, **kwargs):
            envs = getattr(args[0], "num_envs", None)
            if envs != 2:  # those of the evaluation
                events.append(event)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, noting)

    spy(module, "update", "learn")
    spy(common.Envs, "send", "send")
    spy(common.Envs, "receive", "receive")
    spy(Replay, "add", "keep")
    monkeypatch.chdir(tmp_path)
    flags = f"--env-id Pendulum-v1 {SMALL[script]} --num-envs 3 --eval-every 0"
    play_here(script, f"{flags} --total-frames 420")
    letters = {"send": "s", "learn": "l", "receive": "r", "keep": "k"}
    turns = "".join(letters[event] for event in events)
    assert re.fullmatch("(sl*rk)+l*", turns)
    assert turns.count("l") > 10
    assert "srk" in turns  # no update is due after most steps


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_dreamerv1_adds_noise_to_actions_in_training_and_nothing_does_in_evaluation(
    script, tmp_path, monkeypatch, env_id
):
    module = importlib.import_module(Path(script).stem)
    policy, send = module.policy, common.Envs.send
    chosen, taken = {3: [], 1: []}, {3: [], 1: []}  # by the number of environments

    def spy_policy(*args, **kwargs):
        action, state = policy(*args, **kwargs)
        chosen[len(action)].append(action.numpy())
        return action, state

    def spy_send(envs, action):
        if not envs.all_ended:  # a reset ignores the action
            taken[len(action)].append(action.numpy())
        send(envs, action)

    monkeypatch.setattr(module, "policy", spy_policy)
    monkeypatch.setattr(common.Envs, "send", spy_send)
    monkeypatch.chdir(tmp_path)
    noise = "--expl-noise 0.3 --expl-epsilon 0.6 --expl-min 0.6" if "v1" in script else ""
    flags = f"{SMALL[script]} --num-envs 3 --eval-episodes 1 --total-frames 600 {noise}"
    play_here(script, f"--env-id {env_id} {flags}")
    assert np.array_equal(chosen[1], taken[1])
    ours, theirs = np.array(chosen[3]), np.array(taken[3][-len(chosen[3]) :])
    assert len(ours) > 100
    if "v2" in script:
        assert np.array_equal(ours, theirs)
    elif env_id == "CartPole-v1":
        assert 0.2 < (ours != theirs).any(-1).mean() < 0.4  # half of the random ones are others
    else:
        inside = abs(theirs) < 1
        assert abs(theirs).max() == 1
        assert 0.2 < (theirs - ours)[inside].std() < 0.35


SETTINGS = [
    "--env-id Pendulum-v1 --num-envs 3",
    "--env-id CartPole-v1 --pixels",
    "--env-id dm_control/cartpole-swingup-v0 --observation vector --total-frames 600",
]
SLOW_SETTINGS = [
    "--env-id Pendulum-v1 --pixels --grayscale --num-envs 2",
    "--env-id CartPole-v1 --precision bfloat16",
    "--env-id CartPole-v1 --observation both",
    "--env-id dm_control/cartpole-swingup-v0 --total-frames 600",
    "--env-id PongNoFrameskip-v4 --total-frames 1200 --time-limit 400",
]
SLOW_SETTINGS_OF_ITS_OWN = {
    "dreamerv1.py": [
        "--env-id Pendulum-v1 --actor-grad reinforce --actor-entropy 1e-3 --torch-deterministic",
    ],
    "dreamerv2.py": [
        "--env-id Pendulum-v1 --actor-dist tanh_normal",
        "--env-id CartPole-v1 --torch-deterministic --action-repeat 2 --total-frames 600",
        "--env-id dmc/cartpole-swingup --observation both --total-frames 600",
        "--env-id ALE/Pong-v5 --total-frames 1200 --time-limit 400 --no-grayscale --num-envs 2",
    ],
}


def settings():
    """(script, flags) for pytest: all settings with both scripts, and each script's own."""
    for script in SCRIPTS:
        yield from ((script, flags) for flags in SETTINGS)
        for flags in SLOW_SETTINGS + SLOW_SETTINGS_OF_ITS_OWN[script]:
            yield pytest.param(script, flags, marks=pytest.mark.slow)


@pytest.mark.parametrize(("script", "flags"), settings())
def test_a_run_learns_on_every_kind_of_environment(script, tmp_path, flags):
    run = play(script, f"{SMALL[script]} {flags}", tmp_path)
    assert_learnt(run.rows)
    total = int(re.findall(r"--total-frames (\d+)", f"{SMALL[script]} {flags}")[-1])
    assert total <= run.rows[-1]["frames"] < total + 20
    num_envs = int((re.findall(r"--num-envs (\d+)", flags) or [1])[0])
    assert np.load(run.folder / "replay" / "reward.npy").shape[1] == num_envs


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_environments_in_processes_of_their_own_give_the_numbers_of_those_in_turn(
    script, env_id, tmp_path
):
    flags = f"--env-id {env_id} --num-envs 3 --eval-every 100 {SMALL[script]} --log-every 30"
    rows = []
    for name, more in (("turn", ""), ("processes", "--async-envs")):
        (tmp_path / name).mkdir()
        run = play(script, f"{flags} {more}", tmp_path / name)
        weights = torch.load(run.folder / "checkpoint.pt", weights_only=True)["agent"]
        rows.append((without_clock(run.rows), weights))
    assert rows[0][0] == rows[1][0]
    for name, weight in rows[0][1].items():
        assert torch.equal(weight, rows[1][1][name]), name


def test_dreamerv2_copies_the_critic_at_update_0_and_every_slow_update_only(tmp_path, monkeypatch):
    module, seen = importlib.import_module("dreamerv2"), []
    update = module.update

    def spy(agent, *args, **kwargs):
        """Sees the critics as the last update, and what followed it, have left them."""
        seen.append([nn.utils.parameters_to_vector(agent[k].parameters()) for k in critics])
        return update(agent, *args, **kwargs)

    critics = "critic", "slow_critic"
    monkeypatch.setattr(module, "update", spy)
    monkeypatch.chdir(tmp_path)
    flags = f"--env-id CartPole-v1 {SMALL['dreamerv2.py']} --pretrain 7 --slow-update 3"
    play_here("dreamerv2.py", f"{flags} --critic-lr 0.01")
    copied = []
    for (old, old_slow), (critic, slow) in pairwise(seen):
        assert not critic.equal(old)
        copied.append(slow.equal(critic))
        assert copied[-1] or slow.equal(old_slow)
    assert len(copied) == 12
    assert [i for i, was in enumerate(copied) if was] == [0, 3, 6, 9]


# Videos
@pytest.mark.slow
def test_capture_video_films_an_episode_of_each_evaluation(script, tmp_path):
    flags = f"--env-id CartPole-v1 {SMALL[script]} --pixels --eval-every 250 --video-every 250"
    run = play(script, f"{flags} --capture-video", tmp_path)
    evaluations = [row for row in run.rows if "eval/episodic_return" in row]
    films = sorted((run.folder / "videos").glob("*episode*.gif"))
    assert len(films) == len(evaluations) == 2
    dreams = list((run.folder / "videos").glob("open_loop*.gif"))
    assert len(dreams) == 2  # at frame 250 and at the end
    for path in [*films, *dreams]:
        with Image.open(path) as film:
            assert film.n_frames > 3
    before = contents(run.folder)
    finish(start(script, f"--evaluate {run.folder} --capture-video", tmp_path))
    new = set(contents(run.folder)) - set(before)
    assert [path.suffix for path in new] == [".gif"]


# Going on
@pytest.fixture(scope="module")
def resumed(script, small, tmp_path_factory):
    """The small run, 100 frames further."""
    cwd = tmp_path_factory.mktemp("resumed")
    shutil.copytree(small.cwd, cwd, dirs_exist_ok=True)
    flags = f"--resume {small.folder.relative_to(small.cwd)} --total-frames 400 --log-every 1"
    return play(script, flags, cwd)


def test_resume_goes_on_where_the_run_stopped(small, resumed):
    assert resumed.folder.name == small.folder.name
    assert_learnt(resumed.rows)  # all rows, so that counters never fall
    old, new = resumed.rows[: len(small.rows)], resumed.rows[len(small.rows) :]
    assert old == small.rows
    assert new[0]["frames"] > 300
    assert new[-1]["frames"] == 400
    assert new[0]["updates"] == old[-1]["updates"]
    assert new[-1]["updates"] == old[-1]["updates"] + 5
    assert counters(resumed.folder) == (400, new[-1]["updates"])


def test_resume_restores_the_replay(small, resumed):
    old, new = (
        {path.stem: np.load(path) for path in (run.folder / "replay").glob("*.npy")}
        for run in (small, resumed)
    )
    before, after = (
        next(int(row["replay/rows"]) for row in reversed(run.rows) if "replay/rows" in row)
        for run in (small, resumed)
    )
    for name in ("vector", "action", "reward", "is_first", "is_terminal"):
        assert np.array_equal(new[name][:before], old[name][:before]), name
    assert new["is_first"][before] == 1
    assert after == before + 100 + new["is_first"][before:after].sum()  # resets are rows as well
    assert new["reward"][:after].sum() == 400


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(script, tmp_path):
    flags = f"--env-id CartPole-v1 {SIZES[script]} --total-frames 100000 --checkpoint-every 250"
    process = start(script, flags, tmp_path)
    folder = wait_for(
        tmp_path,
        lambda folder: (folder / "checkpoint.pt").exists() and counters(folder)[1] > 0,
    )
    rows_before = len(metrics(folder))
    wait_for(tmp_path, lambda folder: len(metrics(folder)) > rows_before + 3)
    process.kill()
    process.communicate()
    step, updates = counters(folder)
    total = step + 100
    finish(start(script, f"--resume {folder} --total-frames {total}", tmp_path))
    rows = metrics(folder)
    assert_learnt(rows)
    assert rows[-1]["frames"] == total
    assert rows[-1]["updates"] > updates


def wait_for(cwd, ready, timeout=60):
    """Waits until ready(run folder) -> the run folder."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        time.sleep(0.05)
        for folder in cwd.glob("runs/*"):
            if (folder / "metrics.jsonl").exists() and ready(folder):
                return folder
    raise AssertionError(f"not ready within {timeout} s")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_says_how_to_go_on(
    script, tmp_path, number, code
):
    flags = f"--env-id CartPole-v1 {SIZES[script]} --total-frames 100000 --log-every 50"
    process = start(script, flags, tmp_path)
    folder = wait_for(
        tmp_path, lambda folder: '"updates": 5' in (folder / "metrics.jsonl").read_text()
    )
    assert counters(folder) == (200, 0)  # of the end of random play
    process.send_signal(number)
    done = finish(process, code)
    step, updates = counters(folder)
    assert updates >= 5
    assert step - 50 < metrics(folder)[-1]["frames"] <= step
    [line] = [line for line in done.out.splitlines() if "--resume" in line]
    assert f"{script} --resume {folder.relative_to(tmp_path)}" in line


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_lets_processes_of_environments_finish(script, tmp_path):
    flags = f"--env-id CartPole-v1 {SIZES[script]} --num-envs 2 --async-envs --total-frames 100000"
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *flags.split(), "--log-every", "50"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, start_new_session=True, **pipes)
    folder = wait_for(
        tmp_path, lambda folder: '"updates": 5' in (folder / "metrics.jsonl").read_text()
    )
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process of the group
    finish(process, 130)
    assert counters(folder)[1] >= 5


def test_a_signal_in_an_evaluation_ends_a_run_with_a_checkpoint(script, tmp_path, monkeypatch):
    def interrupted(envs, act, state, episodes, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return np.zeros(episodes), 0, []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "evaluate", interrupted)
    flags = f"--env-id CartPole-v1 {SIZES[script]} --total-frames 1000 --eval-every 250"
    play_here(script, flags, code=143)
    [folder] = (tmp_path / "runs").iterdir()
    assert counters(folder)[0] in (250, 251)


def test_a_training_that_a_signal_broke_off_is_made_up_for(script, tmp_path, monkeypatch):
    module = importlib.import_module(Path(script).stem)
    update, calls = module.update, []

    def interrupted(*args, **kwargs):
        calls.append(os.kill(os.getpid(), signal.SIGTERM) if len(calls) == 2 else None)
        return update(*args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "update", interrupted)
    play_here(script, f"--env-id CartPole-v1 {SMALL[script]} --pretrain 9", code=143)
    [folder] = (tmp_path / "runs").iterdir()
    assert counters(folder) == (200, 3)
    play_here(script, f"--resume {folder} --total-frames 201")
    assert counters(folder) == (201, {"dreamerv1.py": 9, "dreamerv2.py": 10}[script])


# Evaluation
def test_evaluate_prints_the_mean_and_leaves_the_run_as_it_is(script, small, copied):
    before = contents(copied)
    flags = f"--evaluate {copied.relative_to(copied.parents[1])} --eval-episodes 3"
    done = finish(start(script, flags, copied.parents[1]))
    [line] = done.out.splitlines()
    mean = re.search(r"(\d+\.\d) \+- \d+\.\d in 3 episodes", line)[1]
    assert 8 <= float(mean) <= 500  # what an episode of CartPole can give
    assert contents(copied) == before
    assert [folder.name for folder in copied.parent.iterdir()] == [small.folder.name]


# What a run refuses
def test_a_loss_that_is_not_finite_stops_the_run_before_the_next_checkpoint(script, tmp_path):
    (tmp_path / "odd_envs.py").write_text(ENVS)
    flags = f"--env-id odd_envs:Huge-v0 {SIZES[script]} --total-frames 1000 --checkpoint-every 240"
    done = finish(start(script, flags, tmp_path), code=1)
    [folder] = (tmp_path / "runs").iterdir()
    assert counters(folder)[0] == 240
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    [line] = [line for line in done.err.splitlines() if "error:" in line]
    assert re.match(r"error: .*update \d+.*losses/reward", line)


def refuse(script, flags, capsys):
    """Runs main in this process -> what it says on stderr; it must exit with code 2."""
    module = importlib.import_module(Path(script).stem)
    with pytest.raises(SystemExit) as exit_, runtime.exit_on_error():
        module.main(parse(module, flags))
    assert exit_.value.code == 2
    assert not Path("runs").exists()
    return capsys.readouterr().err


BAD_IN_COMMON = {  # what common.py refuses, run by one script
    "--env-id CartPol-v1": "CartPol-v1.*Did you mean: `CartPole`",
    "--env-id Nothing/Like-this-v0": "no Nothing/Like-this-v0",
    "--env-id no_module:Thing-v0": "no_module",
    "--env-id dm_control/walker-wlk-v0": "dm_control/walker-wlk-v0.*walker-walk",
    "--env-id odd_envs:MultiDiscrete-v0": "Discrete fit, not .*MultiDiscrete",
    "--env-id odd_envs:Tuple-v0": "only Box, Dict of Box, .* not Tuple",
    "--env-id PongNoFrameskip-v4 --observation vector": "vector",
    "--env-id CartPole-v1 --track": "--track needs pip install wandb",
    "--evaluate nowhere": "nowhere is no run folder of this script",
    "--evaluate empty": "empty is no run folder of this script",
    "--resume full": "full is no run folder of this script",
    "--resume odd_envs.py": "odd_envs.py is no run folder of this script",
}
BAD = {
    "--env-id CartPole-v1 --batch-length 201": "batch-length 201.*prefill",
    "--env-id CartPole-v1 --num-envs 40": "batch-length 7.*prefill",
    "--env-id CartPole-v1 --batch-length 50 --replay-size 40": "batch-length 50.*replay-size",
    "--env-id CartPole-v1 --batch-size 0": "--batch-size is 0",
    "--env-id CartPole-v1 --batch-length -3": "--batch-length is -3",
    "--env-id CartPole-v1 --deter -16": "--deter is -16",
    "--env-id CartPole-v1 --units 0": "--units is 0",
    "--env-id CartPole-v1 --num-envs 0": "--num-envs is 0",
    "--env-id CartPole-v1 --train-every 0": "--train-every is 0",
    "--env-id CartPole-v1 --total-frames -1": "--total-frames is -1",
    "--env-id CartPole-v1 --imag-horizon 0": "--imag-horizon is 0",
    "--env-id CartPole-v1 --imag-horizon 1": "--imag-horizon is 1",
    "--env-id CartPole-v1 --prefill -1": "--prefill is -1",
    "--env-id CartPole-v1 --model-lr 0": "--model-lr is 0",
    "--env-id CartPole-v1 --model-lr nan": "--model-lr is nan",
    "--env-id CartPole-v1 --seed -1": "--seed is -1",
    "--env-id CartPole-v1 --pixels --replay-size 2000000000 --total-frames 2000000000":
        "GiB.*replay-size",
    "--env-id CartPole-v1 --actor-dist tanh_normal": "tanh_normal is not for CartPole-v1's",
    "--env-id Pendulum-v1 --actor-dist onehot": "onehot is not for Pendulum-v1's",
    "--resume foreign": "foreign is no run folder of this script",
    "--evaluate foreign": "foreign is no run folder of this script",
    "--resume begun": "no checkpoint can be read in begun: nothing was saved yet",
    "--evaluate begun": "no checkpoint can be read in begun",
    "--resume begun --deter 32": "--deter cannot change",
}  # fmt: skip
BAD_OF_ITS_OWN = {
    "dreamerv1.py": {
        # Frames: 200 of them are 50 rows.
        "--env-id CartPole-v1 --action-repeat 4 --batch-length 51": "batch-length 51.*prefill",
        "--env-id CartPole-v1 --train-steps 0": "--train-steps is 0",
        "--env-id CartPole-v1 --reward-layers 0": "--reward-layers is 0",
        "--env-id CartPole-v1 --expl-decay 0": "--expl-decay is 0",
        "--env-id Pendulum-v1 --expl-noise -0.3": "--expl-noise is -0.3",
    },
    "dreamerv2.py": BAD_IN_COMMON
    | {
        "--env-id CartPole-v1 --slow-update 0": "--slow-update is 0",
        "--env-id CartPole-v1 --classes 0": "--classes is 0",
    },
}


@pytest.mark.parametrize(
    ("script", "flags"), [(s, flags) for s in SCRIPTS for flags in BAD | BAD_OF_ITS_OWN[s]]
)
def test_bad_input_is_refused_in_one_line(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    (tmp_path / "odd_envs.py").write_text(ENVS)
    for name in ("foreign", "begun", "empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for other in SCRIPTS:
        args = dataclasses.asdict(importlib.import_module(Path(other).stem).Args())
        path = tmp_path / ("begun" if other == script else "foreign") / "args.yaml"
        path.write_text(yaml.safe_dump(args | {"env_id": "CartPole-v1"}))
    before = contents(tmp_path)
    message = refuse(script, flags if "begun" in flags else f"{SMALL[script]} {flags}", capsys)
    said = (BAD | BAD_OF_ITS_OWN[script])[flags]
    assert re.fullmatch(f"error: [^\n]*{said}[^\n]*\n", message), message
    assert set(contents(tmp_path)) - set(before) <= set((tmp_path / "__pycache__").glob("*"))


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("dreamerv1.py", "--kl-balance 0.8", ["--kl-balance"]),
        ("dreamerv1.py", "--classes 32", ["--classes"]),
        ("dreamerv1.py", "--slow-update 100", ["--slow-update"]),
        ("dreamerv1.py", "--actor-grad both", ["--actor-grad", "both", "dynamics", "reinforce"]),
        ("dreamerv1.py", "--actor-dist trunc_normal", ["--actor-dist", "trunc_normal"]),
        ("dreamerv2.py", "--train-steps 2", ["--train-steps"]),
        ("dreamerv2.py", "--expl-noise 0.3", ["--expl-noise"]),
        ("dreamerv2.py", "--act gelu", ["--act", "gelu", "elu", "silu"]),
        ("dreamerv2.py", "--deter many", ["--deter", "many"]),
    ],
)
def test_a_flag_that_cannot_be_read_is_named(script, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    message = refuse(script, f"--env-id CartPole-v1 {flags}", capsys)
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_the_script_itself_exits_with_code_2_and_one_line(script, tmp_path):
    done = finish(start(script, "--env-id CartPol-v1", tmp_path), code=2)
    assert done.out == ""
    assert re.fullmatch(r"error: no CartPol-v1: [^\n]*Did you mean: `CartPole`[^\n]*\n", done.err)
    assert not list(tmp_path.iterdir())


# Help and presets
IDS = ["CartPole-v1", "PongNoFrameskip-v4", "dm_control/walker-walk-v0"]


@pytest.mark.parametrize("env_id", IDS)
def test_help_shows_the_values_in_force_for_the_id(script, monkeypatch, capsys, env_id):
    module = importlib.import_module(Path(script).stem)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        parse(module, f"--env-id {env_id} --help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    preset = {"C": "other", "P": "atari", "d": "dmc_pixels"}[env_id[0]]
    in_force = dataclasses.asdict(module.Args()) | module.PRESETS[preset] | {"env_id": env_id}
    for name in (
        "env_id",
        "total_frames",
        "action_repeat",
        "prefill",
        "deter",
        "gamma",
        "model_lr",
    ):
        flag = f"--{name.replace('_', '-')}"
        shown = re.search(rf"{flag} [A-Z]+ .*?\(default: ([^)]*)\)", text, re.DOTALL)
        assert shown[1] == str(in_force[name]), name
    totals = {module.PRESETS[name].get("total_frames") for name in ("other", "atari", "dmc_pixels")}
    assert len(totals) == 3


@pytest.mark.parametrize(
    ("flags", "frames"),
    [
        ("PongNoFrameskip-v4", 4),
        ("dm_control/walker-walk-v0", 2),
        ("dm_control/walker-walk-v0 --observation vector", 2),
        ("CartPole-v1", 1),
    ],
)
def test_the_id_chooses_the_frames_of_an_agent_step(script, flags, frames):
    module = importlib.import_module(Path(script).stem)
    args = parse(module, f"--env-id {flags}")
    assert args.action_repeat == frames


# The paper's sizes, less the batch of DreamerV1's
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "env_id", "flags", "updates"),
    [
        (
            "dreamerv1.py",
            "PongNoFrameskip-v4",
            "--prefill 2000 --pretrain 1 --train-every 64 --train-steps 1 --total-frames 2256 "
            "--log-every 64 --batch-size 10",
            5,
        ),
        (
            "dreamerv1.py",
            "dm_control/walker-walk-v0",
            "--prefill 400 --pretrain 1 --train-every 4 --train-steps 1 --total-frames 412 "
            "--log-every 2 --batch-size 10",
            4,
        ),
        (
            "dreamerv2.py",
            "PongNoFrameskip-v4",
            "--prefill 500 --total-frames 2256 --log-every 64",
            5,
        ),
        (
            "dreamerv2.py",
            "dm_control/walker-walk-v0",
            "--prefill 200 --pretrain 1 --total-frames 412 --log-every 2",
            3,
        ),
    ],
)
def test_full_size_learns_in_memory_that_does_not_grow(script, tmp_path, env_id, flags, updates):
    flags = f"--env-id {env_id} {flags} --time-limit 100 --eval-episodes 1 --threads 1"
    process = start(script, flags, tmp_path)
    samples = []  # updates, MiB
    while process.poll() is None:
        time.sleep(0.1)
        for path in tmp_path.glob("runs/*/metrics.jsonl"):
            rows = path.read_text().splitlines()
            status = Path(f"/proc/{process.pid}/status").read_text()
            if rows and "RssAnon" in status:
                anon = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024
                samples.append((json.loads(rows[-1])["updates"], anon))
    finish(process)
    [folder] = (tmp_path / "runs").iterdir()
    assert_learnt(metrics(folder))
    assert metrics(folder)[-1]["updates"] >= updates
    early, late = (
        max(anon for seen, anon in samples if (seen <= updates // 2 + 1) == first)
        for first in (True, False)
    )
    assert late < 1.2 * early
