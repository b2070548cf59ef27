"""The worst case of a suite and points made elsewhere: closed forms, levels, interruptions, processes, refusals."""

import hashlib
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

from attacked import Detached, assert_same, distances_to_planes, half_space, near_plane
from exact_models import HalfSpace, Recorder, assert_in_threat
from random_models import NoisyHalfSpace, SharedNoise
from ranks import on_ranks
from rush.attacks.losses import margin
from rush.attacks.threat import ThreatModel
from rush.choices import Decision, Norm
from rush.data.checks import LabelledPixels, labelled_pixels
from rush.data.images import ImageSet
from rush.errors import InputError, ModelError, RunError
from rush.evaluation import evaluation as evaluating
from rush.evaluation.attack import attack, verdict
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import Model, SmoothedDefender, defend
from rush.evaluation.plans import PAPER, WORST_CASE_VERSION, Kind, Plan, Suite, scaled, worst_case
from rush.evaluation.result import ARRAYS, AttackResult
from rush.evaluation.verdict import Verdicts, VerdictSettings
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier

WORLD = 2
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")


def _plane(kind: str = "plain", spread: float = 0.02) -> HalfSpace:
    """A plane through the middle of the 8x8 images."""
    plane = half_space(1)
    if kind == "plain":
        return plane
    return (NoisyHalfSpace if kind == "noisy" else SharedNoise)(plane.weight.detach(), plane.bias, spread)


MODELS: dict[str, tuple[Callable[[float], Model], Decision | None]] = {
    "plain": (lambda _: _plane(), None),
    "smoothed": (lambda spread: SmoothedClassifier(_plane(), spread, 2), None),
    "vote": (lambda spread: _plane("noisy", spread), "vote"),
    "mean": (lambda spread: _plane("shared", spread), "mean"),
}


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("plain", "linf"),
        pytest.param("plain", "l2", marks=pytest.mark.slow),
        pytest.param("plain", "l1", marks=pytest.mark.slow),
        *(("smoothed", norm) for norm in NORMS),
        ("vote", "linf"),
        pytest.param("mean", "l2", marks=pytest.mark.slow),
    ],
)
def test_the_worst_case_breaks_beyond_the_exact_distance_and_not_within(kind: str, norm: Norm) -> None:
    """2 % of it; 3 % for smoothed models, whose noise is a fifth of the distance, so that P = 0.56 against 0.44, and
    6 % for those that draw by themselves: 0.62. Odds of failing by chance: 16 images, whose verdicts at 10,000 votes
    stay undecided or are false with probability < 1e-9 each; by means < 1e-6."""
    made, decision = MODELS[kind]
    plane, distance = _plane(), 0.05 if norm == "l1" else 0.1
    excess = {"plain": 0.02, "smoothed": 0.03}.get(kind, 0.06)
    model, (x, y) = made(distance / 5), near_plane(plane, [distance] * 8)
    exact = distances_to_planes(plane, x, y, norm)
    beyond = attack(model, (x, y), ThreatModel(norm, ((1 + excess) * exact).float()), "worst-case", decision=decision)
    assert_in_threat(beyond.adversarial, x, beyond.threat)
    assert beyond.broken.all()
    within = attack(model, (x, y), ThreatModel(norm, ((1 - excess) * exact).float()), "worst-case", decision=decision)
    assert_in_threat(within.adversarial, x, within.threat)
    assert within.held.all()
    assert within.suite == beyond.suite == WORST_CASE_VERSION
    # what held is returned at its most harmful: nearly at the end of its ball, on the way to the plane
    gone = np.abs(plane.scores(x)) - np.abs(plane.scores(within.adversarial))
    assert (gone > 0.9 * np.abs(plane.scores(x))).all()


@pytest.mark.parametrize("kind", ["smoothed", "vote"])
def test_a_point_on_the_boundary_is_neither_broken_nor_held(kind: str) -> None:
    """Points of a ball that ends at the plane: the first verdict, on the image, holds; one on the plane does not.
    Odds of failing by chance: 0.001 for each of six images, to be broken."""
    made, decision = MODELS[kind]
    x, y = near_plane(_plane(), [0.1] * 6)
    threat = ThreatModel("l2", distances_to_planes(_plane(), x, y, "l2").float())
    assert attack(made(0.02), (x, y), threat, "none", decision=decision).held.all()
    found = attack(made(0.02), (x, y), threat, "worst-case", decision=decision, max_votes=400)
    assert found.undecided.all()
    assert found.robust_accuracy == 1
    assert found.robust_accuracy_lower == 0


def test_an_image_is_held_only_where_every_verdict_on_it_is() -> None:
    """The attack ends on the plane, undecided; a verdict on the image itself, before or behind it, holds. Odds of
    failing by chance: 0.001 for each of six images, to be broken."""
    x, y = near_plane(_plane(), [0.1] * 6)
    threat = ThreatModel("l2", distances_to_planes(_plane(), x, y, "l2").float())
    model, settings = SmoothedClassifier(_plane(), 0.02, 2), VerdictSettings(0.001, 400, 0)
    evaluation = Evaluation.of(model, (x, y), threat, settings)
    pgd = Plan("pgd", "", "pgd", "fresh", 4, 20, 0.25)
    for plans in ((Plan("before", "", "none"), pgd), (pgd, Plan("behind", "", "none"))):
        found = evaluation.run(Suite("two", "two-v1", "", plans))
        assert found.undecided.all()
        assert (found.attacker == plans.index(pgd)).all()
        assert (found.l2 > 0.09).all()


