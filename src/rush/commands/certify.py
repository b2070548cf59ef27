"""``rush certify``: certificates of a run, sampled or recomputed from its stored votes under another rule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rush.choices import Level
from rush.commands.run_folders import Data, Overrides, open_run, print_once
from rush.commands.terminal import print_lines, print_table
from rush.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rush.certification.certificates import Certificates


def certify(
    folder: Path,
    *,
    data: Data = None,
    overrides: Overrides = None,
    recompute: bool = False,
    alpha: float | None = None,
    bound: str | None = None,
    num_estimation: int | None = None,
    radii: list[float] | None = None,
    level: Level | None = None,
    out: Path | None = None,
) -> None:
    """Certify test images of a run; torchrun shards them across processes. Or recompute certificates from the stored
    votes under another rule, without drawing new samples.

    Args:
        folder: Run folder; for --recompute also a certificates.tsv.
        recompute: Apply the options below to the stored votes. A rule that would not be valid is refused.
        alpha: Probability of a false certificate.
        bound: clopper-pearson (only if the number of samples was fixed), two-classes (only with the votes of every
            class), or anytime-valid: geometric, beta.
        num_estimation: Number of votes to use per image, the first ones.
        radii: Grid of radii, in [0, 1] pixel units; repeatable.
        level: What alpha covers: each certificate (image), or all of them jointly (family).
        out: File for the recomputed certificates; if omitted, they are only printed.
    """
    rule = {"alpha": alpha, "bound": bound, "num_estimation": num_estimation, "radii": radii, "level": level}
    changes = {name: value for name, value in rule.items() if value is not None}
    if recompute:
        _recompute(folder, out, **changes)
        return
    if changes or out is not None:
        name = next(iter(changes), "out").replace("_", "-")
        raise ConfigError(f"--{name} belongs to --recompute; to certify with other values give --set certify.FIELD=...")
    run = open_run(folder, data, overrides)
    from rush.pipeline.stages import run_stage

    run_stage(run, "certify", print_once)


def _recompute(path: Path, out: Path | None, **changes: Any) -> None:
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
    if out is not None and out.exists():
        raise RunError(f"{out} exists; give another file to --out")
    indices, stored = read
    certificates = recompute(stored, **changes)
    if out is not None:
        write_certificates(out, certificates, indices)
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
