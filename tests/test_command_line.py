"""Wrong command lines and wrong environments: a clear message, exit code 2, nothing written.

All of them run in this process, in a folder in which a file too many is an error. What tyro refuses
takes a box of several lines that names the flag, everything else one line that begins with error.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import math
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import gymnasium as gym
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import runtime

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dreamerv1", "dreamerv2"]
MODULES = {script: importlib.import_module(script) for script in SCRIPTS}
TINY = [
    "--batch-size", "3", "--batch-length", "7", "--deter", "16", "--hidden", "16",
    "--units", "16", "--stoch", "3", "--cnn-depth", "2", "--prefill", "200",
    "--total-frames", "220", "--eval-episodes", "2", "--threads", "1",
]  # fmt: skip
SHARES = [
    "sticky_prob", "gamma", "discount_lambda", "kl_balance", "actor_grad_mix", "expl_epsilon",
    "expl_min",
]  # fmt: skip
SIZES = ["num_envs", "batch_size", "batch_length", "deter", "units", "eval_episodes"]
OPEN_RUN = runtime.open_run

ENVS = """
import gymnasium as gym
import numpy as np
from gymnasium.spaces import *

box, two = Box(-1, 1, (2,)), Discrete(2)


def image(*shape):
    return Box(0, 255, shape, np.uint8)


OBSERVATIONS = {
    "Text": Text(5), "Tuple": Tuple([box, box]), "MultiDiscrete": MultiDiscrete([2, 3]),
    "MultiBinary": MultiBinary(3), "Discrete": Discrete(4), "Sequence": Sequence(box),
    "Graph": Graph(box, two), "OneOf": OneOf([box, two]), "None": None, "Empty": Dict(),
    "Nested": Dict(a=Dict(b=box)), "Mixed": Dict(a=box, b=two), "Fine": box,
    "TwoChannels": image(64, 64, 2), "FourChannels": image(64, 64, 4), "NoChannel": image(8, 8, 0),
    "ChannelsFirst": image(3, 64, 64), "TwoImages": Dict(a=image(8, 8, 3), b=image(9, 7, 3)),
    "NoPixel": image(0, 0, 3),
}
ACTIONS = {
    "Text": Text(5), "Tuple": Tuple([two, two]), "MultiDiscrete": MultiDiscrete([2, 3]),
    "MultiBinary": MultiBinary(3), "Dict": Dict(a=box), "None": None,
}
ERRORS = [ValueError, RuntimeError, KeyError, AttributeError, AssertionError, FileNotFoundError]
ERRORS += [ImportError, TypeError]


class Env(gym.Env):
    def __init__(self, obs, act, render_mode=None):
        self.observation_space, self.action_space = obs, act


class Raises(gym.Env):
    def __init__(self, kind):
        raise kind("for some reason")


class NoEnv:
    pass


class NoSpaces(gym.Env):
    pass


for name, obs in OBSERVATIONS.items():
    gym.register(f"Wrong/{name}-v0", Env, kwargs={"obs": obs, "act": two})
for name, act in ACTIONS.items():
    gym.register(f"Wrong/{name}Action-v0", Env, kwargs={"obs": box, "act": act})
for kind in ERRORS:
    gym.register(f"Wrong/{kind.__name__}-v0", Raises, kwargs={"kind": kind})
