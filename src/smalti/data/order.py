"""The order in which rows are read: a function of (seed, step), so that it resumes and re-shards by itself."""

import torch
from torch import Tensor

from smalti import rng


def batch_indices(step: int, batch_size: int, num_rows: int, seed: int) -> Tensor:
    """Rows of the batch of a step (0, 1, ...): int64 [batch_size].

    The run reads one endless sequence: every row once an epoch, each epoch in its own random order; a batch may reach
    over the end of an epoch. Ranks of a distributed run take slices of the batch.
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    rows = torch.empty_like(positions)
    for epoch in torch.unique(positions // num_rows).tolist():
        inside = positions // num_rows == epoch
        order = rng.permutation(num_rows, seed=seed, purpose="data/order", call=epoch)
        rows[inside] = order[positions[inside] % num_rows]
    return rows
