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
from smalti.errors import UserError
from smalti.sampling.ems import EMS, EMSIntegrals, ems_integrals, load_ems
from smalti.sampling.plan import AffineRow, Plan, PlanDraft
from smalti.sampling.solvers.nodes import (
    Node,
    ddim_weights,
    is_finite_step,
    is_published,
    multistep_order,
    nodes_of,
)

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


def _curved_part(
    base: Node, step: EMSIntegrals, g: AffineRow, others: list[tuple[AffineRow, Node]], pseudo: bool
) -> AffineRow:
    """sum_k E_k g^(k) for k = 1, 2, ...: what a step takes from y e^L beside its constant g.

    The derivatives are those of the polynomial through g at base and at the others (relative to base too).
    Source: Zheng et al. 2023, section 3.2.
    """
    total = torch.zeros_like(g)
    weights = _derivative_weights([node.log_snr - base.log_snr for _, node in others], pseudo)
    for k, row in enumerate(weights, start=1):
        for weight, (other, _) in zip(row.tolist(), others, strict=True):
            total = total + step.E[k] * (weight * math.factorial(k)) * (other - g)
    return total


def _given_ems(ems: EMS | str | Path) -> EMS:
    statistics = load_ems(ems) if isinstance(ems, str | Path) else ems
    if not isinstance(statistics, EMS):
        raise UserError(f"ems={ems!r} must be an EMS or the path of one; `smalti ems RUN` writes RUN/ems.npz")
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
    variant: str = "corrected",
) -> Plan:
    """DPM-Solver-v3, one call a step. Source: Zheng et al. 2023, section 3, and its code.

    ems: the network's statistics, or the file that `smalti ems` wrote. order: of the predictor, 1 to 3. corrector:
    each step once more with the estimate at its end, which raises the order by one; the network is not called again
    at the corrected point. pseudo: the predictor's derivatives by divided differences, for about 5 steps.
    variant "published": the corrector drops the oldest estimate for the new one and so keeps the predictor's order,
    and the first-order first step, whose error of h^2 holds the whole at second order, is left as it is.
    The statistics are read between their nodes, where the paper's code rounds the times to them.
    Raises UserError for an order that is none of these, fewer steps than the order, and statistics that overflow.
    """
    if order not in (1, 2, 3):
        raise UserError(f"order={order!r} must be 1, 2 or 3")
    if len(times) - 1 < order:
        raise UserError(f"num_inference_steps={len(times) - 1}: dpm_solver_v3 of order={order} needs at least {order}")
    statistics, published = _given_ems(ems), is_published(variant)
    # The corrector takes back what the predictor made of its oldest estimate, so that one is kept too.
    history = ("h1", "h2", "h3")[: order if corrector else order - 1]
    draft = PlanDraft("dpm_solver_v3", process, ("x", *history))
    shape = tuple(statistics.l.shape[1:])
    nodes = nodes_of(process, times)
    steps = [
        ems_integrals(statistics, s.log_snr, t.log_snr, order + corrector) if is_finite_step(s, t) else None
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
        f, start = ((1 - l) * x / s.alpha if known else 0 * x) - x0, x
        now = multistep_order(nodes, i, order, lower_order_final)
        if corrector:
            corrected_order = last_order if published else last_order + 1
        else:
            # As dpmpp_3m mends its first step.
            corrected_order = 2 if order == 3 and now > last_order == 1 and not published else 1
        before = steps[i - 1] if i else None
        if before is not None and corrected_order > 1:
            # f here, relative to where the step that led here began.
            g_here = torch.exp(-before.S) * f
            g_here[-1] = g_here[-1] - before.B
            predicted_with = earlier(i - 1, last_order - 1, past[1:])
            corrected_with = [(g_here, s), *earlier(i - 1, corrected_order - 2, past[1:])]
            predicted = _curved_part(nodes[i - 1], before, past[0], predicted_with, pseudo)
            corrected = _curved_part(nodes[i - 1], before, past[0], corrected_with, pseudo=False)
            start = x + s.alpha * torch.exp(-before.L) * (predicted - corrected)
        step = steps[i]
        if step is None:
            # Where lambda is infinite: DDIM, with the estimate that belongs to the corrected x.
            weight_x, weight_x0 = ddim_weights(s, t)
            row = weight_x * start + weight_x0 * (((1 - l) * start / s.alpha - f) if known else x0)
        else:
            y = start / s.alpha - step.E[0] * f - _curved_part(s, step, f, earlier(i, now - 1, past), pseudo)
            y[-1] = y[-1] - step.C
            row = t.alpha * torch.exp(-step.L) * y
        draft.affine_call(s.t, t.t, now, {"x": row, **dict(zip(history, [f, *past], strict=False))})
        last_order = now
    return draft.finish()
