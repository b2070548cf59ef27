"""The pickled dictionaries of CIFAR's Python version, read without running anything that the file asks for."""

import pickle
from typing import IO, Any

import numpy as np

from rush.errors import DataError


def read_plain_pickle(file: IO[bytes], where: str) -> dict[str, Any]:
    """The dictionary in ``file``, its keys as text; byte arrays come back as NumPy uint8 arrays.

    Nothing named in the file is imported: the few names by which a pickle rebuilds a NumPy array stand for inert
    classes of this module, and every other name is refused before it is looked up.
    Raises: DataError naming ``where`` for a refused name, a truncated file or anything but a dictionary.
    """
    try:
        content = _PlainUnpickler(file, encoding="bytes").load()
    except _Refused as error:
        raise DataError(
            f"{where} asks for {error}, which may run code; it is not an official file: delete it and get it again"
        ) from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise DataError(f"{where} is damaged or truncated ({error}); delete it and get it again") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{where} holds a {type(content).__name__}, expected a dictionary; it is not an official file: get it again"
        )
    return {_text(key): value.array if isinstance(value, _Array) else value for key, value in content.items()}


class _Refused(Exception):
    """A name that a plain pickle has no need of."""


class _Prototype:
    """Stands for numpy.ndarray, which is named but never made."""


class _Dtype:
    """Stands for numpy.dtype: remembers the name it is built with, ignores its state."""

    def __init__(self, name: str | bytes, *_flags: object) -> None:
        self.name = _text(name)

    def __setstate__(self, _state: object) -> None:
        pass


class _Array:
    """Stands for the array that numpy's _reconstruct begins: filled from the pickled state if that is a uint8 array."""

    array: np.ndarray

    def __init__(self, *_prototype: object) -> None:
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _version, shape, dtype, fortran, raw = state
        if dtype.name not in ("u1", "uint8"):
            raise ValueError(f"array of {dtype.name}, expected uint8")
        self.array = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for _codecs.encode, by which Python 3 writes bytes in protocol 2."""
    if encoding not in ("latin1", b"latin1"):
        raise ValueError(f"text encoded as {encoding!r}, expected latin1")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return _Array
            case ("numpy", "ndarray"):
                return _Prototype
            case ("numpy", "dtype"):
                return _Dtype
            case ("_codecs", "encode"):
                return _latin1
        raise _Refused(f"{module}.{name}")


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
