"""The precision of judged samples: chosen by a measurement where the recipe leaves it open, or in integers."""

import json
from collections.abc import Sequence

import torch
from torch import nn

from rush.choices import Precision
from rush.data.images import ImageSet
from rush.runtime.execution import Execution, in_precision
from rush.runtime.machine import processor
from rush.runtime.randomness import stream
from rush.runtime.user_cache import cache_file, keep
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.forward import Forward, rate

_PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")
_GAIN = 1.1  # for a smaller gain, another precision is not worth it
_TURNS = 2
_CALIBRATED = 1024  # images on which the scales of integers are chosen


def faster_precision(
    classifier: nn.Module, execution: Execution, shape: Sequence[int], num_classes: int
) -> tuple[Execution, dict[Precision, float]]:
    """Return ``execution`` in float32 where this is a tenth faster than bfloat16 on this processor.

    Training in bfloat16 pays off on processors on which judging in it does not. The choice is made once per processor,
    number of threads, version of torch and network, and kept in the user's cache.

    Returns:
        The execution, and the images per second of each precision, empty where there is no choice.
    """
    if execution.precision != "bfloat16" or torch.device(execution.device).type != "cpu":
        return execution, {}
    rates = _measured(classifier, execution, shape, num_classes)
    faster = rates["float32"] >= _GAIN * rates["bfloat16"]
    return in_precision(execution, "float32") if faster else execution, rates


def in_integers(smoothed: SmoothedClassifier, train: ImageSet, seed: int) -> SmoothedClassifier:
    """Return ``smoothed`` in 8-bit integers, whose scales are chosen on training images.

    Raises: as ``SmoothedClassifier.quantized``.

    Random: ``stream(seed, "quantize", "images")`` for the images, and as ``SmoothedClassifier.quantized``.
    """
    order = torch.randperm(len(train), generator=stream(seed, "quantize", "images"))
    return smoothed.quantized(train[order[:_CALIBRATED].tolist()], seed)


def _measured(
    classifier: nn.Module, execution: Execution, shape: Sequence[int], num_classes: int
) -> dict[Precision, float]:
    facts = [processor(), execution.threads, torch.__version__, execution.rows(shape), list(shape)]
    file = cache_file("precision", [*facts, str(classifier)], ".json")
    try:
        kept = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
        return {name: float(kept[name]) for name in _PRECISIONS}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rates: dict[Precision, float] = dict.fromkeys(_PRECISIONS, 0.0)
    tile = torch.full((execution.rows(shape), *shape), 0.5)
    for _ in range(_TURNS):
        for name in _PRECISIONS:
            chosen = in_precision(execution, name)
            chosen.place(classifier)
            rates[name] = max(rates[name], rate(Forward(classifier, chosen, num_classes), tile))
    execution.place(classifier)
    if file is not None:
        keep(file, lambda target: target.write_text(json.dumps(rates), encoding="utf-8"))
    return rates
