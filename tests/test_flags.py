"""The flags of the scripts: presets, help, bounds, choices, and what a run that exists allows."""

import dataclasses
import functools
import inspect
import math
import re
import shlex
import string
import typing
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import yaml
from helpers.command_lines import bounded, outcome, refuse, small_args, the_line, write_args
from helpers.runs import EVERY_SCRIPT, ONE_SCRIPT, SCRIPTS, module_of, parse
from hypothesis import given
from hypothesis import strategies as st

import common
import runtime


@pytest.fixture(scope="module", autouse=True)
def begun(tmp_path_factory):
    """A folder of a run of each script, dreamerv1.py/ and so on."""
    folder = tmp_path_factory.mktemp("begun")
    for script in [*SCRIPTS, "dreamerv3.py"]:
        write_args(folder / script, small_args(script))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))  # tyro's, for speed
        yield folder


def hints(script):
    return typing.get_type_hints(module_of(script).Args, include_extras=True)


def bare(hint):
    """The type of an argument without what else is said about it: float | None -> float."""
    while typing.get_origin(hint) not in (None, typing.Literal):
        hint = typing.get_args(hint)[0]
    return hint


def names_of(script, *kinds):
    """The arguments whose type, or that of whose values, is one of the kinds."""
    bares = {name: bare(hint) for name, hint in hints(script).items()}
    return [name for name, kind in bares.items() if (typing.get_origin(kind) or kind) in kinds]


def bounds(script, name):
    return getattr(hints(script)[name], "__metadata__", (0, 2**31 - 1))


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def refuse_flags(script, *flags):
    """What is said about flags that cannot be read, without blanks: tyro breaks lines anywhere."""
    return "".join(refuse(script, flags, whole=False).split())


# Presets and help
@pytest.mark.parametrize(("env_id", "observation", "preset"), [
    ("PongNoFrameskip-v4", "auto", "atari"), ("ALE/Pong-v5", "pixels", "atari"),
    ("Pong", "auto", "atari"), ("PongNoFrameskip", "auto", "atari"), ("ALE/Pong", "auto", "atari"),
    ("ale_py:PongNoFrameskip-v4", "auto", "atari"), ("ale_py:ALE/Pong-v5", "auto", "atari"),
    ("dm_control/walker-walk-v0", "auto", "dmc_pixels"), ("dmc/walker-walk", "both", "dmc_pixels"),
    ("dmc/walker-walk", "vector", "dmc_vector"), ("CartPole-v1", "auto", "other"),
    ("CartPole", "auto", "other"), ("CartPole-v1", "pixels", "other"),
    ("module:dmc/Thing-v0", "auto", "other"), ("mine:Pong2-v0", "auto", "other"),
    ("Nothing-v0", "vector", "other"),
])  # fmt: skip
def test_choose_preset_goes_by_the_id_unless_one_is_named(env_id, observation, preset):
    args = SimpleNamespace(env_id=env_id, observation=observation, preset="auto")
    assert common.choose_preset(args) == preset
    for args.preset in ("atari", "dmc_pixels", "dmc_vector", "other", "crafter"):
        assert common.choose_preset(args) == args.preset


@pytest.mark.parametrize(("line", "preset", "frames"), [
    ("--env-id PongNoFrameskip-v4", "atari", 4), ("--env-id=dmc/walker-walk", "dmc_pixels", 2),
    ("--observation=vector --env-id dmc/walker-walk", "dmc_vector", 2),
    ("--env_id CartPole-v1", "other", 1),
])  # fmt: skip
def test_a_preset_gives_its_values_to_the_ids_that_choose_it_and_to_all_that_name_it(
    script, line, preset, frames
):
    module = module_of(script)
    given = {"env_id": re.search(r"env.id[ =](\S+)", line)[1]}
    given |= {"observation": "vector"} if "vector" in line else {}
    for named in ("auto", *module.PRESETS):
        values = module.PRESETS[preset if named == "auto" else named]
        expected = dataclasses.asdict(module.Args()) | values | given | {"preset": named}
        assert vars(parse(script, f"{line} --preset {named}")) == expected
    assert parse(script, line).action_repeat == frames


def test_flags_override_the_preset(script):
    args = vars(parse(script, "--env-id CartPole-v1 --deter 7 --no-cuda --sticky-prob 0.25"))
    expected = vars(parse(script, "--env-id CartPole-v1"))
    assert args == expected | {"deter": 7, "cuda": False, "sticky_prob": 0.25}


