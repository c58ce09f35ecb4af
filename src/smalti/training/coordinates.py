"""The coordinate check: how large the activations of a network are, and how far training moves them, at each width.

Under muP neither depends on the width; under the standard parametrisation at one learning rate both do. It is the test
that a parametrisation is what it says. Source: Yang et al. 2022 (arXiv 2203.03466), appendix D.1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from smalti.conditioning.prompted import PromptedNetwork
from smalti.config import RunConfig
from smalti.diffusion.objective import per_sample_loss
from smalti.diffusion.processes import make_process
from smalti.errors import UserError
from smalti.models.features import forward_with_features
from smalti.optim.optimizers import MuonConfig, OptimizerConfig
from smalti.pipeline_arguments import PromptEncoder
from smalti.training.batch import Batch, training_batch
from smalti.training.data import RunData, caption_tokenizer, open_run_data, pretrained_encoder
from smalti.training.state import new_state
from smalti.training.widths import PARAMETRISATIONS, Parametrisation, at_width, check_widths
from smalti.types import Condition

FLAT = 0.2  # slopes of log2 size against log2 width within this are flat: finite widths are not quite the limit


@dataclass(frozen=True)
class Coordinates:
    """Mean |activation| of each part before and after training, and mean |after - before|, on one batch."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    change: Mapping[str, float]


