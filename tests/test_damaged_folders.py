"""Damaged, foreign and malicious run folders end in a clear line or go on; full disks, too."""

import errno
import os
import pickle
import random
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import (
    SCRIPTS, TINY, UNCLOSED, counters, kept_process, metrics, module_of, play, run,
    the_error,
)  # fmt: skip

TINY = f"{TINY} --imag-horizon 3 --train-every 50"


@pytest.fixture(scope="module")
def script():
    return "dreamerv2.py"  # what reads a folder is shared


@UNCLOSED
def test_a_full_disk_stops_a_run_in_one_line_and_leaves_the_last_checkpoint(
    script, place, monkeypatch, capsys
):
    calls = []

    def full(data, file):  # half of the fourth checkpoint has room: 0, 100, 200, 300
        calls.append(Path(file.name).name)
        file.write(data.read(len(data.getvalue()) // 2))
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(data.read())

    flags = f"{TINY} --env-id CartPole-v1 --checkpoint-every 100 --total-frames 400"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        folder = play(script, flags, 1)
    assert calls == ["checkpoint.new.pt"] * 4
    assert the_error(capsys.readouterr().err) == "error: [Errno 28] No space left on device"
    assert counters(folder)[0] == 200
    play(script, f"--resume {folder}")
    assert metrics(folder)[-1]["frames"] == 400


def test_a_module_that_a_run_folder_names_is_imported_only_if_the_user_names_it_too(
    script, place, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(place)
    (place / "evil.py").write_text("from pathlib import Path\nPath('pwned').touch()\n")
    folder = play(script, f"{TINY} --env-id CartPole-v1 --total-frames 210")
    args = (folder / "args.yaml").read_text()
    (folder / "args.yaml").write_text(args.replace("CartPole-v1", "evil:CartPole-v1"))
    for flag in ("--resume", "--evaluate"):
        assert run(script, f"{flag} {folder}") == 2
        assert "error: add --env-id evil:CartPole-v1 if" in capsys.readouterr().err
        assert "evil" not in sys.modules
        assert not Path("pwned").exists()
    assert run(script, f"--evaluate {folder} --env-id {module_of(script).Args.env_id}") == 2
    assert "add --env-id" not in capsys.readouterr().err  # another id is played, and does not fit
    assert not Path("pwned").exists()
    play(script, f"--evaluate {folder} --env-id evil:CartPole-v1")
    assert Path("pwned").exists()
    del sys.modules["evil"]


# Damage
class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def flip(path, rng):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 3, 30])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(max(1, path.stat().st_size))])


def append(path, rng):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 100])))


def malicious(path, rng):
    evil = Malicious(path.parent.absolute() / "pwned")
    if rng.random() < 0.5:
        torch.save({"agent": evil, "counters": evil}, path)
    elif path.suffix == ".yaml":
        path.write_text(f"!!python/object/apply:os.system ['touch {evil.path}']")
    elif path.suffix == ".npy":
        np.save(path, np.array([evil], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(evil))


def swap(path, rng):
    other = rng.choice([p for p in path.parent.iterdir() if p.is_file() and p != path])
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)


DAMAGES = {
    "flipped": flip,
    "truncated": truncate,
    "emptied": lambda path, rng: path.write_bytes(b""),
    "removed": lambda path, rng: path.unlink(),
    "appended": append,
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(200)),
    "malicious": malicious,
    "swapped": swap,
}
FILES = ["args.yaml", "checkpoint.pt", "checkpoint.pt", "metrics.jsonl", "replay/action.npy"]
FILES += ["replay/is_first.npy", "replay/vector.npy", "replay/written.npy", "replay/reward.npy"]


@pytest.fixture(scope="module")
def runs(script, tmp_path_factory):
    """Finished runs: of the script, of another environment, and of the other script."""
    [other] = set(SCRIPTS) - {script}
    kinds = {"ours": (script, "Acrobot-v1"), "env": (script, "Pendulum-v1")}
    kinds["script"] = (other, "Acrobot-v1")
    folders = {}
    with pytest.MonkeyPatch.context() as patch, kept_process():
        for name, (which, env_id) in kinds.items():
            patch.chdir(tmp_path_factory.mktemp(name))
            flags = f"{TINY} --env-id {env_id} --total-frames 300 --checkpoint-every 250"
            flags += " --time-limit 50"
            folders[name] = play(which, flags).absolute()
    return folders


def resume_and_evaluate(script, folder, capsys, evaluate=True):
    """Both end with one clear line or well -> code of resume."""
    ways = [f"--evaluate {folder}"] if evaluate else []
    with warnings.catch_warnings(action="ignore"):  # of numbers that overflow
        codes = [run(script, way) for way in [*ways, f"--resume {folder} --total-frames 340"]]
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert set(codes) <= {0, 1, 2}
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == sum(map(bool, codes)), err
    return codes[-1]


@pytest.mark.parametrize(
    "numbers", [range(9), pytest.param(range(9, 72), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_damaged_run_folder_ends_in_a_clear_line_or_goes_on(
    script, runs, tmp_path, capsys, numbers
):
    codes = []
    for number in numbers:
        rng = random.Random(number)
        folder = tmp_path / str(number)
        shutil.copytree(runs["ours"], folder)
        kind = list(DAMAGES)[number % len(DAMAGES)]
        file = FILES[number // len(DAMAGES) % len(FILES)]
        DAMAGES[kind](folder / file, rng)
        codes.append(resume_and_evaluate(script, folder, capsys, evaluate=number % 3 == 0))
        assert not list(folder.rglob("pwned")), (kind, file)
        if file == "checkpoint.pt" and kind != "appended":
            assert codes[-1] in (0, 2), (kind, number)
        shutil.rmtree(folder)
    assert {0, 2} <= set(codes)


@pytest.mark.parametrize(("foreign", "file"), [
    ("env", "checkpoint.pt"), ("env", "args.yaml"), ("env", "replay"),
    ("script", "checkpoint.pt"), ("script", "args.yaml"),
])  # fmt: skip
def test_files_of_another_run_are_refused(script, runs, tmp_path, capsys, foreign, file):
    folder = tmp_path / "mixed"
    shutil.copytree(runs["ours"], folder)
    (folder / "checkpoint.old.pt").unlink(missing_ok=True)
    if file == "replay":
        shutil.rmtree(folder / file)
        shutil.copytree(runs[foreign] / file, folder / file)
    else:
        shutil.copy(runs[foreign] / file, folder / file)
    assert resume_and_evaluate(script, folder, capsys) == 2
