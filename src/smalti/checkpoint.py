"""Checkpoints: a folder of safetensors files and a JSON state, checksummed, written atomically, read strictly.

    checkpoints/step_00000250/{model,ema,optimizer,validations}.safetensors, state.json

A run that is sharded over ranks (FSDP2) writes its weights, averages and optimiser with torch.distributed.checkpoint
into step_XXXXXXXX/sharded/, and the average whole beside it, for whoever samples it.

A folder appears under its name only when every byte of it is on the disk, so a kill at any moment leaves the older
ones whole. state.json holds the SHA-256 of each file and of itself.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smalti.data.durable import sync
from smalti.data.fingerprint import file_digest
from smalti.errors import UserError

SHARDED = "sharded"  # the folder of a checkpoint that torch.distributed.checkpoint writes
_PARTIAL = ".partial-"


class CheckpointError(UserError):
    """A checkpoint that is missing or damaged; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds: named groups of tensors and a JSON state.

    sharded: the folder of torch.distributed.checkpoint's files, where a run on several ranks wrote its state so.
    """

    folder: Path
    step: int
    tensors: Mapping[str, dict[str, Tensor]]
    state: dict[str, Any]
    sharded: Path | None = None


def _state_digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def step_name(step: int) -> str:
    """The folder's name of a checkpoint that a run wrote after a step."""
    return f"step_{step:08d}"


def start_checkpoint(parent: Path, name: str) -> Path:
    """An empty folder in which to write parent/name, under a name that nobody reads. Raises OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f"{_PARTIAL}{name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def finish_checkpoint(
    partial: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write the groups of tensors and the manifest beside what start_checkpoint()'s folder holds; give it its name.

    Raises OSError (disk full, read-only) and leaves nothing half done.
    """
    target = partial.with_name(partial.name.removeprefix(_PARTIAL))
    try:
        for group, named in tensors.items():
            path = partial / f"{group}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, path)
            sync(path)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        digests = {path.relative_to(partial).as_posix(): file_digest(path) for path in files}
        state = {"step": step, **state, "files": digests}
        document = {"state": state, "sha256": _state_digest(state)}
        state_path = partial / "state.json"
        state_path.write_text(json.dumps(document, indent=1))
        sync(state_path)
        sync(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        sync(partial.parent)
    except SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"cannot write {partial}: {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def save_checkpoint(
    parent: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    name: str | None = None,
) -> Path:
    """Write parent/step_XXXXXXXX, or parent/name, and return it.

    One of another name is neither resumed from nor pruned. Raises OSError (disk full, read-only) and leaves nothing
    half done.
    """
    return finish_checkpoint(start_checkpoint(parent, name or step_name(step)), step, tensors, state)


def list_checkpoints(parent: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first. Half-written ones do not count."""
    return sorted(path for path in parent.glob("step_*") if path.is_dir())


def named_checkpoints(parent: Path) -> list[Path]:
    """The checkpoint folders of a run that were written under names of their own, by name."""
    found = {path for path in parent.glob("[!.]*") if path.is_dir()}
    return sorted(found - set(list_checkpoints(parent)))


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a kill left half written."""
    for path in list_checkpoints(parent)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    remove_half_written(parent)


def remove_half_written(parent: Path) -> None:
    """Delete what a kill left half written."""
    for path in parent.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(folder: Path, groups: tuple[str, ...] | None = None) -> Checkpoint:
    """Read a checkpoint folder after checking it; groups limits which tensor files are read.

    Raises CheckpointError, which names the file, when one is missing, truncated or altered.
    """
    state_path = folder / "state.json"
    if not state_path.is_file():
        raise CheckpointError(f"{state_path} is missing: {folder} is not a whole checkpoint")
    try:
        document = json.loads(state_path.read_text())
        state, digest = document["state"], document["sha256"]
        files = dict(state["files"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{state_path} is damaged: it does not parse") from None
    if _state_digest(state) != digest:
        raise CheckpointError(f"{state_path} is damaged: its checksum does not match")
    tensors: dict[str, dict[str, Tensor]] = {}
    for file_name, expected in files.items():
        group = file_name.removesuffix(".safetensors")
        if groups is not None and group not in groups:
            continue
        whole = file_name.endswith(".safetensors")
        path = folder / file_name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if file_digest(path) != expected:
            raise CheckpointError(f"{path} is damaged: its checksum does not match (truncated or altered)")
        if whole:
            tensors[group] = load_file(path)
    sharded = folder / SHARDED
    return Checkpoint(folder, int(state["step"]), tensors, state, sharded if sharded.is_dir() else None)


def newest_checkpoint(parent: Path, groups: tuple[str, ...] | None = None) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer damaged one.

    Raises CheckpointError when there is none.
    """
    folders = list_checkpoints(parent)
    if not folders:
        raise CheckpointError(f"no checkpoint in {parent}")
    complaints: list[str] = []
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder, groups), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    raise CheckpointError("; ".join(complaints) + "; no older checkpoint is whole")
