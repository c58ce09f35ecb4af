"""UniPC: a multistep predictor, and a corrector that reuses the next node's network call."""

import math

import numpy as np
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.errors import unknown_name
from smalti.sampling.plan import Plan, PlanDraft, Row
from smalti.sampling.solvers.nodes import Node, ddim_weights, is_finite_step, multistep_order, nodes_of, phi


def _weights(ratios: list[float], k: float, b: float) -> NDArray[np.float64]:
    """rho with sum_m ratios_m^(j-1) rho_m = j! phi_(j+1)(k) / B for j = 1 .. len(ratios). Source: UniPC, eq. 5."""
    if len(ratios) == 1:
        return np.array([0.5])  # any value near it keeps the order; the paper's choice, appendix F
    powers = np.vander(np.array(ratios), increasing=True).T
    moments = [math.factorial(j) * phi(j + 1, k) / b for j in range(1, len(ratios) + 1)]
    return np.linalg.solve(powers, np.array(moments))


def _update(s: Node, t: Node, start: Row, m0: Row, others: list[tuple[Row, Node]], bh: str) -> Row:
    """x at t from start at s, whose estimate is m0, and estimates at other nodes. Source: UniPC, eq. 8 and 9."""
    weight_x, weight_x0 = ddim_weights(s, t)
    row = weight_x * start + weight_x0 * m0
    if not others:
        return row
    h = t.log_snr - s.log_snr
    b = -h if bh == "bh1" else math.expm1(-h)
    ratios = [(node.log_snr - s.log_snr) / h for _, node in others]
    for rho, ratio, (model, _) in zip(_weights(ratios, -h, b), ratios, others, strict=True):
        row = row - t.alpha * b * rho * (model - m0) / ratio
    return row


def _unipc(
    name: str,
    process: Process,
    times: NDArray[np.float64],
    order: int,
    lower_order_final: bool,
    bh: str,
    corrector: bool,
) -> Plan:
    if bh not in ("bh1", "bh2"):
        raise unknown_name("bh", bh, ("bh1", "bh2"))
    history = [f"h{k + 1}" for k in range(order if corrector else order - 1)]
    draft = PlanDraft(name, process, ("x", "anchor", *history) if corrector else ("x", *history))
    nodes = nodes_of(process, times)
    x0, past = draft.symbol("x0"), draft.symbols(*history)
    last_order = 0
    for i in range(len(nodes) - 1):
        start = draft.symbol("x")
        if corrector and last_order and is_finite_step(nodes[i - 1], nodes[i]):
            # The step that led here, once more with the estimate at its end: h1 is the estimate at its beginning.
            earlier = [(past[k], nodes[i - 1 - k]) for k in range(1, last_order)]
            start = _update(nodes[i - 1], nodes[i], draft.symbol("anchor"), past[0], [*earlier, (x0, nodes[i])], bh)
        now = multistep_order(nodes, i, order, lower_order_final)
        row = _update(nodes[i], nodes[i + 1], start, x0, [(past[k], nodes[i - 1 - k]) for k in range(now - 1)], bh)
        kept = {"anchor": start} if corrector else {}
        shifted = dict(zip(history, [x0, *past], strict=False))
        draft.call(nodes[i].t, nodes[i + 1].t, now, x=row, **kept, **shifted)
        last_order = now
    return draft.finish()


def unipc_2(
    process: Process,
    times: NDArray[np.float64],
    *,
    lower_order_final: bool = True,
    bh: str = "bh2",
    corrector: bool = True,
) -> Plan:
    """UniPC-2 in data prediction; its corrector makes it third order. Source: Zhao et al. 2023, algorithms 5 and 6.

    bh: the paper's B(h), "bh1" = h or "bh2" = e^h - 1. The network is not called again at the corrected point.
    """
    return _unipc("unipc_2", process, times, 2, lower_order_final, bh, corrector)


def unipc_3(
    process: Process,
    times: NDArray[np.float64],
    *,
    lower_order_final: bool = True,
    bh: str = "bh2",
    corrector: bool = True,
) -> Plan:
    """UniPC-3 in data prediction, as unipc_2 with one estimate more. Source: Zhao et al. 2023, algorithms 5 and 6."""
    return _unipc("unipc_3", process, times, 3, lower_order_final, bh, corrector)
