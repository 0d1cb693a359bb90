"""Plumbing: command line, optimizer step, run folders, checkpoints and logs."""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import common

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    env_id: str = "PongNoFrameskip-v4"
    exp_name: str = "try"
    seed: int = 1
    total_frames: int = 200
    cuda: bool = True
    threads: int = 0
    resume: str = ""
    evaluate: str = ""
    observation: str = "auto"
    num_envs: int = 1
    lr: float = 0.1
    clip: float = 100.0
    log_every: int = 10
    eval_episodes: int = 1
    sticky_prob: float | None = None
    track: bool = False


PRESETS = {
    "atari": {},
    "dmc_pixels": {"lr": 0.2},
    "dmc_vector": {"lr": 0.3},
    "other": {"lr": 0.4, "num_envs": 5},
}


def close(logger):
    for closing in (logger.bar, logger.file, logger.writer):
        closing.close()


def parse(line):
    return common.parse_args(Args, PRESETS, line.split())


# Command line
@pytest.mark.parametrize(("line", "lr"), [
    ("", 0.1), ("--env-id ALE/Pong-v5", 0.1), ("--env-id ALE/Pong", 0.1),
    ("--env-id BreakoutNoFrameskip-v4", 0.1),
    ("--env-id dm_control/walker-walk-v0", 0.2), ("--env-id=dmc/walker-walk", 0.2),
    ("--env_id dmc/walker-walk --observation both", 0.2),
    ("--env-id dmc/walker-walk --observation vector", 0.3),
    ("--observation=vector --env-id dm_control/walker-walk-v0", 0.3),
    ("--env-id CartPole-v1", 0.4), ("--env-id some_module:Thing-v0", 0.4),
])  # fmt: skip
def test_the_id_chooses_the_preset(line, lr):
    args = parse(line)
    assert args.lr == lr
    assert args.num_envs == (5 if lr == 0.4 else 1)
    assert args.env_id in f"{line} {Args.env_id}"


def test_flags_override_the_preset():
    args = parse("--env-id CartPole-v1 --lr 7 --no-cuda --total-frames 9 --sticky-prob 0.25")
    assert asdict(args) == asdict(Args(
        env_id="CartPole-v1", num_envs=5, lr=7.0, cuda=False, total_frames=9, sticky_prob=0.25
    ))  # fmt: skip


