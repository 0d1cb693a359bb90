"""Wrong command lines and wrong environments: a clear message, exit code 2, nothing written.

All of them run in this process, in a folder in which a file too many is an error.
"""

import functools
import inspect
import math
import re
import shlex
import shutil
import string
import sys
from pathlib import Path

import gymnasium as gym
import pytest
from helpers.command_lines import bounded, refuse, small_args, the_line, write_args
from helpers.processes import finish, start
from helpers.runs import ONE_SCRIPT, SCRIPTS, TINY, TINY_V3
from hypothesis import given
from hypothesis import strategies as st

import runtime

SHORT = f"{TINY} --total-frames 220"
SHORT_V3 = f"{TINY_V3} --total-frames 220"

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
    "wrong_syntax": "def x(:",
    "wrong_exit": "import sys; sys.exit('bye')",
}


# Folders that are no runs of a script: args.yaml, and which error is told
NO_RUNS = {
    "zero": (b"", "TypeCheckError: None is not a dict"),
    "list": (b"[1, 2]", "TypeCheckError: list is not a dict"),
    "few": (b"env_id: CartPole-v1", "TypeCheckError: .*batch_length"),
    "binary": (bytes(range(256)), "UnicodeDecodeError"),
    "null": (b"a: \0", "ReaderError"),
    "open": (b"a: [1", "ParserError"),
    "two": (b"a: 1\n---\nb: 2", "ComposerError"),
    "key": (b"? [1]\n: 2", "ConstructorError"),
    "date": (b"2001-99-99", "ValueError"),
    "name": (b"!!python/name:os.system", "ConstructorError"),
    "no_bool": (b"!!bool x", ""),  # on these yaml itself trips
    "no_int": (b"!!int ''", ""),
    "depth": (b"[" * 1000, ""),
}
WRONG_TYPES = [  # of one argument in args.yaml
    {"seed": "x"}, {"seed": 1.5}, {"seed": None}, {"seed": [1]}, {"cuda": 1}, {"cuda": "yes"},
    {"pixels": "no"}, {"model_lr": "fast"}, {"model_lr": None}, {"sticky_prob": "often"},
    {"observation": "smell"}, {"observation": None}, {"env_id": None}, {"env_id": 3},
    {"env_id": {}}, {"more": 1}, {3: 4},
]  # fmt: skip
WRONG_VALUES = {
    "negative": ({"seed": -1}, "--seed is -1, it must be from 0 to"),
    "nothing": ({"deter": 0}, "--deter is 0, it must be from 1 to"),
    "nan": ({"model_lr": math.nan}, "--model-lr is nan, it must be from"),
    "env_id": ({"env_id": "Nothing-v0"}, "no Nothing-v0: NameNotFound"),
    "actions": ({"actor_dist": "tanh_normal"}, "tanh_normal is not for CartPole-v1's actions"),
    "horizon": ({"imag_horizon": 1}, "--imag-horizon is 1, it must be from 2 to 2147483647"),
    "track": ({"track": True}, "^--track needs pip install wandb: ModuleNotFoundError"),
    "begun": ({}, "no checkpoint can be read in dreamerv..py/begun"),
}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder with modules of wrong environments, and folders that are no whole runs."""
    place = tmp_path_factory.mktemp("place")
    for name, text in (BROKEN | {"wrong_envs": ENVS}).items():
        (place / f"{name}.py").write_text(text)
    for script, other in zip(SCRIPTS, reversed(SCRIPTS), strict=True):
        folder = place / script
        args = {name: change for name, (change, _) in WRONG_VALUES.items()}
        args |= {f"type{i}": change for i, change in enumerate(WRONG_TYPES)}
        args |= {"unsaved": {}, "other": {"resume": f"{script}/begun"}}
        for name, change in args.items():
            write_args(folder / name, small_args(script) | change)
        write_args(folder / "foreign", small_args(other))
        (folder / "unsaved" / "replay").mkdir()
        for name, (data, _) in NO_RUNS.items():
            (folder / name).mkdir()
            (folder / name / "args.yaml").write_bytes(data)
        (folder / "empty").mkdir()
        (folder / "notes").mkdir()
        (folder / "notes" / "notes.txt").write_text("not from a run")
        (folder / "folder" / "args.yaml").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(place)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setitem(sys.modules, "wandb", None)  # as if it were not installed
        patch.setattr(runtime, "open_run", open_no_new_run)
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))  # tyro's, for speed
        patch.setenv("MUJOCO_GL", "egl")  # so that it is put back
        patch.delenv("MUJOCO_GL")
        yield
    for env_id in [env_id for env_id in gym.registry if env_id.startswith("Wrong/")]:
        del gym.registry[env_id]
    for name in ("wrong_envs", *BROKEN):
        sys.modules.pop(name, None)


def open_no_new_run(*inputs, open_run=runtime.open_run):
    """Opens a run that exists; one that must not begin is put away, unseen by other tests."""
    folder, is_new = open_run(*inputs)
    if is_new:
        shutil.rmtree(folder)
        shutil.rmtree("runs", ignore_errors=True)
        pytest.fail("it was accepted, and a run began")
    return folder, is_new


def refuse_line(script, flags):
    """What the script says, in one line, about flags that it must refuse, with nothing written."""
    sizes = shlex.split(SHORT_V3 if script == "dreamerv3.py" else SHORT)
    if "--resume" in flags or "--evaluate" in flags:
        sizes = []
    flags = flags if isinstance(flags, list) else shlex.split(flags)
    before = contents()
    line = the_line(refuse(script, sizes + flags))
    assert contents() == before
    return line


def contents():
    """All that lies here and in the runs, with when it changed."""
    return {str(path): path.stat().st_mtime_ns for path in Path().rglob("*")}


GYM = "Malformed environment ID"
ONLY_BOXES = "^observations have to be a Box or a Dict of them, not "
ONLY_ACTIONS = "^actions have to be Discrete or a Box, not "
BAD_SPACES = [
    "Text", "Tuple", "MultiDiscrete", "MultiBinary", "Discrete", "Sequence", "Graph", "OneOf",
    "None",
]  # fmt: skip
BAD_ACTIONS = ["Text", "Tuple", "MultiDiscrete", "MultiBinary", "Dict", "None"]
ERRORS = [
    "ValueError", "RuntimeError", "KeyError", "AttributeError", "AssertionError",
    "FileNotFoundError", "ImportError", "TypeError",
]  # fmt: skip
SHARED = {  # what is said about flags, of which either script is given a part; {0} is its folder
    # ids
    "--env-id CartPol-v1": "no CartPol-v1: .*Did you mean: `CartPole`",
    "--env-id cartpole-v1": "no cartpole-v1: .*Did you mean: `CartPole`",
    "--env-id CartPole-v7": r"no CartPole-v7: .*`v0`, `v1`",
    "--env-id Pendulum-v0": "no Pendulum-v0: .*Please use `Pendulum-v1`",
    "--env-id Taxi-v3": "Taxi-v4|Discrete",
    "--env-id LunarLander-v2": "no LunarLander-v2: .*LunarLander-v3",
    "--env-id Ant-v2": "no Ant-v2: ImportError: .*gymnasium-robotics",
    "--env-id GymV21Environment-v0": "no GymV21Environment-v0: .*pip install",
    "--env-id ALE/Pnog-v5": "no ALE/Pnog-v5: .*Did you mean: `Pong`",
    "--env-id ALE/Pong-v6": "no ALE/Pong-v6: .*`v5`",
    "--env-id ALE/": f"no ALE/: .*{GYM}",
    "--env-id PongNoFramskip-v4": "no PongNoFramskip-v4: .*Did you mean: `PongNoFrameskip`",
    "--env-id dm_control/walker-wlk-v0": "no dm_control/walker-wlk-v0: .*`walker-walk`",
    "--env-id dmc/walker_walk": "no dm_control/walker_walk-v0: .*`walker-walk`",
    "--env-id dmc/walker_walk --observation vector": "no dm_control/walker_walk-v0: .*walker-walk",
    "--env-id dm_control/": "no dm_control/-v0: NameNotFound",
    "--env-id ''": f"no : .*{GYM}",
    "--env-id 'CartPole-v1 '": f"no CartPole-v1 : .*{GYM}",
    "--env-id a/b/c-v0": f"no a/b/c-v0: .*{GYM}",
    "--env-id 🎮": f"no 🎮: .*{GYM}",
    "--env-id ünï-v0": "no ünï-v0: NameNotFound",
    "--env-id a:": "no a:: ModuleNotFoundError: No module named 'a'",
    "--env-id no_module:Thing-v0": "no no_module:Thing-v0: ModuleNotFoundError: .*'no_module'",
    "--env-id .wrong_envs:Wrong/Fine-v0": "no .wrong_envs:Wrong/Fine-v0: TypeError: .*relative",
    "--env-id wrong_envs.py:Wrong/Fine-v0": "no wrong_envs.py:.*not a package",
    "--env-id wrong_envs:Wrong/Fone-v0": "no wrong_envs:Wrong/Fone-v0: .*Did you mean",
    "--env-id wrong_import:Thing-v0": "no wrong_import:Thing-v0: .*nowhere_at_all",
    "--env-id wrong_value:Thing-v0": "no wrong_value:Thing-v0: ValueError: for some reason",
    "--env-id wrong_syntax:Thing-v0": "no wrong_syntax:Thing-v0: SyntaxError",
    "--env-id wrong_exit:Thing-v0": "no wrong_exit:Thing-v0: SystemExit: bye",
    "--env-id :": "no :: ValueError: Empty module name",
    "--env-id :CartPole-v1": "no :CartPole-v1: ValueError: Empty module name",
    "--env-id a:b:c": "no a:b:c: ValueError",
    "--env-id dmc/walker-walk/more --observation vector": "no dm_control/walker-walk/more",
    # environments
    "--env-id wrong_envs:Wrong/NoModule-v0": "no wrong_envs:Wrong/NoModule-v0: .*nowhere_at_all",
    "--env-id wrong_envs:Wrong/NoEnv-v0": "no wrong_envs:Wrong/NoEnv-v0: .*must inherit",
    **{
        f"--env-id wrong_envs:Wrong/{kind}-v0":
            f"no wrong_envs:Wrong/{kind}-v0: {kind}: .*reason.* \\(.*wrong_envs.py:\\d+\\)$"
        for kind in ERRORS
    },
    "--env-id wrong_envs:Wrong/NoClass-v0": "no wrong_envs:Wrong/NoClass-v0: .*'Thing'",
    **{
        f"--env-id wrong_envs:Wrong/Fine-v0 {flags}": "Wrong/Fine-v0: .*cannot be drawn"
        for flags in ("--pixels", "--observation both", "--capture-video")
    },
    "--env-id CartPole-v1 --pixels --observation both": "--pixels does not go with .*both",
    "--env-id FrozenLake-v1": rf"{ONLY_BOXES}Discrete\(16\)$",
    "--env-id Blackjack-v1": rf"{ONLY_BOXES}Tuple\(.*\)$",
    **{
        f"--env-id wrong_envs:Wrong/{name}-v0": rf"{ONLY_BOXES}{name}.*$"
        for name in BAD_SPACES
    },
    "--env-id wrong_envs:Wrong/Nested-v0": rf"{ONLY_BOXES}Dict\(.*\)$",
    "--env-id wrong_envs:Wrong/Mixed-v0": rf"{ONLY_BOXES}Dict\(.*\)$",
    "--env-id wrong_envs:Wrong/Empty-v0": r"--observation auto does not fit .*Dict\(\)",
    **{
        f"--env-id wrong_envs:Wrong/{name}Action-v0": f"{ONLY_ACTIONS}{name}"
        for name in BAD_ACTIONS
    },
    "--env-id wrong_envs:Wrong/TwoChannels-v0": r"auto does not fit .*\(64, 64, 2\)",
    "--env-id wrong_envs:Wrong/FourChannels-v0": r"auto does not fit .*\(64, 64, 4\)",
    "--env-id wrong_envs:Wrong/NoChannel-v0": r"auto does not fit .*\(8, 8, 0\)",
    "--env-id wrong_envs:Wrong/ChannelsFirst-v0": r"auto does not fit .*\(3, 64, 64\)",
    "--env-id wrong_envs:Wrong/TwoImages-v0": r"auto does not fit .*\(9, 7, 3\)",
    "--env-id wrong_envs:Wrong/FourChannels-v0 --observation vector": "vector does not fit",
    "--env-id PongNoFrameskip-v4 --observation vector": "--observation vector does not fit",
    "--env-id Pendulum-v1 --env-kwargs g=5": "--env-kwargs g=5 is no JSON object such as",
    "--env-id Pendulum-v1 --env-kwargs [5]": r"--env-kwargs \[5\] is no JSON object such as",
    """--env-id Pendulum-v1 --env-kwargs '{{"h": 5}}'""": "no Pendulum-v1 with --env-kwargs .*'h'",
    """--env-id Pong --env-kwargs '{{"frameskip": 4}}'""": "--env-kwargs cannot set frameskip",
    # numbers and runs
    "--env-id CartPole-v1 --num-envs 10000000000000000000000": "--num-envs is 1",
    "--env-id CartPole-v1 --seed 18446744073709551616": "--seed is 18446744073709551616",
    "--env-id CartPole-v1 --threads 3000000000": "--threads is 3000000000",
    f"--env-id CartPole-v1 --total-frames 1{'0' * 400}": "--total-frames is 10",
    "--env-id CartPole-v1 --sticky-prob -0.1": "--sticky-prob is -0.1, it must be from 0 to 1",
    "--env-id CartPole-v1 --seed 1 --seed -2": "--seed is -2",
    "--env-id CartPole-v1 --env-id Nothing-v0": "no Nothing-v0",
    "--env-id CartPole-v1 --track": "^--track needs pip install wandb: ModuleNotFoundError",
    "--env-id CartPole-v1 --resume ''": "--resume and --evaluate take a run folder",
    "--resume {0}/begun --evaluate {0}/begun": "--resume and --evaluate .* do not go together",
    "--resume {0}/begun --evaluate nowhere": "--resume and --evaluate .* do not go together",
    "--evaluate nowhere": "nowhere is no run folder, it has no args.yaml",
    "--evaluate nowhere --help": "nowhere is no run folder, it has no args.yaml",
    "--evaluate {0}/empty": "empty is no run folder, it has no args.yaml",
    "--evaluate {0}/other": "no checkpoint can be read in dreamerv..py/other",
    "--resume wrong_envs.py": "wrong_envs.py is no run folder, it has no args.yaml",
    "--evaluate wrong_envs.py": "wrong_envs.py is no run folder, it has no args.yaml",
    f"--resume {'x' * 300}": "xxx is no run folder: OSError: .*too long",
}  # fmt: skip
IN_EACH_SCRIPT = {
    **{
        f"--env-id {env_id} --actor-dist {dist}":
            f"^--actor-dist {dist} is not for {env_id.split()[0]}'s actions$"
        for env_id, dist in {
            "PongNoFrameskip-v4": "tanh_normal", "CartPole-v1": "tanh_normal",
            "Pendulum-v1": "onehot", "dmc/walker-walk --observation vector": "onehot",
        }.items()
    },
    "--env-id CartPole-v1 --imag-horizon 1": "--imag-horizon is 1, it must be from 2 to 2147483647",
    "--env-id CartPole-v1 --batch-length 50 --replay-size 40": "--batch-length 50 .* 40 rows",
    "--env-id CartPole-v1 --num-envs 200": "--batch-length 7 .* an environment 6 rows",
    "--env-id Pendulum-v1 --pixels --replay-size 2000000000 --total-frames 2000000000":
        "replay and checkpoints take .* GiB of .* free: lower --replay-size",
    "--resume {0}/foreign": r"foreign is no run folder .*: TypeCheckError: .* key\(s\): ",
    "--evaluate {0}/foreign": r"foreign is no run folder .*: TypeCheckError: .* key\(s\): ",
}  # fmt: skip
IN_ONE_SCRIPT = [
    (
        "dreamerv2.py",
        "--env-id CartPole-v1 --actor-dist trunc_normal",
        "trunc_normal is not for CartPole-v1's",
    ),
    *(
        ("dreamerv3.py", f"--env-id CartPole-v1 {flags}", said)
        for flags, said in {
            "--actor-dist normal": "--actor-dist normal is not for CartPole-v1's actions",
            "--blocks 5": "--deter 16 has to be a multiple of --blocks 5",
            "--pixels --blocks 16": "4 \\* --cnn-depth 2 has to be a multiple of --blocks 16",
            "--batch-length 199 --replay-size 200": "takes 201 rows, .* leave an environment 200",
            "--batch-size 1226": "--batch-length 7 with --batch-size 1226 takes 1232 rows, ",
            "--batch-size 1226 --num-envs 3": "takes 415 rows, .* leave an environment 410",
        }.items()
    ),
]
FOLDERS = {name: f"{name} is no run folder .*: {error}" for name, (_, error) in NO_RUNS.items()}
FOLDERS |= {name: said for name, (_, said) in WRONG_VALUES.items()}
FOLDERS |= {
    f"type{i}": f"is no run folder of this script.*: .*['\"]{next(iter(change))}['\"]"
    for i, change in enumerate(WRONG_TYPES)
}
FOLDERS |= {
    "notes": "notes is no run folder, it has no args.yaml",
    "folder": "folder is no run folder of this script.*: IsADirectoryError",
    "begun/args.yaml": "args.yaml is no run folder, it has no args.yaml",
}
WAYS = ["--resume", "--resume", "--evaluate", "--evaluate"]  # with one script and the other
SHARED |= {f"{WAYS[i % 4]} {{0}}/{name}": said for i, (name, said) in enumerate(FOLDERS.items())}
LINES = [(SCRIPTS[i % 2], flags, said) for i, (flags, said) in enumerate(SHARED.items())]
LINES += [(script, flags, said) for script in SCRIPTS for flags, said in IN_EACH_SCRIPT.items()]
LINES += IN_ONE_SCRIPT


@pytest.mark.parametrize(("script", "flags", "said"), LINES)
def test_bad_input_is_refused_in_one_line(script, flags, said):
    assert re.search(said, refuse_line(script, flags.format(script)))


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_a_run_without_a_checkpoint_is_refused_and_stays_as_it_is(script, flag):
    line = refuse_line(script, f"--{flag} {script}/unsaved")
    assert line.startswith(f"no checkpoint can be read in {script}/unsaved")
    assert ("remove the folder to begin again" in line) == (flag == "resume")


# Ids that hypothesis makes up
SLIPS = ["CartPole-v1", "PongNoFrameskip-v4", "ALE/Breakout-v5", "dm_control/walker-walk-v0"]
SLIPS += ["MountainCarContinuous-v0"]


@given(st.sampled_from(SLIPS), st.sampled_from(string.ascii_letters), st.integers(0, 30))
@bounded(20)
def test_an_id_with_a_letter_too_many_is_named(env_id, letter, where):
    namespace, slash, name = env_id.rpartition("/")
    where %= len(name) + 1
    name = name[:where] + letter + name[where:]
    assert name in refuse_line("dreamerv2.py", f"--env-id {namespace}{slash}{name}")


@given(
    st.sampled_from(["", "ALE/", "dmc/", "dm_control/", "nowhere/"]),
    st.text(st.characters(exclude_characters=":/", exclude_categories=["Cs", "Cc"])),
)
@bounded(40)
def test_any_text_is_no_id_and_is_named(namespace, text):
    line = refuse_line("dreamerv2.py", [f"--env-id={namespace}{text}"])
    assert line.startswith("no ")
    assert " ".join(text.split()) in line


# As processes
@ONE_SCRIPT
def test_the_script_itself_exits_with_code_2_and_one_line(script, tmp_path):
    done = finish(start(script, "--env-id CartPol-v1", tmp_path), code=2)
    assert done.out == ""
    assert re.fullmatch(r"error: no CartPol-v1: [^\n]*Did you mean: `CartPole`[^\n]*\n", done.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_wrong_mujoco_gl_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nothing")
    done = finish(start("dreamerv2.py", f"--env-id dmc/walker-walk {SHORT}", tmp_path), code=2)
    assert re.fullmatch(r"error: no dm_control/walker-walk-v0: .*MUJOCO_GL.*\n", done.err)
    assert not list(tmp_path.iterdir())
