"""The items of the full-size run, in order of value: what each computes, for how long, and what it stores."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

import rush
from certification import textbook
from full_size_store import Clock, Store, in_rounds
from rush.attacks.threat import ThreatModel
from rush.certification.certificates import Certificates, join_certificates
from rush.certification.certify import certify_each
from rush.certification.rule import Rule, make_rule
from rush.choices import parse_fraction
from rush.data.batches import Resident
from rush.data.checks import LabelledPixels, labelled_pixels
from rush.data.images import ImageSet, evaluation_order, stratified_subset
from rush.errors import ConfigError
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.groups import read_group, write_group
from rush.evaluation.ladder import ladder
from rush.evaluation.model import defend
from rush.evaluation.plans import Plan, Suite, worst_case
from rush.evaluation.result import AttackResult, join_results
from rush.evaluation.sandwich import check_sandwich, sandwich_plan, sandwich_positions, sandwich_threat
from rush.evaluation.verdict import VerdictSettings
from rush.models.classifier import Classifier, Represent
from rush.models.storage import ClassifierSpec, load_weights, save_weights
from rush.pipeline.context import training_noise
from rush.pipeline.train import new_classifier, spec_of
from rush.recipe.load import build_recipe
from rush.recipe.schema import Recipe, Schedule
from rush.records.attacks import attack_table
from rush.records.certificates import read_certificates, write_certificates
from rush.runtime.execution import Execution, without_tf32
from rush.runtime.randomness import stream
from rush.statistics import share_interval
from rush.training.finetune import finetune
from rush.training.loop import TrainingSettings
from rush.training.pretrain import pretrain
from rush.training.probes import knn_correct, linear_probe, representations
from shared import labels_of

SIGMAS = (0.06, 0.12, 0.25, 0.5)
MAIN_SIGMA = 0.25
PAPER_CLEAN, PAPER_ROBUST = 87.9, 77.8  # the abstract's figures, in percent
GRID = ("clean", "transfer", "frozen", "eot-1")  # rungs of the ladder that the grid shows
RADII = (0.0, 0.25, 0.5, 0.75)  # at which certified accuracy is printed
T = TypeVar("T")
S = TypeVar("S", bound=Schedule)
LEAST_TRAINING = 2_000  # images of a training that has no time for all of them
VERDICTS = 9  # most verdicts on an image of one model: the grid's, three of the ladder, the suite, the sandwich


@dataclass(frozen=True)
class Sizes:
    """Number of images that each item asks for, and the least that it makes sense with.

    Attributes:
        tenth, hundredth: shares of the labels that the two models of these names are trained on.
        epochs: of every training; None trains by the clock.
        neighbours: of the nearest-neighbour votes.
    """

    grid: int = 500
    ladder: int = 300
    worst: int = 300
    curve: int = 500
    radius: int = 10_000
    sandwich: int = 100
    textbook: int = 3
    least: int = 64  # attacks pad a smaller group to it
    least_worst: int = 10
    textbook_samples: int = 100_000
    tenth: float = 0.1
    hundredth: float = 0.01
    epochs: int | None = None
    neighbours: tuple[int, ...] = (10, 200)


class OmittedError(Exception):
    """An item does not fit into its time; the text says what its minimum is and takes."""


@dataclass(frozen=True)
class Rates:
    """What the probe measured, per second: images in training, forward samples, and attack passes."""

    training: float
    forward: float
    attack: float

    def seconds(self, passes: float, forward_passes: float) -> float:
        """Return about how many seconds these numbers of passes with and without backward take."""
        return passes / self.attack + forward_passes / self.forward


@dataclass
class Bench:
    """What the items share: recipe, images, execution, clock and store."""

    recipe: Recipe
    sizes: Sizes
    store: Store
    clock: Clock
    execution: Execution
    rates: Rates
    train: ImageSet
    test: ImageSet

    @cached_property
    def order(self) -> list[int]:
        """Positions of the test images in the seeded order of evaluation."""
        return evaluation_order(len(self.test), None, self.recipe.seed)

    @cached_property
    def pixels(self) -> LabelledPixels:
        """The test images in that order."""
        return labelled_pixels(self.test[self.order], self.test.num_classes)

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Position in the test split of each image, by id."""
        return dict(zip(self.pixels.ids, self.order, strict=True))

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(self.recipe.attack.norm, parse_fraction(self.recipe.attack.epsilon))

    @property
    def settings(self) -> VerdictSettings:
        """How every point is judged; all verdicts on an image of one model share the level."""
        config = self.recipe.attack
        return VerdictSettings(config.alpha / VERDICTS, config.max_votes, self.recipe.seed)

    @cached_property
    def rungs(self) -> dict[str, Plan]:
        """The ladder from no attack to the largest EOT."""
        config = self.recipe.attack
        plans = ladder(config.replace(strong_steps=0), self.threat, self.test.num_classes)
        return {plan.name: plan for plan in plans if isinstance(plan, Plan)}

    @cached_property
    def spec(self) -> ClassifierSpec:
        return spec_of(self.recipe, self.train)

    def new_classifier(self) -> Classifier:
        return new_classifier(self.spec, self.recipe.seed)

    def weights(self, name: str) -> Path:
        return self.store.work / "models" / f"{name}.safetensors"

    def smoothed(self, name: str) -> rush.SmoothedClassifier:
        """Return the smoothed classifier ``<weights>-<sigma>``, e.g. ``linear-0.12``."""
        base, sigma = name.rsplit("-", 1)
        classifier = self.new_classifier()
        load_weights(classifier, self.weights("linear" if base == "linear" else name))
        self.execution.place(classifier).eval()
        return rush.SmoothedClassifier(
            classifier, float(sigma), self.test.num_classes, execution=self.execution, classes=self.test.classes
        )

    def within(self, config: S, seconds: float) -> S:
        """Return ``config`` for the epochs that fit into ``seconds``, or for a fixed number."""
        if self.sizes.epochs is not None:
            return config.replace(epochs=self.sizes.epochs, minutes=None)
        return config.replace(epochs=None, minutes=seconds / 60)

    def fitting(self, seconds: float) -> int:
        """Return the number of images of which a training under noise takes one epoch within ``seconds``."""
        return int(0.85 * seconds * self.rates.training)

    def attacked(self, name: str, plan: Plan | Suite, images: int) -> AttackResult | None:
        """Return the stored result of a model and attacker on the first images; None where there is none."""
        group = self.pixels.select(list(range(images)))
        file = self.store.work / "results" / f"{name}-{plan.name}.npz"
        if not file.exists():
            return None
        return read_group(file, group, self.threat, plan, self.settings.level, False, name)

    def keep_attacked(self, name: str, result: AttackResult) -> None:
        """Store the result of a model and attacker on the first images."""
        group = self.pixels.select(list(range(len(result))))
        write_group(self.store.work / "results" / f"{name}-{result.plan.name}.npz", result, group, name)

    def certificates(self, name: str) -> Certificates | None:
        """Return the stored certificates of a model; None where there are none."""
        read = read_certificates(self.store.work / "tables" / f"certificates-{name}.tsv")
        return None if read is None else read[1]

    def attacker(
        self, smoothed: rush.SmoothedClassifier, plans: Sequence[Plan | Suite]
    ) -> Callable[[list[int]], list[AttackResult]]:
        """Return what attacks and judges the images at some rows of the order by each of ``plans``."""
        evaluation = Evaluation(defend(smoothed, self.test.num_classes), self.pixels, self.threat, self.settings)

        def attack(rows: list[int]) -> list[AttackResult]:
            chosen = evaluation.select(rows)
            return [chosen.run(plan) for plan in plans]

        return attack

    def in_rounds(
        self, jobs: dict[str, Callable[[list[int]], T]], *, wanted: int, least: int, seconds: float
    ) -> tuple[int, dict[str, list[T]]]:
        """Return as ``full_size_store.in_rounds``. Raises: OmittedError where not even the first round was finished."""
        images, found = in_rounds(jobs, wanted=wanted, minimum=least, seconds=seconds, clock=self.clock)
        if not images:
            raise OmittedError(f"its minimum, {least} images, was not done when the last tenth began")
        return images, found

    def check_fits(self, seconds: float, minimum: str, needed: float) -> None:
        """Raise OmittedError when the minimum of an item needs more seconds than it may take."""
        allowed = min(1.5 * seconds, self.clock.until_last_start)
        if needed > allowed:
            raise OmittedError(
                f"its minimum, {minimum}, needs about {needed:.0f} s; {max(0.0, allowed):.0f} s are left"
            )


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """Return ``recipe`` with some fields of some sections replaced. Raises: ConfigError as ``build_recipe``."""
    values = json.loads(recipe.to_json())
    for section, fields in sections.items():
        values[section] |= fields
    return build_recipe(values)


