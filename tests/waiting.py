"""What would wait for a device, found without one: code is run on the meta device, which computes shapes alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rush.attacks.threat
import rush.data.batches
import rush.training.loop
from rush.runtime.execution import Execution

META = torch.device("meta")
_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")


class MetaGenerator(torch.Generator):
    """A generator that says it is on the meta device, where nothing is drawn."""

    device = META


class Waits(TorchDispatchMode):
    """Keeps the names of the operations that would wait for the device, if the meta device were one.

    These are reads of a value, selections by a mask, whose size depends on the data, and copies between the device and
    pageable memory. A tensor without axes on the CPU may be an operand: its value is read on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        name = func.overloadpacket.__name__
        if any(tensor.is_meta for tensor in tensors):
            self.operations += 1
            masks = name in ("index", "index_put_", "index_put") and any(t.dtype == torch.bool for t in _indices(args))
            if name.startswith(_READS) or masks:
                self.found.append(name)
            if name in ("copy_", "_to_copy") and _crosses(tensors, kwargs):
                self.found.append(name)
        elif name == "_to_copy" and _crosses(tensors, kwargs):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[Waits]:
    """The operations within the context that would wait for the device; tensors made of numbers there are such, too."""
    with pytest.MonkeyPatch.context() as patch, Waits() as mode:

        def noted(make: Any) -> Any:
            def made(value: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
                if device is not None and torch.device(device) == META and not isinstance(value, Tensor):
                    mode.found.append(make.__name__)
                return make(value, *args, device=device, **kwargs)

            return made

        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, noted(getattr(torch, name)))
        yield mode


def on_meta(monkeypatch: pytest.MonkeyPatch) -> Execution:
    """An execution on the meta device; its streams are generators there, and copies through pinned memory are free."""

    def sent(values: Tensor, device: torch.device | str) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, device=device)

    monkeypatch.setattr(rush.attacks.threat, "sent", sent)
    monkeypatch.setattr(rush.data.batches, "sent", sent)
    usual = rush.training.loop.stream
    monkeypatch.setattr(
        rush.training.loop,
        "stream",
        lambda *names, device="cpu": MetaGenerator() if str(device) == "meta" else usual(*names),
    )
    monkeypatch.setattr(Execution, "autocast", lambda _: torch.autocast("cpu", enabled=False))  # none on meta
    return Execution(device="meta")


def refused(*_: object) -> NoReturn:
    """Stands for what is not to be called."""
    raise AssertionError("called")


def _indices(args: tuple[Any, ...]) -> list[Tensor]:
    return [index for index in args[1] if index is not None]


def _crosses(tensors: list[Tensor], kwargs: Any) -> bool:
    devices = {tensor.device.type for tensor in tensors}
    wanted = (kwargs or {}).get("device")
    return len(devices | ({torch.device(wanted).type} if wanted is not None else set())) > 1
