"""The Square attack: random search over square patches (Andriushchenko et al. 2020; for l1 Croce & Hein 2021)."""

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rush.attacks.gradient import LogProbs
from rush.attacks.losses import Loss, margin
from rush.attacks.random_search import REFRESH, Proposal, best_of_proposals
from rush.attacks.threat import ORDERS, ThreatModel, stacked_draws
from rush.choices import Norm

FIRST_SHARE = 0.8  # share of the image that the first squares cover
# Queries of 10,000 after which the squares' share of the image is halved.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# The margin above which an image no longer changes. A forward that rounds differently still finds it broken.
ENOUGH = 1e-3
_TILES = 5  # bumps along each side of the first l2 or l1 change


def square(
    log_probs: LogProbs,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    generators: list[torch.Generator],
    *,
    queries: int,
    loss: Loss = margin,
    schedule: int | None = None,
    refresh: int = REFRESH,
) -> Tensor:
    """Maximise ``loss`` in the ball by a random search that changes one square per query.

    For l-inf the search starts at vertical stripes of +-epsilon. A proposal sets one square to +-epsilon, channel by
    channel, so that all proposals are corners of the ball. For l2 and l1 it starts at a grid of bumps. A proposal moves
    the size of the change from one square, and what remains up to epsilon, into a bump in another. Images broken by a
    margin of ``ENOUGH`` no longer change. No gradient is computed.

    Args:
        log_probs: the attacked function, (B, C, H, W) -> (B, K). If stochastic, see ``best_of_proposals``.
        x: images (B, C, H, W) in [0, 1].
        y: labels (B,).
        threat: the ball.
        generators: one per image.
        queries: number of forward passes.
        loss: the objective.
        schedule: number of queries for which the squares' area falls, by default ``queries``.
        refresh: number of proposals per draw of a stochastic ``log_probs``.

    Returns:
        The best points (B, C, H, W), in the ball and in [0, 1].

    Random: two draws from each of ``generators``, and ``log_probs``.

    Cost: ``queries`` forward passes, or fewer when all images are done earlier.
    """
    share = partial(share_of_image, queries=queries if schedule is None else schedule)
    if threat.norm == "linf":
        first, propose = _stripes(x, threat, generators), _squares(x, threat, generators, queries, share)
    else:
        first, propose = _grid(x, threat, generators), _bumps(x, threat, generators, queries, share)
    return best_of_proposals(log_probs, y, first, propose, passes=queries, loss=loss, refresh=refresh, enough=ENOUGH)


