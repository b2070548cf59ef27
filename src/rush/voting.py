"""Votes of a base classifier on noisy copies of images: the engine under certification, prediction and verdicts."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rush.engine.forward import Forward
from rush.errors import ModelError
from rush.noise import Gaussian

BLOCK = 100  # noise samples that are drawn together, and the unit in which votes are stored


class Request(NamedTuple):
    """One block of noise on one image: ``pixels`` (C, H, W) float32 and ``generator`` on the engine's device; the first
    ``rows`` <= 100 copies vote."""

    pixels: Tensor
    generator: torch.Generator
    rows: int = BLOCK


class Voter:
    """Counts votes in full tiles, whatever images and blocks come.

    Noise is drawn by whole blocks, added in float32 and never clipped. Nothing waits for the device until the counts
    are read, and memory does not grow with the number of requests.
    """

    def __init__(self, forward: Forward, noise: Gaussian, num_classes: int, device: str, tile: int) -> None:
        self._forward, self._noise = forward, noise
        self._num_classes, self._device, self._rows = num_classes, device, tile
        self._tile = self._block = torch.empty(0)
        self._slots = torch.empty(0, dtype=torch.int64)

    def launch(self, requests: Iterable[Request], count: int) -> "PendingVotes":
        """Begin to count the votes of ``count`` requests; each advances its generator by one block.

        Raises: ModelError like ``Forward``.
        """
        votes = torch.zeros(count * self._num_classes, dtype=torch.int64, device=self._device)
        finite = torch.ones((), dtype=torch.bool, device=self._device)
        filled = 0
        for slot, request in enumerate(requests):
            rows = self._noisy(request)[: request.rows]
            while len(rows):
                taken = min(len(rows), self._rows - filled)
                self._tile[filled : filled + taken] = rows[:taken]
                self._slots[filled : filled + taken] = slot
                filled, rows = filled + taken, rows[taken:]
                if filled == self._rows:
                    finite &= self._count(votes, filled)
                    filled = 0
        if filled:
            self._tile[filled:] = self._tile[0].clone()
            finite &= self._count(votes, filled)
        return PendingVotes(votes.view(count, self._num_classes), finite)

    def _noisy(self, request: Request) -> Tensor:
        shape = request.pixels.shape
        if self._block.shape[1:] != shape:
            self._block = torch.empty(BLOCK, *shape, device=self._device)
            self._tile = torch.empty(self._rows, *shape, device=self._device)
            self._slots = torch.empty(self._rows, dtype=torch.int64, device=self._device)
        return self._noise.fill(self._block, request.generator).add_(request.pixels)

    def _count(self, votes: Tensor, rows: int) -> Tensor:
        """Add the votes of the tile's first ``rows``; whether all their logits are finite."""
        logits = self._forward(self._tile)[:rows]
        places = self._slots[:rows] * self._num_classes + logits.argmax(1)
        votes.index_add_(0, places, torch.ones_like(places))
        return logits.isfinite().all()


class PendingVotes:
    """Votes that the device may still be counting."""

    def __init__(self, votes: Tensor, finite: Tensor) -> None:
        self._votes, self._finite = votes, finite
        self._ready = torch.cuda.Event() if votes.is_cuda else None
        if self._ready is not None:  # copied behind the work just queued, not behind what is queued later
            self._votes = votes.to("cpu", non_blocking=True)
            self._finite = finite.to("cpu", non_blocking=True)
            self._ready.record()

    def result(self) -> Tensor:
        """int64 (count, K) on the CPU; waits for the device. Raises: ModelError where logits were not finite."""
        if self._ready is not None:
            self._ready.synchronize()
        if not bool(self._finite):
            raise ModelError("the classifier gave logits that are not finite; such a vote has no class")
        return self._votes.cpu()
