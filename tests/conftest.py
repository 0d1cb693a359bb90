import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side take a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def one_process_after_another():
    """Puts back what a run changes for its whole process, and ends those that were started.

    Noise is the same in each test.
    """
    import torch
    from helpers.processes import end_all
    from helpers.runs import kept_process

    torch.manual_seed(0)
    with kept_process():
        yield
    end_all()


@pytest.fixture(scope="module", params=["dreamerv1.py", "dreamerv2.py"])
def script(request):
    return request.param


@pytest.fixture
def no_estimate(monkeypatch):
    """A run does not time an update of a copy of its agent: all updates are its own."""
    import runtime

    monkeypatch.setattr(runtime, "print_estimate", lambda *inputs: None)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory of one's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_noise(monkeypatch):
    """One-hot samples are the likeliest class and Gaussian ones the mean, with their gradients."""
    import torch

    def mean(self, shape=()):
        return self.loc.expand(*shape, *self.loc.shape)

    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    monkeypatch.setattr(torch.distributions.Normal, "rsample", mean)


@pytest.fixture
def smooth(no_noise, monkeypatch):
    """As no_noise, but one-hot samples are the probabilities: no small change flips a class."""
    from helpers.agents import SCRIPTS

    for script in SCRIPTS.values():
        monkeypatch.setattr(script.OneHot, "rsample", lambda self: self.probs)