@pytest.mark.parametrize("kind", ["noisy", "shared"])
def test_the_worst_case_of_one_draw_is_the_probability_at_the_worst_point(kind: str) -> None:
    """P(right) at the distance minus epsilon. The mean of 16 images on 2,500 draws has a standard error of at most
    0.01, where they share their draws; odds of more than five: < 1e-6. 3 % of epsilon are left to the attack."""
    x, y = near_plane(_plane(), np.linspace(0.05, 0.2, 16).tolist())
    model, epsilon = _plane(kind, spread=0.1), 0.08
    threat = ThreatModel("l2", epsilon)
    result = attack(model, (x, y), threat, "worst-case", decision="single", max_votes=2500)
    distance = np.abs(_plane().margins(x))
    best, nearly = (stats.norm.cdf((distance - share * epsilon) / 0.1).mean() for share in (1.0, 0.97))
    assert best - 0.05 <= result.robust_accuracy <= nearly + 0.05
    assert result.interval.low < best < result.interval.high
    assert result.single
    assert (result.counts.sum(1) == 2500).all()
    assert stats.norm.cdf(distance / 0.1).mean() > nearly + 0.2  # an attack that does nothing fails
    assert (result.l2 > 0.97 * epsilon).all()


# What a suite does with its stages


class Bumpy(nn.Module):
    """Three classes on 1x4x4 images by a random network with many bends."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn((16, 32), generator=stream(0, "first")))
        self.second = nn.Parameter(torch.randn((32, 3), generator=stream(0, "second")))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin((x.flatten(1) - 0.5) @ self.first * 4) @ self.second


def _bumpy(kind: str, count: int = 64) -> tuple[Model, Tensor, Tensor]:
    x = torch.rand((count, 1, 4, 4), generator=stream(0, "images"))
    y = Bumpy()(x).argmax(1)
    y[:3] = (y[:3] + 1) % 3  # broken without an attack
    return (Bumpy() if kind == "plain" else SmoothedClassifier(Bumpy(), 0.05, 3)), x, y


FEW_STEPS = {"pgd": 1, "apgd": 2, "fmn": 20, "square": 100}


@pytest.mark.parametrize("kind", ["plain", "random"])
def test_the_worst_case_is_the_worst_of_its_stages_image_by_image(kind: Kind) -> None:
    """A suite of weak attackers, so that several of them count. Each alone, at the level that it has there, breaks what
    it breaks in the suite; what holds is returned at its most harmful."""
    model, x, y = _bumpy(kind)
    suite, threat, settings = worst_case(kind, 3), ThreatModel("linf", 0.02), VerdictSettings(0.01, 1600, 1)
    plans = tuple(
        replace(plan, steps=FEW_STEPS.get(plan.method, 0), eot_samples=min(plan.eot_samples, 2)) for plan in suite.plans
    )
    evaluation = Evaluation.of(model, (x, y), threat, settings)
    whole = evaluation.run(replace(suite, plans=plans))
    each = replace(evaluation, settings=replace(settings, level=0.01 / len(plans)))
    alone = {number: each.run(plan) for number, plan in enumerate(plans) if plan.start != "best"}
    broken = np.array([result.broken for result in alone.values()])
    assert 0.4 < whole.broken.mean() < 0.9
    assert len(np.unique(whole.attacker[whole.broken])) >= 3
    assert whole.broken[broken.any(0)].all()
    for row in np.flatnonzero(whole.broken & np.isin(whole.attacker, list(alone))):
        number = int(whole.attacker[row])
        assert alone[number].broken[row]
        assert not any(alone[earlier].broken[row] for earlier in alone if earlier < number)
        torch.testing.assert_close(whole.adversarial[row], alone[number].adversarial[row], atol=1e-4, rtol=0)
    assert (whole.attacker[:3] == 0).all()
    assert (whole.passes[:3] == 0).all()
    if kind == "plain":
        harms = torch.stack([_margin(result.adversarial, y) for result in alone.values()]).amax(0)
        held = torch.from_numpy(whole.held)
        assert (_margin(whole.adversarial, y)[held] >= harms[held] - 1e-3).all()


def _margin(points: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(Bumpy()(points).log_softmax(1), y)


def test_an_image_leaves_when_it_is_broken_and_the_passes_say_so() -> None:
    """Four images on the wrong side, two that PGD breaks, two that hold; batches of eight, four, then two."""
    plane = _plane()
    x, y = near_plane(plane, [0.1, 0.1, 0.1, 0.1, 0.02, 0.02, 0.2, 0.2])
    y[:4] = 1 - y[:4]
    nearest = float(distances_to_planes(plane, x[6:], y[6:], "linf").min())
    recorder, threat = Recorder(plane), ThreatModel("linf", 0.5 * nearest)
    result = attack(recorder, (x, y), threat, "worst-case")
    assert result.attacker[:6].tolist() == [0] * 4 + [1] * 2
    assert result.broken.tolist() == [True] * 6 + [False] * 2
    full = worst_case("plain", 2).passes_per_image
    assert result.passes.tolist() == [0] * 4 + [20] * 2 + [full] * 2
    assert recorder.backward_rows == result.passes.sum()
    stages, targeted = len(worst_case("plain", 2).plans), 1
    assert result.votes.tolist() == [1] * 4 + [2] * 2 + [stages] * 2
    seen_by_the_door = 1 + (2 + 4) * 16  # is it random, is it a function of one image
    judged = 256 * stages + 2 * 16 * stages  # each look at points is followed by two at some of them alone and mixed
    ranked, asked_at_the_end = 256 * targeted, 16
    assert recorder.forward_rows == (
        (result.passes + result.forward_passes).sum() + judged + ranked + seen_by_the_door + asked_at_the_end
    )


def test_an_image_of_a_smoothed_model_leaves_too() -> None:
    plane = _plane()
    x, y = near_plane(plane, [0.1, 0.1, 0.1, 0.1, 0.04, 0.04, 0.3, 0.3])
    y[:4] = 1 - y[:4]
    recorder = Recorder(plane)
    suite = worst_case("random", 2)
    result = attack(SmoothedClassifier(recorder, 0.02, 2), (x, y), ThreatModel("l2", 0.1), "worst-case")
    assert result.broken.tolist() == [True] * 6 + [False] * 2
    assert result.passes.tolist() == [0] * 4 + [suite.plans[1].passes_per_image] * 2 + [suite.passes_per_image] * 2
    assert recorder.backward_rows == result.passes.sum()
    assert (result.votes[:4] == 200).all()
    assert (result.votes[4:6] == 400).all()


@pytest.mark.parametrize("kind", ["plain", "smoothed", "vote"])
def test_a_model_without_a_gradient_is_left_to_the_attacks_that_need_none(kind: str) -> None:
    plane = _plane()
    flat = Detached(_plane("noisy") if kind == "vote" else plane)
    x, y = near_plane(plane, [0.1] * 6)
    model: Model = SmoothedClassifier(flat, 0.02, 2) if kind == "smoothed" else flat
    decision: Decision | None = "vote" if kind == "vote" else None
    threat = ThreatModel("linf", 4 * distances_to_planes(plane, x, y, "linf").float())
    assert attack(model, (x, y), threat, "apgd", steps=20, decision=decision).held.sum() >= 5
    result = attack(model, (x, y), threat, "worst-case", decision=decision)
    plans = worst_case("plain" if kind == "plain" else "random", 2, kind != "vote").plans
    by_square = [plans[number].method == "square" for number in result.attacker]
    assert result.broken.all()
    assert sum(by_square) >= 5
    through = attack(model, (x, y), threat, "worst-case", decision=decision, surrogate=plane)
    assert through.broken.all()
    assert (through.attacker < 3).all()


def test_the_level_of_an_image_is_shared_by_all_its_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Bonferroni split: each attacker judges on a stream of its own."""
    judged: list[tuple[str, float]] = []
    judge = SmoothedDefender.judge

    def recorded(self: SmoothedDefender, points: LabelledPixels, purpose: str, settings: VerdictSettings) -> Verdicts:
        judged.append((purpose, settings.level))
        return judge(self, points, purpose, settings)

    monkeypatch.setattr(SmoothedDefender, "judge", recorded)
    x, y = near_plane(_plane(), [0.2] * 3)
    model = SmoothedClassifier(_plane(), 0.02, 2)
    result = attack(model, (x, y), ThreatModel("l2", 0.05), "worst-case", alpha=0.004)
    assert result.level == 0.004
    assert math.fsum(level for _, level in judged) == pytest.approx(0.004, rel=1e-9)
    assert len({purpose for purpose, _ in judged}) == len(judged) == len(worst_case("random", 2).plans)
    assert (result.votes == 200 * len(judged)).all()  # of each at least 200, at once here


