"""The stages of a run. Each reads the results of the stage before it from the run folder and writes its own."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from rush.choices import Stage
from rush.pipeline.attack import run_attack, run_audit
from rush.pipeline.certify import run_certify
from rush.pipeline.teach import run_teach
from rush.pipeline.train import run_finetune, run_pretrain
from rush.records.folder import RunFolder
from rush.runtime.distributed import barrier, rank
from rush.runtime.memory import JUDGED, memory_for


def run_stage(run: RunFolder, stage: Stage, tell: Callable[[str], None] = lambda _: None) -> None:
    """Run one stage by its name, unless it is finished.

    Args:
        tell: Gets one line when the stage begins and one with the time that it took or that it is skipped. In between
            it gets the live figures of a training stage, what ``certify`` can certify before it draws any vote, and the
            time that ``certify``, ``attack`` and ``audit`` take.

    Raises:
        RunError: another process is at work in the folder.
        DeviceMemoryError: the device ran out of memory. The message names the fields to lower.
        RushError: as the stage.
    """
    stages: dict[Stage, Callable[[RunFolder], None]] = {
        "pretrain": partial(run_pretrain, tell=tell),
        "teach": run_teach,
        "finetune": partial(run_finetune, tell=tell),
        "certify": partial(run_certify, tell=tell),
        "attack": partial(run_attack, tell=tell),
        "audit": partial(run_audit, tell=tell),
    }
    if run.finished(stage):
        tell(f"{stage}: already finished, skipping")
        return
    tell(f"{stage} ...")
    with memory_for(stage, JUDGED), run.alone() if rank() == 0 else nullcontext():
        finished = run.finished(stage)  # by a process that held the lock until now
        barrier()  # no process begins, and may finish the stage, before all of them have looked
        if not finished:
            stages[stage](run)
    tell(f"{stage}: {run.require(stage)['seconds']:.0f} s")
