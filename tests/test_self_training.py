"""Self-training of the first teacher: FixMatch against textbook code, and as a part of the stage teach."""

import json
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranks import on_ranks
from rush.commands.cost import measure
from rush.data.images import ImageSet
from rush.data.views import random_view, unit_float
from rush.models.classifier import Classifier, Normalize
from rush.models.heads import linear_head
from rush.pipeline.labels import TARGETS
from rush.pipeline.stages import run_stage
from rush.recipe.schema import FinetuneConfig, TeachConfig, Views
from rush.records.folder import RunFolder
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.training.loop import TrainingSettings
from rush.training.self_training import CONFIDENT, MOMENTUM, MovingTeacher, self_train
from test_teaching import teach_and_read
from tiny import differing, part_of, results_of_training, run_tiny, tiny

RATE, SIDE, CLASSES = 0.5, 6, 3
STRONG = Views(crop_scale=(0.5, 1.0))
CONFIG = FinetuneConfig(epochs=1, batch_size=16, learning_rate=RATE, momentum=0.0, weight_decay=0.0)
SELF_TAUGHT = ("teach.rounds=1", "teach.epochs=2", "finetune.label_fraction=0.05", "data.held_out=200")


class Pixels(nn.Module):
    """An encoder without BatchNorm, so that the textbook below can go image by image."""

    features = 8

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * SIDE * SIDE, self.features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def network() -> Classifier:
    encoder = Pixels()
    classifier = Classifier(Normalize([0.5] * 3, [0.05] * 3), encoder, linear_head(encoder.features, CLASSES))
    return seeded_init(classifier, stream(0, "self-training", "weights"))  # type: ignore[return-value]