def test_the_same_seed_gives_the_same_bits_and_another_one_others() -> None:
    model, x, y = _bumpy("smoothed", 8)

    def attacked(seed: int) -> AttackResult:
        return attack(model, (x, y), ThreatModel("l2", 0.02), "worst-case", seed=seed, max_votes=100)

    first, second, other = attacked(0), attacked(0), attacked(1)
    assert_same(first, second)
    assert first.counts.tolist() != other.counts.tolist()
    assert not torch.equal(first.adversarial, other.adversarial)


# The suites themselves

# Each with the SHA-256 of its plans: a suite that changes gets a new version.
SUITES: dict[str, tuple[Suite, str]] = {
    "plain": (worst_case("plain", 10), "62db9de2953d91b3"),
    "plain, 3 classes": (worst_case("plain", 3), "b7a39225b16db4ee"),
    "random": (worst_case("random", 10), "e4f091d4c861032a"),
    "random, 3 classes": (worst_case("random", 3), "00f6640243379a9c"),
    "random, no base network": (worst_case("random", 10, transferable=False), "f048958a4a14cbbc"),
}


@pytest.mark.parametrize(("suite", "digest"), SUITES.values(), ids=SUITES)
def test_suites_are_frozen_under_their_version(suite: Suite, digest: str) -> None:
    """All but their labels. If this fails after a change: raise ``WORST_CASE_VERSION`` and take the new hashes."""
    plans = [replace(plan, label="") for plan in suite.plans]
    assert suite.version == WORST_CASE_VERSION == "worst-case-v1"
    assert hashlib.sha256(repr((suite.version, plans)).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_in_order_and_can_be_run(name: str) -> None:
    """The image first, then a cheap attack; names are streams, so each is used once; no start that does not exist."""
    suite, _ = SUITES[name]
    names = [plan.name for plan in suite.plans]
    assert len(set(names)) == len(names)
    assert suite.plans[0].method == "none"
    assert suite.plans[0].passes_per_image == 0
    assert 20 <= suite.plans[1].passes_per_image <= 80
    assert {plan.start for plan in suite.plans[:2]} == {"random"}
    for plan in suite.plans:
        assert all(1 <= rank < (3 if "3 classes" in name else 10) for rank in plan.targets)
        noisy = name.startswith("random") and plan.method != "none" and plan.gradient != "transfer"
        assert (plan.eot_samples > 0) == noisy
    methods = {plan.method for plan in suite.plans}
    assert {"pgd", "apgd", "square"} <= methods
    assert "fmn" in methods or name.startswith("random")
    assert any(plan.gradient == "transfer" for plan in suite.plans) == (name in ("random", "random, 3 classes"))


@pytest.mark.parametrize("name", SUITES)
def test_a_scaled_suite_has_that_many_times_the_budget(name: str) -> None:
    suite, _ = SUITES[name]
    ten = scaled(suite, 10)
    assert (ten.name, ten.version) == ("worst-case-x10", "worst-case-v1-x10")
    assert ten.passes_per_image == 10 * suite.passes_per_image
    assert [plan.name for plan in ten.plans] == [plan.name for plan in suite.plans]
    for once, often in zip(suite.plans, ten.plans, strict=True):
        spent = 1 if once.method == "none" else 10
        assert often.runs * max(1, often.steps) == spent * once.runs * max(1, once.steps)
        assert replace(often, restarts=once.restarts, steps=once.steps) == once
    assert scaled(suite, 1).plans == suite.plans


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "smoothed"])
def test_a_scaled_suite_can_be_run(kind: str) -> None:
    """Two images within their distance and two beyond."""
    made, _ = MODELS[kind]
    x, y = near_plane(_plane(), [0.1] * 4)
    exact = distances_to_planes(_plane(), x, y, "linf").float()
    threat = ThreatModel("linf", exact * torch.tensor([0.9, 0.9, 1.1, 1.1]))
    evaluation = Evaluation.of(made(0.02), (x, y), threat, VerdictSettings(0.001, 10_000, 0))
    defender = evaluation.defender
    result = evaluation.run(scaled(worst_case(defender.kind, 2), 2))
    assert result.broken.tolist() == [False, False, True, True]
    assert result.held.tolist() == [True, True, False, False]
    assert result.suite == "worst-case-v1-x2"
    assert result.passes[0] == 2 * worst_case(defender.kind, 2).passes_per_image


