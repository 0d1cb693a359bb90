"""Runtime: command line, random numbers, run folders, checkpoints, logs, and opt_step."""

import contextlib
import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import distributions as td
from torch import nn

import common
import dreamerv1
import dreamerv2
import runtime

ROOT = Path(__file__).parent.parent
SCRIPTS = [dreamerv1, dreamerv2]


@dataclass
class Args:
    env_id: str = "PongNoFrameskip-v4"
    preset: Literal["auto", "atari", "dmc_pixels", "dmc_vector", "other"] = "auto"
    exp_name: str = "try"
    seed: int = 1
    total_frames: int = 200
    cuda: bool = True
    threads: int = 0
    resume: str = ""
    evaluate: str = ""
    observation: Literal["auto", "pixels", "vector", "both"] = "auto"
    num_envs: runtime.Count = 1
    lr: runtime.Rate = 0.1
    clip: float = 100.0
    log_every: runtime.Whole = 10
    eval_episodes: int = 1
    sticky_prob: Annotated[float | None, 0, 1] = None
    track: bool = False
    graph: bool = True
    compile: bool = False


PRESETS = {
    "atari": {},
    "dmc_pixels": {"lr": 0.2},
    "dmc_vector": {"lr": 0.3},
    "other": {"lr": 0.4, "num_envs": 5},
}


def parse(line):
    return runtime.parse_args(Args, PRESETS, common.choose_preset, line.split())


