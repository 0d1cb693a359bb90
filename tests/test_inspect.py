"""The instruments that look into a run folder."""

import contextlib
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import inspect_run
import instruments as tools
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from helpers.processes import start, wait_until
from helpers.runs import play

import runtime
from runtime import UserError

ROOT = Path(__file__).parent.parent
TINY = """--batch-size 3 --batch-length 12 --deter 16 --hidden 16 --units 16 --stoch 3 --cnn-depth 2
    --imag-horizon 4 --replay-size 1000 --eval-episodes 1 --threads 1
    --log-every 100 --total-frames 450 --seed 3"""
STATISTICS = ("mean", "std", "logit")  # of the latents
CASES = {
    "dreamerv1": "--env-id Pendulum-v1 --time-limit 30 --prefill 100 --pretrain 2",
    "dreamerv2": "--env-id CartPole-v1 --prefill 100 --pretrain 2",
    "dreamerv3": """--env-id Pendulum-v1 --time-limit 30 --train-ratio 8 --blocks 2 --classes 4
        --lr 3e-3""",
}


def train(script, flags, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(runtime, "print_estimate", lambda *inputs: None)
        return play(f"{script}.py", flags).absolute()


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Function of a script's name -> the folder of a run of it, the same one each time."""

    @functools.cache
    def trained(script):
        return train(script, f"{TINY} {CASES[script]}", tmp_path_factory.mktemp(script))

    return trained


@pytest.fixture(params=CASES)
def folder(request, run_of):
    return run_of(request.param)


@pytest.fixture
def run(folder):
    torch.manual_seed(0)
    return tools.load_run(folder)


# The numbers, found again in another way


def windows_with_an_end(run):
    """Windows of the replay; in the middle of the first one an episode ends."""
    batch = tools.replayed(run, 6, 12)
    batch["is_terminal"][:, 0] = 0
    batch["is_first"][:, 0] = 0
    batch["is_terminal"][7, 0] = 1
    batch["is_first"][8, 0] = 1
    batch["reward"] = batch["reward"] + torch.randn(12, 6)
    return batch


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("rows", ["fresh", "of the replay"])
def test_horizon_curves_equal_rollouts_one_by_one(run, rows, monkeypatch):
    batch = tools.play(run, 3)[0] if rows == "fresh" else windows_with_an_end(run)
    *_, bias = run.model.discount.parameters()
    monkeypatch.setattr(bias, "data", bias.data + 2)  # so that not all rollouts end soon
    if run.script.__name__ == "dreamerv3":  # the outer bins are so huge that rounding is seen
        monkeypatch.setattr(run.model.reward, "bins", run.model.reward.bins.clamp(-10, 10))
    curves = tools.horizon_curves(run, batch, 7, images=10**6)
    post, _ = tools.observe(run, batch)
    first, reward = batch["is_first"] != 0, batch["reward"]
    vector = tools.reconstructed(run, "vector", batch["vector"])
    mean, rate = reward[~first].mean(), 1 - batch["is_terminal"][~first].mean()
    sums = {}
    with torch.no_grad():
        for t, b in np.ndindex(*reward.shape):
            state = {k: post[k][t, b][None] for k in ("deter", "stoch")}
            alive = 1.0  # the probability that the rollout has not ended
            for h in range(8):
                now = t + h, b
                if t + h >= len(reward) or first[t + 1 : t + h + 1, b].any() or alive <= 0.5:
                    break
                if h:
                    state = run.rssm.img_step(state, batch["action"][now][None])
                feat = run.rssm.feat(state)
                chance = (run.model.discount(feat)[0].sigmoid() / run.args.gamma).clamp(max=1)
                alive *= float(chance)
                if first[now]:
                    continue
                errors = {
                    "reward": (run.model.reward(feat)[0] - reward[now]) ** 2,
                    "reward_trivial": (mean - reward[now]) ** 2,
                    "vector": ((run.model.decoder(feat)["vector"][0] - vector[now]) ** 2).sum(),
                    "vector_trivial": ((vector[t, b] - vector[now]) ** 2).sum(),
                }
                if h:
                    there = {k: v[now][None] for k, v in post.items() if k in STATISTICS}
                    errors["kl"] = run.rssm.kl(there, state)[0]
                goes_on = 1 - batch["is_terminal"][now]
                errors["continuation"] = (chance - goes_on) ** 2
                errors["continuation_trivial"] = (rate - goes_on) ** 2
                for key, value in errors.items():
                    sums.setdefault((key, h), []).append(float(value))
    assert len(curves["reward"]) == 1 + max(h for _, h in sums)
    assert len(sums["reward", 3]) > 10
    for (key, h), values in sums.items():
        assert curves[key][h] == pytest.approx(np.mean(values), rel=1e-3, abs=1e-6), (key, h)
        assert key == "kl" or curves["pairs"][h] == len(values)
    told = tools.reward_errors(curves, 7)
    varies = float(reward[~first].var(unbiased=False))
    expected = {str(h): np.mean(sums["reward", h]) for h in (1, 5, 7)} | {"mean": varies}
    assert told == pytest.approx(expected, rel=1e-3)


def test_what_followed_equals_the_sum_by_hand(run):
    fresh, _ = tools.play(run, 3)
    values = torch.randn(len(fresh["reward"]))
    returns, share = (x[:, 0] for x in tools.discounted_returns(run, fresh, values[:, None]))
    gamma, rows = run.args.gamma, len(values)
    starts = [t for t in range(rows) if fresh["is_first"][t, 0]] + [rows]
    for begin, end in itertools.pairwise(starts):
        terminal = bool(fresh["is_terminal"][end - 1, 0])
        for t in range(begin, end):
            rewards = [float(fresh["reward"][i, 0]) for i in range(t, end)]
            if run.script.__name__ == "dreamerv3":  # whose values begin with the next reward
                rewards = [*rewards[1:], 0.0]
            if not terminal:  # the last value stands for all that comes after the last state
                rewards[-1] = float(values[end - 1])
            total = sum(gamma**k * r for k, r in enumerate(rewards))
            assert float(returns[t]) == pytest.approx(total, rel=1e-4, abs=1e-4)
            expected = 0 if terminal else gamma ** (end - 1 - t)
            assert float(share[t]) == pytest.approx(expected, rel=1e-4)


def test_optimism_is_value_less_what_followed_over_its_size(run, monkeypatch):
    fresh, _ = tools.play(run, 4)
    first = fresh["is_first"][:, 0] != 0
    numbers = tools.optimism(run, fresh)
    assert 0 < numbers["states"] <= int((~first).sum())
    assert all(np.isfinite(numbers[f"return_{k}_horizon"]) for k in ("half", "full", "double"))
    assert -1 <= numbers["rank_correlation"] <= 1

    # A critic that is right but for 3 that it adds, where nothing is left to guess.
    fresh["is_terminal"][:-1] = torch.roll(fresh["is_first"].float(), -1, 0)[:-1]
    fresh["is_terminal"][-1] = 1
    zeros = torch.zeros(len(first), 1)
    truth, share = (x[:, 0] for x in tools.discounted_returns(run, fresh, zeros))
    assert not share.any()
    monkeypatch.setattr(run.agent["critic"], "forward", lambda feat: truth[:, None] + 3)
    monkeypatch.setattr(tools, "imagined_returns", lambda *a: torch.zeros(1))
    numbers, real = tools.optimism(run, fresh), truth[~first]
    assert numbers["states"] == len(real)
    assert numbers["bias"] == pytest.approx(3, abs=1e-4)
    assert numbers["optimism"] == pytest.approx(float(3 / real.abs().mean()), rel=1e-4)
    assert numbers["rank_correlation"] == pytest.approx(1)


def test_what_followed_in_windows_is_that_of_each_window_alone(run):
    windows = tools.replayed(run, 6, 12)
    windows["is_terminal"] = windows["is_terminal"].clone()
    windows["is_terminal"][4, 2] = 1
    windows["is_first"][5, 2] = 1
    values = torch.randn(12, 6)
    together = tools.discounted_returns(run, windows, values)
    for b in range(6):
        alone = {k: v[:, b : b + 1] for k, v in windows.items()}
        apart = tools.discounted_returns(run, alone, values[:, b : b + 1])
        for x, y in zip(together, apart, strict=True):
            assert (x[:, b : b + 1] == y).all()


def test_optimism_in_the_replay_is_3_where_the_critic_adds_3_times_what_followed(run, monkeypatch):
    """The critic's mistake is in the last row's value too, and is found whole all the same."""
    batch = windows_with_an_end(run)
    zeros = torch.zeros(12, 6)
    _, share = tools.discounted_returns(run, batch, zeros)
    batch["reward"] = torch.ones(12, 6)
    # V = r + gamma V', 1 at an end: the returns of a task that pays 1 until it ends.
    followed, _ = tools.discounted_returns(run, batch, zeros)
    right = torch.where(share == 0, followed, 1 / (1 - run.args.gamma))
    size = right[batch["is_first"] == 0].mean()
    for added in (0.0, 3.0):
        wrong = right + added * size
        monkeypatch.setattr(run.agent["critic"], "forward", lambda feat, wrong=wrong: wrong)
        truth, _ = tools.discounted_returns(run, batch, wrong)
        scale = truth[batch["is_first"] == 0].mean()
        told = tools.replay_optimism(run, batch)
        assert told == pytest.approx(float(added * size / scale), abs=1e-4)


def test_measuring_leaves_the_agent_as_it_was(run):
    before = {k: v.clone() for k, v in run.agent.state_dict().items()}
    inspect_run.measure(run, 2, 5)
    after = run.agent.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_collapse_counts_the_latents_that_are_the_same_everywhere(run):
    post, _ = tools.observe(run, windows_with_an_end(run))
    before = tools.collapsed(post)
    assert 0 <= before < 1
    for key in STATISTICS:
        if key in post:
            post[key][:, :, 0] = post[key][0, 0, 0].clone()
    assert tools.collapsed(post) == pytest.approx(before + 1 / 3)


def test_rows_of_resets_alone_have_no_errors_and_no_optimism(run):
    batch = tools.replayed(run, 2, 5)
    batch["is_first"] = torch.ones_like(batch["is_first"])
    assert tools.reward_errors(tools.horizon_curves(run, batch, 3), 3) == {}
    assert tools.replay_optimism(run, batch) is None


def test_windows_of_the_replay_are_rows_that_lie_in_it_one_after_another(run, folder):
    windows = tools.replayed(run, 5, 9)
    stored = {p.stem: np.load(p, mmap_mode="r") for p in (folder / "replay").glob("*.npy")}
    count = run.replay.end
    for b in range(5):
        vector = windows["vector"][:, b].numpy()
        (at,) = np.flatnonzero((stored["vector"][: count - 8, 0] == vector[0]).all(-1))[:1]
        for key in windows:
            assert (stored[key][at : at + 9, 0] == windows[key][:, b].numpy()).all()
    late = tools.replayed(run, 50, 9, last=9)
    assert (late["vector"] == late["vector"][:, :1]).all()  # there is one such window
    with pytest.raises(UserError, match="no 5000 rows"):
        tools.replayed(run, 1, 5000)


def test_predictable_is_the_last_step_before_the_error_passes_half_of_the_trivial_one():
    curves = {"reward": [0.1, 0.4, 0.6, 0.1], "reward_trivial": [1.0] * 4}
    assert tools.predictable(curves) == 1
    assert tools.predictable(curves | {"reward": [0.1] * 4}) == 3
    assert tools.predictable(curves | {"reward": [0.9] * 4}) == -1
    assert tools.predictable(curves | {"reward_trivial": [0.0] * 4}) is None


def test_a_latent_that_ignores_the_state_has_collapsed(run):
    windows = tools.replayed(run, 4, 10)
    before = tools.health(run, windows)
    assert len(before["kl"]) == before["latents"] == 3
    assert set(before["gradient_norms"]) >= {"world_model.rssm", "actor", "critic"}
    assert all(norm > 0 for norm in before["gradient_norms"].values())
    assert all(p.grad is None or not p.grad.any() for p in run.agent.parameters())
    torch.nn.init.zeros_(run.rssm.obs_out[-1].weight)
    after = tools.health(run, windows)
    assert after["collapsed"] == 1
    assert after["uninformed_kl"] == pytest.approx(0, abs=1e-4)


def test_states_of_another_world_are_far(run):
    windows = tools.replayed(run, 6, 10)
    near = tools.drift(run, windows, 2)
    imagine = run.rssm.imagine

    def imagine_elsewhere(*inputs):
        feat, action = imagine(*inputs)
        return torch.cat([feat[:-1], feat[-1:] + 100]), action

    run.rssm.imagine = imagine_elsewhere
    assert near < tools.drift(run, windows, 2) == 1


# The verdict


def numbers(reward, horizon=10, optimism=0.0, kl=1.0, uninformed_kl=10.0, collapsed=0.0, far=0.1,
            gain=0.1, explained=0.9, rewards=50, ends=None):  # fmt: skip
    fresh = {"reward": reward, "reward_trivial": [1.0] * len(reward)}
    steps = tools.predictable(fresh)
    return {
        "fresh": fresh, "replay": fresh, "imag_horizon": horizon,
        "predictable": {"fresh": steps, "replay": steps, "ends": ends},
        "optimism": {
            "optimism": optimism, "rank_correlation": 0.8, "value_share": 0.1, "gain": gain,
        },
        "health": {"kl": [kl], "uninformed_kl": uninformed_kl, "collapsed": collapsed},
        "drift": {"far": far}, "explained_variance": {"vector": explained},
        "evidence": {"rewards": rewards, "ends": 50},
    }  # fmt: skip


HEALTHY = [0.1] * 13 + [0.9] * 5
FAULTS = [
    (numbers([0.1] * 4 + [0.9] * 5), "A horizon above 3 trains on fantasy; it is 10."),
    (numbers(HEALTHY, horizon=50), "A horizon above 12 trains on fantasy; it is 50."),
    (numbers([0.9] * 5), "The reward head fails even where the model sees"),
    (numbers(HEALTHY, optimism=0.6), "Values promise 60% more than what follows."),
    (numbers(HEALTHY, optimism=-0.6), "Values promise 60% less than what follows."),
    (numbers(HEALTHY, kl=9.0), "The prior does not predict the posterior"),
    (numbers(HEALTHY, far=0.8), "the policy has left its model"),
    (numbers(HEALTHY, gain=-0.1), "In its own dreams the policy earns less than random actions."),
    (numbers(HEALTHY, explained=0.3), "It does not see"),
    (numbers(HEALTHY, collapsed=1.0), "No latent depends on what is seen."),
    (numbers(HEALTHY, ends=-1), "Ends of episodes are predicted no better than by their rate."),
]


@pytest.mark.parametrize(("case", "text"), FAULTS, ids=[text[:30] for _, text in FAULTS])
def test_a_fault_is_named_and_no_other(case, text):
    [said] = inspect_run.faults(case)
    assert text in said
    assert inspect_run.verdict(case)[0] == said


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (numbers(HEALTHY), "Rewards stay predictable to 12 steps."),
        (numbers([0.1] * 6), "predictable to 5 steps, as far as was looked"),
        (numbers([0.1] * 6 + [0.9] * 3), "Rewards stay predictable to 5 steps."),
        (numbers([0.9] * 5, rewards=19), "Few rewards seen, 19: too few to judge"),
        (numbers([0.1] * 5, optimism=0.18), "Values are 18% optimistic, with a rank"),
        (numbers([0.1] * 5, optimism=-0.3), "Values are 30% pessimistic"),
        (numbers([0.1] * 5, optimism=0.01), "Values are right within 5 %"),
        (numbers([0.1] * 5, collapsed=0.5), "50% of the latents never change"),
    ],
)
def test_where_there_is_no_fault_it_is_said_how_far_it_sees(case, text):
    said = inspect_run.verdict(case)
    assert said[0] == "No fault is found."
    assert text in " ".join(said[1:])


