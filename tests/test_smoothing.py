"""Votes, predictions and log-probabilities of a smoothed classifier, against slow counting and known probabilities."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import rush
from exact_models import DOOR_TILES, Bins, HalfSpace, PixelVote, Recorder, bins_with, square_half_space, square_images
from rush.data.checks import labelled_pixels
from rush.data.images import ImageSet
from rush.errors import InputError, ModelError
from rush.evaluation.attack import verdict
from rush.models.classifier import Normalize
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.smoothing.classifier import ABSTAIN, SmoothedClassifier
from rush.smoothing.noise import Gaussian


class Smooth(nn.Module):
    """A small network without kinks, drawn from a fixed stream: (B, 1, 2, 2) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        generator = stream(0, "smooth network")
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.flatten(1))))


def _smoothed(classifier: nn.Module, num_classes: int, sigma: float = 0.25, tile: int = 256) -> SmoothedClassifier:
    return SmoothedClassifier(classifier.eval(), sigma, num_classes, execution=Execution(tile=tile))


def _images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 2, 2, generator=stream(seed, "images"))


def _slow_block_votes(x: Tensor, num_samples: int, sigma: float, generators: list[torch.Generator]) -> Tensor:
    """Votes of ``PixelVote`` by blocks, one noisy copy at a time."""
    blocks = math.ceil(num_samples / 100)
    votes = torch.zeros(len(x), blocks, 4, dtype=torch.int64)
    for image, generator in enumerate(generators):
        for block in range(blocks):
            noise = torch.randn((100, 1, 2, 2), generator=generator) * sigma
            for sample in range(min(100, num_samples - 100 * block)):
                votes[image, block, int((x[image] + noise[sample]).flatten().argmax())] += 1
    return votes


@pytest.mark.parametrize("tile", [1, 7, 64, 100, 256])
@pytest.mark.parametrize("num_samples", [1, 99, 100, 101, 250, 300])
def test_votes_are_those_of_slow_counting_whatever_the_tile(num_samples: int, tile: int) -> None:
    smoothed, x = _smoothed(PixelVote(), 4, tile=tile), _images(3)
    ids = ["a", "b", "c"]
    expected = _slow_block_votes(x, num_samples, 0.25, smoothed.streams(5, "test", ids))
    found = smoothed.vote_blocks(x, num_samples, smoothed.streams(5, "test", ids))
    assert torch.equal(found, expected)
    assert torch.equal(smoothed.counts(x, num_samples, smoothed.streams(5, "test", ids)), expected.sum(1))
    assert (expected.sum((0, 1)) > 0).sum() >= 2  # votes went to several classes


def test_every_batch_the_classifier_sees_is_one_full_tile() -> None:
    recorder = Recorder(PixelVote())
    smoothed, x = _smoothed(recorder, 4, tile=64), _images(5)
    smoothed.counts(x, 150, smoothed.streams(0, "test", list("abcde")))
    assert {len(batch) for batch in recorder.inputs} == {64}
    assert recorder.forward_rows == (DOOR_TILES + math.ceil(5 * 150 / 64)) * 64
    smoothed.counts(x, 150, smoothed.streams(0, "test", list("abcde")))
    assert recorder.forward_rows == (DOOR_TILES + 2 * math.ceil(5 * 150 / 64)) * 64  # looked at once


def test_the_votes_for_an_image_depend_on_no_other_image() -> None:
    smoothed, x = _smoothed(PixelVote(), 4, tile=64), _images(6)
    ids = list("abcdef")
    whole = smoothed.counts(x, 230, smoothed.streams(0, "test", ids))
    for chosen in ([4], [5, 0], [3, 2, 1]):
        part = smoothed.counts(x[chosen], 230, smoothed.streams(0, "test", [ids[i] for i in chosen]))
        assert torch.equal(part, whole[chosen])
    assert len(whole.unique(dim=0)) == 6


