"""Solvers: one short function each, from a process and a time grid to a Plan; here their registry.

Notation of a step from s to t: alpha, sigma at each, lambda = ln(alpha / sigma), h = lambda_t - lambda_s > 0.
A grid may begin at pure noise (alpha = 0) and end at data (sigma = 0), where lambda is infinite: the steps there fall
back to first order, whose coefficients stay finite.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_type_hints

import torch

from smalti.diffusion.processes import Process
from smalti.errors import UserError, unknown_name
from smalti.sampling.grids import explicit_grid, time_grid
from smalti.sampling.masked import MASKED_SOLVER, check_masked_options
from smalti.sampling.plan import Plan
from smalti.sampling.solvers.ancestral import ddim, ddpm
from smalti.sampling.solvers.consistency import consistency, lcm
from smalti.sampling.solvers.dpm_solver_v3 import dpm_solver_v3
from smalti.sampling.solvers.edm import edm_euler, edm_heun
from smalti.sampling.solvers.flow import flow_euler, flow_heun, flow_midpoint, flow_rk4
from smalti.sampling.solvers.interpolant import sde_euler, sde_heun
from smalti.sampling.solvers.multistep import dpmpp_2m, dpmpp_3m, dpmpp_sde_1, dpmpp_sde_2m, dpmpp_sde_3m
from smalti.sampling.solvers.singlestep import dpm_solver_1, dpm_solver_2, dpm_solver_3, dpmpp_2s, dpmpp_3s
from smalti.sampling.solvers.unipc import unipc_2, unipc_3

__all__ = ["SolverEntry", "check_option_names", "make_plan", "solver_entry", "solver_names"]


@dataclass(frozen=True)
class SolverEntry:
    """A solver in the registry.

    order: of convergence, for a solver of kind "ode"; of the drift, for "sde" (solvers that draw noise by default).
    spacing: its default. calls_per_step: network calls that one of num_inference_steps costs. min_steps: the least
    num_inference_steps. options: what make_plan passes on to build. needs: those of them that must be given, each with
    what the user is to do for it.
    """

    build: Callable[..., Plan]
    order: int
    spacing: str
    summary: str
    options: tuple[str, ...] = ()
    kind: Literal["ode", "sde"] = "ode"
    calls_per_step: int = 1
    min_steps: int = 1
    in_t: bool = False  # steps in t by alpha' and sigma': may start at pure noise, needs continuous time
    needs: Mapping[str, str] = field(default_factory=dict)
    last_step_size: float | None = None  # length of the last step into t = 0, where the solver has its own


_GRID_OPTIONS = ("t_start", "t_end", "shift", "times")  # of every solver, beside num_inference_steps and spacing
_FINAL = ("lower_order_final",)
_CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
_SIT = ("diffusion", "diffusion_scale", "last_step", "last_step_size")

_SOLVERS: dict[str, SolverEntry] = {
    "ddpm": SolverEntry(ddpm, 1, "time", "ancestral sampling; wants hundreds of steps", ("variance",), "sde"),
    "ddim": SolverEntry(ddim, 1, "time", "deterministic first order; eta=1 is ancestral", ("eta",)),
    "dpm_solver_1": SolverEntry(dpm_solver_1, 1, "lambda", "DPM-Solver-1, which is DDIM"),
    "dpm_solver_2": SolverEntry(dpm_solver_2, 2, "lambda", "two calls a step, in eps", _FINAL, min_steps=2),
    "dpm_solver_3": SolverEntry(
        dpm_solver_3, 3, "lambda", "three calls a step, in eps", (*_FINAL, "solver_type"), min_steps=3
    ),
    "dpmpp_2s": SolverEntry(
        dpmpp_2s, 2, "lambda", "two calls a step; nothing kept between steps", (*_FINAL, "solver_type"), min_steps=2
    ),
    "dpmpp_3s": SolverEntry(
        dpmpp_3s, 3, "lambda", "three calls a step; nothing kept between steps", (*_FINAL, "solver_type"), min_steps=3
    ),
    "dpmpp_2m": SolverEntry(
        dpmpp_2m, 2, "lambda", "one call a step; the default for few steps", (*_FINAL, "solver_type"), min_steps=2
    ),
    "dpmpp_3m": SolverEntry(
        dpmpp_3m, 3, "lambda", "one call a step; variant=published is order 2", (*_FINAL, "variant"), min_steps=3
    ),
    "dpmpp_sde_1": SolverEntry(dpmpp_sde_1, 1, "lambda", "the SDE's exact first-order step", (), "sde"),
    "dpmpp_sde_2m": SolverEntry(
        dpmpp_sde_2m, 2, "lambda", "stochastic 2M, one call a step", (*_FINAL, "solver_type"), "sde", min_steps=2
    ),
    "dpmpp_sde_3m": SolverEntry(
        dpmpp_sde_3m, 3, "lambda", "stochastic 3M, one call a step", (*_FINAL, "variant"), "sde", min_steps=3
    ),
    "dpm_solver_v3": SolverEntry(
        dpm_solver_v3, 3, "lambda", "multistep with the network's own statistics, see `smalti ems`",
        ("ems", "order", "corrector", *_FINAL, "pseudo", "variant"), min_steps=2,
        needs={"ems": "`smalti ems RUN` writes it to RUN/ems.npz"},
    ),
    "unipc_2": SolverEntry(
        unipc_2, 3, "lambda", "predictor of order 2 with its corrector", (*_FINAL, "bh", "corrector"), min_steps=2
    ),
    "unipc_3": SolverEntry(
        unipc_3, 4, "lambda", "predictor of order 3 with its corrector", (*_FINAL, "bh", "corrector"), min_steps=3
    ),
    "edm_euler": SolverEntry(edm_euler, 1, "karras", "Euler in sigma / alpha, with churn", _CHURN),
    "edm_heun": SolverEntry(
        edm_heun, 2, "karras", "Heun in sigma / alpha, with churn", (*_CHURN, *_FINAL), calls_per_step=2
    ),
    "flow_euler": SolverEntry(flow_euler, 1, "time", "Euler in t, as SD3 and FLUX sample", in_t=True),
    "flow_midpoint": SolverEntry(flow_midpoint, 2, "time", "midpoint rule in t", _FINAL, calls_per_step=2, in_t=True),
    "flow_heun": SolverEntry(flow_heun, 2, "time", "Heun in t", _FINAL, calls_per_step=2, in_t=True),
    "flow_rk4": SolverEntry(flow_rk4, 4, "time", "classical Runge-Kutta in t", _FINAL, calls_per_step=4, in_t=True),
    "sde_euler": SolverEntry(
        sde_euler, 1, "time", "Euler-Maruyama on the interpolant's SDE (SiT)", _SIT, "sde", in_t=True,
        last_step_size=0.04,
    ),
    "sde_heun": SolverEntry(
        sde_heun, 2, "time", "Heun's drift after the noise (SiT)", _SIT, "sde", calls_per_step=2, in_t=True,
        last_step_size=0.04,
    ),
    "lcm": SolverEntry(lcm, 1, "time", "for latent consistency models, 1 to 8 steps", (), "sde"),
    "consistency": SolverEntry(consistency, 1, "karras", "for consistency models, 1 to 4 steps", (), "sde"),
}  # fmt: skip


def solver_names() -> list[str]:
    """What make_plan takes."""
    return sorted(_SOLVERS)


def solver_entry(name: str) -> SolverEntry:
    """A solver's entry in the registry. Raises UserError with the nearest names."""
    if name not in _SOLVERS:
        raise unknown_name("solver", name, _SOLVERS)
    return _SOLVERS[name]