@EVERY_SCRIPT
@pytest.mark.parametrize(("flags", "preset"), [
    ("--env-id CartPole-v1", "other"), ("--env-id PongNoFrameskip-v4", "atari"),
    ("--env-id dm_control/walker-walk-v0", "dmc_pixels"),
    ("--env-id CartPole-v1 --preset dmc_vector", "dmc_vector"),
    ("--env-id CartPole-v1 --resume nowhere", "other"),
])  # fmt: skip
def test_help_shows_the_values_in_force(script, monkeypatch, flags, preset):
    monkeypatch.setenv("COLUMNS", "200")
    code, err, out = outcome(script, f"{flags} --help", whole=False)
    assert (code, err) == (0, "")
    module = module_of(script)
    in_force = dataclasses.asdict(module.Args()) | module.PRESETS[preset]
    in_force["env_id"] = flags.split()[1]
    own = ["train_ratio", "lr"] if script == "dreamerv3.py" else ["prefill", "model_lr"]
    for name in ("env_id", "total_frames", "action_repeat", "deter", *own):
        shown = re.search(rf"{flag_of(name)} [A-Z]+ .*?\(default: ([^)]*)\)", out, re.DOTALL)
        assert shown[1] == str(in_force[name]), name


# Numbers
def beyond(script, name):
    """Numbers that are none of the argument's."""
    least, most = bounds(script, name)
    if name in names_of(script, int):
        return least - 1, most + 1
    least, most = float(least), float(most)
    return math.nextafter(least, -1), math.nextafter(most, math.inf), math.nan, math.inf


@EVERY_SCRIPT
def test_every_number_has_bounds_and_is_a_number(script):
    assert not {name for name, hint in hints(script).items() if hint in (int, float)}
    args = parse(script, "--env-id CartPole-v1")
    for name in names_of(script, int, float):
        least, most = bounds(script, name)
        for value in beyond(script, name):
            said = f"{flag_of(name)} is {value}, it must be from {least} to {most}"
            with pytest.raises(runtime.UserError, match=f"^{re.escape(said)}$"):
                runtime.check_bounds(dataclasses.replace(args, **{name: value}))
    line = the_line(refuse(script, [f"{flag_of(name)}={value}"], whole=False))
    assert line == said  # as the command line has it


@EVERY_SCRIPT
def test_numbers_at_their_bounds_are_taken(script):
    names = names_of(script, int, float)
    for end in (0, 1):
        values = {name: bounds(script, name)[end] for name in names}
        args = vars(parse(script, [f"{flag_of(name)}={value}" for name, value in values.items()]))
        assert {name: args[name] for name in names} == values


SHARES = [
    "sticky_prob", "gamma", "discount_lambda", "kl_balance", "actor_grad_mix", "expl_epsilon",
    "expl_min", "unimix", "slow_rate", "return_rate",
]  # fmt: skip
SIZES = [
    "num_envs", "batch_size", "deter", "hidden", "units", "stoch", "classes", "cnn_depth",
    "layers", "reward_layers", "eval_episodes", "total_frames", "action_repeat", "replay_size",
    "train_every", "train_steps", "slow_update",
]  # fmt: skip
WIDTHS = ["deter", "hidden", "units", "classes", "cnn_depth"]  # in V3 0 is that of --size
ABOVE_0 = ["model_lr", "adam_eps", "clip", "expl_decay", "lr", "agc", "train_ratio"]


@EVERY_SCRIPT
def test_what_is_a_share_goes_to_1_and_what_is_a_size_begins_at_1(script):
    every = [*SCRIPTS, "dreamerv3.py"]
    assert {*SHARES, *SIZES, *ABOVE_0} <= set().union(*(hints(script) for script in every))
    for name in SHARES:
        assert name not in hints(script) or bounds(script, name) == (0, 1), name
    for name in SIZES:
        least = 0 if script == "dreamerv3.py" and name in WIDTHS else 1
        assert name not in hints(script) or bounds(script, name)[0] == least, name
    assert bounds(script, "imag_horizon")[0] == 2  # the last imagined state has no return
    assert bounds(script, "batch_length")[0] == 2  # V1 learns no discount of a window's first row
    for name in ABOVE_0:
        assert name not in hints(script) or bounds(script, name)[0] > 0, name


def is_number(text):
    try:
        float(text)
    except ValueError:
        return text == "None"
    return True


NO_NUMBERS = ["", "many", "1,5", "1 2", "0x10", "--1", "1e", "٣ x", "[/b]", "True", "1.0.0"]


@ONE_SCRIPT
@given(st.data())
@bounded(1)
def test_text_is_refused_for_every_number_by_the_name_of_the_flag(script, data):
    names = names_of(script, int, float)
    text = st.sampled_from(NO_NUMBERS) | st.text(st.characters(exclude_characters="-"))
    text = text.filter(lambda text: not is_number(text))
    texts = st.lists(text, unique=True, min_size=len(names), max_size=len(names))
    for name, text in zip(names, data.draw(texts), strict=True):
        assert flag_of(name) in refuse_flags(script, flag_of(name), text)


