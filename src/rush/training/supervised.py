"""Classification objectives: the loss of a batch with its gradient graph, as the mean over the images.

Attacks inside training use ``Examples.evaluated``, a choice that the sources leave open, and never fill ``.grad``.
Noisy copies are (draws, B, ...) in one forward, so BatchNorm sees all draws of an image in one batch. Nothing waits for
the device: masks select what depends on the data. A pass is one forward and one backward of one image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from rush.errors import InputError
from rush.smoothing.noise import Noise
from rush.training.ascent import l2_ascent, l2_norms, signed_ascent

Logits: TypeAlias = Callable[[Tensor], Tensor]

_TRADES_START = 0.001  # standard deviation of the start, Zhang et al. 2019, algorithm 1


@dataclass(frozen=True)
class Examples:
    """The input of an objective: the network, a batch and the noise of the smoothed classifier.

    Attributes:
        logits: the network in training mode, from images (B, C, H, W) to float logits (B, K).
        evaluated: the same weights with BatchNorm in evaluation mode, for attacks.
        x: (B, C, H, W) float in [0, 1], weakly augmented.
        y: labels, int64 (B,), or float (B, K): a probability of each class, whose sum is the weight of the image.
        smoothing: None where the classifier will not be smoothed.
        generator: generator of all draws, on the device of ``x``.
        epoch: epochs done so far.
    """

    logits: Logits
    evaluated: Logits
    x: Tensor
    y: Tensor
    smoothing: Noise | None
    generator: torch.Generator
    epoch: float = 0.0

    @property
    def noise(self) -> Noise:
        """The noise to train under.

        Raises:
            InputError: there is none.
        """
        if self.smoothing is None:
            raise InputError(
                "this objective trains under the noise of the smoothed classifier, and there is none: give noise, or "
                "an objective that draws none (standard, pgd-at, trades)"
            )
        return self.smoothing

    def draw(self, draws: int) -> Tensor:
        """Return noise (draws, B, C, H, W) in the type of ``x``, so that no precision is lost."""
        return self.noise.sample((draws, *self.x.shape), self.generator).to(self.x.dtype)


def standard(examples: Examples) -> Tensor:
    """Return the cross-entropy on the images as they are, a scalar.

    Cost:
        1 pass per image.
    """
    return F.cross_entropy(examples.logits(examples.x), examples.y)


def gaussian(examples: Examples) -> Tensor:
    """Return the cross-entropy under one draw of noise per image, a scalar (Cohen et al. 2019, section 3.3).

    Random:
        One noise tensor of the shape of ``x``.

    Cost:
        1 pass per image.
    """
    x, noise = examples.x, examples.noise
    return F.cross_entropy(examples.logits(noise.noisy(x, noise.sample(x.shape, examples.generator))), examples.y)


def consistency(examples: Examples, *, draws: int, weight: float, entropy_weight: float) -> Tensor:
    """Return the cross-entropy plus a penalty on how predictions differ under noise (Jeong & Shin 2020, section 3).

    With p_i the softmax under draw i of m and p their mean, this is the mean over the images of
    (1/m) sum of -log p_i[y] + weight (1/m) sum of KL(p || p_i) + entropy_weight H(p). Gradients flow through p too.

    Args:
        draws: 2 in the paper.
        weight: weight of the penalty. In the paper, on CIFAR-10, it is 20 at sigma 0.25 and 10 at 0.5 and 1.0.
        entropy_weight: 0.5 in the paper.

    Raises:
        InputError: ``draws`` is below 1.

    Random:
        One noise tensor (draws, B, C, H, W).

    Cost:
        ``draws`` passes per image.
    """
    _check(draws=draws)
    log_probs = _log_probs(examples, examples.logits, examples.x, examples.draw(draws))
    log_mean = _log_mean(log_probs)
    entropy = -(log_mean.exp() * log_mean).sum(1)
    regularizer = weight * _divergence(log_mean, log_probs).mean(0) + entropy_weight * entropy
    return (_cross_entropies(log_probs, examples.y).mean(0) + regularizer).mean()


def smoothadv(examples: Examples, *, draws: int, epsilon: float | Tensor, steps: int) -> Tensor:
    """Return the cross-entropy on noisy copies of images that attack the smoothed classifier, a scalar.

    This is SmoothAdv-PGD (Salman et al. 2019, objective S), trained on every draw. The attack ascends -log of the mean
    softmax over the draws in l2, by ``steps`` normalized gradients of length 2 epsilon / steps from x. Each is followed
    by clipping to [0, 1] and then by projection onto the ball. The same draws serve the whole attack and the loss. The
    image is clipped, the noise is not. Where the gradient is zero the image stays (the authors' code moves at random
    there).

    Args:
        draws, epsilon: later comparisons on CIFAR-10, with 10 steps, use 4 and 1.0 at sigma 0.25, and 2 and 2.0 at 0.5
            and 1.0. ``epsilon`` is l2, in pixel units, warmed up by the caller (over 10 epochs by the authors;
            ``rush.runtime.schedules``).
        steps: >= 1.

    Raises:
        InputError: ``draws`` or ``steps`` is below 1, or ``epsilon`` is negative.

    Random:
        One noise tensor (draws, B, C, H, W).

    Cost:
        (steps + 1) x draws passes per image, of which steps x draws go back to the image and not to the weights.
    """
    _check(draws=draws, steps=steps, epsilon=epsilon)
    drawn, y = examples.draw(draws), examples.y

    def smoothed_loss(images: Tensor) -> Tensor:
        return _cross_entropies(_log_mean(_log_probs(examples, examples.evaluated, images, drawn))[None], y).sum()

    adversarial = l2_ascent(smoothed_loss, examples.x, epsilon, steps, lambda images: images.clamp(0.0, 1.0))
    return _cross_entropies(_log_probs(examples, examples.logits, adversarial, drawn), y).mean()


def cat_rs(examples: Examples, *, draws: int, epsilon: float, steps: int, weight: float) -> Tensor:
    """Return the confidence-aware loss CAT-RS, a scalar (Jeong, Kim & Shin 2023).

    It uses easy draws of images that are hard under noise, and adversarial noise for images that are sure under it.
    With M = ``draws``, q the share of the draws that are classified as y and K = max(1, a draw of Binomial(M, q)):
    (1/M) sum of the K smallest cross-entropies + weight [K = M] max over i of KL(p || softmax f(x + d_i')).
    K = M is certain when all draws are right and has probability q^M otherwise. At least one cross-entropy is kept even
    when no draw is right.

    Each d_i' ascends its KL from the noise d_i inside the l2 ball of radius ``epsilon`` around it, by ``steps``
    normalized gradients of length 2 epsilon / steps. After each step, mean and standard deviation of the noise are
    restored to those of d_i, so that it stays noise-like, and then it is projected onto the ball. (The authors' code
    does these two in the reverse order and leaves the ball by some 0.1 %.)

    p is the mean softmax over the draws of this pass, without gradients. The authors instead use the smoothed
    prediction of a Gaussian model trained beforehand, which costs that training and many votes on every image.

    Args:
        draws, epsilon, steps, weight: the authors use draws 4, epsilon 1.0, steps 4 and a weight of 0.5, 1 and 2 at
            sigma 0.25, 0.5 and 1.0 on CIFAR-10.

    Raises:
        InputError: ``draws`` or ``steps`` is below 1, or ``epsilon`` is negative.

    Random:
        One noise tensor (draws, B, C, H, W), then uniform numbers (draws, B) for K.

    Cost:
        (steps + 2) x draws passes per image, of which steps x draws go back to the noise and not to the weights.
    """
    _check(draws=draws, steps=steps, epsilon=epsilon)
    x, y, drawn = examples.x, examples.y, examples.draw(draws)
    log_probs = _log_probs(examples, examples.logits, x, drawn)
    count = _confidence((log_probs.argmax(2) == y).sum(0), draws, examples.generator).clamp(min=1)
    ordered = _cross_entropies(log_probs, y).sort(0).values
    among = torch.arange(draws, device=x.device)[:, None] < count
    low = torch.where(among, ordered, 0.0).sum(0) / draws

    target = _log_mean(log_probs).detach()
    origin = drawn.flatten(0, 1)

    def divergence(flat: Tensor) -> Tensor:
        return _divergence(target, _log_probs(examples, examples.evaluated, x, flat.view_as(drawn))).sum()

    worst = l2_ascent(divergence, origin, epsilon, steps, lambda noise: _with_moments_of(origin, noise)).view_as(drawn)
    high = _divergence(target, _log_probs(examples, examples.logits, x, worst)).amax(0)
    return (low + weight * torch.where(count == draws, high, 0.0)).mean()


def pgd_at(examples: Examples, *, epsilon: float, step_size: float, steps: int) -> Tensor:
    """Return the cross-entropy at the last iterate of l-inf PGD, a scalar (Madry et al. 2018, equation 2.1).

    The attack starts uniformly in the ball and ascends the cross-entropy by signs of gradients, clipped to the ball and
    to [0, 1]. Usual values on CIFAR-10 are epsilon 8/255, step_size 2/255, and 7 steps in the paper or 10 in most work
    since.

    Raises:
        InputError: ``steps`` is below 1, or ``epsilon`` or ``step_size`` is negative.

    Random:
        One uniform tensor of the shape of ``x``.

    Cost:
        steps + 1 passes per image, of which ``steps`` go back to the image and not to the weights.
    """
    _check(steps=steps, epsilon=epsilon, step_size=step_size)
    x, y, generator = examples.x, examples.y, examples.generator
    uniform = torch.rand(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    start = (x + epsilon * (2 * uniform - 1)).clamp(0.0, 1.0)

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(examples.evaluated(images), y, reduction="sum")

    return F.cross_entropy(examples.logits(signed_ascent(loss, start, x, epsilon, step_size, steps)), y)


def trades(examples: Examples, *, epsilon: float, step_size: float, steps: int, beta: float) -> Tensor:
    """Return the cross-entropy plus beta KL(p(x) || p(x')) at an l-inf adversarial x', a scalar.

    x' ascends this KL by signs of gradients from x + 0.001 N(0, 1), clipped to the ball and to [0, 1] after each step
    (Zhang et al. 2019, algorithm 1). In the attack, p(x) is that of ``evaluated``. Gradients of the loss flow through
    p(x) and p(x'). On CIFAR-10 the paper uses epsilon 0.031 (8/255), step_size 0.007 (near 2/255), steps 10 and beta 6
    (1/lambda).

    Raises:
        InputError: ``steps`` is below 1, or ``epsilon`` or ``step_size`` is negative.

    Random:
        One normal tensor of the shape of ``x``.

    Cost:
        steps + 2 passes per image, of which ``steps`` go back to the image and not to the weights, and one forward
        without backward.
    """
    _check(steps=steps, epsilon=epsilon, step_size=step_size)
    logits, evaluated, x, generator = examples.logits, examples.evaluated, examples.x, examples.generator
    normal = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    with torch.no_grad():
        target = evaluated(x).log_softmax(1)

    def divergence(images: Tensor) -> Tensor:
        return _divergence(target, evaluated(images).log_softmax(1)).sum()

    adversarial = signed_ascent(divergence, x + _TRADES_START * normal, x, epsilon, step_size, steps)
    clean = logits(x)
    robust = _divergence(clean.log_softmax(1), logits(adversarial).log_softmax(1)).mean()
    return F.cross_entropy(clean, examples.y) + beta * robust


def _with_moments_of(origin: Tensor, noise: Tensor) -> Tensor:
    """Return ``noise`` shifted and scaled to the mean and standard deviation of ``origin``, each over one image."""
    mean = origin.mean((1, 2, 3), keepdim=True)
    centred = noise - noise.mean((1, 2, 3), keepdim=True)
    return mean + centred * (l2_norms(origin - mean) / l2_norms(centred))


def _log_probs(examples: Examples, logits: Logits, x: Tensor, drawn: Tensor) -> Tensor:
    """Return the log-probabilities (draws, B, K) of the images under each of the draws (draws, B, C, H, W)."""
    return logits(examples.noise.noisy(x, drawn).flatten(0, 1)).log_softmax(1).unflatten(0, drawn.shape[:2])


def _log_mean(log_probs: Tensor) -> Tensor:
    """Return the log of the mean probability (B, K) over the draws (draws, B, K)."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def _cross_entropies(log_probs: Tensor, y: Tensor) -> Tensor:
    """Return -log p[y], (draws, B), or -sum of y_c log p[c] for labels y (B, K)."""
    if y.ndim == 2:
        return -(y * log_probs).sum(2)
    return -log_probs.gather(2, y.expand(len(log_probs), -1)[..., None])[..., 0]


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) over the last dimension, from logarithms, so that no probability of 0 gives NaN gradients."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _confidence(correct: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Draw from Binomial(draws, correct / draws) for each entry of ``correct`` (B,), exactly ``draws`` where all are.

    A uniform number below 1 times ``draws`` stays below ``draws`` in float32, where a share of 7/7 need not be 1.
    """
    uniform = torch.rand((draws, *correct.shape), generator=generator, device=generator.device)
    return (uniform * draws < correct).sum(0)


def _check(**numbers: float | Tensor) -> None:
    """Raise InputError for a number below its least value. A tensor on a device is not read."""
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            continue
        least = 1 if name in ("draws", "steps") else 0
        if not value >= least:
            raise InputError(f"{name} must be >= {least}, got {value}")
