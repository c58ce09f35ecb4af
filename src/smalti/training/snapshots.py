"""Snapshots of a run's two averages (ema=post_hoc), and the averages of other widths that are made from them."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smalti.checkpoint import list_checkpoints, read_checkpoint, remove_half_written, save_checkpoint, step_name
from smalti.errors import UserError
from smalti.nn.sharded import whole_tensor
from smalti.optim.ema import EmaConfig, PostHocEma
from smalti.optim.post_hoc import Combination, PowerProfile, combine_profiles
from smalti.run_folder import RunFolder, read_config
from smalti.training.parallel import Ranks
from smalti.training.state import TrainingState


def take_snapshot_if_due(
    config: EmaConfig, state: TrainingState, folder: RunFolder, before: float, progress: float, ranks: Ranks
) -> Path | None:
    """Write the averages after a step that ends with a snapshot (PostHocEma.snapshot_due); the first rank writes.

    To be called before the checkpoint of the step is written: a run that is resumed from that then has its snapshot.
    Raises OSError.
    """
    if not isinstance(config, PostHocEma) or not config.snapshot_due(state.step, before, progress):
        return None
    tensors = {
        name: {key: whole_tensor(tensor) for key, tensor in average.state_dict().items()}
        for name, average in state.averages().items()
    }
    if not ranks.first:
        return None
    widths = dict(zip(tensors, (ema.relative_std for ema in config.averages), strict=True))
    return save_checkpoint(folder.ema_snapshots, state.step, tensors, {"relative_stds": widths})


def remove_later_snapshots(folder: RunFolder, step: int) -> None:
    """Delete the snapshots of later steps than the one that a run goes on from: it will take them anew."""
    for path in list_checkpoints(folder.ema_snapshots):
        if path.name > step_name(step):
            shutil.rmtree(path)
    remove_half_written(folder.ema_snapshots)


@dataclass(frozen=True)
class StoredAverage:
    """A tensor file of a snapshot: `group` in `folder`, and what it averages."""

    folder: Path
    group: str
    profile: PowerProfile


@dataclass(frozen=True)
class Reconstruction:
    """An average put together from stored ones. tensors: a state dict, of the types that were stored."""

    profile: PowerProfile
    stored: tuple[StoredAverage, ...]
    combination: Combination
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        """Of the checkpoint that it is written as, such as ema_0.02_step_00000960."""
        return f"ema_{self.profile.relative_std:g}_{step_name(self.profile.step)}"


def stored_averages(run: Path) -> list[StoredAverage]:
    """The stored averages of a run, oldest first. Raises UserError where it has none, saying what to set."""
    config = read_config(run)
    folders = list_checkpoints(RunFolder(run).ema_snapshots)
    if not folders:
        raise UserError(
            f"{run} has no ema_snapshots (ema={config.ema.kind}): train with --set ema=post_hoc"
            + ("; its first snapshot is still to come" if isinstance(config.ema, PostHocEma) else "")
        )
    stored = []
    for folder in folders:
        snapshot = read_checkpoint(folder, ())
        for group, relative_std in snapshot.state["relative_stds"].items():
            stored.append(StoredAverage(folder, group, PowerProfile(float(relative_std), snapshot.step)))
    return stored


def reconstruct_averages(
    run: Path,
    relative_stds: Sequence[float],
    step: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reconstruction]:
    """The averages of any widths as they would stand after a step that has a snapshot (default: the last).

    Made from the snapshots up to that step, which are read one after the other and summed in float64: needed is
    memory for 8 bytes a weight and width. progress(done, total) counts files. Raises UserError for a width or a step
    that cannot be, CheckpointError for a damaged snapshot.
    """
    stored = stored_averages(run)
    steps = sorted({entry.profile.step for entry in stored})
    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise UserError(f"step={step}: {run} has snapshots of the steps {', '.join(map(str, steps))}")
    stored = [entry for entry in stored if entry.profile.step <= step]
    profiles = [PowerProfile(relative_std, step) for relative_std in relative_stds]
    combinations = [combine_profiles([entry.profile for entry in stored], profile) for profile in profiles]
    sums: list[dict[str, Tensor]] = [{} for _ in profiles]
    types: dict[str, torch.dtype] = {}
    for number, entry in enumerate(stored):
        if any(combination.weights[number] for combination in combinations):
            tensors = read_checkpoint(entry.folder, (entry.group,)).tensors[entry.group]
            types |= {name: tensor.dtype for name, tensor in tensors.items()}
            for combination, total in zip(combinations, sums, strict=True):
                _add(total, tensors, float(combination.weights[number]))
        if progress is not None:
            progress(number + 1, len(stored))
    return [
        Reconstruction(profile, tuple(stored), combination, {name: t.to(types[name]) for name, t in total.items()})
        for profile, combination, total in zip(profiles, combinations, sums, strict=True)
    ]


def _add(total: dict[str, Tensor], tensors: dict[str, Tensor], weight: float) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            total[name] = tensor  # counters and tables of indices: the newest
        elif name in total:
            total[name].add_(tensor.double(), alpha=weight)
        else:
            total[name] = weight * tensor.double()


def save_reconstruction(run: Path, made: Reconstruction) -> Path:
    """Write a reconstructed average among the run's checkpoints, under its own name, for --checkpoint. Raises OSError.

    It is neither resumed from nor pruned. Its state.json has the width, the error and the weight of each snapshot.
    """
    weights = [
        {"step": entry.profile.step, "relative_std": entry.profile.relative_std, "weight": float(weight)}
        for entry, weight in zip(made.stored, made.combination.weights, strict=True)
    ]
    state = {"relative_std": made.profile.relative_std, "error": made.combination.error, "weights": weights}
    folder = RunFolder(run).checkpoints
    return save_checkpoint(folder, made.profile.step, {"ema": made.tensors}, state, name=made.name)
