"""Buckets: sizes within the budget, the nearest for each picture, and an order that reads every row once a pass."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from smalti.data.buckets import assign_buckets, bucket_batch, make_buckets
from smalti.data.on_demand import PicturesOnDemand
from smalti.data.opening import open_buckets, open_rows
from smalti.data.rows import PicturesInMemory, to_bytes
from smalti.data.sources import DigitsData, FolderData
from smalti.errors import UserError

# --- sizes


@settings(deadline=None)
@given(
    budget=st.integers(1, 3000), patch=st.integers(1, 32), step=st.integers(1, 4), max_aspect=st.floats(1, 4)
)  # fmt: skip
def test_buckets_fill_the_budget(budget, patch, step, max_aspect):
    assume(budget >= step**2)
    buckets = make_buckets(budget, patch, max_aspect=max_aspect, step=step)

    def allowed(rows, columns):
        return rows * columns <= budget and max(rows, columns) <= max_aspect * min(rows, columns)

    assert buckets
    sides = {(height // patch, width // patch) for height, width in buckets}
    assert len(sides) == len(buckets)
    for height, width in buckets:
        rows, columns = height // patch, width // patch
        assert (rows * patch, columns * patch) == (height, width)
        assert rows % step == columns % step == 0
        assert allowed(rows, columns)
        assert not allowed(rows + step, columns)
        assert not allowed(rows, columns + step)
        assert (columns, rows) in sides  # tall and wide alike


def test_buckets_of_a_small_budget():
    assert make_buckets(16, 2, max_aspect=2) == ((6, 10), (8, 8), (10, 6))
    assert make_buckets(256, 16, step=4) == ((192, 320), (256, 256), (320, 192))
    assert make_buckets(3, 8) == ((8, 16), (16, 8))
    assert len(make_buckets(1024, 16)) > len(make_buckets(1024, 16, step=4))


@pytest.mark.parametrize("options", [{"token_budget": 0}, {"patch": 0}, {"step": 0}, {"max_aspect": 0.5}])
def test_impossible_buckets(options):
    with pytest.raises(UserError, match="must be at least 1"):
        make_buckets(**{"token_budget": 16, "patch": 2, **options})
    with pytest.raises(UserError, match="too small for a bucket of 8 x 8 tokens"):
        make_buckets(16, 2, step=8)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=20))
def test_each_picture_gets_the_nearest_shape(sizes):
    buckets = make_buckets(256, 8, max_aspect=3)
    chosen, enlargement = assign_buckets(torch.tensor(sizes), buckets)
    for (height, width), bucket, factor in zip(sizes, chosen.tolist(), enlargement.tolist(), strict=True):
        distances = [abs(np.log(height / width) - np.log(h / w)) for h, w in buckets]
        assert distances[bucket] == pytest.approx(min(distances), abs=1e-9)
        # Scaled by the factor the picture covers its bucket, and just so.
        cover = (height * factor / buckets[bucket][0], width * factor / buckets[bucket][1])
        assert min(cover) == pytest.approx(1)


# --- the order of batches

ROWS = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum)


@settings(max_examples=100, deadline=None)
@given(num_rows=ROWS, batch_size=st.integers(1, 9), seed=st.integers(0, 2**63 - 1), passes=st.integers(1, 4))
def test_every_row_once_a_pass_and_none_lost(num_rows, batch_size, seed, passes):
    """After `passes` epochs a bucket has read its first passes * rows // batch_size batches: every row as often as any
    other, give or take one."""
    steps = sum(passes * rows // batch_size for rows in num_rows)
    seen = Counter()
    for step in range(steps):
        bucket, rows = bucket_batch(step, batch_size, num_rows, seed)
        assert rows.shape == (batch_size,)
        assert 0 <= rows.min() <= rows.max() < num_rows[bucket]
        if num_rows[bucket] % batch_size == 0:
            assert len(rows.unique()) == batch_size
        seen.update((bucket, row) for row in rows.tolist())
    for bucket, count in enumerate(num_rows):
        times = [seen[bucket, row] for row in range(count)]
        assert sum(times) == (passes * count // batch_size) * batch_size
        assert not times or max(times) - min(times) <= 1
        assert not times or max(times) <= passes


@settings(max_examples=50, deadline=None)
@given(num_rows=ROWS, batch_size=st.integers(1, 60), seed=st.integers(0, 2**40), step=st.integers(0, 10**7))
def test_any_step_can_be_asked_for_by_itself(num_rows, batch_size, seed, step):
    """Resuming: step s is the same whether or not the steps before it were asked for, and far steps cost no more."""
    here = bucket_batch(step, batch_size, num_rows, seed)
    bucket_batch(step + 1, batch_size, num_rows, seed)
    bucket_batch(max(0, step - 1), batch_size, num_rows, seed)
    again = bucket_batch(step, batch_size, num_rows, seed)
    assert here[0] == again[0]
    assert torch.equal(here[1], again[1])


def test_shares_of_the_buckets_follow_their_rows():
    num_rows = (700, 250, 50, 3, 0)
    counts = Counter(bucket_batch(step, 10, num_rows, seed=3)[0] for step in range(1003))
    assert [counts[bucket] for bucket in range(5)] == [700, 250, 50, 3, 0]


def test_orders_differ_by_seed_epoch_and_bucket():
    num_rows = (64, 64)

    def epoch(number, seed):
        batches = [bucket_batch(step, 8, num_rows, seed) for step in range(16 * number, 16 * number + 16)]
        assert Counter(bucket for bucket, _ in batches) == {0: 8, 1: 8}
        return [bucket for bucket, _ in batches], [
            torch.cat([rows for bucket, rows in batches if bucket == wanted]).tolist() for wanted in (0, 1)
        ]

    first, second, other = epoch(0, 0), epoch(1, 0), epoch(0, 1)
    assert first[1][0] != first[1][1]
    assert first != second
    assert first[1] != second[1]
    assert first[1] != other[1]
    assert sorted(first[1][0]) == list(range(64))


# --- rows in buckets


@pytest.fixture
def mixed_folder(tmp_path):
    """Pictures of three shapes, their number as caption and, times ten, as colour."""
    for i in range(18):
        size = ((80, 40), (50, 50), (36, 70))[i % 3]  # width, height
        Image.new("RGB", size, (10 * i,) * 3).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:-30])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (12, 10), "white").save(tmp_path / "small.png")
    return tmp_path


@pytest.mark.parametrize("limit", [0, 2**30])
def test_a_folder_of_mixed_sizes(mixed_folder, limit):
    buckets = ((24, 48), (32, 32), (48, 24), (20, 56))
    config = FolderData(str(mixed_folder), held_out=0.3)
    opened = open_buckets(config, 3, buckets, memory_limit=limit)
    assert {type(rows) for rows in opened.training} == {PicturesInMemory if limit else PicturesOnDemand}
    assert {rows.shape for rows in opened.training} <= {(3, *bucket) for bucket in buckets[:3]}
    shapes, found = {(3, 24, 48): 0, (3, 32, 32): 1, (3, 48, 24): 2}, set()
    for rows in (*opened.training, *opened.held_out):
        pictures = rows.read(torch.arange(len(rows)))
        assert tuple(pictures.shape[1:]) == rows.shape
        for picture, captions in zip(pictures, rows.captions, strict=True):
            if captions:
                number = int(captions[0].removeprefix("number "))
                assert number % 3 == shapes[rows.shape]
                if limit:  # on demand, a broken picture is known only when it is read
                    assert to_bytes(picture).unique().tolist() == [10 * number]
                found.add(number)
    assert found == set(range(18))
    assert len(opened.held_out) > 0
    assert {key for key, _ in opened.skipped} == {"text.png"} | ({"broken.png"} if limit else set())
    assert dict(opened.enlarged) == {"small.png": pytest.approx(3.2)}


def test_buckets_hold_out_the_same_rows(mixed_folder):
    config = FolderData(str(mixed_folder), held_out=0.3)
    plain = open_rows(config, 1, (16, 16))
    bucketed = open_buckets(config, 1, ((16, 32), (32, 16)))
    assert set(plain.held_out.captions) == {caption for rows in bucketed.held_out for caption in rows.captions}


def test_rows_of_one_size_have_one_bucket():
    opened = open_buckets(DigitsData(), 1, make_buckets(49, 4))
    assert [rows.shape for rows in opened.training] == [(1, 28, 28)]
    assert (len(opened.training[0]), len(opened.held_out[0])) == (9000, 1000)
    assert torch.equal(opened.training[0].images, open_rows(DigitsData(), 1, (28, 28)).training.images)
