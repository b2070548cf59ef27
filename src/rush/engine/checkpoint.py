"""Checkpoints of a training."""

from pathlib import Path

import torch
from torch import nn

from rush.errors import CheckpointError
from rush.files import write_atomically


class TrainingCheckpoint:
    """The resumable state of one training in one file: weights, optimizer and number of finished epochs.

    Random streams are named by epoch and step and need no saving. The file is read with ``weights_only=True``: nothing
    in it runs.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, epochs_done: int) -> None:
        state = {
            "fingerprint": self.fingerprint,
            "epochs_done": epochs_done,
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        write_atomically(self.path, lambda target: torch.save(state, target))

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the saved state in place; returns the number of finished epochs, 0 when nothing was saved yet.

        Raises: CheckpointError when the file is damaged or belongs to another recipe.
        """
        if not self.path.exists():
            return 0
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            fingerprint = state["fingerprint"]
        except Exception as error:
            raise self._unreadable(error) from error
        if fingerprint != self.fingerprint:
            raise CheckpointError(
                f"checkpoint {self.path} belongs to another recipe; use another --out folder or delete it"
            )
        try:
            module.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
            return int(state["epochs_done"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> CheckpointError:
        # torch's own text is left out: it advises to switch off weights_only, which would run what is in the file.
        return CheckpointError(
            f"checkpoint {self.path} cannot be read ({type(error).__name__}); delete it to start this stage again"
        )