def test_a_generator_goes_on_by_whole_blocks() -> None:
    """200 votes are the next 100 after 100, which sequential judging relies on."""
    smoothed, x = _smoothed(PixelVote(), 4), _images(2)
    at_once = smoothed.vote_blocks(x, 200, smoothed.streams(0, "test", ["a", "b"]))
    generators = smoothed.streams(0, "test", ["a", "b"])
    first, second = smoothed.vote_blocks(x, 100, generators), smoothed.vote_blocks(x, 100, generators)
    assert torch.equal(at_once, torch.cat([first, second], 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_noise_is_float32_gaussian_of_the_stated_deviation_in_pixel_units_and_not_clipped(sigma: float) -> None:
    """Also where the classifier normalizes and the forward runs in bfloat16.

    160,000 draws at two pixels at the edge of the range. Odds of failing by chance: four statistics beyond five
    standard errors, < 3e-6; and one Kolmogorov-Smirnov test at 1e-6.
    """
    recorder = Recorder(nn.Sequential(Normalize([0.5], [0.1]), nn.Flatten()))
    execution = Execution(precision="bfloat16", channels_last=True)
    smoothed = SmoothedClassifier(recorder.eval(), sigma, 2, execution=execution)
    x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    smoothed.counts(x, 80_000, smoothed.streams(0, "test", ["a"]))
    seen = torch.cat(recorder.inputs[DOOR_TILES:])[:80_000]
    assert seen.dtype == torch.float32
    noise = (seen - x).double().flatten().numpy()
    assert (seen < 0).float().mean() > 0.2
    assert (seen > 1).float().mean() > 0.2
    n = len(noise)
    assert abs(noise.mean()) < 5 * sigma / math.sqrt(n)
    assert abs(noise.std() / sigma - 1) < 5 / math.sqrt(2 * n)
    assert stats.kstest(noise / sigma, "norm").pvalue > 1e-6
    first, second = noise.reshape(-1, 2).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(n / 2)
    assert abs(np.corrcoef(noise[2:], noise[:-2])[0, 1]) < 5 / math.sqrt(n)


def test_the_share_of_votes_is_the_probability_in_pixel_units_even_at_the_edge_of_the_box() -> None:
    """A half-space behind a normalization layer, at a black corner: clipping the noisy pixels, or noise in normalized
    units, would give another probability.

    Odds of failing by chance: two shares beyond five standard errors, < 2e-6.
    """
    normalize = Normalize([0.3], [0.2])
    plane = HalfSpace(torch.tensor([[[1.0, -1.0], [1.0, -1.0]]]), 0.1)  # in normalized units: margin = 0.1 * 0.2 / 2
    smoothed = _smoothed(nn.Sequential(normalize, plane), 2, sigma=0.1)
    x = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]]]])
    expected = 0.5 * (1 + math.erf(0.01 / 0.1 / math.sqrt(2)))
    share = smoothed.counts(x, 40_000, smoothed.streams(0, "test", ["a"]))[0, 1].item() / 40_000
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 40_000)
    assert expected - 0.5 > 15 * math.sqrt(0.25 / 40_000)
    one_sided = HalfSpace(
        torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), 0.02
    )  # class 0 where a black pixel falls below -0.02
    below = _smoothed(one_sided, 2, sigma=0.1).counts(x, 40_000, smoothed.streams(0, "test", ["b"]))
    expected = 0.5 * (1 + math.erf(0.2 / math.sqrt(2)))
    assert abs(below[0, 1].item() / 40_000 - expected) < 5 * math.sqrt(0.25 / 40_000)


def test_predict_is_right_where_the_class_is_clear() -> None:
    """Margins of at least 0.8 sigma: p >= 0.78. Odds of an abstention by chance: < 1e-60 an image."""
    margins = np.concatenate([np.linspace(-0.7, -0.2, 40), np.linspace(0.2, 0.7, 40)])
    x = square_images(margins, seed=0)
    predicted = _smoothed(square_half_space(), 2).predict(x)
    assert predicted.tolist() == [0] * 40 + [1] * 40


