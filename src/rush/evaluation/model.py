"""The model under evaluation, one way to ask it for each kind: deterministic, smoothed, or random by itself.

An attacker gets log-probabilities, the verdict votes (or probabilities) of draws that no attacker has seen, and the
choice among an attacker's candidates votes of a third stream.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rush.attacks.gradient import (
    LogProbs,
    draw_seed,
    fresh_draws,
    fresh_noise,
    frozen_noise,
    pinned,
    plain,
    seeded,
    with_surrogate,
)
from rush.attacks.losses import margin
from rush.choices import Decision
from rush.data.checks import LabelledPixels, pixel_ids
from rush.errors import InputError, ModelError
from rush.evaluation.plans import Kind, Plan
from rush.evaluation.verdict import (
    BROKEN,
    HELD,
    UNDECIDED,
    Verdicts,
    judge,
    judge_deterministic,
    judge_means,
    judge_votes,
)
from rush.runtime.execution import Execution, check_eval_mode, device_of
from rush.runtime.randomness import stream
from rush.smoothing.classifier import BLOCK, SmoothedClassifier
from rush.smoothing.fingerprint import fingerprint_of
from rush.smoothing.inspection import Watch, check_logits, check_structure, compare_calls, with_others_replaced
from rush.statistics import sign_test

Model: TypeAlias = nn.Module | SmoothedClassifier

CHOICE_VOTES = BLOCK  # that choose among candidates of a random model, the same noise for all of them
_RANKING_DRAWS = 64
_FEW = 16  # images that a module without noise of its own is inspected on
_MEAN_DRAWS, _STANDARD_ERRORS = 128, 8


class Defender(Protocol):
    """A model as an evaluation sees it."""

    kind: Kind
    execution: Execution
    num_classes: int
    transferable: bool
    single: bool

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:
        """What the attacker of ``plan`` sees of the images ``x`` (B, C, H, W); draws come from streams of ``name``."""
        ...

    def judge(self, points: LabelledPixels, *, purpose: str, level: float, max_votes: int, seed: int) -> Verdicts:
        """Verdicts on points, each false with probability <= ``level``, on draws named by ``purpose``."""
        ...

    def harm(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:
        """Margin (N,) against the labels on draws named by ``purpose``: the same for all points of an image."""
        ...

    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:
        """Classes (N, K - 1) but the label, the most probable one first."""
        ...

    def inspect(self, x: Tensor, declared: bool) -> None:
        """Raise ModelError unless the model is a function of one image, and of its draws, on the images ``x``.

        declared: refuse a random model that is not said to be one.
        """
        ...

    def recheck(self) -> None:
        """Raise ModelError unless the model is still what it was when inspected; the end of an evaluation."""
        ...

    def fingerprint(self) -> str:
        """Return 64 hex digits that change with weights, noise, execution, decision and surrogate."""
        ...


def defend(
    model: Model,
    num_classes: int | None = None,
    decision: Decision | None = None,
    surrogate: nn.Module | None = None,
) -> Defender:
    """The defender of a model.

    model: a SmoothedClassifier, or an nn.Module from [0, 1] pixels to logits. decision: None for a deterministic
    module; for one that draws by itself at every call what it is used for: the class most often voted for ("vote"),
    that of the largest mean probability ("mean"), or that of one draw ("single"). surrogate: a module whose derivative
    stands in for the model's (BPDA).
    Raises: ModelError or InputError for what cannot be evaluated.
    """
    if not isinstance(model, SmoothedClassifier) and not isinstance(model, nn.Module):
        raise ModelError(f"model must be a SmoothedClassifier or a torch.nn.Module, got {type(model).__name__}")
    if surrogate is not None and not isinstance(surrogate, nn.Module):
        raise InputError(f"surrogate must be a torch.nn.Module, got {type(surrogate).__name__}")
    check_eval_mode(model.classifier if isinstance(model, SmoothedClassifier) else model)
    if surrogate is not None:
        check_eval_mode(surrogate)
    if isinstance(model, SmoothedClassifier):
        if decision is not None:
            raise InputError(f"decision={decision!r} is for modules that are random by themselves; leave it away")
        return SmoothedDefender(model, surrogate)
    if decision is None:
        return PlainDefender(model, num_classes or 0, surrogate)
    if decision not in get_args(Decision):
        raise InputError(f"unknown decision {decision!r}; allowed: {', '.join(get_args(Decision))}")
    return RandomDefender(model, num_classes or 0, decision, surrogate)


class PlainDefender:
    """A deterministic network, judged by its class at the point."""

    kind: Kind = "plain"
    transferable, single = False, False

    def __init__(self, model: nn.Module, num_classes: int, surrogate: nn.Module | None) -> None:
        self.model, self.num_classes, self._surrogate = model, num_classes, surrogate
        self.execution = Execution(device=device_of(model))
        self._watch: Watch | None = None

    def inspect(self, x: Tensor, declared: bool) -> None:
        random = _calls_differ(self.model, self.execution, x)
        if random and declared:
            raise ModelError(
                "the model gives other outputs for the same images from call to call, so it is random; say what it is "
                'used for: decision="vote" (the class most often given), "mean" (of the largest mean probability) or '
                '"single" (one draw)'
            )
        self._watch = _watch(self.model, self.execution, x, random)

    def recheck(self) -> None:
        if self._watch is not None:
            self._watch.conclude()

    def fingerprint(self) -> str:
        return _fingerprint(self, self.model, self._surrogate)

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:  # noqa: ARG002
        return _through(plain(self.model, self.execution), self._surrogate, self.execution)

    def judge(
        self,
        points: LabelledPixels,
        *,
        purpose: str,  # noqa: ARG002
        level: float,  # noqa: ARG002
        max_votes: int,  # noqa: ARG002
        seed: int,  # noqa: ARG002
    ) -> Verdicts:
        logits = plain_logits(self.model, self.execution, points.x)
        if self._watch is not None:
            self._watch.observe(_few(points.x))
        return judge_deterministic(logits, points.y)

    def harm(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:  # noqa: ARG002
        with torch.no_grad():
            return margin(self.execution.logits(self.model, points.x).cpu(), points.y)

    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:  # noqa: ARG002
        return _others(plain_logits(self.model, self.execution, images.x), images.y)


class SmoothedDefender:
    """A smoothed classifier, judged by votes under its noise."""

    kind: Kind = "random"
    transferable, single = True, False

    def __init__(self, smoothed: SmoothedClassifier, surrogate: nn.Module | None) -> None:
        self.smoothed, self._surrogate = smoothed, surrogate
        self.execution, self.num_classes = smoothed.execution, smoothed.num_classes

    def inspect(self, x: Tensor, declared: bool) -> None:  # noqa: ARG002
        """Count a tile of votes, the first of which are inspected, before anything is attacked."""
        few = _few(x)
        names = [str(row) for row in range(_FEW)]
        samples = max(1, self.execution.tile // _FEW)
        self.smoothed.counts(few, samples, self.smoothed.streams(0, "inspection", names))

    def recheck(self) -> None:
        self.smoothed.recheck()

    def fingerprint(self) -> str:
        return _fingerprint(self, self.smoothed.classifier, self._surrogate, noise=self.smoothed.noise)

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:
        if plan.gradient == "transfer":
            return _through(plain(self.smoothed.classifier, self.execution), self._surrogate, self.execution)
        generators = self.smoothed.streams(seed, f"{name}/noise", ids)
        if plan.gradient == "frozen":
            seen = frozen_noise(self.smoothed, x, plan.eot_samples, generators)
        else:
            seen = fresh_noise(self.smoothed, plan.eot_samples, generators)
        return _through(seen, self._surrogate, self.execution)

    def judge(self, points: LabelledPixels, *, purpose: str, level: float, max_votes: int, seed: int) -> Verdicts:
        return judge(self.smoothed, points, purpose=purpose, level=level, max_votes=max_votes, seed=seed)

    def harm(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:
        generators = self.smoothed.streams(seed, purpose, points.ids)
        return margin(self.smoothed.counts(points.x, CHOICE_VOTES, generators).float(), points.y)

    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:
        generators = self.smoothed.streams(seed, "targets", images.ids)
        with torch.no_grad():
            found = [
                self.smoothed.log_probs(images.x[row : row + 1].to(self.execution.device), _RANKING_DRAWS, [generator])
                for row, generator in enumerate(generators)
            ]
        return _others(torch.cat(found).cpu(), images.y)


class RandomDefender:
    """A network that draws by itself at every call, from the process's generators.

    Every draw is a call of its own, so that draws of one image are independent even where the network draws once for
    all rows of a call. The images of one call share a stream; it is named by the first of them.
    """

    kind: Kind = "random"
    transferable = False

    def __init__(self, model: nn.Module, num_classes: int, decision: Decision, surrogate: nn.Module | None) -> None:
        self.model, self.num_classes, self._decision, self._surrogate = model, num_classes, decision, surrogate
        self.execution = Execution(device=device_of(model))
        self.single = decision == "single"
        self._watch: Watch | None = None

    def inspect(self, x: Tensor, declared: bool) -> None:  # noqa: ARG002
        self._watch = _watch(self.model, self.execution, x, random=True)

    def recheck(self) -> None:
        if self._watch is not None:
            self._watch.conclude()

    def fingerprint(self) -> str:
        return _fingerprint(self, self.model, self._surrogate, decision=self._decision)

    @property
    def decision(self) -> Decision:
        """What the network is used for."""
        return self._decision

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:  # noqa: ARG002
        generator = stream(seed, f"{name}/noise", ids[0])
        fresh = fresh_draws(self.model, self.execution, max(1, plan.eot_samples), generator)
        return _through(pinned(fresh) if plan.gradient == "frozen" else fresh, self._surrogate, self.execution)

    def judge(self, points: LabelledPixels, *, purpose: str, level: float, max_votes: int, seed: int) -> Verdicts:
        y, names = points.y.numpy(), (points.ids[0], *pixel_ids(points.x))
        generator = stream(seed, f"verdict/{purpose}", *names)
        challenging = self._probabilities(points.x, BLOCK, stream(seed, f"challenger/{purpose}", *names))

        def draw(rows: list[int], number: int) -> NDArray[np.float64]:
            return self._probabilities(points.x[rows], number, generator)

        def count(rows: list[int], number: int) -> NDArray[np.int64]:
            blocks = [_votes(draw(rows, min(BLOCK, number - first))) for first in range(0, number, BLOCK)]
            return np.sum(blocks, axis=0)

        if self._decision == "mean":
            return judge_means(draw, challenging, y, level, max_votes)
        if self.single:
            return self._judge_single(count(list(range(len(y))), max_votes), challenging, y, level)
        return judge_votes(count, _votes(challenging), y, level, max_votes)

    def harm(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:
        found = self._probabilities(points.x, CHOICE_VOTES, stream(seed, purpose, points.ids[0]))
        # what the model is used for; among equal votes the means tell
        scores = found.mean(1) if self._decision == "mean" else _votes(found) + found.mean(1)
        return margin(torch.from_numpy(scores).float(), points.y)

    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:
        mean = self._probabilities(images.x, _RANKING_DRAWS, stream(seed, "targets", images.ids[0])).mean(1)
        return _others(torch.from_numpy(mean), images.y)

    @staticmethod
    def _judge_single(
        counts: NDArray[np.int64], challenging: NDArray[np.float64], y: NDArray[np.int64], level: float
    ) -> Verdicts:
        """A fixed number of draws, whose share that is right is what counts; *broken* and *held* say on which side of
        one half the probability is shown to be."""
        own = counts[np.arange(len(y)), y]
        rest = counts.sum(1) - own
        verdict = np.where(
            sign_test(rest, own) <= level, BROKEN, np.where(sign_test(own, rest) <= level, HELD, UNDECIDED)
        )
        others = np.where(np.arange(counts.shape[1]) == y[:, None], -1, counts)
        return Verdicts(verdict.astype(np.uint8), others.argmax(1), counts, counts.sum(1) + challenging.shape[1])

    def _probabilities(self, x: Tensor, draws: int, generator: torch.Generator) -> NDArray[np.float64]:
        """Probabilities (N, draws, K) of so many calls on the images ``x``."""
        found = []
        with torch.no_grad(), seeded(draw_seed(generator)):
            for _ in range(draws):
                logits = torch.cat([self.execution.logits(self.model, part) for part in x.split(self.execution.tile)])
                found.append(F.softmax(check_logits(logits, len(x)).double(), dim=1).cpu())
        return torch.stack(found, 1).numpy()


@torch.no_grad()
def _calls_differ(model: nn.Module, execution: Execution, x: Tensor) -> bool:
    """Return whether two calls on some of the images ``x`` differ by more than 0.1 % of the logits' spread."""
    return _unlike(*(check_logits(execution.logits(model, _few(x)), _FEW) for _ in range(2)))


