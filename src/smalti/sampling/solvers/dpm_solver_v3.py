"""DPM-Solver-v3: a multistep solver whose linear part is measured on the network and not chosen between x0 and eps.

In y = x / alpha the flow is dy/dlambda = -(l y + f) with f = (1 - l) y - x0, and f' is modelled as s f + b; l, s and b
are the network's statistics (ems.EMS), per element. A history register holds f: the corrector changes x and eps
so that f stays what it was.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.sampling.ems import EMS, EMSIntegrals, ems_integrals, load_ems
from smalti.sampling.plan import AffineRow, Plan, PlanDraft
from smalti.sampling.solvers.nodes import Node, ddim_weights, is_finite_step, multistep_order, nodes_of
from smalti.types import UserError

# An AffineRow holds a coefficient of one sample's shape for each column of the table, and a constant behind them.


def _derivative_weights(gaps: list[float], pseudo: bool) -> NDArray[np.float64]:
    """W with g^(k) / k! = sum_j W[k - 1, j] (g_j - g_i) from nodes at lambda_i + gaps[j], nearest first.

    pseudo: each derivative from the k nearest nodes alone (divided differences) and not from all of them.
    Source: Zheng et al. 2023, section 3.2, and its code.
    """
    weights = np.zeros((len(gaps), len(gaps)))
    for k in range(1, len(gaps) + 1):
        used = k if pseudo else len(gaps)
        powers = np.array(gaps[:used])[:, None] ** np.arange(1, used + 1)
        weights[k - 1, :used] = np.linalg.inv(powers)[k - 1]
    return weights


def _relative_g(f: AffineRow, steps: list[EMSIntegrals]) -> AffineRow:
    """g at an earlier node, relative to the base that the given steps lead to. Source: Zheng et al. 2023, section 3.2.

    g_j = e^(S_i - S_j) f_j - e^(S_i) (B_j - B_i), one step at a time.
    """
    for step in steps:
        f = torch.exp(step.S) * f
        f[-1] = f[-1] + torch.exp(step.S) * step.B
    return f


def _update(
    s: Node,
    t: Node,
    start: AffineRow,
    step: EMSIntegrals,
    g: AffineRow,
    others: list[tuple[AffineRow, Node]],
    pseudo: bool,
) -> AffineRow:
    """x at t from start at s, f = g there, and g relative to s at others. Source: Zheng et al. 2023, section 3.2."""
    y = start / s.alpha - step.E[0] * g
    y[-1] = y[-1] - step.C
    weights = _derivative_weights([node.log_snr - s.log_snr for _, node in others], pseudo)
    for k, row in enumerate(weights, start=1):
        for weight, (other, _) in zip(row.tolist(), others, strict=True):
            y = y - step.E[k] * (weight * math.factorial(k)) * (other - g)
    return t.alpha * torch.exp(-step.L) * y


def _given_ems(ems: EMS | str | Path, process: Process) -> EMS:
    statistics = load_ems(ems) if isinstance(ems, str | Path) else ems
    if not isinstance(statistics, EMS):
        raise UserError(f"ems={ems!r} must be an EMS or the path of one; `smalti ems RUN` writes RUN/ems.npz")
    if statistics.process != process.name:
        raise UserError(f"ems is of process {statistics.process!r}: it says nothing about {process.name!r}")
    return statistics


def dpm_solver_v3(
    process: Process,
    times: NDArray[np.float64],
    *,
    ems: EMS | str | Path,
    order: int = 2,
    corrector: bool = True,
    lower_order_final: bool = True,
    pseudo: bool = False,
) -> Plan:
    """DPM-Solver-v3, one call a step. Source: Zheng et al. 2023, section 3, and its code.

    ems: the network's statistics, or the file that `smalti ems` wrote. order 1 to 3: the paper takes 3 without labels
    and 2 with guidance. corrector: each step once more with the estimate at its end in the place of the oldest; the
    order is the same, the error smaller at few steps. pseudo: derivatives by divided differences, for about 5 steps.
    The statistics are read between their nodes, where the paper's code rounds the times to them.
    Raises UserError for an order that is none of these, fewer steps than the order, and statistics of another process.
    """
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise UserError(f"order={order!r} must be 1, 2 or 3")
    if not isinstance(pseudo, bool):
        raise UserError(f"pseudo={pseudo!r} must be True or False")
    if len(times) - 1 < order:
        raise UserError(f"num_inference_steps={len(times) - 1}: dpm_solver_v3 of order={order} needs at least {order}")
    statistics = _given_ems(ems, process)
    corrector = corrector and order > 1  # at first order there is no estimate to replace
    history = ("h1", "h2")[: order - 1]
    draft = PlanDraft("dpm_solver_v3", process, ("x", *(["anchor"] if corrector else []), *history))
    shape = tuple(statistics.l.shape[1:])
    nodes = nodes_of(process, times)
    steps = [
        ems_integrals(statistics, s.log_snr, t.log_snr, order) if is_finite_step(s, t) else None
        for s, t in itertools.pairwise(nodes)
    ]
    x, x0 = draft.affine_symbol("x", shape), draft.affine_symbol("x0", shape)
    past = [draft.affine_symbol(name, shape) for name in history]

    def earlier(i: int, count: int, rows: list[AffineRow]) -> list[tuple[AffineRow, Node]]:
        """g relative to node i at the count nodes before it, from the rows of their f, nearest first."""
        found = []
        for k in range(count):
            way = [step for step in steps[i - 1 - k : i] if step is not None]
            found.append((_relative_g(rows[k], way), nodes[i - 1 - k]))
        return found

    last_order = 0
    for i, (s, t) in enumerate(itertools.pairwise(nodes)):
        known = math.isfinite(s.log_snr)
        l = statistics.at(torch.tensor([s.log_snr], dtype=torch.float64))[0][0] if known else torch.ones(shape)  # noqa: E741
        y = x / s.alpha if known else torch.zeros_like(x)
        f, start = (1 - l) * y - x0, x
        before = steps[i - 1] if i else None
        if corrector and last_order > 1 and before is not None:
            # The step that led here once more, with f here relative to where it began.
            g_here = torch.exp(-before.S) * f
            g_here[-1] = g_here[-1] - before.B
            others = [(g_here, s), *earlier(i - 1, last_order - 2, past[1:])]
            start = _update(nodes[i - 1], s, draft.affine_symbol("anchor", shape), before, past[0], others, False)
        now = multistep_order(nodes, i, order, lower_order_final)
        step = steps[i]
        if step is None:
            # Where lambda is infinite: DDIM, with the estimate that belongs to the corrected x.
            weight_x, weight_x0 = ddim_weights(s, t)
            row = weight_x * start + weight_x0 * (((1 - l) * start / s.alpha - f) if known else x0)
        else:
            row = _update(s, t, start, step, f, earlier(i, now - 1, past), pseudo)
        rows = {"x": row, **({"anchor": start} if corrector else {}), **dict(zip(history, [f, *past], strict=False))}
        draft.affine_call(s.t, t.t, now, rows)
        last_order = now
    return draft.finish()
