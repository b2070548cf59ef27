"""What leaves the box by rounding is moved to its edge, once and at the door; what leaves it by more is refused."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rush
from rush.data.checks import ROUNDING, check_pixels, labelled_pixels, pixel_ids
from rush.errors import InputError, RoundingWarning
from rush.evaluation.attack import verdict
from rush.runtime.randomness import stream

MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1), torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
THREAT = rush.ThreatModel("linf", 8 / 255)


def _images() -> Tensor:
    x = torch.rand(20, 3, 8, 8, generator=stream(0, "rounding"))
    x[:, :, 0], x[:, :, 1] = 1, 0
    return x


X = _images()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    layer = nn.Linear(192, 10)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1, generator=stream(0, "rounding", "network"))
    return nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def labels(network: nn.Module) -> Tensor:
    return network(X).argmax(1)


def _outside(high: float, low: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The images with their white pixels at ``high`` and their black ones at ``low``."""
    x = X.to(dtype)
    return torch.where(x == 1, torch.tensor(high, dtype=dtype), torch.where(x == 0, torch.tensor(low, dtype=dtype), x))


def test_normalizing_and_undoing_it_stays_within_the_constant() -> None:
    """The reason of the constant, for every 8-bit value and many statistics."""
    values = (torch.arange(256) / 255).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    worst = 0.0
    for draw in range(300):
        generator = stream(draw, "statistics")
        mean = torch.rand(3, 1, 1, generator=generator)
        std = 0.05 + torch.rand(3, 1, 1, generator=generator)
        back = (values - mean) / std * std + mean
        worst = max(worst, float(back.max()) - 1, -float(back.min()))
    assert 0 < worst <= ROUNDING / 2
    assert float(((X - MEAN) / STD * STD + MEAN).min()) < 0


@pytest.mark.parametrize(
    ("dtype", "high", "low"),
    [
        (torch.float32, 1 + 1.2e-7, 0.0),
        (torch.float32, 1.0, -1e-9),
        (torch.float32, 1 + ROUNDING, -ROUNDING),
        (torch.float64, 1 + 1e-7, -1e-12),
        (torch.float16, 1 + 2.0**-10, -1e-4),
        (torch.bfloat16, 1 + 2.0**-7, -1e-3),
    ],
)
def test_rounding_is_moved_to_the_edge_with_a_warning(dtype: torch.dtype, high: float, low: float) -> None:
    x = _outside(high, low, dtype)
    with pytest.warns(RoundingWarning, match=r"\d+ of 3840 pixels lay up to .* outside \[0, 1\]"):
        moved = check_pixels(x)
    assert moved.dtype == torch.float32
    assert torch.equal(moved, x.float().clamp(0, 1))


@pytest.mark.parametrize(
    ("dtype", "high", "low"),
    [
        (torch.float32, 1 + 2 * ROUNDING, 0.0),
        (torch.float32, 1.0, -2 * ROUNDING),
        (torch.float64, 1 + 1e-6, 0.0),
        (torch.float16, 1 + 2.0**-9, 0.0),
        (torch.bfloat16, 1.0, -0.01),
    ],
)
def test_more_than_rounding_is_refused_with_all_its_digits(dtype: torch.dtype, high: float, low: float) -> None:
    x = _outside(high, low, dtype)
    with pytest.raises(InputError, match="lie in") as refused:
        check_pixels(x)
    text = str(refused.value)
    assert f"minimum {float(x.float().min())!r} and maximum {float(x.float().max())!r}" in text
    assert "minimum 0 and maximum 1;" not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_what_is_not_finite_is_no_rounding(value: float) -> None:
    x = X.double()
    x[3, 1, 2, 2] = value
    with pytest.raises(InputError, match="finite and lie in"):
        check_pixels(x)


def test_images_within_the_box_pass_as_they_are() -> None:
    assert torch.equal(check_pixels(X), X)  # a warning would be an error


def test_the_moved_point_is_what_is_judged_hashed_and_measured(network: nn.Module, labels: Tensor) -> None:
    x = _outside(1 + 1.2e-7, -1e-9)
    with pytest.warns(RoundingWarning):
        found = labelled_pixels((x, labels))
    assert torch.equal(found.x, X)
    assert found.ids == pixel_ids(X)
    smoothed = rush.SmoothedClassifier(network, 0.25, 10)
    with pytest.warns(RoundingWarning):
        predicted = smoothed.predict(x[:4], num_samples=100)
    assert torch.equal(predicted, smoothed.predict(X[:4], num_samples=100))
    with pytest.warns(RoundingWarning):
        attacked = rush.attack(network, (x, labels), THREAT, "fgsm")
    assert torch.equal(attacked.adversarial, rush.attack(network, (X, labels), THREAT, "fgsm").adversarial)
    with pytest.warns(RoundingWarning, match="points lay"):
        judged = verdict(network, (X, labels), x, THREAT)
    assert judged.linf.max() == 0
    assert torch.equal(judged.adversarial, X)


def test_points_of_a_tool_that_works_on_normalized_images_are_judged(network: nn.Module, labels: Tensor) -> None:
    with pytest.warns(RoundingWarning):
        judged = verdict(network, (X, labels), (X - MEAN) / STD * STD + MEAN, THREAT)
    assert judged.robust_accuracy == 1.0
    assert judged.linf.max() < 3e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_points_in_half_precision_are_moved_into_the_ball(
    dtype: torch.dtype, norm: str, network: nn.Module, labels: Tensor
) -> None:
    """Rounding moves each pixel by up to half a step of the type; the judged point keeps the threat model."""
    direction = torch.rand(X.shape, generator=stream(0, "direction")) - 0.5
    threat = rush.ThreatModel(norm, {"linf": 8 / 255, "l2": 0.5, "l1": 2.0}[norm])  # type: ignore[arg-type]
    points = threat.project(X + 100 * direction.sign(), X)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        judged = verdict(network, (X, labels), points.to(dtype), threat)
    assert getattr(judged, norm).max() <= threat.epsilon + 1e-6 + 6e-8 * (192 if norm == "l1" else 14)
    assert getattr(verdict(network, (X, labels), X, threat), norm).max() == 0
    if norm == "linf":
        assert [entry.category for entry in said] == [RoundingWarning]


def test_points_far_outside_the_ball_are_refused_in_half_precision_too(network: nn.Module, labels: Tensor) -> None:
    points = (X + 0.1).clamp(0, 1)
    for given in (points, points.half(), points.bfloat16()):
        with pytest.raises(
            InputError, match=r"outside the linf ball; 20 of 20 are.*up to \S+ outside is taken for rounding"
        ):
            verdict(network, (X, labels), given, THREAT)


def test_float8_and_other_types_are_refused() -> None:
    for dtype in (torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(InputError, match=f"got {dtype} of shape"):
            check_pixels(X.to(dtype))


def test_the_warning_says_how_many_and_how_far() -> None:
    x = X.clone()
    x[0, 0, 0, :3] = 1 + 2.0**-23
    with pytest.warns(RoundingWarning, match=r"^3 of 3840 pixels lay up to 1\.2e-07 outside \[0, 1\]"):
        check_pixels(x)
    assert np.nextafter(np.float32(1), np.float32(2)) == np.float32(1 + 2.0**-23)
