"""Models and points from outside this library: what ``rush audit``, ``rush ladder`` and ``rush verdict`` take."""

import importlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rush.attacks.threat import ThreatModel
from rush.auditing.audit import AuditReport, audit
from rush.choices import Decision, Norm, parse_fraction
from rush.data.checks import LabelledPixels, kind_of, labelled_pixels
from rush.data.images import ImageSet, evaluation_order
from rush.data.labels import decode_texts
from rush.data.readers.npz import read_arrays
from rush.data.readers.roots import Root
from rush.data.sources import load_images
from rush.errors import ConfigError, DataError, InputError, ModelError, RushError
from rush.evaluation.attack import verdict
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.ladder import ladder, plain_ladder
from rush.evaluation.model import Model, SmoothedDefender
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.result import AttackResult
from rush.evaluation.verdict import VerdictSettings
from rush.models.storage import load
from rush.reporting import tables
from rush.runtime.lines import one_line
from rush.smoothing.classifier import SmoothedClassifier
from rush.statistics import paired_difference

_STEPS, _STEP_SHARE = 20, 0.25
_DRAWS = (1, 4, 16, 64, 256)
_STRONG_STEPS = 50
_NATIVE = {2: np.float16, 4: np.float32}  # by the bytes of a number, in the machine's byte order; else float64


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
        root: Root = None,
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
        threat = threat_model(norm, epsilon)
        chosen = _chosen(load_images(data, split=split, root=root), images, seed)
        found = load_model(model, sigma, num_classes or max(2, chosen.num_classes))
        backward = None if surrogate is None else call(surrogate)
        if backward is not None and not isinstance(backward, nn.Module):
            raise ConfigError(f"{surrogate} gave {type(backward).__name__}, expected a torch.nn.Module")
        limit = found.num_classes if isinstance(found, SmoothedClassifier) else None
        return cls(found, labelled_pixels(chosen, limit, kind_of(found)), threat, decision, backward)

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
        settings = VerdictSettings.checked(alpha, max_votes, seed)
        evaluation = Evaluation.of(self.model, self.images, self.threat, settings, self.decision, self.surrogate)
        defender = evaluation.defender
        rungs: list[Plan | Suite] = plain_ladder(defender.num_classes)
        if defender.kind == "random":
            options = {"threat": self.threat, "num_classes": defender.num_classes, "strong_steps": _STRONG_STEPS}
            rungs = ladder(_STEPS, _STEP_SHARE, 1, _DRAWS, **options)  # type: ignore[arg-type]
        if not isinstance(defender, SmoothedDefender):
            rungs = [rung for rung in rungs if rung.name != "transfer"]
        evaluation = replace(evaluation, settings=replace(settings, level=settings.level / len(rungs)))
        for rung in rungs:
            evaluation.check_reachable(rung)
        for rung in rungs:
            yield evaluation.run(rung)


def load_model(name: str, sigma: float | None, num_classes: int) -> Model:
    """The model of a run folder, or what ``module:function`` gives.

    Raises: ConfigError when it is neither, or gives something else than a module or a smoothed classifier; ModelError
    when the function raises.
    """
    found = call(name) if ":" in name else load(name)
    if isinstance(found, SmoothedClassifier):
        found.execution.configure()
        if sigma is not None:
            what = "gives a smoothed classifier with" if ":" in name else "is a run folder and has"
            raise ConfigError(f"{name} {what} its own noise; leave --sigma away")
        return found
    if not isinstance(found, nn.Module):
        raise ConfigError(
            f"{name} gave {type(found).__name__}, expected a torch.nn.Module from [0, 1] pixels to logits or a "
            "rush.SmoothedClassifier"
        )
    if sigma is None:
        return found
    known = kind_of(found).classes
    return SmoothedClassifier(found, sigma, num_classes if known is None else len(known), execution="auto")


def call(name: str) -> object:
    """What ``function()`` of ``module:function`` gives, or the network itself where it names one.

    Modules are also looked for in the working folder, during the call too.
    Raises: ConfigError when there is no such module or function; ModelError, with what was raised and where, when the
    user's own code fails.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"{name!r} must read module:function, e.g. mymodels:resnet")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with _user_code(f"importing {module}", module):
            found = getattr(importlib.import_module(module), function, None)
        if isinstance(found, nn.Module | SmoothedClassifier):
            return found
        if not callable(found):
            raise ConfigError(f"{module} has no function {function!r}")
        with _user_code(f"{name}()"):
            return found()
    finally:
        sys.path.pop(0)


@contextmanager
def _user_code(what: str, module: str | None = None) -> Iterator[None]:
    """Within the context code of the user runs: what it raises becomes a ModelError, an exit too.

    module: is being imported; a ConfigError says when there is none of this name. Errors of this library pass.
    """
    try:
        yield
    except RushError:
        raise
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if module is not None and missing is not None and f"{module}.".startswith(f"{missing}."):
            raise ConfigError(f"{module}: {error}; run the command where the module lies, or install it") from error
        raise ModelError(f"{what} failed: {one_line(error)}{_place(error)}; see all of it with --traceback") from error


def _place(error: BaseException) -> str:
    """`` (file, line)`` of the innermost frame outside installed packages, which is the user's own; empty without
    one."""
    if isinstance(error, SyntaxError):
        return ""  # its text has it
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [frame for frame in frames if not _installed(frame.filename)]
    return f" ({Path(foreign[-1].filename).name}, line {foreign[-1].lineno})" if foreign else ""


def _installed(filename: str) -> bool:
    return (
        filename.startswith("<")
        or any(part in ("site-packages", "importlib") for part in Path(filename).parts)
        or (filename == __file__)
    )


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
        images = (_pixels(arrays, "images", file), _labels(arrays, file))
        return verdict(model, images, points, threat, **given)  # type: ignore[arg-type]
    pixels = subject.images
    if "ids" in arrays:
        pixels = pixels.select(_rows_of(decode_texts(arrays["ids"], "ids", str(file)), pixels.ids, file))
    return verdict(model, pixels, points, threat, **given)  # type: ignore[arg-type]


def _rows_of(ids: list[str], known: Sequence[str], file: Path) -> list[int]:
    """The positions among ``known`` of the images that the file names."""
    places = {image_id: row for row, image_id in enumerate(known)}
    unknown = [image_id for image_id in ids if image_id not in places]
    if unknown:
        raise DataError(f"{file} has {len(unknown)} images that the data set has not, first {unknown[0]}")
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{file} has a duplicate id, {repeated[0]}; give one point per image")
    return [places[image_id] for image_id in ids]


def _labels(arrays: dict[str, NDArray[np.generic]], file: Path) -> Tensor:
    array = _needed(arrays, "labels", file)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"labels in {file} must be class indices, integers of shape (N,), got {array.dtype} {array.shape}; convert "
            "them first"
        )
    return torch.from_numpy(array.astype(np.int64))


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
    """The array (N, C, H, W) as a tensor of its own float type, 8-bit pixels divided by 255."""
    array = _needed(arrays, name, file)
    if array.ndim != 4 or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
        raise DataError(
            f"{name} in {file} must be (N, C, H, W), float in [0, 1] or uint8, got {array.dtype} {array.shape}"
        )
    if array.dtype == np.uint8:
        return torch.from_numpy(array.astype(np.float32) / 255)
    return torch.from_numpy(array.astype(_NATIVE.get(array.dtype.itemsize, np.float64)))
