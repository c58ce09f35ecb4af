"""Which caption a step reads: addressed, so that slots, batch sizes and order of calls change nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.conditioning.captions import FIRST_CAPTIONS, CaptionPolicy, caption_lengths, pick_captions
from smalti.errors import UserError

texts = st.lists(st.lists(st.text(max_size=30), max_size=4).map(tuple), min_size=1, max_size=9)
policies = st.builds(
    CaptionPolicy,
    dropout=st.sampled_from([0.0, 0.3]),
    choose=st.sampled_from(["random", "first"]),
    shuffle=st.booleans(),
)


def parts(caption):
    return sorted(part.strip() for part in caption.split(","))


def pick(captions, indices, policy, slots=None, seed=0, step=0):
    slots = torch.arange(len(indices)) if slots is None else slots
    return pick_captions(captions, torch.tensor(indices), slots, seed, step, policy)


@settings(deadline=None, max_examples=60)
@given(texts, policies, st.integers(0, 2**62), st.integers(0, 2**31), st.data())
def test_a_slot_reads_a_caption_of_its_row_whatever_stands_beside_it(captions, policy, seed, step, data):
    indices = data.draw(st.lists(st.integers(0, len(captions) - 1), min_size=1, max_size=6))
    whole = pick(captions, indices, policy, seed=seed, step=step)
    for row, caption in zip(indices, whole, strict=True):
        assert not caption or parts(caption) in [parts(own) for own in captions[row]]
    for slot, row in enumerate(indices):
        alone = pick(captions, [row], policy, torch.tensor([slot]), seed, step)
        assert alone == [whole[slot]]


@settings(deadline=None)
@given(texts, st.integers(0, 1000))
def test_the_first_captions_are_read_as_they_are_at_every_step(captions, step):
    everything = pick(captions, list(range(len(captions))), FIRST_CAPTIONS, step=step)
    assert everything == [own[0] if own else "" for own in captions]


def test_shares_are_those_of_the_policy():
    captions = [("a", "b", "c")]
    picked = [c for step in range(20) for c in pick(captions, [0] * 500, CaptionPolicy(dropout=0.2), step=step)]
    shares = {caption: picked.count(caption) / len(picked) for caption in ("", "a", "b", "c")}
    assert shares[""] == pytest.approx(0.2, abs=0.012)  # three standard errors
    for caption in "abc":
        assert shares[caption] == pytest.approx(0.8 / 3, abs=0.014)


def test_every_order_of_the_parts_is_as_likely():
    policy = CaptionPolicy(dropout=0.0, shuffle=True)
    picked = [c for step in range(12) for c in pick([(" red,round , big",)], [0] * 500, policy, step=step)]
    orders = {caption: picked.count(caption) / len(picked) for caption in set(picked)}
    assert len(orders) == 6
    assert all(share == pytest.approx(1 / 6, abs=0.015) for share in orders.values())
    assert "round, big, red" in orders


def test_dropping_does_not_change_which_caption_the_others_read():
    captions = [tuple("abcdef")] * 40
    kept = pick(captions, list(range(40)), CaptionPolicy(dropout=0.0))
    dropped = pick(captions, list(range(40)), CaptionPolicy(dropout=0.5))
    assert "" in dropped
    assert all(with_drop in ("", without) for with_drop, without in zip(dropped, kept, strict=True))


@pytest.mark.parametrize("bad", [{"dropout": 1.0}, {"dropout": -0.1}, {"choose": "last"}])
def test_policies_that_make_no_sense(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        CaptionPolicy(**bad)


class Words:
    max_tokens = 4

    def token_counts(self, captions):
        return [len(caption.split()) for caption in captions]


def test_lengths_count_what_is_cut():
    lengths = caption_lengths(Words(), ["a b", "a b c d", "a b c d e f", ""])
    assert (lengths.captions, lengths.mean, lengths.longest, lengths.truncated, lengths.limit) == (4, 3.0, 6, 1, 4)
    assert lengths.longest_caption == "a b c d e f"
    assert caption_lengths(Words(), []).longest == 0
