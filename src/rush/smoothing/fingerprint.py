"""Fingerprints of models, which identify the model that stored results were computed with."""

import hashlib

import torch
from torch import nn


def fingerprint_of(modules: dict[str, nn.Module], facts: dict[str, object]) -> str:
    """Return 64 hex digits that change with the type, parameters and buffers of any module and with any of the facts.

    State outside parameters and buffers does not change it.

    Args:
        modules: modules by their role.
        facts: values with a complete ``repr``.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode("utf-8", "surrogatepass"))
    for role, module in sorted(modules.items()):
        digest.update(repr((role, type(module))).encode())
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            digest.update(repr((name, value.dtype, value.shape)).encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
