"""The folder of a run: where it lies, when a run may begin there, what the disk has to hold."""

import re
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from helpers.agents import same
from helpers.runs import ONE_SCRIPT, TINY, contents, parse, run, the_error, the_run

import dreamerv2
import runtime

SHORT = f"{TINY} --total-frames 220 --env-id CartPole-v1"


def arguments(**changes):
    return asdict(dreamerv2.Args(env_id="CartPole-v1", exp_name="try")) | changes


@pytest.mark.parametrize(("env_id", "name", "shown"), [
    ("ALE/Pong-v5", "mine", "ALE-Pong-v5__mine"), ("module:a/B-v0", "x", "module-a-B-v0__x"),
    ("CartPole-v1", "/../../elsewhere", "CartPole-v1__-..-..-elsewhere"),
])  # fmt: skip
def test_a_new_run_has_a_folder_that_says_what_it_is(place, env_id, name, shown):
    args = arguments(env_id=env_id, exp_name=name, seed=4)
    run, is_new = runtime.open_run(args, {}, 0)
    assert is_new
    assert run.parent == place / "runs"
    assert re.fullmatch(rf"{re.escape(shown)}__4__\d+", run.name)
    assert contents(run).keys() == {"args.yaml", "shapes.yaml", "replay"}
    assert list(yaml.safe_load((run / "args.yaml").read_text()).items()) == list(args.items())


@pytest.mark.parametrize("folder", ["mine", "a/b c/mine", "empty", "absolute"])
def test_a_run_begins_in_a_folder_that_is_missing_or_empty(place, capsys, folder):
    if folder == "empty":
        Path(folder).mkdir()
    if folder == "absolute":
        folder = str(place / folder)
    before = contents(place)
    args = parse("dreamerv2.py", ["--resume", folder, "--env-id", "CartPole-v1", "--seed", "6"])
    expected = vars(parse("dreamerv2.py", "--env-id CartPole-v1 --seed 6"))
    assert asdict(args) == expected | {"resume": folder}
    assert capsys.readouterr() == ("", "")
    assert contents(place) == before

    run, is_new = runtime.open_run(asdict(args), {}, 0)
    assert (run, is_new) == (place / folder, True)
    assert capsys.readouterr().out == f"a new run begins in {run.relative_to(place)}\n"
    assert contents(run).keys() == {"args.yaml", "shapes.yaml", "replay"}
    assert yaml.safe_load((run / "args.yaml").read_text()) == expected
    assert not Path("runs").exists()


@pytest.mark.parametrize("entry", ["notes.txt", ".hidden", "replay/", "a/b/"])
def test_no_run_begins_in_a_folder_with_other_contents(tmp_path, entry):
    path = tmp_path / entry
    if entry.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.write_text("mine")
    before = contents(tmp_path)
    assert not runtime.is_free(tmp_path)
    for flag in ("resume", "evaluate"):
        said = f"^{tmp_path} is no run folder, it has no args.yaml"
        with pytest.raises(runtime.UserError, match=said):
            parse("dreamerv2.py", f"--{flag} {tmp_path}")
    assert contents(tmp_path) == before


def test_a_run_begins_in_a_missing_folder_only_if_its_environment_is_named(tmp_path):
    missing = tmp_path / "mistyped"
    with pytest.raises(runtime.UserError, match=f"^there is no run in {missing}; add --env-id"):
        parse("dreamerv2.py", f"--resume {missing}")
    for flag in ("--env-id CartPole-v1", "--env-id=CartPole-v1", "--env_id CartPole-v1"):
        assert parse("dreamerv2.py", f"{flag} --resume {missing}").env_id == "CartPole-v1"


