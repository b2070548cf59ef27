"""Heads on cached noisy features: the certificates of the whole network, to the bit, without running the encoder."""

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rush
from certifying import assert_same
from exact_models import Later, PixelVote, Recorder
from rush.certification.certificates import Certificates
from rush.certification.features import NoisyFeatures, cache_gigabytes
from rush.data.images import ImageSet
from rush.errors import InputError, ModelError, NumericsWarning
from rush.models.classifier import Classifier
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.noise import Gaussian, Noise
from rush.smoothing.outputs import noisy_copies

SIGMA, SELECTION, ESTIMATION = 0.25, 30, 1230  # the votes end in a block of 30
# Some processors give a row other last bits at another place in the tile, which turns one vote in a million.
pytestmark = pytest.mark.filterwarnings("ignore::rush.errors.NumericsWarning")


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return rush.load_images("digits", split="test")[:7]


def split(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    assert isinstance(network, Classifier)
    return nn.Sequential(network.normalize, network.encoder).eval(), network.head


def drawn(encoder: nn.Module, images: ImageSet, **given: Any) -> NoisyFeatures:
    given = {"num_selection": SELECTION, "num_estimation": ESTIMATION, "seed": 3, **given}
    return rush.noisy_features(encoder, images, None if "noise" in given else SIGMA, **given)


def whole(features: NoisyFeatures, head: nn.Module, images: ImageSet, **given: Any) -> Certificates:
    network = nn.Sequential(features.encoder, head).eval()
    smoothed = SmoothedClassifier(network, noise=features.noise, num_classes=10, execution=features.execution)
    given = {"num_selection": SELECTION, "num_estimation": ESTIMATION, "seed": 3, **given}
    return rush.certify(smoothed, images, **given)


def another_head(width: int) -> nn.Module:
    layers = nn.Sequential(nn.Linear(width, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))
    return seeded_init(layers, stream(0, "another head")).eval()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"level": "family", "alpha": 0.05, "radii": (0.1, 0.2)},
        {"bound": "two-classes"},
        {"method": "sequential"},
        {"method": "sequential", "bound": "beta", "radii": (0.1, 0.3)},
        {"method": "sequential", "bound": "two-classes"},
    ],
)
def test_certificates_are_those_of_the_whole_network(
    digits_network: nn.Module, images: ImageSet, given: dict[str, Any]
) -> None:
    encoder, head = split(digits_network)
    features = drawn(encoder, images)
    for each in (head, another_head(features.features.shape[2])):
        expected = whole(features, each, images, **given)
        assert_same(features.certify(each, 10, **given), expected)
        assert len(set(expected.selected)) > 1
    assert features.certify(head, 10, **given).correct.any()


@pytest.mark.parametrize("noise", [Gaussian(SIGMA), rush.DiscreteGaussian(SIGMA), rush.Laplace(SIGMA)])
@pytest.mark.parametrize("execution", [Execution(tile=64, folded=True), Execution(tile=9, channels_last=True)])
def test_under_every_noise_and_form_of_the_forward(
    digits_network: nn.Module, images: ImageSet, noise: Noise, execution: Execution
) -> None:
    encoder, head = split(digits_network)
    features = drawn(encoder, images[:4], noise=noise, execution=execution, num_estimation=330)
    assert_same(features.certify(head, 10), whole(features, head, images[:4], num_estimation=330))


def test_bfloat16_features_are_kept_as_they_are(digits_network: nn.Module, images: ImageSet) -> None:
    encoder, head = split(digits_network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericsWarning)
        features = drawn(encoder, images, execution=Execution(precision="bfloat16", channels_last=True))
        certificates, expected = features.certify(head, 10), whole(features, head, images)
    assert features.features.dtype == torch.bfloat16
    recorder = Recorder(head)
    features.certify(recorder, 10)
    assert {each.dtype for each in recorder.inputs} == {torch.bfloat16}
    assert features.gigabytes == cache_gigabytes(7, SELECTION + ESTIMATION, features.features.shape[2], 2)
    if caught:  # rows depend on their place in the tile by a last bit
        np.testing.assert_allclose(certificates.counts, expected.counts, atol=10)
    else:
        assert_same(certificates, expected)


def test_a_network_of_rush_has_its_own_certificates(digits_network: nn.Module, images: ImageSet) -> None:
    encoder, head = split(digits_network)
    smoothed = SmoothedClassifier(digits_network, SIGMA, 10)
    expected = rush.certify(smoothed, images, num_selection=SELECTION, num_estimation=ESTIMATION, seed=3)
    assert_same(drawn(encoder, images).certify(head, 10), expected, but="model")


def test_the_encoder_runs_once(digits_network: nn.Module, images: ImageSet) -> None:
    encoder, head = split(digits_network)
    recorder = Recorder(encoder)
    features = drawn(recorder, images)
    rows = recorder.forward_rows
    assert rows < 1.3 * 7 * (SELECTION + ESTIMATION) + 6 * 256  # padding, the inspection and the sentinel
    first = features.certify(head, 10)
    assert recorder.forward_rows == rows
    assert_same(features.certify(head, 10), first)


def test_labels_of_another_set_are_the_heads(digits_network: nn.Module, images: ImageSet) -> None:
    encoder, head = split(digits_network)
    features = drawn(encoder, images)
    parity = nn.Sequential(head, Parity()).eval()
    assert images.labels is not None
    certificates = features.certify(parity, 2, labels=images.labels % 2)
    assert certificates.selection.shape == (7, 2)
    assert certificates.labels.tolist() == (images.labels % 2).tolist()
    assert certificates.accuracy() > 0.5
    assert features.compose(parity, 2).fingerprint() == certificates.model
    with pytest.raises(InputError, match="labels must be 0 to 1, got 0 to"):
        features.certify(parity, 2)


