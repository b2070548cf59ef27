"""Classification objectives: the loss of a batch with its gradient graph, mean over the images.

``logits`` is the network in training mode, ``evaluated`` the same network with BatchNorm in evaluation mode. Both take
images (B, C, H, W) and return float logits (B, K). Attacks inside training use ``evaluated`` and never fill ``.grad``;
the sources leave this mode open. ``x`` is in [0, 1], ``y`` int64 (B,). Noisy copies are (draws, B, ...) in one forward,
so BatchNorm sees all draws of an image in one batch. Nothing waits for the device: masks select what depends on the
data. A pass is one forward and one backward of one image.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from rush.errors import InputError
from rush.smoothing.noise import Gaussian
from rush.training.ascent import gradient, signed_ascent

Logits: TypeAlias = Callable[[Tensor], Tensor]

_TRADES_START = 0.001  # standard deviation of the start, Zhang et al. 2019, algorithm 1
_SMALLEST_NORM = 1e-12  # of a gradient or change that is divided by its norm; below it, nothing moves


def standard(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy on the images as they are, a scalar. Cost: 1 pass per image."""
    return F.cross_entropy(logits(x), y)


def gaussian(logits: Logits, x: Tensor, y: Tensor, noise: Gaussian, generator: torch.Generator) -> Tensor:
    """Cross-entropy under one draw of noise per image, a scalar (Cohen et al. 2019, section 3.3).

    Random: one noise tensor of the shape of ``x``. Cost: 1 pass per image.
    """
    return F.cross_entropy(logits(x + noise.sample(x.shape, generator)), y)


def consistency(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    noise: Gaussian,
    generator: torch.Generator,
    *,
    draws: int,
    weight: float,
    entropy_weight: float,
) -> Tensor:
    """Cross-entropy plus a penalty on how predictions differ under noise, a scalar (Jeong & Shin 2020, section 3).

    With p_i the softmax under draw i of m and p their mean:
    (1/m) sum of -log p_i[y] + weight (1/m) sum of KL(p || p_i) + entropy_weight H(p). Gradients flow through p too.

    draws: the paper takes 2. weight: on CIFAR-10, 20 at sigma 0.25 and 10 at 0.5 and 1.0. entropy_weight: 0.5.
    Random: one noise tensor (draws, B, C, H, W). Cost: ``draws`` passes per image.
    Raises: InputError when ``draws`` is below 1.
    """
    _check(draws=draws)
    log_probs = _log_probs(logits, x, _draw(noise, x, draws, generator))
    log_mean = _log_mean(log_probs)
    entropy = -(log_mean.exp() * log_mean).sum(1)
    regularizer = weight * _divergence(log_mean, log_probs).mean(0) + entropy_weight * entropy
    return (_cross_entropies(log_probs, y).mean(0) + regularizer).mean()


def smoothadv(
    logits: Logits,
    evaluated: Logits,
    x: Tensor,
    y: Tensor,
    noise: Gaussian,
    generator: torch.Generator,
    *,
    draws: int,
    epsilon: float | Tensor,
    steps: int,
) -> Tensor:
    """Cross-entropy on noisy copies of images that attack the smoothed classifier, a scalar (Salman et al. 2019,
    SmoothAdv-PGD, objective S, every draw trained on).

    The attack climbs -log of the mean softmax over the draws in l2, ``steps`` normalized gradients of length
    2 epsilon / steps from x, each followed by [0, 1] and then the ball. The same draws serve the whole attack and the
    loss; the image is clipped, the noise is not. Where the gradient is zero the image stays (the authors' code moves at
    random there).

    epsilon: l2, in pixel units, warmed up by the caller (over 10 epochs by the authors; ``rush.runtime.schedules``). On
    CIFAR-10 with 10 steps, later comparisons take draws and epsilon of 4 and 1.0 at sigma 0.25, 2 and 2.0 at 0.5 and
    1.0.
    Random: one noise tensor (draws, B, C, H, W). Cost: (steps + 1) draws passes per image, of which steps x draws go
    back to the image and not to the weights.
    Raises: InputError when ``draws`` or ``steps`` is below 1 or ``epsilon`` negative.
    """
    _check(draws=draws, steps=steps, epsilon=epsilon)
    drawn = _draw(noise, x, draws, generator)

    def smoothed_loss(images: Tensor) -> Tensor:
        return F.nll_loss(_log_mean(_log_probs(evaluated, images, drawn)), y, reduction="sum")

    adversarial = x
    for _ in range(steps):
        ascent = _unit(gradient(smoothed_loss, adversarial))
        inside = (adversarial + 2 * epsilon / steps * ascent).clamp(0.0, 1.0)
        adversarial = _into_ball(inside, x, epsilon)
    return _cross_entropies(_log_probs(logits, adversarial, drawn), y).mean()


