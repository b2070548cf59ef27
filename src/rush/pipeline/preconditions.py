"""Checks before training for anything that would stop a later stage."""

import torch

from rush.data.batches import batches_per_epoch
from rush.data.images import ImageSet
from rush.data.kind import ImageKind
from rush.data.streaming import Stream
from rush.errors import ConfigError, DataError, InputError
from rush.pipeline.attackers import check_attackers
from rush.pipeline.certify import run_rule
from rush.pipeline.context import StageContext
from rush.recipe.schema import FinetuneConfig, Recipe
from rush.records.folder import RunFolder


def check_run(run: RunFolder) -> None:
    """Check a run that is not yet trained, as ``check_before_training`` does, and that its images have labels.

    Raises:
        ConfigError, DataError: as ``check_before_training``, or images have no labels. Only ``rush pretrain`` runs
            without labels.
    """
    if run.finished("finetune"):
        return
    context = StageContext.of(run)
    check_before_training(context)
    for images in (context.splits.inspect("train"), context.splits.inspect("test")):
        if images.labels is None:
            raise DataError(
                f"{images.name} ({images.split}) has no labels; fine-tuning, certification and attacks need them. "
                "`rush pretrain` alone does without"
            )


def check_before_training(context: StageContext) -> None:
    """Check that fine-tuning and every later stage can run.

    The splits must have images of one shape and, where they are labelled, the same classes, at least two of which
    occur in training. The numbers of fine-tuning, certification, attacks and audit must allow a decision.

    Raises:
        ConfigError, DataError: they cannot.

    Cost:
        Loads the test images, and the training images unless they are streamed.
    """
    check_after_training(context)
    train, recipe = context.splits.inspect("train"), context.recipe
    if train.labels is not None:
        _check_labels(train, recipe)
    if recipe.pretrain.epochs != 0:
        batches_per_epoch(_pretraining_count(context), recipe.pretrain.batch_size)


def check_after_training(context: StageContext) -> None:
    """Check that the stages after fine-tuning can run. This is ``check_before_training`` without the labels."""
    train, test = context.splits.inspect("train"), context.splits.inspect("test")
    _check_kinds(context, train, test)
    for section in (context.recipe.certify, context.recipe.attack):
        context.splits.check_count(section.images)
    if context.noise is not None:
        try:
            run_rule(context.recipe.certify, context.recipe.smoothing, len(test))
        except InputError as error:
            raise ConfigError(f"certify: {error}") from error
    check_attackers(context.recipe, max(2, len(train.classes)), train.shape)


def _pretraining_count(context: StageContext) -> int:
    """Return the number of images of pre-training, without those held out or drawn as test images."""
    data, split = context.recipe.data, context.recipe.data.pretrain_split
    images = len(context.splits.inspect(split))
    if "train" not in split.split("+"):
        return images
    return images - data.held_out - (data.test_images if split != "train" else 0)


def _check_kinds(context: StageContext, train: ImageSet | Stream, test: ImageSet | Stream) -> None:
    """Raise DataError when the splits are incompatible."""
    kind, split = ImageKind(train.shape, train.classes), context.recipe.data.pretrain_split
    try:
        kind.check_shape(test.shape, _named(test), _named(train))
        kind.check_classes(test.classes, _named(test), _named(train))
        if split != "train":
            unlabelled = context.splits.inspect(split)
            kind.check_shape(unlabelled.shape, _named(unlabelled), _named(train))
    except InputError as error:
        raise DataError(str(error)) from error


def _check_labels(train: ImageSet | Stream, recipe: Recipe) -> None:
    """Raise DataError for labels of a single class, and ConfigError for a number of labels that cannot be used."""
    assert train.labels is not None
    labels = train.labels if isinstance(train, ImageSet) else train.labels[train.rows]
    present, total = torch.unique(labels), len(train) - recipe.data.held_out
    if len(present) < 2:
        raise DataError(
            f"all {len(train)} images of {_named(train)} are of the class {train.classes[int(present[0])]!r}; a "
            "classifier needs images of at least two"
        )
    count = labelled_count(recipe.finetune, total, len(train.classes))
    if count != total and not len(present) <= count < total:
        raise ConfigError(
            f"finetune.labels_per_class or label_fraction asks for {count} labelled images of the {total} of "
            f"{_named(train)}; give at least one per class, {len(present)}, and at most all"
        )
    batches_per_epoch(total if recipe.teach.rounds else count, recipe.finetune.batch_size)


def labelled_count(config: FinetuneConfig, images: int, classes: int) -> int:
    """Return the number of training images whose labels fine-tuning reads."""
    if config.labels_per_class is not None:
        return config.labels_per_class * classes
    return round(config.label_fraction * images)


def _named(images: ImageSet | Stream) -> str:
    return f"{images.name} ({images.split})"
