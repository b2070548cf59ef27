"""Votes of a base classifier on noisy copies of images: the engine under certification, prediction and verdicts."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rush.engine.forward import Forward
from rush.errors import ModelError
from rush.noise import Gaussian
from rush.options import BLOCK


class Request(NamedTuple):
    """One block of noise on one image: ``pixels`` (C, H, W) float32 and ``generator`` on the engine's device; the first
    ``rows`` <= 100 copies vote."""

    pixels: Tensor
    generator: torch.Generator
    rows: int = BLOCK


class Voter:
    """Counts votes in full tiles, whatever images and blocks come.

    Noise is drawn by whole blocks, added in float32 and never clipped. A tile that a launch leaves unfinished is filled
    by the next one, and padded only where votes in it are read before. Nothing waits for the device until votes are
    read, and memory does not grow with the number of requests.
    """

    def __init__(self, forward: Forward, noise: Gaussian, num_classes: int, device: str, tile: int) -> None:
        self._forward, self._noise = forward, noise
        self._num_classes, self._device, self._rows = num_classes, device, tile
        self._tile = self._block = torch.empty(0)
        self._places = torch.empty(0, dtype=torch.int64)
        self._filled = 0
        self._owners: list[tuple[PendingVotes, int]] = []  # launches in the tile, each with its first row

    def launch(self, requests: Iterable[Request], count: int) -> "PendingVotes":
        """Begin to count the votes of ``count`` requests; each advances its generator by one block.

        Raises: ModelError like ``Forward``.
        """
        pending = PendingVotes(self, count, self._num_classes, self._device)
        for slot, request in enumerate(requests):
            rows = self._noisy(request)[: request.rows]
            pending.waiting += len(rows)
            while len(rows):
                taken = min(len(rows), self._rows - self._filled)
                if not self._owners or self._owners[-1][0] is not pending:
                    self._owners.append((pending, self._filled))
                self._tile[self._filled : self._filled + taken] = rows[:taken]
                self._places[self._filled : self._filled + taken] = slot * self._num_classes
                self._filled, rows = self._filled + taken, rows[taken:]
                if self._filled == self._rows:
                    self._count()
        pending.close()
        return pending

    def flush(self) -> None:
        """Count the unfinished tile, padded with its first row."""
        if self._filled:
            self._tile[self._filled :] = self._tile[0].clone()
            self._count()

    def _noisy(self, request: Request) -> Tensor:
        shape = request.pixels.shape
        if self._block.shape[1:] != shape:
            self.flush()
            self._block = torch.empty(BLOCK, *shape, device=self._device)
            self._tile = torch.empty(self._rows, *shape, device=self._device)
            self._places = torch.empty(self._rows, dtype=torch.int64, device=self._device)
        return self._noise.fill(self._block, request.generator).add_(request.pixels)

    def _count(self) -> None:
        """Give each launch in the tile the votes of its rows."""
        filled, owners = self._filled, self._owners
        self._filled, self._owners = 0, []  # also where the forward fails: what it refused is not tried again
        logits = self._forward(self._tile)
        voted, finite = self._places + logits.argmax(1), logits.isfinite().all(1)
        ends = [first for _, first in owners[1:]] + [filled]
        for (pending, first), last in zip(owners, ends, strict=True):
            pending.add(voted[first:last], finite[first:last])


class PendingVotes:
    """Votes of one launch that the device may still be counting, or whose last rows wait for a full tile."""

    def __init__(self, voter: Voter, count: int, num_classes: int, device: str) -> None:
        self.waiting = 0  # rows that are not counted yet
        self._voter, self._shape, self._closed = voter, (count, num_classes), False
        self._votes = torch.zeros(count * num_classes, dtype=torch.int64, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._ready = torch.cuda.Event() if self._votes.is_cuda else None

    def add(self, places: Tensor, finite: Tensor) -> None:
        """Count one vote at each of ``places`` (rows,), request x K + class, if ``finite`` (rows,) holds everywhere."""
        self._votes.index_add_(0, places, torch.ones_like(places))
        self._finite &= finite.all()
        self.waiting -= len(places)
        self._fetch_if_complete()

    def close(self) -> None:
        """No more rows will come."""
        self._closed = True
        self._fetch_if_complete()

    def result(self) -> Tensor:
        """int64 (count, K) on the CPU; waits for the device. Raises: ModelError where logits were not finite."""
        if self.waiting:
            self._voter.flush()
        if self._ready is not None:
            self._ready.synchronize()
        if not bool(self._finite):
            raise ModelError("the classifier gave logits that are not finite; such a vote has no class")
        return self._votes.view(self._shape).cpu()

    def _fetch_if_complete(self) -> None:
        """Copy behind the work just queued, not behind what is queued later."""
        if self._closed and self.waiting == 0 and self._ready is not None:
            self._votes = self._votes.to("cpu", non_blocking=True)
            self._finite = self._finite.to("cpu", non_blocking=True)
            self._ready.record()
