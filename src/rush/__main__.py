"""``rush`` and ``python -m rush``."""

import os
import sys


def main() -> None:
    """Run the command line; an error of the user's is one clear line on standard error and exit status 1."""
    from rush.cli import app, several_processes
    from rush.errors import Interrupted, RushError
    from rush.lines import printable

    try:
        if several_processes():
            from rush.engine.distributed import joined_processes

            with joined_processes():
                app()
        else:
            app()
    except Interrupted as stop:
        sys.stderr.write(f"rush: {printable(str(stop))}\n")
        sys.exit(stop.status)
    except RushError as error:
        sys.stderr.write(f"rush: {printable(str(error))}\n")
        sys.exit(1)
    except OSError as error:
        sys.stderr.write(f"rush: {printable(_system_said(error))}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("rush: stopped; the same command goes on from here\n")
        sys.exit(130)


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