gym.register("Wrong/NoEnv-v0", NoEnv)
gym.register("Wrong/NoSpaces-v0", NoSpaces)
gym.register("Wrong/NoModule-v0", "nowhere_at_all:Thing")
gym.register("Wrong/NoClass-v0", f"{__name__}:Thing")
"""
BROKEN = {  # modules that cannot be imported
    "wrong_import": "import nowhere_at_all",
    "wrong_value": "raise ValueError('for some reason')",
    "wrong_zero": "1 / 0",
    "wrong_syntax": "def x(:",
    "wrong_exit": "import sys; sys.exit('bye')",
}


def hints(script):
    return typing.get_type_hints(MODULES[script].Args, include_extras=True)


def bare(hint):
    """The type of an argument without what else is said about it: float | None -> float."""
    while typing.get_origin(hint) not in (None, typing.Literal):
        hint = typing.get_args(hint)[0]
    return hint


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def small_args(script, **changes):
    """What the args.yaml of a run of the script holds."""
    module = MODULES[script]
    args = dataclasses.asdict(module.Args()) | module.PRESETS["other"] | {"env_id": "CartPole-v1"}
    sizes = {"deter": 16, "hidden": 16, "units": 16, "stoch": 3, "cnn_depth": 2, "eval_episodes": 2}
    return args | sizes | {"batch_length": 7, "prefill": 200, "exp_name": script} | changes


# Folders that are no runs, or not of this script: args.yaml and what is said about it
FILES = {
    "zero": (b"", "no run folder of this script: TypeCheckError: None is not a dict"),
    "list": (b"[1, 2]", "no run folder of this script: TypeCheckError: list is not a dict"),
    "number": (b"3", "no run folder of this script: TypeCheckError: int is not a dict"),
    "text": (b"hello", "no run folder of this script: TypeCheckError: str is not a dict"),
    "few": (b"env_id: CartPole-v1", "no run folder of this script: .*batch_length"),
    "binary": (bytes(range(256)), "no run folder of this script: UnicodeDecodeError"),
    "utf16": ("seed: 1".encode("utf-16"), "no run folder of this script: UnicodeDecodeError"),
    "null": (b"a: \0", "no run folder of this script: ReaderError"),
    "open": (b"a: [1", "no run folder of this script: ParserError"),
    "tab": (b"\ta: 1", "no run folder of this script: ScannerError"),
    "two": (b"a: 1\n---\nb: 2", "no run folder of this script: ComposerError"),
    "alias": (b"*a", "no run folder of this script: ComposerError"),
    "key": (b"? [1]\n: 2", "no run folder of this script: ConstructorError"),
    "date": (b"2001-99-99", "no run folder of this script: ValueError"),
    "int": (b"!!int x", "no run folder of this script: ValueError"),
    "call": (
        b"!!python/object/apply:os.mkdir ['pwned']",
        "no run folder of this script: ConstructorError",
    ),
    "name": (b"!!python/name:os.system", "no run folder of this script: ConstructorError"),
    "tuple": (b"!!python/tuple [1]", "no run folder of this script: ConstructorError"),
}
CHANGES = {  # of one argument in args.yaml
    "seed_text": ({"seed": "x"}, "no run folder of this script: .*'seed'"),
    "seed_real": ({"seed": 1.5}, "no run folder of this script: .*'seed'"),
    "seed_none": ({"seed": None}, "no run folder of this script: .*'seed'"),
    "seed_list": ({"seed": [1]}, "no run folder of this script: .*'seed'"),
    "cuda_int": ({"cuda": 1}, "no run folder of this script: .*'cuda'"),
    "pixels_word": ({"pixels": "no"}, "no run folder of this script: .*'pixels'"),
    "rate_text": ({"model_lr": "fast"}, "no run folder of this script: .*'model_lr'"),
    "sticky_text": ({"sticky_prob": "often"}, "no run folder of this script: .*'sticky_prob'"),
    "observation": ({"observation": "smell"}, "no run folder of this script: .*'observation'"),
    "env_id_none": ({"env_id": None}, "no run folder of this script: .*'env_id'"),
    "more": ({"more": 1}, 'no run folder of this script: .*"more"'),
    "a_number": ({3: 4}, 'no run folder of this script: .*"3"'),
    "negative": ({"seed": -1}, "--seed is -1, it must be from 0 to"),
    "nothing": ({"deter": 0}, "--deter is 0, it must be from 1 to"),
    "env_id": ({"env_id": "Nothing-v0"}, "no Nothing-v0: NameNotFound"),
    "actions": ({"actor_dist": "tanh_normal"}, "tanh_normal is not for CartPole-v1's actions"),
    "horizon": ({"imag_horizon": 1}, "--imag-horizon is 1, it must be from 2 to 2147483647"),
    "track": ({"track": True}, "^--track needs pip install wandb: ModuleNotFoundError"),
    "begun": ({}, "no checkpoint can be read in v./begun"),
}


ODD_YAML = {  # on which yaml trips
    "bool": b"!!bool x",
    "timestamp": b"!!timestamp x",
    "int": b"!!int ''",
    "depth": b"[" * 1000,
}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder with modules of wrong environments, and folders that are no whole runs."""
    place = tmp_path_factory.mktemp("place")
    for name, text in (BROKEN | {"wrong_envs": ENVS}).items():
        (place / f"{name}.py").write_text(text)
    for script in SCRIPTS:
        [other] = set(SCRIPTS) - {script}
        files = {name: data for name, (data, _) in FILES.items()}
        args = {name: small_args(script) | change for name, (change, _) in CHANGES.items()}
        args |= {"foreign": small_args(other), "nan": small_args(script, model_lr=math.nan)}
        args["other"] = small_args(script, resume=f"v{script[-1]}/begun")
        files |= {name: yaml.safe_dump(data).encode() for name, data in args.items()}
        files |= {f"odd_{name}": text for name, text in ODD_YAML.items()}
        for name, data in files.items():
            folder = place / f"v{script[-1]}" / name
            folder.mkdir(parents=True)
            (folder / "args.yaml").write_bytes(data)
        (folder.parent / "empty").mkdir()
        unsaved = folder.parent / "unsaved"
        (unsaved / "replay").mkdir(parents=True)
        (unsaved / "args.yaml").write_text(yaml.safe_dump(small_args(script)))
        (folder.parent / "notes").mkdir()
        (folder.parent / "notes" / "notes.txt").write_text("not from a run")
        (folder.parent / "folder" / "args.yaml").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(place)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setitem(sys.modules, "wandb", None)  # as if it were not installed
        patch.setattr(runtime, "open_run", open_no_new_run)
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))  # tyro's, for speed
        patch.setenv("MUJOCO_GL", "egl")  # so that it is put back
        patch.delenv("MUJOCO_GL")
        yield place
    for env_id in [env_id for env_id in gym.registry if env_id.startswith("Wrong/")]:
        del gym.registry[env_id]
    for name in ("wrong_envs", *BROKEN):
        sys.modules.pop(name, None)


