"""The forward through which every certified, predicted or judged sample passes, and the choice of its form."""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rush.choices import CompileMode
from rush.errors import ModelError, NumericsWarning
from rush.runtime.execution import Execution, foreign_call, without_tf32
from rush.smoothing.gradient_graphs import GradientGraphs
from rush.smoothing.inspected import inspected_file, keep_inspected
from rush.smoothing.inspection import Watch, check_forward, check_logits, check_structure

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRIAL_SECONDS = 0.5
_WORTH_TRYING_SECONDS = 60.0
_MOST_COMPILED = 64  # networks per process


class Forward:
    """A map from full tiles (T, C, H, W) float32 to logits (T, num_classes) float32, without gradients.

    The classifier only ever gets copies. Folding works on a copy of the weights, so changed weights need a new forward
    (``is_current``). The first tile is run several times, to verify that the logits of an image depend on nothing but
    the image. A network of this library that has passed this inspection on this machine is not inspected again
    (``inspected``). Some images of that tile are run again at random tiles, and by ``recheck``, with which every
    computation ends.

    Args:
        classifier: nn.Module in evaluation mode.
        execution: where and how it runs.
        num_classes: K.

    Attributes:
        differentiable: this forward uncompiled, for any number of rows. It maps (B, C, H, W) to logits (B, K) that are
            differentiable in the pixels. On CUDA with ``compile_mode`` "reduce-overhead", CUDA graphs are replayed
            (``gradient_graphs``).

    Raises:
        ModelError: logits of an image depend on something else, logits have the wrong shape, the mode is wrong, or the
            classifier raises.
    """

    def __init__(self, classifier: nn.Module, execution: Execution, num_classes: int) -> None:
        check_structure(classifier)
        self._execution, self._num_classes = execution, num_classes
        self._weights = {name: tensor.detach().clone() for name, tensor in _tensors(classifier).items()}
        self._original = classifier
        self._module = fold_batch_norm(classifier) if execution.folded else classifier
        self._call = _compiled(self._unguarded, execution.compile_mode)
        graphs = execution.compile_mode == "reduce-overhead" and torch.device(execution.device).type == "cuda"
        self.differentiable = GradientGraphs(self._eager, execution.precision) if graphs else self._eager
        self._watch: Watch | None = None

    def __call__(self, tile: Tensor) -> Tensor:
        with torch.no_grad():
            if self._watch is not None and self._watch.shape == tile.shape:
                logits = self._guarded(tile)
            else:
                self.recheck()
                self._compile(tile)
                logits = self._guarded(tile)
                self._inspect(tile, logits)
                self._watch = Watch(self._guarded, tile, logits, self._execution.precision)
            self._watch.observe(tile, logits)
            return logits

    def recheck(self) -> None:
        """Run some of the first images again. Raises: ModelError if their logits have changed."""
        if self._watch is not None:
            self._watch.conclude()

    def is_current(self, classifier: nn.Module) -> bool:
        """Return whether ``classifier`` still has the weights from which this forward was made."""
        now = _tensors(classifier)
        return now.keys() == self._weights.keys() and all(
            tensor.device == self._weights[name].device and torch.equal(tensor, self._weights[name])
            for name, tensor in now.items()
        )

    def _eager(self, x: Tensor) -> Tensor:
        return self._execution.logits(self._module, x)

    def _unguarded(self, x: Tensor) -> Tensor:
        return self._execution.unguarded_logits(self._module, x)

    def _guarded(self, tile: Tensor) -> Tensor:
        """Return the logits of a tile, copied, since a CUDA graph overwrites its output at the next call."""
        with foreign_call(tile):
            logits = self._call(tile).clone()
        expected = (len(tile), self._num_classes)
        return logits if logits.shape == expected else check_logits(logits, *expected)

    def _inspect(self, tile: Tensor, logits: Tensor) -> None:
        """Check the forward on a tile with its logits, unless it passed before. Raises: ModelError."""
        file = inspected_file(self._original, self._execution, tile.shape)
        if file is not None and file.exists():
            return
        equal = check_forward(self._guarded, tile, self._execution.precision, logits)
        if self._execution.folded:
            self._check_folding(tile)
        if file is not None and equal:  # a network that warns does so in every process
            keep_inspected(file)

    def _compile(self, tile: Tensor) -> None:
        """Make the first call of a compiled forward, which compiles it."""
        if self._execution.compile_mode == "none":
            return
        try:
            self._call(tile)
        except Exception as error:
            self.differentiable(tile)  # if this fails too, the error comes from the classifier
            raise ModelError(
                f"this classifier's forward is recorded as compiled ({self._execution.compile_mode}) and "
                f"cannot be compiled here ({type(error).__name__}: {str(error)[:300]}); install a C++ compiler, or run "
                "it without: rush.load(folder, compiled=False), rush predict --eager"
            ) from error

    def _check_folding(self, tile: Tensor) -> None:
        """Raise ModelError unless, in float32, the folded copy gives the logits of the original, up to rounding."""
        plain = replace(self._execution, precision="float32")
        with without_tf32(plain.device):
            expected, folded = plain.logits(self._original, tile), plain.logits(self._module, tile)
        spread = float(expected.max() - expected.min())
        if float((folded - expected).abs().max()) > 1e-3 * max(spread, 1e-6):
            raise ModelError(
                "folding BatchNorm into the convolutions changes this classifier's logits; "
                "run it as it is, with execution=Execution(folded=False, ...)"
            )


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Return a copy of ``module``, in evaluation mode, with every BatchNorm folded into the convolution before it.

    The copy computes the same up to rounding. A BatchNorm stays if its input is not the output of a convolution (a sum,
    as in pre-activation networks) or if another layer also reads that output (a shortcut). ``module`` itself is
    returned if there is nothing to fold or its forward cannot be traced symbolically.
    """
    if not any(isinstance(layer, _NORMS) for layer in module.modules()):
        return module
    try:
        traced = symbolic_trace(module)
    except Exception as error:  # a trace runs the user's code on symbols, which may fail in any way
        text = f"BatchNorm is not folded, the classifier's forward cannot be traced: {error}"
        warnings.warn(text, NumericsWarning, stacklevel=2)
        return module
    for node in list(traced.graph.nodes):
        _fold_node(traced, node)
    traced.recompile()
    return traced.eval()


def _fold_node(traced: GraphModule, node: Node) -> None:
    """Fold ``node`` into the convolution before it, if it is a BatchNorm and the only reader of that convolution."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return
    norm, conv = _module_of(traced, node), _module_of(traced, source)
    if not isinstance(norm, _NORMS) or not isinstance(conv, _CONVOLUTIONS) or len(source.users) > 1:
        return
    if any(other is not source and _module_of(traced, other) is conv for other in traced.graph.nodes):
        return  # one convolution used twice
    traced.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm))
    node.replace_all_uses_with(source)
    traced.graph.erase_node(node)


