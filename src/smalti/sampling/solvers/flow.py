"""Runge-Kutta steps of the probability-flow ODE in t: dx/dt = alpha' x0 + sigma' eps."""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from smalti.diffusion.processes import Process, VPDiscrete
from smalti.sampling.plan import Plan, PlanDraft, Row
from smalti.sampling.solvers.nodes import Node, first_order, nodes_of


def velocity_weights(process: Process, node: Node) -> tuple[float, float]:
    """(weight of x, weight of x0) of dx/dt = alpha' x0 + sigma' eps at a node."""
    t = torch.tensor(node.t, dtype=torch.float64)
    alpha_dot, sigma_dot = float(process.alpha_dot(t)), float(process.sigma_dot(t))
    return sigma_dot / node.sigma, alpha_dot - sigma_dot * node.alpha / node.sigma


def velocity(draft: PlanDraft, node: Node) -> Row:
    """dx/dt at the call's own x, as a row."""
    weight_x, weight_x0 = velocity_weights(draft.process, node)
    x, x0 = draft.symbols("x", "x0")
    return weight_x * x + weight_x0 * x0


def is_discrete(process: Process) -> bool:
    """Whether the process is a table of steps, between which the path has no derivative to follow."""
    return bool(getattr(process, "discrete", isinstance(process, VPDiscrete)))


def is_straight(process: Process) -> bool:
    """Whether x_t is a straight line from x0 to eps: alpha' and sigma' are constant."""
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    rates = torch.stack([process.alpha_dot(t), process.sigma_dot(t)])
    return bool(torch.allclose(rates, rates[:, :1], rtol=1e-12, atol=1e-12))


def _first_order_end(draft: PlanDraft, s: Node, t: Node, one_call: bool) -> bool:
    """Take the step into sigma = 0, where a method must, at first order; says whether it did.

    Where sigma reaches 0 along a curved path, dsigma/dt may have no bound and a Runge-Kutta step would leave noise
    behind: the exact first-order step goes to the estimate. On the straight path that is Euler's.
    """
    if t.sigma > 0.0 or (is_straight(draft.process) and not one_call):
        return False
    draft.call(s.t, t.t, 1, x=first_order(draft, s, t))
    return True


def flow_euler(process: Process, times: NDArray[np.float64]) -> Plan:
    """Euler steps of the probability-flow ODE in t. Source: SiT (Ma et al. 2024), eq. 4; SD3 and FLUX sample so."""
    draft = PlanDraft("flow_euler", process)
    x = draft.symbol("x")
    for s, t in pairwise(nodes_of(process, times)):
        if not _first_order_end(draft, s, t, one_call=True):
            draft.call(s.t, t.t, 1, x=x + (t.t - s.t) * velocity(draft, s))
    return draft.finish()


def flow_midpoint(process: Process, times: NDArray[np.float64]) -> Plan:
    """The explicit midpoint method in t: two calls a step."""
    draft = PlanDraft("flow_midpoint", process, ("x", "anchor"))
    x, anchor = draft.symbols("x", "anchor")
    for s, t in pairwise(nodes_of(process, times)):
        if _first_order_end(draft, s, t, one_call=False):
            continue
        (middle,) = nodes_of(process, np.array([(s.t + t.t) / 2]))
        draft.call(s.t, middle.t, 2, x=x + (middle.t - s.t) * velocity(draft, s), anchor=x)
        draft.call(middle.t, t.t, 2, x=anchor + (t.t - s.t) * velocity(draft, middle))
    return draft.finish()


def flow_heun(process: Process, times: NDArray[np.float64]) -> Plan:
    """Heun's method in t: two calls a step, and Euler into sigma = 0, where the second could not be made."""
    draft = PlanDraft("flow_heun", process, ("x", "anchor", "h1"))
    x, anchor, slope = draft.symbols("x", "anchor", "h1")
    for s, t in pairwise(nodes_of(process, times)):
        if _first_order_end(draft, s, t, one_call=True):
            continue
        step = t.t - s.t
        draft.call(s.t, t.t, 2, x=x + step * velocity(draft, s), anchor=x, h1=velocity(draft, s))
        draft.call(t.t, t.t, 2, x=anchor + step / 2 * (slope + velocity(draft, t)))
    return draft.finish()


def flow_rk4(process: Process, times: NDArray[np.float64]) -> Plan:
    """The classical Runge-Kutta method in t: four calls a step.

    A step into sigma = 0, where its last stage would divide by 0, takes Heun's third-order method (nodes 0, 1/3, 2/3)
    on the straight path.
    """
    draft = PlanDraft("flow_rk4", process, ("x", "anchor", "h1"))
    x, anchor, slopes = draft.symbols("x", "anchor", "h1")  # h1: the weighted sum of the slopes so far
    for s, t in pairwise(nodes_of(process, times)):
        if _first_order_end(draft, s, t, one_call=False):
            continue
        step = t.t - s.t
        order = 4 if t.sigma > 0.0 else 3
        places, weights = ((0.5, 0.5, 1.0), (1, 2, 2, 1)) if order == 4 else ((1 / 3, 2 / 3), (1, 0, 3))
        stages = [s, *nodes_of(process, s.t + step * np.array(places))]
        if order == 4:
            stages[-1] = t
        for i, stage in enumerate(stages):
            slope = velocity(draft, stage)
            total = weights[i] * slope if i == 0 else slopes + weights[i] * slope
            begin = x if i == 0 else anchor
            if i == len(places):
                draft.call(stage.t, t.t, order, x=anchor + step / sum(weights) * total)
            else:
                next_x = begin + places[i] * step * slope
                draft.call(stage.t, stages[i + 1].t, order, x=next_x, anchor=begin, h1=total)
    return draft.finish()
