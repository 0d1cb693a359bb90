"""Plumbing: command line, optimizer step, run folders, checkpoints and logs."""

import contextlib
import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from envs import reset_rows
from PIL import Image
from torch import distributions as td
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
    observation: Literal["auto", "pixels", "vector", "both"] = "auto"
    num_envs: common.Count = 1
    lr: common.Rate = 0.1
    clip: float = 100.0
    log_every: int = 10
    eval_episodes: int = 1
    sticky_prob: float | None = None
    track: bool = False
    graph: bool = True
    compile: bool = False


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
    args = asdict(Args(env_id="CartPole-v1", seed=3, lr=0.7))
    (folder := common.new_run(args, 0.0) / "args.yaml").write_text(yaml.safe_dump(args))
    return folder.parent


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_a_run_goes_on_with_its_own_arguments(run, flag):
    args = asdict(parse(f"--{flag} {run}"))
    expected = asdict(Args(env_id="CartPole-v1", seed=3, lr=0.7))
    assert args == expected | {flag: str(run)}


def test_resume_may_change_how_long_and_where_but_not_what_is_learned(run):
    args = parse(f"--resume {run} --total-frames 500 --no-cuda --threads 1 --log-every 7")
    assert (args.total_frames, args.cuda, args.threads, args.log_every) == (500, False, 1, 7)
    args = parse(f"--resume {run} --no-graph --compile")
    assert (args.graph, args.compile) == (False, True)
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


@pytest.mark.parametrize(("flags", "bounds"), [
    ("--num-envs 0", "1 to 2147483647"), ("--num-envs -2", "1 to 2147483647"),
    ("--lr 0.0", "1e-30 to 2147483647"), ("--lr nan", "1e-30 to 2147483647"),
    ("--log-every -1", "0 to 2147483647"), ("--sticky-prob -0.5", "0 to 2147483647"),
])  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(run, flags, bounds):
    flag, value = flags.split()
    with pytest.raises(common.UserError, match=rf"^{flag} is {value}, it must be from {bounds}$"):
        parse(f"{flags} --env-id CartPole-v1")
    args = asdict(Args()) | {flag.strip("-").replace("-", "_"): yaml.safe_load(value)}
    (run / "args.yaml").write_text(yaml.safe_dump(args))
    with pytest.raises(common.UserError):
        parse(f"--evaluate {run}")


def test_a_0_is_fine_where_it_means_something():
    args = parse("--log-every 0 --seed 0 --sticky-prob 0")
    assert (args.log_every, args.seed, args.sticky_prob) == (0, 0, 0)


@pytest.mark.parametrize(("kind", "code"), [
    (common.UserError, 2), (ChildProcessError, 1), (FloatingPointError, 1), (OSError, 1),
    (PermissionError, 1), (FileNotFoundError, 1),
])  # fmt: skip
def test_errors_that_are_meant_for_users_take_one_line_and_have_codes(capsys, kind, code):
    with pytest.raises(SystemExit) as stop, common.exit_on_error():
        raise kind("first\n   second")
    assert stop.value.code == code
    assert capsys.readouterr().err == "error: first second\n"


def test_ctrl_c_is_silent_and_has_code_130(capsys):
    with pytest.raises(SystemExit) as stop, common.exit_on_error():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [ZeroDivisionError, ValueError, RuntimeError, AssertionError])
def test_other_errors_keep_their_traceback(capsys, kind):
    error = kind("unexpected")
    with pytest.raises(kind) as raised, common.exit_on_error():
        raise error
    assert raised.value is error
    assert capsys.readouterr() == ("", "")


def test_an_exit_keeps_its_code():
    with pytest.raises(SystemExit) as stop, common.exit_on_error():
        sys.exit(143)
    assert stop.value.code == 143
    with common.exit_on_error():
        pass


def test_an_error_can_be_explained_in_one_line():
    with common.explain("no luck", ValueError):
        pass
    with (
        pytest.raises(common.UserError, match=r"^no luck: ValueError: first second$"),
        common.explain("no luck", KeyError, ValueError),
    ):
        raise ValueError("first\n  second")
    with pytest.raises(ZeroDivisionError), common.explain("no luck", ValueError):
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