# The command


def inspect(*flags):
    """As from a shell, but in this process."""
    inspect_run.main([str(flag) for flag in flags])


@contextlib.contextmanager
def locked(path):
    """Another process holds the lock of a file, as one that trains does."""
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX); print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, path], **pipes) as process:
        process.stdout.readline()
        yield
        process.stdin.close()


def test_a_run_gets_a_report_in_one_file_while_another_process_trains_in_it(folder, capsys):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with locked(folder / "replay" / "lock"):
        inspect(folder, "--episodes", 2, "--horizon", 8)
    said = capsys.readouterr().out
    assert {p: p.read_bytes() for p in before} == before
    page = (folder / "report.html").read_text()
    told = json.loads((folder / "report.json").read_text())
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)  # nothing is fetched
    assert page.count("data:image/png;base64,") >= 6
    for sentence in told["verdict"]:
        assert sentence in said
        assert sentence in page.replace("&#x27;", "'")
    assert len(told["fresh"]["reward"]) <= 9
    assert {"1", "mean"} <= told["reward_errors"]["replay"].keys() <= {"1", "4", "5", "mean"}
    assert told["reward_errors"]["replay"]["1"] == told["replay"]["reward"][1]
    assert 0 <= told["health"]["collapsed"] <= 1
    assert f"{told['replay_optimism']:+.0%}" in page
    assert f"{told['optimism']['value']:.2f}" in page
    assert f"{told['drift']['far']:.0%}" in page
    assert "batch_length: 12" in page
    assert (folder / "videos" / "horizons.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_that_still_trains_is_inspected_and_trains_on(tmp_path):
    flags = f"{TINY} {CASES['dreamerv2']} --total-frames 1000000 --checkpoint-every 50"
    process = start("dreamerv2.py", f"{flags} --resume run --eval-every 0", tmp_path)
    path = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: path.exists() and "losses/model" in path.read_text())
    inspect(tmp_path / "run", "--episodes", 1, "--horizon", 6)
    assert process.poll() is None
    before = path.stat().st_size
    wait_until(lambda: path.stat().st_size > before)
    process.terminate()
    process.communicate()
    assert process.returncode == 143
    told = json.loads((tmp_path / "run" / "report.json").read_text())
    assert told["updates"] > 0
    # Where the model takes all episodes for ended, there is nothing further to compare.
    assert {"1", "mean"} <= told["reward_errors"]["replay"].keys() <= {"1", "4", "5", "mean"}
    assert np.isfinite(told["replay_optimism"])
    assert 0 <= told["health"]["collapsed"] <= 1


