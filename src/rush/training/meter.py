"""The cost of a training stage in passes through the network, the unit in which methods are compared."""

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rush.runtime.distributed import world_size

_RAPL = Path("/sys/class/powercap")


@dataclass
class Cost:
    """Running totals.

    Attributes:
        passes: number of images that went forward and backward, in all processes.
        forward_passes: number of images that went forward only.
        seconds: wall-clock time.
        joules: energy of this process's processor or accelerator. None where the device has no counter.
    """

    passes: int = 0
    forward_passes: int = 0
    seconds: float = 0.0
    joules: float | None = None

    def minus(self, earlier: "Cost") -> "Cost":
        """Return the cost since ``earlier``. Joules are None unless both have them."""
        joules = None if self.joules is None or earlier.joules is None else self.joules - earlier.joules
        return Cost(
            self.passes - earlier.passes,
            self.forward_passes - earlier.forward_passes,
            self.seconds - earlier.seconds,
            joules,
        )


class Meter:
    """Counter of the rows that go forward through ``networks`` within ``running``, by whether they can go backward.

    A row counts as forward and backward when gradients are on and either the input or a weight requires one. A backward
    pass to the input alone costs less than one to the weights too but counts the same. The rows of the other processes,
    which have equally many, are included. Nothing waits for the device. ``cost`` may be set to that of an earlier
    attempt.
    """

    def __init__(self, *networks: nn.Module, device: str = "cpu") -> None:
        self._networks, self.device = networks, device
        on_cuda = torch.device(device).type == "cuda"
        self._read_energy = _accelerator_energy(device) if on_cuda else _processor_energy()
        self._since, self._energy = time.perf_counter(), 0.0
        self.cost = Cost(joules=0.0 if self._read_energy else None)

    @contextmanager
    def running(self) -> Iterator[None]:
        handles = [network.register_forward_pre_hook(self._count) for network in self._networks]
        self.restart(self.cost)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def restart(self, cost: Cost) -> None:
        """Continue from ``cost``. Passes, time, energy and peak memory counted so far are discarded."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._since, self._energy = time.perf_counter(), self._read_energy() if self._read_energy else 0.0
        self.cost = cost

    def read(self) -> Cost:
        """Add time and energy of this attempt to ``cost`` and return it."""
        now = time.perf_counter()
        self.cost.seconds += now - self._since
        self._since = now
        if self._read_energy and self.cost.joules is not None:
            energy = self._read_energy()
            self.cost.joules += max(0.0, energy - self._energy)  # the processor's counter wraps around
            self._energy = energy
        return replace(self.cost)

    def _count(self, network: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in network.parameters())):
            self.cost.passes += len(x) * world_size()
        else:
            self.cost.forward_passes += len(x) * world_size()


def peak_memory(device: str) -> int | None:
    """Return the peak memory in bytes, on the accelerator or resident in this process, or None if it is not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _accelerator_energy(device: str) -> Callable[[], float] | None:
    """Return a reader of the joules used by the device since an arbitrary start, or None if it has no counter."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid  # device numbers differ where some devices are hidden
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, or a device without the counter
        return None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def _processor_energy() -> Callable[[], float] | None:
    """Return a reader of the sum of the package counters (Intel and AMD RAPL), if they may be read."""
    counters = [zone / "energy_uj" for zone in sorted(_RAPL.glob("intel-rapl:?"))]

    def read() -> float:
        return sum(int(counter.read_text()) for counter in counters) / 1e6

    try:
        return read if counters and read() >= 0 else None
    except (OSError, ValueError):
        return None
