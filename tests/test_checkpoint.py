"""Files are whole or not there, and a checkpoint is read back to the same bits or refused, never run."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rush.engine.checkpoint import TrainingCheckpoint
from rush.engine.optim import build_optimizer
from rush.errors import CheckpointError
from rush.files import write_atomically, write_json
from rush.randomness import seeded_init, stream


def test_a_write_that_fails_midway_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_json(path, [1, 2])

    def fail(target: Path) -> None:
        target.write_text("half of it")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "[\n  1,\n  2\n]\n"
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


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


def test_weights_statistics_and_optimizer_come_back_to_the_same_bits(tmp_path: Path) -> None:
    checkpoint = TrainingCheckpoint(tmp_path / "state.pt", "recipe")
    module, optimizer = trained(0)
    other, other_optimizer = trained(1)
    assert checkpoint.restore(other, other_optimizer) == 0  # nothing saved yet
    assert flat(other.state_dict()) == flat(trained(1)[0].state_dict())
    checkpoint.save(module, optimizer, 5)
    assert checkpoint.restore(other, other_optimizer) == 5
    assert flat(other.state_dict()) == flat(module.state_dict())
    before, after = optimizer.state_dict(), other_optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert [flat(before["state"][key]) for key in before["state"]] == [
        flat(after["state"][key]) for key in after["state"]
    ]


def test_a_checkpoint_of_another_recipe_is_refused_and_loads_nothing(tmp_path: Path) -> None:
    TrainingCheckpoint(tmp_path / "state.pt", "recipe").save(*trained(0), 5)
    module, optimizer = trained(1)
    with pytest.raises(
        CheckpointError, match=r"state\.pt belongs to another recipe; use another --out folder or delete"
    ):
        TrainingCheckpoint(tmp_path / "state.pt", "recipe, changed").restore(module, optimizer)
    assert flat(module.state_dict()) == flat(trained(1)[0].state_dict())


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not a checkpoint")


def a_list(path: Path) -> None:
    torch.save([1, 2], path)


def without_weights(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["module"]
    torch.save(state, path)


def another_network(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["module"]["0.weight"] = torch.zeros(7, 7)
    torch.save(state, path)


def another_optimizer(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
    torch.save(state, path)


@pytest.mark.parametrize("damage", [halved, emptied, text, a_list, without_weights, another_network, another_optimizer])
def test_a_damaged_checkpoint_is_refused_with_its_name_and_the_remedy(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    checkpoint = TrainingCheckpoint(tmp_path / "state.pt", "recipe")
    checkpoint.save(*trained(0), 5)
    damage(checkpoint.path)
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read .*delete it to start this stage again"):
        checkpoint.restore(*trained(1))


class Payload:
    """Pickles into a call of ``os.mkdir``."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("by_torch", [True, False], ids=["torch.save", "pickle"])
def test_code_in_a_checkpoint_does_not_run(by_torch: bool, tmp_path: Path) -> None:
    checkpoint, mark = TrainingCheckpoint(tmp_path / "pretrain.pt", "recipe"), tmp_path / "ran"
    state = {"fingerprint": "recipe", "epochs_done": 1, "module": Payload(mark), "optimizer": {}}
    if by_torch:
        torch.save(state, checkpoint.path)
    else:
        checkpoint.path.write_bytes(pickle.dumps(state))
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.restore(*trained(0))
    assert not mark.exists()
    if by_torch:
        torch.load(checkpoint.path, weights_only=False)
    else:
        pickle.loads(checkpoint.path.read_bytes())
    assert mark.exists(), "the payload is no payload: this test proves nothing"
