"""Networks that draw by themselves: verdicts where their probabilities are known exactly, and what is refused."""

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import rush
from attacked import Detached
from exact_models import HalfSpace, Recorder, bins_with, square_half_space, square_images
from random_models import Drawn, ManySources, NoisyHalfSpace, SharedNoise, split_decision
from rush.attacks.gradient import is_random
from rush.attacks.threat import ThreatModel
from rush.choices import Decision
from rush.data.checks import LabelledPixels
from rush.errors import InputError, ModelError
from rush.evaluation import model as defenders
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import Defender, Model, defend
from rush.evaluation.plans import Plan
from rush.evaluation.result import AttackResult
from rush.evaluation.verdict import BROKEN, HELD, UNDECIDED, Verdicts, VerdictSettings, looks
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier

SPREAD = 0.25
NOISY = [NoisyHalfSpace, SharedNoise, ManySources]
BALL = ThreatModel("l2", 0.1)


def _noisy(kind: type[NoisyHalfSpace]) -> NoisyHalfSpace:
    """The plane of ``square_half_space`` with noise in the score."""
    return kind(torch.full((1, 2, 2), 0.5), -1.0, SPREAD)


def _points(count: int, y: int = 0) -> LabelledPixels:
    x = torch.full((count, 1, 2, 2), 0.5)
    return LabelledPixels(x, torch.full((count,), y), tuple(map(str, range(count))))


def _images(count: int) -> tuple[Tensor, Tensor]:
    """Images on both sides of the plane, all labelled 1."""
    return square_images(np.linspace(-0.2, 0.2, count), seed=0), torch.ones(count, dtype=torch.int64)


def _judged(
    model: nn.Module, decision: Decision, points: LabelledPixels, level: float, max_votes: int, seed: int = 0
) -> Verdicts:
    return defend(model, 2, decision).judge(points, "test", VerdictSettings(level, max_votes, seed))


def _clean(model: Model, images: tuple[Tensor, Tensor], **given: object) -> AttackResult:
    return rush.attack(model, images, BALL, "none", **given)  # type: ignore[arg-type]


# Verdicts


@pytest.mark.parametrize("decision", ["vote", "mean"])
@pytest.mark.parametrize("kind", NOISY)
def test_verdicts_are_right_on_either_side_of_a_noisy_plane(kind: type[NoisyHalfSpace], decision: Decision) -> None:
    """P(class 1) from 0.12 to 0.88 (0.35 and 0.65 the nearest to one half), also where one draw serves all images of a
    call: draws of one image are independent. Odds of failing by chance: 0.001 for each of 20 verdicts by the level,
    < 1e-12 in truth; a point near the plane stays undecided at 6,400 votes with probability < 1e-9."""
    network, margins = _noisy(kind), np.repeat([-0.3, -0.2, -0.1, 0.1, 0.2, 0.3], 2)
    x, y = square_images(margins, seed=0), torch.tensor([0, 1]).repeat(6)
    right = (y.numpy() == 1) == (margins > 0)
    result = _clean(network, (x, y), decision=decision)
    assert result.held.tolist() == right.tolist()
    assert result.broken.tolist() == (~right).tolist()
    votes = result.counts.sum(1)
    tails = stats.binom(votes, network.chance(x))
    assert np.minimum(tails.cdf(result.counts[:, 1]), tails.sf(result.counts[:, 1] - 1)).min() > 1e-7
    assert ((votes >= 100) & (votes <= 10_000)).all()
    assert (result.votes == votes + 100).all()


@pytest.mark.parametrize("kind", [NoisyHalfSpace, SharedNoise])
def test_draws_of_an_image_are_independent_and_those_of_a_call_are_the_networks(kind: type[NoisyHalfSpace]) -> None:
    """2,000 draws of two images on the plane: of an image a draw says nothing about the next one, of a call the second
    image's is the first one's where the network shares it. Odds of failing by chance: 5 standard errors, < 1e-6."""
    seen: list[Tensor] = []
    network = _noisy(kind)
    network.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits[:2, 1].detach()))
    x = square_images(np.zeros(2), seed=0)
    points = LabelledPixels(x, torch.tensor([0, 0]), ("a", "b"))
    _judged(network, "single", points, 0.01, 2000)
    scores = torch.stack(seen)[-2000:].numpy()
    after = np.corrcoef(scores[1:, 0], scores[:-1, 0])[0, 1]
    beside = np.corrcoef(scores[:, 0], scores[:, 1])[0, 1]
    assert abs(after) < 5 / 2000**0.5
    assert beside == pytest.approx(1.0) if kind is SharedNoise else abs(beside) < 5 / 2000**0.5


