"""Logits of a stream of noisy images, where the votes alone do not suffice."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rush.choices import BLOCK
from rush.errors import ModelError
from rush.runtime.execution import Execution
from rush.smoothing.forward import Forward
from rush.smoothing.inspection import NOT_FINITE, SENTINEL_MOVED, Sentinel
from rush.smoothing.noise import Noise
from rush.smoothing.votes import voting_rows


def noisy_copies(pixels: Tensor, num_samples: int, noise: Noise, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield ``num_samples`` noisy copies of an image (C, H, W), at most 100 at once, as certification draws them.

    Each part (B, C, H, W) is valid until the next one is drawn. The generator advances by whole blocks of 100.
    """
    block = torch.empty(BLOCK, *pixels.shape, device=pixels.device)
    for start in range(0, num_samples, BLOCK):
        yield noise.add(pixels, block, generator)[: num_samples - start]


def outputs(forward: Forward, parts: Iterable[Tensor], execution: Execution) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows (R, C, H, W) and their outputs (R, K) for a stream of rows, in full tiles.

    The rows are those of ``parts``, (B, C, H, W) each, in their order. They are valid until the next ones are yielded.
    The last row of a tile of 16 rows or more always holds the same image, as in ``votes``. The last tile is padded.

    Raises:
        ModelError: as for ``Forward``, or outputs are not finite, or the outputs of the image in every tile changed.
    """
    size = filled = 0
    tile: Tensor | None = None
    sentinel: Sentinel | None = None
    for part in parts:
        rows = part.to(execution.device)
        while len(rows):
            if tile is None:
                tile = rows[:1].repeat(execution.rows(rows.shape[1:]), 1, 1, 1)
                size = voting_rows(len(tile))
            taken = min(len(rows), size - filled)
            tile[filled : filled + taken] = rows[:taken]
            filled, rows = filled + taken, rows[taken:]
            if filled == size:
                sentinel, logits = _checked(forward, tile, sentinel, execution)
                yield tile[:filled], logits[:filled]
                filled = 0
    if tile is not None and filled:
        _, logits = _checked(forward, tile, sentinel, execution)
        yield tile[:filled], logits[:filled]


def _checked(
    forward: Forward, tile: Tensor, sentinel: Sentinel | None, execution: Execution
) -> tuple[Sentinel | None, Tensor]:
    """Return the sentinel, which the first tile defines, and the outputs of ``tile``."""
    logits = forward(tile)
    if sentinel is None and voting_rows(len(tile)) < len(tile):
        sentinel = Sentinel(logits, execution.precision)
    if not bool(logits.isfinite().all()):
        raise ModelError(NOT_FINITE)
    if sentinel is not None and not bool(sentinel.unmoved(logits)):
        raise ModelError(SENTINEL_MOVED)
    return sentinel, logits
