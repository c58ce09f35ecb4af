"""The retrieval judge: ranks by hand, splits and draws as stated, and a judge that learns coloured squares."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.conditioning.tiny import TinyTextConfig
from smalti.data.rows import PicturesInMemory
from smalti.errors import UserError
from smalti.evaluation.retrieval import (
    RetrievalConfig,
    contrastive_loss,
    jitter,
    judge_report,
    load_retrieval_judge,
    prompt_ranks,
    prompt_rows,
    ranks_of,
    resized,
    share_in_top,
    split_captions,
    train_retrieval_judge,
    without_skin_tone,
)

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
PLACES = {"top left": (2, 2), "top right": (2, 10), "bottom left": (10, 2), "bottom right": (10, 10)}
NAMES = list(itertools.product(COLOURS, PLACES))
CONFIG = RetrievalConfig(
    image_size=(16, 16), width=16, embed_width=32,
    text=TinyTextConfig(vocab_size=300, width=32, depth=1, max_tokens=12),
    epochs=60, batch_size=16, learning_rate=5e-3, shift=1, held_out=0.0,
)  # fmt: skip


def squares():
    """A coloured square at one of four places, one row each, with two captions."""
    images = torch.zeros(len(NAMES), 3, 16, 16, dtype=torch.uint8)
    for row, (colour, place) in enumerate(NAMES):
        top, left = PLACES[place]
        images[row, :, top : top + 4, left : left + 4] = torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None, None]
    return PicturesInMemory(images, captions=[(f"{c} square, {p}", f"{p}: a {c} square") for c, p in NAMES])


@pytest.fixture(scope="module")
def judge():
    torch.set_num_threads(1)
    rows = squares()
    return train_retrieval_judge(rows, rows.captions, CONFIG)


def test_a_trained_judge_finds_the_caption_and_an_untrained_one_does_not(judge):
    rows = squares()
    prompts = [own[1] for own in rows.captions]
    pictures = rows.read(torch.arange(16))
    ranks = prompt_ranks(judge, pictures, prompts, prompts)
    assert (ranks == 1).float().mean() > 0.9
    untrained = train_retrieval_judge(rows, rows.captions, dataclasses.replace(CONFIG, epochs=0.1, learning_rate=1e-9))
    assert 4 < prompt_ranks(untrained, pictures, prompts, prompts).float().mean() < 13
    wrong = prompt_ranks(judge, pictures.roll(1, 0), prompts, prompts)
    assert (wrong == 1).float().mean() < 0.1
    larger = torch.nn.functional.interpolate(pictures, (48, 48), mode="nearest")
    assert torch.equal(prompt_ranks(judge, larger, prompts, prompts), ranks)


def test_a_caption_is_read_the_same_whatever_stands_beside_it(judge):
    together = judge.embed_captions(["red square, top left", "blue square, bottom right and much more besides"])
    torch.testing.assert_close(together[:1], judge.embed_captions(["red square, top left"]))


def test_the_judge_is_a_function_of_data_and_seed(judge):
    rows = squares()
    torch.manual_seed(5)
    torch.set_num_threads(1)
    short = dataclasses.replace(CONFIG, epochs=2)
    first, second = (train_retrieval_judge(rows, rows.captions, short, seed=1) for _ in range(2))
    other = train_retrieval_judge(rows, rows.captions, short, seed=2)
    state = first.state_dict()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in state.items())
    assert not torch.equal(state["text_out.weight"], other.state_dict()["text_out.weight"])


def test_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.2, 0.2], [float("nan")] * 3])
    own = torch.tensor([0, 2, 1, 0])
    assert ranks_of(scores, own).tolist() == [1, 3, 3, 3]  # ties and what is not a number count against the picture
    skipped = torch.zeros(4, 3, dtype=torch.bool)
    skipped[1, 0] = skipped[0, 0] = True  # the own candidate is never left out
    assert ranks_of(scores, own, skipped).tolist() == [1, 2, 3, 3]


class Fixed:
    """A judge with given scores."""

    def __init__(self, scores):
        self.table = scores

    def scores(self, images, captions):
        return self.table


def test_groups_leave_out_the_nearly_same():
    judge = Fixed(torch.tensor([[0.5, 0.6, 0.7], [0.5, 0.6, 0.7]]))
    pictures, candidates = torch.zeros(2, 3, 8, 8), ["wave", "wave light", "dog"]
    assert prompt_ranks(judge, pictures, ["wave", "dog"], candidates).tolist() == [3, 1]
    assert prompt_ranks(judge, pictures, ["wave", "dog"], candidates, ["w", "w", "d"]).tolist() == [2, 1]


def test_questions_that_make_no_sense():
    judge = Fixed(torch.zeros(1, 2))
    picture = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UserError, match="'b' is not among the 1 candidates"):
        prompt_ranks(judge, picture, ["b"], ["a"])
    with pytest.raises(UserError, match="different"):
        prompt_ranks(judge, picture, ["a"], ["a", "a"])
    with pytest.raises(UserError, match="as many"):
        prompt_ranks(judge, picture, ["a", "a"], ["a", "b"])
    with pytest.raises(UserError, match="captions"):
        train_retrieval_judge(squares(), [()] * 16, CONFIG)
    with pytest.raises(UserError, match="candidates=17"):
        prompt_rows(squares().captions, 17)


def test_shares_resample_prompts_with_all_their_pictures():
    single = share_in_top(torch.tensor([1, 11, 3, 20] * 50), 10)
    assert single.value == 0.5
    assert 0.4 < single.low < 0.5 < single.high < 0.6
    repeated = share_in_top(torch.tensor([1, 11, 3, 20] * 50)[:, None].expand(-1, 9), 10)  # nine equal pictures each
    assert (repeated.low, repeated.high) == (single.low, single.high)
    assert share_in_top(torch.ones(30), 1).high == 1.0


@pytest.mark.parametrize(
    ("caption", "base"),
    [
        ("waving hand: medium-light skin tone", "waving hand"),
        ("couple with heart: man, man, dark skin tone, light skin tone", "couple with heart: man, man"),
        ("handshake light skin tone dark skin tone", "handshake"),
        ("a raised fist with light skin tone", "a raised fist"),
        ("two people kissing with light and medium-dark skin tones", "two people kissing"),
        ("fist emoji, dark skin", "fist emoji"),
        ("light bulb", "light bulb"),
        ("a person with white hair", "a person with white hair"),
    ],
)
def test_skin_tones_are_one_emoji(caption, base):
    assert without_skin_tone(caption) == base


captions = st.lists(st.lists(st.text("ab", min_size=1, max_size=3), max_size=5).map(tuple), max_size=40)


@settings(deadline=None)
@given(captions, st.sampled_from([0.0, 0.2, 0.9]), st.integers(0, 2**40))
def test_a_split_loses_nothing_and_leaves_each_group_something(captions, share, seed):
    split = split_captions(captions, share, seed)
    for own, training, held_out in zip(captions, split.training, split.held_out, strict=True):
        assert sorted(training + held_out) == sorted(own)
    for group in {own[0] for own in captions if own}:
        assert any(split.training[row] for row, own in enumerate(captions) if own and own[0] == group)
    if share == 0.0:
        assert not any(split.held_out)


def test_about_a_fifth_of_the_variants_is_held_out():
    tones = [f"hand {i}: {tone} skin tone" for i in range(200) for tone in ("light", "medium", "dark", "medium-dark")]
    names = [(f"thing {i}", f"object {i}", f"item {i}") for i in range(300)]
    single = [(f"one {i}",) for i in range(100)]
    split = split_captions([*((tone,) for tone in tones), *names, *single], 0.2)
    rows = split.held_out
    assert sum(map(len, rows[:800])) == pytest.approx(160, abs=34)  # three standard errors
    assert sum(map(len, rows[800:1100])) == pytest.approx(180, abs=36)
    assert not any(rows[1100:])


def test_prompts_have_distinct_texts_and_their_own_rows():
    captions = [("a",), ("b",), ("a",), (), ("c", "a")]
    rows = prompt_rows(captions, 3, seed=4).tolist()
    assert sorted(captions[row][0] for row in rows) == ["a", "b", "c"]


def test_the_loss_of_perfect_pairs_is_that_of_equal_captions():
    eye = torch.eye(3)
    assert contrastive_loss(eye, eye, ["a", "b", "c"], torch.tensor(100.0)) < 1e-6
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    both = contrastive_loss(same, same, ["a", "a", "b"], torch.tensor(100.0))
    assert both == pytest.approx(2 / 3 * torch.log(torch.tensor(2.0)).item(), abs=1e-4)  # half and half is the best
    shifted = contrastive_loss(eye, eye.roll(1, 0), ["a", "b", "c"], torch.tensor(10.0))
    assert shifted == pytest.approx(10.0, abs=1e-2)


def test_jitter_moves_and_tints_a_little_by_address():
    images = squares().read(torch.arange(16))
    moved = jitter(images, 3, 0, shift=2, colour=0.0)
    assert moved.shape == images.shape
    offsets = set()
    for before, after in zip(images, moved, strict=True):
        found = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(before.roll((-dy, -dx), (1, 2)), after)
        ]
        assert len(found) == 1
        offsets |= set(found)
    assert len(offsets) > 5
    assert torch.equal(jitter(images, 3, 0, 2, 0.0), moved)
    assert not torch.equal(jitter(images, 4, 0, 2, 0.0), moved)
    grey = torch.zeros(50, 3, 4, 4)
    tinted = jitter(grey, 0, 0, 0, 0.1)
    assert 0.05 < tinted.abs().max() <= 0.1
    assert (tinted.amax((2, 3)) == tinted.amin((2, 3))).all()


def test_pictures_of_any_size_are_brought_to_the_judges():
    ramp = torch.arange(64.0).view(1, 1, 8, 8)
    torch.testing.assert_close(resized(ramp, (4, 4)), torch.nn.functional.avg_pool2d(ramp, 2))
    assert resized(ramp, (8, 8)) is ramp
    assert resized(ramp, (16, 12)).shape[-2:] == (16, 12)


def test_the_report_and_the_cache(tmp_path):
    torch.set_num_threads(1)
    rows = squares()
    config = dataclasses.replace(CONFIG, held_out=0.3, epochs=30)
    calls = []
    judge, report = load_retrieval_judge(rows, tmp_path, config, progress=lambda step, steps: calls.append(step))
    assert calls[-1] == len(calls) == 30
    assert report.num_candidates == 16
    assert 0 < report.num_held_out < 16
    assert report.training_top10.value >= report.training_top1.value > 0.3
    assert f"{report.num_held_out} held-out pairs" in report.text()
    again, same = load_retrieval_judge(rows, tmp_path, config, progress=lambda *a: pytest.fail("trained again"))
    assert same == report
    pictures, prompts = rows.read(torch.arange(16)), [own[0] for own in rows.captions]
    assert torch.equal(judge.scores(pictures, prompts), again.scores(pictures, prompts))
    split = split_captions(rows.captions, 0.3)
    assert judge_report(again, rows, split) == report
    (file,) = tmp_path.glob("retrieval-v*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    load_retrieval_judge(rows, tmp_path, config)
    assert file.stat().st_size > 100
    images = rows.images.clone()
    images[0, 0, 0, 0] += 1
    for other in (dataclasses.replace(rows, images=images), dataclasses.replace(rows, captions=rows.captions[::-1])):
        load_retrieval_judge(other, tmp_path, config)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(UserError, match="captions"):
        load_retrieval_judge(PicturesInMemory(rows.images), tmp_path)
