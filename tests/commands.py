"""What tests of the command line share: calls, within this process or in others, and the line of a refusal."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

Call = Callable[..., subprocess.CompletedProcess[str]]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "xterm"}
COMMAND = [sys.executable, "-m", "rush"]
# torchrun's own entry point, on a free port
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rush"]


def rush(*arguments: object, command: Sequence[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    """``rush`` in a process of its own."""
    words = [*command, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=200)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line with which a command was refused, the last on standard error."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("rush: ")
    return line
