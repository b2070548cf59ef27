"""Models from outside a run, their images and their threat model, as commands take them."""

from __future__ import annotations

import importlib
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Parameter

from rush.choices import Decision, NoiseName, Norm, parse_fraction
from rush.commands.run_folders import data_roots, print_once
from rush.errors import ConfigError, InputError, ModelError, RushError
from rush.runtime.lines import one_line

if TYPE_CHECKING:
    from torch import nn

    from rush.attacks.threat import ThreatModel
    from rush.data.checks import LabelledPixels
    from rush.data.images import ImageSet
    from rush.evaluation.model import Model
    from rush.evaluation.result import AttackResult


@Parameter(name="*")
@dataclass(frozen=True)
class ExternalModel:
    """A model from outside a run with its images, as the command line names them.

    The fields are options of the commands; what they name is loaded when it is first used.

    Args:
        model: module:function that returns a torch.nn.Module (pixels to logits) or SmoothedClassifier; or a run folder.
        data: Images: a name or path as in recipes. For a run folder: where its data set lies, as in `rush run`.
        root: Folder with the archives or shards of the data set; repeatable, shards of all folders are joined.
        split: Split of the data set.
        size: Side in pixels to which each image's central square is resampled. By default images are taken as they are.
        images: Number of images to evaluate: the first N of a seeded shuffle of the split.
        sigma: Smooth the module with noise of this standard deviation.
        noise: Kind of that noise.
        num_classes: Number of classes, if it is not that of the data set.
        seed: Seed of all draws, 0 by default, but verdict draws one from the system.
    """

    model: str | None = None
    data: list[str] | None = None
    root: list[Path] | None = None
    split: str = "test"
    size: int | None = None
    images: int | None = 200
    sigma: float | None = None
    noise: NoiseName = "gaussian"
    num_classes: int | None = None
    seed: int | None = None

    def data_of_run(self) -> list[Path] | None:
        """Return the folders of a run's data set.

        Raises:
            ConfigError: Another option is given, for which a run has its own value.
        """
        if self.model is not None:
            raise ConfigError(f"give a run folder or --model {self.model}, not both")
        for field in fields(self):
            if field.name != "data" and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"--{field.name.replace('_', '-')} belongs to --model; a run folder has its own value, see --set"
                )
        return None if self.data is None else list(map(Path, self.data))

    @cached_property
    def classifier(self) -> Model:
        """The model. Raises as ``load_model``."""
        if self.model is None:
            raise ConfigError("give --model: a run folder, or module:function")
        if self.sigma is None and self.noise != "gaussian":
            raise ConfigError(f"--noise {self.noise} needs --sigma, its standard deviation")
        default = 10 if self.data is None else max(2, self._image_set.num_classes)
        return load_model(self.model, self.sigma, self.num_classes or default, self.noise)

    @cached_property
    def pixels(self) -> LabelledPixels:
        """The checked images with labels that fit the model."""
        from rush.data.checks import kind_of, labelled_pixels
        from rush.reporting.wording import classes_text
        from rush.smoothing.classifier import SmoothedClassifier

        images, model = self._image_set, self.classifier
        named = images.classes != tuple(map(str, range(images.num_classes)))
        if named and kind_of(model).classes is None:
            print_once(f"{self.model} names no classes: its logits are taken to be {classes_text(images.classes)}")
        num_classes = model.num_classes if isinstance(model, SmoothedClassifier) else None
        return labelled_pixels(images, num_classes, kind_of(model))

    @property
    def indices(self) -> list[int]:
        """The positions of the images in their split."""
        return self._selected[0]

    @property
    def _image_set(self) -> ImageSet:
        return self._selected[1]

    @cached_property
    def _selected(self) -> tuple[list[int], ImageSet]:
        """The first ``images`` of the split in a seeded order, or all in their original order, and their positions."""
        from rush.data.images import evaluation_order
        from rush.data.sources import is_divided, load_images

        if self.model is None or self.data is None:
            raise ConfigError(
                "give a run folder, or --model module:function with --data (a name such as cifar10, or a path)"
            )
        name, root = one_data_set(self.data), data_roots(self.root)
        images = load_images(name, split=self.split, root=root, size=self.size)
        if not is_divided(name, root):
            print_once(f"{name} has no split of test images, so that images of training may be among these")
        if self.images is None or self.images >= len(images):
            return list(range(len(images))), images
        if self.images < 1:
            raise ConfigError(f"--images must be at least 1, got {self.images}")
        indices = evaluation_order(len(images), self.images, self.seed or 0)
        return indices, images[indices]


