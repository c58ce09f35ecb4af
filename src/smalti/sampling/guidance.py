"""Guidance wraps a denoiser and gives a denoiser. It takes and gives x0 estimates and acts on all channels.

Eps, v and velocity are affine in x0 at a given x, so an affine combination of x0 estimates with weights that sum to 1
equals the same combination done on any of them. What is not affine in x0 says in which space it works.
"""

from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from smalti.diffusion.denoiser import NetworkDenoiser
from smalti.diffusion.prediction import convert_prediction, prediction_types
from smalti.diffusion.processes import Process
from smalti.errors import UserError, unknown_name
from smalti.sampling.guidance_schedules import GuidanceScale, check_scale, is_off, name_scale, scale_at
from smalti.sampling.wrapped import Estimate, Estimator, WrappedDenoiser, x0_alone
from smalti.types import Backbone, Condition, Denoiser, concat_conditions


def _check_rows(field: str, cond: Condition, batch: int) -> None:
    for f in fields(cond):
        value = getattr(cond, f.name)
        if value is not None and value.shape[0] != batch:
            raise UserError(f"{field}.{f.name} has {value.shape[0]} rows, one a sample is needed: {batch}")


@dataclass(frozen=True)
class ClassifierFreeGuidance(WrappedDenoiser):
    """x0 = x0_null + guidance_scale (x0_cond - x0_null), both halves in one forward.

    null: the unconditional or negative condition, a row a sample; None only where guidance_scale is 1.
    guidance_scale: a number (1 = off, and then no null rows are computed), one a sample [batch], or a schedule of t.
    Raises UserError naming guidance_scale, null or cond. Source: Ho and Salimans 2022, eq. 6, with scale = 1 + w.
    """

    denoiser: Denoiser
    null: Condition | None
    guidance_scale: GuidanceScale

    def __post_init__(self) -> None:
        check_scale("guidance_scale", self.guidance_scale)
        if self.null is None and not is_off(self.guidance_scale, 1.0):
            raise UserError(
                f"guidance_scale={name_scale(self.guidance_scale)} needs a null condition and null is None: "
                "an unconditional network takes 1 alone"
            )

    def estimate(self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
        """The guided x0; the variance logits are the conditional rows', as in DiT's forward_with_cfg."""
        guided, _, logits = self._guided(inner, x, t, cond)
        return guided, logits

    def _guided(
        self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(guided x0, conditional x0, variance logits)."""
        if is_off(self.guidance_scale, 1.0):
            conditional, logits = inner(self.denoiser, x, t, cond)
            return conditional, conditional, logits
        conditional, unconditional, logits = self._halves(inner, x, t, cond)
        # Ho and Salimans 2022, eq. 6: (1 + w) cond - w null.
        guided = torch.lerp(unconditional, conditional, scale_at("guidance_scale", self.guidance_scale, t, conditional))
        return guided, conditional, logits

    def _halves(
        self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(conditional x0, null x0, the conditional rows' variance logits) from one forward of twice the batch."""
        if cond is None:
            raise UserError(f"guidance_scale={name_scale(self.guidance_scale)} needs a condition and cond is missing")
        assert self.null is not None
        _check_rows("cond", cond, x.shape[0])
        _check_rows("null", self.null, x.shape[0])
        both = concat_conditions(cond, self.null)
        x0, logits = inner(self.denoiser, torch.cat([x, x]), torch.cat([t, t]), both)
        conditional, unconditional = x0.chunk(2)
        return conditional, unconditional, None if logits is None else logits.chunk(2)[0]


def rescale_to_conditional(guided: Tensor, conditional: Tensor, guidance_rescale: float) -> Tensor:
    """guided [batch, ...] with its standard deviation per sample moved to that of conditional.

    guidance_rescale (phi) in [0, 1] blends: 0 leaves guided, 1 gives it all of conditional's.
    """
    axes = tuple(range(1, guided.ndim))
    std_guided = guided.std(axes, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)  # a constant stays as it is
    # Lin et al. 2023, eq. 15 and 16.
    factor = conditional.std(axes, keepdim=True) / std_guided
    return guided * torch.lerp(torch.ones_like(factor), factor, guidance_rescale)


@dataclass(frozen=True)
class RescaledGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance whose result keeps the conditional estimate's standard deviation.

    guidance_rescale: phi in [0, 1]; the paper uses 0.7. space: the prediction type whose standard deviation is meant:
    "x0", or what the network predicts ("eps", "v", "velocity"), which is what the paper and diffusers'
    rescale_noise_cfg do and needs the process. "eps" has no x0 at pure noise (alpha = 0): begin below it. The other
    fields are ClassifierFreeGuidance's. Raises UserError naming the field. Source: Lin et al. 2023, eq. 15 and 16.
    """

    guidance_rescale: float
    space: str = "x0"
    process: Process | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise UserError(f"guidance_rescale={self.guidance_rescale} must lie in [0, 1]")
        if self.space not in prediction_types():
            raise unknown_name("space", self.space, prediction_types())
        if self.space != "x0" and self.process is None:
            raise UserError(f"space={self.space!r} needs the process that x0 is converted by: process is missing")

    def estimate(self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
        """The guided and rescaled x0."""
        guided, conditional, logits = self._guided(inner, x, t, cond)
        if self.process is None or self.space == "x0":
            return rescale_to_conditional(guided, conditional, self.guidance_rescale), logits
        guided, conditional = (
            convert_prediction("x0", self.space, self.process, t, x, x0) for x0 in (guided, conditional)
        )
        rescaled = rescale_to_conditional(guided, conditional, self.guidance_rescale)
        return convert_prediction(self.space, "x0", self.process, t, x, rescaled), logits


@dataclass(frozen=True)
class Autoguidance(WrappedDenoiser):
    """x0 = x0_weak + guidance_scale (x0_strong - x0_weak): a smaller or less trained network in the null's place.

    weaker: another denoiser of the same process, a forward of its own. weaker_cond: its condition, where that is not
    the strong one's. A guidance_scale of 1 does not run it. Source: Karras et al. 2024, "Guiding a diffusion model with
    a bad version of itself", eq. 3 (their D1 is the strong network, D0 the weak one).
    """

    denoiser: Denoiser
    weaker: Denoiser
    guidance_scale: GuidanceScale
    weaker_cond: Condition | None = None

    def __post_init__(self) -> None:
        check_scale("guidance_scale", self.guidance_scale)

    def estimate(self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
        """The guided x0; the variance logits are the strong network's."""
        strong, logits = inner(self.denoiser, x, t, cond)
        if is_off(self.guidance_scale, 1.0):
            return strong, logits
        if self.weaker_cond is not None:
            _check_rows("weaker_cond", self.weaker_cond, x.shape[0])
        weak, _ = x0_alone(self.weaker, x, t, cond if self.weaker_cond is None else self.weaker_cond)
        return torch.lerp(weak, strong, scale_at("guidance_scale", self.guidance_scale, t, x)), logits


def project(difference: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of difference [batch, ...] parallel and orthogonal to onto, per sample, all axes together."""
    axes = tuple(range(1, onto.ndim))
    wide = torch.promote_types(onto.dtype, torch.float32)
    length = onto.to(wide).square().sum(axes, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    parallel = ((difference.to(wide) * onto.to(wide)).sum(axes, keepdim=True) / length).to(onto.dtype) * onto
    return parallel, difference - parallel


@dataclass(frozen=True)
class AdaptiveProjectedGuidance(ClassifierFreeGuidance):
    """x0 = x0_cond + (guidance_scale - 1) d, d = the orthogonal + eta times the parallel part of x0_cond - x0_null.

    The parallel part (along x0_cond) saturates colours; eta = 0 drops it (perpendicular guidance), eta = 1 without a
    threshold is classifier-free guidance. norm_threshold (the paper's r): the difference is first shortened to at most
    this L2 norm; None leaves it. The paper's momentum over steps is left out: it would make a denoiser depend on its
    earlier calls. The other fields are ClassifierFreeGuidance's. Raises UserError naming the field.
    Source: Sadat et al. 2024, "Eliminating oversaturation and artifacts of high guidance scales" (APG).
    """

    eta: float = 0.0
    norm_threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_threshold is not None and not self.norm_threshold > 0:
            raise UserError(f"norm_threshold={self.norm_threshold} must be above 0, or None for no threshold")

    def estimate(self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
        """The guided x0; the variance logits are the conditional rows'."""
        if is_off(self.guidance_scale, 1.0):
            return inner(self.denoiser, x, t, cond)
        conditional, unconditional, logits = self._halves(inner, x, t, cond)
        difference = conditional - unconditional
        if self.norm_threshold is not None:
            norm = torch.linalg.vector_norm(difference, dim=tuple(range(1, x.ndim)), keepdim=True)
            tiny = torch.finfo(norm.dtype).tiny
            difference = difference * (self.norm_threshold / norm.clamp_min(tiny)).clamp(max=1.0)
        parallel, orthogonal = project(difference, conditional)
        scale = scale_at("guidance_scale", self.guidance_scale, t, x)
        return conditional + (scale - 1) * (orthogonal + self.eta * parallel), logits


@runtime_checkable
class PerturbableBackbone(Protocol):
    """A network whose self-attention can be made the identity map in chosen layers."""

    def with_identity_attention(self, layers: tuple[int, ...]) -> Backbone:
        """A view of the network, all weights shared, in whose `layers` each token attends to itself alone."""
        ...


def perturbed_attention(denoiser: NetworkDenoiser, layers: tuple[int, ...]) -> NetworkDenoiser:
    """The denoiser with identity self-attention in `layers`, for PerturbedAttentionGuidance; weights are shared.

    Raises UserError for a layer that is out of range and for a network without with_identity_attention.
    """
    backbone = denoiser.backbone
    if not isinstance(backbone, PerturbableBackbone):
        raise UserError(f"network {type(backbone).__name__} has no with_identity_attention, which pag_scale needs")
    return replace(denoiser, backbone=backbone.with_identity_attention(layers))


@dataclass(frozen=True)
class PerturbedAttentionGuidance(ClassifierFreeGuidance):
    """x0 = x0_null + guidance_scale (x0_cond - x0_null) + pag_scale (x0_cond - x0_perturbed).

    perturbed: the same network with identity self-attention in some layers (`perturbed_attention`), under the same
    condition, a forward of its own. pag_scale: 0 = off; a number, one a sample, or a schedule. The other fields are
    ClassifierFreeGuidance's; null = None and guidance_scale = 1 give x0_cond + pag_scale (x0_cond - x0_perturbed).
    Raises UserError naming the field. Source: Ahn et al. 2024, "Self-rectifying diffusion sampling with
    perturbed-attention guidance".
    """

    perturbed: Denoiser
    pag_scale: GuidanceScale

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("pag_scale", self.pag_scale)

    def estimate(self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
        """The guided x0; the variance logits are the conditional rows'."""
        guided, conditional, logits = self._guided(inner, x, t, cond)
        if is_off(self.pag_scale, 0.0):
            return guided, logits
        perturbed, _ = x0_alone(self.perturbed, x, t, cond)
        scale = scale_at("pag_scale", self.pag_scale, t, x)
        return guided + scale * (conditional - perturbed), logits
