"""Nearest-neighbour and linear accuracy of a frozen encoder's representations, clean and under noise."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.data.images import ImageSet
from rush.runtime.execution import Execution, without_tf32
from rush.runtime.randomness import stream
from rush.smoothing.noise import Noise

MAP_IMAGES = 300
"""Largest number of images on the map of an encoder."""


def representations(
    images: ImageSet,
    represent: nn.Module,
    execution: Execution,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the float32 representations (N, D) of all images by ``represent``, a module in evaluation mode.

    Args:
        noise: one draw of this noise from ``generator``, which is on the device, is added to every image.
    """
    parts = []
    rows = execution.rows(images.images.shape[1:])
    for start in range(0, len(images), rows):
        x = images.pixels(slice(start, start + rows), execution.device)
        if noise is not None and generator is not None:
            x = noise.noisy(x, noise.sample(x.shape, generator))
        parts.append(execution.tiled_logits(represent, x))
    return torch.cat(parts)


def knn_correct(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, neighbours: int, temperature: float = 0.1
) -> int:
    """Count the ``queries`` (M, D) whose weighted nearest-neighbour vote over ``bank`` (N, D) gives their label.

    The ``neighbours`` of largest cosine similarity s vote with weight exp(s / temperature) (Wu et al. 2018, section
    3.4).
    """
    bank, num_classes = F.normalize(bank, dim=1), int(bank_labels.max()) + 1
    correct = 0
    for part, truth in zip(F.normalize(queries, dim=1).split(1000), labels.split(1000), strict=True):
        similarity, index = (part @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        votes = torch.zeros(len(part), num_classes, device=part.device)
        votes.scatter_add_(1, bank_labels[index], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == truth).sum())
    return correct


def linear_probe(bank: Tensor, bank_labels: Tensor, num_classes: int, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return weight (K, D) and bias (K,) of a logistic regression on the standardised ``bank`` (N, D).

    They are folded so that they apply to representations that are not standardised. The regression minimizes the summed
    cross-entropy plus half of ``strength`` times the squared norm of the weights on standardised representations, as
    scikit-learn's ``LogisticRegression`` with C = 1 / ``strength`` does, by L-BFGS (Liu and Nocedal 1989) in float32 on
    the bank's device.

    Args:
        bank: representations (N, D) float32.
        bank_labels: int64 (N,) in 0..K-1, on the same device.
        num_classes: K.
        strength: strength of the penalty.

    Cost:
        At most 200 steps, each of a few passes over the bank.
    """
    mean, std = bank.mean(0), bank.std(0).clamp(min=1e-6)
    x = (bank - mean) / std
    weight = torch.zeros(num_classes, bank.shape[1], device=bank.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=bank.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), bank_labels) + strength * weight.square().sum() / (
            2 * len(x)
        )
        value.backward()
        return value

    with without_tf32(str(bank.device)):
        optimizer.step(loss)
        folded = weight.detach() / std
        return folded, bias.detach() - folded @ mean


def linear_correct(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> int:
    """Return the number of ``queries`` (M, D) whose label ``linear_probe`` of the ``bank`` (N, D) gives."""
    weight, bias = linear_probe(bank, bank_labels, int(max(bank_labels.max(), labels.max())) + 1)
    return int((F.linear(queries, weight, bias).argmax(1) == labels).sum())


def encoder_figures(
    represent: nn.Module,
    bank: ImageSet,
    held_out: ImageSet,
    noise: Noise | None,
    execution: Execution,
    *,
    neighbours: int,
    seed: int,
) -> dict[str, float]:
    """Return the accuracy on ``held_out`` by nearest neighbours in ``bank`` and by a linear probe on it.

    The figures are "knn" and "linear". With ``noise`` there are also "knn_noisy" and "linear_noisy", with one draw of
    it on every image of both sets.
    """
    assert bank.labels is not None
    assert held_out.labels is not None
    figures = {}
    for suffix, added in _conditions(noise):
        bank_features, queries = (
            representations(images, represent, execution, added, stream(seed, "probe", part, device=execution.device))
            for images, part in ((bank, "bank"), (held_out, "held out"))
        )
        labels, truth = bank.labels.to(queries.device), held_out.labels.to(queries.device)
        figures[f"knn{suffix}"] = knn_correct(bank_features, labels, queries, truth, neighbours) / len(held_out)
        figures[f"linear{suffix}"] = linear_correct(bank_features, labels, queries, truth) / len(held_out)
    return figures


def embedding(
    represent: nn.Module, images: ImageSet, noise: Noise | None, execution: Execution, seed: int
) -> dict[str, Any] | None:
    """Return a map of representations, clean and with one draw of ``noise``, in two dimensions.

    Its axes are the first two principal components of the clean representations of unit length, with the sign that
    makes their largest weight positive. It shows at most ``MAP_IMAGES`` evenly spaced images.

    Returns:
        labels: labels of n images. clean: their places (n, 2). noisy: likewise, None without noise. explained: the
        share of the clean variance along each axis. The result is None where labels are missing, and for fewer than
        three images.
    """
    if images.labels is None or len(images) < 3:
        return None
    rows = torch.linspace(0, len(images) - 1, min(len(images), MAP_IMAGES)).round().long()
    chosen = images[rows]
    assert chosen.labels is not None
    features = representations(chosen, represent, execution)
    clean = F.normalize(features, dim=1).double().cpu()
    mean = clean.mean(0)
    _, values, components = torch.linalg.svd(clean - mean, full_matrices=False)
    axes = components[:2] * torch.take_along_dim(components[:2], components[:2].abs().argmax(1, keepdim=True), 1).sign()
    places = {"clean": clean}
    if noise is not None:
        generator = stream(seed, "embedding", device=execution.device)
        noisy = representations(chosen, represent, execution, noise, generator)
        places["noisy"] = F.normalize(noisy, dim=1).double().cpu()
    rounded = {name: ((own - mean) @ axes.T * 1e4).round() / 1e4 for name, own in places.items()}
    shares = values.square() / values.square().sum().clamp(min=1e-300)
    return {
        "labels": chosen.labels.tolist(),
        "clean": rounded["clean"].tolist(),
        "noisy": rounded["noisy"].tolist() if "noisy" in rounded else None,
        "explained": [round(float(share), 4) for share in shares[:2]],
    }


def classifier_figures(
    classifier: nn.Module, held_out: ImageSet, noise: Noise | None, execution: Execution, seed: int
) -> dict[str, float]:
    """Return the "accuracy" of the classifier on ``held_out``, and "accuracy_noisy" with one draw of ``noise``."""
    assert held_out.labels is not None
    figures = {}
    for suffix, added in _conditions(noise):
        generator = stream(seed, "probe", "held out", device=execution.device)
        logits = representations(held_out, classifier, execution, added, generator)
        correct = logits.argmax(1) == held_out.labels.to(logits.device)
        figures[f"accuracy{suffix}"] = float(correct.double().mean())
    return figures


def _conditions(noise: Noise | None) -> list[tuple[str, Noise | None]]:
    """Return the suffix and the noise of each set of figures, first those of clean images."""
    return [("", None), *([("_noisy", noise)] if noise is not None else [])]
