"""How a run ends: which errors take one line, and with which exit code."""

import re

import pytest
import torch

import runtime


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


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_ctrl_c_and_an_exit_are_silent_and_have_their_codes(capsys, error, code):
    with pytest.raises(SystemExit) as stop, runtime.exit_on_error():
        raise error
    assert stop.value.code == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [ZeroDivisionError, ValueError, RuntimeError, AssertionError])
def test_other_errors_keep_their_traceback(capsys, kind):
    error = kind("unexpected")
    with pytest.raises(kind) as raised, runtime.exit_on_error():
        raise error
    assert raised.value is error
    assert capsys.readouterr() == ("", "")


def test_an_error_can_be_explained_in_one_line():
    said = r"^no luck: ValueError: first second \(.*test_errors.py:\d+\)$"
    with (
        pytest.raises(runtime.UserError, match=said),
        runtime.explain("no luck", KeyError, ValueError),
    ):
        raise ValueError("first\n  second")
    with pytest.raises(ZeroDivisionError), runtime.explain("no luck", ValueError):
        _ = 1 / 0


@pytest.mark.parametrize(("error", "code", "said"), [
    (KeyboardInterrupt(), 130, r"^$"), (runtime.UserError("x"), 2, r"^error: x\n$"),
    (FloatingPointError("not finite"), 1, r"^error: not finite\n$"),
    (ValueError("unexpected"), 1, r"(?s)^Traceback.*ValueError: unexpected\n$"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["gpus", "cpus"])
def test_an_error_in_one_of_several_processes_on_gpus_ends_it_without_waiting(
    capsys, monkeypatch, error, code, said, where
):
    """nccl's orderly end would wait for graphs that the error keeps alive."""

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(runtime, "WORLD", 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: where == "gpus")
    monkeypatch.setattr(runtime.os, "_exit", end)
    with pytest.raises(Ended if where == "gpus" else SystemExit) as stop, runtime.exit_on_error():
        raise error
    assert stop.value.args == (code,)
    assert re.search(said, capsys.readouterr().err)
