"""The report: one HTML file made of comparison.json alone, its words computed from the intervals it shows."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from smalti.comparison.bundled import bundled_specs
from smalti.comparison.charts import Line, line_chart
from smalti.comparison.conclusions import (
    ACCURACY,
    DECIDING,
    FRECHET,
    KERNEL,
    Metric,
    Point,
    Verdict,
    headline,
    sentences,
    verdicts_by_calls,
    verdicts_by_seconds,
)
from smalti.comparison.journal import ComparisonFolder
from smalti.comparison.run import FORMAT
from smalti.errors import UserError
from smalti.evaluation.cards import Card, card_from_json, check_comparable
from smalti.evaluation.intervals import Estimate
from smalti.pages.figures import COLOURS, charts_available
from smalti.pages.page import render_page
from smalti.run_folder import write_text

_MATCHED = {
    "flops": "equal training FLOPs",
    "parameters": "equal parameters and equal training steps",
    "minutes": "equal training time",
}


def _number(value: Any) -> float:
    """JSON has no infinity: null stands for it."""
    return math.inf if value is None else float(value)


def _estimate(body: Mapping[str, Any]) -> Estimate:
    return Estimate(_number(body["value"]), _number(body["low"]), _number(body["high"]))


def read_comparison(out: Path) -> dict[str, Any]:
    """The body of a folder's comparison.json. Raises UserError where it is missing, damaged or of another format."""
    path = ComparisonFolder(out).comparison
    try:
        body = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; `smalti compare SPEC --out {out}` writes it") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise UserError(f"{path} is not a comparison of format {FORMAT}: run the comparison again")
    return body


