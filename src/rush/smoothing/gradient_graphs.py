"""The forward and backward pass of attacks, replayed as CUDA graphs, one pair per shape."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rush.choices import Precision
from rush.errors import NumericsWarning
from rush.runtime.lines import one_line
from rush.smoothing.inspection import ARITHMETIC, RELATIVE, is_rounding

_SHAPES = 4  # most shapes that are captured; each holds the activations of a forward pass
_CALLS = 3  # the call at which a shape is captured

Function = Callable[[Tensor], Tensor]


def graphed(function: Function, sample: Tensor) -> Function:
    """Return ``function`` with its forward and backward pass captured for inputs like ``sample``, on CUDA."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a capture must not use weights that were cast outside it
    try:
        return torch.cuda.make_graphed_callables(function, (sample,))  # type: ignore[return-value]
    finally:
        torch.set_autocast_cache_enabled(before)


class GradientGraphs:
    """A function (B, C, H, W) -> (B, K), differentiable in its input alone, that replays CUDA graphs if possible.

    A shape is captured at its third call with gradients. Value and gradient are then compared once with those of the
    function itself, with which they must agree up to rounding (``inspection.check_forward``). If they do not, or if a
    capture fails, the function runs eagerly, with a NumericsWarning. It also runs eagerly without gradients, and for
    shapes after the first four. Outputs and gradients are copies, which later calls do not overwrite. A backward pass
    whose forward pass is not the latest one computes that forward pass again.

    Args:
        function: function to capture. It must not draw random numbers.
        precision: precision of its arithmetic.
        capture: a function like ``graphed``.
    """

    def __init__(
        self, function: Function, precision: Precision, capture: Callable[[Function, Tensor], Function] = graphed
    ) -> None:
        self._function, self._precision, self._capture = function, precision, capture
        self._calls: Counter[torch.Size] = Counter()
        self._captured: dict[torch.Size, _Pair] = {}
        self._usable = True

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``function(x)``."""
        if not (self._usable and torch.is_grad_enabled() and x.requires_grad):
            return self._function(x)
        if x.shape not in self._captured:
            self._calls[x.shape] += 1
            if self._calls[x.shape] < _CALLS or len(self._captured) == _SHAPES or not self._try(x):
                return self._function(x)
        logits = _Replayed.apply(x, self._captured[x.shape])
        assert isinstance(logits, Tensor)
        return logits

    def _try(self, x: Tensor) -> bool:
        """Capture the shape of ``x`` and return whether the capture can be used."""
        try:
            replayed = self._capture(self._function, x.detach().clone().requires_grad_())
            pair = _Pair(self._function, replayed)
            doubt = self._differing(x, pair)
        except Exception as error:  # an operation that no graph can hold, too little memory, ...
            doubt = f"cannot be captured as CUDA graphs ({one_line(error)})"
        if doubt:
            self._usable, self._captured = False, {}
            warnings.warn(
                f"the classifier's forward and backward pass {doubt}; attacks run without CUDA graphs",
                NumericsWarning,
                stacklevel=4,
            )
            return False
        self._captured[x.shape] = pair
        return True

    def _differing(self, x: Tensor, pair: "_Pair") -> str:
        """Return what differs by more than rounding between replay and function at ``x``, or "" if nothing does."""
        expected, gradient = _value_and_gradient(self._function, x)
        logits, replayed_gradient = _value_and_gradient(lambda point: _Replayed.apply(point, pair), x)
        if not is_rounding(expected, logits, self._precision):
            return "give other logits as CUDA graphs, by more than rounding explains"
        limit = RELATIVE * ARITHMETIC[self._precision] * gradient.norm()
        if not bool((replayed_gradient - gradient).norm() <= limit):
            return "give another gradient as CUDA graphs, by more than rounding explains"
        return ""


class _Pair:
    """A function and its capture, whose memory holds only the latest call."""

    def __init__(self, function: Function, replayed: Function) -> None:
        self.function, self.replayed = function, replayed
        self.calls = 0
        self.point = self.output = torch.empty(0)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pair: _Pair) -> Tensor:
        pair.calls += 1
        with torch.enable_grad():
            pair.point = x.detach().requires_grad_()
            pair.output = pair.replayed(pair.point)
        ctx.save_for_backward(x)
        ctx.pair, ctx.call = pair, pair.calls
        return pair.output.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        pair: _Pair = ctx.pair
        with torch.enable_grad():
            if ctx.call == pair.calls:
                (gradient,) = torch.autograd.grad(pair.output, pair.point, gradients[0], retain_graph=True)
                return gradient.clone(), None
            point = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(pair.function(point), point, gradients[0])[0], None


def _value_and_gradient(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits at ``x``, and the gradient of their sum with a different weight for each class."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        logits = function(point)
        weights = torch.linspace(-1.0, 1.0, logits.shape[1], device=logits.device, dtype=logits.dtype)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), point)
    return logits.detach(), gradient
