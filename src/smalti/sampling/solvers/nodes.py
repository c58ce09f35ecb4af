"""What every solver's formulas are made of: the process's scales at a time, and the exponential integrator's step."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.errors import unknown_name
from smalti.sampling.plan import PlanDraft, Row


@dataclass(frozen=True)
class Node:
    """One time of the grid with the process's scales at it, in float64. s = sigma / alpha."""

    t: float
    alpha: float
    sigma: float
    log_snr: float

    @property
    def s(self) -> float:
        """sigma / alpha, the noise level of x / alpha; infinite at pure noise."""
        return self.sigma / self.alpha if self.alpha > 0.0 else math.inf


def nodes_of(process: Process, times: NDArray[np.float64]) -> list[Node]:
    """alpha, sigma and lambda at each time; the ends are snapped to 0 and 1, where rounding leaves a residue."""
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = process.alpha(t).tolist(), process.sigma(t).tolist()
    nodes = []
    for time, a, s in zip(times.tolist(), alpha, sigma, strict=True):
        if time == 0.0:
            a, s = 1.0, 0.0
        log_snr = math.inf if s == 0.0 else (-math.inf if a <= 0.0 else math.log(a) - math.log(s))
        nodes.append(Node(time, max(a, 0.0), s, log_snr))
    return nodes


def phi(n: int, k: float) -> float:
    """phi_1 = e^k - 1, phi_2 = phi_1 / k - 1, phi_3 = phi_2 / k - 1/2: k times the exponential integrator's phi_n.

    By its series k / n! + k^2 / (n + 1)! + ... where the recurrence would cancel.
    """
    if abs(k) < 0.05:
        return math.fsum(k**j / math.factorial(n + j - 1) for j in range(1, 10))
    return math.expm1(k) if n == 1 else phi(n - 1, k) / k - 1 / math.factorial(n - 1)


@dataclass(frozen=True)
class ExponentialStep:
    """The exact solution of the linear part from s to t, and the weights of a model's Taylor terms beside it.

    x_t = ratio x_s - scale (phi_1(k) m + phi_2(k) D1 + phi_3(k) D2), where D1 and D2 are h m' and h^2 m'' in lambda.
    Every DPM-Solver is this line: k = -h with the estimate x0 as model, k = h with eps, k = -2h for the SDE.
    """

    ratio: float
    scale: float
    k: float

    @property
    def first(self) -> float:
        """Weight of m."""
        return -self.scale * phi(1, self.k)

    @property
    def second(self) -> float:
        """Weight of D1."""
        return -self.scale * phi(2, self.k)

    @property
    def third(self) -> float:
        """Weight of D2."""
        return -self.scale * phi(3, self.k)


def data_step(s: Node, t: Node) -> ExponentialStep:
    """With the estimate x0 as model. Source: DPM-Solver++ (Lu et al. 2022), eq. 9."""
    return ExponentialStep(t.sigma / s.sigma, t.alpha, s.log_snr - t.log_snr)


def noise_step(s: Node, t: Node) -> ExponentialStep:
    """With eps as model. Source: DPM-Solver (Lu et al. 2022), eq. 3.7."""
    return ExponentialStep(t.alpha / s.alpha, t.sigma, t.log_snr - s.log_snr)


def ddim_weights(s: Node, t: Node) -> tuple[float, float]:
    """(weight of x, weight of x0) of the exact first-order step. Source: DPM-Solver++ (Lu et al. 2022), eq. 9.

    alpha_t (1 - e^-h) written as alpha_t - sigma_t alpha_s / sigma_s, which is finite also at pure noise and at data.
    """
    ratio = t.sigma / s.sigma
    return ratio, t.alpha - ratio * s.alpha


def implied_noise(draft: PlanDraft, node: Node) -> Row:
    """The eps that the call's own x and x0 imply at a node, as a row."""
    x, x0 = draft.symbols("x", "x0")
    return (x - node.alpha * x0) / node.sigma


def first_order(draft: PlanDraft, s: Node, t: Node) -> Row:
    """The exact first-order step as a row of x and x0."""
    weight_x, weight_x0 = ddim_weights(s, t)
    x, x0 = draft.symbols("x", "x0")
    return weight_x * x + weight_x0 * x0


def is_finite_step(s: Node, t: Node) -> bool:
    """Whether lambda is finite at both ends; where it is not, only first order has finite coefficients."""
    return math.isfinite(s.log_snr) and math.isfinite(t.log_snr)


def multistep_order(nodes: list[Node], i: int, order: int, lower_order_final: bool) -> int:
    """The order that step i of nodes can take: earlier nodes with finite lambda, and the steps that are left."""
    if not is_finite_step(nodes[i], nodes[i + 1]):
        return 1
    usable = sum(math.isfinite(node.log_snr) for node in nodes[: i + 1])
    # DPM-Solver++'s code: the last steps fall to second and first order.
    remaining = len(nodes) - 1 - i if lower_order_final else order
    return min(order, usable, remaining)


def is_published(variant: str) -> bool:
    """Whether a solver is to be as its paper's code has it, flaws kept. Raises UserError for an unknown variant."""
    if variant not in ("corrected", "published"):
        raise unknown_name("variant", variant, ("corrected", "published"))
    return variant == "published"
