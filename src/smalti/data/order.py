"""The order in which rows are read: a function of (seed, step), so that it resumes and re-shards by itself."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from smalti import rng


@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's rows, kept while its batches are read: drawing it costs more than reading a batch."""
    return rng.permutation(num_rows, seed=seed, purpose="data/order", call=epoch)


def batch_indices(step: int, batch_size: int, num_rows: int, seed: int) -> Tensor:
    """Rows of the batch of a step (0, 1, ...): int64 [batch_size].

    The run reads one endless sequence: every row once an epoch, each epoch in its own random order; a batch may reach
    over the end of an epoch. Ranks of a distributed run take slices of the batch.
    """
    return cut_batch(step, batch_size, num_rows, lambda epoch: _epoch_order(num_rows, seed, epoch))


def cut_batch(step: int, batch_size: int, num_rows: int, order: Callable[[int], Tensor]) -> Tensor:
    """Batch number `step`, int64 [batch_size], of the endless sequence order(0), order(1), ..., each of num_rows."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    rows = torch.empty_like(positions)
    for epoch in torch.unique(positions // num_rows).tolist():
        inside = positions // num_rows == epoch
        rows[inside] = order(epoch)[positions[inside] % num_rows]
    return rows
