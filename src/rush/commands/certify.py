"""``rush certify``: certificates of a run, sampled or recomputed from its stored votes under another rule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rush.choices import CertifyMethod, Level
from rush.commands.external import NO_MODEL, ExternalModel
from rush.commands.run_folders import Overrides, Redo, open_run, print_once, rank_of_process, refuse_existing
from rush.commands.terminal import Json, print_json, print_lines, print_table
from rush.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rush.certification.certificates import Certificates


def certify(
    folder: Path | None = None,
    *,
    external: ExternalModel = NO_MODEL,
    overrides: Overrides = None,
    redo: Redo = False,
    recompute: bool = False,
    method: CertifyMethod | None = None,
    alpha: float | None = None,
    bound: str | None = None,
    num_estimation: int | None = None,
    radii: list[float] | None = None,
    level: Level | None = None,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Certify test images of a run, or images of any model; torchrun shards them across processes. Or recompute
    certificates from the stored votes under another rule, without drawing new samples.

    Args:
        folder: Run folder; for --recompute also a certificates.tsv. Or give --model and --data.
        recompute: Apply the options below to the stored votes. A rule that would not be valid is refused.
        method: For --model: clopper-pearson draws the same number of votes for every image, sequential stops as soon as
            the radii are decided. By default sequential, and exact, which counts all draws, for splitting noise.
        alpha: Probability of a false certificate. [default: 0.001]
        bound: clopper-pearson (only if the number of samples was fixed), two-classes (only with the votes of every
            class), or anytime-valid: geometric, beta.
        num_estimation: Number of votes to use per image, the first ones. For --model the largest number. [default:
            100,000]
        radii: Grid of radii, in [0, 1] pixel units; repeatable.
        level: What alpha covers: each certificate (image), or all of them jointly (family).
        out: File for the certificates. By default certificates.tsv for --model, and none for --recompute.
    """
    values = {"alpha": alpha, "bound": bound, "num_estimation": num_estimation, "radii": radii, "level": level}
    rule = {name: value for name, value in values.items() if value is not None}
    if folder is None:
        if recompute or overrides:
            raise ConfigError(f"{'--recompute' if recompute else '--set'} needs a run folder")
        if external.model is None:
            raise ConfigError("give a run folder, or --model module:function with --data and --sigma")
        _certify_model(external, method, out or Path("certificates.tsv"), json, **rule)
        return
    if method is not None:
        raise ConfigError("--method belongs to --model; the votes of a run were drawn by certify.method of its recipe")
    data = external.data_of_run()
    if recompute:
        _recompute(folder, out, json, **rule)
        return
    if rule or out is not None:
        name = next(iter(rule), "out").replace("_", "-")
        raise ConfigError(
            f"--{name} belongs to --recompute or --model; to certify a run with other values give --set "
            "certify.FIELD=..."
        )
    run = open_run(folder, data, overrides, "certify" if redo else None)
    from rush.pipeline.stages import run_stage

    run_stage(run, "certify", print_once)
    if json and rank_of_process() == 0:
        from rush.records.read_run import read_run

        certificates = read_run(folder).certificates
        print_json(None if certificates is None else certificates.to_dict())


def _certify_model(
    external: ExternalModel, method: CertifyMethod | None, out: Path, json: bool, **options: Any
) -> None:
    """Certify the images of a model that belongs to no run, write the certificates to ``out`` and print them.

    Raises:
        ConfigError: The model is not smoothed.
        RunError: ``out`` exists.
    """
    refuse_existing(out)
    from rush.certification.rule import make_rule, reach
    from rush.pipeline.certify import certify_into
    from rush.pipeline.estimate import certify_estimate, estimate_text, measured_rates
    from rush.recipe.schema import CertifyConfig
    from rush.smoothing.classifier import SmoothedClassifier

    smoothed, pixels, seed = external.classifier, external.pixels, external.seed or 0
    if not isinstance(smoothed, SmoothedClassifier):
        raise ConfigError(
            f"{external.model} is not smoothed, and only smoothed classifiers can be certified; give --sigma, the "
            "standard deviation of the noise"
        )
    smoothed.check_shape(pixels.x.shape[1:])
    smoothed.noise.check(pixels.x)
    defaults = CertifyConfig().model_dump(exclude={"images", "method"})
    default = None if smoothed.noise.name == "splitting" else "sequential"
    rule = make_rule(
        noise=smoothed.noise.name,
        sigma=smoothed.sigma,
        num_images=len(pixels),
        method=method or default,
        **(defaults | options),
    )
    print_once(f"certify: {reach(rule)}")
    rates = measured_rates(smoothed, pixels.x.shape[1:])
    print_once(f"certify: {estimate_text(certify_estimate(rule, len(pixels), rates), rates)}")
    parts = out.with_name(f"{out.name}.seed-{seed}.parts")  # votes of two seeds are never mixed
    certificates = certify_into(out, parts, smoothed, pixels, external.indices, rule, seed)
    _print_certificates(certificates, json)
    print_once(f"written to {out}")


def _recompute(path: Path, out: Path | None, json: bool, **changes: Any) -> None:
    """Print the certificates of a run folder or a table under a changed rule, and write them to ``out`` if given.

    Raises:
        RunError: There are no certificates, or ``out`` exists.
        InputError: The new rule would not be valid.
    """
    from rush.certification.recertify import recompute
    from rush.records.certificates import TABLE, read_certificates, write_certificates

    table = path / TABLE if path.is_dir() else path
    read = read_certificates(table)
    if read is None:
        raise RunError(
            f"{table} is missing or holds no certificates; run `rush certify` first "
            "(a run with smoothing.sigma = 0 has nothing to certify)"
        )
    if out is not None:
        refuse_existing(out)
    indices, stored = read
    certificates = recompute(stored, **changes)
    if out is not None:
        write_certificates(out, certificates, indices)
    _print_certificates(certificates, json)


def _print_certificates(certificates: Certificates, json: bool) -> None:
    """Print the figures of certificates, in the first process only."""
    if rank_of_process() > 0:
        return
    if json:
        print_json(certificates.to_dict())
        return
    print_table(("", "certified", "true accuracy at least"), _rows(certificates))
    statement = certificates.rule.statement
    print_lines([f"{statement}; the last column, with 95 % confidence, is over images and noise together"])


def _rows(certificates: Certificates) -> list[tuple[str, str, str]]:
    from rush.reporting.wording import copies_text, lower_text, share

    rule = certificates.rule
    samples = f"{certificates.num_samples.mean():,.0f} of at most {rule.num_samples:,}"
    copies = copies_text(certificates)
    return [
        ("method, bound", f"{rule.method}, {rule.bound}", ""),
        ("noise", f"{rule.noise}, sigma {rule.sigma:g}", ""),
        ("samples per image", samples, ""),
        *([("copies", copies, "")] if copies else []),
        *(
            (
                f"{rule.norm} radius {radius:g}",
                share(certificates.accuracy_interval(radius)),
                lower_text(certificates, radius),
            )
            for radius in certificates.table_radii
        ),
        (certificates.acr_name, f"{certificates.acr:.4f}", ""),
    ]
