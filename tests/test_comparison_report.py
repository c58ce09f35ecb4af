"""The report: conclusions that follow from intervals, in words and in a browser."""

import base64
import io
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from quiet_page import lowest_label, quiet_page
from small_comparisons import cards, figures, small_spec

from smalti.cli import main
from smalti.comparison.budget import training_flops
from smalti.comparison.conclusions import (
    ACCURACY,
    FRECHET,
    Point,
    difference,
    headline,
    judge_budget,
    rank,
    sentences,
    verdicts_by_calls,
    verdicts_by_seconds,
)
from smalti.comparison.pictures import grid_png
from smalti.comparison.report import conclude, conclusion_lines, points_of, render, write_report
from smalti.config import to_json
from smalti.errors import UserError
from smalti.evaluation.intervals import Estimate


def estimate(value, half):
    return Estimate(value, value - half, value + half)


def point(name, accuracy, fd, calls=4, seconds=0.01, half=(0.01, 1.0)):
    kid = estimate(fd / 100, half[1] / 100)
    return Point(
        name, calls, seconds, {"accuracy": estimate(accuracy, half[0]), "fd": estimate(fd, half[1]), "kid": kid}
    )


# --- what follows from intervals


@given(
    a=st.floats(-100, 100), b=st.floats(-100, 100), ends=st.lists(st.floats(0, 50), min_size=4, max_size=4),
)  # fmt: skip
def test_the_interval_of_a_difference(a, b, ends):
    first, second = Estimate(a, a - ends[0], a + ends[1]), Estimate(b, b - ends[2], b + ends[3])
    both, reverse = difference(first, second), difference(second, first)
    assert both.low <= both.value <= both.high
    assert (both.low, both.high) == pytest.approx((-reverse.high, -reverse.low))
    # It is narrower than the intervals laid end to end and wider than either alone.
    assert both.high - both.low <= sum(ends) + 1e-9
    assert both.value - both.low >= max(ends[0], ends[3]) - 1e-9
    if first.low > second.high:  # intervals apart: the difference is sure
        assert both.low > 0


def test_the_interval_of_a_difference_of_equals_is_the_normal_one():
    assert difference(estimate(5.0, 0.3), estimate(3.0, 0.4)).low == pytest.approx(1.5)


VALUES = st.tuples(st.floats(0, 1), st.floats(0, 100), st.floats(0.001, 0.2), st.floats(0.01, 30))


@settings(max_examples=200, deadline=None)
@given(values=st.lists(VALUES, min_size=2, max_size=5))
def test_verdicts_say_what_the_intervals_say(values):
    points = [point(f"c{i}", a, f, half=(ha, hf)) for i, (a, f, ha, hf) in enumerate(values)]
    verdict = judge_budget("4 network calls", points)
    for ranking, metric in zip(verdict.rankings, (ACCURACY, FRECHET), strict=True):
        best = ranking.figures[ranking.order[0]]
        worst_first = sorted(ranking.figures.values(), key=lambda e: e.value, reverse=not metric.higher_is_better)
        assert best.value == worst_first[-1].value
        for name, own in ranking.figures.items():
            gap = difference(best, own) if metric.higher_is_better else difference(own, best)
            assert (name in ranking.level) == (gap.low <= 0 or name == ranking.order[0])
    winners = {ranking.winner for ranking in verdict.rankings} - {None}
    if verdict.kind == "winner":
        assert winners == {verdict.winner}
        assert all(verdict.winner in ranking.level for ranking in verdict.rankings)
        assert headline([verdict]) == f"{verdict.winner} is better at 4 network calls."
    elif verdict.kind == "chance":
        assert all(p.figures["accuracy"].low <= 0.1 for p in points)
        assert "by chance" in headline([verdict])
    elif verdict.kind == "none":
        assert not winners
        assert "no difference" in headline([verdict])
        assert not re.search(r"c\d is better", headline([verdict]))
    else:
        assert verdict.kind == "split"
        assert "disagree" in headline([verdict])
    for line, ranking in zip(sentences(verdict), verdict.rankings, strict=True):
        assert line.startswith(f"{ranking.metric.name}: {ranking.order[0]} ")
        assert ("no difference that these samples show" in line) == (ranking.winner is None)


