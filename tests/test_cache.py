"""The cache: nothing is encoded twice, damage is found, a kill loses a shard at most, two processes agree."""

import json
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from cache_rounds import SHARD_ENTRIES
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.data.cache import Cache, CacheDamage, picture_key, text_key
from smalti.data.cached_rows import CachedLatents, CachedText, condition_entries, joined_condition
from smalti.data.filling import fill_cache
from smalti.data.latents import LatentStatistics, measure_latents
from smalti.errors import UserError
from smalti.types import Condition

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)


class CountingEncoder:
    """Moments of a text: a function of its characters. Remembers what it was asked for."""

    def __init__(self, channels=2, size=3):
        self.shape, self.encoded, self.made = (2 * channels, size, size), [], 0

    def make(self):
        self.made += 1
        return self.encode

    def encode(self, texts):
        self.encoded += texts
        return [{"moments": moments_of(text, self.shape)} for text in texts]


def moments_of(text, shape):
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    return torch.randn(shape, generator=generator)


def fill(folder, texts, encoder, **options):
    return fill_cache(folder, {text_key(text, "encoder"): text for text in texts}, encoder.make, **options)


def assert_right(folder, texts, encoder):
    cache = Cache(folder)
    for text in texts:
        assert torch.equal(cache.read(text_key(text, "encoder"))["moments"], moments_of(text, encoder.shape))


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made = (torch.randn(shape, generator=generator) * 100).to(dtype)
    return made.mT if len(shape) > 1 and draw(st.booleans()) else made  # convolutions may leave any order of strides


@settings(max_examples=40, deadline=None)
@given(
    entries=st.dictionaries(
        st.text(max_size=5),
        st.dictionaries(st.sampled_from(["moments", "mask", "a/b"]), tensors(), max_size=3),
        max_size=6,
    ),
    batch_size=st.integers(1, 4),
    shard_bytes=st.integers(1, 500),
)
def test_entries_come_back_bit_for_bit(tmp_path_factory, entries, batch_size, shard_bytes):
    folder = tmp_path_factory.mktemp("cache")
    wanted = {text_key(name, "e"): entry for name, entry in entries.items()}
    fill_cache(folder, wanted, lambda: lambda items: items, batch_size=batch_size, shard_bytes=shard_bytes)
    cache = Cache(folder)
    assert len(cache) == len(wanted)
    for key, entry in wanted.items():
        back = cache.read(key)
        assert back.keys() == entry.keys()
        for name, tensor in entry.items():
            assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(back[name], tensor)


def test_a_second_run_encodes_nothing_and_a_change_is_encoded_alone(tmp_path):
    encoder = CountingEncoder()
    texts = [f"picture {i}" for i in range(20)]
    report = fill(tmp_path, texts, encoder, batch_size=3)
    assert (report.encoded, report.reused, report.damages) == (20, 0, ())
    assert sorted(encoder.encoded) == sorted(texts)
    again = CountingEncoder()
    report = fill(tmp_path, texts, again)
    assert (report.encoded, report.reused, again.made) == (0, 20, 0)  # the encoder is not even loaded
    texts[7] = "another picture"
    report = fill(tmp_path, texts, again)
    assert (report.encoded, report.reused, again.encoded) == (1, 19, ["another picture"])
    assert_right(tmp_path, texts, encoder)


def test_the_address_holds_all_that_decides_an_entry():
    transform = {"size": [64, 64], "crop": "center"}
    keys = {
        picture_key("a", "e", transform),
        picture_key("b", "e", transform),
        picture_key("a", "f", transform),
        picture_key("a", "e", transform | {"size": [64, 32]}),
        picture_key("a", "e", transform, flipped=True),
        text_key("a", "e"),
        text_key("ae", ""),
        text_key("", "ae"),
    }
    assert len(keys) == 8
    assert picture_key("a", "e", dict(reversed(transform.items()))) in keys  # the order of fields does not count


