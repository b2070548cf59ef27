"""The l1 ball within the pixel range: against slow textbook formulas in float64."""

import math
import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import optimize, stats
from torch import Tensor

from attacked import generators
from exact_models import assert_in_threat
from rush.attacks.l1 import sparse_step
from rush.attacks.threat import L1_DENSITY, ThreatModel, norms, project
from rush.choices import Norm
from rush.errors import InputError
from rush.runtime.randomness import stream


def _cases(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (40, 2, 3, 4), many of whose pixels are 0 or 1, points up to far outside, and radii."""
    draws = stream(seed, "cases")
    x = torch.rand((40, 2, 3, 4), generator=draws)
    x = torch.where(torch.rand(x.shape, generator=draws) < 0.4, x.round(), x)
    spread = 10 ** (torch.rand((40, 1, 1, 1), generator=draws) * 3 - 1.5)
    points = x + spread * torch.randn(x.shape, generator=draws)
    points = torch.where(torch.rand(x.shape, generator=draws) < 0.2, x, points)  # zero changes and ties
    epsilon = 10 ** (torch.rand(40, generator=draws) * 3 - 2)
    x[:4], points[:2], points[2:4] = x[:4].round(), 1 - x[:2].round(), x[2:4]  # corners of the box; nothing to do
    return x, points, epsilon


def _textbook(point: NDArray[np.float64], x: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    """Minimise ||z - point||_2 over both sets: soft-threshold and clip, the threshold by bisection."""
    change = point - x

    def shrunk(threshold: float) -> NDArray[np.float64]:
        return np.clip(np.sign(change) * np.maximum(np.abs(change) - threshold, 0), -x, 1 - x)

    def excess(threshold: float) -> float:
        return float(np.abs(shrunk(threshold)).sum() - epsilon)

    if excess(0) <= 0:
        return x + shrunk(0)
    return x + shrunk(optimize.brentq(excess, 0, np.abs(change).max(), xtol=1e-14, rtol=1e-14))


@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_the_textbooks(seed: int) -> None:
    x, points, epsilon = _cases(seed)
    found = ThreatModel("l1", epsilon).project(points, x)
    assert_in_threat(found, x, ThreatModel("l1", epsilon))
    for i in range(len(x)):
        expected = _textbook(points[i].double().numpy(), x[i].double().numpy(), float(epsilon[i]))
        far = max(1.0, float((points[i] - x[i]).abs().max()))  # up to 100: so coarse is float32 there
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=0, atol=1e-6 * far)


def test_no_feasible_point_is_nearer_than_the_projection() -> None:
    """The variational inequality <point - found, z - found> <= 0 for 200 random z of the set, in each of 40 cases."""
    x, points, epsilon = _cases(9)
    threat = ThreatModel("l1", epsilon)
    found = threat.project(points, x)
    others = torch.cat([threat.random_points(x, generators(40), 100, surface=s) for s in (True, False)], 1)
    product = ((points - found)[:, None] * (others - found[:, None])).flatten(2).sum(2)
    assert (product <= 1e-4 * (points - found).flatten(1).norm(dim=1)[:, None] + 1e-6).all()


def test_projecting_twice_is_projecting_once_and_an_infinite_radius_clips_alone() -> None:
    x, points, epsilon = _cases(7)
    threat = ThreatModel("l1", epsilon)
    once = threat.project(points, x)
    torch.testing.assert_close(threat.project(once, x), once, rtol=0, atol=1e-6)
    unbounded = project("l1", points, x, torch.full((40, 1, 1, 1), math.inf))
    torch.testing.assert_close(unbounded, points.clamp(0, 1), rtol=0, atol=3e-6)
    torch.testing.assert_close(project("l1", points, x, torch.zeros(40, 1, 1, 1)), x, rtol=0, atol=0)


def test_a_large_image_keeps_its_budget_in_float32() -> None:
    """3 x 64 x 64 pixels: a threshold that was summed up carelessly would miss epsilon."""
    x = torch.rand((4, 3, 64, 64), generator=stream(0, "x"))
    points = x + torch.randn(x.shape, generator=stream(0, "points"))
    threat = ThreatModel("l1", torch.tensor([0.5, 12.0, 300.0, 2000.0]))
    found = threat.project(points, x)
    assert_in_threat(found, x, threat)
    np.testing.assert_allclose(norms(found, x, "l1"), threat.epsilon, rtol=1e-4)


def _greedy(gradient: NDArray[np.float64], room: NDArray[np.float64], length: float, most: float) -> float:
    """The largest <gradient, s> over ||s||_1 <= length, |s_i| <= min(most, room_i), by hand."""
    left, gain = length, 0.0
    for i in np.argsort(-np.abs(gradient)):
        part = min(left, most, room[i])
        left, gain = left - part, gain + part * abs(gradient[i])
    return gain


@pytest.mark.parametrize("pixels", [1, 4, 24])
def test_a_sparse_step_gains_the_most_that_its_limits_allow(pixels: int) -> None:
    draws = stream(pixels, "steps")
    gradient = torch.randn((30, 2, 3, 4), generator=draws)
    room = torch.rand(gradient.shape, generator=draws) * (torch.rand(gradient.shape, generator=draws) < 0.7)
    length = torch.rand((30, 1, 1, 1), generator=draws) * 3
    step = sparse_step(gradient, room, length, torch.full((30, 1, 1, 1), float(pixels)))
    assert (step.abs() <= torch.minimum(room, length / pixels) + 1e-6).all()
    assert (step.abs().flatten(1).sum(1) <= length.flatten() + 1e-5).all()
    for i in range(30):
        own = [t[i].double().flatten().numpy() for t in (gradient, room, step)]
        expected = _greedy(own[0], own[1], float(length[i]), float(length[i]) / pixels)
        assert own[0] @ own[2] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_an_unhindered_l1_step_changes_a_hundredth_of_the_pixels_alike() -> None:
    gradient = torch.randn((3, 3, 20, 20), generator=stream(0, "gradient"))
    step = ThreatModel("l1", 6.0).step(gradient, 0.5, torch.full_like(gradient, 0.5))
    for own, values in zip(step, gradient, strict=True):
        largest = values.abs().flatten().topk(int(1200 * L1_DENSITY)).indices
        expected = torch.zeros(1200).scatter(0, largest, values.flatten()[largest].sign() * 3 / 12)
        torch.testing.assert_close(own.flatten(), expected)


def test_random_starts_are_uniform_in_the_l1_ball_and_on_its_faces() -> None:
    """3,000 points of 4 pixels. The norm to the 4th power is uniform; of a face's points any share has the law
    Beta(1, 3). Odds of failing by chance: two Kolmogorov-Smirnov tests at 1e-6, 4 signs and 6 correlations at 5
    standard errors, < 1e-5 in all."""
    x = torch.full((3000, 1, 2, 2), 0.5)
    threat = ThreatModel("l1", 0.4)
    inside = ((threat.random_start(x, generators(3000)) - x) / 0.4).flatten(1).double().numpy()
    assert stats.kstest(np.abs(inside).sum(1) ** 4, "uniform").pvalue > 1e-6
    points = threat.random_points(x, generators(3000), 1, surface=True)[:, 0]
    faces = ((points - x) / 0.4).flatten(1).double().numpy()
    np.testing.assert_allclose(np.abs(faces).sum(1), 1, rtol=1e-5)
    assert stats.kstest(np.abs(faces[:, 0]), stats.beta(1, 3).cdf).pvalue > 1e-6
    assert (np.abs((faces > 0).mean(0) - 0.5) < 5 * 0.5 / math.sqrt(3000)).all()
    assert abs(np.corrcoef(faces.T) - np.eye(4)).max() < 5 / math.sqrt(3000)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_points_differ_lie_in_the_ball_and_reach_its_edge(norm: Norm) -> None:
    x = torch.rand((5, 3, 6, 6), generator=stream(0, "x")) * 0.2 + 0.4
    threat = ThreatModel(norm, torch.tensor([0.01, 0.05, 0.1, 0.2, 0.3]))
    for surface in (True, False):
        points = threat.random_points(x, generators(5), 7, surface=surface)
        assert points.shape == (5, 7, 3, 6, 6)
        assert len(points.flatten(2).flatten(0, 1).unique(dim=0)) == 35
        for own in points.unbind(1):
            assert_in_threat(own, x, threat)
            if surface:
                np.testing.assert_allclose(norms(own, x, norm), threat.epsilon, rtol=1e-4)
    corners = ThreatModel("linf", 0.1).random_points(x, generators(5), 2, surface=True)
    torch.testing.assert_close((corners - x[:, None]).abs(), torch.full_like(corners, 0.1), rtol=1e-5, atol=1e-7)


def test_norms_are_numpys() -> None:
    x, points, _ = _cases(3)
    change = (points.double() - x.double()).flatten(1).numpy()
    for norm, order in (("linf", np.inf), ("l2", 2), ("l1", 1)):
        np.testing.assert_allclose(norms(points, x, norm), np.linalg.norm(change, order, axis=1), rtol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_point_outside_is_noticed(norm: Norm) -> None:
    x = torch.full((2, 1, 4, 4), 0.5)
    points = ThreatModel(norm, 0.3).random_points(x, generators(2), 1, surface=True)[:, 0]
    assert_in_threat(points, x, ThreatModel(norm, 0.3))
    with pytest.raises(AssertionError):
        assert_in_threat(x + (points - x) * 1.001, x, ThreatModel(norm, 0.3))


def test_an_l1_epsilon_is_a_sum_over_pixels() -> None:
    assert ThreatModel("l1", 12).epsilon == 12
    assert ThreatModel("l1", torch.tensor([0.5, 40.0])).select([1]).epsilon.tolist() == [40.0]
    for epsilon in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=re.escape(f"epsilon must be a finite number > 0, got {epsilon}")):
            ThreatModel("l1", epsilon)
