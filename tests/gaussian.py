"""Exact truth for samplers: a Gaussian's and a Gaussian mixture's posterior mean, and the ODE's exact end point."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti import rng
from smalti.diffusion import Process


@dataclass(frozen=True)
class GaussianDenoiser:
    """E[x0 | x_t] for x0 ~ N(mean, diag(variance)); mean, variance: float64 [dimensions]."""

    process: Process
    mean: Tensor
    variance: Tensor

    def __call__(self, x, t, cond=None):
        alpha, sigma = self.process.alpha(t)[:, None], self.process.sigma(t)[:, None]
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def exact_flow(self, x: Tensor, t_start: float, t_end: float) -> Tensor:
        """Where the probability-flow ODE carries x: the standardised deviation is kept."""
        ends = torch.tensor([t_start, t_end], dtype=torch.float64)
        alpha, sigma = self.process.alpha(ends), self.process.sigma(ends)
        spread = torch.sqrt(alpha[:, None] ** 2 * self.variance + sigma[:, None] ** 2)
        return alpha[1] * self.mean + spread[1] / spread[0] * (x - alpha[0] * self.mean)


@dataclass(frozen=True)
class MixtureDenoiser:
    """E[x0 | x_t] for an equal mixture of isotropic Gaussians; means [components, dimensions]."""

    process: Process
    means: Tensor
    std: float

    def __call__(self, x, t, cond=None):
        alpha, sigma = self.process.alpha(t)[:, None], self.process.sigma(t)[:, None]
        total = alpha**2 * self.std**2 + sigma**2
        # |x|^2 is the same for all components and falls out of the softmax.
        logits = alpha * (x @ self.means.T - alpha * self.means.square().sum(1) / 2) / total
        gain = alpha * self.std**2 / total
        return gain * x + (1 - gain * alpha) * (torch.softmax(logits, dim=1) @ self.means)

    def sample(self, t: float, seeds: Tensor) -> Tensor:
        """Exact samples of x_t, [len(seeds), dimensions]."""
        t_row = torch.tensor([t], dtype=torch.float64)
        alpha, sigma = self.process.alpha(t_row), self.process.sigma(t_row)
        u = rng.uniform(seed=seeds, purpose="test/component").reshape(-1)
        noise = rng.normal(self.means.shape[1:], seed=seeds, purpose="test/sample", dtype=torch.float64)
        spread = torch.sqrt(alpha**2 * self.std**2 + sigma**2)
        return alpha * self.means[(u * len(self.means)).long()] + spread * noise

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_t."""
        t_row = torch.tensor([t], dtype=torch.float64)
        alpha, sigma = self.process.alpha(t_row), self.process.sigma(t_row)
        gaps = alpha * (self.means - self.means.mean(0))
        isotropic = (alpha**2 * self.std**2 + sigma**2) * torch.eye(self.means.shape[1], dtype=torch.float64)
        return alpha * self.means.mean(0), gaps.T @ gaps / len(self.means) + isotropic
