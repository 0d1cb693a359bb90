"""What survives what: stops, kills, damaged and foreign files, failing environments."""

import errno
import importlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_often import kill_often
from processes import start

import common
import runtime

SCRIPTS = ["dreamerv1.py", "dreamerv2.py"]
TINY = """--batch-size 3 --batch-length 7 --deter 16 --hidden 16 --units 16 --stoch 3 --cnn-depth 2
    --pretrain 2 --prefill 200 --eval-episodes 2 --threads 1 --imag-horizon 3"""
UNCLOSED = pytest.mark.filterwarnings(  # a process that ends closes its files by itself
    "ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"
)
CLOCK = {"seconds", "charts/SPS", "time/updates_per_second"}


def play(script, flags, code=0):
    """A run in this process and folder, as from the command line -> its exit code."""
    module = importlib.import_module(Path(script).stem)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with runtime.exit_on_error():
            choose = common.choose_preset
            args = runtime.parse_args(module.Args, module.PRESETS, choose, flags.split())
            ended = module.main(args)
    except SystemExit as exit_:
        ended = exit_.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code is None or ended == code
    return ended


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


# Stopped and resumed
SCHEDULE = {
    "dreamerv1.py": "--train-every 50 --train-steps 4",
    "dreamerv2.py": "--train-every 50 --slow-update 3",
}
EXACT = ["--env-id MountainCar-v0", "--env-id Pendulum-v1"]
EXACT += [
    pytest.param(f"{env_id} --pixels", marks=pytest.mark.slow)
    for env_id in ("--env-id MountainCar-v0", "--env-id Pendulum-v1")
]


@pytest.mark.parametrize("where", ["update", "receive"])
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_is_stopped_and_resumed_has_the_metrics_of_one_that_was_not(
    script, kind, where, tmp_path, monkeypatch
):
    """Both end their episodes as truncated after frame 300: one by its time limit of 50 frames."""
    flags = f"{TINY} {SCHEDULE[script]} {kind} --time-limit 50 --log-every 50 --eval-every 100"
    flags += " --video-every 100 --total-frames 500"
    if where == "update":
        # Ten updates are due after frame 300, and the ninth one is interrupted.
        owner = importlib.import_module(Path(script).stem)
        stop_at = 9
        saved_updates = 9
        if script == "dreamerv2.py":  # it has bursts of several only when learning begins
            flags += " --prefill 300 --pretrain 9"
    else:
        # The row of frame 300, after six episodes with a reset and 50 steps each.
        owner = common.Envs
        stop_at = 6 * 51
        saved_updates = 6 if script == "dreamerv1.py" else 4
    original = getattr(owner, where)
    calls = []

    def stopping(*args, **kwargs):
        result = original(*args, **kwargs)
        if where == "update" or args[0].num_envs == 1:  # evaluation has two environments
            calls.append(1)
            if len(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return result

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "whole":
            play(script, flags)
        else:
            monkeypatch.setattr(owner, where, stopping)
            play(script, flags, 143)
            monkeypatch.setattr(owner, where, original)
            [folder] = Path("runs").iterdir()
            saved = torch.load(folder / "checkpoint.pt", weights_only=True)
            expected = {"step": 300, "updates": saved_updates, "last_report": 299}
            assert saved["counters"] == expected
            play(script, f"--resume {folder}")
    [whole] = (tmp_path / "whole" / "runs").iterdir()
    [stopped] = (tmp_path / "stopped" / "runs").iterdir()
    assert metrics(whole)[-1]["frames"] == 500
    assert metrics(stopped) == metrics(whole)  # to the last bit


@pytest.mark.parametrize("step", [120, 134])
@pytest.mark.parametrize("script", SCRIPTS)
def test_environments_that_a_stop_breaks_off_are_truncated_and_nothing_else_changes(
    script, step, tmp_path, monkeypatch
):
    """The reference run takes all of its three environments as done after that step."""
    receive = common.Envs.receive
    folders = []
    flags = f"{TINY} {SCHEDULE[script]} --env-id CartPole-v1 --num-envs 3 --log-every 50"
    flags += " --eval-every 100 --checkpoint-every 130 --total-frames 600"

    def interfere(envs):
        row, episodes = receive(envs)
        if envs.num_envs == 3:
            steps.append(1)
            if len(steps) == step:
                assert not envs.all_ended
                if name == "stopped":
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    envs.ended = np.ones(3, bool)
        return row, episodes

    for name in ("whole", "stopped"):
        steps = []
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(common.Envs, "receive", interfere)
        play(script, flags, 143 if name == "stopped" else 0)
        monkeypatch.setattr(common.Envs, "receive", receive)
        [folder] = Path("runs").iterdir()
        if name == "stopped":
            play(script, f"--resume {folder}")
        folders.append(metrics(folder))
    assert folders[0][-1]["frames"] >= 600
    assert folders[0] == folders[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_however_often_a_run_is_stopped_its_log_has_each_row_once(script, tmp_path, monkeypatch):
    """Stops, a kill's lost rows, a failed evaluation, and resumes after the end."""
    module = importlib.import_module(Path(script).stem)
    update = module.update
    evaluate = common.evaluate
    calls = []
    flags = f"{TINY} {SCHEDULE[script]} --env-id CartPole-v1 --log-every 50 --eval-every 100"

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) % 3 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args, **kwargs)

    def failing(*args, **kwargs):
        monkeypatch.setattr(common, "evaluate", evaluate)
        raise ChildProcessError("the environment failed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "update", stopping)
    code = play(script, f"{flags} --total-frames 400", None)
    [folder] = Path("runs").iterdir()
    for attempt in range(40):
        if code == 0:
            break
        assert code in (1, 143)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"frames": 999}\n{"fra')  # as if it had been killed after a few more rows
        if attempt == 4:
            monkeypatch.setattr(common, "evaluate", failing)
        code = play(script, f"--resume {folder}", None)
    assert code == 0
    monkeypatch.setattr(module, "update", update)
    for _ in range(2):
        play(script, f"--resume {folder}")
    rows = [(row["frames"], row["updates"], *sorted(row)) for row in metrics(folder)]
    assert rows[-1][0] == 400
    assert len(set(rows)) == len(rows)
    assert rows == sorted(rows, key=lambda row: row[:2])
    assert len([row for row in rows if "losses/kl" in row]) >= 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_remembers_how_far_it_was_told_to_go(script, tmp_path, monkeypatch):
    module = importlib.import_module(Path(script).stem)
    update = module.update
    calls = []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args, **kwargs)

    monkeypatch.chdir(tmp_path)
    play(script, f"{TINY} {SCHEDULE[script]} --env-id CartPole-v1 --total-frames 210")
    [folder] = Path("runs").iterdir()
    monkeypatch.setattr(module, "update", stopping)
    play(script, f"--resume {folder} --total-frames 300 --log-every 10", 143)
    play(script, f"--resume {folder}")
    rows = metrics(folder)
    assert rows[-1]["frames"] == 300
    assert len([row for row in rows if row["frames"] > 210 and "losses/kl" in row]) == 9


