"""The report of a run folder: every figure comes from the files, the page stands alone, and damage is named."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rush.errors import RunError
from rush.evaluation.intervals import paired_difference, share_interval
from rush.reporting.page import write_report
from rush.reporting.results import read_run
from rush.reporting.tables import bounds, percent, points, share, summary_rows

CERTIFIED, ATTACKED, SIGMA, EPSILON = 60, 40, 0.5, 8 / 255
COVERING = EPSILON * 8  # 8 x 8 pixels, one channel
# Images (of the 40 attacked, counted from 0) that each rung leaves standing; the rest of the right ones are broken.
STANDING = {"clean": 36, "frozen": 30, "transfer": 20, "eot-1": 17, "eot-16": 12}
LABELS = {
    "clean": "no attack",
    "frozen": "PGD, one noise draw kept",
    "transfer": "PGD on the plain classifier",
    "eot-1": "PGD, fresh noise, EOT 1",
    "eot-16": "PGD, fresh noise, EOT 16",
}


def write_json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_run(folder: Path, name: str = "digits", classes: list[str] | None = None) -> Path:
    """A small synthetic run: 60 certified images, 35 of them right and 10 with a radius above 0.25; the first 40 are attacked."""
    write_json(folder / "recipe.json", recipe(name))
    write_json(folder / "provenance.json", {"seed": 0, "commit": "abc123", "versions": {"torch": "2.13.0"}, "threads": 2})
    write_json(folder / "model" / "model.json", {"classes": classes or [f"digit {k}" for k in range(10)]})
    write_log(folder / "log.jsonl")
    timing = {"seconds": 65.0, "started": "2026-01-01T10:00:00", "finished": "2026-01-01T10:01:05", "commit": "abc123"}
    training = {"epochs": 3, "passes_per_image": 6.0, "images_per_second": 812.0}
    write_json(folder / "stages" / "pretrain.json", {"stage": "pretrain", **timing, **training, "knn_accuracy": None})
    write_json(folder / "stages" / "finetune.json", {"stage": "finetune", **timing, **training, "mode": "full"})
    write_certificates(folder, timing)
    write_attacks(folder, timing)
    return folder


def recipe(name: str) -> dict:
    return {
        "name": name,
        "seed": 0,
        "data": {"name": "digits"},
        "model": {"encoder": "small", "width": 16},
        "smoothing": {"sigma": SIGMA},
        "attack": {"norm": "linf", "epsilon": "8/255", "eot_samples": [1, 16]},
    }


def write_log(file: Path) -> None:
    events = [
        {"event": "epoch", "stage": stage, "epoch": epoch, "loss": 2.0 / epoch, "seconds": 3.0, "images_per_second": 812.0}
        for stage in ("pretrain", "finetune")
        for epoch in (1, 2, 3)
    ]
    lines = [json.dumps(event) for event in [{"event": "start"}, *events]]
    file.write_text("\n".join(lines) + '\n{"event": "epo', encoding="utf-8")


def write_certificates(folder: Path, timing: dict) -> None:
    rows = ["idx\tlabel\tpredict\tradius\tcorrect\ttime\tid\tp_lower\tnum_samples\tcounts"]
    for i in range(CERTIFIED):
        label, counts = i % 10, ",".join(["100"] * 10)
        right, abstained = i < 30 or 40 <= i < 45, 30 <= i < 40
        predict = label if right else -1 if abstained else (label + 1) % 10
        radius = 0.9 - 0.05 * i if i < 10 else 0.0 if abstained else max(0.2 - 0.005 * (i - 10), 0.1)
        correct = int(predict == label)
        rows.append(f"{i}\t{label}\t{predict}\t{radius!r}\t{correct}\t0.01\timg-{i}\t0.9\t1000\t{counts}")
    (folder / "certificates.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    fields = {"images": CERTIFIED, "sigma": SIGMA, "alpha": 0.001, "num_selection": 100, "num_estimation": 1000}
    cost = {"forward_passes_per_image": 1100, "images_per_second": 9.5}
    write_json(folder / "stages" / "certify.json", {"stage": "certify", **timing, **fields, **cost})


def write_attacks(folder: Path, timing: dict) -> None:
    rows = ["rung\tidx\tid\tlabel\tverdict\tlinf\tl2\tchallenger\tvotes\tvotes_label\tvotes_challenger"]
    for rung, standing in STANDING.items():
        for i in reversed(range(ATTACKED)):  # the order in the file must not matter
            # One image stays undecided on the strongest rung.
            verdict = "broken" if i >= standing else "undecided" if rung == "eot-16" and i == 0 else "held"
            l2 = 0.0 if rung == "clean" else COVERING  # above the radius of every image that breaks
            rows.append(f"{rung}\t{i}\timg-{i}\t{i % 10}\t{verdict}\t0.03\t{l2}\t{(i + 3) % 10}\t1000\t700\t200")
    rows += [f"sandwich\t{i}\timg-{i}\t{i % 10}\theld\t0.2\t0.1\t0\t1000\t900\t50" for i in range(30)]
    (folder / "attacks.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    rungs = [
        {
            "name": name,
            "label": LABELS[name],
            "steps": 20 if place else None,
            "step_size": "2/255" if place else None,
            "restarts": 1 if place else None,
            "eot_samples": {"frozen": 1, "eot-1": 1, "eot-16": 16}.get(name),
            "passes_per_image": 20.0 * place,
            "seconds": 10.0 * place,
        }
        for place, name in enumerate(STANDING)
    ]
    sandwich = {"checked": 30, "violations": [], "allowed": 1, "passes_per_image": 40, "seconds": 12.0}
    threat = {"norm": "linf", "epsilon": EPSILON, "epsilon_text": "8/255"}
    judged = {"alpha": 0.001, "level": 0.0002, "num_verdicts": 5, "max_votes": 10000, "votes_per_image": 800.0}
    write_json(
        folder / "stages" / "attack.json",
        {"stage": "attack", **timing, "threat": threat, **judged, "rungs": rungs, "sandwich": sandwich},
    )
    write_images(folder / "attacks")


def write_images(folder: Path) -> None:
    """Image i is flat grey 100 + i; an attacked image is 8/255 lighter on the left half and darker on the right."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack([np.full((1, 8, 8), 100 + i, np.uint8) for i in range(ATTACKED)])
    ids = np.array([f"img-{i}" for i in range(ATTACKED)])
    np.savez(folder / "images.npz", images=images, labels=np.arange(ATTACKED) % 10, ids=ids)
    sign = np.where(np.arange(8) < 4, 1.0, -1.0)
    adversarial = (images / 255 + EPSILON * sign).astype(np.float32)
    for name in STANDING:
        np.savez(folder / f"{name}.npz", adversarial=adversarial if name != "clean" else images / np.float32(255), ids=ids)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")
