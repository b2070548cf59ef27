"""Probes on models and evaluations made to fail one of them, and on honest ones that must pass it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rush
from audit_zoo import Scaled, quantised
from exact_models import HalfSpace, assert_in_threat, square_half_space, square_images
from random_models import NoisyHalfSpace
from rush.attacks.gradient import fresh_noise
from rush.attacks.losses import margin
from rush.attacks.random_search import random_search
from rush.attacks.threat import ThreatModel, norms
from rush.auditing import measures
from rush.auditing.audit import PROBES
from rush.auditing.case import Case
from rush.auditing.findings import Finding
from rush.auditing.planted import Planted, edge_point
from rush.auditing.surrogates import Changed
from rush.choices import Decision, Norm
from rush.data.checks import LabelledPixels, labelled_pixels
from rush.evaluation import model as defenders
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import Defender, Model, SmoothedDefender
from rush.evaluation.plans import Plan, worst_case
from rush.evaluation.result import AttackResult
from rush.evaluation.verdict import BROKEN, HELD, UNDECIDED, VerdictSettings
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier

N = 24
# l-inf distances 0.1 to 0.2 from the plane: nothing is broken at 0.05, everything at 0.5
MARGINS = np.linspace(0.2, 0.4, N) * np.where(np.arange(N) % 2, 1, -1)
X, Y = square_images(MARGINS, seed=0), torch.from_numpy((MARGINS > 0).astype(np.int64))
MANY = torch.cat([X, X + 0.001, X - 0.001]), Y.repeat(3)  # enough to show a gain of 50 points over one of 20
THREAT = ThreatModel("linf", 0.05)
SIGMA = 0.25
PGD = Plan("pgd", "PGD-20", "pgd", "fresh", 0, 20, 0.25)
EOT = replace(PGD, eot_samples=8)


def _prepared(
    model: Model,
    threat: ThreatModel = THREAT,
    images: tuple[Tensor, Tensor] = (X, Y),
    decision: Decision | None = None,
) -> tuple[Defender, LabelledPixels]:
    evaluation = Evaluation.of(model, images, threat, VerdictSettings(1e-3, 100, 0), decision)
    return evaluation.defender, evaluation.images


def _case(
    model: Model,
    plan: Plan | None = None,
    *,
    threat: ThreatModel = THREAT,
    tampered: Callable[[AttackResult], AttackResult] = lambda result: result,
    **options: object,
) -> Case:
    """Return the audit of ``plan`` on the half space's images, with its result ``tampered``."""
    images = options.pop("images", (X, Y))
    doors = {name: options.pop(name, None) for name in ("decision", "surrogate")}
    judging = VerdictSettings(1e-4, 1000, 0)
    evaluation = Evaluation.of(model, images, threat, judging, **doors, declared=False)  # type: ignore[arg-type]
    defender, pixels = evaluation.defender, evaluation.images
    made = evaluation.run(plan or (PGD if defender.kind == "plain" else EOT))
    options["surrogate"] = doors["surrogate"]
    return Case(model, defender, pixels, threat, tampered(made), judging, **options)  # type: ignore[arg-type]


def _probed(name: str, case: Case) -> Finding:
    finding = PROBES[name](case)
    assert finding.name == name
    return finding


def _smoothed(sigma: float = SIGMA) -> SmoothedClassifier:
    return SmoothedClassifier(square_half_space(), sigma, 2)


def _moved(factor: float) -> Callable[[AttackResult], AttackResult]:
    """Return a function that multiplies the change of every point by ``factor``."""
    return lambda result: replace(result, adversarial=X + factor * (result.adversarial - X))


def in_batch() -> nn.Module:
    """The half space on images without their batch's mean."""
    return Changed(square_half_space(), lambda x: x - 0.5 * x.mean(0, keepdim=True))


class QuietUnderAttack(NoisyHalfSpace):
    """Stochastic, but not where gradients are on."""

    def draws(self, rows: int) -> Tensor:
        return torch.zeros(rows) if torch.is_grad_enabled() else super().draws(rows)


