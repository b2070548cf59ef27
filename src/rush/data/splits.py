"""The images of a run by their use, which is training, monitoring, pre-training or evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from rush.data.batches import TrainingImages
from rush.data.checks import LabelledPixels, labelled_pixels
from rush.data.images import ImageSet, evaluation_order, hold_out
from rush.data.kind import ANY_KIND, ImageKind
from rush.data.sources import decoded_bytes, load_images
from rush.data.streaming import Stream, open_stream, training_source
from rush.errors import ConfigError
from rush.recipe.schema import DataConfig
from rush.runtime.distributed import rank, world_size
from rush.runtime.randomness import stream

_DRAWN = ("train", "test")  # the splits into which ``data.test_images`` divides the training images
_SAMPLE = 20_000  # images of a stream that statistics and nearest neighbours are computed from


@dataclass(frozen=True)
class Splits:
    """The images that ``data`` names. Splits that would take more than its share of memory are streamed.

    Attributes:
        seed: seed of the choice of images that are held out, sampled and evaluated.
        device: device for which streams are decoded.
        record: called once with the name and the images of each split that is computed with. An error that it raises
            ends the access.
        loaded: splits already in memory, by name. Splits read from now on are added.
        lenient: whether to evaluate all test images where fewer exist than are asked for, as the trial of a recipe
            does.
    """

    data: DataConfig
    seed: int
    device: str
    record: Callable[[str, ImageSet | Stream], None]
    loaded: dict[str, ImageSet]
    lenient: bool = False
    _streams: dict[str, Stream] = field(default_factory=dict, init=False)
    _recorded: set[str] = field(default_factory=set, init=False)

    @property
    def train(self) -> ImageSet | Stream:
        """The training images without those that are held out."""
        return self._divided[0]

    @property
    def held_out(self) -> ImageSet | None:
        """The training images that neither training stage sees, or None if none are held out."""
        return self._divided[1]

    @property
    def test(self) -> ImageSet:
        """The test images."""
        images = self._in_memory("test")
        self._record_once("test", images)
        return images

    def pretraining(self) -> TrainingImages:
        """Return the source of pre-training."""
        return training_source(self.pretraining_images(), self.device, rank(), world_size())

    def pretraining_images(self) -> ImageSet | Stream:
        """Return the images of pre-training: its split without the held-out images and without labels."""
        split = self.data.pretrain_split
        if split == "train":
            return self.train.without_labels()
        kept = [self.held_out, self._in_memory("test") if self.data.test_images else None]
        images = self._used(split)
        for part in kept:
            if part is not None:
                images = _without(images, np.concatenate([part.ids, np.char.add("train/", part.ids)]))
        return images.without_labels()

    def reference(self, count: int | None = None) -> ImageSet:
        """Return training images in memory, for statistics and nearest neighbours.

        Args:
            count: None for all training images, else the greatest number, without held-out images. For a stream, the
                images are a random sample.
        """
        images = self._used("train") if count is None else self.train
        if isinstance(images, ImageSet):
            return images if count is None else images[: min(count, len(images))]
        size = min(count or _SAMPLE, len(images) - 1)
        return images.holding_out(size, stream(self.seed, "known images"))[1]

    def evaluation(
        self, count: int | None, num_classes: int, kind: ImageKind = ANY_KIND
    ) -> tuple[list[int], LabelledPixels]:
        """Return the first ``count`` test images (all for None) of one seeded order, and their positions in the split.

        Certification and attacks use the beginning of the same order, so that they evaluate the same images.

        Args:
            kind: images that the model accepts.

        Raises:
            ConfigError: there are fewer than ``count`` test images, and the splits are not ``lenient``.
        """
        self.check_count(count)
        test = self.test
        order = evaluation_order(len(test), count, self.seed)
        return order, labelled_pixels(test[order], num_classes, kind)

    def check_count(self, count: int | None) -> None:
        """Raise ConfigError when there are fewer than ``count`` test images, unless ``lenient``."""
        test = self._in_memory("test")
        if count is not None and count > len(test) and not self.lenient:
            raise ConfigError(
                f"the recipe asks for {count} test images, {test.name} has {len(test)}; "
                "lower certify.images and attack.images"
            )

    def inspect(self, split: str) -> ImageSet | Stream:
        """Return a split without recording it, to check it before anything is computed with it."""
        data = self.data
        if self.data.test_images and split in _DRAWN:
            return self._in_memory(split)
        if split in self.loaded or decoded_bytes(data.name, split, data.root, size=data.size) <= data.memory_bytes:
            return self._in_memory(split)
        if split not in self._streams:
            self._streams[split] = open_stream(
                data.name, split, root=data.root, size=data.size, memory=data.memory_bytes
            )
        return self._streams[split]

    @cached_property
    def _divided(self) -> tuple[ImageSet | Stream, ImageSet | None]:
        train, count = self._used("train"), self.data.held_out
        if not count:
            return train, None
        generator = stream(self.seed, "held out")
        return hold_out(train, count, generator) if isinstance(train, ImageSet) else train.holding_out(count, generator)

    def _used(self, split: str) -> ImageSet | Stream:
        images = self.inspect(split)
        self._record_once(split, images)
        return images

    def _in_memory(self, split: str) -> ImageSet:
        data = self.data
        if split not in self.loaded and data.test_images and split in _DRAWN:
            self.loaded.update(zip(_DRAWN, self._drawn(), strict=True))
        if split not in self.loaded:
            self.loaded[split] = load_images(data.name, split=split, root=data.root, size=data.size)
        return self.loaded[split]

    def _drawn(self) -> tuple[ImageSet, ImageSet]:
        """Return the training images without ``data.test_images`` of them, and the latter.

        Raises:
            ConfigError: there are too few training images, or they do not fit in memory.
        """
        data = self.data
        if decoded_bytes(data.name, "train", data.root, size=data.size) > data.memory_bytes:
            raise ConfigError(
                f"data.test_images = {data.test_images} needs all images in memory, and these are streamed; set "
                "data.memory_gb to what they take, or data.size to a smaller one, or give the data a test split"
            )
        whole = load_images(data.name, split="train", root=data.root, size=data.size)
        if data.test_images >= len(whole):
            raise ConfigError(
                f"data.test_images = {data.test_images} leaves none of {len(whole)} images for training; lower it"
            )
        train, test = hold_out(whole, data.test_images, stream(0, "test split"))
        return train, replace(test, split="test")

    def _record_once(self, split: str, images: ImageSet | Stream) -> None:
        if split not in self._recorded:
            self.record(split, images)
            self._recorded.add(split)


def _without(images: ImageSet | Stream, ids: np.ndarray) -> ImageSet | Stream:
    """Return the images that have none of these ids."""
    if isinstance(images, ImageSet):
        return images[np.flatnonzero(~np.isin(images.ids, ids))]
    return replace(images, rows=images.rows[~np.isin(images.ids, ids)])
