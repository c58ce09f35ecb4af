"""Pixels as tokens: exact on their own levels, and as far from other values as arithmetic says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.autoencoders.pixel_levels import PixelLevels, PixelLevelsTokenizer
from smalti.autoencoders.registry import autoencoder_of, load_autoencoder, load_tokenizer
from smalti.errors import UserError


@settings(max_examples=50, deadline=None)
@given(channels=st.sampled_from([1, 3]), data=st.data(), seed=st.integers(0, 2**31))
def test_levels_come_back_exactly(channels, data, seed):
    levels = data.draw(st.integers(2, 256 if channels == 1 else 40))
    tokenizer = load_tokenizer(PixelLevels(levels, channels))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(levels**channels, (2, 3, 5), generator=generator)
    pictures = tokenizer.decode(tokens)
    assert (pictures.shape, pictures.dtype) == ((2, channels, 3, 5), torch.float32)
    assert torch.equal(tokenizer.encode(pictures), tokens)
    assert torch.equal(tokenizer.decode(tokenizer.encode(pictures)), pictures)
    # Any picture: no value is further off than half a step, and none of the other levels is nearer.
    pictures = torch.rand(2, channels, 3, 5, generator=generator) * 2 - 1
    error = (tokenizer.decode(tokenizer.encode(pictures)) - pictures).abs()
    all_levels = torch.linspace(-1, 1, levels)
    assert torch.allclose(error, (pictures[..., None] - all_levels).abs().amin(-1), atol=1e-6)
    assert error.max() <= 1 / (levels - 1) + 1e-6


def test_the_ends_are_black_and_white_and_colours_are_digits():
    tokenizer = PixelLevelsTokenizer(PixelLevels(4, 3))
    assert tokenizer.codebook_size == 64
    red_green_blue = torch.tensor([[1.0, -1.0, -1 / 3]]).view(1, 3, 1, 1)
    assert tokenizer.encode(red_green_blue).item() == 3 * 16 + 0 * 4 + 1
    assert torch.equal(tokenizer.decode(torch.tensor([[[0, 63]]])), torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2))
    grey = PixelLevelsTokenizer(PixelLevels())
    assert grey.encode(torch.tensor([-7.0, 7.0]).view(1, 1, 1, 2)).tolist() == [[[0, 15]]]


@pytest.mark.parametrize("levels", [2, 16, 64])
def test_the_psnr_is_the_closed_form(levels):
    tokenizer = PixelLevelsTokenizer(PixelLevels(levels))
    even = ((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 500_000 - 1).view(1, 1, 1000, 1000)
    error = (tokenizer.decode(tokenizer.encode(even)) - even).square().mean()
    assert 10 * math.log10(4 / error) == pytest.approx(PixelLevels(levels).psnr, abs=1e-3)


def test_fingerprints_tell_tokenizers_apart():
    configs = [PixelLevels(), PixelLevels(8), PixelLevels(8, 3)]
    assert len({PixelLevelsTokenizer(config).fingerprint for config in configs}) == 3


def test_mistakes_are_said():
    with pytest.raises(UserError, match=r"autoencoder\.channels=2 must be 1 \(grey\) or 3"):
        PixelLevels(channels=2)
    for levels, channels in ((1, 1), (257, 1), (41, 3)):
        with pytest.raises(UserError, match=rf"autoencoder\.levels={levels} must lie in 2 \.\. "):
            PixelLevels(levels, channels)
    tokenizer = PixelLevelsTokenizer(PixelLevels())
    with pytest.raises(UserError, match=r"tokens of 0 \.\. 16: this tokenizer decodes 0 \.\. 15"):
        tokenizer.decode(torch.tensor([[[0, 16]]]))
    with pytest.raises(UserError, match="pictures of 3 channels"):
        tokenizer.encode(torch.zeros(1, 3, 2, 2))
    assert autoencoder_of("pixel_levels") == PixelLevels()
    with pytest.raises(UserError, match="autoencoder=pixel_levels makes tokens, not latents"):
        load_autoencoder(PixelLevels())
