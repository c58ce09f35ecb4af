"""Cards: the JSON round trip, what may be compared with what, and who is better."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.errors import UserError
from smalti.evaluation.cards import (
    Card,
    Drawing,
    Extractor,
    Reference,
    card_from_json,
    card_to_json,
    check_comparable,
    compare_all,
    compare_cards,
    make_card,
    read_cards,
)
from smalti.evaluation.intervals import Estimate
from smalti.evaluation.metrics import METRICS, resample

REFERENCE = Reference("held-out rows of the bundled digits", 1000, "ab" * 32)
EXTRACTOR = Extractor("judge", "cd" * 32)
CARD = make_card("fd", Estimate(5.0, 4.0, 6.0), 1000, REFERENCE, EXTRACTOR, Drawing("runs/a", "ef", "edm", "ddim", 10))

finite = st.floats(-1e12, 1e12)
figures = st.lists(finite | st.just(math.inf), min_size=3, max_size=3).map(sorted)
names = st.text(max_size=8)


@st.composite
def cards(draw):
    low, value, high = draw(figures)
    return Card(
        draw(st.sampled_from(sorted(METRICS))), value, low, high, draw(st.integers(1, 10**6)),
        Reference(draw(names), draw(st.integers(0, 10**6)), draw(names)), Extractor(draw(names), draw(names)),
        Drawing(draw(names), draw(names), draw(names), draw(names), draw(st.integers(0, 1000)), draw(finite),
                draw(st.integers(0, 2**40))),
        draw(st.none() | st.integers(1, 9)), draw(names), draw(names),
    )  # fmt: skip


@given(cards())
def test_cards_survive_json(card):
    text = json.dumps(card_to_json(card), allow_nan=False)
    assert card_from_json(json.loads(text)) == card


def test_a_card_says_what_it_depends_on():
    assert CARD.neighbours is None
    assert make_card("recall", Estimate(0.5, 0.4, 0.6), 10, REFERENCE, EXTRACTOR).neighbours == 3
    assert len(CARD.created.split("-")) == 3
    for word in ("Frechet distance: 5", "4 .. 6", "1000 samples", "held-out rows", "judge cdcdcdcd"):
        assert word in CARD.text()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"metric": "kid"}, "metric (fd and kid)"),
        ({"reference": replace(REFERENCE, fingerprint="00")}, "reference (1000 held-out"),
        ({"reference": replace(REFERENCE, rows=999)}, "and 999 held-out"),
        ({"extractor": Extractor("inception", "cd" * 32)}, "and inception"),
        ({"extractor": Extractor("judge", "11")}, "extractor (judge cdcdcdcdcdcdcdcd and judge 11)"),
        ({"num_samples": 999}, "num_samples (its bias depends on it) (1000 and 999)"),
        ({"neighbours": 4}, "neighbours (None and 4)"),
    ],
)  # fmt: skip
def test_cards_that_do_not_match_refuse_to_be_compared(change, named):
    other = replace(CARD, **change)
    with pytest.raises(UserError) as caught:
        check_comparable(CARD, other)
    assert named in str(caught.value)
    with pytest.raises(UserError):
        compare_cards(CARD, other)


def test_an_unbiased_metric_compares_at_other_numbers_and_sampling_is_what_is_compared():
    kid = replace(CARD, metric="kid")
    check_comparable(kid, replace(kid, num_samples=20))
    check_comparable(CARD, replace(CARD, drawing=Drawing("runs/b", "01", "vp", "unipc_2", 99, 4.0, 7), created=""))


def test_all_that_differs_is_named():
    other = replace(CARD, num_samples=5, extractor=Extractor("dinov2", ""))
    with pytest.raises(UserError, match=r"extractor .*; num_samples"):
        check_comparable(CARD, other)


def test_the_better_card_is_the_one_whose_interval_lies_apart_on_the_right_side():
    worse, near = replace(CARD, value=8.0, low=7.0, high=9.0), replace(CARD, value=5.5, low=4.5, high=6.5)
    assert compare_cards(CARD, worse).better == "a"
    assert compare_cards(worse, CARD).better == "b"
    assert compare_cards(CARD, near) == compare_cards(near, CARD)
    assert compare_cards(CARD, near).better is None
    recall = [replace(card, metric="recall", neighbours=3) for card in (CARD, worse)]
    assert compare_cards(*recall).better == "b"
    diverged = replace(CARD, value=math.inf, low=math.inf, high=math.inf)
    assert compare_cards(CARD, diverged).better == "a"
    assert compare_cards(diverged, diverged).better is None


def test_memorisation_is_best_at_a_half():
    def share(value):
        return replace(CARD, metric="memorisation", value=value, low=value - 0.02, high=value + 0.02)

    assert compare_cards(share(0.5), share(0.9)).better == "a"
    assert compare_cards(share(0.1), share(0.55)).better == "b"
    assert compare_cards(share(0.4), share(0.6)).better is None


def test_the_difference_tells_apart_what_intervals_do_not():
    """Two intervals may overlap while their difference is clear of 0: it is narrower than their sum."""
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(800, 3))
    sets = [generator.normal(shift, 1.0, size=(800, 3)) for shift in np.linspace(0.1, 0.4, 13)]
    resampled = [resample("kid", samples, reference) for samples in sets]
    estimates = [METRICS["kid"].estimate(r) for r in resampled]
    kids = [make_card("kid", estimate, 800, REFERENCE, EXTRACTOR) for estimate in estimates]
    found = [compare_cards(kids[0], kids[i], (resampled[0], resampled[i])) for i in range(1, 13)]
    assert any(one.overlap and one.better == "a" for one in found)
    assert all(one.better == "a" for one in found if not one.overlap)
    assert found[0].better is None
    assert "difference" in found[0].text()


def test_cards_of_a_file_are_read_and_paired(tmp_path):
    path = tmp_path / "evaluation.json"
    mine = [CARD, replace(CARD, metric="kid")]
    path.write_text(json.dumps({"cards": [card_to_json(card) for card in mine]}))
    assert read_cards(path) == mine
    assert [c.metric for c in compare_all(mine, mine[1:])] == ["kid"]
    with pytest.raises(UserError, match="no metric in common: fd by judge; and recall by judge"):
        compare_all(mine[:1], [replace(CARD, metric="recall")])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "cannot be read"),
        ("[]", "has no cards"),
        ('{"cards": []}', "has no cards"),
        ('{"cards": [1]}', "must be an object"),
        ('{"cards": [{"metric": "fd"}]}', "without value"),
    ],
)
def test_damaged_files_of_cards_are_named(tmp_path, text, named):
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(UserError, match=named):
        read_cards(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_cards(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"metric": "fdi"}, "unknown metric"),
        ({"low": 7.0}, "value=5.0 must lie in its interval, 7.0 .. 6.0"),
        ({"value": math.nan}, "must be numbers"),
        ({"num_samples": 0}, "at least 1"),
    ],
)
def test_impossible_cards_are_refused(change, named):
    with pytest.raises(UserError, match=named):
        replace(CARD, **change)