@ONE_SCRIPT
@pytest.mark.parametrize("value", ["1e6", "16.0", "-h", "-", "-1e3"])
def test_what_is_no_whole_number_is_refused(script, value):
    for name in ("total_frames", "deter"):
        assert flag_of(name) in refuse_flags(script, flag_of(name), value)


# Words
@ONE_SCRIPT
@given(st.data())
@bounded(2)
def test_a_word_that_is_no_choice_is_named_with_the_choices(script, data):
    for name in names_of(script, typing.Literal):
        choices = typing.get_args(hints(script)[name])
        words = st.sampled_from([*map(str.upper, choices), choices[0] + "x", "", "0", "None"])
        words |= st.text(string.ascii_letters + "[]{}% é", max_size=20)
        word = data.draw(words.filter(lambda word, choices=choices: word not in choices))
        said = refuse_flags(script, f"{flag_of(name)}={word}")
        assert flag_of(name) in said
        assert all(f"'{choice}'" in said for choice in ("".join(word.split()), *choices))


@ONE_SCRIPT
@given(st.text(string.ascii_letters + string.digits, min_size=2), st.booleans(), st.booleans())
@bounded(12)
def test_an_unknown_flag_is_named(script, name, first, valued):
    if name in hints(script) or name == "help":
        return
    unknown = [f"--{name}", "1"] if valued else [f"--{name}"]
    known = ["--env-id", "CartPole-v1"]
    assert f"--{name}" in refuse_flags(script, *(unknown + known if first else known + unknown))


@pytest.mark.parametrize(("script", "flags"), [
    ("dreamerv1.py", "--kl-balance 0.8"), ("dreamerv1.py", "--classes 32"),
    ("dreamerv1.py", "--slow-update 100"), ("dreamerv1.py", "--actor-grad both"),
    ("dreamerv1.py", "--actor-dist trunc_normal"), ("dreamerv2.py", "--train-steps 2"),
    ("dreamerv2.py", "--expl-noise 0.3"), ("dreamerv2.py", "--act gelu"),
    ("dreamerv3.py", "--kl-scale 1"), ("dreamerv3.py", "--prefill 200"),
    ("dreamerv2.py", "--size 12m"), ("dreamerv1.py", "--train-ratio 32"),
])  # fmt: skip
def test_a_flag_that_only_another_version_has_is_named(script, flags):
    assert flags.split()[0] in refuse_flags(script, *flags.split())


@ONE_SCRIPT
def test_every_flag_but_a_switch_needs_a_value(script):
    for name in hints(script):
        if name not in names_of(script, bool):
            assert flag_of(name) in refuse_flags(script, flag_of(name))


@ONE_SCRIPT
@pytest.mark.parametrize("flags", [
    "extra", "''", "-x", "-", "--env CartPole-v1", "--no-deter", "--no-env-id", "--deter 16 32",
    "--cuda yes", "--track True", "--tyro-print-completion", "@flags.txt",
])  # fmt: skip
def test_what_is_no_flag_and_no_value_is_named(script, flags):
    said = refuse(script, ["--env-id", "CartPole-v1", *shlex.split(flags)], whole=False)
    assert flags.split()[-1].strip("'") in said


# A run that exists
@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_a_run_goes_on_with_its_own_arguments(script, flag):
    assert vars(parse(script, f"--{flag} {script}")) == small_args(script) | {flag: script}


def test_resume_may_change_how_long_and_where_but_not_what_is_learned(script):
    more = "--total-frames 500 --no-cuda --threads 2 --log-every 7 --no-graph --compile"
    changes = {"total_frames": 500, "cuda": False, "threads": 2, "log_every": 7, "graph": False}
    args = vars(parse(script, f"--resume {script} {more}"))
    assert args == small_args(script) | changes | {"compile": True, "resume": script}
    parse(script, f"--resume {script} --deter 16 --env-id CartPole-v1")  # said again, not changed
    track = parse(script, f"--resume {script} --wandb-project-name mine --wandb-entity us")
    assert (track.wandb_project_name, track.wandb_entity) == ("mine", "us")
    for change in ("--deter 32", "--seed 4", "--env-id Pendulum-v1", "--gamma 0.9"):
        with pytest.raises(runtime.UserError, match=f"{change.split()[0]} cannot change"):
            parse(script, f"--resume {script} {change}")


def test_keywords_of_an_environment_can_be_typed_again_in_other_words(script, tmp_path):
    write_args(tmp_path / "run", small_args(script, env_kwargs='{"g": 5, "a": [1]}'))
    again = ["--resume", f"{tmp_path}/run", "--env-kwargs"]
    parse(script, [*again, '{"a":[1],"g":5.0}'])
    for other in ('{"g": 6, "a": [1]}', "{", "{}"):
        with pytest.raises(runtime.UserError, match="--env-kwargs cannot change"):
            parse(script, [*again, other])


