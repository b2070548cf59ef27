"""Results as words and table rows: the only place where a fraction becomes a percentage."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rush.auditing.findings import Finding
from rush.auditing.report import AuditReport
from rush.certification.certificates import Certificates
from rush.choices import CertifyMethod, Stage
from rush.records.ladder import CurvePoint, Ladder, Rung
from rush.records.read_run import RunResults, StageRecord
from rush.statistics import Interval

NORM_SIGNS: Mapping[str, str] = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1"}
NOT_CERTIFIED = (
    "the classifier is used without smoothing noise, of which certificates speak; what attacks leave of it is an upper "
    "bound, and nothing is proved"
)
_METHOD_SIGNS: Mapping[CertifyMethod, str] = {"clopper-pearson": "Clopper–Pearson", "sequential": "Sequential"}
_STATUSES = ("failed", "undecided", "passed", "skipped")  # what asks for a reader first
_LISTED = 8  # a longer grid is told by its ends
_NOT_DONE: Mapping[Stage, str] = {
    "pretrain": "not pre-trained yet",
    "finetune": "not fine-tuned yet",
    "certify": "not certified yet",
    "attack": "not attacked yet",
    "audit": "not audited yet",
}
# What the curve may leave where all images can be made one grey: the audit's large-epsilon finding has the same bound.
_NEAR_ZERO = 0.1


@dataclass(frozen=True)
class LadderRow:
    """One attacker of the ladder as printed; ``share`` fields are None where there is nothing to say."""

    label: str
    budget: str
    passes: str
    forward: str
    seconds: str
    accuracy: str
    held: str
    undecided: str
    step: str
    to_last_eot: str
    strongest: bool


@dataclass(frozen=True)
class CostRow:
    """What a stage took, as printed; ``objective`` is empty where a stage has none, "–" stands for what it does not
    say."""

    stage: str
    objective: str
    time: str
    passes: str
    rate: str
    memory: str
    energy: str


@dataclass(frozen=True)
class CurveRow:
    """One epsilon of the curve as printed; ``floor`` is empty without certificates, ``own`` marks the run's threat."""

    epsilon: str
    accuracy: str
    held: str
    undecided: str
    floor: str
    own: bool


@dataclass(frozen=True)
class FindingRow:
    """One finding of the audit as printed; ``remedy`` is empty where there is nothing to do."""

    name: str
    status: str
    figure: str
    threshold: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class CertifiedRow:
    """Certified accuracy at one radius as printed; ``decided``: further shares, () with a fixed number of samples."""

    radius: str
    accuracy: str
    lower: str
    decided: tuple[str, ...]


@dataclass(frozen=True)
class ComparisonRow:
    """A published or own pair of figures and the conditions they hold under; ``own`` marks this run's rows."""

    source: str
    data: str
    model: str
    attack: str
    clean: str
    robust: str
    own: bool


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def bounds(interval: Interval) -> str:
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def share(interval: Interval) -> str:
    return f"{percent(interval.estimate)} {bounds(interval)}"


def points(difference: Interval) -> str:
    """A difference of two shares in percentage points, with its sign and interval."""
    low, high = (f"{100 * end:+.1f}" for end in (difference.low, difference.high))
    return f"{100 * difference.estimate:+.1f} [{low}, {high}]".replace("-", "−")


def count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:,.1f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def passes_text(passes: float, forward_passes: float) -> str:
    """Forward and backward passes together, then those that only went forward, where there are any."""
    if not passes and forward_passes:
        return f"{count(forward_passes)} forward only"
    return count(passes) + (f" + {count(forward_passes)} forward only" if forward_passes else "")


def memory_text(size: float | None) -> str:
    """Bytes as gigabytes, "–" where they are not known."""
    return f"{size / 1e9:.2f} GB" if size else "–"


def energy_text(joules: float | None) -> str:
    """Joules with their prefix, "–" where the device did not tell."""
    if joules is None:
        return "–"
    scale, unit = next(pair for pair in ((1e6, "MJ"), (1e3, "kJ"), (0, "J")) if joules >= pair[0])
    return f"{joules / (scale or 1):.3g} {unit}"


