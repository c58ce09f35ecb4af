"""Solvers as tables (plans), the loop that runs them, time grids and guidance."""

from smalti.sampling.guidance import ClassifierFreeGuidance, ClippedDenoiser
from smalti.sampling.plan import Plan, PlanDraft, Trajectories, VarianceDenoiser, run_plan, run_plans
from smalti.sampling.solvers import make_plan, solver_names

__all__ = [
    "ClassifierFreeGuidance",
    "ClippedDenoiser",
    "Plan",
    "PlanDraft",
    "Trajectories",
    "VarianceDenoiser",
    "make_plan",
    "run_plan",
    "run_plans",
    "solver_names",
]
