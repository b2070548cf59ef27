"""Copies between host and device that do not wait for running work."""

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device | str) -> Tensor:
    """Return ``values`` on ``device``.

    A copy to a CUDA device goes through pinned memory and is queued. From pageable memory it would wait for all work
    that was queued before it.
    """
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class HostCopy:
    """Copies of tensors that are being transferred to the host.

    They hold the values of the tensors after the work that is queued now. From a CUDA device the copies are enqueued
    into pinned memory, and nothing waits. From any other device they are made at once.

    Args:
        values: tensors, on the host or on one other device.
    """

    def __init__(self, *values: Tensor) -> None:
        queued = [value.device for value in values if value.is_cuda]
        self._copies = [value.detach().to("cpu", non_blocking=value.is_cuda, copy=True) for value in values]
        self._made = torch.cuda.Event() if queued else None
        if self._made is not None:
            self._made.record(torch.cuda.current_stream(queued[0]))

    def read(self) -> list[Tensor]:
        """Return the copies, after waiting for the work that was queued before them but not for later work."""
        if self._made is not None:
            self._made.synchronize()
        return self._copies