def open_no_new_run(args, replay_bytes):
    """Opens a run that exists; one that must not begin is put away, unseen by other tests."""
    folder, is_new = OPEN_RUN(args, replay_bytes)
    if is_new:
        shutil.rmtree(folder)
        shutil.rmtree("runs", ignore_errors=True)
        pytest.fail("it was accepted, and a run began")
    return folder, is_new


def contents():
    """All that lies here and in the runs, with when it changed."""
    return {str(path): path.stat().st_mtime_ns for path in Path().rglob("*")}


def parse(script, flags):
    module = MODULES[script]
    return runtime.parse_args(module.Args, module.PRESETS, common.choose_preset, flags)


def run(script, flags, whole=True):
    """A command line in this process -> its exit code, what it says on stderr and on stdout."""
    err = io.StringIO()
    out = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (
            contextlib.redirect_stderr(err),
            contextlib.redirect_stdout(out),
            runtime.exit_on_error(),
        ):
            args = parse(script, flags)
            code = 0
            if whole:
                with warnings.catch_warnings(action="ignore"):  # gymnasium's, of old versions
                    code = MODULES[script].main(args)
    except SystemExit as stop:
        code = stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, err.getvalue(), out.getvalue()


def refuse(script, flags, whole=True):
    """What the script says about a command line that it must refuse, with nothing written."""
    before = contents()
    code, err, out = run(script, flags, whole)
    assert code == 2, err
    assert contents() == before
    assert out == ""
    return err


def the_line(said):
    """The one line of an error, without the word error."""
    [line] = said.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def squeezed(text):
    return "".join(text.split())  # tyro breaks lines where it likes