@pytest.mark.parametrize(("decision", "top"), [("vote", 0), ("mean", 1)])
def test_vote_and_mean_decide_where_they_disagree(decision: Decision, top: int) -> None:
    """Class 0 has 0.6 of the votes and a mean probability of 0.334. Odds of failing by chance: < 1e-9."""
    network = split_decision()
    assert network.vote.argmax() == 0
    assert network.mean.argmax() == 1
    x = square_images(np.linspace(-0.3, 0.3, 6), seed=0)
    for label in (0, 1):
        result = _clean(network, (x, torch.full((6,), label)), decision=decision)
        assert (result.held if label == top else result.broken).all()
        assert abs(result.right.mean() - network.vote[label]) < 0.1  # of votes, whatever the decision is


@pytest.mark.parametrize("decision", ["vote", "mean"])
def test_a_label_must_beat_every_class_to_hold_and_one_class_breaks_it(decision: Decision) -> None:
    """Three classes of 0.5, 0.4 and 0.1, by votes and by means. Odds of failing by chance: < 1e-9."""
    network = Drawn([0.5, 0.4, 0.1], [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
    x = square_images(np.linspace(-0.3, 0.3, 4), seed=0)
    verdicts = [_clean(network, (x, torch.full((4,), label)), decision=decision).verdict for label in range(3)]
    assert (np.array(verdicts) == np.array([[HELD], [BROKEN], [BROKEN]])).all()


# The level at a tie, where every verdict is false


def coin() -> Drawn:
    """All or nothing, at equal odds."""
    return Drawn([0.5, 0.5], [[1.0, 0.0], [0.0, 1.0]])


def skewed() -> Drawn:
    """Means tie at 0.5 each; one draw in ten is far from it, nine are 0.05 off."""
    return Drawn([0.1, 0.9], [[0.95, 0.05], [0.45, 0.55]])


def chance_of_broken(stops: Sequence[int], wins_needed: Callable[[int], int]) -> float:
    """P(*broken*) = P(*held*) for a fair coin, whose wins are looked at after these numbers of draws."""
    alive, found, before = np.ones(1), 0.0, 0
    for now in stops:
        alive = np.convolve(alive, stats.binom.pmf(np.arange(now - before + 1), now - before, 0.5))
        needed = wins_needed(now)
        found += float(alive[needed:].sum())
        alive[needed:] = 0
        alive[: now - needed + 1] = 0  # the other class has won
        before = now
    return found


def wins_by_means(level: float) -> Callable[[int], int]:
    """Fewest wins of n at which the mean over eight b of (1 + b)^wins (1 - b)^losses reaches 1 / level."""
    bets = 0.98 / 2.0 ** np.arange(8)

    def needed(draws: int) -> int:
        wins = np.arange(draws + 1)[:, None]
        logs = wins * np.log1p(bets) + (draws - wins) * np.log1p(-bets)
        shown = np.logaddexp.reduce(logs, 1) - np.log(8) >= np.log(1 / level)
        return int(np.argmax(shown))

    return needed


def wins_by_votes(level: float, max_votes: int) -> Callable[[int], int]:
    """Fewest wins of n at which the sign test is significant at the level's share of one look."""
    share = level / len(looks(max_votes))
    return lambda draws: int(np.argmax(stats.binom.sf(np.arange(draws + 1) - 1, draws, 0.5) <= share))


@pytest.mark.parametrize(
    ("decision", "level", "most", "points"), [("vote", 0.05, 400, 3000), ("mean", 0.2, 1600, 2000)]
)
def test_false_verdicts_on_a_fair_coin_are_as_frequent_as_computed_and_below_the_level(
    decision: Decision, level: float, most: int, points: int
) -> None:
    """In truth 0.035 by votes and 0.036 by means. Odds of failing by chance: 4e-6. A level twice as large, of 0.083 and
    0.090 in truth, would pass with probability < 1e-6."""

    def exact(level: float) -> float:
        if decision == "mean":
            return chance_of_broken(range(100, most + 1, 100), wins_by_means(level))
        return chance_of_broken(looks(most), wins_by_votes(level, most))

    assert exact(level) <= level
    low, high = stats.binom(points, exact(level)).isf([1 - 1e-6, 1e-6])
    assert high < stats.binom.isf(1e-6, points, level)
    assert stats.binom.cdf(high, points, exact(2 * level)) < 1e-6
    found = _judged(coin(), decision, _points(points), level, most).verdict
    doubled = _judged(coin(), decision, _points(points), 2 * level, most).verdict
    for kind in (BROKEN, HELD):
        assert low <= (found == kind).sum() <= high
        assert (doubled == kind).sum() > high


@pytest.mark.parametrize("y", [0, 1])
def test_false_verdicts_by_means_stay_below_the_level_also_where_draws_are_skewed(y: int) -> None:
    """2,000 points at a tie of the means that votes would decide at once. Odds of failing by chance: 2e-6."""
    network = skewed()
    assert network.mean[0] == pytest.approx(0.5, abs=1e-7)
    found = _judged(network, "mean", _points(2000, y=y), 0.05, 400).verdict
    for kind in (BROKEN, HELD):
        assert (found == kind).sum() <= stats.binom.isf(1e-6, 2000, 0.05)
    by_votes = _judged(network, "vote", _points(20, y=y), 0.05, 400).verdict
    assert (by_votes == (HELD if y == 1 else BROKEN)).all()


def test_a_mean_beyond_the_tie_is_decided_and_one_at_the_tie_is_not() -> None:
    """0.47 against 0.53, and the tie, at the default level: the power of the test and its silence. Odds of failing by
    chance: 0.001 a point at the tie; more than 3 of 50 with probability < 1e-5."""
    off = Drawn([0.1, 0.9], [[0.95, 0.05], [0.4167, 0.5833]])
    assert off.mean[1] == pytest.approx(0.53, abs=1e-4)
    assert (_judged(off, "mean", _points(50, y=1), 0.001, 10_000).verdict == HELD).all()
    assert (_judged(off, "mean", _points(50, y=0), 0.001, 10_000).verdict == BROKEN).all()
    assert (_judged(skewed(), "mean", _points(50), 0.001, 1600).verdict == UNDECIDED).sum() >= 47


# One draw


@pytest.mark.parametrize("kind", NOISY)
def test_single_gives_the_mean_probability_of_being_right(kind: type[NoisyHalfSpace]) -> None:
    """40 images of known probability, 2,500 draws each. Odds of failing by chance: 5 standard errors, < 1e-6; where
    images share their draws the error may be as large as one image's, 0.01."""
    network, margins = _noisy(kind), np.linspace(-0.3, 0.4, 40)
    x, y = square_images(margins, seed=0), torch.ones(40, dtype=torch.int64)
    chance = network.chance(x)
    result = _clean(network, (x, y), decision="single", max_votes=2500)
    exact = chance.mean()
    error = 0.01 if kind is SharedNoise else float(np.sqrt((chance * (1 - chance)).sum() / 2500) / 40)
    assert abs(result.robust_accuracy - exact) < 5 * error
    assert result.robust_accuracy == result.robust_accuracy_lower == pytest.approx(result.right.mean())
    assert result.interval.low < exact < result.interval.high
    assert (result.counts.sum(1) == 2500).all()
    tails = stats.binom(2500, chance)
    assert np.minimum(tails.cdf(result.counts[:, 1]), tails.sf(result.counts[:, 1] - 1)).min() > 1e-8
    clear = np.abs(chance - 0.5) > 0.1
    assert (result.verdict[clear] == np.where(chance > 0.5, HELD, BROKEN)[clear]).all()


@pytest.mark.parametrize("kind", [NoisyHalfSpace, SharedNoise])
def test_the_interval_of_single_covers_the_mean_over_all_images(kind: type[NoisyHalfSpace]) -> None:
    """50 data sets of 30 images, whose margins are uniform in [-0.2, 0.5], at the fewest draws there are. The interval
    may miss 5 in 100; odds of failing by chance: 1e-6."""
    network, law = _noisy(kind), stats.uniform(-0.2, 0.7)
    exact = law.expect(lambda margin: stats.norm.cdf(margin / SPREAD))
    missed = 0
    for number in range(50):
        margins = law.rvs(30, random_state=np.random.default_rng(number))
        x = square_images(margins, seed=number)
        images = x, torch.ones(30, dtype=torch.int64)
        interval = _clean(network, images, decision="single", max_votes=100, seed=number).interval
        missed += not interval.low <= exact <= interval.high
    assert missed <= stats.binom.isf(1e-6, 50, 0.05)


# The other questions that a defender answers


def test_judging_follows_its_seed_and_purpose_and_no_global_generator() -> None:
    network, x = _noisy(ManySources), square_images(np.linspace(-0.1, 0.1, 8), seed=0)
    points = LabelledPixels(x, torch.ones(8, dtype=torch.int64), tuple("abcdefgh"))
    defender = defend(network, 2, "vote")

    def counts(purpose: str, seed: int) -> list[list[int]]:
        return defender.judge(points, purpose, VerdictSettings(1e-6, 400, seed)).counts.tolist()

    first = counts("test", 0)
    torch.rand(7)
    np.random.random(3)  # noqa: NPY002
    assert counts("test", 0) == first
    assert counts("other", 0) != first
    assert counts("test", 1) != first


def test_attack_choice_challenger_and_verdict_draw_from_seeds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seed that is drawn, by the name of its stream. Two of them are equal by chance with probability < 1e-6."""
    owner: dict[int, str] = {}
    kept: list[torch.Generator] = []
    drawn: list[tuple[str, int]] = []
    draw_seed = defenders.draw_seed

    def named(seed: int, *names: str) -> torch.Generator:
        kept.append(stream(seed, *names))
        owner[id(kept[-1])] = names[0].split("/")[0]
        return kept[-1]

    def recorded(generator: torch.Generator) -> int:
        drawn.append((owner[id(generator)], draw_seed(generator)))
        return drawn[-1][1]

    monkeypatch.setattr(defenders, "stream", named)
    for module in ("rush.evaluation.model", "rush.attacks.gradient"):
        monkeypatch.setattr(f"{module}.draw_seed", recorded)
    x = square_images(np.array([0.1, -0.1, 0.05]), seed=0)
    y = torch.tensor([1, 0, 1])
    rush.attack(_noisy(NoisyHalfSpace), (x, y), BALL, steps=3, targets=[1], eot_samples=5, decision="vote")
    assert {name for name, _ in drawn} == {"attack", "choice", "challenger", "verdict", "targets"}
    choice = [seed for name, seed in drawn if name == "choice"]
    others = [seed for name, seed in drawn if name != "choice"]
    assert len(choice) == 2
    assert len(set(choice)) == 1  # the same for both candidates
    assert len({*others, *choice}) == len(others) + 1
    assert sum(name == "attack" for name, _ in drawn) == 4  # fresh at every step and at the last look


def test_an_attack_on_a_drawing_network_is_the_same_whatever_the_global_generators_are() -> None:
    network, (x, y) = _noisy(ManySources), _images(8)

    def attacked() -> AttackResult:
        return rush.attack(network, (x, y), BALL, steps=3, eot_samples=2, decision="vote", max_votes=400)

    first = attacked()
    torch.rand(7)
    np.random.random(3)  # noqa: NPY002
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
    second = attacked()
    assert torch.equal(first.adversarial, second.adversarial)
    assert first.counts.tolist() == second.counts.tolist()
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize("decision", ["vote", "mean", "single", None])
def test_the_choice_margin_is_measured_on_the_same_draws_for_all_points_of_an_image(decision: Decision | None) -> None:
    """Also where one image has moved; None is the smoothed plane."""
    plane = square_half_space()
    model: Model = SmoothedClassifier(plane, SPREAD, 2) if decision is None else _noisy(NoisyHalfSpace)
    defender = defend(model, 2, decision)
    x, y = _images(6)
    ids = tuple("abcdef")
    first = defender.choice_margin(LabelledPixels(x, y, ids), "choice", 0)
    assert torch.equal(defender.choice_margin(LabelledPixels(x.clone(), y, ids), "choice", 0), first)
    moved = x.clone()
    moved[3] = (moved[3] - 0.1).clamp(0, 1)
    second = defender.choice_margin(LabelledPixels(moved, y, ids), "choice", 0)
    assert second[3] > first[3]
    assert torch.equal(second[[0, 1, 2, 4, 5]], first[[0, 1, 2, 4, 5]])
    assert not torch.equal(defender.choice_margin(LabelledPixels(x, y, ids), "choice", 1), first)


class Undecided(nn.Module):
    """At the bright image class 1 wins 2 votes in 3 by a hair and loses the mean; at the dark one it wins 1 vote in 3
    for sure, and the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.bright = Drawn([2 / 3, 1 / 3], [[0.45, 0.55], [0.99, 0.01]], shared=True)
        self.dark = Drawn([2 / 3, 1 / 3], [[0.55, 0.45], [0.01, 0.99]], shared=True)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        is_bright = x.flatten(1).mean(1, keepdim=True) > 0.5
        return torch.where(is_bright, self.bright(x), self.dark(x))


@pytest.mark.parametrize(("decision", "worse"), [("vote", "bright"), ("single", "bright"), ("mean", "dark")])
def test_the_choice_among_candidates_asks_what_the_model_is_used_for(decision: Decision, worse: str) -> None:
    """Label 0: votes lose it at the bright point, means at the dark one. Odds of failing by chance: 100 votes at 2 in 3
    against 1 in 3, < 1e-10."""
    ids, y = ("a",), torch.tensor([0])
    defender = defend(Undecided(), 2, decision)
    bright, dark = (
        float(defender.choice_margin(LabelledPixels(torch.full((1, 1, 2, 2), value), y, ids), "choice", 0))
        for value in (0.8, 0.2)
    )
    assert (bright > dark) == (worse == "bright")


def test_ranking_puts_the_most_probable_other_class_first() -> None:
    """0.5, 0.3 and 0.2 in 64 draws and in 64 votes under noise; odds of failing by chance: 0.1, so several images."""
    means = Drawn([1.0], [[0.1, 0.2, 0.3, 0.4]])
    logits = Drawn([1.0], [[0.1, 0.2, 0.3, 0.4]])
    model, x = bins_with((0.1, 0.2, 0.3, 0.4), 0.25)
    drawing = defend(means, 4, "vote")
    plain = defend(logits, 4)
    smoothed = defend(SmoothedClassifier(model, 0.25, 4))
    expected = [[3, 2, 1], [3, 2, 0], [3, 1, 0], [2, 1, 0]]
    for defender in (drawing, plain):
        images = LabelledPixels(torch.full((4, 1, 2, 2), 0.5), torch.arange(4), tuple("abcd"))
        assert defender.ranking(images, 0).tolist() == expected
    many = LabelledPixels(x.expand(40, -1, -1, -1), torch.tensor([3]).expand(40), tuple(map(str, range(40))))
    found = smoothed.ranking(many, 0)
    assert (found.sort(1).values == torch.tensor([0, 1, 2])).all()
    assert (found[:, 0] == 2).sum() > (found[:, 0] == 1).sum() > (found[:, 0] == 0).sum()


def _smoothed_plane() -> Defender:
    return defend(SmoothedClassifier(square_half_space(), SPREAD, 2))


@pytest.mark.parametrize(
    ("defender", "gradient", "random"),
    [
        (lambda: defend(square_half_space(), 2), "fresh", False),
        (_smoothed_plane, "fresh", True),
        (_smoothed_plane, "frozen", False),
        (_smoothed_plane, "transfer", False),
        (lambda: defend(_noisy(NoisyHalfSpace), 2, "vote"), "fresh", True),
        (lambda: defend(_noisy(NoisyHalfSpace), 2, "vote"), "frozen", False),
    ],
)
def test_what_an_attacker_sees_is_what_the_plan_says(
    defender: Callable[[], Defender], gradient: str, random: bool
) -> None:
    x = square_images(np.array([0.1, -0.1]), seed=0)
    plan = Plan("pgd", "", "pgd", gradient, 4, 3, 0.25)  # type: ignore[arg-type]
    view = defender().log_probs(plan, x, ("a", "b"), 0, "attack/pgd/0")
    assert is_random(view) == random
    again = defender().log_probs(plan, x, ("a", "b"), 0, "attack/pgd/0")
    other = defender().log_probs(plan, x, ("a", "b"), 0, "attack/pgd/1")
    first = view(x)
    assert torch.equal(again(x), first)
    if random or gradient == "frozen":
        assert (other(x) != first).any()
    else:
        torch.testing.assert_close(first, F.log_softmax(square_half_space()(x), 1))
    assert torch.equal(view(x), first) != random


def test_a_surrogate_is_seen_in_every_view_of_a_model() -> None:
    """Also in the noise-free base network's; the model's own gradient is 0 everywhere."""

    plane, x = square_half_space(), square_images(np.array([0.1, -0.1]), seed=0)
    flat = Detached(plane)
    for model, decision, gradients in (
        (flat, None, ("fresh",)),
        (flat, "vote", ("fresh", "frozen")),
        (SmoothedClassifier(flat, SPREAD, 2), None, ("fresh", "frozen", "transfer")),
    ):
        for gradient, surrogate in itertools.product(gradients, (None, plane)):
            plan = Plan("pgd", "", "pgd", gradient, 4, 3, 0.25)  # type: ignore[arg-type]
            defender = defend(model, 2, decision, surrogate)  # type: ignore[arg-type]
            points = x.clone().requires_grad_(True)
            value = defender.log_probs(plan, points, ("a", "b"), 0, "attack/pgd/0")(points)[:, 0].sum()
            (slope,) = torch.autograd.grad(value, points, allow_unused=True)
            assert (slope is not None and bool((slope != 0).all())) == (surrogate is not None)


# At the door


class Dropping(HalfSpace):
    """Its dropout is never switched off."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, training=True)


DRAWING = [*map(_noisy, NOISY), split_decision(), Dropping(torch.full((1, 2, 2), 0.5), -1.0)]


@pytest.mark.parametrize("network", DRAWING)
@pytest.mark.parametrize("method", ["none", "pgd", "worst-case"])
def test_a_drawing_network_that_is_not_said_to_be_one_is_refused(network: nn.Module, method: str) -> None:
    """Odds that two calls on eight images agree by chance: 0.52^8 for the one that has two outputs, else none."""
    text = r'it is random; say what it is used for: decision="vote" .* "mean" .* or "single"'
    with pytest.raises(ModelError, match=text):
        rush.attack(network, _images(8), BALL, method)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=text):
        Evaluation.of(network, _images(8), BALL, VerdictSettings(0.001, 100, 0))


@pytest.mark.parametrize("decision", ["vote", "mean", "single"])
def test_a_deterministic_network_may_be_called_random(decision: Decision) -> None:
    """It costs more and says the same."""
    plane, margins = square_half_space(), np.array([0.3, -0.3, 0.05, -0.05])
    x, y = square_images(margins, seed=0), torch.ones(4, dtype=torch.int64)
    result = _clean(plane, (x, y), decision=decision, max_votes=6400)
    assert result.held.tolist() == (margins > 0).tolist()
    assert result.broken.tolist() == (margins < 0).tolist()
    assert result.robust_accuracy == 0.5
    assert result.votes.min() >= 200


def test_a_rounding_error_between_two_calls_is_no_randomness() -> None:
    class Trembling(HalfSpace):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits * (1 + 1e-6 * torch.rand_like(logits))

    assert len(_clean(Trembling(torch.full((1, 2, 2), 0.5), -1.0), _images(8))) == 8


def _smoothed_in_training() -> SmoothedClassifier:
    model = SmoothedClassifier(square_half_space(), 0.1, 2)
    model.classifier.train()
    return model


@pytest.mark.parametrize(
    ("model", "given", "error", "text"),
    [
        (square_half_space(), {"decision": "votes"}, InputError, "decision 'votes'; allowed: vote, mean, single"),
        (SmoothedClassifier(square_half_space(), 0.1, 2), {"decision": "vote"}, InputError, "omit it"),
        (square_half_space(), {"surrogate": len}, InputError, "surrogate must be a torch.nn.Module, got builtin"),
        (square_half_space(), {"surrogate": nn.Dropout().train()}, ModelError, "training mode"),
        (square_half_space().train(), {}, ModelError, "training mode"),
        (square_half_space().train(), {"decision": "vote"}, ModelError, "training mode"),
        (_smoothed_in_training(), {}, ModelError, "training mode"),
        (len, {}, ModelError, "model must be a SmoothedClassifier or a torch.nn.Module, got builtin_function"),
        (_noisy(NoisyHalfSpace), {"decision": "vote", "gradient": "transfer", "method": "pgd"}, InputError, "transfer"),
    ],
)
def test_models_that_cannot_be_asked_are_refused(
    model: Model, given: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        rush.attack(model, _images(3), BALL, **{"method": "none", **given})  # type: ignore[arg-type]


class Answering(nn.Module):
    """Gives what ``answer`` makes of the images, from call number ``since`` on; before that two logits."""

    def __init__(self, answer: Callable[[Tensor], object], since: int = 0) -> None:
        super().__init__()
        self.answer, self.since, self.calls = answer, since, 0
        self.eval()

    def forward(self, x: Tensor) -> object:
        self.calls += 1
        return self.answer(x) if self.calls > self.since else x.flatten(1)[:, :2]


ANSWERS: list[tuple[Callable[[Tensor], object], str]] = [
    (lambda x: x.flatten(1)[:, 0], r"one logit per image .*torch\.cat\(\[-z, z\], 1\)"),
    (lambda x: x.flatten(1)[:, :1], r"one logit per image .*torch\.cat\(\[-z, z\], 1\)"),
    (lambda x: x[:, :, :1], r"logits of shape .*, expected \(1, (classes|2)\)"),
    (lambda x: x.flatten(1)[:1].repeat(3, 1), "logits of shape"),
    (lambda x: x.flatten(1)[:, :2] / 0, "not finite"),
    (lambda x: x.flatten(1)[:, :2] * torch.nan, "not finite"),
    (lambda x: (x.flatten(1)[:, :2], None), "expected a real tensor of logits"),
]


@pytest.mark.parametrize(("answer", "text"), ANSWERS, ids=[str(i) for i in range(len(ANSWERS))])
@pytest.mark.parametrize("kind", ["plain", "vote", "smoothed"])
@pytest.mark.parametrize("method", ["pgd", "worst-case"])
def test_outputs_that_are_no_logits_are_refused_before_an_attack_starts(
    answer: Callable[[Tensor], object], text: str, kind: str, method: str
) -> None:
    """At most a few calls, the door's."""
    network = Answering(answer)
    model: Model = SmoothedClassifier(network, 0.1, 2) if kind == "smoothed" else network
    decision: Decision | None = "vote" if kind == "vote" else None
    with pytest.raises(ModelError, match=text):
        rush.attack(model, _images(3), BALL, method, decision=decision)  # type: ignore[arg-type]
    assert network.calls <= 2


@pytest.mark.parametrize("decision", ["vote", "mean", "single"])
def test_an_output_that_stops_being_finite_is_an_error_and_no_verdict(decision: Decision) -> None:
    network = Answering(lambda x: x.flatten(1)[:, :2] * torch.nan, since=60)
    with pytest.raises(ModelError, match="not finite"):
        _clean(network, _images(3), decision=decision)


def test_the_number_of_classes_is_asked_of_the_network_once() -> None:
    """Two forwards of a deterministic network tell whether it is one, four whether it looks at one image alone."""
    recorder = Recorder(square_half_space())
    evaluation = Evaluation.of(recorder, _images(12), BALL, VerdictSettings(0.001, 100, 0))
    assert evaluation.defender.num_classes == 2
    assert len(evaluation.images) == 12
    assert [len(batch) for batch in recorder.inputs] == [1, *[16] * 6]


def test_a_smoothed_classifier_of_another_number_of_classes_is_refused() -> None:
    smoothed = SmoothedClassifier(Recorder(square_half_space()), 0.1, 10)
    with pytest.raises(ModelError, match=r"logits of shape \(1, 2\) for 1 images, expected \(1, 10\)"):
        rush.attack(smoothed, _images(3), BALL, "worst-case")