def test_nothing_that_the_folder_holds_is_executed(run_of, tmp_path):
    theirs = tmp_path / "run"
    shutil.copytree(run_of("dreamerv2"), theirs)
    for name in ("dreamerv2.py", "common.py", "runtime.py", "evil.py", "instruments.py"):
        (theirs / name).write_text("raise SystemExit('executed')")
    inspect(theirs, "--episodes", 1, "--horizon", 2)
    assert (theirs / "report.html").exists()
    text = (theirs / "args.yaml").read_text()
    (theirs / "args.yaml").write_text(re.sub("exp_name: .*", "exp_name: evil", text))
    with pytest.raises(UserError, match="is of evil, no script of ours: give --script"):
        inspect(theirs)


def test_the_script_of_a_variant_can_be_given(run_of, tmp_path):
    shutil.copy(ROOT / "dreamerv2.py", tmp_path / "mine.py")
    run = tools.load_run(run_of("dreamerv2"), tmp_path / "mine.py")
    assert Path(run.script.__file__) == tmp_path / "mine.py"


def test_an_episode_is_filmed_with_its_return_on_it(folder, capsys):
    inspect(folder, "--film")
    with Image.open(folder / "videos" / "evaluate.gif") as film:
        assert film.n_frames > 5
        assert film.width >= 256
    assert re.search(r"return -?\d+\.\d\n", capsys.readouterr().out)


