"""How a run ends: which errors take one line, and with which exit code."""

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
    with (
        pytest.raises(runtime.UserError, match=r"^no luck: ValueError: first second$"),
        runtime.explain("no luck", KeyError, ValueError),
    ):
        raise ValueError("first\n  second")
    with pytest.raises(ZeroDivisionError), runtime.explain("no luck", ValueError):
        _ = 1 / 0