@dataclass(frozen=True)
class Item:
    """One item: its name, what it is, its share of the time, what computes its figures within a number of seconds, and
    the items that it needs."""

    name: str
    title: str
    share: float
    work: Callable[[Bench, float], dict[str, Any]]
    needs: tuple[str, ...] = ()

    def figures(self, bench: Bench, seconds: float) -> dict[str, Any]:
        """Return the item's figures. Raises: OmittedError where it does not fit, or needs an item that is not done."""
        if bench.clock.until_last_start < 0:
            raise OmittedError("the last tenth of the minutes had begun")
        for name in self.needs:
            if not item_done(bench, name):
                raise OmittedError(f"it needs item ({name}), which is not done")
        return self.work(bench, seconds)


# --- trainings --------------------------------------------------------------------------------------------------------


class Events:
    """Keeps what a training logs."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.budget: dict[str, Any] = {}

    def __call__(self, event: str, **values: Any) -> None:
        if event == "epoch":
            self.epochs.append(values)
        elif event == "budget":
            self.budget = values

    def figures(self, images: int) -> dict[str, Any]:
        """Cost and course of the training of ``images`` images."""
        joules = [epoch["joules"] for epoch in self.epochs]
        rates = sorted(epoch["images_per_second"] for epoch in self.epochs)
        return {
            "images": images,
            "epochs": len(self.epochs),
            "passes": sum(epoch["passes"] for epoch in self.epochs),
            "passes_per_image": sum(epoch["passes"] for epoch in self.epochs) / images,
            "images_per_second": rates[len(rates) // 2],
            "training_seconds": sum(epoch["seconds"] for epoch in self.epochs),
            "peak_memory": max((epoch["peak_memory"] or 0 for epoch in self.epochs), default=None),
            "joules": None if None in joules else sum(joules),
            "loss": [self.epochs[row]["loss"] for row in _spread(len(self.epochs), 20)],
            **({"budget": self.budget} if self.budget else {}),
        }


def training_settings(recipe: Recipe, execution: Execution, events: Events) -> TrainingSettings:
    """Return the settings of a training by ``recipe`` that logs to ``events``."""
    return TrainingSettings(recipe.seed, execution, recipe.execution.compile_training, log=events)


@contextmanager
def _budgeted() -> Iterator[None]:
    """Within the context a training by minutes that has no time for an epoch is one that is omitted."""
    try:
        yield
    except ConfigError as error:
        if "is too little" not in str(error):
            raise
        raise OmittedError(f"its minimum is one epoch: {error}") from error


def _spread(total: int, most: int) -> list[int]:
    """At most ``most`` of the positions 0 to ``total`` - 1, evenly spread, the first and the last among them."""
    count = min(total, most)
    return [round(row * (total - 1) / max(1, count - 1)) for row in range(count)]


def pretrain_encoder(bench: Bench, seconds: float) -> dict[str, Any]:
    """(a) SimCLR, along a cosine to zero within its minutes."""
    classifier, events, config = bench.new_classifier(), Events(), bench.recipe.pretrain
    source = Resident(bench.train.without_labels(), bench.execution.device)
    with _budgeted():
        pretrain(
            source,
            classifier.encoder,
            classifier.normalize,
            bench.within(config, seconds),
            training_settings(bench.recipe, bench.execution, events),
        )
    save_weights(classifier, bench.weights("encoder"))
    bench.store.keep_weights("encoder", classifier.encoder)
    figures = events.figures(len(bench.train))
    return {"batch_size": config.batch_size, "views_per_second": 2 * figures["images_per_second"], **figures}


def judge_encoder(bench: Bench, _seconds: float) -> dict[str, Any]:
    """(b) Nearest neighbours and a linear probe, whose weights become the head on the clean encoder."""
    classifier = bench.new_classifier()
    load_weights(classifier, bench.weights("encoder"))
    represent = bench.execution.place(Represent(classifier)).eval()
    known, asked = (representations(images, represent, bench.execution) for images in (bench.train, bench.test))
    labels, truth = (labels_of(images).to(known.device) for images in (bench.train, bench.test))
    knn = {str(k): knn_correct(known, labels, asked, truth, k) for k in bench.sizes.neighbours}
    weight, bias = linear_probe(known, labels, bench.train.num_classes)
    linear = int((torch.nn.functional.linear(asked, weight, bias).argmax(1) == truth).sum())
    with torch.no_grad():
        head = classifier.head
        assert isinstance(head, torch.nn.Linear)
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    save_weights(classifier, bench.weights("linear"))
    return {"images": len(bench.test), "knn_correct": knn, "linear_correct": linear}


def finetune_all(bench: Bench, seconds: float) -> dict[str, Any]:
    """(c) Fine-tuning under noise: every sigma with all labels, one sigma with a part of them.

    A model whose time has no room for an epoch of its images is trained on fewer, for one epoch.
    """
    names = [f"noise-{sigma:g}" for sigma in SIGMAS] + [f"{part}-{MAIN_SIGMA:g}" for part in ("tenth", "hundredth")]
    shares = {"tenth": bench.sizes.tenth, "hundredth": bench.sizes.hundredth}
    figures: dict[str, Any] = {}
    began = bench.clock.elapsed
    for position, name in enumerate(names):
        file = bench.store.work / "items" / f"c-{name}.json"
        if not file.exists():
            left = (seconds - (bench.clock.elapsed - began)) / (len(names) - position)
            base, sigma = name.rsplit("-", 1)
            found = _finetuned(bench, name, float(sigma), shares.get(base, 1.0), left, pretrained=True)
            bench.store.finish(f"c-{name}", found)
        figures[name] = json.loads(file.read_text())
    return {"models": figures}


def train_from_scratch(bench: Bench, seconds: float) -> dict[str, Any]:
    """(d) Gaussian training from scratch for the passes of one fine-tuning and its share of the pre-training."""
    shared, pretraining = item_done(bench, "c")["models"], item_done(bench, "a")
    finetuning = shared[f"noise-{MAIN_SIGMA:g}"]
    passes = (finetuning["passes"] + pretraining["passes"] / len(shared)) / len(bench.train)
    wanted = max(1, round(passes))
    per_epoch = len(bench.train) / finetuning["images_per_second"]
    bench.check_fits(seconds, "one epoch", per_epoch)
    epochs = wanted if bench.sizes.epochs is not None else min(wanted, max(1, int(seconds / per_epoch)))
    found = _finetuned(bench, f"scratch-{MAIN_SIGMA:g}", MAIN_SIGMA, 1.0, seconds, pretrained=False, epochs=epochs)
    return {"wanted_epochs": wanted, "wanted_passes_per_image": passes, **found}


def _finetuned(
    bench: Bench, name: str, sigma: float, labels: float, seconds: float, *, pretrained: bool, epochs: int | None = None
) -> dict[str, Any]:
    """Train ``name`` under noise on a part of the labels and keep its weights; the figures of the training."""
    form = bench.recipe.execution.compile_training
    recipe = changed(
        bench.recipe,
        smoothing={"sigma": sigma},
        finetune={"label_fraction": labels},
        execution={"compile_training": form if form == "graph" else "none"},  # compiling pays for the longest training
    )
    classifier, events = bench.new_classifier(), Events()
    if pretrained:
        load_weights(classifier, bench.weights("encoder"))
    generator = stream(recipe.seed, "finetune", "labels")
    images = bench.train if labels == 1 else stratified_subset(bench.train, labels, generator)
    batch = min(recipe.finetune.batch_size, 1 << (len(images).bit_length() - 1))
    config = bench.within(recipe.finetune, seconds).replace(batch_size=batch)
    wanted, fitting = len(images), max(LEAST_TRAINING, bench.fitting(seconds))
    if epochs is None and config.minutes is not None and wanted > fitting:
        images, epochs = stratified_subset(images, fitting, generator), 1
    if epochs is not None:
        config = config.replace(epochs=epochs, minutes=None)
    with _budgeted():
        settings = training_settings(recipe, bench.execution, events)
        finetune(images, classifier, config, settings, noise=training_noise(recipe))
    save_weights(classifier, bench.weights(name))
    if name == f"noise-{MAIN_SIGMA:g}":
        bench.store.keep_weights(name, classifier)
    return {"sigma": sigma, "batch_size": batch, "wanted_images": wanted, **events.figures(len(images))}


# --- attacks ----------------------------------------------------------------------------------------------------------


def protocol_grid(bench: Bench, seconds: float) -> dict[str, Any]:
    """(e) Every sigma, both bases, three attackers: the paper's protocol with what it leaves open."""
    names = [f"{base}-{sigma:g}" for sigma in SIGMAS for base in ("noise", "linear")]
    plans = [bench.rungs[rung] for rung in GRID]
    models = {name: bench.smoothed(name) for name in names}
    passes, votes = sum(plan.passes_per_image for plan in plans), len(plans) * bench.recipe.attack.max_votes / 2
    least = min(bench.sizes.least, bench.sizes.grid)
    needed = bench.rates.seconds(len(names) * least * passes, len(names) * least * votes)
    bench.check_fits(seconds, f"{least} images per cell", needed)

    images, found = bench.in_rounds(
        {name: bench.attacker(models[name], plans) for name in names},
        wanted=min(bench.sizes.grid, len(bench.test)),
        least=least,
        seconds=seconds,
    )
    cells = {name: _joined(bench, name, found[name]) for name in names}
    config = bench.recipe.attack
    return {
        "images": images,
        "attacker": f"PGD-{config.steps}, {config.norm} {config.epsilon}, steps of {config.step_size}",
        "cells": {name: _rungs(results) for name, results in cells.items()},
    }