@ONE_SCRIPT
def test_the_same_command_begins_a_run_in_a_folder_and_goes_on_with_it(script, place, capsys):
    for said in ("a new run begins in mine", "the run in mine goes on"):
        assert run(script, f"{SHORT} --resume mine") == 0
        assert capsys.readouterr().out.splitlines()[0] == said
        assert [path.name for path in place.iterdir()] == ["mine"]
    args = vars(parse(script, f"{SHORT} --resume mine")) | {"resume": ""}
    assert yaml.safe_load(Path("mine/args.yaml").read_text()) == args
    before = contents("mine")
    assert runtime.open_run(args | {"resume": "mine"}, {}, 2**60) == (place / "mine", False)
    assert contents("mine") == before  # it has its room on the disk
    assert run(script, "--evaluate mine") == 0
    out = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"return \d+\.\d \+- \d+\.\d in 2 episodes, mine", out)
    assert contents("mine") == before


@pytest.mark.parametrize("flags", ["", f"--exp-name {'x' * 300}", "--resume runs/run"])
def test_a_run_folder_that_cannot_be_made_is_named_in_one_line(place, capsys, flags):
    if "xxx" not in flags:
        Path("runs").write_text("a file")
    before = contents(place)
    assert run("dreamerv2.py", f"{SHORT} {flags}") == 2
    said = capsys.readouterr()
    assert re.search("x{300}|runs", the_error(said.err))
    assert said.out == ""
    after = contents(place)
    assert not any(after.values()) or after == before  # no file is left


def test_a_path_is_meant_from_where_the_command_was_typed(place, monkeypatch):
    monkeypatch.setattr(runtime, "STARTED_IN", place)
    monkeypatch.chdir("/")
    assert runtime.from_start("runs/x") == place / "runs" / "x"
    assert runtime.shown(place / "runs" / "x") == Path("runs/x")
    assert runtime.shown(Path("/elsewhere")) == Path("/elsewhere")


def test_an_agent_is_loaded_from_the_folder_that_its_path_means_now(place, monkeypatch):
    args = parse("dreamerv2.py", f"{SHORT} --resume mine")
    shapes = {"vector": (4,), "action": (2,)}
    folder, _ = runtime.open_run(asdict(args), shapes, 0)
    dreamerv2.resolve_auto(args, torch.device("cpu"), discrete=True)
    agent = dreamerv2.make_agent(shapes, args)
    runtime.save_checkpoint(folder, {"agent": agent}, {})
    runtime.write_args(folder, asdict(args) | {"compile": True})
    monkeypatch.setattr(runtime, "STARTED_IN", Path("/"))  # a program moved after it began
    loaded, its_args = runtime.load_agent(dreamerv2, "mine")
    assert same(loaded.state_dict(), agent.state_dict())
    assert not its_args.compile  # a program need not wait for that


def test_the_command_to_go_on_is_quoted(place):
    command = runtime.resume_command(place / "runs" / "with a space", "Mine-v0")
    assert "--resume 'runs/with a space' --env-id Mine-v0" in command


# Room on the disk
def disk_with(monkeypatch, free):
    """Lets the disk have so many free bytes."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(runtime.shutil, "disk_usage", lambda path: usage(2**40, 0, free))


@pytest.mark.parametrize("resume", ["", "mine"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_is_too_small_is_a_user_error_before_there_is_a_run(
    place, monkeypatch, resume, processes
):
    """All processes together need their room."""
    disk_with(monkeypatch, 3 * 2**30)
    monkeypatch.setattr(runtime, "WORLD", processes)
    monkeypatch.setattr(runtime, "all_gather", lambda value: [value] * processes)
    with pytest.raises(runtime.UserError, match=r"4 GiB of 3 free.*--replay-size"):
        runtime.open_run(arguments(resume=resume), {}, 3 * 2**30 / processes, 2**30)
    assert not list(place.iterdir())
    folder, _ = runtime.open_run(arguments(resume=resume), {}, 2.9 * 2**30 / processes)
    assert folder == (place / resume if resume else the_run(place))


def test_the_room_is_measured_on_the_disk_of_the_run(place, monkeypatch):
    asked = []
    usage = runtime.shutil.disk_usage
    monkeypatch.setattr(
        runtime.shutil, "disk_usage", lambda path: asked.append(path) or usage(path)
    )
    (place / "elsewhere").mkdir()
    (place / "runs").symlink_to(place / "elsewhere")
    runtime.open_run(arguments(), {}, 0)
    assert asked == [place / "runs"]