# Interruptions


def _three_groups(count: int = 150) -> tuple[Model, ImageSet, ThreatModel]:
    x, ids = torch.rand((count, 1, 4, 4), generator=stream(0, "images")), np.array([f"bump-{i}" for i in range(count)])
    images = ImageSet((x * 255).round().to(torch.uint8), Bumpy()(x).argmax(1), ("a", "b", "c"), ids, "bumps", "test")
    return SmoothedClassifier(Bumpy(), 0.05, 3), images, ThreatModel("linf", 0.01)


def _attacked(resume: Path | None = None, count: int = 150, **changed: Any) -> AttackResult:
    model, images, threat = _three_groups(count)
    given = {"method": "pgd", "steps": 3, "eot_samples": 2, "max_votes": 400}
    named = {"model": model, "images": images, "threat": threat, "resume": resume}
    return attack(**{**named, **given, **changed})


@pytest.fixture(scope="module")
def undisturbed() -> AttackResult:
    return _attacked()


def killed_in_the_third_group(folder: Path) -> None:
    """A process that attacks until it is killed."""
    torch.set_num_threads(1)
    write_group, files = evaluating.write_group, []

    def until_killed(file: Path, *rest: Any) -> None:
        files.append(file)
        if len(files) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write_group(file, *rest)

    evaluating.write_group = until_killed
    _attacked(folder)


