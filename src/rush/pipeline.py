"""The stages of a run: each reads what the stage before left in the run folder, hands plain arguments on and writes its own part."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rush.config import Recipe, TrainingConfig
from rush.data.images import ImageSet, stratified_subset
from rush.data.sources import load_images
from rush.data.views import Views
from rush.engine.checkpoint import TrainingCheckpoint
from rush.engine.loop import Schedule
from rush.engine.precision import Execution, decide_execution
from rush.engine.probes import knn_correct, representations
from rush.engine.runs import RunFolder
from rush.errors import DataError
from rush.finetuning import finetune
from rush.models.classifier import Classifier
from rush.models.saved import ClassifierSpec, load_weights, save_smoothed, save_weights
from rush.noise import Gaussian
from rush.pretraining import channel_statistics, pretrain
from rush.options import Stage
from rush.randomness import seeded_init, stream

ENCODER = Path("checkpoints/encoder.safetensors")


@dataclass(frozen=True)
class Conditions:
    """What every stage of a run shares: its folder, its recipe and the recorded execution."""

    run: RunFolder
    recipe: Recipe
    execution: Execution

    @classmethod
    def of(cls, run: RunFolder) -> "Conditions":
        wanted = run.recipe.execution
        return cls(run, run.recipe, decide_execution(wanted.device, wanted.precision, wanted.tile))

    def images(self, split: str) -> ImageSet:
        """A split of the recipe's data, checked to be the one this run has used before; its fingerprint is recorded."""
        images = load_images(self.recipe.data.name, split=split, root=self.recipe.data.root)
        self.run.record_provenance(
            self.execution.as_dict(),
            {split: {"name": images.name, "images": len(images), "fingerprint": images.fingerprint}},
        )
        return images


def run_pretrain(run: RunFolder) -> None:
    """Pre-train the encoder on the training images without their labels, then its kNN accuracy on the test images, once."""
    if run.finished("pretrain"):
        return
    here = Conditions.of(run)
    train, test = here.images("train"), here.images("test")
    run.begin("pretrain")
    config = here.recipe.pretrain
    classifier = _new_classifier(here.recipe, train)
    pretrain(
        train.without_labels(),
        classifier.encoder,
        classifier.normalize,
        views=Views(**config.views.model_dump()),
        schedule=_schedule(config),
        temperature=config.temperature,
        projector_hidden=config.projector_hidden,
        projector_out=config.projector_out,
        seed=here.recipe.seed,
        execution=here.execution,
        checkpoint=TrainingCheckpoint(run.path / "checkpoints/pretrain.pt", run.fingerprint("pretrain")),
        log=run.log,
    )
    knn = _knn_accuracy(classifier, train, test, config.knn_neighbours, here.execution)
    save_weights(classifier.encoder, run.path / ENCODER)
    run.finish("pretrain", **_training_figures(run, "pretrain", len(train), passes=2 * config.epochs), knn_accuracy=knn)


def run_finetune(run: RunFolder) -> None:
    """Train the classifier under noise on the pre-trained encoder and save the smoothed model."""
    if run.finished("finetune"):
        return
    run.require("pretrain")
    here = Conditions.of(run)
    train = here.images("train")
    run.begin("finetune")
    config = here.recipe.finetune
    labelled = _labelled(train, here.recipe)
    classifier = _new_classifier(here.recipe, train)
    load_weights(classifier.encoder, run.path / ENCODER)
    finetune(
        labelled,
        classifier,
        noise=Gaussian(here.recipe.smoothing.sigma),
        mode=config.mode,
        views=Views.weak(shift_pad=config.shift, flip=config.flip),
        schedule=_schedule(config),
        seed=here.recipe.seed,
        execution=here.execution,
        checkpoint=TrainingCheckpoint(run.path / "checkpoints/finetune.pt", run.fingerprint("finetune")),
        log=run.log,
    )
    save_smoothed(
        run.path / "model", classifier, _spec(here.recipe, train), here.recipe.smoothing.sigma, here.execution
    )
    figures = _training_figures(run, "finetune", len(labelled), passes=config.epochs)
    run.finish("finetune", **figures, mode=config.mode, labelled_images=len(labelled))


def _spec(recipe: Recipe, train: ImageSet) -> ClassifierSpec:
    mean, std = channel_statistics(train)
    return ClassifierSpec(recipe.model.encoder, recipe.model.width, train.images.shape[1], mean, std, train.classes)


def _new_classifier(recipe: Recipe, train: ImageSet) -> Classifier:
    """The recipe's classifier with its seeded initial weights."""
    classifier = _spec(recipe, train).build()
    seeded_init(classifier, stream(recipe.seed, "classifier", "weights"))
    return classifier


def _schedule(config: TrainingConfig) -> Schedule:
    return Schedule(**config.model_dump(include=set(Schedule.__dataclass_fields__)))


def _labelled(train: ImageSet, recipe: Recipe) -> ImageSet:
    """The training images whose labels fine-tuning may read: all, a fraction or so many a class, stratified and seeded."""
    config = recipe.finetune
    if train.labels is None:
        raise DataError(f"{train.name} (train) has no labels; fine-tuning needs them")
    if config.labels_per_class is None and config.label_fraction == 1.0:
        return train
    wanted = config.label_fraction if config.labels_per_class is None else config.labels_per_class * train.num_classes
    return stratified_subset(train, wanted, stream(recipe.seed, "finetune", "labels"))


class _Represent(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.represent(x)


def _knn_accuracy(
    classifier: Classifier, train: ImageSet, test: ImageSet, neighbours: int, execution: Execution
) -> dict[str, int] | None:
    """Nearest-neighbour votes of the test images among the training images; None where labels are missing."""
    if train.labels is None or test.labels is None:
        return None
    represent = execution.place(_Represent(classifier)).eval()
    bank, queries = (representations(images, represent, execution) for images in (train, test))
    correct = knn_correct(bank, train.labels.to(bank.device), queries, test.labels.to(bank.device), neighbours)
    return {"correct": correct, "total": len(test), "neighbours": neighbours}


def _training_figures(run: RunFolder, stage: Stage, images: int, passes: int) -> dict[str, Any]:
    """Cost of a training from its logged epochs, the last event of each; an epoch repeated after a kill counts once."""
    epochs = {event["epoch"]: event for event in run.events("epoch", stage)}.values()
    seconds = sum(event["seconds"] for event in epochs)
    return {
        "seconds": seconds,
        "epochs": len(epochs),
        "images": images,
        "passes_per_image": passes,
        "images_per_second": images * len(epochs) / seconds if seconds else None,
    }
