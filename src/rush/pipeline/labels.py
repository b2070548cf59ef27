"""The training images of fine-tuning: those whose labels are read, or all of them where a stage teaches the others."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rush.data.images import ImageSet, stratified_subset
from rush.data.streaming import Stream
from rush.errors import ConfigError, DataError, RunError
from rush.pipeline.context import StageContext
from rush.pipeline.preconditions import labelled_count
from rush.recipe.schema import Recipe
from rush.records.arrays import read_arrays
from rush.runtime.files import write_arrays
from rush.runtime.randomness import stream

TARGETS = Path("teach/targets.npz")


def labelled_images(train: ImageSet | Stream, recipe: Recipe) -> ImageSet | Stream:
    """Return the training images whose labels fine-tuning reads: a seeded, stratified subset, or all.

    Raises:
        DataError: the images have no labels.
    """
    if train.labels is None:
        raise DataError(f"{train.name} (train) has no labels; fine-tuning needs them")
    count = labelled_count(recipe.finetune, len(train), train.num_classes)
    if count == len(train):
        return train
    generator = stream(recipe.seed, "finetune", "labels")
    if isinstance(train, ImageSet):
        return stratified_subset(train, count, generator)
    return train.holding_out(count, generator)[1]


@dataclass(frozen=True)
class Taught:
    """The images for which a run is taught labels, those of pre-training.

    Attributes:
        images: N images without labels.
        rows: int64 (L,), the positions of the images whose labels are read.
        labels: int64 (L,).
        num_classes: K.
    """

    images: ImageSet
    rows: Tensor
    labels: Tensor
    num_classes: int

    @classmethod
    def of(cls, context: StageContext) -> "Taught":
        """Return the images of a run. Raises: ConfigError if they are streamed or lack the labelled ones."""
        labelled, images = labelled_images(context.splits.train, context.recipe), context.splits.pretraining_images()
        if isinstance(labelled, Stream) or isinstance(images, Stream):
            raise ConfigError(
                f"teach.rounds = {context.recipe.teach.rounds} needs all images in memory, and these are streamed; set "
                "data.memory_gb to what they take, data.size to a smaller one, or teach.rounds = 0"
            )
        place = {name: row for row, name in enumerate(images.ids.tolist())}
        rows = [place.get(name, place.get(f"train/{name}", -1)) for name in labelled.ids.tolist()]
        if -1 in rows:
            raise ConfigError(
                f"data.pretrain_split = {context.recipe.data.pretrain_split} lacks labelled images, and it is the "
                "images of pre-training that are taught: let it contain train, e.g. train+unlabeled"
            )
        assert labelled.labels is not None
        return cls(images, torch.tensor(rows), labelled.labels, labelled.num_classes)

    def write(self, folder: Path, targets: Tensor) -> None:
        """Write the soft labels of the images, float32 (N, K), see ``data.batches.Batch``, into the run ``folder``."""
        write_arrays(folder / TARGETS, ids=self.images.ids, targets=targets.numpy())

    def read(self, folder: Path) -> Tensor:
        """Return what ``write`` wrote. Raises: RunError if it is damaged or belongs to other images."""
        remedy = f"delete it and stages/teach.json, then run `rush teach {folder}` again"
        stored = read_arrays(folder / TARGETS, ("ids", "targets"), remedy)
        targets = torch.from_numpy(stored["targets"])
        fits = targets.shape == (len(self.images), self.num_classes) and targets.dtype == torch.float32
        if not fits or not np.array_equal(stored["ids"], self.images.ids) or not bool((targets >= 0).all()):
            raise RunError(f"{folder / TARGETS} holds no labels of this run's images. Remedy: {remedy}.")
        return targets
