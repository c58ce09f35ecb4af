"""Training a network to reconstruct pictures: what autoencoder.py and tokenizer.py share."""

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from smalti.autoencoders.network_folder import CONFIG
from smalti.config import Budget, to_json
from smalti.data.order import batch_indices
from smalti.data.rows import TrainingRows
from smalti.errors import UserError
from smalti.images import grid_picture
from smalti.optim.ema import ExponentialEma, PowerEma, update_ema
from smalti.optim.optimizers import AdamWConfig, build_optimizers
from smalti.optim.schedule import Schedule, learning_rate_factor
from smalti.run_folder import write_json
from smalti.training.display import TrainingDisplay, terminal_display
from smalti.training.failure import TrainingDiverged
from smalti.training.loop import budget_progress

RECORD, PICTURE = "training.json", "reconstructions.png"
_SHOWN = 16  # pictures in the picture
_MEASURED = 512  # held-out rows that are measured on

NetworkT = TypeVar("NetworkT", bound=nn.Module)
_GivenT = TypeVar("_GivenT", bound=nn.Module, contravariant=True)


@dataclass(frozen=True)
class ReconstructionTraining:
    """How to train. The loss of a batch begins with l1_weight |d| + l2_weight d^2 + gradient_weight (|d_x| + |d_y|).

    Each is a mean over pixels, of the difference d of reconstruction and picture and of its steps to the neighbours.
    """

    budget: Budget = field(default_factory=lambda: Budget("minutes", 3.0))
    seed: int = 0
    batch_size: int = 16
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    gradient_weight: float = 0.5
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(learning_rate=2e-3, beta2=0.99))
    schedule: Schedule = field(default_factory=lambda: Schedule(warmup_steps=50, decay="cosine", decay_share=1.0))
    ema: PowerEma | ExponentialEma = field(default_factory=PowerEma)
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        for name in ("l1_weight", "l2_weight", "gradient_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if not self.l1_weight + self.l2_weight > 0:
            raise UserError("l1_weight and l2_weight are both 0: nothing ties a reconstruction to its picture")
        if self.clip_norm <= 0:
            raise UserError(f"clip_norm={self.clip_norm} must be above 0")


@dataclass(frozen=True)
class Batch:
    """What a step learns from: pictures [batch, channels, height, width] in [-1, 1].

    step: 0, 1, ...; progress: share of the budget spent, in [0, 1].
    """

    pictures: Tensor
    step: int
    progress: float


class Task(Protocol[_GivenT]):
    """What differs between the networks that are trained to reconstruct."""

    def loss(self, network: _GivenT, batch: Batch) -> Tensor:
        """The loss of a batch."""
        ...

    def reconstruct(self, network: _GivenT, pictures: Tensor) -> Tensor:
        """Pictures as they come back, in [-1, 1]."""
        ...

    def save(self, network: _GivenT, folder: Path) -> None:
        """Write the network's own files."""
        ...

    def warning(self, step: int) -> str | None:
        """What to tell the user after a step, if anything."""
        ...

    def measures(self, network: _GivenT, held_out_rows: TrainingRows) -> dict[str, float]:
        """What the record holds of a network beside its PSNR."""
        ...


@dataclass(frozen=True)
class Trained(Generic[NetworkT]):
    """The averaged network, its PSNR in dB on held-out rows before the first step and after the last, its measures."""

    model: NetworkT
    psnr_before: float
    psnr_after: float
    measures: dict[str, float]
    steps: int
    seconds: float
    outcome: str  # "finished", "interrupted"


def reconstruction_loss(config: ReconstructionTraining, reconstructions: Tensor, pictures: Tensor) -> Tensor:
    """The loss as ReconstructionTraining has it; both [batch, channels, height, width] in [-1, 1].

    The third term compares edges, which the first two alone leave soft. Source: Mathieu, Couprie and LeCun 2016, "Deep
    multi-scale video prediction beyond mean square error", eq. 6, here of the signed differences.
    """
    difference = reconstructions - pictures
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return (
        config.l1_weight * difference.abs().mean()
        + config.l2_weight * difference.square().mean()
        + config.gradient_weight * edges
    )


def measured_pictures(rows: TrainingRows, device: torch.device | str, max_rows: int = _MEASURED) -> Iterator[Tensor]:
    """Batches of up to max_rows pictures, spread evenly over the rows."""
    for indices in torch.linspace(0, len(rows) - 1, min(max_rows, len(rows))).round().long().split(64):
        yield rows.read(indices).to(device)


def psnr(
    reconstruct: Callable[[Tensor], Tensor],
    rows: TrainingRows,
    device: torch.device | str = "cpu",
    max_rows: int = _MEASURED,
) -> float:
    """Peak signal-to-noise ratio of reconstructions in dB: 10 log10(2^2 / mean squared error), pixels in [-1, 1]."""
    total, count = 0.0, 0
    for pictures in measured_pictures(rows, device, max_rows):
        total += float((reconstruct(pictures) - pictures).square().mean((1, 2, 3)).double().sum())
        count += len(pictures)
    return 10 * math.log10(4.0 / max(total / count, 1e-12))


def train_to_reconstruct(
    config: ReconstructionTraining,
    network: NetworkT,
    task: Task[NetworkT],
    training_rows: TrainingRows,
    held_out_rows: TrainingRows,
    out: Path,
    *,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    display: TrainingDisplay | None = None,
) -> Trained[NetworkT]:
    """Train, and write into the folder `out` what task.save() writes, training.json and reconstructions.png.

    With a budget in steps or epochs the weights are a function of the config and the rows. Ctrl-C ends the training and
    keeps what is there. Raises UserError for a folder that holds something else, TrainingDiverged for a loss that is
    not finite.
    """
    _prepare_folder(out, overwrite)
    if not len(held_out_rows):
        held_out_rows = training_rows
    network = network.to(device)
    average = copy.deepcopy(network).requires_grad_(False).eval()

    def measured() -> float:
        return psnr(lambda pictures: task.reconstruct(average, pictures), held_out_rows, device)

    before = measured()
    display = display or terminal_display()
    started, step, progress, outcome = time.monotonic(), 0, 0.0, "finished"
    with display:
        display.message(f"PSNR on held-out pictures before: {before:.1f} dB")
        do_step = _stepper(config, network, average, task, training_rows)
        try:
            while progress < 1:
                loss = do_step(step, progress)
                if (warning := task.warning(step)) is not None:
                    display.message(warning)
                step += 1
                seconds = time.monotonic() - started
                progress = budget_progress(config.budget, step, seconds, config.batch_size, len(training_rows))
                left = seconds / max(progress, 1e-9) * (1 - progress)
                display.update(step, progress, loss, step * config.batch_size / seconds, left)
        except KeyboardInterrupt:
            outcome = "interrupted"
        seconds = time.monotonic() - started
        after = measured()
        display.message(f"PSNR on held-out pictures after {step} steps: {after:.1f} dB")
    task.save(average, out)
    shown = held_out_rows.read(torch.arange(min(_SHOWN, len(held_out_rows)))).to(device)
    grid_picture(torch.cat([shown, task.reconstruct(average, shown)]), len(shown), zoom=2).save(out / PICTURE)
    result = Trained(average, before, after, task.measures(average, held_out_rows), step, seconds, outcome)
    record: dict[str, Any] = {
        "config": to_json(config), "steps": step, "seconds": round(seconds, 3), "outcome": outcome,
        "psnr_before": round(before, 3), "psnr_after": round(after, 3),
        **{name: round(value, 4) for name, value in result.measures.items()}, "threads": torch.get_num_threads(),
    }  # fmt: skip
    write_json(out / RECORD, record)
    return result


def check_rows(rows: TrainingRows, in_channels: int, factor: int) -> None:
    """Raise UserError for pictures that a network does not take."""
    channels, height, width = rows.shape
    if channels != in_channels:
        raise UserError(f"model.in_channels={in_channels}: the pictures have {channels} channels")
    if height % factor or width % factor:
        raise UserError(f"model.factor={factor} must divide the pictures' height and width: {height}, {width}")


def _prepare_folder(out: Path, overwrite: bool) -> None:
    """Raises UserError for a folder with something in it that may not be replaced."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise UserError(f"{out} exists: pass --overwrite to replace it, or another --out")
        if not out.is_dir() or not (out / CONFIG).is_file() or not (out / RECORD).is_file():
            raise UserError(
                f"{out} exists and holds no autoencoder: --overwrite only replaces those; give another --out"
            )
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None


def _stepper(
    config: ReconstructionTraining, network: NetworkT, average: NetworkT, task: Task[NetworkT], rows: TrainingRows
) -> Callable[[int, float], float]:
    """The function that does step number (0, 1, ...) at a progress in [0, 1], and returns its loss."""
    parameters, averages = list(network.parameters()), list(average.parameters())
    (optimizer,) = build_optimizers(config.optimizer, network).values()
    device = parameters[0].device

    def do_step(step: int, progress: float) -> float:
        indices = batch_indices(step, config.batch_size, len(rows), config.seed)
        loss = task.loss(network, Batch(rows.read(indices, draw=step).to(device), step, progress))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            raise TrainingDiverged(f"loss {value} at step {step} is not finite: try a lower learning rate")
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * learning_rate_factor(config.schedule, step, progress)
        optimizer.step()
        update_ema(averages, parameters, config.ema.decay(step + 1))
        return value

    return do_step
