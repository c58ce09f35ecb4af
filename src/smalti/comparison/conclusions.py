"""What follows from the intervals, in words: the same figures that the report shows, and nothing else.

A contender is called better where the 95 % interval of its difference to each other one leaves 0 out, else no
difference is shown. The interval of a difference is put together from those of the two figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smalti.evaluation.intervals import Estimate

SLACK = 1.05  # a contender is within a budget of seconds also where it takes this much of it: clocks vary


@dataclass(frozen=True)
class Metric:
    """A figure that contenders are ranked by. scale: of what is shown, such as 100 for percent."""

    key: str
    name: str
    higher_is_better: bool
    scale: float = 1.0
    unit: str = ""
    digits: int = 1

    def text(self, value: float) -> str:
        """A value as it is shown."""
        return f"{self.scale * value:.{self.digits}f}{self.unit}" if math.isfinite(value) else "infinite"

    def interval(self, estimate: Estimate) -> str:
        """The value with its interval."""
        ends = f"{self.text(estimate.low)} to {self.text(estimate.high)}"
        return f"{self.text(estimate.value)} (95 %: {ends})"


ACCURACY = Metric("accuracy", "judge accuracy", True, 100.0, " %")
FRECHET = Metric("fd", "Frechet distance", False)
KERNEL = Metric("kid", "kernel distance", False)
DECIDING = (ACCURACY, FRECHET)
CHANCE = 0.1  # accuracy of pictures that have nothing to do with their labels, of ten classes


@dataclass(frozen=True)
class Point:
    """A contender's figures at a number of network calls. seconds: of drawing one picture."""

    contender: str
    calls: int
    seconds: float
    figures: dict[str, Estimate]


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b with its 95 % interval, for independent figures.

    Source: Zou and Donner 2008, "Construction of confidence intervals about effect measures", eq. 3 (MOVER).
    """
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, low, high)


@dataclass(frozen=True)
class Ranking:
    """Contenders by one metric, best first. level: those that the intervals do not show to be worse than the first.

    lead: how much better the first is than the second, positive; None where one of them is infinitely far.
    """

    metric: Metric
    order: tuple[str, ...]
    level: tuple[str, ...]
    figures: dict[str, Estimate]
    lead: Estimate | None

    @property
    def winner(self) -> str | None:
        """The one that is better than all others, if the intervals show one."""
        return self.order[0] if len(self.level) == 1 else None


def rank(metric: Metric, points: Sequence[Point]) -> Ranking:
    """Rank the points of one budget by a metric."""
    figures = {point.contender: point.figures[metric.key] for point in points}
    sign = 1.0 if metric.higher_is_better else -1.0

    def better_by(a: str, b: str) -> Estimate:
        first, second = (figures[a], figures[b]) if metric.higher_is_better else (figures[b], figures[a])
        return difference(first, second)

    order = sorted(figures, key=lambda name: (-sign * figures[name].value, name))
    best = order[0]
    if not math.isfinite(figures[best].value):
        return Ranking(metric, tuple(order), tuple(order), figures, None)
    finite = [name for name in order if math.isfinite(figures[name].value)]
    level = [best, *(name for name in finite[1:] if better_by(best, name).low <= 0)]
    lead = better_by(best, finite[1]) if len(finite) > 1 else None
    return Ranking(metric, tuple(order), tuple(level), figures, lead)


def listed(names: Sequence[object]) -> str:
    """a, b and c."""
    words = [str(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


@dataclass(frozen=True)
class Verdict:
    """What a budget's intervals show. budget: in words; absent: contenders that have nothing within it.

    kind: "winner" (by one metric at least, and no other contradicts), "split" (metrics name different winners),
    "none" (no difference shown), "chance" (no contender's pictures are read better than by chance) or "alone" (one
    contender only).
    """

    budget: str
    kind: str
    winner: str | None
    rankings: tuple[Ranking, ...]
    points: tuple[Point, ...]
    absent: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """For a table's cell."""
        if self.kind == "winner":
            return str(self.winner)
        if self.kind == "split":
            return "; ".join(f"{listed(r.level)} by {r.metric.name}" for r in self.rankings)
        if self.kind == "alone":
            return f"only {self.points[0].contender}"
        return "none draws its labels" if self.kind == "chance" else "no difference shown"


