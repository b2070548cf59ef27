"""Foreign decoders' exceptions on damaged files, turned into errors that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager

from rush.errors import DataError


@contextmanager
def name_damage(problem: str, remedy: str) -> Iterator[None]:
    """Turn every exception that is not a DataError into one: "``problem``: the exception's text; ``remedy``".

    Archives, images and pickles are parsed by libraries that may raise any exception on a damaged file.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{problem}: {error or type(error).__name__}; {remedy}") from error
