"""Checkpoints that are whole or not there, and are believed only as far as their hashes hold.

    <folder>/step-000050/{weights.safetensors, optimizer.pt, state.json, sha256.json}
    <folder>/latest        name of the newest, for readers

A checkpoint is written to a temporary folder, each file flushed to the disk, and the folder renamed: a
process killed at any instant, or a full disk, leaves the earlier checkpoints as they were. Both torch and
safetensors load a file with a flipped bit without a word, hence the hashes; they guard against damage, and
`weights_only=True` against a pickle that would run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from muonlab.registry.errors import IntegrityError, MuonlabError
from muonlab.training.model import load_weights, weights_of

if TYPE_CHECKING:
    from muonlab.training.model import Model

WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE, HASHES_FILE = (
    *("weights.safetensors", "optimizer.pt"),
    *("state.json", "sha256.json"),
)
LATEST_FILE = "latest"
SCRATCH_PREFIX = ".writing-"
KEPT = 2
"""Checkpoints on disk: the newest, and the one to fall back on."""


class CheckpointError(MuonlabError):
    """A checkpoint that cannot be written, or that is refused because it is not of this run."""


class DamagedCheckpoint(Exception):
    """What was read is not what was written; the message says which file and why."""


@dataclass(frozen=True)
class LoopState:
    """What the loop needs besides weights and optimizer state to go on as if it had never stopped."""

    cell_digest: str
    step: int
    """Optimizer steps done."""
    seconds: float
    """Wall seconds over all attempts."""
    losses_since_point: list[float]
    """Training losses of the steps after the last curve point."""
    curve: list[dict[str, float | None]]


def save(folder: Path, model: Model, optimizer: torch.optim.Optimizer, state: LoopState) -> None:
    """Add the checkpoint of `state.step` and drop all but the newest `KEPT`.

    Raises CheckpointError where it cannot be written; the earlier checkpoints are then intact.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{state.step:06d}"
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=folder) as scratch:
            new = Path(scratch) / name
            new.mkdir()
            with _flushed(new / WEIGHTS_FILE) as file:
                file.write(_weights_content(model))
            with _flushed(new / OPTIMIZER_FILE) as file:
                torch.save(optimizer.state_dict(), file)
            with _flushed(new / STATE_FILE) as file:
                file.write(json.dumps(vars(state)).encode())
            hashes = {file.name: _sha256(file) for file in sorted(new.iterdir())}
            with _flushed(new / HASHES_FILE) as file:
                file.write(json.dumps(hashes, indent=2).encode())
            _flush_folder(new)
            if (folder / name).exists():  # a damaged one, passed over by `resume`
                os.rename(folder / name, Path(scratch) / "replaced")
            os.rename(new, folder / name)
        _replace(folder / LATEST_FILE, f"{name}\n".encode())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        intact = ", ".join(path.name for path in _newest_first(folder)) or "none"
        raise CheckpointError(
            f"{folder}: the checkpoint of step {state.step} cannot be written ({error}); intact: {intact}. "
            "Free space and start again: the run resumes."
        ) from error
    for old in _newest_first(folder)[KEPT:]:
        shutil.rmtree(old)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left."""
    for left in folder.glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(left)


def resume(
    folder: Path,
    cell_digest: str,
    model: Model,
    optimizer: torch.optim.Optimizer,
    *,
    warn: Callable[[str], None],
) -> LoopState | None:
    """Load the newest checkpoint whose hashes hold into model and optimizer; None where there is none.

    `warn` is told of each one that is passed over. Raises CheckpointError for a checkpoint of another cell,
    and for one whose hashes hold but that does not load.
    """
    for path in _newest_first(folder):
        try:
            contents = _verified(path)
        except DamagedCheckpoint as damage:
            warn(f"checkpoint {path.name} is passed over: {damage}.")
        else:
            return _load(path, contents, cell_digest, model, optimizer)
    return None


def _verified(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each read once and compared with its hash."""
    try:
        hashes = json.loads((path / HASHES_FILE).read_bytes())
        contents = {name: (path / name).read_bytes() for name in (WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE)}
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"it cannot be read ({error})") from None
    for name, content in contents.items():
        if not isinstance(hashes, dict) or hashes.get(name) != hashlib.sha256(content).hexdigest():
            raise DamagedCheckpoint(f"the SHA-256 of {name} is not the one in {HASHES_FILE}")
    return contents


def _load(
    path: Path,
    contents: dict[str, bytes],
    cell_digest: str,
    model: Model,
    optimizer: torch.optim.Optimizer,
) -> LoopState:
    """Load verified contents. What fails here was not damaged but made so, hence it is not passed over."""
    try:
        state = LoopState(**json.loads(contents[STATE_FILE]))
        if state.cell_digest != cell_digest:
            raise CheckpointError(
                f"{path}: it belongs to the cell {state.cell_digest[:12]}…, this is {cell_digest[:12]}…; "
                "give each cell a folder of its own, or delete this one."
            )
        optimizer.load_state_dict(
            torch.load(io.BytesIO(contents[OPTIMIZER_FILE]), weights_only=True, map_location="cpu")
        )
        load_weights(model, contents[WEIGHTS_FILE], WEIGHTS_FILE)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        IntegrityError,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: its hashes hold, but it is not a checkpoint of this run ({reason}); "
            "find out who wrote it, then delete it."
        ) from None
    return state


def write_weights(path: Path, model: Model) -> None:
    """Write the model's parameters as safetensors, at once. Raises CheckpointError where it cannot."""
    try:
        _replace(path, _weights_content(model))
    except OSError as error:
        raise CheckpointError(f"{path}: the weights cannot be written ({error}); free space and start again.") from None


def _weights_content(model: Model) -> bytes:
    from safetensors.torch import save

    return save({name: weight.cpu().contiguous() for name, weight in weights_of(model).items()})


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True)


def _replace(path: Path, content: bytes) -> None:
    """Give a file new content: a reader sees the old or the new, never a part."""
    new = path.with_name(f".{path.name}.new")
    with _flushed(new) as file:
        file.write(content)
    os.replace(new, path)
    _flush_folder(path.parent)


@contextlib.contextmanager
def _flushed(path: Path) -> Iterator[BinaryIO]:
    """A new file whose content is on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
