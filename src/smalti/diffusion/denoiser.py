"""A denoiser joins a network with a process: (x, t, condition) -> x0 estimate. Solvers and guidance see only it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.diffusion.prediction import x0_from_output
from smalti.diffusion.processes import Process
from smalti.types import Backbone, Condition


@dataclass(frozen=True)
class NetworkDenoiser:
    """x0 estimates from a network that predicts prediction_type under process.

    A network with twice the input's channels (learned sigma) is read in its first half.
    """

    backbone: Backbone
    process: Process
    prediction_type: str

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x [batch, channels, ...] at t [batch] in [0, 1] -> x0 estimate of the shape and dtype of x."""
        t64 = t.to(torch.float64) if t.device.type != "mps" else t
        output = self.backbone(x, self.process.network_time(t64).to(x.dtype), cond)
        return x0_from_output(self.prediction_type, self.process, t64, x, output[:, : x.shape[1]])
