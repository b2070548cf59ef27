"""The stages of a run: each reads what the stage before left in the run folder, hands plain arguments on and writes its
own part."""

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
    """Run one stage by its name; a finished one is kept as it is.

    Raises: RunError where another process is at work, or where several processes would do a stage that knows one;
    DeviceMemoryError naming what to lower where memory is short.
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
