"""Scripts as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(script, flags, cwd, root=ROOT, torchrun=""):
    """A script in a process of its own, which finds modules of environments in `cwd`.

    torchrun: its flags, if it is to start the script.
    """
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    launcher = ["-m", "torch.distributed.run", *torchrun.split()] if torchrun else []
    command = [sys.executable, *launcher, str(root / script), *flags.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environ, **pipes)