def test_gradients_flow_through_another_module_and_leave_nothing_there():
    mine, other = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(mine.parameters(), lr=1.0)
    old = mine.weight.detach().clone()
    norm = common.opt_step(optimizer, other(mine(torch.ones(5, 3))).sum(), 100.0)
    step = 5 * other.weight.detach().T  # (2, 1), of 5 rows of ones
    torch.testing.assert_close(old - mine.weight.detach(), step.expand(2, 3))
    torch.testing.assert_close(norm, step.expand(2, 4).norm())  # with the bias
    assert [p.grad for p in other.parameters()] == [None, None]
    assert all(p.requires_grad for p in other.parameters())

    gradients = [torch.full_like(p, 7.0) for p in other.parameters()]  # of a step of its own
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    common.opt_step(optimizer, other(mine(torch.ones(5, 3))).sum(), 100.0)
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        assert parameter.grad.equal(gradient)


def test_a_parameter_that_requires_no_gradient_stays_as_it_is():
    mine = nn.Linear(3, 2)
    mine.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1.0, weight_decay=0.5)
    weight, bias = (p.detach().clone() for p in mine.parameters())
    norm = common.opt_step(optimizer, mine(torch.ones(5, 3)).sum(), 100.0)
    assert mine.weight.equal(weight)
    assert mine.weight.grad is None
    assert not mine.bias.equal(bias)
    assert norm.item() == pytest.approx(np.sqrt(2 * 5**2))  # of the bias alone
    mine.weight.requires_grad_(True)
    common.opt_step(optimizer, mine(torch.ones(5, 3)).sum(), 100.0)
    assert not mine.weight.equal(weight)


def test_a_parameter_that_the_loss_does_not_reach_stays_as_it_is():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([used, unused], lr=1.0, weight_decay=0.5)
    common.opt_step(optimizer, used.sum(), 100.0)
    assert used.max() < 1
    assert unused.tolist() == [1, 1]


@pytest.mark.parametrize("enabled", [True, False])
def test_without_a_gpu_a_captured_function_is_called_each_time_with_rows_as_tensors(enabled):
    calls = []
    captured = common.Captured(lambda *x: calls.append(x) or x, torch.device("cpu"), enabled)
    for i in range(6):
        row = {"vector": np.full((2, 3), i, np.float32), "is_first": np.arange(2) == i}
        given, state = captured(row, {"deter": torch.full((2, 1), i)})
        assert len(calls) == i + 1
        assert all(torch.is_tensor(v) for v in (*given.values(), *state.values()))
        assert given["vector"].tolist() == [[i] * 3] * 2
        assert given["is_first"].tolist() == [i == 0, i == 1]
        assert state["deter"].tolist() == [[i]] * 2


def test_the_finite_guard_names_the_first_update_and_its_bad_losses():
    guard = common.FiniteGuard()
    assert guard.check() == {}
    good = {k: torch.tensor(1.0) for k in ("image", "kl", "actor")}
    for updates in range(3):
        guard.watch(updates, good)
    guard.check()
    nan, inf = torch.tensor(float("nan")), torch.tensor(-float("inf"))
    guard.watch(3, good | {"kl": nan, "actor": inf})
    guard.watch(4, dict.fromkeys(good, nan))
    guard.watch(5, good)
    with pytest.raises(FloatingPointError, match=r"^not finite at update 3: kl, actor$"):
        guard.check()


def test_the_finite_guard_tells_the_values_of_the_last_update_as_they_were_then():
    guard, kl = common.FiniteGuard(), torch.tensor(0.5)
    guard.watch(0, {"kl": torch.tensor(9.0), "image": torch.tensor(8.0)})
    guard.watch(1, {"kl": kl, "image": torch.tensor(-2.0)})
    kl.fill_(7.0)  # as a CUDA graph writes its next outputs over the last ones
    values = guard.check()
    assert values == {"kl": 0.5, "image": -2.0}
    assert {type(value) for value in values.values()} == {float}


def test_the_finite_guard_sees_the_very_first_update():
    guard = common.FiniteGuard()
    guard.watch(0, {"kl": torch.tensor(float("inf")), "image": torch.tensor(0.0)})
    with pytest.raises(FloatingPointError, match=r"update 0: kl$"):
        guard.check()