def test_predict_abstains_at_one_half_and_is_wrong_as_seldom_as_stated() -> None:
    """2,000 images on the boundary, where every answer is a false one; the exact rate of answers is 0.089.

    Odds of failing by chance: 2e-6. A test without the factor 2 of two-sided answers at rate 0.19 and is caught with
    probability > 1 - 1e-11.
    """
    x = square_images(np.zeros(2000), seed=1)
    predicted = _smoothed(square_half_space(), 2).predict(x, num_samples=100, alpha=0.1)
    answers = int((predicted != ABSTAIN).sum())
    k = np.arange(101)
    rate = 2 * stats.binom.pmf(k, 100, 0.5)[2 * stats.binom.sf(k - 1, 100, 0.5) <= 0.1].sum()
    assert stats.binom.isf(1 - 1e-6, 2000, rate) <= answers <= stats.binom.isf(1e-6, 2000, 0.1)


def test_an_abstention_is_no_class() -> None:
    """Tools that return zeros on abstention turn it into class 0, right for every image of class 0."""
    model, x = bins_with([0.5, 0.5], 0.25)
    predicted = _smoothed(model, 2).predict(x, num_samples=100)
    assert predicted.tolist() == [ABSTAIN]
    assert ABSTAIN == -1
    assert predicted.dtype == torch.int64


def test_numbers_of_votes_that_can_never_decide_are_refused_with_the_least_one_that_can() -> None:
    """Two-sided at 0.001: 2 / 2^10 > 0.001 >= 2 / 2^11."""
    x = square_images(np.full(20, 0.75), seed=2)
    smoothed = _smoothed(square_half_space(), 2)
    for too_few in (1, 10):
        with pytest.raises(InputError, match=f"num_samples = {too_few} cannot decide .* needs at least 11$"):
            smoothed.predict(x, num_samples=too_few, alpha=0.001)
    assert (smoothed.predict(x, num_samples=11, alpha=0.001) != ABSTAIN).any()
    with pytest.raises(InputError, match="needs at least 1002"):
        smoothed.predict(x, num_samples=1000, alpha=2.0**-1000)


def test_predict_compares_the_two_most_voted_classes_of_many() -> None:
    model, x = bins_with([0.3, 0.2, 0.5], 0.25)
    assert _smoothed(model, 3).predict(x, num_samples=1000).tolist() == [2]
    model, x = bins_with([0.45, 0.1, 0.45], 0.25)
    assert _smoothed(model, 3).predict(x, num_samples=1000, alpha=1e-6).tolist() == [ABSTAIN]


def test_predictions_follow_the_seed_and_neither_order_nor_company() -> None:
    x = square_images(np.linspace(-0.1, 0.1, 60), seed=3)
    smoothed = _smoothed(square_half_space(), 2, tile=64)
    first = smoothed.predict(x, num_samples=150, seed=4)
    assert torch.equal(first, smoothed.predict(x, num_samples=150, seed=4))
    assert torch.equal(first.flip(0), smoothed.predict(x.flip(0), num_samples=150, seed=4))
    assert torch.equal(first[10:11], smoothed.predict(x[10:11], num_samples=150, seed=4))
    assert not torch.equal(first, smoothed.predict(x, num_samples=150, seed=5))