def test_verdicts_in_words():
    clear = judge_budget("8 network calls", [point("a", 0.97, 10), point("b", 0.90, 20)])
    assert clear.winner == "a"
    assert sentences(clear)[0] == (
        "judge accuracy: a 97.0 % (95 %: 96.0 % to 98.0 %), 7.0 points better than b's 90.0 % (95 %: 5.6 to 8.4)"
    )
    equal = judge_budget("8 network calls", [point("a", 0.951, 10.2), point("b", 0.95, 10)])
    assert equal.kind == "none"
    assert sentences(equal)[1].endswith("no difference that these samples show between b and a")
    one = judge_budget("8 network calls", [point("a", 0.951, 10.2), point("b", 0.95, 18)])
    assert one.winner == "a"  # by one figure, and the other does not say otherwise
    torn = judge_budget("8 network calls", [point("a", 0.99, 20), point("b", 0.90, 10)])
    assert torn.kind == "split"
    assert torn.short == "a by judge accuracy; b by Frechet distance"
    assert headline([clear, torn]) == "a is better at 8 network calls; the two figures disagree at 8 network calls."


def test_nobody_wins_among_those_that_draw_nothing():
    verdict = judge_budget("4 network calls", [point("a", 0.10, 1500), point("b", 0.105, 1700)])
    assert verdict.kind == "chance"
    assert verdict.winner is None
    assert "no contender draws what it is asked for better than by chance" in headline([verdict])
    assert judge_budget("4 network calls", [point("a", 0.10, 1500), point("b", 0.5, 1700)]).kind != "chance"


def test_a_sampler_that_diverged_is_worst():
    lost = point("lost", 0.1, 1.0)
    lost.figures["fd"] = Estimate(math.inf, math.inf, math.inf)
    ranking = rank(FRECHET, [lost, point("a", 0.9, 10), point("b", 0.9, 30)])
    assert ranking.order == ("a", "b", "lost")
    assert ranking.winner == "a"
    assert rank(FRECHET, [lost, point("a", 0.9, 10)]).winner == "a"
    both = rank(FRECHET, [lost, Point("too", 4, 0.1, lost.figures)])
    assert both.winner is None


def test_budgets_of_seconds_give_each_what_it_can_do_in_them():
    slow = [point("slow", 0.95, 12, calls, 0.01 * calls) for calls in (2, 4)]
    fast = [point("fast", 0.90 + 0.01 * calls, 20 - 2 * calls, calls, 0.005 * calls) for calls in (2, 4)]
    first, second = verdicts_by_seconds([*slow, *fast], ["slow", "fast"])
    assert {p.contender: p.calls for p in first.points} == {"slow": 2, "fast": 4}
    assert {p.contender: p.calls for p in second.points} == {"slow": 4, "fast": 4}
    assert first.budget == "20 ms a picture"
    alone = verdicts_by_seconds([point("slow", 0.9, 12, 2, 1.0), point("fast", 0.9, 12, 4, 0.1)], ["slow", "fast"])
    assert alone[0].kind == "alone"
    assert alone[0].absent == ("slow",)


def test_a_contender_that_is_missing_at_a_budget_is_told():
    verdicts = verdicts_by_calls([point("a", 0.9, 10, 2), point("a", 0.9, 10, 4), point("b", 0.9, 10, 4)], ["a", "b"])
    assert [verdict.absent for verdict in verdicts] == [("b",), ()]


# --- the page


def constructed(diverged=False, same_losses=True):
    """comparison.json of two contenders, made up."""
    spec = small_spec()
    png = base64.b64decode(grid_png_of_noise())
    assert Image.open(io.BytesIO(png)).size[0] > 200
    rows = {"narrow": [(0.60, 90), (0.70, 70)], "wide": [(0.605, 89.5), (0.85, 40)]}
    if diverged:
        del rows["wide"]
    scores = [
        {
            "name": name, "calls": calls, "samples": 100, "steps": calls, "seconds": 0.1 * calls,
            "seconds_per_picture": 0.001 * calls * (1 + (name == "wide")), "peak_bytes": None,
            "figures": figures(accuracy, fd), "grid": grid_png_of_noise(),
        }
        for name, values in rows.items()
        for calls, (accuracy, fd) in zip(spec.calls, values, strict=True)
    ]  # fmt: skip
    curves = [
        {
            "name": name, "share": share, "step": int(16 * share), "samples": 100, "steps": 2, "seconds": 0.1,
            "seconds_per_picture": 0.001, "peak_bytes": 2**20, "figures": figures(0.3 + share / 3, 200 - 100 * share),
        }
        for name in rows
        for share in (0.25, 0.5, 0.75)
    ]  # fmt: skip
    for row in scores:
        row["cards"] = cards(row["figures"], row["samples"])
    contenders = []
    for contender in spec.contenders:
        config = contender.config()
        lost = diverged and contender.name == "wide"
        training = {
            "steps": None if lost else 16, "seconds": 12.3, "peak_bytes": None if lost else 300 * 2**20,
            "resumed": False, "diverged": "loss nan at step 3" if lost else None,
        }  # fmt: skip
        contenders.append({
            "name": contender.name, "recipe": contender.recipe, "set": list(contender.set),
            "architecture": "dit", "process": config.process, "parameters": 123456, "forward_flops": 7_000_000,
            "training_flops": None if lost else 16 * training_flops(config), "images": None if lost else 128,
            "training": training, "losses": [[8, 0.5], [16, 0.4]], "config": to_json(config),
        })  # fmt: skip
    if not same_losses:
        contenders[0]["config"]["process"] = "edm"
    return {
        "format": 1, "spec": spec.to_json(), "minutes": 1.0, "seconds": 55.0, "command": "smalti compare small.json",
        "finished": "2026-01-01", "samples": 100, "curve": {"calls": 2, "samples": 100},
        "machine": {
            "processor": "A <made-up> one", "cores": 2, "threads": 2, "products": "float32", "system": "Linux",
            "python": "3", "torch": "2", "smalti": "0",
        },
        "judge": {"held_out_accuracy": 0.98, "real_fd": 30.0}, "contenders": contenders, "scores": scores,
        "curves": curves,
    }  # fmt: skip


