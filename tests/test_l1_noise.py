"""Uniform and Laplace noise: published values, draws, tight certificates in l1, and levels."""

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import rush
from certifying import METHODS
from exact_models import HalfSpace
from rush.certification.bounds import LAWS, certified_radius, uniform_linf_radius
from rush.certification.rule import make_rule, null_probability
from rush.choices import NoiseName
from rush.errors import InputError
from rush.models.storage import load_smoothed
from rush.runtime.randomness import stream
from rush.smoothing.noise import Noise, make_noise

SIGMA, ALPHA = 0.5, 0.05
L1: tuple[NoiseName, ...] = ("uniform", "laplace")
DISTRIBUTIONS = {
    "uniform": stats.uniform(-math.sqrt(3) * SIGMA, 2 * math.sqrt(3) * SIGMA),
    "laplace": stats.laplace(scale=SIGMA / math.sqrt(2)),
}


def half_space(noise: Noise) -> rush.SmoothedClassifier:
    """Class 1 where the first of four pixels is above 0.5."""
    weight = torch.zeros(1, 2, 2)
    weight[0, 0, 0] = 1
    return rush.SmoothedClassifier(HalfSpace(weight, -0.5), noise=noise, num_classes=2)


def images(margins: Any) -> tuple[Tensor, Tensor]:
    """Images of class 1 at these l1 distances to the plane, with ids of their own."""
    x = torch.rand(len(margins), 1, 2, 2, generator=stream(0, "l1"))
    x[:, 0, 0, 0] = 0.5 + torch.as_tensor(margins, dtype=torch.float32)
    return x, torch.ones(len(margins), dtype=torch.int64)


@pytest.mark.parametrize(
    ("noise", "radii"), [("uniform", (0.5196, 0.8487, 0.8643)), ("laplace", (0.3240, 1.3831, 2.1972))]
)
def test_radii_are_the_published_ones(noise: NoiseName, radii: tuple[float, ...]) -> None:
    """Yang et al. 2020 at sigma 0.5 and p = 0.8, 0.99, 0.999."""
    np.testing.assert_allclose(certified_radius([0.8, 0.99, 0.999], SIGMA, noise), radii, atol=5e-5)
    assert certified_radius([0.2, 0.5], SIGMA, noise).tolist() == [0, 0]


def test_the_linf_radius_of_uniform_noise_is_that_of_a_shifted_cube() -> None:
    """A shift by r in every pixel leaves (1 - r / (2 lambda))^d of the cube, so p - 1/2 = 1 - that at the radius."""
    for p, values in ((0.8, 12), (0.99, 3072)):
        radius, width = uniform_linf_radius(p, SIGMA, values), 2 * math.sqrt(3) * SIGMA
        assert 1 - (1 - radius / width) ** values == pytest.approx(p - 0.5, rel=1e-9)
        assert radius < width * (p - 0.5) < certified_radius(p, SIGMA, "uniform") + 1e-5
    assert uniform_linf_radius(0.5, SIGMA, 12) == 0


@pytest.mark.parametrize("noise", LAWS)
def test_probability_and_radius_are_inverse_and_rounded_to_the_safe_side(noise: NoiseName) -> None:
    for radius in np.linspace(0.001, 0.8, 50):
        p = null_probability(radius, SIGMA, noise)
        assert float(LAWS[noise].radius(np.array(p), SIGMA)) == pytest.approx(radius, rel=1e-9)
        with mpmath.workdps(40):
            exact = {
                "uniform": lambda r: mpmath.mpf(1) / 2 + r / (2 * mpmath.sqrt(3) * SIGMA),
                "laplace": lambda r: 1 - mpmath.exp(-r * mpmath.sqrt(2) / SIGMA) / 2,
            }.get(noise, lambda r: mpmath.ncdf(r / SIGMA))(mpmath.mpf(float(radius)))
            assert exact < p < exact + 1e-11
    p_lower = np.linspace(0.5, 1, 1001)[1:-1]
    radii = certified_radius(p_lower, SIGMA, noise)
    assert all(LAWS[noise].probability(r, SIGMA) <= p for r, p in zip(radii, p_lower, strict=True))


@pytest.mark.parametrize("noise", L1)
def test_draws_have_their_distribution(noise: NoiseName) -> None:
    """Kolmogorov and Smirnov's test, which a deviation that is six percent too large fails."""
    drawn = make_noise(noise, SIGMA).sample((100_000,), stream(0, "draws")).double().numpy()
    assert stats.kstest(drawn, DISTRIBUTIONS[noise].cdf).pvalue > 1e-6
    assert stats.kstest(drawn * 1.06, DISTRIBUTIONS[noise].cdf).pvalue < 1e-6
    assert drawn.std() == pytest.approx(SIGMA, rel=0.01)
    assert np.corrcoef(drawn[:-1], drawn[1:])[0, 1] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise", L1)
def test_certificates_are_tight_for_one_pixel_and_never_too_large(noise: NoiseName, method: str) -> None:
    """Seven images whose certified l1 radius in the limit is the distance to the plane."""
    margins = np.array([0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])
    smoothed = half_space(make_noise(noise, SIGMA))
    radii = tuple(np.arange(0, 0.45, 0.02))
    certificates = rush.certify(smoothed, images(margins), method, 2000, 40_000, 1e-6, radii)
    assert certificates.rule.norm == "l1"
    assert (certificates.prediction == 1).all()
    assert (certificates.radius <= margins).all()
    assert (certificates.radius >= margins - 0.045).all()


def test_two_classes_and_l1_noise_are_refused_together() -> None:
    given: dict[str, Any] = {"sigma": 0.25, "method": "clopper-pearson", "alpha": 0.001, "level": "image"}
    given |= {"num_images": 1, "num_selection": 100, "num_estimation": 1000, "radii": None, "futility": 0.05}
    with pytest.raises(InputError, match="'two-classes' is for Gaussian noise, got noise 'laplace'"):
        make_rule(**given, noise="laplace", bound="two-classes")


@pytest.mark.parametrize("noise", L1)
def test_an_attack_in_l1_breaks_beyond_the_plane_and_not_within(noise: NoiseName) -> None:
    """At 0.6 and 1.5 of the distance, which is the exact radius."""
    smoothed, margins = half_space(make_noise(noise, SIGMA)), np.full(6, 0.3)
    for share, broken in ((0.6, False), (1.5, True)):
        result = rush.attack(smoothed, images(margins), rush.ThreatModel("l1", share * 0.3), "pgd", steps=20)
        assert (result.broken == broken).all()


@pytest.mark.parametrize("noise", ["discrete", "splitting", *L1])
def test_a_model_is_loaded_with_its_noise(noise: NoiseName, tmp_path: Any) -> None:
    from rush.models.storage import ClassifierSpec, save_smoothed
    from rush.runtime.execution import Execution
    from rush.runtime.randomness import seeded_init

    spec = ClassifierSpec("small", 4, 1, [0.5], [0.25], ["a", "b"])
    classifier = seeded_init(spec.build(), stream(0, "init")).eval()
    save_smoothed(tmp_path, classifier, spec, make_noise(noise, 0.25), Execution(), (1, 8, 8))
    assert load_smoothed(tmp_path, Execution()).noise == make_noise(noise, 0.25)