def test_predict_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    smoothed = _smoothed(square_half_space(), 2)
    smoothed.predict(_images(2), num_samples=11)
    smoothed.log_probs(_images(2), 4, stream(0, "test"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_log_probs_are_the_log_of_the_mean_probability_written_slowly() -> None:
    network, x = Smooth(), _images(5)
    found = _smoothed(network, 3).log_probs(x, 7, stream(0, "test"))
    noise = torch.randn((5, 7, 1, 2, 2), generator=stream(0, "test")) * 0.25
    for image in range(5):
        mean = sum(network((x[image] + noise[image, m])[None])[0].double().softmax(0) for m in range(7)) / 7
        torch.testing.assert_close(found[image].double(), torch.as_tensor(mean).log(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5))


def test_log_probs_with_one_generator_an_image_use_that_images_own_noise() -> None:
    network, x = Smooth(), _images(3)
    smoothed = _smoothed(network, 3)
    together = smoothed.log_probs(x, 6, [stream(0, name) for name in "abc"])
    alone = torch.cat([smoothed.log_probs(x[i : i + 1], 6, stream(0, name)) for i, name in enumerate("abc")])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_log_probs_do_not_underflow_where_every_sample_is_sure() -> None:
    plane = HalfSpace(torch.full((1, 2, 2), 500.0), -1000.0)
    x = square_images(np.array([0.7]), seed=0).requires_grad_(True)
    found = _smoothed(plane, 2, sigma=0.01).log_probs(x, 8, stream(0, "test"))
    assert found.isfinite().all()
    (gradient,) = torch.autograd.grad(found[0, 0], x)
    assert gradient.abs().min() > 100


def test_the_gradient_of_log_probs_is_that_of_finite_differences() -> None:
    smoothed, x = _smoothed(Smooth(), 3), _images(4)
    leaf = x.clone().requires_grad_(True)
    for label in range(3):
        (gradient,) = torch.autograd.grad(smoothed.log_probs(leaf, 9, stream(0, "test"))[:, label].sum(), leaf)
        for pixel in range(4):
            step = torch.zeros(4)
            step[pixel] = 0.01
            up, down = (
                smoothed.log_probs(x + sign * step.view(1, 1, 2, 2), 9, stream(0, "test")) for sign in (1.0, -1.0)
            )
            expected = (up - down)[:, label] / 0.02
            torch.testing.assert_close(gradient.flatten(1)[:, pixel], expected, rtol=1e-2, atol=1e-3)
        assert gradient.abs().max() > 0.05


def test_noise_is_fresh_at_every_call() -> None:
    smoothed, x, generator = _smoothed(Smooth(), 3), _images(2), stream(0, "test")
    first = smoothed.log_probs(x, 4, generator)
    assert not torch.equal(first, smoothed.log_probs(x, 4, generator))
    assert torch.equal(first, smoothed.log_probs(x, 4, stream(0, "test")))


def test_as_module_is_log_probs_with_fresh_noise() -> None:
    smoothed, x = _smoothed(Smooth(), 3), _images(2).requires_grad_(True)
    module = smoothed.as_module(num_samples=5, generator=stream(0, "test"))
    assert isinstance(module, nn.Module)
    assert not module.training
    own = stream(0, "test")
    for _ in range(2):
        assert torch.equal(module(x), smoothed.log_probs(x, 5, own))
    assert torch.autograd.grad(module(x)[:, 0].sum(), x)[0].abs().max() > 0


def test_without_a_generator_there_is_no_noise() -> None:
    smoothed = _smoothed(Smooth(), 3)
    with pytest.raises(InputError, match=r"give generator=rush\.stream"):
        smoothed.log_probs(_images(1), 4)
    with pytest.raises(InputError, match="generator"):
        smoothed.as_module()(_images(1))


@pytest.mark.parametrize("sigma", [0, 0.0, -0.25, math.nan, math.inf, True, "0.25"])
def test_a_sigma_that_is_no_positive_number_is_refused(sigma: object) -> None:
    with pytest.raises(InputError, match="sigma must be a finite number > 0"):
        SmoothedClassifier(Smooth(), sigma, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"got {sigma!r}"):
        Gaussian(sigma)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_classes", [None, 0, 1, -2, 2.0, True])
def test_fewer_than_two_classes_are_refused(num_classes: object) -> None:
    with pytest.raises(InputError, match=f"num_classes must be an integer >= 2, got {num_classes!r}"):
        SmoothedClassifier(Smooth(), 0.25, num_classes)  # type: ignore[arg-type]


def test_other_bad_constructions_are_refused() -> None:
    with pytest.raises(ModelError, match=r"torch\.nn\.Module.*got function"):
        SmoothedClassifier(lambda x: x, 0.25, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="either sigma or noise"):
        SmoothedClassifier(Smooth(), num_classes=3)
    with pytest.raises(InputError, match="either sigma or noise"):
        SmoothedClassifier(Smooth(), 0.25, 3, noise=Gaussian(0.25))
    with pytest.raises(InputError, match="2 class names for num_classes = 3"):
        SmoothedClassifier(Smooth(), 0.25, 3, classes=["cat", "dog"])
    assert SmoothedClassifier(Smooth(), num_classes=3, noise=Gaussian(0.5)).sigma == 0.5


BAD_PIXELS = {
    "int16": torch.zeros(2, 1, 2, 2, dtype=torch.int16),
    "no batch": torch.zeros(1, 2, 2),
    "no image": torch.zeros(0, 1, 2, 2),
    "a list": [[0.0]],
    "NaN": torch.full((1, 1, 2, 2), math.nan),
    "one NaN": torch.tensor([0.1, math.nan, 0.2, 0.3]).view(1, 1, 2, 2),
    "infinite": torch.full((1, 1, 2, 2), math.inf),
    "0 to 255": torch.full((1, 1, 2, 2), 128.0),
    "just above 1": torch.full((1, 1, 2, 2), 1.001),
    "normalized": torch.tensor([-1.9, 0.1, 0.5, 2.2]).view(1, 1, 2, 2),
}


@pytest.mark.parametrize("name", BAD_PIXELS)
def test_images_that_are_no_pixels_are_refused_everywhere(name: str) -> None:
    pattern = r"float tensor \(N, C, H, W\)|finite and lie in \[0, 1\]"
    with pytest.raises(InputError, match=pattern):
        _smoothed(square_half_space(), 2).predict(BAD_PIXELS[name])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=pattern):
        labelled_pixels((BAD_PIXELS[name], torch.zeros(1, dtype=torch.int64)))  # type: ignore[arg-type]


def test_predict_certify_and_verdict_take_the_same_images() -> None:
    """Tensors and NumPy arrays, of floats or uint8, in any byte order, and numbers of NumPy; the same bits of all."""
    smoothed, labels, threat = _smoothed(square_half_space(), 2), np.array([0, 1, 1]), rush.ThreatModel("linf", 0.1)
    eight = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 1, 2, 2), np.uint8))
    floats = eight.float() / 255
    names = np.array(["a", "b", "c"])
    images = ImageSet(eight, torch.from_numpy(labels), ("no", "yes"), names, "own", "test")
    predicted = smoothed.predict(floats, 100)
    certified = rush.certify(smoothed, (floats, torch.from_numpy(labels)), num_estimation=100)
    judged = verdict(smoothed, (floats, torch.from_numpy(labels)), floats, threat)
    for given in (eight, eight.numpy(), floats.numpy(), floats.numpy().astype(">f4"), floats.double(), floats[:]):
        assert torch.equal(smoothed.predict(given, np.int64(100), np.float64(0.001)), predicted)
        for y in (labels, labels.astype(np.uint8), torch.from_numpy(labels)):
            again = rush.certify(smoothed, (given, y), num_estimation=np.int64(100))
            assert np.array_equal(again.counts, certified.counts)
            assert again.ids == certified.ids
        assert np.array_equal(verdict(smoothed, (given, labels), given, threat).counts, judged.counts)
    for labelled in (images, labelled_pixels(images), (floats, labels)):
        assert torch.equal(smoothed.predict(labelled, 100), predicted)
    unlabelled = ImageSet(eight, None, ("no", "yes"), names, "own", "test")
    assert torch.equal(smoothed.predict(unlabelled, 100), predicted)
    with pytest.raises(InputError, match="got a NumPy array, int16 of shape"):
        smoothed.predict(eight.numpy().astype(np.int16), 100)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 1, 1]),
        torch.tensor([[0], [1]]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.tensor([0, 2]),
        torch.tensor([-1, 0]),
        [0, 1],
    ],
)
def test_labels_of_the_wrong_kind_number_or_range_are_refused(labels: object) -> None:
    with pytest.raises(InputError, match="labels must be"):
        labelled_pixels((_images(2), labels), 2)  # type: ignore[arg-type]