def _module_of(traced: GraphModule, node: Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def try_forwards(
    classifier: nn.Module, execution: Execution, shape: Sequence[int], num_classes: int, forward_passes: int
) -> tuple[Execution, dict[str, object]]:
    """Choose the form of the forward that computes ``forward_passes`` images of ``shape`` in the least time.

    Eager is timed first. torch.compile (on CUDA also with CUDA graphs) is tried only if the whole work takes longer
    eagerly than a compilation, and is chosen if the time saved exceeds the time of compilation.

    Returns:
        ``execution`` with the chosen form, and the measurements: images per second of each form, seconds of
        compilation, and why a form could not be used.
    """
    modes: list[CompileMode] = ["default", "reduce-overhead"] if execution.device.startswith("cuda") else ["default"]
    tile = torch.full((execution.rows(shape), *shape), 0.5, device=execution.device)
    rates: dict[CompileMode, float] = {"none": rate(Forward(classifier, execution, num_classes), tile)}
    measured: dict[str, object] = {"forward_passes": forward_passes, "images_per_second": rates}
    best, least = execution, forward_passes / rates["none"]
    if least < _WORTH_TRYING_SECONDS:
        return best, {**measured, "compiled": "not tried, the whole work takes less than a compilation"}
    for mode in modes:
        candidate = replace(execution, compile_mode=mode)
        started = time.perf_counter()
        try:
            forward = Forward(classifier, candidate, num_classes)
            forward(tile)
            compile_seconds = time.perf_counter() - started
            rates[mode] = rate(forward, tile)
        except Exception as error:  # no compiler, an unsupported operation, ...: eager still works
            logging.getLogger(__name__).info("torch.compile (%s) cannot be used", mode, exc_info=True)
            cause = error.__cause__ or error  # a ModelError names the remedy, its cause the reason
            measured[f"{mode}_failed"] = f"{type(cause).__name__}: {str(cause)[:200]}"
            continue
        measured[f"{mode}_compile_seconds"] = round(compile_seconds, 1)
        total = compile_seconds + forward_passes / rates[mode]
        if total < least:
            best, least = candidate, total
    return best, measured


def _compiled(function: Callable[[Tensor], Tensor], mode: CompileMode) -> Callable[[Tensor], Tensor]:
    if mode == "none":
        return function
    from torch._dynamo import config

    # torch compiles a limited number of networks per process, by default 8, and silently runs further ones eagerly.
    config.recompile_limit = max(_MOST_COMPILED, config.recompile_limit)
    options: dict[str, Any] = {"freezing": True, "triton.cudagraphs": mode == "reduce-overhead"}
    return torch.compile(function, dynamic=False, options=options)


def rate(forward: Forward, tile: Tensor) -> float:
    """Return images per second, over about half a second after two warm-up tiles."""
    for _ in range(2):
        forward(tile)
    _wait(tile)
    started, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < _TRIAL_SECONDS:
        forward(tile)
        images += len(tile)
        _wait(tile)
    return images / elapsed


def _wait(tile: Tensor) -> None:
    if tile.is_cuda:
        torch.cuda.synchronize(tile.device)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
