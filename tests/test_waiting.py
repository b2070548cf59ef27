"""Nothing within a step waits for the device: on the meta device, where a value that is read is an error."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rush.attacks.apgd import apgd
from rush.attacks.gradient import fresh_noise
from rush.attacks.losses import cross_entropy, dlr, margin
from rush.attacks.pgd import pgd
from rush.attacks.threat import ThreatModel
from rush.choices import NoiseName, Norm
from rush.data.batches import Resident
from rush.data.sources import load_images
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import SmallEncoder
from rush.models.heads import linear_head
from rush.pipeline.context import training_noise
from rush.recipe.schema import Recipe
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.runtime.transfer import HostCopy, sent
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.forward import Forward
from rush.smoothing.inspection import Sentinel
from rush.smoothing.noise import make_noise
from rush.smoothing.votes import VoteCounter, VoteRequest
from rush.training.finetune import finetune
from rush.training.loop import TrainingRun, TrainingSettings
from rush.training.pretrain import pretrain
from tiny import tiny
from waiting import META, MetaGenerator, on_meta, refused, waits

STEPS = 3


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Execution:
    return on_meta(monkeypatch)


def classifier() -> Classifier:
    encoder = SmallEncoder(width=4, in_channels=3)
    return Classifier(Normalize([0.3] * 3, [0.38] * 3), encoder, linear_head(encoder.features, 10))


def steps_of(monkeypatch: pytest.MonkeyPatch, training: Callable[[], None]) -> tuple[list[str], int]:
    """What the steps of ``training`` would wait for, and the number of operations that they were of."""
    found: list[str] = []
    operations = 0

    def take_some_steps(run: TrainingRun) -> None:
        nonlocal operations
        order = stream(0, "order")
        with waits() as mode, run.meter.running():
            batches = run.images.batches(order, run.schedule.batch_size)
            for _ in range(STEPS):
                run._one_step(next(batches), SimpleNamespace())  # type: ignore[arg-type]
                run.number += 1
        found.extend(mode.found)
        operations += mode.operations

    monkeypatch.setattr(TrainingRun, "run", take_some_steps)
    training()
    return found, operations


def coloured(recipe: Recipe) -> Resident:
    """Three batches of colour images on the meta device; every operation of a view has a part in them."""
    images = load_images("digits", "train")[: 3 * recipe.pretrain.batch_size]
    return replace(images, images=images.images.expand(-1, 3, -1, -1))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "overrides",
    [
        (
            "pretrain.objective=simclr",
            "pretrain.views.blur=0.5",
            "pretrain.views.greyscale=0.2",
            "pretrain.ema_decay=0.9",
        ),
        ("pretrain.objective=simclr", "pretrain.micro_batch=50", "pretrain.optimizer=lars"),
        ("pretrain.noise.views=both", "pretrain.noise.ramp_epochs=1"),
        ("pretrain.objective=moco", "pretrain.queue=512", "pretrain.optimizer=adamw"),
        ("pretrain.objective=acl",),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_no_step_of_pre_training_waits(
    overrides: tuple[str, ...],
    meta: Execution,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    recipe = tiny(tmp_path, *overrides)
    images = Resident(coloured(recipe).without_labels(), "meta")
    network = classifier()
    found, operations = steps_of(
        monkeypatch,
        lambda: pretrain(
            images,
            network.encoder,
            network.normalize,
            recipe.pretrain,
            TrainingSettings(seed=0, execution=meta, log=refused),
        ),
    )
    assert found == []
    assert operations > 100 * STEPS


@pytest.mark.parametrize(
    "objective", ["standard", "gaussian", "consistency", "smoothadv", "cat-rs", "pgd-at", "trades"]
)
@pytest.mark.parametrize("mode", ["full", "linear"])
def test_no_step_of_fine_tuning_waits(
    objective: str,
    mode: str,
    meta: Execution,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    recipe = tiny(tmp_path, f"finetune.objective={objective}", f"finetune.mode={mode}", "finetune.flip=0.5")
    found, operations = steps_of(
        monkeypatch,
        lambda: finetune(
            coloured(recipe),
            classifier(),
            recipe.finetune,
            TrainingSettings(seed=0, execution=meta, log=refused),
            noise=training_noise(recipe),
        ),
    )
    assert found == []
    assert operations > 30 * STEPS


def smoothed(execution: Execution) -> SmoothedClassifier:
    network = classifier().eval()
    return SmoothedClassifier(execution.place(network), 0.25, 10, execution=execution, image_shape=(3, 8, 8))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("each", [False, True], ids=["one epsilon", "an epsilon each"])
@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr])
def test_no_step_of_an_attack_waits(
    norm: Norm,
    each: bool,
    loss: Callable[[Tensor, Tensor], Tensor],
    meta: Execution,
) -> None:
    x, y = torch.empty(4, 3, 8, 8, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    threat = ThreatModel(norm, torch.full((4,), 0.5) if each else 0.5)
    log_probs = fresh_noise(smoothed(meta), 4, [MetaGenerator() for _ in range(4)])
    with waits() as mode:
        pgd(log_probs, x, y, threat, steps=2, step_size=0.5, loss=loss, decay=0.9)
        apgd(log_probs, x, y, threat, steps=4, loss=loss)
        apgd(lambda points: log_probs(points), x, y, threat, steps=4, loss=loss)
    assert mode.found == []
    assert mode.operations > 1000


@pytest.mark.parametrize("noise", ["gaussian", "discrete", "uniform"])  # the meta device draws no exponentials
def test_no_tile_of_a_certification_waits(noise: NoiseName, meta: Execution) -> None:
    """Once the classifier has been inspected, and but for the tile that is asked again now and then."""
    own = replace(meta, tile=64)
    forward = Forward(smoothed(own).classifier, own, 10)
    forward._watch = SimpleNamespace(shape=(64, 3, 8, 8), observe=lambda *_: None)  # type: ignore[assignment]
    voter = VoteCounter(forward, make_noise(noise, 0.25), 10, own)
    pixels = torch.empty(3, 3, 8, 8, device="meta")
    voter._noisy(VoteRequest(pixels[0], MetaGenerator()))
    sentinel = object.__new__(Sentinel)
    sentinel._expected, sentinel._limit = torch.empty(10, device="meta"), 0.1
    voter._sentinel = sentinel
    with waits() as mode:
        voter.launch([VoteRequest(image, MetaGenerator()) for image in pixels], 3)
    assert mode.found == []
    assert mode.operations > 100


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to("meta"),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="meta"),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_what_waits_is_found(read: Callable[[Tensor], object]) -> None:
    with waits() as mode:
        try:
            read(torch.empty(3, device=META))
        except (RuntimeError, NotImplementedError):  # the meta device has no values
            assert mode.found
    assert mode.found


def test_copies_to_the_host_hold_what_was_there_when_they_were_begun() -> None:
    values, flag = torch.arange(3.0), torch.ones(())
    coming = HostCopy(values, flag)
    values.zero_()
    flag.zero_()
    assert [copy.tolist() for copy in coming.read()] == [[0.0, 1.0, 2.0], 1.0]
    assert sent(values, "cpu") is values