@dataclass(frozen=True)
class CoordinateCheck:
    """Coordinates by parametrisation and width (in the order of widths)."""

    widths: tuple[int, ...]
    base_width: int
    steps: int
    learning_rate: float
    seeds: int
    sizes: Mapping[Parametrisation, tuple[Coordinates, ...]]

    def slopes(self, parametrisation: Parametrisation) -> dict[str, tuple[float, float]]:
        """By part: slopes of log2 size after training and of log2 change against log2 width; nan where one is 0."""
        measured = self.sizes[parametrisation]
        return {
            part: (
                log_slope(self.widths, [c.after[part] for c in measured]),
                log_slope(self.widths, [c.change[part] for c in measured]),
            )
            for part in measured[0].after
        }

    def steepest(self, parametrisation: Parametrisation) -> tuple[str, float]:
        """The part with the largest |slope| of its size or its change, and that slope; inf for one that diverged."""
        worst = {
            part: max((s for s in pair if not math.isnan(s)), key=abs, default=0.0)
            for part, pair in self.slopes(parametrisation).items()
        }
        return max(worst.items(), key=lambda entry: abs(entry[1]))

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured, with its slopes."""
        return {
            "widths": list(self.widths),
            "base_width": self.base_width,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "seeds": self.seeds,
            "flat_within": FLAT,
            **{
                name: {
                    part: {
                        "before": [c.before[part] for c in measured],
                        "after": [c.after[part] for c in measured],
                        "change": [c.change[part] for c in measured],
                        "slope_after": slopes[0],
                        "slope_change": slopes[1],
                    }
                    for part, slopes in self.slopes(name).items()
                }
                for name, measured in self.sizes.items()
            },
        }


def log_slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """The slope of the line through (log2 width, log2 size) by least squares: inf where a size is not finite, nan
    where one is 0."""
    if not all(map(math.isfinite, sizes)):
        return math.inf
    if min(sizes) <= 0:
        return math.nan
    x, y = [math.log2(w) for w in widths], [math.log2(s) for s in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def measured_parts(network: nn.Module) -> list[str]:
    """The parts whose activations are measured: all layers beside the blocks, each block, and its parts."""
    parts = []
    for name, module in network.named_children():
        if isinstance(module, nn.ModuleList):
            for number, block in enumerate(module):
                inside = [f"{name}.{number}.{child}" for child, _ in block.named_children() if "norm" not in child]
                parts += [f"{name}.{number}", *inside]
        else:
            parts.append(name)
    return parts


def with_learning_rate(optimizer: OptimizerConfig, rate: float) -> OptimizerConfig:
    """The optimiser at this rate; Muon's AdamW keeps its ratio to Muon's."""
    if not isinstance(optimizer, MuonConfig):
        return replace(optimizer, learning_rate=rate)
    adamw_rate = rate * optimizer.adamw_learning_rate / optimizer.learning_rate
    return replace(optimizer, learning_rate=rate, adamw_learning_rate=adamw_rate)


def measure_coordinates(
    config: RunConfig, data: RunData, steps: int, encode: PromptEncoder | None = None, device: str = "cpu"
) -> Coordinates:
    """Train the run's network for a few steps at its full rate, without clipping, and measure it on the next batch.

    encode: captions to what the network reads, for one that reads them.
    """
    process, state = make_process(config.process), new_state(config, torch.device(device))
    training = [rows.to(device) for rows in data.training]
    probe = training_batch(config, process, training, steps, encode)
    network = state.model.network if isinstance(state.model, PromptedNetwork) else state.model
    assert isinstance(network, nn.Module)
    prefix, parts = ("network." if network is not state.model else ""), measured_parts(network)

    def losses(batch: Batch, backbone: Callable[[Tensor, Tensor, Condition | None], Tensor]) -> Tensor:
        return per_sample_loss(backbone, process, config.objective, batch.x0, batch.eps, batch.t, batch.cond)  # type: ignore[arg-type]

    @torch.inference_mode()
    def activations() -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}

        def probed(x: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
            output, features = forward_with_features(state.model, [prefix + part for part in parts], x, t, cond)
            kept.update({part: features[prefix + part].float() for part in parts if prefix + part in features})
            return output

        losses(probe, probed)
        return kept

    before = activations()
    for step in range(steps):
        loss = losses(training_batch(config, process, training, step, encode), state.model).mean()
        for parameter in state.parameters:
            parameter.grad = None
        loss.backward()
        for optimizer in state.optimizers.values():
            optimizer.step()
    after = activations()
    return Coordinates(
        *(
            {part: float(tensor.abs().mean()) for part, tensor in group.items()}
            for group in (before, after, {part: after[part] - before[part] for part in before})
        )
    )


def check_coordinates(
    config: RunConfig,
    widths: Sequence[int],
    *,
    base_width: int = 64,
    steps: int = 10,
    learning_rate: float = 2**-8,
    seeds: int = 3,
    keep_heads: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> CoordinateCheck:
    """Measure the run's network at each width under both parametrisations, the mean over so many seeds.

    progress(done, total) is called after each network. Raises UserError as at_width does, and for data that cannot be
    opened.
    """
    check_widths(widths)
    for option, value in (("--steps", steps), ("--seeds", seeds)):
        if value < 1:
            raise UserError(f"{option} {value} must be at least 1")
    config = replace(config, optimizer=with_learning_rate(config.optimizer, learning_rate))
    widths = sorted(widths)
    configs = {p: [at_width(config, w, p, base_width, keep_heads) for w in widths] for p in PARAMETRISATIONS}
    data = open_run_data(config, torch.device(device))
    tokenizer = caption_tokenizer(config, data.training)
    encode = pretrained_encoder(config, torch.device(device)) if tokenizer is None else tokenizer.encode
    sizes: dict[Parametrisation, tuple[Coordinates, ...]] = {}
    done, total = 0, 2 * len(widths) * seeds
    for name in PARAMETRISATIONS:
        for scaled in configs[name]:
            drawn = []
            for seed in range(config.seed, config.seed + seeds):
                drawn.append(measure_coordinates(replace(scaled, seed=seed), data, steps, encode, device))
                done += 1
                if progress is not None:
                    progress(done, total)
            sizes[name] = (*sizes.get(name, ()), _mean(drawn))
    return CoordinateCheck(tuple(widths), base_width, steps, learning_rate, seeds, sizes)


def _mean(drawn: Sequence[Coordinates]) -> Coordinates:
    def mean(groups: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {part: sum(group[part] for group in groups) / len(groups) for part in groups[0]}

    return Coordinates(mean([c.before for c in drawn]), mean([c.after for c in drawn]), mean([c.change for c in drawn]))
