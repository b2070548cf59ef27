"""What every stage of a run shares: recipe, recorded execution, and which images are used for what."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from rush.choices import Stage
from rush.data.batches import TrainingImages
from rush.data.checks import LabelledPixels, labelled_pixels
from rush.data.images import ImageSet, evaluation_order, hold_out
from rush.data.kind import ANY_KIND, ImageKind
from rush.data.sources import decoded_bytes, load_images
from rush.data.streaming import Stream, open_stream, training_source
from rush.errors import ConfigError
from rush.recipe.schema import Recipe
from rush.records.folder import RunFolder
from rush.runtime.distributed import in_turn, rank, world_size
from rush.runtime.execution import Execution, decide_execution
from rush.runtime.randomness import stream
from rush.smoothing.noise import Gaussian
from rush.training.budget import Budget
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.loop import Keeping

_SAMPLE = 20_000  # of streamed images: what statistics and nearest neighbours are taken from


@dataclass(frozen=True)
class Conditions:
    """What every stage of a run shares: its folder, its recipe and the recorded execution."""

    run: RunFolder
    recipe: Recipe
    execution: Execution

    @classmethod
    def of(cls, run: RunFolder) -> "Conditions":
        wanted = run.recipe.execution
        torch.set_num_threads(run.recorded("threads") or torch.get_num_threads())
        execution = decide_execution(wanted.device, wanted.precision, wanted.tile, wanted.deterministic)
        return cls(run, run.recipe, execution.configure())

    @property
    def noise(self) -> Gaussian | None:
        """What smooths the classifier; None for a classifier that is not smoothed."""
        return noise_of(self.recipe)

    def log(self, event: str, **values: Any) -> None:
        """Write one event of the run, in the first process."""
        if rank() == 0:
            self.run.log(event, **values)

    def begin(self, stage: Stage) -> None:
        """Log that an attempt at ``stage`` begins, once for all processes."""
        if rank() == 0:
            self.run.begin(stage)

    def images(self, split: str) -> ImageSet:
        """A split of the recipe's data, checked to be the one this run has used before; its fingerprint is recorded."""
        images = self._loaded(split)
        self._record(split, images)
        return images

    def split(self, split: str) -> ImageSet | Stream:
        """The same, streamed where it would take more than the recipe's share of memory."""
        images = self.opened(split)
        self._record(split, images)
        return images

    def opened(self, split: str) -> ImageSet | Stream:
        """The same images without a record: to be looked at before anything is computed with them."""
        data = self.recipe.data
        if split in self.run.loaded or decoded_bytes(data.name, split, data.root, size=data.size) <= data.memory_bytes:
            return self._loaded(split)
        if split not in self._streams:
            self._streams[split] = open_stream(
                data.name, split, root=data.root, size=data.size, memory=data.memory_bytes
            )
        return self._streams[split]

    def training_images(self) -> ImageSet | Stream:
        """The training images without those that are held out."""
        return self._divided[0]

    def held_out_images(self) -> ImageSet | None:
        """The training images that neither training sees; None where none is held out."""
        return self._divided[1]

    def pretraining_images(self) -> TrainingImages:
        """What pre-training draws from: the images of its split but the held-out ones, without labels."""
        split, held = self.recipe.data.pretrain_split, self.held_out_images()
        images = self.training_images() if split == "train" else self.split(split)
        if split != "train" and held is not None:
            images = _without(images, np.concatenate([held.ids, np.char.add("train/", held.ids)]))
        return training_source(images.without_labels(), self.execution.device, rank(), world_size())

    def known_images(self, count: int | None = None) -> ImageSet:
        """Training images in memory: all, or at most ``count`` that are not held out, of streams a random sample."""
        images = self.split("train") if count is None else self.training_images()
        if isinstance(images, ImageSet):
            return images if count is None else images[: min(count, len(images))]
        wanted = min(count or _SAMPLE, len(images) - 1)
        return images.holding_out(wanted, stream(self.recipe.seed, "known images"))[1]

    @cached_property
    def _divided(self) -> tuple[ImageSet | Stream, ImageSet | None]:
        train, count = self.split("train"), self.recipe.data.held_out
        if not count:
            return train, None
        generator = stream(self.recipe.seed, "held out")
        return hold_out(train, count, generator) if isinstance(train, ImageSet) else train.holding_out(count, generator)

    @cached_property
    def _streams(self) -> dict[str, Stream]:
        return {}

    @cached_property
    def _recorded(self) -> set[str]:
        return set()

    def _loaded(self, split: str) -> ImageSet:
        if split not in self.run.loaded:
            data = self.recipe.data
            self.run.loaded[split] = load_images(data.name, split=split, root=data.root, size=data.size)
        images = self.run.loaded[split]
        assert isinstance(images, ImageSet)
        return images

    def _record(self, split: str, images: ImageSet | Stream) -> None:
        """Check that this run has used these images before, or note that it does now; once per stage."""
        if split in self._recorded:
            return
        found = {split: {"name": images.name, "images": len(images), "fingerprint": images.fingerprint}}
        in_turn(lambda: self.run.record_provenance(self.execution.as_dict(), found))
        self._recorded.add(split)

    def keeping(self, stage: Stage) -> Keeping:
        """Where and how often a training is kept, and who records the number of epochs of one by minutes."""
        checkpoint = TrainingCheckpoint(self.run.path / f"checkpoints/{stage}.pt", self.run.fingerprint(stage))
        execution = self.recipe.execution
        return Keeping(checkpoint, execution.checkpoint_minutes, execution.on_nonfinite, partial(self._settle, stage))

    def _settle(self, stage: Stage, budget: Budget) -> None:
        """Record the number of epochs; ConfigError where a ramp of the recipe takes more of them."""
        budget.require_ramps(self.recipe.training(stage).ramps)
        in_turn(lambda: self.run.settle(stage, budget.figures()))

    def check_count(self, count: int | None) -> None:
        """Raise ConfigError when there are fewer than ``count`` test images."""
        test = self._loaded("test")
        if count is not None and count > len(test):
            raise ConfigError(
                f"the recipe asks for {count} test images, {test.name} has {len(test)}; "
                "lower certify.images and attack.images"
            )

    def evaluation_images(
        self, count: int | None, num_classes: int, kind: ImageKind = ANY_KIND
    ) -> tuple[list[int], LabelledPixels]:
        """The first ``count`` test images (all for None) of one seeded order, with their positions in the split.

        Certification and attacks take the beginning of the same order: whatever their numbers, they speak of the same
        images. ``kind``: what the model takes.
        """
        self.check_count(count)
        test = self.images("test")
        order = evaluation_order(len(test), count, self.recipe.seed)
        return order, labelled_pixels(test[order], num_classes, kind)


def noise_of(recipe: Recipe) -> Gaussian | None:
    """The smoothing noise that the recipe names; None where its sigma is 0."""
    sigma = recipe.smoothing.sigma
    return Gaussian(sigma) if sigma > 0 else None


def _without(images: ImageSet | Stream, ids: np.ndarray) -> ImageSet | Stream:
    """The images that have none of these ids."""
    if isinstance(images, ImageSet):
        return images[np.flatnonzero(~np.isin(images.ids, ids))]
    return replace(images, rows=images.rows[~np.isin(images.ids, ids)])
