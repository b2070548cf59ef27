"""An attack on a replayed forward and backward pass is the attack on the function itself, whatever is called when."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rush.smoothing.forward
from rush.attacks.apgd import apgd
from rush.attacks.gradient import fresh_noise
from rush.attacks.pgd import pgd
from rush.attacks.threat import ThreatModel
from rush.data.sources import load_images
from rush.errors import NumericsWarning
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.forward import Forward
from rush.smoothing.gradient_graphs import Function, GradientGraphs

MATRIX = torch.randn(12, 5, generator=stream(0, "matrix"))


def curved(x: Tensor) -> Tensor:
    """Logits whose gradient depends on the point."""
    return torch.tanh(x.flatten(1) @ MATRIX) ** 3


class Capture:
    """What CUDA graphs do, on the CPU: input, activations, output and gradient lie where those of the last call lay."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda logits: logits, slope: float = 1.0) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.replays = 0
        self._change, self._slope = change, slope

    def __call__(self, function: Function, sample: Tensor) -> Function:
        self.shapes.append(tuple(sample.shape))
        static = sample.detach().clone().requires_grad_()
        output, gradient = function(static).detach().clone(), torch.zeros_like(sample)
        capture = self

        class Graph(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, x: Tensor) -> Tensor:  # noqa: ARG004
                capture.replays += 1
                with torch.no_grad():
                    static.copy_(x)
                    output.copy_(capture._change(function(static)))
                return output.detach()

            @staticmethod
            def backward(ctx: object, *gradients: Tensor) -> Tensor:  # noqa: ARG004
                with torch.enable_grad():
                    (now,) = torch.autograd.grad(function(static), static, gradients[0])
                gradient.copy_(capture._slope * now)
                return gradient.detach()

        return lambda x: Graph.apply(x)  # type: ignore[no-any-return]


def images(number: int, rows: int = 3) -> Tensor:
    return torch.randn((rows, 3, 2, 2), generator=stream(0, "images", number)).requires_grad_()


def gradient_of(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    logits = function(x)
    return logits, torch.autograd.grad(logits.square().sum(), x)[0]


def test_a_shape_is_captured_at_its_third_call_and_gives_the_same_bits() -> None:
    capture = Capture()
    graphs = GradientGraphs(curved, "float32", capture)
    kept = [(gradient_of(graphs, images(number)), gradient_of(curved, images(number))) for number in range(6)]
    for (logits, gradient), (expected, slope) in kept:  # no later call wrote over them
        assert torch.equal(logits, expected)
        assert torch.equal(gradient, slope)
    assert capture.shapes == [(3, 3, 2, 2)]
    assert capture.replays == 5  # the comparison and four calls


def test_a_backward_pass_behind_another_forward_pass_is_that_of_its_own_point() -> None:
    graphs = GradientGraphs(curved, "float32", Capture())
    for number in range(3):
        gradient_of(graphs, images(number))
    first, second = images(10), images(11)
    (graphs(first).square().sum() + 2 * graphs(second).square().sum()).backward()
    assert first.grad is not None
    assert second.grad is not None
    torch.testing.assert_close(first.grad, gradient_of(curved, images(10))[1], rtol=0, atol=0)
    torch.testing.assert_close(second.grad, 2 * gradient_of(curved, images(11))[1], rtol=1e-6, atol=1e-6)


def test_without_gradients_and_for_a_fifth_shape_the_function_runs_as_it_is() -> None:
    capture = Capture()
    graphs = GradientGraphs(curved, "float32", capture)
    for rows in range(1, 7):
        for number in range(4):
            assert torch.equal(
                gradient_of(graphs, images(number, rows))[1], gradient_of(curved, images(number, rows))[1]
            )
    assert [shape[0] for shape in capture.shapes] == [1, 2, 3, 4]
    before = capture.replays
    with torch.no_grad():
        graphs(images(0))
    graphs(images(0).detach())
    assert capture.replays == before


def failing(_function: Function, _sample: Tensor) -> Function:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("capture", "told"),
    [
        (
            failing,
            r"cannot be captured as CUDA graphs \(RuntimeError: operation not permitted when stream is capturing\)",
        ),
        (Capture(lambda logits: logits + 0.1), "give other logits as CUDA graphs"),
        (Capture(lambda logits: logits * torch.nan), "give other logits as CUDA graphs"),
        (Capture(slope=1.1), "give another gradient as CUDA graphs"),
        (Capture(slope=float("nan")), "give another gradient as CUDA graphs"),
    ],
)
def test_what_differs_or_cannot_be_captured_is_not_used_and_said_once(
    capture: Callable[[Function, Tensor], Function], told: str
) -> None:
    graphs = GradientGraphs(curved, "float32", capture)
    for number in range(2):
        gradient_of(graphs, images(number))
    with pytest.warns(NumericsWarning, match=f"{told}.*; attacks run without CUDA graphs"):
        found = gradient_of(graphs, images(2))
    for number in (2, 3, 4):
        expected = gradient_of(curved, images(number))
        assert torch.equal(found[1], expected[1])
        found = gradient_of(graphs, images(number + 1))


def test_attacks_on_replayed_passes_find_the_same_points(
    digits_network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoothed = SmoothedClassifier(digits_network, 0.25, 10)
    test = load_images("digits", "test")[:8]
    assert test.labels is not None
    x, y, threat = test.pixels(), test.labels, ThreatModel("l2", 0.5)

    def attacked() -> list[Tensor]:
        generators = [stream(0, "attack", row) for row in range(8)]
        log_probs = fresh_noise(smoothed, 4, generators)
        found = pgd(log_probs, x, y, threat, steps=6, step_size=0.3, decay=0.9)
        return [*found, *apgd(log_probs, x, y, threat, steps=8)]

    plain, capture = attacked(), Capture()
    usual = Forward.__init__

    def climbing(self: Forward, *given: object) -> None:
        usual(self, *given)  # type: ignore[arg-type]
        self.differentiable = GradientGraphs(self._eager, "float32", capture)

    monkeypatch.setattr(rush.smoothing.forward.Forward, "__init__", climbing)
    smoothed = SmoothedClassifier(digits_network, 0.25, 10)
    replayed = attacked()
    assert capture.replays > 8
    assert all(torch.equal(one, other) for one, other in zip(plain, replayed, strict=True))


def test_graphs_are_for_cuda_with_cuda_graphs_alone(digits_network: nn.Module) -> None:
    for execution, wanted in (
        (Execution(), False),
        (Execution(compile_mode="reduce-overhead"), False),
        (Execution("cuda", compile_mode="default"), False),
        (Execution("cuda", compile_mode="reduce-overhead"), True),
    ):
        assert isinstance(Forward(digits_network, execution, 10).differentiable, GradientGraphs) == wanted