def climb_ladder(bench: Bench, seconds: float) -> dict[str, Any]:
    """(f) The ladder to the largest EOT on the two models nearest to the paper and on the main one."""
    grid = item_done(bench, "e")
    names = [*nearest_to_paper(grid["cells"]), f"noise-{MAIN_SIGMA:g}"]
    plans = [plan for rung, plan in bench.rungs.items() if rung not in GRID]
    models = {name: bench.smoothed(name) for name in names}
    most = min(bench.sizes.ladder, grid["images"])
    least = min(bench.sizes.least, most)
    per_image = len(names) * sum(plan.passes_per_image for plan in plans)
    votes = len(names) * len(plans) * bench.recipe.attack.max_votes / 2
    needed = bench.rates.seconds(least * per_image, least * votes)
    bench.check_fits(seconds, f"{least} images per model", needed)

    images, found = bench.in_rounds(
        {name: bench.attacker(models[name], plans) for name in names},
        wanted=most,
        least=least,
        seconds=seconds,
    )
    rungs = {}
    for name in names:
        below = [_required(bench.attacked(name, bench.rungs[rung], grid["images"])) for rung in GRID]
        above = _joined(bench, name, found[name])
        rungs[name] = _rungs([*(result.select(list(range(images))) for result in below), *above])
    return {"images": images, "models": rungs}


