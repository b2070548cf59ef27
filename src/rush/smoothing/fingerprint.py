"""Fingerprints of models: what a stored result was computed with."""

import hashlib

import torch
from torch import nn


def fingerprint_of(modules: dict[str, nn.Module], facts: dict[str, object]) -> str:
    """Return 64 hex digits that change with the type, parameters and buffers of any module and with any of the facts.

    What a module keeps outside its parameters and buffers is not seen.

    Args:
        modules: modules by their role.
        facts: values whose ``repr`` says what they are.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode("utf-8", "surrogatepass"))
    for role, module in sorted(modules.items()):
        digest.update(repr((role, type(module))).encode())
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            digest.update(repr((name, value.dtype, value.shape)).encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
