"""DPM-Solver++ multistep, of the ODE and of the SDE: earlier estimates give the higher orders, one call a step."""

import math

import numpy as np
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.errors import unknown_name
from smalti.sampling.plan import Plan, PlanDraft, Row
from smalti.sampling.solvers.nodes import (
    ExponentialStep,
    Node,
    data_step,
    is_finite_step,
    is_published,
    multistep_order,
    nodes_of,
)


def _differences(draft: PlanDraft, nodes: list[Node], i: int, order: int) -> tuple[Row, Row]:
    """h m' and h^2 m'' / 2 at node i from the estimates there and at the order - 1 nodes before (m'' = 0 of two)."""
    h = nodes[i + 1].log_snr - nodes[i].log_snr
    r0 = (nodes[i].log_snr - nodes[i - 1].log_snr) / h
    recent = (draft.symbol("x0") - draft.symbol("h1")) / r0
    if order == 2:
        return recent, np.zeros_like(recent)
    r1 = (nodes[i - 1].log_snr - nodes[i - 2].log_snr) / h
    earlier = (draft.symbol("h1") - draft.symbol("h2")) / r1
    second = (recent - earlier) / (r0 + r1)
    return recent + r0 * second, second


def _row(draft: PlanDraft, nodes: list[Node], i: int, order: int, solver_type: str, published: bool, sde: bool) -> Row:
    """x at node i + 1. Source: DPM-Solver++ (Lu et al. 2022), algorithm 2, eq. 14 and 18; third order in appendix B."""
    s, t = nodes[i], nodes[i + 1]
    x, x0, z = draft.symbols("x", "x0", "z")
    if sde:
        h = t.log_snr - s.log_snr
        # e^-h is 0 where lambda is infinite: the step forgets x, and its coefficients stay finite.
        step = ExponentialStep(t.sigma / s.sigma * math.exp(-h), t.alpha, -2 * h)
        row = step.ratio * x + step.first * x0 + t.sigma * math.sqrt(-math.expm1(-2 * h)) * z
    else:
        step = data_step(s, t)
        row = step.ratio * x + step.first * x0
    if order == 1:
        return row
    slope, half_curvature = _differences(draft, nodes, i, order)
    if order == 2 and solver_type == "midpoint":
        return row + 0.5 * step.first * slope
    # The paper's code takes the halved second difference for the whole, which costs the third order: measured 2.0.
    curvature = half_curvature if published else 2 * half_curvature
    return row + step.second * slope + step.third * curvature


def _multistep(
    name: str,
    process: Process,
    times: NDArray[np.float64],
    order: int,
    lower_order_final: bool,
    solver_type: str = "midpoint",
    published: bool = False,
    sde: bool = False,
) -> Plan:
    if solver_type not in ("midpoint", "heun"):
        raise unknown_name("solver_type", solver_type, ("midpoint", "heun"))
    draft = PlanDraft(name, process, ("x", "h1", "h2")[:order])
    history = draft.symbols(*("x0", "h1")[: order - 1])
    nodes = nodes_of(process, times)
    previous = 0
    for i in range(len(nodes) - 1):
        now = multistep_order(nodes, i, order, lower_order_final)
        row = _row(draft, nodes, i, now, solver_type, published, sde)
        if order == 3 and now > previous == 1 and not published and not sde:
            # The first step's error is O(h^2), once: it would hold the whole at second order. The estimate at its end
            # corrects it at no further call, as UniPC's corrector does (Zhao et al. 2023, eq. 9).
            missing = data_step(nodes[i - 1], nodes[i]).second * (draft.symbol("x0") - draft.symbol("h1"))
            row = row + nodes[i + 1].sigma / nodes[i].sigma * missing
        draft.call(nodes[i].t, nodes[i + 1].t, now, x=row, **{f"h{k + 1}": old for k, old in enumerate(history)})
        previous = now if is_finite_step(nodes[i], nodes[i + 1]) else 0
    return draft.finish()


def dpmpp_2m(
    process: Process, times: NDArray[np.float64], *, lower_order_final: bool = True, solver_type: str = "midpoint"
) -> Plan:
    """DPM-Solver++(2M): second order from one call a step. Source: Lu et al. 2022, algorithm 2.

    lower_order_final takes the last step at first order, which few-step sampling wants; a step to sigma = 0 always is.
    solver_type "midpoint" is the paper's, "heun" weighs the slope by its exact integral.
    """
    return _multistep("dpmpp_2m", process, times, 2, lower_order_final, solver_type)


def dpmpp_3m(
    process: Process, times: NDArray[np.float64], *, lower_order_final: bool = True, variant: str = "corrected"
) -> Plan:
    """DPM-Solver++(3M): one call a step. Source: Lu et al. 2022, appendix B, and its code.

    variant "corrected" extrapolates the quadratic exactly and is of third order; "published" is the code's, which
    every library copies: its second difference lacks a factor 2, and it is of second order.
    """
    return _multistep("dpmpp_3m", process, times, 3, lower_order_final, published=is_published(variant))


def dpmpp_sde_1(process: Process, times: NDArray[np.float64]) -> Plan:
    """SDE-DPM-Solver++(1). Source: Lu et al. 2022, eq. 18."""
    return _multistep("dpmpp_sde_1", process, times, 1, True, sde=True)


def dpmpp_sde_2m(
    process: Process, times: NDArray[np.float64], *, lower_order_final: bool = True, solver_type: str = "midpoint"
) -> Plan:
    """SDE-DPM-Solver++(2M). Source: Lu et al. 2022, eq. 19; solver_type is that of dpmpp_2m."""
    return _multistep("dpmpp_sde_2m", process, times, 2, lower_order_final, solver_type, sde=True)


def dpmpp_sde_3m(
    process: Process, times: NDArray[np.float64], *, lower_order_final: bool = True, variant: str = "corrected"
) -> Plan:
    """SDE-DPM-Solver++(3M): the exact integral of the quadratic through three estimates.

    variant "published" is k-diffusion's dpmpp_3m_sde, which takes half of the second difference.
    """
    published = is_published(variant)
    return _multistep("dpmpp_sde_3m", process, times, 3, lower_order_final, published=published, sde=True)
