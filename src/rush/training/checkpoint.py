"""Atomic checkpoints of a training stage, with a checksum. The previous one is retained."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from rush.errors import CheckpointError, WriteError
from rush.runtime.files import write_atomically

LONG_SAVING = 0.2  # seconds; a checkpoint that takes less is written at the end of every epoch
SAVING_SHARE = 0.05  # largest share of the time for checkpoints at the ends of epochs that take longer to write
_OPENING = b"rush checkpoint 2\n"
_DIGEST_CHARACTERS = 64


class TrainingCheckpoint:
    """The resumable state of a training stage in ``path``: an identifying line, a SHA-256, and tensors.

    Random streams are named by epoch and step and need no saving. The state is read with ``weights_only=True``, so that
    no code in it runs. ``previous`` is the checkpoint before the newest, retained in case the disk loses the newest.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint

    @property
    def previous(self) -> Path:
        return self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state`` as the newest checkpoint. The one before it becomes ``previous``.

        Raises:
            CheckpointError: the file cannot be written. The newest checkpoint is then unchanged.
        """
        buffer = io.BytesIO()
        torch.save({"fingerprint": self.fingerprint, **state}, buffer)
        content = buffer.getvalue()  # shares the memory, without an exported view that would outlive an error
        opening = _OPENING + hashlib.sha256(content).hexdigest().encode() + b"\n"

        def write(target: Path) -> None:
            with open(target, "wb") as file:
                file.write(opening)
                file.write(content)
            self._keep_newest()

        try:
            write_atomically(self.path, write)
        except WriteError as error:
            kept = "; the last one is kept" if self.path.exists() else ""
            raise CheckpointError(
                f"checkpoint {self.path} cannot be written: {error.reason}{kept}. "
                "Free or allow space there; the same command then resumes from the last checkpoint"
            ) from error

    def rehearse(self, state: dict[str, Any]) -> None:
        """Write ``state`` to a separate file and delete it, to measure the cost of ``save``.

        Raises:
            CheckpointError: the file cannot be written.
        """
        rehearsal = TrainingCheckpoint(self.path.with_name(f"{self.path.stem}.rehearsal.pt"), self.fingerprint)
        rehearsal.save(state)
        rehearsal.path.unlink()

    def load(self) -> dict[str, Any] | None:
        """Return the saved state, on the CPU, or None if nothing has been saved yet.

        Raises:
            CheckpointError: the file is damaged or belongs to a different recipe.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(io.BytesIO(_checked(self.path.read_bytes())), weights_only=True, map_location="cpu")
            fingerprint = state.pop("fingerprint")
        except Exception as error:
            raise self.unreadable(error) from error
        if fingerprint != self.fingerprint:
            raise CheckpointError(
                f"checkpoint {self.path} belongs to another recipe; use another --out folder or delete it"
            )
        return dict(state)

    def unreadable(self, error: Exception) -> CheckpointError:
        """Return the error for content that does not fit."""
        # torch's own text is omitted: it advises to switch off weights_only, which would run code from the file.
        earlier = f" or move {self.previous.name} to its place to resume from it" if self.previous.exists() else ""
        return CheckpointError(
            f"checkpoint {self.path} cannot be read ({type(error).__name__}); "
            f"delete it to start this stage again{earlier}"
        )

    def _keep_newest(self) -> None:
        """Link the newest file as ``previous``. ``path`` never disappears."""
        if not self.path.exists():
            return
        self.previous.unlink(missing_ok=True)
        try:
            os.link(self.path, self.previous)
        except OSError:  # a file system without links keeps only the newest
            return


def _checked(content: bytes) -> bytes:
    """Return the content after the opening of a checkpoint.

    Raises:
        ValueError: its checksum is wrong.
    """
    start = len(_OPENING) + _DIGEST_CHARACTERS + 1
    digest = content[len(_OPENING) : start - 1]
    if not content.startswith(_OPENING) or hashlib.sha256(content[start:]).hexdigest().encode() != digest:
        raise ValueError("checksum")
    return content[start:]
