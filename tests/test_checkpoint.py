"""A file is renamed once it is on the disk, and a checkpoint is read back to the same bits or refused, never run."""

import errno
import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rush.errors import CheckpointError
from rush.runtime.files import write_atomically
from rush.runtime.randomness import seeded_init, stream
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.optim import build_optimizer


def test_the_name_changes_hands_only_after_the_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file"
    seen: list[str] = []
    sync, replace = os.fsync, os.replace

    def watched_sync(descriptor: int) -> None:
        seen.append(f"sync {os.fstat(descriptor).st_size} bytes, target there: {path.exists()}")
        sync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        seen.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)

    def write(target: Path) -> None:
        target.write_bytes(b"12345")

    write_atomically(path, write)
    assert seen == ["sync 5 bytes, target there: False", "replace"]
    assert path.read_bytes() == b"12345"


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and an optimizer with a momentum that is not zero."""
    module = seeded_init(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), stream(seed, "weights"))
    optimizer = build_optimizer(module, "adamw", 0.01, 0.9, 1e-4)
    module(torch.randn(8, 3, generator=stream(seed, "x"))).square().sum().backward()
    optimizer.step()
    return module, optimizer


def flat(state: dict[str, object]) -> bytes:
    return pickle.dumps(
        {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    )


def state_of(seed: int) -> dict[str, Any]:
    module, optimizer = trained(seed)
    return {"number": 5, "module": module.state_dict(), "optimizer": optimizer.state_dict()}


def test_weights_statistics_and_optimizer_come_back_to_the_same_bits(tmp_path: Path) -> None:
    checkpoint, state = TrainingCheckpoint(tmp_path / "state.pt", "recipe"), state_of(0)
    assert checkpoint.load() is None  # nothing saved yet
    checkpoint.save(state)
    found = checkpoint.load()
    assert found is not None
    assert found["number"] == 5
    assert flat(found["module"]) == flat(state["module"])
    assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    moments, kept = state["optimizer"]["state"], found["optimizer"]["state"]
    assert [flat(kept[key]) for key in kept] == [flat(moments[key]) for key in moments]


def test_the_checkpoint_before_the_newest_is_kept(tmp_path: Path) -> None:
    checkpoint = TrainingCheckpoint(tmp_path / "state.pt", "recipe")
    for number in range(3):
        checkpoint.save({"number": number})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.previous.pt", "state.pt"]
    assert TrainingCheckpoint(checkpoint.previous, "recipe").load() == {"number": 1}
    assert checkpoint.load() == {"number": 2}


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    TrainingCheckpoint(tmp_path / "state.pt", "recipe").save(state_of(0))
    with pytest.raises(
        CheckpointError, match=r"state\.pt belongs to another recipe; use another --out folder or delete"
    ):
        TrainingCheckpoint(tmp_path / "state.pt", "recipe, changed").load()


def damages(content: bytes) -> dict[str, bytes]:
    """Return what became of the ``content`` of a checkpoint."""
    middle = len(content) // 2
    without_opening = io.BytesIO()
    torch.save({"fingerprint": "recipe"}, without_opening)
    return {
        "half": content[:middle],
        "empty": b"",
        "text": b"not a checkpoint",
        "one bit turned": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "of torch alone": without_opening.getvalue(),
    }


@pytest.mark.parametrize("name", damages(b"content"))
def test_a_damaged_checkpoint_is_refused_with_its_name_and_the_remedy(name: str, tmp_path: Path) -> None:
    checkpoint = TrainingCheckpoint(tmp_path / "state.pt", "recipe")
    checkpoint.save(state_of(0))
    damaged = damages(checkpoint.path.read_bytes())[name]
    checkpoint.path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read .*; delete it to start this stage again$"):
        checkpoint.load()
    assert checkpoint.path.read_bytes() == damaged


def test_where_the_newest_is_damaged_the_one_before_is_named(tmp_path: Path) -> None:
    checkpoint = TrainingCheckpoint(tmp_path / "state.pt", "recipe")
    checkpoint.save({"number": 1})
    checkpoint.save({"number": 2})
    checkpoint.path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"or move state\.previous\.pt to its place to resume from it"):
        checkpoint.load()
    os.replace(checkpoint.previous, checkpoint.path)
    assert checkpoint.load() == {"number": 1}


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_where_nothing_can_be_written_the_newest_checkpoint_stays(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = TrainingCheckpoint(tmp_path / "state.pt", "recipe")
    checkpoint.save({"number": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync" if fails == "write" else "replace", full)
    with pytest.raises(
        CheckpointError, match=r"cannot be written: .*No space left on device; the last one is kept\. Fre"
    ):
        checkpoint.save({"number": 2})
    assert checkpoint.load() == {"number": 1}


class Payload:
    """Pickles into a call of ``os.mkdir``."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("by_torch", [True, False], ids=["torch.save", "pickle"])
def test_code_in_a_checkpoint_does_not_run(by_torch: bool, tmp_path: Path) -> None:
    checkpoint, mark = TrainingCheckpoint(tmp_path / "pretrain.pt", "recipe"), tmp_path / "ran"
    state = {"fingerprint": "recipe", "number": 1, "module": Payload(mark), "optimizer": {}}
    buffer = io.BytesIO()
    if by_torch:
        torch.save(state, buffer)
    else:
        buffer.write(pickle.dumps(state))
    content = buffer.getvalue()
    checkpoint.path.write_bytes(b"rush checkpoint 2\n" + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load()
    assert not mark.exists()
    if by_torch:
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)
    assert mark.exists(), "the payload is no payload: this test proves nothing"