def check_option_names(solver: str, options: Iterable[str]) -> None:
    """Raise UserError for an option that is neither the solver's own nor one of the time grid (_GRID_OPTIONS).

    For callers that take options as names and values, where another argument's name would else be given twice.
    """
    if solver == MASKED_SOLVER:
        check_masked_options(options)
        return
    own = solver_entry(solver).options
    for option in options:
        if option not in (*own, *_GRID_OPTIONS):
            near = difflib.get_close_matches(option, (*own, *_GRID_OPTIONS), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            takes = f"it takes {', '.join(own)}" if own else "it takes no options"
            raise UserError(
                f"option {option!r} has no effect on solver {solver!r}: {hint}{takes} (and of the time grid "
                f"{', '.join(_GRID_OPTIONS)})"
            )


_KINDS: dict[Any, tuple[type[Any], str]] = {
    bool: (bool, "True or False"), int: (Integral, "a whole number"), float: (Real, "a number"), str: (str, "a name"),
}  # fmt: skip


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Raise UserError for a value that is not of the kind that the option's annotation says; NaN is no number."""
    allowed, words = _KINDS.get(kind, (object, ""))
    fits = isinstance(value, allowed) and (kind is bool or kind not in _KINDS or not isinstance(value, bool))
    if not fits or (kind is float and value != value):
        raise UserError(f"{name}={value!r} must be {words}")


def _check_options(name: str, entry: SolverEntry, options: Mapping[str, Any]) -> None:
    for option, how in entry.needs.items():
        if options.get(option) is None:
            raise UserError(f"{option} is missing: solver {name!r} needs it; {how}")
    check_option_names(name, options)
    kinds = {"last_step_size": float, **get_type_hints(entry.build)}
    for option, value in options.items():
        _check_kind(option, value, kinds[option])


def _ends_in_pure_noise(process: Process) -> bool:
    return float(process.alpha(torch.ones((), dtype=torch.float64))) == 0.0


def make_plan(
    name: str,
    *,
    process: Process,
    num_inference_steps: int | None = None,
    spacing: str | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    shift: float = 1.0,
    times: Sequence[float] | None = None,
    **options: Any,
) -> Plan:
    """The plan of a solver by name.

    spacing, shift: see grids.time_grid; the default is the solver's own. t_start, t_end: where to begin and end; by
    default from the process's noisiest time to 0, with no residual noise. times: the grid itself, num_inference_steps
    + 1 falling numbers within [0, 1], in place of all of these. options: the solver's own, such as eta or
    lower_order_final; last_step_size, of the solvers that take it, is the t that their step into 0 comes from.
    num_inference_steps counts steps, which for dpm_solver_*, dpmpp_2s and dpmpp_3s are network calls.
    Raises UserError for an unknown solver, spacing or option, for fewer steps than the solver's order needs, and for
    solvers in continuous time on a process that is a table of steps.
    """
    entry = solver_entry(name)
    _check_options(name, entry, options)
    for place, number in (("t_start", t_start), ("t_end", t_end), ("shift", shift)):
        if number is not None:
            _check_kind(place, number, float)
    if entry.in_t and process.discrete:
        raise UserError(
            f"process {process.name!r} is a table of steps: solver {name!r} needs a continuous one, "
            f"such as {process.name.removesuffix('_discrete')!r}"
        )
    if times is not None:
        given = {"spacing": spacing, "t_start": t_start, "t_end": t_end, "shift": None if shift == 1.0 else shift}
        given["last_step_size"] = options.get("last_step_size")
        for field, value in given.items():
            if value is not None:
                raise UserError(f"{field}={value!r} has no effect beside times: the grid is given")
        grid = explicit_grid(times)
        if num_inference_steps not in (None, len(grid) - 1):
            raise UserError(f"num_inference_steps={num_inference_steps} contradicts the {len(grid)} times")
    else:
        if num_inference_steps is None:
            raise UserError("num_inference_steps is missing: give it, or the grid itself as times")
        last_node = options.pop("last_step_size", entry.last_step_size)
        if last_node is not None and not 0.0 < last_node < 1.0:
            raise UserError(f"last_step_size={last_node} must lie between 0 and 1")
        # The score-based diffusion has no bound at pure noise, so its SDE begins at t_max.
        if t_start is None and entry.in_t and options.get("diffusion") != "sbdm" and _ends_in_pure_noise(process):
            t_start = 1.0
        grid = time_grid(
            process, num_inference_steps, spacing or entry.spacing, t_start, t_end, shift=shift, last_node=last_node
        )
    if len(grid) - 1 < entry.min_steps:
        raise UserError(f"num_inference_steps={len(grid) - 1}: solver {name!r} needs at least {entry.min_steps}")
    return entry.build(process, grid, **options)
