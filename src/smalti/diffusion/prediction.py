"""What a network's raw output stands for, and the one table that converts between the kinds.

Every prediction type is a line in the plane of x0 and eps: output = a x0 + b eps. With x = alpha x0 + sigma eps that
is a 2 x 2 system, so one solve serves every pair.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from smalti.diffusion.processes import Process
from smalti.types import unknown_name

PredictionType = Literal["eps", "x0", "v", "velocity"]


def prediction_types() -> tuple[str, ...]:
    """The known prediction types."""
    return get_args(PredictionType)


def prediction_row(prediction_type: str, process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) with output = a x0 + b eps, each of the shape of t.

    v = alpha eps - sigma x0 (Salimans and Ho 2022, section 4); velocity = dx/dt = alpha' x0 + sigma' eps (SiT, eq. 4).
    """
    if prediction_type == "eps":
        return torch.zeros_like(t), torch.ones_like(t)
    if prediction_type == "x0":
        return torch.ones_like(t), torch.zeros_like(t)
    if prediction_type == "v":
        return -process.sigma(t), process.alpha(t)
    if prediction_type == "velocity":
        return process.alpha_dot(t), process.sigma_dot(t)
    raise unknown_name("prediction_type", prediction_type, prediction_types())


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[batch] to [batch, 1, ..., 1] in the precision of like."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def training_target(prediction_type: str, process: Process, t: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """What the network should put out at t [batch] for x0 and eps [batch, ...]."""
    a, b = prediction_row(prediction_type, process, t)
    return _per_sample(a, x0) * x0 + _per_sample(b, x0) * eps


def x0_from_output(prediction_type: str, process: Process, t: Tensor, x: Tensor, output: Tensor) -> Tensor:
    """The x0 that x [batch, ...] at t [batch] and the raw output imply: (b x - sigma output) / (alpha b - sigma a)."""
    a, b = prediction_row(prediction_type, process, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    determinant = alpha * b - sigma * a
    return _per_sample(b / determinant, x) * x - _per_sample(sigma / determinant, x) * output


def convert_prediction(from_type: str, to_type: str, process: Process, t: Tensor, x: Tensor, output: Tensor) -> Tensor:
    """One kind of output from another at x [batch, ...], t [batch]; finite where both kinds determine x0 and eps."""
    if from_type == to_type:
        return output
    a, b = prediction_row(from_type, process, t)
    to_a, to_b = prediction_row(to_type, process, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    determinant = alpha * b - sigma * a
    from_x = (to_a * b - to_b * a) / determinant
    from_output = (to_b * alpha - to_a * sigma) / determinant
    return _per_sample(from_x, x) * x + _per_sample(from_output, x) * output