def grid_png_of_noise():
    import torch

    return grid_png(torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def test_the_conclusion_of_a_file():
    body = constructed()
    found = conclude(body)
    assert found.headline == "wide is better at 3 network calls; these samples show no difference at 2 network calls."
    assert conclusion_lines(body)[0] == f"At equal training FLOPs: {found.headline}"
    assert len(points_of(body["scores"])) == 4
    assert "wide diverged in training and is left out." in conclusion_lines(constructed(diverged=True))


def test_the_page_says_the_conclusion_and_escapes_what_it_is_given():
    page = render(constructed())
    assert "At equal training FLOPs: wide is better at 3 network calls; these samples show no difference" in page
    assert "Which of &lt;two&gt; &amp; why?" in page
    assert "<made-up>" not in page
    assert len(page) < 600_000
    for wanted in ("85.0 % (95 %: 84.0 % to 86.0 %)", "123 k", "300 MiB", "smalti compare small.json --minutes 1"):
        assert wanted in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_losses_are_shown_only_where_they_mean_the_same():
    assert "Validation loss against" in render(constructed())
    page = render(constructed(same_losses=False))
    assert "Validation loss against" not in page
    assert "losses are of different quantities" in page


def test_cards_that_do_not_match_are_not_compared():
    body = constructed()
    body["scores"][2]["cards"] = cards(body["scores"][2]["figures"], 100, judge="another")
    with pytest.raises(UserError, match="another"):
        render(body)


def test_infinite_figures_have_a_page():
    body = constructed()
    body["scores"][0]["figures"]["fd"] = {"value": None, "low": None, "high": None}
    assert "infinite" in render(body)


def test_a_report_alone(tmp_path, capsys):
    spec = small_spec()
    (tmp_path / "small.json").write_text(json.dumps(spec.to_json()))
    (tmp_path / "comparison.json").write_text(json.dumps(constructed()))
    with pytest.raises(SystemExit) as left:
        main(["compare", str(tmp_path / "small.json"), "--out", str(tmp_path), "--report-only"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "wide is better at 3 network calls" in printed
    assert f"report: {tmp_path / 'report.html'}" in printed
    assert "wide is better" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "says"), [(None, "cannot read"), ("{", "is damaged"), ('{"format": 7}', "is not a comparison of format 1")]
)
def test_what_is_no_comparison_is_refused(tmp_path, text, says):
    if text is not None:
        (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(UserError, match=says):
        write_report(tmp_path)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser(browser, tmp_path, width, scheme):
    (tmp_path / "comparison.json").write_text(json.dumps(constructed()))
    path = write_report(tmp_path)
    with quiet_page(browser, path, width, scheme) as page:
        for details in page.query_selector_all("details"):
            details.evaluate("element => element.open = true")
        images = page.eval_on_selector_all("img", "all => all.map(i => [i.complete, i.naturalWidth, i.alt])")
        assert len(images) == 4
        assert all(complete and natural > 0 and alt for complete, natural, alt in images)
        charts = page.eval_on_selector_all("svg", "all => all.map(s => s.getBoundingClientRect().width)")
        assert len(charts) == 7
        assert all(200 < w <= width for w in charts)
        ink = page.eval_on_selector("svg text", "text => getComputedStyle(text).fill")
        assert ink == page.eval_on_selector("body", "body => getComputedStyle(body).color")  # also in the dark
        assert lowest_label(page) >= 8  # pixels: labels can be read
