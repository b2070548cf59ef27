"""Verdicts on points whose class probabilities are known exactly: their level, their power and their streams."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import rush
from exact_models import bins_with, square_half_space, square_images
from random_models import NoisyHalfSpace
from rush.data.checks import LabelledPixels, pixel_ids
from rush.evaluation.attack import verdict
from rush.evaluation.model import defend
from rush.evaluation.verdict import (
    BROKEN,
    HELD,
    UNDECIDED,
    VERDICTS,
    Verdicts,
    VerdictSettings,
    judge_deterministic,
    looks,
)
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.noise import Gaussian

SIGMA = 0.25


def _judged(
    probabilities: Sequence[float],
    y: int,
    count: int,
    *,
    level: float = 0.001,
    max_votes: int = 10_000,
    seed: int = 0,
    purpose: str = "test",
) -> Verdicts:
    """Verdicts on ``count`` independent looks at one point with these class probabilities and label ``y``."""
    model, x = bins_with(probabilities, SIGMA)
    points = LabelledPixels(x.expand(count, -1, -1, -1), torch.full((count,), y), tuple(map(str, range(count))))
    smoothed = SmoothedClassifier(model, SIGMA, len(probabilities), execution=Execution(tile=4000))
    return defend(smoothed).judge(points, purpose, VerdictSettings(level, max_votes, seed))


def _count(verdicts: Verdicts, kind: int) -> int:
    return int((verdicts.verdict == kind).sum())


def test_looks_are_at_100_times_powers_of_4_and_at_the_cap() -> None:
    assert looks(100) == [100]
    assert looks(101) == [100, 101]
    assert looks(400) == [100, 400]
    assert looks(10_000) == [100, 400, 1600, 6400, 10_000]


@pytest.mark.parametrize("probabilities", [(0.5, 0.5), (0.4, 0.2, 0.4)])
def test_false_verdicts_at_ties_are_no_more_frequent_than_the_level(probabilities: tuple[float, ...]) -> None:
    """2,000 points where the label ties with the class it is tried against, the hardest case: whichever of the two is
    called the top class, *broken* or *held* is false, each at most with probability 0.05.

    Each is 0.037 in truth. Odds of failing by chance: 2e-6, and 2e-9 for the lower limit, which shows that the verdicts
    have power.
    """
    verdicts = _judged(probabilities, 0, 2000, level=0.05, max_votes=1600)
    for kind in (BROKEN, HELD):
        assert stats.binom.isf(1 - 1e-9, 2000, 0.035) <= _count(verdicts, kind) <= stats.binom.isf(1e-6, 2000, 0.05)


def test_the_whole_level_at_every_look_is_caught() -> None:
    """The same test, where each of three looks has the whole level: false verdicts are 0.113 in truth, so that it is
    not caught with probability < 1e-7."""
    verdicts = _judged((0.5, 0.5), 0, 2000, level=0.05 * len(looks(1600)), max_votes=1600)
    for kind in (BROKEN, HELD):
        assert _count(verdicts, kind) > stats.binom.isf(1e-6, 2000, 0.05)


def test_verdicts_are_those_of_scipys_exact_tests_look_by_look() -> None:
    """200 points near a tie of three classes, decided again slowly from the streams that the documentation names."""
    probabilities, level, stops = (0.36, 0.3, 0.34), 0.2, [100, 400, 900]
    verdicts = _judged(probabilities, 2, 200, level=level, max_votes=900, seed=3)
    model, x = bins_with(probabilities, SIGMA)
    smoothed, pixels = SmoothedClassifier(model, SIGMA, 3), pixel_ids(x)[0]
    for point in range(200):
        first = smoothed.counts(x, 100, [stream(3, "challenger/test", str(point), pixels)])[0].tolist()
        challenger = 0 if first[0] >= first[1] else 1
        blocks = smoothed.vote_blocks(x, 900, [stream(3, "verdict/test", str(point), pixels)])[0]
        expected, counts = UNDECIDED, [0, 0, 0]
        for stop in stops:
            counts = blocks[: stop // 100].sum(0).tolist()

            def beats(one: int, other: int, counts: list[int] = counts) -> bool:
                test = stats.binomtest(counts[one], counts[one] + counts[other], 0.5, alternative="greater")
                return test.pvalue <= level / 3

            if beats(challenger, 2):
                expected = BROKEN
            elif beats(2, 0) and beats(2, 1):
                expected = HELD
            if expected != UNDECIDED:
                break
        assert verdicts.verdict[point] == expected
        assert verdicts.challenger[point] == challenger
        assert verdicts.counts[point].tolist() == counts
        assert verdicts.votes[point] == sum(counts) + 100
    assert set(verdicts.verdict.tolist()) == {BROKEN, HELD, UNDECIDED}


@pytest.mark.parametrize(
    ("probabilities", "y", "kind"),
    [
        ((0.1, 0.9), 0, BROKEN),
        ((0.1, 0.9), 1, HELD),
        ((0.7, 0.3), 0, HELD),
        ((0.3, 0.7), 0, BROKEN),
        ((0.3, 0.4, 0.3), 1, HELD),
    ],
)
def test_points_with_a_most_probable_class_are_decided(probabilities: tuple[float, ...], y: int, kind: int) -> None:
    """Also without a majority, and where 30 of 100 single passes say otherwise; clear points by the first 200 votes.

    Odds of failing by chance: 0.001 for each of 100 points by the level, < 1e-12 in truth.
    """
    verdicts = _judged(probabilities, y, 100)
    assert (verdicts.verdict == kind).all()
    if max(probabilities) == 0.9:
        assert (verdicts.votes == 200).all()
        assert (verdicts.counts.sum(1) == 100).all()


def test_ties_stay_undecided_at_the_cap() -> None:
    """Odds of a decision by chance: 0.001 a point and side; more than 5 of 100 with probability < 1e-7."""
    verdicts = _judged((0.5, 0.5), 0, 100, level=0.001, max_votes=1000)
    undecided = verdicts.verdict == UNDECIDED
    assert undecided.sum() >= 95
    assert (verdicts.votes[undecided] == 1100).all()
    assert (verdicts.counts.sum(1)[undecided] == 1000).all()


def test_a_point_is_broken_by_any_class_that_beats_the_label() -> None:
    """The label has 0.2, the others 0.35 and 0.45; the challenger is one of those, not always the top one."""
    verdicts = _judged((0.2, 0.35, 0.45), 0, 100)
    assert (verdicts.verdict == BROKEN).all()
    assert set(verdicts.challenger.tolist()) == {1, 2}
    rows = np.arange(100)
    assert (verdicts.counts[rows, verdicts.challenger] > verdicts.counts[:, 0]).all()


def test_a_label_that_beats_its_challenger_alone_does_not_hold() -> None:
    """Label 0.45, a rival of 0.45 and a class of 0.1: beating the weakest, as a test against one class would, is not
    enough. Odds of a *held* by chance: the level, 0.01; more than 15 of 200 with probability < 1e-8."""
    verdicts = _judged((0.45, 0.1, 0.45), 0, 200, level=0.01, max_votes=1600)
    assert _count(verdicts, HELD) <= 15


def test_verdicts_follow_seed_and_purpose_and_not_the_other_points() -> None:
    model, x = bins_with((0.48, 0.52), SIGMA)
    smoothed = SmoothedClassifier(model, SIGMA, 2)

    def counts(ids: Sequence[str], purpose: str = "test", seed: int = 0) -> list[list[int]]:
        points = LabelledPixels(x.expand(len(ids), -1, -1, -1), torch.zeros(len(ids), dtype=torch.int64), tuple(ids))
        verdicts = defend(smoothed).judge(points, purpose, VerdictSettings(0.05, 1600, seed))
        return np.column_stack([verdicts.counts, verdicts.verdict, verdicts.votes]).tolist()

    whole = counts("abcdefgh")
    assert counts("abcdefgh") == whole
    assert counts("hc") == [whole[7], whole[2]]
    assert counts("abcdefgh", purpose="other") != whole
    assert counts("abcdefgh", seed=1) != whole


def test_attack_choice_challenger_and_verdict_share_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every noise row that ``rush.attack`` draws, by the name of its stream: the four purposes have none in common."""
    owner: dict[int, str] = {}
    kept: list[torch.Generator] = []
    drawn: dict[str, list[Tensor]] = defaultdict(list)
    fill = Gaussian.fill

    def named(seed: int, *names: str, device: str = "cpu") -> torch.Generator:
        kept.append(stream(seed, *names, device=device))
        owner[id(kept[-1])] = names[0].split("/")[0]
        return kept[-1]

    def recorded(self: Gaussian, out: Tensor, generator: torch.Generator) -> Tensor:
        noise = fill(self, out, generator)
        drawn[owner[id(generator)]].append(noise.clone().view(-1, 4))
        return noise

    monkeypatch.setattr("rush.smoothing.classifier.stream", named)
    monkeypatch.setattr("rush.evaluation.evaluation.stream", named)
    monkeypatch.setattr(Gaussian, "fill", recorded)
    x = square_images(np.array([0.1, -0.1, 0.05]), seed=0)
    smoothed = SmoothedClassifier(square_half_space(), SIGMA, 2)
    rush.attack(
        smoothed, (x, torch.tensor([1, 0, 1])), rush.ThreatModel("l2", 0.1), steps=3, eot_samples=5, max_votes=400
    )
    assert set(drawn) == {"attack", "choice", "challenger", "verdict", "inspection"}
    unique = {name: torch.cat(rows).unique(dim=0) for name, rows in drawn.items()}
    assert len(torch.cat(list(unique.values())).unique(dim=0)) == sum(map(len, unique.values()))
    assert len(unique["challenger"]) == 300
    assert len(unique["choice"]) == 300  # common to both candidates of an image
    assert len(unique["attack"]) == 3 * 5 * (3 + 1)  # fresh at every step and at the last look


