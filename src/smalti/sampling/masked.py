"""Decoding of masked tokens: predict all that are hidden, keep the most confident, hide the rest again, repeat.

A plan says how many tokens are hidden after each network call and how much chance there is in it; trajectories hold the
grids. Both have the face of a solver's (sampling/plan.py), so the same loop and the same server run them. In place of
an x0 estimate the network gives logits [batch, codebook, height, width], which guidance acts on as on any estimate.
Sources: MaskGIT (Chang et al. 2022), section 3.2; aMUSEd (Patil et al. 2024), whose scheduler's steps these are.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smalti import rng
from smalti.diffusion.masking import Masking, mask_tokens, masked_count
from smalti.errors import UserError, unknown_name
from smalti.types import MASKED

MASKED_SOLVER = "masked"  # what configs, requests and cards call this decoding
_OPTIONS = ("t_start", "temperature", "choice_temperature")


@dataclass(frozen=True, eq=False)
class MaskedPlan:
    """How many tokens each network call leaves hidden. Compared by identity, as every plan.

    times [calls]: t before each call, evenly from t_start on; next_times [calls]: after it, down to 0, where no token
    is hidden. temperature: of the draws from softmax(logits / temperature); 0 takes the likeliest. choice_temperatures
    [calls]: of the Gumbel noise on the confidence by which tokens are kept.
    """

    process: Masking
    times: NDArray[np.float64]
    next_times: NDArray[np.float64]
    temperature: float
    choice_temperatures: NDArray[np.float64]
    solver: str = MASKED_SOLVER
    noise_log_ratio: None = None  # no learned variance

    @property
    def num_calls(self) -> int:
        """Network calls."""
        return len(self.times)

    @property
    def registers(self) -> tuple[str, ...]:
        """What a trajectory holds: the tokens."""
        return ("x",)

    @cached_property
    def masked_shares(self) -> Tensor:
        """Share of all tokens that is hidden after each call, float32 [calls]."""
        next_times = torch.from_numpy(self.next_times)
        return (
            cosine_shares(next_times)
            if self.process.name == "masked_cosine"
            else self.process.sigma(next_times).float()
        )


def cosine_shares(times: Tensor) -> Tensor:
    """Share that masked_cosine hides at times float64 [...], in float32 and rounded as aMUSEd's scheduler does it.

    cos(pi / 3) then is below 1/2, and of an even number of tokens one less is hidden.
    """
    return torch.cos((1 - times).float() * math.pi / 2).clamp(min=0)


def masked_plan(
    process: Masking,
    num_inference_steps: int,
    *,
    t_start: float = 1.0,
    temperature: float = 1.0,
    choice_temperature: float = 2.0,
) -> MaskedPlan:
    """The plan of a number of network calls from t_start on. Raises UserError naming what is out of range.

    choice_temperature: at the first call, falling linearly to 0; more of it gives more variety and more errors. 2 is
    aMUSEd's, 4.5 MaskGIT's.
    """
    options = {"t_start": t_start, "temperature": temperature, "choice_temperature": choice_temperature}
    for name, number in options.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UserError(f"{name}={number!r} must be a number")
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps={num_inference_steps} must be at least 1")
    if not 0.0 < t_start <= 1.0:
        raise UserError(f"t_start={t_start} must lie in (0, 1]")
    for name, value in (("temperature", temperature), ("choice_temperature", choice_temperature)):
        if not 0.0 <= value < float("inf"):
            raise UserError(f"{name}={value} must be at least 0 and finite")
    times = t_start * (1 - np.arange(num_inference_steps + 1) / num_inference_steps)
    falling = np.linspace(choice_temperature, 0.0, num_inference_steps)
    return MaskedPlan(process, times[:-1], times[1:], temperature, falling)


def check_masked_options(names: Iterable[str]) -> None:
    """Raise UserError for an option that masked_plan does not take."""
    for name in names:
        if name not in _OPTIONS:
            raise unknown_name(f"option of solver {MASKED_SOLVER!r}", name, _OPTIONS)


def draw_tokens(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """A token a place from softmax(logits / temperature), by the inverse distribution function; the likeliest at 0.

    logits [batch, codebook, height, width]; u in (0, 1) [batch, height, width]. Returns int64 of the shape of u.
    """
    if temperature == 0.0:
        return logits.argmax(dim=1)
    shares = torch.softmax(logits.movedim(1, -1).double() / temperature, dim=-1).cumsum(dim=-1)
    # Rounding may leave the last sum below u.
    reached = torch.searchsorted(shares, (u.double() * shares[..., -1])[..., None]).squeeze(-1)
    return reached.clamp(max=logits.shape[1] - 1)


def hide_least_confident(
    x: Tensor, tokens: Tensor, log_probabilities: Tensor, noise: Tensor, num_hidden: Tensor
) -> Tensor:
    """`tokens` with the least confident of those that were hidden in x hidden again.

    x, tokens: int64 [batch, height, width]; tokens agrees with x where x is not MASKED. log_probabilities, noise: of
    their shape; their sum is the confidence. num_hidden: int64 [batch], held between 1 and one less than x hides: each
    call reveals a token and leaves one to the next. Source: MaskGIT, section 3.2, step 4; aMUSEd's scheduler.
    """
    hidden = (x == MASKED).flatten(1)
    most = (hidden.sum(dim=1) - 1).clamp(min=0)
    count = torch.minimum(num_hidden.clamp(min=1), most)
    confidence = torch.where(hidden, (log_probabilities + noise).flatten(1), torch.inf)
    return mask_tokens(tokens, count, confidence.view_as(log_probabilities))


def gumbel(u: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers in (0, 1)."""
    return -torch.log(-torch.log(u))