@Parameter(name="*")
@dataclass(frozen=True)
class ExternalEvaluation(ExternalModel):
    """A model from outside a run with its images and threat model, as the command line names them.

    Args:
        norm: Norm of the threat model; a run has its own.
        epsilon: A number or a fraction such as 8/255, in [0, 1] pixel units.
        decision: How a stochastic module is used: vote, mean or single.
        surrogate: module:function of a module whose derivative replaces that of the model (BPDA).
    """

    norm: Norm = "linf"
    epsilon: str = "8/255"
    decision: Decision | None = None
    surrogate: str | None = None

    @cached_property
    def threat(self) -> ThreatModel:
        """The threat model. Raises ConfigError where ``epsilon`` is not a number, InputError where it is too large."""
        from rush.attacks.threat import ThreatModel

        try:
            return ThreatModel(self.norm, parse_fraction(self.epsilon))
        except ValueError as error:
            raise error if isinstance(error, InputError) else ConfigError(f"--epsilon: {error}") from None

    @property
    def words(self) -> str:
        """The options that name model, images and threat, as ``rush verdict`` takes them."""
        names = ("model", "sigma", "noise", "num_classes", "decision", "data", "root", "split", "size")
        defaults = {field.name: field.default for field in fields(self)}
        given = [(name, value) for name in names if (value := getattr(self, name)) != defaults[name]]
        given += [("norm", self.norm), ("epsilon", self.epsilon)]
        return shlex.join(
            word
            for name, value in given
            for each in (value if isinstance(value, list) else [value])
            for word in (f"--{name.replace('_', '-')}", str(each))
        )

    @cached_property
    def surrogate_module(self) -> nn.Module | None:
        """The module that ``surrogate`` names. Raises ConfigError where it is not a module."""
        return None if self.surrogate is None else call_module(self.surrogate)

    def run_ladder(self, alpha: float = 0.001, max_votes: int = 10_000) -> Iterator[AttackResult]:
        """Yield the result of each rung of the ladder; ``alpha`` is shared by all of them.

        Raises:
            InputError: No verdict can be given at this level and number of votes; raised before the first attack.
        """
        from rush.evaluation.evaluation import Evaluation
        from rush.evaluation.ladder import ladder, plain_ladder
        from rush.evaluation.model import SmoothedDefender
        from rush.evaluation.verdict import VerdictSettings
        from rush.recipe.schema import AttackConfig

        threat, pixels, settings = self.threat, self.pixels, VerdictSettings.checked(alpha, max_votes, self.seed or 0)
        evaluation = Evaluation.of(self.classifier, pixels, threat, settings, self.decision, self.surrogate_module)
        defender = evaluation.defender
        rungs = plain_ladder(defender.num_classes)
        if defender.kind == "random":
            rungs = ladder(AttackConfig(), threat, defender.num_classes)
        if not isinstance(defender, SmoothedDefender):
            rungs = [rung for rung in rungs if rung.name != "transfer"]
        evaluation = replace(evaluation, settings=replace(settings, level=settings.level / len(rungs)))
        for rung in rungs:
            evaluation.check_reachable(rung)
        yield from evaluation.run_all(rungs)


NO_MODEL = ExternalModel()
NO_EVALUATION = ExternalEvaluation()


def verdict_rows(result: AttackResult) -> list[tuple[str, str]]:
    """Return the rows that state the verdicts on points."""
    from rush.reporting.wording import percent, share

    undecided = int(result.undecided.sum())
    return [
        ("images", f"{len(result):,}"),
        ("robust accuracy, 1 - broken", share(result.interval)),
        ("held", share(result.interval_lower)),
        ("undecided", f"{undecided} ({percent(undecided / len(result))})"),
        ("largest change", f"l-inf {result.linf.max():.5f}, l2 {result.l2.max():.4f}, l1 {result.l1.max():.3f}"),
        ("votes per image", f"{result.votes.mean():,.0f}"),
    ]


