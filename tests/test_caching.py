"""Pictures on the disk to rows of latents: encoded once, the mirror image on its own, changes noticed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.autoencoders.caching import open_latents
from smalti.autoencoders.registry import Pixels, SmallKLAutoencoder, load_autoencoder
from smalti.autoencoders.small_kl import SmallKLConfig, new_small_kl, save_small_kl
from smalti.data.latents import LatentStatistics
from smalti.data.rows import to_signed_unit
from smalti.data.sources import FolderData
from smalti.errors import UserError

SIZE = (16, 24)


def write_picture(path, number):
    pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return to_signed_unit(torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures in class folders, as a source and as tensors by name; a small autoencoder; a cache's folder."""
    tensors = {}
    for number in range(10):
        path = tmp_path / "pictures" / ("even", "odd")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors[path] = write_picture(path, number)
    save_small_kl(new_small_kl(SmallKLConfig(width=8)), tmp_path / "autoencoder")
    data = FolderData(str(tmp_path / "pictures"), held_out=0.3)
    return data, SmallKLAutoencoder(str(tmp_path / "autoencoder")), tmp_path / "cache", tensors


def test_rows_are_the_normalised_latents_of_the_pictures(pictures):
    data, config, cache, tensors = pictures
    seen = []
    opened = open_latents(cache, data, config, SIZE, encoding=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 10) for i in range(1, 11)]
    assert (opened.report.encoded, opened.skipped, opened.class_names) == (10, (), ("even", "odd"))
    assert (len(opened.training) + len(opened.held_out), opened.training.shape) == (10, (4, 4, 6))
    assert len(opened.held_out) > 0
    autoencoder = load_autoencoder(config)
    truth = {autoencoder.encode_moments(p[None])[0, :4]: path for path, p in tensors.items()}
    for part in (opened.training, opened.held_out):
        latents = opened.statistics.denormalise(part.read(torch.arange(len(part))))
        for i, row in enumerate(latents):
            (path,) = [path for expected, path in truth.items() if torch.allclose(row, expected, atol=1e-5)]
            assert part.class_labels[i] == (path.parent.name == "odd")
            assert part.captions[i] == (path.parent.name,)
    normal = opened.training.read(torch.arange(len(opened.training)))
    # Over the training rows: mean 0, and the variance that the noise of the moments leaves.
    assert normal.mean((0, 2, 3)).abs().max() < 1e-5
    drawn = torch.cat([opened.training.read(torch.arange(len(opened.training)), draw=i) for i in range(200)])
    assert (drawn.var((0, 2, 3)) - 1).abs().max() < 0.02


def test_the_mirror_image_is_encoded_and_not_the_latent_mirrored(pictures):
    data, config, cache, tensors = pictures
    opened = open_latents(cache, data, config, SIZE, flips=True)
    assert opened.report.encoded == 20
    autoencoder, training = load_autoencoder(config), opened.training
    key = training.keys[0]
    plain, flipped = training.cache.read(key)["moments"], training.cache.read(training.flipped_keys[0])["moments"]
    (picture,) = [
        p for p in tensors.values() if torch.allclose(autoencoder.encode_moments(p[None])[0], plain, atol=1e-5)
    ]
    assert torch.allclose(autoencoder.encode_moments(picture.flip(-1)[None])[0], flipped, atol=1e-5)
    assert (flipped - plain.flip(-1)).abs().max() > 0.01
    report = open_latents(cache, data, config, SIZE).report  # without flips: the plain ones are there
    assert (report.encoded, report.reused) == (0, 10)


def test_only_what_changed_is_encoded_again(pictures):
    data, config, cache, _ = pictures
    assert open_latents(cache, data, config, SIZE).report.encoded == 10
    assert open_latents(cache, data, config, SIZE).report.encoded == 0
    path = Path(data.path) / "odd" / "3.png"
    write_picture(path, 99)
    assert open_latents(cache, data, config, SIZE).report.encoded == 1
    path.rename(path.with_name("elsewhere.png"))  # a name is not content
    assert open_latents(cache, data, config, SIZE).report.encoded == 0
    assert open_latents(cache, data, config, (16, 16)).report.encoded == 10  # another crop
    save_small_kl(new_small_kl(SmallKLConfig(width=8), seed=1), Path(config.path))
    assert open_latents(cache, data, config, SIZE).report.encoded == 10  # another encoder


def test_a_corrupt_picture_is_skipped_named_and_not_tried_again(pictures):
    data, config, cache, _ = pictures
    (Path(data.path) / "odd" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    (Path(data.path) / "odd" / "dot.png").write_bytes(b"")
    opened = open_latents(cache, data, config, SIZE, flips=True)
    assert [name for name, _ in opened.skipped] == ["odd/broken.png", "odd/dot.png"]
    assert dict(opened.skipped)["odd/dot.png"] == "an empty file"
    assert len(opened.training) + len(opened.held_out) == 10
    again = open_latents(cache, data, config, SIZE, flips=True)
    assert (again.report.encoded, again.skipped) == (0, opened.skipped)
    for path in Path(data.path).glob("*/?.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"none of 2 pictures can be read; odd/broken\.png"):
        open_latents(cache, data, config, SIZE)


def test_statistics_of_an_earlier_call_are_kept(pictures):
    data, config, cache, _ = pictures
    statistics = LatentStatistics((0.0,) * 4, (2.0,) * 4)
    opened = open_latents(cache, data, config, SIZE, statistics=statistics)
    assert opened.training.statistics == opened.held_out.statistics == opened.statistics == statistics


@pytest.mark.slow
def test_several_processes_encode_the_same(pictures, tmp_path):
    data, config, cache, _ = pictures
    one = open_latents(cache, data, config, SIZE)
    two = open_latents(tmp_path / "other", data, config, SIZE, jobs=2, batch_size=3)
    assert two.report.encoded == 10
    indices = torch.arange(len(one.training))
    assert torch.allclose(one.training.read(indices), two.training.read(indices), atol=1e-4)


def test_what_does_not_fit_is_said_before_anything_is_encoded(pictures):
    data, config, cache, _ = pictures
    for changed, words in {
        (data, config, (16, 18)): "factor of 4 must divide both",
        (data, Pixels(), SIZE): "autoencoder=pixels makes no latents",
        (FolderData(data.path + "x"), config, SIZE): "is no folder",
    }.items():
        with pytest.raises(UserError, match=words):
            open_latents(cache, *changed)
    assert not cache.exists()
