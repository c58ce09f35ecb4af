"""Empirical model statistics (EMS): how a network's estimates move along its own ODE, measured once per network.

DPM-Solver-v3 reads them. In y = x / alpha the probability flow is dy/dlambda = x0 - y, and the paper's quantities need
neither alpha nor sigma: with m = 1 - l, f = m y - x0, and along the flow f' = m (x0 - y) + m' y - dx0/dlambda.
So they hold on any process that the network is sampled on, at equal lambda.
Source: Zheng et al. 2023 (DPM-Solver-v3), section 3.
"""

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smalti import rng
from smalti.diffusion.prediction import per_sample
from smalti.diffusion.process import Process
from smalti.errors import UserError
from smalti.types import Condition, Denoiser

# In lambda. Within it a network's own fine wiggles outweigh the curvature that a solver's step can use: exact
# derivatives (width 0) made the solver worse than DPM-Solver++ on a trained run, see docs/LOG.md.
SECANT_WIDTH = 0.3
_LARGEST_PIECE = 0.25  # in lambda: what one set of Gauss points integrates to rounding
_GAUSS_POINTS = 4


@dataclass(frozen=True)
class EMSOrigin:
    """What statistics were measured on; None where that is not known. secant_width, shrink: see estimate_ems."""

    process: str | None = None
    prediction_type: str | None = None
    checkpoint: str | None = None
    guidance_scale: float | None = None
    num_samples: int | None = None
    secant_width: float | None = None
    shrink: bool | None = None


