import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side take a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def one_process_after_another(monkeypatch):
    """Puts back what a run changes for its whole process; noise is the same in each test."""
    import torch

    import runtime

    torch.manual_seed(0)
    monkeypatch.setattr(runtime, "STARTED_IN", None)
    streams = sys.stdout, sys.stderr
    yield
    sys.stdout, sys.stderr = streams


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
