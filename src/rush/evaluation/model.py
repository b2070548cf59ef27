"""The defender: the model under evaluation, with one interface for deterministic, smoothed and stochastic models.

An attacker gets log-probabilities. The verdict gets votes, or probabilities, of draws that no attacker has seen. The
choice among an attacker's candidates gets votes of a third stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeAlias, get_args

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
    seeded_plain,
    with_surrogate,
)
from rush.attacks.losses import margin
from rush.choices import BLOCK, Decision
from rush.data.checks import LabelledPixels, pixel_ids
from rush.errors import InputError, ModelError
from rush.evaluation.plans import CHOICE_VOTES, Kind, Plan
from rush.evaluation.verdict import (
    Verdicts,
    VerdictSettings,
    judge_deterministic,
    judge_exactly,
    judge_means,
    judge_single,
    judge_votes,
    votes_of,
)
from rush.runtime.execution import Execution, check_eval_mode, device_of
from rush.runtime.numbers import is_one_of
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.fingerprint import fingerprint_of
from rush.smoothing.inspection import Watch, check_logits, check_structure, compare_calls, with_others_replaced
from rush.smoothing.splitting import Splitting

Model: TypeAlias = nn.Module | SmoothedClassifier

_RANKING_DRAWS = 64
_FEW = 16  # images on which a module without noise of its own is inspected
_MEAN_DRAWS, _STANDARD_ERRORS = 128, 8


class Defender(ABC):
    """The model under evaluation.

    Attributes:
        kind: "plain" for a deterministic model, "random" for one that draws.
        model: the network.
        execution: where and in what precision it runs.
        num_classes: number of classes, K, 0 while unknown.
        surrogate: network whose derivative stands in for the model's.
        transferable: whether a random model has a base network without noise, which an attacker may ascend.
        decision: what a stochastic network is used for.
        single: whether a random model is used with one draw, so that no verdict on a point is final.
        eight_bit: whether it takes 8-bit images only, to which attacked points are rounded.
        exact: whether a random model's verdicts are exact, because all of its draws vote.
    """

    kind: Kind
    transferable, single, eight_bit, exact = False, False, False, False
    decision: Decision | None = None

    def __init__(self, model: nn.Module, execution: Execution, num_classes: int, surrogate: nn.Module | None) -> None:
        self.model, self.execution, self.num_classes, self.surrogate = model, execution, num_classes, surrogate
        self._watch: Watch | None = None

    @abstractmethod
    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:
        """Return the function that the attacker of ``plan`` sees on the images ``x`` (B, C, H, W).

        Its draws are named by ``name``.
        """

    @abstractmethod
    def judge(self, points: LabelledPixels, purpose: str, settings: VerdictSettings) -> Verdicts:
        """Return verdicts on points, each false with probability <= ``settings.level``. ``purpose`` names the draws."""

    @abstractmethod
    def choice_margin(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:
        """Return the margin (N,) of the best other class over the label, on draws that all points of an image share."""

    @abstractmethod
    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:
        """Return the classes (N, K - 1) other than the label, the most probable one first."""

    @abstractmethod
    def inspect(self, x: Tensor, declared: bool) -> None:
        """Raise ModelError unless the model is a function of one image, and of its draws, on the images ``x``.

        Args:
            declared: whether to refuse a random model that is not declared to be one.
        """

    def recheck(self) -> None:
        """Raise ModelError if the model has changed since its inspection. An evaluation ends with this check."""
        if self._watch is not None:
            self._watch.conclude()

    def fingerprint(self) -> str:
        """Return 64 hex digits that change with weights, noise, execution, decision and surrogate."""
        modules = {"model": self.model} | ({} if self.surrogate is None else {"surrogate": self.surrogate})
        facts = {"defender": type(self).__name__, "execution": self.execution, "classes": self.num_classes}
        return fingerprint_of(modules, facts | self._facts())

    def _facts(self) -> dict[str, object]:
        """Return the other facts that determine the answers, for ``fingerprint``."""
        return {}

    def _seen(self, log_probs: LogProbs, seed: int, name: str, ids: Sequence[str]) -> LogProbs:
        """Return ``log_probs`` with the surrogate's derivative, where there is a surrogate."""
        if self.surrogate is None:
            return log_probs
        generator = stream(seed, f"{name}/surrogate", ids[0])  # the surrogate may be stochastic
        return with_surrogate(log_probs, seeded_plain(self.surrogate, self.execution, generator))


