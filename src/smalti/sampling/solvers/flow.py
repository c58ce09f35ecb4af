"""Runge-Kutta steps of the probability-flow ODE in t: dx/dt = alpha' x0 + sigma' eps."""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
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


def is_straight(process: Process) -> bool:
    """Whether x_t is a straight line from x0 to eps: alpha' and sigma' are constant."""
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    rates = torch.stack([process.alpha_dot(t), process.sigma_dot(t)])
    return bool(torch.allclose(rates, rates[:, :1], rtol=1e-12, atol=1e-12))


def _euler_step(draft: PlanDraft, s: Node, t: Node) -> None:
    """Euler in t; into sigma = 0 the exact first-order step.

    Where sigma reaches 0 along a curved path, dsigma/dt may have no bound and a Runge-Kutta step would leave noise
    behind: the exact step goes to the estimate. On the straight path the two are the same.
    """
    euler = draft.symbol("x") + (t.t - s.t) * velocity(draft, s)
    draft.call(s.t, t.t, 1, x=first_order(draft, s, t) if t.sigma == 0.0 else euler)


def _is_euler(process: Process, nodes: list[Node], i: int, lower_order_final: bool, needs_end: bool) -> bool:
    """Whether step i is of first order: the last, where that is asked for or a method's stages would not reach it.

    needs_end: the method evaluates at the step's end, which cannot be done at sigma = 0.
    """
    into_data = nodes[i + 1].sigma == 0.0
    return (i == len(nodes) - 2 and lower_order_final) or (into_data and (needs_end or not is_straight(process)))


def flow_euler(process: Process, times: NDArray[np.float64]) -> Plan:
    """Euler steps of the probability-flow ODE in t. Source: SiT (Ma et al. 2024), eq. 4; SD3 and FLUX sample so."""
    draft = PlanDraft("flow_euler", process)
    for s, t in pairwise(nodes_of(process, times)):
        _euler_step(draft, s, t)
    return draft.finish()


def flow_midpoint(process: Process, times: NDArray[np.float64], *, lower_order_final: bool = False) -> Plan:
    """The explicit midpoint method in t: two calls a step; lower_order_final takes the last by Euler."""
    draft = PlanDraft("flow_midpoint", process, ("x", "anchor"))
    x, anchor = draft.symbols("x", "anchor")
    nodes = nodes_of(process, times)
    for i, (s, t) in enumerate(pairwise(nodes)):
        if _is_euler(process, nodes, i, lower_order_final, needs_end=False):
            _euler_step(draft, s, t)
            continue
        (middle,) = nodes_of(process, np.array([(s.t + t.t) / 2]))
        draft.call(s.t, middle.t, 2, x=x + (middle.t - s.t) * velocity(draft, s), anchor=x)
        draft.call(middle.t, t.t, 2, x=anchor + (t.t - s.t) * velocity(draft, middle))
    return draft.finish()


def flow_heun(process: Process, times: NDArray[np.float64], *, lower_order_final: bool = False) -> Plan:
    """Heun's method in t: two calls a step, and Euler into sigma = 0, where the second could not be made.

    lower_order_final takes the last step by Euler in any case.
    """
    draft = PlanDraft("flow_heun", process, ("x", "anchor", "h1"))
    x, anchor, slope = draft.symbols("x", "anchor", "h1")
    nodes = nodes_of(process, times)
    for i, (s, t) in enumerate(pairwise(nodes)):
        if _is_euler(process, nodes, i, lower_order_final, needs_end=True):
            _euler_step(draft, s, t)
            continue
        step = t.t - s.t
        draft.call(s.t, t.t, 2, x=x + step * velocity(draft, s), anchor=x, h1=velocity(draft, s))
        draft.call(t.t, t.t, 2, x=anchor + step / 2 * (slope + velocity(draft, t)))
    return draft.finish()


def flow_rk4(process: Process, times: NDArray[np.float64], *, lower_order_final: bool = False) -> Plan:
    """The classical Runge-Kutta method in t: four calls a step.

    A step into sigma = 0, where its last stage would divide by 0, takes Heun's third-order method (nodes 0, 1/3, 2/3)
    on the straight path. lower_order_final takes the last step by Euler.
    """
    draft = PlanDraft("flow_rk4", process, ("x", "anchor", "h1"))
    x, anchor, slopes = draft.symbols("x", "anchor", "h1")  # h1: the weighted sum of the slopes so far
    nodes = nodes_of(process, times)
    for i, (s, t) in enumerate(pairwise(nodes)):
        if _is_euler(process, nodes, i, lower_order_final, needs_end=False):
            _euler_step(draft, s, t)
            continue
        step = t.t - s.t
        order = 4 if t.sigma > 0.0 else 3
        places, weights = ((0.5, 0.5, 1.0), (1, 2, 2, 1)) if order == 4 else ((1 / 3, 2 / 3), (1, 0, 3))
        stages = [s, *nodes_of(process, s.t + step * np.array(places))]
        if order == 4:
            stages[-1] = t
        for k, stage in enumerate(stages):
            slope = velocity(draft, stage)
            total = weights[k] * slope if k == 0 else slopes + weights[k] * slope
            begin = x if k == 0 else anchor
            if k == len(places):
                draft.call(stage.t, t.t, order, x=anchor + step / sum(weights) * total)
            else:
                next_x = begin + places[k] * step * slope
                draft.call(stage.t, stages[k + 1].t, order, x=next_x, anchor=begin, h1=total)
    return draft.finish()
