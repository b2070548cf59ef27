"""NT-Xent against the paper's formula written slowly, its symmetries and another library."""

import math

import pytest
import torch
from torch import Tensor

from rush.errors import InputError
from rush.runtime.randomness import stream
from rush.training.contrastive import nt_xent


def pair(rows: int = 6, size: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = stream(seed, "views")
    view_a, view_b = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for _ in range(2))
    return view_a, view_b


def textbook(view_a: Tensor, view_b: Tensor, temperature: float) -> float:
    """Chen et al. 2020, algorithm 1: z_(2k-1) and z_(2k) are the views of image k; plain loops over plain numbers."""
    z = [row.tolist() for both in zip(view_a, view_b, strict=True) for row in both]

    def similarity(i: int, j: int) -> float:
        dot = math.fsum(a * b for a, b in zip(z[i], z[j], strict=True))
        return dot / (math.hypot(*z[i]) * math.hypot(*z[j]))

    def loss(i: int, j: int) -> float:
        others = math.fsum(math.exp(similarity(i, k) / temperature) for k in range(len(z)) if k != i)
        return -math.log(math.exp(similarity(i, j) / temperature) / others)

    count = len(z) // 2
    return math.fsum(loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(count)) / (2 * count)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_nt_xent_is_the_papers_double_loop(rows: int, temperature: float) -> None:
    view_a, view_b = pair(rows)
    assert nt_xent(view_a, view_b, temperature).item() == pytest.approx(
        textbook(view_a, view_b, temperature), abs=1e-12
    )


def test_nt_xent_is_that_of_pytorch_metric_learning_in_value_and_gradient() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    view_a, view_b = (view.requires_grad_() for view in pair(16, 8))
    own = nt_xent(view_a, view_b, 0.2)
    labels = torch.arange(16).repeat(2)
    theirs = losses.NTXentLoss(temperature=0.2)(torch.cat([view_a, view_b]), labels)
    assert own.item() == pytest.approx(theirs.item(), abs=1e-10)
    gradients = torch.autograd.grad(own, (view_a, view_b)), torch.autograd.grad(theirs, (view_a, view_b))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


def test_the_views_are_interchangeable_and_rows_may_be_reordered_and_rescaled() -> None:
    view_a, view_b = pair()
    loss = nt_xent(view_a, view_b, 0.5)
    order, scale = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([0.1, 2, 30, 1, 0.5, 7]).double()[:, None]
    for changed in (
        nt_xent(view_b, view_a, 0.5),
        nt_xent(view_a[order], view_b[order], 0.5),
        nt_xent(view_a * scale, view_b * scale.flip(0), 0.5),
    ):
        torch.testing.assert_close(changed, loss, atol=1e-12, rtol=0)
    # what must not be an invariance: reordering one view alone parts the pairs
    assert abs(float(nt_xent(view_a[order], view_b, 0.5) - loss)) > 1e-3


def test_the_gradient_is_that_of_finite_differences() -> None:
    view_a, view_b = (view.requires_grad_() for view in pair(4, 3))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (view_a, view_b))


@pytest.mark.parametrize(
    ("shapes", "temperature", "text"),
    [
        (((4, 3), (5, 3)), 0.5, r"need two \(B, D\) tensors of one shape, got \(4, 3\) and \(5, 3\)"),
        (((4,), (4,)), 0.5, r"got \(4,\) and \(4,\)"),
        (((4, 3), (4, 3)), 0.0, "temperature must be > 0, got 0.0"),
        (((4, 3), (4, 3)), float("nan"), "temperature must be > 0, got nan"),
    ],
)
def test_views_that_do_not_pair_and_a_temperature_of_zero_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], temperature: float, text: str
) -> None:
    with pytest.raises(InputError, match=text):
        nt_xent(torch.ones(shapes[0]), torch.ones(shapes[1]), temperature)
