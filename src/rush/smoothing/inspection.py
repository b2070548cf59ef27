"""Checks that a classifier is one fixed function of one image: before sampling, at random tiles and at the end.

Every guarantee is about votes of one function f under noise. A classifier is not such a function if it is stochastic,
changes between calls, or lets the logits of an image depend on the rest of the batch or on its row in the tile.
``check_structure`` reads what the layers declare. ``check_forward`` measures what only a call can show. ``Watch`` keeps
some of the first images with their logits and runs them again later, among other images.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rush.choices import Precision
from rush.errors import ModelError, NumericsWarning
from rush.runtime.execution import check_eval_mode
from rush.runtime.randomness import stream

# Tolerances for rounding: inside a deep network, in epsilons of the arithmetic times the spread of the logits, and of
# the logits themselves, in epsilons of their type times their magnitude.
RELATIVE = 16
ULPS = 4
# Convolutions and products in float32 may be computed in TF32, whose mantissa has 10 bits, as that of float16. Sums of
# integers are exact, and only what surrounds them is in float32.
ARITHMETIC: dict[Precision, float] = {"float32": 2**-10, "bfloat16": 2**-7, "int8": 2**-10}


@dataclass(frozen=True)
class _Question:
    """One comparison of two calls.

    Attributes:
        finding: the property that a difference shows.
        remedy: remedy for a difference that rounding does not explain.
        consequence: consequence of a difference that may be rounding.
    """

    finding: str
    remedy: str
    consequence: str


_CALLS = _Question(
    "for the same tile of images change from call to call",
    "the classifier must be one fixed function: remove dropout, noise, counters and updated averages that act in "
    "evaluation mode",
    "its kernels are not deterministic, and the same command may give other votes; "
    "torch.use_deterministic_algorithms(True) asks for kernels that are",
)
_NEIGHBOURS = _Question(
    "of one image depend on its neighbours in the tile",
    "the classifier must be a function of one image: remove batch statistics, attention across the batch (batch_first) "
    "and whatever else mixes images",
    "votes may depend on the tile: the other images in flight may turn a close one",
)
_LATER = _Question(
    "of one image are no longer those that it gave before, or depend on the other images or on its row in the tile",
    "the classifier must be one fixed function of one image from the first call to the last: remove counters, caches, "
    "updated averages and whatever depends on the rest of the batch; nothing computed with it is kept",
    "",
)
NOT_FINITE = "the classifier gave logits that are not finite; such a vote has no class"
SENTINEL_MOVED = (
    "the classifier's logits of an image that is in every tile depend on the other images, or changed from one tile to "
    f"another, by more than rounding explains: {_LATER.remedy}"
)
_POSITION = _Question(
    "of one image depend on its row in the tile",
    "the classifier must be a function of one image: remove row indices, noise drawn from a fixed seed, and whatever "
    "reads a certain row",
    "votes may depend on the tile: another order of images may turn a close one",
)


def check_structure(module: nn.Module) -> None:
    """Raise ModelError if a layer of ``module`` is in training mode or normalizes by the statistics of the batch.

    A BatchNorm without running statistics does the latter even in evaluation mode. InstanceNorm, LayerNorm and
    GroupNorm normalize each image separately and pass. Cost: no forward pass.
    """
    check_eval_mode(module)
    layers = [name or "(the module itself)" for name, layer in module.named_modules() if _uses_batch_statistics(layer)]
    if layers:
        raise ModelError(
            f"a BatchNorm layer has no running statistics (first such layer: {layers[0]}, {len(layers)} in all) and "
            "takes those of the batch even in evaluation mode, so an image's logits depend on its neighbours: "
            "train the classifier with track_running_stats=True, or with GroupNorm in place of that layer"
        )


def check_forward(
    forward: Callable[[Tensor], Tensor], tile: Tensor, precision: Precision = "float32", logits: Tensor | None = None
) -> bool:
    """Raise ModelError unless ``forward`` is, up to rounding, one fixed function of one image.

    The logits of the same images are compared in at most four calls, without gradients:

    1. the tile, unless its ``logits`` are given;
    2. the same tile again;
    3. about half of the rows replaced. The rows whose number has an even number of ones in binary stay (the Thue-Morse
       sequence). This pattern has no period and splits every pair (2k, 2k + 1), so any mixing of rows at some distance,
       in groups or in halves involves replaced rows. The replaced rows become 3 - 2x, brighter than white and with
       twice the contrast, so that every statistic of the batch changes;
    4. every image moved by one row. A function of the row that this leaves unchanged is constant.

    A tile of one row has no neighbours and no other row.

    Rounding explains a difference of at most 16 epsilons of the arithmetic (2^-7 for bfloat16, 2^-10 for float32, which
    may be computed in TF32) times the standard deviation over the classes, the image's own or the tile's median,
    whichever is larger, plus 4 epsilons of the type that holds the logits times their magnitude. That is 12.5 % of the
    spread in bfloat16 and 1.6 % in float32. Measured on a ResNet-18 and on a trained small network, bfloat16 differs
    from float32, and from bfloat16 in another memory layout, by at most 3 %; float32 with its sums in another order
    differs by less than 0.001 %; batch statistics in one layer, centring by the batch and dropout of 1 % change logits
    by 25 % and more. Between these sizes, rounding and a weak dependence look alike, so the warning states the size.
    For logits that jump, as those of a hard decision do, a last-bit difference becomes an error.

    Args:
        forward: maps a full tile (T, C, H, W) to logits (T, K).
        tile: float32 pixels, T >= 1, preferably the noisy images to be judged. It is not changed.
        precision: precision of the forward.
        logits: logits of the tile (T, K), from a call of this forward.

    Returns:
        Whether all calls gave the same bits.

    Raises:
        ModelError: logits are not finite, not (T, K), or depend on something else. The message states the size.

    Warns:
        NumericsWarning: once, for the first nonzero difference in this order that may be rounding. A forward that
            changes from call to call differs in the other comparisons too.

    Random: this function draws nothing. The forward itself may advance the global generator.
    """
    notes = list(filter(None, compare_calls(forward, tile, precision, logits=logits)))
    if notes:
        warnings.warn(notes[0], NumericsWarning, stacklevel=2)
    return not notes


def compare_calls(
    forward: Callable[[Tensor], Tensor],
    tile: Tensor,
    precision: Precision = "float32",
    movable: bool = True,
    logits: Tensor | None = None,
) -> Iterator[str]:
    """Make the comparisons of ``check_forward`` one by one and yield the text of a warning for each, or "" for none.

    Args:
        forward: as in ``check_forward``.
        tile: as in ``check_forward``.
        precision: as in ``check_forward``.
        movable: whether an image may be compared at another row. False if each row has its own seeded draw.
        logits: as in ``check_forward``.

    Raises:
        ModelError: at the first difference that rounding does not explain.
    """
    first = check_logits(_logits(forward, tile) if logits is None else _compared(logits), len(tile))
    yield _judge(first, _logits(forward, tile), precision, _CALLS)
    if len(tile) > 1:
        stay, replaced = with_others_replaced(tile)
        yield _judge(first[stay], _logits(forward, replaced)[stay], precision, _NEIGHBOURS)
        if movable:
            yield _judge(first, _logits(forward, tile.roll(1, 0)).roll(-1, 0), precision, _POSITION)


class Sentinel:
    """One image in every tile, whose logits must not change, whatever the other rows hold.

    Args:
        logits: logits of a whole tile (T, K). The sentinel's row is the last.
        precision: precision of the forward.
    """

    def __init__(self, logits: Tensor, precision: Precision) -> None:
        _, limits = _rounding(_compared(logits), precision)
        self._expected, self._limit = logits[-1].clone(), float(limits[-1])

    def unmoved(self, logits: Tensor) -> Tensor:
        """Return whether the last row of ``logits`` (T, K) is unchanged up to rounding: a bool () on its device."""
        return (logits[-1] - self._expected).abs().amax() <= self._limit


class Watch:
    """A few images with their logits, which are run again later.

    The forward is run again after a random number of observed tiles, ``spacing`` on average, and by ``conclude``. It
    gets a mixture of kept and new images, at different rows than before. One call thus reveals a function that has
    changed, a dependence on neighbours and a dependence on the row. Rounding is defined as in ``check_forward``. A
    difference of that size passes without a warning, since the first inspection gives one.

    Args:
        forward: maps images (T, C, H, W) to logits (T, K).
        tile: images (T, C, H, W) to keep.
        logits: logits of these images, (T, K).
        precision: precision of the forward.
        movable: whether an image may be run at another row. False if each row has its own seeded draw.
        spacing: mean number of observed tiles between two calls. The sequence is the same in every process.

    Raises:
        ModelError: logits differ by more than rounding explains.

    Cost: one call per ``spacing`` tiles on average, one per ``conclude``, and the memory of one tile.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        tile: Tensor,
        logits: Tensor,
        precision: Precision = "float32",
        movable: bool = True,
        spacing: int = 64,
    ) -> None:
        self._forward, self._precision, self._movable, self._spacing = forward, precision, movable, spacing
        self._tile, self._logits = tile.clone(), _compared(logits)
        self._generator = stream(0, "inspection")
        self._remaining = self._draw(2 * spacing - 1) + 1

    @property
    def shape(self) -> torch.Size:
        """Shape (T, C, H, W) of the tiles that are observed."""
        return self._tile.shape

    def observe(self, tile: Tensor, logits: Tensor | None = None) -> None:
        """Check at random times that the logits of an image depend on nothing else. Raises: ModelError.

        Args:
            tile: images, shaped as the kept ones.
            logits: their logits (T, K). With None they are computed if needed.
        """
        self._remaining -= 1
        if self._remaining == 0:
            self._remaining = self._draw(2 * self._spacing - 1) + 1
            self._ask(tile, _compared(self._forward(tile) if logits is None else logits))

    @torch.no_grad()
    def conclude(self) -> None:
        """Run half of the kept images again, with the others replaced. Raises: ModelError."""
        self._ask(_replaced(self._tile), None)

    def _ask(self, tile: Tensor, logits: Tensor | None) -> None:
        """Run a mixture of kept images and those of ``tile``, and compare both with their earlier logits."""
        stay = _staying(len(tile))
        shift = self._draw(len(tile)) if self._movable else 0
        mixed = torch.where(_column(stay, tile), self._tile, tile)
        now = _logits(self._forward, mixed.roll(shift, 0)).roll(-shift, 0)
        _judge(self._logits[stay], now[stay], self._precision, _LATER)
        if logits is not None and len(tile) > 1:
            _judge(logits[~stay], now[~stay], self._precision, _LATER)

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self._generator))