def contents(folder):
    """All files below a folder -> path from there: bytes; folders have none."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
    }


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
    assert asdict(parse(f"{line} --preset auto")) == asdict(args)


@pytest.mark.parametrize("env_id", ["PongNoFrameskip-v4", "dmc/walker-walk", "CartPole-v1"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_that_is_named_goes_before_the_id(env_id, preset):
    args = parse(f"--env-id {env_id} --preset {preset} --observation both --seed 9")
    given = {"env_id": env_id, "preset": preset, "observation": "both", "seed": 9}
    assert asdict(args) == asdict(Args()) | PRESETS[preset] | given
    assert parse(f"--preset {preset} --env-id {env_id} --lr 7").lr == 7


def test_a_preset_that_there_is_not_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--env-id CartPole-v1 --preset small")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--preset" in said
    assert "'small'" in said
    assert all(f"'{preset}'" in said for preset in ("auto", *PRESETS))


@pytest.mark.parametrize(("env_id", "observation", "preset"), [
    ("PongNoFrameskip-v4", "auto", "atari"), ("ALE/Pong-v5", "pixels", "atari"),
    ("dm_control/walker-walk-v0", "auto", "dmc_pixels"), ("dmc/walker-walk", "both", "dmc_pixels"),
    ("dmc/walker-walk", "vector", "dmc_vector"), ("CartPole-v1", "auto", "other"),
    ("CartPole-v1", "pixels", "other"), ("module:dmc/Thing-v0", "auto", "other"),
    ("Nothing-v0", "vector", "other"),
])  # fmt: skip
def test_choose_preset_goes_by_the_id_unless_one_is_named(env_id, observation, preset):
    args = SimpleNamespace(env_id=env_id, observation=observation, preset="auto")
    assert common.choose_preset(args) == preset
    for args.preset in PRESETS:
        assert common.choose_preset(args) == args.preset


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
    with pytest.raises(SystemExit) as stop:
        parse("--env-id CartPole-v1 --preset dmc_vector --help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "0.3" in text
    assert "0.4" not in text


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
    folder, is_new = runtime.open_run(args, 0)
    assert is_new
    return folder


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
    changes = ["--lr 0.8", "--seed 4", "--env-id Pendulum-v1", "--num-envs 2", "--preset other"]
    for change in changes:
        name = change.split()[0].strip("-")
        with pytest.raises(runtime.UserError, match=f"--{name} cannot change"):
            parse(f"--resume {run} {change}")


def test_evaluate_may_change_the_episodes_and_their_seed_but_not_the_agent(run):
    args = parse(f"--evaluate {run} --eval-episodes 9 --seed 4")
    assert (args.eval_episodes, args.seed, args.lr) == (9, 4, 0.7)
    with pytest.raises(runtime.UserError, match="--lr cannot change"):
        parse(f"--evaluate {run} --lr 0.8")


@pytest.mark.parametrize(("flags", "bounds"), [
    ("--num-envs 0", "1 to 2147483647"), ("--num-envs -2", "1 to 2147483647"),
    ("--lr 0.0", "1e-30 to 2147483647"), ("--lr nan", "1e-30 to 2147483647"),
    ("--log-every -1", "0 to 2147483647"), ("--sticky-prob -0.5", "0 to 1"),
])  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(run, flags, bounds):
    flag, value = flags.split()
    with pytest.raises(runtime.UserError, match=rf"^{flag} is {value}, it must be from {bounds}$"):
        parse(f"{flags} --env-id CartPole-v1")
    args = asdict(Args()) | {flag.strip("-").replace("-", "_"): yaml.safe_load(value)}
    (run / "args.yaml").write_text(yaml.safe_dump(args))
    with pytest.raises(runtime.UserError):
        parse(f"--evaluate {run}")


def test_a_0_is_fine_where_it_means_something():
    args = parse("--log-every 0 --seed 0 --sticky-prob 0")
    assert (args.log_every, args.seed, args.sticky_prob) == (0, 0, 0)


@pytest.mark.parametrize(("kind", "code"), [
    (runtime.UserError, 2), (ChildProcessError, 1), (FloatingPointError, 1), (OSError, 1),
    (PermissionError, 1), (FileNotFoundError, 1), (runtime.DeviceError, 1),
    (torch.OutOfMemoryError, 1), (runtime.ElsewhereError, 1),
])  # fmt: skip
def test_errors_that_are_meant_for_users_take_one_line_and_have_codes(capsys, kind, code):
    with pytest.raises(SystemExit) as stop, runtime.exit_on_error():
        raise kind("first\n   second")
    assert stop.value.code == code
    assert capsys.readouterr().err == "error: first second\n"


def test_ctrl_c_is_silent_and_has_code_130(capsys):
    with pytest.raises(SystemExit) as stop, runtime.exit_on_error():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [ZeroDivisionError, ValueError, RuntimeError, AssertionError])
def test_other_errors_keep_their_traceback(capsys, kind):
    error = kind("unexpected")
    with pytest.raises(kind) as raised, runtime.exit_on_error():
        raise error
    assert raised.value is error
    assert capsys.readouterr() == ("", "")


def test_an_exit_keeps_its_code():
    with pytest.raises(SystemExit) as stop, runtime.exit_on_error():
        sys.exit(143)
    assert stop.value.code == 143
    with runtime.exit_on_error():
        pass


def test_an_error_can_be_explained_in_one_line():
    with runtime.explain("no luck", ValueError):
        pass
    with (
        pytest.raises(runtime.UserError, match=r"^no luck: ValueError: first second$"),
        runtime.explain("no luck", KeyError, ValueError),
    ):
        raise ValueError("first\n  second")
    with pytest.raises(ZeroDivisionError), runtime.explain("no luck", ValueError):
        _ = 1 / 0


# Optimizer step
per_script = pytest.mark.parametrize("script", SCRIPTS, ids=["dreamerv1", "dreamerv2"])


@per_script
def test_opt_step_clips_by_the_global_norm_and_says_what_it_was(script):
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    target = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0, 12.0])]

    def step(clip):
        loss = -sum((w * t).sum() for w, t in zip(weights, target, strict=True))
        return script.opt_step(optimizer, loss, clip)

    assert step(6.5).item() == pytest.approx(13)
    for weight, t in zip(weights, target, strict=True):
        torch.testing.assert_close(weight.detach(), t / 2)
    assert step(100.0).item() == pytest.approx(13)  # no gradient is left from before
    for weight, t in zip(weights, target, strict=True):
        torch.testing.assert_close(weight.detach(), t * 1.5)


@per_script
def test_opt_step_moves_only_the_parameters_of_its_optimizer(script):
    mine = nn.Linear(3, 2)
    other = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(mine.parameters(), lr=1.0)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    old = mine.weight.detach().clone()
    script.opt_step(optimizer, other(mine(torch.ones(5, 3))).sum(), 100.0)
    assert not mine.weight.equal(old)
    for key, value in other.state_dict().items():
        assert value.equal(before[key])


@per_script
def test_gradients_flow_through_another_module_and_leave_nothing_there(script):
    mine = nn.Linear(3, 2)
    other = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(mine.parameters(), lr=1.0)
    old = mine.weight.detach().clone()
    norm = script.opt_step(optimizer, other(mine(torch.ones(5, 3))).sum(), 100.0)
    step = 5 * other.weight.detach().T  # (2, 1), of 5 rows of ones
    torch.testing.assert_close(old - mine.weight.detach(), step.expand(2, 3))
    torch.testing.assert_close(norm, step.expand(2, 4).norm())  # with the bias
    assert [p.grad for p in other.parameters()] == [None, None]
    assert all(p.requires_grad for p in other.parameters())

    gradients = [torch.full_like(p, 7.0) for p in other.parameters()]  # of a step of its own
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    script.opt_step(optimizer, other(mine(torch.ones(5, 3))).sum(), 100.0)
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        assert parameter.grad.equal(gradient)


@per_script
def test_a_parameter_that_requires_no_gradient_stays_as_it_is(script):
    mine = nn.Linear(3, 2)
    mine.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1.0, weight_decay=0.5)
    weight, bias = (p.detach().clone() for p in mine.parameters())
    norm = script.opt_step(optimizer, mine(torch.ones(5, 3)).sum(), 100.0)
    assert mine.weight.equal(weight)
    assert mine.weight.grad is None
    assert not mine.bias.equal(bias)
    assert norm.item() == pytest.approx(np.sqrt(2 * 5**2))  # of the bias alone
    mine.weight.requires_grad_(True)
    script.opt_step(optimizer, mine(torch.ones(5, 3)).sum(), 100.0)
    assert not mine.weight.equal(weight)


@per_script
def test_a_parameter_that_the_loss_does_not_reach_stays_as_it_is(script):
    used = nn.Parameter(torch.ones(2))
    unused = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([used, unused], lr=1.0, weight_decay=0.5)
    script.opt_step(optimizer, used.sum(), 100.0)
    assert used.max() < 1
    assert unused.tolist() == [1, 1]


@pytest.mark.parametrize("enabled", [True, False])
def test_without_a_gpu_a_captured_function_is_called_each_time_with_rows_as_tensors(enabled):
    calls = []
    captured = runtime.Captured(lambda *x: calls.append(x) or x, torch.device("cpu"), enabled)
    for i in range(6):
        row = {"vector": np.full((2, 3), i, np.float32), "is_first": np.arange(2) == i}
        given, state = captured(row, {"deter": torch.full((2, 1), i)})
        assert len(calls) == i + 1
        assert all(torch.is_tensor(v) for v in (*given.values(), *state.values()))
        assert given["vector"].tolist() == [[i] * 3] * 2
        assert given["is_first"].tolist() == [i == 0, i == 1]
        assert state["deter"].tolist() == [[i]] * 2


# Metrics
def test_metrics_name_the_first_update_and_its_losses_that_are_not_finite():
    metrics = runtime.Metrics()
    assert metrics.names == []
    assert metrics.read() == {}
    good = {k: torch.tensor(1.0) for k in ("image", "kl", "actor")}
    for updates in range(3):
        metrics.record(good, updates)
    assert metrics.read() == dict.fromkeys(good, 1.0)
    nan = torch.tensor(float("nan"))
    inf = torch.tensor(-float("inf"))
    metrics.record(good | {"kl": nan, "actor": inf}, 3)
    metrics.record(dict.fromkeys(good, nan), 4)
    metrics.record(good, 5)
    for read in (metrics.read, metrics.state_dict):
        with pytest.raises(FloatingPointError, match=r"^not finite at update 3: kl, actor$"):
            read()


def test_metrics_tell_the_values_of_the_last_update_as_they_were_then():
    metrics = runtime.Metrics()
    kl = torch.tensor(0.5)
    metrics.record({"kl": torch.tensor(9.0), "image": torch.tensor(8.0)}, 0)
    metrics.record({"kl": kl, "image": torch.tensor(-2.0)}, 1)
    kl.fill_(7.0)  # as a CUDA graph writes its next outputs over the last ones
    values = metrics.read()
    assert values == {"kl": 0.5, "image": -2.0}
    assert {type(value) for value in values.values()} == {float}


def test_metrics_see_the_very_first_update():
    metrics = runtime.Metrics()
    metrics.record({"kl": torch.tensor(float("inf")), "image": torch.tensor(0.0)}, 0)
    with pytest.raises(FloatingPointError, match=r"update 0: kl$"):
        metrics.read()


def test_metrics_come_back_from_a_checkpoint_as_they_were(tmp_path):
    metrics = runtime.Metrics()
    metrics.record({"kl": torch.tensor(0.1), "image": torch.tensor(-2e30)}, 8)
    runtime.save_checkpoint(tmp_path, {"metrics": metrics}, {})
    again = runtime.Metrics()
    runtime.load_checkpoint(tmp_path, {"metrics": again})
    assert again.names == ["kl", "image"]
    assert again.read() == metrics.read()
    again.record({"kl": torch.tensor(0.25), "image": torch.tensor(1.0)}, 9)
    assert again.read() == {"kl": 0.25, "image": 1.0}
    again.record({"kl": torch.tensor(0.25), "image": torch.tensor(torch.nan)}, 10)
    with pytest.raises(FloatingPointError, match=r"update 10: image$"):
        again.read()


def test_metrics_of_no_update_come_back_as_none(tmp_path):
    runtime.save_checkpoint(tmp_path, {"metrics": runtime.Metrics()}, {})
    again = runtime.Metrics()
    runtime.load_checkpoint(tmp_path, {"metrics": again})
    assert again.names == []
    assert again.read() == {}
    again.record({"kl": torch.tensor(0.25)}, 0)
    assert again.read() == {"kl": 0.25}


def test_a_run_that_diverged_writes_no_checkpoint(tmp_path):
    metrics = runtime.Metrics()
    metrics.record({"kl": torch.tensor(1.0)}, 0)
    runtime.save_checkpoint(tmp_path, {"metrics": metrics}, {"updates": 1})
    before = contents(tmp_path)
    metrics.record({"kl": torch.tensor(torch.nan)}, 1)
    with pytest.raises(FloatingPointError, match=r"^not finite at update 1: kl$"):
        runtime.save_checkpoint(tmp_path, {"metrics": metrics}, {"updates": 2})
    assert contents(tmp_path) == before
    assert runtime.load_checkpoint(tmp_path, {"metrics": runtime.Metrics()}) == {"updates": 1}


# Devices and random numbers
@pytest.fixture
def settings():
    """Puts back what setup sets for the whole process."""
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    rng = torch.get_rng_state()
    checks = td.Distribution._validate_args
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_rng_state(rng)
    td.Distribution.set_default_validate_args(checks)


def setup(seed):
    return runtime.setup(seed, cuda=False, deterministic=False, threads=1)


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
    runtime.save_checkpoint(tmp_path, {}, {})
    undisturbed = [torch.randn(3).tolist() for _ in range(3)]
    setup(8)
    runtime.load_checkpoint(tmp_path, {})
    assert [torch.randn(3).tolist() for _ in range(3)] == undisturbed


def draws_in_a_fork(*key):
    with runtime.forked_rng(*key):
        return torch.rand(4).tolist()


def test_a_fork_leaves_the_draws_outside_unchanged(settings):
    setup(7)
    undisturbed = [torch.rand(3).tolist() for _ in range(4)]
    setup(7)
    disturbed = [torch.rand(3).tolist()]
    draws_in_a_fork("acting", 7, 0)
    disturbed.append(torch.rand(3).tolist())
    with pytest.raises(ZeroDivisionError), runtime.forked_rng("acting", 7, 1):
        _ = torch.rand(9) / (1 // 0)
    disturbed.append(torch.rand(3).tolist())
    with runtime.forked_rng("evaluation", 7):
        torch.manual_seed(0)
    disturbed.append(torch.rand(3).tolist())
    assert disturbed == undisturbed


def test_draws_in_a_fork_follow_from_its_key_alone(settings):
    setup(7)
    first = draws_in_a_fork("acting", 7, 0)
    setup(8)
    torch.rand(3)
    assert draws_in_a_fork("acting", 7, 0) == first
    others = [("acting", 7, 1), ("acting", 8, 0), ("video", 7, 0), ("acting", 70), ("acting", 7)]
    for key in others:
        assert not set(draws_in_a_fork(*key)) & set(first)


def test_a_fork_in_a_fork_leaves_the_outer_one_unchanged(settings):
    first = draws_in_a_fork("acting", 7, 0)
    with runtime.forked_rng("acting", 7, 0):
        draws = torch.rand(2).tolist()
        draws_in_a_fork("evaluation", 7)
        draws += torch.rand(2).tolist()
    assert draws == first


def test_a_seed_follows_from_its_key_and_the_process(settings, monkeypatch):
    seeds = []
    draws = []
    for rank in range(3):
        monkeypatch.setattr(runtime, "RANK", rank)
        keys = [("acting", 1, 2), ("acting", 12), ("acting", 1, 3), ("video", 1, 2), ("acting",)]
        seeds += [runtime.seed_of(*key) for key in keys]
        assert [runtime.seed_of(*key) for key in keys] == seeds[-len(keys) :]
        draws += draws_in_a_fork("acting", 1, 2)
        runtime.seed_process(1)
        draws += torch.rand(4).tolist()
    assert len(set(seeds)) == len(seeds) == 15
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(draws)) == len(draws) == 24


def test_a_process_has_the_same_noise_in_each_run_of_a_seed(settings):
    draws = []
    for seed in (1, 1, 2):
        torch.rand(3)
        runtime.seed_process(seed)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


def test_seeds_are_the_same_on_every_machine():
    assert runtime.seed_of("acting", 1, 2) == 2013912898257820372


def test_memory_that_was_freed_is_used_again_without_page_faults():
    code = """
