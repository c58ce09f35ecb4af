"""DPM-Solver and DPM-Solver++ singlestep: the higher orders from calls inside the step, nothing kept between steps.

num_inference_steps counts network calls: the grid has a node for each, and a step of order k spans k of its intervals,
so that its inner nodes are the grid's own.
"""

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.errors import unknown_name
from smalti.sampling.plan import Plan, PlanDraft, Row
from smalti.sampling.solvers.nodes import (
    ExponentialStep,
    Node,
    data_step,
    first_order,
    implied_noise,
    nodes_of,
    noise_step,
)


def step_orders(calls: int, order: int, lower_order_final: bool) -> list[int]:
    """How calls are shared out between steps of at most order. Source: DPM-Solver's code (app. D.3 of Lu et al. 2022).

    The last steps are of lower order (order 3: ... 2, 1, or a remainder of 1 or 2). With lower_order_final False only
    what the order does not divide is, and comes first.
    """
    full, rest = divmod(calls, order)
    if not lower_order_final:
        return ([rest] if rest else []) + [order] * full
    if order == 3 and rest == 0 and full > 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + ([rest] if rest else [])


def _steps(nodes: list[Node], order: int, lower_order_final: bool) -> list[list[Node]]:
    """The nodes of each step, its two ends and those between; steps from or to infinite lambda are of first order."""
    before = 0 if math.isfinite(nodes[0].log_snr) else 1
    after = 0 if math.isfinite(nodes[-1].log_snr) else 1
    inside = max(len(nodes) - 1 - before - after, 0)
    orders = [1] * before + step_orders(inside, order, lower_order_final) + [1] * after
    ends = np.cumsum([0, *orders[: len(nodes) - 1]]).tolist()
    return [nodes[first : last + 1] for first, last in pairwise(ends)]


def _singlestep(
    name: str,
    process: Process,
    times: NDArray[np.float64],
    order: int,
    lower_order_final: bool,
    taylor: bool,
    eps: bool,
) -> Plan:
    """Any order, in x0 or in eps. Source: Lu et al. 2022a, algorithms 1, 2 and 4; Lu et al. 2022b, algorithm 1."""
    draft = PlanDraft(name, process, ("x", "anchor", "h1", "h2")[: order + 1 if order > 1 else 1])
    for nodes in _steps(nodes_of(process, times), order, lower_order_final):
        s, t, k = nodes[0], nodes[-1], len(nodes) - 1
        if k == 1:
            draft.call(s.t, t.t, 1, x=first_order(draft, s, t))
            continue
        x, anchor, m0 = draft.symbols("x", "anchor", "h1")
        h = t.log_snr - s.log_snr
        r1 = (nodes[1].log_snr - s.log_snr) / h
        draft.call(s.t, nodes[1].t, k, x=first_order(draft, s, nodes[1]), anchor=x, h1=_model(draft, s, eps))
        whole = _step(s, t, eps)
        model = _model(draft, nodes[1], eps)
        if k == 2:
            slope_weight = whole.second if taylor else 0.5 * whole.first
            row = whole.ratio * anchor + whole.first * m0 + slope_weight * (model - m0) / r1
            draft.call(nodes[1].t, t.t, 2, x=row)
            continue
        r2 = (nodes[2].log_snr - s.log_snr) / h
        part = _step(s, nodes[2], eps)
        row = part.ratio * anchor + part.first * m0 + part.second * r2 / r1 * (model - m0)
        draft.call(nodes[1].t, nodes[2].t, 3, x=row, h2=model)
        first_slope = (draft.symbol("h2") - m0) / r1
        second_slope = (_model(draft, nodes[2], eps) - m0) / r2
        row = whole.ratio * anchor + whole.first * m0
        if taylor:
            slope = (r2 * first_slope - r1 * second_slope) / (r2 - r1)
            row = row + whole.second * slope + whole.third * 2 * (second_slope - first_slope) / (r2 - r1)
        else:
            row = row + whole.second * second_slope
        draft.call(nodes[2].t, t.t, 3, x=row)
    return draft.finish()


def _step(s: Node, t: Node, eps: bool) -> ExponentialStep:
    return noise_step(s, t) if eps else data_step(s, t)


def _model(draft: PlanDraft, node: Node, eps: bool) -> Row:
    """What the solver interpolates, at the call's own x: x0, or the eps that it implies."""
    return implied_noise(draft, node) if eps else draft.symbol("x0")


def _is_taylor(solver_type: str) -> bool:
    if solver_type not in ("taylor", "dpmsolver"):
        raise unknown_name("solver_type", solver_type, ("taylor", "dpmsolver"))
    return solver_type == "taylor"


def dpm_solver_1(process: Process, times: NDArray[np.float64]) -> Plan:
    """DPM-Solver-1, which is DDIM. Source: Lu et al. 2022a, eq. 3.7."""
    return _singlestep("dpm_solver_1", process, times, 1, True, False, True)


def dpm_solver_2(process: Process, times: NDArray[np.float64], *, lower_order_final: bool = True) -> Plan:
    """DPM-Solver-2: two calls a step, in eps. Source: Lu et al. 2022a, algorithms 1 and 4 (r1 from the grid)."""
    return _singlestep("dpm_solver_2", process, times, 2, lower_order_final, False, True)


def dpm_solver_3(
    process: Process, times: NDArray[np.float64], *, lower_order_final: bool = True, solver_type: str = "dpmsolver"
) -> Plan:
    """DPM-Solver-3: three calls a step, in eps. Source: Lu et al. 2022a, algorithms 2 and 5; "taylor" is its code's."""
    return _singlestep("dpm_solver_3", process, times, 3, lower_order_final, _is_taylor(solver_type), True)


def dpmpp_2s(
    process: Process, times: NDArray[np.float64], *, lower_order_final: bool = True, solver_type: str = "midpoint"
) -> Plan:
    """DPM-Solver++(2S): two calls a step. Source: Lu et al. 2022b, algorithm 1; r from the grid (1/2 when even)."""
    if solver_type not in ("midpoint", "heun"):
        raise unknown_name("solver_type", solver_type, ("midpoint", "heun"))
    return _singlestep("dpmpp_2s", process, times, 2, lower_order_final, solver_type == "heun", False)


def dpmpp_3s(
    process: Process, times: NDArray[np.float64], *, lower_order_final: bool = True, solver_type: str = "taylor"
) -> Plan:
    """DPM-Solver++(3S): three calls a step. Source: Lu et al. 2022b's code, types "taylor" and "dpmsolver"."""
    return _singlestep("dpmpp_3s", process, times, 3, lower_order_final, _is_taylor(solver_type), False)