def test_deterministic_verdicts_are_broken_exactly_where_the_class_is_not_the_label() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [-1.0, -3.0, -2.0]])
    verdicts = judge_deterministic(logits, torch.tensor([0, 2, 0]))
    assert [VERDICTS[v] for v in verdicts.verdict] == ["held", "broken", "held"]
    assert verdicts.challenger.tolist() == [1, 0, 2]
    assert verdicts.counts.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert verdicts.votes.tolist() == [1, 1, 1]


def test_undecided_points_count_for_the_model_above_and_against_it_below() -> None:
    """Four images: held, broken, held and on the boundary. Odds of failing by chance: 0.002 by the levels."""
    x = square_images(np.array([0.5, -0.5, 0.4, 0.0]), seed=0)
    smoothed = SmoothedClassifier(square_half_space(), SIGMA, 2)
    result = rush.attack(
        smoothed, (x, torch.ones(4, dtype=torch.int64)), rush.ThreatModel("l2", 1), "none", alpha=1e-3, max_votes=1000
    )
    assert result.held.tolist() == [True, False, True, False]
    assert result.broken.tolist() == [False, True, False, False]
    assert result.undecided.tolist() == [False, False, False, True]
    assert result.robust_accuracy == 0.75
    assert result.robust_accuracy_lower == 0.5
    assert result.interval.estimate == 0.75
    assert torch.equal(result.adversarial, x)
    assert result.budget == {"passes_per_image": 0, "forward_passes_per_image": 0, "votes_per_image": 425.0}