def threat_text(ladder: Ladder) -> str:
    return f"{NORM_SIGNS[ladder.norm]} {ladder.epsilon_text}"


def audited_threat_text(audit: AuditReport) -> str:
    """Norm and epsilon of the audit, of l-inf in grey levels."""
    levels = f"{255 * audit.epsilon:.4g}/255"
    return f"{NORM_SIGNS[audit.norm]} {levels if audit.norm == 'linf' else f'{audit.epsilon:.4g}'}"


def not_done(results: RunResults) -> tuple[tuple[str, str], ...]:
    """For every unfinished stage what is missing and the command that makes it."""
    return tuple((_NOT_DONE[stage], results.command(stage)) for stage in results.missing)


def summary_rows(results: RunResults) -> list[tuple[str, str]]:
    """The run in a few lines of name and value, weakest claim first; unfinished stages say what to run."""
    rows = [*_certified_rows(results), *_attacked_rows(results), *_audit_rows(results)]
    return rows + [(what, f"`{command}`") for what, command in not_done(results)]


def _certified_rows(results: RunResults) -> Iterator[tuple[str, str]]:
    certificates, ladder = results.certificates, results.ladder
    if results.plain:
        yield "certificates", f"none: {NOT_CERTIFIED}"
    if certificates is None:
        return
    yield "certified by", method_text(certificates)
    yield "level", f"{certificates.rule.statement}, over the noise"
    yield "samples an image", samples_text(certificates)
    for radius in dict.fromkeys((certificates.table_radii[0], headline_radius(certificates))):
        yield (
            f"certified at ℓ2 {radius_text(radius)}",
            _certified_text(certificates, radius) + _rest(certificates, radius),
        )
    if copies_text(certificates):
        yield "copies of a picture", copies_text(certificates)
    yield certificates.acr_name, acr_text(results)
    proved = results.threat_certificates
    if ladder is not None and proved is not None:
        yield f"certified floor at {threat_text(ladder)}", _certified_text(proved, ladder.covering_radius)
    yield "true ≥", "of the data's distribution, with 95 % confidence over images and noise together"


def _certified_text(certificates: Certificates, radius: float) -> str:
    size = f"(n = {certificates.num_pictures:,})"
    return f"{share(certificates.accuracy_interval(radius))} {size}, true ≥ {lower_text(certificates, radius)}"


def _rest(certificates: Certificates, radius: float) -> str:
    """The images that are not certified with the right class."""
    decided = certificates.other_shares(radius) or {}
    return "".join(f", {name} {percent(part.estimate)}" for name, part in decided.items())


def lower_text(certificates: Certificates, radius: float) -> str:
    """The lower bound on the true certified accuracy, rounded down."""
    return percent(math.floor(1000 * certificates.accuracy_lower(radius)) / 1000)


def copies_text(certificates: Certificates) -> str:
    """Say how many images are not counted because they are copies, or that this is not known; empty without any."""
    copies = certificates.num_copies
    if copies is None:
        return "not known: the table is older than the column that tells pictures apart, so every image is counted"
    one = "1 image is a copy of another" if copies == 1 else f"{copies:,} images are copies of others"
    return f"{one}: each picture is counted once, as certified only if all of its copies are" if copies else ""


def method_text(certificates: Certificates) -> str:
    """Method, name of the test martingale where there is one, and the grid where there is one."""
    name = _METHOD_SIGNS[certificates.rule.method]
    test = f" ({certificates.rule.bound})" if certificates.rule.method == "sequential" else ""
    return f"{name}{test}{', ' if certificates.rule.radii else ''}{grid_text(certificates)}"


def headline_radius(certificates: Certificates) -> float:
    """Return sigma / 2, or the grid's first radius from there on, its last where there is none."""
    half, radii = certificates.sigma / 2, certificates.rule.radii
    return half if radii is None else next((radius for radius in radii if radius >= half), radii[-1])


