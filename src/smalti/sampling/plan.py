"""A solver is a table: the Plan, the drafting board that writes one, and the loop that runs any.

Registers of one trajectory: x (where the network is evaluated next), then whatever the solver keeps: "anchor" (where
the current step began), "h1", "h2" (earlier estimates). One network call estimates x0 at (x, t_k), draws fresh noise z
where the row asks for it, and replaces the registers by linear combinations:

    [x, ...registers]  <-  matrix_k [x, ...registers, x0, z]

So a plan can be printed, plotted, cached and tested against exact truth, and its state is local: concurrent calls
are safe, and trajectories with different plans can share one forward pass.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smalti import rng
from smalti.diffusion.processes import Process
from smalti.types import Condition, Denoiser, UserError

Row = NDArray[np.float64]  # one linear combination of [registers..., x0, z]


@dataclass(frozen=True)
class Plan:
    """A solver's table for one process and one time grid.

    times [calls]: where the network is evaluated. matrices [calls, registers, registers + 2]: float64.
    next_times [calls]: the t that x stands at after the call (its noise level, for previews and for `explain`).
    orders [calls]: the order of the update that the call completes or begins.
    """

    solver: str
    process: Process
    registers: tuple[str, ...]
    times: NDArray[np.float64]
    next_times: NDArray[np.float64]
    matrices: NDArray[np.float64]
    orders: tuple[int, ...]

    @property
    def num_calls(self) -> int:
        """Network calls that running the plan costs."""
        return len(self.times)

    @property
    def uses_noise(self) -> bool:
        """Whether any row draws fresh noise."""
        return bool(np.any(self.matrices[:, :, -1]))


@dataclass
class PlanDraft:
    """A plan in the making: solvers write their formulas as arithmetic on the symbols x, x0, z and the registers."""

    solver: str
    process: Process
    registers: tuple[str, ...] = ("x",)
    _times: list[float] = field(default_factory=list)
    _next_times: list[float] = field(default_factory=list)
    _matrices: list[Row] = field(default_factory=list)
    _orders: list[int] = field(default_factory=list)

    def symbol(self, name: str) -> Row:
        """A register, "x0" (the estimate of this call) or "z" (its fresh noise), as a unit row."""
        row = np.zeros(len(self.registers) + 2)
        row[[*self.registers, "x0", "z"].index(name)] = 1.0
        return row

    def symbols(self, *names: str) -> list[Row]:
        """Several symbols at once."""
        return [self.symbol(name) for name in names]

    def call(self, t: float, next_t: float, order: int, **rows: Row) -> None:
        """One network call at t; rows name the registers it replaces, the others stay as they are."""
        matrix = np.stack([rows.pop(name) if name in rows else self.symbol(name) for name in self.registers])
        assert not rows, f"{self.solver} writes registers it does not have: {sorted(rows)}"
        assert np.isfinite(matrix).all(), f"{self.solver} has a coefficient that is not finite at t={t}"
        self._times.append(t)
        self._next_times.append(next_t)
        self._matrices.append(matrix)
        self._orders.append(order)

    def finish(self) -> Plan:
        """The plan as drafted."""
        return Plan(
            self.solver,
            self.process,
            self.registers,
            np.array(self._times),
            np.array(self._next_times),
            np.stack(self._matrices),
            tuple(self._orders),
        )


def combine(row: Row, sources: list[Tensor | None]) -> Tensor | None:
    """The linear combination of sources that row names; a unit row gives its source itself, without a copy."""
    (used,) = np.nonzero(row)
    total: Tensor | None = None
    for column in used:
        source, coefficient = sources[column], float(row[column])
        assert source is not None, "a plan reads a register that it has not written"
        if len(used) == 1 and coefficient == 1.0:
            return source
        total = source * coefficient if total is None else total.add_(source, alpha=coefficient)
    if total is None:
        x = sources[0]
        assert x is not None
        return torch.zeros_like(x)
    return total


def fresh_noise(x: Tensor, seeds: Tensor, call: int) -> Tensor:
    """The noise z of one network call for each row of x, addressed by the row's seed and the call's number."""
    return rng.normal(
        tuple(x.shape[1:]), seed=seeds, purpose="sampling/step", call=call, device=x.device, dtype=x.dtype
    )


def run_plan(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    cond: Condition | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Run a plan from x [batch, ...] at the plan's first time; returns x at its last, in the dtype of x.

    denoiser(x, t, cond) gives the x0 estimate for t float64 [batch] in [0, 1]. seeds: int64 [batch], one a
    trajectory (0 .. batch - 1 by default); only plans that draw noise read them. Raises UserError on a wrong seeds
    shape.
    """
    batch = x.shape[0]
    if seeds is None:
        seeds = torch.arange(batch, device=x.device)
    if seeds.shape != (batch,):
        raise UserError(f"seeds has shape {tuple(seeds.shape)}, one seed a sample is needed: ({batch},)")
    registers: list[Tensor | None] = [x, *[None] * (len(plan.registers) - 1)]
    time_dtype = torch.float32 if x.device.type == "mps" else torch.float64
    for call, (t, matrix) in enumerate(zip(plan.times, plan.matrices, strict=True)):
        current = registers[0]
        assert current is not None
        t_batch = torch.full((batch,), float(t), dtype=time_dtype, device=x.device)
        x0 = denoiser(current, t_batch, cond)
        noise = fresh_noise(current, seeds, call) if matrix[:, -1].any() else None
        sources = [*registers, x0, noise]
        # A register that keeps itself may still be unwritten, so it is passed on rather than combined.
        keeps = [row[i] == 1.0 and np.count_nonzero(row) == 1 for i, row in enumerate(matrix)]
        registers = [
            registers[i] if keep else combine(row, sources)
            for i, (keep, row) in enumerate(zip(keeps, matrix, strict=True))
        ]
    assert registers[0] is not None
    return registers[0]