def test_help_shows_the_values_in_force_for_the_id(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--env-id CartPole-v1 --help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "0.4" in text
    assert "CartPole-v1" in text


def test_an_unknown_flag_exits_with_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--learning-rate 7")
    assert stop.value.code == 2
    assert "learning-rate" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder of seed 3 with lr 0.7."""
    monkeypatch.chdir(tmp_path)
    return common.new_run(asdict(Args(env_id="CartPole-v1", seed=3, lr=0.7)))


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_a_run_goes_on_with_its_own_arguments(run, flag):
    args = asdict(parse(f"--{flag} {run}"))
    expected = asdict(Args(env_id="CartPole-v1", seed=3, lr=0.7))
    assert args == expected | {flag: str(run)}


def test_resume_may_change_how_long_and_where_but_not_what_is_learned(run):
    args = parse(f"--resume {run} --total-frames 500 --no-cuda --threads 1 --log-every 7")
    assert (args.total_frames, args.cuda, args.threads, args.log_every) == (500, False, 1, 7)
    parse(f"--resume {run} --lr 0.7 --env-id CartPole-v1")  # said again, but not changed
    for change in ("--lr 0.8", "--seed 4", "--env-id Pendulum-v1", "--num-envs 2"):
        name = change.split()[0].strip("-")
        with pytest.raises(common.UserError, match=f"--{name} cannot change"):
            parse(f"--resume {run} {change}")


def test_evaluate_may_change_the_episodes_and_their_seed_but_not_the_agent(run):
    args = parse(f"--evaluate {run} --eval-episodes 9 --seed 4")
    assert (args.eval_episodes, args.seed, args.lr) == (9, 4, 0.7)
    with pytest.raises(common.UserError, match="--lr cannot change"):
        parse(f"--evaluate {run} --lr 0.8")


def test_numbers_that_make_no_sense_are_refused():
    common.check_positive(Args(num_envs=1, log_every=0), "num_envs lr")
    for wrong, said in (
        (Args(num_envs=0), "--num-envs is 0, it must be above 0"),
        (Args(lr=0.0), "--lr is 0.0, it must be above 0"),
        (Args(num_envs=-2), "--num-envs is -2, it must be above 0"),
        (Args(log_every=-1), "--log-every is -1, it must be 0 or more"),
        (Args(sticky_prob=-0.5), "--sticky-prob is -0.5, it must be 0 or more"),
    ):
        with pytest.raises(common.UserError, match=said):
            common.check_positive(wrong, "num_envs lr")


@pytest.mark.parametrize(("kind", "code"), [(common.UserError, 2), (common.NonFiniteError, 1)])
def test_errors_that_are_meant_for_users_take_one_line_and_have_codes(capsys, kind, code):
    with pytest.raises(SystemExit) as stop, common.exit_on_error():
        raise kind("first\n   second")
    assert stop.value.code == code
    assert capsys.readouterr().err == "error: first second\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), common.exit_on_error():
        _ = 1 / 0


# Optimizer step
def test_opt_step_clips_by_the_global_norm_and_says_what_it_was():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    target = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0, 12.0])]

    def step(clip):
        loss = -sum((w * t).sum() for w, t in zip(weights, target, strict=True))
        return common.opt_step(optimizer, loss, clip)

    assert step(6.5).item() == pytest.approx(13)
    for weight, t in zip(weights, target, strict=True):
        torch.testing.assert_close(weight.detach(), t / 2)
    assert step(100.0).item() == pytest.approx(13)  # no gradient is left from before
    for weight, t in zip(weights, target, strict=True):
        torch.testing.assert_close(weight.detach(), t * 1.5)


def test_opt_step_moves_only_the_parameters_of_its_optimizer():
    mine, other = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(mine.parameters(), lr=1.0)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    old = mine.weight.detach().clone()
    common.opt_step(optimizer, other(mine(torch.ones(5, 3))).sum(), 100.0)
    assert not mine.weight.equal(old)
    for key, value in other.state_dict().items():
        assert value.equal(before[key])


def test_gradients_flow_through_a_frozen_module_but_not_into_it():
    module, x = nn.Linear(3, 2), torch.ones(5, 3, requires_grad=True)
    with common.frozen(module):
        loss = module(x).sum()
    loss.backward()
    assert x.grad.abs().sum() > 0
    assert module.weight.grad is None
    module(x).sum().backward()
    assert module.weight.grad.abs().sum() > 0


def test_the_finite_guard_names_the_first_update_and_its_bad_losses():
    guard = common.FiniteGuard()
    guard.check()
    good = {k: torch.tensor(1.0) for k in ("image", "kl", "actor")}
    for updates in range(3):
        guard.watch(updates, good)
    guard.check()
    nan, inf = torch.tensor(float("nan")), torch.tensor(-float("inf"))
    guard.watch(3, good | {"kl": nan, "actor": inf})
    guard.watch(4, dict.fromkeys(good, nan))
    guard.watch(5, good)
    with pytest.raises(common.NonFiniteError, match=r"^not finite at update 3: kl, actor$"):
        guard.check()


def test_the_finite_guard_sees_the_very_first_update():
    guard = common.FiniteGuard()
    guard.watch(0, {"kl": torch.tensor(float("inf")), "image": torch.tensor(0.0)})
    with pytest.raises(common.NonFiniteError, match=r"update 0: kl$"):
        guard.check()


def test_setup_seeds_torch():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    draws = []
    for seed in (7, 7, 8):
        device = common.setup(seed, cuda=False, deterministic=False, threads=1)
        draws.append(torch.rand(5))
    assert torch.get_num_threads() == 1
    assert device == torch.device("cpu")
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


# When
@pytest.mark.parametrize(("before", "after", "every", "expected"), [
    (0, 4, 10, False), (6, 10, 10, True), (10, 14, 10, False), (8, 12, 10, True),
    (8, 45, 10, True), (0, 0, 10, False), (0, 100, 0, False), (9, 10, 1, True),
])  # fmt: skip
def test_crossed_says_whether_a_multiple_lies_between(before, after, every, expected):
    assert common.crossed(before, after, every) is expected


def test_crossed_is_true_once_per_multiple_whatever_the_step():
    frames = range(0, 1000, 12)
    hits = sum(common.crossed(a, b, 50) for a, b in pairwise(frames))
    assert hits == frames[-1] // 50


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_a_second_ctrl_c_does_not(number, code):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        interrupt = common.Interrupt()
        assert interrupt.code == 0
        signal.raise_signal(number)
        assert interrupt.code == code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


# Run folders
def test_a_new_run_has_a_folder_that_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = asdict(Args(env_id="ALE/Pong-v5", exp_name="mine", seed=4))
    run = common.new_run(args)
    assert run.parent == Path("runs")
    assert run.name.split("__")[:3] == ["ALE-Pong-v5", "mine", "4"]
    assert run.name.split("__")[3].isdigit()
    assert yaml.safe_load((run / "args.yaml").read_text()) == args
    assert list(yaml.safe_load((run / "args.yaml").read_text())) == list(args)  # in their order
    assert common.load_args(run, Args) == args
    assert "/" not in common.new_run(args | {"env_id": "module:a/B-v0"}).name


def test_a_folder_that_is_no_run_is_a_user_error(tmp_path, run):
    with pytest.raises(common.UserError, match="no run folder"):
        common.load_args(tmp_path / "nowhere", Args)
    with pytest.raises(common.UserError, match="no run folder"):
        common.load_args(run / "args.yaml", Args)  # a file
    for content in (b"a: [1", b"\xff\xfe\xfa"):
        (run / "args.yaml").write_bytes(content)
        with pytest.raises(common.UserError, match="no run folder"):
            common.load_args(run, Args)
    for content in ("", "3", "[1, 2]", yaml.safe_dump(asdict(Args()) | {"more": 1}), "seed: 1"):
        (run / "args.yaml").write_text(content)
        with pytest.raises(common.UserError, match="another script or version"):
            common.load_args(run, Args)


def test_args_yaml_executes_nothing(run):
    (run / "args.yaml").write_text(f"!!python/object/apply:os.mkdir ['{run}/pwned']")
    with pytest.raises(common.UserError, match="no run folder"):
        common.load_args(run, Args)
    assert not (run / "pwned").exists()


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    common.opt_step(optimizer, model(torch.ones(5, 3)).sum(), 100.0)
    rng = np.random.default_rng(0).bit_generator.state
    state = {"counters": {"step": 3, "episodes": [1, 2]}, "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "replay": rng,
             "seconds": 1.5}  # fmt: skip
    common.save_checkpoint(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    loaded = common.load_checkpoint(tmp_path, torch.device("cpu"))
    for key in ("counters", "replay", "seconds"):
        assert loaded[key] == state[key]
    assert loaded["rng"].equal(state["rng"])
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    torch.testing.assert_close(loaded["optimizer"], state["optimizer"])


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    common.save_checkpoint(tmp_path, {"step": 1})

    def half(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        common.save_checkpoint(tmp_path, {"step": 2})
    assert common.load_checkpoint(tmp_path, "cpu") == {"step": 1}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda x, f: f.write(pickle.dumps(x))])
def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path, save):
    with open(tmp_path / "checkpoint.pt", "wb") as file:
        save({"step": Malicious(str(tmp_path / "pwned"))}, file)
    with pytest.raises(common.UserError, match="no checkpoint can be read"):
        common.load_checkpoint(tmp_path, "cpu")
    assert not (tmp_path / "pwned").exists()


def test_a_missing_or_broken_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(common.UserError, match="no checkpoint"):
        common.load_checkpoint(tmp_path, "cpu")
    common.save_checkpoint(tmp_path, {"x": torch.zeros(1000)})
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(common.UserError, match="no checkpoint can be read"):
            common.load_checkpoint(tmp_path, "cpu")


# Logs
@pytest.fixture
def logger(run):
    logger = common.Logger(run, asdict(Args(total_frames=40)))
    yield logger
    close(logger)


def events(run):
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0}).Reload()


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_row_of_metrics_is_a_line_that_begins_with_frames(run, logger):
    logger.log({"losses/kl": torch.tensor(0.5), "charts/episodic_return": np.float32(3)}, 8, 2)
    logger.log({"losses/kl": 0.25}, 12, 3)
    first, second = rows(run)  # already there before the logger is closed
    assert list(first) == ["frames", "updates", "seconds", "losses/kl", "charts/episodic_return"]
    assert (first["frames"], first["updates"], first["losses/kl"]) == (8, 2, 0.5)
    assert first["charts/episodic_return"] == 3
    assert (second["frames"], second["updates"], second["losses/kl"]) == (12, 3, 0.25)
    assert 0 <= first["seconds"] <= second["seconds"] < 60


def test_tensorboard_reads_the_same_numbers(run, logger):
    logger.log({"losses/kl": torch.tensor(0.5), "eval/episodic_return": 3}, 8, 2)
    logger.log({"losses/kl": 0.25}, 12, 3)
    logger.writer.flush()
    shown = events(run)
    assert set(shown.Tags()["scalars"]) == {"losses/kl", "eval/episodic_return"}
    assert [(e.step, e.value) for e in shown.Scalars("losses/kl")] == [(8, 0.5), (12, 0.25)]
    assert shown.Tags()["tensors"] == ["hyperparameters/text_summary"]
    (text,) = shown.Tensors("hyperparameters/text_summary")
    assert "|env_id|PongNoFrameskip-v4|" in text.tensor_proto.string_val[0].decode()


def test_a_resumed_log_goes_on_where_it_was(run, logger):
    logger.log({"losses/kl": 1.0}, 8, 2)
    again = common.Logger(run, asdict(Args(total_frames=40)), frames=8, seconds=1000.0)
    again.log({"losses/kl": 2.0}, 12, 3)
    assert [row["frames"] for row in rows(run)] == [8, 12]
    assert 1000 <= rows(run)[1]["seconds"] < 1060
    assert again.bar.n == 8
    again.writer.flush()
    logger.writer.flush()
    assert [point.step for point in events(run).Scalars("losses/kl")] == [8, 12]
    close(again)


def test_speed_is_since_it_was_asked_last(logger, monkeypatch):
    now = iter([10.0, 14.0, 22.0])
    monkeypatch.setattr(logger, "seconds", lambda: next(now))
    logger.speed(100, 10)
    assert logger.speed(300, 30) == {"charts/SPS": 50, "time/updates_per_second": 5}
    assert logger.speed(300, 46) == {"charts/SPS": 0, "time/updates_per_second": 2}


@pytest.mark.parametrize("shape", [(6, 20, 30), (6, 20, 30, 3)])
def test_a_video_is_in_the_run_folder_and_in_tensorboard(run, logger, shape):
    video = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    logger.gif("eval/episode", video, 8)
    logger.writer.flush()
    path = run / "videos" / "eval_episode_8.gif"
    with Image.open(path) as image:
        assert (image.n_frames, image.size) == (6, (30, 20))
        image.seek(4)
        if len(shape) == 3:
            np.testing.assert_array_equal(np.asarray(image.convert("L")), video[4])
        assert image.info["duration"] == 50  # milliseconds
    (shown,) = events(run).Images("eval/episode")
    assert shown.step == 8
    assert shown.encoded_image_string == path.read_bytes()


def test_tile_puts_the_videos_of_a_batch_side_by_side():
    video = torch.rand(4, 3, 1, 5, 7) * 1.4 - 0.2  # (T, B, C, H, W), beyond [0, 1] as well
    video[2, 1, 0, 3, 4], video[2, 1, 0, 3, 5] = 5.0, -5.0
    tiled = common.tile(video)
    assert tiled.shape == (4, 5, 21)
    assert tiled.dtype == np.uint8
    for b in range(3):
        part = tiled[:, :, 7 * b : 7 * b + 7].astype(float)
        assert abs(part - video[:, b, 0].clamp(0, 1).numpy() * 255).max() <= 1
    assert (tiled[2, 3, 7 + 4], tiled[2, 3, 7 + 5]) == (255, 0)
    assert common.tile(torch.rand(4, 2, 3, 5, 7)).shape == (4, 5, 14, 3)


@pytest.mark.parametrize("script", ["dreamerv1", "dreamerv2"])
def test_a_python_that_is_too_old_is_told_so(script):
    code = f"import sys; sys.version_info = (3, 10, 4); import {script}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "too old" in result.stderr
    assert "Traceback" not in result.stderr
