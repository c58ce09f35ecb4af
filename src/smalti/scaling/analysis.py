"""What a study's results say: the law, the best sizes of each budget, what compute buys, and where that bends."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smalti.errors import UserError
from smalti.run_folder import read_rows
from smalti.scaling.compute import ComputeLaw, fit_compute
from smalti.scaling.huber import PARAMETERS
from smalti.scaling.intervals import Interval, Values
from smalti.scaling.isoflop import Frontier, Minimum, Slice, frontier, minima, slices
from smalti.scaling.law import FittedLaw, Runs, fit

_PARABOLA = 3  # constants of it
_COLUMNS = ("parameters", "images", "loss", "flops")


@dataclass(frozen=True)
class HeldOut:
    """The run that the law was not fitted to. predicted: the interval for one new run of its size and length."""

    parameters: float
    images: float
    flops: float
    loss: float
    predicted: Interval

    @property
    def inside(self) -> bool:
        """Whether its loss lies in the predicted interval."""
        return self.loss in self.predicted


@dataclass(frozen=True)
class Analysis:
    """All that is fitted to a study's results.

    rows: the runs that finished, but for those held out. best_rows: of each budget the run of the lowest loss, those
    held out among them. Parts that there are too few results for are None, with the reason in `missing`.
    """

    rows: tuple[Mapping[str, Any], ...]
    unfinished: tuple[Mapping[str, Any], ...]
    fitted: FittedLaw
    minima: tuple[Minimum, ...]
    frontier: Frontier | None
    loss_of_compute: ComputeLaw | None
    fd_of_compute: ComputeLaw | None
    held_out: HeldOut | None
    best_rows: tuple[Mapping[str, Any], ...]
    scores: Mapping[str, Mapping[str, Any]]
    missing: Mapping[str, str]

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Runs by budget."""
        return tuple(minimum.slice for minimum in self.minima)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a study's folder, a .jsonl or a .csv. Raises UserError where they are no results."""
    if path.is_dir():
        file = path / "results.jsonl"
        if not file.exists():
            raise UserError(f"{path} holds no results: run a study with `smalti scaling run digits --out {path}`")
        return read_rows(file)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a study's folder, a .csv or a .jsonl of results")
    if path.suffix == ".jsonl":
        rows = read_rows(path)
    elif path.suffix == ".csv":
        with path.open(newline="") as file_of_rows:
            rows = [dict(row) for row in csv.DictReader(file_of_rows)]
    else:
        raise UserError(f"{path} must be a study's folder, a .csv or a .jsonl")
    return [_own_row(row, f"{path}, run {number + 1}") for number, row in enumerate(rows)]


def _own_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row of somebody's own table: numbers, and finished unless it says otherwise."""
    numbers = {}
    for name in (*_COLUMNS, *(["budget"] if "budget" in row else [])):
        if name not in row:
            raise UserError(f"{where}: no column {name!r}; there must be {', '.join(_COLUMNS)}")
        try:
            numbers[name] = float(row[name])
        except (TypeError, ValueError):
            raise UserError(f"{where}: {name}={row[name]!r} must be a number") from None
    return {"kind": "train", "status": "finished", "held_out": False, "key": where, **row, **numbers}


def analyse(rows: Sequence[Mapping[str, Any]], *, replicates: int = 300, seed: int = 0) -> Analysis:
    """Fit everything to a study's rows. Raises UserError where the law itself cannot be fitted."""
    trained = [row for row in rows if row["kind"] == "train"]
    finished = [row for row in trained if row["status"] == "finished"]
    fitted_to = [row for row in finished if not row["held_out"]]
    runs = _runs(fitted_to)
    fitted = fit(runs, replicates=replicates, seed=seed)
    scores = {row["key"]: row for row in rows if row["kind"] == "score" and "fd" in row}
    missing: dict[str, str] = {}
    found: tuple[Minimum, ...] = ()
    line: Frontier | None = None
    if all("budget" in row for row in fitted_to):
        groups = slices(runs, [row["budget"] for row in fitted_to])
        # Where no slice has a run to spare for its noise, the law's scatter tells it.
        spare = any(len(one.n) > _PARABOLA for one in groups)
        noise = None if spare else _scatter(fitted.residuals)
        found = minima(groups, noise=noise, replicates=replicates, seed=seed)
        try:
            line = frontier(found)
        except UserError as error:
            missing["frontier"] = str(error)
    else:
        missing["frontier"] = "the results have no column budget, by which runs of equal compute belong together"
    best = _best_rows(finished)
    loss_law = fd_law = None
    try:
        loss_law = fit_compute(*_columns(best, "loss"), replicates=replicates, seed=seed)
    except UserError as error:
        missing["loss_of_compute"] = str(error)
    scored = [{"flops": row["flops"], "fd": scores[row["key"]]["fd"]["value"]} for row in best if row["key"] in scores]
    try:
        fd_law = fit_compute(*_columns(scored, "fd"), name="Frechet distance", replicates=replicates, seed=seed)
    except UserError as error:
        missing["fd_of_compute"] = str(error)
    held_out = [row for row in finished if row["held_out"]]
    return Analysis(
        rows=tuple(fitted_to),
        unfinished=tuple(row for row in trained if row["status"] != "finished"),
        fitted=fitted,
        minima=found,
        frontier=line,
        loss_of_compute=loss_law,
        fd_of_compute=fd_law,
        held_out=_held_out(held_out[0], fitted) if held_out else None,
        best_rows=tuple(best),
        scores=scores,
        missing=missing,
    )


