"""``rush`` and ``python -m rush``."""

import os
import sys
from typing import Any

_TRACEBACK = "--traceback"


def main() -> None:
    """Run the command line; whatever goes wrong is one clear line on standard error and exit status 1.

    With ``--traceback`` anywhere on the command line, or RUSH_TRACEBACK=1 in the environment, the traceback comes
    before the line.
    """
    from rush.errors import Interrupted, RushError

    wanted = _take_traceback()
    _show_own_warnings_in_one_line()
    try:
        _run()
    except Interrupted as stop:
        _say(str(stop), wanted)
        sys.exit(stop.status)
    except RushError as error:
        _say(str(error), wanted)
        sys.exit(1)
    except OSError as error:
        _say(_system_said(error), wanted)
        sys.exit(1)
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to resume", wanted)
        sys.exit(130)
    except Exception as error:
        _say(_memory_said(error) or _unexpected(error, wanted), wanted)
        sys.exit(1)


def _run() -> None:
    from rush.commands.app import app, several_processes

    if several_processes():
        from rush.runtime.distributed import joined_processes

        with joined_processes():
            app()
    else:
        app()


def _take_traceback() -> bool:
    """Whether a traceback is wanted; the option is taken off the command line, whose commands do not know it."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != _TRACEBACK]
    sys.argv[1:] = [*kept, *words[end:]]
    return len(kept) < end or os.environ.get("RUSH_TRACEBACK", "0") not in ("", "0")


def _show_own_warnings_in_one_line() -> None:
    """Print warnings of this library without the place in its code that raised them."""
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


def _memory_said(error: Exception) -> str | None:
    """What to say of a device that is out of memory; None of any other error."""
    if "torch" not in sys.modules:
        return None
    from rush.runtime.memory import JUDGED, is_out_of_memory, memory_error

    return str(memory_error("stopped", JUDGED, error)) if is_out_of_memory(error) else None


def _unexpected(error: Exception, traceback_shown: bool) -> str:
    """What to say of an error that no part of this library raises on purpose."""
    said = " ".join(str(error).split())
    more = "" if traceback_shown else f", which {_TRACEBACK} shows"
    return (
        f"internal error: {type(error).__name__}{': ' if said else ''}{said}; this should not happen: please report it "
        f"with the command and the traceback{more}"
    )


def _say(text: str, traceback_wanted: bool) -> None:
    from rush.runtime.lines import printable

    if traceback_wanted:
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"rush: {printable(text)}\n")


def _system_said(error: OSError) -> str:
    """What to say where the system refuses something that no other part of the library has put into words."""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}; the same command resumes once this is mended"
    try:
        sys.stdout.flush()
    except OSError:  # what is still to be printed would be tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return f"the output cannot be written: {error.strerror or error}; what was computed is kept"


if __name__ == "__main__":
    main()
