"""What a frozen encoder knows: nearest-neighbour accuracy of its representations."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.data.images import ImageSet
from rush.engine.precision import Execution


def representations(images: ImageSet, represent: nn.Module, execution: Execution) -> Tensor:
    """Representations (N, D) float32 of all images by ``represent``, a module from [0, 1] pixels in evaluation mode."""
    parts = [
        execution.tiled_logits(represent, images.pixels(slice(start, start + execution.tile), execution.device))
        for start in range(0, len(images), execution.tile)
    ]
    return torch.cat(parts)


def knn_correct(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, neighbours: int, temperature: float = 0.1
) -> int:
    """Number of ``queries`` (M, D) whose weighted nearest-neighbour vote over ``bank`` (N, D) gives their label.

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