import resource, torch, runtime
runtime.setup(1, False, False, 1)
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


# Interrupts
@pytest.fixture
def handlers():
    """Puts the handlers of signals back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_a_second_ctrl_c_does_not(handlers, number, code):
    with runtime.Interrupt() as interrupt:
        assert interrupt.code == 0
        signal.raise_signal(number)
        assert interrupt.agreed() == interrupt.code == code
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_failed_environment_ends_the_loop_with_a_line_and_code_1(handlers, capsys):
    with runtime.Interrupt() as interrupt:
        raise ChildProcessError("environment 3 failed")
    assert interrupt.code == 1
    assert capsys.readouterr().err == "error: environment 3 failed\n"
    with runtime.Interrupt() as interrupt:
        pass
    assert interrupt.code == 0
    for kind in (runtime.UserError, ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(kind), runtime.Interrupt():
            raise kind


def test_a_signal_that_ends_the_processes_of_environments_too_keeps_its_code(handlers, capsys):
    with runtime.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        raise ChildProcessError("its process died")
    assert interrupt.code == 143
    assert capsys.readouterr().err == ""


# Run folders
def disk_with(monkeypatch, free):
    """Lets the disk have so many free bytes."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(runtime.shutil, "disk_usage", lambda path: usage(2**40, 0, free))


