"""What `smalti top` shows: the engine read from a running server, drawn as text. Pure functions of its readings."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from smalti.serving.service import ServiceState, WorkerState

HISTORY = 120  # readings that are kept

_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {
    "ready": "green",
    "starting": "yellow",
    "draining": "yellow",
    "backing_off": "red",
    "failed": "bold red",
}


@dataclass(frozen=True)
class Reading:
    """The server's state, read at a time in seconds of a clock that only goes forward."""

    at: float
    state: ServiceState


def with_reading(history: Sequence[Reading], new: Reading) -> tuple[Reading, ...]:
    """The history with another reading; one of a server that has begun anew begins a new history."""
    if history and new.state.ticks < history[-1].state.ticks:
        return (new,)
    return (*history, new)[-HISTORY:]


def rows_per_tick(history: Sequence[Reading]) -> list[float]:
    """Mean rows of a forward between each two readings; 0 where there was none."""
    pairs = [(b.state.rows - a.state.rows, b.state.ticks - a.state.ticks) for a, b in pairwise(history)]
    return [rows / ticks if ticks else 0.0 for rows, ticks in pairs]


def rate(history: Sequence[Reading], seconds: float = 10.0) -> tuple[float, float] | None:
    """Pictures and ticks a second over the last seconds of the history; None before two readings."""
    if len(history) < 2:
        return None
    last = history[-1]
    first = next(reading for reading in history if last.at - reading.at <= seconds or reading is history[-2])
    span = max(last.at - first.at, 1e-9)
    return (last.state.finished - first.state.finished) / span, (last.state.ticks - first.state.ticks) / span


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as bars, of which the highest is the largest value."""
    values = values[-width:]
    top = max(values, default=0.0)
    if top <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[min(len(_BARS) - 1, int(max(0.0, value) / top * len(_BARS)))] for value in values)


def frame(address: str, history: Sequence[Reading], trouble: str = "", width: int = 80) -> RenderableType:
    """One frame. trouble: why there is no newer reading, if so."""
    parts: list[RenderableType] = [Text.assemble(("smalti top ", "bold"), address)]
    if trouble:
        parts.append(Text(trouble, "red"))
    if history:
        parts += [_totals(history, width), _workers(history[-1].state.workers)]
    return Group(*parts)


def _totals(history: Sequence[Reading], width: int) -> RenderableType:
    state = history[-1].state
    grid = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(state.cost_limit, 1.0), completed=min(state.cost_left, state.cost_limit), width=20)
    share = state.cost_left / state.cost_limit if state.cost_limit else 0.0
    left = "" if not state.cost_per_second else f", {state.cost_left / state.cost_per_second:.1f} s of work"
    queue = Table.grid(padding=(0, 1))
    queue.add_row(bar, f"{share:.0%} of {_short(state.cost_limit)} cost units{left}")
    grid.add_row("queue", queue)
    rates = rate(history)
    speed = f"{_short(state.cost_per_second)} cost/s"
    if rates is not None:
        speed = f"{rates[0]:.2f} pictures/s, {rates[1]:.1f} ticks/s, {speed}"
    grid.add_row("speed", speed + ("  [yellow]draining[/]" if state.draining else ""))
    rows = rows_per_tick(history)
    if rows:
        mean = f"{rows[-1]:.1f} now, {max(rows):.1f} at most"
        grid.add_row("rows a tick", f"{sparkline(rows, max(8, width - 45))}  {mean}")
    padding = 1 - state.rows / state.padded_rows if state.padded_rows else 0.0
    grid.add_row(
        "since start", f"{state.finished} pictures, {state.ticks} ticks, {state.rows} rows, {padding:.0%} padding"
    )
    return grid


def _workers(workers: Sequence[WorkerState]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("worker", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("pid", "restarts", "beat", "step", "live", "waiting", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in workers:
        style = _STYLES.get(worker.state, "")
        table.add_row(
            str(worker.number),
            escape(worker.model),
            f"[{style}]{worker.state}[/]" if style else worker.state,
            "-" if worker.pid is None else str(worker.pid),
            str(worker.restarts),
            f"{worker.heartbeat_age:.1f} s",
            f"{1000 * worker.mean_step_seconds:.1f} ms",
            str(worker.live),
            str(worker.waiting),
            str(worker.rows),
        )
    return table


def _short(value: float) -> str:
    """1234567 as 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
