"""The cost of a recipe on this machine, extrapolated from a few measured steps and passes of each stage."""

import math
import multiprocessing
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from rush.choices import Stage
from rush.data.batches import Resident, batches_per_epoch
from rush.data.images import ImageSet
from rush.data.sources import NUM_CLASSES, SHAPES, SPLITS, load_images
from rush.errors import ConfigError, Interrupted, RushError
from rush.evaluation.model import Model
from rush.models.classifier import Classifier
from rush.pipeline.attackers import Attackers
from rush.pipeline.certify import run_rule
from rush.pipeline.context import smoothing_noise, training_noise
from rush.pipeline.estimate import Estimate, attack_estimate, audit_estimate, certify_estimate, measured_rates
from rush.pipeline.preconditions import labelled_count
from rush.pipeline.train import new_classifier, spec_of
from rush.recipe.schema import FinetuneConfig, Recipe, Schedule
from rush.reporting.costs import known_sum
from rush.reporting.wording import duration, energy_text, memory_text, passes_text
from rush.runtime.execution import Execution, decide_execution
from rush.runtime.machine import device_name
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier
from rush.training.budget import Plan, Times
from rush.training.finetune import finetune
from rush.training.loop import TrainingSettings
from rush.training.pretrain import pretrain
from rush.training.self_training import self_train

STEPS = 4
COST_HEADER = ("recipe", "network", "objectives", "passes per image", "steps", "s per step", "hours", "vs. first")
STAGE_HEADER = (
    "recipe", "stage", "images", "passes per image", "epochs", "steps", "s per step", "images/s", "time",
    "peak memory", "energy",
)  # fmt: skip
EVALUATION_HEADER = ("recipe", "stage", "images", "passes per image at most", "usual time", "time at most")
# Fields of a trial. Random images teach nothing, so the learning rate is nearly 0; a step costs the same.
_TRIAL: dict[str, Any] = {"minutes": None, "learning_rate": 1e-9, "warmup_epochs": 0.0}


@dataclass(frozen=True)
class DataSize:
    """Shape (C, H, W), number of classes, number of images of each training stage, and number of test images."""

    shape: tuple[int, int, int]
    num_classes: int
    pretrain: int
    finetune: int
    test: int


@dataclass(frozen=True)
class Extrapolated:
    """The extrapolated cost of one or more whole training stages.

    Attributes:
        objective: objective of each stage, joined by " + ".
        images: number of images that the stage draws from, the largest of several stages.
        steps: number of steps.
        passes: images that pass forward and backward.
        forward_passes: images that only pass forward.
        seconds: time of all steps.
        peak_memory: bytes, including the training images. None if the device does not report it.
        joules: energy of all steps. None if the device does not report it.
    """

    objective: str
    images: int
    steps: int
    passes: int
    forward_passes: int
    seconds: float
    peak_memory: int | None
    joules: float | None

    @property
    def passes_per_image(self) -> float:
        return self.passes / self.images

    @property
    def forward_passes_per_image(self) -> float:
        return self.forward_passes / self.images

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    def figures(self) -> dict[str, Any]:
        """Return all values for the JSON file, marked as extrapolated."""
        ratios = ("passes_per_image", "forward_passes_per_image", "seconds_per_step")
        return {**asdict(self), "extrapolated": True, **{name: getattr(self, name) for name in ratios}}


@dataclass(frozen=True)
class StageCost(Extrapolated):
    """The extrapolated cost of a whole training stage.

    Attributes:
        epochs: those of the recipe, or as many as fit into its minutes.
    """

    stage: Stage
    images_per_second: float
    epochs: int


@dataclass(frozen=True)
class RecipeCost:
    """The cost of all stages of a recipe, extrapolated from ``measured_steps`` of each training stage and a few passes.

    ``conditions`` describes the machine.
    """

    recipe: str
    network: str
    conditions: str
    measured_steps: int
    stages: tuple[StageCost, ...]
    evaluations: Mapping[Stage, Estimate]

    @property
    def total(self) -> Extrapolated:
        """The cost of all training stages together. Passes are counted per image of the stage that draws from most."""
        stages = self.stages
        return Extrapolated(
            objective=" + ".join(stage.objective for stage in stages),
            images=max(stage.images for stage in stages),
            steps=sum(stage.steps for stage in stages),
            passes=sum(stage.passes for stage in stages),
            forward_passes=sum(stage.forward_passes for stage in stages),
            seconds=sum(stage.seconds for stage in stages),
            peak_memory=_largest_known(stage.peak_memory for stage in stages),
            joules=known_sum([stage.joules for stage in stages]),
        )


