"""Finished groups of an attack on disk, so that a killed one repeats one group at most."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch

from rush.attacks.threat import ThreatModel
from rush.data.checks import LabelledPixels
from rush.errors import RunError
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.result import ARRAYS, AttackResult
from rush.runtime.files import write_arrays


def write_part(path: Path, result: AttackResult, group: LabelledPixels, made_by: str) -> None:
    """Write the result of ``group`` to ``path``, atomically. made_by: what else than plan and threat decides it."""
    arrays = {name: getattr(result, name) for name in ARRAYS}
    write_arrays(
        path,
        adversarial=result.adversarial.numpy(),
        ids=np.array(result.ids),
        images=np.array(_digest(group)),
        conditions=np.array(_conditions(result.plan, result.threat, result.level, made_by)),
        **arrays,
    )


def read_part(
    path: Path,
    group: LabelledPixels,
    threat: ThreatModel,
    plan: Plan | Suite,
    level: float,
    single: bool,
    made_by: str,
) -> AttackResult | None:
    """The result of ``group`` in ``path``, None where there is no file.

    Raises: RunError when the file is damaged, or is of other images, another attacker or another ``made_by``.
    """
    if not path.exists():
        return None
    try:
        # opened here, since numpy leaves a damaged file open
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        adversarial, ids = torch.from_numpy(arrays.pop("adversarial")), tuple(str(own) for own in arrays.pop("ids"))
        images, conditions = str(arrays.pop("images")), str(arrays.pop("conditions"))
        kept = {name: arrays[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); delete it and attack again") from error
    if ids != group.ids or images != _digest(group):
        raise RunError(f"{path} holds other images than are attacked now; move {path.parent} away and attack again")
    if conditions != _conditions(plan, threat, level, made_by):
        raise RunError(
            f"{path} was made by another attacker or threat, on another model or with another seed; "
            f"move {path.parent} away and attack again"
        )
    return AttackResult(plan=plan, threat=threat, adversarial=adversarial, ids=ids, level=level, single=single, **kept)


def _conditions(plan: Plan | Suite, threat: ThreatModel, level: float, made_by: str) -> str:
    epsilon = np.asarray(torch.as_tensor(threat.epsilon)).tolist()
    return repr((plan, threat.norm, epsilon, level, made_by))


def _digest(group: LabelledPixels) -> str:
    """SHA-256 of pixels and labels: an image set keeps its ids when its pixels are changed."""
    return hashlib.sha256(group.x.contiguous().numpy().tobytes() + group.y.numpy().tobytes()).hexdigest()
