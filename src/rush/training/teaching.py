"""Teaching: soft labels for images whose labels are not read, from a linear classifier on a frozen encoder.

The encoder was pre-trained without labels. A multinomial logistic regression on its representations of clean images,
fitted to the labelled images, gives every image a probability of each class, which fine-tuning under noise then learns
from. SimCLRv2 (Chen et al. 2020) and Carmon et al. (2019) train students in this way, the latter for robustness.
``self_training`` improves the classifier before it teaches.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rush.recipe.schema import TeachConfig
from rush.training.probes import linear_probe

STRENGTHS = tuple(10.0 ** (half / 2) for half in range(-4, 9))
"""Penalties among which cross-validation chooses, 0.01 to 10,000."""
_FOLDS = 5


def probe_strength(features: Tensor, labels: Tensor, num_classes: int, generator: torch.Generator) -> float:
    """Return the penalty of ``linear_probe`` with the least cross-entropy in cross-validation with five folds.

    Args:
        features: float32 (N, D), of labelled images.
        labels: int64 (N,) in 0..K-1.
        num_classes: K.
        generator: generator on the CPU, for the order in which the images of each class are dealt to the folds in turn.

    Returns:
        The penalty, the larger one in case of a tie. It is 1 where no class has two images, so that nothing can be
        validated.
    """
    fold = _folds(labels.cpu(), generator).to(labels.device)
    if int(fold.max()) == 0:
        return 1.0
    losses = []
    for strength in STRENGTHS:
        loss = 0.0
        for number in range(int(fold.max()) + 1):
            fitted, left = fold != number, fold == number
            weight, bias = linear_probe(features[fitted], labels[fitted], num_classes, strength)
            loss += float(F.cross_entropy(F.linear(features[left], weight, bias), labels[left], reduction="sum"))
        losses.append(loss)
    return max(strength for strength, loss in zip(STRENGTHS, losses, strict=True) if loss == min(losses))


def soft_labels(probabilities: Tensor, shares: Tensor, config: TeachConfig) -> Tensor:
    """Return soft labels of images, float32 (N, K): a probability of each class, whose sum is the image's weight.

    Args:
        probabilities: (N, K), the teacher's.
        shares: (K,), the mean probability of each class, by which ``config.balance`` divides.
        config: how probabilities become labels.
    """
    p = probabilities
    if config.balance:
        p = p / shares.clamp(min=1e-12)
        p = p / p.sum(1, keepdim=True)
    largest = p.amax(1, keepdim=True)
    weight = largest**config.confidence * (largest >= config.threshold)
    sharp = F.softmax(p.clamp(min=torch.finfo(p.dtype).tiny).log() / config.temperature, dim=1)
    return (weight * sharp).float()


def taught(probabilities: Tensor, labels: Tensor, rows: Tensor, config: TeachConfig) -> Tensor:
    """Return the ``soft_labels`` of images, of which those with a label keep it.

    Args:
        probabilities: float32 (N, K), the teacher's.
        labels: int64 (L,), of the labelled images, which keep them with weight 1.
        rows: int64 (L,), the positions of the labelled images.
        config: how the probabilities of the other images become labels.
    """
    p = probabilities.double()
    targets = soft_labels(p, p.mean(0), config)
    targets[rows] = F.one_hot(labels, probabilities.shape[1]).float()
    return targets


def _folds(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the fold (N,) of each image, such that the folds divide each class as equally as they can."""
    fold, start = torch.zeros_like(labels), 0
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = members[torch.randperm(len(members), generator=generator)]
        fold[order] = (torch.arange(len(order)) + start) % _FOLDS
        start += len(order)
    counts = torch.bincount(labels)
    return fold if int(counts.max()) > 1 else torch.zeros_like(fold)