# --- the noise of a verdict and the point ---------------------------------------------------------------------------


class Phase(nn.Module):
    """Class 1 where the fractional part of 40 times the sum of squares is below 0.2: P = 0.2 nearly everywhere, and
    noise that is known can be fitted with tiny changes."""

    def forward(self, x: Tensor) -> Tensor:
        phase = (40 * x.double().square().flatten(1).sum(1)) % 1
        margin = torch.where(phase < 0.2, 1.0, -1.0)
        return torch.stack([-margin, margin], 1).float()


def _fitted(x: Tensor, noise: Tensor) -> Tensor:
    """A point near ``x`` (1, C, H, W) that class 1 gets under every one of these draws (n, D)."""
    pixels, change = x.double().flatten(), torch.zeros(x.numel(), dtype=torch.float64)
    for _ in range(5):
        phases = 40 * (pixels + change + noise).square().sum(1)
        wanted = (0.1 - phases) % 1
        wanted = torch.where(wanted > 0.5, wanted - 1, wanted)
        slope = 80 * (pixels + change + noise)
        change = change + torch.linalg.lstsq(slope, wanted[:, None], driver="gelsd").solution[:, 0]
    return (pixels + change).view_as(x).float()


def test_a_point_that_is_fitted_to_known_noise_is_judged_on_other_noise() -> None:
    """Whatever name of a stream the point is fitted to: the one without the point, the point's own before the fit."""
    smoothed = SmoothedClassifier(Phase().eval(), SIGMA, 2)
    x = torch.rand((1, 3, 16, 16), generator=stream(0, "phase")) * 0.6 + 0.2
    y = torch.zeros(1, dtype=torch.int64)
    (image_id,) = pixel_ids(x)
    for names in (("verdict/given", image_id), ("verdict/given", image_id, image_id)):
        noise = Gaussian(SIGMA).sample((100, 3, 16, 16), stream(0, *names)).double().flatten(1)
        point = _fitted(x, noise)
        with torch.no_grad():
            assert (
                Phase()((point.double().flatten() + noise).view(100, 3, 16, 16)).argmax(1) == 1
            ).float().mean() > 0.9
        assert float((point - x).norm()) < 0.02
        for seed in (0, 1):
            result = verdict(smoothed, (x, y), point, rush.ThreatModel("l2", 0.05), seed=seed)
            assert result.verdict[0] == HELD
            assert result.counts[0, 1] / result.counts[0].sum() < 0.5


@pytest.mark.parametrize("kind", ["smoothed", "vote"])
def test_the_smallest_change_of_a_point_changes_the_noise_of_its_verdict(kind: str) -> None:
    """And only that: the choice among candidates compares points on common noise. Odds of equal votes: < 0.1 each."""
    if kind == "smoothed":
        defender = defend(SmoothedClassifier(bins_with([0.5, 0.5], SIGMA)[0], SIGMA, 2))
    else:
        defender = defend(NoisyHalfSpace(torch.zeros(1, 1, 1), 0.0, 1.0), 2, "vote")
    points = [
        LabelledPixels(torch.full((1, 1, 1, 1), value), torch.zeros(1, dtype=torch.int64), ("a",))
        for value in np.nextafter(np.float32(0.5), np.arange(2, dtype=np.float32))
    ]
    judged = [defender.judge(given, "p", VerdictSettings(1e-9, 3200, seed=0)) for given in (*points, points[0])]
    counts = [verdicts.counts.tolist() for verdicts in judged]
    assert counts[0] == counts[2]
    assert counts[0] != counts[1]
    below, above = (float(defender.choice_margin(given, "choice", 0)) for given in points)
    assert below == pytest.approx(above, abs=1e-4)