@EVERY_SCRIPT
def test_a_command_that_says_auto_can_be_typed_again(script, tmp_path):
    began = small_args(script, actor_dist="onehot", precision="float32")  # what it stood for
    write_args(tmp_path / "run", began)
    again = f"--resume {tmp_path}/run --actor-dist auto --precision auto --preset auto"
    assert vars(parse(script, again)) == began | {"resume": f"{tmp_path}/run"}


@EVERY_SCRIPT
def test_evaluate_may_change_episodes_and_environment_but_not_the_agent(script):
    args = parse(script, f"--evaluate {script} --eval-episodes 9 --seed 4 --eval-envs 3")
    assert (args.eval_episodes, args.seed, args.eval_envs, args.deter) == (9, 4, 3, 16)
    other = ["--env-id", "Pendulum-v1", "--env-kwargs", '{"g": 5}', "--time-limit", "9"]
    args = parse(script, [f"--evaluate={script}", *other, "--sticky-prob", "0.5"])
    assert (args.env_id, args.env_kwargs, args.time_limit) == ("Pendulum-v1", '{"g": 5}', 9)
    assert (args.sticky_prob, args.deter) == (0.5, 16)
    rate = "--lr" if script == "dreamerv3.py" else "--model-lr"
    with pytest.raises(runtime.UserError, match=f"{rate} cannot change"):
        parse(script, f"--evaluate {script} {rate} 0.8")


def others(hint, value):
    """Good values of an argument that are not the one given."""
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from([choice for choice in typing.get_args(hint) if choice != value])
    good = {
        int: st.integers(2, 2**31 - 1),  # what all of them allow
        float: st.floats(1e-9, 1.0),
        str: st.text(string.ascii_letters + string.digits + " /.=-é", min_size=1),
    }
    return good[bare(hint)].filter(lambda other: other != value)


@ONE_SCRIPT
@given(st.data())
@bounded(1)
def test_all_that_is_learned_and_how_is_fixed_in_a_run_that_exists(script, data):
    for name, hint in hints(script).items():
        if name in runtime.MAY_CHANGE:
            continue
        value = small_args(script)[name]
        if hint is bool:
            change = flag_of(f"no_{name}" if value else name)
        else:
            change = f"{flag_of(name)}={data.draw(others(hint, value))}"
        ways = ["resume"] if name in runtime.MAY_CHANGE_IN_EVALUATION else ["resume", "evaluate"]
        flags = [f"--{data.draw(st.sampled_from(ways))}", script, change]
        line = the_line(refuse(script, flags, whole=False))
        assert line == f"{flag_of(name)} cannot change in a run that exists"


# args.yaml
@ONE_SCRIPT
def test_a_missing_arg_is_a_user_error_that_names_it(script, tmp_path):
    for name in small_args(script):
        write_args(tmp_path, {k: v for k, v in small_args(script).items() if k != name})
        with pytest.raises(runtime.UserError, match=f"{tmp_path} is no run folder .*{name}"):
            runtime.read_args(module_of(script).Args, tmp_path)


def test_an_integer_will_do_for_a_real_number(script, tmp_path):
    write_args(tmp_path, small_args(script, model_lr=1, sticky_prob=0))
    assert parse(script, f"--resume {tmp_path}").model_lr == 1


def test_args_yaml_executes_nothing(script, tmp_path):
    pwned = tmp_path / "pwned"
    (tmp_path / "args.yaml").write_text(f"!!python/object/apply:os.mkdir ['{pwned}']")
    for flag in ("resume", "evaluate"):
        line = the_line(refuse(script, f"--{flag} {tmp_path}"))
        assert f"{tmp_path} is no run folder of this script: ConstructorError" in line
    assert not pwned.exists()


@dataclass
class Flags:
    env_id: str = "CartPole-v1"
    resume: str = ""
    evaluate: str = ""
    track: bool = False
    shift: float = -0.5
    offset: int = -3
    sizes: tuple[int, ...] = (3, 4)
    pair: tuple[float, str] = (1.0, "x")


def test_flags_of_ones_own_may_be_negative_or_tuples_and_can_be_resumed(tmp_path):
    def parse(line):
        return runtime.parse_args(Flags, {"other": {}}, lambda args: "other", line.split())

    args = parse("--shift -2.5 --sizes 5 6 7")
    assert (args.shift, args.offset, args.sizes) == (-2.5, -3, (5, 6, 7))
    runtime.write_args(tmp_path, vars(args))
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["shift"] == -2.5
    again = parse(f"--resume {tmp_path}")
    assert (again.sizes, again.pair, again.shift) == ((5, 6, 7), (1.0, "x"), -2.5)
