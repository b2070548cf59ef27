"""Training of a network from other code under noise, in a folder of its own."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rush.data.images import ImageSet
from rush.data.kind import ImageKind
from rush.errors import ConfigError, RunError
from rush.models.classifier import Classifier, Normalize
from rush.models.imported import load_imported
from rush.models.storage import save
from rush.pipeline.context import noise_in_training
from rush.pipeline.precision import in_fastest_form, in_integers
from rush.recipe.schema import Recipe
from rush.records.folder import now
from rush.records.log import append_event
from rush.runtime.execution import decide_execution
from rush.runtime.files import make_folder, write_json
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.inspection import check_logits
from rush.smoothing.noise import Noise
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.finetune import finetune
from rush.training.loop import CheckpointPolicy, TrainingSettings

SETTINGS = "training.json"


def train_module(
    network: nn.Module,
    name: str,
    images: ImageSet,
    recipe: Recipe,
    noise: Noise,
    folder: Path,
    weights: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> SmoothedClassifier:
    """Train ``network`` under ``noise`` by the section ``finetune`` of a recipe, and save it smoothed.

    A call after an interruption resumes. The folder gets ``training.json``, ``log.jsonl``, ``checkpoints`` and, at the
    end, ``model``, which ``rush.load(folder, classifier=network)`` loads.

    Args:
        network: pixels in [0, 1] -> logits, with the weights from which training begins.
        name: name of the network, for the record.
        images: the training images, with labels.
        recipe: gives ``seed``, ``execution`` and ``finetune``, whose mode must be full.
        weights: file from which training begins instead (``models.imported``).
        tell: gets one line at a time.

    Raises:
        ConfigError: the recipe trains the head alone.
        ModelError: the network does not take these images, or does not give a logit per class.
        RunError: the folder belongs to a different training run, or ``weights`` do not fit.
    """
    config = recipe.finetune
    if config.mode != "full":
        raise ConfigError(f"finetune.mode = {config.mode} trains a head of this library; give --set finetune.mode=full")
    described: dict[str, Any] = {
        "network": name,
        "weights": None if weights is None else hashlib.sha256(weights.read_bytes()).hexdigest(),
        "noise": {"name": noise.name, "sigma": noise.sigma},
        "images": {"name": images.name, "fingerprint": images.fingerprint},
        "seed": recipe.seed,
        "finetune": config.model_dump(mode="json"),
    }
    execution = decide_execution(recipe.execution.device, recipe.execution.precision, recipe.execution.tile).configure()
    few = images[:2].pixels()
    logits = execution.logits(execution.place(network).eval(), few)
    check_logits(logits, len(few), images.num_classes)
    _begin(folder, described)
    if weights is not None:
        imported = load_imported(network, weights)
        for line in imported.lines:
            tell(f"{weights}: {line}")
    channels = images.shape[0]
    classifier = Classifier(
        Normalize([0.0] * channels, [1.0] * channels), nn.Identity(), network, ImageKind(images.shape, images.classes)
    )
    checkpoint = TrainingCheckpoint(folder / "checkpoints/finetune.pt", json.dumps(described, sort_keys=True))
    policy = CheckpointPolicy(checkpoint, recipe.execution.checkpoint_minutes, recipe.execution.on_nonfinite)

    def log(event: str, **values: Any) -> None:
        append_event(folder / "log.jsonl", {"event": event, "time": now(), **values})
        if event == "epoch":
            tell(f"epoch {values['epoch']} of {config.epochs}: loss {values['loss']:.4f}")

    settings = TrainingSettings(recipe.seed, execution, "none", policy, None, log)
    finetune(images, classifier, config, settings, noise=noise_in_training(noise))
    smoothed = SmoothedClassifier(
        network.eval(),
        noise=noise,
        num_classes=images.num_classes,
        execution=execution,
        classes=images.classes,
        image_shape=images.shape,
    )
    if recipe.execution.precision == "int8":
        smoothed = in_integers(smoothed, images, recipe.seed)
    elif recipe.execution.precision == "auto":
        in_fastest_form(smoothed, images.shape)
    save(smoothed, folder / "model")
    tell(f"written to {folder / 'model'}: rush.load({str(folder)!r}, classifier=network)")
    return smoothed


def _begin(folder: Path, described: dict[str, Any]) -> None:
    """Write what is trained into a new folder, or compare it with what an interrupted run there trained."""
    file = folder / SETTINGS
    if (folder / "model").exists():
        raise RunError(f"{folder} holds a trained network; give another --out")
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) == described:
            return
        if any((folder / "checkpoints").glob("*")):
            raise RunError(f"{folder} holds another training, see {file}; give another --out")
        write_json(file, described)  # the attempt before ended before its first checkpoint
        return
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; give a new --out")
    make_folder(folder / "checkpoints")
    write_json(file, described)