class RandomSlope(nn.Module):
    """A plane whose normal gets a new normal draw of deviation ``spread`` at every call, one for each row."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        weight = 0.5 + self.spread * torch.randn(x.flatten(1).shape)
        score = (weight * x.flatten(1)).sum(1) - 1
        return torch.stack([-score, score], 1)


def noisy(spread: float = 0.1) -> NoisyHalfSpace:
    return NoisyHalfSpace(torch.full((1, 2, 2), 0.5), -1.0, spread)


def wrong_way() -> HalfSpace:
    return HalfSpace(torch.full((1, 2, 2), -0.5), 1.0)


def test_an_honest_evaluation_of_an_exact_model_passes_everything() -> None:
    """Smoothed by noise, so that nothing is skipped but what was not given. Failing by chance: a false verdict on one
    of 24 images in each of ten attacks, 10 x 24 x 1e-4 by the levels; in truth margins are 0.6 sigma and more."""
    case = _case(_smoothed())
    statuses = {name: probe(case).status for name, probe in PROBES.items()}
    assert set(statuses.values()) == {"passed", "skipped"}
    assert [name for name, status in statuses.items() if status == "skipped"] == [
        "verdict",
        "frozen-noise",
        "straight-through",
        "certificates",
    ]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("input-range", lambda: _case(_smoothed(), tampered=lambda result: replace(result, adversarial=255 * X))),
        ("pixel-scale", lambda: _case(Changed(square_half_space(), lambda x: x / 255), images=MANY)),
        ("ball", lambda: _case(square_half_space(), tampered=_moved(1.1))),
        ("ball", lambda: _case(square_half_space(), tampered=_moved(255 / 256))),
        ("ball", lambda: _case(square_half_space(), tampered=_moved(0.5))),
        ("mode", lambda: _case(square_half_space(), training_layers=("layer",))),
        ("mode", lambda: _case(in_batch())),
        ("randomness", lambda: _case(noisy())),
        ("randomness", lambda: _case(square_half_space(), decision="vote")),
        ("noise", lambda: _case(_smoothed(), replace(PGD, gradient="transfer"))),
        ("noise", lambda: _case(_smoothed(), tampered=lambda result: replace(result, plan=PGD))),
        ("noise", lambda: _case(QuietUnderAttack(torch.full((1, 2, 2), 0.5), -1.0, 0.1), decision="vote")),
        ("gradient", lambda: _case(Scaled(square_half_space(), 1e5))),
        ("gradient", lambda: _case(quantised(square_half_space(), 16))),
        ("finite-differences", lambda: _case(square_half_space(), surrogate=wrong_way())),
        ("step-size", lambda: _case(square_half_space(), replace(PGD, steps=3))),
        ("step-size", lambda: _case(square_half_space(), tampered=_moved(0.3))),
        ("signal-to-noise", lambda: _case(RandomSlope(3.0), replace(EOT, eot_samples=1), decision="vote")),
        ("path", lambda: _case(square_half_space(), tampered=_moved(0.0))),
        ("path", lambda: _case(square_half_space(), surrogate=wrong_way())),
        ("large-epsilon", lambda: _case(Scaled(square_half_space(), 1e5))),
        ("planted", lambda: _case(square_half_space(), replace(PGD, steps=1))),
        ("planted", lambda: _case(Scaled(square_half_space(), 1e5))),
    ],
)
def test_a_flaw_is_found(name: str, case: Callable[[], Case]) -> None:
    """RandomSlope's images are random, the attack's view of them too; it is wide enough to fail in any draw: 12 draws
    are needed, one is used."""
    assert _probed(name, case()).status == "failed"


@pytest.mark.parametrize("name", ["randomness", "noise", "signal-to-noise", "planted", "large-epsilon", "path"])
def test_a_foreign_random_model_attacked_as_it_is_passes(name: str) -> None:
    """Nothing is left to chance in the noise: both sides see the same draws."""
    assert _probed(name, _case(noisy(), decision="vote")).status == "passed"


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_the_attackers_sigma_is_measured(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defender that hands the attacker ``share`` of its sigma; each deviation has a standard error of about 1 %."""

    def other_noise(smoothed: SmoothedClassifier, draws: int, generators: Sequence[torch.Generator]) -> object:
        return fresh_noise(SmoothedClassifier(smoothed.classifier, share * smoothed.sigma, 2), draws, generators)

    monkeypatch.setattr(defenders, "fresh_noise", other_noise)
    attacker, defender = measures.sigmas(_smoothed(), EOT, X.shape[1:], 0)
    assert attacker == pytest.approx(share * SIGMA, rel=0.06)
    assert defender == pytest.approx(SIGMA, rel=0.06)


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_draws_needed_of_a_slope_with_known_noise(spread: float) -> None:
    """The margin's gradient is 2 (w + spread z), signal 4 ||w||^2 = 4, noise 4 spread^2 x 4 pixels: a cosine of 1/2
    takes noise / (3 signal) draws. 1,000 repeats: the median of 24 images is within 25 % but for 1e-4."""
    defender, pixels = _prepared(RandomSlope(spread), decision="vote")
    one = defender.log_probs(replace(EOT, eot_samples=1), pixels.x, pixels.ids, 0, "test")
    needed = measures.draws_needed(one, pixels.x, pixels.y, margin, 1, 1000)
    assert np.median(needed) == pytest.approx(4 * spread**2 / 3, rel=0.25)


