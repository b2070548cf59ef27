"""Numbers that follow the epoch, also in a step that is captured once and replayed."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from rush.errors import ConfigError

_TURN_OFF = 'set execution.compile_training = "none"'


def scheduled(function: Callable[[float], float], epoch: float) -> float | Tensor:
    """Return ``function(epoch)``, for a number that follows the epoch.

    In a captured step (``rush.training.graphs``) it is a float64 tensor without axes, which is filled anew before every
    replay: arithmetic on it rounds like that of numbers. It must not decide which operations are made, nor be read.
    """
    return epoch.follow(function) if isinstance(epoch, FollowedEpoch) else function(epoch)


class FollowedEpoch(float):
    """The epoch of a captured step: numbers follow it by ``follow``; as a number itself it cannot be used."""

    closed: bool
    _device: str
    _values: list[tuple[Callable[[float], float], Tensor]]
    _next: int
    _now: float

    def __new__(cls, device: str) -> "FollowedEpoch":
        epoch = super().__new__(cls, 0.0)
        epoch.closed, epoch._device, epoch._values = False, device, []
        epoch._next, epoch._now = 0, 0.0
        return epoch

    def fill(self, epoch: float) -> None:
        """Write what the numbers are at ``epoch`` into their tensors; the next step asks for the first of them."""
        self._next, self._now = 0, epoch
        for function, value in self._values:
            value.fill_(function(epoch))

    def follow(self, function: Callable[[float], float]) -> Tensor:
        """The tensor of the next number in the order in which the step asks for them."""
        if self._next == len(self._values):
            if self.closed:
                raise ConfigError(f"the training step asks for other numbers than before; {_TURN_OFF}")
            value = torch.full((), function(self._now), dtype=torch.float64, device=self._device)
            self._values.append((function, value))
        self._next += 1
        return self._values[self._next - 1][1]

    def _refuse(self, *_: Any) -> NoReturn:
        raise ConfigError(
            "what the training step does depends on the epoch, so that one capture does not hold for all of them; "
            f"{_TURN_OFF}, or give the number by rush.runtime.schedules.scheduled"
        )

    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __float__ = __index__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __round__ = __floor__ = __ceil__ = __trunc__ = __floordiv__ = __mod__ = __pow__ = __neg__ = _refuse
