"""Geometry of the l1 ball within the pixel range: exact projection and steepest step, batched over images."""

import torch
from torch import Tensor


def project_l1(change: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
    """Return the nearest changes (B, C, H, W), in l2, with ||change||_1 <= epsilon and x + change in [0, 1].

    With a = |change| and room u to the end of the range on the change's side, the solution is min(max(a - t, 0), u)
    with the smallest t >= 0 that meets epsilon (Croce & Hein 2021, proposition 2.1). Its sum over pixels is piecewise
    linear in t with knots at a and a - u. Sorting them gives t without iteration and with sums of terms >= 0 only, so
    that float32 suffices.

    Args:
        change: (B, C, H, W).
        x: images (B, C, H, W) in [0, 1].
        epsilon: (B, 1, 1, 1) >= 0, may be infinite.
    """
    size, room = change.abs().flatten(1), room_towards(change, x).flatten(1)
    radius = epsilon.reshape(-1, 1)
    threshold = torch.where(torch.minimum(size, room).sum(1, keepdim=True) <= radius, 0.0, _knot(size, room, radius))
    projected = torch.minimum((size - threshold).clamp(min=0), room)
    projected = projected * (radius / projected.sum(1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)  # rounding
    return projected.view_as(change) * change.sign()


def sparse_step(gradient: Tensor, room: Tensor, length: Tensor, pixels: Tensor) -> Tensor:
    """Return the step s (B, C, H, W) that maximises <gradient, s> within a length and a limit per pixel.

    The constraints are ||s||_1 <= length and |s_i| <= min(length / pixels, room_i). Far from the ends of the range it
    is sign(gradient) * length / pixels on the ``pixels`` largest entries (Croce & Hein 2021, section 3). A pixel at the
    end of its range passes its part to the next largest one.

    Args:
        gradient: (B, C, H, W).
        room: largest change of each entry, (B, C, H, W) >= 0.
        length: (B, 1, 1, 1).
        pixels: number of entries to change, (B, 1, 1, 1) >= 1.
    """
    order = gradient.abs().flatten(1).argsort(stable=True, dim=1, descending=True)
    total = length.reshape(-1, 1)
    most = torch.minimum(room.flatten(1).gather(1, order), total / pixels.reshape(-1, 1))
    taken = (total - (most.cumsum(1) - most)).clamp(min=0).minimum(most)
    return torch.zeros_like(taken).scatter(1, order, taken).view_as(gradient) * gradient.sign()


def room_towards(gradient: Tensor, x: Tensor) -> Tensor:
    """Return how far each pixel of ``x`` can move within [0, 1] in the direction of the gradient's sign."""
    return torch.where(gradient > 0, 1 - x, x)


def _knot(size: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """Return the threshold t >= 0, (B, 1), at which the sum of min(max(size - t, 0), room) is ``radius``."""
    knots, order = torch.cat([size, size - room], 1).sort(1, descending=True)
    slope = torch.where(order < size.shape[1], 1.0, -1.0).cumsum(1)  # pixels that shrink with t, just below each knot
    sums = torch.nn.functional.pad((slope[:, :-1] * (knots[:, :-1] - knots[:, 1:])).cumsum(1), (1, 0))
    last = ((sums <= radius).sum(1, keepdim=True) - 1).clamp(min=0)
    below = (radius - sums.gather(1, last)) / slope.gather(1, last).clamp(min=1)
    return (knots.gather(1, last) - below).clamp(min=0)
