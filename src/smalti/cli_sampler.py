"""The options of --solver, --guidance-scale and their kind, as the keyword arguments of a pipeline call."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smalti.cli_evaluate_arguments import Sampler
from smalti.errors import UserError

if TYPE_CHECKING:
    from smalti.config import SamplingConfig
    from smalti.sampling.guided import GuidanceOptions


def solver_options(given: Sequence[str], solver: str) -> dict[str, Any]:
    """name=value texts as keyword arguments: numbers, true, false, or the text itself."""
    import json

    from smalti.sampling.solvers import check_option_names

    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--solver-options {text!r} must have the form name=value")
        if name in options:
            raise UserError(f"--solver-options {text!r}: {name} is given twice")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    check_option_names(solver, options)
    return options


def _guidance(sampler: Sampler, default: "GuidanceOptions") -> "GuidanceOptions":
    """The run's guidance options with those of the command line in their place."""
    from dataclasses import replace

    given: dict[str, Any] = {
        "interval": sampler.guidance_interval,
        "schedule": sampler.guidance_schedule,
        "rescale": sampler.guidance_rescale,
        "apg_eta": sampler.apg_eta,
        "pag_scale": sampler.pag_scale,
        "pag_layers": sampler.pag_layers or None,
    }
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def sampling_arguments(sampler: Sampler, default: "SamplingConfig") -> dict[str, Any]:
    """The keyword arguments of a pipeline call that the command line's sampler stands for."""
    return {
        "num_inference_steps": sampler.num_inference_steps,
        "solver": sampler.solver,
        "spacing": sampler.spacing,
        "guidance_scale": sampler.guidance_scale,
        "guidance": _guidance(sampler, default.guidance),
        **solver_options(sampler.solver_options, sampler.solver or default.solver),
    }
