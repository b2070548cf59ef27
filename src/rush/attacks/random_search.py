"""Attacks without gradients: the loop they share, and random search, the control that every other attack must beat."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from rush.attacks.gradient import LogProbs, is_random, pinned
from rush.attacks.losses import Loss, margin
from rush.attacks.threat import ThreatModel

Proposal: TypeAlias = Callable[[int, Tensor], Tensor]

REFRESH = 10
_DRAWN_AT_ONCE = 16
_LOOK_EVERY = 64  # queries between two looks whether all images are done


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
    """The point (B, C, H, W) of largest ``loss`` among ``x`` and ``draws`` random points of the ball.

    By turns a point at the surface (l-inf: a corner) and one uniform in the ball, see ``ThreatModel.random_points``.
    No gradient is computed. generators: one an image, the only ones drawn from. Random ``log_probs``: see
    ``best_of_proposals``. Cost: draws + 1 forward passes; (draws - 1) // refresh more where ``log_probs`` is random.
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
    """The point (B, C, H, W) that is left when ``first`` has met the proposals one by one and the larger ``loss``
    stayed, image by image.

    propose: (number of passes so far, points so far) -> points. Where ``log_probs`` is random the two are compared on
    common random numbers; the noise is drawn anew, and the point so far measured again, after every ``refresh``
    proposals, so that no draw is fitted. enough: on a function that is not random, images whose margin exceeds this
    stay as they are from then on, and the loop ends when all do.
    Cost: ``passes`` forward passes or, with ``enough``, fewer; in the random case every (refresh + 1)-th of them
    measures the point so far. No gradient is computed.
    """
    random, best, same = is_random(log_probs), first, pinned(log_probs)
    with torch.no_grad():
        found = same(best)
        value, done = loss(found, y), _exceeds(found, y, None if random else enough)
        for query in range(1, passes):
            if random and query % (refresh + 1) == 0:
                same = pinned(log_probs)
                value = loss(same(best), y)
                continue
            if enough is not None and query % _LOOK_EVERY == 0 and bool(done.all()):
                break
            candidate = propose(query, best)
            found = same(candidate)
            new = loss(found, y)
            better = (new > value) & ~done
            best = torch.where(better.view(-1, 1, 1, 1), candidate, best)
            value = torch.where(better, new, value)
            done = done | (better & _exceeds(found, y, None if random else enough))
    return best


def _random_points(x: Tensor, threat: ThreatModel, generators: list[torch.Generator]) -> Iterator[Tensor]:
    while True:
        surface = threat.random_points(x, generators, _DRAWN_AT_ONCE // 2, surface=True)
        inside = threat.random_points(x, generators, _DRAWN_AT_ONCE // 2)
        yield from chain.from_iterable(zip(surface.unbind(1), inside.unbind(1), strict=True))


def _exceeds(log_probs: Tensor, y: Tensor, enough: float | None) -> Tensor:
    return torch.zeros_like(y, dtype=torch.bool) if enough is None else margin(log_probs, y) > enough
