"""The audit: its verdict rule against scipy, its report on disk, and the first half of the zoo."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from audit_zoo import (
    Entry,
    Scaled,
    assert_told_apart,
    audited,
    digits,
    linf,
    noisy_network,
    plain_network,
    quantised,
    robust_network,
)
from exact_models import square_half_space, square_images
from rush.attacks.threat import ThreatModel
from rush.auditing import audit as audit_module
from rush.auditing.audit import PROBES, AuditReport, audit, default_plan
from rush.auditing.case import Case
from rush.auditing.findings import GAIN, INVALIDATING, Finding
from rush.auditing.report import decide, images_needed
from rush.data.checks import LabelledPixels, labelled_pixels
from rush.errors import CopiesWarning, InputError
from rush.evaluation.attack import attack
from rush.evaluation.model import SmoothedDefender, defend
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.result import AttackResult
from rush.evaluation.verdict import Verdicts, VerdictSettings
from rush.records.audit import write_audit
from rush.smoothing.classifier import SmoothedClassifier

N = 16
MARGINS = np.linspace(0.2, 0.4, N) * np.where(np.arange(N) % 2, 1, -1)
IMAGES = square_images(MARGINS, seed=0), torch.from_numpy((MARGINS > 0).astype(np.int64))
THREAT = ThreatModel("linf", 0.05)

PGD_100 = Plan("pgd-100", "PGD-100", "pgd", steps=100, step_size=0.1)
APGD_100 = Plan("apgd-100", "APGD-100", "apgd", steps=100)
ONE_STEP = Plan("one-step", "one step of a quarter", "pgd", steps=1, step_size=0.25)
NOISE_OFF = Plan("noise-off", "PGD-20 on the base network", "pgd", "transfer", steps=20, step_size=0.25)


def _smoothed(network: nn.Module, sigma: float) -> SmoothedClassifier:
    return SmoothedClassifier(network, sigma, 10)


def _on_the_base(model: object, images: Any, threat: ThreatModel) -> AttackResult:
    """The evaluation of a smoothed classifier by points that were made, and counted, on its base network."""
    assert isinstance(model, SmoothedClassifier)
    return attack(model.classifier, images, threat)


FIRST_HALF = [
    Entry("plain network, default", plain_network, digits(100), linf(0.1)),
    Entry("PGD-trained network, PGD-100", robust_network, digits(100), linf(0.1), PGD_100),
    Entry("noise-trained smoothed network, EOT 20", lambda: _smoothed(noisy_network(), 0.25), digits(100), linf(0.07)),
    Entry(
        "logits x 1000 under cross-entropy",
        lambda: Scaled(plain_network(), 1000.0),
        digits(60),
        linf(0.07),
        first=("gradient",),
    ),
    Entry("quantised input", lambda: quantised(plain_network(), 8), digits(60), linf(0.1), first=("gradient",)),
    Entry("one step", robust_network, digits(60), linf(0.15), ONE_STEP, ("step-size",)),
    Entry(
        "noise off in the attacker's view",
        lambda: _smoothed(plain_network(), 0.5),
        digits(60),
        linf(0.1),
        NOISE_OFF,
        ("noise",),
    ),
]
SLOW_FIRST_HALF = [
    Entry("PGD-trained network, APGD-100", robust_network, digits(100), linf(0.1), APGD_100),
    Entry("PGD-trained network, default", robust_network, digits(150), linf(0.1)),
    Entry(
        "judged on the base network",
        lambda: _smoothed(plain_network(), 0.5),
        digits(100),
        linf(0.1),
        _on_the_base,
        ("noise",),
    ),
]


@pytest.mark.parametrize("entry", FIRST_HALF, ids=lambda entry: entry.name)
def test_the_zoo_is_told_apart(entry: Entry) -> None:
    """No honest evaluation is flagged and no flattered one passes; the first failed finding is the cause."""
    assert_told_apart(entry, audited(entry))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("entry", [*FIRST_HALF, *SLOW_FIRST_HALF], ids=lambda entry: entry.name)
def test_the_zoo_is_told_apart_by_other_seeds_too(entry: Entry, seed: int) -> None:
    assert_told_apart(entry, audited(entry, seed))


@pytest.mark.parametrize("total", [20, 60, 100, 150, 1000])
@pytest.mark.parametrize("tolerance", [0.03, 0.05, 0.1])
def test_the_verdict_follows_exact_one_sided_tests(total: int, tolerance: float) -> None:
    """``overestimated`` where scipy rejects d <= 1 point at 4 %, which leaves 1 % to the findings that decide alone;
    ``holds`` where it rejects d >= tolerance."""
    for newly in range(total + 1):
        more = stats.binomtest(newly, total, GAIN, alternative="greater").pvalue < 0.04
        less = stats.binomtest(newly, total, tolerance, alternative="less").pvalue < 0.05
        expected = "overestimated" if more else ("holds" if less else "undecided")
        assert decide(newly, total, tolerance, []) == expected, newly
        assert decide(newly, total, tolerance, ["path"]) == ("overestimated" if more else "undecided"), newly
        for name in INVALIDATING:
            assert decide(newly, total, tolerance, [name]) == "overestimated"


@pytest.mark.parametrize(
    ("newly", "total", "tolerance", "failed"),
    [
        (0, 20, 0.05, []),
        (0, 50, 0.05, []),
        (2, 100, 0.05, []),
        (3, 100, 0.05, []),
        (3, 100, 0.05, ["path"]),
        (1, 64, 0.03, []),
    ],
)
def test_images_needed_are_the_fewest_that_decide(newly: int, total: int, tolerance: float, failed: list[str]) -> None:
    """At the observed rate n images decide and n - 1 do not: beta quantiles at n d, an integer or not."""
    assert decide(newly, total, tolerance, failed) == "undecided"
    needed = images_needed(newly, total, tolerance, failed)
    assert needed is not None
    assert needed > total

    def decided(n: int) -> bool:
        k = newly / total * n
        low = stats.beta.ppf(0.04, k, n - k + 1) if newly else 0.0
        high = stats.beta.ppf(0.95, k + 1, n - k)
        return bool(low > GAIN or (high < tolerance and not failed))

    assert decided(needed)
    assert not decided(needed - 1)


def test_images_needed_where_none_would_decide() -> None:
    assert images_needed(0, 100, 0.05, ["path"]) is None
    assert images_needed(1, 100, 0.005, []) is None  # d is the point itself, and above the tolerance


def _report(**changes: Any) -> AuditReport:
    finding = Finding("path", "failed", 0.5, 0.1, "5 of 10 ...", "look at the loss")
    passed = Finding("ball", "passed", None, None, "", "")
    report = AuditReport(
        verdict="undecided",
        evaluation="PGD-20",
        evaluation_accuracy=0.5,
        reference="worst-case-v1",
        reference_accuracy=0.47,
        images=100,
        newly_broken=("a", "b", "c"),
        tolerance=0.05,
        findings=(passed, finding),
        norm="linf",
        epsilon=8 / 255,
        alpha=0.001,
        max_votes=4000,
        seed=3,
    )
    return replace(report, **changes)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = _report()
    write_audit(tmp_path / "audit.json", report)
    stored = json.loads((tmp_path / "audit.json").read_text(), parse_constant=pytest.fail)
    assert AuditReport.from_json(stored) == report
    assert (stored["here"], stored["accuracy_here"]) == (report.reference, report.reference_accuracy)
    assert stored["failed"] == ["path"]
    assert (stored["d"], stored["d_low"], stored["d_high"]) == (report.d, report.d_low, report.d_high)
    assert stored["images_needed"] == report.images_needed == images_needed(3, 100, 0.05, ["path"])
    assert report.d_low == pytest.approx(stats.beta.ppf(0.05, 3, 98))
    assert report.d_high == pytest.approx(stats.beta.ppf(0.95, 4, 97))


def test_a_damaged_report_is_refused() -> None:
    stored = _report().to_json()
    with pytest.raises(InputError, match="format 7"):
        AuditReport.from_json({**stored, "format": 7})
    del stored["images"]
    with pytest.raises(InputError, match=r"not complete.*images"):
        AuditReport.from_json(stored)


def test_the_summary_says_what_failed_and_what_to_do() -> None:
    text = str(_report())
    assert "undecided: PGD-20" in text
    assert "robust accuracy: reported 50.0%, re-measured 47.0% (worst-case-v1)" in text
    assert "failed: path: 5 of 10 ..." in text
    assert "look at the loss" in text
    assert "ball" not in text
    assert f"{_report().images_needed} images would decide" in text
    assert "more images will not decide" in str(_report(newly_broken=("a",)))


def test_every_verdict_on_an_image_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The levels of all verdicts that an audit gives on one image sum to ``alpha`` at most; none is given twice on the
    same draws."""
    spent: dict[str, float] = defaultdict(float)
    purposes: list[tuple[str, tuple[str, ...]]] = []
    judge = SmoothedDefender.judge

    def counted(self: SmoothedDefender, points: LabelledPixels, purpose: str, settings: VerdictSettings) -> Verdicts:
        purposes.append((purpose, points.ids))
        for image_id in points.ids:
            spent[image_id] += settings.level
        return judge(self, points, purpose, settings)

    monkeypatch.setattr(SmoothedDefender, "judge", counted)
    smoothed = SmoothedClassifier(square_half_space(), 0.25, 2)
    report = audit(smoothed, IMAGES, THREAT, alpha=0.01, max_votes=400)
    assert report.verdict == "undecided"  # of 16 images nothing is known to within 5 points
    assert report.images_needed == 59
    assert not report.failed
    assert len(spent) == N
    assert 0.005 < max(spent.values()) <= 0.01 * (1 + 1e-9)
    assert len(set(purposes)) == len(purposes)


