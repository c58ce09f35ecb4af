"""What a network's raw output stands for, and the one table that converts between the kinds.

Every prediction type is a line in the plane of x0 and eps: output = a x0 + b eps. With x = alpha x0 + sigma eps that
is a 2 x 2 system, so one solve serves every pair.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from smalti.diffusion.process import Process
from smalti.errors import unknown_name

PredictionType = Literal["eps", "x0", "v", "velocity", "edm"]
OutputType = Literal["eps", "x0", "v", "velocity", "edm", "tokens"]  # tokens: logits, in no plane of x0 and eps


def prediction_types() -> tuple[str, ...]:
    """The known prediction types."""
    return get_args(PredictionType)


def prediction_row(prediction_type: str, process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) with output = a x0 + b eps, each of the shape of t.

    v = alpha eps - sigma x0 (Salimans and Ho 2022, section 4); velocity = dx/dt = alpha' x0 + sigma' eps (SiT, eq. 4);
    edm is the preconditioned network F of Karras et al. 2022, eq. 7, whose input is scaled too: see input_scale.
    """
    if prediction_type == "eps":
        return torch.zeros_like(t), torch.ones_like(t)
    if prediction_type == "x0":
        return torch.ones_like(t), torch.zeros_like(t)
    if prediction_type == "v":
        return -process.sigma(t), process.alpha(t)
    if prediction_type == "velocity":
        return process.alpha_dot(t), process.sigma_dot(t)
    if prediction_type == "edm":
        # Karras et al. 2022, eq. 8: F = (x0 - c_skip x / alpha) / c_out with s = sigma / alpha in c_skip and c_out, and
        # both fractions times alpha, so that they are finite at pure noise and at data.
        alpha, sigma, sigma_data = process.alpha(t), process.sigma(t), process.sigma_data
        spread = torch.hypot(sigma, sigma_data * alpha)
        return sigma / (spread * sigma_data), -sigma_data * alpha / spread
    raise unknown_name("prediction_type", prediction_type, prediction_types())


def input_scale(prediction_type: str, process: Process, t: Tensor) -> Tensor:
    """The factor on x before the network, of the shape of t: 1, but for edm c_in / alpha.

    c_in = 1 / sqrt(s^2 + sigma_data^2) with s = sigma / alpha. Source: Karras et al. 2022, table 1.
    """
    if prediction_type == "edm":
        return 1 / torch.hypot(process.sigma(t), process.sigma_data * process.alpha(t))
    return torch.ones_like(t)


def usable_at_pure_noise(prediction_type: str) -> bool:
    """Whether the output says what x0 is where alpha = 0: all but eps, which repeats the input there.

    There x0_from_output divides by zero for eps; a caller that starts at such a t asks here first. Raises UserError for
    an unknown type.
    """
    if prediction_type not in prediction_types():
        raise unknown_name("prediction_type", prediction_type, prediction_types())
    return prediction_type != "eps"


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[batch] to [batch, 1, ..., 1] in the precision of like."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def training_target(prediction_type: str, process: Process, t: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """What the network should put out at t [batch] for x0 and eps [batch, ...]."""
    a, b = prediction_row(prediction_type, process, t)
    return per_sample(a, x0) * x0 + per_sample(b, x0) * eps


def x0_from_output(prediction_type: str, process: Process, t: Tensor, x: Tensor, output: Tensor) -> Tensor:
    """The x0 that x [batch, ...] at t [batch] and the raw output imply: (b x - sigma output) / (alpha b - sigma a).

    Finite at pure noise for the types that usable_at_pure_noise names; velocity also needs alpha' there.
    """
    if prediction_type == "x0":
        return output
    a, b = prediction_row(prediction_type, process, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    determinant = alpha * b - sigma * a
    return per_sample(b / determinant, x) * x - per_sample(sigma / determinant, x) * output


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
    return per_sample(from_x, x) * x + per_sample(from_output, x) * output
