"""Result cards: a figure with its interval and what it depends on. Cards that do not match do not compare."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import smalti
from smalti.config import from_json
from smalti.errors import UserError
from smalti.evaluation.intervals import Estimate, Resampled, difference
from smalti.evaluation.metrics import metric_named
from smalti.run_folder import finite_json


@dataclass(frozen=True)
class Reference:
    """What samples are measured against. name: in words; fingerprint: SHA-256 of the pictures."""

    name: str
    rows: int
    fingerprint: str


@dataclass(frozen=True)
class Extractor:
    """What computed the features. fingerprint: SHA-256 of its weights and of how it reads a picture."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Drawing:
    """How the samples were drawn. weights: SHA-256 of the network's. seed: of the first sample."""

    run: str = ""
    weights: str = ""
    process: str = ""
    solver: str = ""
    network_calls: int = 0
    guidance_scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Card:
    """A figure, its 95 % interval, and what it depends on.

    An infinite value is that of a sampler that diverged. neighbours: k of a metric that has one. created: a date.
    Raises UserError for an unknown metric, a figure outside its interval, NaN, or no samples.
    """

    metric: str
    value: float
    low: float
    high: float
    num_samples: int
    reference: Reference
    extractor: Extractor
    drawing: Drawing = Drawing()
    neighbours: int | None = None
    smalti: str = smalti.__version__
    created: str = ""

    def __post_init__(self) -> None:
        metric_named(self.metric)
        if self.num_samples < 1:
            raise UserError(f"card.num_samples={self.num_samples} must be at least 1")
        if any(math.isnan(x) or x == -math.inf for x in (self.value, self.low, self.high)):
            raise UserError(f"card of {self.metric}: {self.value} [{self.low}, {self.high}] must be numbers")
        if not self.low <= self.value <= self.high:
            raise UserError(
                f"card of {self.metric}: value={self.value} must lie in its interval, {self.low} .. {self.high}"
            )

    @property
    def estimate(self) -> Estimate:
        """The figure with its interval."""
        return Estimate(self.value, self.low, self.high)

    def text(self) -> str:
        """One line for a person."""
        return (
            f"{metric_named(self.metric).title}: {self.value:.4g}  (95 %: {self.low:.4g} .. {self.high:.4g}; "
            f"{self.num_samples} samples against {self.reference.rows} {self.reference.name}, {self.extractor.name} "
            f"{self.extractor.fingerprint[:8]})"
        )


def make_card(
    metric: str,
    estimate: Estimate,
    num_samples: int,
    reference: Reference,
    extractor: Extractor,
    drawing: Drawing | None = None,
) -> Card:
    """A card of today, by this version of smalti."""
    neighbours = metric_named(metric).neighbours
    return Card(
        metric, estimate.value, estimate.low, estimate.high, num_samples, reference, extractor,
        drawing or Drawing(), neighbours, smalti.__version__, date.today().isoformat(),
    )  # fmt: skip


def card_to_json(card: Card) -> dict[str, Any]:
    """A card as plain JSON; null stands for an infinite figure."""
    body: dict[str, Any] = finite_json(asdict(card))
    return body


def card_from_json(body: Any) -> Card:
    """card_to_json's card. Raises UserError for anything else."""
    if not isinstance(body, dict):
        raise UserError(f"a card must be an object, not {body!r}")
    figures = {name: math.inf for name in ("value", "low", "high") if name in body and body[name] is None}
    missing = [f.name for f in fields(Card) if f.name not in body]
    if missing:
        raise UserError(f"a card without {', '.join(missing)}")
    try:
        card: Card = from_json(Card, {**body, **figures})
    except TypeError as error:
        raise UserError(f"a card that does not parse: {error}") from None
    return card


