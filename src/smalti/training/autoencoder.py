"""Training a small KL autoencoder (autoencoders/small_kl.py) on pictures: reconstruction, edges, a little KL."""

import copy
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from smalti import rng
from smalti.autoencoders.small_kl import CONFIG, SmallKL, SmallKLConfig, new_small_kl, save_small_kl
from smalti.config import Budget, from_json, to_json
from smalti.data.latents import sample_moments, split_moments
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

_RECORD, PICTURE = "training.json", "reconstructions.png"
_SHOWN = 16  # pictures in the picture
_MEASURED = 512  # held-out rows that the PSNR is measured on


@dataclass(frozen=True)
class AutoencoderTraining:
    """Everything that defines an autoencoder's training.

    The loss of a batch is l1_weight |d| + l2_weight d^2 + gradient_weight (|d_x| + |d_y|), each a mean over pixels, of
    the difference d of reconstruction and picture and of its steps to the neighbours, plus kl_weight times the mean KL
    divergence of a latent.
    """

    model: SmallKLConfig = field(default_factory=SmallKLConfig)
    budget: Budget = field(default_factory=lambda: Budget("minutes", 3.0))
    seed: int = 0
    batch_size: int = 16
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    gradient_weight: float = 0.5
    kl_weight: float = 1e-4
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(learning_rate=2e-3, beta2=0.99))
    schedule: Schedule = field(default_factory=lambda: Schedule(warmup_steps=50, decay="cosine", decay_share=1.0))
    ema: PowerEma | ExponentialEma = field(default_factory=PowerEma)
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        for name in ("l1_weight", "l2_weight", "gradient_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if not self.l1_weight + self.l2_weight > 0:
            raise UserError("l1_weight and l2_weight are both 0: nothing ties a reconstruction to its picture")
        if self.clip_norm <= 0:
            raise UserError(f"clip_norm={self.clip_norm} must be above 0")


@dataclass(frozen=True)
class TrainedAutoencoder:
    """The averaged network, and its PSNR in dB on held-out rows before the first step and after the last."""

    model: SmallKL
    psnr_before: float
    psnr_after: float
    steps: int
    seconds: float
    outcome: str  # "finished", "interrupted"


def kl_divergence(moments: Tensor, latent_channels: int) -> Tensor:
    """Of N(mean, variance) from N(0, 1), the mean over latents. Source: Kingma and Welling 2014, appendix B."""
    mean, log_variance = split_moments(moments, latent_channels)
    assert log_variance is not None
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()


def reconstruction_loss(config: AutoencoderTraining, reconstructions: Tensor, pictures: Tensor) -> Tensor:
    """The loss without its KL term; both [batch, channels, height, width] in [-1, 1].

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


@torch.no_grad()
def reconstruct(model: SmallKL, pictures: Tensor) -> Tensor:
    """Pictures decoded from the means of their latents, clamped to [-1, 1]."""
    mean, _ = split_moments(model.encode_moments(pictures), model.latent_channels)
    return model.decode(mean).clamp(-1, 1)


def psnr(model: SmallKL, rows: TrainingRows, max_rows: int = _MEASURED) -> float:
    """Peak signal-to-noise ratio of reconstructions in dB: 10 log10(2^2 / mean squared error), pixels in [-1, 1]."""
    count = min(max_rows, len(rows))
    device = next(model.parameters()).device
    total = 0.0
    for indices in torch.linspace(0, len(rows) - 1, count).round().long().split(64):
        pictures = rows.read(indices).to(device)
        total += float((reconstruct(model, pictures) - pictures).square().mean((1, 2, 3)).double().sum())
    return 10 * math.log10(4.0 / max(total / count, 1e-12))


def train_autoencoder(
    config: AutoencoderTraining,
    training_rows: TrainingRows,
    held_out_rows: TrainingRows,
    out: Path,
    *,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    display: TrainingDisplay | None = None,
) -> TrainedAutoencoder:
    """Train, and write into the folder `out` what autoencoder=small_kl reads, training.json and reconstructions.png.

    With a budget in steps or epochs the weights are a function of the config and the rows. Ctrl-C ends the training and
    keeps what is there. Raises UserError for rows that do not fit the network and a folder that holds something else,
    TrainingDiverged for a loss that is not finite.
    """
    channels, height, width = training_rows.shape
    _check_rows(config, channels, height, width)
    _prepare_folder(out, overwrite)
    if not len(held_out_rows):
        held_out_rows = training_rows
    model = new_small_kl(config.model, config.seed).to(device)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    before = psnr(average, held_out_rows)
    display = display or terminal_display()
    started, step, progress, outcome = time.monotonic(), 0, 0.0, "finished"
    with display:
        display.message(f"PSNR on held-out pictures before: {before:.1f} dB")
        do_step = _stepper(config, model, average, training_rows)
        try:
            while progress < 1:
                loss = do_step(step, progress)
                step += 1
                seconds = time.monotonic() - started
                progress = budget_progress(config.budget, step, seconds, config.batch_size, len(training_rows))
                left = seconds / max(progress, 1e-9) * (1 - progress)
                display.update(step, progress, loss, step * config.batch_size / seconds, left)
        except KeyboardInterrupt:
            outcome = "interrupted"
        seconds = time.monotonic() - started
        after = psnr(average, held_out_rows)
        display.message(f"PSNR on held-out pictures after {step} steps: {after:.1f} dB")
    save_small_kl(average, out)
    shown = held_out_rows.read(torch.arange(min(_SHOWN, len(held_out_rows)))).to(device)
    grid_picture(torch.cat([shown, reconstruct(average, shown)]), len(shown), zoom=2).save(out / PICTURE)
    result = TrainedAutoencoder(average, before, after, step, seconds, outcome)
    record = {
        "config": to_json(config), "steps": step, "seconds": round(seconds, 1), "outcome": outcome,
        "psnr_before": round(before, 3), "psnr_after": round(after, 3), "threads": torch.get_num_threads(),
    }  # fmt: skip
    write_json(out / _RECORD, record)
    return result


def read_training(folder: Path) -> AutoencoderTraining:
    """The config that an autoencoder was trained with. Raises UserError where the folder holds none."""
    import json

    try:
        body = json.loads((folder / _RECORD).read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / _RECORD} cannot be read: {error}") from None
    config = from_json(AutoencoderTraining, body)
    assert isinstance(config, AutoencoderTraining)
    return config


def _check_rows(config: AutoencoderTraining, channels: int, height: int, width: int) -> None:
    if channels != config.model.in_channels:
        raise UserError(f"model.in_channels={config.model.in_channels}: the pictures have {channels} channels")
    if height % config.model.factor or width % config.model.factor:
        raise UserError(
            f"model.factor={config.model.factor} must divide the pictures' height and width: {height}, {width}"
        )


def _prepare_folder(out: Path, overwrite: bool) -> None:
    """Raises UserError for a folder with something in it that may not be replaced."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise UserError(f"{out} exists: pass --overwrite to replace it, or another --out")
        if not out.is_dir() or not (out / CONFIG).is_file() or not (out / _RECORD).is_file():
            raise UserError(
                f"{out} exists and holds no autoencoder: --overwrite only replaces those; give another --out"
            )
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None


def _stepper(
    config: AutoencoderTraining, model: SmallKL, average: SmallKL, rows: TrainingRows
) -> Callable[[int, float], float]:
    """The function that does step number (0, 1, ...) at a progress in [0, 1], and returns its loss."""
    parameters, averages = list(model.parameters()), list(average.parameters())
    (optimizer,) = build_optimizers(config.optimizer, model).values()
    device = parameters[0].device
    slots = torch.arange(config.batch_size)

    def do_step(step: int, progress: float) -> float:
        indices = batch_indices(step, config.batch_size, len(rows), config.seed)
        pictures = rows.read(indices, draw=step).to(device)
        moments = model.encode_moments(pictures)
        shape = (model.latent_channels, *moments.shape[-2:])
        eps = rng.normal(shape, seed=config.seed, purpose="autoencoder/noise", index=slots, call=step).to(device)
        reconstructions = model.decode(sample_moments(moments, eps))
        loss = reconstruction_loss(config, reconstructions, pictures)
        loss = loss + config.kl_weight * kl_divergence(moments, model.latent_channels)
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