@pytest.fixture
def settings():
    """Puts back what setup sets for the whole process."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    rng, checks = torch.get_rng_state(), td.Distribution._validate_args
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_rng_state(rng)
    td.Distribution.set_default_validate_args(checks)


def setup(seed):
    return common.setup(seed, cuda=False, deterministic=False, threads=1)


def test_setup_seeds_torch(settings):
    draws = []
    for seed in (7, 7, 2**32 + 8):
        device = setup(seed)
        draws.append(torch.rand(3).tolist())
    assert torch.get_num_threads() == 1
    assert device == torch.device("cpu")
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


def test_after_setup_distributions_take_their_parameters_unchecked(settings):
    td.Distribution.set_default_validate_args(True)
    with pytest.raises(ValueError, match="constraint"):
        td.Normal(torch.zeros(1), -torch.ones(1))
    setup(7)
    assert td.Normal(torch.zeros(1), -torch.ones(1)).scale == -1


def test_the_state_of_torchs_generator_comes_back_from_a_checkpoint(tmp_path, settings):
    setup(7)
    torch.randn(3)
    common.save_checkpoint(tmp_path, {}, {})
    undisturbed = [torch.randn(3).tolist() for _ in range(3)]
    setup(8)
    common.load_checkpoint(tmp_path, {})
    assert [torch.randn(3).tolist() for _ in range(3)] == undisturbed


# When
def test_memory_that_was_freed_is_used_again_without_page_faults():
    code = """
import resource, torch, common
common.setup(1, False, False, 1)
faults = []
for _ in range(20):
    torch.ones(50 * 2**20 // 4)  # 12,800 pages
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[10])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert int(result.stdout) < 100


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


@pytest.fixture
def handlers():
    """Puts the handlers of signals back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_a_second_ctrl_c_does_not(handlers, number, code):
    with common.Interrupt() as interrupt:
        assert interrupt.code == 0
        signal.raise_signal(number)
        assert interrupt.agreed() == interrupt.code == code
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_failed_environment_ends_the_loop_with_a_line_and_code_1(handlers, capsys):
    with common.Interrupt() as interrupt:
        raise ChildProcessError("environment 3 failed")
    assert interrupt.code == 1
    assert capsys.readouterr().err == "error: environment 3 failed\n"
    with common.Interrupt() as interrupt:
        pass
    assert interrupt.code == 0
    for kind in (common.UserError, ZeroDivisionError):
        with pytest.raises(kind), common.Interrupt():
            raise kind


def test_a_signal_that_ends_the_processes_of_environments_too_keeps_its_code(handlers, capsys):
    with common.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        raise ChildProcessError("its process died")
    assert interrupt.code == 143
    assert capsys.readouterr().err == ""


# Run folders
def disk_with(monkeypatch, free):
    """Lets the disk have so many free bytes."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: usage(2**40, 0, free))


def test_a_new_run_has_a_folder_that_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = asdict(Args(env_id="ALE/Pong-v5", exp_name="mine", seed=4))
    run = common.new_run(args, 0.0)
    log = common.Logger(run, args)
    for closing in (log.bar, log.file, log.writer):
        closing.close()
    assert run.parent == Path("runs")
    assert run.name.split("__")[:3] == ["ALE-Pong-v5", "mine", "4"]
    assert run.name.split("__")[3].isdigit()
    assert yaml.safe_load((run / "args.yaml").read_text()) == args
    assert list(yaml.safe_load((run / "args.yaml").read_text())) == list(args)  # in their order
    assert asdict(parse(f"--evaluate {run}")) == args | {"evaluate": str(run)}
    assert "/" not in common.new_run(args | {"env_id": "module:a/B-v0"}, 0.0).name


def test_a_disk_that_is_too_small_is_a_user_error_before_there_is_a_run(tmp_path, monkeypatch):
    disk_with(monkeypatch, 3 * 2**30)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UserError, match=r"4\.0 GiB of 3\.0 free.*--replay-size"):
        common.new_run(asdict(Args()), 4.0)
    assert not list(tmp_path.iterdir())
    assert common.new_run(asdict(Args()), 2.9).exists()


