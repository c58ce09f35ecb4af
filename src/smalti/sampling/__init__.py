"""Solvers as tables (plans), the loop that runs them, time grids and guidance."""

from smalti.sampling.adaptive import solve_adaptive
from smalti.sampling.guidance import ClassifierFreeGuidance, ClippedDenoiser
from smalti.sampling.plan import Plan, PlanDraft, Trajectories, run_plan, run_plans
from smalti.sampling.solvers import make_plan, solver_names

__all__ = [
    "ClassifierFreeGuidance",
    "ClippedDenoiser",
    "Plan",
    "PlanDraft",
    "Trajectories",
    "make_plan",
    "run_plan",
    "run_plans",
    "solve_adaptive",
    "solver_names",
]
