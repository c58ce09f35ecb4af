"""EDM's Euler and Heun steps with churn, on any process: x / alpha has noise of level s = sigma / alpha."""

import math

import numpy as np
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.errors import UserError
from smalti.sampling.grids import times_at
from smalti.sampling.plan import Plan, PlanDraft, Row
from smalti.sampling.solvers.nodes import Node, first_order, nodes_of


def _churned(process: Process, node: Node, highest: Node, gamma: float) -> Node:
    """The node at noise level s (1 + gamma), or at the process's highest where that is less."""
    level = min(node.s * (1.0 + gamma), highest.s)
    if not node.s < level < highest.s:
        return node if level <= node.s else highest
    return nodes_of(process, times_at(process, np.array([-math.log(level)])))[0]


def _edm(
    name: str,
    process: Process,
    times: NDArray[np.float64],
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
    heun: bool,
    lower_order_final: bool = False,
) -> Plan:
    """Source: Karras et al. 2022, algorithm 2, in y = x / alpha; noise of a step is folded into the row before it."""
    for field, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_noise", s_noise)):
        if not 0.0 <= value < math.inf:
            raise UserError(f"{field}={value} must be at least 0 and finite")
    if s_tmax < s_tmin:
        raise UserError(f"s_tmax={s_tmax} must be at least s_tmin={s_tmin}")
    nodes = nodes_of(process, times)
    most = min(s_churn / (len(nodes) - 1), math.sqrt(2) - 1)
    (highest,) = nodes_of(process, np.array([max(nodes[0].t, process.t_max)]))
    hats = [
        _churned(process, node, highest, most if s_tmin <= node.s <= s_tmax and node.s < math.inf else 0.0)
        for node in nodes[:-1]
    ]

    def raised(x: Row, z: Row, i: int) -> Row:
        """x at node i with the noise that takes it to hats[i]."""
        if i == len(hats) or hats[i] is nodes[i]:
            return x
        noise = s_noise * math.sqrt(max(hats[i].s ** 2 - nodes[i].s ** 2, 0.0))
        return hats[i].alpha * (x / nodes[i].alpha + noise * z)

    draft = PlanDraft(name, process, ("x", "anchor", "h1") if heun else ("x",))
    x, x0, z = draft.symbols("x", "x0", "z")

    if hats[0] is not nodes[0]:
        weight_x, weight_z = raised(np.array([1.0, 0.0]), np.array([0.0, 1.0]), 0).tolist()
        draft.start_row = (weight_x, weight_z)
    for i, (s, t) in enumerate(zip(hats, nodes[1:], strict=True)):
        euler = first_order(draft, s, t)
        next_t = hats[i + 1].t if i + 1 < len(hats) else t.t
        final = i == len(hats) - 1 and lower_order_final
        if not heun or final or t.sigma == 0.0 or s.alpha == 0.0:
            draft.call(s.t, next_t, 1, x=raised(euler, z, i + 1))
            continue
        draft.call(s.t, t.t, 2, x=euler, anchor=x, h1=x0)
        y_hat = draft.symbol("anchor") / s.alpha
        slope = (y_hat - draft.symbol("h1")) / s.s
        slope_at_end = (x / t.alpha - x0) / t.s
        heuns = t.alpha * (y_hat + (t.s - s.s) * (slope + slope_at_end) / 2)
        draft.call(t.t, next_t, 2, x=raised(heuns, z, i + 1))
    return draft.finish()


def edm_euler(
    process: Process,
    times: NDArray[np.float64],
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Plan:
    """Euler in sigma / alpha with churn: without churn it is DDIM. Source: Karras et al. 2022, algorithm 2."""
    return _edm("edm_euler", process, times, s_churn, s_tmin, s_tmax, s_noise, heun=False)


def edm_heun(
    process: Process,
    times: NDArray[np.float64],
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    lower_order_final: bool = False,
) -> Plan:
    """EDM's sampler: Heun's second-order steps, Euler into sigma = 0. Source: Karras et al. 2022, algorithm 2.

    s_churn adds noise before each step whose level sigma / alpha lies in s_tmin .. s_tmax, scaled by s_noise; it does
    not raise the level above the process's highest (t_max), where the published code leaves the trained range.
    num_inference_steps counts steps: 2 calls each, the last 1. lower_order_final takes the last by Euler also where it
    does not end at sigma = 0.
    """
    return _edm("edm_heun", process, times, s_churn, s_tmin, s_tmax, s_noise, True, lower_order_final)
