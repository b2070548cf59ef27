"""Refusals before the first training of a run, of what would stop a later stage: images that do not belong together,
numbers that can never give an answer."""

import torch

from rush.certification.rule import make_rule
from rush.data.batches import batches_per_epoch
from rush.data.images import ImageSet
from rush.data.kind import ImageKind
from rush.data.streaming import Stream
from rush.errors import ConfigError, DataError, InputError
from rush.pipeline.attack import check_attackers
from rush.pipeline.context import Conditions
from rush.recipe.schema import FinetuneConfig, Recipe
from rush.records.folder import RunFolder


def check_run(run: RunFolder) -> None:
    """Raise what ``check_before_training`` raises, and DataError for images without labels, which only pre-training
    does without.

    A run that is trained already is not looked at.
    """
    if run.finished("finetune"):
        return
    here = Conditions.of(run)
    check_before_training(here)
    for images in (here.opened("train"), here.opened("test")):
        if images.labels is None:
            raise DataError(
                f"{images.name} ({images.split}) has no labels; fine-tuning, certification and attacks need them. "
                "`rush pretrain` alone does without"
            )


def check_before_training(here: Conditions) -> None:
    """Raise an error when fine-tuning or a later stage of the run could not do its part: at the start of
    pre-training.

    The splits must have images of one shape and, where they are labelled, the same classes, at least two of which
    occur in training. The numbers of fine-tuning, certification, attacks and audit must be able to give an answer.
    Cost: the test images are loaded, and the training images where they are not streamed.
    """
    check_after_training(here)
    train = here.opened("train")
    if train.labels is not None:
        _check_labels(train, here.recipe)


def check_after_training(here: Conditions) -> None:
    """Raise an error when a stage behind fine-tuning could not do its part: what ``check_before_training`` says but
    for labels."""
    train, test = here.opened("train"), here.opened("test")
    _check_kinds(here, train, test)
    for section in (here.recipe.certify, here.recipe.attack):
        here.check_count(section.images)
    if here.noise is not None:
        _check_rule(here, len(test))
    check_attackers(here.recipe, max(2, len(train.classes)), train.shape)


def _check_kinds(here: Conditions, train: ImageSet | Stream, test: ImageSet | Stream) -> None:
    """Raise DataError when the splits do not belong together."""
    kind, split = ImageKind(train.shape, train.classes), here.recipe.data.pretrain_split
    try:
        kind.check_shape(test.shape, _named(test), _named(train))
        kind.check_classes(test.classes, _named(test), _named(train))
        if split != "train":
            unlabelled = here.opened(split)
            kind.check_shape(unlabelled.shape, _named(unlabelled), _named(train))
    except InputError as error:
        raise DataError(str(error)) from error


def _check_labels(train: ImageSet | Stream, recipe: Recipe) -> None:
    """Raise an error for labels of one class, and for more of them, or fewer, than fine-tuning can take."""
    assert train.labels is not None
    labels = train.labels if isinstance(train, ImageSet) else train.labels[train.rows]
    present, total = torch.unique(labels), len(train) - recipe.data.held_out
    if len(present) < 2:
        raise DataError(
            f"all {len(train)} images of {_named(train)} are of the class {train.classes[int(present[0])]!r}; a "
            "classifier needs images of at least two"
        )
    config = recipe.finetune
    if config.labels_per_class is None and config.label_fraction == 1.0:
        wanted = total
    else:
        wanted = labelled_count(config, total, len(train.classes))
        if not len(present) <= wanted <= total:
            raise ConfigError(
                f"finetune.labels_per_class or label_fraction asks for {wanted} labelled images of the {total} of "
                f"{_named(train)}; give at least one per class, {len(present)}, and at most all"
            )
    batches_per_epoch(wanted, config.batch_size)


def labelled_count(config: FinetuneConfig, images: int, classes: int) -> int:
    """Number of training images whose labels fine-tuning reads."""
    if config.labels_per_class is not None:
        return config.labels_per_class * classes
    return round(config.label_fraction * images)


def _check_rule(here: Conditions, images: int) -> None:
    config, noise = here.recipe.certify, here.noise
    assert noise is not None
    try:
        make_rule(sigma=noise.sigma, num_images=config.images or images, **config.model_dump(exclude={"images"}))
    except InputError as error:
        raise ConfigError(f"certify: {error}") from error


def _named(images: ImageSet | Stream) -> str:
    return f"{images.name} ({images.split})"