@pytest.fixture
def attacked_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the groups that are attacked, and so written."""
    sizes: list[int] = []
    write_group = evaluating.write_group

    def counted(file: Path, result: AttackResult, *rest: Any) -> None:
        sizes.append(len(result))
        write_group(file, result, *rest)

    monkeypatch.setattr(evaluating, "write_group", counted)
    return sizes


@pytest.mark.timeout(120)
def test_an_attack_that_was_killed_goes_on_and_ends_with_the_same_bits(
    processes: ForkServerContext, undisturbed: AttackResult, attacked_groups: list[int], tmp_path: Path
) -> None:
    child = processes.Process(target=killed_in_the_third_group, args=(tmp_path,), daemon=True)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pgd-0000.npz", "pgd-0001.npz"]
    assert_same(_attacked(tmp_path), undisturbed)
    assert attacked_groups == [22]
    assert_same(_attacked(tmp_path), undisturbed)
    assert attacked_groups == [22]  # nothing is left to do


def test_a_group_on_disk_says_of_what_it_is_in_the_words_of_the_first_ones(tmp_path: Path) -> None:
    """So that a run begun before the settings had their present name is resumed."""
    model, images, _ = _three_groups(3)
    plan, fingerprint = Plan("pgd", "PGD", "pgd", "fresh", 2, 3, 0.25), defend(model).fingerprint()
    Evaluation.of(model, images, ThreatModel("linf", 1 / 64), VerdictSettings(0.01, 400, seed=7)).run(plan, tmp_path)
    with np.load(tmp_path / "pgd-0000.npz") as stored:
        conditions = str(stored["conditions"])
    origin = f"(Judging(level=0.01, max_votes=400, seed=7), '{fingerprint}')"
    assert conditions == repr((plan, "linf", 1 / 64, 0.01, origin))
    assert repr(plan).startswith("Plan(name='pgd', label='PGD', method='pgd', gradient='fresh', eot_samples=2, steps=3")


def test_a_suite_is_taken_up_again_too(attacked_groups: list[int], tmp_path: Path) -> None:
    model, images, threat = _three_groups(70)

    def attacked() -> AttackResult:
        suite = Suite("short", "short-v1", "", (Plan("clean", "", "none"), Plan("pgd", "", "pgd", "fresh", 2, 3, 0.25)))
        return Evaluation.of(model, images, threat, VerdictSettings(0.01, 400, 0)).run(suite, tmp_path)

    first = attacked()
    (tmp_path / "short-0000.npz").unlink()
    assert_same(attacked(), first)
    assert attacked_groups == [64, 6, 64]
    assert first.suite == "short-v1"


OTHER_IMAGES = "holds other images than are attacked now"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"steps": 4}, "was made by another attacker or threat, on another model or with another seed"),
        ({"threat": ThreatModel("linf", 0.06)}, "was made by another attacker"),
        ({"threat": ThreatModel("l2", 0.05)}, "was made by another attacker"),
        ({"alpha": 0.01}, "was made by another attacker"),
        ({"seed": 1}, "with another seed"),
        ({"max_votes": 500}, "was made by another attacker"),
        ({"model": SmoothedClassifier(Bumpy(), 0.06, 3)}, "on another model"),
        ({"images": lambda images: images[np.array([1, 0, *range(2, 66)])]}, OTHER_IMAGES),
        ({"images": lambda images: replace(images, images=255 - images.images)}, OTHER_IMAGES),
        ({"images": lambda images: replace(images, labels=(images.labels + 1) % 3)}, OTHER_IMAGES),
        ({"images": lambda images: replace(images, ids=np.array([f"bent-{i}" for i in range(66)]))}, OTHER_IMAGES),
    ],
)
def test_a_folder_of_another_attack_is_refused(changed: dict[str, Any], text: str, tmp_path: Path) -> None:
    """Images are known by ids, which name their noise, and by pixels and labels, which may change under one id."""
    _attacked(tmp_path, count=66)
    if "images" in changed:
        _, images, _ = _three_groups(66)
        changed = {"images": changed["images"](images)}
    with pytest.raises(RunError, match=re.escape(text)) as caught:
        _attacked(tmp_path, count=66, **changed)
    assert "pgd-0000.npz" in str(caught.value)
    assert f"move {tmp_path} away and attack again" in str(caught.value)


def test_a_folder_of_another_networks_points_is_refused(tmp_path: Path) -> None:
    """Its weights are looked at, and for what it is used."""
    x, y = near_plane(_plane(), [0.1] * 3)
    images, threat = (x, y), ThreatModel("l2", 0.05)
    retrained = _plane("noisy")
    with torch.no_grad():
        retrained.weight.mul_(1.01)

    def attacked(model: nn.Module, decision: Decision | None, surrogate: nn.Module | None = None) -> AttackResult:
        return attack(
            model, images, threat, steps=2, decision=decision, surrogate=surrogate, max_votes=100, resume=tmp_path
        )

    first = attacked(_plane("noisy"), "vote")
    assert_same(attacked(_plane("noisy"), "vote"), first)
    for model, decision, surrogate in (
        (retrained, "vote", None),
        (_plane("noisy"), "mean", None),
        (_plane("noisy"), "vote", _plane()),
        (_plane("shared"), "vote", None),
        (_plane(), None, None),
    ):
        with pytest.raises(RunError, match=r"another model|another attacker"):
            attacked(model, decision, surrogate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-40], lambda whole: whole[:0], lambda whole: whole[:100] + b"\0" * 50 + whole[150:]]
)
def test_a_damaged_file_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    _attacked(tmp_path, count=66)
    file = tmp_path / "pgd-0001.npz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match=r"pgd-0001\.npz is damaged .*; delete it and attack again"):
        _attacked(tmp_path, count=66)
    file.unlink()
    assert_same(_attacked(tmp_path, count=66), _attacked(count=66))


# Processes


def attack_share(folder: Path) -> list[dict[str, Tensor | list[str]]]:
    """In one of two processes: results of 150 images, of one group, and of 66 with files in ``folder``."""
    results = [_attacked(), _attacked(count=5), _attacked(folder, count=66)]
    return [_plain_values(result) for result in results]


def _plain_values(result: AttackResult) -> dict[str, Tensor | list[str]]:
    arrays = {name: torch.from_numpy(getattr(result, name)) for name in ARRAYS if name != "seconds"}
    return {"adversarial": result.adversarial, "ids": list(result.ids), **arrays}


@pytest.mark.timeout(120)
def test_two_processes_share_the_groups_and_each_returns_the_bits_of_one(
    processes: ForkServerContext, undisturbed: AttackResult, tmp_path: Path
) -> None:
    """Three groups, so that shares are unequal, and one, so that a process has none."""
    found_on_ranks = on_ranks(processes, partial(attack_share, tmp_path / "parts"), WORLD, tmp_path)
    expected = [_plain_values(result) for result in (undisturbed, _attacked(count=5), _attacked(count=66))]
    for found in found_on_ranks:
        for own, other in zip(found, expected, strict=True):
            assert own.keys() == other.keys()
            assert own["ids"] == other["ids"]
            for name in own.keys() - {"ids"}:
                assert torch.equal(own[name], other[name]), name
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == ["pgd-0000.npz", "pgd-0001.npz"]


# Named protocols


@pytest.mark.parametrize("method", ["worst-case", "paper"])
@pytest.mark.parametrize(
    "given",
    [
        {"steps": 40},
        {"step_size": 0.01},
        {"restarts": 2},
        {"eot_samples": 4},
        {"eot_samples": "auto"},
        {"gradient": "transfer"},
        {"loss": "margin"},
        {"targets": (1,)},
    ],
    ids=str,
)
def test_fixed_protocols_take_no_budget(method: str, given: dict[str, object]) -> None:
    recorder = Recorder(_plane())
    images = near_plane(_plane(), [0.1] * 3)
    name, value = next(iter(given.items()))
    with pytest.raises(InputError, match=re.escape(f"{name}={value} was given, but method '{method}'")):
        attack(SmoothedClassifier(recorder, 0.1, 2), images, ThreatModel("linf", 8 / 255), method, **given)  # type: ignore[arg-type]
    assert recorder.backward_rows == 0


def test_the_papers_protocol_is_what_it_says() -> None:
    """20 steps of 2/255 within l-inf 8/255, one new noise draw at each, from a random start; two images in a batch of
    their own."""
    recorder = Recorder(_plane())
    x, y = near_plane(_plane(), [0.3] * 2)
    result = attack(SmoothedClassifier(recorder, 0.05, 2), (x, y), ThreatModel("linf", 8 / 255), "paper")
    assert result.plan == PAPER
    assert (PAPER.steps, PAPER.eot_samples, PAPER.restarts, PAPER.start) == (20, 1, 1, "random")
    assert PAPER.step_size * 8 / 255 == pytest.approx(2 / 255)
    assert result.passes.tolist() == [20, 20]
    assert recorder.backward_rows == 2 * 20
    assert_in_threat(result.adversarial, x, ThreatModel("linf", 8 / 255))
    assert (result.linf > 7.99 / 255).all()
    plain = attack(_plane(), (x, y), ThreatModel("linf", 8 / 255), "paper")
    assert plain.plan == replace(PAPER, eot_samples=0)
    noisy = attack(_plane("noisy"), (x, y), ThreatModel("linf", 8 / 255), "paper", decision="vote")
    assert noisy.plan == PAPER


@pytest.mark.parametrize(
    "threat",
    [
        ThreatModel("l2", 8 / 255),
        ThreatModel("linf", 4 / 255),
        ThreatModel("linf", 8 / 256),
        ThreatModel("linf", torch.full((3,), 8 / 255)),
    ],
)
def test_the_papers_protocol_is_for_its_threat_alone(threat: ThreatModel) -> None:
    with pytest.raises(InputError, match=r"method 'paper' is l-inf 8/255, got .*; take method 'pgd'"):
        attack(_plane(), near_plane(_plane(), [0.1] * 3), threat, "paper")


# The number of draws


def _needed(norm: float, sigma: float, cosine: float = 0.9) -> float:
    """Draws that the gradient of CE at a plane of this weight needs: g = 2 p (1 - p) w at a Gaussian score, on it."""
    score = np.linspace(-20, 20, 400_001)
    slope, law = 2 * special.expit(2 * score) * special.expit(-2 * score), stats.norm(0, norm * sigma).pdf(score)
    first, second = np.trapezoid(law * slope, score), np.trapezoid(law * slope**2, score)
    return float((second / first**2 - 1) * cosine**2 / (1 - cosine**2))


@pytest.mark.parametrize(("norm", "draws"), [(0.5, 4), (10, 8), (30, 32), (300, 256), (4000, 256)])
def test_auto_takes_as_many_draws_as_the_gradients_noise_asks_for(norm: float, draws: int) -> None:
    """16 images on the plane in a ball so small that they stay there: the power of two at or above the exact number,
    which is 4 / 3 or more away from both, and 256 where it is above. The median of 16 estimates from 64 draws errs by
    less (20 seeds tried). At the last one most images show no slope in 64 draws."""
    assert draws in (4, 256) or draws / 2 * 4 / 3 < _needed(norm, 0.25) < draws * 3 / 4
    plane = _plane()
    steep = HalfSpace(plane.weight.detach() * norm, plane.bias * norm)
    x, y = near_plane(plane, [0.0] * 16)
    result = attack(
        SmoothedClassifier(steep, 0.25, 2), (x, y), ThreatModel("l2", 1e-5), steps=2, eot_samples="auto", max_votes=100
    )
    assert isinstance(result.plan, Plan)
    assert result.plan.eot_samples == draws
    assert result.plan.label.endswith(f"EOT {draws} (auto)")
    assert result.passes[0] == 2 * draws


def test_auto_is_for_smoothed_classifiers() -> None:
    images, threat = near_plane(_plane(), [0.1] * 3), ThreatModel("l2", 0.05)
    with pytest.raises(InputError, match="eot_samples=auto was given, but method 'pgd' takes none on this model"):
        attack(_plane(), images, threat, eot_samples="auto")
    with pytest.raises(InputError, match='eot_samples="auto" needs a smoothed classifier; give a number of draws'):
        attack(_plane("noisy"), images, threat, eot_samples="auto", decision="vote")


# Points made elsewhere


def _towards(plane: HalfSpace, x: Tensor, y: Tensor, far: Tensor) -> Tensor:
    """Images moved by these l2 distances (N,) against their class."""
    normal = plane.weight.detach() / plane.weight.detach().norm()
    return x - (torch.where(y == 1, 1.0, -1.0) * far).view(-1, 1, 1, 1) * normal


@pytest.mark.parametrize("kind", MODELS)
def test_given_points_are_judged_as_those_of_an_attack(kind: str) -> None:
    """Odds of failing by chance: 6 verdicts at level 0.001 and 0.15 sigma from the plane, < 1e-9."""
    made, decision = MODELS[kind]
    plane = _plane()
    x, y = near_plane(plane, [0.1] * 6)
    far = torch.tensor([0.08, 0.12] * 3)
    points = _towards(plane, x, y, far)
    result = verdict(made(0.02), (x, y), points, ThreatModel("l2", 0.12), decision=decision, name="theirs")
    assert result.broken.tolist() == [False, True] * 3
    assert result.held.tolist() == [True, False] * 3
    assert torch.equal(result.adversarial, points)
    np.testing.assert_allclose(result.l2, far, rtol=1e-5)
    assert isinstance(result.plan, Plan)
    assert (result.plan.name, result.plan.method) == ("theirs", "none")
    assert result.passes.sum() == result.forward_passes.sum() == 0
    assert result.robust_accuracy == 0.5


@pytest.mark.parametrize("norm", NORMS)
def test_points_of_our_own_attacks_are_let_in(norm: Norm) -> None:
    """Also on large images, whose rounding adds up: 3 x 64 x 64."""
    x = torch.rand((2, 3, 64, 64), generator=stream(0, "images"))
    weight = torch.randn((3, 64, 64), generator=stream(0, "plane"))
    plane = HalfSpace(weight, -0.5 * float(weight.sum()))
    y = plane(x).argmax(1)
    for epsilon in (0.03, 0.9) if norm == "linf" else (0.5, 90.0):
        threat = ThreatModel(norm, epsilon)
        made = attack(plane, (x, y), threat, "pgd", steps=3)
        found = verdict(plane, (x, y), made.adversarial, threat)
        assert found.broken.tolist() == made.broken.tolist()
        moved = made.adversarial.double() + (made.adversarial.double() - x.double()) * 1e-2
        if float(moved.min()) >= 0 and float(moved.max()) <= 1:
            with pytest.raises(InputError, match="outside"):
                verdict(plane, (x, y), moved, threat)


def test_points_are_judged_on_other_noise_than_any_attack_uses_and_by_name() -> None:
    x, y = near_plane(_plane(), [0.0] * 4)
    model, threat = SmoothedClassifier(_plane(), 0.1, 2), ThreatModel("l2", 0.1)

    def counts(name: str, seed: int = 0) -> list[list[int]]:
        return verdict(model, (x, y), x, threat, name=name, seed=seed, max_votes=400).counts.tolist()

    first = counts("given")
    assert counts("given") == first
    assert counts("other") != first
    assert counts("given", seed=1) != first
    clean = attack(model, (x, y), threat, "none", max_votes=400)
    assert clean.counts.tolist() != first


def test_groups_and_epsilons_stay_with_their_images() -> None:
    """70 points, each at the end of its own ball."""
    plane = _plane()
    x, y = near_plane(plane, [0.2] * 70)
    epsilon = torch.linspace(0.01, 0.3, 70)
    points = _towards(plane, x, y, epsilon)
    result = verdict(plane, (x, y), points, ThreatModel("l2", epsilon))
    assert result.broken.tolist() == (epsilon > 0.2).tolist()
    with pytest.raises(InputError, match=r"point 69 .* is 0\.15 outside the l2 ball; 70 of 70 are"):
        verdict(plane, (x, y), points, ThreatModel("l2", epsilon / 2))


@pytest.mark.parametrize("norm", NORMS)
def test_a_point_outside_the_ball_is_named_with_its_excess(norm: Norm) -> None:
    plane = _plane()
    x, y = near_plane(plane, [0.1] * 5)
    points, threat = x.clone(), ThreatModel(norm, 0.05)
    for row, far in ((1, 0.06), (3, 0.09), (4, 0.05)):
        points[row, 0, 2, 3] += far
    own = labelled_pixels((x, y)).ids[3]
    text = rf"point 3 \({own}\) is 0\.04 outside the {norm} ball; 2 of 5 are\. Give the epsilon they were made with"
    with pytest.raises(InputError, match=text):
        verdict(plane, (x, y), points, threat)


@pytest.mark.parametrize(
    ("points", "text"),
    [
        (lambda x: x[:2], "adversarial must be a float tensor of shape (3, 1, 8, 8), got (2, 1, 8, 8)"),
        (lambda x: x[:, :, :4], "got (3, 1, 4, 8)"),
        (lambda x: x.flatten(1), "got (3, 64)"),
        (lambda x: x.tolist(), "got list"),
        (lambda x: (x * 255).to(torch.int16), "must be a float tensor"),
        (lambda x: x - 0.5, "lie in [0, 1]"),
        (lambda x: x * 255, "lie in [0, 1]"),
        (lambda x: x * torch.nan, "finite and lie in [0, 1]"),
    ],
)
def test_points_that_are_no_images_are_refused(points: Callable[[Tensor], object], text: str) -> None:
    recorder = Recorder(_plane())
    x, y = near_plane(_plane(), [0.1] * 3)
    with pytest.raises(InputError, match=re.escape(text)):
        verdict(recorder, (x, y), points(x), ThreatModel("linf", 0.1))  # type: ignore[arg-type]


# Bad input, before any attack starts


def _changed(y: Tensor, label: int) -> Tensor:
    return torch.cat([y[:-1], torch.tensor([label])])


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (lambda x, y: (x, _changed(y, 2)), "labels must be 0 to 1, got 0 to 2"),
        (lambda x, y: (x, _changed(y, -1)), "labels must be at least 0, got -1"),
        (lambda x, y: (x, y[:2]), "labels must be an integer tensor of shape (3,)"),
        (lambda x, y: (x, y.float()), "labels must be an integer tensor"),
        (lambda x, y: (x * 255, y), "divide images of 0 to 255 by 255"),
        (lambda x, y: (x - 1, y), "finite and lie in [0, 1]"),
        (lambda x, y: (x * torch.inf, y), "finite and lie in [0, 1]"),
        (lambda x, y: ((x * 255).to(torch.int16), y), "images must be a float tensor"),
        (lambda x, y: (x[0], y[:1]), "images must be a float tensor (N, C, H, W)"),
        (lambda *images: images[0], "images must be an ImageSet or a pair"),
    ],
)
@pytest.mark.parametrize("method", ["pgd", "worst-case"])
@pytest.mark.parametrize("kind", ["plain", "smoothed", "vote"])
def test_images_and_labels_that_cannot_be_attacked_are_refused_before_work_starts(
    images: Callable[[Tensor, Tensor], object], text: str, method: str, kind: str
) -> None:
    recorder = Recorder(_plane("noisy" if kind == "vote" else "plain"))
    model: Model = SmoothedClassifier(recorder, 0.1, 2) if kind == "smoothed" else recorder
    x, y = near_plane(_plane(), [0.1] * 3)
    decision: Decision | None = "vote" if kind == "vote" else None
    with pytest.raises(InputError, match=re.escape(text)):
        attack(model, images(x, y), ThreatModel("linf", 8 / 255), method, decision=decision)  # type: ignore[arg-type]
    assert recorder.forward_rows <= 1


@pytest.mark.parametrize(
    ("threat", "text"),
    [
        (ThreatModel("l2", torch.full((4,), 0.1)), "epsilon has shape (4,), expected one number or (3,)"),
        (8 / 255, "threat must be a rush.ThreatModel(norm, epsilon), got float"),
        (("linf", 8 / 255), "threat must be a rush.ThreatModel(norm, epsilon), got tuple"),
    ],
)
def test_threats_that_cannot_be_meant_are_refused_before_work_starts(threat: ThreatModel, text: str) -> None:
    recorder = Recorder(_plane())
    images = near_plane(_plane(), [0.1] * 3)
    with pytest.raises(InputError, match=re.escape(text)):
        attack(recorder, images, threat, "worst-case")
    with pytest.raises(InputError, match=re.escape(text)):
        verdict(recorder, images, images[0], threat)
    assert recorder.backward_rows == 0


@pytest.mark.parametrize("targets", [1, (), (0,), (2,), (1.0,), (True,), "1", [1, 2]], ids=repr)
def test_targets_that_are_no_ranks_are_refused(targets: object) -> None:
    images = near_plane(_plane(), [0.1] * 3)
    with pytest.raises(InputError, match="targets are ranks from 1 to 1, got "):
        attack(_plane(), images, ThreatModel("linf", 0.01), targets=targets)  # type: ignore[arg-type]


class Spoiled(HalfSpace):
    """Its outputs are not finite for the images whose first pixel is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.where(x[:, :1, 0, 0] == 0, torch.nan, 0.0)


@pytest.mark.parametrize("row", [0, 2])
def test_an_output_that_is_not_finite_is_found_before_work_starts(row: int) -> None:
    x, y = near_plane(_plane(), [0.1] * 3)
    x[row, 0, 0, 0] = 0
    recorder = Recorder(Spoiled(_plane().weight.detach(), 0.0))
    with pytest.raises(ModelError, match="not finite"):
        attack(recorder, (x, y), ThreatModel("linf", 8 / 255), "worst-case")
    assert recorder.backward_rows == 0


def test_results_of_parts_of_a_set_join_to_the_whole() -> None:
    model, images, threat = _three_groups(70)
    whole = attack(model, images, threat, steps=2, eot_samples=2, max_votes=100)
    rows = [3, 69, 0]
    chosen = whole.select(rows)
    assert torch.equal(chosen.adversarial, whole.adversarial[rows])
    assert chosen.ids == tuple(whole.ids[row] for row in rows)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(chosen, name), getattr(whole, name)[rows])
    assert chosen.plan == whole.plan
    assert len(chosen) == 3