def nearest_to_paper(cells: dict[str, Any]) -> list[str]:
    """Return the two models but the main one with the cell nearest to the paper's clean and robust accuracy.

    The distance is the sum of the two differences in points; the cell is the nearest of the model's three attackers.
    """

    def distance(name: str) -> float:
        clean, *attacked = (100 * cells[name][rung]["accuracy"] for rung in GRID)
        return abs(clean - PAPER_CLEAN) + min(abs(robust - PAPER_ROBUST) for robust in attacked)

    return sorted((name for name in cells if name != f"noise-{MAIN_SIGMA:g}"), key=distance)[:2]


def worst_cases(bench: Bench, seconds: float) -> dict[str, Any]:
    """(g) The parameter-free suite on the nearest model and on the main one."""
    names = [nearest_to_paper(item_done(bench, "e")["cells"])[0], f"noise-{MAIN_SIGMA:g}"]
    suite = worst_case("random", bench.test.num_classes)
    models = {name: bench.smoothed(name) for name in names}
    most = min(bench.sizes.worst, len(bench.test))
    least = min(bench.sizes.least_worst, most)
    needed = bench.rates.seconds(len(names) * least * suite.passes_per_image / 2, 0)  # many images leave early
    bench.check_fits(seconds, f"{least} images per model", needed)

    images, found = bench.in_rounds(
        {name: bench.attacker(models[name], [suite]) for name in names},
        wanted=most,
        least=least,
        seconds=seconds,
    )
    return {
        "images": images,
        "suite": suite.version,
        "models": {name: _rungs(_joined(bench, name, found[name]))[suite.name] for name in names},
    }


