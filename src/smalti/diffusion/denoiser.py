"""A denoiser joins a network with a process: (x, t, condition) -> x0 estimate. Solvers and guidance see only it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from smalti.diffusion.prediction import input_scale, per_sample, x0_from_output
from smalti.diffusion.process import Process
from smalti.errors import UserError
from smalti.rng import widest_float
from smalti.types import Backbone, Condition, Denoiser


@runtime_checkable
class VarianceDenoiser(Protocol):
    """A denoiser that can also say what its network has learned of the step's variance."""

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """As of any denoiser."""
        ...

    def with_variance(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        """x0 estimate and variance logits, both of the shape of x."""
        ...


def x0_and_variance(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Condition | None) -> tuple[Tensor, Tensor]:
    """The x0 estimate and the variance logits, both of the shape of x. Raises UserError where the denoiser has none."""
    if not isinstance(denoiser, VarianceDenoiser):
        raise UserError(
            f"denoiser {type(denoiser).__name__} has no with_variance: a learned variance needs a network that has it"
        )
    return denoiser.with_variance(x, t, cond)


@dataclass(frozen=True)
class MaskedDenoiser:
    """The estimate of a masked model: logits of all tokens, in place of an x0."""

    backbone: Backbone
    process: Process

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x int64 [batch, height, width] with masked tokens -> logits [batch, codebook, height, width]."""
        return self.backbone(x, self.process.network_time(t).float(), cond)


@dataclass(frozen=True)
class NetworkDenoiser:
    """x0 estimates from a network that predicts prediction_type under process.

    A network with twice the input's channels (learned sigma) is read in its first half. Where alpha = 0 an eps network
    gives no x0 (inf or nan): prediction.usable_at_pure_noise says so beforehand.
    """

    backbone: Backbone
    process: Process
    prediction_type: str

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x [batch, channels, ...] at t [batch] in [0, 1] -> x0 estimate of the shape and dtype of x."""
        x0, _ = self._estimate(x, t, cond)
        return x0

    def with_variance(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        """x0 estimate and the network's variance logits, both of the shape of x. Source: Nichol and Dhariwal 2021, 3.1.

        Raises UserError for a network whose output has no second half.
        """
        x0, rest = self._estimate(x, t, cond)
        if rest.shape != x.shape:
            raise UserError(
                f"the network's output has {x.shape[1] + rest.shape[1]} channels for {x.shape[1]} of input: "
                f"a learned variance needs {2 * x.shape[1]} (model.learn_sigma)"
            )
        return x0, rest

    def _estimate(self, x: Tensor, t: Tensor, cond: Condition | None) -> tuple[Tensor, Tensor]:
        """x0, and what the output has beyond the input's channels."""
        t = t.to(widest_float(t.device))
        scaled = x * per_sample(input_scale(self.prediction_type, self.process, t), x)
        output = self.backbone(scaled, self.process.network_time(t).to(x.dtype), cond)
        channels = x.shape[1]
        return x0_from_output(self.prediction_type, self.process, t, x, output[:, :channels]), output[:, channels:]
