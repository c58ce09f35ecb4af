"""A plan as a picture: where the network is called, and what becomes of its answers."""

from pathlib import Path

import numpy as np
import torch

from smalti.errors import UserError
from smalti.sampling.plan import Plan


def plot_plan(plan: Plan, path: Path) -> None:
    """Draw the grid over the process's noise levels, and the weights that make the next x; the suffix of path says the
    format (png, svg, pdf).

    Raises UserError without matplotlib, for an unknown suffix, and where path cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'smalti[eval]'") from None
    process = plan.process
    figure = Figure(figsize=(8, 7), layout="constrained")
    levels, weights = figure.subplots(2, 1)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    t = t[(t >= process.t_min) & (t <= process.t_max)]
    calls = torch.tensor(plan.times)
    log_snr = process.log_snr(t)
    levels.plot(t, log_snr, color="C0", label="lambda = ln(alpha / sigma)")
    at_calls = process.log_snr(calls)
    shown = torch.isfinite(at_calls)
    levels.plot(calls[shown], at_calls[shown], "o", color="C3", label="network calls")
    for time in plan.times:
        levels.axvline(time, color="0.9", zorder=0)
    levels.set(xlabel="t (0 data, 1 noise)", ylabel="lambda", title=f"{plan.solver} on {process.name}")
    levels.invert_xaxis()
    share = levels.twinx()
    share.plot(t, process.sigma(t) / torch.hypot(process.alpha(t), process.sigma(t)), color="0.6", linestyle="--")
    share.set(ylabel="noise's share (dashed)", ylim=(0, 1.05))
    levels.legend(loc="lower right")
    names = [*plan.registers, "x0", "z"]
    width = 0.8 / len(names)
    for column, name in enumerate(names):
        row = plan.matrices[:, 0, column]
        if np.any(row):
            weights.bar(np.arange(plan.num_calls) + column * width - 0.4, row, width, align="edge", label=name)
    weights.axhline(0, color="0.5", linewidth=0.8)
    weights.xaxis.set_major_locator(MaxNLocator(integer=True))
    weights.set(xlabel="call", ylabel="weight", title="what the next x is made of")
    weights.legend(ncols=len(names))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from None
