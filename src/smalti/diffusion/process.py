"""The contract of a process: what noise means. x_t = alpha(t) x0 + sigma(t) eps, t = 0 is data, t = 1 is noise.

A process owns alpha, sigma, their derivatives, the half-log-SNR lambda = ln(alpha / sigma) with its inverse, and the
one map from t to the time that a network is fed. Everything takes and gives tensors of any shape; the tables of solvers
are computed from them in float64.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Process(ABC):
    """A noise process with alpha(0) = 1, sigma(0) = 0 (or nearly), and lambda falling in t."""

    discrete: ClassVar[bool] = False  # a table of steps: the path between them has no derivative to follow

    name: str
    t_min: float  # a network is trained on [t_min, t_max]; lambda is finite there, but at the t_max of zero-SNR tables
    t_max: float
    sigma_data: float = 0.5  # standard deviation of the data, which the "edm" prediction and weighting read

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at t in [0, 1]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at t in [0, 1]."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / d t."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / d t."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What the network is fed for t."""

    @abstractmethod
    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t in [0, 1] at which lambda = log_snr; the nearest end for one that the process does not reach."""

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = ln(alpha / sigma), the half-log-SNR of DPM-Solver; infinite where sigma or alpha is 0."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))
