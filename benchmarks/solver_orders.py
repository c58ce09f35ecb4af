"""Orders of convergence of all solvers, as docs/solvers.md has them: the fitted slope of the error over halved steps.
A second table has the weak orders of those that draw noise.

    python benchmarks/solver_orders.py [--processes rectified_flow vp_cosine edm] [--dimensions 2] [--out ROWS.jsonl]

tests/convergence.py says what is measured; tests/test_conformance.py holds it. Prints a Markdown table; --out appends
each solver as a JSON row, with the errors that its slope is fitted to.
"""

import sys
from pathlib import Path

import torch
import tyro
from timing import append_row

from smalti.diffusion import make_process
from smalti.sampling.solvers import solver_entry

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from convergence import CASES, measured_orders
from moments import WEAK_CASES, weak_order


def main(
    processes: tuple[str, ...] = ("rectified_flow", "vp_cosine", "edm"), dimensions: int = 2, out: Path | None = None
) -> None:
    """Print the tables; append rows of the first to `out`."""
    torch.set_num_threads(1)  # small tensors: a second thread is only waited for
    measured = {name: measured_orders(make_process(name), dimensions) for name in processes}
    columns = ("solver", "of the", "order", *processes, "calls a step")
    print(*("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns))), sep="\n")
    for i, case in enumerate(CASES):
        what = "drift" if case.draws_noise else "ODE"
        slopes = [f"{measured[name][i][0]:.2f}" for name in processes]
        calls = str(solver_entry(case.solver).calls_per_step)
        print("| " + " | ".join([f"`{case}`", what, str(case.order), *slopes, calls]) + " |")
        if out is not None:
            figures = {name: dict(zip(("slope", "errors"), measured[name][i], strict=True)) for name in processes}
            settings = {"dimensions": dimensions, "steps": case.steps, "torch": torch.__version__}
            append_row(out, {"solver": str(case), "of": what, "order": case.order, **settings, "measured": figures})
    print(
        *("| " + " | ".join(cells) + " |" for cells in (("", "order", *processes), ["---"] * (2 + len(processes)))),
        sep="\n",
    )
    for solver, options, order in WEAK_CASES:
        name = " ".join([solver, *(f"{option}={value}" for option, value in options.items())])
        slopes = [f"{weak_order(solver, make_process(process), **options):.2f}" for process in processes]
        print("| " + " | ".join([f"`{name}`", str(order), *slopes]) + " |")


if __name__ == "__main__":
    tyro.cli(main)
