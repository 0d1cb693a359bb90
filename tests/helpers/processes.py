"""Scripts as processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent.parent
started = []


def start(script, flags, cwd, root=ROOT, torchrun="", **options):
    """A script in a process of its own, which finds modules of environments in `cwd` and here.

    torchrun: its flags, if it is to start the script; options: of subprocess.Popen.
    """
    path = os.pathsep.join([str(cwd), str(ROOT / "tests")])
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    launcher = ["-m", "torch.distributed.run", *torchrun.split()] if torchrun else []
    command = [sys.executable, *launcher, str(root / script), *flags.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started.append(subprocess.Popen(command, cwd=cwd, env=environ, **pipes | options))
    return started[-1]


def end_all():
    """Ends what a test that fails leaves behind; torchrun ends its own processes."""
    while started:
        process = started.pop()
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=40)  # torchrun gives its own 30 s
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def finish(process, code=0, timeout=300):
    """Waits for the process -> its out and err, in which a traceback may not be.

    What takes longer is left to end_all.
    """
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, err
    if "torch.distributed.run" not in process.args:  # which shows one when a process fails
        assert "Traceback" not in out + err
    return SimpleNamespace(out=out, err=err)


def wait_until(ready, seconds=300):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not ready within {seconds} s"
        time.sleep(0.05)


def has_logged(cwd, text):
    """Whether the log of any run there has the text."""
    return any(text in path.read_text() for path in Path(cwd).glob("runs/*/metrics.jsonl"))
