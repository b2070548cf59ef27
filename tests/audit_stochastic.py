"""Stochastic networks: honest ones whose evaluation is credible, and defences that weaken attacks."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audit_zoo_second import fitted_perceptron
from rush.auditing.surrogates import Changed


def dropped(inner: nn.Module, rate: float) -> nn.Module:
    """``inner`` on pixels of which every call drops a share ``rate``."""
    return Changed(inner, lambda x: F.dropout(x, rate, True))


def dithered(inner: nn.Module, levels: int) -> nn.Module:
    """``inner`` on pixels rounded to ``levels`` + 1 values, up or down by chance, so that their mean is the pixel."""
    return Changed(inner, lambda x: (x * levels + torch.rand_like(x)).floor() / levels)


def own_draws(inner: nn.Module, sigma: float, seed: int = 0) -> nn.Module:
    """``inner`` under noise from a generator of its own, which no seed of the evaluation reaches."""
    generator = torch.Generator().manual_seed(seed)
    return Changed(inner, lambda x: x + sigma * torch.randn(x.shape, generator=generator))


class NoisyWeights(nn.Module):
    """A perceptron whose weights get new noise at every call, ``spread`` times their own deviation in each layer."""

    def __init__(self, inner: nn.Module, spread: float) -> None:
        super().__init__()
        self.inner, self.spread = inner, spread
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        drawn = {
            name: weight + self.spread * weight.std() * torch.randn_like(weight)
            for name, weight in self.inner.named_parameters()
        }
        return torch.func.functional_call(self.inner, drawn, (x,))


class Rarely(nn.Module):
    """``inner`` that one call in a thousand answers at random."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return logits.roll(1, 1) if float(torch.rand(())) < 1e-3 else logits


class Picked(nn.Module):
    """One of several networks by chance at every call."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.networks[int(torch.randint(len(self.networks), ()))](x)


class UnderAttack(nn.Module):
    """``quiet`` where gradients are on, else ``inner``: attack and verdict have different draws."""

    def __init__(self, inner: nn.Module, quiet: nn.Module) -> None:
        super().__init__()
        self.inner, self.quiet = inner, quiet
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.quiet(x) if torch.is_grad_enabled() else self.inner(x)


class OneSeed(nn.Module):
    """``inner``, whose every call begins with the same seed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.inner(x)


@cache
def dropout_perceptron() -> nn.Module:
    """64-64-10, trained under noise that dropped pixels resemble."""
    return fitted_perceptron("dropout perceptron", noise=0.15)
