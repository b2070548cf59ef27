"""Models and points from outside this library: what ``rush audit``, ``rush ladder`` and ``rush verdict`` take."""

import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rush.attacks.threat import ThreatModel
from rush.data.arrays import read_arrays
from rush.data.images import ImageSet, evaluation_order
from rush.data.labels import decode_texts
from rush.data.sources import load_images
from rush.errors import ConfigError, DataError, InputError
from rush.evaluation.audit import AuditReport, audit
from rush.evaluation.defenders import Model, SmoothedDefender
from rush.evaluation.intervals import paired_difference
from rush.evaluation.ladder import ladder, plain_ladder
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.results import AttackResult
from rush.evaluation.robust import Judging, evaluate, prepare, verdict
from rush.inputs import LabelledPixels, labelled_pixels
from rush.loading import load
from rush.options import Decision, Norm, parse_fraction
from rush.reporting import tables
from rush.smoothing import SmoothedClassifier

_STEPS, _STEP_SHARE = 20, 0.25
_DRAWS = (1, 4, 16, 64, 256)
_STRONG_STEPS = 50


@dataclass(frozen=True)
class Subject:
    """A model from outside and the images it is tried on.

    decision, surrogate: as ``rush.attack``. images: checked pixels with labels.
    """

    model: Model
    images: LabelledPixels
    threat: ThreatModel
    decision: Decision | None = None
    surrogate: nn.Module | None = None

    @classmethod
    def of(
        cls,
        model: str,
        data: str,
        norm: Norm,
        epsilon: str,
        *,
        split: str = "test",
        root: str | None = None,
        images: int | None = 200,
        sigma: float | None = None,
        num_classes: int | None = None,
        decision: Decision | None = None,
        surrogate: str | None = None,
        seed: int = 0,
    ) -> "Subject":
        """What the command line names: ``model`` is module:function or a run folder, ``data`` a name or path for
        ``rush.load_images``.

        images: so many of the split, the first of an order fixed by ``seed``; None all. sigma: makes a smoothed
        classifier of the module, for noise of that deviation. Raises: ConfigError, DataError and InputError.
        """
        chosen = _chosen(load_images(data, split=split, root=root), images, seed)
        classes = num_classes or max(2, chosen.num_classes)
        found = load_model(model, sigma, classes)
        backward = None if surrogate is None else call(surrogate)
        if backward is not None and not isinstance(backward, nn.Module):
            raise ConfigError(f"{surrogate} gave {type(backward).__name__}, expected a torch.nn.Module")
        limit = found.num_classes if isinstance(found, SmoothedClassifier) else None
        return cls(found, labelled_pixels(chosen, limit), threat_model(norm, epsilon), decision, backward)

    def audit(self, tolerance: float, seed: int) -> AuditReport:
        """The audit of the default evaluation."""
        return audit(
            self.model,
            self.images,
            self.threat,
            None,
            tolerance,
            decision=self.decision,
            surrogate=self.surrogate,
            seed=seed,
        )

    def climb(self, seed: int, alpha: float = 0.001, max_votes: int = 10_000) -> Iterator[AttackResult]:
        """The ladder's results, rung after rung; ``alpha`` is shared by all of them."""
        defender, pixels = prepare(self.model, self.images, self.threat, self.decision, self.surrogate)
        rungs: list[Plan | Suite] = plain_ladder(defender.num_classes)
        if defender.kind == "random":
            options = {"threat": self.threat, "num_classes": defender.num_classes, "strong_steps": _STRONG_STEPS}
            rungs = ladder(_STEPS, _STEP_SHARE, 1, _DRAWS, **options)  # type: ignore[arg-type]
        if not isinstance(defender, SmoothedDefender):
            rungs = [rung for rung in rungs if rung.name != "transfer"]
        judging = Judging(alpha / len(rungs), max_votes, seed)
        for rung in rungs:
            yield evaluate(defender, pixels, self.threat, rung, judging)


def load_model(name: str, sigma: float | None, num_classes: int) -> Model:
    """The model of a run folder, or what ``module:function`` gives.

    Raises: ConfigError when it is neither, or gives something else than a module or a smoothed classifier.
    """
    found = call(name) if ":" in name else load(name)
    if isinstance(found, SmoothedClassifier):
        if sigma is not None:
            what = "gives a smoothed classifier with" if ":" in name else "is a run folder and has"
            raise ConfigError(f"{name} {what} its own noise; leave --sigma away")
        return found
    if not isinstance(found, nn.Module):
        raise ConfigError(
            f"{name} gave {type(found).__name__}, expected a torch.nn.Module from [0, 1] pixels to logits or a "
            "rush.SmoothedClassifier"
        )
    return found if sigma is None else SmoothedClassifier(found, sigma, num_classes, execution="auto")