def _joined(bench: Bench, name: str, rounds: Sequence[list[AttackResult]]) -> list[AttackResult]:
    """The results of each attacker over all rounds, stored and written to the model's table."""
    results = [join_results(list(parts), bench.threat) for parts in zip(*rounds, strict=True)]
    for result in results:
        bench.keep_attacked(name, result)
    rungs = "-".join(dict.fromkeys((results[0].plan.name, results[-1].plan.name)))
    bench.store.table(f"attacks-{name}-{rungs}.tsv", attack_table(results, bench.index_of))
    return results


def _rungs(results: Sequence[AttackResult]) -> dict[str, Any]:
    """Figures of each attacker: images not broken, held and undecided, with the interval of the first."""
    return {
        result.plan.name: {
            "label": result.plan.label,
            "images": len(result),
            "broken": int(result.broken.sum()),
            "held": int(result.held.sum()),
            "undecided": int(result.undecided.sum()),
            "accuracy": result.robust_accuracy,
            "interval": [result.interval.low, result.interval.high],
            **result.budget,
        }
        for result in results
    }


# --- certificates -----------------------------------------------------------------------------------------------------


def certified_curves(bench: Bench, seconds: float) -> dict[str, Any]:
    """(h) The certified curve of three classifiers on the same images."""
    names = [f"{base}-{MAIN_SIGMA:g}" for base in ("noise", "scratch", "hundredth")]
    config = bench.recipe.certify
    most = min(bench.sizes.curve, len(bench.test))
    least = min(bench.sizes.least, most)
    needed = bench.rates.seconds(0, len(names) * least * config.num_estimation / 3)
    bench.check_fits(seconds, f"{least} images per model", needed)
    rule = _rule(bench, most, None)
    models = {name: bench.smoothed(name) for name in names}
    images, found = bench.in_rounds(
        {name: _certifier(bench, models[name], rule) for name in names},
        wanted=most,
        least=least,
        seconds=seconds,
    )
    return {
        "images": images,
        "rule": asdict(rule),
        "models": {name: _certified(bench, name, found[name]) for name in names},
    }


