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
    """Puts back what a run changes for its whole process, and ends those that were started."""
    from helpers.processes import end_all
    from helpers.runs import kept_process

    with kept_process():
        yield
    end_all()


@pytest.fixture(scope="module", params=["dreamerv1.py", "dreamerv2.py"])
def script(request):
    return request.param


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory of one's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
