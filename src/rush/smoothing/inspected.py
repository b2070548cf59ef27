"""A record, in the user's cache, of the networks of this library that passed their inspection on this machine."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

import rush
from rush.models.classifier import Classifier
from rush.runtime.execution import Execution
from rush.runtime.machine import device_name
from rush.runtime.user_cache import cache_file, keep
from rush.smoothing.fingerprint import fingerprint_of

_OWN = ("rush.models.", "torch.nn.modules.")


def inspected_file(classifier: nn.Module, execution: Execution, tile: Sequence[int]) -> Path | None:
    """Return the file that records that this forward passed its inspection, or None where that is not recorded.

    What a classifier of this library computes follows from its layers, its weights, the code of this library and of
    torch, the execution, the shape of the tile and the processor. The name of the file changes with each of them. A
    network that contains anything else is inspected in every process.

    Args:
        classifier: the network.
        execution: where and how it runs.
        tile: shape (T, C, H, W).
    """
    if not _is_own(classifier):
        return None
    facts: dict[str, object] = {
        "network": (classifier.spec, repr(classifier)),
        "execution": (execution, torch.get_num_threads()),
        "tile": tuple(tile),
        "code": (_code(), torch.__version__),
        "processor": device_name(execution.device),
    }
    return cache_file("inspected", fingerprint_of({"classifier": classifier}, facts), "")


def keep_inspected(file: Path) -> None:
    """Write the empty ``file`` where this is possible."""
    keep(file, Path.touch)


def _is_own(classifier: nn.Module) -> bool:
    """Return whether this library built the classifier, with no hooks added and no forward replaced since."""
    return (
        type(classifier) is Classifier
        and classifier.spec is not None
        and all(type(layer).__module__.startswith(_OWN) for layer in classifier.modules())
        and not any(
            layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
            for layer in classifier.modules()
        )
    )


@cache
def _code() -> str:
    """Return a digest of the source code of this library."""
    root, found = Path(rush.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(str(file.relative_to(root)).encode())
        found.update(file.read_bytes())
    return found.hexdigest()