def test_what_cannot_be_inspected_is_said_in_one_line(folder, tmp_path):
    (tmp_path / "common.py").write_text("SIZE = 96\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "bad.py").write_text("def x(:")
    (tmp_path / "mine" / "none.py").touch()
    another = f"{tmp_path / 'common.py'} is not what would be imported here"
    for flags, text in (
        ([folder, "--script", tmp_path / "mine.py"], another),
        ([folder, "--script", tmp_path / "mine" / "bad.py"], "bad.py cannot be imported: Syntax"),
        ([folder, "--script", tmp_path / "mine" / "none.py"], "none.py has no Args and PRESETS"),
        ([tmp_path], f"{tmp_path} is no run folder"),
        ([folder, "--dream"], "--dream needs an agent that learns from images"),
        ([folder, "--episodes", "0"], "--episodes is 0"),
    ):
        with pytest.raises(UserError) as error:
            inspect(*flags)
        assert text in str(error.value)
        assert "\n" not in str(error.value)


def test_a_perfect_dream_of_vectors_is_drawn_over_what_happened(run, monkeypatch):
    batch = tools.replayed(run, 1, 12)
    batch["is_first"] = torch.zeros_like(batch["is_first"])
    batch["vector"] = 5 * batch["vector"]  # so large that V3's symlog differs from it
    perfect = tools.reconstructed(run, "vector", batch["vector"])
    monkeypatch.setattr(run.model.decoder, "forward", lambda feat: {"vector": perfect})
    monkeypatch.setattr(inspect_run, "figure_bytes", lambda figure: figure)
    figure = inspect_run.draw_vectors(run, batch, 4, 8)
    assert len(figure.axes) == batch["vector"].shape[-1]
    for axis in figure.axes:
        happened, dreamt, _ = axis.lines
        assert np.allclose(happened.get_ydata(), dreamt.get_ydata(), atol=1e-4)
    pyplot.close(figure)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dreamerv2", "dreamerv3"])
def test_a_run_from_pixels_gets_pictures_of_its_dreams(script, tmp_path):
    run = train(script, f"{TINY} {CASES[script]} --env-id CartPole-v1 --pixels", tmp_path)
    inspect(run, "--episodes", 2, "--horizon", 8)
    assert "data:image/gif;base64," in (run / "report.html").read_text()
    assert "image" in json.loads((run / "report.json").read_text())["fresh"]
    assert (run / "videos" / "contact_sheet.png").exists()
    inspect(run, "--dream", "--horizon", 12)
    with Image.open(run / "videos" / "dream.gif") as film:
        assert 2 < film.n_frames <= 13


@pytest.mark.slow
def test_the_verdict_names_the_faults_of_bad_models(tmp_path):
    flags = "--env-id Pendulum-v1 --total-frames 3500 --eval-every 0 --eval-episodes 1"
    flags += " --imag-horizon 5"
    run = tools.load_run(train("dreamerv2", flags, tmp_path))
    weights = {k: v.clone() for k, v in run.agent.state_dict().items()}

    def verdict(horizon=10):
        run.args.imag_horizon = horizon
        said, *_ = inspect_run.measure(run, 3, 50)
        run.agent.load_state_dict(weights)
        return " ".join(said["verdict"])

    good = verdict()
    assert "does not predict" not in good
    assert "fails" not in good
    for layer in run.rssm.img_out.modules():  # as if it had never been trained
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    assert "The prior does not predict the posterior" in verdict()
    weight = run.model.reward.out.weight
    weight.data = weight.data[:, torch.randperm(weight.shape[1])]
    assert "The reward head fails even where the model sees" in verdict()
