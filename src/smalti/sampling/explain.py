"""A plan as a table that a person can read."""

import numpy as np
import torch
from rich.table import Table

from smalti.sampling.plan import Plan, Row
from smalti.sampling.solvers import solver_entry, solver_names


def _formula(row: Row, names: list[str], per_element: list[str]) -> str:
    terms = [f"{value:+.4g} {name}" for value, name in zip(row, names, strict=True) if value != 0.0]
    terms += [f"+c {name}".rstrip() for name in per_element]
    return " ".join(terms).removeprefix("+") or "0"


def plan_table(plan: Plan) -> Table:
    """Each network call: t, lambda, sigma, SNR, order, and the new registers as formulas of the old ones.

    "c" stands for a coefficient of each element's own, or alone for its constant;
    "z v" for noise whose variance the network has learned.
    """
    table = Table(
        title=f"{plan.solver} on {plan.process.name}: {plan.num_calls} network calls"
        + (", draws noise" if plan.uses_noise else ", deterministic")
    )
    if plan.start_row is not None:
        table.caption = f"before the first call: x <- {_formula(np.array(plan.start_row), ['x', 'z'], [])}"
    for column in ("call", "t", "network time", "lambda", "sigma", "SNR", "order", "next t"):
        table.add_column(column, justify="right", no_wrap=True)
    for register in plan.registers:
        table.add_column(f"{register} <-")
    t = torch.tensor(plan.times)
    log_snr, sigma = plan.process.log_snr(t).tolist(), plan.process.sigma(t).tolist()
    network_time = plan.process.network_time(t).tolist()
    names = [*plan.registers, "x0", "z" if plan.noise_log_ratio is None else "z v"]
    per_element: dict[tuple[int, int], list[str]] = {}
    for call, i, place in sorted(plan.elements):
        per_element.setdefault((call, i), []).append(names[place])
    for call, i in plan.offsets:
        per_element.setdefault((call, i), []).append("")
    for k in range(plan.num_calls):
        table.add_row(
            str(k),
            f"{plan.times[k]:.4f}",
            f"{network_time[k]:.1f}",
            f"{log_snr[k]:.3f}",
            f"{sigma[k]:.4f}",
            f"{np.exp(min(2 * log_snr[k], 700)):.3g}",
            str(plan.orders[k]),
            f"{plan.next_times[k]:.4f}",
            *(_formula(row, names, per_element.get((k, i), [])) for i, row in enumerate(plan.matrices[k])),
        )
    return table


def solver_table() -> Table:
    """Every solver: what it is, its order, calls a step, default spacing and options."""
    table = Table(title="solvers (smalti explain --solver NAME draws the table of one)")
    for column in ("solver", "kind", "order", "calls a step", "spacing", "options", ""):
        table.add_column(column, justify="right" if column in ("order", "calls a step") else "left")
    for name in solver_names():
        entry = solver_entry(name)
        figures = entry.kind, str(entry.order), str(entry.calls_per_step), entry.spacing
        table.add_row(name, *figures, ", ".join(entry.options), entry.summary)
    return table