def data_size(recipe: Recipe) -> DataSize:
    """Return shape and numbers of the recipe's training images, which are loaded unless their data set has a name.

    Raises:
        DataError: as in ``load_images``.
        ConfigError: at least as many images are held out as there are.
    """
    data, parts = recipe.data, recipe.data.pretrain_split.split("+")
    if data.name in SPLITS:
        counts = SPLITS[data.name]
        unknown = [part for part in parts if part not in counts]
        if unknown:
            raise ConfigError(f"{data.name} has no split {unknown[0]!r}; allowed are {', '.join(counts)}")
        channels, height, width = SHAPES[data.name]
        height, width = (data.size or height), (data.size or width)
        num_classes = {"digits": 10, **NUM_CLASSES}[data.name]
    else:
        needed = ["train", *parts, *([] if data.test_images else ["test"])]
        splits = {part: load_images(data.name, part, data.root, size=data.size) for part in dict.fromkeys(needed)}
        counts = {part: len(images) for part, images in splits.items()}
        channels, height, width = splits["train"].images.shape[1:]
        num_classes = splits["train"].num_classes
    if data.test_images:
        counts |= {"train": counts["train"] - data.test_images, "test": data.test_images}
    kept = counts["train"] - data.held_out
    if kept <= 0:
        raise ConfigError(f"data.held_out = {data.held_out} leaves none of {counts['train']} training images; lower it")
    pretraining = sum(kept if part == "train" else counts[part] for part in parts)
    labelled = labelled_count(recipe.finetune, kept, num_classes)
    finetuning = pretraining if recipe.teach.rounds else labelled
    return DataSize((channels, height, width), num_classes, pretraining, finetuning, counts["test"])


def measure(recipe: Recipe, steps: int = STEPS) -> RecipeCost:
    """Measure the cost of the recipe's stages on random 8-bit images.

    The functions, precision and device are those of a run. The time between steps (reading data, live figures,
    checkpoints) is not included. A stage with a limit in minutes gets the number of epochs whose steps alone fit.

    Args:
        recipe: the recipe to measure.
        steps: steps to measure per stage, after the same number of warm-up steps, which are not counted.

    Raises:
        ConfigError: ``steps`` is below 1, a batch is larger than the training set, or there are too few minutes.
        DataError: as in ``load_images``.

    Random:
        Images, labels and weights, from the recipe's seed.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    config = recipe.execution
    execution = decide_execution(config.device, config.precision, config.tile, config.deterministic)
    trial = _Trial(recipe, data_size(recipe), execution.configure(), steps)
    stages = [trial.pretrain()] if recipe.pretrain.epochs != 0 else []
    stages += [trial.teach()] if recipe.teach.rounds and recipe.teach.epochs else []
    model = recipe.model
    return RecipeCost(
        recipe.name,
        f"{model.encoder}, width {model.width}",
        conditions_text(trial.execution),
        steps,
        (*stages, trial.finetune()),
        trial.evaluations(),
    )


def measure_apart(recipe: Recipe, steps: int = STEPS) -> RecipeCost:
    """Return ``measure(recipe, steps)`` as a new process computes it, so that the peak memory is that of this recipe.

    Raises:
        RushError: as in ``measure``, or the process ends without an answer, e.g. because it ran out of memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, recipe.to_json(), steps, torch.get_num_threads())
    child = context.Process(target=_answer, args=arguments, daemon=True)
    child.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        child.join()
        raise RushError(
            f"{recipe.name}: the process that measured it ended without an answer (exit status {child.exitcode}), most "
            "likely because it ran out of memory; lower batch_size, or set pretrain.micro_batch"
        ) from None
    child.join()
    if isinstance(answer, RushError):
        raise answer
    assert isinstance(answer, RecipeCost)
    return answer


def conditions_text(execution: Execution) -> str:
    """Return the device, precision, threads and torch version that training uses."""
    name = device_name(execution.device)
    threads = f"{execution.threads} thread{'s' if execution.threads != 1 else ''}"
    return f"{execution.device} ({name}), {execution.precision}, {threads}, torch {torch.__version__}"


def cost_rows(costs: Sequence[RecipeCost]) -> list[tuple[str, ...]]:
    """Return a row under ``COST_HEADER`` per recipe, with its time relative to the first, and the sum of several."""
    totals = [cost.total for cost in costs]
    rows: list[tuple[str, ...]] = [
        (
            cost.recipe,
            cost.network,
            total.objective,
            passes_text(total.passes_per_image, total.forward_passes_per_image),
            f"{total.steps:,}",
            f"{total.seconds_per_step:.3g}",
            _hours(total.seconds),
            f"{total.seconds / totals[0].seconds:.2f}",
        )
        for cost, total in zip(costs, totals, strict=True)
    ]
    steps, seconds = sum(total.steps for total in totals), sum(total.seconds for total in totals)
    last = ("all", "", "", "", f"{steps:,}", "", _hours(seconds), f"{seconds / totals[0].seconds:.2f}")
    return rows if len(rows) == 1 else [*rows, last]


