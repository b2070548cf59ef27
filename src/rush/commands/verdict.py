"""``rush verdict``: judgement of adversarial images that any tool has made."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rush.commands.external import NO_EVALUATION, ExternalEvaluation, verdict_rows
from rush.commands.terminal import Json, print_json, print_table
from rush.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from rush.attacks.threat import ThreatModel
    from rush.data.checks import LabelledPixels
    from rush.evaluation.model import Model
    from rush.evaluation.result import AttackResult

    Arrays = dict[str, NDArray[np.generic]]

_NATIVE = {2: "float16", 4: "float32"}  # by the bytes of a number, in the machine's byte order; else float64


def verdict(
    file: Path,
    *,
    external: ExternalEvaluation = NO_EVALUATION,
    alpha: float = 0.001,
    max_votes: int = 10_000,
    json: Json = False,
) -> None:
    """Judge adversarial images made by any tool: broken, held or undecided, on fresh noise.

    The noise depends on the point and on a seed. The seed is drawn after the points are fixed, so that no point can
    have been tried against it, and is printed; --seed repeats a verdict.

    Args:
        file: An .npz file with adversarial (N, C, H, W), float in [0, 1] or uint8.
            It also holds ids of images of --data, or its own images and labels.
        alpha: Probability of a false verdict, per image.
        max_votes: Largest number of votes per verdict.
    """
    external = replace(external, images=None)
    threat, model = external.threat, external.classifier
    seed = secrets.randbelow(2**32) if external.seed is None else external.seed
    pixels = None if external.data is None else external.pixels
    options = {"decision": external.decision, "alpha": alpha, "max_votes": max_votes, "seed": seed}
    result = judge_file(file, pixels, model, threat, **options)
    if json:
        print_json({**result.to_dict(), "seed": seed})
        return
    drawn = "" if external.seed is not None else f", drawn after the points; repeat this verdict with --seed {seed}"
    rows = [
        *verdict_rows(result),
        ("seed", f"{seed}{drawn}"),
    ]
    print_table(("", str(file)), rows)


def judge_file(
    file: Path, pixels: LabelledPixels | None, model: Model, threat: ThreatModel, **options: Any
) -> AttackResult:
    """Judge the points in an .npz file with ``adversarial`` (N, C, H, W), float in [0, 1] or uint8.

    Args:
        file: The file.
        pixels: The images with the ``ids`` of the file, or in its order if it has none. None if the file holds its own,
            as ``images`` and ``labels``.
        model: As in ``rush.attack``.
        threat: Threat model within which the points must lie.
        options: As in ``rush.evaluation.attack.verdict``.

    Raises:
        DataError: The file cannot be read, lacks an array, or has one of another kind or with unknown ids.
        InputError: The points or options are refused by ``rush.evaluation.attack.verdict``.
    """
    from rush.data.labels import decode_texts
    from rush.data.readers.npz import read_arrays
    from rush.evaluation.attack import verdict

    if not file.is_file():
        raise DataError(f"{file} does not exist; give an .npz file with an array 'adversarial'")
    arrays = read_arrays(file, lambda _: True)
    points = _pixels(arrays, "adversarial", file)
    if pixels is None:
        return verdict(model, (_pixels(arrays, "images", file), _labels(arrays, file)), points, threat, **options)
    if "ids" in arrays:
        pixels = pixels.select(_positions(decode_texts(arrays["ids"], "ids", str(file)), pixels.ids, file))
    return verdict(model, pixels, points, threat, **options)


def _positions(ids: list[str], all_ids: Sequence[str], file: Path) -> list[int]:
    """Return the positions in ``all_ids`` of the images that the file names."""
    positions = {image_id: position for position, image_id in enumerate(all_ids)}
    unknown = [image_id for image_id in ids if image_id not in positions]
    if unknown:
        raise DataError(f"{file} names {len(unknown)} images that are not in the data set, first {unknown[0]}")
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{file} has a duplicate id, {repeated[0]}; give one point per image")
    return [positions[image_id] for image_id in ids]


def _array(arrays: Arrays, name: str, file: Path) -> NDArray[np.generic]:
    if name not in arrays:
        raise DataError(f"{file} has no array {name!r}; it has {', '.join(sorted(arrays)) or 'none'}")
    return arrays[name]


def _labels(arrays: Arrays, file: Path) -> Tensor:
    import torch

    array = _array(arrays, "labels", file)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"labels in {file} must be class indices, integers of shape (N,), got {array.dtype} {array.shape}; convert "
            "them first"
        )
    return torch.from_numpy(array.astype("int64"))


def _pixels(arrays: Arrays, name: str, file: Path) -> Tensor:
    """Return the array (N, C, H, W) as a tensor of its own float type, with 8-bit pixels divided by 255."""
    import torch

    array = _array(arrays, name, file)
    if array.ndim != 4 or not (array.dtype == "uint8" or array.dtype.kind == "f"):
        raise DataError(
            f"{name} in {file} must be (N, C, H, W), float in [0, 1] or uint8, got {array.dtype} {array.shape}"
        )
    if array.dtype == "uint8":
        return torch.from_numpy(array.astype("float32") / 255)
    return torch.from_numpy(array.astype(_NATIVE.get(array.dtype.itemsize, "float64")))