def test_the_same_seed_gives_the_same_report() -> None:
    smoothed = SmoothedClassifier(square_half_space(), 0.25, 2)
    first, second = (audit(smoothed, IMAGES, THREAT, max_votes=200, seed=4) for _ in range(2))
    assert first == second
    assert tuple(finding.name for finding in first.findings) == tuple(PROBES)


def test_a_model_in_training_mode_is_a_finding_and_stays_as_it_is() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), square_half_space()).train()
    report = audit(model, IMAGES, THREAT)
    assert report.verdict == "overestimated"
    assert report.failed == ("mode",)
    assert model.training
    assert model[0].num_batches_tracked == 0


def test_a_given_result_is_taken_as_it_is_and_judged_again() -> None:
    """An evaluation that calls held what its own points break is overestimated by all of them."""
    threat = ThreatModel("linf", 0.3)
    made = attack(square_half_space(), IMAGES, threat)
    assert made.broken.all()
    assert audit(square_half_space(), IMAGES, threat, made).verdict == "undecided"
    flattered = replace(made, verdict=1 - made.verdict)
    report = audit(square_half_space(), IMAGES, threat, flattered)
    assert report.verdict == "overestimated"
    assert report.failed[0] == "verdict"
    assert len(report.newly_broken) == N
    assert (report.evaluation_accuracy, report.reference_accuracy) == (1.0, 0.0)


