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
    """Puts back what a run changes for its whole process."""
    import runtime

    monkeypatch.setattr(runtime, "STARTED_IN", None)
    streams = sys.stdout, sys.stderr
    yield
    sys.stdout, sys.stderr = streams
