"""``rush`` and ``python -m rush``."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

_TRACEBACK = "--traceback"
_QUIET, _VERBOSE = ("-q", "--quiet"), ("-v", "--verbose")
_EVERY, _OFTEN = 60.0, 10.0  # seconds between lines of progress where there is no terminal


def main() -> None:
    """Run the command line. An error ends it with one line on standard error and exit status 1.

    With ``--traceback`` anywhere on the command line, or RUSH_TRACEBACK=1 in the environment, the traceback is printed
    before the line. With ``-q`` or ``--quiet`` nothing but results and errors is printed. With ``-v`` or ``--verbose``
    progress is printed more often.
    """
    from rush.errors import Interrupted, RushError

    show_traceback = _taken(_TRACEBACK) or os.environ.get("RUSH_TRACEBACK", "0") not in ("", "0")
    quiet, verbose = _taken(*_QUIET), _taken(*_VERBOSE)
    _show_own_warnings_in_one_line()
    try:
        from rush.commands.app import app

        if sys.argv[1:2] in ([], ["--help"], ["-h"]):
            app.resolved_commands()  # the list of commands consists of their docstrings
        with _processes(), _progress(quiet, verbose):
            app()
    except Interrupted as stop:
        _fail(str(stop), show_traceback, stop.status)
    except RushError as error:
        _fail(str(error), show_traceback)
    except OSError as error:
        _fail(_system_message(error), show_traceback)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to resume", show_traceback, 130)
    except Exception as error:
        _fail(_memory_message(error) or _unexpected(error, show_traceback), show_traceback)


def _processes() -> AbstractContextManager[None]:
    """Return the context in which the processes that torchrun started are connected; torch is imported for several."""
    from rush.commands.run_folders import several_processes

    if not several_processes():
        return nullcontext()
    from rush.runtime.distributed import joined_processes

    return joined_processes()


def _progress(quiet: bool, verbose: bool) -> AbstractContextManager[None]:
    """Return the context in which progress is shown as asked for."""
    from rush.commands import terminal
    from rush.runtime.progress import NOTHING, Shown, showing

    terminal.quiet = quiet
    return showing(NOTHING if quiet else Shown(every=_OFTEN if verbose else _EVERY))


def _taken(*options: str) -> bool:
    """Return whether one of these is on the command line, and remove them, as no command has them."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word not in options]
    sys.argv[1:] = [*kept, *words[end:]]
    return len(kept) < end


def _show_own_warnings_in_one_line() -> None:
    """Print warnings of this library in one line, without the place in its code that raised them."""
    import warnings

    from rush.errors import RushWarning
    from rush.runtime.lines import printable

    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **where: Any) -> None:
        if issubclass(category, RushWarning):
            sys.stderr.write(f"rush: warning: {printable(str(message))}\n")
        else:
            shown(message, category, *place, **where)

    warnings.showwarning = show


def _memory_message(error: Exception) -> str | None:
    """Return the message for a device that is out of memory, or None for any other error."""
    if "torch" not in sys.modules:
        return None
    from rush.runtime.memory import JUDGED, is_out_of_memory, memory_error

    return str(memory_error("stopped", JUDGED, error)) if is_out_of_memory(error) else None


def _unexpected(error: Exception, traceback_shown: bool) -> str:
    """Return the message for an error that no part of this library raises on purpose."""
    text = " ".join(str(error).split())
    more = "" if traceback_shown else f", which {_TRACEBACK} shows"
    return (
        f"internal error: {type(error).__name__}{': ' if text else ''}{text}; this should not happen: please report it "
        f"with the command and the traceback{more}"
    )


def _fail(text: str, show_traceback: bool, status: int = 1) -> NoReturn:
    """Print the error that is being handled and exit."""
    from rush.runtime.lines import printable

    if show_traceback:
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"rush: {printable(text)}\n")
    sys.exit(status)


def _system_message(error: OSError) -> str:
    """Return the message for an error of the operating system that no other part of the library has described."""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}; fix this and run the same command again to resume"
    try:
        sys.stdout.flush()
    except OSError:  # buffered output would be written again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return f"the output cannot be written: {error.strerror or error}; results computed so far are kept"


if __name__ == "__main__":
    main()