def cat_rs(
    logits: Logits,
    evaluated: Logits,
    x: Tensor,
    y: Tensor,
    noise: Gaussian,
    generator: torch.Generator,
    *,
    draws: int,
    epsilon: float,
    steps: int,
    weight: float,
) -> Tensor:
    """Confidence-aware loss, a scalar (Jeong, Kim & Shin 2023, CAT-RS): easy draws of images that are hard under
    noise, adversarial noise for images that are sure under it.

    With M = ``draws``, q the share of the draws that are classified as y and K = max(1, a draw of Binomial(M, q)):
    (1/M) sum of the K smallest cross-entropies + weight [K = M] max over i of KL(p || softmax f(x + d_i')).
    K = M is certain when all draws are right, has probability q^M otherwise, and 1/M at least is kept when none is.
    Each d_i' climbs its KL from the noise d_i inside the l2 ball of radius ``epsilon`` around it by ``steps``
    normalized gradients of length 2 epsilon / steps; after each, mean and standard deviation of the noise are put back
    to those of d_i, so that it stays noise-like, and the ball has the last word (the authors' code has these two the
    other way round and leaves the ball by some 0.1 %).

    p is the mean softmax over the draws of this pass, without gradients. The authors take the smoothed prediction of a
    Gaussian model trained beforehand instead, which costs that training and many votes on every image.

    On CIFAR-10 the authors take draws 4, epsilon 1.0, steps 4 and a weight of 0.5, 1 and 2 at sigma 0.25, 0.5 and 1.0.
    Random: one noise tensor (draws, B, C, H, W), then uniform numbers (draws, B) for K. Cost: (steps + 2) draws passes
    per image, of which steps x draws go back to the noise and not to the weights.
    Raises: InputError when ``draws`` or ``steps`` is below 1 or ``epsilon`` negative.
    """
    _check(draws=draws, steps=steps, epsilon=epsilon)
    drawn = _draw(noise, x, draws, generator)
    log_probs = _log_probs(logits, x, drawn)
    count = _confidence((log_probs.argmax(2) == y).sum(0), draws, generator).clamp(min=1)
    ordered = _cross_entropies(log_probs, y).sort(0).values
    among = torch.arange(draws, device=x.device)[:, None] < count
    low = torch.where(among, ordered, 0.0).sum(0) / draws

    target = _log_mean(log_probs).detach()
    worst = _adversarial_noise(evaluated, x, drawn, target, epsilon, steps)
    high = _divergence(target, _log_probs(logits, x, worst)).amax(0)
    return (low + weight * torch.where(count == draws, high, 0.0)).mean()