def test_slopes_of_a_plane_agree_exactly() -> None:
    defender, pixels = _prepared(square_half_space())
    log_probs = defender.log_probs(PGD, pixels.x, pixels.ids, 0, "test")
    slopes = measures.slopes_at(log_probs, pixels.x, pixels.y, THREAT, stream(0, "test"))
    assert measures.agreement([slopes]) == pytest.approx((1.0, 1.0, N), rel=1e-3)


def test_verdicts_that_do_not_stand_are_found() -> None:
    """Six images called broken that are held, or left undecided that are broken; six left undecided are no fault."""
    case = _case(_smoothed())
    judged = case.defender.judge(replace(case.pixels, x=case.points), "again", VerdictSettings(1e-4, 1000, 0))
    verdict = np.full(N, HELD, np.uint8)
    for called, now, status in ((BROKEN, HELD, "failed"), (UNDECIDED, BROKEN, "failed"), (UNDECIDED, HELD, "passed")):
        reported, rejudged = verdict.copy(), verdict.copy()
        reported[:6], rejudged[:6] = called, now
        case.evaluation, case.rejudged = replace(case.evaluation, verdict=reported), replace(judged, verdict=rejudged)
        assert _probed("verdict", case).status == status


def test_transfer_through_a_surrogate_finds_what_a_masked_gradient_hides() -> None:
    """At 0.25 every image can be broken, and the evaluation, one random draw, breaks few."""
    weak = Plan("weak", "one random point", "random", steps=1, loss="margin", start="clean")
    case = _case(
        quantised(square_half_space(), 64), weak, threat=ThreatModel("linf", 0.25), surrogate=square_half_space()
    )
    assert len(case.held) > N // 2
    assert _probed("transfer", case).status == "failed"
    assert case.results[0].broken.all()


def test_a_suites_attacks_are_named() -> None:
    case = _case(square_half_space(), replace(PGD, steps=1, step_size=0.01), threat=ThreatModel("linf", 0.15))
    case.attack(worst_case("plain", 2), case.held)
    finding = _probed("worst-case", case)
    assert finding.status == "failed"
    assert "PGD-20" in finding.evidence


def test_certificates_in_l1_are_compared_in_l1() -> None:
    """An l1 attack at 1.2 times the distance: it breaks l1 radii of 1.3 times that distance, and none in l2 of 0.5."""
    smoothed = _smoothed()
    certificates = rush.certify(smoothed, (X, Y), num_estimation=10_000)
    distance = np.abs(square_half_space().scores(X)) / 0.5
    threat, plan = ThreatModel("l1", torch.from_numpy(1.2 * distance).float()), replace(EOT, eot_samples=4)
    for share, status in ((1.3, "failed"), (0.9, "passed")):
        rule = replace(certificates.rule, noise="laplace")
        given = replace(certificates, radius=share * distance, rule=rule)
        assert _probed("certificates", _case(smoothed, plan, threat=threat, certificates=given)).status == status


