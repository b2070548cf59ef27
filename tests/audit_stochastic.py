"""Networks that draw by themselves: honest ones whose evaluation is believable, and defences that weaken attacks."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audit_zoo import digits
from audit_zoo_second import fitted, noisy_perceptron, perceptron


class Dropped(nn.Module):
    """``inner`` on pixels of which every call drops a share ``rate``."""

    def __init__(self, inner: nn.Module, rate: float) -> None:
        super().__init__()
        self.inner, self.rate = inner, rate
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.dropout(x, self.rate, True))


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


class OwnDraws(nn.Module):
    """``inner`` under noise from a generator of its own, which no seed of the evaluation reaches."""

    def __init__(self, inner: nn.Module, sigma: float, seed: int = 0) -> None:
        super().__init__()
        self.inner, self.sigma = inner, sigma
        self._generator = torch.Generator().manual_seed(seed)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.sigma * torch.randn(x.shape, generator=self._generator))


class Rarely(nn.Module):
    """``inner`` that one call in a thousand answers at random."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return logits.roll(1, 1) if float(torch.rand(())) < 1e-3 else logits


class Dithered(nn.Module):
    """``inner`` on pixels rounded to ``levels`` + 1 values, up or down by chance, so that their mean is the pixel."""

    def __init__(self, inner: nn.Module, levels: int) -> None:
        super().__init__()
        self.inner, self.levels = inner, levels
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x * self.levels + torch.rand_like(x)).floor() / self.levels)


class Picked(nn.Module):
    """One of several networks by chance at every call."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.networks[int(torch.randint(len(self.networks), ()))](x)


class UnderAttack(nn.Module):
    """``quiet`` where a gradient is asked for, ``inner`` where not: an attacker sees other draws than the verdict."""

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
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return fitted(network, digits(10_000, "train"), "dropout perceptron", noise=0.15)


def dithered_ensemble() -> nn.Module:
    """A random pick of two perceptrons, each on dithered pixels."""
    return Picked([Dithered(perceptron(), 3), Dithered(noisy_perceptron(), 3)])


Made = Callable[[], nn.Module]
