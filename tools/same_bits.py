"""Print a digest of everything that some small runs of a checkout compute, to compare before and after a change.

    python tools/same_bits.py [ROOT] [--digits] > before.json

ROOT is a checkout, by default this one. Its commands run in processes of their own, with one thread. Digests are equal
where weights, votes, radii, adversarial images and verdicts are. They depend on processor and torch version, so compare
two checkouts on one machine. ``--digits`` adds ``rush run digits``.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

RECIPE = Path(__file__).resolve().parents[1] / "tests/tiny.toml"
WHOLE: tuple[tuple[str, ...], ...] = (
    (),
    ("certify.method=sequential", "attack.norm=l2", "attack.epsilon=0.5", "execution.precision=bfloat16"),
    ("pretrain.epochs=0", "finetune.objective=standard", "smoothing.sigma=0"),
)
TRAININGS: tuple[tuple[str, ...], ...] = (
    ("pretrain.noise.views=both", "pretrain.noise.ramp_epochs=2", "pretrain.ema_decay=0.9", "pretrain.warmup_epochs=1"),
    ("pretrain.micro_batch=50", "finetune.mode=linear", "finetune.ema_decay=0.9"),
    (
        "pretrain.objective=moco",
        "pretrain.temperature=0.5",
        "pretrain.queue=512",
        "finetune.objective=consistency",
        "finetune.optimizer=adamw",
    ),
    ("pretrain.objective=acl", "finetune.objective=cat-rs", "pretrain.optimizer=lars"),
    ("pretrain.epochs=0", "finetune.objective=smoothadv", "finetune.smoothadv.steps=2"),
    ("pretrain.epochs=0", "finetune.objective=trades", "finetune.adversary.steps=2"),
    ("pretrain.epochs=0", "finetune.objective=pgd-at", "finetune.adversary.steps=2", "execution.precision=bfloat16"),
    ("finetune.mode=linear-then-full", "finetune.label_fraction=0.2", "data.held_out=100"),
)
TIMES = {"time", "seconds"}


def rush(root: Path, *arguments: str) -> str:
    """Run a command of the checkout and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "rush", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"rush {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def digests(run: Path) -> dict[str, str]:
    """Return a digest of each thing that a run holds, times apart."""
    result = {}
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if name.startswith("stages/"):  # when and how long
            continue
        if file.suffix == ".safetensors":
            result[name] = digest([(key, a.dtype, a.shape, a.tobytes()) for key, a in sorted(load_file(file).items())])
        elif file.suffix == ".npz":
            with np.load(file) as stored:
                result[name] = digest(
                    [
                        (key, stored[key].dtype, stored[key].tobytes())
                        for key in sorted(stored.files)
                        if key not in TIMES
                    ]
                )
        elif file.suffix == ".tsv":
            result[name] = digest(without_times(file.read_text()))
        elif file.name == "audit.json":
            result[name] = digest(figures(json.loads(file.read_text())))
        elif file.name == "log.jsonl":
            events = [json.loads(line) for line in file.read_text().splitlines()]
            result[name] = digest([(event.get("loss"), event.get("passes"), event.get("epoch")) for event in events])
    return result


def without_times(table: str) -> list[list[str]]:
    lines = [line.split("\t") for line in table.splitlines()]
    keep = [column for column, name in enumerate(lines[0]) if name not in {*TIMES, "format"}]
    return [[line[column] for column in keep] for line in lines]


def figures(value: Any) -> Any:
    """Return the numbers and single words of a JSON value, without prose and without the names of its fields."""
    if isinstance(value, dict):
        return [figures(entry) for key, entry in sorted(value.items()) if key not in TIMES]
    if isinstance(value, list):
        return [figures(entry) for entry in value]
    return None if isinstance(value, str) and " " in value else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).resolve().parents[1])
    parser.add_argument("--digits", action="store_true", help="also run the recipe digits, some minutes")
    arguments = parser.parse_args()
    root, result = arguments.root.resolve(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [(overrides, ["run"]) for overrides in WHOLE] + [
            (overrides, ["pretrain", "finetune"]) for overrides in TRAININGS
        ]
        for number, (overrides, commands) in enumerate(runs):
            out = folder / f"run-{number}"
            sets = [word for override in overrides for word in ("--set", override)]
            for position, command in enumerate(commands):
                given = [str(RECIPE), "--out", str(out), *sets] if position == 0 else [str(out)]
                rush(root, command, *given)
            result[" ".join(overrides) or "tiny"] = digests(out)
        if arguments.digits:
            rush(root, "run", "digits", "--out", str(folder / "digits"))
            result["digits"] = digests(folder / "digits")
    print(json.dumps(result, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
