"""A call in a child process that may take a second gigabyte of memory and a minute, and no more."""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from rush.errors import RushError

ALLOWED = 1 << 30  # bytes beside what the process has when it starts
SECONDS = 60


def refused(context: ForkServerContext, function: Callable[..., Any], *arguments: Any) -> str:
    """Return the text of the error of this library that ``function(*arguments)`` raises within the bounds.

    Fails where it raises another error or none, is killed, or takes too long.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    child = context.Process(target=_call, args=(there, function, arguments))
    child.start()
    there.close()
    try:
        assert here.poll(SECONDS), f"no answer within {SECONDS} s"
        kind, text = here.recv()
    except EOFError:
        child.join()
        raise AssertionError(f"the process ended with exit code {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    assert kind == "refused", f"{kind}: {text}"
    return str(text)


def _call(answers: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ALLOWED, in_use + ALLOWED))
    try:
        result = function(*arguments)
    except RushError as error:
        answers.send(("refused", str(error)))
    except BaseException as error:
        answers.send((type(error).__name__, str(error)[:2000]))
    else:
        answers.send(("accepted", repr(result)[:2000]))
