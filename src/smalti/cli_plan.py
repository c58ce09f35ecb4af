"""The command `smalti plan`."""

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smalti.cli_options import set_threads
from smalti.cli_plan_arguments import Plan
from smalti.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from smalti.config import RunConfig
    from smalti.scaling.measured_training import MeasuredTraining
    from smalti.scaling.planner import Amount, RunPlan

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "averages": "averages of the weights",
    "activations": "activations",
    "batch": "batch",
    "workspace": "workspace",
    "framework": "framework",
}


def plan_command(command: Plan) -> int:
    """smalti plan; exit code 1 where the run does not fit into the memory."""
    from dataclasses import replace

    from smalti.config import Budget
    from smalti.run_folder import finite_json
    from smalti.scaling.accelerators import parse_devices
    from smalti.scaling.amounts import parse_count
    from smalti.scaling.planner import plan_run

    set_threads(command.threads)
    config = _config(command)
    amount = _amount(command, config)
    images = None if command.data is None else parse_count(command.data, "--data")
    devices = parse_devices(command.gpu)
    measured = None
    if devices.is_cpu and command.recipe is not None and not command.no_measure and command.mfu is None:
        budgets = {"steps": amount.steps, "minutes": amount.minutes, "epochs": amount.epochs}
        given = [Budget(unit, value) for unit, value in budgets.items() if value is not None]  # type: ignore[arg-type]
        measured = _measured(replace(config, budget=given[0]) if given else config, command.measure_steps)
    plan = plan_run(
        config,
        devices,
        amount,
        sharding=command.sharding,
        dataset_images=images if images is not None else _bundled_images(config),
        utilisation=command.mfu,
        price_per_hour=command.price_per_hour,
        measured=measured,
    )
    if command.json:
        print(json.dumps(finite_json(plan_json(plan, measured)), indent=1))
    else:
        _print_plan(plan, measured)
    return 0 if plan.fits else 1


def _config(command: Plan) -> "RunConfig":
    """The recipe's, run's or model's config with the command's options, then with --set."""
    from smalti.config import apply_overrides
    from smalti.recipes import recipe, recipe_names
    from smalti.run_folder import read_config
    from smalti.scaling.planned_config import planned_config

    if (command.model is None) == (command.recipe is None):
        raise UserError("give --model (such as dit-xl-2) or --recipe (a recipe's name or a run directory), one of them")
    if command.model is not None:
        config = planned_config(command.model)
    else:
        assert command.recipe is not None
        is_folder = command.recipe not in recipe_names() and (Path(command.recipe).exists() or "/" in command.recipe)
        config = read_config(Path(command.recipe)) if is_folder else recipe(command.recipe)
    overrides = []
    if command.batch_size is not None:
        overrides.append(f"loop.batch_size={command.batch_size}")
    if command.precision is not None:
        overrides.append(f"loop.precision={command.precision}")
    if command.activation_checkpointing:
        overrides.append("loop.activation_checkpointing=true")
    if command.optimizer == "schedule_free":
        overrides += ["optimizer=schedule_free", "ema=by_optimizer", "schedule.decay=none"]
    elif command.optimizer is not None:
        overrides.append(f"optimizer={command.optimizer}")
    if command.ema is not None:
        if command.ema not in (1, 2):
            raise UserError(f"--ema {command.ema}: smalti keeps 1 average of the weights, or 2 (ema=post_hoc)")
        if command.ema == 2:
            overrides.append("ema=post_hoc")
        elif len(config.ema.averages) == 2:
            overrides.append("ema=power")
    return apply_overrides(config, [*overrides, *command.set])


def _amount(command: Plan, config: "RunConfig") -> "Amount":
    """How long the run trains: what was given, else the recipe's budget, else the published number of steps."""
    from smalti.scaling.amounts import parse_amount, parse_count
    from smalti.scaling.planned_config import PUBLISHED_STEPS
    from smalti.scaling.planner import Amount

    given: dict[str, float] = {}
    if command.steps is not None:
        given["steps"] = parse_count(command.steps, "--steps")
    if command.images is not None:
        given["images"] = parse_count(command.images, "--images")
    if command.flops is not None:
        given["flops"] = parse_amount(command.flops, "--flops")
    for name in ("epochs", "minutes"):
        value = getattr(command, name)
        if value is not None:
            if not 0 < value < float("inf"):
                raise UserError(f"--{name} {value:g} must be above 0 and finite")
            given[name] = value
    if len(given) > 1:
        raise UserError(f"give one of {', '.join('--' + name for name in given)}, not several")
    if not given and command.model is not None:
        given["steps"] = PUBLISHED_STEPS
    elif not given:
        budget = config.budget
        given[budget.unit] = int(budget.amount) if budget.unit == "steps" else budget.amount
    amount: dict[str, Any] = given
    return Amount(**amount)