def share_of_image(query: int, queries: int) -> float:
    """Return the share of the image's area that a square covers at query number ``query`` of ``queries``."""
    return FIRST_SHARE / 2 ** bisect_left(HALVINGS, query * 10_000 // queries)


def _stripes(x: Tensor, threat: ThreatModel, generators: list[torch.Generator]) -> Tensor:
    signs = _signs(_uniform(generators, (x.shape[1], 1, x.shape[3]), x))  # (B, C, 1, W)
    return threat.project(x + signs * threat.radius(x), x)


def _squares(
    x: Tensor, threat: ThreatModel, generators: list[torch.Generator], queries: int, share: Callable[[int], float]
) -> Proposal:
    channels, height, width = x.shape[1:]
    # All draws at once: two for the place of a square and one sign per channel, for each query.
    draws = _uniform(generators, (queries, 2 + channels), x)
    epsilon = threat.radius(x)

    def propose(query: int, best: Tensor) -> Tensor:
        side = _side(share(query), height, width, smallest=1)
        inside = _inside(draws[:, query, :2], side, height, width)
        signs = _signs(draws[:, query, 2:]).view(-1, channels, 1, 1)
        return torch.where(inside, (x + signs * epsilon).clamp(0.0, 1.0), best)

    return propose


def _grid(x: Tensor, threat: ThreatModel, generators: list[torch.Generator]) -> Tensor:
    channels, height, width = x.shape[1:]
    tiles = min(_TILES, height, width)
    side = min(height, width) // tiles
    signs = _signs(_uniform(generators, (channels, tiles, tiles), x))  # (B, C, tiles, tiles)
    bumps = bump(side, side, threat.norm, x).repeat(tiles, tiles)
    grid = signs.repeat_interleave(side, 2).repeat_interleave(side, 3) * bumps
    top, left = (height - tiles * side) // 2, (width - tiles * side) // 2
    change = F.pad(grid, (left, width - tiles * side - left, top, height - tiles * side - top))
    return threat.project(x + _of_size(change, threat.norm, (1, 2, 3)) * threat.radius(x), x)


def _bumps(
    x: Tensor, threat: ThreatModel, generators: list[torch.Generator], queries: int, share: Callable[[int], float]
) -> Proposal:
    channels, height, width = x.shape[1:]
    # For each query: two places of squares, the orientation of the bump and one sign per channel.
    draws = _uniform(generators, (queries, 5 + channels), x)
    epsilon, norm = threat.radius(x), threat.norm
    order = ORDERS[norm]  # sizes to this power add up over disjoint sets of pixels

    def propose(query: int, best: Tensor) -> Tensor:
        row, change = draws[:, query], best - x  # (B, 5 + C), (B, C, H, W)
        side = _side(share(query), height, width, smallest=3)
        side = min(side + 1 - side % 2, height, width)  # odd, so that a bump has a centre
        into, emptied = _inside(row[:, :2], side, height, width), _inside(row[:, 2:4], side, height, width)
        signs = _signs(row[:, 5:]).view(-1, channels, 1, 1)
        # The new content is a bump plus the change that the square already holds, both at unit norm.
        new = signs * _placed(row[:, :2], row[:, 4], side, norm, x) + _of_size(change * into, norm, (2, 3))
        unused = (epsilon**order - _size(change, norm, (1, 2, 3)) ** order).clamp(min=0) / channels
        freed = _size(change * (into | emptied), norm, (2, 3)) ** order
        moved = _of_size(new * into, norm, (2, 3)) * (freed + unused) ** (1 / order)
        return threat.project(x + torch.where(into | emptied, moved, change), x)

    return propose


def bump(height: int, width: int, norm: Norm, like: Tensor) -> Tensor:
    """Return a pyramid (height, width) of the dtype and on the device of ``like``, for height >= width.

    At depth M from its rim it is the sum over k = 0..M of 1 / (n + 1 - k)^p with n = height // 2. The exponent p is 2
    for l2 (Andriushchenko et al. 2020, equation 2) and 4 for l1 (Croce & Hein 2021).
    """
    n = height // 2
    rows = (torch.arange(height, device=like.device) - n).abs()
    columns = (torch.arange(width, device=like.device) - width // 2).abs()
    depth = n - torch.maximum(rows[:, None], columns[None, :])
    terms = 1 / (n + 1 - torch.arange(n + 1, device=like.device, dtype=like.dtype)) ** (2 if norm == "l2" else 4)
    return terms.cumsum(0)[depth]


def _placed(corner: Tensor, turn: Tensor, side: int, norm: Norm, x: Tensor) -> Tensor:
    """Return two bumps of opposite sign side by side in each image's square, (B, 1, H, W), of unit norm together.

    They are transposed where ``turn`` (B,) is at least 1/2.
    """
    pair = torch.cat([bump(side, side // 2, norm, x), -bump(side, side - side // 2, norm, x)], 1)
    pair = _of_size(pair, norm, (0, 1))
    pairs = torch.where(turn.view(-1, 1, 1) < 0.5, pair, pair.T)
    top, left = _corner(corner, side, *x.shape[2:])
    row = torch.arange(x.shape[2], device=x.device).view(1, -1, 1) - top.view(-1, 1, 1)
    column = torch.arange(x.shape[3], device=x.device).view(1, 1, -1) - left.view(-1, 1, 1)
    flat = (row.clamp(0, side - 1) * side + column.clamp(0, side - 1)).flatten(1)
    placed = pairs.flatten(1).gather(1, flat).view(len(x), 1, *x.shape[2:])
    return placed * _inside(corner, side, *x.shape[2:])


def _corner(draws: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    top = (draws[:, 0] * (height - side + 1)).floor().clamp(max=height - side)
    left = (draws[:, 1] * (width - side + 1)).floor().clamp(max=width - side)
    return top.long(), left.long()


def _inside(draws: Tensor, side: int, height: int, width: int) -> Tensor:
    """Return which pixels (B, 1, H, W) lie in the square whose place is given by ``draws`` (B, 2) in [0, 1)."""
    top, left = (value.view(-1, 1, 1, 1) for value in _corner(draws, side, height, width))
    rows = torch.arange(height, device=draws.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=draws.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)


def _side(share: float, height: int, width: int, smallest: int) -> int:
    return min(max(round(math.sqrt(share * height * width)), smallest), height, width)


def _size(change: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(change, ORDERS[norm], dim=dims, keepdim=True)


def _of_size(change: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
    return change / _size(change, norm, dims).clamp(min=1e-12)


def _uniform(generators: list[torch.Generator], shape: tuple[int, ...], x: Tensor) -> Tensor:
    return stacked_draws(torch.rand, shape, generators).to(x.device)


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)