def pgd_at(
    logits: Logits,
    evaluated: Logits,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
) -> Tensor:
    """Cross-entropy at the last iterate of an l-inf PGD attack, a scalar (Madry et al. 2018, equation 2.1).

    The attack starts uniformly in the ball and climbs the cross-entropy by signs of gradients, clipped to the ball and
    to [0, 1]. On CIFAR-10: epsilon 8/255, step_size 2/255, steps 7 in the paper and 10 in most work since.
    Random: one uniform tensor of the shape of ``x``. Cost: steps + 1 passes per image, of which ``steps`` go back to
    the image and not to the weights.
    Raises: InputError when ``steps`` is below 1, ``epsilon`` or ``step_size`` negative.
    """
    _check(steps=steps, epsilon=epsilon, step_size=step_size)
    uniform = torch.rand(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    start = (x + epsilon * (2 * uniform - 1)).clamp(0.0, 1.0)

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(evaluated(images), y, reduction="sum")

    return F.cross_entropy(logits(signed_ascent(loss, start, x, epsilon, step_size, steps)), y)


def trades(
    logits: Logits,
    evaluated: Logits,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    beta: float,
) -> Tensor:
    """Cross-entropy on the images plus beta KL(p(x) || p(x')) at an l-inf adversarial x', a scalar (Zhang et al. 2019,
    algorithm 1).

    x' climbs this KL by signs of gradients from x + 0.001 N(0, 1), clipped to the ball and to [0, 1] after each step;
    p(x) of the attack is that of ``evaluated``. Gradients of the loss flow through p(x) and p(x').

    On CIFAR-10 the paper takes epsilon 0.031 (8/255), step_size 0.007 (2/255 is near), steps 10 and beta 6 (1/lambda).
    Random: one normal tensor of the shape of ``x``. Cost: steps + 2 passes per image, of which ``steps`` go back to the
    image and not to the weights, and one forward without backward.
    Raises: InputError when ``steps`` is below 1, ``epsilon`` or ``step_size`` negative.
    """
    _check(steps=steps, epsilon=epsilon, step_size=step_size)
    normal = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    with torch.no_grad():
        target = evaluated(x).log_softmax(1)

    def divergence(images: Tensor) -> Tensor:
        return _divergence(target, evaluated(images).log_softmax(1)).sum()

    adversarial = signed_ascent(divergence, x + _TRADES_START * normal, x, epsilon, step_size, steps)
    clean = logits(x)
    robust = _divergence(clean.log_softmax(1), logits(adversarial).log_softmax(1)).mean()
    return F.cross_entropy(clean, y) + beta * robust


def _adversarial_noise(
    evaluated: Logits, x: Tensor, drawn: Tensor, target: Tensor, epsilon: float, steps: int
) -> Tensor:
    """Return noise (draws, B, C, H, W) within l2 ``epsilon`` of ``drawn`` that moves the predictions away from the
    log-probabilities ``target`` (B, K), see ``cat_rs``."""
    origin = drawn.flatten(0, 1)

    def divergence(flat: Tensor) -> Tensor:
        return _divergence(target, _log_probs(evaluated, x, flat.view_as(drawn))).sum()

    current = origin
    for _ in range(steps):
        moved = current + 2 * epsilon / steps * _unit(gradient(divergence, current))
        current = _into_ball(_with_moments_of(origin, moved), origin, epsilon)
    return current.view_as(drawn)


def _into_ball(points: Tensor, centres: Tensor, epsilon: float | Tensor) -> Tensor:
    """Move the points straight towards their centres into the l2 ball."""
    change = points - centres
    # The reciprocal is how torch divides a number by a tensor; a tensor in place of the number must round alike.
    return centres + change * (_norms(change).reciprocal() * epsilon).clamp(max=1.0)


def _with_moments_of(origin: Tensor, noise: Tensor) -> Tensor:
    """Return ``noise`` shifted and scaled to the mean and standard deviation of ``origin``, each over one image."""
    mean = origin.mean((1, 2, 3), keepdim=True)
    centred = noise - noise.mean((1, 2, 3), keepdim=True)
    return mean + centred * (_norms(origin - mean) / _norms(centred))


def _unit(direction: Tensor) -> Tensor:
    return direction / _norms(direction)


def _norms(images: Tensor) -> Tensor:
    """Return the l2 norm of every image (N, 1, 1, 1), as a divisor: never below ``_SMALLEST_NORM``."""
    return images.flatten(1).norm(dim=1).clamp(min=_SMALLEST_NORM).view(-1, 1, 1, 1)


def _draw(noise: Gaussian, x: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return noise (draws, B, C, H, W) of the type of ``x``, so that results computed from it alone are as exact."""
    return noise.sample((draws, *x.shape), generator).to(x.dtype)


def _log_probs(logits: Logits, x: Tensor, drawn: Tensor) -> Tensor:
    """Return the log-probabilities (draws, B, K) of the images under each of the draws (draws, B, C, H, W)."""
    return logits((x + drawn).flatten(0, 1)).log_softmax(1).unflatten(0, drawn.shape[:2])


def _log_mean(log_probs: Tensor) -> Tensor:
    """Return the log of the mean probability (B, K) over the draws (draws, B, K)."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def _cross_entropies(log_probs: Tensor, y: Tensor) -> Tensor:
    """Return -log p[y], (draws, B)."""
    return -log_probs.gather(2, y.expand(len(log_probs), -1)[..., None])[..., 0]


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) over the last dimension, from logarithms: a probability of zero gives no NaN in gradients."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _confidence(correct: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Draw from Binomial(draws, correct / draws) for each entry of ``correct`` (B,): exactly ``draws`` where all are.

    A uniform number below 1 times ``draws`` stays below ``draws`` in float32; a share of 7/7 need not be 1 there.
    """
    uniform = torch.rand((draws, *correct.shape), generator=generator, device=generator.device)
    return (uniform * draws < correct).sum(0)


def _check(**numbers: float | Tensor) -> None:
    """Raise InputError for a number below its least value; a tensor on a device is not read."""
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            continue
        least = 1 if name in ("draws", "steps") else 0
        if not value >= least:
            raise InputError(f"{name} must be >= {least}, got {value}")
