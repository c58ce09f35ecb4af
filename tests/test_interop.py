"""Files of networks: what is read, what is refused, and what comes back bit for bit."""

import argparse
import dataclasses
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import smalti
from smalti.errors import UserError
from smalti.interop.convert import convert
from smalti.interop.files import read_folder, write_folder
from smalti.interop.formats import format_of_class
from smalti.interop.layout import Layout, joined, swapped_halves
from smalti.interop.load import check_precision, read_weights, write_network
from smalti.models import DiTConfig, build_model, network_of
from smalti.types import Condition

TINY = DiTConfig(
    image_size=(8, 8), in_channels=4, patch_size=2, width=64, depth=2, num_heads=1, num_classes=10, learn_sigma=True
)
AS_DIFFUSERS = dataclasses.replace(TINY, frequency_shift=1.0, mlp_norm_eps=1e-5)


def randomised(config, seed=0):
    model = build_model(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def position_table(width, side):
    """As facebookresearch/DiT makes it, in NumPy: columns first, sines before cosines."""

    def one_axis(positions):
        omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
        angles = np.einsum("m,d->md", positions.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32), indexing="ij")
    return torch.from_numpy(np.concatenate([one_axis(columns), one_axis(rows)], axis=1)).float()[None]


def original_dit(width=64, depth=2, side=4, channels=4, classes=10):
    """A state dict as the published DiT files have it, from the documented names and shapes."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "x_embedder.proj": (width, channels, 2, 2),
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (8 * channels, width), "final_layer.adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }  # fmt: skip
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}
    tensors["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, generator=generator)
    return {**tensors, "pos_embed": position_table(width, side)}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


# What comes back bit for bit


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_to_smalti_to_original(tmp_path, prefix):
    tensors = {prefix + name: tensor for name, tensor in original_dit().items()}
    save_file(tensors, tmp_path / "dit.safetensors")
    convert(tmp_path / "dit.safetensors", tmp_path / "ours", "smalti")
    model = smalti.load_backbone(tmp_path / "ours")
    assert model.config == TINY
    convert(tmp_path / "ours", tmp_path / "back.safetensors", "original", prefix=prefix)
    assert same(load_file(tmp_path / "back.safetensors"), tensors)
    convert(tmp_path / "dit.safetensors", tmp_path / "direct.safetensors", "original")
    assert same(load_file(tmp_path / "direct.safetensors"), tensors)


def test_a_learned_table_of_positions_is_kept(tmp_path):
    tensors = original_dit()
    tensors["pos_embed"] = tensors["pos_embed"] + 0.25
    save_file(tensors, tmp_path / "dit.safetensors")
    weights = read_weights(tmp_path / "dit.safetensors")
    assert weights.config.positions == "learned"
    convert(tmp_path / "dit.safetensors", tmp_path / "back.safetensors", "original")
    assert same(load_file(tmp_path / "back.safetensors"), tensors)


def test_the_original_network_computes_the_papers_formulas(tmp_path):
    """An independent forward from the original's tensors, as networks.md states it, against ours."""
    from torch.nn import functional as F

    w = {name: tensor * 0.1 for name, tensor in original_dit().items()}
    w["pos_embed"] = position_table(64, 4)
    save_file(w, tmp_path / "dit.safetensors")
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 10])

    def linear(name, z):
        return F.linear(z, w[f"{name}.weight"], w[f"{name}.bias"])

    frequencies = torch.exp(-np.log(10000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][labels])
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    h = h + w["pos_embed"]
    for i in range(2):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(6, 2)
        q, k, v = linear(f"blocks.{i}.attn.qkv", F.layer_norm(h, (64,), eps=1e-6) * (1 + scale1) + shift1).chunk(3, 2)
        attended = torch.softmax(q @ k.transpose(1, 2) / 8, dim=-1) @ v  # one head of 64
        h = h + gate1 * linear(f"blocks.{i}.attn.proj", attended)
        z = linear(f"blocks.{i}.mlp.fc1", F.layer_norm(h, (64,), eps=1e-6) * (1 + scale2) + shift2)
        h = h + gate2 * linear(f"blocks.{i}.mlp.fc2", F.gelu(z, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, 2)
    out = linear("final_layer.linear", F.layer_norm(h, (64,), eps=1e-6) * (1 + scale) + shift)
    expected = torch.einsum("nhwpqc->nchpwq", out.view(2, 4, 4, 2, 2, 8)).reshape(2, 8, 8, 8)
    output = smalti.load_backbone(tmp_path / "dit.safetensors")(x, t, Condition(class_labels=labels))
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("max_shard_bytes", [2**30, 40_000])
def test_smalti_to_diffusers_to_smalti(tmp_path, max_shard_bytes):
    model = randomised(AS_DIFFUSERS)
    write_network(tmp_path / "ours", AS_DIFFUSERS, model.state_dict())
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    tensors = read_folder(tmp_path / "theirs")
    write_folder(tmp_path / "theirs", tensors, max_shard_bytes)
    if max_shard_bytes < 2**30:
        (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors").unlink()
        assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    back = smalti.load_backbone(tmp_path / "theirs")
    assert back.config == AS_DIFFUSERS
    assert same(back.state_dict(), model.state_dict())


def test_half_precision_weights_keep_their_bytes(tmp_path):
    tensors = {name: t.to(torch.bfloat16) for name, t in original_dit().items()}
    save_file(tensors, tmp_path / "dit.safetensors")
    assert read_weights(tmp_path / "dit.safetensors").config.positions == "learned"
    convert(tmp_path / "dit.safetensors", tmp_path / "back.safetensors", "original")
    assert same(load_file(tmp_path / "back.safetensors"), tensors)
    model = smalti.load_backbone(tmp_path / "dit.safetensors", dtype=torch.float32)
    assert next(model.parameters()).dtype == torch.float32


def test_pickled_files_are_read_for_their_tensors(tmp_path):
    tensors = original_dit()
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save({"ema": tensors, "model": {}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "with_arguments.pt")
    for name in ("plain.pt", "with_arguments.pt"):
        assert same(read_weights(tmp_path / name).tensors, read_weights(tmp_path / "plain.pt").tensors)
        assert smalti.load_backbone(tmp_path / name).config == TINY


def test_a_hub_repository_from_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    write_network(tmp_path / "ours", AS_DIFFUSERS, randomised(AS_DIFFUSERS).state_dict())
    snapshot = tmp_path / "cache" / "models--someone--digits" / "snapshots" / "0123"
    convert(tmp_path / "ours", snapshot / "transformer", "diffusers")
    (snapshot / "model_index.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert smalti.load_backbone("hf://someone/digits").config == AS_DIFFUSERS
    assert smalti.load_backbone("hf://someone/digits/transformer").config == AS_DIFFUSERS
    with pytest.raises(UserError, match="cannot fetch hf://someone/other"):
        smalti.load_backbone("hf://someone/other")


# Layouts


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), columns=st.integers(1, 3))
def test_joined_tensors_come_apart_again(sizes, columns):
    parts = {f"p{i}": torch.randn(size, columns) for i, size in enumerate(sizes)}
    layout = Layout((joined("whole", list(parts), sizes),))
    assert same(layout.to_theirs(layout.to_ours(parts)), parts)


def test_swapped_halves_swap():
    layout = Layout((swapped_halves("ours", "theirs"),))
    assert layout.to_ours({"theirs": torch.arange(4)})["ours"].tolist() == [2, 3, 0, 1]


def test_a_layout_that_names_a_tensor_twice_is_a_bug():
    with pytest.raises(AssertionError, match="named twice"):
        Layout((swapped_halves("ours", "a"), swapped_halves("ours", "b")))


# Bad input


@pytest.fixture
def folder(tmp_path):
    write_network(tmp_path / "ours", AS_DIFFUSERS, randomised(AS_DIFFUSERS).state_dict())
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    return tmp_path / "theirs"


def weights_file(folder):
    return folder / "diffusion_pytorch_model.safetensors"


def test_truncated_file(folder):
    data = weights_file(folder).read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        weights_file(folder).write_bytes(data[:length])
        with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
            smalti.load_backbone(folder)


@pytest.mark.parametrize("where", [0, 12, 200, -5000, -1])
def test_flipped_bit(folder, where):
    data = bytearray(weights_file(folder).read_bytes())
    data[where] ^= 0x10
    weights_file(folder).write_bytes(data)
    with pytest.raises(UserError):
        smalti.load_backbone(folder)


def test_values_that_are_not_finite(folder):
    tensors = load_file(weights_file(folder))
    tensors["proj_out_2.bias"][3] = float("nan")
    save_file(tensors, weights_file(folder))
    with pytest.raises(UserError, match=r"proj_out_2\.bias holds values that are not finite"):
        smalti.load_backbone(folder)


def test_missing_surplus_and_misshapen_are_all_listed(folder):
    tensors = load_file(weights_file(folder))
    del tensors["proj_out_2.bias"]
    tensors["extra"] = torch.zeros(1)
    tensors["proj_out_1.bias"] = torch.zeros(3)
    save_file(tensors, weights_file(folder))
    with pytest.raises(UserError) as error:
        smalti.load_backbone(folder)
    for words in (
        "1 missing: proj_out_2.bias", "1 surplus: extra", "wrongly shaped: proj_out_1.bias (3,) instead of (128,)"
    ):  # fmt: skip
        assert words in str(error.value)


def test_copies_that_differ(folder):
    tensors = load_file(weights_file(folder))
    tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(tensors, weights_file(folder))
    with pytest.raises(UserError, match="must be copies"):
        smalti.load_backbone(folder)


def test_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        smalti.load_backbone(folder)


def test_missing_shard(folder):
    tensors = read_folder(folder)
    weights_file(folder).unlink()
    write_folder(folder, tensors, 40_000)
    next(folder.glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match=r"00002-of-.*missing"):
        smalti.load_backbone(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "DiTTransformer2Dmodel"}, "did you mean 'DiTTransformer2DModel'"),
        ({"norm_type": "layer_norm"}, "norm_type='layer_norm' of DiTTransformer2DModel is not supported"),
        ({"new_field": 3}, "new_field=3 of DiTTransformer2DModel is not known"),
        ({"out_channels": 5}, "out_channels=5"),
    ],
)
def test_configs_that_we_do_not_have(folder, change, says):
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, **change}))
    with pytest.raises(UserError, match=says):
        smalti.load_backbone(folder)