def load_model(name: str, sigma: float | None, num_classes: int, noise: NoiseName = "gaussian") -> Model:
    """Return the model of a run folder, or what ``module:function`` returns.

    Args:
        name: Run folder or ``module:function``.
        sigma: Standard deviation of the noise to smooth a module with, None to take it as it is.
        num_classes: Number of classes of a module that does not name its classes.
        noise: Kind of that noise.

    Raises:
        ConfigError: ``name`` is neither, or gives something other than a module or a smoothed classifier.
        ModelError: The function raises.
    """
    from torch import nn

    from rush.data.checks import kind_of
    from rush.models.storage import HUB, SHIPPED, load
    from rush.smoothing.classifier import SmoothedClassifier
    from rush.smoothing.noise import make_noise

    if ":" not in name and not Path(name).exists() and name not in SHIPPED:
        raise ConfigError(
            f"--model {name} is neither module:function, e.g. mymodels:net, nor a run folder, nor a shipped model "
            f"({', '.join(SHIPPED)})"
        )
    model = load(name) if ":" not in name or name.startswith(HUB) else call(name)
    if isinstance(model, SmoothedClassifier):
        model.execution.configure()
        if sigma is not None:
            what = "gives a smoothed classifier with" if ":" in name else "is a run folder and has"
            raise ConfigError(f"{name} {what} its own noise; omit --sigma")
        return model
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{name} gave {type(model).__name__}, expected a torch.nn.Module from [0, 1] pixels to logits or a "
            "rush.SmoothedClassifier"
        )
    if sigma is None:
        return model
    classes = kind_of(model).classes
    count = num_classes if classes is None else len(classes)
    return SmoothedClassifier(model, num_classes=count, noise=make_noise(noise, sigma), execution="auto")


def one_data_set(data: list[str]) -> str:
    """Return the only name or path in ``data``. Raises: ConfigError if there are several."""
    if len(data) > 1:
        raise ConfigError(
            f"--data names one data set, got {', '.join(data)}; give the folders that hold it with --root"
        )
    return data[0]


def call_module(name: str) -> nn.Module:
    """Return what ``call`` returns. Raises: ConfigError if it is not a torch.nn.Module."""
    from torch import nn

    module = call(name)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name} gave {type(module).__name__}, expected a torch.nn.Module from pixels to logits")
    return module


def call(name: str) -> object:
    """Return what ``function()`` of ``module:function`` returns, or the network itself if that is what it names.

    The working folder is searched for modules, too, also during the call.

    Raises:
        ConfigError: There is no such module or function.
        ModelError: The user's code fails. The message holds the exception and its place.
    """
    from torch import nn

    from rush.smoothing.classifier import SmoothedClassifier

    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"{name!r} must read module:function, e.g. mymodels:resnet")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with _user_code(f"importing {module}", module):
            value = getattr(importlib.import_module(module), function, None)
        if isinstance(value, nn.Module | SmoothedClassifier):
            return value
        if not callable(value):
            raise ConfigError(f"{module} has no function {function!r}")
        with _user_code(f"{name}()"):
            return value()
    finally:
        sys.path.pop(0)


@contextmanager
def _user_code(what: str, module: str | None = None) -> Iterator[None]:
    """Turn whatever the user's code raises, even an exit, into a ModelError. Errors of this library pass unchanged.

    Args:
        what: What the code does.
        module: Name of the module that is imported. If there is none of this name, a ConfigError is raised.
    """
    try:
        yield
    except RushError:
        raise
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if module is not None and missing is not None and f"{module}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{module}: {error}; run the command in the folder of the module, or install it"
            ) from error
        raise ModelError(
            f"{what} failed: {one_line(error)}{_place(error)}; --traceback shows the whole error"
        ) from error


def _place(error: BaseException) -> str:
    """Return `` (file, line)`` of the innermost frame outside installed packages, which is the user's code, if any."""
    if isinstance(error, SyntaxError):
        return ""  # the text of the error contains it
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not _installed(frame.filename)]
    return f" ({Path(users[-1].filename).name}, line {users[-1].lineno})" if users else ""


def _installed(filename: str) -> bool:
    packages = {"site-packages", "importlib"}
    return filename.startswith("<") or filename == __file__ or not packages.isdisjoint(Path(filename).parts)