def test_images_without_labels_or_of_no_known_kind_are_refused() -> None:
    unlabelled = ImageSet(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), None, ("a", "b"), np.array(["0"]), "own", "test")
    with pytest.raises(InputError, match=r"own \(test\) has no labels"):
        labelled_pixels(unlabelled, 2)
    with pytest.raises(InputError, match="ImageSet or a pair"):
        labelled_pixels(_images(2), 2)  # type: ignore[arg-type]


def test_ids_are_a_function_of_the_pixels_alone() -> None:
    x = _images(20)
    labels = torch.zeros(20, dtype=torch.int64)
    ids = labelled_pixels((x, labels)).ids
    assert len(set(ids)) == 20
    assert labelled_pixels((x[5:8].double(), labels[5:8] + 1)).ids == ids[5:8]
    assert labelled_pixels((x.view(20, 1, 1, 4), labels)).ids[0] != ids[0]


@pytest.mark.parametrize(
    ("num_samples", "alpha"),
    [(0, 0.1), (-5, 0.1), (10.5, 0.1), (True, 0.1), (10, 0.0), (10, 1.0), (10, math.nan)],
)
def test_numbers_that_predict_cannot_use_are_refused(num_samples: int, alpha: float) -> None:
    with pytest.raises(InputError, match=r"num_samples must be an integer >= 1|alpha must lie in \(0, 1\)"):
        _smoothed(square_half_space(), 2).predict(_images(1), num_samples, alpha)


