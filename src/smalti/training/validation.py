"""The fixed-t validation loss: of the network that trains, and of other weights afterwards."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from smalti.config import RunConfig
from smalti.diffusion.objective import per_sample_loss
from smalti.diffusion.process import Process
from smalti.diffusion.processes import make_process
from smalti.errors import UserError
from smalti.pipeline_arguments import PromptEncoder
from smalti.run_folder import RunFolder, read_config
from smalti.training.batch import Batch, objective_batches, validation_batches
from smalti.training.data import caption_features, kept_tokenizer, open_run_data, pretrained_encoder
from smalti.training.parallel import Ranks
from smalti.types import Backbone

_ALONE = Ranks()


def held_out_losses(
    config: RunConfig,
    process: Process,
    network: Backbone,
    batches: Sequence[Batch],
    ranks: Ranks = _ALONE,
    activity: str = "a validation",
) -> Tensor:
    """The loss of each held-out row, [rows]. Each rank computes some of them, and all get all."""
    # Inference mode and weights that are gathered from ranks do not go together.
    with torch.inference_mode() if ranks.size == 1 else torch.no_grad():
        return torch.cat([_losses(config, process, network, batch, ranks, activity) for batch in batches])


def _losses(
    config: RunConfig, process: Process, network: Backbone, batch: Batch, ranks: Ranks, activity: str
) -> Tensor:
    size = len(batch.t)
    first, last = ranks.rank * size // ranks.size, (ranks.rank + 1) * size // ranks.size
    # A rank without rows computes one all the same: where weights are sharded, all must run the network.
    own = batch.rows(first, max(last, first + 1)) if first < size else batch.rows(0, 1)
    ranks.doing(activity)
    losses = per_sample_loss(network, process, config.objective, own.x0, own.eps, own.t, own.cond)
    if ranks.size == 1:
        return losses
    combined = losses.new_zeros(size)
    combined[first:last] = losses[: last - first]
    return ranks.combine(combined, activity)


def validation_of_run(run: Path, device: str = "cpu") -> Callable[[Backbone], float]:
    """What takes a network with any of a run's weights to its validation loss, as the run itself measured it: the mean
    over held-out rows at fixed t and noise.

    Raises UserError where the run's data cannot be opened or holds no rows out.
    """
    config, process, batches = _batches_of_run(run, device, "held_out", validation_batches)
    return lambda network: held_out_losses(config, process, network, batches).mean().item()


def objective_of_run(
    run: Path, device: str = "cpu", part: Literal["held_out", "training"] = "held_out"
) -> Callable[[Backbone], Tensor]:
    """What takes a network with any of a run's weights to losses whose mean is the run's training objective on held-out
    rows, [draws]: t is spread as in training, where a validation spreads it evenly and so weighs times most that
    training may hardly visit. part="training": on rows that it was trained on.

    Raises UserError where the run's data cannot be opened or holds no rows out.
    """
    config, process, batches = _batches_of_run(run, device, part, objective_batches)
    return lambda network: held_out_losses(config, process, network, batches)


def _batches_of_run(
    run: Path, device: str, part: Literal["held_out", "training"], batches: Callable[..., Iterator[Batch]]
) -> tuple[RunConfig, Process, list[Batch]]:
    config, place = read_config(run), torch.device(device)
    process = make_process(config.process)
    data = open_run_data(config, place, run)
    rows_of_part = data.held_out if part == "held_out" else data.training
    if not sum(map(len, rows_of_part)):
        raise UserError(f"{run} holds no rows out to validate on")
    encoder = pretrained_encoder(config, place)
    encode: PromptEncoder | None = None if encoder is None else caption_features(config, data, encoder)
    tokenizer = kept_tokenizer(config, data.training, RunFolder(run))
    if tokenizer is not None:
        encode = tokenizer.encode
    return config, process, list(batches(config, process, [rows.to(place) for rows in rows_of_part], encode))