@dataclass
class MaskedTrajectories:
    """Rows of a batch that go through one masked plan together; the face of plan.Trajectories.

    rows: int64 [group], their places in the batch. seeds: int64 [group]. x: int64 [group, height, width].
    """

    plan: MaskedPlan
    rows: Tensor
    seeds: Tensor
    x: Tensor
    call: int = 0

    @property
    def done(self) -> bool:
        """Whether every call is behind them."""
        return self.call == self.plan.num_calls

    @property
    def t(self) -> Tensor:
        """The plan's time of the next call, once a row: [group]."""
        device = self.x.device
        value = float(self.plan.times[self.call])
        return torch.full((len(self.x),), value, dtype=rng.widest_float(device), device=device)

    def registers(self) -> list[Tensor | None]:
        """The tokens [group, height, width]."""
        return [self.x]

    def go_on_from(self, call: int, registers: Sequence[Tensor | None]) -> None:
        """Take the place that another object of the same plan and rows was at: what its `registers` gave at `call`."""
        assert 0 <= call <= self.plan.num_calls
        (x,) = registers
        assert x is not None
        self.x, self.call = x, call

    def _uniform(self, purpose: str) -> Tensor:
        shape, device = tuple(self.x.shape[1:]), self.x.device
        return rng.uniform(shape, seed=self.seeds, purpose=purpose, call=self.call, device=device)

    def advance(self, logits: Tensor, variance_logits: Tensor | None = None) -> Tensor:
        """Take the logits [group, codebook, height, width] of x and go on to the next call; the whole grids drawn."""
        assert variance_logits is None
        plan = self.plan
        drawn = draw_tokens(logits, self._uniform("sampling/token"), plan.temperature)
        tokens = torch.where(self.x == MASKED, drawn, self.x)
        if self.call + 1 == plan.num_calls:
            self.x = tokens
        else:
            log_probabilities = logits.double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
            noise = float(plan.choice_temperatures[self.call]) * gumbel(self._uniform("sampling/choice"))
            share = plan.masked_shares[self.call].to(self.x.device)
            num_hidden = (share * self.x[0].numel()).floor().long().expand(len(self.x))
            self.x = hide_least_confident(self.x, tokens, log_probabilities, noise, num_hidden)
        self.call += 1
        return tokens


def begin_at(plan: MaskedPlan, tokens: Tensor, seeds: Tensor, keep: Tensor | None = None) -> Tensor:
    """Where image-to-image and inpainting begin: tokens [batch, height, width] with the share of plan's start hidden.

    keep: bool, broadcasting against tokens, True where a token stays as it is to the end; what may change is hidden in
    the same share, by seeds [batch]. A row of which nothing may change is a picture already: it stays whole.
    """
    u = rng.uniform(tuple(tokens.shape[1:]), seed=seeds, purpose="sampling/start", device=tokens.device)
    free = torch.ones_like(tokens, dtype=torch.bool) if keep is None else ~keep.expand_as(tokens)
    rate = plan.process.sigma(torch.tensor(float(plan.times[0]), dtype=torch.float64))
    counts = torch.stack([masked_count(rate, max(1, int(row.sum()))) if row.any() else row.sum() for row in free])
    return mask_tokens(tokens, counts.to(tokens.device), torch.where(free, u, torch.inf))