def _measured(config: "RunConfig", steps: int) -> "MeasuredTraining":
    from smalti.scaling.measured_training import FEWEST_STEPS, measure_training
    from smalti.training.memory import keep_freed_memory

    if steps < FEWEST_STEPS:
        raise UserError(f"--measure-steps {steps} must be at least {FEWEST_STEPS}")
    keep_freed_memory()
    print(f"training for {steps} steps to time them (--no-measure estimates instead)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        return measure_training(config, Path(folder) / "run", steps)


def _bundled_images(config: "RunConfig") -> int | None:
    """Pictures to train on, where they come with smalti."""
    from smalti.data.sources import DigitsData, list_pictures

    return int((~list_pictures(config.data).held_out).sum()) if isinstance(config.data, DigitsData) else None


def plan_json(plan: "RunPlan", measured: "MeasuredTraining | None") -> dict[str, Any]:
    """A plan as JSON; bytes are of one device."""
    from dataclasses import asdict

    from smalti.config import to_json

    def parts(memory: Any) -> dict[str, int]:
        return {**asdict(memory), "total": memory.total}

    return {
        "devices": {"name": plan.devices.accelerator.name, "count": plan.devices.count, "sharding": plan.sharding},
        "precision": plan.precision,
        "parameters": plan.parameters,
        "flops": {
            "forward": plan.forward_flops,
            "step": plan.step_flops,
            "executed_step": plan.executed_flops,
            "run": plan.flops,
        },
        "steps": plan.steps,
        "images": plan.images,
        "passes": plan.passes,
        "seconds": {"step": plan.step_seconds, "run": plan.seconds},
        "utilisation": plan.utilisation,
        "measured": None if measured is None else asdict(measured),
        "device_hours": plan.device_hours,
        "price_per_hour": plan.price_per_hour,
        "cost": plan.cost,
        "memory": {
            "peak_moment": plan.peak_moment,
            "peaks": {moment: parts(memory) for moment, memory in plan.peaks.items()},
            "checkpoint_copy": plan.checkpoint_copy,
            "needed": plan.needed,
            "device": plan.devices.accelerator.memory,
            "fits": plan.fits,
        },
        "advice": list(plan.advice),
        "config": to_json(plan.config),
    }


def _print_plan(plan: "RunPlan", measured: "MeasuredTraining | None") -> None:
    from rich.console import Console

    from smalti.scaling.amounts import bytes_text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(_run_table(plan, measured))
    console.print(_memory_table(plan))
    device = plan.devices.accelerator
    has = f"{device.name} has {bytes_text(device.memory)}"
    copy = bytes_text(plan.checkpoint_copy)
    beside = f"with the copy that a checkpoint takes ({copy})" if plan.devices.is_cpu else "a device"
    if plan.fits:
        tight = "; barely: allocators hold some more than tensors" if plan.needed > 0.8 * device.memory else ""
        print(f"fits: {bytes_text(plan.needed)} {beside}, {has}{tight}")
    else:
        print(f"does not fit: {bytes_text(plan.needed)} {beside}, {has}; what would:")
        for change in plan.advice:
            print(f"  {change}")
    if not plan.devices.is_cpu:
        print(f"each checkpoint takes a copy of {copy} in the machine's own memory while it is written")


def _run_table(plan: "RunPlan", measured: "MeasuredTraining | None") -> "Table":
    from rich.table import Table

    from smalti.scaling.amounts import amount_text, duration_text, flops_text

    config = plan.config
    passes = "" if plan.passes is None else f", {plan.passes:,.1f} passes over {amount_text(plan.dataset_images or 0)}"
    again = ", with the forward that checkpointing repeats" if plan.executed_flops > plan.step_flops else ""
    if measured is not None:
        basis = "measured here"
    else:
        peak = flops_text(plan.devices.accelerator.peak(plan.precision))
        basis = f"assumed: {plan.utilisation:.0%} of {peak}/s a device"
    rows = [
        ("model", f"{config.recipe}: {config.model.kind}, {amount_text(plan.parameters)} parameters"),
        ("devices", f"{plan.devices}, {plan.precision}" + (f", {plan.sharding}" if plan.devices.count > 1 else "")),
        ("training", f"{plan.steps:,} steps of {config.loop.batch_size} pictures: {amount_text(plan.images)}{passes}"),
        ("forward", f"{flops_text(plan.forward_flops)} a picture"),
        ("step", f"{flops_text(plan.executed_flops)}{again}, {duration_text(plan.step_seconds)} ({basis})"),
        ("run", f"{flops_text(plan.flops)}, {duration_text(plan.seconds)}"),
    ]
    if plan.cost is not None:
        price = f"{plan.device_hours:,.1f} device hours at {plan.price_per_hour:,.2f} dollars"
        rows.append(("cost", f"{plan.cost:,.2f} dollars ({price})"))
    table = Table(title="Run", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def _memory_table(plan: "RunPlan") -> "Table":
    from rich.table import Table

    from smalti.scaling.amounts import bytes_text

    title = f"Memory of {'this process' if plan.devices.is_cpu else 'a device'} when most is held in each moment"
    table = Table("", title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for moment in plan.peaks:
        table.add_column(moment + (" (peak)" if moment == plan.peak_moment else ""), justify="right")
    for part, words in _PARTS.items():
        table.add_row(words, *(bytes_text(getattr(memory, part)) for memory in plan.peaks.values()))
    table.add_row("total", *(bytes_text(memory.total) for memory in plan.peaks.values()))
    return table