def test_a_new_run_has_a_folder_that_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = asdict(Args(env_id="ALE/Pong-v5", exp_name="mine", seed=4))
    run, is_new = runtime.open_run(args, 0)
    runtime.Logger(run, args).close()
    assert is_new
    assert run.parent == tmp_path / "runs"
    assert run.name.split("__")[:3] == ["ALE-Pong-v5", "mine", "4"]
    assert run.name.split("__")[3].isdigit()
    assert (run / "replay").is_dir()
    assert yaml.safe_load((run / "args.yaml").read_text()) == args
    assert list(yaml.safe_load((run / "args.yaml").read_text())) == list(args)  # in their order
    assert asdict(parse(f"--evaluate {run}")) == args | {"evaluate": str(run)}
    assert "/" not in runtime.open_run(args | {"env_id": "module:a/B-v0"}, 0)[0].name


def test_a_disk_that_is_too_small_is_a_user_error_before_there_is_a_run(tmp_path, monkeypatch):
    disk_with(monkeypatch, 3 * 2**30)
    monkeypatch.chdir(tmp_path)
    for resume in ("", "mine"):
        args = asdict(Args(resume=resume))
        with pytest.raises(runtime.UserError, match=r"4\.0 GiB of 3\.0 free.*--replay-size"):
            runtime.open_run(args, 4 * 2**30)
        assert not list(tmp_path.iterdir())
    assert runtime.open_run(asdict(Args()), 2.9 * 2**30)[0].exists()


