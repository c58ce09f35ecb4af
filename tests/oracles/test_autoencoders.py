"""diffusers' autoencoders behind our protocol: equal to diffusers' own encode and decode, with random weights."""

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file

from smalti.autoencoders.from_diffusers import (
    DCAutoencoder,
    KLAutoencoder,
    TinyAutoencoder,
    VQAutoencoder,
    VQTokens,
)
from smalti.autoencoders.registry import Pixels, autoencoder_of, load_autoencoder, load_tokenizer
from smalti.data.latents import LatentStatistics, sample_moments
from smalti.errors import UserError

TWO_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}


def small_kl():
    return diffusers.AutoencoderKL(**TWO_LEVELS, latent_channels=3)


def small_dc():
    return diffusers.AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), downsample_block_type="Conv",
        upsample_block_type="interpolate",
    )  # fmt: skip


def small_tiny():
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3, latent_channels=5,
    )  # fmt: skip


def small_vq():
    return diffusers.VQModel(**TWO_LEVELS, latent_channels=4, num_vq_embeddings=16, vq_embed_dim=3)


# kind, their network, factor, latent channels, their moments of a picture
CASES = {
    "kl": (KLAutoencoder, small_kl, 2, 3, lambda network, x: network.encode(x).latent_dist.parameters),
    "dc": (DCAutoencoder, small_dc, 2, 8, lambda network, x: network.encode(x).latent),
    "tiny": (TinyAutoencoder, small_tiny, 4, 5, lambda network, x: network.encode(x).latents),
    "vq": (VQAutoencoder, small_vq, 2, 3, lambda network, x: network.encode(x).latents),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder and the network of each case, its weights random and none of them zero."""
    folder, made = tmp_path_factory.mktemp("autoencoders"), {}
    generator = torch.Generator().manual_seed(0)
    for name, (_, build, *_) in CASES.items():
        network = build().eval()
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        network.save_pretrained(folder / name)
        made[name] = (folder / name, network)
    return made


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_encodes_and_decodes_as_diffusers(name, saved):
    config_of, _, factor, channels, moments = CASES[name]
    folder, network = saved[name]
    ours = load_autoencoder(config_of(str(folder), subfolder=None))
    assert ours is not None
    assert (ours.factor, ours.latent_channels, ours.in_channels) == (factor, channels, 3)
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    expected = moments(network, pictures)
    ours_of = ours.encode_moments(pictures)
    assert torch.equal(ours_of, expected)
    assert ours_of.shape == (2, channels * (2 if name == "kl" else 1), 16 // factor, 24 // factor)
    latents = torch.randn(2, channels, 4, 6)
    assert torch.equal(ours.decode(latents), network.decode(latents).sample)
    assert ours.decode(latents).shape == (2, 3, 4 * factor, 6 * factor)
    with pytest.raises(UserError, match="takes heights and widths that"):
        ours.encode_moments(torch.zeros(1, 3, 16, 16 + 1))
    with pytest.raises(UserError, match="takes 3"):
        ours.encode_moments(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("unit_range", [True, False])
@torch.inference_mode()
def test_vq_tokens_are_diffusers_indices(unit_range, tmp_path):
    network = diffusers.VQModel(**TWO_LEVELS, latent_channels=3, num_vq_embeddings=16, lookup_from_codebook=True).eval()
    network.quantize.embedding.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    network.save_pretrained(tmp_path)
    ours = load_tokenizer(VQTokens(str(tmp_path), None, 16, unit_range))
    assert (ours.factor, ours.codebook_size, ours.in_channels) == (2, 16, 3)
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = network.encode((pictures + 1) / 2 if unit_range else pictures).latents
    tokens = ours.encode(pictures)
    assert torch.equal(tokens, network.quantize(latents)[2][2].reshape(2, 8, 12))
    assert len(tokens.unique()) > 1
    expected = network.decode(tokens, force_not_quantize=True, shape=(2, 8, 12, 3)).sample
    assert torch.equal(ours.decode(tokens), 2 * expected - 1 if unit_range else expected)
    with pytest.raises(UserError, match=r"autoencoder\.codebook_size=8192: the tokenizer at .* has 16; set it to that"):
        load_tokenizer(VQTokens(str(tmp_path), None))
    other = load_tokenizer(VQTokens(str(tmp_path), None, 16, not unit_range))
    assert other.fingerprint != ours.fingerprint
    assert autoencoder_of(str(tmp_path)) == VQAutoencoder(str(tmp_path), subfolder=None)  # as latents


@torch.inference_mode()
def test_moments_are_sampled_as_diffusers_does(saved):
    _, network = saved["kl"]
    parameters = 40 * torch.randn(2, 6, 5, 4)  # log-variances beyond both clamps
    eps = torch.randn(2, 3, 5, 4)
    theirs = DiagonalGaussianDistribution(parameters)
    assert torch.equal(sample_moments(parameters, eps), theirs.mean + theirs.std * eps)
    assert torch.equal(sample_moments(parameters, torch.zeros_like(eps)), theirs.mode())
    latents = network.encode(torch.zeros(1, 3, 8, 8)).latent_dist.mode()
    assert torch.equal(sample_moments(latents, torch.randn_like(latents)), latents)
    scaled = (latents - 0.1) * network.config.scaling_factor
    ours = LatentStatistics.of_scaling(3, network.config.scaling_factor, 0.1).normalise(latents)
    assert torch.allclose(ours, scaled, atol=1e-6)


def test_the_fingerprint_is_that_of_the_weights(saved, tmp_path):
    folder, network = saved["kl"]
    config = KLAutoencoder(str(folder))
    first = load_autoencoder(config).fingerprint
    network.save_pretrained(tmp_path / "elsewhere" / "vae")
    moved = autoencoder_of(str(tmp_path / "elsewhere"))
    assert moved == KLAutoencoder(str(tmp_path / "elsewhere"), "vae")
    assert load_autoencoder(moved).fingerprint == first
    path = tmp_path / "elsewhere" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = "encoder.conv_in.weight"
    tensors[name].view(-1)[7] = torch.nextafter(tensors[name].view(-1)[7], torch.tensor(1.0))
    save_file(tensors, path)
    assert load_autoencoder(moved).fingerprint != first


@pytest.mark.parametrize("name", CASES)
def test_a_folder_says_what_it_holds(name, saved):
    config_of, *_ = CASES[name]
    folder, _ = saved[name]
    assert autoencoder_of(str(folder)) == config_of(str(folder), subfolder=None)
    other = DCAutoencoder if name == "kl" else KLAutoencoder
    with pytest.raises(UserError, match=f"autoencoder={other.kind} reads an {other.class_name}"):
        load_autoencoder(other(str(folder)))


def test_what_is_not_there_is_said_in_one_line(saved, tmp_path):
    assert load_autoencoder(Pixels()) is None
    for path, words in {
        "someone/something": "offline, give a folder as diffusers' save_pretrained writes it",
        "nothing": "did you mean 'tiny'",
        str(tmp_path / "no"): "there is no autoencoder at",
        str(tmp_path): "holds no config.json: an autoencoder is one of AutoencoderKL",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            load_autoencoder(autoencoder_of(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="subfolder may be meant: dc, kl, tiny, vq"):
        load_autoencoder(KLAutoencoder(str(saved["kl"][0].parent)))


def test_damaged_weights_are_found(saved, tmp_path):
    _, network = saved["kl"]
    network.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    name = "decoder.conv_in.bias"
    damages = {
        "does not fit its config.json: 1 tensors are missing, such as decoder.conv_in.bias": {
            key: tensor for key, tensor in whole.items() if key != name
        },
        "decoder.conv_in.bias expected shape": whole | {name: whole[name][:-1].clone()},
        "decoder.conv_in.bias holds values that are not finite": whole | {name: whole[name] / 0},
    }
    for words, tensors in damages.items():
        save_file(tensors, path)
        with pytest.raises(UserError, match=words):
            load_autoencoder(KLAutoencoder(str(tmp_path)))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        load_autoencoder(KLAutoencoder(str(tmp_path)))
