"""Networks in 8-bit integers, quantized after training, for processors with integer dot products (VNNI).

Every certificate of such a network is about the network of integers: votes, verdicts and predictions come from it. Its
sums of products are exact, so that an image's outputs do not depend on the batch. Weights of convolutions have one
scale per output channel, activations one scale and zero point per tensor, which noisy training images determine. Linear
layers and whatever torch cannot quantize stay in float32.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from rush.errors import ConfigError, ModelError
from rush.models.classifier import Classifier
from rush.runtime.execution import check_integers
from rush.runtime.lines import one_line
from rush.smoothing.forward import fold_batch_norm

Ranges: TypeAlias = Sequence[tuple[float, int]]  # scale and zero point of every activation
_OBSERVER = "activation_post_process_"
_ENGINE = "x86"
_ROWS = 128  # calibrated together


class Quantized(nn.Module):
    """A network computed in 8-bit integers, with the derivative of the network in float32.

    Args:
        network: network in evaluation mode on the CPU. Its weights must not change afterwards.
        ranges: scale and zero point of every activation, in the order of the network (``quantized`` computes them).

    Attributes:
        network: the network in float32.
        ranges: float64 (L, 2).

    Raises:
        ConfigError: this processor or this version of torch cannot compute it.
        ModelError: the network cannot be traced, or has a different number of activations.
    """

    ranges: Tensor

    def __init__(self, network: nn.Module, ranges: Ranges) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("ranges", torch.tensor(ranges, dtype=torch.float64).reshape(-1, 2), persistent=False)
        integers = _converted(network, ranges)
        self._forms = (integers, fold_batch_norm(network))  # in a tuple, so that their weights are not counted twice
        self.eval()

    @property
    def features(self) -> int:
        """Number of features of an encoder."""
        found = self.network.features
        assert isinstance(found, int)
        return found

    def forward(self, x: Tensor) -> Tensor:
        integers, smooth = self._forms
        with torch.no_grad():
            value = integers(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        differentiable = smooth(x)
        return differentiable + (value - differentiable).detach()


def quantized(classifier: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of ``classifier`` in 8-bit integers. In a ``Classifier``, the encoder is quantized.

    Args:
        classifier: network from pixels to logits, in evaluation mode, with weights in float32, on the CPU.
        images: float32 (N, C, H, W), with noise as at prediction, which determine the ranges of activations.

    Raises:
        ConfigError, ModelError: as ``Quantized``.
    """
    classifier = copy.deepcopy(classifier).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with torch.no_grad():
        inputs = classifier.normalize(images) if isinstance(classifier, Classifier) else images
    return with_ranges(classifier, _calibrated(_quantized_part(classifier), inputs))


def with_ranges(classifier: nn.Module, ranges: Ranges) -> nn.Module:
    """Return ``classifier`` in 8-bit integers with known ranges of activations. Raises: as ``Quantized``."""
    if not isinstance(classifier, Classifier):
        return Quantized(classifier, ranges)
    classifier.encoder = Quantized(classifier.encoder, ranges)
    return classifier


def is_quantized(classifier: nn.Module) -> bool:
    """Return whether ``classifier``, or a part of it, computes in 8-bit integers."""
    return any(isinstance(layer, Quantized) for layer in classifier.modules())


def without_ranges(classifier: nn.Module) -> tuple[nn.Module, Ranges | None]:
    """Return the network in float32, and the ranges of a network in integers or None for any other."""
    inner = _quantized_part(classifier)
    if not isinstance(inner, Quantized):
        return classifier, None
    ranges = [(float(scale), int(zero)) for scale, zero in inner.ranges.tolist()]
    if not isinstance(classifier, Classifier):
        return inner.network, ranges
    plain = copy.copy(classifier)
    plain._modules = {**classifier._modules, "encoder": inner.network}
    return plain, ranges


def _quantized_part(classifier: nn.Module) -> nn.Module:
    """Return the part of a classifier that is quantized: the encoder of one of this library, else the whole."""
    return classifier.encoder if isinstance(classifier, Classifier) else classifier


def _calibrated(network: nn.Module, inputs: Tensor) -> Ranges:
    """Return the ranges that lose least of the distribution of each activation (torch's histogram observer)."""
    prepared = _prepared(network)
    with torch.no_grad():
        for part in inputs.split(_ROWS):
            prepared(part)
    found = (observer.calculate_qparams() for _, observer in _observers(prepared))
    return [(float(scale), int(zero)) for scale, zero in found]


def _converted(network: nn.Module, ranges: Ranges) -> nn.Module:
    from torch.ao.quantization.observer import FixedQParamsObserver
    from torch.ao.quantization.quantize_fx import convert_fx

    prepared = _prepared(network)
    names = [name for name, _ in _observers(prepared)]
    if len(names) != len(ranges):
        raise ModelError(f"the network has {len(names)} activations to quantize, and ranges of {len(ranges)} are given")
    for name, (scale, zero) in zip(names, ranges, strict=True):
        setattr(prepared, name, FixedQParamsObserver(scale, zero, dtype=torch.quint8, quant_min=0, quant_max=255))
    with _quietly():
        converted = convert_fx(prepared)
    assert isinstance(converted, nn.Module)
    return converted.eval()


def _prepared(network: nn.Module) -> GraphModule:
    """Return a traced copy of ``network`` with an observer after every activation that is quantized."""
    check_integers("cpu")
    try:
        from torch.ao.quantization import QConfig, QConfigMapping
        from torch.ao.quantization.observer import HistogramObserver, PerChannelMinMaxObserver
        from torch.ao.quantization.quantize_fx import prepare_fx
    except ImportError as error:
        raise ConfigError(f"torch {torch.__version__} has no quantization of networks; use torch 2.13") from error
    torch.backends.quantized.engine = _ENGINE
    observers = QConfig(
        activation=HistogramObserver.with_args(dtype=torch.quint8, reduce_range=False),
        weight=PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric),
    )
    mapping = QConfigMapping().set_global(observers).set_object_type(nn.Linear, None)
    try:
        with _quietly():
            prepared = prepare_fx(copy.deepcopy(network).eval(), mapping, (torch.zeros(1),))
    except Exception as error:  # a trace runs the user's code on symbols, which may fail in any way
        raise ModelError(
            f"the network's forward cannot be traced for quantization ({one_line(error)}); use a float precision"
        ) from error
    assert isinstance(prepared, GraphModule)
    return prepared


def _observers(prepared: nn.Module) -> list[tuple[str, Any]]:
    """Return names and observers of the activations, in the order of the network."""
    found = [(name, module) for name, module in prepared.named_children() if name.startswith(_OBSERVER)]
    return sorted(found, key=lambda each: int(each[0].removeprefix(_OBSERVER)))


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence torch's announcement that this interface will move to another package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
