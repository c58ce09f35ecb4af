"""A network trained under one process, sampled under another: at equal SNR both see the same picture up to a scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.diffusion.denoiser import x0_and_variance
from smalti.diffusion.prediction import per_sample
from smalti.diffusion.process import Process
from smalti.types import Condition, Denoiser


@dataclass(frozen=True)
class SwitchedDenoiser:
    """A denoiser for the process `sampled` from one made for the process `trained`.

    Asked at (x, t), it asks the inner one at the t' of equal lambda, held within the trained span, with x scaled to the
    trained process's size. Source: Karras et al. 2022, appendix C.3; Kingma et al. 2021, section 5.1.
    """

    denoiser: Denoiser
    trained: Process
    sampled: Process

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x [batch, ...] at t [batch] of `sampled` -> x0 estimate of the shape and dtype of x."""
        return self.denoiser(*self._switch(x, t), cond)

    def with_variance(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        """x0 estimate and variance logits of the inner denoiser; UserError where it has none."""
        return x0_and_variance(self.denoiser, *self._switch(x, t), cond)

    def _switch(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x and t as the trained process has them."""
        matched = self.trained.t_of_log_snr(self.sampled.log_snr(t)).clamp(self.trained.t_min, self.trained.t_max)
        size_now = torch.hypot(self.sampled.alpha(t), self.sampled.sigma(t))
        size_then = torch.hypot(self.trained.alpha(matched), self.trained.sigma(matched))
        return x * per_sample(size_then / size_now, x), matched