def certified_at_one_radius(bench: Bench, seconds: float) -> dict[str, Any]:
    """(k) One radius on as many of all test images as the time suffices for."""
    name = f"noise-{MAIN_SIGMA:g}"
    most = min(bench.sizes.radius, len(bench.test))
    rule = _rule(bench, most, (MAIN_SIGMA,))
    least = min(bench.sizes.least, most)
    bench.check_fits(seconds, f"{least} images", bench.rates.seconds(0, least * 500))
    images, found = bench.in_rounds(
        {name: _certifier(bench, bench.smoothed(name), rule)},
        wanted=most,
        least=least,
        seconds=seconds,
    )
    return {"images": images, "models": {name: _certified(bench, name, found[name], "-one-radius", (MAIN_SIGMA,))}}


def compare_with_textbook(bench: Bench, seconds: float) -> dict[str, Any]:
    """(j) The textbook's certificates of some images, with our own of the same images beside them."""
    name, images, samples = f"noise-{MAIN_SIGMA:g}", bench.sizes.textbook, bench.sizes.textbook_samples
    needed = bench.rates.seconds(0, 3 * images * samples)  # float32, eager: about a third of the rate
    bench.check_fits(seconds, f"{images} images at N = {samples:,}", needed)
    smoothed = bench.smoothed(name)
    ours = _required(bench.certificates(name)).select(list(range(images)))
    plain = smoothed.classifier.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    torch.manual_seed(bench.recipe.seed)  # the textbook draws from the global generator
    rows = []
    for row in range(images):
        began = bench.clock.elapsed
        x = bench.pixels.x[row].to(bench.execution.device)
        with without_tf32(bench.execution.device):
            prediction, radius = textbook(plain, x, MAIN_SIGMA, 100, samples)
        rows.append(
            {
                "id": bench.pixels.ids[row],
                "textbook": [prediction, radius, bench.clock.elapsed - began],
                "ours": [int(ours.prediction[row]), float(ours.radius[row]), float(ours.seconds[row])],
            }
        )
    return {"images": images, "num_estimation": samples, "rows": rows}