def test_certificates_above_the_attack_are_found() -> None:
    """Radii 1.5 times too large, and an attack in l2 at 1.2 times the distances."""
    smoothed = _smoothed()
    certificates = rush.certify(smoothed, (X, Y), num_estimation=10_000)
    threat = ThreatModel("l2", torch.from_numpy(1.2 * np.abs(MARGINS)).float())
    plan = replace(EOT, eot_samples=4)
    assert _probed("certificates", _case(smoothed, plan, threat=threat, certificates=certificates)).status == "passed"
    inflated = replace(certificates, radius=1.5 * certificates.radius)
    assert _probed("certificates", _case(smoothed, plan, threat=threat, certificates=inflated)).status == "failed"


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 0.1), ("l1", 0.2)])
@pytest.mark.parametrize("kind", ["plain", "random"])
def test_planted_examples_are_at_their_points(norm: Norm, epsilon: float, kind: str) -> None:
    """Nothing changes at the image; at the planted point, inside the ball, the other class wins by 0.5 nats and more.

    Random model: 200 draws of a margin with little spread, far from 0.5 nats."""
    threat = ThreatModel(norm, epsilon)
    defender, pixels = _prepared(square_half_space() if kind == "plain" else _smoothed(), threat)
    planted = Planted(defender, pixels, threat, 0)
    slopes, tilted = planted.slopes, planted.tilt(pixels.ids, X.device)
    assert torch.allclose(tilted(torch.zeros(N, 2), X).exp(), torch.full((N, 2), 0.5))
    sizes = slopes.flatten(1).norm(dim=1)
    assert bool((sizes > 0).all())
    direction = slopes.sign() if norm == "linf" else slopes / sizes.view(-1, 1, 1, 1)
    points = threat.project(X + epsilon * direction, X)
    assert_in_threat(points, X, threat)
    assert bool((planted.defender.choice_margin(replace(pixels, x=points), "test", 0) > 0.3).all())
    assert bool((planted.defender.choice_margin(pixels, "test", 0) < 0).all())


def test_random_points_do_not_find_what_is_planted() -> None:
    """In 64 pixels 100 random corners come 0.4 of the way at most; the planted class takes 0.8 of it. Failing: one of
    2,400 sums of 64 signs beyond 6 of its deviations, < 1e-5."""
    x = 0.25 + 0.5 * torch.rand(N, 1, 8, 8, generator=stream(0, "test"))
    model = HalfSpace(torch.full((1, 8, 8), 1 / 8), -8.0)
    threat, y = ThreatModel("linf", 0.02), torch.zeros(N, dtype=torch.int64)
    defender, pixels = _prepared(model, threat, (x, y))
    planted = Planted(defender, pixels, threat, 0)
    log_probs = planted.log_probs(PGD, x, pixels.ids, 0, "test")
    points = random_search(log_probs, x, y, threat, [stream(0, image_id) for image_id in pixels.ids], draws=100)
    assert bool((planted.defender.choice_margin(replace(pixels, x=points), "test", 0) < 0).all())
    result = Evaluation(planted.defender, pixels, threat, VerdictSettings(1e-3, 100, 0)).run(PGD)
    assert bool(result.broken.all())


