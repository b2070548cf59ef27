"""Numbers that depend on the epoch, even in a training step that is captured once and replayed."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from rush.errors import ConfigError

TURN_OFF = 'set execution.compile_training = "none"'
"""The remedy where a step cannot be captured."""


def scheduled(function: Callable[[float], float], epoch: float) -> float | Tensor:
    """Return ``function(epoch)``, for a number that depends on the epoch.

    In a captured step (``rush.training.graphs``) it is a 0-d float64 tensor that is refilled before every replay.
    Arithmetic on it rounds like arithmetic on floats. It must not be read, nor decide which operations run.
    """
    return epoch.follow(function) if isinstance(epoch, FollowedEpoch) else function(epoch)


class FollowedEpoch(float):
    """The epoch of a captured step: ``follow`` gives tensors that depend on it, and using it as a number raises."""

    def __new__(cls, _device: str) -> "FollowedEpoch":
        return super().__new__(cls)

    def __init__(self, device: str) -> None:
        self.closed = False
        self._device = device
        self._values: list[tuple[Callable[[float], float], Tensor]] = []
        self._next, self._now = 0, 0.0

    def fill(self, epoch: float) -> None:
        """Write the values at ``epoch`` into all tensors, and let the next step start at the first of them."""
        self._next, self._now = 0, epoch
        for function, value in self._values:
            value.fill_(function(epoch))

    def follow(self, function: Callable[[float], float]) -> Tensor:
        """Return the tensor of the next number, in the order in which the step requests them."""
        if self._next == len(self._values):
            if self.closed:
                raise ConfigError(f"the training step requests different numbers than before; {TURN_OFF}")
            value = torch.full((), function(self._now), dtype=torch.float64, device=self._device)
            self._values.append((function, value))
        self._next += 1
        return self._values[self._next - 1][1]

    def _refuse(self, *_: Any) -> NoReturn:
        raise ConfigError(
            "the operations of the training step depend on the epoch, so that one capture cannot serve all epochs; "
            f"{TURN_OFF}, or obtain the number from rush.runtime.schedules.scheduled"
        )

    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __float__ = __index__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __round__ = __floor__ = __ceil__ = __trunc__ = __floordiv__ = __mod__ = __pow__ = __neg__ = _refuse
