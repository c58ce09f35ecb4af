"""The commands `smalti scaling plan | run | fit | predict | report`."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from smalti.cli_options import check_device
from smalti.cli_scaling_arguments import Scaling, ScalingFit, ScalingPlan, ScalingPredict, ScalingReport, ScalingRun
from smalti.errors import UserError

if TYPE_CHECKING:
    from smalti.scaling.analysis import Analysis
    from smalti.scaling.executors import LocalProcesses
    from smalti.scaling.spec import ScalingSpec


def scaling_command(command: Scaling) -> int:
    """smalti scaling: the chosen one of its commands."""
    chosen = command.command
    if isinstance(chosen, ScalingPlan):
        return _plan(chosen)
    if isinstance(chosen, ScalingRun):
        return _run(chosen)
    if isinstance(chosen, ScalingFit):
        return _fit(chosen)
    return _predict(chosen) if isinstance(chosen, ScalingPredict) else _report(chosen)


def _spec(command: ScalingPlan | ScalingRun) -> "ScalingSpec":
    from smalti.scaling.spec import find_spec, with_overrides

    check_device(command.device)
    return with_overrides(find_spec(command.spec), command.set)


def _local(command: ScalingPlan | ScalingRun) -> "LocalProcesses":
    from smalti.scaling.executors import LocalProcesses

    if command.threads < 1:
        raise UserError(f"--threads {command.threads} must be at least 1")
    cores = os.cpu_count() or 1
    jobs = command.jobs if command.jobs is not None else max(1, cores // command.threads)
    if command.jobs is None and command.device != "cpu":
        jobs = 1
    if jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1")
    return LocalProcesses(jobs, command.threads)


def _plan(command: ScalingPlan) -> int:
    from rich.console import Console
    from rich.table import Table

    from smalti.scaling.budget import parse_budget, smallest_budget
    from smalti.scaling.grid import expected_layout
    from smalti.scaling.sweep import measure_steps
    from smalti.training.display import clock

    spec, executor, budget = _spec(command), _local(command), parse_budget(command.budget)
    times = None
    if budget.unit == "seconds":
        print(f"measuring the speed of training steps, {executor.slots} at a time", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            times = measure_steps(spec, executor, command.device, Path(folder))
    smallest = smallest_budget(spec, spec.sizes(), budget, times, executor.slots)
    planned = expected_layout(spec, spec.sizes(), smallest)
    table = Table("budget", "width", "parameters", "steps", "pictures", "time", title=f"{spec.name}: expected runs")
    cells = sorted(planned.cells, key=lambda cell: (cell.budget, cell.size.width))
    for cell in cells:
        held = " (held out)" if cell is planned.held_out else ""
        time = "" if times is None else clock(times.run(cell))
        row = (f"{cell.size.parameters:,}", f"{cell.steps:,}", f"{cell.images:,}", time)
        table.add_row(f"{cell.budget:.2e}{held}", str(cell.size.width), *row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    total = sum(cell.flops for cell in cells)
    print(f"{len(cells)} runs over {spec.compute_range:g}x of compute, {total:.2e} training FLOPs in all")
    for part in planned.slices:
        if part.edge:
            print(f"slice {part.budget:.2e} FLOPs: {part.edge}; set widths beyond it in a spec of your own")
    return 0


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM ends a study as Ctrl-C does: its runs save themselves."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: ScalingRun) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from smalti.pages.figures import charts_available
    from smalti.scaling.budget import parse_budget
    from smalti.scaling.executors import Executor, ray_cluster
    from smalti.scaling.sweep import open_study, run_study

    spec, budget = _spec(command), parse_budget(command.budget)
    if command.max_runs is not None and command.max_runs < 1:
        raise UserError(f"--max-runs {command.max_runs} must be at least 1")
    if not command.give_up > 1:
        raise UserError(f"--give-up {command.give_up:g} must be above 1: times what was planned for a run")
    out = command.out or Path("runs") / f"scaling-{spec.name}"
    charts_available()  # before the time is spent
    with ExitStack() as stack:
        stack.enter_context(_sigterm_as_ctrl_c())
        executor: Executor = _local(command)
        if command.ray:
            if not out.is_absolute():
                out = out.resolve()
            executor = stack.enter_context(ray_cluster(command.threads, command.device))
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        stack.enter_context(bar)

        def say(text: str) -> None:
            bar.console.print(text, highlight=False) if sys.stderr.isatty() else print(text, flush=True)

        task = bar.add_task(f"scaling {spec.name}", total=1.0)
        try:
            study = open_study(spec, out, budget, executor, command.device, say)
            complete = run_study(
                study, executor, device=command.device, max_runs=command.max_runs, give_up=command.give_up, say=say,
                progress=lambda share: bar.update(task, completed=share),
            )  # fmt: skip
        except KeyboardInterrupt:
            print(f"stopped; what was trained is kept in {out}: the same command goes on", file=sys.stderr)
            raise
    if not complete:
        print(f"more runs are left in {out}: the same command goes on")
        return 0
    return _print_report(out)


def _print_report(folder: Path) -> int:
    from smalti.scaling.analysis import analyse, read_results, write_fit
    from smalti.scaling.report import write_report

    analysis = analyse(read_results(folder))
    _print_findings(analysis)
    write_fit(folder, analysis)
    print(f"report: {write_report(folder)}")
    return 0


def _print_findings(analysis: "Analysis") -> None:
    from smalti.scaling.bends import bends
    from smalti.scaling.report import findings, headline

    print(headline(analysis))
    for line in (*findings(analysis), *bends(analysis)):
        print(f"- {line}")


def _fit(command: ScalingFit) -> int:
    from rich.console import Console
    from rich.table import Table

    from smalti.scaling.analysis import analyse, read_results, write_fit
    from smalti.scaling.report import constant_rows

    analysis = analyse(read_results(command.results))
    table = Table("", "value", "95 % interval", "", title="L(N, D) = E + A / N^alpha + B / D^beta")
    for row in constant_rows(analysis):
        table.add_row(row["name"], row["value"], row["interval"], row["meaning"])
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    _print_findings(analysis)
    print(f"written: {write_fit(command.results, analysis)}")
    return 0


def _flops(command: ScalingPredict) -> float:
    from smalti.scaling.accelerators import parse_devices
    from smalti.scaling.planner import GPU_UTILISATION
    from smalti.scaling.prediction import flops_from_hours, flops_from_money

    given = [name for name in ("flops", "gpu_hours", "money") if getattr(command, name) is not None]
    if len(given) != 1:
        raise UserError("give one budget: --flops, --gpu-hours or --money")
    if command.flops is not None:
        return command.flops
    if command.gpu is None:
        raise UserError(f"--{given[0].replace('_', '-')}: give --gpu, whose hours they are, such as h100")
    devices = parse_devices(command.gpu)
    if devices.count != 1:
        raise UserError(f"--gpu {command.gpu}: hours and prices are of one; give --gpu {devices.accelerator.name}")
    gpu, mfu = devices.accelerator, GPU_UTILISATION if command.mfu is None else command.mfu
    peak = gpu.peak("float32" if gpu.bfloat16 is None else "bfloat16")
    if command.gpu_hours is not None:
        return flops_from_hours(command.gpu_hours, peak, mfu)
    price = command.price_per_hour if command.price_per_hour is not None else gpu.price_per_hour
    if price is None:
        raise UserError(f"--gpu {command.gpu}: no price is known for it: give --price-per-hour")
    assert command.money is not None
    return flops_from_money(command.money, price, peak, mfu)


def _predict(command: ScalingPredict) -> int:
    from smalti.scaling.analysis import analyse, read_results
    from smalti.scaling.prediction import predict
    from smalti.scaling.report import amount, amount_with_interval, with_interval

    analysis = analyse(read_results(command.results))
    found = predict(analysis.fitted, _flops(command))
    if command.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    print(f"budget: {found.flops:.3g} FLOPs, {found.extrapolation:.3g} times the largest that the law was fitted to")
    print(f"best size: {amount_with_interval(found.n)} parameters")
    print(f"best length: {amount_with_interval(found.d)} pictures, {amount(found.d.value / found.n.value)} a parameter")
    print(f"loss of such a run: {with_interval(found.run_loss)}")
    if found.warning is not None:
        print(f"warning: {found.warning}", file=sys.stderr)
    return 0


def _report(command: ScalingReport) -> int:
    from smalti.scaling.report import write_report

    print(f"report: {write_report(command.folder)}")
    return 0
