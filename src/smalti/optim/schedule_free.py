"""Schedule-free AdamW: a learning rate that never decays, and an average of the weights in the decay's place."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smalti.errors import UserError


@dataclass(frozen=True)
class ScheduleFreeConfig:
    """Schedule-free AdamW on every parameter (Defazio et al. 2024, "The Road Less Scheduled").

    The averaged weights are the optimiser's own (ema=by_optimizer), and the schedule warms up only (decay=none).
    beta1: the share of the average in the weights that gradients are taken at.
    """

    kind: ClassVar[str] = "schedule_free"
    learning_rate: float = 2.5e-3
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"optimizer.learning_rate={self.learning_rate} must be above 0")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must lie in (0, 1)")


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """AdamW on weights z, their average x, and gradients at y = (1 - beta1) z + beta1 x.

    The parameters hold y. The averages hold x: they begin equal to the parameters, in the same order, and are written
    in place at each step, so that they can be another network's weights. z and the mean squared gradient v are the
    optimiser's state, which thus is AdamW's in size. A group's lr is the rate of its next step, warm-up included; a
    step's z counts in the average by the square of its rate. Source: Defazio et al. 2024 (arXiv 2405.15682),
    algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        averages: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        params = [p for group in self.param_groups for p in group["params"]]
        self._averages = dict(zip(params, averages, strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of z, x and y; every parameter must have a gradient."""
        for group in self.param_groups:
            params, (beta1, beta2) = group["params"], group["betas"]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "z": p.clone(),
                        "v": torch.zeros_like(p),
                        "step": torch.tensor(0.0, dtype=torch.float64),
                        "squared_rates": torch.tensor(0.0, dtype=torch.float64),  # summed over the steps so far
                    }
            grads, x = [p.grad for p in params], [self._averages[p] for p in params]
            z, v = ([self.state[p][name] for p in params] for name in ("z", "v"))
            # Lines 6 to 11 of algorithm 1. Its y_t is what params hold until the last two lines.
            step = float(self.state[params[0]]["step"]) + 1
            rate = group["lr"] * (1 - beta2**step) ** 0.5
            squared_rates = float(self.state[params[0]]["squared_rates"]) + rate**2
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            scales = torch._foreach_sqrt(v)
            torch._foreach_add_(scales, group["eps"])
            if group["weight_decay"]:
                torch._foreach_add_(z, params, alpha=-rate * group["weight_decay"])
            torch._foreach_addcdiv_(z, grads, scales, value=-rate)
            torch._foreach_lerp_(x, z, rate**2 / squared_rates)
            torch._foreach_copy_(params, z)
            torch._foreach_lerp_(params, x, beta1)
            for p in params:
                self.state[p]["step"].fill_(step)
                self.state[p]["squared_rates"].fill_(squared_rates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round the sum of squared rates to the parameters' type."""
        super().load_state_dict(state_dict)
        numbered = enumerate(p for group in self.param_groups for p in group["params"])
        for number, p in numbered:
            if p in self.state:
                self.state[p]["squared_rates"] = state_dict["state"][number]["squared_rates"].clone().cpu()