@torch.no_grad()
def _watch(model: nn.Module, execution: Execution, x: Tensor, random: bool) -> Watch | None:
    """Inspect ``model`` on a few of the images ``x``; return what checks it later.

    A random model is called from the same seeds of the process's generators, so that rows which stay have the same
    draws. One that these seeds do not pin has generators of its own: the means of many draws are compared, and it is
    not checked again (None).

    Raises:
        ModelError: if an image's logits depend on the other images or, for a deterministic model, on its row.
    """
    check_structure(model)
    few = _few(x)

    def call(images: Tensor) -> Tensor:
        with torch.no_grad(), seeded(0) if random else nullcontext():
            return check_logits(execution.logits(model, images), len(images))

    logits = call(few)
    if random and _unlike(logits, call(few)):
        _check_means(call, few)
        return None
    for _ in compare_calls(call, few, movable=not random):
        pass  # a difference that may be rounding is worth no warning where no votes are counted
    return Watch(call, few, logits, movable=not random, spacing=1)


def _unlike(first: Tensor, second: Tensor) -> bool:
    return float((second - first).abs().max()) > 1e-3 * max(float(first.std()), 1e-12)


def _check_means(call: Callable[[Tensor], Tensor], few: Tensor) -> None:
    """Raise ModelError where mean logits over 128 draws change with the other images by 8 standard errors."""
    stay, replaced = with_others_replaced(few)
    alone, beside = (
        torch.stack([call(images)[stay].double() for _ in range(_MEAN_DRAWS)]) for images in (few, replaced)
    )
    errors = ((alone.var(0) + beside.var(0)) / _MEAN_DRAWS).sqrt()
    gaps = (alone.mean(0) - beside.mean(0)).abs()
    if bool((gaps > _STANDARD_ERRORS * errors + 1e-3 * alone.mean(0).std(1, keepdim=True)).any()):
        raise ModelError(
            "the model's logits of one image depend on the other images of a call: it must be a function of one image "
            "and of its own draws; remove batch statistics and whatever else mixes images"
        )


