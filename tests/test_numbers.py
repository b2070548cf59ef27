"""Numbers of NumPy, fractions and 0-d arrays are taken wherever a number is, and recorded as plain ones."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import rush
from rush.auditing.audit import audit
from rush.certification.rule import make_rule
from rush.data.checks import labelled_pixels
from rush.data.images import ImageSet, hold_out, stratified_subset
from rush.errors import InputError
from rush.evaluation.attack import verdict
from rush.evaluation.verdict import VerdictSettings
from rush.runtime.numbers import as_real, as_whole, least_whole, positive_integer, probability
from rush.runtime.randomness import stream
from rush.smoothing.noise import Gaussian

WHOLE = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)]
REAL = [0.25, np.float32(0.25), np.float64(0.25), np.array(0.25), torch.tensor(0.25), Fraction(1, 4), np.float16(0.25)]
NO_NUMBER = [
    None,
    "0.25",
    True,
    np.bool_(True),
    torch.tensor(True),
    math.nan,
    -math.inf,
    1j,
    [0.25],
    np.ones(1),
]
THREAT = rush.ThreatModel("linf", 0.1)
LABELLED = (torch.rand(6, 1, 2, 2, generator=stream(0, "numbers")), torch.tensor([0, 1, 0, 1, 0, 1]))


def _network() -> nn.Module:
    generator = stream(0, "numbers", "network")
    layer = nn.Linear(4, 2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_integers_of_every_kind_become_plain_ones(value: object) -> None:
    assert type(as_whole(value)) is int
    assert as_whole(value) == as_real(value) == 3
    assert type(positive_integer("n", value)) is int


@pytest.mark.parametrize("value", REAL, ids=repr)
def test_numbers_of_every_kind_become_plain_ones(value: object) -> None:
    assert type(as_real(value)) is float
    assert as_real(value) == 0.25
    assert as_whole(value) is None
    assert type(probability("p", value)) is float


@pytest.mark.parametrize("value", NO_NUMBER, ids=repr)
def test_what_is_no_number_is_none(value: object) -> None:
    assert as_real(value) is None
    with pytest.raises(InputError, match="n must be an integer >= 1, got"):
        positive_integer("n", value)
    with pytest.raises(InputError, match=r"p must lie in \(0, 1\), got"):
        probability("p", value)


def test_an_integer_beyond_every_float_is_no_real_number() -> None:
    assert as_real(10**400) is None
    with pytest.raises(InputError, match="sigma must be a finite number"):
        Gaussian(10**400)


@pytest.mark.parametrize("value", [2.0, np.float32(2), torch.tensor(2.0), Fraction(2)], ids=repr)
def test_whole_floats_are_no_integers(value: object) -> None:
    assert as_whole(value) is None


@pytest.mark.parametrize("start", [1, 5, 100])
def test_the_least_number_is_that_of_trying_them_all(start: int) -> None:
    for least in range(1, 300):
        assert least_whole(lambda n, least=least: n >= least, start) == max(least, start)
    assert least_whole(lambda _: False) is None


@pytest.mark.parametrize("sigma", REAL, ids=repr)
def test_a_smoothed_classifier_takes_them_and_gives_the_same_bits(sigma: object) -> None:
    plain = rush.SmoothedClassifier(_network(), 0.25, 2)
    other = rush.SmoothedClassifier(_network(), sigma, np.int64(2), image_shape=(np.int64(1), 2, 2))  # type: ignore[arg-type]
    assert type(other.sigma) is float
    assert type(other.num_classes) is int
    assert other.image_shape == (1, 2, 2)
    expected = plain.predict(LABELLED[0], num_samples=100, alpha=0.25, seed=3)
    found = other.predict(LABELLED[0], num_samples=np.int32(100), alpha=sigma, seed=np.array(3))  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    assert torch.equal(
        other.log_probs(LABELLED[0], np.int64(4), stream(np.int64(1), "a")),
        plain.log_probs(LABELLED[0], 4, stream(1, "a")),
    )
    assert Gaussian(sigma) == Gaussian(0.25)  # type: ignore[arg-type]


def test_certificates_record_plain_numbers() -> None:
    smoothed = rush.SmoothedClassifier(_network(), np.float32(0.25), 2)
    given = {
        "num_selection": np.int64(50), "num_estimation": np.int32(300), "alpha": np.float32(0.25),
        "radii": np.array([0.0, 0.125]), "futility": Fraction(1, 8), "seed": np.uint8(1), "in_flight": np.int64(3),
    }  # fmt: skip
    found = rush.certify(smoothed, LABELLED, "sequential", **given)  # type: ignore[arg-type]
    plain = rush.certify(smoothed, LABELLED, "sequential", 50, 300, 0.25, (0.0, 0.125), futility=0.125, seed=1)
    assert json.loads(found.rule.to_json()) == json.loads(plain.rule.to_json())
    np.testing.assert_array_equal(found.radius, plain.radius)
    assert found.accuracy(Fraction(1, 8)) == plain.accuracy(np.float32(0.125)) == plain.accuracy(0.125)  # type: ignore[arg-type]
    for radius in (math.nan, -0.1, True):
        with pytest.raises(InputError, match="radius must be a finite number >= 0"):
            found.accuracy(radius)


def test_a_rule_refuses_what_is_no_number() -> None:
    given = {
        "sigma": 0.25, "method": "clopper-pearson", "alpha": 0.001, "level": "image", "num_images": 3,
        "num_selection": 10, "radii": None, "futility": 0.01,
    }  # fmt: skip
    with pytest.raises(InputError, match=r"alpha must lie in \(0, 0\.5\), got True"):
        make_rule(**{**given, "alpha": True}, num_estimation=100)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"num_estimation must be an integer >= 1, got 100\.0"):
        make_rule(**given, num_estimation=100.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"for one radius give \(0\.1,\)"):
        make_rule(**{**given, "radii": 0.1}, num_estimation=100)  # type: ignore[arg-type]
    for radii in ({0.1, 0.2}, iter([0.2, 0.1]), torch.tensor([0.1, 0.2], dtype=torch.float64)):
        assert make_rule(**{**given, "radii": radii}, num_estimation=1000).radii == (0.1, 0.2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="radii must be finite numbers >= 0"):
        make_rule(**{**given, "radii": [0.1, math.inf]}, num_estimation=100)  # type: ignore[arg-type]


def test_attacks_verdicts_and_audits_take_them() -> None:
    given = {"steps": np.int64(2), "step_size": np.float32(0.0625), "restarts": np.array(2), "seed": np.int64(1)}
    threat = rush.ThreatModel("linf", np.float64(0.1))
    assert type(threat.epsilon) is float
    found = rush.attack(_network(), LABELLED, threat, targets=np.array([1]), alpha=np.float64(0.01), **given)  # type: ignore[arg-type]
    plain = rush.attack(_network(), LABELLED, THREAT, steps=2, step_size=0.0625, restarts=2, targets=(1,), seed=1)
    assert torch.equal(found.adversarial, plain.adversarial)
    assert found.plan == plain.plan
    assert {type(value) for value in (found.plan.steps, found.plan.restarts, *found.plan.targets)} == {int}
    verdict(
        _network(),
        LABELLED,
        found.adversarial,
        threat,
        max_votes=np.int64(100),
        alpha=Fraction(1, 100),
        seed=np.int8(2),
    )  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed must be an integer >= 0"):
        rush.attack(_network(), LABELLED, threat, seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tolerance is a share of images"):
        audit(_network(), LABELLED, threat, tolerance=True)
    assert VerdictSettings.checked(np.float32(0.25), np.int64(100), np.int64(0)) == VerdictSettings(0.25, 100, 0)  # type: ignore[arg-type]


def test_a_threat_model_takes_an_array_of_one_epsilon_per_image() -> None:
    threat = rush.ThreatModel("linf", np.linspace(0.05, 0.1, 6))  # type: ignore[arg-type]
    assert isinstance(threat.epsilon, torch.Tensor)
    assert rush.attack(_network(), LABELLED, threat, "fgsm").linf.max() <= 0.1 + 1e-6
    assert rush.ThreatModel("l2", torch.tensor(0.5)).epsilon == 0.5
    for wrong in (np.array([0.1, np.nan]), np.array([True]), "0.1", np.array(["a"])):
        with pytest.raises(InputError, match="epsilon must be a finite number > 0"):
            rush.ThreatModel("linf", wrong)  # type: ignore[arg-type]


def test_subsets_of_images_take_them() -> None:
    images = ImageSet(
        torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2), torch.tensor([0, 1] * 5), ("a", "b"),
        np.array([str(i) for i in range(10)]), "own", "train",
    )  # fmt: skip
    assert len(stratified_subset(images, np.int64(4), stream(0, "a"))) == 4
    assert len(stratified_subset(images, np.float32(0.5), stream(0, "a"))) == 5
    assert [len(part) for part in hold_out(images, np.int64(3), stream(0, "a"))] == [7, 3]
    assert len(rush.load_images("digits", size=np.int64(4)).images[0, 0]) == 4


def test_one_logit_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"num_classes must be an integer >= 2, got 1; .*torch\.cat\(\[-z, z\], 1\)"):
        rush.SmoothedClassifier(_network(), 0.25, 1)


LABELS = {
    "text": np.array(["0", "1", "0", "1", "0", "1"]),
    "list": [0, 1, 0, 1, 0, 1],
    "array of floats": np.array([0.0, 1, 0, 1, 0, 1]),
    "1.7": torch.tensor([0, 1, 0, 1.7, 0, 1]),
    "1.0": torch.tensor([0.0, 1, 0, 1, 0, 1]),
    "bool": torch.tensor([False, True] * 3),
    "too few": torch.tensor([0, 1]),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_no_integer_tensor_are_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(InputError, match=r"labels must be an integer tensor of shape \(6,\).*torch\.as_tensor"):
        labelled_pixels((LABELLED[0], LABELS[name]), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16])
def test_labels_of_every_integer_type_are_taken(dtype: torch.dtype) -> None:
    found = labelled_pixels((LABELLED[0], LABELLED[1].to(dtype)), 2)
    assert found.y.dtype == torch.int64
    assert torch.equal(found.y, LABELLED[1])
