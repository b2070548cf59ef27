"""The figures of training as a TensorBoard log."""

from datetime import datetime
from pathlib import Path

from rush.records.log import read_events
from rush.records.read_run import NO_FIGURES
from rush.runtime.extras import optional


def export_tensorboard(run: Path, folder: Path) -> int:
    """Write the figures of each epoch in ``log.jsonl`` of a run as scalars named stage/figure, and return their number.

    They are the loss, the cost and the live figures on held-out images. For an epoch that was repeated after an
    interruption, the last figures count.

    Args:
        run: the run folder.
        folder: the new log folder of TensorBoard.

    Raises:
        MissingExtraError: tensorboard is not installed.
        RunError: the log is damaged.
    """
    optional("tensorboard", "export to TensorBoard")
    writer = optional("torch.utils.tensorboard", "export to TensorBoard").SummaryWriter(str(folder))
    scalars: dict[tuple[str, int], tuple[float, float]] = {}
    for event in read_events(run / "log.jsonl").values():
        if event["event"] not in ("epoch", "monitor"):
            continue
        seconds = datetime.fromisoformat(str(event["time"])).timestamp()
        for name, value in event.items():
            if name not in NO_FIGURES and isinstance(value, int | float):
                scalars[f"{event['stage']}/{name}", int(event["epoch"])] = (float(value), seconds)
    with writer:
        for (name, epoch), (value, seconds) in scalars.items():
            writer.add_scalar(name, value, epoch, walltime=seconds)
    return len(scalars)
