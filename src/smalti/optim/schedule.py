"""Learning-rate schedules as functions of progress, so that a budget in minutes works as well as one in steps."""

import math
from dataclasses import dataclass, field
from typing import Literal

from smalti.errors import UserError

_ONLY_IF_DECAYING = {"only_if": ("decay", ("linear", "cosine", "sqrt"))}


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over steps, then constant, then a decay over the last share of the run.

    With decay_share below 1 this is WSD (warm-up, stable, decay); decay="sqrt" falls as 1 - sqrt(share of the decay),
    which Hägele et al. 2024 ("Scaling laws and compute-optimal training beyond fixed training durations") found
    the best shape for it, over the last 10 to 20 % of a run. decay="cosine" with decay_share=1 is the cosine
    schedule (Loshchilov and Hutter 2017, without restarts).
    """

    warmup_steps: int = 50
    decay: Literal["none", "linear", "cosine", "sqrt"] = "linear"
    decay_share: float = field(default=0.5, metadata=_ONLY_IF_DECAYING)  # of the run, at its end
    final_factor: float = field(default=0.0, metadata=_ONLY_IF_DECAYING)  # of the learning rate, at the very end

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps={self.warmup_steps} must not be negative")
        if not 0 < self.decay_share <= 1:
            raise UserError(f"schedule.decay_share={self.decay_share} must lie in (0, 1]")
        if not 0 <= self.final_factor <= 1:
            raise UserError(f"schedule.final_factor={self.final_factor} must lie in [0, 1]")


def learning_rate_factor(schedule: Schedule, step: int, progress: float) -> float:
    """Factor on the learning rate for the update after step (0, 1, ...), progress in [0, 1] of the budget."""
    warmup = min(1.0, (step + 1) / (schedule.warmup_steps + 1))
    if schedule.decay == "none":
        return warmup
    into_decay = min(1.0, max(0.0, (progress - (1 - schedule.decay_share)) / schedule.decay_share))
    if schedule.decay == "linear":
        falling = 1 - into_decay
    elif schedule.decay == "sqrt":
        falling = 1 - math.sqrt(into_decay)
    else:
        falling = 0.5 * (1 + math.cos(math.pi * into_decay))
    return warmup * (schedule.final_factor + (1 - schedule.final_factor) * falling)
