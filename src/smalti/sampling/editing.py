"""Sampling that begins at a picture or keeps a part of one: img2img and inpainting, with any solver."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.diffusion.objective import noisy_input
from smalti.diffusion.processes import Process
from smalti.errors import UserError
from smalti.rng import widest_float
from smalti.sampling.wrapped import Estimate, Estimator, WrappedDenoiser
from smalti.types import Condition, Denoiser


def strength_to_start(process: Process, strength: float) -> float:
    """Where img2img begins: t_start = t_min + strength (t_max - t_min), the process's own range.

    strength 1 is the process's noisiest time, where little of the picture is left; near 0 the picture is kept. It is a
    share of the time t, not of the noise level. Raises UserError for a strength outside (0, 1].
    Source: SDEdit (Meng et al. 2022), section 3, where t_start is t_0.
    """
    if not 0.0 < strength <= 1.0:
        raise UserError(f"strength={strength} must lie in (0, 1]")
    return process.t_min + strength * (process.t_max - process.t_min)


def noised(process: Process, x0: Tensor, t: float, eps: Tensor) -> Tensor:
    """The picture x0 [batch, ...] taken to time t: alpha(t) x0 + sigma(t) eps, where a plan with t_start = t begins.

    Raises UserError for a t outside [0, 1] and for noise of another shape.
    """
    if not 0.0 <= t <= 1.0:
        raise UserError(f"t={t} must lie in [0, 1]")
    if eps.shape != x0.shape:
        raise UserError(f"eps has shape {tuple(eps.shape)}, that of x0 is needed: {tuple(x0.shape)}")
    times = torch.full((x0.shape[0],), t, dtype=widest_float(x0.device), device=x0.device)
    return noisy_input(process, times, x0, eps)


def _check_mask(mask: Tensor, known: Tensor) -> None:
    batch, channels, *extent = known.shape
    fits = mask.ndim == known.ndim and mask.shape[0] in (1, batch) and mask.shape[1] in (1, channels)
    if not fits or list(mask.shape[2:]) != extent:
        needed = f"[1 or {batch}, 1 or {channels}, {', '.join(map(str, extent))}]"
        raise UserError(f"mask has shape {tuple(mask.shape)}, needed is {needed}")
    if not mask.is_floating_point():
        raise UserError(f"mask is {mask.dtype}, a floating-point type is needed: 1 = to be painted, 0 = kept")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        low, high = float(mask.min()), float(mask.max())
        raise UserError(f"mask has values from {low:g} to {high:g}, they must lie in [0, 1]")


@dataclass(frozen=True)
class InpaintDenoiser(WrappedDenoiser):
    """Paints where mask is 1 and keeps `known` where it is 0; values between blend.

    Before the estimate the kept region of x is replaced by alpha(t) known + sigma(t) noise, after it the estimate by
    known. The loop knows nothing of it, so every solver works. It goes around guidance and thresholding.
    known, noise: [batch, channels, ...], the shape of x. noise: that of the trajectory's start is best, since then a
    deterministic solver's own x agrees with the replaced one. mask: [1 or batch, 1 or channels, ...].
    Replacement is no exact conditional sampling: the painted region follows `known` less than it should. Of two pixels
    with correlation 0.8 the painted one follows by 0.35 under an ODE solver and by 0.49 under 400 steps of ddpm; 0.8 is
    right. More noise and repeated steps bring it nearer (RePaint, Lugmayr et al. 2022).
    Raises UserError naming mask, known or noise. Source: Song et al. 2021, appendix I.2.
    """

    denoiser: Denoiser
    process: Process
    known: Tensor
    mask: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        if self.known.ndim < 3:
            raise UserError(f"known has shape {tuple(self.known.shape)}, needed is [batch, channels, ...]")
        if not bool(torch.isfinite(self.known).all()):
            raise UserError("known has entries that are NaN or infinite: needed are finite numbers")
        if self.noise.shape != self.known.shape:
            shape = tuple(self.known.shape)
            raise UserError(f"noise has shape {tuple(self.noise.shape)}, that of known is needed: {shape}")
        _check_mask(self.mask, self.known)

    def estimate(self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
        """The estimate of the painted region in sight of the noised known one."""
        if self.known.shape != x.shape:
            raise UserError(f"known has shape {tuple(self.known.shape)}, that of x is needed: {tuple(x.shape)}")
        known, mask = self.known.to(x.dtype), self.mask.to(x.dtype)
        seen = torch.lerp(noisy_input(self.process, t, known, self.noise.to(x.dtype)), x, mask)
        x0, logits = inner(self.denoiser, seen, t, cond)
        return torch.lerp(known, x0, mask), logits
