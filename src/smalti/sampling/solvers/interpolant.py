"""The SDE of stochastic interpolants (SiT): drift and diffusion chosen apart, any diffusion keeps the marginals.

SiT's time runs from noise (0) to data (1), ours the other way: its tau is 1 - t, and its velocity is -dx/dt.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.errors import UserError, unknown_name
from smalti.sampling.plan import Plan, PlanDraft, Row
from smalti.sampling.solvers.flow import velocity, velocity_weights
from smalti.sampling.solvers.nodes import Node, implied_noise, nodes_of


def _sbdm(process: Process, node: Node) -> float:
    """-(alpha'/alpha) sigma^2 + sigma sigma' in our time: half the squared diffusion of the forward process.

    The weight of x0 in the velocity is alpha' - sigma' alpha / sigma: minus this, times alpha / sigma^2.
    """
    if node.alpha == 0.0:
        raise UserError(
            f'diffusion="sbdm" has no bound at pure noise: t_start={node.t} must be lower on {process.name}'
        )
    _, weight_x0 = velocity_weights(process, node)
    return -weight_x0 * node.sigma**2 / node.alpha


# D of dX = (v + D score) dtau + sqrt(2 D) dW. Source: SiT (Ma et al. 2024), table 2, and its code.
_DIFFUSIONS: dict[str, Callable[[Process, Node, float], float]] = {
    "constant": lambda process, node, scale: scale,
    "sbdm": lambda process, node, scale: scale * _sbdm(process, node),
    "sigma": lambda process, node, scale: scale * node.sigma,
    "linear": lambda process, node, scale: scale * node.t,
    "decreasing": lambda process, node, scale: 0.25 * (scale * math.cos(math.pi * (1 - node.t)) + 1) ** 2,
    "increasing-decreasing": lambda process, node, scale: scale * math.sin(math.pi * node.t) ** 2,
}
_LAST_STEPS = ("mean", "tweedie", "euler")


def _drift(draft: PlanDraft, node: Node, diffusion: float) -> Row:
    """v + D score, in SiT's time. The score is -eps / sigma."""
    return -velocity(draft, node) - diffusion / node.sigma * implied_noise(draft, node)


def _sde(
    name: str,
    process: Process,
    times: NDArray[np.float64],
    diffusion: str,
    diffusion_scale: float,
    last_step: str,
    heun: bool,
) -> Plan:
    if diffusion not in _DIFFUSIONS:
        raise unknown_name("diffusion", diffusion, _DIFFUSIONS)
    if last_step not in _LAST_STEPS:
        raise unknown_name("last_step", last_step, _LAST_STEPS)
    if not 0.0 <= diffusion_scale < math.inf:
        raise UserError(f"diffusion_scale={diffusion_scale} must be at least 0 and finite")
    nodes = nodes_of(process, times)
    diffusions = [_DIFFUSIONS[diffusion](process, node, diffusion_scale) if node.sigma > 0.0 else 0.0 for node in nodes]

    def noise(i: int) -> float:
        """Weight of z in the step from node i; the step into sigma = 0 has none."""
        if i + 1 >= len(nodes) or nodes[i + 1].sigma == 0.0:
            return 0.0
        return math.sqrt(2 * diffusions[i] * (nodes[i].t - nodes[i + 1].t))

    draft = PlanDraft(name, process, ("x", "anchor", "h1") if heun else ("x",))
    if heun and noise(0) > 0.0:
        draft.start_row = (1.0, noise(0))
    x, x0, z = draft.symbols("x", "x0", "z")
    for i, (s, t) in enumerate(pairwise(nodes)):
        step = s.t - t.t
        drift = _drift(draft, s, diffusions[i])
        if t.sigma == 0.0:
            mean = x + step * drift
            rows = {"mean": mean, "tweedie": x0, "euler": x - step * velocity(draft, s)}
            draft.call(s.t, t.t, 1, x=rows[last_step])
        elif heun:
            # The noise of a step comes before both of its calls: it is folded into the row before.
            draft.call(s.t, t.t, 2, x=x + step * drift, anchor=x, h1=drift)
            both = draft.symbol("h1") + _drift(draft, t, diffusions[i + 1])
            draft.call(t.t, t.t, 2, x=draft.symbol("anchor") + step / 2 * both + noise(i + 1) * z)
        else:
            draft.call(s.t, t.t, 1, x=x + step * drift + noise(i) * z)
    return draft.finish()


def sde_euler(
    process: Process,
    times: NDArray[np.float64],
    *,
    diffusion: str = "sigma",
    diffusion_scale: float = 1.0,
    last_step: str = "mean",
) -> Plan:
    """Euler-Maruyama on the interpolant's SDE. Source: SiT (Ma et al. 2024), eq. 7 and section 3.4, and its code.

    diffusion: the form of D(t), scaled by diffusion_scale. The step into t = 0 draws no noise: last_step "mean" takes
    its drift, "tweedie" the estimate x0, "euler" the velocity alone. make_plan's last_step_size is its length.
    """
    return _sde("sde_euler", process, times, diffusion, diffusion_scale, last_step, heun=False)


def sde_heun(
    process: Process,
    times: NDArray[np.float64],
    *,
    diffusion: str = "sigma",
    diffusion_scale: float = 1.0,
    last_step: str = "mean",
) -> Plan:
    """Heun's rule for the drift after the step's noise: two calls a step. Source: SiT's code. Options: sde_euler's."""
    return _sde("sde_heun", process, times, diffusion, diffusion_scale, last_step, heun=True)
