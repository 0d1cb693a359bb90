"""Command lines that must be refused, and folders in which a run has begun."""

import contextlib
import dataclasses
import io
import warnings

import yaml
from helpers.runs import module_of, run
from hypothesis import settings


def outcome(script, flags, whole=True):
    """A command line in this process -> its exit code, what it says on stderr and on stdout."""
    err = io.StringIO()
    out = io.StringIO()
    with (
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(out),
        warnings.catch_warnings(action="ignore"),  # gymnasium's, of old versions
    ):
        code = run(script, flags, whole)
    return code, err.getvalue(), out.getvalue()


def refuse(script, flags, whole=True):
    """What the script says about a command line that it must refuse."""
    code, err, out = outcome(script, flags, whole)
    assert code == 2, err
    assert out == ""
    return err


def the_line(said):
    """The one line of an error, without the word error."""
    [line] = said.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def small_args(script, **changes):
    """What the args.yaml of a small run of the script holds."""
    module = module_of(script)
    args = dataclasses.asdict(module.Args()) | module.PRESETS["other"] | {"env_id": "CartPole-v1"}
    sizes = {"deter": 16, "hidden": 16, "units": 16, "stoch": 3, "cnn_depth": 2, "eval_episodes": 2}
    sizes |= {"batch_length": 7, "prefill": 200}  # V3 has no prefill
    return args | {k: v for k, v in sizes.items() if k in args} | {"exp_name": script[:9]} | changes


def write_args(folder, args):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(args))


def bounded(examples):
    """Hypothesis's settings for so many examples, the same ones each time."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)
