"""What a run does, in the order of the paper, and what it leaves in its folder."""

import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers.command_lines import outcome
from helpers.processes import ROOT, finish, start
from helpers.runs import (
    EVERY_SCRIPT, ONE_SCRIPT, TINY, TINY_V3, contents, counters, metrics, module_of, play,
    the_run, without_clock,
)  # fmt: skip
from PIL import Image
from torch import nn

import common

pytestmark = pytest.mark.usefixtures("no_estimate")

TINY = f"{TINY} --train-every 20 --total-frames 300"
SMALL = {"dreamerv1.py": f"{TINY} --train-steps 1", "dreamerv2.py": TINY}
SMALL["dreamerv3.py"] = f"{TINY_V3} --total-frames 300"


def assert_learnt(rows):
    """Updates beyond those of pretraining, losses of all three, evaluation, nothing infinite."""
    tags = set().union(*rows)
    assert tags >= {"losses/model", "model/kl", "losses/reward", "losses/actor", "losses/critic"}
    assert tags >= {"eval/episodic_return", "replay/rows"}
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(list(row)[:3] == ["frames", "updates", "seconds"] for row in rows)
    for key in ("frames", "updates", "seconds"):
        assert all(a[key] <= b[key] for a, b in pairwise(rows)), key
    assert rows[-1]["updates"] > 2


@pytest.fixture(scope="module")
def small(script, tmp_path_factory):
    """A run that the tests below look at."""
    cwd = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        code, _, out = outcome(script, f"--env-id CartPole-v1 {SMALL[script]}")
    assert code == 0
    folder = the_run(cwd)
    return SimpleNamespace(folder=folder, rows=metrics(folder), out=out)


def test_a_run_makes_updates_with_finite_losses_and_says_what_it_runs_on(small):
    assert_learnt(small.rows)
    assert small.rows[-1]["frames"] == 300
    assert {"charts/episodic_return", "charts/episodic_length"} < set().union(*small.rows)
    for word in ("CartPole-v1", "cpu", "float32", str(small.folder.name), "parameters", "replay"):
        assert word in small.out


def test_a_run_folder_can_be_read_without_our_code(small, script):
    args = yaml.safe_load((small.folder / "args.yaml").read_text())
    assert (args["env_id"], args["deter"]) == ("CartPole-v1", 16)
    assert small.folder.name.startswith(f"CartPole-v1__{Path(script).stem}__1__")
    replay = {path.stem: np.load(path) for path in (small.folder / "replay").glob("*.npy")}
    assert set(replay) >= {"vector", "action", "reward", "is_first", "is_terminal"}
    assert replay["vector"].shape[1:] == (1, 4)
    assert replay["reward"].sum() == 300  # CartPole gives 1 for every step
    assert replay["is_first"].sum() == small.rows[-1]["replay/rows"] - 300
    assert counters(small.folder) == (300, small.rows[-1]["updates"])
    assert list(small.folder.glob("events.out.tfevents.*"))


