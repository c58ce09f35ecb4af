"""The training loss of one batch, per sample, and its mean per bin of t."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from smalti.diffusion.masking import Masking, masked_token_loss
from smalti.diffusion.prediction import (
    OutputType,
    input_scale,
    per_sample,
    prediction_row,
    training_target,
    usable_at_pure_noise,
    x0_from_output,
)
from smalti.diffusion.process import Process
from smalti.diffusion.variance_preserving import VPDiscrete
from smalti.diffusion.variational_bound import variational_bound
from smalti.errors import UserError
from smalti.types import Backbone, Condition


@dataclass(frozen=True)
class Objective:
    """What the network predicts and how the squared errors are weighted.

    uniform, sigma_sqrt and cosmap weigh the error of the output, min_snr and edm that of x0 (see loss_weight).
    min_snr_gamma caps the weight of nearly clean samples at gamma in x0 terms (Hang et al. 2023, eq. 8).
    vlb_weight: of the variational bound, by which a network learns the variance of its steps; 0.001 is the paper's
    (Nichol and Dhariwal 2021, eq. 16), 0 leaves the variance untrained. tokens is the prediction of masked tokens, by
    cross-entropy with label_smoothing (diffusion/masking.py).
    """

    prediction_type: OutputType = "velocity"
    weighting: Literal["uniform", "min_snr", "sigma_sqrt", "cosmap", "edm"] = "uniform"
    min_snr_gamma: float = field(default=5.0, metadata={"only_if": ("weighting", ("min_snr",))})
    vlb_weight: float = 0.0
    label_smoothing: float = field(default=0.0, metadata={"only_if": ("prediction_type", ("tokens",))})

    def __post_init__(self) -> None:
        if not 0 <= self.vlb_weight < math.inf:
            raise UserError(f"objective.vlb_weight={self.vlb_weight} must be at least 0 and finite")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing={self.label_smoothing} must lie in [0, 1)")
        if self.min_snr_gamma <= 0:
            raise UserError(f"objective.min_snr_gamma={self.min_snr_gamma} must be above 0")


def check_objective(objective: Objective, process: Process, learns_variance: bool = False) -> None:
    """Raise UserError where the prediction does not say what x0 is at the noise that sampling starts from, and for a
    variational bound of a network without variances or of a process without steps."""
    if objective.prediction_type == "tokens" or isinstance(process, Masking):
        return  # they go together: config.check_parts
    if objective.vlb_weight > 0 and not learns_variance:
        raise UserError(
            f"objective.vlb_weight={objective.vlb_weight} has no effect on this network, which learns no variance: "
            "set model.learn_sigma=true before it, or leave it at 0"
        )
    if objective.vlb_weight > 0 and not isinstance(process, VPDiscrete):
        raise UserError(
            f"objective.vlb_weight={objective.vlb_weight} is for a process of steps, such as 'vp_linear_discrete'; "
            f"the process is {process.name!r}: leave it at 0"
        )
    at_start = process.alpha(torch.tensor(process.t_max, dtype=torch.float64))
    if float(at_start) == 0.0 and not usable_at_pure_noise(objective.prediction_type):
        raise UserError(
            f"objective.prediction_type={objective.prediction_type!r} says nothing of x0 at pure noise, where "
            f"{process.name!r} starts: take v, velocity, x0 or edm, set before process"
        )


def loss_weight(objective: Objective, process: Process, t: Tensor) -> Tensor:
    """Weight of the squared error of the output at t [batch].

    sigma_sqrt and cosmap are those of SD3's training code, in the rectified-flow time of equal SNR. min_snr and edm are
    weights of the x0 error, converted: an error e of the output is an error e sigma / (alpha b - sigma a) of x0.
    """
    if objective.weighting == "uniform":
        return torch.ones_like(t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    flow_time = sigma / (alpha + sigma)
    if objective.weighting == "sigma_sqrt":
        return flow_time**-2
    if objective.weighting == "cosmap":
        # SD3 (Esser et al. 2024), eq. 21: the density of cosmap, as a weight.
        return 2 / (math.pi * (1 - 2 * flow_time + 2 * flow_time**2))
    if objective.weighting == "edm":
        # Karras et al. 2022, table 1 (loss weighting), with s = sigma / alpha: (s^2 + sigma_data^2) / (s sigma_data)^2.
        x0_weight = (sigma**2 + (process.sigma_data * alpha) ** 2) / (sigma * process.sigma_data) ** 2
    else:
        # Hang et al. 2023, eq. 8.
        x0_weight = torch.clamp((alpha / sigma) ** 2, max=objective.min_snr_gamma)
    a, b = prediction_row(objective.prediction_type, process, t)
    x0_error_per_output_error = sigma / (alpha * b - sigma * a)
    return x0_weight * x0_error_per_output_error**2


def noisy_input(process: Process, t: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps for t [batch] and x0, eps [batch, ...]."""
    return per_sample(process.alpha(t), x0) * x0 + per_sample(process.sigma(t), x0) * eps


def per_sample_loss(
    backbone: Backbone,
    process: Process,
    objective: Objective,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Condition | None,
) -> Tensor:
    """Weighted mean squared error of each sample's output, [batch]; with vlb_weight the variational bound beside it.

    x0, eps: [batch, channels, ...]. t: [batch] in (0, 1), float64. Source: Ho et al. 2020, eq. 14, in any prediction;
    Nichol and Dhariwal 2021, eq. 16, where the bound trains the variances alone. Of tokens: see masked_token_loss, of
    which x0 are the tokens and eps the uniform numbers.
    """
    if isinstance(process, Masking):
        return masked_token_loss(backbone, process, objective.label_smoothing, x0, eps, t, cond)
    x = noisy_input(process, t, x0, eps)
    target = training_target(objective.prediction_type, process, t, x0, eps)
    scaled = x * per_sample(input_scale(objective.prediction_type, process, t), x)
    output, logits = backbone(scaled, process.network_time(t).to(x.dtype), cond).tensor_split([x0.shape[1]], dim=1)
    squared_error = (output - target).square().flatten(1).mean(dim=1)
    loss = squared_error * loss_weight(objective, process, t).to(squared_error.dtype)
    if objective.vlb_weight == 0:
        return loss
    assert isinstance(process, VPDiscrete)  # check_objective
    assert logits.shape == x0.shape
    estimate = x0_from_output(objective.prediction_type, process, t, x, output.detach())
    return loss + objective.vlb_weight * variational_bound(process, t, x0, estimate, logits)


def loss_by_timestep_bin(losses: Tensor, t: Tensor, bins: int = 8) -> tuple[Tensor, Tensor]:
    """Mean loss of the samples of each of `bins` equal parts of t in [0, 1] (nan where there are none), and the counts.

    losses, t: [batch]. Returns float [bins] of the dtype of losses and int64 [bins]. Raises UserError for bins < 1.
    """
    if bins < 1:
        raise UserError(f"bins={bins} must be at least 1")
    number = (t * bins).floor().clamp(0, bins - 1).long()
    member = number[None] == torch.arange(bins, device=t.device)[:, None]
    counts = member.sum(1)
    # where, not a product: a loss that is not finite stays in its own bin.
    total = torch.where(member, losses[None], torch.zeros_like(losses[None])).sum(1)
    return total / counts, counts
