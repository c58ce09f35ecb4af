"""A solver is a table: the Plan, the drafting board that writes one, and the loop that runs any.

Registers of one trajectory: x (where the network is evaluated next), then whatever the solver keeps: "anchor" (where
the current step began), "h1", "h2" (earlier estimates). One network call estimates x0 at (x, t_k), draws fresh noise z
where the row asks for it, and replaces the registers by linear combinations:

    [x, ...registers]  <-  matrix_k [x, ...registers, x0, z]

A plan may be affine: a method with per-element statistics adds constants of its own to a register (Plan.offsets).
So a plan can be printed, plotted, cached and tested against exact truth, and its state is local: concurrent calls
are safe, and trajectories with different plans can share one forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smalti import rng
from smalti.diffusion.denoiser import x0_and_variance
from smalti.diffusion.processes import Process
from smalti.errors import UserError
from smalti.sampling.masked import MaskedPlan, MaskedTrajectories
from smalti.sampling.wrapped import Estimator, x0_alone
from smalti.types import Condition, Denoiser

Row = NDArray[np.float64]  # one linear combination of [registers..., x0, z]
Terms = tuple[tuple[int, float | Tensor], ...]  # the same, sparse: (column, coefficient)
Update = int | Terms  # what a register becomes: a column as it is (its own, where it is kept), or a combination
AffineRow = Tensor  # per element: float64 [len(columns) + 1, *sample shape], the last entry is a constant


@dataclass(frozen=True, eq=False)
class Plan:
    """A solver's table for one process and one time grid. Compared by identity.

    times [calls]: where the network is evaluated. matrices [calls, registers, registers + 2]: float64.
    next_times [calls]: the t that x stands at after the call (its noise level, for previews and for `explain`).
    orders [calls]: the order of the update that the call completes or begins.
    start_row: (weight of x, weight of z) applied to the start before the first call, for methods that add noise there.
    noise_log_ratio [calls]: ln(largest / smallest variance) of the noise; when set, the denoiser's variance logits say
    per element where between the two the variance lies (Nichol and Dhariwal 2021, eq. 15), and z's column holds the
    smallest. elements: (call, row, column) -> tensor of one sample's shape that is added to that entry, for methods
    whose coefficients differ per element (DPM-Solver-v3). offsets: (call, row) -> tensor of one sample's shape that is
    added to that register after the combination, for methods that are affine and not linear in the registers.
    """

    solver: str
    process: Process
    registers: tuple[str, ...]
    times: NDArray[np.float64]
    next_times: NDArray[np.float64]
    matrices: NDArray[np.float64]
    orders: tuple[int, ...]
    start_row: tuple[float, float] | None = None
    noise_log_ratio: NDArray[np.float64] | None = None
    elements: Mapping[tuple[int, int, int], Tensor] = field(default_factory=dict)
    offsets: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def num_calls(self) -> int:
        """Network calls that running the plan costs."""
        return len(self.times)

    @property
    def uses_noise(self) -> bool:
        """Whether the plan draws fresh noise."""
        return bool(np.any(self.matrices[:, :, -1])) or (self.start_row is not None and self.start_row[1] != 0.0)

    @cached_property
    def draws_noise(self) -> tuple[bool, ...]:
        """For each call whether any of its rows reads fresh noise."""
        return tuple(bool(drawn) for drawn in np.any(self.matrices[:, :, -1], axis=1))

    @cached_property
    def updates(self) -> tuple[tuple[Update, ...], ...]:
        """matrices and elements, sparse: for each call what each register becomes."""
        columns = len(self.registers) + 2
        table: list[tuple[Update, ...]] = []
        for call, matrix in enumerate(self.matrices.tolist()):
            rows: list[Update] = []
            for i, row in enumerate(matrix):
                entries: list[tuple[int, float | Tensor]] = []
                for column in range(columns):
                    element = self.elements.get((call, i, column))
                    if element is not None:
                        entries.append((column, element + row[column]))
                    elif row[column] != 0.0:
                        entries.append((column, row[column]))
                moved = len(entries) == 1 and not isinstance(entries[0][1], Tensor) and entries[0][1] == 1.0
                rows.append(entries[0][0] if moved else tuple(entries))
            table.append(tuple(rows))
        return tuple(table)


@dataclass
class PlanDraft:
    """A plan in the making: solvers write their formulas as arithmetic on the symbols x, x0, z and the registers."""

    solver: str
    process: Process
    registers: tuple[str, ...] = ("x",)
    start_row: tuple[float, float] | None = None
    _times: list[float] = field(default_factory=list)
    _next_times: list[float] = field(default_factory=list)
    _matrices: list[Row] = field(default_factory=list)
    _orders: list[int] = field(default_factory=list)
    _noise_log_ratios: list[float] = field(default_factory=list)
    _elements: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    _offsets: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """What a row combines: the registers, the estimate and the noise."""
        return [*self.registers, "x0", "z"]

    def symbol(self, name: str) -> Row:
        """A register, "x0" (the estimate of this call) or "z" (its fresh noise), as a unit row."""
        row = np.zeros(len(self.columns))
        row[self.columns.index(name)] = 1.0
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

    def learn_noise(self, log_ratio: float) -> None:
        """The last call's noise varies per element within ln(largest / smallest variance) = log_ratio."""
        self._noise_log_ratios.append(log_ratio)

    def add_element(self, register: str, symbol: str, coefficient: Tensor) -> None:
        """Add a coefficient of one sample's shape to the last call's weight of symbol in register."""
        assert symbol != "z", "noise has one weight for all elements"
        place = (len(self._times) - 1, self.registers.index(register), self.columns.index(symbol))
        self._elements[place] = coefficient

    def affine_symbol(self, name: str, shape: tuple[int, ...]) -> AffineRow:
        """A symbol as a row whose coefficients are tensors of one sample's shape, with a constant behind them."""
        row = torch.zeros(len(self.columns) + 1, *shape, dtype=torch.float64)
        row[self.columns.index(name)] = 1.0
        return row

    def affine_call(self, t: float, next_t: float, order: int, rows: Mapping[str, AffineRow]) -> None:
        """A call of affine rows: the matrix holds each coefficient's mean, elements what an element differs by."""
        means = {name: row[:-1].reshape(len(row) - 1, -1).mean(1) for name, row in rows.items()}
        self.call(t, next_t, order, **{name: mean.numpy() for name, mean in means.items()})
        for name, row in rows.items():
            for column, coefficient, mean in zip(self.columns, row[:-1], means[name], strict=True):
                if coefficient.ndim and bool((coefficient != mean).any()):
                    self.add_element(name, column, coefficient - mean)
            if bool(row[-1].any()):
                self._offsets[len(self._times) - 1, self.registers.index(name)] = row[-1]

    def finish(self) -> Plan:
        """The plan as drafted."""
        ratios = self._noise_log_ratios
        assert len(ratios) in (0, len(self._times)), "noise is learned in all calls or in none"
        return Plan(
            self.solver,
            self.process,
            self.registers,
            np.array(self._times),
            np.array(self._next_times),
            np.stack(self._matrices),
            tuple(self._orders),
            self.start_row,
            np.array(ratios) if ratios else None,
            self._elements,
            self._offsets,
        )


