"""Verification of a run: its certificates and the verdicts on its points, computed again on this machine."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rush.certification.certificates import Certificates
from rush.certification.certify import certify_each
from rush.choices import VERDICTS
from rush.data.checks import kind_of
from rush.data.splits import Splits
from rush.errors import ConfigError, RunError
from rush.evaluation.candidates import Candidates
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import defend
from rush.evaluation.plans import Plan
from rush.evaluation.sandwich import sandwich_plan
from rush.models.storage import load
from rush.pipeline.attackers import Attackers
from rush.pipeline.precision import FORM
from rush.records.arrays import read_arrays
from rush.records.attacks import read_verdicts
from rush.records.certificates import TABLE, read_certificates
from rush.records.folder import RunFolder, versions
from rush.records.read_run import read_provenance
from rush.runtime.machine import machine
from rush.smoothing.classifier import SmoothedClassifier


@dataclass(frozen=True)
class Replay:
    """A part of a run, computed again.

    Attributes:
        what: "certificates", or the name of a rung.
        images: number of images.
        same: number of those with the same votes.
        largest: largest difference of an image's votes for one class, as a share of them.
        changed: number of images whose class, radius or verdict differs.
    """

    what: str
    images: int
    same: int
    largest: float
    changed: int


@dataclass(frozen=True)
class Verification:
    """The replays of a run, and what differs between the machine that made it and this one.

    Attributes:
        differences: name, recorded value and value on this machine.
        skipped: what was not replayed, and why.
        causes: sentences on why votes differ: another model, or a form of the forward that gives the stored votes.
    """

    replays: tuple[Replay, ...]
    differences: tuple[tuple[str, str, str], ...]
    skipped: tuple[str, ...]
    causes: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether every vote is the same."""
        return all(replay.same == replay.images for replay in self.replays)


def verify(run: RunFolder, images: int) -> Verification:
    """Certify the first ``images`` images of a run again, and judge the stored points of the same number of images.

    Raises:
        ConfigError: ``images`` is not positive.
        RunError: the run has no model, or its data are not those of the run.
    """
    if images < 1:
        raise ConfigError(f"--images must be at least 1, got {images}")
    run.require("finetune")
    recorded = {**read_provenance(run.path), **_judged_form(run)}
    model = _model(run, recorded)
    replays: list[Replay] = []
    skipped: list[str] = []
    session = _Session(run, model, images, recorded)
    for step in (session.certificates, session.points):
        for found in step():
            (skipped if isinstance(found, str) else replays).append(found)  # type: ignore[arg-type]
    result = Verification(tuple(replays), tuple(_differences(recorded, model)), tuple(skipped))
    return result if result.identical else replace(result, causes=tuple(session.causes()))


def _judged_form(run: RunFolder) -> dict[str, Any]:
    """Return in what form the run was judged, as far as it differs from the training's. Older runs had no other."""
    forward = run.require("finetune").get("forward", {})
    return {name: value for name, value in forward.items() if name in FORM}


def _model(run: RunFolder, recorded: dict[str, Any]) -> Any:
    """Return the model of the run, with the number of threads that the run had."""
    threads = recorded.get("threads")
    if isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)
    model = load(run.path)
    if isinstance(model, SmoothedClassifier):
        model.execution.configure()
    return model


