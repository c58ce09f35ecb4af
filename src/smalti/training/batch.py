"""What a training step reads: rows, noise, timesteps and dropped labels, all addressed by (seed, step, slot)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti import rng
from smalti.conditioning.captions import FIRST_CAPTIONS, pick_captions
from smalti.config import RunConfig
from smalti.data.buckets import bucket_batch
from smalti.data.order import batch_indices
from smalti.data.rows import TrainingRows
from smalti.diffusion.process import Process
from smalti.diffusion.timesteps import stratify, trained_span
from smalti.pipeline_arguments import PromptEncoder
from smalti.types import Condition

VALIDATION_ROWS = 256  # that a validation takes, or as many as are held out
OBJECTIVE_DRAWS = 8  # times as many pairs of a row and noise for a loss that a few per cent matter in


@dataclass(frozen=True)
class Batch:
    """x0, eps: [batch, channels, height, width]. t: float64 [batch]. cond: labels or captions, some of them dropped.

    Of tokens: x0 int64 [batch, height, width], eps uniform numbers of its shape (diffusion/masking.py).
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    cond: Condition | None

    def rows(self, first: int, last: int) -> "Batch":
        """The rows first .. last - 1."""
        cond = None if self.cond is None else self.cond.map(lambda tensor: tensor[first:last])
        return Batch(self.x0[first:last], self.eps[first:last], self.t[first:last], cond)


def _rows_of_step(config: RunConfig, buckets: Sequence[TrainingRows], step: int) -> tuple[TrainingRows, Tensor]:
    """(the bucket of a step, its rows int64 [batch])."""
    size, seed = config.loop.batch_size, config.seed
    if len(buckets) == 1:
        return buckets[0], batch_indices(step, size, len(buckets[0]), seed)
    number, indices = bucket_batch(step, size, [len(rows) for rows in buckets], seed)
    return buckets[number], indices


def training_batch(
    config: RunConfig,
    process: Process,
    buckets: Sequence[TrainingRows],
    step: int,
    encode_captions: PromptEncoder | None = None,
    part: tuple[int, int] = (0, 1),
) -> Batch:
    """The batch of a step (0, 1, ...), on the device of rows; a function of (config.seed, step) alone.

    buckets: the rows of each size; a batch has rows of one. encode_captions: of a network that reads text, captions to
    the fields of a condition. part: (number, count), only that one of `count` equal parts of the batch's slots, for a
    micro-batch or a rank: the parts hold what the whole batch does.
    """
    size, seed = config.loop.batch_size, config.seed
    rows, indices = _rows_of_step(config, buckets, step)
    number, count = part
    own = slice(number * size // count, (number + 1) * size // count)
    slots = torch.arange(size)
    indices = indices[own]
    x0 = rows.read(indices, step)
    device = x0.device
    slots = slots.to(device)
    # Of the whole batch: a processor's vector functions give an element another last bit at another place of a tensor.
    u = rng.uniform((2,), seed=seed, purpose="train/timestep", index=slots, call=step, device=device)
    share = stratify(u[:, 0], slots, size) if config.loop.stratified_timesteps else u[:, 0]
    t, u, slots = config.timesteps(share, process)[own], u[own], slots[own]
    eps = _noise(x0, seed, "train/noise", slots, step)
    if encode_captions is not None:
        assert rows.captions is not None
        captions = pick_captions(rows.captions, indices, slots, seed, step, config.captions)
        return Batch(x0, eps, t, encode_captions(captions).to(device))
    labels = _labels(config, rows, indices)
    if labels is None:
        return Batch(x0, eps, t, None)
    dropped = u[:, 1] < config.loop.label_dropout
    return Batch(x0, eps, t, Condition(class_labels=torch.where(dropped, config.num_classes, labels.to(device))))


def validation_batches(
    config: RunConfig,
    process: Process,
    buckets: Sequence[TrainingRows],
    encode_captions: PromptEncoder | None = None,
) -> Iterator[Batch]:
    """Held-out rows at fixed t, evenly spread, with fixed noise and true labels or first captions: the same in every
    run of a process. A batch for each bucket, by its share of the rows."""
    return _measured_batches(config, process, buckets, encode_captions, 0, trained_span)


def objective_batches(
    config: RunConfig,
    process: Process,
    buckets: Sequence[TrainingRows],
    encode_captions: PromptEncoder | None = None,
) -> Iterator[Batch]:
    """Rows at fixed t spread as those of training are, so that their mean loss is what training minimises; with fixed
    noise and true labels or first captions. Several times as many batches as a validation has, of other rows where
    there are enough and with other noise."""
    for draw in range(OBJECTIVE_DRAWS):
        yield from _measured_batches(config, process, buckets, encode_captions, draw, config.timesteps)


def _measured_batches(
    config: RunConfig,
    process: Process,
    buckets: Sequence[TrainingRows],
    encode_captions: PromptEncoder | None,
    draw: int,
    density: Callable[[Tensor, Process], Tensor],
) -> Iterator[Batch]:
    total = sum(len(rows) for rows in buckets)
    counts = [min(math.ceil(VALIDATION_ROWS * len(rows) / total), len(rows)) for rows in buckets]
    first = draw * sum(counts)
    for rows, count in zip(buckets, counts, strict=True):
        indices = (torch.arange(count) + draw * count) % max(1, len(rows))
        slots = torch.arange(count) + first
        yield _measured_batch(config, process, rows, indices, slots, encode_captions, density)
        first += count


def _measured_batch(
    config: RunConfig,
    process: Process,
    rows: TrainingRows,
    indices: Tensor,
    slots: Tensor,
    encode_captions: PromptEncoder | None,
    density: Callable[[Tensor, Process], Tensor],
) -> Batch:
    """Rows with the noise and the t of slots."""
    x0 = rows.read(indices)
    device = x0.device
    eps = _noise(x0, 0, "validation/noise", slots.to(device))
    # 0.618...: neighbours in row order get far-apart t, so that classes and t do not go together.
    t = density((slots.double() * 0.6180339887498949 + 0.5) % 1.0, process)
    t = t.to(device, rng.widest_float(device))
    if encode_captions is not None:
        assert rows.captions is not None
        captions = pick_captions(rows.captions, indices, slots, 0, 0, FIRST_CAPTIONS)
        return Batch(x0, eps, t, encode_captions(captions).to(device))
    labels = _labels(config, rows, indices)
    return Batch(x0, eps, t, None if labels is None else Condition(class_labels=labels.to(device)))


def _noise(x0: Tensor, seed: int, purpose: str, slots: Tensor, step: int = 0) -> Tensor:
    """What a step draws for x0: normal numbers, for tokens uniform ones."""
    draw = rng.normal if x0.is_floating_point() else rng.uniform
    return draw(tuple(x0.shape[1:]), seed=seed, purpose=purpose, index=slots, call=step, device=x0.device)


def _labels(config: RunConfig, rows: TrainingRows, indices: Tensor) -> Tensor | None:
    """Class labels of rows, where the network is told them."""
    if not config.num_classes:
        return None
    assert rows.class_labels is not None
    return rows.class_labels[indices.to(rows.class_labels.device)]
