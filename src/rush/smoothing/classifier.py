"""The smoothed classifier: votes of a base classifier under noise."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.choices import ABSTAIN, BLOCK
from rush.data.checks import Pixels, pixel_ids, unlabelled_pixels
from rush.data.kind import ANY_KIND, ImageKind, checked_shape
from rush.errors import InputError, ModelError
from rush.models.classifier import Classifier
from rush.runtime.execution import Execution, check_eval_mode, check_integers, decide_execution, device_of, in_precision
from rush.runtime.numbers import as_whole, positive_integer, probability
from rush.runtime.randomness import stream
from rush.smoothing.base import Draws
from rush.smoothing.channels import copied_planes
from rush.smoothing.fingerprint import fingerprint_of
from rush.smoothing.forward import Forward
from rush.smoothing.inspection import check_logits
from rush.smoothing.noise import Noise, Splitting, noise_of
from rush.smoothing.outputs import outputs
from rush.smoothing.quantized import is_quantized, quantized
from rush.smoothing.votes import VoteCounter, VoteRequest
from rush.statistics import fewest_votes, sign_test

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]


def _class_names(classes: Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise InputError(f"classes must be a list of names, got {classes!r}")
    return tuple(map(str, classes))


class SmoothedClassifier:
    """A base classifier f under noise: g(x) = argmax_c P(f(x + noise) = c) (Cohen et al. 2019, equation 1).

    Noise is not clipped, so f sees values outside [0, 1]. Every certified, predicted or judged sample passes through
    one forward, which ``execution`` describes.

    Args:
        classifier: nn.Module in evaluation mode from pixels (B, C, H, W) in [0, 1] to logits (B, num_classes). Its
            logits for an image must not depend on the rest of the batch.
        sigma: standard deviation of Gaussian noise, in pixel units.
        num_classes: K, at least 2.
        noise: noise to use in place of ``sigma``, which means ``rush.Gaussian(sigma)``. Under
            ``rush.DiscreteGaussian(sigma)`` every judged image must be an 8-bit image, and certificates hold in
            floating point, too. The same applies under ``rush.Splitting(sigma)``, whose certificates are exact.
        execution: where and how f runs. With None, f runs in float32, on the device of its parameters. With "auto", f
            is moved to the best device, and runs in bfloat16 where the processor computes in it, with BatchNorm folded.
            Both run f on tiles whose number of rows follows from the size of the images (``Execution.rows``).
        classes: names of the classes, in the order of the logits. By default those that f was trained on, if known.
        image_shape: (C, H, W) of the images. By default the shape that f was trained on, if known. Images of another
            shape are refused. Where no shape is known, the first images fix the number of channels. Grey images are
            refused if f repeats their plane before its first layer, since the copies would carry the same noise.

    Raises:
        InputError: bad sigma, number of classes or shape.
        ModelError: ``classifier`` is not a module.

    Example:
        >>> import rush, torch
        >>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> smoothed = rush.SmoothedClassifier(classifier, sigma=0.25, num_classes=10)
        >>> x = rush.load_images("digits", split="test")[:3].pixels()
        >>> smoothed.predict(x, num_samples=100).shape
        torch.Size([3])
        >>> smoothed.log_probs(x, num_samples=8, generator=rush.stream(0, "example")).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        classifier: nn.Module,
        sigma: float | None = None,
        num_classes: int | None = None,
        *,
        noise: Noise | None = None,
        execution: Execution | Literal["auto"] | None = None,
        classes: Sequence[str] | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(classifier, nn.Module):
            raise ModelError(
                f"classifier must be a torch.nn.Module from pixels to logits, got {type(classifier).__name__}"
            )
        noise = noise_of(sigma, noise)
        whole = as_whole(num_classes)
        if whole is None or whole < 2:
            hint = "; a classifier with a single logit z has two classes: let it return torch.cat([-z, z], 1)"
            raise InputError(f"num_classes must be an integer >= 2, got {num_classes!r}{hint if whole == 1 else ''}")
        trained_on = classifier.kind if isinstance(classifier, Classifier) else ANY_KIND
        names = trained_on.classes if classes is None else _class_names(classes)
        if names is not None and len(names) != whole:
            raise InputError(f"got {len(names)} class names for num_classes = {whole}")
        self.classifier = classifier
        self.noise = noise
        self.num_classes = whole
        self.classes = names if names is not None else tuple(str(k) for k in range(whole))
        self.kind = ImageKind(trained_on.shape if image_shape is None else checked_shape(image_shape), names)
        self._channels: int | None = None  # channels of the first images that it has answered, where no shape is known
        self._examined: tuple[int, ...] | None = None
        if execution == "auto":
            execution = decide_execution()
            execution.place(classifier)
        self.execution = execution or Execution(device=device_of(classifier))
        if (self.execution.precision == "int8") != is_quantized(classifier):
            raise InputError(
                f"the classifier and execution.precision = {self.execution.precision!r} do not fit: "
                'SmoothedClassifier.quantized makes a classifier in 8-bit integers, whose precision is "int8"'
            )
        self._forward: Forward | None = None

    @property
    def sigma(self) -> float:
        return self.noise.sigma

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images that the classifier takes, None if not known."""
        return self.kind.shape

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise InputError unless images of ``shape`` (C, H, W) are of the kind that the classifier takes.

        Where its shape is not known, the number of channels must be that of the first images, and a single one must
        not be repeated before the first layer (``smoothing.channels``).
        """
        shape = tuple(shape)
        self.kind.check_shape(shape, "the images", "those of the model")
        if self.kind.shape is not None or shape[0] == self._channels:
            return
        if self._channels is not None:
            raise InputError(
                f"the images have {shape[0]} channels, the first images of this classifier had {self._channels}; make "
                "another SmoothedClassifier for other images, with its image_shape"
            )
        if shape == self._examined:
            return
        check_eval_mode(self.classifier)
        copies = copied_planes(self.classifier, self.execution, shape, stream(0, "channels"))
        if copies > 1:
            raise InputError(
                f"the images have 1 channel, and the classifier repeats it to {copies} before its first layer, e.g. by "
                "a normalization with statistics of several channels: all of them would carry the same noise. Give "
                f"images of {copies} channels, or set image_shape={shape} if the classifier was trained like this"
            )
        self._examined = shape

    def answered(self, shape: Sequence[int]) -> None:
        """Note that the classifier has answered images of ``shape``, which fixes its number of channels."""
        self._channels = shape[0]

    def quantized(self, x: Pixels, seed: int = 0) -> "SmoothedClassifier":
        """Return this classifier computed in 8-bit integers, for processors with integer dot products (VNNI).

        It is another classifier: votes, certificates and verdicts of one say nothing about the other. Attacks follow
        the derivative of the network in float32. It runs on the CPU only.

        Args:
            x: some hundred training images, as ``predict`` takes them, which determine the scale of every activation.
            seed: seed of their noise.

        Raises:
            InputError: bad images.
            ConfigError: the device is not a CPU with integer dot products.
            ModelError: the network cannot be traced.

        Random: ``stream(seed, "quantize", hash of the pixels)`` for each image.
        """
        x = unlabelled_pixels(x, self.kind)
        check_integers(self.execution.device)
        check_eval_mode(self.classifier)
        noise = self.sample_noise(x, 1, self.streams(seed, "quantize", pixel_ids(x)))
        return SmoothedClassifier(
            quantized(self.classifier, self.noise.noisy(x, noise[:, 0])),
            noise=self.noise,
            num_classes=self.num_classes,
            execution=in_precision(self.execution, "int8"),
            classes=self.classes,
            image_shape=self.image_shape,
        )

    def vote_blocks(self, x: Tensor, num_samples: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Count the votes of noisy copies of each image, in blocks of 100.

        The votes for an image depend on its pixels and its generator alone. Any use of the votes ends with ``recheck``.

        Args:
            x: images (B, C, H, W), float32 in [0, 1].
            num_samples: noisy copies per image.
            generators: one per image, on the execution's device. Each advances by whole blocks.

        Returns:
            int64 (B, ceil(num_samples / 100), K), on the CPU.

        Raises:
            ModelError: the classifier is in training mode, is stochastic, lets an image depend on the rest of the
                batch, or returns logits that are not finite or of the wrong shape.

        Cost: B x num_samples forward passes, in full tiles.
        """
        num_samples = positive_integer("num_samples", num_samples)
        _check_one_each(generators, len(x))
        self.check_shape(x.shape[1:])
        self.noise.check(x)
        blocks = -(-num_samples // BLOCK)
        images = x.to(self.execution.device, torch.float32)
        requests = (
            VoteRequest(pixels, generator, min(BLOCK, num_samples - block * BLOCK))
            for pixels, generator in zip(images, generators, strict=True)
            for block in range(blocks)
        )
        votes = self.vote_counter().launch(requests, len(x) * blocks).result()
        self.answered(x.shape[1:])
        return votes.view(len(x), blocks, self.num_classes)

    def all_votes(self, x: Tensor) -> Tensor:
        """Count the votes of all draws of splitting noise on each image, in blocks of 100, as ``vote_blocks``.

        Cost: B x ``noise.num_draws`` forward passes.
        """
        assert isinstance(self.noise, Splitting)
        return self.vote_blocks(x, self.noise.num_draws, [Draws() for _ in x])

    def counts(self, x: Tensor, num_samples: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Count the votes of ``num_samples`` noisy copies of each image, int64 (B, K), see ``vote_blocks``."""
        return self.vote_blocks(x, num_samples, generators).sum(1)

    def predict(self, x: Pixels, num_samples: int = 1000, alpha: float = 0.001, seed: int = 0) -> Tensor:
        """Predict the class of each image with ``num_samples`` votes.

        P(the result is neither g(x) nor ABSTAIN) <= alpha for each image, by the two-sided binomial test between the
        two classes with the most votes (Cohen et al. 2019, proposition 2). Under splitting noise all draws vote: the
        result is g(x), and only ``x`` matters.

        Args:
            x: B images: a tensor or NumPy array (B, C, H, W), floats in [0, 1] or uint8, or images with labels, as
                ``rush.certify`` takes them.
            num_samples: noisy copies per image.
            alpha: probability of a wrong answer.
            seed: seed of the noise.

        Returns:
            int64 (B,), ABSTAIN (-1) where the votes do not decide.

        Raises:
            InputError: bad images or numbers, or fewer samples than could ever decide at ``alpha`` (11 at 0.001).
            ModelError: as ``vote_blocks``.

        Random: ``stream(seed, "predict", hash of the pixels)`` for each image.
        """
        x, num_samples = unlabelled_pixels(x, self.kind), positive_integer("num_samples", num_samples)
        if isinstance(self.noise, Splitting):
            exact = self.all_votes(x).sum(1).argmax(1)
            self.recheck()
            return exact
        alpha = probability("alpha", alpha)
        fewest = fewest_votes(alpha / 2)
        if num_samples < fewest:
            raise InputError(
                f"num_samples = {num_samples} cannot decide at alpha = {alpha:g}, even if all votes agree: the "
                f"two-sided test needs at least {fewest}"
            )
        generators = self.streams(seed, "predict", pixel_ids(x))
        votes, classes = self.counts(x, num_samples, generators).topk(2, dim=1)
        self.recheck()
        p_value = torch.from_numpy(2 * sign_test(votes[:, 0].numpy(), votes[:, 1].numpy()))
        return torch.where(p_value <= alpha, classes[:, 0], ABSTAIN)

    def log_probs(self, x: Tensor, num_samples: int = 32, generator: Generators | None = None) -> Tensor:
        """Return the log of the mean softmax over noisy copies, the differentiable surrogate that attacks ascend.

        Salman et al. 2019, section 3.

        Args:
            x: images (B, C, H, W) in [0, 1].
            num_samples: noisy copies per image.
            generator: one for all images, or a sequence with one per image. They advance.

        Returns:
            float32 (B, K), differentiable in ``x``.
        """
        noise = self.sample_noise(x, num_samples, generator)
        return self.log_probs_at(x, noise)

    def sample_noise(self, x: Tensor, num_samples: int, generator: Generators | None) -> Tensor:
        """Draw noise (B, num_samples, C, H, W) for the images ``x``, from one generator or one per image."""
        num_samples = positive_integer("num_samples", num_samples)
        if generator is None:
            raise InputError("log_probs draws noise: give generator=rush.stream(seed, name) or another torch.Generator")
        if isinstance(generator, torch.Generator):
            return self.noise.sample((len(x), num_samples, *x.shape[1:]), generator)
        _check_one_each(generator, len(x))
        noise = torch.empty((len(x), num_samples, *x.shape[1:]), device=generator[0].device)
        self.noise.fill_each(noise, generator)
        return noise

    def log_probs_at(self, x: Tensor, noise: Tensor, logits: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return ``log_probs`` for given noise.

        Args:
            x: images (B, C, H, W) in [0, 1].
            noise: (B, M, C, H, W).
            logits: the forward to use, e.g. ``differentiable()``, in which BatchNorm may be folded. By default f.
        """
        check_eval_mode(self.classifier)
        self.check_shape(x.shape[1:])
        noisy = self.noise.noisy(x[:, None], noise.to(x.device)).flatten(0, 1)
        noisy_logits = (logits or self._logits)(noisy)
        self.answered(x.shape[1:])
        return mean_log_softmax(noisy_logits, len(x))

    def as_module(self, num_samples: int = 32, generator: torch.Generator | None = None) -> nn.Module:
        """Return an nn.Module that computes ``log_probs`` with fresh noise at every call, for attack libraries."""
        return _SmoothedModule(self, num_samples, generator)

    @classmethod
    def from_pretrained(
        cls, name: str | PathLike[str], device: str = "auto", classifier: nn.Module | None = None
    ) -> "SmoothedClassifier":
        """Load a smoothed classifier by its name on the Hugging Face hub, "owner/name", or from a folder.

        Args:
            name: "owner/name", "owner/name@revision", or what ``rush.load`` takes.
            device, classifier: as for ``rush.load``.

        Raises:
            RunError: it does not exist, or is not smoothed.
            MissingExtraError: huggingface_hub is not installed.
        """
        from rush.models.storage import load_pretrained

        return load_pretrained(name, device, classifier)

    def save_pretrained(self, folder: str | PathLike[str], run: str | PathLike[str] | None = None) -> None:
        """Write ``config.json``, ``model.safetensors`` and a model card, see ``rush.exporting.hub.save_pretrained``."""
        from rush.exporting import hub

        hub.save_pretrained(self, Path(folder), None if run is None else Path(run))

    def push_to_hub(self, repository: str, run: str | PathLike[str] | None = None, private: bool = False) -> str:
        """Upload to the Hugging Face hub with a model card, see ``rush.exporting.hub.push_to_hub``."""
        from rush.exporting import hub

        return hub.push_to_hub(self, repository, None if run is None else Path(run), private)

    def streams(self, seed: int, purpose: str, *names: Sequence[str]) -> list[torch.Generator]:
        """Return one generator per image, named after its purpose and the image's names, e.g. its id."""
        return [stream(seed, purpose, *each, device=self.execution.device) for each in zip(*names, strict=True)]

    def vote_counter(self) -> VoteCounter:
        """Return the engine that counts votes, with a new forward if the classifier's weights have changed."""
        return VoteCounter(self._current(), self.noise, self.num_classes, self.execution)

    def outputs(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield noisy images and their logits through the judged forward (``smoothing.outputs``).

        Any use of them ends with ``recheck``.
        """
        return outputs(self._current(), parts, self.execution)

    def fingerprint(self) -> str:
        """Return 64 hex digits that change with the classifier's weights, the noise and the execution."""
        return fingerprint_of({"model": self.classifier}, {"noise": self.noise, "execution": self.execution})

    def recheck(self) -> None:
        """Check that the classifier still gives the same logits for some images of its first tile.

        Every computation ends with this check.

        Raises:
            ModelError: it does not. Then no vote so far is valid.

        Cost: one tile.
        """
        if self._forward is not None:
            self._forward.recheck()

    def differentiable(self) -> Callable[[Tensor], Tensor]:
        """Return the judged forward before compilation, which attacks ascend.

        It maps noisy pixels (B, C, H, W) to logits (B, K) and is differentiable in them.
        """
        return self._current().differentiable

    def _current(self) -> Forward:
        check_eval_mode(self.classifier)
        if self._forward is None or not self._forward.is_current(self.classifier):
            self._forward = Forward(self.classifier, self.execution, self.num_classes)
        return self._forward

    def _logits(self, x: Tensor) -> Tensor:
        return check_logits(self.execution.logits(self.classifier, x), len(x), self.num_classes)


class _SmoothedModule(nn.Module):
    def __init__(self, smoothed: SmoothedClassifier, num_samples: int, generator: torch.Generator | None) -> None:
        super().__init__()
        check_eval_mode(smoothed.classifier)
        self.base = smoothed.classifier
        self._smoothed, self._num_samples = smoothed, num_samples
        self._generator = generator
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        noise = self._smoothed.sample_noise(x, self._num_samples, self._generator)
        return self._smoothed.log_probs_at(x, noise, self._smoothed.differentiable())


def mean_log_softmax(logits: Tensor, images: int) -> Tensor:
    """Return the log of the mean softmax (B, K) of logits (B x M, K), in which the M draws of an image are adjacent."""
    log_softmax = F.log_softmax(logits, dim=1).view(images, -1, logits.shape[1])
    return log_softmax.logsumexp(1) - torch.tensor(float(log_softmax.shape[1])).log()


def _check_one_each(generators: Sequence[torch.Generator], num_images: int) -> None:
    if len(generators) != num_images:
        raise InputError(f"got {len(generators)} generators for {num_images} images; give one per image")
