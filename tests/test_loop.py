"""The training loop visits, steps and resumes as it says; the two trainings touch what they may and nothing else."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rush.choices import OptimizerName
from rush.data.batches import Batch, Resident
from rush.data.images import ImageSet, stratified_subset
from rush.data.sources import load_images
from rush.errors import ConfigError, DataError
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import SmallEncoder
from rush.models.heads import linear_head
from rush.recipe.load import load_recipe
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.noise import Gaussian
from rush.training.loop import TrainingRun
from rush.training.optim import build_optimizer, cosine_factor
from rush.training.pretrain import channel_statistics
from trainings import FINETUNE, PER_EPOCH, SCHEDULE, SIMCLR, Training, bits, classifier, digits, finetuned, pretrained


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (7, 0.75), (8.5, 0.5), (10, 0.25), (13, 0.0), (20, 0.0)],
)
def test_the_learning_rate_rises_over_the_warm_up_and_falls_along_half_a_cosine(step: int, factor: float) -> None:
    # 4 steps of warm-up, then 9: at a third of them 0.5 (1 + cos 60 degrees) = 0.75
    assert cosine_factor(step, total_steps=13, warmup_steps=4) == pytest.approx(factor, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_whole_learning_rate() -> None:
    assert cosine_factor(0, 10, 0) == 1.0
    assert cosine_factor(0, 0, 0) == 1.0


def test_biases_and_normalization_are_neither_decayed_nor_adapted_and_frozen_weights_are_left_out() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2), nn.Linear(2, 2))
    module[3].requires_grad_(False)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    optimizers: tuple[OptimizerName, ...] = ("sgd", "lars", "adamw")
    for own in optimizers:
        matrices, vectors = build_optimizer(module, own, 0.1, 0.9, 0.01).param_groups
        assert [names[id(parameter)] for parameter in matrices["params"]] == ["0.weight", "2.weight"]
        assert [names[id(parameter)] for parameter in vectors["params"]] == ["0.bias", "1.weight", "1.bias", "2.bias"]
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.01, 0.0)
        assert (matrices.get("adapt"), vectors.get("adapt")) == ((True, False) if own == "lars" else (None, None))
    with pytest.raises(ConfigError, match=r"unknown optimizer 'adam'; allowed: sgd, lars, adamw"):
        build_optimizer(module, "adam", 0.1, 0.9, 0.01)  # type: ignore[arg-type]


def numbered(count: int) -> Resident:
    """So many images of one pixel, each with its number as its label."""
    pixels = torch.zeros(count, 1, 1, 1, dtype=torch.uint8)
    names = [str(number) for number in range(count)]
    return Resident(ImageSet(pixels, torch.arange(count), tuple(names), np.array(names), "numbered", "train"))


class Scale(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))

    def step(self, *_: object) -> Tensor:
        """The loss is the weight."""
        loss = self.weight.sum()
        loss.backward()
        return loss.detach()


def test_every_step_is_taken_with_the_learning_rate_of_its_number() -> None:
    """A constant gradient of 1 moves the weight by the sum of all learning rates."""
    module, schedule = Scale(), SCHEDULE.replace(momentum=0.0, weight_decay=0.0, warmup_epochs=1.5, ema_decay=0.0)
    TrainingRun(module, module.step, name="test", images=numbered(35), schedule=schedule, seed=0).run()
    rates = [0.1 * cosine_factor(number, 3 * 4, 6) for number in range(3 * 4)]
    assert module.weight.item() == pytest.approx(1 - math.fsum(rates), abs=1e-12)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    seen: list[list[int]] = []
    numbers: list[float] = []
    module = Scale()

    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        assert batch.labels is not None
        assert epoch == len(seen) / 5
        seen.append(batch.labels.tolist())
        numbers.append(float(torch.rand(1, generator=generator)))
        return module.step()

    TrainingRun(module, step, name="test", images=numbered(43), schedule=SCHEDULE, seed=0).run()
    assert [len(batch) for batch in seen] == [8] * 15
    epochs = [[index for batch in seen[5 * epoch : 5 * epoch + 5] for index in batch] for epoch in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 40  # three of 43 images do not fill a batch
        assert set(epoch) <= set(range(43))
    # by chance two orders of 40 agree in 20 places with odds below 1e-18
    assert all(sum(a == b for a, b in zip(epochs[i], epochs[j], strict=True)) < 20 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert len(set(numbers)) == 15  # every step has randomness of its own


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size = 8 exceeds the 7 training images; lower it to at most 7"):
        TrainingRun(Scale(), Scale().step, name="test", images=numbered(7), schedule=SCHEDULE, seed=0).run()


def test_every_epoch_is_logged_with_the_mean_of_its_losses() -> None:
    losses: list[float] = []

    def remember(_step: int, loss: Tensor) -> Tensor:
        losses.append(loss.item())
        return loss

    events = Training(disturb=remember).run().events
    told = [(own["event"], own["stage"], own["epoch"]) for own in events]
    assert told == [("epoch", "pretrain", number) for number in (1, 2, 3)]
    for own, of_epoch in zip(events, np.split(np.array(losses), 3), strict=True):
        assert own["loss"] == pytest.approx(of_epoch.mean(), rel=1e-6)
        assert own["images_per_second"] == pytest.approx(8 * PER_EPOCH / own["seconds"])


def test_every_epoch_is_logged_with_the_learning_rate_of_its_last_step() -> None:
    events = Training().run().events
    last = [number * PER_EPOCH - 1 for number in (1, 2, 3)]
    factors = [cosine_factor(step, 3 * PER_EPOCH, round(SCHEDULE.warmup_epochs * PER_EPOCH)) for step in last]
    rates = [event["learning_rate"] for event in events]
    assert rates == pytest.approx([SCHEDULE.learning_rate * factor for factor in factors], rel=1e-6)
    assert len(set(rates)) == 3


def test_pre_training_never_reads_labels() -> None:
    images = digits()
    assert images.labels is not None
    found = bits(pretrained(images=images))
    assert found != bits(classifier())
    assert bits(pretrained(images=images.without_labels())) == found
    assert bits(pretrained(images=replace(images, labels=images.labels.flip(0)))) == found
    assert bits(pretrained(images=images, seed=1)) != found


def test_pre_training_for_no_epochs_leaves_the_encoder_as_it_was() -> None:
    own = pretrained(SIMCLR.replace(epochs=0))
    assert bits(own) == bits(classifier())
    assert not own.encoder.training


def test_linear_fine_tuning_trains_the_head_and_touches_neither_weights_nor_statistics_of_the_encoder() -> None:
    before, own = classifier(), finetuned(FINETUNE.replace(mode="linear"))
    assert bits(own.encoder) == bits(before.encoder)
    assert bits(own.normalize) == bits(before.normalize)
    after, usual = bits(own.head), bits(before.head)
    assert after["weight"] != usual["weight"]
    assert after["bias"] != usual["bias"]
    assert not own.training
    assert not own.encoder.training
    assert all(parameter.requires_grad for parameter in own.parameters())


def test_full_fine_tuning_trains_every_weight_and_statistic() -> None:
    before, own = bits(classifier()), finetuned(FINETUNE.replace(mode="full"))
    changed = {name for name, value in bits(own).items() if value != before[name]}
    assert changed == set(before) - {"normalize.mean", "normalize.std"}
    assert not any(layer.training for layer in own.modules())


def test_fine_tuning_sees_noise_of_its_sigma() -> None:
    """The pixels that reach the classifier spread by sigma around the clean ones, and are not clipped."""
    images, seen = digits(64), []
    own = classifier()
    own.normalize.register_forward_pre_hook(lambda _module, given: seen.append(given[0].detach()))
    config = FINETUNE.replace(epochs=1, batch_size=64, shift=0)
    finetuned(config, images, start=own, noise=Gaussian(0.5))
    order = torch.randperm(64, generator=stream(0, "finetune", "order", 0))
    noise = seen[0] - images.pixels()[order]
    # 4,096 draws: the standard error of the standard deviation is 0.0055, of the mean 0.0078; five of them: odds 1e-6
    assert float(noise.std()) == pytest.approx(0.5, abs=0.028)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.039)
    assert float(seen[0].min()) < -0.5


def test_fine_tuning_needs_labels() -> None:
    with pytest.raises(DataError, match="has no labels; fine-tuning needs a labelled training split"):
        finetuned(images=digits().without_labels())


def test_channel_statistics_are_those_of_all_pixels() -> None:
    pixels = torch.randint(0, 256, (1003, 3, 4, 5), generator=stream(0, "pixels")).to(torch.uint8)
    pixels[:, 2] = 7  # a constant channel is not divided by zero
    images = ImageSet(pixels, None, ("a",), np.array([str(i) for i in range(1003)]), "random", "train")
    mean, std = channel_statistics(images)
    whole = pixels.double() / 255
    np.testing.assert_allclose(mean, whole.mean((0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(std[:2], whole.std((0, 2, 3), correction=0)[:2], atol=1e-9)
    assert std[2] == 1.0


RECIPE = load_recipe("digits")


def frozen_encoder_accuracy(epochs: int, labelled: ImageSet) -> float:
    """Test accuracy of a linear head on the digits recipe's encoder, pre-trained for ``epochs`` and frozen, by the
    vote of 16 noisy copies."""
    train_images, test = load_images("digits", "train"), load_images("digits", "test")
    encoder = SmallEncoder(RECIPE.model.width)
    own = Classifier(Normalize(*channel_statistics(train_images)), encoder, linear_head(encoder.features, 10))
    seeded_init(own, stream(RECIPE.seed, "classifier", "weights"))
    pretrained(RECIPE.pretrain.replace(epochs=epochs), train_images.without_labels(), start=own, seed=RECIPE.seed)
    noise = Gaussian(RECIPE.smoothing.sigma)
    head = FINETUNE.replace(mode="linear", epochs=150, batch_size=50, optimizer="adamw", learning_rate=4e-3)
    finetuned(head, labelled, start=own, seed=RECIPE.seed, noise=noise)
    return vote_accuracy(own, test, noise)


def vote_accuracy(own: nn.Module, test: ImageSet, noise: Gaussian) -> float:
    """Share of ``test`` whose label wins the vote of 16 noisy copies."""
    assert test.labels is not None
    draws = stream(0, "vote")
    with torch.no_grad():
        logits = [own(test.pixels() + noise.sample(test.images.shape, draws)) for _ in range(16)]
    votes = torch.stack([nn.functional.one_hot(own.argmax(1), 10) for own in logits]).sum(0)
    return float((votes.argmax(1) == test.labels).double().mean())


@pytest.mark.timeout(280)
def test_contrastive_pre_training_is_worth_points_of_accuracy(
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    """With ten labels a class, a linear head does better on the pre-trained encoder than on the untrained one.

    Nothing here is left to chance: on one machine and version of torch both figures are the same every time.
    """
    labelled = stratified_subset(load_images("digits", "train"), 100, stream(0, "labels"))
    untrained = frozen_encoder_accuracy(0, labelled)
    contrastive = frozen_encoder_accuracy(RECIPE.pretrain.epochs, labelled)
    record_testsuite_property("accuracy with untrained and with pre-trained encoder", (untrained, contrastive))
    assert contrastive - untrained >= 0.05, f"untrained {untrained:.1%}, pre-trained {contrastive:.1%}"
