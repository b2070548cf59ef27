"""The two training stages of a run, from the fields of the recipe to the files that they write."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rush.data.images import ImageSet
from rush.errors import DataError, RunError
from rush.models.classifier import Classifier, Represent
from rush.models.imported import load_imported
from rush.models.storage import ClassifierSpec, load_weights, save_plain, save_smoothed, save_weights
from rush.pipeline.certify import run_rule
from rush.pipeline.context import StageContext, training_noise
from rush.pipeline.estimate import SEQUENTIAL_SHARE
from rush.pipeline.labels import Taught, labelled_images
from rush.pipeline.precision import FORM, fastest_form, in_integers
from rush.pipeline.preconditions import check_after_training, check_before_training
from rush.recipe.schema import Recipe
from rush.records.folder import RunFolder
from rush.runtime.distributed import barrier, rank, world_size
from rush.runtime.execution import Execution, in_precision
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.forward import try_forwards
from rush.training.finetune import finetune
from rush.training.loop import Monitor
from rush.training.pretrain import channel_statistics, pretrain
from rush.training.probes import classifier_figures, embedding, encoder_figures, knn_correct, representations

ENCODER = Path("checkpoints/encoder.safetensors")
_BANK_IMAGES = 10_000  # images for the live figures; the final figure uses all training images


def run_pretrain(run: RunFolder, tell: Callable[[str], None] = lambda _: None) -> None:
    """Pre-train the encoder without labels, and measure its kNN accuracy on the test images.

    ``tell`` gets the live figures, one line at a time.
    """
    context = StageContext.of(run)
    check_before_training(context)
    recipe, config, execution = context.recipe, context.recipe.pretrain, context.execution
    train, test = context.splits.reference(), context.splits.test
    _check_separate(train, test)
    context.begin("pretrain")
    classifier = new_classifier(spec_of(recipe, train), recipe.seed)
    source = context.splits.pretraining()
    if config.epochs == 0:  # no batch is drawn, so any size is valid
        config = config.replace(batch_size=min(config.batch_size, len(source)))
    settings = context.training("pretrain", _watch_encoder(context, classifier), tell=tell)
    pretrain(source, classifier.encoder, classifier.normalize, config, settings)
    if rank() == 0:
        knn = _knn_accuracy(classifier, train, test, config.knn_neighbours, execution)
        save_weights(classifier.encoder, run.path / ENCODER)
        figures = {**training_figures(run, "pretrain", len(source)), "objective": config.objective}
        places = _embedding(context, classifier, test) if config.epochs else None
        run.finish("pretrain", **figures, knn_accuracy=knn, embedding=places)
    barrier()


def import_encoder(run: RunFolder, file: Path, tell: Callable[[str], None] = lambda _: None) -> None:
    """Take the encoder of a run from a file of weights in place of pre-training, whose epochs the recipe sets to 0.

    Args:
        file: as in ``models.imported``.
        tell: gets a line on what was loaded, and on what was not.

    Raises:
        RunError: the run is pre-trained already, or the weights do not fit.
    """
    if run.finished("pretrain") is not None:
        raise RunError(f"{run.path} has an encoder already; give another --out")
    context = StageContext.of(run)
    check_before_training(context)
    train, test = context.splits.reference(), context.splits.test
    _check_separate(train, test)
    context.begin("pretrain")
    classifier = new_classifier(spec_of(context.recipe, train), context.recipe.seed)
    imported = load_imported(classifier.encoder, file)
    for line in imported.lines:
        tell(f"{file}: {line}")
    if rank() == 0:
        classifier.eval()
        knn = _knn_accuracy(classifier, train, test, context.recipe.pretrain.knn_neighbours, context.execution)
        save_weights(classifier.encoder, run.path / ENCODER)
        figures = training_figures(run, "pretrain", len(train)) | {
            "objective": "imported",
            "weights": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        places = _embedding(context, classifier, test)
        run.finish("pretrain", **figures, left=list(imported.left), knn_accuracy=knn, embedding=places)
    barrier()


def run_finetune(run: RunFolder, tell: Callable[[str], None] = lambda _: None) -> None:
    """Train the classifier on the pre-trained encoder and save the model, smoothed where the recipe has noise.

    ``tell`` gets the live figures, one line at a time.
    """
    for stage in run.recipe.stages[: run.recipe.stages.index("finetune")]:
        run.require(stage)
    context = StageContext.of(run)
    check_after_training(context)
    recipe, config = context.recipe, context.recipe.finetune
    train = context.splits.reference()
    context.begin("finetune")
    known = Taught.of(context) if recipe.teach.rounds else None
    trained = labelled_images(context.splits.train, recipe) if known is None else known.images
    labelled = len(trained) if known is None else len(known.rows)
    spec = spec_of(recipe, train)
    classifier = new_classifier(spec, recipe.seed)
    load_weights(classifier.encoder, run.path / ENCODER)
    settings = context.training("finetune", _watch_classifier(context, classifier), tell=tell)
    targets = None if known is None else known.read(run.path)
    finetune(trained, classifier, config, settings, noise=training_noise(recipe), targets=targets)
    if rank() == 0:
        forward = _save_model(context, classifier, spec, train)
        figures = {**training_figures(run, "finetune", len(trained)), "objective": config.objective}
        run.finish("finetune", **figures, mode=config.mode, labelled_images=labelled, forward=forward)
    barrier()


def spec_of(recipe: Recipe, train: ImageSet) -> ClassifierSpec:
    """Return the recipe's classifier, normalized by the channel statistics of ``train`` (reads every pixel)."""
    mean, std = channel_statistics(train)
    model = recipe.model
    return ClassifierSpec(model.encoder, model.width, train.images.shape[1], mean, std, train.classes, stem=model.stem)