def grid_text(certificates: Certificates) -> str:
    """The grid in words, empty without one."""
    radii = certificates.rule.radii
    if radii is None:
        return ""
    if len(radii) > _LISTED:
        return f"grid of {len(radii)} radii from {radius_text(radii[0])} to {radius_text(radii[-1])}"
    return f"grid {' / '.join(radius_text(radius) for radius in radii)}"


def samples_text(certificates: Certificates) -> str:
    """Mean and cap of a sequential run, else the fixed number; selection and estimation together."""
    most = f"{certificates.rule.num_samples:,}"
    if certificates.rule.method == "sequential":
        most = f"{certificates.num_samples.mean():,.0f} on average, at most {most}"
    return f"{most}, {certificates.num_selection:,} of them to select the class"


def radius_text(radius: float) -> str:
    """``radius`` with the six decimals that radii have, without trailing zeros."""
    return f"{radius:.6f}".rstrip("0").rstrip(".")


def _attacked_rows(results: RunResults) -> Iterator[tuple[str, str]]:
    ladder = results.ladder
    if ladder is None:
        return
    size = f"(n = {ladder.clean.num_pictures:,})"
    yield "clean accuracy", f"{share(ladder.clean.accuracy)} {size}"
    yield f"attacked, {threat_text(ladder)}, {ladder.strongest.label}", f"{share(ladder.strongest.accuracy)} {size}"
    if ladder.worst_case is not None:
        told = f"{share(ladder.worst_case.accuracy)} {size}, held {share(ladder.worst_case.accuracy_lower)}"
        yield f"worst case, {threat_text(ladder)}, {ladder.worst_case.suite}", told
    yield "attacked, by any rung of the ladder", f"{share(ladder.combined)} {size}"
    if ladder.flattering is not None:
        yield f"{ladder.flattering.label} flatters by", f"{points(ladder.flattering.above(ladder.reference))} points"
    if not results.plain:
        yield "sandwich", sandwich_text(results)


def _audit_rows(results: RunResults) -> Iterator[tuple[str, str]]:
    audit = results.audit
    if audit is None:
        return
    yield "audited evaluation", f"{audit.evaluation}, {audited_threat_text(audit)} (n = {audit.images:,})"
    yield "audit", f"{audit.verdict}: {audit_sentence(audit)}"
    yield "accuracy there and here", f"{share(audit.claimed)} and {share(audit.measured)}"
    for finding in audit.failed_findings:
        yield f"audit: {finding.name} failed", finding.evidence


def acr_text(results: RunResults) -> str:
    """Average certified radius with what it depends on: N, or mean samples and cap, and the grid."""
    certificates = results.certificates
    if certificates is None:
        return ""
    samples = f"N = {certificates.num_estimation:,}"
    if certificates.rule.method == "sequential":
        mean = certificates.num_samples.mean()
        samples = f"{mean:,.0f} samples an image, at most {certificates.rule.num_samples:,}"
    return f"{certificates.acr:.3f} ({'; '.join(filter(None, (samples, grid_text(certificates))))})"


def sandwich_text(results: RunResults) -> str:
    if results.ladder is None:
        return ""
    sandwich = results.ladder.sandwich
    return f"{len(sandwich.violations)} violations, {sandwich.checked:,} images checked, {sandwich.allowed} allowed"


def ladder_rows(ladder: Ladder) -> list[LadderRow]:
    """The rungs in their order, each with its paired difference to the one before and to the last EOT rung."""
    before = (None, *ladder.rungs[:-1])
    return [_ladder_row(ladder, rung, previous) for rung, previous in zip(ladder.rungs, before, strict=True)]


