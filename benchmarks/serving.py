"""Throughput and latency over HTTP: `smalti serve` against a diffusers pipeline behind FastAPI and behind LitServe.

    python benchmarks/serving.py [--rounds 3] [--seconds 6] [--run RUN] [--servers ...] [--quick]

One run with diffusers' settings of DiT-Tiny on 28 x 28 pictures serves them all, each server in processes of its own,
the load from another, over loopback. All servers draw the same pictures (checked to 1 of 255). They are measured in
turn, round by round, and medians over rounds are reported; latencies are percentiles over all rounds.

    one at a time      FastAPI, requests wait for each other, one torch thread
    batched            LitServe: whole runs in batches of up to 16 requests, of which equal ones share a run; two
                       workers of a thread each
    smalti             two workers of a thread each, pictures exact to the bit
    smalti compiled    the same with --compile, equal to rounding

`one at a time, all threads`, `batched, one worker` and `smalti, one worker` use both cores by torch's threads, which at
this size is slower for each of them; `smalti, 32 rows` has forwards of up to 32 rows in place of 16.

Loads: `saturated` and `closed-N` keep N requests waiting; `open-R` sends R a second at Poisson's moments, whatever
becomes of them, up to 48 at once; `equal` is `saturated` with requests all alike, the best case of whole-run batches;
`probe` times a request of 4 steps on the idle server, then beside 8 requests of 50 steps that never end. Requests are
of 4, 10, 20, 30 or 50 steps and guidance 1, 1.5 or 3, each combination equally often: with any number of steps from 4
to 50 whole-run batches would have next to nothing to share. Running all of a batch to its longest step count would
change pictures and is left out.
"""

import base64
import io
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import tyro
from PIL import Image
from serving_processes import RunningServer, ServerKind, peer, send_load, smalti_server
from timing import append_row, machine

from smalti import rng
from smalti.config import Budget, RunConfig, apply_overrides
from smalti.interop.convert import export_run
from smalti.recipes import recipe
from smalti.training.display import SilentDisplay
from smalti.training.loop import train

STEPS, GUIDANCE = (4, 10, 20, 30, 50), (1.0, 1.5, 3.0)
_ROW_FILE = Path(__file__).parent / "results" / "serving.jsonl"
_SATURATED = 32  # requests that wait
_IN_EVERY_ROUND = ("saturated", "probe")  # the others in the first
_DISTURBED = 0.1  # cores that others use
_MOST_WAITING = 48  # of an open loop: below every server's bound
_WARM = 0.25  # of a measurement: what comes before is not counted
_AS_DIFFUSERS = (
    "positions=sincos", "qk_norm=false", "activation=gelu_tanh", "frequency_shift=1", "mlp_norm_eps=1e-5",
    "sampling.solver=flow_euler", "loop.compile=false",
)  # fmt: skip
_SMALLEST = ("model.width=32", "depth=1", "num_heads=2", "batch_size=8")


def make_run(folder: Path, steps: int, *changes: str) -> Path:
    """A run that diffusers has classes for, trained for so few steps that its pictures are shapes."""
    config: RunConfig = apply_overrides(recipe("mnist"), [*_AS_DIFFUSERS, *changes])
    train(replace(config, budget=Budget("steps", steps)), folder, display=SilentDisplay())
    return folder


def server_kinds(
    run: Path, exported: Path, names: Sequence[str], threads: int, peers_keep_memory: bool
) -> list[ServerKind]:
    """The servers by name, in order. threads: in all, of each; smalti's workers have one each."""
    memory = ("--keep-memory",) if peers_keep_memory else ()
    kinds = [
        peer("one at a time", "one-at-a-time", exported, "--threads=1", *memory),
        peer("one at a time, all threads", "one-at-a-time", exported, f"--threads={threads}", *memory),
        peer("batched", "batched", exported, f"--workers={threads}", "--threads=1", *memory),
        peer("batched, one worker", "batched", exported, f"--threads={threads}", *memory),
        smalti_server("smalti", run, threads, 1),
        smalti_server("smalti compiled", run, threads, 1, "--compile"),
        smalti_server("smalti, 32 rows", run, threads, 1, "--max-rows=32"),
        smalti_server("smalti, one worker", run, 1, threads),
    ]
    by_name = {kind.name: kind for kind in kinds}
    return [by_name[name] for name in names]


# --- what is asked