def close_sandwich(bench: Bench, seconds: float) -> dict[str, Any]:
    """(i) Attack inside the certified balls of the main model, and compare all its broken points with them."""
    name = f"noise-{MAIN_SIGMA:g}"
    certificates = _required(bench.certificates(name))
    ids = bench.pixels.ids[: len(certificates)]
    positions = sandwich_positions(certificates, ids)[: bench.sizes.sandwich]
    if not positions:
        raise OmittedError("no image is certified with its label, so that there is no ball to attack in")
    smoothed, plan = bench.smoothed(name), sandwich_plan(bench.recipe.attack.steps)
    balls = sandwich_threat(certificates, [ids[position] for position in positions])
    least = min(bench.sizes.least, len(positions))
    needed = bench.rates.seconds(least * plan.passes_per_image, least * bench.recipe.attack.max_votes)
    bench.check_fits(seconds, f"{least} images", needed)
    defender, certified = defend(smoothed, bench.test.num_classes), bench.pixels.select(positions)
    evaluation = Evaluation(defender, certified, balls, bench.settings)

    def job(rows: list[int]) -> AttackResult:
        return evaluation.select(rows).run(plan)

    images, found = bench.in_rounds({name: job}, wanted=len(positions), least=least, seconds=seconds)
    inside = join_results(found[name], balls.select(list(range(images))))
    bench.store.table(f"attacks-{name}-sandwich.tsv", attack_table([inside], bench.index_of))
    sandwich = check_sandwich(certificates, [inside, *_attacks_on(bench, name)], bench.recipe.attack.alpha)
    return {"images": images, **asdict(sandwich), "broken_inside": int(inside.broken.sum())}