@UNCLOSED
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(script, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(Path(script).stem)
    update = module.update
    calls = []

    def stop_at_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            calls.append("the first one lets the update go on")
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the update went on")
        return update(*args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "update", stop_at_once)
    play(script, f"{TINY} {SCHEDULE[script]} --env-id CartPole-v1 --total-frames 400", 130)
    [folder] = Path("runs").iterdir()
    assert len(calls) == 5
    names = sorted(path.name for path in folder.glob("checkpoint*"))
    assert names == ["checkpoint.old.pt", "checkpoint.pt"]  # of step 0 and of random play's end
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (saved["counters"]["step"], saved["counters"]["updates"]) == (200, 0)
    assert "Traceback" not in capsys.readouterr().err


# Two processes
@pytest.mark.slow
def test_a_second_process_in_a_run_folder_is_refused_until_the_first_one_is_dead(tmp_path):
    flags = f"{TINY} {SCHEDULE['dreamerv2.py']} --env-id CartPole-v1 --checkpoint-every 210"
    first = start("dreamerv2.py", f"{flags} --total-frames 90000", tmp_path)
    try:
        wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
        [folder] = tmp_path.glob("runs/*")
        second = start("dreamerv2.py", f"--resume {folder}", tmp_path)
        _, err = second.communicate(timeout=100)
        assert second.returncode == 2
        assert f"error: another process trains in {folder}/replay" in err
        assert first.poll() is None
        evaluating = start("dreamerv2.py", f"--evaluate {folder}", tmp_path)
        assert "in 2 episodes" in evaluating.communicate(timeout=100)[0]
    finally:
        first.kill()
        first.communicate()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    total = saved["counters"]["step"] + 5
    again = start("dreamerv2.py", f"--resume {folder} --total-frames {total}", tmp_path)
    _, err = again.communicate(timeout=100)
    assert again.returncode == 0, err


# Environments that fail
BREAKING = """
import os, signal
import gymnasium as gym
import numpy as np


class Breaking(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, how):
        self.how, self.broken = how, os.path.exists("mended")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes, self.time = getattr(self, "episodes", 0) + 1, 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        if self.episodes == 5 and self.time == 7 and not os.path.exists("mended"):
            if self.how == "raise":
                raise RuntimeError("no more power")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), 1.0, self.time == 25, False, {}


for how in ("raise", "die"):
    gym.register(f"{how}-v0", Breaking, kwargs={"how": how})
"""


SLOW = pytest.mark.slow
FAILS = [("dreamerv2.py", "raise", ""), pytest.param("dreamerv1.py", "raise", "", marks=SLOW)]
FAILS += [
    pytest.param(script, kind, "--num-envs 2 --async-envs", marks=SLOW)
    for script in SCRIPTS
    for kind in ("raise", "die")
]


@pytest.mark.parametrize(("script", "kind", "envs"), FAILS)
def test_an_environment_that_fails_is_named_and_nothing_else_is_lost(script, kind, envs, tmp_path):
    (tmp_path / "breaking.py").write_text(BREAKING)
    flags = f"{TINY} {SCHEDULE[script]} --prefill 50 --env-id breaking:{kind}-v0 {envs}"
    process = start(script, f"{flags} --total-frames 400 --eval-every 0", tmp_path)
    began = time.monotonic()
    out, err = process.communicate(timeout=100)
    assert time.monotonic() - began < 60
    assert process.returncode == 1, err
    assert "Traceback" not in out + err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(r"environment [01] of (breaking:)?\w+-v0 \(seed 1, episode 4\) failed: ", line)
    assert ("no more power" in line) if kind == "raise" else ("its process died" in line)
    [resume] = [line for line in out.splitlines() if "--resume" in line]
    [folder] = tmp_path.glob("runs/*")
    where = f"--resume {folder.relative_to(tmp_path)} --env-id breaking:{kind}-v0"
    assert resume.endswith(f"{script} {where}")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["counters"]["step"] == (
        106 if not envs else 212
    )  # four episodes of 25 and 6 steps
    (tmp_path / "mended").touch()
    again = start(script, resume.split(f"{script} ")[1], tmp_path)
    _, err = again.communicate(timeout=100)
    assert again.returncode == 0, err
    assert metrics(folder)[-1]["frames"] == 400
    terminal, first = (np.load(folder / "replay" / f"is_{k}.npy") for k in ("terminal", "first"))
    broke_off = saved["replay"]["end"]
    assert broke_off == 4 * 26 + 7
    assert (terminal[:broke_off].sum(0) == 4).all()  # it was truncated
    assert first[broke_off].all()


def wait_until(ready, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


# Full disks
@UNCLOSED
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_stops_a_run_in_one_line_and_leaves_the_last_checkpoint(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = f"{TINY} {SCHEDULE[script]} --env-id CartPole-v1 --checkpoint-every 100"
    write_bytes = Path.write_bytes
    calls = []

    def full(path, data):  # half of the fourth checkpoint has room: 0, 100, 200, 300
        calls.append(path.name)
        if len(calls) == 4:
            write_bytes(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    play(script, f"{flags} --total-frames 400", 1)
    assert calls == ["checkpoint.new.pt"] * 4
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert line == "error: [Errno 28] No space left on device"
    [folder] = Path("runs").iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["counters"]["step"] == 200
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    play(script, f"--resume {folder}")
    assert metrics(folder)[-1]["frames"] == 400


# Folders from someone else
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_module_that_a_run_folder_names_is_imported_only_if_the_user_names_it_too(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("open('pwned', 'w')\n")
    flags = f"{TINY} {SCHEDULE[script]} --env-id CartPole-v1 --total-frames 210"
    play(script, flags)
    [folder] = Path("runs").iterdir()
    args = (folder / "args.yaml").read_text()
    (folder / "args.yaml").write_text(args.replace("CartPole-v1", "evil:CartPole-v1"))
    for flag in ("--resume", "--evaluate"):
        play(script, f"{flag} {folder}", 2)
        assert "error: add --env-id evil:CartPole-v1 if" in capsys.readouterr().err
        assert "evil" not in sys.modules
        assert not Path("pwned").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it leaves its file open
        play(script, f"--evaluate {folder} --env-id evil:CartPole-v1")
    assert Path("pwned").exists()
    del sys.modules["evil"]


# Damaged folders
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


def noise(path, rng):
    path.write_bytes(rng.randbytes(200))


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
    "noise": noise,
    "malicious": malicious,
    "swapped": swap,
}
FILES = ["args.yaml", "checkpoint.pt", "checkpoint.pt", "metrics.jsonl", "replay/action.npy"]
FILES += ["replay/is_first.npy", "replay/vector.npy", "replay/written.npy", "replay/reward.npy"]


@pytest.fixture(scope="module", params=SCRIPTS)
def runs(request, tmp_path_factory):
    """Finished runs: of the script, of another environment, and of the other script."""
    cwd = tmp_path_factory.mktemp("runs")
    script = request.param
    [other] = set(SCRIPTS) - {script}
    before = os.getcwd()
    os.chdir(cwd)
    try:
        folders = {}
        for name, which, env_id in (
            ("ours", script, "Acrobot-v1"),
            ("env", script, "Pendulum-v1"),
            ("script", other, "Acrobot-v1"),
        ):
            flags = f"{TINY} {SCHEDULE[which]} --env-id {env_id} --total-frames 300"
            play(which, f"{flags} --checkpoint-every 250 --exp-name {name}")
            [folders[name]] = Path("runs").glob(f"*__{name}__*")
        yield script, {name: cwd / folder for name, folder in folders.items()}
    finally:
        os.chdir(before)


def resume_and_evaluate(script, folder, capsys, code=None, evaluate=True):
    """Both end with one clear line or well; -> code of resume, what was printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that overflow
        played = play(script, f"--evaluate {folder}", None) if evaluate else 0
        resumed = play(script, f"--resume {folder} --total-frames 340", code)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert played in (0, 1, 2)
    assert resumed in (0, 1, 2)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == sum(bool(code) for code in (played, resumed)), err
    return resumed, out + err


def damage_some(runs, numbers, tmp_path, capsys):
    script, folders = runs
    names = list(DAMAGES)
    codes = []
    for number in numbers:
        rng = random.Random(number)
        folder = tmp_path / str(number)
        shutil.copytree(folders["ours"], folder)
        kind = names[number % len(names)]
        file = FILES[number // len(names) % len(FILES)]
        DAMAGES[kind](folder / file, rng)
        codes.append(resume_and_evaluate(script, folder, capsys, None, number % 3 == 0)[0])
        assert not list(folder.rglob("pwned")), (kind, file)
        if file == "checkpoint.pt" and kind != "appended":
            assert codes[-1] in (0, 2), (kind, number)
        shutil.rmtree(folder)
    return codes


def test_a_damaged_run_folder_ends_in_a_clear_line_or_goes_on(runs, tmp_path, capsys):
    codes = damage_some(runs, range(9), tmp_path, capsys)
    assert {0, 2} <= set(codes)


@pytest.mark.slow
def test_hundreds_of_damaged_run_folders_end_in_a_clear_line_or_go_on(runs, tmp_path, capsys):
    codes = damage_some(runs, range(9, 120), tmp_path, capsys)
    assert {0, 2} <= set(codes)


@pytest.mark.parametrize(("foreign", "file"), [
    ("env", "checkpoint.pt"), ("env", "args.yaml"), ("env", "replay"),
    ("script", "checkpoint.pt"), ("script", "args.yaml"),
])  # fmt: skip
def test_files_of_another_run_are_refused(runs, tmp_path, capsys, foreign, file):
    script, folders = runs
    folder = tmp_path / "mixed"
    shutil.copytree(folders["ours"], folder)
    (folder / "checkpoint.old.pt").unlink(missing_ok=True)
    if file == "replay":
        shutil.rmtree(folder / file)
        shutil.copytree(folders[foreign] / file, folder / file)
    else:
        shutil.copy(folders[foreign] / file, folder / file)
    resume_and_evaluate(script, folder, capsys, 2)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(runs, tmp_path, capsys):
    script, folders = runs
    folder = tmp_path / "run"
    shutil.copytree(folders["ours"], folder)
    data = bytearray((folder / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of some weights
    (folder / "checkpoint.pt").write_bytes(data)
    _, said = resume_and_evaluate(script, folder, capsys, 0)
    assert f"{folder}/checkpoint.pt cannot be used" in said
    assert metrics(folder)[-1]["frames"] == 340


# Killed
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_is_killed_at_random_moments_loses_nothing_that_it_saved(script, tmp_path):
    flags = f"{TINY} {SCHEDULE[script]} --env-id CartPole-v1 --total-frames 3000 --replay-size 1200"
    flags += " --checkpoint-every 100 --eval-every 200 --log-every 100"
    folder, seen = kill_often(script, flags.split(), 4, tmp_path, steps=(310, 500))
    assert [phase for phase, *_ in seen] == ["receive", "update", "save_checkpoint", "evaluate"]
    assert seen[-1][2] > 0
    assert metrics(folder)[-1]["frames"] == 3000
