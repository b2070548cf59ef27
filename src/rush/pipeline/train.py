"""The two trainings of a run, from the recipe's fields to the files that they leave."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rush.choices import FinetuneObjective, Stage, parse_fraction
from rush.data.batches import TrainingImages
from rush.data.images import ImageSet, stratified_subset
from rush.data.noisy_views import NoiseSchedule
from rush.data.streaming import Stream
from rush.data.views import Views
from rush.errors import DataError
from rush.models.classifier import Classifier, Represent
from rush.models.storage import ClassifierSpec, load_weights, save_plain, save_smoothed, save_weights
from rush.pipeline.context import Conditions, noise_of
from rush.pipeline.preconditions import check_after_training, check_before_training
from rush.recipe.schema import AdversaryConfig, FinetuneConfig, PretrainConfig, Recipe, TrainingConfig
from rush.records.folder import RunFolder
from rush.runtime.distributed import barrier, rank, world_size
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.runtime.schedules import scheduled
from rush.smoothing.forward import try_forwards
from rush.training.finetune import Objective, finetune
from rush.training.loop import Schedule
from rush.training.pretrain import ACL, Method, MoCo, SimCLR, channel_statistics, pretrain
from rush.training.probes import classifier_figures, encoder_figures, knn_correct, representations
from rush.training.supervised import cat_rs, consistency, gaussian, pgd_at, smoothadv, standard, trades

ENCODER = Path("checkpoints/encoder.safetensors")
_BANK_IMAGES = 10_000  # for the live figures; the figure at the end takes all training images
_SEQUENTIAL_SHARE = 0.2  # of the cap that a sequential certification draws on average, for the trial of the forward


def run_pretrain(run: RunFolder) -> None:
    """Pre-train the encoder on the training images without their labels, then its kNN accuracy on the test images,
    once."""
    if run.finished("pretrain"):
        return
    here = Conditions.of(run)
    check_before_training(here)
    train, test = here.known_images(), here.images("test")
    _check_separate(train, test)
    here.begin("pretrain")
    config, recipe = here.recipe.pretrain, here.recipe
    classifier = new_classifier(spec_of(recipe, train), recipe.seed)
    source = here.pretraining_images()
    pretrain_by(
        recipe,
        source,
        classifier,
        here.execution,
        keeping=here.keeping("pretrain"),
        monitor=_watch_encoder(here, classifier),
        monitor_epochs=config.monitor_epochs,
        log=here.log,
    )
    if rank() == 0:
        knn = _knn_accuracy(classifier, train, test, config.knn_neighbours, here.execution)
        save_weights(classifier.encoder, run.path / ENCODER)
        figures = {**_training_figures(run, "pretrain", len(source)), "objective": config.objective}
        run.finish("pretrain", **figures, knn_accuracy=knn)
    barrier()


def run_finetune(run: RunFolder) -> None:
    """Train the classifier on the pre-trained encoder and save the model, smoothed where the recipe has noise."""
    if run.finished("finetune"):
        return
    run.require("pretrain")
    here = Conditions.of(run)
    check_after_training(here)
    train = here.known_images()
    here.begin("finetune")
    config, recipe = here.recipe.finetune, here.recipe
    labelled = _labelled(here.training_images(), recipe)
    spec = spec_of(recipe, train)
    classifier = new_classifier(spec, recipe.seed)
    load_weights(classifier.encoder, run.path / ENCODER)
    finetune_by(
        recipe,
        labelled,
        classifier,
        here.execution,
        keeping=here.keeping("finetune"),
        monitor=_watch_classifier(here, classifier),
        monitor_epochs=config.monitor_epochs,
        log=here.log,
    )
    if rank() == 0:
        forward = _save_model(here, classifier, spec, train)
        figures = {**_training_figures(run, "finetune", len(labelled)), "objective": config.objective}
        run.finish("finetune", **figures, mode=config.mode, labelled_images=len(labelled), forward=forward)
    barrier()


def pretrain_by(
    recipe: Recipe,
    images: TrainingImages,
    classifier: Classifier,
    execution: Execution,
    schedule: Schedule | None = None,
    **watched: Any,
) -> None:
    """Pre-train the encoder of ``classifier`` as the recipe says, along its schedule or another one; ``watched`` are
    the arguments of ``pretrain`` that say how it is kept, monitored and logged."""
    config = recipe.pretrain
    pretrain(
        images,
        classifier.encoder,
        classifier.normalize,
        method=method_of(config),
        views=Views(**config.views.model_dump()),
        noise=NoiseSchedule(**config.noise.model_dump()),
        schedule=schedule or schedule_of(config),
        projector_hidden=config.projector_hidden,
        projector_out=config.projector_out,
        seed=recipe.seed,
        execution=execution,
        compile_mode=recipe.execution.compile_training,
        **watched,
    )


def finetune_by(
    recipe: Recipe,
    images: ImageSet | Stream,
    classifier: Classifier,
    execution: Execution,
    schedule: Schedule | None = None,
    head_epochs: int | None = None,
    **watched: Any,
) -> None:
    """Fine-tune ``classifier`` as the recipe says, along its schedule and for its ``head_epochs``, or others;
    ``watched`` as in ``pretrain_by``."""
    config = recipe.finetune
    finetune(
        images,
        classifier,
        objective=objective_of(config),
        noise=noise_of(recipe),
        mode=config.mode,
        head_epochs=config.head_epochs if head_epochs is None else head_epochs,
        views=Views.weak(shift_pad=config.shift, flip=config.flip),
        schedule=schedule or schedule_of(config),
        seed=recipe.seed,
        execution=execution,
        compile_mode=recipe.execution.compile_training,
        **watched,
    )


def method_of(config: PretrainConfig) -> Method:
    """The pre-training method that the recipe names."""
    if config.objective == "moco":
        return MoCo(config.temperature, config.queue, config.key_momentum, config.shuffle_groups)
    if config.objective == "acl":
        return ACL(config.temperature, **_budget(config.adversary))
    return SimCLR(config.temperature, config.micro_batch)


def objective_of(config: FinetuneConfig) -> Objective:
    """The fine-tuning objective that the recipe names, with its options."""
    budget = _budget(config.adversary)
    objectives: dict[FinetuneObjective, Objective] = {
        "standard": lambda e: standard(e.logits, e.x, e.y),
        "gaussian": lambda e: gaussian(e.logits, e.x, e.y, e.noise, e.generator),
        "consistency": lambda e: consistency(
            e.logits, e.x, e.y, e.noise, e.generator, **config.consistency.model_dump()
        ),
        "smoothadv": lambda e: smoothadv(
            e.logits,
            e.evaluated,
            e.x,
            e.y,
            e.noise,
            e.generator,
            draws=config.smoothadv.draws,
            epsilon=scheduled(config.smoothadv.epsilon_at, e.epoch),
            steps=config.smoothadv.steps,
        ),
        "cat-rs": lambda e: cat_rs(e.logits, e.evaluated, e.x, e.y, e.noise, e.generator, **config.cat_rs.model_dump()),
        "pgd-at": lambda e: pgd_at(e.logits, e.evaluated, e.x, e.y, e.generator, **budget),
        "trades": lambda e: trades(e.logits, e.evaluated, e.x, e.y, e.generator, **budget, beta=config.trades.beta),
    }
    return objectives[config.objective]


def schedule_of(config: TrainingConfig) -> Schedule:
    """How long and by which optimizer a training of the recipe goes."""
    return Schedule(**config.model_dump(include=set(Schedule.__dataclass_fields__)))


def _budget(adversary: AdversaryConfig) -> dict[str, Any]:
    return {
        "epsilon": parse_fraction(adversary.epsilon),
        "step_size": parse_fraction(adversary.step_size),
        "steps": adversary.steps,
    }


def spec_of(recipe: Recipe, train: ImageSet) -> ClassifierSpec:
    """The recipe's classifier for these images, normalized by their statistics, which takes a look at every pixel."""
    mean, std = channel_statistics(train)
    model = recipe.model
    return ClassifierSpec(model.encoder, model.width, train.images.shape[1], mean, std, train.classes, stem=model.stem)