def _ladder_row(ladder: Ladder, rung: Rung, previous: Rung | None) -> LadderRow:
    last = ladder.last_eot
    forward = float(rung.settings.get("forward_passes_per_image") or 0)
    return LadderRow(
        label=rung.label,
        budget=budget_text(rung),
        passes=count(float(rung.settings.get("passes_per_image") or 0)),
        forward=count(forward) if forward else "",
        seconds=duration(float(rung.settings.get("seconds") or 0)),
        accuracy=share(rung.accuracy),
        held=share(rung.accuracy_lower),
        undecided=f"{rung.undecided:,}" if rung.undecided else "–",
        step="–" if previous is None else points(rung.above(previous)),
        to_last_eot="–" if last is None or last is rung else points(rung.above(last)),
        strongest=rung is ladder.strongest,
    )


def budget_text(rung: Rung) -> str:
    """Steps or queries, noise draws per gradient and restarts, as far as the attacker has them; a suite's version."""
    settings = rung.settings
    unit = {"square": "queries", "random": "draws"}.get(str(settings.get("method")), "steps")
    size = f" of {_step_text(settings['step_size'])}" if settings.get("step_size") else ""
    parts = [f"{settings['steps']:,} {unit}{size}"] if settings.get("steps") else []
    parts += [f"EOT {settings['eot_samples']}"] if settings.get("eot_samples") else []
    parts += [f"{settings['restarts']} restarts"] if (settings.get("restarts") or 1) != 1 else []
    return ", ".join([*parts, *filter(None, [rung.suite])])


def attackers_text(rung: Rung) -> str:
    """How many images each attacker of a suite was the first to break, those that broke one, in the suite's order."""
    told = [f"{name} {number:,}" for name, number in rung.attackers.items() if number]
    return ", ".join(told) or "none"


def _step_text(step_size: float | str) -> str:
    """A number is a share of epsilon, a text such as 2/255 is in pixels."""
    return step_size if isinstance(step_size, str) else f"{step_size:g} ε"


def curve_rows(results: RunResults) -> list[CurveRow]:
    """The epsilons of the curve, each with the certified accuracy that no attack of that size can undercut."""
    ladder = results.ladder
    if ladder is None or ladder.curve is None:
        return []
    return [_curve_row(results, ladder, point) for point in ladder.curve.points]


def _curve_row(results: RunResults, ladder: Ladder, point: CurvePoint) -> CurveRow:
    proved = results.threat_certificates
    return CurveRow(
        epsilon=point.epsilon_text,
        accuracy=share(point.accuracy),
        held=share(point.accuracy_lower),
        undecided=f"{point.undecided:,}" if point.undecided else "–",
        floor="" if proved is None else share(proved.accuracy_interval(ladder.around(point.epsilon))),
        own=math.isclose(point.epsilon, ladder.epsilon, rel_tol=1e-6),
    )


def zero_text(ladder: Ladder) -> tuple[str, bool]:
    """Whether accuracy goes to zero where it must, in a sentence, and whether that is a reason for mistrust.

    From ``grey_epsilon`` on all images have a point in common, where only one class can be right.
    """
    assert ladder.curve is not None
    last, images = ladder.curve.last, ladder.curve.images
    where = f"{NORM_SIGNS[ladder.norm]} {last.epsilon_text}"
    standing = last.held + last.undecided
    if standing == 0:
        return f"It reaches zero at {where}, as it must.", False
    left = f"{percent(last.accuracy.estimate)} still stand ({standing:,} of {images:,} images"
    left += f", {last.undecided:,} of them undecided)" if last.undecided else ")"
    if last.epsilon < ladder.grey_epsilon * (1 - 1e-6):
        return f"It ends at {where}, where {left}; that it reaches zero where it must was not looked at.", False
    must = "where every image can be turned into the same grey, so that accuracy must be near zero"
    if last.accuracy.estimate > _NEAR_ZERO:
        doubt = "The attack does not find what is there, so its figures at smaller sizes are too high as well."
        return f"It does not reach zero: at {where}, {must}, {left}. {doubt}", True
    return f"At {where}, {must}, {left}.", False


def rises_text(ladder: Ladder) -> str:
    """Where a larger ball left more images standing than a smaller one inside it; empty where none did."""
    curve = ladder.curve
    told = [
        f"from {before.epsilon_text} to {after.epsilon_text} by {before.broken - after.broken:,}"
        for before, after in (curve.rises if curve is not None else ())
    ]
    return f"Images standing rise {', '.join(told)}, which no best attack can do." if told else ""


