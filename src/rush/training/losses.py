"""Losses of an epoch, stored on the device and inspected some steps late."""

import torch
from torch import Tensor

from rush.runtime.transfer import HostCopy


class Losses:
    """The losses of the current epoch, in one tensor on the device.

    ``exchange`` reads what the call before it sent to the host. By then the device has long computed it, so that no
    step waits for the device.

    Args:
        capacity: most losses of an epoch.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._losses = torch.empty(0)
        self._count = self._sent = 0
        self._coming: HostCopy | None = None
        self._first = 0  # position in the epoch of the first loss that is being sent

    def add(self, loss: Tensor) -> None:
        """Store a copy of the scalar ``loss`` of the next step."""
        if not self._count:
            self._losses = loss.new_empty(self._capacity)
        self._losses[self._count].copy_(loss.detach())
        self._count += 1

    def values(self) -> Tensor:
        """Return the losses so far, (n,), on their device."""
        return self._losses[: self._count]

    def exchange(self, flag: Tensor) -> tuple[int, Tensor, Tensor] | None:
        """Send the losses since the last call to the host, with ``flag``, and return those that the last call sent.

        Returns:
            The position in the epoch of the first of these losses, the losses (n,) and the flag, both on the host. None
            at the first call.
        """
        before, first = self._coming, self._first
        self._first, self._coming = self._sent, HostCopy(self._losses[self._sent : self._count], flag)
        self._sent = self._count
        if before is None:
            return None
        losses, sent_flag = before.read()
        return first, losses, sent_flag

    def replace(self, values: Tensor) -> None:
        """Begin again with ``values`` (n,), the losses of a checkpoint within an epoch, or none for a new epoch."""
        self._count, self._sent, self._first, self._coming = len(values), 0, 0, None
        if len(values):
            self._losses = values.new_empty(self._capacity)
            self._losses[: len(values)].copy_(values)
