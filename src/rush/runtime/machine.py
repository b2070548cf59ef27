"""A description of this machine, for readers of the figures and for files that are kept per processor."""

import os
import platform
import sys
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Return operating system, processor and number of cores."""
    return {"system": platform.system(), "processor": processor(), "cores": os.cpu_count()}


def device_name(device: str) -> str:
    """Return the name of the GPU of a CUDA device, and of the processor for any other."""
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()


def processor() -> str:
    """Return the name of the processor, or of its architecture where the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or sys.platform