def call(name: str) -> object:
    """What ``function()`` of ``module:function`` gives; modules are also looked for in the working folder."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"{name!r} must read module:function, e.g. mymodels:resnet")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name}: {error}; run the command where the module lies, or install it") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ConfigError(f"{module} has no function {function!r}")
    return found()


def threat_model(norm: Norm, epsilon: str) -> ThreatModel:
    """The threat model of a command's options. Raises: ConfigError when ``epsilon`` is no number; InputError."""
    try:
        return ThreatModel(norm, parse_fraction(epsilon))
    except ValueError as error:
        raise error if isinstance(error, InputError) else ConfigError(f"--epsilon: {error}") from None


def judge_file(file: Path, subject: Subject | None, model: Model, threat: ThreatModel, **given: object) -> AttackResult:
    """Verdicts on the points in ``file``, an .npz with ``adversarial`` (N, C, H, W), float in [0, 1] or uint8.

    The images are those of ``subject`` with the same ``ids``, or in its order where the file has no ids; without a
    subject they lie in the file, as ``images`` and ``labels``.
    """
    arrays = _arrays(file)
    points = _pixels(arrays, "adversarial", file)
    if subject is None:
        images = (_pixels(arrays, "images", file), torch.from_numpy(_needed(arrays, "labels", file)).long())
        return verdict(model, images, points, threat, **given)  # type: ignore[arg-type]
    pixels = subject.images
    if "ids" in arrays:
        places = {own: row for row, own in enumerate(pixels.ids)}
        names = decode_texts(arrays["ids"], "ids", str(file))
        strange = [own for own in names if own not in places]
        if strange:
            raise DataError(f"{file} has {len(strange)} images that the data set has not, first {strange[0]}")
        pixels = pixels.select([places[own] for own in names])
    return verdict(model, pixels, points, threat, **given)  # type: ignore[arg-type]


LADDER_HEADER = ("attacker", "passes + forward", "accuracy", "held", "minus the one before", "time")


def ladder_rows(results: Sequence[AttackResult]) -> list[tuple[str, ...]]:
    """A table row a rung: label, passes with and without backward, accuracy, held, difference to the rung before,
    seconds."""
    rows: list[tuple[str, ...]] = []
    before: AttackResult | None = None
    for result in results:
        step = "" if before is None else tables.points(paired_difference(~result.broken, ~before.broken))
        budget = result.budget
        rows.append(
            (
                result.plan.label,
                f"{tables.count(budget['passes_per_image'])} + {tables.count(budget['forward_passes_per_image'])}",
                tables.share(result.interval),
                tables.percent(result.robust_accuracy_lower),
                step,
                tables.duration(float(result.seconds.sum())),
            )
        )
        before = result
    return rows


def _chosen(images: ImageSet, count: int | None, seed: int) -> ImageSet:
    if count is None or count >= len(images):
        return images
    if count < 1:
        raise ConfigError(f"--images must be at least 1, got {count}")
    return images[evaluation_order(len(images), count, seed)]


def _arrays(file: Path) -> dict[str, NDArray[np.generic]]:
    if not file.is_file():
        raise DataError(f"{file} does not exist; give an .npz file with an array 'adversarial'")
    return read_arrays(file, lambda _: True)


def _needed(arrays: dict[str, NDArray[np.generic]], name: str, file: Path) -> NDArray[np.generic]:
    if name not in arrays:
        raise DataError(f"{file} has no array {name!r}; it has {', '.join(sorted(arrays)) or 'none'}")
    return arrays[name]


def _pixels(arrays: dict[str, NDArray[np.generic]], name: str, file: Path) -> Tensor:
    array = _needed(arrays, name, file)
    if array.ndim != 4 or array.dtype.kind not in "fu":
        raise DataError(
            f"{name} in {file} must be (N, C, H, W), float in [0, 1] or uint8, got {array.dtype} {array.shape}"
        )
    return torch.from_numpy(array.astype(np.float32) / (255 if array.dtype.kind == "u" else 1))