def test_an_unknown_module_names_what_is_known():
    with pytest.raises(UserError, match="DiTTransformer2DModel"):
        smalti.load_backbone(torch.nn.Linear(2, 2))


class Canary:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"model": original_dit(), "args": Canary(canary)}, tmp_path / "zip.pt")
    torch.save({"a": Canary(canary)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Canary(canary)))
    for name in ("zip.pt", "legacy.pt", "bare.pt"):
        with pytest.raises(UserError, match=name):
            smalti.load_backbone(tmp_path / name)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))  # the canary does sing
    assert canary.exists()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_pickle_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("pickles")
    torch.save({"ema": {"a": torch.ones(3)}, "args": argparse.Namespace(lr=1)}, folder / "x.pt")
    with zipfile.ZipFile(folder / "x.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    body = bytearray(entries[name])
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with zipfile.ZipFile(folder / "y.pt", "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, bytes(body) if entry == name else content)
    with pytest.raises(UserError):  # at the latest since it is no DiT
        smalti.load_backbone(folder / "y.pt")


def test_a_file_of_no_known_format(tmp_path):
    save_file({"a.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no known original format"):
        smalti.load_backbone(tmp_path / "x.safetensors")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        smalti.load_backbone(tmp_path / "x.zip")


def test_precision_that_the_device_does_not_have(folder):
    with pytest.raises(UserError, match=r"float8.*use float32"):
        smalti.load_backbone(folder, dtype=torch.float8_e4m3fn)
    check_precision("cpu", torch.float32)


def test_targets_that_cannot_express_the_network(tmp_path, folder):
    convert(folder, tmp_path / "again", "diffusers")
    with pytest.raises(UserError, match="exists: pass --overwrite"):
        convert(folder, tmp_path / "again", "diffusers")
    config = dataclasses.replace(TINY, qk_norm=True, positions="sincos+rope")
    write_network(tmp_path / "ours2", config, network_of(config).state_dict())
    with pytest.raises(UserError, match=r"cannot express model\.positions.*model\.qk_norm"):
        convert(tmp_path / "ours2", tmp_path / "x", "diffusers")
    with pytest.raises(UserError, match=r"\.safetensors"):
        convert(folder, tmp_path / "x", "original")
    with pytest.raises(UserError, match="unknown original format"):
        convert(folder, tmp_path / "x.safetensors", "original", original="DIT")
    assert not (tmp_path / "x").exists()


def test_the_form_of_a_class():
    assert format_of_class("DiTTransformer2DModel").config_type is DiTConfig