def read_cards(path: Path) -> list[Card]:
    """The cards of an evaluation.json. Raises UserError where it is missing, damaged or has none."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; `smalti eval RUN` writes it") from None
    cards = body.get("cards") if isinstance(body, dict) else None
    if not isinstance(cards, list) or not cards:
        raise UserError(f"{path} has no cards: write it anew with `smalti eval RUN`")
    return [card_from_json(card) for card in cards]


def check_comparable(a: Card, b: Card) -> None:
    """Raise UserError naming all that differs where two cards' figures do not mean the same."""
    pairs: list[tuple[str, object, object]] = [("metric", a.metric, b.metric)]
    if a.metric == b.metric:
        pairs += [
            ("neighbours", a.neighbours, b.neighbours),
            ("extractor", _named(a.extractor), _named(b.extractor)),
            ("reference", _named(a.reference), _named(b.reference)),
        ]
        if metric_named(a.metric).depends_on_count:
            pairs.append(("num_samples (its bias depends on it)", a.num_samples, b.num_samples))
    different = [f"{name} ({x} and {y})" for name, x, y in pairs if x != y]
    if different:
        raise UserError(f"cards of {a.metric} do not compare: they differ in {'; '.join(different)}")


def _named(source: Reference | Extractor) -> str:
    rows = f"{source.rows} " if isinstance(source, Reference) else ""
    return f"{rows}{source.name} {source.fingerprint[:16]}"


@dataclass(frozen=True)
class Comparison:
    """Two cards that match. better: "a" or "b"; None where the intervals do not tell them apart.

    difference: a - b with its interval, where the replicates of both were at hand; without them two cards are told
    apart only where their intervals do not overlap, which is stricter.
    """

    metric: str
    better: str | None
    overlap: bool
    difference: Estimate | None = None

    def text(self) -> str:
        """One line for a person."""
        verdict = "not told apart" if self.better is None else f"{self.better} is better"
        gap = self.difference
        tail = "" if gap is None else f"; difference {gap.value:.4g}  (95 %: {gap.low:.4g} .. {gap.high:.4g})"
        return f"{self.metric}: {verdict}, intervals {'overlap' if self.overlap else 'are apart'}{tail}"


def compare_cards(a: Card, b: Card, replicates: tuple[Resampled, Resampled] | None = None) -> Comparison:
    """Which of two cards is better, if either. replicates: of a's and b's samples, which are drawn independently.

    Raises UserError where the cards do not match.
    """
    check_comparable(a, b)
    if metric_named(a.metric).better == "half":
        a, b = _distance_from_half(a), _distance_from_half(b)
        replicates = None  # of the share and not of its distance from a half
    overlap = a.low <= b.high and b.low <= a.high
    gap = None if replicates is None else difference(*replicates)
    told_apart = not overlap if gap is None else gap.low > 0 or gap.high < 0
    if not told_apart or a.value == b.value:
        return Comparison(a.metric, None, overlap, gap)
    higher_wins = metric_named(a.metric).better == "higher"
    return Comparison(a.metric, "a" if (a.value > b.value) == higher_wins else "b", overlap, gap)


def _distance_from_half(card: Card) -> Card:
    """A share's card as one of |share - 0.5|, which is better the lower it is."""
    low, high = abs(card.low - 0.5), abs(card.high - 0.5)
    nearest = 0.0 if card.low <= 0.5 <= card.high else min(low, high)
    return replace(card, value=abs(card.value - 0.5), low=nearest, high=max(low, high))


def compare_all(a: Sequence[Card], b: Sequence[Card]) -> list[Comparison]:
    """The comparisons of cards of one metric and extractor, in a's order. Raises UserError where two do not match, or
    none have a metric in common."""
    by_key = {(card.metric, card.extractor.name): card for card in b}
    found = [compare_cards(card, by_key[key]) for card in a if (key := (card.metric, card.extractor.name)) in by_key]
    if not found:
        ours, theirs = ({f"{card.metric} by {card.extractor.name}" for card in cards} for cards in (a, b))
        raise UserError(f"no metric in common: {', '.join(sorted(ours))}; and {', '.join(sorted(theirs))}")
    return found