def test_a_generator_too_few_is_refused_and_never_shared() -> None:
    smoothed, x = _smoothed(Smooth(), 3), _images(2)
    for call in (smoothed.log_probs, smoothed.vote_blocks):
        with pytest.raises(InputError, match="got 1 generators for 2 images; give one per image"):
            call(x, 4, smoothed.streams(0, "test", ["a"]))
    with pytest.raises(InputError, match="num_samples must be an integer >= 1, got 0"):
        smoothed.log_probs(x, 0, stream(0, "test"))


def test_images_that_carry_gradients_are_predicted_like_others() -> None:
    smoothed, x = _smoothed(Smooth(), 3), _images(2)
    expected = smoothed.predict(x, num_samples=100)
    assert torch.equal(smoothed.predict(x.clone().requires_grad_(True), num_samples=100), expected)


def test_a_network_in_training_mode_is_refused_by_votes_and_by_gradients() -> None:
    """Batch statistics make a row depend on its tile: here, on copies of one image."""
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    network[1].train()
    smoothed = SmoothedClassifier(network, 0.25, 3)
    with pytest.raises(ModelError, match=r"training mode \(first such layer: 1, 1 in all\).*eval\(\)"):
        smoothed.predict(_images(1))
    with pytest.raises(ModelError, match="training mode"):
        smoothed.log_probs(_images(1), 4, stream(0, "test"))
    network.eval()
    assert smoothed.predict(_images(1), num_samples=100).shape == (1,)


class Wrong(nn.Module):
    """Logits that no classifier should give."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = x.flatten(1)[:, :3] + 0.0
        if self.kind == "too few classes":
            return logits[:, :2]
        if self.kind == "no class axis":
            return logits[:, 0]
        if self.kind == "summed over the batch":
            return logits.sum(0, keepdim=True)
        logits[0, 1] = math.nan if self.kind == "NaN" else math.inf
        return logits


@pytest.mark.parametrize("kind", ["too few classes", "no class axis", "summed over the batch", "NaN", "infinite"])
def test_logits_of_the_wrong_shape_or_not_finite_are_refused(kind: str) -> None:
    smoothed, x = _smoothed(Wrong(kind), 3), _images(2)
    pattern = "expected" if kind not in {"NaN", "infinite"} else "not finite"
    with pytest.raises(ModelError, match=pattern):
        smoothed.predict(x, num_samples=100)
    with pytest.raises(ModelError, match=pattern):
        smoothed.log_probs(x, 4, stream(0, "test"))


def test_bins_have_the_probabilities_they_state() -> None:
    """The oracle itself. Odds of failing by chance: three shares beyond five standard errors, < 2e-6."""
    model, x = bins_with([0.2, 0.35, 0.45], 0.25)
    assert isinstance(model, Bins)
    smoothed = _smoothed(model, 3)
    shares = smoothed.counts(x, 50_000, smoothed.streams(0, "test", ["a"]))[0] / 50_000
    assert (shares - torch.tensor([0.2, 0.35, 0.45])).abs().max() < 5 * math.sqrt(0.25 / 50_000)
