"""Solvers as tables (plans), the loop that runs them, time grids and guidance."""

from smalti.sampling.guidance import ClassifierFreeGuidance, ClippedDenoiser
from smalti.sampling.plan import Plan, PlanDraft, run_plan
from smalti.sampling.solvers import make_plan, solver_names

__all__ = ["ClassifierFreeGuidance", "ClippedDenoiser", "Plan", "PlanDraft", "make_plan", "run_plan", "solver_names"]