def test_all_processes_need_their_room_on_the_disk(tmp_path, monkeypatch):
    disk_with(monkeypatch, 3 * 2**30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "WORLD", 2)
    monkeypatch.setattr(runtime, "all_gather", lambda value: [value, value])
    with pytest.raises(runtime.UserError, match=r"4\.0 GiB of 3\.0 free"):
        runtime.open_run(asdict(Args()), 2 * 2**30)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["mine", "a/b c/mine", "empty", "absolute"])
def test_a_run_begins_in_a_folder_that_is_missing_or_empty(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    if folder == "empty":
        Path(folder).mkdir()
    if folder == "absolute":
        folder = str(tmp_path / folder)
    flags = ["--resume", folder, "--env-id", "CartPole-v1", "--seed", "6"]
    args = runtime.parse_args(Args, PRESETS, common.choose_preset, flags)
    preset = {"lr": 0.4, "num_envs": 5}
    expected = asdict(Args(env_id="CartPole-v1", seed=6)) | preset
    assert asdict(args) == expected | {"resume": folder}
    assert capsys.readouterr() == ("", "")
    assert not Path(folder).exists() or not contents(Path(folder))

    run, is_new = runtime.open_run(asdict(args), 0)
    assert (run, is_new) == (tmp_path / folder, True)
    said = f"a new run begins in {run.relative_to(tmp_path)}\n"
    assert capsys.readouterr().out == said
    assert contents(run).keys() == {"args.yaml", "replay"}
    assert yaml.safe_load((run / "args.yaml").read_text()) == expected
    assert not Path("runs").exists()


def test_the_run_that_began_in_a_folder_goes_on_with_the_same_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "--resume mine --env-id CartPole-v1 --lr 0.7"
    first = parse(line)
    runtime.open_run(asdict(first), 0)
    saved(Path("mine"), 1)
    before = contents(Path("mine"))
    capsys.readouterr()
    assert asdict(parse(line)) == asdict(parse("--resume mine")) == asdict(first)
    assert runtime.open_run(asdict(first), 2**60) == (tmp_path / "mine", False)  # it has its replay
    assert capsys.readouterr().out == "the run in mine goes on\n"
    assert contents(Path("mine")) == before
    with pytest.raises(runtime.UserError, match="--lr cannot change in a run that exists"):
        parse("--resume mine --lr 0.8")


@pytest.mark.parametrize("entry", ["notes.txt", ".hidden", "replay/", "a/b/"])
def test_no_run_begins_in_a_folder_with_other_contents(tmp_path, entry):
    path = tmp_path / entry
    if entry.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.write_text("mine")
    before = contents(tmp_path)
    refused(tmp_path, f"^{tmp_path} is no run folder of this script: FileNotFoundError")
    assert contents(tmp_path) == before


def test_no_run_begins_where_a_file_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    refused(path, "notes.txt is no run folder of this script: NotADirectoryError")
    assert path.read_text() == "mine"


def test_tracking_without_its_package_is_a_user_error_before_there_is_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    args = asdict(Args(env_id="CartPole-v1"))
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(args))
    for line in ("--env-id CartPole-v1", f"--resume {tmp_path}"):
        with pytest.raises(runtime.UserError, match=r"^--track needs pip install wandb: "):
            parse(f"{line} --track")
        assert not parse(line).track


