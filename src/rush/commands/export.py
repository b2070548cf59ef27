"""``rush export``: a run for other software."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rush.commands.run_folders import refuse_existing
from rush.commands.terminal import print_lines
from rush.errors import ConfigError


def export(
    folder: Path,
    *,
    to: Literal["onnx", "hub", "tensorboard"],
    out: Path | None = None,
    push: str | None = None,
    private: bool = False,
) -> None:
    """Write a run for other software: its base classifier as an ONNX file, a folder with weights, configuration and
    model card for the Hugging Face hub, or the figures of training as a TensorBoard log.

    Args:
        folder: Run folder, a folder with a saved model, or the name of a shipped model.
        to: onnx, hub or tensorboard.
        out: The new file or folder; model.onnx, hub and tensorboard by default.
        push: Also upload to this repository of the hub, owner/name, as the user that is logged in.
        private: Create the repository as a private one.
    """
    if push is not None and to != "hub":
        raise ConfigError("--push belongs to --to hub")
    target = out or Path("model.onnx" if to == "onnx" else to)
    refuse_existing(target, what="place")
    if to == "tensorboard":
        from rush.commands.run_folders import open_run
        from rush.exporting.tensorboard import export_tensorboard

        count = export_tensorboard(open_run(folder).path, target)
        print_lines([f"{count:,} figures written to {target}; tensorboard --logdir {target}"])
        return
    from rush.models.storage import load

    model = load(folder)
    if to == "onnx":
        from rush.exporting.onnx import export_onnx

        export_onnx(model, target)
    else:
        from rush.exporting.hub import push_to_hub, save_pretrained

        run = folder if (folder / "recipe.json").is_file() else None
        save_pretrained(model, target, run)
        if push is not None:
            print_lines([push_to_hub(model, push, run, private)])
    print_lines([f"written to {target}"])