def judge_budget(budget: str, points: Sequence[Point], absent: Sequence[str] = ()) -> Verdict:
    """The verdict on the points of one budget."""
    rankings = tuple(rank(metric, points) for metric in DECIDING)
    winners = {ranking.winner for ranking in rankings if ranking.winner is not None}
    kind, winner = "none", None
    if all(point.figures[ACCURACY.key].low <= CHANCE for point in points):
        kind = "chance"  # who is nearer to digits among those that draw none is no answer
    elif len(points) == 1:
        kind = "alone"
    elif len(winners) == 1:
        (candidate,) = winners
        if all(candidate in ranking.level for ranking in rankings):
            kind, winner = "winner", candidate
        else:
            kind = "split"
    elif winners or not set.intersection(*(set(ranking.level) for ranking in rankings)):
        kind = "split"
    return Verdict(budget, kind, winner, rankings, tuple(points), tuple(absent))


def sentences(verdict: Verdict) -> list[str]:
    """The verdict's reasons: for each metric who leads, by how much, and the interval of that."""
    lines = []
    for ranking in verdict.rankings:
        metric, best = ranking.metric, ranking.order[0]
        shown = f"{best} {metric.interval(ranking.figures[best])}"
        if ranking.lead is None:
            lines.append(f"{metric.name}: {shown}; nothing to compare it with")
            continue
        second = next(name for name in ranking.order[1:] if math.isfinite(ranking.figures[name].value))
        unit = " points" if metric.unit == " %" else ""
        low, value, high = (
            f"{metric.scale * number:.{metric.digits}f}"
            for number in (ranking.lead.low, ranking.lead.value, ranking.lead.high)
        )
        lead = f"{value}{unit} better than {second}'s {metric.text(ranking.figures[second].value)}"
        says = f"{metric.name}: {shown}, {lead} (95 %: {low} to {high})"
        if ranking.winner is None:
            says += f"; no difference that these samples show between {listed(ranking.level)}"
        lines.append(says)
    return lines


def verdicts_by_calls(points: Sequence[Point], contenders: Sequence[str]) -> list[Verdict]:
    """A verdict for each number of network calls."""
    verdicts = []
    for calls in sorted({point.calls for point in points}):
        present = [point for point in points if point.calls == calls]
        absent = [name for name in contenders if name not in {point.contender for point in present}]
        verdicts.append(judge_budget(f"{calls} network calls", present, absent))
    return verdicts


def verdicts_by_seconds(points: Sequence[Point], contenders: Sequence[str]) -> list[Verdict]:
    """A verdict for each time in which the slowest contender makes one of the numbers of calls.

    Each contender enters with the most calls that it makes in that time.
    """
    budgets = sorted({max(p.seconds for p in points if p.calls == calls) for calls in {p.calls for p in points}})
    verdicts = []
    for seconds in budgets:
        within = [point for point in points if point.seconds <= SLACK * seconds]
        chosen = [
            max((p for p in within if p.contender == name), key=lambda p: p.calls)
            for name in contenders
            if any(p.contender == name for p in within)
        ]
        absent = [name for name in contenders if name not in {point.contender for point in chosen}]
        verdicts.append(judge_budget(f"{1000 * seconds:.3g} ms a picture", chosen, absent))
    return verdicts


def headline(verdicts: Sequence[Verdict]) -> str:
    """Who is better at which budgets, in a sentence or two."""
    if not verdicts:
        return "Nothing was measured."
    parts = []
    for winner in dict.fromkeys(verdict.winner for verdict in verdicts if verdict.winner is not None):
        parts.append(f"{winner} is better at {_budgets([v for v in verdicts if v.winner == winner])}")
    undecided = [verdict for verdict in verdicts if verdict.kind == "none"]
    if undecided:
        parts.append(f"these samples show no difference at {_budgets(undecided)}")
    split = [verdict for verdict in verdicts if verdict.kind == "split"]
    if split:
        parts.append(f"the two figures disagree at {_budgets(split)}")
    chance = [verdict for verdict in verdicts if verdict.kind == "chance"]
    if chance:
        parts.append(
            f"at {_budgets(chance)} no contender draws what it is asked for better than by chance: train for longer"
        )
    alone = [verdict for verdict in verdicts if verdict.kind == "alone"]
    if alone:
        parts.append(f"only one contender has anything to show at {_budgets(alone)}")
    return f"{'; '.join(parts)}."


def _budgets(verdicts: Sequence[Verdict]) -> str:
    """4, 8 and 16 network calls."""
    words = [verdict.budget.split(" ", 1) for verdict in verdicts]
    assert len({unit for _, unit in words}) == 1
    return f"{listed([amount for amount, _ in words])} {words[0][1]}"
