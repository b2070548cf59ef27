"""Several processes that know each other as training processes do, and what each of them found."""

import os
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from torch import distributed

_PATIENCE_SECONDS = 100.0


def on_ranks(processes: ForkServerContext, work: Callable[[], Any], world: int, folder: Path) -> list[Any]:
    """What ``work()`` returns in each of ``world`` gloo processes on one thread, in rank order.

    work: a function of a module; its result must be tensors, numbers, text, lists or dicts.
    Raises: AssertionError when a process failed or all wait for each other; none is left running.
    """
    children = [processes.Process(target=_rank, args=(work, rank, world, folder), daemon=True) for rank in range(world)]
    for child in children:
        child.start()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while any(child.exitcode is None for child in children):
        failed = [rank for rank, child in enumerate(children) if child.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            for child in children:
                child.kill()
            raise AssertionError(f"processes {failed} failed" if failed else "the processes wait for each other")
        time.sleep(0.01)
    assert [child.exitcode for child in children] == [0] * world
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def _rank(work: Callable[[], Any], rank: int, world: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(work(), folder / f"rank{rank}.partial")
    os.replace(folder / f"rank{rank}.partial", folder / f"rank{rank}.pt")
    while not all((folder / f"rank{other}.pt").exists() for other in range(world)):
        time.sleep(0.01)
    os._exit(0)  # gloo's threads are not taken down, which now and then hangs
