"""A run's folder before it trains: made, checked against the config that it holds, and locked."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smalti.config import RunConfig, flat_json
from smalti.errors import UserError
from smalti.run_folder import RunFolder, read_config, write_config

_LOCK, _HOLDER = ".lock", ".lock-holder"
# What --resume may change: none of it has a part in what is learnt, except the budget, by its schedule.
_FREE_PARTS = ("budget", "sampling")
_FREE_FIELDS = (
    "loop.gradient_accumulation_steps",
    "loop.activation_checkpointing",
    "loop.compile",
    "loop.log_every",
    "loop.validate_every",
    "loop.checkpoint_every",
    "loop.preview_every",
    "loop.keep_checkpoints",
    "loop.writers",
    "loop.hang_seconds",
)


@contextmanager
def prepared_folder(config: RunConfig, path: Path, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """A run directory, made or checked, that no other process trains into while the context lasts.

    Raises UserError when it holds something that the flags do not allow for, is in use, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; give a folder")
    with _locked(path):
        try:
            yield _prepare(config, path, resume=resume, overwrite=overwrite)
        finally:
            (path / _HOLDER).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / _LOCK, timeout=0)  # of the kernel: a killed process leaves it open
        lock.acquire()
    except Timeout:
        raise UserError(f"--out {path} is in use by {_holder(path)}: wait for it, or give another --out") from None
    except OSError as error:
        raise UserError(f"cannot write to --out {path}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        holder = json.loads((path / _HOLDER).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _prepare(config: RunConfig, path: Path, *, resume: bool, overwrite: bool) -> RunFolder:
    folder = RunFolder(path)
    contents = [entry for entry in path.iterdir() if entry.name not in (_LOCK, _HOLDER)]
    if contents and not resume:
        if not overwrite:
            raise UserError(
                f"{path} exists: pass --resume to go on with it, --overwrite to start over, or another --out"
            )
        if not folder.config.exists():
            raise UserError(f"{path} exists and holds no run: --overwrite only replaces runs; give another --out")
        for entry in contents:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    try:
        if resume and folder.config.exists():
            check_resumable(read_config(path), config, path)
        (path / _HOLDER).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        write_config(folder, config)
    except OSError as error:
        raise UserError(f"cannot write to --out {path}: {error.strerror}") from None
    return folder


def check_resumable(before: RunConfig, now: RunConfig, path: Path) -> None:
    """Raise UserError, listing every changed field, where a run of one config cannot go on with another."""
    old, new = flat_json(before), flat_json(now)
    changed = [n for n in {**old, **new} if old.get(n) != new.get(n) and not _is_free(n)]
    if not changed:
        return
    listed = "; ".join(f"{name}: it has {old.get(name)}, asked for is {new.get(name)}" for name in changed)
    free = ", ".join([*(f"{part}.*" for part in _FREE_PARTS), *_FREE_FIELDS])
    raise UserError(f"--resume: the run at {path} has another config ({listed}); what may change: {free}")


def _is_free(name: str) -> bool:
    return name in _FREE_FIELDS or name.split(".")[0] in _FREE_PARTS
