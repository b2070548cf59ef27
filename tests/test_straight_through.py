"""The straight-through twin: the network's values to the bit, and a derivative through what has none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.attacks.straight_through import StraightThrough, straight_through
from rush.runtime.randomness import stream

WEIGHT = torch.randn(64, 3, generator=stream(0, "weight"))
X = torch.rand(5, 1, 8, 8, generator=stream(0, "pixels"))


class Behind(nn.Module):
    """A linear model of what ``quantise`` makes of the pixels."""

    def __init__(self, quantise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.quantise = quantise
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.quantise(x).flatten(1) @ WEIGHT


class RoundedBackwardZero(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return (x * 7).round() / 7

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(gradient)


@torch.no_grad()
def without_gradient(x: Tensor) -> Tensor:
    return (x * 7).round() / 7


def in_place(x: Tensor) -> Tensor:
    rounded = x * 7
    rounded.round_()
    return rounded.div_(7)


def bits_in_place(x: Tensor) -> Tensor:
    grey = (x * 255).byte()
    grey >>= 5
    grey <<= 5
    return grey.float() / 255


def by_parts(x: Tensor) -> Tensor:
    whole = torch.zeros_like(x)
    whole[:, :, ::2] = (x * 7).round()[:, :, ::2] / 7
    whole[:, :, 1::2] = (x * 7).round()[:, :, 1::2] / 7
    return whole


def from_a_table(x: Tensor) -> Tensor:
    levels = torch.linspace(0, 1, 8)
    return levels[torch.bucketize(x.detach(), (levels[1:] + levels[:-1]) / 2)]


QUANTISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "round": lambda x: (x * 7).round() / 7,
    "round to decimals": lambda x: torch.round(x, decimals=1),
    "dithered floor": lambda x: (x * 7 + torch.rand_like(x)).floor() / 7,
    "ceil": lambda x: torch.ceil(x * 7) / 7,
    "trunc": lambda x: torch.trunc(x * 7) / 7,
    "cast to bytes": lambda x: (x * 255).byte().float() / 255,
    "cast and back": lambda x: (x * 255).to(torch.uint8).to(x.dtype) / 255,
    "integers divided": lambda x: (x * 255).int() / 255,
    "bits shifted away": lambda x: ((x * 255).to(torch.uint8) >> 4 << 4).float() / 255,
    "bits masked": lambda x: ((x * 255).to(torch.uint8) & 0xF0).float() / 255,
    "bits shifted in place": bits_in_place,
    "integers divided and rounded": lambda x: ((x * 255).to(torch.uint8) // 16 * 16).float() / 255,
    "floor division": lambda x: x // (1 / 7) / 7,
    "division that rounds": lambda x: torch.div(x, 1 / 7, rounding_mode="floor") / 7,
    "without the remainder": lambda x: x - x % (1 / 7),
    "without the fraction": lambda x: (x * 7 - (x * 7).frac()) / 7,
    "no_grad": without_gradient,
    "detach": lambda x: (x.detach() * 7).round() / 7,
    "data": lambda x: (x.data * 7).round() / 7,
    "a function of zero derivative": RoundedBackwardZero.apply,
    "in place": in_place,
    "written by parts": by_parts,
    "in chunks": lambda x: torch.cat([(part.detach() * 7).round() / 7 for part in x.chunk(4, 2)], 2),
    "levels from a table": from_a_table,
    "thermometer": lambda x: sum((x > level).float() for level in torch.linspace(0.1, 0.9, 7)) / 7,  # type: ignore[misc]
    "below": lambda x: 1 - (x < 0.5).float(),
    "threshold": lambda x: torch.where(x > 0.5, 1.0, 0.0),
    "sign": lambda x: torch.sign(x - 0.5),
    "fake quantisation": lambda x: torch.fake_quantize_per_tensor_affine(x, 1 / 7, 0, 0, 255),
    "quantised tensor": lambda x: torch.quantize_per_tensor(x, 1 / 7, 0, torch.quint8).dequantize(),
    "straight through already": lambda x: x + ((x * 7).round() / 7 - x).detach(),
    "drawn": lambda x: torch.bernoulli(x),
    "clamped before": lambda x: ((3 * x - 1).clamp(0, 1) * 7).round() / 7,
}


def run(quantise: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None, int]:
    """Outputs of the twin, the gradient of their sum, and how many steps were replaced."""
    x = X.clone().requires_grad_(True)
    outputs, replaced = straight_through(Behind(quantise), x)
    (gradient,) = torch.autograd.grad(outputs.sum(), x, allow_unused=True)
    return outputs.detach(), gradient, replaced


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", QUANTISERS)
def test_the_derivative_is_that_of_the_pixels(name: str) -> None:
    """Every pixel has the derivative of the linear model, up to one factor: that of the quantiser's mean slope."""
    torch.manual_seed(0)
    expected = Behind(QUANTISERS[name])(X)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    outputs, gradient, replaced = run(QUANTISERS[name])
    assert torch.equal(outputs, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert replaced > 0
    assert gradient is not None
    slope = WEIGHT.sum(1).view(1, 1, 8, 8).expand_as(gradient)
    assert torch.allclose(gradient, slope * (gradient * slope).sum() / slope.square().sum(), atol=1e-4)
    assert 0.5 < float((gradient * slope).sum() / slope.square().sum()) < 4


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "noisy": lambda x: x + 0.1 * torch.randn_like(x),
    "dropped": lambda x: F.dropout(x, 0.3, True),
    "masked": lambda x: x * (torch.rand_like(x) > 0.3),
    "moved by chance": lambda x: x.roll(int(torch.randint(3, ())), 2),
    "looked at": lambda x: x if int(x.argmax()) >= 0 and bool(x.isfinite().all()) else 0 * x,
    "linear": lambda x: 2 * x - 1,
    "rectified": lambda x: (x - 0.5).clamp(min=0),
    "half precision": lambda x: x.half().float(),
    "pooled": lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2),
    "normalised": lambda x: F.layer_norm(x, x.shape[1:]),
    "clamped": lambda x: x.clamp(-1, 2),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_a_network_with_a_derivative_keeps_it(name: str) -> None:
    torch.manual_seed(0)
    outputs, gradient, replaced = run(SMOOTH[name])
    torch.manual_seed(0)
    x = X.clone().requires_grad_(True)
    expected = Behind(SMOOTH[name])(x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(outputs, expected.detach())
    assert replaced == 0
    assert gradient is not None
    assert torch.equal(gradient, slope)


def test_draws_of_steps_without_a_derivative_are_made_once() -> None:
    """Dropout behind ``detach`` drops the same entries in the values and in the derivative."""
    torch.manual_seed(0)
    outputs, gradient, _ = run(lambda x: F.dropout(x.detach(), 0.5, True))
    torch.manual_seed(0)
    dropped = F.dropout(X, 0.5, True)
    assert torch.equal(outputs, Behind(lambda _: dropped)(X))
    assert gradient is not None
    assert torch.equal(gradient == 0, dropped == 0)


def test_a_module_that_asks_for_no_gradient_runs_as_it_is() -> None:
    model = StraightThrough(Behind(QUANTISERS["round"]))
    with torch.no_grad():
        assert torch.equal(model(X), model.inner(X))
    assert not model.training
    x = X.clone().requires_grad_(True)
    assert torch.autograd.grad(model(x).sum(), x)[0].abs().sum() > 0


def test_a_network_whose_weights_have_gradients_too_keeps_its_derivative() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = X.clone().requires_grad_(True)
    outputs, replaced = straight_through(network, x)
    (gradient,) = torch.autograd.grad(outputs.sum(), x)
    (expected,) = torch.autograd.grad(network(x).sum(), x)
    assert replaced == 0
    assert torch.equal(gradient, expected)