def test_points_that_break_when_judged_again_are_not_attacked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no suite and no probe at all, the evaluation's own points alone show what it called held."""
    threat = ThreatModel("linf", 0.3)
    nothing = Suite("nothing", "nothing-v0", "nothing", (Plan("clean", "no attack", "none"),))
    monkeypatch.setattr(audit_module, "worst_case", lambda *_: nothing)
    monkeypatch.setattr(audit_module, "_findings", lambda _: ())
    made = attack(square_half_space(), IMAGES, threat)
    report = audit(square_half_space(), IMAGES, threat, replace(made, verdict=1 - made.verdict))
    assert len(report.newly_broken) == N


@pytest.mark.parametrize("smoothed", [False, True])
def test_a_known_result_of_the_suite_is_judged_again_and_the_suite_is_not_run(
    smoothed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its points break what the evaluation held, whatever its verdicts say, and no draw of these is used again."""
    model: Any = SmoothedClassifier(square_half_space(), 0.1, 2) if smoothed else square_half_space()
    threat, purposes = ThreatModel("linf", 0.3), list[str]()
    weak, made = attack(model, IMAGES, threat, "none"), attack(model, IMAGES, threat, "worst-case")
    assert made.broken.all()
    judge = type(defend(model)).judge

    def recorded(self: Any, points: Any, purpose: str, settings: Any) -> Any:
        purposes.append(purpose)
        return judge(self, points, purpose, settings)

    monkeypatch.setattr(type(defend(model)), "judge", recorded)
    monkeypatch.setattr(audit_module, "_findings", lambda _: ())
    monkeypatch.setattr(Case, "attack", None)
    report = audit(model, IMAGES, threat, weak, suite=replace(made, verdict=1 - made.verdict))
    assert (report.verdict, len(report.newly_broken)) == ("overestimated", int(weak.held.sum()))
    assert report.reference.endswith("(worst-case-v1), judged again")
    assert purposes == ["audit-again", "audit-suite"]
    with pytest.raises(InputError, match=r"must be the AttackResult of the worst case of .* got no attack"):
        audit(model, IMAGES, threat, weak, suite=weak)
    with pytest.raises(InputError, match=r"must be the AttackResult of the worst case of .* got Suite"):
        audit(model, IMAGES, threat, weak, suite=made.plan)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not, in this order"):
        audit(model, IMAGES, threat, weak, suite=made.select([0, 1]))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images": (IMAGES[0].flip(0), IMAGES[1].flip(0))}, "not, in this order"),
        ({"images": (IMAGES[0], 1 - IMAGES[1])}, "not, in this order"),
        ({"threat": ThreatModel("l2", 0.05)}, "audit under the threat model that was evaluated"),
        ({"threat": ThreatModel("linf", 0.06)}, "audit under the threat model that was evaluated"),
        ({"evaluation": "pgd"}, "must be an AttackResult, a Plan, a Suite or None, got str"),
    ],
)
def test_an_evaluation_of_something_else_is_refused(changes: dict[str, Any], match: str) -> None:
    given = {"images": IMAGES, "threat": THREAT, "evaluation": attack(square_half_space(), IMAGES, THREAT)}
    with pytest.raises(InputError, match=match):
        audit(square_half_space(), **{**given, **changes})


@pytest.mark.parametrize("numbers", [{"tolerance": 0.0}, {"tolerance": 5}, {"alpha": 0.7}, {"max_votes": 10}])
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(numbers))):
        audit(square_half_space(), IMAGES, THREAT, **numbers)


def test_the_default_is_named_in_the_report() -> None:
    assert default_plan("random").eot_samples == 20
    assert default_plan("plain").passes_per_image == 20
    report = audit(square_half_space(), IMAGES, THREAT)
    assert report.evaluation == "PGD-20, cross-entropy (the default)"
    assert "worst-case-v1" in report.reference


def test_newly_broken_images_are_named() -> None:
    """One step of a quarter of a ball that holds the plane for half of the images."""
    threat = ThreatModel("linf", 0.15)
    report = audit(square_half_space(), IMAGES, threat, replace(ONE_STEP, step_size=0.01, start="clean"))
    within = np.abs(square_half_space().linf_distances(IMAGES[0])) < 0.15
    assert set(report.newly_broken) == set(np.array(labelled_pixels(IMAGES).ids)[within])
    assert report.failed[0] == "step-size"


def test_digits_of_the_zoo_are_the_test_set() -> None:
    x, y = digits(100)
    assert x.shape == (100, 1, 8, 8)
    assert len(y.unique()) == 10


def test_copies_of_a_picture_are_audited_once() -> None:
    """One image on the wrong side of a weak evaluation, a hundred times: no bound comes of it."""
    plane = square_half_space()
    x = square_images(np.array([0.01, *np.linspace(0.3, 0.4, 9)]), seed=0)
    y, threat = plane(x).argmax(1), ThreatModel("linf", 0.02)
    rows = [0] * 100 + list(range(1, 10))
    weak = attack(plane, (x[rows], y[rows]), threat, method="none")
    with pytest.warns(CopiesWarning, match="99 of 109 images are copies"):
        report = audit(plane, (x[rows], y[rows]), threat, weak)
    assert report.images == 10
    assert len(report.newly_broken) == 1
    assert report.d == 0.1
    single = attack(plane, (x, y), threat, method="none")
    assert audit(plane, (x, y), threat, single).d_low == report.d_low
