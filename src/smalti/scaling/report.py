"""A study's report: one HTML file and PNG pictures, made of its folder alone."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from smalti.comparison.machine import machine_of
from smalti.config import to_json
from smalti.pages.figures import charts_available
from smalti.pages.page import render_page
from smalti.run_folder import read_json, write_text
from smalti.scaling.analysis import Analysis, analyse, scatter
from smalti.scaling.bends import bends
from smalti.scaling.charts import chart_svg, charts, write_png
from smalti.scaling.compute import ComputeLaw
from smalti.scaling.intervals import Interval
from smalti.scaling.prediction import predict
from smalti.scaling.published import DIFFUSION_TRANSFORMERS
from smalti.scaling.spec import bundled_specs
from smalti.scaling.sweep import PLAN, Study, read_study
from smalti.training.batch import OBJECTIVE_DRAWS, VALIDATION_ROWS

_FURTHER = (1.0, 10.0, 100.0)  # times the largest measured budget, that the next run is planned for


def amount(value: float) -> str:
    """12,300, or 1.2e+07 where that is long."""
    return f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"


def with_interval(interval: Interval, digits: str = ".4f") -> str:
    """A value and its interval's ends."""
    return f"{interval.value:{digits}} ({interval.low:{digits}} to {interval.high:{digits}})"


def amount_with_interval(interval: Interval) -> str:
    """A large number and its interval's ends."""
    return f"{amount(interval.value)} ({amount(interval.low)} to {amount(interval.high)})"


def headline(analysis: Analysis) -> str:
    """The study in a sentence."""
    fitted = analysis.fitted
    n = fitted.interval(lambda law: law.n_exponent(fitted.cost))
    span = fitted.runs.flops.max() / fitted.runs.flops.min()
    return (
        f"Over {span:.0f}x of compute the best size grows as C^{n.value:.2f} ({n.low:.2f} to {n.high:.2f}) and the "
        f"loss follows L(N, D) with a scatter of {100 * scatter(analysis):.1f} %."
    )


def findings(analysis: Analysis) -> list[str]:
    """What follows, a sentence each; the first thing that a terminal and the report say."""
    said = []
    held = analysis.held_out
    if held is not None:
        said.append(
            f"The largest run was held out: its loss {held.loss:.4f} lies {'inside' if held.inside else 'OUTSIDE'} the "
            f"95 % interval that the others predict, {held.predicted.low:.4f} to {held.predicted.high:.4f}."
        )
    if analysis.frontier is not None:
        power = analysis.frontier.n.power()
        said.append(
            f"Through the minima of the slices the best size grows as C^{power.value:.2f} ({power.low:.2f} to "
            f"{power.high:.2f}); published for text to image: C^{DIFFUSION_TRANSFORMERS.n.power:g}."
        )
    for law, name in ((analysis.loss_of_compute, "loss"), (analysis.fd_of_compute, "Frechet distance")):
        if law is not None:
            power = law.chosen.interval(lambda curve: curve.power)
            to = f" towards {law.chosen.curve.asymptote:.3g}" if law.asymptote_chosen else ""
            known = "" if power.low > 0 else ": the budgets do not tell how fast"
            p = with_interval(power, ".3f") + known
            said.append(f"The best {name} of a budget goes{to or ' down'} as C^-p with p = {p}.")
    return said


_MEANINGS = {
    "e": "the loss that no size and no data removes",
    "a": "the size's share",
    "b": "the data's share",
    "alpha": "how fast size helps",
    "beta": "how fast data helps",
}