def test_a_defender_of_grey_images_is_only_watched_for_the_noise() -> None:
    """The measurement leaves the model as it was: no layer is wrapped, no hook stays."""
    smoothed = _smoothed()
    before = dict(smoothed.classifier.named_modules())
    measures.sigmas(smoothed, EOT, X.shape[1:], 0)
    assert dict(smoothed.classifier.named_modules()) == before
    assert isinstance(_case(smoothed).defender, SmoothedDefender)
    assert not smoothed.classifier._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("more-steps", {"steps": 40}),
        ("more-eot-samples", {"eot_samples": 16}),
        ("more-restarts", {"start": "random"}),
        ("other-loss", {"loss": "margin"}),
        ("fixed-noise-attack", {"gradient": "frozen"}),
        ("transfer", {"gradient": "transfer", "method": "apgd"}),
        ("smoothed-surrogate", {"method": "apgd", "steps": 20, "eot_samples": 16, "loss": "margin"}),
        ("square", {"method": "square", "steps": 100, "loss": "margin"}),
        ("random-search", {"method": "random", "steps": 50, "loss": "margin"}),
    ],
)
def test_a_probe_runs_the_attack_that_it_names(name: str, changed: dict[str, object]) -> None:
    """On the held images, with draws of its own; the rest of the evaluation's plan stays where the attack is the
    same."""
    case = _case(_smoothed())
    assert _probed(name, case).status == "passed"
    (result,) = case.results
    plan = result.plan
    assert isinstance(plan, Plan)
    assert len(result) == len(case.held) == N
    assert plan.name == f"audit-{name}"
    assert {field: getattr(plan, field) for field in changed} == changed
    if plan.method == "pgd":
        assert replace(plan, label="", name="", **changed) == replace(EOT, label="", name="", **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(("broken", "status"), [(0, "passed"), (1, "undecided"), (2, "failed")])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("frozen-noise", lambda: _case(_smoothed(), replace(EOT, gradient="frozen"))),
        ("straight-through", lambda: _case(quantised(square_half_space(), 16))),
        *(
            (name, lambda: _case(_smoothed()))
            for name in (
                "more-eot-samples",
                "more-steps",
                "more-restarts",
                "other-loss",
                "fixed-noise-attack",
                "transfer",
                "smoothed-surrogate",
                "square",
                "random-search",
            )
        ),
    ],
)
def test_an_attack_that_breaks_more_is_a_finding(
    name: str, case: Callable[[], Case], broken: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 24 images the exact lower bound of two exceeds the point that an attack may gain, that of one does not."""
    audited = case()
    verdict = np.where(np.arange(N) < broken, BROKEN, HELD).astype(np.uint8)
    monkeypatch.setattr(Case, "attack", lambda *_: replace(audited.evaluation, verdict=verdict))
    finding = _probed(name, audited)
    assert (finding.status, finding.figure) == (status, broken / N)
    assert finding.remedy


def test_frozen_noise_is_tried_again_with_fresh_noise() -> None:
    case = _case(_smoothed(), replace(EOT, gradient="frozen"))
    assert _probed("frozen-noise", case).status == "passed"
    assert case.results[0].plan == replace(EOT, name="audit-frozen-noise")
    assert _probed("fixed-noise-attack", case).status == "skipped"


def test_few_steps_become_ten() -> None:
    case = _case(square_half_space(), replace(PGD, method="fgsm", steps=1, step_size=1.0))
    _probed("more-steps", case)
    plan = case.results[0].plan
    assert isinstance(plan, Plan)
    assert (plan.method, plan.steps, plan.step_size) == ("pgd", 10, 0.25)


@pytest.mark.parametrize(("degrees", "status"), [(0, "passed"), (40, "passed"), (75, "failed"), (90, "failed")])
def test_a_gradient_at_an_angle_to_the_slope(degrees: int, status: str) -> None:
    """A surrogate plane turned by an angle: the agreement is its cosine, to 1 / sqrt(24 images x 16 directions) = 0.05;
    the cosines tested are at least 5 of these away from 0.5."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    along, across = torch.full((1, 2, 2), 0.5), torch.tensor([[[0.5, -0.5], [0.5, -0.5]]])
    surrogate = HalfSpace(float(cosine) * along + float(sine) * across, -1.0)
    finding = _probed("finite-differences", _case(square_half_space(), surrogate=surrogate))
    assert finding.status == status
    assert finding.figure == pytest.approx(cosine, abs=0.25)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_black_and_white_images_are_planted_at_the_edge_too(norm: Norm) -> None:
    """Where a pixel can move one way alone, it moves that way: the change is epsilon long."""
    x = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4), 0.01 * torch.ones(1, 4, 4)])
    pixels, threat = labelled_pixels((x, torch.zeros(3, dtype=torch.int64))), ThreatModel(norm, 0.4)
    points = torch.stack([edge_point(image_id, row, threat, pixels, 0) for row, image_id in enumerate(pixels.ids)])
    assert_in_threat(points, x, threat)
    assert norms(points, x, norm).numpy() == pytest.approx(np.full(3, 0.4), rel=1e-5)


def test_transferred_points_are_judged_by_the_model() -> None:
    """A surrogate whose plane is near breaks on itself what the model holds."""
    near = HalfSpace(torch.full((1, 2, 2), 0.5), -1.0)
    near.bias = -1.15  # within 0.05 of the images at 0.2 from the model's own plane on its upper side
    case = _case(square_half_space(), surrogate=near)
    assert _probed("transfer", case).status == "passed"
    assert not case.results[0].broken.any()