def defend(
    model: Model,
    num_classes: int | None = None,
    decision: Decision | None = None,
    surrogate: nn.Module | None = None,
) -> Defender:
    """Return the defender of a model.

    Args:
        model: a SmoothedClassifier, or an nn.Module from [0, 1] pixels (B, C, H, W) to logits (B, K).
        num_classes: number of classes of an nn.Module, where it is known.
        decision: None for a deterministic module. For a stochastic one, what it is used for: the class most often
            voted for ("vote"), that of the largest mean probability ("mean"), or that of one draw ("single").
        surrogate: a module whose derivative stands in for the model's (BPDA).

    Raises:
        ModelError: the model is of another type, or in training mode.
        InputError: the surrogate or the decision cannot be used.
    """
    if not isinstance(model, SmoothedClassifier | nn.Module):
        raise ModelError(f"model must be a SmoothedClassifier or a torch.nn.Module, got {type(model).__name__}")
    if surrogate is not None and not isinstance(surrogate, nn.Module):
        raise InputError(f"surrogate must be a torch.nn.Module, got {type(surrogate).__name__}")
    check_eval_mode(model.classifier if isinstance(model, SmoothedClassifier) else model)
    if surrogate is not None:
        check_eval_mode(surrogate)
    if isinstance(model, SmoothedClassifier):
        if decision is not None:
            raise InputError(f"decision={decision!r} is for stochastic modules; omit it for a smoothed classifier")
        return (ExactDefender if isinstance(model.noise, Splitting) else SmoothedDefender)(model, surrogate)
    if decision is None:
        return PlainDefender(model, num_classes or 0, surrogate)
    if not is_one_of(decision, get_args(Decision)):
        raise InputError(f"unknown decision {decision!r}; allowed: {', '.join(get_args(Decision))}")
    return RandomDefender(model, num_classes or 0, decision, surrogate)