def _few(rows: Tensor) -> Tensor:
    """The first 16 rows, cyclically where there are fewer."""
    return rows[torch.arange(_FEW) % len(rows)]


def plain_logits(model: nn.Module, execution: Execution, x: Tensor) -> Tensor:
    """Logits (N, K) of a plain model on the CPU; ModelError when they have another shape or are not finite."""
    return check_logits(execution.tiled_logits(model, x), len(x)).cpu()


def _fingerprint(defender: Defender, model: nn.Module, surrogate: nn.Module | None, **facts: object) -> str:
    modules = {"model": model} if surrogate is None else {"model": model, "surrogate": surrogate}
    facts |= {"defender": type(defender).__name__, "execution": defender.execution, "classes": defender.num_classes}
    return fingerprint_of(modules, facts)


def _through(seen: LogProbs, surrogate: nn.Module | None, execution: Execution) -> LogProbs:
    return seen if surrogate is None else with_surrogate(seen, plain(surrogate, execution))


def _others(scores: Tensor, y: Tensor) -> Tensor:
    return scores.scatter(1, y[:, None], -torch.inf).argsort(stable=True, dim=1, descending=True)[:, :-1]


def _votes(probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
    classes = np.arange(probabilities.shape[2])
    return (probabilities.argmax(2)[:, :, None] == classes).sum(1).astype(np.int64)
