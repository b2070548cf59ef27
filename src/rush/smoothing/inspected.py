"""A record, in the user's cache, of the networks of this library that passed their inspection on this machine."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import rush
from rush.models.classifier import Classifier
from rush.runtime.execution import Execution
from rush.runtime.machine import processor
from rush.runtime.user_cache import cache_file, keep

_OWN = ("rush.models.", "torch.nn.modules.")


def inspected_file(
    classifier: nn.Module, weights: Mapping[str, Tensor], execution: Execution, tile: Sequence[int]
) -> Path | None:
    """Return the file that says that this forward passed its inspection, or None where nothing may say so.

    What a classifier of this library computes follows from its layers, its weights, the code of this library and of
    torch, the execution, the shape of the tile and the processor. The name of the file changes with each of them. A
    network that contains anything else is inspected in every process.

    Args:
        classifier: the network.
        weights: its parameters and buffers by name.
        execution: where and how it runs.
        tile: shape (T, C, H, W).
    """
    if not _is_own(classifier):
        return None
    device = torch.device(execution.device)
    facts = {
        "network": [repr(classifier.spec), repr(classifier)],
        "weights": _digest(weights),
        "execution": asdict(execution) | {"threads": torch.get_num_threads()},
        "tile": list(tile),
        "code": [_code(), torch.__version__],
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
    }
    return cache_file("inspected", facts, ".json")


def keep_inspected(file: Path) -> None:
    """Write ``file``, where this is possible."""
    keep(file, lambda target: target.write_text(json.dumps({"inspected": True}), encoding="utf-8"))


def _is_own(classifier: nn.Module) -> bool:
    """Return whether this library built the classifier, and nothing was hooked into it or put in place of a forward."""
    return (
        type(classifier) is Classifier
        and classifier.spec is not None
        and all(type(layer).__module__.startswith(_OWN) for layer in classifier.modules())
        and not any(
            layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
            for layer in classifier.modules()
        )
    )


def _digest(weights: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@cache
def _code() -> str:
    """Return a digest of the source code of this library."""
    root, found = Path(rush.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(str(file.relative_to(root)).encode())
        found.update(file.read_bytes())
    return found.hexdigest()