def new_classifier(spec: ClassifierSpec, seed: int) -> Classifier:
    """Return the classifier with its seeded initial weights."""
    classifier = spec.build()
    seeded_init(classifier, stream(seed, "classifier", "weights"))
    return classifier


def _check_separate(train: ImageSet, test: ImageSet) -> None:
    if torch.equal(train.images, test.images):
        raise DataError(
            f"{train.name} gives the same {len(train)} images for train and test; nothing measured on them would hold "
            "for new images: give it separate splits (docs/data.md)"
        )


def _save_model(context: StageContext, classifier: Classifier, spec: ClassifierSpec, train: ImageSet) -> dict[str, Any]:
    """Save the final model and return the figures of its forward."""
    folder, shape, noise = context.run.path / "model", train.images.shape[1:], context.noise
    resized = context.recipe.data.size is not None
    if noise is None:
        save_plain(folder, classifier, spec, context.execution.device, shape, resized)
        return {"compile_mode": "none"}
    if context.recipe.execution.precision == "int8":
        plain = in_precision(context.execution, "float32")
        smoothed = SmoothedClassifier(classifier.eval(), noise=noise, num_classes=train.num_classes, execution=plain)
        smoothed = in_integers(smoothed, train, context.recipe.seed)
        assert isinstance(smoothed.classifier, Classifier)
        save_smoothed(folder, smoothed.classifier, spec, noise, smoothed.execution, shape, resized)
        return _form(smoothed.execution)
    execution, forward = _choose_forward(context, classifier, train)
    save_smoothed(folder, classifier, spec, noise, execution, shape, resized)
    return forward


def _choose_forward(context: StageContext, classifier: Classifier, train: ImageSet) -> tuple[Execution, dict[str, Any]]:
    """Return the execution of judged samples, the recipe's or whichever form a short benchmark finds fastest."""
    mode, config = context.recipe.execution.compile, context.recipe.certify
    execution = context.execution
    if mode != "auto":
        execution = replace(execution, compile_mode=mode)
        return execution, _form(execution)
    images = config.images or len(context.splits.test)
    rule = run_rule(config, context.recipe.smoothing, images)
    share = SEQUENTIAL_SHARE if rule.method == "sequential" else 1.0
    passes = int(images * (rule.num_selection + share * rule.num_estimation))
    placed, shape = execution.place(classifier).eval(), train.images.shape[1:]
    rates: dict[str, float] = {}
    if context.recipe.execution.precision == "auto":
        execution, rates = fastest_form(placed, execution, shape, train.num_classes)
    chosen, trial = try_forwards(execution.place(placed), execution, shape, train.num_classes, passes)
    return chosen, {**_form(chosen), "forms": rates, **trial}


def _form(execution: Execution) -> dict[str, Any]:
    """Return what is recorded of the form in which samples are judged."""
    return {name: getattr(execution, name) for name in FORM}


def _watch_encoder(context: StageContext, classifier: Classifier) -> Monitor | None:
    """Return a function that measures the encoder on the held-out images, or None if there are none."""
    held_out, config = context.splits.held_out, context.recipe.pretrain
    if held_out is None or held_out.labels is None:
        return None
    bank, represent = context.splits.reference(_BANK_IMAGES), Represent(classifier)
    return lambda _: encoder_figures(
        represent,
        bank,
        held_out,
        training_noise(context.recipe),
        context.execution,
        neighbours=config.knn_neighbours,
        seed=context.recipe.seed,
    )


def _watch_classifier(context: StageContext, classifier: Classifier) -> Monitor | None:
    """Return a function that measures the classifier on the held-out images, or None if there are none."""
    held_out = context.splits.held_out
    if held_out is None:
        return None
    noise, seed = training_noise(context.recipe), context.recipe.seed
    return lambda _: classifier_figures(classifier, held_out, noise, context.execution, seed)


def _knn_accuracy(
    classifier: Classifier, train: ImageSet, test: ImageSet, neighbours: int, execution: Execution
) -> dict[str, int] | None:
    """Return the result of nearest-neighbour votes on the test images, or None if labels are missing."""
    if train.labels is None or test.labels is None:
        return None
    represent = execution.place(Represent(classifier)).eval()
    bank, queries = (representations(images, represent, execution) for images in (train, test))
    correct = knn_correct(bank, train.labels.to(bank.device), queries, test.labels.to(bank.device), neighbours)
    return {"correct": correct, "total": len(test), "neighbours": neighbours}


def _embedding(context: StageContext, classifier: Classifier, test: ImageSet) -> dict[str, Any] | None:
    """Return the map of the encoder's representations of test images that the report draws."""
    represent = context.execution.place(Represent(classifier)).eval()
    return embedding(represent, test, training_noise(context.recipe), context.execution, context.recipe.seed)


def training_figures(run: RunFolder, stage: str, images: int) -> dict[str, Any]:
    """Return the cost of a training stage from the last logged event of each epoch, which may have been repeated."""
    epochs = list({event["epoch"]: event for event in run.events("epoch", stage)}.values())
    seconds = sum(event["seconds"] for event in epochs)
    joules = [event.get("joules") for event in epochs]
    return {
        "seconds": seconds,
        "epochs": len(epochs),
        "images": images,
        "passes_per_image": sum(event["passes"] for event in epochs) / images,
        "forward_passes_per_image": sum(event["forward_passes"] for event in epochs) / images,
        "images_per_second": images * len(epochs) / seconds if seconds else None,
        "peak_memory": max((event["peak_memory"] or 0 for event in epochs), default=None),
        "joules": None if None in joules else sum(joules),
        "processes": world_size(),
    }