def test_tracking_without_its_package_is_a_user_error_before_there_is_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    args = asdict(Args(env_id="CartPole-v1"))
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(args))
    for line in ("--env-id CartPole-v1", f"--resume {tmp_path}"):
        with pytest.raises(common.UserError, match=r"^--track needs pip install wandb: "):
            parse(f"{line} --track")
        assert not parse(line).track


def refused(run, match):
    """Both ways to go on with the run are refused, in one line."""
    for flag in ("resume", "evaluate"):
        with pytest.raises(common.UserError, match=match) as error:
            parse(f"--{flag} {run}")
        assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_a_user_error(tmp_path, run):
    refused(tmp_path / "nowhere", "nowhere is no run folder of this script: FileNotFoundError")
    refused(run / "args.yaml", "args.yaml is no run folder of this script")  # a file
    for content in (b"a: [1", b"\xff\xfe\xfa", b"a: \x00"):
        (run / "args.yaml").write_bytes(content)
        refused(run, f"{run} is no run folder of this script")
    for content in ("", "3", "[1, 2]"):
        (run / "args.yaml").write_text(content)
        refused(run, f"{run} is no run folder of this script: TypeCheckError")


@pytest.mark.parametrize("change", [
    {"seed": "x"}, {"seed": 1.5}, {"seed": None}, {"seed": [1]}, {"cuda": 1}, {"cuda": "yes"},
    {"lr": "fast"}, {"lr": None}, {"env_id": 3}, {"env_id": {}}, {"observation": "smell"},
    {"observation": None}, {"sticky_prob": "often"}, {"more": 1}, {3: 4},
])  # fmt: skip
def test_args_of_a_wrong_type_or_choice_are_a_user_error_that_names_them(run, change):
    args = asdict(Args()) | change
    (run / "args.yaml").write_text(yaml.safe_dump(args))
    refused(run, f"{run} is no run folder of this script: .*{next(iter(change))}")


@pytest.mark.parametrize("name", asdict(Args()))
def test_a_missing_arg_is_a_user_error_that_names_it(run, name):
    args = asdict(Args())
    del args[name]
    (run / "args.yaml").write_text(yaml.safe_dump(args))
    refused(run, f"{run} is no run folder of this script: .*{name}")


def test_an_integer_will_do_for_a_real_number(run):
    (run / "args.yaml").write_text(yaml.safe_dump(asdict(Args()) | {"lr": 1, "sticky_prob": 0}))
    assert parse(f"--resume {run}").lr == 1


def test_args_yaml_executes_nothing(run):
    (run / "args.yaml").write_text(f"!!python/object/apply:os.mkdir ['{run}/pwned']")
    refused(run, "no run folder of this script")
    assert not (run / "pwned").exists()


# Checkpoints
class Part:
    """Something that has a state, a number."""

    def __init__(self, number=None):
        self.number = number

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def saved(run, *numbers, size=1000):
    """The folder after a checkpoint with each of the numbers."""
    for number in numbers:
        weights = torch.full((size,), float(number))
        common.save_checkpoint(run, {"part": Part(number)}, {"weights": weights})
    return run


def loaded(run):
    """The number of the checkpoint that a resumed run takes."""
    state = common.load_checkpoint(run, {"part": (part := Part())})
    assert set(state["weights"].tolist()) == {float(part.number)}
    assert state["part"] == {"number": part.number}
    return part.number


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    def make():
        model = nn.Linear(3, 2)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}

    parts, same = make(), make()
    common.opt_step(parts["optimizer"], parts["model"](torch.ones(5, 3)).sum(), 100.0)
    rng = np.random.default_rng(0).bit_generator.state
    more = {"counters": (3, [1, 2], 1.5), "replay": rng, "metrics": {"kl": torch.tensor(2.0)}}
    common.save_checkpoint(tmp_path, parts, more)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    state = common.load_checkpoint(tmp_path, same)
    assert {key: state[key] for key in more} == more
    for key, part in parts.items():
        torch.testing.assert_close(same[key].state_dict(), part.state_dict())


def test_the_last_two_checkpoints_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint.old.pt"}
    assert loaded(tmp_path) == 3
    (tmp_path / "checkpoint.pt").unlink()
    assert loaded(tmp_path) == 2


