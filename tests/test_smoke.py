"""benchmarks/smoke.py tells a script that learns from one that does not."""

import shutil

import pytest
import smoke
from helpers.processes import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dreamerv2.py", "dreamerv3.py"])
def test_a_script_that_learns_passes(script, capfd):
    assert smoke.main([str(ROOT / script)]) == 0
    assert f"{script} learned: the best is " in capfd.readouterr().out


@pytest.mark.slow
def test_a_script_whose_actor_has_a_loss_of_the_wrong_sign_fails(tmp_path, capfd):
    text = (ROOT / "dreamerv2.py").read_text()
    assert text.count("actor_loss = -(") == 1
    (tmp_path / "mine.py").write_text(text.replace("actor_loss = -(", "actor_loss = ("))
    for name in ("common.py", "runtime.py"):
        shutil.copy(ROOT / name, tmp_path)
    assert smoke.main([str(tmp_path / "mine.py")]) == 1
    assert "mine.py has NOT learned: the best is " in capfd.readouterr().out


def test_the_exit_code_of_a_script_that_ends_early_is_passed_on(capfd):
    assert smoke.main([str(ROOT / "dreamerv2.py"), "--", "--gamma", "2"]) == 2
    out, err = capfd.readouterr()
    assert "error: --gamma is 2.0" in err
    assert "dreamerv2.py ended with exit code 2" in out