def _columns(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[Any, Any]:
    return np.array([row["flops"] for row in rows], dtype=float), np.array([row[name] for row in rows], dtype=float)


def _runs(rows: Sequence[Mapping[str, Any]]) -> Runs:
    n, d, loss, flops = (np.array([row[name] for row in rows], dtype=float) for name in _COLUMNS)
    return Runs(n, d, loss, flops)


def _best_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The run of the lowest loss of each budget, smallest budget first; of runs without budgets those that no run of
    as few FLOPs beats."""
    if not all("budget" in row for row in rows):
        frontier_rows: list[Mapping[str, Any]] = []
        for row in sorted(rows, key=lambda row: (row["flops"], row["loss"])):
            if not frontier_rows or row["loss"] < frontier_rows[-1]["loss"]:
                frontier_rows.append(row)
        return frontier_rows
    best: dict[float, Mapping[str, Any]] = {}
    for row in rows:
        if row["budget"] not in best or row["loss"] < best[row["budget"]]["loss"]:
            best[row["budget"]] = row
    return [best[budget] for budget in sorted(best)]


def _held_out(row: Mapping[str, Any], fitted: FittedLaw) -> HeldOut:
    n, d = float(row["parameters"]), float(row["images"])
    return HeldOut(n, d, float(row["flops"]), float(row["loss"]), fitted.predict_loss(n, d))


def to_json(analysis: Analysis) -> dict[str, Any]:
    """What `smalti scaling fit` writes: constants with their intervals."""
    law, cost = analysis.fitted.law, analysis.fitted.cost
    intervals = {
        name: asdict(analysis.fitted.interval(lambda law, name=name: getattr(law, name)))  # type: ignore[misc]
        for name in ("e", "a", "b", "alpha", "beta")
    }
    intervals["n_exponent"] = asdict(analysis.fitted.interval(lambda law: law.n_exponent(cost)))
    intervals["d_exponent"] = asdict(analysis.fitted.interval(lambda law: law.d_exponent(cost)))
    return {
        "runs": len(analysis.rows),
        "flops": [float(analysis.fitted.runs.flops.min()), float(analysis.fitted.runs.flops.max())],
        "law": asdict(law),
        "cost": asdict(cost),
        "intervals": intervals,
        "scatter": scatter(analysis),
        "minima": [
            {
                "budget": minimum.slice.budget,
                "problem": minimum.problem,
                "add_parameters": minimum.add_n,
                **{
                    name: None if value is None else asdict(value)
                    for name, value in (("n", minimum.n), ("d", minimum.d), ("loss", minimum.loss))
                },
            }
            for minimum in analysis.minima
        ],
        "frontier": None if analysis.frontier is None else {
            "n": {"factor": analysis.frontier.n.law.factor, "power": asdict(analysis.frontier.n.power())},
            "d": {"factor": analysis.frontier.d.law.factor, "power": asdict(analysis.frontier.d.power())},
        },
        "loss_of_compute": _compute_json(analysis.loss_of_compute),
        "frechet_distance_of_compute": _compute_json(analysis.fd_of_compute),
        "held_out": None if analysis.held_out is None else {
            **asdict(analysis.held_out), "inside": analysis.held_out.inside,
        },
        "missing": dict(analysis.missing),
    }  # fmt: skip


def scatter(analysis: Analysis) -> float:
    """Standard deviation of one run's ln loss about the law, degrees of freedom counted."""
    return _scatter(analysis.fitted.residuals)


def _scatter(residuals: Values) -> float:
    return math.sqrt(float((residuals**2).sum()) / max(1, len(residuals) - PARAMETERS))


def _compute_json(law: ComputeLaw | None) -> dict[str, Any] | None:
    if law is None:
        return None
    fits = {"power": law.power, "with_asymptote": law.with_asymptote}
    return {
        "chosen": "with_asymptote" if law.asymptote_chosen else "power",
        **{
            name: {
                "curve": asdict(one.curve),
                "power": asdict(one.interval(lambda curve: curve.power)),
                "cv_error": one.cv_error,
            }
            for name, one in fits.items()
        },
    }


def write_fit(path: Path, analysis: Analysis) -> Path:
    """Write fit.json in a study's folder, or beside a table of results."""
    out = path / "fit.json" if path.is_dir() else path.with_name(path.stem + ".fit.json")
    try:
        out.write_text(json.dumps(to_json(analysis), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    return out