def stage_rows(costs: Sequence[RecipeCost]) -> list[tuple[str, ...]]:
    """Return a row under ``STAGE_HEADER`` per training stage."""
    return [
        (
            cost.recipe,
            stage.stage,
            f"{stage.images:,}",
            passes_text(stage.passes_per_image, stage.forward_passes_per_image),
            f"{stage.epochs:,}",
            f"{stage.steps:,}",
            f"{stage.seconds_per_step:.3g}",
            f"{stage.images_per_second:,.0f}",
            duration(stage.seconds),
            memory_text(stage.peak_memory),
            energy_text(stage.joules),
        )
        for cost in costs
        for stage in cost.stages
    ]


def evaluation_rows(costs: Sequence[RecipeCost]) -> list[tuple[str, ...]]:
    """Return a row under ``EVALUATION_HEADER`` per stage after training."""
    return [
        (
            cost.recipe,
            stage,
            f"{estimate.images:,}",
            passes_text(round(estimate.passes), round(estimate.forward_passes)) if estimate.bounded else "–",
            duration(estimate.usual_seconds),
            duration(estimate.seconds) if estimate.bounded else "–",
        )
        for cost in costs
        for stage, estimate in cost.evaluations.items()
    ]


def costs_value(costs: Sequence[RecipeCost]) -> dict[str, Any]:
    """Return all figures as plain values, each marked as ``extrapolated``."""
    first = costs[0].total.seconds
    entries = []
    for cost in costs:
        total = cost.total.figures()
        described = {"recipe": cost.recipe, "network": cost.network, "conditions": cost.conditions}
        entries.append(
            {
                **described,
                "measured_steps": cost.measured_steps,
                "objectives": total.pop("objective"),
                **{name: value for name, value in total.items() if name not in ("passes", "forward_passes")},
                "hours": total["seconds"] / 3600,
                "time_ratio": total["seconds"] / first,
                "stages": [stage.figures() for stage in cost.stages],
                "evaluations": {stage: asdict(estimate) for stage, estimate in cost.evaluations.items()},
            }
        )
    return {"recipes": entries}


