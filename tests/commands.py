"""What tests of the command line share: a call within this process, and the line of a refusal."""

import subprocess
from collections.abc import Callable

Call = Callable[..., subprocess.CompletedProcess[str]]


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line with which a command was refused, the last on standard error."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("rush: ")
    return line
