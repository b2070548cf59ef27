"""Named random streams: the only source of randomness in the library."""

import hashlib

import numpy as np
import torch
from torch import nn

from rush.errors import InputError
from rush.runtime.numbers import as_whole

_MT19937_WORDS = 624
_CPU_STATE_BYTES = 5056
_CPU_STATE_OFFSET = 24  # the words follow the 64-bit seed, two 32-bit counters and the 64-bit position


def stream(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator that depends on nothing but ``seed``, ``names`` and the type of ``device``.

    Streams are named by what they serve, e.g. ``stream(seed, "certify", image_id)``, so that no result depends on
    order, batch or process. The key is SHA-256 of seed and names. On the CPU all 624 words of the Mersenne Twister are
    filled from 256 bits of that key (``Generator.manual_seed`` would keep 32 bits, and a few ten thousand streams would
    already collide); elsewhere the generator's 64-bit seed is set. NumPy's SeedSequence does the filling.

    Raises: InputError when ``seed`` is not a non-negative integer or a name is neither text nor integer.
    """
    return restarted(torch.Generator(device=device), seed, *names)


def restarted(generator: torch.Generator, seed: int, *names: str | int) -> torch.Generator:
    """Return ``generator``, set to the beginning of the stream of this name on its device; see ``stream``."""
    number = as_whole(seed)
    if number is None or number < 0:
        raise InputError(f"seed must be an integer >= 0, got {seed!r}")
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise InputError(f"stream names must be str or int, got {name!r} of type {type(name).__name__}")
    # NumPy's text and enumerations print themselves in ways of their own; they name the stream of their plain value.
    plain = (number, *(str(name) if isinstance(name, str) else int(name) for name in names))
    key = hashlib.sha256(repr(plain).encode()).digest()
    generator.manual_seed(int.from_bytes(key[:8], "little"))
    if generator.device.type == "cpu":
        generator.set_state(_filled_state(generator.get_state(), key))
    return generator


def seeded_init(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """``module`` with every convolution and linear layer drawn anew from ``generator`` (on the CPU), in the order of
    their names.

    Kaiming normal, fan out, for convolutions (He et al. 2015); uniform in +-1/sqrt(fan in) for linear layers, which is
    torch's own default; normalization layers start as the identity.
    """
    for _, layer in sorted(module.named_modules()):
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()
            if layer.affine:
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
    return module


def _filled_state(state: torch.Tensor, key: bytes) -> torch.Tensor:
    if state.numel() != _CPU_STATE_BYTES:
        raise RuntimeError(
            f"torch {torch.__version__} keeps its CPU generator in {state.numel()} bytes, expected {_CPU_STATE_BYTES}"
        )
    words = np.random.SeedSequence(int.from_bytes(key, "little")).generate_state(_MT19937_WORDS).astype(np.int64)
    state[_CPU_STATE_OFFSET : _CPU_STATE_OFFSET + 8 * _MT19937_WORDS] = torch.from_numpy(words).view(torch.uint8)
    return state