def new_classifier(spec: ClassifierSpec, seed: int) -> Classifier:
    """The classifier with its seeded initial weights."""
    classifier = spec.build()
    seeded_init(classifier, stream(seed, "classifier", "weights"))
    return classifier


def _check_separate(train: ImageSet, test: ImageSet) -> None:
    if torch.equal(train.images, test.images):
        raise DataError(
            f"{train.name} gives the same {len(train)} images for train and test; nothing measured on them would hold "
            "for new images: give it separate splits (docs/data.md)"
        )


def _labelled(train: ImageSet | Stream, recipe: Recipe) -> ImageSet | Stream:
    """The training images whose labels fine-tuning may read: all, a fraction or so many a class, stratified and
    seeded."""
    config = recipe.finetune
    if train.labels is None:
        raise DataError(f"{train.name} (train) has no labels; fine-tuning needs them")
    if config.labels_per_class is None and config.label_fraction == 1.0:
        return train
    wanted = config.label_fraction if config.labels_per_class is None else config.labels_per_class * train.num_classes
    generator = stream(recipe.seed, "finetune", "labels")
    if isinstance(train, ImageSet):
        return stratified_subset(train, wanted, generator)
    return train.holding_out(wanted if isinstance(wanted, int) else round(wanted * len(train)), generator)[1]