def bounded(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


# Numbers, choices and flags that tyro or parse_args refuses
per_script = pytest.mark.parametrize("script", SCRIPTS)


def names_of(script, *kinds):
    """The arguments whose type, or that of whose values, is one of the kinds."""
    kind = {
        name: typing.get_origin(bare(hint)) or bare(hint) for name, hint in hints(script).items()
    }
    return [name for name in kind if kind[name] in kinds]


def bounds(script, name):
    return getattr(hints(script)[name], "__metadata__", (0, 2**31 - 1))


def assert_beyond(script, name, value):
    line = the_line(refuse(script, [f"{flag_of(name)}={value}"], whole=False))
    least, most = bounds(script, name)
    assert line == f"{flag_of(name)} is {value}, it must be from {least} to {most}"


@per_script
def test_every_number_has_bounds_and_is_a_number(script):
    for name in names_of(script, int):
        least, most = bounds(script, name)
        assert_beyond(script, name, least - 1)
        assert_beyond(script, name, most + 1)
    for name in names_of(script, float):
        least, most = map(float, bounds(script, name))
        for value in (math.nextafter(least, -1), math.nextafter(most, math.inf), math.nan):
            assert_beyond(script, name, value)
        assert_beyond(script, name, math.inf)


@per_script
def test_numbers_at_their_bounds_are_taken(script):
    for name in names_of(script, int, float):
        for value in bounds(script, name):
            assert getattr(parse(script, [f"{flag_of(name)}={value}"]), name) == value


@per_script
def test_what_is_a_share_goes_to_1_and_what_is_a_size_begins_at_1(script):
    for name in SHARES:
        assert name not in hints(script) or bounds(script, name) == (0, 1)
    for name in SIZES:
        assert bounds(script, name)[0] == 1
    assert bounds(script, "imag_horizon")[0] == 2  # the last imagined state has no return
    for name in ("model_lr", "adam_eps", "clip"):
        assert bounds(script, name)[0] > 0


@per_script
@given(st.data())
@bounded(25)
def test_a_negative_number_is_named_with_what_is_allowed(script, data):
    name = data.draw(st.sampled_from(names_of(script, int, float)))
    if name in names_of(script, int):
        assert_beyond(script, name, data.draw(st.integers(max_value=-1)))
    else:
        assert_beyond(script, name, data.draw(st.floats(max_value=0.0, exclude_max=True)))


def is_number(text, kind):
    try:
        kind(text)
    except ValueError:
        return text == "None"
    return True


NO_NUMBERS = ["", "many", "1,5", "1 2", "0x10", "--1", "1e", "٣ x", "[/b]", "True", "1.0.0"]


@per_script
@given(st.data())
@bounded(1)
def test_text_is_refused_for_every_number_by_the_name_of_the_flag(script, data):
    names = names_of(script, int, float)
    text = st.sampled_from(NO_NUMBERS) | st.text(st.characters(exclude_characters="-"))
    text = text.filter(lambda text: not is_number(text, float))
    texts = st.lists(text, unique=True, min_size=len(names), max_size=len(names))
    for name, text in zip(names, data.draw(texts), strict=True):
        assert flag_of(name) in squeezed(refuse(script, [flag_of(name), text], whole=False))


@pytest.mark.parametrize("value", ["1e6", "16.0", "-h", "-", "-1e3"])
@per_script
def test_what_is_no_whole_number_is_refused(script, value):
    for name in ("total_frames", "deter"):
        assert flag_of(name) in squeezed(refuse(script, [flag_of(name), value], whole=False))


@per_script
@given(st.data())
@bounded(2)
def test_a_word_that_is_no_choice_is_named_with_the_choices(script, data):
    for name in names_of(script, typing.Literal):
        choices = typing.get_args(hints(script)[name])
        words = st.sampled_from([*map(str.upper, choices), choices[0] + "x", "", "0", "None"])
        words |= st.text(string.ascii_letters + "[]{}% é", max_size=20)
        word = data.draw(words.filter(lambda word, choices=choices: word not in choices))
        said = squeezed(refuse(script, [f"{flag_of(name)}={word}"], whole=False))
        assert flag_of(name) in said
        assert f"'{squeezed(word)}'" in said
        assert all(f"'{choice}'" in said for choice in choices)


@per_script
@given(st.text(string.ascii_letters + string.digits, min_size=2), st.booleans(), st.booleans())
@bounded(12)
def test_an_unknown_flag_is_named(script, name, first, valued):
    if name in hints(script) or name == "help":
        return
    unknown = [f"--{name}", "1"] if valued else [f"--{name}"]
    known = ["--env-id", "CartPole-v1"]
    flags = unknown + known if first else known + unknown
    assert f"--{name}" in squeezed(refuse(script, flags, whole=False))


@per_script
def test_every_flag_but_a_switch_needs_a_value(script):
    for name in hints(script):
        if name not in names_of(script, bool):
            assert flag_of(name) in squeezed(refuse(script, [flag_of(name)], whole=False))


@pytest.mark.parametrize("flags", [
    "extra", "''", "-x", "-", "--env CartPole-v1", "--no-deter", "--no-env-id", "--deter 16 32",
    "--cuda yes", "--track True", "--tyro-print-completion", "@flags.txt",
])  # fmt: skip
@per_script
def test_what_is_no_flag_and_no_value_is_named(script, flags):
    said = refuse(script, ["--env-id", "CartPole-v1", *shlex.split(flags)], whole=False)
    assert flags.split()[-1].strip("'") in said


# What can no longer change
def fixed_names(script):
    return [name for name in hints(script) if name not in runtime.CHANGEABLE]


def others(hint, value):
    """Good values of an argument that are not the one given."""
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from([choice for choice in typing.get_args(hint) if choice != value])
    good = {
        int: st.integers(1, 2**31 - 1),
        float: st.floats(1e-9, 1.0),
        str: st.text(string.ascii_letters + string.digits + " /.=-é", min_size=1),
    }
    return good[bare(hint)].filter(lambda other: other != value)


def assert_fixed(script, name, data):
    hint = hints(script)[name]
    value = small_args(script)[name]
    if hint is bool:
        change = flag_of(f"no_{name}" if value else name)
    else:
        change = f"{flag_of(name)}={data.draw(others(hint, value))}"
    goes_on = (
        "resume"
        if name in ("seed", "eval_envs")
        else data.draw(st.sampled_from(["resume", "evaluate"]))
    )
    flags = [f"--{goes_on}", f"v{script[-1]}/begun", change]
    line = the_line(refuse(script, flags, whole=False))
    assert line == f"{flag_of(name)} cannot change in a run that exists"


@per_script
@given(st.data())
@bounded(1)
def test_all_that_is_learned_and_how_is_fixed_in_a_run_that_exists(script, data):
    for name in fixed_names(script):
        assert_fixed(script, name, data)


@per_script
@given(st.data())
@bounded(15)
def test_what_is_fixed_can_change_to_no_value_at_all(script, data):
    assert_fixed(script, data.draw(st.sampled_from(fixed_names(script))), data)


# What main refuses; with sizes that make no work
GYM = "Malformed environment ID"
ONLY = "only Box, Dict of Box, Discrete fit, not "
BAD_SPACES = [
    "Text", "Tuple", "MultiDiscrete", "MultiBinary", "Discrete", "Sequence", "Graph", "OneOf",
    "None",
]  # fmt: skip
BAD_ACTIONS = ["Text", "Tuple", "MultiDiscrete", "MultiBinary", "Dict", "None"]
COMMON = {
    # ids
    "--env-id CartPol-v1": "no CartPol-v1: .*Did you mean: `CartPole`",
    "--env-id cartpole-v1": "no cartpole-v1: .*Did you mean: `CartPole`",
    "--env-id CartPole_v1": "no CartPole_v1: .*Did you mean: `CartPole`",
    "--env-id CartPole-v": "no CartPole-v: .*Did you mean: `CartPole`",
    "--env-id CartPole-v7": r"no CartPole-v7: .*`v0`, `v1`",
    "--env-id Pendulum-v0": "no Pendulum-v0: .*Please use `Pendulum-v1`",
    "--env-id Taxi-v3": "Taxi-v4|Discrete",
    "--env-id LunarLander-v2": "no LunarLander-v2: .*LunarLander-v3",
    "--env-id Ant-v2": "no Ant-v2: ImportError: .*gymnasium-robotics",
    "--env-id HalfCheetah-v1": "no HalfCheetah-v1: .*HalfCheetah-v5",
    "--env-id GymV21Environment-v0": "no GymV21Environment-v0: .*pip install",
    "--env-id ALE/Pnog-v5": "no ALE/Pnog-v5: .*Did you mean: `Pong`",
    "--env-id ALE/pong-v5": "no ALE/pong-v5: .*Did you mean: `Pong`",
    "--env-id ALE/Pong-v6": "no ALE/Pong-v6: .*`v5`",
    "--env-id ALE/": f"no ALE/: .*{GYM}",
    "--env-id PongNoFramskip-v4": "no PongNoFramskip-v4: .*Did you mean: `PongNoFrameskip`",
    "--env-id PongNoFrameskip-v5": "no PongNoFrameskip-v5: .*`v0`, `v4`",
    "--env-id pong": "no pong: .*Did you mean: `Pong`",
    "--env-id dm_control/walker-wlk-v0": "no dm_control/walker-wlk-v0: .*`walker-walk`",
    "--env-id dm_control/walker-walk-v1": "no dm_control/walker-walk-v1.*`walker-walk`",
    "--env-id dmc/walker_walk": "no dm_control/walker_walk-v0: .*`walker-walk`",
    "--env-id dmc/walker_walk --observation vector": "no dm_control/walker_walk-v0: .*walker-walk",
    "--env-id dm_control/": "no dm_control/-v0: NameNotFound",
    "--env-id dm_control": "no dm_control: NameNotFound",
    "--env-id ''": f"no : .*{GYM}",
    "--env-id=": f"no : .*{GYM}",
    "--env-id ' '": f"no : .*{GYM}",
    "--env-id 'CartPole v1'": f"no CartPole v1: .*{GYM}",
    "--env-id 'CartPole-v1 '": f"no CartPole-v1 : .*{GYM}",
    "--env-id ../x": rf"no \.\./x: .*{GYM}",
    "--env-id a/b/c-v0": f"no a/b/c-v0: .*{GYM}",
    "--env-id '*'": rf"no \*: .*{GYM}",
    "--env-id 🎮": f"no 🎮: .*{GYM}",
    "--env-id ünï-v0": "no ünï-v0: NameNotFound",
    "--env-id a:": "no a:: ModuleNotFoundError: No module named 'a'",
    "--env-id no_module:Thing-v0": "no no_module:Thing-v0: ModuleNotFoundError: .*'no_module'",
    "--env-id .wrong_envs:Wrong/Fine-v0": "no .wrong_envs:Wrong/Fine-v0: TypeError: .*relative",
    "--env-id wrong_envs.py:Wrong/Fine-v0": "no wrong_envs.py:.*not a package",
    "--env-id wrong_envs:Wrong/Fone-v0": "no wrong_envs:Wrong/Fone-v0: .*Did you mean",
    "--env-id wrong_import:Thing-v0": "no wrong_import:Thing-v0: .*nowhere_at_all",
    # environments
    "--env-id wrong_envs:Wrong/NoModule-v0": "no wrong_envs:Wrong/NoModule-v0: .*nowhere_at_all",
    "--env-id wrong_envs:Wrong/NoEnv-v0": "no wrong_envs:Wrong/NoEnv-v0: .*must inherit",
    "--env-id wrong_envs:Wrong/ImportError-v0": "ImportError-v0: ImportError: for some reason",
    "--env-id wrong_envs:Wrong/TypeError-v0": "TypeError-v0: TypeError: for some reason",
    "--env-id FrozenLake-v1": rf"^{ONLY}Discrete\(16\) and Discrete\(4\)$",
    "--env-id FrozenLake-v1 --pixels": rf"^{ONLY}Discrete\(16\) and Discrete\(4\)$",
    "--env-id Blackjack-v1": rf"^{ONLY}Tuple\(.*\) and Discrete\(2\)$",
    **{
        f"--env-id wrong_envs:Wrong/{name}-v0": rf"^{ONLY}{name}.* and Discrete\(2\)$"
        for name in BAD_SPACES
    },
    "--env-id wrong_envs:Wrong/Nested-v0": rf"^{ONLY}Dict\(.*\) and Discrete\(2\)$",
    "--env-id wrong_envs:Wrong/Mixed-v0": rf"^{ONLY}Dict\(.*\) and Discrete\(2\)$",
    "--env-id wrong_envs:Wrong/Empty-v0": r"--observation auto does not fit .*Dict\(\)",
    **{
        f"--env-id wrong_envs:Wrong/{name}Action-v0": rf"^{ONLY}Box\(.*\) and {name}"
        for name in BAD_ACTIONS
    },
    "--env-id wrong_envs:Wrong/TwoChannels-v0": r"auto does not fit .*\(64, 64, 2\)",
    "--env-id wrong_envs:Wrong/FourChannels-v0": r"auto does not fit .*\(64, 64, 4\)",
    "--env-id wrong_envs:Wrong/NoChannel-v0": r"auto does not fit .*\(8, 8, 0\)",
    "--env-id wrong_envs:Wrong/ChannelsFirst-v0": r"auto does not fit .*\(3, 64, 64\)",
    "--env-id wrong_envs:Wrong/TwoImages-v0": r"auto does not fit .*\(9, 7, 3\)",
    "--env-id wrong_envs:Wrong/FourChannels-v0 --observation vector": "vector does not fit",
    "--env-id PongNoFrameskip-v4 --observation vector": "--observation vector does not fit",
    # values that do not go together
    "--env-id PongNoFrameskip-v4 --actor-dist tanh_normal":
        "^--actor-dist tanh_normal is not for PongNoFrameskip-v4's actions$",
    "--env-id CartPole-v1 --actor-dist tanh_normal":
        "^--actor-dist tanh_normal is not for CartPole-v1's actions$",
    "--env-id Pendulum-v1 --actor-dist onehot":
        "^--actor-dist onehot is not for Pendulum-v1's actions$",
    "--env-id dmc/walker-walk --observation vector --actor-dist onehot":
        "^--actor-dist onehot is not for dmc/walker-walk's actions$",
    "--env-id CartPole-v1 --imag-horizon 1": "--imag-horizon is 1, it must be from 2 to 2147483647",
    "--env-id CartPole-v1 --batch-length 201": "--batch-length 201 > --prefill or --replay-size",
    "--env-id CartPole-v1 --batch-length 50 --replay-size 40": "--batch-length 50 > .*replay-size",
    "--env-id CartPole-v1 --num-envs 40": "--batch-length 7 > --prefill",
    "--env-id CartPole-v1 --prefill 0": "--batch-length 7 > --prefill",
    "--env-id CartPole-v1 --num-envs 10000000000000000000000": "--num-envs is 1",
    "--env-id Pendulum-v1 --pixels --replay-size 2000000000 --total-frames 2000000000":
        "the replay takes .* GiB of .* free: lower --replay-size",
    "--env-id CartPole-v1 --track": "^--track needs pip install wandb: ModuleNotFoundError",
    "--env-id CartPole-v1 --sticky-prob -0.1": "--sticky-prob is -0.1, it must be from 0 to 1",
    "--env-id CartPole-v1 --seed 1 --seed -2": "--seed is -2",
    "--env-id CartPole-v1 --env-id Nothing-v0": "no Nothing-v0",
    # runs
    "--evaluate nowhere": "nowhere is no run folder of this script: FileNotFoundError",
    "--evaluate nowhere --help": "nowhere is no run folder of this script: FileNotFoundError",
    "--resume wrong_envs.py": "wrong_envs.py is no run folder of this script: NotADirectoryError",
    "--evaluate wrong_envs.py": "wrong_envs.py is no run folder of this script: NotADirectoryError",
    f"--resume {'x' * 300}": "xxx is no run folder of this script: OSError: .*too long",
}  # fmt: skip
OWN = {
    "dreamerv1": {  # prefill is in frames
        "--env-id CartPole-v1 --action-repeat 4 --batch-length 51": "--batch-length 51 > --prefill",
    },
    "dreamerv2": {
        "--env-id CartPole-v1 --actor-dist trunc_normal": "trunc_normal is not for CartPole-v1's",
        "--env-id CartPole-v1 --classes 0": "--classes is 0, it must be from 1 to 2147483647",
        "--env-id CartPole-v1 --num-envs 30": "--batch-length 7 > --prefill",
    },
}
LINES = [(SCRIPTS[i % 2], flags, said) for i, (flags, said) in enumerate(COMMON.items())]
LINES += [(s, flags, said) for s in SCRIPTS for flags, said in OWN[s].items()]
FOLDERS = {name: said for name, (_, said) in (FILES | CHANGES).items()} | {
    "notes": "notes is no run folder of this script: FileNotFoundError",
    "folder": "folder is no run folder of this script: IsADirectoryError",
    "begun/args.yaml": "args.yaml is no run folder of this script: NotADirectoryError",
    "foreign": r"foreign is no run folder of this script: TypeCheckError: .* key\(s\): ",
}
LINES += [
    (s, f"--{('resume', 'evaluate')[i // 2 % 2]} v{s[-1]}/{name}", said)
    for i, (name, said) in enumerate(FOLDERS.items()) for s in SCRIPTS[i % 2 : i % 2 + 1]
]  # fmt: skip


def whole_line(script, flags):
    """What the script says, in one line, about flags that it must refuse."""
    sizes = [] if flags.startswith(("--resume", "--evaluate")) else TINY
    return the_line(refuse(script, sizes + shlex.split(flags)))


@pytest.mark.parametrize(("script", "flags", "said"), LINES)
def test_a_wrong_command_line_ends_in_one_line_that_says_what_is_wrong(script, flags, said):
    assert re.search(said, whole_line(script, flags))


def test_there_are_at_least_60_wrong_command_lines():
    assert len(LINES) >= 60
    assert {script for script, *_ in LINES} == set(SCRIPTS)
    assert len(set(LINES)) == len(LINES)


# Ids that hypothesis makes up
SLIPS = ["CartPole-v1", "PongNoFrameskip-v4", "ALE/Breakout-v5", "dm_control/walker-walk-v0"]
SLIPS += ["MountainCarContinuous-v0"]


@per_script
@given(st.sampled_from(SLIPS), st.sampled_from(string.ascii_letters), st.integers(0, 30))
@bounded(15)
def test_an_id_with_a_letter_too_many_is_named(script, env_id, letter, where):
    namespace, slash, name = env_id.rpartition("/")
    where %= len(name) + 1
    name = name[:where] + letter + name[where:]
    assert name in whole_line(script, f"--env-id {namespace}{slash}{name}")


@per_script
@given(
    st.sampled_from(["", "ALE/", "dmc/", "dm_control/", "nowhere/"]),
    st.text(st.characters(exclude_characters=":/", exclude_categories=["Cs", "Cc"])),
)
@bounded(25)
def test_any_text_is_no_id_and_is_named(script, namespace, text):
    line = the_line(refuse(script, [*TINY, f"--env-id={namespace}{text}"]))
    assert line.startswith("no ")
    assert " ".join(text.split()) in line


# Environments that fail when they are made, values beyond bounds, ways to go on
ERRORS = ["ValueError", "RuntimeError", "KeyError", "AttributeError", "AssertionError"]
ODD = {
    **{
        f"--env-id wrong_envs:Wrong/{kind}-v0": f"no wrong_envs:Wrong/{kind}-v0: {kind}"
        for kind in ERRORS
    },
    "--env-id wrong_envs:Wrong/FileNotFoundError-v0": "no wrong_envs.*FileNotFoundError",
    "--env-id wrong_envs:Wrong/NoClass-v0": "no wrong_envs:Wrong/NoClass-v0: .*'Thing'",
    "--env-id wrong_value:Thing-v0": "no wrong_value:Thing-v0: ValueError: for some reason",
    "--env-id wrong_zero:Thing-v0": "no wrong_zero:Thing-v0: ZeroDivisionError",
    "--env-id wrong_syntax:Thing-v0": "no wrong_syntax:Thing-v0: SyntaxError",
    "--env-id wrong_exit:Thing-v0": "no wrong_exit:Thing-v0: SystemExit: bye",
    "--env-id :": "no :: ValueError: Empty module name",
    "--env-id :CartPole-v1": "no :CartPole-v1: ValueError: Empty module name",
    "--env-id a:b:c": "no a:b:c: ValueError",
    **{
        f"--env-id wrong_envs:Wrong/Fine-v0 {flags}": "Wrong/Fine-v0: .*cannot be drawn"
        for flags in ("--pixels", "--observation both", "--capture-video")
    },
    "--env-id dmc/walker-walk/more --observation vector": "no dm_control/walker-walk/more",
    "--env-id CartPole-v1 --seed 18446744073709551616": "--seed is 18446744073709551616",
    "--env-id CartPole-v1 --threads 3000000000": "--threads is 3000000000",
    f"--env-id CartPole-v1 --total-frames 1{'0' * 400}": "--total-frames is 10",
    "--env-id CartPole-v1 --deter 1000000000000": "--deter is 1000000000000",
    "--env-id CartPole-v1 --resume ''": "--resume and --evaluate take a run folder",
    "--env-id CartPole-v1 --evaluate=": "--resume and --evaluate take a run folder",
    **{
        f"--resume {{0}}/odd_{name}": f"odd_{name} is no run folder of this script"
        for name in ODD_YAML
    },
    "--resume {0}/nan": "--model-lr is nan, it must be from",
    "--resume {0}/begun --evaluate {0}/begun": "--resume and --evaluate .* do not go together",
    "--resume {0}/begun --evaluate nowhere": "--resume and --evaluate .* do not go together",
    "--evaluate {0}/empty": "empty is no run folder of this script: FileNotFoundError",
    "--evaluate {0}/other": "no checkpoint can be read in v./other",
}


@pytest.mark.parametrize(("script", "flags"), zip(SCRIPTS * len(ODD), ODD, strict=False))
def test_what_is_odd_is_refused_in_one_line_too(script, flags):
    assert re.search(ODD[flags], whole_line(script, flags.format(f"v{script[-1]}")))


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
@per_script
def test_a_run_without_a_checkpoint_is_refused_and_stays_as_it_is(script, flag):
    folder = f"v{script[-1]}/unsaved"
    line = the_line(refuse(script, [f"--{flag}", folder]))
    assert line.startswith(f"no checkpoint can be read in {folder}")


# Folders in which a run begins
@pytest.mark.parametrize("folder", ["nowhere", "nowhere/at/all", "v{}/empty"])
@per_script
def test_where_nothing_is_the_preset_gives_the_values_and_nothing_is_written(script, folder):
    folder = folder.format(script[-1])
    flags = ["--resume", folder, "--env-id", "CartPole-v1", "--deter", "16"]
    before = contents()
    args = vars(parse(script, flags))
    module = MODULES[script]
    given = {"resume": folder, "env_id": "CartPole-v1", "deter": 16}
    assert args == dataclasses.asdict(module.Args()) | module.PRESETS["other"] | given
    code, err, out = run(script, [*flags, "--help"], whole=False)
    assert (code, err) == (0, "")
    assert str(module.PRESETS["other"]["total_frames"]) in out
    assert contents() == before


@per_script
def test_a_command_line_begins_a_run_in_its_folder_and_goes_on_with_it(
    script, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "open_run", OPEN_RUN)
    flags = [*TINY, "--env-id", "CartPole-v1", "--pretrain", "1", "--resume", "mine"]
    code, _, out = run(script, flags)
    assert code == 0
    assert out.splitlines()[0] == "a new run begins in mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    args = vars(parse(script, flags)) | {"resume": ""}
    assert yaml.safe_load(Path("mine/args.yaml").read_text()) == args
    code, _, out = run(script, flags)
    assert code == 0
    assert out.splitlines()[0] == "the run in mine goes on"
    code, _, out = run(script, ["--evaluate", "mine"])
    assert code == 0
    assert re.match(r"return \d+\.\d \+- \d+\.\d in 2 episodes$", out)


# Presets
@pytest.mark.parametrize(("env_id", "observation", "preset"), [
    ("PongNoFrameskip-v4", "auto", "atari"), ("dmc/walker-walk", "auto", "dmc_pixels"),
    ("dmc/walker-walk", "vector", "dmc_vector"), ("CartPole-v1", "auto", "other"),
])  # fmt: skip
@per_script
def test_a_preset_gives_its_values_to_the_ids_that_choose_it_and_to_all_that_name_it(
    script, env_id, observation, preset
):
    module = MODULES[script]
    for named in ("auto", *module.PRESETS):
        given = {"env_id": env_id, "observation": observation, "preset": named}
        flags = ["--env-id", env_id, "--observation", observation, "--preset", named]
        values = module.PRESETS[preset if named == "auto" else named]
        expected = dataclasses.asdict(module.Args()) | values | given
        assert vars(parse(script, flags)) == expected
        assert parse(script, [*flags, "--deter", "7"]).deter == 7


@per_script
def test_a_task_of_dm_control_may_have_the_small_values(script):
    args = parse(script, ["--env-id", "dm_control/walker-walk-v0", "--preset", "other"])
    small = MODULES[script].PRESETS["other"]
    assert {name: getattr(args, name) for name in small} == small
    assert args.deter == 128


@per_script
def test_a_preset_without_a_name_that_is_known_is_refused(script):
    said = squeezed(refuse(script, ["--env-id", "CartPole-v1", "--preset", "small"]))
    assert "--preset" in said
    assert all(f"'{preset}'" in said for preset in ("small", "auto", *MODULES[script].PRESETS))


# Run folders
@per_script
def test_a_run_folder_lies_in_runs_whatever_its_name(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = small_args(script, exp_name="/../../../elsewhere")
    folder, _ = OPEN_RUN(args, 0)
    assert folder.resolve().parent == tmp_path / "runs"


@pytest.mark.parametrize("exp_name", ["name", "x" * 300])
@per_script
def test_a_run_folder_that_the_disk_does_not_take_is_named(script, exp_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if exp_name == "name":
        Path("runs").write_text("a file")
    code, err, _ = run(script, [*TINY, "--env-id", "CartPole-v1", "--exp-name", exp_name])
    assert code == 1
    assert exp_name in the_line(err)


@per_script
def test_a_run_that_is_to_begin_below_a_file_is_one_line(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "open_run", OPEN_RUN)
    Path("notes.txt").write_text("mine")
    code, err, out = run(script, [*TINY, "--env-id", "CartPole-v1", "--resume", "notes.txt/run"])
    assert code == 1
    assert "notes.txt/run" in the_line(err)
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_wrong_mujoco_gl_is_said_in_one_line(tmp_path):
    command = [sys.executable, ROOT / "dreamerv2.py", "--env-id", "dmc/walker-walk", *TINY]
    environ = os.environ | {"MUJOCO_GL": "nothing", "OMP_NUM_THREADS": "1"}
    pipes = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, cwd=tmp_path, env=environ, **pipes)
    assert done.returncode == 2
    assert re.fullmatch(r"error: no dm_control/walker-walk-v0: .*MUJOCO_GL.*\n", done.stderr)
    assert not list(tmp_path.iterdir())
