"""A stand-in for a CUDA graph: the operations of a step are kept with their memory and repeated without its Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Operations:
    """Repeats on the CPU what a captured graph repeats: every operation, on the tensors that it had, in order.

    Whatever Python decided or computed at the capture stays as it was, e.g. numbers that should have changed. Recording
    does the step, so that the first replay behind it has nothing to do.
    """

    def __init__(self) -> None:
        self.made: list[tuple[Any, Any, Any, Any]] = []
        self.replayed = 0
        self._done = False

    def plain(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def record(self, function: Callable[[], Tensor]) -> None:
        with _Noted(self.made):
            self._result = function()
        self._done = True

    @torch.no_grad()
    def replay(self) -> Tensor:
        self.replayed += 1
        if self._done:
            self._done = False
            return self._result
        for operation, args, kwargs, results in self.made:
            if operation.overloadpacket.__name__ in _UNWRITTEN:
                continue
            again = operation(*args, **kwargs)
            for before, now in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(before, Tensor) and _storage(before) != _storage(now):
                    before.copy_(now)
        return self._result


class _Noted(TorchDispatchMode):
    def __init__(self, made: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self._made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            raise RuntimeError("operation not permitted when stream is capturing: a value is read")
        results = func(*args, **(kwargs or {}))
        self._made.append((func, args, kwargs or {}, results))
        return results


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