@dataclass(frozen=True, eq=False, repr=False)
class EMS:
    """Statistics of one network, at rising lambda from noise to data; between nodes they are linear.

    log_snrs: float64 [N + 1]. l, s, b: float64 [N + 1, *shape of one sample], or [N + 1] the same for all elements.
    l = 1, s = b = 0 makes DPM-Solver-v3 the data prediction of DPM-Solver++. origin: what they were measured on.
    Raises UserError for shapes that do not fit and for values that are not finite.
    """

    log_snrs: Tensor
    l: Tensor  # noqa: E741 (the paper's letter)
    s: Tensor
    b: Tensor
    origin: EMSOrigin = field(default_factory=EMSOrigin)

    def __post_init__(self) -> None:
        for name in ("log_snrs", "l", "s", "b"):
            value = getattr(self, name)
            if value.dtype != torch.float64 or not bool(torch.isfinite(value).all()):
                raise UserError(f"ems.{name} of dtype {value.dtype} must hold finite float64 numbers")
        nodes = self.log_snrs
        if nodes.ndim != 1 or len(nodes) < 2 or not bool((nodes.diff() > 0).all()):
            raise UserError(f"ems.log_snrs of shape {tuple(nodes.shape)} must be two or more rising numbers")
        shapes = [tuple(value.shape) for value in (self.l, self.s, self.b)]
        if len(set(shapes)) != 1 or shapes[0][:1] != (len(nodes),):
            raise UserError(f"ems.l, s and b have shapes {shapes}: needed is one shape [{len(nodes)}, ...] for all")

    def at(self, log_snr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """l, s and b at lambda [points], each [points, *shape]; beyond the nodes they stay what they are at the end."""
        nodes = self.log_snrs
        right = torch.searchsorted(nodes, log_snr).clamp(1, len(nodes) - 1)
        fraction = ((log_snr - nodes[right - 1]) / (nodes[right] - nodes[right - 1])).clamp(0, 1)
        l, s, b = (torch.lerp(v[right - 1], v[right], per_sample(fraction, v)) for v in (self.l, self.s, self.b))  # noqa: E741
        return l, s, b


@dataclass(frozen=True)
class EMSIntegrals:
    """Integrals of the statistics over one step from lambda_i to lambda_t, all relative to its beginning.

    With L and S the integrals of l and s from lambda_i (each field: one sample's shape):
    L, S: over the whole step. B: of e^-S b. E[k]: of e^(L + S) (lambda - lambda_i)^k / k!. C: of e^(L + S) B.
    The paper takes differences of integrals from lambda_T; relative ones neither cancel nor overflow.
    """

    L: Tensor
    S: Tensor
    B: Tensor
    E: tuple[Tensor, ...]
    C: Tensor


def _gauss_rule() -> tuple[Tensor, Tensor, Tensor]:
    """Points c and weights w of Gauss's rule on [0, 1], and A[j, k], the integral to c_j of the k-th Lagrange basis."""
    nodes, weights = np.polynomial.legendre.leggauss(_GAUSS_POINTS)
    points = (nodes + 1) / 2
    powers = np.arange(_GAUSS_POINTS)
    to_points = points[:, None] ** (powers + 1) / (powers + 1)
    inner = to_points @ np.linalg.inv(points[:, None] ** powers)
    return torch.from_numpy(points), torch.from_numpy(weights / 2), torch.from_numpy(inner)


def ems_integrals(ems: EMS, start: float, end: float, terms: int) -> EMSIntegrals:
    """The integrals over the step from lambda = start to end, with terms entries in E.

    l, s and b are linear between nodes, so Gauss's rule on each piece leaves an error near rounding.
    Raises UserError for statistics so large that an integral overflows.
    """
    even = torch.linspace(start, end, math.ceil((end - start) / _LARGEST_PIECE) + 1, dtype=torch.float64)
    inside = ems.log_snrs[(ems.log_snrs > start) & (ems.log_snrs < end)]
    edges = torch.unique(torch.cat([even, inside]))
    points, weights, inner = _gauss_rule()
    lengths = edges.diff()
    log_snrs = edges[:-1, None] + lengths[:, None] * points  # [pieces, points]
    l, s, b = (v.reshape(*log_snrs.shape, *v.shape[1:]) for v in ems.at(log_snrs.flatten()))  # noqa: E741

    def over_pieces(values: Tensor) -> Tensor:
        return per_sample(lengths, values[:, 0]) * torch.einsum("k,nk...->n...", weights, values)

    def running(values: Tensor) -> Tensor:
        """The integral from start to each point, and so of the shape of values."""
        whole = over_pieces(values)
        before = whole.cumsum(0) - whole
        return before[:, None] + per_sample(lengths, values) * torch.einsum("jk,nk...->nj...", inner, values)

    running_s = running(s)
    drag = torch.exp(-running_s) * b
    weight = torch.exp(running(l) + running_s)
    since = per_sample((log_snrs - start).flatten(), l.flatten(0, 1)).reshape(*log_snrs.shape, *[1] * (l.ndim - 2))
    integrals = EMSIntegrals(
        over_pieces(l).sum(0),
        over_pieces(s).sum(0),
        over_pieces(drag).sum(0),
        tuple(over_pieces(weight * since**k / math.factorial(k)).sum(0) for k in range(terms)),
        over_pieces(weight * running(drag)).sum(0),
    )
    if not all(bool(torch.isfinite(v).all()) for v in (integrals.B, *integrals.E, integrals.C)):
        raise UserError(
            f"ems overflows between lambda={start:.2f} and {end:.2f}, where s reaches {float(s.abs().max()):.3g}: "
            "measure it on more samples or with a wider secant"
        )
    return integrals


def _log_snr_range(process: Process, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    start, end = process.t_max if t_start is None else t_start, process.t_min if t_end is None else t_end
    if not 0.0 <= end < start <= 1.0:
        raise UserError(f"t_start={start}, t_end={end}: needed is 0 <= t_end < t_start <= 1")
    if t_start is None and float(process.alpha(torch.tensor(start, dtype=torch.float64))) == 0.0:
        start -= 1e-3  # a table that ends at pure noise
    first, last = process.log_snr(torch.tensor([start, end], dtype=torch.float64)).tolist()
    if not (math.isfinite(first) and math.isfinite(last)):
        raise UserError(f"t_start={start}, t_end={end}: lambda is infinite at pure noise and at data, go less far")
    return first, last


def _sums(probe: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over a batch: of v Jv and its square [2, *shape], of q = (y, x0, dx0/dlambda), of q q^T. In widest_float."""
    probes = torch.stack([probe.sum(0), probe.square().sum(0)])
    return probes, q.sum(1), torch.einsum("ib...,jb...->ij...", q, q)


def _at(process: Process, log_snr: float, like: Tensor) -> tuple[Tensor, float]:
    """t, one a row of like [batch, ...], and alpha at lambda."""
    t = process.t_of_log_snr(torch.tensor([log_snr], dtype=torch.float64))
    return t.to(like.device, rng.widest_float(like.device)).repeat(len(like)), float(process.alpha(t))


def _rate(
    denoiser: Denoiser,
    process: Process,
    log_snr: float,
    ends: tuple[float, float],
    y: Tensor,
    guess: Tensor,
    cond: Condition | None,
) -> Tensor:
    """dx0/dlambda along the flow at y with estimate guess: the secant between ends, or the derivative if they meet."""
    t, alpha = _at(process, log_snr, y)
    before, after = ends
    if before == after:
        # The flow's direction in (x, t): dx/dlambda = (d ln alpha / dlambda) x + alpha (x0 - y), dt/dlambda.
        alpha_rate, sigma_rate = process.alpha_dot(t[:1]) / alpha, process.sigma_dot(t[:1]) / process.sigma(t[:1])
        t_rate = 1 / float(alpha_rate - sigma_rate)
        direction = alpha * (float(alpha_rate) * t_rate * y + guess - y)
        steps = (direction, torch.full_like(t, t_rate))
        rate: Tensor
        _, rate, *_ = torch.func.jvp(lambda x, t: denoiser(x, t, cond), (alpha * y, t), steps)
        return rate

    def estimate(end: float) -> Tensor:
        # A constant estimate carries y there up to O(d^2), even in the distance d: the difference loses it.
        t, alpha = _at(process, end, y)
        kept = math.exp(log_snr - end)
        return denoiser(alpha * (kept * y + (1 - kept) * guess), t, cond)

    return (estimate(after) - estimate(before)) / (after - before)


def _measure(
    denoiser: Denoiser,
    process: Process,
    log_snr: float,
    ends: tuple[float, float],
    x0: Tensor,
    z: Tensor,
    v: Tensor,
    cond: Condition | None,
) -> tuple[Tensor, Tensor]:
    """v alpha (d x0 / d x) v, and q = (y, x0, dx0/dlambda along the flow), at y = x0 + e^-lambda z of one batch."""
    t, alpha = _at(process, log_snr, x0)
    y = x0 + math.exp(-log_snr) * z
    guess, along_probe, *_ = torch.func.jvp(lambda x: denoiser(x, t, cond), (alpha * y,), (v,))
    rate = _rate(denoiser, process, log_snr, ends, y, guess, cond)
    wide = rng.widest_float(x0.device)
    return (v * along_probe).to(wide) * alpha, torch.stack([y, guess, rate]).to(wide)


def estimate_ems(
    denoiser_for: Callable[[Tensor], Denoiser],
    process: Process,
    x0: Tensor,
    cond: Condition | None = None,
    *,
    num_nodes: int = 120,
    t_start: float | None = None,
    t_end: float | None = None,
    secant_width: float = SECANT_WIDTH,
    shrink: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> EMS:
    """Measure a network's statistics on clean samples x0 [K, ...]; the paper takes 4096, shrunk 128 and more will do.

    denoiser_for(rows) is the denoiser of those rows of x0 (int64 [batch]), guided as it will be when sampling; cond is
    gathered likewise. num_nodes: intervals, even in lambda between t_start and t_end (default: process.t_max and
    t_min). x is drawn from the forward process with noise addressed by seed and row, the same at every node, so that
    the statistics are smooth in lambda. Each node costs a Jacobian-vector product in x, for which the estimates must
    be differentiable, and two forwards a sample. progress(done, total) counts nodes times batches.
    secant_width: over how much of lambda dx0/dlambda is taken, as a secant along the flow; 0 takes the derivative
    itself, as the paper does. shrink: draw each element's l and s towards the mean of all, by what their noise of K
    samples is beside their spread; the paper does not. Source: Zheng et al. 2023, section 3.
    Raises UserError for too few samples or nodes, a negative secant_width and an infinite lambda.
    """
    if num_nodes < 2:
        raise UserError(f"num_nodes={num_nodes} must be at least 2")
    if len(x0) < 3:
        raise UserError(f"x0 has {len(x0)} samples: at least 3 are needed, some hundreds for use")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if not (0.0 <= secant_width < math.inf):
        raise UserError(f"secant_width={secant_width} must be 0 (the derivative itself) or a width in lambda")
    first, last = _log_snr_range(process, t_start, t_end)
    nodes = torch.linspace(first, last, num_nodes + 1, dtype=torch.float64)
    shape, device = tuple(x0.shape[1:]), x0.device
    totals: list[tuple[Tensor, ...]] = []
    batches = torch.arange(len(x0), device=device).split(batch_size)
    for i, rows in enumerate(batches):
        z = rng.normal(shape, seed=seed, purpose="ems/noise", index=rows, device=device, dtype=x0.dtype)
        words = rng.random_words(math.prod(shape), seed=seed, purpose="ems/probe", index=rows, device=device)
        v = (2 * (words & 1) - 1).to(x0.dtype).reshape(-1, *shape)  # Rademacher
        batch_cond = None if cond is None else cond.map(itemgetter(rows))
        denoiser = denoiser_for(rows)
        # Fused attention kernels have no forward-mode derivative.
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for k, log_snr in enumerate(nodes.tolist()):
                ends = max(log_snr - secant_width / 2, first), min(log_snr + secant_width / 2, last)
                sums = _sums(*_measure(denoiser, process, log_snr, ends, x0[rows], z, v, batch_cond))
                if i == 0:
                    totals.append(sums)
                else:
                    totals[k] = tuple(total + part for total, part in zip(totals[k], sums, strict=True))
                if progress is not None:
                    progress(i * len(nodes) + k + 1, len(batches) * len(nodes))
    probes, means, products = (torch.stack(values).cpu().double() / len(x0) for values in zip(*totals, strict=True))
    m = probes[:, 0]
    if shrink:
        noise = (probes[:, 1] - m.square()).clamp(min=0) / (len(x0) - 1)
        m = _shrunk(m, noise, torch.ones_like(m))
    origin = EMSOrigin(process.name, num_samples=len(x0), secant_width=secant_width, shrink=shrink)
    return EMS(nodes, 1 - m, *_regression(nodes, m, means, products, len(x0) if shrink else None), origin)


def _shrunk(values: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """values [N + 1, *shape] drawn towards their weighted mean at each node, by their noise beside their spread.

    noise: the variance of each as an estimate. What the values vary by beyond it is taken for their true variance.
    Source: DerSimonian and Laird 1986 (random effects), an empirical Bayes estimate.
    """
    elements = tuple(range(1, values.ndim))
    total = weight.sum(elements, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    mean = (weight * values).sum(elements, keepdim=True) / total
    excess = torch.where(weight > 0, weight * ((values - mean).square() - noise), 0)
    spread = (excess.sum(elements, keepdim=True) / total).clamp(min=0)
    kept = torch.where(spread > 0, spread / (spread + noise), 0)
    return mean + kept * (values - mean)


def _regression(
    nodes: Tensor, m: Tensor, means: Tensor, products: Tensor, shrunk_by: int | None
) -> tuple[Tensor, Tensor]:
    """s and b, the line through f' over f; m = 1 - l. Source: Zheng et al. 2023, section 3.2.

    means [N + 1, 3, *shape] and products [N + 1, 3, 3, *shape]: of y, x0 and dx0/dlambda. shrunk_by: how many samples
    they are of, where s is to be shrunk.
    """
    (m_rate,) = torch.gradient(m, spacing=(nodes,), dim=0, edge_order=2)
    zero, one = torch.zeros_like(m), torch.ones_like(m)
    # In (y, x0, dx0/dlambda); with n = y - x0 for x0 the variance of f would cancel at high noise.
    of_f = torch.stack([m, -one, zero], 1)
    of_rate = torch.stack([m_rate - m, m, -one], 1)
    mean_f, mean_rate = (of_f * means).sum(1), (of_rate * means).sum(1)
    covariance = products - means[:, :, None] * means[:, None, :]
    with_f = torch.einsum("nij...,nj...->ni...", covariance, of_f)
    variance, shared = (of_f * with_f).sum(1), (of_rate * with_f).sum(1)
    # Where f is the same for all samples (a linear score, a pixel that is always black) there is no slope to see: its
    # variance is below the rounding of what it was summed from.
    summed = of_f.square().mul(products.diagonal(0, 1, 2).movedim(-1, 1)).sum(1)
    seen = variance > 1e-12 * (mean_f.square() + 0.1 * summed)
    safe_variance = torch.where(seen, variance, one)
    s = torch.where(seen, shared / safe_variance, zero)
    if shrunk_by is not None:
        rate_variance = (of_rate * torch.einsum("nij...,nj...->ni...", covariance, of_rate)).sum(1)
        residual = (rate_variance - s * shared).clamp(min=0) / (shrunk_by - 2)
        s = _shrunk(s, torch.where(seen, residual / safe_variance, math.inf), torch.where(seen, variance, zero))
    return s, mean_rate - s * mean_f


def save_ems(ems: EMS, path: Path) -> None:
    """Write an .npz of log_snrs, l, s, b and the origin (as JSON). Raises UserError where it cannot be written."""
    arrays = {name: getattr(ems, name).numpy() for name in ("log_snrs", "l", "s", "b")}
    try:
        with path.open("wb") as file:
            np.savez(file, origin=np.array(json.dumps(asdict(ems.origin))), **arrays)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def load_ems(path: str | Path) -> EMS:
    """Read what save_ems wrote. Raises UserError where there is no such file, or it is not one of these."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            log_snrs, l, s, b = (torch.from_numpy(archive[name]) for name in ("log_snrs", "l", "s", "b"))  # noqa: E741
            origin = EMSOrigin(**json.loads(str(archive["origin"])))
    except OSError as error:
        raise UserError(f"ems={str(path)!r}: {error.strerror or error}; `smalti ems RUN` writes RUN/ems.npz") from None
    except (KeyError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"ems={str(path)!r} is not a file of `smalti ems`: {error}") from None
    return EMS(log_snrs, l, s, b, origin)