class PlainDefender(Defender):
    """A deterministic network, judged by its class at the point."""

    kind: Kind = "plain"

    def __init__(self, model: nn.Module, num_classes: int, surrogate: nn.Module | None) -> None:
        super().__init__(model, Execution(device=device_of(model)), num_classes, surrogate)

    def inspect(self, x: Tensor, declared: bool) -> None:
        with torch.no_grad():
            calls = [check_logits(self.execution.logits(self.model, _few(x)), _FEW) for _ in range(2)]
        random = _unlike(*calls)
        if random and declared:
            raise ModelError(
                "the model gives other outputs for the same images from call to call, so it is random; say what it is "
                'used for: decision="vote" (the class most often given), "mean" (of the largest mean probability) or '
                '"single" (one draw)'
            )
        self._watch = _watch(self.model, self.execution, x, random)

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:  # noqa: ARG002
        return self._seen(plain(self.model, self.execution), seed, name, ids)

    def judge(self, points: LabelledPixels, purpose: str, settings: VerdictSettings) -> Verdicts:  # noqa: ARG002
        logits = plain_logits(self.model, self.execution, points.x)
        if self._watch is not None:
            self._watch.observe(_few(points.x))
        return judge_deterministic(logits, points.y)

    def choice_margin(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:  # noqa: ARG002
        with torch.no_grad():
            return margin(self.execution.logits(self.model, points.x).cpu(), points.y)

    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:  # noqa: ARG002
        return _others(plain_logits(self.model, self.execution, images.x), images.y)


class SmoothedDefender(Defender):
    """A smoothed classifier, judged by votes under its noise.

    The noise of a verdict comes from ``stream(seed, "challenger/<purpose>", id, hash)`` and ``stream(seed,
    "verdict/<purpose>", id, hash)``, where the hash is that of the point's float32 pixels. No attack draws from these
    streams, and no point can be fitted to noise that changes with it.
    """

    kind: Kind = "random"
    transferable = True

    def __init__(self, smoothed: SmoothedClassifier, surrogate: nn.Module | None) -> None:
        super().__init__(smoothed.classifier, smoothed.execution, smoothed.num_classes, surrogate)
        self.smoothed, self.eight_bit = smoothed, smoothed.noise.eight_bit

    def inspect(self, x: Tensor, declared: bool) -> None:  # noqa: ARG002
        """Check the images and count a tile of votes, the first of which are inspected, before anything is attacked."""
        self.smoothed.noise.check(x)
        names = [str(row) for row in range(_FEW)]
        samples = max(1, self.execution.rows(x.shape[1:]) // _FEW)
        self.smoothed.counts(_few(x), samples, self.smoothed.streams(0, "inspection", names))

    def recheck(self) -> None:
        self.smoothed.recheck()

    def _facts(self) -> dict[str, object]:
        return {"noise": self.smoothed.noise}

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:
        if plan.gradient == "transfer":
            return self._seen(plain(self.model, self.execution), seed, name, ids)
        generators = self.smoothed.streams(seed, f"{name}/noise", ids)
        if plan.gradient == "frozen":
            return self._seen(frozen_noise(self.smoothed, x, plan.eot_samples, generators), seed, name, ids)
        return self._seen(fresh_noise(self.smoothed, plan.eot_samples, generators), seed, name, ids)

    def judge(self, points: LabelledPixels, purpose: str, settings: VerdictSettings) -> Verdicts:
        """Return the verdicts on points, see ``Defender.judge``.

        Cost: 200 to 100 + ``settings.max_votes`` forward passes per point.
        """
        names = points.ids, pixel_ids(points.x)
        challengers = self.smoothed.streams(settings.seed, f"challenger/{purpose}", *names)
        challenging = self.smoothed.counts(points.x, BLOCK, challengers)
        generators = self.smoothed.streams(settings.seed, f"verdict/{purpose}", *names)

        def count(rows: list[int], number: int) -> NDArray[np.int64]:
            return self.smoothed.counts(points.x[rows], number, [generators[row] for row in rows]).numpy()

        return judge_votes(count, challenging.numpy(), points.y.numpy(), settings.level, settings.max_votes)

    def choice_margin(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:
        generators = self.smoothed.streams(seed, purpose, points.ids)
        return margin(self.smoothed.counts(points.x, CHOICE_VOTES, generators).float(), points.y)

    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:
        generators = self.smoothed.streams(seed, "targets", images.ids)
        with torch.no_grad():
            log_probs = [
                self.smoothed.log_probs(images.x[row : row + 1].to(self.execution.device), _RANKING_DRAWS, [generator])
                for row, generator in enumerate(generators)
            ]
        return _others(torch.cat(log_probs).cpu(), images.y)


class ExactDefender(SmoothedDefender):
    """A classifier smoothed by splitting noise, judged by the votes of all draws: every verdict is exact."""

    exact = True

    def judge(self, points: LabelledPixels, purpose: str, settings: VerdictSettings) -> Verdicts:  # noqa: ARG002
        """Return the verdicts on points, see ``Defender.judge``.

        Cost: ``num_draws`` forward passes per point.
        """
        return judge_exactly(self.smoothed.all_votes(points.x).sum(1).numpy(), points.y.numpy())


class RandomDefender(Defender):
    """A stochastic network, which draws from the process's generators at every call.

    Every draw is a separate call, so that draws of one image are independent even where the network draws once for all
    rows of a call. The images of one call share a stream, which is named by the first of them.
    """

    kind: Kind = "random"

    def __init__(self, model: nn.Module, num_classes: int, decision: Decision, surrogate: nn.Module | None) -> None:
        super().__init__(model, Execution(device=device_of(model)), num_classes, surrogate)
        self.decision, self.single = decision, decision == "single"

    def inspect(self, x: Tensor, declared: bool) -> None:  # noqa: ARG002
        self._watch = _watch(self.model, self.execution, x, random=True)

    def _facts(self) -> dict[str, object]:
        return {"decision": self.decision}

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:  # noqa: ARG002
        generator = stream(seed, f"{name}/noise", ids[0])
        fresh = fresh_draws(self.model, self.execution, max(1, plan.eot_samples), generator)
        return self._seen(pinned(fresh) if plan.gradient == "frozen" else fresh, seed, name, ids)

    def judge(self, points: LabelledPixels, purpose: str, settings: VerdictSettings) -> Verdicts:
        y, names = points.y.numpy(), (points.ids[0], *pixel_ids(points.x))
        generator = stream(settings.seed, f"verdict/{purpose}", *names)
        challenger = stream(settings.seed, f"challenger/{purpose}", *names)
        challenging = self._probabilities(points.x, BLOCK, challenger)

        def draw(rows: list[int], number: int) -> NDArray[np.float64]:
            return self._probabilities(points.x[rows], number, generator)

        def count(rows: list[int], number: int) -> NDArray[np.int64]:
            blocks = [votes_of(draw(rows, min(BLOCK, number - first))) for first in range(0, number, BLOCK)]
            return np.sum(blocks, axis=0)

        if self.decision == "mean":
            return judge_means(draw, challenging, y, settings.level, settings.max_votes)
        if self.single:
            return judge_single(count([*range(len(y))], settings.max_votes), challenging.shape[1], y, settings.level)
        return judge_votes(count, votes_of(challenging), y, settings.level, settings.max_votes)

    def choice_margin(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:
        probabilities = self._probabilities(points.x, CHOICE_VOTES, stream(seed, purpose, points.ids[0]))
        means = probabilities.mean(1)
        # scored by what the model is used for; the means decide between equal votes
        scores = means if self.decision == "mean" else votes_of(probabilities) + means
        return margin(torch.from_numpy(scores).float(), points.y)

    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:
        mean = self._probabilities(images.x, _RANKING_DRAWS, stream(seed, "targets", images.ids[0])).mean(1)
        return _others(torch.from_numpy(mean), images.y)

    def _probabilities(self, x: Tensor, draws: int, generator: torch.Generator) -> NDArray[np.float64]:
        """Return the class probabilities (N, draws, K) of ``draws`` calls on the images ``x``."""
        probabilities = []
        with torch.no_grad(), seeded(draw_seed(generator)):
            for _ in range(draws):
                parts = x.split(self.execution.rows(x.shape[1:]))
                logits = torch.cat([self.execution.logits(self.model, part) for part in parts])
                probabilities.append(F.softmax(check_logits(logits, len(x)).double(), dim=1).cpu())
        return torch.stack(probabilities, 1).numpy()


@torch.no_grad()
def _watch(model: nn.Module, execution: Execution, x: Tensor, random: bool) -> Watch | None:
    """Inspect ``model`` on a few of the images ``x`` and return what checks it later.

    A random model is called from the same seeds of the process's generators, so that rows which stay have the same
    draws. A model whose draws these seeds do not determine has generators of its own. The means of many draws are then
    compared, and the model is not checked again (None).

    Raises:
        ModelError: an image's logits depend on the other images or, for a deterministic model, on its row.
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
    for _ in compare_calls(call, few, movable=not random, logits=logits):
        pass  # a difference that may be rounding is worth no warning where no votes are counted
    return Watch(call, few, logits, movable=not random, spacing=1)


def _unlike(first: Tensor, second: Tensor) -> bool:
    """Return whether two logits differ by more than 0.1 % of the first one's spread."""
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
    """Return the first 16 rows, repeated cyclically where there are fewer."""
    return rows[torch.arange(_FEW) % len(rows)]


def plain_logits(model: nn.Module, execution: Execution, x: Tensor) -> Tensor:
    """Return the logits (N, K) of a deterministic model, on the CPU.

    Raises:
        ModelError: they have another shape or are not finite.
    """
    return check_logits(execution.tiled_logits(model, x), len(x)).cpu()


def _others(scores: Tensor, y: Tensor) -> Tensor:
    """Return the classes (N, K - 1) other than the label ``y``, sorted by descending score (N, K)."""
    return scores.scatter(1, y[:, None], -torch.inf).argsort(stable=True, dim=1, descending=True)[:, :-1]