@ONE_SCRIPT
def test_a_copy_of_the_script_gives_the_same_metrics_under_its_own_name(script, small, tmp_path):
    for name in ("common.py", "runtime.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / script, tmp_path / "mine.py")
    finish(start("mine.py", f"--env-id CartPole-v1 {SMALL[script]}", tmp_path, tmp_path))
    folder = the_run(tmp_path)
    assert folder.name.startswith("CartPole-v1__mine__1__")
    assert without_clock(metrics(folder)) == without_clock(small.rows)


def test_another_seed_gives_other_metrics(script, small, place):
    other = metrics(play(script, f"--env-id CartPole-v1 {SMALL[script]} --seed 2"))
    for tag in ("charts/episodic_return", "losses/model"):
        ours, theirs = ([row[tag] for row in rows if tag in row] for rows in (small.rows, other))
        assert ours
        assert ours != theirs, tag


# The order of a turn
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


def test_random_play_and_updates_are_counted_in_the_units_of_the_paper(script, place, monkeypatch):
    flags, prefill, updates = SCHEDULES[script]
    played, random_actions = [], common.Envs.random_actions

    def spy_random_actions(envs):
        action = random_actions(envs)
        if envs.num_envs == 1:  # not the reset of an evaluation
            played.append(action.item())
        return action

    monkeypatch.setattr(common.Envs, "random_actions", spy_random_actions)
    flags = f"--env-id Pendulum-v1 {SMALL[script]} --action-repeat 2 --total-frames 190 {flags}"
    rows = metrics(play(script, f"{flags} --log-every 1"))
    assert len(played) == 1 + prefill  # the first step is the reset, which ignores it
    assert len(set(played[1:])) == prefill  # each step has noise of its own
    learnt = {row["frames"]: row["updates"] for row in rows if "losses/model" in row}
    assert learnt == {2 * step: updates(step) for step in range(prefill, 96)}


def test_random_play_lasts_until_there_is_a_window(script, place):
    flags = "--prefill 0 --pretrain 3 --train-every 1000 --batch-length 9 --total-frames 40"
    rows = metrics(play(script, f"--env-id Pendulum-v1 {SMALL[script]} {flags} --log-every 1"))
    learnt = {row["frames"]: row["updates"] for row in rows if "losses/model" in row}
    owed = {"dreamerv1.py": 3, "dreamerv2.py": 4}[script]
    assert learnt == dict.fromkeys(range(8, 41), owed)  # nine rows: a reset and eight steps


@EVERY_SCRIPT
def test_a_turn_acts_then_learns_and_then_observes(script, place, monkeypatch):
    turns = []

    def spy(owner, name, letter):
        function = getattr(owner, name)

        def noting(*args, **kwargs):
            envs = getattr(args[0], "num_envs", None)
            if envs != 2:  # those of the evaluation
                turns.append(letter)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, noting)

    spy(module_of(script), "update", "l")
    spy(common.Envs, "send", "s")
    spy(common.Envs, "receive", "r")
    spy(common.Replay, "add", "k")
    flags = f"{SMALL[script]} --num-envs 3 --eval-every 0 --total-frames 420"
    play(script, f"--env-id Pendulum-v1 {flags}")
    assert re.fullmatch("(sl*rk)+l*", "".join(turns))
    assert turns.count("l") > 10
    assert "srk" in "".join(turns)  # no update is due after most steps


@pytest.mark.parametrize(
    ("script", "env_id"),
    [
        ("dreamerv1.py", "Pendulum-v1"),
        ("dreamerv1.py", "CartPole-v1"),
        ("dreamerv2.py", "CartPole-v1"),
    ],
)
def test_dreamerv1_adds_noise_to_actions_in_training_and_nothing_does_in_evaluation(
    script, place, monkeypatch, env_id
):
    module = module_of(script)
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
    noise = "--expl-noise 0.3 --expl-epsilon 0.6 --expl-min 0.6" if "v1" in script else ""
    flags = f"{SMALL[script]} --num-envs 3 --eval-episodes 1 --total-frames 600 {noise}"
    play(script, f"--env-id {env_id} {flags}")
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


def test_training_acts_with_samples_and_evaluation_with_modes(script, place, monkeypatch):
    module = module_of(script)
    policy, samples = module.policy, {3: set(), 1: set()}  # by the number of environments

    def spy(agent, row, state, sample=True):
        samples[len(row["action"])].add(sample)
        return policy(agent, row, state, sample)

    monkeypatch.setattr(module, "policy", spy)
    flags = f"{SMALL[script]} --num-envs 3 --eval-episodes 1 --total-frames 240"
    play(script, f"--env-id CartPole-v1 {flags}")
    assert samples == {3: {True}, 1: {False}}


def test_dreamerv2_copies_the_critic_at_update_0_and_every_slow_update_only(place, monkeypatch):
    module, seen = module_of("dreamerv2.py"), []
    update = module.update

    def spy(agent, *args, **kwargs):
        """Sees the critics as the last update, and what followed it, have left them."""
        critics = agent["critic"], agent["slow_critic"]
        seen.append([nn.utils.parameters_to_vector(net.parameters()) for net in critics])
        return update(agent, *args, **kwargs)

    monkeypatch.setattr(module, "update", spy)
    flags = f"{SMALL['dreamerv2.py']} --pretrain 7 --slow-update 3 --critic-lr 0.01"
    play("dreamerv2.py", f"--env-id CartPole-v1 {flags}")
    copied = []
    for (old, old_slow), (critic, slow) in pairwise(seen):
        assert not critic.equal(old)
        copied.append(slow.equal(critic))
        assert copied[-1] or slow.equal(old_slow)
    assert len(copied) == 12
    assert [i for i, was in enumerate(copied) if was] == [0, 3, 6, 9]


