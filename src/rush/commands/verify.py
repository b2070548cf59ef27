"""``rush verify``: the certificates and verdicts of a run, computed again on this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from rush.commands.run_folders import Data, data_roots
from rush.commands.terminal import Json, print_json, print_lines, print_table

DIFFERENT = 3
"""Exit status where a vote differs."""


def verify(folder: Path, *, images: int = 10, data: Data = None, json: Json = False) -> None:
    """Compute certificates and verdicts of a run again on this machine, and list what differs and why. Ends with status
    3 where a vote differs. Nothing is written.

    Args:
        folder: Run folder.
        images: Number of images, the first ones of the run.
    """
    from rush.pipeline.verify import verify
    from rush.recipe.load import build_recipe
    from rush.records.folder import RunFolder
    from rush.reporting.wording import percent

    run = RunFolder.open(folder)
    if data is not None:
        run.recipe = build_recipe(run.recipe.model_dump(mode="json"), (), data_roots(data))
    result = verify(run, images)
    if json:
        print_json({**asdict(result), "identical": result.identical})
    else:
        rows = [
            (each.what, str(each.images), str(each.same), str(each.changed), percent(each.largest))
            for each in result.replays
        ]
        header = ("", "images", "same votes", "other answer", "largest difference of votes")
        print_table(header, rows, str(folder))
        print_lines(f"not computed again: {text}" for text in result.skipped)
        if result.differences:
            print_table(("differs", "then", "here"), result.differences)
        print_lines(result.causes)
        print_lines([_sentence(result.identical, bool(result.differences))])
    if not result.identical:
        sys.exit(DIFFERENT)


def _sentence(identical: bool, differences: bool) -> str:
    if identical:
        return "every vote is the same"
    if differences:
        return (
            "votes differ. The same bits are promised only for the same recorded execution, torch version and "
            "processor, see above. A certificate is valid where it was computed"
        )
    return (
        "votes differ, and nothing recorded does: the weights, the images or a library below torch may have changed. "
        "Restore the run from a copy, or certify it again here"
    )