def audit_sentence(audit: AuditReport) -> str:
    """Why the verdict is what it is, with one-sided bounds, each of 95 % confidence."""
    low, high = (percent(bound) for bound in _outward(audit))
    what = "of the images are left standing by the evaluation and broken here"
    if audit.verdict == "holds":
        return f"at most {high} {what}, less than the tolerance of {percent(audit.tolerance)}; no finding failed"
    if audit.verdict == "undecided":
        return f"between {low} and {high} {what}; {_deciding(audit)}"
    if audit.beyond_a_point:
        return f"at least {low} {what}, more than one point"
    return "a failed finding says that it was not an evaluation of this model under this threat model"


def d_text(audit: AuditReport) -> str:
    """The share that the evaluation held and the audit broke, with its bounds and counts."""
    low, high = (f"{100 * bound:.1f}" for bound in _outward(audit))
    return f"{percent(audit.d)} [{low}, {high}] ({len(audit.newly_broken):,} of {audit.images:,} images)"


def _outward(audit: AuditReport) -> tuple[float, float]:
    """Return both bounds of d in full tenths of a percent, rounded so that they stay bounds."""
    return math.floor(1000 * audit.d_low) / 1000, math.ceil(1000 * audit.d_high) / 1000


def _deciding(audit: AuditReport) -> str:
    against = " and a failed finding stands against “holds”" if audit.failed else ""
    if audit.images_needed is None:
        return f"more images would not decide{against}"
    return f"{audit.images_needed:,} images would decide if the share stayed the same{against}"


def finding_rows(audit: AuditReport) -> list[FindingRow]:
    """The findings, failed ones first, then undecided, passed and skipped, each group from cause to symptom."""
    order = sorted(audit.findings, key=lambda finding: _STATUSES.index(finding.status))
    return [
        FindingRow(
            name=finding.name,
            status=finding.status,
            figure=_figure(finding.figure),
            threshold=_figure(finding.threshold),
            evidence=finding.evidence,
            remedy=finding.remedy if _asks(finding) else "",
        )
        for finding in order
    ]


def _asks(finding: Finding) -> bool:
    return finding.status in ("failed", "undecided")


def _figure(number: float | None) -> str:
    if number is None or math.isnan(number):
        return "–"
    return f"{number + 0.0:.4g}".replace("inf", "∞").replace("-", "−")


def certified_rows(results: RunResults) -> list[CertifiedRow]:
    """Certified accuracy at the grid's radii, else at 0, sigma/2, sigma, ... up to the ceiling."""
    certificates = results.certificates
    if certificates is None:
        return []
    return [
        CertifiedRow(
            radius=radius_text(radius),
            accuracy=share(certificates.accuracy_interval(radius)),
            lower=lower_text(certificates, radius),
            decided=tuple(percent(part.estimate) for part in (certificates.other_shares(radius) or {}).values()),
        )
        for radius in certificates.table_radii
    ]


def comparison_rows(results: RunResults) -> list[ComparisonRow]:
    """The paper's and the field's best figures beside this run's; the conditions stand in every row."""
    robustbench, pgd = "AutoAttack, ℓ∞ 8/255", "PGD, ℓ∞ 8/255"
    best_of_size = "RobustBench, best of its size (Gowal 2021, generated data)"
    published = [
        ComparisonRow("RUSH abstract (arXiv 2207.05127)", "CIFAR-10", "ResNet-18", pgd, "87.9 %", "77.8 %", False),
        ComparisonRow(best_of_size, "CIFAR-10", "ResNet-18", robustbench, "87.4 %", "58.5 %", False),
        ComparisonRow("RobustBench, best of any size", "CIFAR-10", "any", robustbench, "–", "73.7 %", False),
    ]
    return published + list(_own_rows(results))


def _own_rows(results: RunResults) -> Iterator[ComparisonRow]:
    ladder, proved = results.ladder, results.threat_certificates
    data, model = str(results.setting("data", "name") or "–"), model_text(results)
    if ladder is None:
        return
    clean, threat = share(ladder.clean.accuracy), threat_text(ladder)
    shown = [rung for rung in (ladder.flattering, ladder.strongest) if rung is not None]
    for rung in shown:
        yield ComparisonRow("This run", data, model, f"{rung.label}, {threat}", clean, share(rung.accuracy), True)
    if proved is not None:
        floor = share(proved.accuracy_interval(ladder.covering_radius))
        yield ComparisonRow("This run, certificate", data, model, f"any attack, {threat}", clean, f"≥ {floor}", True)


def model_text(results: RunResults) -> str:
    encoder, width = results.setting("model", "encoder"), results.setting("model", "width")
    return f"{encoder or '–'}, width {width}" if width else str(encoder or "–")


def unequal_conditions(results: RunResults) -> list[str]:
    """In what this run differs from the paper's conditions: CIFAR-10, ResNet-18, l-inf 8/255, the whole test split."""
    data, ladder = results.setting("data", "name"), results.ladder
    checks = [
        (data == "cifar10", f"data set {data} instead of CIFAR-10"),
        (
            results.setting("model", "encoder") == "resnet18" and results.setting("model", "width") in (None, 64),
            f"model {model_text(results)} instead of ResNet-18 (width 64)",
        ),
    ]
    if ladder is not None:
        same_threat = ladder.norm == "linf" and math.isclose(ladder.epsilon, 8 / 255)
        checks.append((same_threat, f"threat {threat_text(ladder)} instead of ℓ∞ 8/255"))
        checks.append((len(ladder.clean) >= 10_000, f"{len(ladder.clean):,} attacked images instead of 10,000"))
    return [text for holds, text in checks if not holds]


def cost_rows(results: RunResults) -> list[CostRow]:
    """One row a stage; the last one sums the times."""
    rows = [
        CostRow(
            stage=name,
            objective=str(stage.fields.get("objective") or "") if stage.fields.get("epochs") != 0 else "",
            time=_stage_time(stage),
            passes=_passes(results, name),
            rate=_rate(stage.fields.get("images_per_second")),
            memory=memory_text(stage.fields.get("peak_memory")),
            energy=energy_text(stage.fields.get("joules")),
        )
        for name, stage in results.stages.items()
    ]
    total = duration(sum(stage.seconds for stage in results.stages.values()))
    return [*rows, CostRow("all", "", total, "–", "–", "–", "–")]


def _stage_time(stage: StageRecord) -> str:
    processes = stage.fields.get("processes") or 1
    return duration(stage.seconds) + (f" (sum of {processes} processes)" if processes != 1 else "")


def _passes(results: RunResults, name: Stage) -> str:
    fields = results.stages[name].fields
    if name == "certify":
        return f"{count(float(fields.get('forward_passes_per_image') or 0))} (forward only)"
    if name == "attack" and results.ladder is not None:
        return _attack_passes(results.ladder)
    made = fields.get("passes_per_image")
    return "–" if made is None else passes_text(float(made), float(fields.get("forward_passes_per_image") or 0))


def _attack_passes(ladder: Ladder) -> str:
    rungs = [rung.settings for rung in ladder.rungs]
    both = sum(float(rung.get("passes_per_image") or 0) for rung in rungs) + ladder.sandwich.passes_per_image
    forward = sum(float(rung.get("forward_passes_per_image") or 0) for rung in rungs)
    return count(both) + (f" + {count(forward)} forward only" if forward else "")


def _rate(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) and value >= 10 else f"{value:.2g}" if value else "–"


def nested_rows(entries: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every leaf of ``entries`` as dotted key and text, in its own order."""
    rows: list[tuple[str, str]] = []
    for key, value in entries.items():
        if isinstance(value, Mapping):
            rows += [(f"{key}.{inner}", text) for inner, text in nested_rows(value)]
        else:
            rows.append((str(key), _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
