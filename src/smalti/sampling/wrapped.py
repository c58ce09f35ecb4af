"""What guidance, thresholding and inpainting share: a denoiser around a denoiser, with or without variance logits."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from smalti.diffusion.denoiser import x0_and_variance
from smalti.types import Condition, Denoiser

Estimate = tuple[Tensor, Tensor | None]  # x0 and, where asked for, the variance logits of a learned sigma
Estimator = Callable[[Denoiser, Tensor, Tensor, Condition | None], Estimate]


def x0_alone(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
    """The x0 estimate, no variance logits."""
    return denoiser(x, t, cond), None


class WrappedDenoiser(ABC):
    """A denoiser made of denoisers. A subclass says once, in `estimate`, what becomes of their estimates."""

    @abstractmethod
    def estimate(self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
        """The estimate at x [batch, ...], t [batch]; inner asks a wrapped denoiser and may bring variance logits."""

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x [batch, ...], t float64 [batch] in [0, 1] -> x0 estimate of the shape of x."""
        return self.estimate(x0_alone, x, t, cond)[0]

    def with_variance(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        """(x0 estimate, variance logits) of the conditional rows. Raises UserError where the network has no logits."""
        x0, logits = self.estimate(x0_and_variance, x, t, cond)
        assert logits is not None, f"{type(self).__name__} lost the variance logits"
        return x0, logits
