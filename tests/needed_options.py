"""For tests that go through all solvers: the options that some cannot do without."""

import torch

from smalti.sampling.ems import EMS
from smalti.sampling.solvers import solver_entry


def constant_ems(l=1.0, s=0.0, b=0.0):  # noqa: E741
    """Statistics that are the same everywhere; by default those that know nothing, DPM-Solver++'s."""
    values = (torch.full((2,), value, dtype=torch.float64) for value in (l, s, b))
    return EMS(torch.tensor([-1.0, 1.0], dtype=torch.float64), *values)


def needed_options(solver, l=1.0, s=0.0, b=0.0):  # noqa: E741
    """A value for each option that the solver needs."""
    values = {"ems": constant_ems(l, s, b)}
    return {name: values[name] for name in solver_entry(solver).needs}
