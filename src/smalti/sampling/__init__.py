"""Solvers as tables (plans), the loop that runs them, time grids, guidance, thresholding and editing."""

from smalti.sampling.adaptive import solve_adaptive
from smalti.sampling.editing import InpaintDenoiser, noised, strength_to_start
from smalti.sampling.guidance import (
    AdaptiveProjectedGuidance,
    Autoguidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    RescaledGuidance,
    perturbed_attention,
)
from smalti.sampling.guidance_schedules import (
    CosineScale,
    GuidanceScale,
    GuidanceSchedule,
    IntervalScale,
    LinearScale,
    noise_level_interval,
)
from smalti.sampling.guided import GuidanceOptions
from smalti.sampling.plan import Plan, PlanDraft, Trajectories, run_plan, run_plans
from smalti.sampling.solvers import make_plan, solver_names
from smalti.sampling.thresholding import ClippedDenoiser, DynamicThreshold

__all__ = [
    "AdaptiveProjectedGuidance",
    "Autoguidance",
    "ClassifierFreeGuidance",
    "ClippedDenoiser",
    "CosineScale",
    "DynamicThreshold",
    "GuidanceOptions",
    "GuidanceScale",
    "GuidanceSchedule",
    "InpaintDenoiser",
    "IntervalScale",
    "LinearScale",
    "PerturbedAttentionGuidance",
    "Plan",
    "PlanDraft",
    "RescaledGuidance",
    "Trajectories",
    "make_plan",
    "noise_level_interval",
    "noised",
    "perturbed_attention",
    "run_plan",
    "run_plans",
    "solve_adaptive",
    "solver_names",
    "strength_to_start",
]