def _combination(terms: Terms, sources: Sequence[Tensor | None]) -> Tensor:
    """The linear combination of sources that terms name, in a tensor of its own."""
    total: Tensor | None = None
    for column, coefficient in terms:
        source = sources[column]
        assert source is not None, "a plan reads a register that it has not written"
        if isinstance(coefficient, Tensor):
            coefficient = coefficient.to(source)
            total = source * coefficient if total is None else total.addcmul_(source, coefficient)
        else:
            total = source.mul(coefficient) if total is None else total.add_(source, alpha=coefficient)
    if total is None:
        assert sources[0] is not None
        return torch.zeros_like(sources[0])
    return total


@dataclass
class Trajectories:
    """Rows of a batch that go through one plan together: their registers, and how many calls are behind them.

    rows: int64 [group], their places in the batch. seeds: int64 [group]. x [group, ...]: the start, then the state.
    """

    plan: Plan
    rows: Tensor
    seeds: Tensor
    x: Tensor
    call: int = 0

    def __post_init__(self) -> None:
        self._kept: list[Tensor | None] = [None] * (len(self.plan.registers) - 1)
        device, times = self.x.device, self.plan.times[:, None].repeat(len(self.x), axis=1)
        self._times_of_rows = torch.tensor(times, dtype=rng.widest_float(device), device=device).unbind()
        if self.plan.start_row is not None:
            weight_x, weight_z = self.plan.start_row
            # Its own purpose: the addresses of "sampling/step" begin with the first call.
            self.x = weight_x * self.x + weight_z * self._noise("sampling/churn", 0)

    @property
    def done(self) -> bool:
        """Whether every call is behind them."""
        return self.call == self.plan.num_calls

    @property
    def t(self) -> Tensor:
        """Where the network is evaluated next, once a row: [group], in the widest float of the device."""
        return self._times_of_rows[self.call]

    def registers(self) -> list[Tensor | None]:
        """x and what else the plan keeps, each [group, ...]; None where nothing was written yet."""
        return [self.x, *self._kept]

    def go_on_from(self, call: int, registers: Sequence[Tensor | None]) -> None:
        """Take the place that another object of the same plan and rows was at: what its `registers` gave at `call`."""
        assert 0 <= call <= self.plan.num_calls
        assert len(registers) == len(self.plan.registers)
        x, *self._kept = registers
        assert x is not None
        self.x, self.call = x, call

    def _noise(self, purpose: str, call: int) -> Tensor:
        """Fresh noise, addressed by each row's seed and the call's number."""
        shape, device, dtype = tuple(self.x.shape[1:]), self.x.device, self.x.dtype
        return rng.normal(shape, seed=self.seeds, purpose=purpose, call=call, device=device, dtype=dtype)

    def advance(self, x0: Tensor, variance_logits: Tensor | None = None) -> Tensor:
        """Take the estimate at (x, t), of the shape of x, and go on to the next call; gives the estimate back."""
        assert x0.shape == self.x.shape, f"the denoiser gave {tuple(x0.shape)} for x of {tuple(self.x.shape)}"
        noise = self._noise("sampling/step", self.call) if self.plan.draws_noise[self.call] else None
        if noise is not None and self.plan.noise_log_ratio is not None:
            assert variance_logits is not None
            # Nichol and Dhariwal 2021, eq. 15: variance = exp(v ln largest + (1 - v) ln smallest).
            noise = noise * torch.exp(0.25 * self.plan.noise_log_ratio[self.call] * (variance_logits.to(noise) + 1))
        sources = [self.x, *self._kept, x0, noise]
        # A column that is taken as it is may be one that nothing was written to yet, as a history shifts at the first
        # call. Nothing is changed in place: what the denoiser was given or has given is its own.
        x, *kept = [
            sources[update] if isinstance(update, int) else _combination(update, sources)
            for update in self.plan.updates[self.call]
        ]
        if self.plan.offsets:
            x, *kept = self._shifted([x, *kept])
        assert x is not None
        self.x, self._kept = x, kept
        self.call += 1
        return x0

    def _shifted(self, registers: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The registers with the offsets of this call added."""
        shifted = list(registers)
        for i, value in enumerate(registers):
            offset = self.plan.offsets.get((self.call, i))
            if offset is not None:
                assert value is not None
                shifted[i] = value + offset.to(value)
        return shifted


AnyPlan = Plan | MaskedPlan


def trajectories(plan: AnyPlan, rows: Tensor, seeds: Tensor, x: Tensor) -> Trajectories | MaskedTrajectories:
    """Rows at the plan's first time, to be advanced call by call. rows, seeds: int64 [group]; x [group, ...]."""
    if isinstance(plan, MaskedPlan):
        return MaskedTrajectories(plan, rows, seeds, x)
    return Trajectories(plan, rows, seeds, x)


def _is_finite(x: Tensor) -> bool:
    # The sum is a tenth of the price and is not finite where an entry is not; where it overflows, all are looked at.
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def _check_start(x: Tensor, seeds: Tensor, tokens: bool) -> None:
    if x.ndim == 0 or x.is_floating_point() == tokens:
        wanted = "int64 [batch, height, width]" if tokens else "a floating point [batch, ...]"
        raise UserError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}: needed is {wanted}")
    if not _is_finite(x):
        raise UserError("x has entries that are NaN or infinite: needed are finite numbers")
    if seeds.shape != (len(x),) or seeds.is_floating_point():
        raise UserError(
            f"seeds has shape {tuple(seeds.shape)} and dtype {seeds.dtype}: "
            f"one seed a sample is needed, int64 ({len(x)},)"
        )