# Kinds of environments
V1 = "dreamerv1.py"
V2 = "dreamerv2.py"
SETTINGS = [
    (V1, "--env-id CartPole-v1 --pixels"),
    (V2, "--env-id dm_control/cartpole-swingup-v0 --observation vector --total-frames 600"),
]
SLOW_SETTINGS = [
    (V1, "--env-id Pendulum-v1 --pixels --grayscale --num-envs 2"),
    (V1, "--env-id CartPole-v1 --precision bfloat16"),
    (V2, "--env-id CartPole-v1 --precision bfloat16"),
    (V1, "--env-id CartPole-v1 --observation both"),
    (V2, "--env-id CartPole-v1 --observation both"),
    (V2, "--env-id PongNoFrameskip-v4 --total-frames 1200 --time-limit 400"),
    (V1, "--env-id Pendulum-v1 --actor-grad reinforce --actor-entropy 1e-3 --torch-deterministic"),
    (V2, "--env-id Pendulum-v1 --actor-grad reinforce --actor-entropy 1e-3 --torch-deterministic"),
    (V1, "--env-id Pendulum-v1 --actor-dist tanh_normal"),
    (V2, "--env-id Pendulum-v1 --actor-dist tanh_normal"),
    (V2, "--env-id CartPole-v1 --torch-deterministic --action-repeat 2 --total-frames 600"),
    (V2, "--env-id dmc/cartpole-swingup --observation both --total-frames 600 --time-limit 100"),
    (V1, "--env-id ALE/Pong-v5 --total-frames 1200 --time-limit 400 --no-grayscale --num-envs 2"),
]
SLOW_SETTINGS = [pytest.param(*setting, marks=pytest.mark.slow) for setting in SLOW_SETTINGS]


@pytest.mark.parametrize(("script", "flags"), SETTINGS + SLOW_SETTINGS)
def test_a_run_makes_updates_on_every_kind_of_environment(script, place, flags):
    flags = f"{SMALL[script]} {flags}"
    folder = play(script, flags)
    assert_learnt(metrics(folder))
    total = int(re.findall(r"--total-frames (\d+)", flags)[-1])
    assert total <= metrics(folder)[-1]["frames"] < total + 20
    num_envs = int((re.findall(r"--num-envs (\d+)", flags) or [1])[0])
    assert np.load(folder / "replay" / "reward.npy").shape[1] == num_envs


@EVERY_SCRIPT
@pytest.mark.slow
def test_capture_video_films_an_episode_of_each_evaluation(script, place):
    flags = f"--env-id CartPole-v1 {SMALL[script]} --pixels --eval-every 250 --video-every 250"
    folder = play(script, f"{flags} --capture-video")
    evaluations = [row for row in metrics(folder) if "eval/episodic_return" in row]
    films = sorted((folder / "videos").glob("*episode*.gif"))
    assert len(films) == len(evaluations) == 2
    dreams = list((folder / "videos").glob("open_loop*.gif"))
    assert len(dreams) == 2  # at frame 250 and at the end
    for path in [*films, *dreams]:
        with Image.open(path) as film:
            assert film.n_frames > 3
    before = contents(folder)
    play(script, f"--evaluate {folder} --capture-video")
    assert set(contents(folder)) - set(before) == {"videos/evaluate.gif"}


# The paper's sizes, with small batches of short windows, and four updates
PONG = "--env-id PongNoFrameskip-v4 --total-frames 2192 --log-every 64"
WALKER = "--env-id dm_control/walker-walk-v0 --log-every 2 --pretrain 1"
FULL_SIZE = [
    ("dreamerv1.py", f"{PONG} --train-steps 1 --prefill 2000 --pretrain 1 --train-every 64"),
    ("dreamerv1.py", f"{WALKER} --total-frames 406 --train-steps 1 --prefill 400 --train-every 2"),
    ("dreamerv2.py", f"{PONG} --prefill 500"),
    ("dreamerv2.py", f"{WALKER} --total-frames 430 --prefill 200"),
    # 16 environments, whose first batch is there after 256 steps of 4 frames.
    ("dreamerv3.py", "--env-id PongNoFrameskip-v4 --total-frames 1088 --log-every 64 --size 12m"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flags"), FULL_SIZE)
def test_a_run_makes_updates_at_full_size(script, place, flags):
    flags = (
        f"{flags} --batch-size 4 --batch-length 16 --time-limit 100 --eval-episodes 1 --threads 1"
    )
    rows = metrics(play(script, flags))
    assert_learnt(rows)
    assert rows[-1]["updates"] >= 4
