"""The form of judged samples: precision and layout by a measurement where the recipe leaves them open, or integers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from rush.data.images import ImageSet
from rush.runtime.execution import Execution, in_precision
from rush.runtime.machine import processor
from rush.runtime.randomness import stream
from rush.runtime.user_cache import cache_file, keep
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.forward import Forward, rate

FORM = ("compile_mode", "precision", "channels_last")
"""Fields of ``Execution`` that a run records as the form in which its samples are judged."""
_GAIN = 1.1  # for a smaller gain, another form is not worth it
_TURNS = 2
_CALIBRATED = 1024  # images on which the scales of integers are chosen


def fastest_form(
    classifier: nn.Module, execution: Execution, shape: Sequence[int], num_classes: int
) -> tuple[Execution, dict[str, float]]:
    """Return ``execution`` in the precision and layout that judge images of ``shape`` (C, H, W) fastest on this CPU.

    The forms are float32 with contiguous tensors, float32 with channels last, and bfloat16 if ``execution`` is in it.
    A later one is chosen where it is a tenth faster than the one chosen before it. What trains fastest need not judge
    fastest. The choice is made once per processor, number of threads, version of torch and network, and kept in the
    user's cache.

    Returns:
        The execution, and the images per second of each form, empty where there is no choice.
    """
    forms = _forms(execution)
    if not forms:
        return execution, {}
    rates = _measured(classifier, execution, forms, shape, num_classes)
    chosen, *others = forms
    for other in others:
        if rates[other] >= _GAIN * rates[chosen]:
            chosen = other
    return forms[chosen], rates


def in_fastest_form(smoothed: SmoothedClassifier, shape: Sequence[int]) -> SmoothedClassifier:
    """Return ``smoothed``, changed in place to the form that ``fastest_form`` finds for images of ``shape``."""
    execution, _ = fastest_form(smoothed.classifier, smoothed.execution, shape, smoothed.num_classes)
    execution.place(smoothed.classifier)
    smoothed.execution = execution
    return smoothed


def in_integers(smoothed: SmoothedClassifier, train: ImageSet, seed: int) -> SmoothedClassifier:
    """Return ``smoothed`` in 8-bit integers, whose scales are chosen on training images.

    Raises: as ``SmoothedClassifier.quantized``.

    Random: ``stream(seed, "quantize", "images")`` for the images, and as ``SmoothedClassifier.quantized``.
    """
    order = torch.randperm(len(train), generator=stream(seed, "quantize", "images"))
    return smoothed.quantized(train[order[:_CALIBRATED].tolist()], seed)


def _forms(execution: Execution) -> dict[str, Execution]:
    """Return the forms to choose from by name, the one that is chosen among equal ones first."""
    if torch.device(execution.device).type != "cpu" or execution.precision == "int8":
        return {}
    plain = in_precision(execution, "float32")
    forms = {
        "float32": replace(plain, channels_last=False),
        "float32, channels_last": replace(plain, channels_last=True),
    }
    return forms if execution.precision == "float32" else {**forms, "bfloat16": execution}


def _measured(
    classifier: nn.Module, execution: Execution, forms: Mapping[str, Execution], shape: Sequence[int], num_classes: int
) -> dict[str, float]:
    facts = [processor(), execution.threads, torch.__version__, execution.rows(shape), list(shape), list(forms)]
    file = cache_file("forms", [*facts, str(classifier)], ".json")
    try:
        kept = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
        return {name: float(kept[name]) for name in forms}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rates = dict.fromkeys(forms, 0.0)
    tile = torch.full((execution.rows(shape), *shape), 0.5)
    for _ in range(_TURNS):
        for name, form in forms.items():
            form.place(classifier)
            rates[name] = max(rates[name], rate(Forward(classifier, form, num_classes), tile))
    execution.place(classifier)
    if file is not None:
        keep(file, lambda target: target.write_text(json.dumps(rates), encoding="utf-8"))
    return rates
