"""Quantizers: indices and codes are a bijection, gradients go straight through, codes move to where latents are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.autoencoders.codebook_usage import CodebookUsage, codebook_usage, token_counts
from smalti.autoencoders.quantizers import FSQ, VQ, FiniteScalarQuantizer, VectorQuantizer
from smalti.errors import UserError


@settings(max_examples=40, deadline=None)
@given(levels=st.lists(st.integers(3, 9), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_finite_scalars_and_their_indices_are_a_bijection(levels, seed):
    config = FSQ(tuple(levels))
    quantizer = FiniteScalarQuantizer(config)
    every = torch.arange(config.codebook_size).view(1, 1, -1)
    codes = quantizer.codes_of(every)
    assert torch.equal(quantizer.index_of(codes), every)
    assert len(codes[0, :, 0].T.unique(dim=0)) == config.codebook_size
    assert codes.min() >= -1
    assert codes.max() <= 1
    latents = 3 * torch.randn(2, len(levels), 3, 4, generator=torch.Generator().manual_seed(seed))
    quantized = quantizer(latents)
    assert torch.allclose(quantizer.codes_of(quantized.tokens), quantized.codes, atol=1e-6)
    assert torch.equal(quantizer.tokens_of(latents), quantized.tokens)


def test_finite_scalars_are_the_papers_by_hand():
    # Mentzer et al., section 3.1: an odd number of levels is round(floor(L / 2) tanh(z)), but for the bound's 0.1 %.
    z = torch.linspace(-4, 4, 401).view(1, 1, 1, -1)
    codes = FiniteScalarQuantizer(FSQ((5,)))(z).codes
    assert torch.equal(codes * 2, (2 * 0.999 * z.tanh()).round())
    # An even number has one level more below 0; every level is reached, and 0 stays 0.
    eight = FiniteScalarQuantizer(FSQ((8,)))
    assert (eight(z).codes * 4).unique().tolist() == list(range(-4, 4))
    assert eight(torch.zeros(1, 1, 1, 1)).codes.item() == 0


def test_gradients_go_straight_through():
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for config in (VQ(16, 3), VQ(16, 3, "cosine")):
        quantizer = VectorQuantizer(config)
        latents.grad = None
        if config.distance == "euclidean":
            (quantizer(latents).codes * weights).sum().backward()
            assert torch.equal(latents.grad, weights)
        (gradient,) = torch.autograd.grad(quantizer(latents).loss, latents)
        moved = latents.detach() - 0.1 * gradient / gradient.abs().max()
        assert quantizer(moved).loss < quantizer(latents).loss
    fsq = FiniteScalarQuantizer(FSQ((5, 5, 5)))
    latents.grad = None
    (fsq(latents).codes * weights).sum().backward()
    slope = 0.999 * (1 - latents.detach().tanh() ** 2)  # of the bound, per half width
    assert torch.allclose(latents.grad, weights * slope, atol=1e-5)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_codes_are_the_nearest_and_become_the_means_of_their_clusters(distance):
    generator = torch.Generator().manual_seed(0)
    angles = torch.tensor([0.0, 2.0, 4.0])
    centres = torch.stack([angles.cos(), angles.sin()], 1)
    rows = centres[torch.arange(60) % 3] + 0.01 * torch.randn(60, 2, generator=generator)
    latents = rows.T.view(1, 2, 6, 10)
    quantizer = VectorQuantizer(VQ(3, 2, distance, decay=0.5))
    quantizer.codebook.data = centres + 0.3
    for _ in range(30):
        quantizer.learn(latents)
    means = torch.stack([rows[k::3].mean(0) for k in range(3)])
    if distance == "cosine":
        unit = torch.nn.functional.normalize(rows, dim=1)
        means = torch.nn.functional.normalize(torch.stack([unit[k::3].mean(0) for k in range(3)]), dim=1)
    assert torch.allclose(quantizer.codebook, means, atol=1e-5)
    tokens = quantizer.tokens_of(latents)
    assert torch.equal(tokens.flatten(), torch.arange(60) % 3)
    assert torch.equal(quantizer.tokens_of(quantizer.codes_of(tokens)), tokens)
    assert quantizer.codes_of(tokens).shape == latents.shape


def test_dead_codes_begin_anew_at_latents():
    latents = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 100  # far from all first codes
    u = torch.rand(32, generator=torch.Generator().manual_seed(1))
    never, revived = (VectorQuantizer(VQ(32, 2, restart_below=share)) for share in (0.0, 0.03))
    for quantizer in (never, revived):
        for _ in range(3):
            quantizer.learn(latents, u)
    used = [len(quantizer.tokens_of(latents).unique()) for quantizer in (never, revived)]
    assert used[0] <= 3
    assert used[1] >= 25
    # A code that is used stays what it has learned.
    before = revived.codebook.clone()
    revived.learn(latents, u.flip(0))
    assert (revived.codebook - before).abs().max() < 1


def test_usage_counts_codes_and_their_evenness():
    even = codebook_usage(token_counts(torch.arange(64).repeat(10), 256))
    assert (even.used, even.num_tokens) == (64, 640)
    assert even.perplexity == pytest.approx(64)
    assert even.share == 0.25
    assert not even.collapsed
    assert str(even) == "64 of 256 codes used (25%), perplexity 64.0"
    uneven = codebook_usage(torch.tensor([3, 1, 0, 0]))
    assert uneven.perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert codebook_usage(torch.tensor([1000] + [0] * 255)).collapsed
    assert CodebookUsage(256, 25_000, 12, 9.0).collapsed  # below 5 %
    assert CodebookUsage(256, 25_000, 100, 1.9).collapsed  # nearly all tokens are the same few
    assert not CodebookUsage(8192, 288, 200, 150.0).collapsed  # so few tokens cannot use more


def test_mistakes_are_said():
    for make, words in {
        lambda: VQ(1): r"quantizer\.codebook_size=1 must lie in 2 \.\. 65536",
        lambda: VQ(code_width=0): r"quantizer\.code_width=0",
        lambda: VQ(distance="manhattan"): r"quantizer\.distance='manhattan' must be euclidean or cosine",
        lambda: VQ(decay=1.0): r"quantizer\.decay=1\.0",
        lambda: VQ(commitment=-1.0): r"quantizer\.commitment=-1\.0",
        lambda: VQ(restart_below=1.0): r"quantizer\.restart_below=1\.0",
        lambda: FSQ((8, 2)): r"quantizer\.levels=\(8, 2\) must be numbers of at least 3",
        lambda: FSQ(()): r"quantizer\.levels=\(\)",
        lambda: FSQ((100, 100, 100)): "make 1000000 codes: a codebook has at most 65536",
    }.items():
        with pytest.raises(UserError, match=words):
            make()
