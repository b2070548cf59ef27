"""Attack results on disk: one file a judged group while the stage runs, ``attacks.tsv`` and one archive a rung when it
ends."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from rush.attacks.threat import ThreatModel
from rush.engine.progress import progress
from rush.errors import RunError
from rush.evaluation.robust import GROUP, AttackResult, Plan, attack_groups, join_results
from rush.files import write_atomically, write_text
from rush.inputs import LabelledPixels
from rush.options import VERDICTS
from rush.smoothing import SmoothedClassifier

COLUMNS = (
    "rung", "idx", "id", "label", "verdict", "linf", "l2",
    "challenger", "votes", "votes_label", "votes_challenger", "time",
)  # fmt: skip
_ARRAYS = ("labels", "verdict", "challenger", "counts", "votes", "linf", "l2", "seconds")


class AttackParts:
    """Runs attackers group by group, each finished group in a file of its own, so that a killed stage repeats one group
    at most."""

    def __init__(self, folder: Path, smoothed: SmoothedClassifier, *, level: float, max_votes: int, seed: int) -> None:
        self.folder = folder
        self.smoothed = smoothed
        self.level = level
        self.max_votes = max_votes
        self.seed = seed

    def run(self, plan: Plan, pixels: LabelledPixels, threat: ThreatModel) -> AttackResult:
        """The result of one attacker on all images, from the files that are there and new groups for the rest."""
        parts = self._finished(plan, pixels, threat)
        start = GROUP * len(parts)
        with progress(f"attack {plan.name}", len(pixels), start=min(start, len(pixels))) as advance:
            groups = attack_groups(
                self.smoothed,
                pixels,
                threat,
                plan,
                level=self.level,
                max_votes=self.max_votes,
                seed=self.seed,
                start=start,
                advance=advance,
            )
            for part in groups:
                _save_result(self._file(plan, len(parts)), part)
                parts.append(part)
        return join_results(parts, threat)

    def _finished(self, plan: Plan, pixels: LabelledPixels, threat: ThreatModel) -> list[AttackResult]:
        parts: list[AttackResult] = []
        while (file := self._file(plan, len(parts))).exists():
            part = _load_result(file, plan, threat, self.level)
            first = GROUP * len(parts)
            if part.ids != pixels.ids[first : first + GROUP]:
                raise RunError(
                    f"{file} holds other images than this recipe attacks; move {self.folder} away and attack again"
                )
            parts.append(part)
        return parts

    def _file(self, plan: Plan, number: int) -> Path:
        return self.folder / f"{plan.name}-{number:04d}.npz"


def write_attacks(
    run: Path, results: Sequence[AttackResult], index_of: Mapping[str, int], clean: LabelledPixels
) -> None:
    """Write ``attacks.tsv``, ``attacks/<rung>.npz`` (adversarial float32, ids) and ``attacks/images.npz`` (uint8
    images, labels, ids)."""
    for result in results:
        _save_arrays(
            run / f"attacks/{result.plan.name}.npz", adversarial=result.adversarial.numpy(), ids=np.array(result.ids)
        )
    pixels = (clean.x * 255).round().to(torch.uint8).numpy()
    _save_arrays(run / "attacks/images.npz", images=pixels, labels=clean.y.numpy(), ids=np.array(clean.ids))
    lines = ["\t".join(COLUMNS)] + [_line(result, row, index_of) for result in results for row in range(len(result))]
    write_text(run / "attacks.tsv", "\n".join(lines) + "\n")


def _line(result: AttackResult, row: int, index_of: Mapping[str, int]) -> str:
    label, challenger = result.labels[row], result.challenger[row]
    values = (
        result.plan.name,
        index_of[result.ids[row]],
        result.ids[row],
        label,
        VERDICTS[result.verdict[row]],
        f"{result.linf[row]:.6f}",
        f"{result.l2[row]:.6f}",
        challenger,
        result.votes[row],
        result.counts[row, label],
        result.counts[row, challenger],
        f"{result.seconds[row]:.4f}",
    )
    return "\t".join(str(value) for value in values)


def _save_result(path: Path, result: AttackResult) -> None:
    arrays = {name: getattr(result, name) for name in _ARRAYS}
    _save_arrays(path, adversarial=result.adversarial.numpy(), ids=np.array(result.ids), **arrays)


def _load_result(path: Path, plan: Plan, threat: ThreatModel, level: float) -> AttackResult:
    try:
        # opened here, since numpy leaves a damaged file open
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); delete it and attack again") from error
    adversarial, ids = torch.from_numpy(arrays.pop("adversarial")), tuple(str(own) for own in arrays.pop("ids"))
    known = {field.name for field in fields(AttackResult)}
    return AttackResult(
        plan=plan,
        threat=threat,
        adversarial=adversarial,
        ids=ids,
        level=level,
        **{k: v for k, v in arrays.items() if k in known},
    )


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    def write(target: Path) -> None:
        with open(target, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_atomically(path, write)