def refused(run, match):
    """Both ways to go on with the run are refused, in one line."""
    for flag in ("resume", "evaluate"):
        with pytest.raises(runtime.UserError, match=match) as error:
            parse(f"--{flag} {run}")
        assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_a_user_error(tmp_path, run):
    with pytest.raises(
        runtime.UserError, match="nowhere is no run folder of this script: FileNotFoundError"
    ):
        parse(f"--evaluate {tmp_path / 'nowhere'}")
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
    """Something that has a state: a number and as many weights as asked for, each that number."""

    def __init__(self, number=None, size=1000):
        self.number = number
        self.weights = torch.full((size,), float(number or 0))

    def state_dict(self):
        return {"number": self.number, "weights": self.weights}

    def load_state_dict(self, state):
        self.number = state["number"]
        self.weights = state["weights"]


def saved(run, *numbers, size=1000):
    """The folder after a checkpoint with each of the numbers."""
    for number in numbers:
        runtime.save_checkpoint(run, {"part": Part(number, size)}, {"step": number})
    return run


def loaded(run):
    """The number of the checkpoint that a resumed run takes."""
    part = Part()
    counters = runtime.load_checkpoint(run, {"part": part})
    assert counters == {"step": part.number}
    assert set(part.weights.tolist()) == {float(part.number)}
    return part.number


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    def make():
        model = nn.Linear(3, 2)
        optimizers = {
            "model": torch.optim.AdamW(model.parameters(), lr=0.1),
            "bias": torch.optim.Adam([model.bias], lr=0.2),
        }
        return {"model": model, "optimizers": optimizers, "replay": Part(3)}

    parts = make()
    for optimizer in parts["optimizers"].values():
        dreamerv2.opt_step(optimizer, parts["model"](torch.ones(5, 3)).sum(), 100.0)
    counters = {"step": 3, "updates": 2, "last_report": 12}
    runtime.save_checkpoint(tmp_path, parts, counters)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    same = make()
    same["replay"].number = None
    assert runtime.load_checkpoint(tmp_path, same) == counters
    assert same["replay"].number == 3
    assert same["model"].state_dict().keys() == parts["model"].state_dict().keys()
    for key, value in parts["model"].state_dict().items():
        assert same["model"].state_dict()[key].equal(value)
    for name, optimizer in parts["optimizers"].items():
        assert optimizer.state_dict()["state"]
        torch.testing.assert_close(
            same["optimizers"][name].state_dict(), optimizer.state_dict(), rtol=0, atol=0
        )


