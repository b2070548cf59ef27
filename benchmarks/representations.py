"""Are contrastive representations robust by nature? Linear heads on frozen encoders, clean, noisy, attacked, certified.

    python benchmarks/representations.py --data CIFAR10 --run simclr=RUN1 --run supervised=RUN2 --plot FILE.svg

CIFAR10 is a folder with the data set (docs/data.md). For the encoder of each run, and for its untrained initial
weights: a linear head fitted to clean images, with its accuracy on clean images, under one draw of noise, and under
PGD-20 in l-inf 8/255 and l2 0.5; and a linear head fitted to noisy images, with its certified accuracy (sequential, at
most --num-estimation votes). Heads are logistic regressions on all training images except the held-out ones, on which
their strength is chosen. The encoder of a run is the one that fine-tuning begins with, or the fine-tuned one for a run
without pre-training.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rush
from rush.attacks.threat import ThreatModel
from rush.certification.certificates import Certificates
from rush.data.images import ImageSet
from rush.models.classifier import Classifier, Represent
from rush.models.storage import load_weights
from rush.pipeline.context import StageContext, smoothing_noise, training_noise
from rush.pipeline.train import ENCODER, new_classifier, spec_of
from rush.records.folder import RunFolder
from rush.runtime.randomness import stream
from rush.smoothing.noise import Noise
from rush.statistics import share_interval
from rush.training.probes import linear_probe, representations
from shared import Row, benchmark_parser, in_percent, labels_of, printed, record

RADII = (0.0, 0.25, 0.5)
STRENGTHS = (1.0, 10.0, 100.0)
ATTACKS = {"PGD-20 l-inf 8/255": ThreatModel("linf", 8 / 255), "PGD-20 l2 0.5": ThreatModel("l2", 0.5)}


class Bench:
    """The images of a run, and what is measured of an encoder on them."""

    def __init__(self, run: RunFolder, data: Path, images: int, attacked: int, num_estimation: int) -> None:
        recipe = run.recipe.replace(data=run.recipe.data.replace(root=str(data)))
        self.context = StageContext.of(RunFolder(run.path, recipe))
        splits = self.context.splits
        train, held_out = splits.train, splits.held_out
        assert isinstance(train, ImageSet)
        assert held_out is not None
        self.train, self.held_out = train, held_out
        order, _ = splits.evaluation(images, train.num_classes)
        self.test, self.attacked, self.num_estimation = splits.test[order], attacked, num_estimation

    def classifier(self, trained: bool) -> Classifier:
        """The run's classifier with its encoder, or with its initial weights."""
        recipe, folder = self.context.recipe, self.context.run.path
        classifier = new_classifier(spec_of(recipe, self.context.splits.reference()), recipe.seed)
        if trained and recipe.pretrain.epochs == 0:
            found = rush.load(folder)
            model = found.classifier if isinstance(found, rush.SmoothedClassifier) else found
            assert isinstance(model, Classifier)
            classifier = model
        elif trained:
            load_weights(classifier.encoder, folder / ENCODER)
        self.context.execution.place(classifier).eval()
        return classifier

    def fit(self, classifier: Classifier, noise: Noise | None) -> nn.Linear:
        """A linear head on features of clean images, or of one noisy copy of each; the best on held-out images."""
        bank, queries = (self._features(images, classifier, noise) for images in (self.train, self.held_out))
        labels, truth = (labels_of(images).to(bank.device) for images in (self.train, self.held_out))
        heads = [linear_probe(bank, labels, self.train.num_classes, strength) for strength in STRENGTHS]
        correct = [int((F.linear(queries, *head).argmax(1) == truth).sum()) for head in heads]
        weight, bias = heads[correct.index(max(correct))]
        head = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.device).requires_grad_(False).eval()
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        return head

    def accuracies(self, classifier: Classifier) -> Iterator[tuple[str, Sequence[float]]]:
        """Accuracy in percent of a clean head on clean images, under noise and under attack, with intervals."""
        truth, noise = labels_of(self.test), training_noise(self.context.recipe)
        for name, added in (("clean", None), ("under noise", noise)):
            logits = representations(self.test, classifier, self.context.execution, added, self._stream("test"))
            yield name, in_percent(share_interval(int((logits.argmax(1).cpu() == truth).sum()), len(truth)))
        few = self.test[: self.attacked]
        for name, threat in ATTACKS.items():
            result = rush.attack(classifier, few, threat=threat, method="pgd", steps=20)
            yield name, in_percent(share_interval(int((~result.broken).sum()), len(few)))

    def certificates(self, classifier: Classifier) -> Certificates:
        noise = smoothing_noise(self.context.recipe)
        smoothed = rush.SmoothedClassifier(
            classifier, noise=noise, num_classes=self.test.num_classes, execution=self.context.execution
        )
        few = self.test[: self.attacked]
        return rush.certify(smoothed, few, "sequential", num_estimation=self.num_estimation, radii=RADII)

    def _features(self, images: ImageSet, classifier: Classifier, noise: Noise | None) -> Tensor:
        return representations(images, Represent(classifier), self.context.execution, noise, self._stream(images.split))

    def _stream(self, name: str) -> torch.Generator:
        return stream(self.context.recipe.seed, "representations", name, device=self.context.execution.device)


def draw(path: Path, certified: dict[str, Certificates]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "rush"
    axes = (figure := Figure(figsize=(5, 3.5))).subplots()
    for name, certificates in certified.items():
        axes.plot(RADII, [100 * certificates.accuracy(radius) for radius in RADII], marker="o", label=name)
    axes.set(xlabel="l2 radius", ylabel="certified accuracy of a linear head, %", ylim=(0, 100))
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER", help="pre-trained run")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--attacked", type=int, default=200, help="those that are attacked and certified, the first")
    parser.add_argument("--num-estimation", type=int, default=10_000)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    certified: dict[str, Certificates] = {}
    rows: list[Row] = []
    for number, given in enumerate(arguments.run):
        name, _, folder = given.partition("=")
        bench = Bench(
            RunFolder.open(Path(folder)), arguments.data, arguments.images, arguments.attacked, arguments.num_estimation
        )
        for label, trained in [(name, True)] + ([("untrained", False)] if number == 0 else []):
            classifier = bench.classifier(trained)
            classifier.head = bench.fit(classifier, None)
            row: Row = {"encoder": label, **dict(bench.accuracies(classifier))}
            classifier.head = bench.fit(classifier, training_noise(bench.context.recipe))
            certified[label] = bench.certificates(classifier)
            for radius in RADII:
                row[f"certified at {radius:g}"] = in_percent(certified[label].accuracy_interval(radius))
            rows.append(printed(row))
    recipe = bench.context.recipe
    record(
        arguments,
        "representations",
        rows,
        {
            "noise": recipe.smoothing.noise,
            "sigma": recipe.smoothing.sigma,
            "precision": bench.context.execution.precision,
            "images": f"{arguments.images:,}, of which the first {arguments.attacked:,} are attacked and certified",
            "heads": "linear, of a frozen encoder; certified ones are fitted to noisy images",
            "cells": "percent, with exact 95 % intervals",
        },
    )
    if arguments.plot is not None:
        draw(arguments.plot, certified)


if __name__ == "__main__":
    main()
