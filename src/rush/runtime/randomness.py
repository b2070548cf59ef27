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
    """Return a new generator that depends only on ``seed``, ``names`` and the type of ``device``.

    Streams are named after their purpose, e.g. ``stream(seed, "certify", image_id)``, so that no result depends on
    order, batch or process. The key is the SHA-256 digest of seed and names. On the CPU, NumPy's SeedSequence fills
    all 624 words of the Mersenne Twister from the 256 bits of the key. ``Generator.manual_seed`` would use 32 bits
    only, and a few tens of thousands of streams would already collide. On other devices the generator's 64-bit seed is
    set.

    Args:
        seed: an integer >= 0.
        names: the name of the stream, strings and integers.
        device: where the generator draws.

    Raises:
        InputError: ``seed`` is not an integer >= 0, or a name is neither a string nor an integer.
    """
    return restarted(torch.Generator(device=device), seed, *names)


def restarted(generator: torch.Generator, seed: int, *names: str | int) -> torch.Generator:
    """Reset ``generator`` to the start of the stream of this name on its device, and return it (see ``stream``)."""
    number = as_whole(seed)
    if number is None or number < 0:
        raise InputError(f"seed must be an integer >= 0, got {seed!r}")
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise InputError(f"stream names must be str or int, got {name!r} of type {type(name).__name__}")
    # NumPy strings and enumerations have a repr of their own; they name the same stream as their plain value.
    plain = (number, *(str(name) if isinstance(name, str) else int(name) for name in names))
    key = hashlib.sha256(repr(plain).encode()).digest()
    generator.manual_seed(int.from_bytes(key[:8], "little"))
    if generator.device.type == "cpu":
        generator.set_state(_filled_state(generator.get_state(), key))
    return generator


def seeded_init(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Initialize ``module`` in place and return it.

    Convolutions are Kaiming normal with fan out (He et al. 2015). Linear layers are uniform in +-1/sqrt(fan in), which
    is torch's default. Normalization layers start as the identity.

    Random:
        Draws from ``generator`` (on the CPU), layer by layer in the order of their names.
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
            layer.reset_parameters()
    return module


def _filled_state(state: torch.Tensor, key: bytes) -> torch.Tensor:
    if state.numel() != _CPU_STATE_BYTES:
        raise RuntimeError(
            f"the CPU generator of torch {torch.__version__} has a state of {state.numel()} bytes, expected "
            f"{_CPU_STATE_BYTES}; install a version that rush-smoothing supports"
        )
    words = np.random.SeedSequence(int.from_bytes(key, "little")).generate_state(_MT19937_WORDS).astype(np.int64)
    state[_CPU_STATE_OFFSET : _CPU_STATE_OFFSET + 8 * _MT19937_WORDS] = torch.from_numpy(words).view(torch.uint8)
    return state
