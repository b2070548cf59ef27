"""Attack results on disk when a stage ends: ``attacks.tsv`` and one archive a rung."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from rush.choices import VERDICTS
from rush.data.checks import LabelledPixels
from rush.evaluation.groups import save_arrays
from rush.evaluation.result import AttackResult
from rush.runtime.files import write_text
from rush.runtime.lines import escape

COLUMNS = (
    "rung", "idx", "id", "label", "verdict", "linf", "l2",
    "challenger", "votes", "votes_label", "votes_challenger", "time", "l1",
)  # fmt: skip


def write_attacks(
    run: Path, results: Sequence[AttackResult], index_of: Mapping[str, int], clean: LabelledPixels
) -> None:
    """Write ``attacks.tsv``, ``attacks/<rung>.npz`` (adversarial float32, ids) and ``attacks/images.npz`` (uint8
    images, labels, ids)."""
    for result in results:
        save_arrays(
            run / f"attacks/{result.plan.name}.npz", adversarial=result.adversarial.numpy(), ids=np.array(result.ids)
        )
    pixels = (clean.x * 255).round().to(torch.uint8).numpy()
    save_arrays(run / "attacks/images.npz", images=pixels, labels=clean.y.numpy(), ids=np.array(clean.ids))
    write_text(run / "attacks.tsv", attack_table(results, index_of))


def attack_table(results: Sequence[AttackResult], index_of: Mapping[str, int]) -> str:
    """Return the text of ``attacks.tsv``: a header and one line per image and result.

    Args:
        results: of one model, each by another attacker.
        index_of: position in the split of each image, by id.
    """
    lines = ["\t".join(COLUMNS)] + [_line(result, row, index_of) for result in results for row in range(len(result))]
    return "\n".join(lines) + "\n"


def _line(result: AttackResult, row: int, index_of: Mapping[str, int]) -> str:
    label, challenger = result.labels[row], result.challenger[row]
    values = (
        result.plan.name,
        index_of[result.ids[row]],
        escape(result.ids[row]),
        label,
        VERDICTS[result.verdict[row]],
        f"{result.linf[row]:.6f}",
        f"{result.l2[row]:.6f}",
        challenger,
        result.votes[row],
        result.counts[row, label],
        result.counts[row, challenger],
        f"{result.seconds[row]:.4f}",
        f"{result.l1[row]:.6f}",
    )
    return "\t".join(str(value) for value in values)