def constant_rows(analysis: Analysis) -> list[dict[str, str]]:
    """The law's constants and exponents for a table: name, value, interval, meaning."""
    rows = []
    names = {"e": "E", "a": "A", "b": "B", "alpha": "\u03b1", "beta": "\u03b2"}
    for key, meaning in _MEANINGS.items():
        interval = analysis.fitted.interval(lambda law, key=key: getattr(law, key))  # type: ignore[misc]
        ends = f"{interval.low:.3g} to {interval.high:.3g}"
        rows.append({"name": names[key], "value": f"{interval.value:.4g}", "interval": ends, "meaning": meaning})
    for name, interval in (
        ("N_opt ~ C^", analysis.fitted.interval(lambda law: law.n_exponent(analysis.fitted.cost))),
        ("D_opt ~ C^", analysis.fitted.interval(lambda law: law.d_exponent(analysis.fitted.cost))),
    ):
        ends = f"{interval.low:.3f} to {interval.high:.3f}"
        value, meaning = f"{interval.value:.3f}", "follows from the above"
        rows.append({"name": name, "value": value, "interval": ends, "meaning": meaning})
    return rows


def _minima(analysis: Analysis) -> list[dict[str, str]]:
    return [
        {
            "budget": f"{minimum.slice.budget:.2e}",
            "n": "" if minimum.n is None else amount_with_interval(minimum.n),
            "d": "" if minimum.d is None else amount_with_interval(minimum.d),
            "loss": "" if minimum.loss is None else with_interval(minimum.loss),
            "note": minimum.problem or "",
        }
        for minimum in analysis.minima
    ]


def _predictions(analysis: Analysis) -> list[dict[str, str]]:
    largest = max(float(row["flops"]) for row in analysis.best_rows)
    rows = []
    for factor in _FURTHER:
        found = predict(analysis.fitted, factor * largest)
        beyond = f"{found.extrapolation:.3g}x"
        rows.append({
            "budget": f"{found.flops:.2e}", "n": amount_with_interval(found.n), "d": amount_with_interval(found.d),
            "loss": with_interval(found.run_loss), "beyond": beyond + (" (too far to trust)" if found.warning else ""),
        })  # fmt: skip
    return rows


def _curves(analysis: Analysis) -> list[dict[str, str]]:
    rows = []
    laws: tuple[tuple[str, ComputeLaw | None], ...] = (
        ("loss", analysis.loss_of_compute),
        ("Frechet distance", analysis.fd_of_compute),
    )
    for name, law in laws:
        for one, curve in () if law is None else ((law.power, "k C^-p"), (law.with_asymptote, "E + k C^-p")):
            assert law is not None
            rows.append({
                "of": name,
                "curve": curve,
                "power": with_interval(one.interval(lambda c: c.power), ".3f"),
                "asymptote": "none" if one is law.power else with_interval(one.interval(lambda c: c.asymptote), ".3g"),
                "error": f"{100 * one.cv_error:.2f} %",
                "chosen": "chosen" if one is law.chosen else "",
            })  # fmt: skip
    return rows