def body(number: int, steps: int, guidance_scale: float) -> str:
    """A request as JSON; all servers take the same fields."""
    return json.dumps(
        {
            "class_label": number % 10,
            "seed": number,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
        }
    )


@dataclass(frozen=True)
class Request:
    """What a request asks for."""

    steps: int
    guidance_scale: float


def mixed(count: int, call: int) -> list[Request]:
    """Every combination equally often, in blocks of all of them in random order. call: of the random numbers."""
    kinds = [Request(steps, scale) for steps in STEPS for scale in GUIDANCE]
    blocks = range(-(-count // len(kinds)))
    orders = (rng.permutation(len(kinds), seed=block, purpose="benchmarks/serving/mix", call=call) for block in blocks)
    return [kinds[int(i)] for order in orders for i in order][:count]


def poisson_moments(rate: float, seconds: float, call: int) -> list[float]:
    """Seconds of arrivals at a mean rate."""
    count = int(rate * seconds * 1.5) + 10
    u = rng.uniform((count,), seed=0, purpose="benchmarks/serving/arrivals", call=call)[0]
    moments = torch.cumsum(-torch.log(u) / rate, 0)
    return [float(t) for t in moments if t < seconds]


@dataclass(frozen=True)
class LoadKind:
    """outstanding: requests that wait at most. rate: of an open loop, in requests a second. equal: all alike."""

    name: str
    outstanding: int = _MOST_WAITING
    rate: float | None = None
    equal: bool = False


def load_kind(name: str) -> LoadKind:
    """A load by its name. Raises ValueError for an unknown one."""
    kind, _, number = name.partition("-")
    if kind == "open":
        return LoadKind(name, rate=float(number))
    if kind == "closed":
        return LoadKind(name, int(number))
    if name not in ("saturated", "equal"):
        raise ValueError(f"load {name!r} is none of saturated, equal, closed-N, open-R, probe")
    return LoadKind(name, _SATURATED, equal=name == "equal")


def turns(
    rounds: int, loads: Sequence[str], servers: Sequence[RunningServer]
) -> Iterator[tuple[int, str, RunningServer]]:
    """Round, load and server of each measurement: the servers take turns."""
    for number in range(rounds):
        for load in loads:
            if number == 0 or load in _IN_EVERY_ROUND:
                yield from ((number, load, server) for server in servers)


@dataclass(frozen=True)
class Measured:
    """One load on one server. images_per_second: finished after the warm part. latencies: seconds by steps.

    row_calls_per_second: rows of forwards that those pictures took, in whatever forwards. turned_away: share of the
    requests that the load did not send, since too many waited. server_cores, parent_cores, load_cores, other_cores:
    busy cores; others are processes that should not be there.
    """

    images_per_second: float
    row_calls_per_second: float
    latencies: dict[int, list[float]]
    turned_away: float
    failed: int
    rows_per_tick: float | None
    server_cores: float
    parent_cores: float
    load_cores: float
    other_cores: float


def measure(server: RunningServer, load: LoadKind, seconds: float, call: int) -> Measured:
    """Send a load for so long, and wait until all of it is answered."""
    count = 15 * 60 if load.rate is None else int(load.rate * seconds * 1.5) + 10
    requests = [Request(20, 1.5)] * count if load.equal else mixed(count, call)
    stream = {
        "name": load.name,
        "bodies": [body(i, r.steps, r.guidance_scale) for i, r in enumerate(requests)],
        "outstanding": load.outstanding,
        "arrivals": None if load.rate is None else poisson_moments(load.rate, seconds, call),
    }
    before = server.usage()
    report = send_load(server, seconds, [stream], None)
    used = server.usage().since(before)
    asked = report["asked"]
    answered = [(one, requests[one["number"] % count]) for one in asked if one["status"] == 200]
    begin, window = _WARM * seconds, (1 - _WARM) * seconds
    counted = [r for one, r in answered if begin <= one["ended"] < seconds]
    latencies: dict[int, list[float]] = {}
    for one, request in answered:
        if begin <= one["due"]:
            latencies.setdefault(request.steps, []).append(one["ended"] - one["due"])
    return Measured(
        images_per_second=len(counted) / window,
        row_calls_per_second=sum(r.steps * (1 if r.guidance_scale == 1.0 else 2) for r in counted) / window,
        latencies=latencies,
        turned_away=sum(one["status"] == 0 for one in asked) / max(1, len(asked)),
        failed=sum(one["status"] not in (0, 200) for one in asked),
        rows_per_tick=used.rows / used.ticks if used.ticks else None,
        server_cores=used.server / used.moment,
        parent_cores=used.parent / used.moment,
        load_cores=report["cpu_seconds"] / used.moment,
        other_cores=(used.machine - used.server - report["cpu_seconds"]) / used.moment,
    )


@dataclass(frozen=True)
class Probed:
    """Seconds of requests of 4 steps on the idle server and beside long ones. other_cores: as Measured's."""

    idle: list[float]
    busy: list[float]
    other_cores: float


def probe(server: RunningServer, count: int, seconds: float, call: int) -> Probed:
    """Time requests of 4 steps, one after another at random moments, alone and then beside 8 of 50 steps."""
    u = rng.uniform((count,), seed=0, purpose="benchmarks/serving/pauses", call=call)[0]
    bodies = [body(i, 4, 1.5) for i in range(count)]
    probes = {"name": "probe", "bodies": bodies, "outstanding": 1, "pauses": [0.05 + 0.2 * float(x) for x in u]}
    long = {"name": "long", "bodies": [body(1000 + i, 50, 1.5) for i in range(64)], "outstanding": 8}

    warm = 1.0 if seconds > 5 else 0.2
    before = server.usage()
    reports = [
        send_load(server, seconds, streams, "probe")
        for streams in ([{**probes, "most": count}], [long, {**probes, "most": count, "begin": warm}])
    ]
    used = server.usage().since(before)
    idle, busy = (
        [one["ended"] - one["due"] for one in report["asked"] if one["stream"] == "probe"] for report in reports
    )
    others = used.machine - used.server - sum(report["cpu_seconds"] for report in reports)
    return Probed(idle, busy, others / used.moment)


Result = TypeVar("Result", Measured, Probed)


def undisturbed(measurement: Callable[[], Result], tries: int) -> Result:
    """A measurement, made again while other processes take more than a tenth of a core; the least disturbed one."""
    results = []
    for _ in range(tries):
        results.append(measurement())
        if results[-1].other_cores < _DISTURBED:
            break
    return min(results, key=lambda result: result.other_cores)


# --- what is said of it


def milliseconds(latencies: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile."""
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]) * 1e3
    return {"p50": round(p50, 1), "p95": round(p95, 1), "p99": round(p99, 1)}


def summary(rounds: Sequence[Measured]) -> dict[str, Any]:
    """Several rounds of a load on one server."""

    def median(name: str, digits: int) -> float | None:
        values = [getattr(one, name) for one in rounds]
        return None if None in values else round(statistics.median(values), digits)

    by_steps = {steps: [x for one in rounds for x in one.latencies.get(steps, [])] for steps in STEPS}
    everything = [x for latencies in by_steps.values() for x in latencies]
    return {
        "images_per_second": median("images_per_second", 2),
        "images_per_second_rounds": [round(one.images_per_second, 2) for one in rounds],
        "row_calls_per_second": median("row_calls_per_second", 0),
        "latency_ms": {
            str(name): milliseconds(latencies)
            for name, latencies in {"all": everything, **by_steps}.items()
            if latencies
        },
        "turned_away": median("turned_away", 3),
        "failed": sum(one.failed for one in rounds),
        "rows_per_tick": median("rows_per_tick", 1),
        "server_cores": median("server_cores", 2),
        "parent_cores": median("parent_cores", 2),
        "load_cores": median("load_cores", 3),
        "other_cores_rounds": [round(one.other_cores, 2) for one in rounds],
    }


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Images a second of each smalti server over each other one's."""
    return {
        ours: {
            theirs: round(results[ours]["images_per_second"] / result["images_per_second"], 2)
            for theirs, result in results.items()
            if not theirs.startswith("smalti") and result["images_per_second"]
        }
        for ours in results
        if ours.startswith("smalti")
    }


def probe_summary(rounds: Sequence[Probed]) -> dict[str, Any]:
    """All probes of one server; median_ratio is the figure."""
    idle, busy = ([x for one in rounds for x in getattr(one, name)] for name in ("idle", "busy"))
    return {
        "probes": len(busy),
        "idle_ms": milliseconds(idle),
        "busy_ms": milliseconds(busy),
        "median_ratio": round(statistics.median(busy) / statistics.median(idle), 2),
        "other_cores_rounds": [round(one.other_cores, 2) for one in rounds],
    }


def pixels(server: RunningServer, request: str) -> np.ndarray:
    """The picture that a server draws, in 0 .. 255."""
    answer = server.draw(request)
    if server.kind.is_smalti:
        answer = base64.b64decode(json.loads(answer)["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(answer)).convert("L")).astype(int)


def largest_difference(servers: Sequence[RunningServer]) -> int:
    """Between the servers' pictures of the same requests, in levels of 255. Raises RuntimeError above 1."""
    worst = 0
    for number, (steps, scale) in enumerate([(4, 1.0), (10, 1.5), (50, 3.0)]):
        pictures = [pixels(server, body(number, steps, scale)) for server in servers]
        if pictures[0].std() < 5:
            raise RuntimeError(f"{servers[0].kind.name} draws next to nothing: a comparison would say nothing")
        for server, picture in zip(servers, pictures, strict=True):
            worst = max(worst, int(np.abs(picture - pictures[0]).max()))
            if worst > 1:
                raise RuntimeError(f"{server.kind.name} and {servers[0].kind.name} differ by {worst} of 255")
    return worst


def main(
    rounds: int = 3,
    seconds: float = 6.0,
    probes: int = 12,
    tries: int = 2,
    loads: tuple[str, ...] = ("saturated", "probe", "equal", "open-4", "open-15", "open-60", "closed-1", "closed-8"),
    servers: tuple[str, ...] = ("one at a time", "batched", "smalti", "smalti compiled"),
    run: Path | None = None,
    note: str = "",
    threads: int = 2,
    peers_keep_memory: bool = False,
    minutes: float = 8.0,
    quick: bool = False,
    out: Path = _ROW_FILE,
) -> None:
    """Measure, and append a row a load to a file.

    seconds: of each measurement; probes: of each round. tries: of a measurement that other processes disturb. loads:
    "saturated" and "probe" are measured in every round, the others in the first. run: one made earlier by this script,
    in place of a new one. note: for the rows. threads: of each server. peers_keep_memory: as smalti does. quick: a
    small network, one thread and half a second a measurement.
    """
    if quick:
        rounds, seconds, probes, tries, loads = 1, 0.6, 2, 1, ("saturated", "open-20", "probe")
        servers, threads = servers[:3], 1
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the clean-up below
    with tempfile.TemporaryDirectory() as text, ExitStack() as running:
        folder = Path(text)
        run = run or (make_run(folder / "run", 30, *_SMALLEST) if quick else make_run(folder / "run", 60))
        export_run(run, folder / "exported")
        kinds = server_kinds(run, folder / "exported", servers, threads, peers_keep_memory)
        started = [RunningServer(kind, folder / f"server_{i}") for i, kind in enumerate(kinds)]
        for server in started:
            running.callback(server.stop)
        warm_up = {server.kind.name: round(server.wait_until_ready(), 1) for server in started}
        setting = {
            "note": note,
            "rounds": rounds,
            "seconds": seconds,
            "steps": STEPS,
            "guidance": GUIDANCE,
            "peers_keep_memory": peers_keep_memory,
            "start_seconds": warm_up,
            "largest_difference_of_255": largest_difference(started),
            "versions": {name: version(name) for name in ("diffusers", "litserve", "fastapi", "uvicorn")},
        }
        measured: dict[str, dict[str, list[Measured]]] = {}
        probed: dict[str, list[Probed]] = {}
        for server in started:
            server.pause()
        for number, load, server in turns(rounds, loads, started):
            if time.perf_counter() - began > 60 * minutes:
                print(f"{minutes:g} minutes are over in round {number} before {load} of {server.kind.name}", flush=True)
                break
            server.go_on()
            if load == "probe":
                probing = partial(probe, server, probes, 2 * seconds, number)
                probed.setdefault(server.kind.name, []).append(undisturbed(probing, tries))
            else:
                one = undisturbed(partial(measure, server, load_kind(load), seconds, number), tries)
                measured.setdefault(load, {}).setdefault(server.kind.name, []).append(one)
                print(f"round {number}, {load}, {server.kind.name}: {one.images_per_second:.2f} images/s", flush=True)
            server.pause()
    common = {**setting, **machine(threads)}
    for load, of_servers in measured.items():
        results = {name: summary(list_of) for name, list_of in of_servers.items()}
        append_row(out, {"load": load, **common, "results": results, "smalti_over": ratios(results)}, show=True)
    if probed:
        results = {name: probe_summary(list_of) for name, list_of in probed.items()}
        append_row(out, {"load": "probe", **common, "results": results}, show=True)


if __name__ == "__main__":
    tyro.cli(main)