@dataclass(frozen=True)
class _Session:
    run: RunFolder
    model: Any
    count: int
    recorded: dict[str, Any]

    def certificates(self) -> Iterator[Replay | str]:
        """Yield the replay of the certificates."""
        stored = self._stored()
        if stored is None:
            yield "certificates: there are none"
            return
        pairs = self._certified_again(self.model, stored, self.count)
        yield Replay(
            "certificates",
            len(pairs),
            sum(_same_votes(*pair) for pair in pairs),
            max(float(_difference(*pair)) for pair in pairs),
            sum(bool(a.prediction[0] != b.prediction[0] or a.radius[0] != b.radius[0]) for a, b in pairs),
        )

    def causes(self) -> Iterator[str]:
        """Yield why votes may differ, after trying other forms of the forward on two images."""
        stored = self._stored()
        if stored is None:
            return
        if stored.model not in (None, self.model.fingerprint()):
            yield "the certificates are of another model: weights, noise or execution have changed since"
        execution = self.model.execution
        if execution.precision == "int8":
            return  # integers have no other form
        other = "float32" if execution.precision == "bfloat16" else "bfloat16"
        changes = (
            {"precision": other, "channels_last": True},
            {"precision": other, "channels_last": False},
            {"channels_last": not execution.channels_last},
            {"folded": not execution.folded},
        )
        for change in changes:
            changed = replace(execution, **change)
            model = SmoothedClassifier(
                changed.place(copy.deepcopy(self.model.classifier)),
                noise=self.model.noise,
                num_classes=self.model.num_classes,
                execution=changed,
                classes=self.model.classes,
                image_shape=self.model.image_shape,
            )
            if all(_same_votes(*pair) for pair in self._certified_again(model, stored, 2)):
                told = ", ".join(f"{name} = {value}" for name, value in change.items())
                yield f"with {told} the votes are the stored ones"

    def _stored(self) -> Certificates | None:
        read = read_certificates(self.run.path / TABLE) if self.run.finished("certify") else None
        return None if read is None or not isinstance(self.model, SmoothedClassifier) else read[1]

    def _certified_again(
        self, model: SmoothedClassifier, stored: Certificates, count: int
    ) -> list[tuple[Certificates, Certificates]]:
        """Return the stored and the new certificate of the first images."""
        config = self.run.recipe.certify
        _, pixels = self._splits().evaluation(config.images, model.num_classes, model.kind)
        rows = list(range(min(count, len(pixels))))
        again = dict(certify_each(model, pixels.select(rows), stored.rule, self.run.recipe.seed, rows))
        place = {image_id: row for row, image_id in enumerate(stored.ids)}
        return [(stored.select([place[pixels.ids[row]]]), again[row]) for row in rows]

    def points(self) -> Iterator[Replay | str]:
        """Yield the replay of each rung's verdicts."""
        run = self.run
        if not run.finished("attack"):
            yield "points: the run has not been attacked"
            return
        if not (run.path / "attacks/images.npz").is_file():
            yield "points: they are not stored"
            return
        num_classes = self.model.num_classes if isinstance(self.model, SmoothedClassifier) else None
        config = run.recipe.attack
        classes = num_classes or len(kind_of(self.model).classes or ())
        _, images = self._splits().evaluation(config.images, classes, kind_of(self.model))
        attackers = Attackers.of(run.recipe, classes, images.x[0].numel())
        evaluation = Evaluation(defend(self.model, classes), images, attackers.threat, attackers.settings)
        stored = read_verdicts(run.path)
        inside = sandwich_plan(config.steps, norm="l2")
        for plan in (*attackers.rungs, inside):
            if plan.name not in stored:
                continue
            if not isinstance(plan, Plan):
                yield f"{plan.name}: a suite shares its level among its attackers, whose points are not stored"
                continue
            yield self._judged_again(evaluation, plan, stored[plan.name])

    def _judged_again(self, evaluation: Evaluation, plan: Plan, lines: dict[str, tuple[str, int, int]]) -> Replay:
        remedy = "restore it from a copy"
        arrays = read_arrays(self.run.path / f"attacks/{plan.name}.npz", ("adversarial", "ids"), remedy)
        ids = list(map(str, arrays["ids"]))[: self.count]
        place = {image_id: row for row, image_id in enumerate(evaluation.images.ids)}
        chosen = evaluation.select([place[image_id] for image_id in ids])
        points = torch.from_numpy(arrays["adversarial"][: len(ids)])
        result = chosen.judge(Candidates.unmeasured(points), plan)
        same, changed, largest = 0, 0, 0.0
        for row, image_id in enumerate(ids):
            verdict, votes, right = lines[image_id]
            for_label, judging = int(result.counts[row, result.labels[row]]), int(result.counts[row].sum())
            same += bool(result.votes[row] == votes and for_label == right)
            changed += VERDICTS[result.verdict[row]] != verdict
            stored = votes - (int(result.votes[row]) - judging)  # both chose the challenger by as many votes
            largest = max(largest, abs(for_label / max(1, judging) - right / max(1, stored)))
        return Replay(plan.name, len(ids), same, largest, changed)

    def _splits(self) -> Splits:
        """Return the images, which must be those of the run."""
        known = self.recorded.get("data", {})

        def record(split: str, images: Any) -> None:
            before = known.get(split, {}).get("fingerprint")
            if before is not None and before != images.fingerprint:
                raise RunError(
                    f"the images of {split} are not those of {self.run.path}; give the folder of its data with --data"
                )

        recipe = self.run.recipe
        return Splits(recipe.data, recipe.seed, "cpu", record, self.run.loaded, recipe.quick)


def _same_votes(stored: Certificates, again: Certificates) -> bool:
    return np.array_equal(stored.blocks[0], again.blocks[0]) and np.array_equal(stored.selection, again.selection)


def _difference(stored: Certificates, again: Certificates) -> float:
    """Return the largest difference of the share of votes that a class gets."""
    shares = [each.counts[0] / max(1, int(each.counts[0].sum())) for each in (stored, again)]
    return float(np.abs(shares[0] - shares[1]).max())


def _differences(recorded: dict[str, Any], model: Any) -> Iterator[tuple[str, str, str]]:
    """Yield name, recorded value and value on this machine of everything in the provenance that differs."""
    here: dict[str, Any] = {}
    if isinstance(model, SmoothedClassifier):
        here = {"device": model.execution.device, "threads": torch.get_num_threads()}
        here |= {name: getattr(model.execution, name) for name in FORM}
    for name, value in here.items():
        if name in recorded and recorded[name] != value:
            yield name, str(recorded[name]), str(value)
    for group, now in (("versions", versions()), ("machine", machine())):
        before = recorded.get(group)
        for name, value in now.items():
            if isinstance(before, dict) and name in before and before[name] != value:
                yield name, str(before[name]), str(value)
