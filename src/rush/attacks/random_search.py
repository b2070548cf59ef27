"""The loop of attacks without gradients, and random search, the baseline that every other attack must beat."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from rush.attacks.gradient import LogProbs, is_random, pinned
from rush.attacks.losses import Loss, margin
from rush.attacks.threat import ThreatModel, choose

Proposal: TypeAlias = Callable[[int, Tensor], Tensor]

REFRESH = 10
_DRAWN_AT_ONCE = 16
_CHECK_EVERY = 64  # queries between two checks whether all images are done; each check waits for the device


def random_search(
    log_probs: LogProbs,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    generators: list[torch.Generator],
    *,
    draws: int,
    loss: Loss = margin,
    refresh: int = REFRESH,
) -> Tensor:
    """Return the point (B, C, H, W) with the largest ``loss`` among ``x`` and random points of the ball.

    Points at the surface (for l-inf: corners) alternate with points uniform in the ball, see
    ``ThreatModel.random_points``. No gradient is computed.

    Args:
        log_probs: the attacked function, (B, C, H, W) -> (B, K). If stochastic, see ``best_of_proposals``.
        x: images (B, C, H, W) in [0, 1].
        y: labels (B,).
        threat: the ball.
        generators: one per image.
        draws: number of random points per image.
        loss: the objective.
        refresh: number of proposals per draw of a stochastic ``log_probs``.

    Random: draws from ``generators``, and ``log_probs``.

    Cost: draws + 1 forward passes, and (draws - 1) // refresh more where ``log_probs`` is stochastic.
    """
    points = _random_points(x, threat, generators)
    passes = draws + 1 + ((draws - 1) // refresh if is_random(log_probs) else 0)
    return best_of_proposals(
        log_probs, y, x, lambda _query, _best: next(points), passes=passes, loss=loss, refresh=refresh
    )


def best_of_proposals(
    log_probs: LogProbs,
    y: Tensor,
    first: Tensor,
    propose: Proposal,
    *,
    passes: int,
    loss: Loss,
    refresh: int = REFRESH,
    enough: float | None = None,
) -> Tensor:
    """Keep for each image the point with the larger ``loss`` while proposals come one by one.

    On a stochastic ``log_probs`` two points are compared on common random numbers. After every ``refresh`` proposals
    the noise is redrawn and the current point measured again, so that no draw is overfitted. No gradient is computed.

    Args:
        log_probs: the attacked function, (B, C, H, W) -> (B, K).
        y: labels (B,).
        first: points (B, C, H, W) to start from.
        propose: (number of passes so far, current points) -> proposed points.
        passes: number of forward passes.
        loss: the objective.
        refresh: number of proposals per draw of a stochastic ``log_probs``.
        enough: on a deterministic function, images whose margin exceeds it no longer change, and the loop ends when
            all do.

    Returns:
        The best points (B, C, H, W).

    Cost: ``passes`` forward passes, or fewer with ``enough``. On a stochastic function every (refresh + 1)-th of them
    measures the current point.
    """
    random, best, same = is_random(log_probs), first, pinned(log_probs)
    enough = None if random else enough
    with torch.no_grad():
        out = same(best)
        value, done = loss(out, y), _exceeds(out, y, enough)
        for query in range(1, passes):
            if random and query % (refresh + 1) == 0:
                same = pinned(log_probs)
                value = loss(same(best), y)
                continue
            if enough is not None and query % _CHECK_EVERY == 0 and bool(done.all()):
                break
            candidate = propose(query, best)
            out = same(candidate)
            candidate_value = loss(out, y)
            better = (candidate_value > value) & ~done
            best, value = choose(better, candidate, best), choose(better, candidate_value, value)
            done = done | (better & _exceeds(out, y, enough))
    return best


def _random_points(x: Tensor, threat: ThreatModel, generators: list[torch.Generator]) -> Iterator[Tensor]:
    while True:
        surface = threat.random_points(x, generators, _DRAWN_AT_ONCE // 2, surface=True)
        inside = threat.random_points(x, generators, _DRAWN_AT_ONCE // 2)
        yield from chain.from_iterable(zip(surface.unbind(1), inside.unbind(1), strict=True))


def _exceeds(log_probs: Tensor, y: Tensor, enough: float | None) -> Tensor:
    return torch.zeros_like(y, dtype=torch.bool) if enough is None else margin(log_probs, y) > enough
