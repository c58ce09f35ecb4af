"""Checkpoints while training: copied between two steps, written by a thread beside the next ones."""

import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from smalti.checkpoint import SHARDED, Checkpoint, finish_checkpoint, prune_checkpoints, start_checkpoint, step_name
from smalti.nn.sharded import whole_tensor
from smalti.training.parallel import Ranks
from smalti.training.state import TrainingState, empty_like_state, restore_state, state_numbers, state_tensors

Groups = Mapping[str, Mapping[str, Tensor]]


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; only the first rank's has a folder to write to. sharded: whether the
    network is spread over the ranks.

    begin() returns when the values are copied; a thread writes, hashes, syncs and renames. A write that fails (a full
    disk) leaves the older checkpoints as they are and is told by `complain`; training goes on.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks, sharded: bool) -> None:
        self._folder, self._keep, self._ranks = folder, keep, ranks
        self._sharded = sharded
        self._thread: threading.Thread | None = None
        self._failure: OSError | None = None
        self._told = False

    def begin(self, state: TrainingState, extra: Mapping[str, Any]) -> None:
        """Take the state as it is now and write it while the caller goes on; waits for an earlier write.

        Called by all ranks at the same step. extra goes into the checkpoint's JSON.
        """
        ranks, step = self._ranks, state.step
        ranks.doing(f"saving step {step}", long=True)
        self.wait()
        groups: Groups = state_tensors(state)
        partial: Path | None = None
        if self._sharded:
            try:
                name = step_name(step)
                partial = ranks.from_first(lambda: start_checkpoint(self._folder, name), f"saving step {step}")
                _write_shards({n: g for n, g in groups.items() if n != "validations"}, partial / SHARDED)
            except OSError as error:  # the disk of one machine, so of all ranks on it
                self._failure, self._told = error, False
                return
            groups = {name: groups[name] for name in ("ema", "validations")}
        # Gathering is a collective, so every rank takes the copy and the first keeps it.
        copied = {group: {n: _copy(t) for n, t in named.items()} for group, named in groups.items() if named}
        if not ranks.first:
            return
        numbers = {**state_numbers(state), **extra}

        def write() -> None:
            self._failure, self._told = None, False
            try:
                finish_checkpoint(partial or start_checkpoint(self._folder, step_name(step)), step, copied, numbers)
                prune_checkpoints(self._folder, self._keep)
            except OSError as error:
                self._failure = error

        self._thread = threading.Thread(target=write, name="checkpoint")  # not a daemon: a normal exit waits for it
        self._thread.start()

    def wait(self) -> None:
        """Until the write under way is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def failure(self) -> OSError | None:
        """Why the last write failed; None where it did not, or is still under way."""
        return None if self._thread is not None and self._thread.is_alive() else self._failure

    def complain(self, say: Callable[[str], None]) -> None:
        """Say once that the last write failed."""
        if self.failure is not None and not self._told:
            self._told = True
            say(
                f"warning: the checkpoint could not be written ({self.failure}); training goes on, the older ones are "
                "kept: free some space before it ends"
            )


def _copy(tensor: Tensor) -> Tensor:
    """A tensor's values as they are now, whole and on the CPU."""
    whole = whole_tensor(tensor.detach())
    return whole.to("cpu", copy=True)


def _write_shards(groups: Groups, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    flat = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    save(flat, checkpoint_id=folder)


def restore(state: TrainingState, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's values into a state, whatever ranks either is spread over. A collective for sharded ones."""
    if checkpoint.sharded is not None:
        checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, **_read_shards(state, checkpoint.sharded)})
    restore_state(state, checkpoint)


def _read_shards(state: TrainingState, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The groups that torch.distributed.checkpoint wrote, cut as the state is cut on this rank."""
    from torch.distributed import is_initialized
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    flat: dict[str, Tensor] = {}
    for name, entry in entries.items():
        assert isinstance(entry, TensorStorageMetadata)
        flat[name] = empty_like_state(state, name, entry.size, entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant, for one process
        load(flat, storage_reader=reader, no_dist=not is_initialized())
    groups: dict[str, dict[str, Tensor]] = {}
    for path, tensor in flat.items():
        group, name = path.split("/", 1)
        groups.setdefault(group, {})[name] = tensor
    return groups
