"""The stages of a run. Each reads the results of the stage before it from the run folder and writes its own."""

from contextlib import nullcontext

from rush.choices import Stage
from rush.errors import RunError
from rush.pipeline.attack import run_attack, run_audit
from rush.pipeline.certify import run_certify
from rush.pipeline.preconditions import check_run
from rush.pipeline.train import run_finetune, run_pretrain
from rush.records.folder import RunFolder
from rush.runtime.distributed import rank, world_size
from rush.runtime.memory import JUDGED, memory_for

__all__ = ["check_run", "run_stage"]


def run_stage(run: RunFolder, stage: Stage) -> None:
    """Run one stage by its name, unless it is finished.

    Raises:
        RunError: another process is at work in the folder, or the stage cannot run in several processes.
        DeviceMemoryError: memory is short. The text names the fields to lower.
        RushError: as the stage.
    """
    stages = {
        "pretrain": run_pretrain,
        "finetune": run_finetune,
        "certify": run_certify,
        "attack": run_attack,
        "audit": run_audit,
    }
    if world_size() > 1 and stage == "audit" and not run.finished(stage):
        raise RunError(f"stage {stage} runs in one process; start `rush {stage} {run.path}` without torchrun")
    with memory_for(stage, JUDGED), run.alone() if rank() == 0 else nullcontext():
        stages[stage](run)