def pictures(number: int, name: str) -> ImageSet:
    generator = stream(0, "self-training", name)
    pixels = torch.randint(0, 256, (number, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    ids = np.array([f"{name}/{row}" for row in range(number)])
    return ImageSet(pixels, torch.arange(number) % CLASSES, ("a", "b", "c"), ids, "random", "train")


def textbook(images: ImageSet, labelled: ImageSet, teach: TeachConfig, seed: int) -> tuple[dict[str, Tensor], int]:
    """The average of the weights after the last step, image by image in float64, and the number of confident images."""
    student, average = network(), {name: value.clone() for name, value in network().state_dict().items()}
    shares, steps, batch = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64), 3, CONFIG.batch_size
    order, answered = torch.randperm(len(images), generator=stream(seed, "teach-1", "order", 0)), 0
    for number in range(steps):
        average = {
            name: MOMENTUM * average[name] + (1 - MOMENTUM) * value for name, value in student.state_dict().items()
        }
        generator = stream(seed, "teach-1", "step", number)
        pixels = unit_float(images.images[order[number * batch : (number + 1) * batch]])
        weak = random_view(pixels, CONFIG.views, generator)
        chosen = torch.randint(len(labelled), (batch // 2,), generator=generator)
        known = random_view(unit_float(labelled.images[chosen]), CONFIG.views, generator)
        strong = random_view(pixels, STRONG, generator)
        teacher = network()
        teacher.load_state_dict(average)
        p = F.softmax(teacher(weak), 1).detach().double()
        shares = MOMENTUM * shares + (1 - MOMENTUM) * p.mean(0)
        total = torch.zeros((), dtype=torch.float64)
        for row in range(batch):
            q = p[row] / shares if teach.balance else p[row]
            q = q / q.sum()
            if q.max() < max(CONFIDENT, teach.threshold):
                continue
            answered += 1
            target = q ** (1 / teach.temperature) / (q ** (1 / teach.temperature)).sum()
            total = total - (target * F.log_softmax(student(strong[row : row + 1])[0].double(), 0)).sum() / batch
        assert labelled.labels is not None
        for row, place in enumerate(chosen.tolist()):
            answer = int(labelled.labels[place])
            total = total - F.log_softmax(student(known[row : row + 1])[0].double(), 0)[answer] / (batch // 2)
        gradients = torch.autograd.grad(total, list(student.parameters()))
        rate = RATE * 0.5 * (1 + np.cos(np.pi * number / steps))
        with torch.no_grad():
            for weight, gradient in zip(student.parameters(), gradients, strict=True):
                weight -= rate * gradient
    return average, answered


@pytest.mark.parametrize(
    "teach", [TeachConfig(epochs=1, balance=True), TeachConfig(epochs=1, temperature=0.25, threshold=0.95)]
)
def test_it_is_fixmatch_with_a_moving_teacher(teach: TeachConfig) -> None:
    images, labelled, seed = pictures(48, "all"), pictures(9, "labelled"), 5
    found = network()
    settings = TrainingSettings(seed, Execution())
    self_train(images, labelled, found, teach, CONFIG, STRONG, settings, "teach-1")
    expected, answered = textbook(images, labelled, teach, seed)
    assert 5 < answered < 43
    began = network().state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, expected[name].float(), atol=1e-6, rtol=1e-5)
    assert not found.training
    assert any(not torch.equal(value, began[name]) for name, value in found.state_dict().items())


def test_the_teacher_averages_weights_and_statistics_and_never_trains() -> None:
    encoder = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    student = Classifier(Normalize([0.0] * 3, [1.0] * 3), encoder, nn.Linear(3 * SIDE * SIDE, CLASSES))
    teacher = MovingTeacher(student, Execution(), CLASSES).train()
    assert not any(module.training for module in teacher.modules())
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    student.train()(torch.rand(8, 3, SIDE, SIDE, generator=stream(0, "x")))
    with torch.no_grad():
        student.head.weight.add_(1.0)  # type: ignore[operator, union-attr]
    teacher.follow(student)
    for name, value in teacher.network.state_dict().items():
        new = student.state_dict()[name]
        expected = MOMENTUM * before[name] + (1 - MOMENTUM) * new if value.is_floating_point() else new
        torch.testing.assert_close(value, expected)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.fixture(scope="module")
def self_taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stages = ("pretrain", "teach", "finetune")
    return run_tiny(tmp_path_factory.mktemp("self-taught"), *SELF_TAUGHT, stages=stages).path


def figures_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "stages/teach.json").read_text())


def test_the_stage_says_how_right_both_teachers_are_and_what_they_cost(self_taught: Path) -> None:
    figures = figures_of(self_taught)
    assert isinstance(figures["rounds"], list)
    assert figures["rounds"][0]["held_out"] > 0.5
    assert figures["rounds"][0] != figures["probe"]
    images, batch = figures["images"], 128
    assert isinstance(images, int)
    trained = 2 * (images // batch) * batch / images  # two epochs, without their incomplete batches
    assert figures["passes_per_image"] == pytest.approx(1.5 * trained)
    assert figures["forward_passes_per_image"] == pytest.approx(trained + 2)  # both teachers label all images
    with np.load(self_taught / TARGETS) as stored:
        assert stored["targets"].shape == (images, 10)


def test_a_self_training_that_was_killed_ends_with_the_same_bits(self_taught: Path, tmp_path: Path) -> None:
    run = part_of(self_taught, tmp_path / "again", "finetune", "teach")
    (run.path / "checkpoints/teach-1.previous.pt").rename(run.path / "checkpoints/teach-1.pt")
    for stage in ("teach", "finetune"):
        run_stage(RunFolder.open(run.path), stage)  # type: ignore[arg-type]
    assert not differing(results_of_training(self_taught), results_of_training(run.path))


@pytest.mark.timeout(240)
def test_two_processes_train_one_teacher(processes: ForkServerContext, self_taught: Path, tmp_path: Path) -> None:
    lost = ("finetune", "teach", "checkpoints/teach-1.pt", "checkpoints/teach-1.previous.pt")
    run = part_of(self_taught, tmp_path / "both", *lost)
    both = [part["targets"] for part in on_ranks(processes, partial(teach_and_read, run.path), 2, tmp_path)]
    assert torch.equal(both[0], both[1])
    with np.load(self_taught / TARGETS) as stored:
        alone = torch.from_numpy(stored["targets"])
    assert (both[0].argmax(1) == alone.argmax(1)).double().mean() > 0.6


def test_the_cost_of_a_recipe_has_that_of_its_teacher(tmp_path: Path) -> None:
    stages = {stage.stage: stage for stage in measure(tiny(tmp_path, *SELF_TAUGHT), 2).stages}
    assert set(stages) == {"pretrain", "teach", "finetune"}
    teacher = stages["teach"]
    assert teacher.epochs == 2
    trained = 2 * (teacher.images // 128) * 128 / teacher.images
    assert teacher.passes_per_image == pytest.approx(1.5 * trained)
    assert teacher.forward_passes_per_image == pytest.approx(trained)