def check_logits(logits: Tensor, rows: int, num_classes: int | None = None) -> Tensor:
    """Return ``logits`` if they are finite and of shape (rows, num_classes), with any K >= 2 if that is None.

    Raises: ModelError otherwise.
    """
    if logits.shape in ((rows,), (rows, 1)):
        raise ModelError(
            f"the classifier gave one logit per image (shape {tuple(logits.shape)}), expected one per class; a binary "
            "classifier with a single logit z becomes one with two by returning torch.cat([-z, z], 1)"
        )
    allowed = f"({rows}, {num_classes or 'classes'})"
    if logits.ndim != 2 or len(logits) != rows or (num_classes is not None and logits.shape[1] != num_classes):
        raise ModelError(
            f"the classifier gave logits of shape {tuple(logits.shape)} for {rows} images, expected {allowed}; it must "
            "return one row of logits per image, one per class"
        )
    if not bool(logits.isfinite().all()):
        raise ModelError(NOT_FINITE)
    return logits


def with_others_replaced(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask bool (T,) of the images of ``tile`` that stay, and the tile with the others replaced.

    Rows with an even number of ones in binary stay, row 0 among them (``check_forward``).
    """
    stay = _staying(len(tile))
    return stay, torch.where(_column(stay, tile), tile, _replaced(tile))


def _staying(rows: int) -> Tensor:
    return torch.tensor([row.bit_count() % 2 == 0 for row in range(rows)])


def _column(mask: Tensor, tile: Tensor) -> Tensor:
    return mask.to(tile.device)[:, None, None, None]


def _replaced(tile: Tensor) -> Tensor:
    """Return images with other brightness and contrast, within [0, 1] if ``tile`` is, else brighter than white."""
    inside = bool((tile >= 0).all()) and bool((tile <= 1).all())
    return (1 - tile) / 2 if inside else 3 - 2 * tile


def _uses_batch_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is None and layer.running_var is None


@torch.no_grad()
def _logits(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return logits (T, K) in float64 on the CPU. The forward gets a copy, which it may overwrite."""
    return _compared(forward(x.clone()))


def _compared(logits: Tensor) -> Tensor:
    return logits.detach().cpu().double()


def is_rounding(expected: Tensor, actual: Tensor, precision: Precision) -> bool:
    """Return whether logits (R, K) of the same images differ by no more than rounding (``check_forward``)."""
    expected, actual = _compared(expected), _compared(actual)
    return bool((_gaps(expected, actual) <= _rounding(expected, precision)[1]).all())


def _judge(expected: Tensor, actual: Tensor, precision: Precision, question: _Question) -> str:
    """Compare logits (R, K) of the same images from two calls and return the text of a warning, or "" if equal."""
    gaps = _gaps(expected, actual)
    if not bool((gaps > 0).any()):
        return ""
    spreads, limits = _rounding(expected, precision)
    worst = int((gaps / limits).nan_to_num(nan=0.0).argmax())  # 0 / 0: equal logits that did not change
    finding = (
        f"the classifier's logits {question.finding}, by up to {gaps[worst]:.2g} where those of an image have a "
        f"standard deviation of {spreads[worst]:.2g}"
    )
    if gaps[worst] > limits[worst]:
        raise ModelError(f"{finding}, more than rounding explains: {question.remedy}")
    return f"{finding}, which may be rounding: {question.consequence}"


def _gaps(expected: Tensor, actual: Tensor) -> Tensor:
    """Return the largest difference of each image's logits, (R,), infinite where one of them is NaN."""
    return (actual - expected).abs().amax(1).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _rounding(logits: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Return the spreads (R,) of logits (R, K), and by how much rounding may change them, (R,) (``check_forward``)."""
    deviations = logits.std(1, correction=0)
    spreads = deviations.maximum(deviations.median())
    resolution = _resolution(logits)
    inside = RELATIVE * max(ARITHMETIC[precision], resolution) * spreads
    return spreads, inside + ULPS * resolution * logits.abs().amax(1)


def _resolution(logits: Tensor) -> float:
    """Return the epsilon of the coarsest type that holds all of ``logits`` exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(logits.to(dtype).double(), logits):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps
