"""The wording of results: numbers, sentences and summary rows. Fractions become percentages only in this module."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rush.auditing.findings import Finding
from rush.auditing.report import AuditReport
from rush.certification.certificates import Certificates
from rush.choices import CertifyMethod, Stage
from rush.records.ladder import Ladder, Rung
from rush.records.read_run import RunResults, StageRecord
from rush.statistics import Interval

NORM_SIGNS: Mapping[str, str] = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1"}
NOT_CERTIFIED = (
    "the classifier is used without smoothing noise, which certificates need; its accuracy under attack is an upper "
    "bound, and nothing is proved"
)
QUICK = "this run is a trial of the recipe (--quick), and its figures mean nothing"
_METHOD_SIGNS: Mapping[CertifyMethod, str] = {
    "clopper-pearson": "Clopper–Pearson",
    "sequential": "Sequential",
    "exact": "Exact count",
}
PAPER_DATA = "cifar10"
"""Data set of the paper's figures."""
_STATUSES = ("failed", "undecided", "passed", "skipped")  # in the order of their urgency
_LISTED = 8  # only the ends of a longer grid are printed
_NOT_DONE: Mapping[Stage, str] = {
    "pretrain": "not pre-trained yet",
    "teach": "no labels taught yet",
    "finetune": "not fine-tuned yet",
    "certify": "not certified yet",
    "attack": "not attacked yet",
    "audit": "not audited yet",
}
# Largest accuracy accepted where all images can be made the same grey, as in the audit's large-epsilon finding.
_NEAR_ZERO = 0.1


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def bounds(interval: Interval) -> str:
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def share(interval: Interval) -> str:
    return str(interval)


def points(difference: Interval) -> str:
    """Return a difference of two shares in percentage points, with sign and interval."""
    low, high = (f"{100 * end:+.1f}" for end in (difference.low, difference.high))
    return f"{100 * difference.estimate:+.1f} [{low}, {high}]".replace("-", "−")


def count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:,.1f}"


def count_or_dash(number: int) -> str:
    return f"{number:,}" if number else "–"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def passes_text(passes: float, forward_passes: float) -> str:
    """Return the number of forward and backward passes, followed by that of the passes that were forward only."""
    forward = f"{count(forward_passes)} forward only"
    if not forward_passes:
        return count(passes)
    return f"{count(passes)} + {forward}" if passes else forward


def memory_text(size: float | None) -> str:
    """Return bytes as gigabytes, or "–" if they are unknown."""
    return f"{size / 1e9:.2f} GB" if size else "–"


def energy_text(joules: float | None) -> str:
    """Return joules with an SI prefix, or "–" if the device does not measure energy."""
    if joules is None:
        return "–"
    scale, unit = next(pair for pair in ((1e6, "MJ"), (1e3, "kJ"), (0, "J")) if joules >= pair[0])
    return f"{joules / (scale or 1):.3g} {unit}"


def threat_text(ladder: Ladder) -> str:
    return f"{NORM_SIGNS[ladder.norm]} {ladder.epsilon_text}"


def audited_threat_text(audit: AuditReport) -> str:
    """Return norm and epsilon of an audit, with epsilon of l-inf in grey levels."""
    levels = f"{255 * audit.epsilon:.4g}/255"
    return f"{NORM_SIGNS[audit.norm]} {levels if audit.norm == 'linf' else f'{audit.epsilon:.4g}'}"


def not_done(results: RunResults) -> list[tuple[str, str]]:
    """Return for every unfinished stage a statement and the command that runs it."""
    return [(_NOT_DONE[stage], results.command(stage)) for stage in results.missing]


_NAMED = 10  # classes that a line names


def summary_rows(results: RunResults) -> list[tuple[str, str]]:
    """Return a run as lines of name and value, weakest claim first, and the commands of unfinished stages."""
    rows = [("trial", QUICK)] if results.quick else []
    rows += [*_certified_rows(results), *_attacked_rows(results), *_audit_rows(results), *_taught_rows(results)]
    return rows + [(what, f"`{command}`") for what, command in not_done(results)]


def about_rows(results: RunResults) -> list[tuple[str, str]]:
    """Describe a run as lines of name and value: data, classes, network, noise, labels, seed, dates, size."""
    setting, stages = results.setting, results.stages.values()
    splits = [f"{split['images']:,} in {name}" for name, split in (results.provenance.get("data") or {}).items()]
    rows = [("data", str(setting("data", "name")) + (f" ({', '.join(splits)})" if splits else ""))]
    if results.classes:
        rows.append(("classes", f"{len(results.classes)}: {classes_text(results.classes)}"))
    rows.append(("network", f"{setting('model', 'encoder')}, width {setting('model', 'width')}"))
    noise = f"{setting('smoothing', 'noise') or 'gaussian'}, sigma {setting('smoothing', 'sigma')}"
    labelled = results.stages["finetune"].fields.get("labelled_images") if "finetune" in results.stages else None
    rows.append(("noise", "none" if results.plain else noise))
    rows.append(("labels", "–" if labelled is None else f"{labelled:,} training images"))
    rows.append(("seed", str(setting("seed"))))
    begun, ended = (
        sorted(filter(None, moments))
        for moments in ((stage.fields.get("started") for stage in stages), (stage.finished for stage in stages))
    )
    if ended:
        span = f"{begun[0] if begun else '–'} to {ended[-1]}"
        rows.append(("time", f"{duration(sum(stage.seconds for stage in stages))} of work, {span}"))
    return rows


def classes_text(classes: Sequence[str]) -> str:
    """Return the names of the first classes, and how many more there are."""
    more = f" and {len(classes) - _NAMED} more" if len(classes) > _NAMED else ""
    return f"{', '.join(classes[:_NAMED])}{more}"


def size_text(size: int) -> str:
    """Return bytes as megabytes or gigabytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _taught_rows(results: RunResults) -> Iterator[tuple[str, str]]:
    if "teach" not in results.stages:
        return
    taught = results.stages["teach"].fields
    yield "labels read", f"{taught['labelled_images']:,} of {taught['images']:,} training images"
    right = [percent(teacher["held_out"]) for teacher in taught["rounds"] if teacher["held_out"] is not None]
    if right:
        yield "teacher right", f"on {' / '.join(right)} of {taught['held_out_images']:,} held-out images, by rounds"


def _certified_rows(results: RunResults) -> Iterator[tuple[str, str]]:
    certificates, ladder = results.certificates, results.ladder
    if results.plain:
        yield "certificates", f"none: {NOT_CERTIFIED}"
    if certificates is None:
        return
    yield "certified by", method_text(certificates)
    yield "level", level_text(certificates)
    yield "samples per image", samples_text(certificates)
    for radius in dict.fromkeys((certificates.table_radii[0], headline_radius(certificates))):
        shares = (certificates.other_shares(radius) or {}).items()
        others = "".join(f", {name} {percent(interval.estimate)}" for name, interval in shares)
        sign = NORM_SIGNS[certificates.rule.norm]
        yield f"certified at {sign} {radius_text(radius)}", _certified_text(certificates, radius) + others
    if copies_text(certificates):
        yield "copies of a picture", copies_text(certificates)
    yield certificates.acr_name, acr_text(certificates)
    proved = results.threat_certificates
    if ladder is not None and proved is not None:
        radius = ladder.covering_radius(proved.rule.norm)
        yield f"certified floor at {threat_text(ladder)}", _certified_text(proved, radius)
    yield "true ≥", "of the data's distribution, with 95 % confidence over images and noise together"


def _certified_text(certificates: Certificates, radius: float) -> str:
    size = f"(n = {certificates.num_pictures:,})"
    return f"{share(certificates.accuracy_interval(radius))} {size}, true ≥ {lower_text(certificates, radius)}"


def lower_text(certificates: Certificates, radius: float) -> str:
    """Return the lower bound on the true certified accuracy, rounded down."""
    return percent(math.floor(1000 * certificates.accuracy_lower(radius)) / 1000)


def copies_text(certificates: Certificates) -> str:
    """Return in words the number of copies, which are not counted.

    The text is empty without copies. A table without the column ``pixels`` does not show which images are copies.
    """
    copies = certificates.num_copies
    if copies is None:
        return "not known: the table is older than the column that identifies pictures, so every image is counted"
    number = "1 image is a copy of another" if copies == 1 else f"{copies:,} images are copies of others"
    return f"{number}: each picture is counted once, as certified only if all of its copies are" if copies else ""


def level_text(certificates: Certificates) -> str:
    """Return what the certificates claim, and over which randomness."""
    rule = certificates.rule
    return rule.statement if rule.exact else f"{rule.statement}, over the draws of the noise"


def method_text(certificates: Certificates) -> str:
    """Return the method, its bound if that has another name, and the grid if there is one."""
    rule = certificates.rule
    name = _METHOD_SIGNS[rule.method]
    test = f" ({rule.bound})" if rule.bound != rule.method else ""
    return f"{name}{test}{', ' if rule.radii else ''}{grid_text(certificates)}"


def headline_radius(certificates: Certificates) -> float:
    """Return sigma / 2, or with a grid its first radius of at least sigma / 2, else its last."""
    half, radii = certificates.sigma / 2, certificates.rule.radii
    return half if radii is None else next((radius for radius in radii if radius >= half), radii[-1])


def grid_text(certificates: Certificates) -> str:
    """Return the grid in words, empty without a grid."""
    radii = certificates.rule.radii
    if radii is None:
        return ""
    if len(radii) > _LISTED:
        return f"grid of {len(radii)} radii from {radius_text(radii[0])} to {radius_text(radii[-1])}"
    return f"grid {' / '.join(radius_text(radius) for radius in radii)}"


def samples_text(certificates: Certificates) -> str:
    """Return the number of samples per image, including selection. A sequential run has a mean and a cap."""
    most = f"{certificates.rule.num_samples:,}"
    if certificates.rule.exact:
        return f"{most}, all draws of the noise"
    if certificates.rule.method == "sequential":
        most = f"{certificates.num_samples.mean():,.0f} on average, at most {most}"
    return f"{most}, {certificates.num_selection:,} of them to select the class"


def radius_text(radius: float) -> str:
    """Return ``radius`` with at most six decimals, as radii have, without trailing zeros."""
    return f"{radius:.6f}".rstrip("0").rstrip(".")


def acr_text(certificates: Certificates) -> str:
    """Return the average certified radius with what it depends on: N, or mean samples and cap, and the grid."""
    samples = f"N = {certificates.num_estimation:,}"
    if certificates.rule.method == "sequential":
        mean = certificates.num_samples.mean()
        samples = f"{mean:,.0f} samples per image, at most {certificates.rule.num_samples:,}"
    return f"{certificates.acr:.3f} ({'; '.join(filter(None, (samples, grid_text(certificates))))})"


def _attacked_rows(results: RunResults) -> Iterator[tuple[str, str]]:
    ladder = results.ladder
    if ladder is None:
        return
    size, threat, worst = f"(n = {ladder.clean.num_pictures:,})", threat_text(ladder), ladder.worst_case
    yield "clean accuracy", f"{share(ladder.clean.accuracy)} {size}"
    yield f"attacked, {threat}, {ladder.strongest.label}", f"{share(ladder.strongest.accuracy)} {size}"
    if worst is not None:
        yield (
            f"worst case, {threat}, {worst.suite}",
            f"{share(worst.accuracy)} {size}, held {share(worst.accuracy_lower)}",
        )
    yield "attacked, by any rung of the ladder", f"{share(ladder.combined)} {size}"
    if ladder.flattering is not None:
        yield f"{ladder.flattering.label} flatters by", f"{points(ladder.flattering.above(ladder.reference))} points"
    if not results.plain:
        violations, sandwich = len(ladder.sandwich.violations), ladder.sandwich
        yield "sandwich", f"{violations} violations, {sandwich.checked:,} images checked, {sandwich.allowed} allowed"


def _audit_rows(results: RunResults) -> Iterator[tuple[str, str]]:
    audit = results.audit
    if audit is None:
        return
    yield "audited evaluation", f"{audit.evaluation}, {audited_threat_text(audit)} (n = {audit.images:,})"
    yield "audit", f"{audit.verdict}: {audit_sentence(audit)}"
    yield "accuracy, reported and re-measured", f"{share(audit.claimed)} and {share(audit.measured)}"
    for finding in audit.failed_findings:
        yield f"audit: {finding.name} failed", finding.evidence


def budget_text(rung: Rung) -> str:
    """Return steps or queries, noise draws per gradient and restarts, as far as the attacker has them.

    The version of a suite follows.
    """
    settings = rung.settings
    unit = {"square": "queries", "random": "draws"}.get(str(settings.get("method")), "steps")
    size = settings.get("step_size")  # a number is a share of epsilon, a text such as 2/255 is in pixels
    of_size = f" of {size if isinstance(size, str) else f'{size:g} ε'}" if size else ""
    parts = [f"{settings['steps']:,} {unit}{of_size}"] if settings.get("steps") else []
    parts += [f"EOT {settings['eot_samples']}"] if settings.get("eot_samples") else []
    parts += [f"{settings['restarts']} restarts"] if (settings.get("restarts") or 1) != 1 else []
    return ", ".join([*parts, *filter(None, [rung.suite])])


def attackers_text(rung: Rung) -> str:
    """Return the number of images that each attacker of a suite was the first to break, without attackers of none."""
    return ", ".join(f"{name} {number:,}" for name, number in rung.attackers.items() if number) or "none"


def zero_text(ladder: Ladder) -> tuple[str, bool]:
    """Return a sentence on whether accuracy reaches zero where it must, and whether it is a reason for mistrust.

    From ``grey_epsilon`` on, the balls around all images have a point in common, where only one class can be right.
    """
    assert ladder.curve is not None
    last, images = ladder.curve.last, ladder.curve.images
    where = f"{NORM_SIGNS[ladder.norm]} {last.epsilon_text}"
    unbroken = last.held + last.undecided
    if unbroken == 0:
        return f"It reaches zero at {where}, as it must.", False
    left = f"{percent(last.accuracy.estimate)} are not broken ({unbroken:,} of {images:,} images"
    left += f", {last.undecided:,} of them undecided)" if last.undecided else ")"
    if last.epsilon < ladder.grey_epsilon * (1 - 1e-6):
        return f"It ends at {where}, where {left}; whether it reaches zero where it must was not measured.", False
    must = "where every image can be turned into the same grey, so that accuracy must be near zero"
    if last.accuracy.estimate > _NEAR_ZERO:
        doubt = (
            "The attack misses adversarial examples that exist, so its figures at smaller sizes are too high as well."
        )
        return f"It does not reach zero: at {where}, {must}, {left}. {doubt}", True
    return f"At {where}, {must}, {left}.", False


def rises_text(ladder: Ladder) -> str:
    """Return where a larger ball left more images unbroken than a smaller one inside it, empty if none did."""
    rises = ", ".join(
        f"from {before.epsilon_text} to {after.epsilon_text} by {before.broken - after.broken:,}"
        for before, after in (ladder.curve.rises if ladder.curve is not None else ())
    )
    return f"The number of unbroken images rises {rises}, which an optimal attack rules out." if rises else ""


def audit_sentence(audit: AuditReport) -> str:
    """Return the reason for an audit's verdict, with one-sided bounds, each of 95 % confidence."""
    low, high = (percent(bound) for bound in _outward(audit))
    what = "of the images are reported robust but broken by the audit"
    if audit.verdict == "holds":
        return f"at most {high} {what}, less than the tolerance of {percent(audit.tolerance)}; no finding failed"
    if audit.verdict == "undecided":
        return f"between {low} and {high} {what}; {_deciding(audit)}"
    if audit.beyond_a_point:
        return f"at least {low} {what}, more than one percentage point"
    return "a failed finding says that it was not an evaluation of this model under this threat model"


def d_text(audit: AuditReport) -> str:
    """Return the share of images that the evaluation reports as robust and the audit broke, with bounds and counts."""
    low, high = (f"{100 * bound:.1f}" for bound in _outward(audit))
    return f"{percent(audit.d)} [{low}, {high}] ({len(audit.newly_broken):,} of {audit.images:,} images)"


def _outward(audit: AuditReport) -> tuple[float, float]:
    """Return both bounds of d in whole tenths of a percent, rounded outwards so that they remain bounds."""
    return math.floor(1000 * audit.d_low) / 1000, math.ceil(1000 * audit.d_high) / 1000


def _deciding(audit: AuditReport) -> str:
    against = " and a failed finding rules out “holds”" if audit.failed else ""
    if audit.images_needed is None:
        return f"more images would not decide{against}"
    return f"{audit.images_needed:,} images would decide if the share stayed the same{against}"


def sorted_findings(audit: AuditReport) -> list[Finding]:
    """Return the failed findings, then the undecided, passed and skipped ones, each group from cause to symptom."""
    return sorted(audit.findings, key=lambda finding: _STATUSES.index(finding.status))


def figure_text(number: float | None) -> str:
    if number is None or math.isnan(number):
        return "–"
    return f"{number + 0.0:.4g}".replace("inf", "∞").replace("-", "−")


def own_rows(results: RunResults) -> list[tuple[str, ...]]:
    """Return the rows of this run beside published results: source, clean and robust accuracy, attack, data, model."""
    ladder, proved = results.ladder, results.threat_certificates
    if ladder is None:
        return []
    rungs = [rung for rung in (ladder.flattering, ladder.strongest) if rung is not None]
    rows = [("This run", share(rung.accuracy), rung.label) for rung in rungs]
    if proved is not None:
        floor = share(proved.accuracy_interval(ladder.covering_radius(proved.rule.norm)))
        rows.append(("This run, certificate", f"≥ {floor}", "any attack"))
    clean, threat = share(ladder.clean.accuracy), threat_text(ladder)
    conditions = str(results.setting("data", "name") or "–"), model_text(results)
    return [(source, clean, robust, f"{attack}, {threat}", *conditions) for source, robust, attack in rows]


def model_text(results: RunResults) -> str:
    encoder, width = results.setting("model", "encoder"), results.setting("model", "width")
    return f"{encoder or '–'}, width {width}" if width else str(encoder or "–")


def unequal_conditions(results: RunResults) -> list[str]:
    """Return how a run differs from the published conditions: ResNet-18, l-inf 8/255, the whole test split."""
    ladder = results.ladder
    checks = [
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


def cost_rows(results: RunResults) -> list[tuple[str, ...]]:
    """Return a row per stage: name, objective, time, passes, images per second, memory, energy.

    The last row has the sum. The objective is empty where a stage has none. "–" stands for what a stage does not
    record.
    """
    rows = [
        (
            name,
            str(stage.fields.get("objective") or "") if stage.fields.get("epochs") != 0 else "",
            _stage_time(stage),
            _passes(results, name),
            _rate(stage.fields.get("images_per_second")),
            memory_text(stage.fields.get("peak_memory")),
            energy_text(stage.fields.get("joules")),
        )
        for name, stage in results.stages.items()
    ]
    total = duration(sum(stage.seconds for stage in results.stages.values()))
    return [*rows, ("all", "", total, "–", "–", "–", "–")]


def _stage_time(stage: StageRecord) -> str:
    processes = stage.fields.get("processes") or 1
    return duration(stage.seconds) + (f" (sum of {processes} processes)" if processes != 1 else "")


def _passes(results: RunResults, name: Stage) -> str:
    fields, ladder = results.stages[name].fields, results.ladder
    forward = float(fields.get("forward_passes_per_image") or 0)
    if name == "certify":
        return f"{count(forward)} (forward only)"
    if name == "attack" and ladder is not None:
        both = sum(rung.spent("passes_per_image") for rung in ladder.rungs) + ladder.sandwich.passes_per_image
        return passes_text(both, sum(rung.spent("forward_passes_per_image") for rung in ladder.rungs))
    passes = fields.get("passes_per_image")
    return "–" if passes is None else passes_text(float(passes), forward)


def _rate(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) and value >= 10 else f"{value:.2g}" if value else "–"


def nested_rows(entries: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every leaf of ``entries`` as dotted key and text, in their order."""
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