def test_progress_reaches_the_total(tmp_path):
    seen = []
    fill(tmp_path, ["a", "b", "c"], CountingEncoder(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-3:] == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    fill(tmp_path, ["a", "b", "c", "d"], CountingEncoder(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_flipped_bit_is_found_and_that_entry_alone_encoded_again(tmp_path):
    encoder = CountingEncoder()
    texts = [f"picture {i}" for i in range(12)]
    fill(tmp_path, texts, encoder, shard_bytes=4 * 36 * 4)
    shards = sorted(tmp_path.glob("shard-*.safetensors"))
    assert len(shards) == 3
    content = bytearray(shards[1].read_bytes())
    content[-10] ^= 4  # the values lie at the end: in the last of the shard's entries
    shards[1].write_bytes(content)
    cache, damaged = Cache(tmp_path), []
    for text in texts:
        try:
            cache.read(text_key(text, "encoder"))
        except CacheDamage:
            damaged.append(text)
    assert len(damaged) == 1
    again = CountingEncoder()
    report = fill(tmp_path, texts, again)
    assert (again.encoded, report.encoded, report.reused) == (damaged, 1, 11)
    assert "checksum does not match" in report.damages[0]
    assert_right(tmp_path, texts, encoder)
    assert fill(tmp_path, texts, again).damages == ()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_no_flipped_bit_anywhere_ever_gives_a_wrong_value(tmp_path_factory, seed):
    folder, generator = tmp_path_factory.mktemp("cache"), random.Random(seed)
    encoder, texts = CountingEncoder(), [f"picture {i}" for i in range(6)]
    fill(folder, texts, encoder, shard_bytes=3 * 36 * 4)
    shard = generator.choice(sorted(folder.glob("shard-*.safetensors")))
    content = bytearray(shard.read_bytes())
    position = generator.randrange(len(content))
    content[position] ^= 1 << generator.randrange(8)
    shard.write_bytes(content)
    cache = Cache(folder)
    for text in texts:  # whatever is still read is right
        try:
            entry = cache.read(text_key(text, "encoder"))
        except UserError:
            continue
        assert torch.equal(entry["moments"], moments_of(text, encoder.shape))
    again = CountingEncoder()
    fill(folder, texts, again)
    assert_right(folder, texts, encoder)
    assert len(again.encoded) <= 3  # the shard at most
    if position >= len(content) - 3 * 36 * 4:
        assert len(again.encoded) == 1


def test_a_shard_without_a_readable_header_is_set_aside(tmp_path):
    encoder, texts = CountingEncoder(), [f"picture {i}" for i in range(6)]
    fill(tmp_path, texts, encoder, shard_bytes=3 * 36 * 4)
    first = tmp_path / "shard-00000001.safetensors"
    first.write_bytes(first.read_bytes()[:100])
    again = CountingEncoder()
    report = fill(tmp_path, texts, again)
    assert again.encoded == texts[:3]
    assert report.damages == (f"{first} cannot be read: set aside as shard-00000001.damaged, which may be deleted",)
    assert_right(tmp_path, texts, encoder)
    assert fill(tmp_path, texts, CountingEncoder()).damages == ()


def test_an_encoder_that_fails_loses_nothing(tmp_path):
    encoder, texts = CountingEncoder(), [f"picture {i}" for i in range(6)]

    def encode(items):
        if "picture 4" in items:
            raise KeyboardInterrupt
        return encoder.encode(items)

    with pytest.raises(KeyboardInterrupt):
        fill_cache(tmp_path, {text_key(t, "encoder"): t for t in texts}, lambda: encode, batch_size=2)
    assert len(Cache(tmp_path)) == 4
    with pytest.raises(UserError, match="gave moments that are not finite for 'bad'"):
        fill_cache(tmp_path, {"key": "bad"}, lambda: lambda items: [{"moments": torch.tensor([torch.inf])}])
    with pytest.raises(UserError, match="jobs=0"):
        fill_cache(tmp_path, {}, lambda: encode, jobs=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the cache"):
        fill_cache(tmp_path / "file", {}, lambda: encode)


def encode_unless_bad(items):
    if "bad" in items:
        raise UserError("the last one is bad")
    return CountingEncoder().encode(items)


def make_encode_unless_bad():
    return encode_unless_bad


@pytest.mark.slow
def test_processes_encode_the_same_and_their_error_is_that_of_the_call(tmp_path):
    texts = [f"picture {i}" for i in range(9)]
    wanted = {text_key(text, "encoder"): text for text in [*texts, "bad"]}
    with pytest.raises(UserError, match="the last one is bad"):
        fill_cache(tmp_path, wanted, make_encode_unless_bad, jobs=2, batch_size=3)
    assert len(Cache(tmp_path)) == 9
    assert_right(tmp_path, texts, CountingEncoder())


def test_who_waits_for_another_says_so(tmp_path):
    lock = FileLock(tmp_path / "lock")
    lock.acquire()
    assert fill(tmp_path, ["a"], CountingEncoder(), waiting=lock.release).encoded == 1
    assert not lock.is_locked


def program(*arguments):
    path = Path(__file__).parent / "cache_rounds.py"
    result = subprocess.run(
        [sys.executable, str(path), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_kill_loses_at_most_one_shard(tmp_path):
    *rounds, end = program("kills", tmp_path, 120)
    assert all(r["killed"] for r in rounds)
    assert any(r["leftover"] for r in rounds)  # a half-written shard was met, and cost nothing more
    assert sum(r["encoded"] for r in rounds) > 40
    for r in rounds:
        lost = r["encoded"] - (r["has"] - r["had"])
        assert 0 <= lost <= SHARD_ENTRIES + 1, r  # and the one that was being encoded
    assert end == {
        "point": "end",
        "had": rounds[-1]["has"],
        "encoded": 120 - rounds[-1]["has"],
        "whole": True,
        "leftover": 0,
    }


def test_two_processes_fill_one_cache_without_doing_anything_twice(tmp_path):
    (outcome,) = program("race", tmp_path, 40)
    assert outcome == {"codes": [0, 0], "encoded": 40, "whole": True}


@pytest.mark.slow
def test_processes_that_encode_end_with_a_killed_parent(tmp_path):
    (outcome,) = program("orphans", tmp_path, 40)
    assert outcome == {"workers": 2, "left": 0}


@pytest.fixture
def latents(tmp_path):
    """Eight rows and their mirror images: 2 channels of 3 x 3; and their moments."""
    encoder = CountingEncoder()
    plain, flipped = [f"p{i}" for i in range(8)], [f"f{i}" for i in range(8)]
    fill(tmp_path, plain + flipped, encoder)
    moments = torch.stack([moments_of(t, encoder.shape) for t in plain + flipped])
    assert len(moments.flatten(1).unique(dim=0)) == 16
    statistics = measure_latents([moments[:8]], 2)
    keys = [text_key(t, "encoder") for t in plain + flipped]
    rows = CachedLatents(Cache(tmp_path), (2, 3, 3), keys[:8], statistics, keys[8:], torch.arange(8), seed=5)
    return rows, moments


def test_rows_without_a_draw_are_the_means(latents):
    rows, moments = latents
    assert (rows.shape, len(rows)) == ((2, 3, 3), 8)
    indices = torch.tensor([3, 0, 3])
    assert torch.equal(rows.read(indices), rows.statistics.normalise(moments[indices, :2]))
    moved = rows.to("meta")
    assert moved.read(indices).device.type == moved.class_labels.device.type == "meta"


def test_rows_are_drawn_by_address(latents):
    rows, moments = latents
    every = torch.arange(8)
    drawn = rows.read(every, draw=4)
    order = torch.tensor([6, 1, 1])
    assert torch.equal(rows.read(order, draw=4), drawn[order])  # no batch mate, place or order counts
    assert not torch.equal(rows.read(every, draw=5), drawn)
    # Over many draws: the normalised latents of a row have the moments' mean and variance, either way round.
    many = torch.stack([rows.read(every, draw=step) for step in range(700)]).double()
    both = rows.statistics.normalise(moments[:, :2]).unflatten(0, (2, 8)).double()
    variance = (moments[:, 2:].exp() / torch.tensor(rows.statistics.std)[:, None, None] ** 2).unflatten(0, (2, 8))
    total = variance.mean(0) + both.var(0, correction=0)
    error = (total / 700).sqrt()
    assert ((many.mean(0) - both.mean(0)).abs() < 5 * error).all()
    assert (many.var(0) / total - 1).abs().max() < 0.3
    # Without mirror images, every draw is around the row's own mean.
    alone = CachedLatents(rows.cache, rows.shape, rows.keys, rows.statistics, seed=5)
    many = torch.stack([alone.read(every, draw=step) for step in range(300)]).double()
    assert ((many.mean(0) - both[0]).abs() < 5 * (variance[0] / 300).sqrt()).all()


def test_latents_of_an_encoder_without_variance_are_read_as_they_are(tmp_path):
    encoder = CountingEncoder()
    fill(tmp_path, ["a", "b"], encoder)
    rows = CachedLatents(
        Cache(tmp_path), (4, 3, 3), [text_key(t, "encoder") for t in "ab"], LatentStatistics((0.0,) * 4, (1.0,) * 4)
    )
    truth = torch.stack([moments_of(t, encoder.shape) for t in "ab"])
    assert torch.equal(rows.read(torch.tensor([0, 1]), draw=3), truth)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), pooled=st.booleans(), seed=st.integers(0, 2**31))
def test_text_features_round_trip(tmp_path_factory, lengths, pooled, seed):
    generator = torch.Generator().manual_seed(seed)
    encoded = [
        Condition(
            text_embeds=torch.randn(1, length, 3, generator=generator),
            text_mask=torch.rand(1, length, generator=generator) < 0.7,
            pooled_embeds=torch.randn(1, 2, generator=generator) if pooled else None,
        )
        for length in lengths
    ]
    folder = tmp_path_factory.mktemp("cache")
    wanted = {text_key(f"caption {i}", "e"): i for i in range(len(lengths))}
    fill_cache(folder, wanted, lambda: lambda items: [condition_entries(encoded[i])[0] for i in items])
    joined = CachedText(Cache(folder), "e").read([f"caption {i}" for i in range(len(lengths))])
    assert joined.text_embeds.shape == (len(lengths), max(lengths), 3)
    for i, (length, one) in enumerate(zip(lengths, encoded, strict=True)):
        assert torch.equal(joined.text_embeds[i, :length], one.text_embeds[0])
        assert torch.equal(joined.text_mask[i, :length], one.text_mask[0])
        assert not joined.text_mask[i, length:].any()
        assert not joined.text_embeds[i, length:].any()
        assert (joined.pooled_embeds is not None) == pooled
        assert not pooled or torch.equal(joined.pooled_embeds[i], one.pooled_embeds[0])
    again = joined_condition(condition_entries(joined))
    assert torch.equal(again.text_embeds, joined.text_embeds)
    with pytest.raises(UserError, match="has no entry"):
        CachedText(Cache(folder), "e").read(["a caption that nobody encoded"])
