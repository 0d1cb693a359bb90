"""A checkpoint comes back as it was, or the one before does, whatever happens to the files."""

import contextlib
import errno
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import contents
from torch import nn

import runtime


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
    def make(number):
        model = nn.Linear(3, 2)
        optimizers = {
            "model": torch.optim.AdamW(model.parameters(), lr=0.1),
            "bias": torch.optim.Adam([model.bias], lr=0.2),
        }
        return {"model": model, "optimizers": optimizers, "replay": Part(number)}

    parts = make(3)
    parts["model"](torch.ones(5, 3)).sum().backward()
    for optimizer in parts["optimizers"].values():
        optimizer.step()
    counters = {"step": 3, "updates": 2, "last_report": 12}
    runtime.save_checkpoint(tmp_path, parts, counters)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    same = make(None)
    assert runtime.load_checkpoint(tmp_path, same) == counters
    assert same["replay"].number == 3
    pairs = [(same["model"], parts["model"])]
    pairs += [(same["optimizers"][name], parts["optimizers"][name]) for name in ("model", "bias")]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert all(optimizer.state_dict()["state"] for optimizer in same["optimizers"].values())


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


# Damage
def flip(whole):
    """One bit of the tensor."""
    middle = whole.index(torch.full((9,), 2.0).numpy().tobytes()) + 1000
    return whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]


DAMAGE = [
    flip, lambda whole: b"", lambda whole: b"hello", lambda whole: whole[: len(whole) // 2],
    lambda whole: whole[:-1], lambda whole: whole[100:], lambda whole: bytes(len(whole)),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    path = saved(tmp_path, 1, 2) / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    assert loaded(tmp_path) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} cannot be used, trying another: ")
    saved(tmp_path, 3)  # the good one is not thrown away before there is a new one
    assert loaded(tmp_path) == 3


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


# Crashes while it is written
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
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(RuntimeError, match="broken"):
        saved(tmp_path, 3)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("state", [np.float64(0.5), np.ones(3), {np.int64(3): 1}, Path("x")])
def test_a_state_that_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path, state):
    before = contents(saved(tmp_path, 1, 2))
    with pytest.raises(TypeError, match="a checkpoint holds tensors and Python's own types, no "):
        runtime.save_checkpoint(tmp_path, {"part": Part(3)}, {"step": 3, "mine": state})
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


# Full disks
def assert_one_line(function, capsys, number):
    """The function ends as a script that meets an error of the disk: code 1 and one line."""
    with pytest.raises(SystemExit) as stop, runtime.exit_on_error():
        function()
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"error: [Errno {number}] {os.strerror(number)}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("size", [100, 1_000_000])  # fails as it is flushed, as it is written
@pytest.mark.parametrize("numbers", [(), (1,), (1, 2)])
def test_a_full_disk_at_a_checkpoint_leaves_the_last_one(tmp_path, capsys, numbers, size):
    before = contents(saved(tmp_path, *numbers))
    new = tmp_path / "checkpoint.new.pt"
    new.symlink_to("/dev/full")
    assert_one_line(lambda: saved(tmp_path, 3, size=size), capsys, errno.ENOSPC)
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
        assert_one_line(lambda: saved(tmp_path, 3), capsys, number)
    assert before.items() <= contents(tmp_path).items()
    assert loaded(tmp_path) == 2
    assert loaded(saved(tmp_path, 4)) == 4


# Generators, metrics
def test_an_optimizers_averages_come_back_however_they_lay_in_memory(tmp_path):
    layouts = [torch.contiguous_format, torch.channels_last]

    def make(layout):
        torch.manual_seed(1)
        model = nn.Conv2d(3, 2, 5).to(memory_format=layout)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 3 * 5 * 5).reshape(1, 3, 5, 5)).square().sum().backward()
        optimizer.step()

    model, optimizer = make(layouts[0])
    step(model, optimizer)
    runtime.save_checkpoint(tmp_path, {"model": model, "optimizer": optimizer}, {})
    step(model, optimizer)
    for layout in layouts:
        resumed, its_optimizer = make(layout)
        runtime.load_checkpoint(tmp_path, {"model": resumed, "optimizer": its_optimizer})
        step(resumed, its_optimizer)
        torch.testing.assert_close(resumed.weight, model.weight)


def test_the_state_of_torchs_generator_comes_back(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        torch.randn(3)
        runtime.save_checkpoint(tmp_path, {}, {})
        undisturbed = [torch.randn(3).tolist() for _ in range(3)]
        torch.manual_seed(8)
        runtime.load_checkpoint(tmp_path, {})
        assert [torch.randn(3).tolist() for _ in range(3)] == undisturbed


def recorded(updates, **losses):
    """Metrics after an update."""
    metrics = runtime.Metrics()
    metrics.record({name: torch.tensor(loss) for name, loss in losses.items()}, updates)
    return metrics


def test_metrics_come_back_as_they_were(tmp_path):
    metrics = recorded(8, kl=0.1, image=-2e30)
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
    assert (again.names, again.read()) == ([], {})
    again.record({"kl": torch.tensor(0.25)}, 0)
    assert again.read() == {"kl": 0.25}


def test_a_run_that_diverged_writes_no_checkpoint(tmp_path):
    runtime.save_checkpoint(tmp_path, {"metrics": recorded(0, kl=1.0)}, {"updates": 1})
    before = contents(tmp_path)
    with pytest.raises(FloatingPointError, match=re.escape("not finite at update 1: kl")):
        runtime.save_checkpoint(tmp_path, {"metrics": recorded(1, kl=torch.nan)}, {"updates": 2})
    assert contents(tmp_path) == before
    assert runtime.load_checkpoint(tmp_path, {"metrics": runtime.Metrics()}) == {"updates": 1}
