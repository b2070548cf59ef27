"""The rule of a certification, which is fixed before the first vote and stored with the votes."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, get_args

import numpy as np

from rush.certification.bounds import LAWS, RADIUS_DIGITS, certify_two_classes, largest_radius
from rush.certification.sequential import FixedSequence, reachable
from rush.choices import (
    CERTIFIED_NORM,
    LEVELS,
    TOTAL_VARIATION,
    CertifyMethod,
    Level,
    NoiseName,
    Norm,
    SequentialBound,
    Stopping,
    splitting_draws,
)
from rush.errors import InputError
from rush.runtime.numbers import as_real, is_one_of, least_whole, positive_integer, probability, sigma_of
from rush.statistics import most_by_chance

CLOPPER_PEARSON, TWO_CLASSES = FIXED = ("clopper-pearson", "two-classes")
"""Bounds of a number of votes that is fixed beforehand (``certification.bounds``)."""
_LATER = {"noise": "gaussian", "stopping": "test"}  # fields that tables of older versions omit
EXACT: Final = "exact"  # method and bound of splitting noise, all of whose draws vote


@dataclass(frozen=True)
class Rule:
    """Rule by which every image of a table is certified.

    Attributes:
        sigma: standard deviation of the noise, in pixel units.
        method: ``clopper-pearson`` draws ``num_estimation`` votes per image. ``sequential`` draws until it decides, at
            most that number. ``exact`` takes all draws of splitting noise: alpha, num_selection and futility are 0.
        bound: name of the bound or test martingale.
        alpha: probability of a false certificate.
        level: ``image`` applies alpha to each certificate, ``family`` to all ``num_images`` jointly.
        num_images: number of certificates that share alpha at level ``family``.
        num_selection: votes per image that select the class.
        num_estimation: votes per image that bound its probability.
        radii: the grid, ascending. None allows any radius.
        futility: probability at which a sequential run gives up a radius.
        noise: name of the noise. Tables of older versions omit it and mean "gaussian".
        stopping: how a sequential run gives up a radius (``certification.sequential``). It is "test" for tables of
            older versions, which omit it, and for any other method.
    """

    sigma: float
    method: CertifyMethod
    bound: str
    alpha: float
    level: Level
    num_images: int
    num_selection: int
    num_estimation: int
    radii: tuple[float, ...] | None
    futility: float
    noise: NoiseName = "gaussian"
    stopping: Stopping = "test"

    @property
    def norm(self) -> Norm:
        """Norm of the certified radii."""
        return CERTIFIED_NORM[self.noise]

    @property
    def exact(self) -> bool:
        """Whether all draws of the noise vote, so that nothing is left to chance."""
        return self.bound == EXACT

    @property
    def needs_every_class(self) -> bool:
        """Whether the rule needs, and blocks store, the votes of every class and not of the selected one only."""
        return self.method == "sequential" and self.bound == TWO_CLASSES

    @property
    def image_alpha(self) -> float:
        """Level of each single certificate: alpha, or alpha / num_images for the family (Bonferroni)."""
        return self.alpha if self.level == "image" else self.alpha / self.num_images

    @property
    def num_samples(self) -> int:
        """Largest number of samples per image, selection and estimation together."""
        return self.num_selection + self.num_estimation

    @property
    def largest_radius(self) -> float:
        """The largest radius that an image can be certified at under this rule."""
        if self.radii is not None:
            return self.radii[-1]
        return self.num_estimation // 2 / LEVELS if self.exact else self.radius_of_all_votes

    @property
    def radius_of_all_votes(self) -> float:
        """The radius that a fixed number of votes certifies when all of them agree, regardless of any grid."""
        if self.bound == CLOPPER_PEARSON:
            return largest_radius(self.num_estimation, self.sigma, self.image_alpha, self.noise)
        agreeing = np.array([[self.num_estimation, 0]])
        return float(certify_two_classes(agreeing, agreeing, self.sigma, self.image_alpha).radius[0])

    @property
    def statement(self) -> str:
        """A clause that states whether alpha covers each certificate or all of them jointly."""
        if self.exact:
            return "every certificate is exact: all draws of the noise vote, and no probability of error is left"
        return self.statement_at(self.alpha)

    def statement_at(self, alpha: float) -> str:
        """Return ``statement`` for another total level ``alpha``."""
        if self.level == "image":
            return f"each certificate by itself is false with probability at most {alpha:g}"
        return f"all {self.num_images:,} certificates hold together with probability at least {1 - alpha:g}"

    @property
    def slack(self) -> float:
        """Distance beyond a printed radius that a certificate still covers.

        Exact certificates cover 8-bit images up to the radius itself, which is printed rounded down.
        """
        return 0.5 / LEVELS if self.exact else 0.0

    def allowed_violations(self, images: int, verdict_level: float) -> int:
        """Return the largest number of certified ``images`` that may be judged broken in their balls by chance.

        ``verdict_level`` is the probability of a false verdict per image. Under an exact rule verdicts are exact, too.
        """
        return most_by_chance(images, 0.0 if self.exact else self.image_alpha + verdict_level)

    def null_probability(self, radius: float) -> float:
        """Return the probability that a class must be proven to exceed for ``radius`` to be certified.

        Under Gaussian noise it is Phi(radius / sigma), rounded up. Under discrete noise, votes follow the drawn noise
        and the theorem is about the exact noise, under which a class may be less probable by ``TOTAL_VARIATION``.
        """
        exact = null_probability(radius, self.sigma, self.noise)
        return exact + TOTAL_VARIATION if self.noise == "discrete" else exact

    def tests(self) -> FixedSequence:
        """The tests of a sequential rule."""
        assert self.radii is not None
        assert self.bound in get_args(SequentialBound)
        return FixedSequence(
            [self.null_probability(radius) for radius in self.radii],
            bound=self.bound,  # type: ignore[arg-type]
            level=self.image_alpha,
            futility=self.futility,
            cap=self.num_estimation,
            stopping=self.stopping,
        )

    def to_json(self) -> str:
        """Return the rule as one line, which ``from_json`` reads."""
        values = asdict(self)
        if self.stopping == "test":
            del values["stopping"]  # as older versions wrote it
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Rule":
        """Return the rule that ``to_json`` wrote.

        Raises:
            ValueError: ``text`` is not a rule.
        """
        values: dict[str, Any] = json.loads(text)
        if not isinstance(values, dict) or {*values, *_LATER} != {field.name for field in fields(cls)}:
            raise ValueError(f"{text!r} is not a certification rule")
        if not isinstance(values["radii"], list | None):
            raise ValueError(f"radii must be a list or null, got {values['radii']!r}")
        return make_rule(**{**_LATER, **values})


def make_rule(
    *,
    sigma: float,
    method: str | None,
    alpha: float,
    level: str,
    num_images: int,
    num_selection: int,
    num_estimation: int,
    radii: Sequence[float] | None,
    futility: float,
    bound: str | None = None,
    noise: str = "gaussian",
    stopping: str = "power",
) -> Rule:
    """Return a validated rule, whose fields are the arguments.

    Radii are rounded up to six decimals. A sequential rule without ``radii`` gets 0 and the multiples of sigma / 2
    within reach. Without ``bound``, the first bound of the method is used. Without ``method``, it is ``exact`` for
    splitting noise, for which only sigma and num_images matter, and ``clopper-pearson`` for any other noise.

    Raises:
        InputError: an argument is not allowed, or no radius could be certified.
    """
    bounds: dict[str, tuple[str, ...]] = {"clopper-pearson": FIXED, "sequential": get_args(SequentialBound)}
    exact = noise == "splitting"
    method = (EXACT if exact else CLOPPER_PEARSON) if method is None else method
    _check_one_of("method", method, get_args(CertifyMethod))
    if exact != (method == EXACT):
        raise InputError(
            f"method {EXACT!r} is for splitting noise and no other is, got method {method!r} and noise {noise!r}; omit "
            "the method"
        )
    if exact:
        return _exact_rule(sigma, num_images)
    _check_one_of("level", level, get_args(Level))
    _check_one_of("noise", noise, get_args(NoiseName))
    _check_one_of("stopping", stopping, get_args(Stopping))
    bound = bounds[method][0] if bound is None else bound
    _check_one_of(f"bound of method {method!r}", bound, bounds[method])
    if bound == TWO_CLASSES and CERTIFIED_NORM[noise] != "l2":  # type: ignore[index]
        raise InputError(f"the bound {TWO_CLASSES!r} is for Gaussian noise, got noise {noise!r}; omit it")
    free = Rule(
        num_selection=positive_integer("num_selection", num_selection),
        num_estimation=positive_integer("num_estimation", num_estimation),
        num_images=positive_integer("num_images", num_images),
        sigma=sigma_of(sigma),
        alpha=probability("alpha", alpha, 0.5),
        futility=probability("futility", futility, 0.5),
        method=method,  # type: ignore[arg-type]
        level=level,  # type: ignore[arg-type]
        bound=bound,
        radii=None,
        noise=noise,  # type: ignore[arg-type]
        stopping=stopping if method == "sequential" else "test",  # type: ignore[arg-type]
    )
    _check_enough(free)
    within = within_reach(free)
    if radii is not None:
        return replace(free, radii=_checked_grid(radii, within, free))
    return free if method == "clopper-pearson" else replace(free, radii=_default_grid(free, within))


def _exact_rule(sigma: float, num_images: int) -> Rule:
    sigma, num_images = sigma_of(sigma), positive_integer("num_images", num_images)
    return Rule(sigma, EXACT, EXACT, 0.0, "image", num_images, 0, splitting_draws(sigma), None, 0.0, "splitting")


def null_probability(radius: float, sigma: float, noise: NoiseName = "gaussian") -> float:
    """Return the class probability that certifies ``radius``, under Gaussian noise Phi(radius / sigma), rounded up."""
    return float(LAWS[noise].probability(radius * (1 + 1e-12), sigma) + 1e-14)


def within_reach(rule: Rule) -> Callable[[float], bool]:
    """Return a predicate: is a radius certified if all ``rule.num_estimation`` votes agree? The grid is ignored."""
    if rule.method == "clopper-pearson":
        ceiling = rule.radius_of_all_votes
        return lambda radius: radius <= ceiling
    return lambda radius: reachable(
        rule.bound,  # type: ignore[arg-type]
        rule.null_probability(radius),
        rule.image_alpha,
        rule.num_estimation,
    )


def fewest_estimation(rule: Rule) -> int | None:
    """Return the smallest ``num_estimation`` with which ``rule`` can certify a radius if all votes agree.

    It is None if no number of votes can, because sigma is so small that every radius is rounded down to 0.
    """
    return least_whole(lambda n: _certifies_something(replace(rule, num_estimation=n)))


def fewest_for(rule: Rule, radius: float) -> int | None:
    """Return the smallest ``num_estimation`` with which ``rule`` can certify ``radius`` if all votes agree, or None."""
    return least_whole(lambda n: within_reach(replace(rule, num_estimation=n))(radius))


def reach(rule: Rule) -> str:
    """Return a sentence that states, before any vote is drawn, what ``rule`` can certify if all votes agree."""
    if rule.exact:
        return (
            f"all {rule.num_estimation:,} draws of splitting noise vote, which certifies the exact {rule.norm} radius, "
            f"at most {rule.largest_radius:.6f}"
        )
    sizes = [f"{fewest_estimation(rule)} for any radius"]
    for name, radius in (("sigma", rule.sigma), ("2 sigma", 2 * rule.sigma)):
        fewest = fewest_for(rule, _six_decimals(radius))
        if fewest is not None:
            sizes.append(f"{fewest:,} for {name}")
    return (
        f"{rule.num_estimation:,} votes per image that all agree certify an {rule.norm} radius of at most "
        f"{_largest(within_reach(rule)):.6f}; the least number of votes is {', '.join(sizes)}"
    )


def _certifies_something(rule: Rule) -> bool:
    """Return whether all ``rule.num_estimation`` votes certify a radius if they agree. The grid is ignored."""
    if rule.method == "clopper-pearson":
        return rule.radius_of_all_votes > 0
    return within_reach(rule)(0.0)


def _check_enough(rule: Rule) -> None:
    if _certifies_something(rule):
        return
    fewest = fewest_estimation(rule)
    remedy = f"give at least {fewest}" if fewest is not None else "no number of votes suffices: give a larger sigma"
    raise InputError(
        f"num_estimation = {rule.num_estimation} certifies nothing with the bound {rule.bound!r}, sigma = "
        f"{rule.sigma:g}, at level {rule.image_alpha:g} per image, even if all votes agree; {remedy}"
    )


def _default_grid(rule: Rule, within: Callable[[float], bool]) -> tuple[float, ...]:
    multiples = (_six_decimals(half * rule.sigma / 2) for half in itertools.count())
    return tuple(itertools.takewhile(within, multiples))


def check_grid(radii: Sequence[float]) -> tuple[float, ...]:
    """Return ``radii`` as a grid: ascending, without duplicates, rounded up to six decimals.

    Raises:
        InputError: ``radii`` is not a sequence of finite numbers >= 0, or is empty.
    """
    try:
        values = list(radii)
    except TypeError:
        raise InputError(
            f"radii must be several numbers or None, got {radii!r}; for one radius give ({radii!r},)"
        ) from None
    numbers = [as_real(radius) for radius in values]
    for radius, number in zip(values, numbers, strict=True):
        if number is None or number < 0:
            raise InputError(f"radii must be finite numbers >= 0 in [0, 1] pixel units, got {radius!r}")
    grid = tuple(sorted({_six_decimals(number) for number in numbers if number is not None}))
    if not grid:
        raise InputError("radii is empty; give at least one radius, or None")
    return grid


def _checked_grid(radii: Sequence[float], within: Callable[[float], bool], rule: Rule) -> tuple[float, ...]:
    grid = check_grid(radii)
    if not within(grid[-1]):
        beyond = [radius for radius in grid if not within(radius)]
        raise InputError(
            f"radius {beyond[0]:g} cannot be certified with num_estimation = {rule.num_estimation} at level "
            f"{rule.image_alpha:g} per image, even if all votes agree: at most {_largest(within):.6f} can; "
            "give smaller radii, more samples or a larger sigma"
        )
    return grid


def _largest(within: Callable[[float], bool]) -> float:
    """Return the largest radius within reach, to a millionth, or 0."""
    low, high = 0, 1
    while within(high / 1e6):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle / 1e6) else (low, middle)
    return low / 1e6


def _six_decimals(radius: float) -> float:
    """Return ``radius`` rounded up to six decimals, unchanged if it has no more."""
    nearest = round(radius, RADIUS_DIGITS)
    return nearest if nearest >= radius else round(nearest + 10.0**-RADIUS_DIGITS, RADIUS_DIGITS)


def _check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not is_one_of(value, allowed):
        raise InputError(f"unknown {name} {value!r}; allowed: {', '.join(allowed)}")
