"""The certification of a run. Each image is written as soon as it is decided, and finally a table of all images."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rush.certification.certificates import Certificates, first_difference, join_certificates
from rush.certification.certify import certify_each
from rush.certification.rule import Rule, make_rule, reach
from rush.certification.sequential import UNDECIDED
from rush.data.checks import LabelledPixels, pixel_ids
from rush.errors import ModelError, RunError
from rush.models.storage import load_smoothed
from rush.pipeline.context import StageContext
from rush.pipeline.estimate import certify_estimate, estimate_text, measured_rates
from rush.recipe.schema import CertifyConfig, SmoothingConfig
from rush.records.certificates import (
    TABLE,
    append_certificates,
    drop_unfinished_line,
    read_certificates,
    write_certificates,
)
from rush.records.folder import RunFolder
from rush.runtime.distributed import barrier, in_turn, rank, world_size
from rush.runtime.files import make_folder
from rush.smoothing.classifier import SmoothedClassifier

CERTIFICATES = Path(TABLE)
CERTIFICATE_PARTS = Path("certificates.parts")
NOT_SMOOTHED = "the classifier is not smoothed (smoothing.sigma = 0): nothing is certified"


def run_certify(run: RunFolder, tell: Callable[[str], None] = lambda _: None) -> None:
    """Certify the evaluation images and write ``certificates.tsv``.

    Each image is written as soon as it is decided. The stage resumes after an interruption with the images still
    missing. With several processes each takes its share of them. With sigma = 0 the stage only records that there is
    nothing to certify.

    Args:
        tell: gets a line on what the rule can certify, and one on the time that it takes at most.

    Raises:
        ModelError: the classifier cannot be certified.
        RunError: files of the run belong to another rule, other images or another model.
    """
    run.require("finetune")
    context = StageContext.of(run)
    if context.noise is None:
        context.begin("certify")
        if rank() == 0:
            run.finish("certify", seconds=0.0, images=0, certified=False, reason=NOT_SMOOTHED)
        barrier()
        return
    smoothed = load_smoothed(run.path / "model", context.execution)
    config = context.recipe.certify
    indices, pixels = context.splits.evaluation(config.images, smoothed.num_classes, smoothed.kind)
    rule = run_rule(config, context.recipe.smoothing, len(pixels))
    tell(f"certify: {reach(rule)}")
    rates = measured_rates(smoothed, pixels.x.shape[1:])
    tell(f"certify: {estimate_text(certify_estimate(rule, len(pixels), rates), rates)}")
    context.begin("certify")
    table = run.path / CERTIFICATES
    certificates = certify_into(
        table, run.path / CERTIFICATE_PARTS, smoothed, pixels, indices, rule, context.recipe.seed
    )
    if rank() == 0:
        run.finish("certify", **_certify_figures(certificates))
    barrier()


def certify_into(
    table: Path,
    parts: Path,
    smoothed: SmoothedClassifier,
    pixels: LabelledPixels,
    indices: list[int],
    rule: Rule,
    seed: int,
) -> Certificates:
    """Certify images, write the table of their certificates, and return them.

    Each image is written as soon as it is decided. A call after an interruption resumes with the images still missing.
    With several processes each takes its share of them, and each returns all certificates.

    Args:
        table: file of the table, which may have some of the images already.
        parts: folder of the certificates until the table is written. It is then removed.
        indices: indices of the images in their split.
        seed: seed of the noise.

    Raises:
        ModelError: the classifier cannot be certified.
        RunError: the table or the parts belong to another rule, other images or another model.
    """
    model = smoothed.fingerprint()
    done = in_turn(lambda: _read_parts(table, parts, rule, model, indices, pixels))
    missing = [position for position, index in enumerate(indices) if index not in done]
    try:
        for position, certificate in certify_each(smoothed, pixels, rule, seed, missing[rank() :: world_size()]):
            append_certificates(parts / f"{rank()}.tsv", certificate, [indices[position]])
    except ModelError:
        shutil.rmtree(parts, ignore_errors=True)  # the votes are not those of a fixed function
        raise
    barrier()
    done = _read_parts(table, parts, rule, model, indices, pixels)
    certificates = join_certificates([done[index] for index in indices])
    barrier()
    if rank() == 0:
        write_certificates(table, certificates, indices)
        shutil.rmtree(parts, ignore_errors=True)
    return certificates


def run_rule(config: CertifyConfig, smoothing: SmoothingConfig, num_images: int) -> Rule:
    """Return the rule by which a run certifies ``num_images`` images, or ``config.images`` of them.

    Raises:
        InputError: with these numbers nothing can be certified.
    """
    return make_rule(
        sigma=smoothing.sigma,
        noise=smoothing.noise,
        method=config.method,
        alpha=config.alpha,
        level=config.level,
        num_images=config.images or num_images,
        num_selection=config.num_selection,
        num_estimation=config.num_estimation,
        radii=config.radii,
        futility=config.futility,
        bound=config.bound,
        stopping=config.stopping,
    )


def _differing_image(certificates: Certificates, pixels: LabelledPixels) -> str | None:
    """Return the id of the first of ``pixels`` whose label or pixels differ in ``certificates``, if any."""
    return first_difference(certificates, pixels.ids, pixels.y.tolist(), pixel_ids(pixels.x))


def read_run_certificates(run: RunFolder, pixels: LabelledPixels, smoothed: SmoothedClassifier) -> Certificates:
    """Return the certificates of a run whose certification is finished.

    The model of a table that names none is not checked.

    Raises:
        RunError: their file is missing, has labels or pixels that differ from ``pixels``, or belongs to a model other
            than ``smoothed``.
    """
    table = run.path / CERTIFICATES
    read = read_certificates(table)
    if read is None:
        raise RunError(f"{table} is missing or empty; remove stages/certify.json and run `rush certify` again")
    _, certificates = read
    differing = _differing_image(certificates, pixels)
    if differing is not None:
        raise RunError(
            f"{table}: image {differing!r} has another label or other pixels than in the data; "
            "restore the file from a copy, or remove it and stages/certify.json and run `rush certify` again"
        )
    if certificates.model not in (None, smoothed.fingerprint()):
        raise RunError(
            f"{table} is of another model than the run's, whose weights, noise or execution have "
            "changed since; restore the model, or remove the file and stages/certify.json and run `rush certify` again"
        )
    return certificates


def _certify_figures(certificates: Certificates) -> dict[str, Any]:
    seconds = float(certificates.seconds.sum())
    rule = certificates.rule
    return {
        "seconds": seconds,
        "processes": world_size(),
        "images": len(certificates),
        **asdict(rule),
        "statement": rule.statement,
        "forward_passes_per_image": float(certificates.num_samples.mean()),
        "undecided": int((certificates.outcome == UNDECIDED).sum()),
        "images_per_second": len(certificates) / seconds,
    }


def _read_parts(
    table: Path, parts: Path, rule: Rule, model: str, indices: list[int], pixels: LabelledPixels
) -> dict[int, Certificates]:
    """Return the certificates that are already written, by the indices of their images.

    Raises:
        RunError: they were made under another rule, for other images or with another model.
    """
    certified: dict[int, Certificates] = {}
    ids = dict(zip(indices, pixels.ids, strict=True))
    for part in (table, *sorted(parts.glob("*.tsv"))):
        drop_unfinished_line(part)
        read = read_certificates(part)
        if read is None:
            continue
        stored, certificates = read
        if certificates.rule != rule:
            raise RunError(f"{part} was made under another rule; move it away and certify again")
        if certificates.model != model:
            raise RunError(
                f"{part} was made with another model, or names none: weights, noise or execution may "
                "have changed; restore the model, or move the file away and certify again"
            )
        same = all(ids.get(index) == image_id for index, image_id in zip(stored, certificates.ids, strict=True))
        if not same or _differing_image(certificates, pixels) is not None:
            raise RunError(f"{part} holds other images than this recipe certifies; move it away and certify again")
        certified |= {index: certificates.select([row]) for row, index in enumerate(stored)}
    make_folder(parts)
    return certified
