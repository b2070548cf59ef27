"""Straight-through derivatives of a network, whose values do not change.

Rounding, casts to integers, comparisons and ``detach`` have a derivative of zero or none at all, so that a gradient
attack on a network that quantises its input makes no progress. The straight-through estimator (Bengio et al. 2013; as
an attack: BPDA, Athalye et al. 2018) uses the identity as that derivative. The operations to replace are detected while
the network runs, so that no layer has to be named.

Every operation of torch is intercepted and executed unchanged, so that the values are those of the network. A tensor
that has lost its derivative gets a *shadow*: a floating-point tensor of the same values that has one. The shadow of a
rounded tensor has the derivative of the tensor before rounding. The shadow of any other result has that of the same
operation on the shadows of its operands.

Operations outside torch (NumPy, Pillow) and inside TorchScript are not intercepted.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_BITS = frozenset(("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__", "__rand__", "__ror__"))
_QUANTISING = frozenset(("fake_quantize_per_tensor_affine", "quantize_per_tensor"))
_ROUNDING = frozenset(("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "bernoulli")) | _BITS | _QUANTISING
_DETACHING = frozenset(("detach", "data", "dequantize"))
_CLAMPING = frozenset(("clamp", "clip"))
# The remainder of rounding: its derivative is dropped, so that x - frac(x) has the derivative of x.
_REST = frozenset(("remainder", "fmod", "frac", "__mod__"))
_ABOVE = frozenset(("gt", "ge", "greater", "greater_equal", "__gt__", "__ge__"))
_BELOW = frozenset(("lt", "le", "less", "less_equal", "__lt__", "__le__"))
_DIVIDING = frozenset(("floor_divide", "__floordiv__", "div", "divide"))
_HALVING = frozenset(("bitwise_right_shift", "__rshift__"))
_DOUBLING = frozenset(("bitwise_left_shift", "__lshift__"))
_BINNING = frozenset(("bucketize", "searchsorted"))
_SELECTING = frozenset(("__getitem__", "take", "index_select", "gather"))
# Any other operation without a derivative passes none on.
_CASTS = frozenset(("to", "int", "long", "short", "byte", "char", "bool", "type", "type_as"))


class StraightThrough(nn.Module):
    """Module with the values of ``inner`` and a derivative through rounding, casts, comparisons, detach and clamping.

    Where gradients are disabled, ``inner`` itself is called.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.train(inner.training)

    def forward(self, x: Tensor) -> Tensor:
        return straight_through(self.inner, x)[0] if torch.is_grad_enabled() else self.inner(x)


