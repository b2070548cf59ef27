"""Certification of many heads on one frozen encoder: its noisy features are drawn once and kept.

The copies of an image are those that ``certify`` draws under the same seed, and the head gets the features that it
would get after the encoder. Its votes, and so its certificates, are therefore those of ``certify`` for the network
``Sequential(encoder, head)``, and the guarantee is the same, under one more condition.

The condition. The proofs of ``bounds`` and ``sequential`` take the network as fixed before the votes. Each head must
therefore be fixed without regard to the cached features and to the noise behind them. They must not be used to train a
head, to stop its training, or to choose one of several. Several heads may be certified with the same features, each at
its own level, but no level covers the choice of the best of them by these certificates.

Same bits. Encoder and head run in the same precision, layout, folding of BatchNorm and tile as the whole network would.
Features keep the type in which the encoder returns them, bfloat16 for instance. All votes agree with those of
``certify`` if the outputs of encoder and head for a row are the same bits at every row of a tile. The inspection of
every forward measures this and gives a ``NumericsWarning`` otherwise. There are two exceptions. A compiled network may
sum in a different order than its two parts, so a compiled execution is refused. If symbolic tracing fails for the head,
``folded`` folds BatchNorm in the encoder alone, but not in the whole network. In these cases a vote whose two largest
logits differ by rounding may change. The certificates then hold for the network as executed in two parts.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rush.certification.apply_rule import apply_rule
from rush.certification.certificates import Certificates
from rush.certification.certify import noise_streams
from rush.certification.rule import make_rule
from rush.choices import BLOCK, CertifyBound, CertifyMethod, Level, Stopping
from rush.data.checks import Images, LabelledPixels, check_class_indices, labelled_pixels, pixel_ids
from rush.errors import InputError, ModelError
from rush.recipe.schema import CertifyConfig
from rush.runtime.execution import Execution, check_eval_mode, device_of, foreign_call
from rush.runtime.numbers import as_real, positive_integer
from rush.runtime.progress import progress
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.noise import Noise, Splitting, noise_of
from rush.smoothing.outputs import noisy_copies

_DEFAULTS = CertifyConfig()
_BYTES_PER_GIGABYTE = 1e9
_MOST_GIGABYTES = 4.0


def noisy_features(
    encoder: nn.Module,
    images: Images,
    sigma: float | None = None,
    num_selection: int = _DEFAULTS.num_selection,
    num_estimation: int = 1000,
    seed: int = 0,
    *,
    noise: Noise | None = None,
    execution: Execution | None = None,
    max_gigabytes: float = _MOST_GIGABYTES,
) -> "NoisyFeatures":
    """Draw the noisy copies of images through a frozen encoder once, and keep their features in memory.

    ``NoisyFeatures.certify`` then certifies any head without running the encoder again.

    Args:
        encoder: nn.Module in evaluation mode from pixels (B, C, H, W) in [0, 1] to features (B, D), D >= 2. For a
            network of RUSH it is ``Sequential(network.normalize, network.encoder)``.
        images: an ImageSet with labels, or a pair (float images (N, C, H, W) in [0, 1], labels (N,)). The labels may
            be replaced for each head.
        sigma: standard deviation of Gaussian noise, in pixel units.
        num_selection: copies per image that select the class.
        num_estimation: copies per image that bound its probability.
        seed: seed of the noise.
        noise: noise to use in place of ``sigma``, as for ``SmoothedClassifier``.
        execution: where and how encoder and heads run, not compiled. None means float32, on the encoder's device.
        max_gigabytes: the largest size of the cache, in units of 10^9 bytes, see ``cache_gigabytes``.

    Raises:
        InputError: bad images or numbers, a compiled execution, or a cache larger than ``max_gigabytes``. This is
            checked before any noise is drawn. The message gives the numbers of images and of copies that would fit.
        ModelError: the encoder does not return features (B, D), is in training mode, is stochastic, or lets an image
            depend on the rest of the batch.

    Cost: ``num_selection + num_estimation`` passes of the encoder per image, and the memory of the cache on the host.
        Every process draws all images.

    Random: the streams of ``certify``, named by ``seed`` and the image's id.

    Example:
        >>> import rush, torch
        >>> encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU()).eval()
        >>> images = rush.load_images("digits", split="test")[:5]
        >>> features = rush.noisy_features(encoder, images, sigma=0.25, num_estimation=400)
        >>> head = torch.nn.Linear(16, 10).eval()  # fixed without regard to these features
        >>> certificates = features.certify(head, num_classes=10)
        >>> network = rush.SmoothedClassifier(torch.nn.Sequential(encoder, head).eval(), sigma=0.25, num_classes=10)
        >>> bool((certificates.counts == rush.certify(network, images, num_estimation=400).counts).all())
        True
    """
    noise = noise_of(sigma, noise)
    execution = execution or Execution(device=device_of(encoder))
    if execution.compile_mode != "none":
        raise InputError(
            f"the execution compiles the network ({execution.compile_mode}), which sums differently from encoder and "
            'head by themselves; give execution=replace(execution, compile_mode="none")'
        )
    if isinstance(noise, Splitting):
        raise InputError("all draws of splitting noise vote, which rush.certify counts; give a noise that is sampled")
    num_selection = positive_integer("num_selection", num_selection)
    num_estimation = positive_integer("num_estimation", num_estimation)
    pixels = labelled_pixels(images)
    noise.check(pixels.x)
    execution = replace(execution, tile=execution.rows(pixels.x.shape[1:]))  # heads use the tile of the images, too
    votes = num_selection + num_estimation
    example = _features(encoder, execution, pixels.x[:1])
    _check_size(len(pixels), votes, example, max_gigabytes)
    base = SmoothedClassifier(encoder, noise=noise, num_classes=example.shape[1], execution=execution)
    base.check_shape(pixels.x.shape[1:])
    features = torch.empty(len(pixels), votes, example.shape[1], dtype=example.dtype)
    rows, filled = features.view(-1, example.shape[1]), 0
    for _, values in base.outputs(_copies(base, pixels, (num_selection, num_estimation), seed)):
        rows[filled : filled + len(values)] = values
        filled += len(values)
    base.recheck()
    return NoisyFeatures(
        encoder=encoder,
        noise=noise,
        execution=execution,
        num_selection=num_selection,
        features=features,
        labels=pixels.y,
        ids=pixels.ids,
        pixels=pixel_ids(pixels.x),
        fingerprint=base.fingerprint(),
    )


def cache_gigabytes(num_images: int, num_votes: int, num_features: int, bytes_per_value: int = 4) -> float:
    """Return the size of a cache in units of 10^9 bytes.

    Args:
        num_images: N.
        num_votes: copies per image, ``num_selection + num_estimation``.
        num_features: D.
        bytes_per_value: 4 for float32, 2 for bfloat16.
    """
    return num_images * num_votes * num_features * bytes_per_value / _BYTES_PER_GIGABYTE


@dataclass(frozen=True, eq=False)
class NoisyFeatures:
    """Features of noisy copies of N images, made by ``noisy_features``.

    They must not be used to train or to choose a head that is then certified with them.

    Attributes:
        encoder: the network that made them.
        noise: noise of the copies.
        execution: execution of encoder and heads.
        num_selection: copies per image that select the class, the first ones.
        features: (N, num_selection + num_estimation, D) in the encoder's type, on the CPU.
        labels: int64 (N,), labels of the images.
        ids: ids of the images.
        pixels: hashes of the images.
        fingerprint: fingerprint of the encoder, noise and execution.
    """

    encoder: nn.Module
    noise: Noise
    execution: Execution
    num_selection: int
    features: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    pixels: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def gigabytes(self) -> float:
        """Size in units of 10^9 bytes."""
        images, votes, width = self.features.shape
        return cache_gigabytes(images, votes, width, self.features.element_size())

    def compose(self, head: nn.Module, num_classes: int) -> SmoothedClassifier:
        """Return the smoothed classifier that the certificates of ``head`` are about."""
        network = nn.Sequential(self.encoder, head)
        network.training = False  # only for the container: the mode of its parts is checked, not set
        return SmoothedClassifier(network, noise=self.noise, num_classes=num_classes, execution=self.execution)

    def certify(
        self,
        head: nn.Module,
        num_classes: int,
        method: CertifyMethod = _DEFAULTS.method,
        alpha: float = _DEFAULTS.alpha,
        radii: Sequence[float] | None = _DEFAULTS.radii,
        level: Level = _DEFAULTS.level,
        futility: float = _DEFAULTS.futility,
        bound: CertifyBound | None = _DEFAULTS.bound,
        stopping: Stopping = _DEFAULTS.stopping,
        labels: Tensor | None = None,
    ) -> Certificates:
        """Certify ``head`` on the encoder, from the cached features.

        The result is what ``rush.certify`` returns for ``compose(head, num_classes)`` with the seed and the numbers of
        samples of these features, except for the times. The module's docstring lists further exceptions.

        **The head must be fixed without regard to these features and their noise**: do not train or choose it with
        them.

        Args:
            head: nn.Module in evaluation mode from features (B, D) to logits (B, num_classes), on the execution's
                device.
            num_classes: K.
            method: as for ``rush.certify``. ``sequential`` reads the features of an image until it is decided.
            alpha: probability of a false certificate.
            radii: as for ``rush.certify``.
            level: as for ``rush.certify``.
            futility: as for ``rush.certify``.
            bound, stopping: as for ``rush.certify``.
            labels: int (N,), None for those of the images.

        Raises:
            InputError: bad labels or numbers.
            ModelError: the encoder has changed since the features were drawn, or the head cannot be certified.

        Cost: one pass of the head per copy. The encoder is not run.
        """
        started = time.perf_counter()
        y = self.labels if labels is None else labels
        check_class_indices(y, len(self), num_classes)
        votes = self.features.shape[1]
        rule = make_rule(
            noise=self.noise.name,
            bound=bound,
            sigma=self.noise.sigma,
            method=method,
            alpha=alpha,
            level=level,
            num_images=len(self),
            num_selection=self.num_selection,
            num_estimation=votes - self.num_selection,
            radii=radii,
            futility=futility,
            stopping=stopping,
        )
        composed = self.compose(head, num_classes)
        self._check_encoder()
        classes = self._classes(head, num_classes)
        drawn = classes[:, self.num_selection :]
        selection = _counts(classes[:, : self.num_selection], num_classes)
        stored = np.arange(num_classes) if rule.needs_every_class else selection.argmax(1)[:, None, None]
        voted = drawn[:, :, None] == stored
        paths = np.add.reduceat(voted, np.arange(0, drawn.shape[1], BLOCK), axis=1, dtype=np.uint8)
        paths = paths if rule.needs_every_class else paths[:, :, 0]
        lengths = np.full(len(self), drawn.shape[1])
        certified, outcome, _, trials = apply_rule(rule, list(paths), lengths, selection, _counts(drawn, num_classes))
        read = np.arange(drawn.shape[1]) < trials[:, None]
        return Certificates(
            prediction=certified.prediction,
            radius=certified.radius,
            p_lower=certified.p_lower,
            num_samples=self.num_selection + trials,
            counts=_counts(np.where(read, drawn, num_classes), num_classes),
            blocks=tuple(path[: -(-int(end) // BLOCK)] for path, end in zip(paths, trials, strict=True)),
            selection=selection,
            outcome=outcome,
            seconds=np.full(len(self), (time.perf_counter() - started) / len(self)),
            labels=y.cpu().numpy().astype(np.int64),
            ids=self.ids,
            rule=rule,
            pixels=self.pixels,
            model=composed.fingerprint(),
        )

    def _classes(self, head: nn.Module, num_classes: int) -> NDArray[np.int64]:
        """Return the class of every copy, (N, copies)."""
        classifier = SmoothedClassifier(
            _OnFeatures(head, self.features.dtype),
            noise=self.noise,
            num_classes=num_classes,
            execution=self.execution,
        )
        parts = (image.float()[:, :, None, None] for image in self.features)
        classes = torch.cat([logits.argmax(1).cpu() for _, logits in classifier.outputs(parts)])
        classifier.recheck()
        return classes.view(self.features.shape[:2]).numpy()

    def _check_encoder(self) -> None:
        base = SmoothedClassifier(
            self.encoder, noise=self.noise, num_classes=self.features.shape[2], execution=self.execution
        )
        if base.fingerprint() != self.fingerprint:
            raise ModelError(
                "the encoder's weights have changed since its features were drawn; draw them again with "
                "rush.noisy_features, or certify another copy of the encoder"
            )


class _OnFeatures(nn.Module):
    """``head`` on features that are stored as images (B, D, 1, 1) of one pixel, in the type that the encoder gave."""

    def __init__(self, head: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.head, self.dtype = head, dtype
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1).to(self.dtype))


def _copies(base: SmoothedClassifier, pixels: LabelledPixels, numbers: tuple[int, int], seed: int) -> Iterator[Tensor]:
    """Yield the noisy copies of all images, for each image first those that select its class."""
    with progress("features", len(pixels)) as advance:
        for x, image_id in zip(pixels.x, pixels.ids, strict=True):
            on_device = x.to(base.execution.device, torch.float32)
            for generator, number in zip(noise_streams(base, seed, image_id), numbers, strict=True):
                yield from noisy_copies(on_device, number, base.noise, generator)
            advance(1)


def _features(encoder: nn.Module, execution: Execution, x: Tensor) -> Tensor:
    """Return the encoder's output for two copies of an image (1, C, H, W)."""
    check_eval_mode(encoder)
    pair = x.float().to(execution.device).repeat(2, 1, 1, 1)
    with torch.no_grad(), foreign_call(pair), execution.autocast():
        output = encoder(execution.copied(pair))
    valid = isinstance(output, Tensor) and output.ndim == 2 and len(output) == 2 and output.shape[1] >= 2
    if not valid or not output.is_floating_point():
        given = (
            f"{output.dtype} of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        )
        raise ModelError(
            f"the encoder returned {given} for 2 images, expected floating-point features (2, D) with D >= 2; move "
            "layers between encoder and head, e.g. a Flatten, so that one row of features per image lies between them"
        )
    return output


def _check_size(images: int, votes: int, example: Tensor, max_gigabytes: float) -> None:
    most = as_real(max_gigabytes)
    if most is None or most <= 0:
        raise InputError(f"max_gigabytes must be a finite number > 0, got {max_gigabytes!r}")
    width, size = example.shape[1], example.element_size()
    needed = cache_gigabytes(images, votes, width, size)
    if needed > most:
        room = int(most * _BYTES_PER_GIGABYTE) // (width * size)  # rows
        raise InputError(
            f"features of {images} images x {votes} copies x {width} values take {needed:.3g} GB, more than "
            f"max_gigabytes = {most:g}: {room // votes} images would fit with this number of copies, or "
            f"{room // images} copies per image (num_selection + num_estimation) with this number of images"
        )


def _counts(classes: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Return how often each row of ``classes`` (N, M) holds each class, int64 (N, num_classes)."""
    counted = [np.bincount(row, minlength=num_classes)[:num_classes] for row in classes]
    return np.stack(counted).astype(np.int64)
