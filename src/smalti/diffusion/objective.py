"""The training loss of one batch, per sample."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from smalti.diffusion.prediction import PredictionType, prediction_row, training_target
from smalti.diffusion.processes import Process
from smalti.types import Backbone, Condition, UserError


@dataclass(frozen=True)
class Objective:
    """What the network predicts and how samples are weighted.

    min_snr_gamma caps the weight of nearly clean samples at gamma in x0 terms (Hang et al. 2023, eq. 8).
    """

    prediction_type: PredictionType = "velocity"
    weighting: Literal["uniform", "min_snr"] = "uniform"
    min_snr_gamma: float = field(default=5.0, metadata={"only_if": ("weighting", ("min_snr",))})

    def __post_init__(self) -> None:
        if self.min_snr_gamma <= 0:
            raise UserError(f"objective.min_snr_gamma={self.min_snr_gamma} must be above 0")


def loss_weight(objective: Objective, process: Process, t: Tensor) -> Tensor:
    """Weight of the squared error of the output at t [batch].

    An error e of the output is an error e sigma / (alpha b - sigma a) of x0; min-SNR asks for a weight min(SNR, gamma)
    on the x0 error, so it is converted through that factor.
    """
    if objective.weighting == "uniform":
        return torch.ones_like(t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    a, b = prediction_row(objective.prediction_type, process, t)
    x0_error_per_output_error = sigma / (alpha * b - sigma * a)
    snr = (alpha / sigma) ** 2
    return torch.clamp(snr, max=objective.min_snr_gamma) * x0_error_per_output_error**2


def noisy_input(process: Process, t: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps for t [batch] and x0, eps [batch, ...]."""
    shape = (-1, *[1] * (x0.ndim - 1))
    return process.alpha(t).to(x0.dtype).reshape(shape) * x0 + process.sigma(t).to(x0.dtype).reshape(shape) * eps


def per_sample_loss(
    backbone: Backbone,
    process: Process,
    objective: Objective,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Condition | None,
) -> Tensor:
    """Weighted mean squared error of each sample's output, [batch].

    x0, eps: [batch, channels, ...]. t: [batch] in (0, 1), float64. Source: Ho et al. 2020, eq. 14, in any prediction.
    """
    x = noisy_input(process, t, x0, eps)
    target = training_target(objective.prediction_type, process, t, x0, eps)
    output = backbone(x, process.network_time(t).to(x.dtype), cond)[:, : x0.shape[1]]
    squared_error = (output - target).square().flatten(1).mean(dim=1)
    return squared_error * loss_weight(objective, process, t).to(squared_error.dtype)