@dataclass(frozen=True)
class _Trial:
    """Short training stages of a recipe on random images. A phase lasts two epochs, of which the second is measured."""

    recipe: Recipe
    size: DataSize
    execution: Execution
    steps: int

    def pretrain(self) -> StageCost:
        config = self.recipe.pretrain
        batches_per_epoch(self.size.pretrain, config.batch_size)
        images, epochs = self._images(config.batch_size), list[dict[str, Any]]()
        classifier = self._classifier(images)
        pretrain(
            Resident(images.without_labels(), self.execution.device),
            classifier.encoder,
            classifier.normalize,
            config.replace(epochs=2, **_TRIAL),
            self._settings(epochs),
        )
        return self._extrapolated("pretrain", config.objective, config, self.size.pretrain, epochs)

    def teach(self) -> StageCost:
        """Return the cost of the first teacher's training, without that of the linear classifier."""
        recipe, config = self.recipe, self.recipe.finetune.replace(epochs=self.recipe.teach.epochs, minutes=None)
        batches_per_epoch(self.size.finetune, config.batch_size)
        images, epochs = self._images(config.batch_size), list[dict[str, Any]]()
        self_train(
            images,
            images,
            self._classifier(images),
            recipe.teach.replace(epochs=2),
            config.replace(**_TRIAL),
            recipe.pretrain.views,
            self._settings(epochs),
            "teach-1",
        )
        return self._extrapolated("teach", "fixmatch", config, self.size.finetune, epochs)

    def finetune(self) -> StageCost:
        config = self.recipe.finetune
        batches_per_epoch(self.size.finetune, config.batch_size)
        images, epochs = self._images(config.batch_size), list[dict[str, Any]]()
        finetune(
            images,
            self._classifier(images),
            config.replace(epochs=4 if config.mode == "linear-then-full" else 2, head_epochs=2, **_TRIAL),
            self._settings(epochs),
            noise=training_noise(self.recipe),
        )
        objective = config.objective if config.mode == "full" else f"{config.objective} ({config.mode})"
        if self.recipe.teach.rounds > 1:  # every further teacher is fine-tuned as the classifier is
            objective += f", {self.recipe.teach.rounds} times"
            config = config.replace(epochs=self.recipe.teach.rounds * (config.epochs or 0) or None)
        return self._extrapolated("finetune", objective, config, self.size.finetune, epochs)

    def evaluations(self) -> dict[Stage, Estimate]:
        """Return the cost of certification, attacks and audit of an untrained classifier."""
        recipe, size, noise = self.recipe, self.size, smoothing_noise(self.recipe)
        classifier = self._classifier(self._images(1)).to(self.execution.device).eval()
        model: Model = classifier
        if noise is not None:
            model = SmoothedClassifier(classifier, noise=noise, num_classes=size.num_classes, execution=self.execution)
        rates = measured_rates(model, size.shape)
        attackers = Attackers.of(recipe, size.num_classes, math.prod(size.shape))
        certified, attacked = recipe.certify.images or size.test, recipe.attack.images or size.test
        estimates: dict[Stage, Estimate] = {}
        if noise is not None:
            rule = run_rule(recipe.certify, recipe.smoothing, certified)
            estimates["certify"] = certify_estimate(rule, certified, rates)
        estimates["attack"] = attack_estimate(attackers, attacked, recipe.attack.curve_images, rates)
        audited = min(recipe.audit.images or attacked, attacked)
        estimates["audit"] = audit_estimate(attackers, recipe.audit, size.num_classes, audited, rates)
        return estimates

    def _settings(self, epochs: list[dict[str, Any]]) -> TrainingSettings:
        """Return settings under which the figures of every epoch are appended to ``epochs``."""

        def log(event: str, **values: Any) -> None:
            if event == "epoch":
                epochs.append(values)

        return TrainingSettings(self.recipe.seed, self.execution, self.recipe.execution.compile_training, log=log)

    def _classifier(self, images: ImageSet) -> Classifier:
        return new_classifier(spec_of(self.recipe, images), self.recipe.seed)

    def _images(self, batch_size: int) -> ImageSet:
        """Return ``steps`` batches of random images with random labels."""
        count, generator = self.steps * batch_size, stream(self.recipe.seed, "cost", "images")
        pixels = torch.randint(0, 256, (count, *self.size.shape), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, self.size.num_classes, (count,), generator=generator)
        classes = tuple(str(label) for label in range(self.size.num_classes))
        return ImageSet(pixels, labels, classes, np.arange(count).astype(str), "random", "train")

    def _extrapolated(
        self, stage: Stage, objective: str, config: Schedule, images: int, measured: Sequence[dict[str, Any]]
    ) -> StageCost:
        """Return the cost of the whole stage.

        Args:
            measured: figures of the trial's epochs. The second epoch of each kind of step is multiplied: of the head
                alone and of all weights, or of the only kind.
        """
        phases, per_epoch = measured[1::2], images // config.batch_size
        head_epochs = config.head_epochs if isinstance(config, FinetuneConfig) and len(phases) == 2 else 0
        epochs = config.epochs
        if epochs is None:
            assert config.minutes is not None
            seconds_per_step = [phase["seconds"] / self.steps for phase in phases]
            plan = Plan(stage, config.minutes, per_epoch, head_epochs, config.warmup_epochs)
            budget = plan.fit(Times(seconds_per_step[-1], seconds_per_step[0]))
            budget.require_ramps(config.ramps)
            epochs = budget.epochs
        counts = [head_epochs, epochs - head_epochs] if head_epochs else [epochs]
        repeated = [count * per_epoch / self.steps for count in counts]  # how often the measured steps are made

        def total(name: str) -> float | None:
            return known_sum(
                [
                    None if phase[name] is None else times * phase[name]
                    for phase, times in zip(phases, repeated, strict=True)
                ]
            )

        seconds, steps = total("seconds"), epochs * per_epoch
        assert seconds is not None
        return StageCost(
            stage=stage,
            objective=objective,
            images=images,
            steps=steps,
            passes=round(total("passes") or 0),
            forward_passes=round(total("forward_passes") or 0),
            seconds=seconds,
            images_per_second=steps * config.batch_size / seconds,
            peak_memory=self._peak_memory([phase["peak_memory"] for phase in phases], images, config),
            joules=total("joules"),
            epochs=epochs,
        )

    def _peak_memory(self, measured: Sequence[int | None], images: int, config: Schedule) -> int | None:
        """Return the peak with the training images in place of the random ones, unless they would be streamed."""
        peak = _largest_known(measured)
        if peak is None:
            return None
        size, trial = (count * int(np.prod(self.size.shape)) for count in (images, self.steps * config.batch_size))
        in_memory = size if size <= self.recipe.data.memory_bytes else trial
        return peak + in_memory - trial


def _answer(sender: Connection, recipe: str, steps: int, threads: int) -> None:
    """Measure in this process and send the cost, or the error to show the user."""
    torch.set_num_threads(threads)
    try:
        sender.send(measure(Recipe.model_validate_json(recipe), steps))
    except Interrupted as stop:
        sys.exit(stop.status)
    except RushError as error:
        sender.send(error)


def _largest_known(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g}"