def _save_model(here: Conditions, classifier: Classifier, spec: ClassifierSpec, train: ImageSet) -> dict[str, Any]:
    """Save what is used in the end, and say how it is computed."""
    folder, shape, noise = here.run.path / "model", train.images.shape[1:], here.noise
    resized = here.recipe.data.size is not None
    if noise is None:
        save_plain(folder, classifier, spec, here.execution.device, shape, resized)
        return {"compile_mode": "none"}
    execution, forward = _choose_forward(here, classifier, train)
    save_smoothed(folder, classifier, spec, noise.sigma, execution, shape, resized)
    return forward


def _choose_forward(here: Conditions, classifier: Classifier, train: ImageSet) -> tuple[Execution, dict[str, Any]]:
    """How judged samples are to be computed: as the recipe says, or what a short trial shows to be soonest done."""
    wanted, config = here.recipe.execution.compile, here.recipe.certify
    execution = here.execution
    if wanted != "auto":
        return replace(execution, compile_mode=wanted), {"compile_mode": wanted}
    images = config.images or len(here.images("test"))
    share = _SEQUENTIAL_SHARE if config.method == "sequential" else 1.0
    passes = int(images * (config.num_selection + share * config.num_estimation))
    placed = execution.place(classifier).eval()
    chosen, trial = try_forwards(placed, execution, train.images.shape[1:], train.num_classes, passes)
    return chosen, {"compile_mode": chosen.compile_mode, **trial}


Watch = Callable[[int], dict[str, Any]]


def _watch_encoder(here: Conditions, classifier: Classifier) -> Watch | None:
    """Live figures of the encoder on the held-out images; None where none is held out."""
    held, config = here.held_out_images(), here.recipe.pretrain
    if held is None or held.labels is None:
        return None
    known, represent = here.known_images(_BANK_IMAGES), Represent(classifier)
    return lambda _: encoder_figures(
        represent, known, held, here.noise, here.execution, neighbours=config.knn_neighbours, seed=here.recipe.seed
    )


def _watch_classifier(here: Conditions, classifier: Classifier) -> Watch | None:
    """Live figures of the classifier on the held-out images; None where none is held out."""
    held = here.held_out_images()
    if held is None:
        return None
    return lambda _: classifier_figures(classifier, held, here.noise, here.execution, here.recipe.seed)


def _knn_accuracy(
    classifier: Classifier, train: ImageSet, test: ImageSet, neighbours: int, execution: Execution
) -> dict[str, int] | None:
    """Nearest-neighbour votes of the test images among the training images; None where labels are missing."""
    if train.labels is None or test.labels is None:
        return None
    represent = execution.place(Represent(classifier)).eval()
    bank, queries = (representations(images, represent, execution) for images in (train, test))
    correct = knn_correct(bank, train.labels.to(bank.device), queries, test.labels.to(bank.device), neighbours)
    return {"correct": correct, "total": len(test), "neighbours": neighbours}


def _training_figures(run: RunFolder, stage: Stage, images: int) -> dict[str, Any]:
    """Cost of a training from its logged epochs, the last event of each; an epoch repeated after a kill counts once."""
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