def test_a_checkpoint_holds_counters_generators_parts_and_what_each_process_has(tmp_path):
    parts = {"agent": Part(1), "optimizers": {"actor": Part(2), "critic": Part(3)}}
    runtime.save_checkpoint(tmp_path, parts | {"replay": Part(4), "envs": Part(5)}, {"step": 6})
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    own = {"generators", "replay", "envs"}
    assert saved.keys() == {"counters", "agent", "optimizers", "ranks"} | own
    assert saved["counters"] == {"step": 6}
    numbers = {name: state["number"] for name, state in saved["optimizers"].items()}
    assert numbers == {"actor": 2, "critic": 3}
    [rank] = saved["ranks"]
    assert rank.keys() == own
    assert rank["envs"]["number"] == saved["envs"]["number"] == 5


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
    same = {"model": nn.Linear(3, 2)}
    runtime.save_checkpoint(tmp_path, parts, {"step": 1})
    runtime.save_checkpoint(tmp_path, {"model": nn.Linear(3, 4)}, {"step": 2})
    assert runtime.load_checkpoint(tmp_path, same) == {"step": 1}
    assert same["model"].weight.equal(parts["model"].weight)
    assert "cannot be used" in capsys.readouterr().err
    for others in ({}, {"part": Part(3)}):  # a part is missing
        (tmp_path / "checkpoint.old.pt").unlink(missing_ok=True)
        runtime.save_checkpoint(tmp_path, others, {"step": 3})
    with pytest.raises(runtime.UserError, match="no checkpoint can be read"):
        runtime.load_checkpoint(tmp_path, same)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_between_the_renames_leaves_a_usable_checkpoint(tmp_path, monkeypatch, renames):
    saved(tmp_path, 1, 2)
    rename = Path.replace
    done = []

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
    sync = os.fsync
    synced = []

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
    with pytest.raises(runtime.UserError, match="no checkpoint can be read"):
        loaded(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("damage", DAMAGE[1:])
def test_without_any_whole_checkpoint_there_is_a_user_error(tmp_path, damage):
    with pytest.raises(runtime.UserError, match=f"no checkpoint can be read in {tmp_path}"):
        loaded(tmp_path)
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoint.new.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes())
    for path in tmp_path.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(runtime.UserError, match=f"no checkpoint can be read in {tmp_path}"):
        loaded(tmp_path)


# A full disk
def full_disk(function, capsys, message="[Errno 28] No space left on device"):
    """Runs it as a script would; it must exit with code 1 and the message in one line."""
    with pytest.raises(SystemExit) as stop, runtime.exit_on_error():
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
    logger = runtime.Logger(run, asdict(Args(total_frames=40)))
    yield logger
    logger.close()


@needs_full
@pytest.mark.parametrize("sink", ["metrics.jsonl", "TensorBoard"])
def test_a_full_disk_at_a_log_is_one_line(run, capsys, sink):
    logger = runtime.Logger(run, asdict(Args(total_frames=40)))

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
    again = runtime.Logger(run, asdict(Args(total_frames=40)))
    again.load_state_dict({"frames": 8, "seconds": 1000.0, "bytes": size})
    again.log({"losses/kl": 2.0}, 12, 3)
    assert again.bar.n == 8
    again.close()
    return (run / "metrics.jsonl").read_bytes().splitlines()


def test_a_resumed_log_goes_on_where_it_was(run, logger):
    logger.log({"losses/kl": 1.0}, 8, 2)
    resumed_log(run, logger.file.tell())
    assert [row["frames"] for row in rows(run)] == [8, 12]
    assert 1000 <= rows(run)[1]["seconds"] < 1060
    logger.writer.flush()
    assert [point.step for point in events(run).Scalars("losses/kl")] == [8, 12]