def _attacks_on(bench: Bench, name: str) -> list[AttackResult]:
    """All stored results of a model under the threat."""
    counts = {rung: item_done(bench, "e" if rung in GRID else "f").get("images", 0) for rung in bench.rungs}
    suite = worst_case("random", bench.test.num_classes)
    wanted = [*((bench.rungs[rung], count) for rung, count in counts.items())]
    stored = [bench.attacked(name, plan, count) for plan, count in wanted if count]
    worst = item_done(bench, "g").get("images", 0)
    if worst:
        stored.append(bench.attacked(name, suite, worst))
    return [result for result in stored if result is not None]


def _rule(bench: Bench, images: int, radii: tuple[float, ...] | None) -> Rule:
    config = bench.recipe.certify
    return make_rule(sigma=MAIN_SIGMA, num_images=images, **config.model_dump(exclude={"images", "radii"}), radii=radii)


def _certifier(bench: Bench, smoothed: rush.SmoothedClassifier, rule: Rule) -> Callable[[list[int]], Certificates]:
    def certify(rows: list[int]) -> Certificates:
        found = dict(certify_each(smoothed, bench.pixels, rule, bench.recipe.seed, rows))
        return join_certificates([found[row] for row in rows])

    return certify


def _certified(
    bench: Bench, name: str, rounds: Sequence[Certificates], suffix: str = "", radii: Sequence[float] = RADII
) -> dict[str, Any]:
    """Write the certificates of a model and return its figures, as if its images had been certified alone."""
    joined = join_certificates(rounds)
    certificates = replace(joined, rule=replace(joined.rule, num_images=len(joined)))
    indices = [bench.index_of[image_id] for image_id in certificates.ids]
    write_certificates(bench.store.work / "tables" / f"certificates-{name}{suffix}.tsv", certificates, indices)
    reached = [radius for radius in radii if radius <= certificates.largest_radius]
    correct = {f"{radius:g}": int((certificates.correct & (certificates.radius >= radius)).sum()) for radius in reached}
    return {
        "images": len(certificates),
        "certified": correct,
        "accuracy": {radius: count / len(certificates) for radius, count in correct.items()},
        "interval": {radius: _interval(count, len(certificates)) for radius, count in correct.items()},
        "acr": certificates.acr,
        "acr_name": certificates.acr_name,
        "samples_per_image": float(certificates.num_samples.mean()),
        "seconds_per_image": float(certificates.seconds.mean()),
    }


# --- shared -----------------------------------------------------------------------------------------------------------


def _interval(count: int, total: int) -> list[float]:
    interval = share_interval(count, total)
    return [interval.low, interval.high]


def item_done(bench: Bench, name: str) -> dict[str, Any]:
    """Return the figures of an item that is done; an empty dict for another one."""
    found = bench.store.item(name)
    return found if found is not None and found["status"] == "done" else {}


def _required(value: T | None) -> T:
    assert value is not None  # of an item that is done
    return value


ITEMS = (
    Item("a", "SimCLR", 180, pretrain_encoder),
    Item("b", "nearest neighbours and linear probe", 10, judge_encoder, ("a",)),
    Item("c", "fine-tuning under noise", 75, finetune_all, ("a",)),
    Item("d", "Gaussian training from scratch", 60, train_from_scratch, ("a", "c")),
    Item("e", "protocol grid", 60, protocol_grid, ("b", "c")),
    Item("f", "ladder", 50, climb_ladder, ("e",)),
    Item("g", "worst case", 20, worst_cases, ("e",)),
    Item("h", "certified curve", 50, certified_curves, ("c", "d")),
    Item("i", "sandwich", 7, close_sandwich, ("h",)),
    Item("j", "textbook", 8, compare_with_textbook, ("h",)),
    Item("k", "one radius on all images", 1, certified_at_one_radius, ("c",)),
)
