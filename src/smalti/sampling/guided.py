"""One choice of guidance in plain values, for pipelines, the command line and servers."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from smalti.diffusion.processes import Process
from smalti.errors import UserError
from smalti.sampling.guidance import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    RescaledGuidance,
)
from smalti.sampling.guidance_schedules import CosineScale, GuidanceScale, IntervalScale, LinearScale, is_off
from smalti.types import Condition, Denoiser


@dataclass(frozen=True)
class GuidanceOptions:
    """How guidance is done, beside its scale.

    interval: (low, high) in t, guidance is off outside. schedule: the course of the scale from t = 1 to 0, with the
    scale as its mean ("linear" and "cosine" rise from 1). rescale: phi of RescaledGuidance. apg_eta: projected guidance
    with this share of the parallel part. pag_scale, pag_layers: perturbed attention in these layers. Raises UserError
    for a schedule or method that excludes another.
    """

    interval: tuple[float, float] = (0.0, 1.0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    rescale: float = 0.0
    apg_eta: float | None = None
    apg_norm_threshold: float | None = None
    pag_scale: float = 0.0
    pag_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.interval) != 2 or not 0.0 <= self.interval[0] < self.interval[1] <= 1.0:
            raise UserError(f"guidance interval={self.interval}: needed is 0 <= low < high <= 1, in t")
        if self.interval != (0.0, 1.0) and self.schedule != "constant":
            raise UserError(f"guidance interval={self.interval} and schedule={self.schedule!r}: give one of them")
        methods = {"rescale": self.rescale != 0, "apg_eta": self.apg_eta is not None, "pag_scale": self.pag_scale != 0}
        chosen = [name for name, on in methods.items() if on]
        if len(chosen) > 1:
            raise UserError(f"guidance {' and '.join(chosen)} exclude each other: give one of them")
        if self.apg_norm_threshold is not None and self.apg_eta is None:
            raise UserError("guidance apg_norm_threshold has no effect without apg_eta")
        if bool(self.pag_layers) != (self.pag_scale != 0):
            raise UserError(f"guidance pag_scale={self.pag_scale}, pag_layers={self.pag_layers}: give both or none")


def scheduled(scale: float | Tensor, options: GuidanceOptions) -> GuidanceScale:
    """The scale over t that the options ask for."""
    if options.schedule == "linear":
        return LinearScale(1.0, 2 * scale - 1)
    if options.schedule == "cosine":
        return CosineScale(1.0, 2 * scale - 1)
    if options.interval == (0.0, 1.0):
        return scale
    return IntervalScale(scale, *options.interval)


def guide(
    denoiser: Denoiser,
    null: Condition | None,
    guidance_scale: float | Tensor,
    options: GuidanceOptions,
    process: Process,
    perturbed: Denoiser | None = None,
) -> Denoiser:
    """The denoiser guided as the options say; a scale of 1 without any other method gives it back as it is.

    null: the unconditional or negative condition, a row a sample. perturbed: the denoiser with identity attention, for
    pag_scale. Raises UserError naming guidance_scale where there is no null condition.
    """
    off = is_off(guidance_scale, 1.0)
    if off and not options.pag_scale:
        return denoiser
    scale = guidance_scale if off else scheduled(guidance_scale, options)
    if options.pag_scale:
        assert perturbed is not None
        return PerturbedAttentionGuidance(denoiser, null, scale, perturbed, options.pag_scale)
    if options.apg_eta is not None:
        return AdaptiveProjectedGuidance(denoiser, null, scale, options.apg_eta, options.apg_norm_threshold)
    if options.rescale:
        return RescaledGuidance(denoiser, null, scale, options.rescale, process=process)
    return ClassifierFreeGuidance(denoiser, null, scale)