def _run_rows(analysis: Analysis, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    shown = []
    trained = [row for row in rows if row["kind"] == "train"]
    for row in sorted(trained, key=lambda row: (row["budget"], row["parameters"])):
        finished = row["status"] == "finished"
        law = float(analysis.fitted.law.loss(row["parameters"], row["images"]))
        score = analysis.scores.get(row["key"])
        shown.append({
            "budget": f"{row['budget']:.2e}" + (" (held out)" if row["held_out"] else ""),
            "width": str(row["width"]),
            "n": amount(row["parameters"]),
            "d": amount(row["images"]),
            "steps": f"{row['steps']:,}",
            "loss": f"{row['loss']:.4f}" if finished else row["status"],
            "training": f"{row['training_rows_loss']:.4f}" if finished else "",
            "law": f"{law:.4f}",
            "seconds": f"{row['seconds']:.0f} s" if finished else "",
            "fd": "" if score is None else with_interval(Interval(**score["fd"]), ".1f"),
        })  # fmt: skip
    return shown


def training_rows_of(study: Study) -> int | None:
    """Pictures in a study's data that are trained on; None where it cannot be opened here."""
    import torch

    from smalti.errors import UserError
    from smalti.training.data import open_run_data

    try:
        data = open_run_data(study.spec.config(), torch.device("cpu"), None)
    except (UserError, OSError):
        return None
    return sum(len(rows) for rows in data.training)


def _settings(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    config = study.spec.config()
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    machine = machine_of(config)
    plan = read_json(study.folder / PLAN)
    return [
        f"Recipe {config.recipe}'s learning rate holds at width {study.spec.base_width}; muP carries it to the others."
        f" Batches of {config.loop.batch_size}; warm-up and decay follow each run's length; one seed.",
        f"{sum(row['kind'] == 'train' for row in rows)} runs and {sum(row['kind'] == 'score' for row in rows)} "
        f"scorings took {seconds / 60:.0f} minutes of work, {plan['slots']} at a time, on {machine['processor']} "
        f"({machine['cores']} cores, products in {machine['products']}), PyTorch {machine['torch']}, smalti "
        f"{machine['smalti']}.",
        "The loss is the training objective of the averaged weights on held-out pictures: the mean over the same "
        f"{OBJECTIVE_DRAWS * VALIDATION_ROWS:,} or fewer triples of picture, noise and time in every run, the times "
        "spread as in training.",
    ]  # fmt: skip


def render(study: Study, analysis: Analysis) -> str:
    """The report as HTML. Raises UserError where matplotlib or jinja2 is missing."""
    charts_available()
    rows = study.rows()
    template = (files("smalti.scaling") / "report.html.jinja").read_text(encoding="utf-8")
    bundled = study.spec == bundled_specs().get(study.spec.name)
    plan = read_json(study.folder / PLAN)
    budget = plan["budget"]
    asked = f"{budget['amount'] / 60:g}min" if budget["unit"] == "seconds" else f"{budget['amount']:g}"
    largest = max(float(row["flops"]) for row in analysis.best_rows)
    cost = analysis.fitted.cost
    return render_page(
        template,
        name=study.spec.name,
        headline=headline(analysis),
        findings=findings(analysis),
        bends=bends(analysis, training_rows_of(study)),
        charts=[
            {"title": title, "svg": chart_svg(draw, name), "alt": _in_words(name, analysis)}
            for name, (title, draw) in charts(analysis).items()
        ],
        published=DIFFUSION_TRANSFORMERS.source,
        constants=constant_rows(analysis),
        cost=f"{cost.factor:.3g} N^{cost.power:.2f}",
        scatter=f"{100 * scatter(analysis):.2f} %",
        minima=_minima(analysis),
        predictions=_predictions(analysis),
        curves=_curves(analysis),
        runs=_run_rows(analysis, rows),
        settings=_settings(study, rows),
        rerun=f"smalti scaling run {study.spec.name if bundled else study.spec.name + '.json'} --budget {asked}",
        folder=f"runs/scaling-{study.spec.name}",
        next_flops=f"{10 * largest:.0e}",
        spec_json=json.dumps(to_json(study.spec), indent=2),
    )


def _in_words(name: str, analysis: Analysis) -> str:
    """What a picture shows, for those who do not see it."""
    best = "; ".join(f"{row['flops']:.1e} FLOPs: loss {row['loss']:.4f}" for row in analysis.best_rows)
    sizes = "; ".join(f"{m.slice.budget:.1e} FLOPs: N {amount(m.n.value)}" for m in analysis.minima if m.n is not None)
    return {
        "isoflop": f"Loss against parameters at each budget. Minima: {sizes or 'none'}",
        "best-sizes": f"Best parameters against compute. {sizes or 'no slice has a minimum'}",
        "loss-of-compute": f"The best loss of each budget. {best}",
        "distance-of-compute": "The Frechet distance of each budget's best run",
        "residuals": f"Runs scatter about the law by {100 * scatter(analysis):.1f} %",
    }[name]


def write_report(folder: Path) -> Path:
    """Write a study's report.html and, under pictures/, a PNG of each chart; returns the page's path.

    Raises UserError where there is no study, or too few results for a law.
    """
    study = read_study(folder)
    analysis = analyse(study.rows())
    page = folder / "report.html"
    write_text(page, render(study, analysis))
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for name, (title, draw) in charts(analysis).items():
        write_png(draw, title, pictures / f"{name}.png")
    return page
