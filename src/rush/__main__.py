"""``rush`` and ``python -m rush``."""

import sys


def main() -> None:
    """Run the command line; an error of the user's is one clear line on standard error and exit status 1."""
    from rush.cli import app, several_processes
    from rush.errors import Interrupted, RushError

    try:
        if several_processes():
            from rush.engine.distributed import joined_processes

            with joined_processes():
                app()
        else:
            app()
    except Interrupted as stop:
        sys.stderr.write(f"rush: {stop}\n")
        sys.exit(stop.status)
    except RushError as error:
        sys.stderr.write(f"rush: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("rush: stopped; the same command goes on from here\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
