"""Latent statistics without drawing latents, and the small autoencoder's folder."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.autoencoders.registry import SmallKLAutoencoder, autoencoder_of, load_autoencoder
from smalti.autoencoders.small_kl import SmallKLConfig, load_small_kl, new_small_kl, save_small_kl
from smalti.data.latents import LatentStatistics, measure_latents, sample_moments
from smalti.errors import UserError


def gaussian_moments(pictures, mean, spread, log_variance, generator):
    """Moments whose means are N(mean, spread^2) in each channel and whose variances are exp(log_variance)."""
    channels = len(mean)
    means = torch.tensor(mean)[:, None, None] + torch.tensor(spread)[:, None, None] * torch.randn(
        pictures, channels, 16, 16, generator=generator
    )
    variances = torch.tensor(log_variance)[:, None, None].expand_as(means)
    return torch.cat([means, variances], dim=1)


def test_statistics_are_those_of_drawn_latents():
    generator = torch.Generator().manual_seed(0)
    mean, spread, log_variance = (100.0, -2.0), (0.5, 3.0), (np.log(4.0), np.log(0.25))
    moments = gaussian_moments(200, mean, spread, log_variance, generator)
    statistics = measure_latents(moments.split(7), 2)
    # The truth: mean, and spread^2 + variance = 0.25 + 4, 9 + 0.25. 51,200 values: a standard error of 0.3 %.
    assert statistics.mean == pytest.approx(mean, abs=0.05)
    assert statistics.std == pytest.approx((4.25**0.5, 9.25**0.5), rel=0.02)
    drawn = sample_moments(moments, torch.randn(200, 2, 16, 16, generator=generator))
    normal = statistics.normalise(drawn)
    assert normal.mean((0, 2, 3)).abs().max() < 0.02
    assert (normal.std((0, 2, 3)) - 1).abs().max() < 0.02
    assert torch.allclose(statistics.denormalise(normal), drawn, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    offset=st.floats(-1e4, 1e4),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_batches_and_mixed_sizes_do_not_matter(sizes, offset, deterministic, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [offset + torch.randn(b, 3 if deterministic else 6, b + 1, 3, generator=generator) for b in sizes]
    if not deterministic:
        for batch in batches:
            batch[:, 3:] = torch.randn(batch[:, 3:].shape, generator=generator)
    statistics = measure_latents(batches, 3)
    values = torch.cat([b[:, :3].double().movedim(1, 0).flatten(1) for b in batches], dim=1)
    variance = values.var(1, correction=0)
    if not deterministic:
        variance += torch.cat([b[:, 3:].double().exp().movedim(1, 0).flatten(1) for b in batches], dim=1).mean(1)
    assert torch.allclose(torch.tensor(statistics.mean).double(), values.mean(1), rtol=1e-6, atol=1e-6)
    assert torch.allclose(torch.tensor(statistics.std).double(), variance.sqrt(), rtol=1e-5)
    assert LatentStatistics.from_json(json.loads(json.dumps(statistics.to_json()))) == statistics


def test_bad_latents_are_refused():
    with pytest.raises(UserError, match="no latents to measure"):
        measure_latents([], 4)
    with pytest.raises(UserError, match="not finite"):
        measure_latents([torch.full((1, 4, 2, 2), torch.nan)], 4)
    with pytest.raises(UserError, match=r"channel 1 has a standard deviation of 0\.0"):
        measure_latents([torch.randn(1, 1, 2, 2).repeat(1, 2, 1, 1) * torch.tensor([1.0, 0.0])[:, None, None]], 2)
    with pytest.raises(UserError, match="moments of 5 channels do not fit latents of 4"):
        measure_latents([torch.zeros(1, 5, 2, 2)], 4)
    with pytest.raises(UserError, match="must be an object"):
        LatentStatistics.from_json({"mean": [1.0]})
    with pytest.raises(UserError, match="latents of 3 channels, statistics of 2"):
        LatentStatistics((0.0, 0.0), (1.0, 1.0)).normalise(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(("factor", "channels"), [(2, 1), (4, 3), (8, 3), (16, 3)])
def test_the_small_autoencoder_takes_any_size_that_divides(factor, channels):
    model = new_small_kl(SmallKLConfig(channels, latent_channels=5, factor=factor, width=8))
    moments = model.encode_moments(torch.zeros(2, channels, 2 * factor, 3 * factor))
    assert moments.shape == (2, 10, 2, 3)
    assert model.decode(moments[:, :5]).shape == (2, channels, 2 * factor, 3 * factor)
    with pytest.raises(UserError, match=f"that {factor} divides"):
        model.encode_moments(torch.zeros(2, channels, 2 * factor + 1, factor))


def test_the_default_has_about_a_million_weights():
    assert 0.9e6 < sum(p.numel() for p in new_small_kl(SmallKLConfig()).parameters()) < 1.1e6


def test_the_folder_gives_the_same_bits_back_and_damage_is_found(tmp_path):
    model = new_small_kl(SmallKLConfig(width=8), seed=3)
    save_small_kl(model, tmp_path / "a")
    config = autoencoder_of(str(tmp_path / "a"))
    assert config == SmallKLAutoencoder(str(tmp_path / "a"))
    back = load_autoencoder(config)
    assert back.fingerprint == model.fingerprint
    assert new_small_kl(SmallKLConfig(width=8), seed=4).fingerprint != model.fingerprint
    pictures = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(back.encode_moments(pictures), model.encode_moments(pictures))
    path = tmp_path / "a" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its checksum"):
        load_small_kl(tmp_path / "a")
    path.write_bytes(content[:500])
    with pytest.raises(UserError, match="is damaged"):
        load_small_kl(tmp_path / "a")
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_small_kl(tmp_path / "a")
