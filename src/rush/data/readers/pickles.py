"""Reader of the pickled dictionaries in CIFAR's Python version, which runs nothing that the file asks for."""

import io
import pickle
import pickletools
from typing import IO, Any

import numpy as np

from rush.data.readers.damage import name_damage
from rush.errors import DataError

_MOST_BYTES = 1 << 28
_MOST_OPCODES = 1 << 22  # CIFAR's largest file has a tenth of them
_MOST_TUPLES = 1000  # bounds the nesting of tuples, which hashing follows in C without its own limit
_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
"""
_ALLOWED = frozenset(_OPCODES.split())


def read_plain_pickle(file: IO[bytes], where: str) -> dict[str, Any]:
    """Read the dictionary in ``file``. Keys are returned as text, and byte arrays as uint8 NumPy arrays.

    Nothing named in the file is imported. The few names by which a pickle rebuilds a NumPy array stand for inert
    classes of this module, and every other name is refused before it is looked up. The whole file is checked before
    anything is built, so that what it can allocate is bounded by its length and some hundred megabytes.

    Raises:
        DataError: the file, named by ``where``, names something else, is truncated, or does not hold a dictionary.
    """
    stored = file.read(_MOST_BYTES + 1)
    with name_damage(f"{where} is damaged or truncated", "delete it and get it again"):
        _check_opcodes(stored)
        content = _PlainUnpickler(stored, where).load()
        if isinstance(content, dict):
            return {_key(key): value.array if isinstance(value, _Array) else value for key, value in content.items()}
    raise DataError(
        f"{where} holds a {type(content).__name__}, expected a dictionary; it is not an official file: get it again"
    )


def _check_opcodes(stored: bytes) -> None:
    """Raise ValueError for a pickle that is too long, or has opcodes that plain content does not need."""
    if len(stored) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    tuples = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stored)):
        if opcode.name not in _ALLOWED or number >= _MOST_OPCODES:
            raise ValueError(f"opcode {opcode.name}, number {number}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= number + _MOST_TUPLES:
            raise ValueError(f"place {argument} of the memo")
        tuples += opcode.name.startswith("TUPLE")
        if tuples > _MOST_TUPLES:
            raise ValueError(f"more than {_MOST_TUPLES} tuples")


def _key(key: object) -> str:
    if not isinstance(key, str | bytes):
        raise ValueError(f"a key is a {type(key).__name__}, expected text")
    return _text(key)


class _Prototype:
    """A stand-in for numpy.ndarray, which is named but never created."""


class _Dtype:
    """A stand-in for numpy.dtype that keeps the name it is built with and ignores its state."""

    def __init__(self, name: str | bytes, *_flags: object) -> None:
        self.name = _text(name)

    def __setstate__(self, _state: object) -> None:
        pass


class _Array:
    """A stand-in for the array that numpy's _reconstruct creates, filled from the pickled state of a uint8 array."""

    array: np.ndarray

    def __init__(self, *_prototype: object) -> None:
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _version, shape, dtype, fortran, raw = state
        if dtype.name not in ("u1", "uint8"):
            raise ValueError(f"array of {dtype.name}, expected uint8")
        self.array = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _latin1(text: str, encoding: str) -> bytes:
    """Stand in for _codecs.encode, with which Python 3 writes bytes in protocol 2."""
    if encoding not in ("latin1", b"latin1"):
        raise ValueError(f"text encoded as {encoding!r}, expected latin1")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that resolves the names of a pickled NumPy array to the classes above and refuses every other name."""

    def __init__(self, stored: bytes, where: str) -> None:
        super().__init__(io.BytesIO(stored), encoding="bytes")
        self._where = where

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
        raise DataError(
            f"{self._where} asks for {module}.{name}, which may run code; it is not an official file: delete it and "
            "get it again"
        )


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
