"""Finished groups of an evaluation on disk, so that an interrupted evaluation repeats at most one group."""

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
from rush.evaluation.verdict import VerdictSettings
from rush.runtime.files import write_arrays


def made_by(settings: VerdictSettings, fingerprint: str) -> str:
    """Return the text by which a group on disk names its settings and, by the ``fingerprint``, its model.

    "Judging" is what the settings were called when the first groups were written. Files of any age are compared with
    this text.
    """
    shown = f"level={settings.level!r}, max_votes={settings.max_votes!r}, seed={settings.seed!r}"
    return f"(Judging({shown}), {fingerprint!r})"


def write_group(path: Path, result: AttackResult, images: LabelledPixels, origin: str) -> None:
    """Write the result of a group of images, atomically.

    Args:
        origin: everything that determines the result besides images, plan, threat and level, e.g. ``made_by``.
    """
    write_arrays(
        path,
        adversarial=result.adversarial.numpy(),
        ids=np.array(result.ids),
        images=np.array(_digest(images)),
        conditions=np.array(_conditions(result.plan, result.threat, result.level, origin)),
        **{name: getattr(result, name) for name in ARRAYS},
    )


def read_group(
    path: Path,
    images: LabelledPixels,
    threat: ThreatModel,
    plan: Plan | Suite,
    level: float,
    single: bool,
    origin: str,
) -> AttackResult:
    """Return the result of a group of images.

    Raises:
        RunError: the file is damaged, or belongs to different images, a different attacker or a different ``origin``.
    """
    try:
        # opened explicitly, since numpy leaves a damaged file open
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        adversarial, ids = torch.from_numpy(arrays.pop("adversarial")), tuple(map(str, arrays.pop("ids")))
        digest, conditions = str(arrays.pop("images")), str(arrays.pop("conditions"))
        kept = {name: arrays[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); delete it and attack again") from error
    if ids != images.ids or digest != _digest(images):
        raise RunError(f"{path} holds other images than are attacked now; move {path.parent} away and attack again")
    if conditions != _conditions(plan, threat, level, origin):
        raise RunError(
            f"{path} was made by another attacker or threat, on another model or with another seed; "
            f"move {path.parent} away and attack again"
        )
    return AttackResult(plan=plan, threat=threat, adversarial=adversarial, ids=ids, level=level, single=single, **kept)


def _conditions(plan: Plan | Suite, threat: ThreatModel, level: float, origin: str) -> str:
    epsilon = np.asarray(torch.as_tensor(threat.epsilon)).tolist()
    return repr((plan, threat.norm, epsilon, level, origin))


def _digest(images: LabelledPixels) -> str:
    """Return the SHA-256 of pixels and labels: an image set keeps its ids when its pixels are changed."""
    return hashlib.sha256(images.x.contiguous().numpy().tobytes() + images.y.numpy().tobytes()).hexdigest()
