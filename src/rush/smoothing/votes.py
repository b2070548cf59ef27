"""The votes of a base classifier on noisy copies of images, for certification, prediction and verdicts."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rush.choices import BLOCK
from rush.errors import ModelError
from rush.runtime.execution import Execution
from rush.runtime.transfer import HostCopy
from rush.smoothing.forward import Forward
from rush.smoothing.inspection import NOT_FINITE, SENTINEL_MOVED, Sentinel
from rush.smoothing.noise import Noise

_SENTINEL_TILE = 16  # rows: in a smaller tile one row that does not vote would cost more than it is worth


def voting_rows(tile: int) -> int:
    """Return the rows of a tile that vote: all, less one for the sentinel in a tile of 16 rows or more."""
    return tile - 1 if tile >= _SENTINEL_TILE else tile


class VoteRequest(NamedTuple):
    """One block of noise on one image.

    Attributes:
        pixels: (C, H, W) float32, on the engine's device.
        generator: generator of the noise, on the engine's device. It advances by one block.
        rows: number of copies that vote, at most 100. They are the first ones of the block.
    """

    pixels: Tensor
    generator: torch.Generator
    rows: int = BLOCK


class VoteCounter:
    """A counter of votes that fills whole tiles, whatever images and blocks are requested.

    Noise is drawn and added in whole blocks, and never clipped. A launch continues the tile that the previous
    one left unfinished. A tile is padded only if votes in it are read before it is full. The host waits for the device
    only when votes are read, and memory does not grow with the number of requests.

    The last row of a tile of 16 rows or more does not vote. It always holds the same noisy image, whose logits show in
    every tile whether the forward still computes each image separately.
    """

    def __init__(self, forward: Forward, noise: Noise, num_classes: int, execution: Execution) -> None:
        self._forward, self._noise, self._num_classes = forward, noise, num_classes
        self._execution, self._device = execution, execution.device
        self._rows = 0  # rows of the tile that vote
        self._sentinel: Sentinel | None = None
        self._tile = self._block = torch.empty(0)
        self._places = torch.empty(0, dtype=torch.int64)
        self._filled = 0
        self._owners: list[tuple[PendingVotes, int]] = []  # launches in the tile, each with its first row

    def launch(self, requests: Iterable[VoteRequest], count: int) -> "PendingVotes":
        """Start counting the votes of ``count`` requests. Raises: ModelError as ``Forward``."""
        pending = PendingVotes(self, count, self._num_classes, self._device)
        for slot, request in enumerate(requests):
            rows = self._noisy(request)[: request.rows]  # (r, C, H, W), valid until the next request
            pending.waiting += len(rows)
            while len(rows):
                taken = min(len(rows), self._rows - self._filled)
                if not self._owners or self._owners[-1][0] is not pending:
                    self._owners.append((pending, self._filled))
                self._tile[self._filled : self._filled + taken] = rows[:taken]
                self._places[self._filled : self._filled + taken] = slot * self._num_classes  # + class: slot's count
                self._filled, rows = self._filled + taken, rows[taken:]
                if self._filled == self._rows:
                    self._count()
        pending.close()
        return pending

    def flush(self) -> None:
        """Count the unfinished tile, padded with copies of its first row."""
        if self._filled:
            self._tile[self._filled : self._rows] = self._tile[0].clone()
            self._count()

    def _noisy(self, request: VoteRequest) -> Tensor:
        shape = request.pixels.shape
        if self._block.shape[1:] != shape:
            self.flush()
            self._block = torch.empty(BLOCK, *shape, device=self._device)
            rows = self._execution.rows(shape)
            self._rows = voting_rows(rows)
            self._tile = torch.empty(rows, *shape, device=self._device)
            self._places = torch.empty(self._rows, dtype=torch.int64, device=self._device)
            self._sentinel = None
        return self._noise.add(request.pixels, self._block, request.generator)

    def _count(self) -> None:
        """Compute the logits of the tile and add the votes of its rows to the launches that they belong to."""
        filled, owners = self._filled, self._owners
        self._filled, self._owners = 0, []  # also if the forward fails, so that a refused tile is not tried again
        logits = self._classified()
        unmoved = self._sentinel.unmoved(logits) if self._sentinel else None
        voting = logits[: self._rows]
        voted, finite = self._places + voting.argmax(1), voting.isfinite().all(1)
        ends = [first for _, first in owners[1:]] + [filled]
        for (pending, first), last in zip(owners, ends, strict=True):
            pending.add(voted[first:last], finite[first:last], unmoved)

    def _classified(self) -> Tensor:
        """Return the logits of the tile. The first tile of a shape defines the sentinel."""
        if self._rows == len(self._tile) or self._sentinel is not None:
            return self._forward(self._tile)
        self._tile[-1] = self._tile[0]
        logits = self._forward(self._tile)
        self._sentinel = Sentinel(logits, self._execution.precision)
        return logits


class PendingVotes:
    """Votes of one launch, which the device may still be counting or whose last rows may wait for a full tile."""

    def __init__(self, counter: VoteCounter, count: int, num_classes: int, device: str) -> None:
        self.waiting = 0  # rows that are not counted yet
        self._counter, self._shape, self._closed = counter, (count, num_classes), False
        self._votes = torch.zeros(count * num_classes, dtype=torch.int64, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._unmoved = torch.ones((), dtype=torch.bool, device=device)
        self._copies: HostCopy | None = None

    def add(self, places: Tensor, finite: Tensor, unmoved: Tensor | None) -> None:
        """Add one vote at each of ``places``.

        Args:
            places: int64 (rows,), request x K + class.
            finite: bool (rows,), whether the logits of each row are finite.
            unmoved: bool (), whether the tile's sentinel still has its first logits, or None without a sentinel.
        """
        self._votes.index_add_(0, places, torch.ones_like(places))
        self._finite &= finite.all()
        if unmoved is not None:
            self._unmoved &= unmoved
        self.waiting -= len(places)
        self._fetch_if_complete()

    def close(self) -> None:
        """Note that all rows of the launch have been placed."""
        self._closed = True
        self._fetch_if_complete()

    def result(self) -> Tensor:
        """Wait for the device and return the votes, int64 (count, K), on the CPU.

        Raises:
            ModelError: logits were not finite, or the sentinel's logits changed.
        """
        if self.waiting:
            self._counter.flush()
        assert self._copies is not None
        votes, finite, unmoved = self._copies.read()
        if not bool(finite):
            raise ModelError(NOT_FINITE)
        if not bool(unmoved):
            raise ModelError(SENTINEL_MOVED)
        return votes.view(self._shape)

    def _fetch_if_complete(self) -> None:
        """Enqueue the copy to the host right after the current work, ahead of any later launch."""
        if self._closed and self.waiting == 0:
            self._copies = HostCopy(self._votes, self._finite, self._unmoved)
