"""What a training step reads: rows, noise, timesteps and dropped labels, all addressed by (seed, step, slot)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti import rng
from smalti.config import RunConfig
from smalti.data.order import batch_indices
from smalti.data.rows import PicturesInMemory
from smalti.diffusion.process import Process
from smalti.diffusion.timesteps import stratify, trained_span
from smalti.types import Condition


@dataclass(frozen=True)
class Batch:
    """x0, eps: [batch, channels, height, width]. t: float64 [batch]. cond: labels, some of them the null label."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    cond: Condition | None


def training_batch(config: RunConfig, process: Process, rows: PicturesInMemory, step: int) -> Batch:
    """The batch of a step (0, 1, ...), on the device of rows; a function of (config.seed, step) alone."""
    size, seed = config.loop.batch_size, config.seed
    device = rows.images.device
    slots = torch.arange(size, device=device)
    indices = batch_indices(step, size, len(rows), seed).to(device)
    x0, labels = rows.labelled(indices)
    eps = rng.normal(tuple(x0.shape[1:]), seed=seed, purpose="train/noise", index=slots, call=step, device=device)
    u = rng.uniform((2,), seed=seed, purpose="train/timestep", index=slots, call=step, device=device)
    share = stratify(u[:, 0], slots, size) if config.loop.stratified_timesteps else u[:, 0]
    t = config.timesteps(share, process)
    if not config.model.num_classes:
        return Batch(x0, eps, t, None)
    dropped = u[:, 1] < config.loop.label_dropout
    return Batch(x0, eps, t, Condition(class_labels=torch.where(dropped, config.model.num_classes, labels)))


def validation_batch(config: RunConfig, process: Process, rows: PicturesInMemory) -> Batch:
    """Held-out rows at fixed t, evenly spread, with fixed noise and true labels: the same in every run of a process."""
    device = rows.images.device
    count = min(256, len(rows))
    slots = torch.arange(count, device=device)
    x0, labels = rows.labelled(slots)
    eps = rng.normal(tuple(x0.shape[1:]), seed=0, purpose="validation/noise", index=slots, device=device)
    # 0.618...: neighbours in row order get far-apart t, so that classes and t do not go together.
    t = trained_span((slots.to(rng.widest_float(device)) * 0.6180339887498949 + 0.5) % 1.0, process)
    cond = Condition(class_labels=labels) if config.model.num_classes else None
    return Batch(x0, eps, t, cond)
