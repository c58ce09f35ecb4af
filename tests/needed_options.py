"""For tests that go through all solvers: the options that some cannot do without."""

from smalti.sampling.ems import constant_ems
from smalti.sampling.solvers import solver_entry


def needed_options(solver, l=1.0, s=0.0, b=0.0):  # noqa: E741
    """A value for each; statistics of the network are constants, by default those that know nothing."""
    values = {"ems": constant_ems(l, s, b)}
    return {name: values[name] for name in solver_entry(solver).needs}