def _check_elements(plan: Plan, shape: tuple[int, ...]) -> None:
    for values in (plan.elements, plan.offsets):
        wrong = next((tuple(v.shape) for v in values.values() if v.ndim and tuple(v.shape) != shape), None)
        if wrong is not None:
            raise UserError(f"x has samples of shape {shape}: the coefficients of {plan.solver!r} are of shape {wrong}")


def _rows_of(cond: Condition, rows: Tensor) -> Condition:
    return cond.map(lambda value: value[rows])


def _gather(live: Sequence[Trajectories | MaskedTrajectories]) -> tuple[Tensor, Tensor]:
    """x and t of all live rows, in the order of the groups."""
    if len(live) == 1:
        return live[0].x, live[0].t
    return torch.cat([group.x for group in live]), torch.cat([group.t for group in live])


def run_plans(
    plans: Sequence[AnyPlan],
    denoiser_for: Callable[[Tensor], Denoiser],
    x: Tensor,
    cond: Condition | None = None,
    seeds: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run a batch in which every row has its own plan; rows with the same Plan object advance as one group.

    plans: one a row of x [batch, ...], which stands at its plan's first time. At each tick all rows that are not done
    share one network call: denoiser_for(rows) gives the denoiser of those rows (int64 [live], in the order of the
    call; asked again only when that set changes), and cond is gathered likewise. So a row's result is what it gets
    alone. seeds: int64 [batch], 0 .. batch - 1 by default; only plans that draw noise read them. progress(done, total)
    counts the ticks. Returns x at the plans' last times, in the dtype of x. Raises UserError for x that is not finite,
    for wrong shapes of plans or seeds, and for a learned variance that the denoiser does not have. Masked plans run on
    tokens, int64 [batch, height, width], and a denoiser that gives logits; plans of both kinds cannot share a batch.
    """
    if seeds is None:
        seeds = torch.arange(x.shape[0] if x.ndim else 0, device=x.device)
    _check_start(x, seeds, tokens=any(isinstance(plan, MaskedPlan) for plan in plans))
    if len(plans) != len(x):
        raise UserError(f"plans has {len(plans)} entries for {len(x)} rows of x: one plan a row is needed")
    members: dict[AnyPlan, list[int]] = {}
    for row, plan in enumerate(plans):
        members.setdefault(plan, []).append(row)
    live = []
    for plan, places in members.items():
        if isinstance(plan, Plan):
            _check_elements(plan, tuple(x.shape[1:]))
        rows = torch.tensor(places, device=x.device)
        whole = len(members) == 1
        live.append(trajectories(plan, rows, seeds if whole else seeds[rows], x if whole else x[rows]))
    end = torch.empty_like(x)
    total, ticks = max((plan.num_calls for plan in members), default=0), 0
    while live:
        # The same groups are live until the first of them is done.
        rows = torch.cat([group.rows for group in live])
        sizes = [len(group.rows) for group in live]
        denoiser = denoiser_for(rows)
        live_cond = cond if cond is None or len(members) == 1 else _rows_of(cond, rows)
        learned = any(group.plan.noise_log_ratio is not None for group in live)
        estimate: Estimator = x0_and_variance if learned else x0_alone
        until = min(group.plan.num_calls for group in live)
        for tick in range(ticks, until):
            x0, logits = estimate(denoiser, *_gather(live), live_cond)
            if len(live) == 1:
                live[0].advance(x0, logits)
            else:
                logits_parts: Sequence[Tensor | None] = [None] * len(live) if logits is None else logits.split(sizes)
                for group, x0_part, logits_part in zip(live, x0.split(sizes), logits_parts, strict=True):
                    group.advance(x0_part, logits_part)
            if progress is not None:
                progress(tick + 1, total)
        ticks = until
        for group in live:
            if group.done and len(members) == 1:
                end.copy_(group.x)
            elif group.done:
                end[group.rows] = group.x
        live = [group for group in live if not group.done]
    return end


def run_plan(
    plan: AnyPlan,
    denoiser: Denoiser,
    x: Tensor,
    cond: Condition | None = None,
    seeds: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run a plan from x [batch, ...] at the plan's first time; returns x at its last, in the dtype of x.

    denoiser(x, t, cond) gives the x0 estimate for t float64 [batch] in [0, 1]. The other arguments and the errors are
    those of run_plans, of which this is the case of one group.
    """
    return run_plans([plan] * (len(x) if x.ndim else 0), lambda rows: denoiser, x, cond, seeds, progress)