class Parity(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return torch.stack([logits[:, ::2].amax(1), logits[:, 1::2].amax(1)], 1)


def test_the_size_is_told_before_anything_is_drawn(images: ImageSet) -> None:
    assert cache_gigabytes(1000, 10_100, 512) == pytest.approx(20.6848)
    recorder = Recorder(nn.Sequential(nn.Flatten(), nn.Linear(64, 16)).eval())
    most = 7 * 200 * 16 * 4 / 1e9  # holds 7 images with 200 votes
    with pytest.raises(InputError) as refused:
        rush.noisy_features(recorder, images, SIGMA, 30, 171, max_gigabytes=most)
    assert recorder.forward_rows == 2
    found = re.search(r"= 8.96e-05: (\d+) images would fit.*, or (\d+) copies per image", str(refused.value))
    assert found is not None
    assert [int(number) for number in found.groups()] == [6, 200]
    assert rush.noisy_features(recorder, images, SIGMA, 30, 170, max_gigabytes=most).gigabytes == most
    assert len(rush.noisy_features(recorder, images[:6], SIGMA, 30, 171, max_gigabytes=most)) == 6


def test_what_cannot_be_cached_is_refused(digits_network: nn.Module, images: ImageSet) -> None:
    encoder, head = split(digits_network)
    with pytest.raises(InputError, match='compile_mode="none"'):
        drawn(encoder, images, execution=Execution(compile_mode="default"))
    with pytest.raises(InputError, match="give either sigma or noise"):
        rush.noisy_features(encoder, images)
    with pytest.raises(InputError, match="all draws of splitting noise vote"):
        rush.noisy_features(encoder, images, noise=rush.Splitting(SIGMA))
    with pytest.raises(InputError, match="max_gigabytes must be a finite number > 0, got 0"):
        drawn(encoder, images, max_gigabytes=0)
    with pytest.raises(ModelError, match=r"returned torch.float32 of shape \(2, 4, 6, 6\) .* a Flatten"):
        drawn(nn.Conv2d(1, 4, 3).eval(), images)
    with pytest.raises(ModelError, match="training mode"):
        drawn(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), images)
    features = drawn(encoder, images)
    with pytest.raises(ModelError, match="training mode"):
        features.certify(nn.Linear(features.features.shape[2], 10), 10)
    with pytest.raises(ModelError, match="neighbours in the tile"):
        features.certify(nn.Sequential(head, Centred()).eval(), 10)


class Centred(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(0)


def test_a_changed_encoder_is_noticed(images: ImageSet) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16)).eval().requires_grad_(False)
    features, head = drawn(encoder, images), nn.Linear(16, 10).eval()
    features.certify(head, 10)
    encoder[1].weight[0, 0] += 1
    with pytest.raises(ModelError, match="have changed since"):
        features.certify(head, 10)


@pytest.mark.parametrize("part", ["encoder", "head"])
def test_a_part_that_changes_is_noticed_at_the_end(images: ImageSet, part: str) -> None:
    """In tiles too small for an image that is in each of them."""
    parts = {"encoder": PixelVote(), "head": PixelVote(), part: Later(1.0)}
    with pytest.raises(ModelError, match="no longer those that it gave before"):
        drawn(parts["encoder"], images[:1], num_estimation=100, execution=Execution(tile=9)).certify(parts["head"], 64)


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [7, 16, 250])
def test_outputs_give_the_votes_of_the_same_noise(digits_network: nn.Module, images: ImageSet, tile: int) -> None:
    smoothed = SmoothedClassifier(digits_network, SIGMA, 10, execution=Execution(tile=tile))
    x, names = images.pixels(), [str(name) for name in images.ids]
    votes = smoothed.vote_blocks(x, 130, smoothed.streams(0, "test", names))
    streams = smoothed.streams(0, "test", names)
    parts = (
        part
        for image, generator in zip(x, streams, strict=True)
        for part in noisy_copies(image, 130, smoothed.noise, generator)
    )
    rows, classes = zip(*((len(rows), logits.argmax(1)) for rows, logits in smoothed.outputs(parts)), strict=True)
    assert sum(rows) == 7 * 130
    counted = torch.stack([each.bincount(minlength=10) for each in torch.cat(classes).split(130)])
    assert counted.tolist() == votes.sum(1).tolist()


@pytest.mark.parametrize(("value", "text"), [(1.0, "an image that is in every tile"), (torch.nan, "not finite")])
def test_a_tile_that_changes_the_kept_image_is_refused(value: float, text: str) -> None:
    smoothed = SmoothedClassifier(Later(value), SIGMA, 4, execution=Execution(tile=20))
    parts = noisy_copies(torch.full((1, 2, 2), 0.5), 2000, smoothed.noise, stream(0, "test"))
    with pytest.raises(ModelError, match=text):
        list(smoothed.outputs(parts))


def test_certificates_depend_on_no_tile(digits_network: nn.Module, images: ImageSet) -> None:
    encoder, head = split(digits_network)
    first, second = (drawn(encoder, images, execution=Execution(tile=tile)) for tile in (250, 40))
    assert_same(first.certify(head, 10), second.certify(head, 10), but="model")
