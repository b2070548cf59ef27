"""The teaching stage of a run: labels for the images whose labels fine-tuning does not read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rush.data.images import ImageSet
from rush.errors import ConfigError
from rush.models.classifier import Classifier, Represent
from rush.models.storage import load_weights
from rush.pipeline.context import StageContext, training_noise
from rush.pipeline.labels import Taught, labelled_images
from rush.pipeline.train import ENCODER, new_classifier, spec_of, training_figures
from rush.records.folder import RunFolder
from rush.runtime.distributed import barrier, rank
from rush.runtime.randomness import stream
from rush.smoothing.noise import Noise
from rush.training.finetune import finetune
from rush.training.probes import linear_probe, representations
from rush.training.self_training import self_train
from rush.training.teaching import probe_strength, taught


def run_teach(run: RunFolder) -> None:
    """Label the images of pre-training, and write the labels with the accuracy of every teacher on held-out images.

    Raises:
        ConfigError: the recipe has no round of teaching, the images are streamed, or the labelled ones are not among
            them.
    """
    run.require("pretrain")
    if not run.recipe.teach.rounds:
        raise ConfigError("this recipe teaches nothing: set teach.rounds to 1, or more, in a run of its own")
    context = StageContext.of(run)
    known = Taught.of(context)
    context.begin("teach")
    started = time.perf_counter()
    session = _Session(context, known)
    weight, bias, strength = session.probe()
    probabilities = session.linear(weight, bias)
    probed, labelling, trained = session.figures(probabilities), 1, list[dict[str, Any]]()
    if context.recipe.teach.epochs:
        probabilities = session.self_trained(weight, bias)
        labelling += 1
        trained.append(training_figures(run, "teach-1", len(known.images)))
    targets, rounds = session.targets(probabilities), [session.figures(probabilities)]
    for number in range(2, context.recipe.teach.rounds + 1):
        probabilities = session.student(number, targets)
        targets = session.targets(probabilities)
        rounds.append(session.figures(probabilities))
        labelling += session.draws
        trained.append(training_figures(run, f"teach-{number}", len(known.images)))
    if rank() == 0:
        known.write(run.path, targets)
        weights = targets.sum(1)
        run.finish(
            "teach",
            seconds=time.perf_counter() - started - session.training + sum(part["seconds"] for part in trained),
            objective="teach",
            images=len(known.images),
            labelled_images=len(known.rows),
            held_out_images=len(context.splits.held_out or ()),
            probe_strength=strength,
            probe=probed,
            rounds=rounds,
            weight=float(weights.mean()),
            passes_per_image=sum(part["passes_per_image"] for part in trained),
            forward_passes_per_image=labelling + sum(part["forward_passes_per_image"] for part in trained),
        )
    barrier()


class _Session:
    """The teachers of one run, on the images that they label and on those that are held out.

    Attributes:
        draws: noisy copies per image over which a fine-tuned teacher averages.
        training: seconds of this attempt in the training of teachers. The log has those of all attempts.
    """

    def __init__(self, context: StageContext, known: Taught) -> None:
        self._context, self._known = context, known
        self._config, self._noise = context.recipe.teach, training_noise(context.recipe)
        self._held_out = context.splits.held_out
        self._spec = spec_of(context.recipe, context.splits.reference())  # reads every pixel
        self._seed, self._device = context.recipe.seed, context.execution.device
        self.draws = self._config.draws if self._noise is not None else 1
        self.training = 0.0
        self._sets = [known.images, *([self._held_out] if self._held_out is not None else [])]

    @cached_property
    def _features(self) -> list[Tensor]:
        """The representations of each set by the pre-trained encoder."""
        represent = self._context.execution.place(Represent(self._new())).eval()
        return [representations(images, represent, self._context.execution) for images in self._sets]

    def probe(self) -> tuple[Tensor, Tensor, float]:
        """Return weight and bias of the linear classifier on the representations, and its strength."""
        known = self._known
        labels, bank = known.labels.to(self._device), self._features[0][known.rows.to(self._device)]
        strength = probe_strength(bank, labels, known.num_classes, stream(self._seed, "teach", "folds"))
        return *linear_probe(bank, labels, known.num_classes, strength), strength

    def linear(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Return the probabilities that a linear classifier on the representations gives each set."""
        return [F.softmax(F.linear(each, weight, bias), dim=1).cpu() for each in self._features]

    def self_trained(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Train the encoder with this linear classifier on its own answers, and return its probabilities."""
        recipe, classifier, name = self._context.recipe, self._new(), "teach-1"
        classifier.head.load_state_dict({"weight": weight, "bias": bias})
        labelled = labelled_images(self._context.splits.train, recipe)
        assert isinstance(labelled, ImageSet)
        with self._timed():
            self_train(
                self._known.images,
                labelled,
                classifier,
                recipe.teach,
                recipe.finetune,
                recipe.pretrain.views,
                self._context.training("teach", None, name),
                name,
            )
        return [self._mean(images, classifier, None, 1, name) for images in self._sets]

    def student(self, number: int, targets: Tensor) -> list[Tensor]:
        """Train the teacher of round ``number`` on the labels of the round before, and return its probabilities."""
        context, name = self._context, f"teach-{number}"
        classifier = self._new()
        with self._timed():
            finetune(
                self._known.images,
                classifier,
                context.recipe.finetune,
                context.training("teach", None, name),
                noise=self._noise,
                targets=targets,
                name=name,
            )
        return [self._mean(images, classifier, self._noise, self.draws, name) for images in self._sets]

    def targets(self, probabilities: list[Tensor]) -> Tensor:
        """Return the soft labels that these probabilities give the images."""
        return taught(probabilities[0], self._known.labels, self._known.rows, self._config)

    def figures(self, probabilities: list[Tensor]) -> dict[str, Any]:
        """Return the accuracy of a teacher on the held-out images, or None if there are none."""
        if self._held_out is None or self._held_out.labels is None:
            return {"held_out": None}
        return {"held_out": float((probabilities[1].argmax(1) == self._held_out.labels).double().mean())}

    def _new(self) -> Classifier:
        """Return the classifier with the pre-trained encoder and its initial head."""
        classifier = new_classifier(self._spec, self._seed)
        load_weights(classifier.encoder, self._context.run.path / ENCODER)
        return classifier

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.training += time.perf_counter() - started

    def _mean(self, images: ImageSet, classifier: Classifier, noise: Noise | None, draws: int, name: str) -> Tensor:
        """Return the mean probabilities (N, K) over noisy copies."""
        generator = stream(self._seed, name, "noise", device=self._device)
        total = torch.zeros(len(images), self._known.num_classes)
        for _ in range(draws):
            logits = representations(images, classifier, self._context.execution, noise, generator)
            total += F.softmax(logits, dim=1).cpu()
        return total / draws