def test_a_log_comes_back_from_a_checkpoint_as_it_was(run, logger):
    logger.began -= 1000  # seconds that it took
    logger.progress(8)
    logger.log({"losses/kl": 1.0}, 8, 2)
    runtime.save_checkpoint(run, {"logger": logger}, {})
    state = logger.state_dict()
    size = (run / "metrics.jsonl").stat().st_size
    assert (state["frames"], state["bytes"]) == (8, size)
    assert 1000 <= state["seconds"] < 1060
    for frames in (12, 16):
        logger.progress(frames)
        logger.log({"losses/kl": 9.0}, frames, 3)
    logger.writer.flush()

    again = runtime.Logger(run, asdict(Args(total_frames=40)))
    runtime.load_checkpoint(run, {"logger": again})
    assert again.state_dict() == state | {"seconds": pytest.approx(state["seconds"], abs=60)}
    assert again.bar.n == 8
    again.progress(12)
    assert again.bar.n == again.frames == 12
    again.log({"losses/kl": 2.0}, 12, 3)
    again.close()
    assert [(row["frames"], row["losses/kl"]) for row in rows(run)] == [(8, 1.0), (12, 2.0)]
    shown = [(e.step, e.value) for e in events(run).Scalars("losses/kl")]
    assert shown == [(8, 1.0), (12, 2.0)]


def test_a_log_of_a_checkpoint_before_the_first_row_is_empty(run, logger):
    state = logger.state_dict()
    assert (state["frames"], state["bytes"]) == (0, 0)
    logger.log({"losses/kl": 1.0}, 8, 2)
    again = runtime.Logger(run, asdict(Args(total_frames=40)))
    again.load_state_dict(state)
    again.close()
    assert rows(run) == []


def test_the_progress_bar_shows_the_frames(logger):
    for frames in (0, 8, 8, 12):
        logger.progress(frames)
        assert logger.bar.n == frames
    assert logger.bar.total == 40


def test_other_processes_than_the_first_log_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "RANK", 1)
    args = asdict(Args(total_frames=40)) | {"track": True}
    logger = runtime.Logger(tmp_path, args)
    logger.log({"losses/model": 1.0}, 8, 2)
    logger.gif("eval/episode", np.zeros((2, 8, 8), np.uint8), 8)
    logger.progress(8)
    state = logger.state_dict()
    again = runtime.Logger(tmp_path, args)
    again.load_state_dict(state)
    assert again.state_dict()["frames"] == 8
    for closing in (logger, again):
        closing.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


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
    path = run / "metrics.jsonl"
    size = logger.file.tell()
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
    logger = runtime.Logger(run, asdict(Args(total_frames=400)))
    logger.load_state_dict({"frames": 100, "seconds": before, "bytes": 0})
    now = iter(logger.began + before + np.array([10.0, 13.0, 20.0, 30.0]))
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "time", SimpleNamespace(time=lambda: next(now)))
        logger.log({"losses/model": 1.0}, 100, 10)
        logger.log({"charts/episodic_return": 1.0}, 200, 20)
        logger.log({"losses/model": 1.0}, 300, 30)
        logger.log({"losses/model": 1.0}, 300, 60)
    logger.close()
    assert [row["seconds"] for row in rows(run)] == [before + t for t in (10, 13, 20, 30)]
    speeds = [(r.get("charts/SPS"), r.get("time/updates_per_second")) for r in rows(run)]
    wanted = [(frames / (before + t), updates / (before + t)) for frames, updates, t in (
        (100, 10, 10), (300, 30, 20), (300, 60, 30),
    )]  # fmt: skip
    assert speeds.pop(1) == (None, None)
    assert speeds == [pytest.approx(pair) for pair in wanted]


def test_tracking_logs_to_weights_and_biases(run, monkeypatch):
    track = {"track": True, "wandb_project_name": "some", "wandb_entity": None}
    args = asdict(Args(total_frames=40)) | track
    calls = []
    init = SimpleNamespace(init=lambda **options: calls.append(options))
    monkeypatch.setitem(sys.modules, "wandb", init)
    runtime.Logger(run, args).close()
    where = {"project": "some", "entity": None, "name": run.name, "id": run.name}
    assert calls == [{"config": args, "sync_tensorboard": True, "resume": "allow"} | where]


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
    runtime.save_gif(tmp_path / "videos" / "some.gif", video)
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