def straight_through(network: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Evaluate ``network`` at ``x`` with the derivative of ``StraightThrough``.

    Returns:
        The outputs, and the number of operations whose derivative was replaced. Clamping alone does not count.
    """
    shadowing = _Shadowing()
    inputs = x.clone()  # not a leaf, and a copy that the network may overwrite
    with shadowing:
        outputs = network(inputs)
    return shadowing.joined(outputs), shadowing.replaced


class _Shadowing(TorchFunctionMode):
    """One forward pass and its shadows. Torch passes it every operation to execute."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced = 0
        self._shadows: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # (tensor, shadow) by id; holding the tensor keeps the id from being reused

    def joined(self, outputs: Any) -> Any:
        """Return ``outputs`` with the derivative of their shadow, if they have one."""
        shadow = self._shadows.get(id(outputs))
        return outputs if shadow is None else _AsIdentity.apply(outputs.detach(), shadow[1])

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, in_place = _name(function)
        leaves = tree_leaves((args, kwargs))
        if name == "__set__" or not any(self._carries(leaf) for leaf in leaves):
            return function(*args, **kwargs)
        cuts = _cuts(name, args, kwargs)
        shadowed = any(id(leaf) in self._shadows for leaf in leaves)
        before = _random_state(leaves)
        # An operation in place overwrites the operand that its derivative is computed from.
        operands = self._copied(args) if in_place and (cuts or shadowed or not torch.is_grad_enabled()) else args
        result = function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not tensors or not (cuts or shadowed or any(not tensor.requires_grad for tensor in tensors)):
            return result
        with torch.enable_grad(), _replayed(*before):
            source = self._source(name, function, in_place, operands, kwargs)
        if source is _NONE:
            self.replaced += 1
            return result if in_place else tree_map_only(Tensor, Tensor.detach, result)
        self.replaced += name not in _CLAMPING and not shadowed and source is not None
        return self._joined_all(result, source, in_place)

    def _carries(self, leaf: object) -> bool:
        """Return whether ``leaf`` may depend on the pixels, unlike a weight, which is a leaf of the graph."""
        if not isinstance(leaf, Tensor):
            return False
        return (leaf.requires_grad and not leaf.is_leaf) or id(leaf) in self._shadows

    def _shadow(self, leaf: Any) -> Any:
        """Return the tensor that represents ``leaf`` in the derivative."""
        return self._shadows[id(leaf)][1] if id(leaf) in self._shadows else leaf

    def _copied(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        with torch.enable_grad():
            return (self._shadow(args[0]).clone(), *args[1:])

    def _source(self, name: str, function: Callable[..., Any], in_place: bool, args: Any, kwargs: Any) -> Any:
        """Return the tensors whose derivative an operation's result gets, in the result's structure.

        None where there are none, ``_NONE`` where the derivative is dropped.
        """
        if name in _REST:
            return _NONE
        first = self._shadow(args[0]) if args else None
        if name in _ROUNDING or name in _DETACHING or name in _CLAMPING:
            return first
        plain = _out_of_place(name) if in_place else function
        try:
            source = self._slope(name, plain, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            source = None  # not defined on floating-point tensors: a cast, or an operation without a slope
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(source)):
            return source
        return first if name in _CASTS else None

    def _slope(self, name: str, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Apply the operation to the shadows of its operands, where integer operations get their real counterpart."""
        shadows = [self._shadow(arg) for arg in args]
        if name in _ABOVE or name in _BELOW:
            return shadows[0] - shadows[1] if name in _ABOVE else shadows[1] - shadows[0]
        if name in _DIVIDING and _cuts(name, args, kwargs):
            return shadows[0] / shadows[1]
        if name in _HALVING:
            return shadows[0] / 2 ** shadows[1]
        if name in _DOUBLING:
            return shadows[0] * 2 ** shadows[1]
        if name in _BINNING:
            return _bins(shadows[0], shadows[1]) if name == "bucketize" else _bins(shadows[1], shadows[0])
        if name in _SELECTING:
            return self._selected(plain, shadows[0], args, kwargs)
        if name == "where" and len(args) == 3 and not any(self._carries(arg) for arg in args[1:]):
            return shadows[0] * (args[1] - args[2])
        return plain(*tree_map(self._shadow, args), **tree_map(self._shadow, kwargs))

    def _selected(self, function: Callable[..., Any], table: Any, args: Any, kwargs: Any) -> Any:
        """Return entries of ``table``, where a table without a derivative gets its mean slope in the index."""
        index = args[1]
        if not self._carries(args[0]) and isinstance(index, Tensor) and id(index) in self._shadows and table.ndim == 1:
            return self._shadow(index) * ((table[-1] - table[0]) / max(1, len(table) - 1))
        return function(table, *args[1:], **kwargs)

    def _joined_all(self, result: Any, source: Any, in_place: bool) -> Any:
        if isinstance(result, Tensor):
            return self._joined(result, source, in_place)
        if isinstance(result, tuple | list) and isinstance(source, tuple | list):
            for value, slope in zip(result, source, strict=True):
                self._keep(value, slope)
        return result

    def _joined(self, value: Tensor, source: Any, in_place: bool) -> Tensor:
        if not _fits(value, source):
            if in_place:
                self._shadows.pop(id(value), None)
            return value
        if not (value.requires_grad and value.is_floating_point() and torch.is_grad_enabled()):
            self._keep(value, source)
            return value
        joined = _AsIdentity.apply(value.detach(), source)
        return value.copy_(joined) if in_place else joined

    def _keep(self, value: Any, source: Any) -> None:
        if _fits(value, source):
            real = value.dequantize() if value.is_quantized else value.detach()
            with torch.enable_grad():
                self._shadows[id(value)] = value, _AsIdentity.apply(real.to(source.dtype), source)


class _AsIdentity(torch.autograd.Function):
    """Function with the value of the first argument and the derivative of the second, of the same shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, gradients[0].to(ctx.dtype)


_NONE = object()


def _name(function: Callable[..., Any]) -> tuple[str, bool]:
    """Return the name of an operation without its in-place mark, and whether it is in place."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    if name == "__setitem__":
        return name, True
    if name.startswith("__i") and name.endswith("__") and hasattr(Tensor, f"__{name[3:]}"):
        return f"__{name[3:]}", name not in ("__invert__", "__index__", "__int__")
    if name.endswith("_") and not name.startswith("_"):
        return name[:-1], True
    return name, False


def _out_of_place(name: str) -> Callable[..., Any]:
    plain: Callable[..., Any] = _with_item if name == "__setitem__" else getattr(Tensor, name)
    return plain


def _with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def _cuts(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the derivative of an operation is replaced or dropped."""
    if name in _CLAMPING:
        bounds = [*args[1:], *kwargs.values()]
        return len(bounds) == 2 and all(bound is not None for bound in bounds)  # with one bound it is a rectifier
    if name in ("div", "divide"):
        return kwargs.get("rounding_mode") is not None
    return name in _ROUNDING or name in _DETACHING or name in _REST or name in _DIVIDING or name in _BINNING


def _fits(value: Any, source: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and isinstance(source, Tensor)
        and source.requires_grad
        and source.is_floating_point()
        and value.shape == source.shape
    )


def _bins(x: Tensor, boundaries: Tensor) -> Tensor:
    """Return ``x`` divided by the mean width of a bin."""
    return x * ((len(boundaries) - 1) / (boundaries[-1] - boundaries[0]))


def _random_state(leaves: list[Any]) -> tuple[Tensor, dict[torch.device, Tensor]]:
    """Return the states of torch's generators on the CPU and on the devices of the tensors among ``leaves``."""
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}


@contextmanager
def _replayed(on_cpu: Tensor, on_devices: dict[torch.device, Tensor]) -> Iterator[None]:
    """Replay torch's random draws from these states within the context, and restore its generators afterwards."""
    with torch.random.fork_rng(list(on_devices), device_type="cuda"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the network's own operation has given them already
        torch.set_rng_state(on_cpu)
        for device, state in on_devices.items():
            torch.cuda.set_rng_state(state, device)
        yield
