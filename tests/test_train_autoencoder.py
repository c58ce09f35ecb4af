"""A small autoencoder trained on the digits for a few seconds: it reconstructs, and reads back bit for bit."""

import json
from functools import partial

import pytest
import torch
from PIL import Image

from smalti.autoencoders.registry import SmallKLAutoencoder, load_autoencoder
from smalti.autoencoders.small_kl import SmallKLConfig
from smalti.config import Budget, from_json
from smalti.data.digits import load_digits
from smalti.data.latents import measure_latents, sample_moments
from smalti.data.rows import PicturesInMemory
from smalti.errors import UserError
from smalti.optim.optimizers import AdamWConfig
from smalti.training.autoencoder import AutoencoderTraining, kl_divergence, reconstruct, train_autoencoder
from smalti.training.display import PlainDisplay
from smalti.training.reconstruction import psnr, reconstruction_loss


def small_training(steps, **changes):
    return AutoencoderTraining(
        model=SmallKLConfig(1, width=16),
        budget=Budget("steps", steps),
        optimizer=AdamWConfig(learning_rate=8e-3, beta2=0.99),
        **changes,
    )


@pytest.fixture(scope="module")
def digits():
    training, held_out = load_digits()
    return PicturesInMemory(training.images[:500]), PicturesInMemory(held_out.images[:100])


def quiet(config, digits, out, **options):
    return train_autoencoder(config, *digits, out, display=PlainDisplay(1e9), **options)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("autoencoder") / "out"
    return quiet(small_training(150), digits, out), out


def test_a_few_seconds_reconstruct_digits(trained, digits):
    result, out = trained
    assert (result.outcome, result.steps) == ("finished", 150)
    assert result.psnr_before < 10
    # The mean picture has 11.5 dB; digits averaged to half their size, which are as many numbers as the latents, 18.6.
    assert result.psnr_after > 20
    record = json.loads((out / "training.json").read_text())
    assert record["psnr_after"] == pytest.approx(result.psnr_after, abs=1e-3)
    assert from_json(AutoencoderTraining, record["config"]) == small_training(150)
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.size == (2 * (16 * 30 + 2), 2 * (2 * 30 + 2))


def test_psnr_is_that_of_the_reconstructions(trained, digits):
    result, _ = trained
    pictures = digits[1].read(torch.arange(100))
    error = (reconstruct(result.model, pictures) - pictures).double().square().mean()
    assert psnr(partial(reconstruct, result.model), digits[1]) == pytest.approx(
        float(10 * torch.log10(4 / error)), abs=1e-4
    )
    # Of the file on the disk: the averaged weights, bit for bit.
    assert result.psnr_after == pytest.approx(psnr(partial(reconstruct, result.model), digits[1]))


def test_what_is_loaded_is_what_was_trained(trained, digits):
    result, out = trained
    loaded = load_autoencoder(SmallKLAutoencoder(str(out)))
    assert loaded.fingerprint == result.model.fingerprint
    pictures = digits[1].read(torch.arange(5))
    moments = loaded.encode_moments(pictures)
    assert torch.equal(moments, result.model.encode_moments(pictures))
    assert torch.equal(loaded.decode(moments[:, :4]), result.model.decode(moments[:, :4]))
    # What a diffusion model is trained on: latents drawn from the moments decode nearly as well as their means.
    statistics = measure_latents([loaded.encode_moments(digits[0].read(torch.arange(200)))], 4)
    drawn = sample_moments(moments, torch.randn(5, 4, 7, 7, generator=torch.Generator().manual_seed(0)))
    back = loaded.decode(statistics.denormalise(statistics.normalise(drawn)))
    assert 10 * torch.log10(4 / (back - pictures).square().mean()) > 17


def test_training_is_a_function_of_its_config(digits, tmp_path):
    a, b = (quiet(small_training(3), digits, tmp_path / name) for name in "ab")
    assert a.model.fingerprint == b.model.fingerprint
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    c = quiet(small_training(3, seed=1), digits, tmp_path / "c")
    assert c.model.fingerprint != a.model.fingerprint


def test_ctrl_c_keeps_what_is_there(digits, tmp_path):
    class Impatient(PlainDisplay):
        def update(self, step, *rest):
            if step == 2:
                raise KeyboardInterrupt

    result = train_autoencoder(small_training(50), *digits, tmp_path / "out", display=Impatient(1e9))
    assert (result.outcome, result.steps) == ("interrupted", 2)
    assert load_autoencoder(SmallKLAutoencoder(str(tmp_path / "out"))).fingerprint == result.model.fingerprint


def test_the_terms_of_the_loss_are_what_they_say():
    pictures, ramp = torch.zeros(1, 1, 4, 4), torch.arange(4.0).expand(1, 1, 4, 4)  # each step to the right is 1
    config = AutoencoderTraining(l1_weight=1.0, l2_weight=10.0, gradient_weight=100.0)
    assert reconstruction_loss(config, ramp, pictures) == 1.5 + 10 * 3.5 + 100 * 1
    assert reconstruction_loss(config, ramp.mT, pictures) == 1.5 + 10 * 3.5 + 100 * 1
    mean, log_variance = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    p = torch.distributions.Normal(mean, (log_variance / 2).exp())
    truth = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).mean()
    assert torch.allclose(kl_divergence(torch.cat([mean, log_variance], 1), 3), truth)


def test_mistakes_are_said_before_training(digits, tmp_path):
    with pytest.raises(UserError, match=r"model\.in_channels=3: the pictures have 1 channels"):
        quiet(AutoencoderTraining(), digits, tmp_path / "out")
    with pytest.raises(UserError, match=r"model\.factor=8 must divide"):
        quiet(AutoencoderTraining(model=SmallKLConfig(1, factor=8)), digits, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match="exists: pass --overwrite"):
        quiet(small_training(1), digits, tmp_path / "full")
    with pytest.raises(UserError, match="holds no autoencoder"):
        quiet(small_training(1), digits, tmp_path / "full", overwrite=True)
    quiet(small_training(1), digits, tmp_path / "out")
    quiet(small_training(1), digits, tmp_path / "out", overwrite=True)
    for name, (value, words) in {
        "batch_size": (0, "must be at least 1"),
        "kl_weight": (-1.0, "must not be negative"),
        "clip_norm": (0.0, "must be above 0"),
    }.items():
        with pytest.raises(UserError, match=words):
            AutoencoderTraining(**{name: value})
    with pytest.raises(UserError, match="factor=3 must be one of"):
        SmallKLConfig(factor=3)
    with pytest.raises(UserError, match="width=20 must be a multiple of 8"):
        SmallKLConfig(width=20)