def flip(whole):
    """One bit of the tensor."""
    middle = whole.index(torch.full((9,), 2.0).numpy().tobytes()) + 1000
    return whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]


DAMAGE = [
    flip, lambda whole: b"", lambda whole: b"hello", lambda whole: whole[: len(whole) // 2],
    lambda whole: whole[:-1], lambda whole: whole[100:], lambda whole: bytes(len(whole)),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(tmp_path, capsys, damage):
    path = saved(tmp_path, 1, 2) / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    assert loaded(tmp_path) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} cannot be used, trying another: ")
    saved(tmp_path, 3)  # the good one is not thrown away before there is a new one
    assert loaded(tmp_path) == 3


def test_a_checkpoint_of_other_parts_is_not_taken(tmp_path, capsys):
    parts = {"model": nn.Linear(3, 2)}
    common.save_checkpoint(tmp_path, parts, {})
    common.save_checkpoint(tmp_path, {"model": nn.Linear(3, 4)}, {})
    common.load_checkpoint(tmp_path, same := {"model": nn.Linear(3, 2)})
    assert same["model"].weight.equal(parts["model"].weight)
    assert "cannot be used" in capsys.readouterr().err
    for state in ({}, {"weights": 3}):  # a part is missing
        (tmp_path / "checkpoint.old.pt").unlink(missing_ok=True)
        common.save_checkpoint(tmp_path, {}, state)
    with pytest.raises(common.UserError, match="no checkpoint can be read"):
        common.load_checkpoint(tmp_path, same)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_between_the_renames_leaves_a_usable_checkpoint(tmp_path, monkeypatch, renames):
    saved(tmp_path, 1, 2)
    rename, done = Path.replace, []

    def crashing(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crashing)
        with pytest.raises(KeyboardInterrupt) if renames < 2 else contextlib.nullcontext():
            saved(tmp_path, 3)
    assert loaded(tmp_path) == (3 if renames else 2)
    assert loaded(saved(tmp_path, 4)) == 4
    assert not (tmp_path / "checkpoint.new.pt").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_state_that_cannot_be_serialised_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    def half(state, file):
        file.write(b"half")
        raise RuntimeError("broken")

    before = contents(saved(tmp_path, 1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(RuntimeError, match="broken"):
            saved(tmp_path, 3)
    assert contents(tmp_path) == before
    assert loaded(tmp_path) == 2


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_last(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    sync, synced = os.fsync, []

    def noting(file):
        assert os.path.samestat(os.fstat(file), (tmp_path / "checkpoint.new.pt").stat())
        synced.append((os.fstat(file).st_size, loaded(tmp_path)))
        sync(file)

    monkeypatch.setattr(os, "fsync", noting)
    saved(tmp_path, 2)
    assert synced == [((tmp_path / "checkpoint.pt").stat().st_size, 1)]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda x, f: f.write(pickle.dumps(x))])
def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path, save):
    with open(tmp_path / "checkpoint.pt", "wb") as file:
        save({"part": Malicious(str(tmp_path / "pwned"))}, file)
    with pytest.raises(common.UserError, match="no checkpoint can be read"):
        loaded(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("damage", DAMAGE[1:])
def test_without_any_whole_checkpoint_there_is_a_user_error(tmp_path, damage):
    with pytest.raises(common.UserError, match=f"no checkpoint can be read in {tmp_path}"):
        loaded(tmp_path)
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoint.new.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes())
    for path in tmp_path.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(common.UserError, match=f"no checkpoint can be read in {tmp_path}"):
        loaded(tmp_path)


# A full disk
def full_disk(function, capsys, message="[Errno 28] No space left on device"):
    """Runs it as a script would; it must exit with code 1 and the message in one line."""
    with pytest.raises(SystemExit) as stop, common.exit_on_error():
        function()
    assert stop.value.code == 1
    lines = [line.strip() for line in re.split(r"[\r\n]", capsys.readouterr().err)]
    lines = [line for line in lines if line and "frames/s" not in line]  # without the bar
    assert lines == [f"error: {message}"]


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")


@needs_full
@pytest.mark.parametrize("size", [100, 1_000_000])  # fails as it is flushed, as it is written
@pytest.mark.parametrize("numbers", [(), (1,), (1, 2)])
def test_a_full_disk_at_a_checkpoint_leaves_the_last_one(tmp_path, capsys, numbers, size):
    before = contents(saved(tmp_path, *numbers))
    new = tmp_path / "checkpoint.new.pt"
    new.symlink_to("/dev/full")
    full_disk(lambda: saved(tmp_path, 3, size=size), capsys)
    new.unlink()
    assert contents(tmp_path) == before
    new.write_bytes(before.get("checkpoint.pt", b"")[:2000])  # what had room
    if numbers:
        assert loaded(tmp_path) == numbers[-1]
    assert loaded(saved(tmp_path, 4)) == 4
    assert not new.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_to_sync_a_checkpoint_leaves_the_last_one(
    tmp_path, monkeypatch, capsys, number
):
    def fail(file):
        raise OSError(number, os.strerror(number))

    before = contents(saved(tmp_path, 1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        full_disk(lambda: saved(tmp_path, 3), capsys, f"[Errno {number}] {os.strerror(number)}")
    assert before.items() <= contents(tmp_path).items()
    assert loaded(tmp_path) == 2
    assert loaded(saved(tmp_path, 4)) == 4


# Logs
@pytest.fixture
def logger(run):
    logger = common.Logger(run, asdict(Args(total_frames=40)))
    yield logger
    close(logger)


@needs_full
@pytest.mark.parametrize("sink", ["metrics.jsonl", "TensorBoard"])
def test_a_full_disk_at_a_log_is_one_line(run, capsys, sink):
    logger = common.Logger(run, asdict(Args(total_frames=40)))

    def log():
        for frames in range(100):  # TensorBoard writes in a thread of its own
            logger.log({"losses/kl": 1.0}, frames, 2)
            logger.writer.flush()

    logger.writer.flush()
    if sink == "TensorBoard":
        [path] = run.glob("events.*")
        path.unlink()
        path.symlink_to("/dev/full")
    else:
        logger.file.close()
        logger.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    full_disk(log, capsys)
    for closing in (logger.bar, logger.file, logger.writer):
        with contextlib.suppress(OSError):
            closing.close()


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
    assert shown.Tags()["tensors"] == shown.Tags()["images"] == []


def test_the_progress_bar_shows_the_return_of_the_last_episode_and_nothing_else(logger):
    logger.log({"losses/kl": 1.0, "eval/episodic_return": 9.0}, 4, 1)
    assert not logger.bar.postfix
    logger.log({"charts/episodic_return": np.float32(3), "charts/episodic_length": 7}, 8, 2)
    assert logger.bar.postfix == "return=3"
    logger.log({"losses/kl": 0.5}, 12, 3)
    assert logger.bar.postfix == "return=3"
    logger.log({"charts/episodic_return": np.float32(-250.5)}, 16, 4)
    assert re.fullmatch(r"return=-25[01](\.5)?", logger.bar.postfix)


def resumed_log(run, size):
    """Goes on with the log of a checkpoint at frame 8 and adds a row -> its lines."""
    again = common.Logger(run, asdict(Args(total_frames=40)), 8, 1000.0, size)
    again.log({"losses/kl": 2.0}, 12, 3)
    assert again.bar.n == 8
    close(again)
    return (run / "metrics.jsonl").read_bytes().splitlines()


def test_a_resumed_log_goes_on_where_it_was(run, logger):
    logger.log({"losses/kl": 1.0}, 8, 2)
    resumed_log(run, logger.file.tell())
    assert [row["frames"] for row in rows(run)] == [8, 12]
    assert 1000 <= rows(run)[1]["seconds"] < 1060
    logger.writer.flush()
    assert [point.step for point in events(run).Scalars("losses/kl")] == [8, 12]


@pytest.mark.parametrize("after", [
    "", '{"frames": 9, "updates": 2}\n', '{"frames": 9, "upda', "\n\n", "{broken}\n{}\n3\n",
    '{"frames": 9, "upd{"frames": 10, "updates": 3}\n', "\xff\xfe\x00\x80",
])  # fmt: skip
def test_rows_and_rubbish_from_after_the_checkpoint_are_cut_off(run, logger, after):
    logger.log({"losses/kl": 1.0}, 8, 2)
    size = logger.file.tell()
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(after.encode("latin-1"))
    resumed_log(run, size)
    assert [row["frames"] for row in rows(run)] == [8, 12]


@pytest.mark.parametrize("content", [None, b"", b'{"frames": 8}\n'])
def test_a_log_that_has_lost_rows_of_the_checkpoint_goes_on(run, logger, content):
    for frames in range(1, 9):
        logger.log({"losses/kl": 1.0}, frames, 2)
    path, size = run / "metrics.jsonl", logger.file.tell()
    path.unlink() if content is None else path.write_bytes(content)
    resumed_log(run, size)
    assert [row["frames"] for row in rows(run)] == ([8, 12] if content else [12])


def test_broken_bytes_from_before_the_checkpoint_stop_no_resumed_run(run, logger):
    logger.log({"losses/kl": 1.0}, 8, 2)
    path = run / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe\n{broken\n" + path.read_bytes())
    first, second, *whole = resumed_log(run, path.stat().st_size)
    assert (first, second) == (b"\xff\xfe", b"{broken")
    assert [json.loads(line)["frames"] for line in whole] == [8, 12]


@pytest.mark.parametrize("before", [0.0, 90.0])
def test_a_row_of_losses_has_the_speed_of_the_whole_run(run, monkeypatch, before):
    logger = common.Logger(run, asdict(Args(total_frames=400)), 100, before)
    now = iter(logger.began + before + np.array([10.0, 13.0, 20.0, 30.0]))
    with monkeypatch.context() as patch:
        patch.setattr(common, "time", SimpleNamespace(time=lambda: next(now)))
        logger.log({"losses/model": 1.0}, 100, 10)
        logger.log({"charts/episodic_return": 1.0}, 200, 20)
        logger.log({"losses/model": 1.0}, 300, 30)
        logger.log({"losses/model": 1.0}, 300, 60)
    close(logger)
    assert [row["seconds"] for row in rows(run)] == [before + t for t in (10, 13, 20, 30)]
    speeds = [(r.get("charts/SPS"), r.get("time/updates_per_second")) for r in rows(run)]
    wanted = [(frames / (before + t), updates / (before + t)) for frames, updates, t in (
        (100, 10, 10), (300, 30, 20), (300, 60, 30),
    )]  # fmt: skip
    assert speeds.pop(1) == (None, None)
    assert speeds == [pytest.approx(pair) for pair in wanted]


def test_tracking_logs_to_weights_and_biases(run, monkeypatch):
    track = {"track": True, "wandb_project_name": "some", "wandb_entity": None}
    args, calls = asdict(Args(total_frames=40)) | track, []
    init = SimpleNamespace(init=lambda **options: calls.append(options))
    monkeypatch.setitem(sys.modules, "wandb", init)
    close(common.Logger(run, args))
    where = {"project": "some", "entity": None, "name": run.name}
    assert calls == [{"config": args, "sync_tensorboard": True} | where]


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


@pytest.mark.parametrize("channels", [1, 3])
def test_a_tensor_is_filmed_with_the_videos_of_its_batch_side_by_side(tmp_path, channels):
    torch.manual_seed(0)
    video = torch.rand(4, 3, channels, 20, 30) * 1.4 - 0.2  # (T, B, C, H, W), beyond [0, 1] too
    common.save_gif(tmp_path / "videos" / "some.gif", video)
    with Image.open(tmp_path / "videos" / "some.gif") as image:
        assert (image.n_frames, image.size) == (4, (90, 20))
        image.seek(2)
        frame = np.asarray(image.convert("RGB" if channels == 3 else "L")).astype(float)
    wanted = (video[2].clamp(0, 1) * 255).numpy()  # (B, C, H, W)
    wanted = np.hstack(list(wanted.transpose(0, 2, 3, 1))).squeeze()
    if channels == 1:
        assert abs(frame - wanted).max() < 4  # Pillow may merge neighbors in its palette
    else:  # a GIF has 256 colors
        assert abs(frame - wanted).mean() < 40
        assert np.corrcoef(frame.ravel(), wanted.ravel())[0, 1] > 0.9