def points_of(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """comparison.json's scores as points."""
    return [
        Point(
            row["name"],
            row.get("calls", 0),
            row["seconds_per_picture"],
            {key: _estimate(value) for key, value in row["figures"].items()},
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Conclusion:
    """What a comparison shows, in words."""

    terms: str
    headline: str
    by_seconds: str
    calls: tuple[Verdict, ...]
    seconds: tuple[Verdict, ...]
    diverged: tuple[str, ...]


def _check_cards(body: Mapping[str, Any]) -> None:
    """Raise UserError where figures do not mean the same: of other judges, references or numbers of pictures."""
    first: dict[str, Card] = {}
    for row in body["scores"]:
        for card in map(card_from_json, row["cards"]):
            check_comparable(first.setdefault(card.metric, card), card)


def conclude(body: Mapping[str, Any]) -> Conclusion:
    """The conclusion that comparison.json's intervals allow. Raises UserError where its cards do not match."""
    _check_cards(body)
    names = [contender["name"] for contender in body["contenders"]]
    points = points_of(body["scores"])
    calls, seconds = verdicts_by_calls(points, names), verdicts_by_seconds(points, names)
    diverged = tuple(c["name"] for c in body["contenders"] if c["training"].get("diverged"))
    return Conclusion(
        _MATCHED[body["spec"]["match"]], headline(calls), headline(seconds), tuple(calls), tuple(seconds), diverged
    )


def conclusion_lines(body: Mapping[str, Any]) -> list[str]:
    """The conclusion for a terminal."""
    found = conclude(body)
    lines = [f"At {found.terms}: {found.headline}", f"By time: {found.by_seconds}"]
    lines += [f"{name} diverged in training and is left out." for name in found.diverged]
    return lines


def _curve(body: Mapping[str, Any], metric: Metric, x: Callable[[Mapping[str, Any]], float], rows: str) -> list[Line]:
    lines = []
    for number, contender in enumerate(body["contenders"]):
        own = [row for row in body[rows] if row["name"] == contender["name"]]
        points: list[tuple[float, float, float, float]] = []
        for row, point in zip(own, points_of(own), strict=True):
            estimate = point.figures[metric.key]
            if math.isfinite(estimate.value):
                value, low, high = (metric.scale * v for v in (estimate.value, estimate.low, estimate.high))
                points.append((x(row), value, low, high))
        lines.append(Line(contender["name"], number, points))
    return lines


def _training_curve(body: Mapping[str, Any], metric: Metric) -> list[Line]:
    """Quality against seconds of training: the kept checkpoints, and the end."""
    curve_calls = body["curve"]["calls"]
    training = {c["name"]: c["training"] for c in body["contenders"]}

    def seconds(row: Mapping[str, Any]) -> float:
        own = training[row["name"]]
        return float(own["seconds"] * row.get("step", own["steps"]) / own["steps"])

    ends = [row for row in body["scores"] if row["calls"] == curve_calls]
    return _curve({**body, "points": [*body["curves"], *ends]}, metric, seconds, "points")


def _charts(body: Mapping[str, Any]) -> list[dict[str, str]]:
    calls = body["spec"]["calls"]
    real = body["judge"]["real_fd"]
    floor = (real, "as many real digits")
    charts = []
    for metric, log, level in ((FRECHET, True, floor), (ACCURACY, False, None)):
        label = f"{metric.name}, %" if metric.unit == " %" else metric.name
        way = "lower is better" if not metric.higher_is_better else "higher is better"
        shown = [
            (_curve(body, metric, lambda row: row["calls"], "scores"), "network calls", True, calls, "network calls"),
            (
                _curve(body, metric, lambda row: 1000 * row["seconds_per_picture"], "scores"),
                "milliseconds a picture", True, (), "sampling time",
            ),
        ]  # fmt: skip
        if body["curves"]:
            shown.append((_training_curve(body, metric), "seconds of training", False, (), "training time"))
        for rows, x_label, x_log, ticks, title in shown:
            name = f"{metric.key}-{title.replace(' ', '-')}"
            charts.append({
                "title": f"{metric.name[0].upper()}{metric.name[1:]} against {title} ({way})",
                "svg": line_chart(
                    rows, x_label, label, name, x_log=x_log, y_log=log, x_ticks=tuple(ticks), level=level
                ),
                "alt": _chart_in_words(rows, x_label, metric),
            })  # fmt: skip
    return charts


def _chart_in_words(lines: Sequence[Line], x_label: str, metric: Metric) -> str:
    told = []
    for line in lines:
        figures = ", ".join(f"{y:.{metric.digits}f} at {x:.3g}" for x, y, *_ in sorted(line.points))
        told.append(f"{line.name}: {figures or 'nothing'}")
    return f"{metric.name} by {x_label}. " + "; ".join(told)


def _same_losses(body: Mapping[str, Any]) -> bool:
    """Whether validation losses mean the same: of one data set, tokenizer, process, objective and density of times."""
    parts = [
        [c["config"].get(key) for key in ("data", "autoencoder", "process", "objective", "timesteps")]
        for c in body["contenders"]
    ]
    return all(part == parts[0] for part in parts)


def _loss_chart(body: Mapping[str, Any]) -> dict[str, str] | None:
    if not _same_losses(body):
        return None
    lines = []
    for number, contender in enumerate(body["contenders"]):
        images = contender["config"]["loop"]["batch_size"]
        lines.append(
            Line(contender["name"], number, [(step * images / 1000, v, v, v) for step, v in contender["losses"]])
        )
    words = "; ".join(f"{line.name} ends at {line.points[-1][1]:.4f}" for line in lines if line.points)
    return {
        "title": "Validation loss against pictures seen (lower is better)",
        "svg": line_chart(lines, "thousand pictures", "validation loss", "loss"),
        "alt": f"Validation loss. {words}",
    }


def _size(count: float | None) -> str:
    """1.27 million."""
    if count is None:
        return "not measured"
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.3g} "


def _costs(body: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for number, contender in enumerate(body["contenders"]):
        training, config = contender["training"], contender["config"]
        own = [row for row in body["scores"] if row["name"] == contender["name"]]
        calls = sum(row["calls"] * row["samples"] for row in own)
        per_call = sum(row["seconds"] for row in own) / calls if calls else math.nan
        peaks = [row["peak_bytes"] for row in own if row["peak_bytes"] is not None]
        note = " (of its last session)" if training["resumed"] and training["peak_bytes"] is not None else ""
        rows.append({
            "name": contender["name"],
            "colour": COLOURS[number % len(COLOURS)],
            "network": contender["architecture"],
            "parameters": _size(contender["parameters"]),
            "forward": f"{_size(contender['forward_flops'])}FLOPs",
            "steps": "diverged" if training["diverged"] else f"{training['steps']:,} of {config['loop']['batch_size']}",
            "training_flops": _flops(contender["training_flops"]),
            "seconds": f"{training['seconds']:.0f} s",
            "training_memory": _memory(training["peak_bytes"]) + note,
            "sampling_memory": _memory(max(peaks) if peaks else None),
            "per_call": f"{1000 * per_call:.2f} ms" if calls else "not measured",
        })  # fmt: skip
    return rows


def _flops(count: float | None) -> str:
    return "not measured" if count is None else f"{_size(count)}FLOPs"


def _memory(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:.0f} MiB"


def _figures(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every figure with its interval, a row a contender and number of calls."""
    rows = []
    for row, point in zip(body["scores"], points_of(body["scores"]), strict=True):
        shown = {metric.key: metric.interval(point.figures[metric.key]) for metric in (ACCURACY, FRECHET, KERNEL)}
        rows.append({
            "name": row["name"],
            "calls": str(row["calls"]),
            "milliseconds": f"{1000 * row['seconds_per_picture']:.2f}",
            **shown,
        })  # fmt: skip
    return rows


def _grids(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sample grids by number of calls, the contenders beside each other."""
    groups = []
    for calls in body["spec"]["calls"]:
        rows = [row for row in body["scores"] if row["calls"] == calls and "grid" in row]
        pictures = [
            {
                "name": row["name"],
                "png": row["grid"],
                "alt": f"Digits 0 to 9, four of each, drawn by {row['name']} in {calls} network calls",
            }
            for row in rows
        ]
        groups.append({"calls": calls, "pictures": pictures})
    return groups


def _settings(body: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for contender in body["contenders"]:
        sampling = contender["config"]["sampling"]
        command = " ".join(
            ["smalti train", contender["recipe"], *(["--set", *contender["set"]] if contender["set"] else [])]
        )
        how = ", ".join(
            f"{name.replace('_', ' ')} {sampling[name]}"
            for name in ("solver", "spacing", "guidance_scale")
            if name in sampling
        )
        rows.append({"name": contender["name"], "command": command, "sampling": how})
    return rows


def _limits(body: Mapping[str, Any]) -> list[str]:
    """How far the figures go."""
    lines = [
        "Each contender was trained once, with one seed. The intervals are about the pictures drawn: another "
        "training run would move a contender by more than they say.",
        f"Each figure is of {body['samples']} pictures, of the same labels and seeds for every contender. The Frechet "
        "distance depends on that number: compare it within this report alone. As many real digits score "
        f"{body['judge']['real_fd']:.1f}; the judge reads {100 * body['judge']['held_out_accuracy']:.1f} % of held-out "
        "digits right.",
        "Intervals are at 95 %, each for itself: of twenty budgets one may be decided by chance.",
        "FLOPs count matrix products and convolutions of a forward, times three for training. Seconds are of this "
        "machine: networks of equal FLOPs may differ in them. Training was not compiled.",
        "Memory is the peak of resident memory beyond what the process held before.",
    ]
    for contender in body["contenders"]:
        tokenizer = contender.get("tokenizer")
        if tokenizer is not None:
            lines.append(
                f"The tokenizer of {contender['name']} was trained first, for {tokenizer['seconds']:.0f} s of the "
                f"comparison's time that its FLOPs and seconds leave out: {tokenizer['psnr']:.1f} dB on held-out "
                f"digits, {tokenizer['codes_used']} codes used."
            )
    fewer = body["spec"]["num_samples"] - body["samples"]
    if fewer > 0:
        lines.append(
            f"The spec asks for {body['spec']['num_samples']} pictures; the time was enough for {body['samples']}."
        )
    if any(c["training"]["resumed"] for c in body["contenders"]):
        lines.append("The comparison was interrupted and gone on with; a training's seconds are of all its sessions.")
    return lines


def render(body: Mapping[str, Any]) -> str:
    """The report of comparison.json as HTML. Raises UserError where matplotlib or jinja2 is missing."""
    charts_available()
    template = (files("smalti.comparison") / "report.html.jinja").read_text(encoding="utf-8")
    found = conclude(body)
    reasons = [(verdict, sentences(verdict)) for verdict in found.calls]
    by_seconds = [(verdict, sentences(verdict)) for verdict in found.seconds]
    colours = {c["name"]: COLOURS[i % len(COLOURS)] for i, c in enumerate(body["contenders"])}
    return render_page(
        template,
        body=body,
        found=found,
        metrics=DECIDING,
        reasons=reasons,
        by_seconds=by_seconds,
        colours=colours,
        charts=_charts(body),
        loss=_loss_chart(body),
        costs=_costs(body),
        figures=_figures(body),
        grids=_grids(body),
        settings=_settings(body),
        limits=_limits(body),
        rerun=f"smalti compare {_spec_argument(body)} --minutes {body['minutes']:g}",
        spec_json=json.dumps(body["spec"], indent=2),
    )


def _spec_argument(body: Mapping[str, Any]) -> str:
    name = str(body["spec"]["name"])
    spec = bundled_specs().get(name)
    return name if spec is not None and spec.to_json() == body["spec"] else f"{name}.json"


def write_report(out: Path) -> Path:
    """Write a folder's report from its comparison.json. Raises UserError as read_comparison does."""
    path = ComparisonFolder(out).report
    write_text(path, render(read_comparison(out)))
    return path
