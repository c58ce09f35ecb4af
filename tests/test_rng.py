"""Addressed random numbers: the published generator, and independence of everything but the address."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti import rng


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123 for philox4x32, 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    words = rng.philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == expected


@settings(max_examples=50, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5),
    call=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
)
def test_a_row_depends_on_its_own_address_alone(seeds, call, count):
    batch = rng.normal((count,), seed=torch.tensor(seeds), purpose="a", call=call)
    for row, seed in zip(batch, seeds, strict=True):
        assert torch.equal(rng.normal((count,), seed=seed, purpose="a", call=call)[0], row)
        longer = rng.normal((count + 7,), seed=seed, purpose="a", call=call)[0]
        assert torch.equal(longer[:count], row)


def test_each_part_of_the_address_matters():
    base = {"seed": 5, "purpose": "a", "index": 1, "call": 2}
    reference = rng.random_words(8, **base)
    for change in ({"seed": 5 + 2**32}, {"seed": 6}, {"purpose": "b"}, {"index": 2}, {"call": 3}):
        assert not torch.equal(rng.random_words(8, **{**base, **change}), reference), change


def test_normals_are_normal_and_uncorrelated_between_neighbouring_seeds():
    z = rng.normal((500,), seed=torch.arange(400), purpose="x", dtype=torch.float64)
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((z[1:] * z[:-1]).mean()) < 4 / n**0.5
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4 / n**0.5


def test_uniforms_fill_the_open_interval_evenly():
    u = rng.uniform((1000,), seed=torch.arange(100), purpose="x").flatten()
    assert 0 < u.min() < u.max() < 1
    counts = np.histogram(u.numpy(), bins=20, range=(0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi-square, 19 degrees of freedom, p < 0.001


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 3000), seed=st.integers(0, 2**40), call=st.integers(0, 1000))
def test_permutation_holds_each_row_once(length, seed, call):
    order = rng.permutation(length, seed=seed, purpose="o", call=call)
    assert torch.equal(order.sort().values, torch.arange(length))


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    rng.normal((3,), seed=1, purpose="x")
    assert torch.equal(torch.get_rng_state(), before)
