"""smalti train-autoencoder, train-tokenizer and data cache: the real commands."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from smalti.cli import main


@pytest.fixture
def command(capsys):
    """The command's exit code and what it printed."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of twelve coloured squares on grey, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = np.full((24, 32, 3), 128, dtype=np.uint8)
        top, left = generator.integers(0, 12, 2)
        pixels[top : top + 12, left : left + 12] = generator.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_from_a_folder_to_cached_latents(command, pictures, tmp_path):
    out, cache = tmp_path / "autoencoder", tmp_path / "cache"
    code, output = command(
        "train-autoencoder", pictures, "--out", out, "--size", 16, 24, "--steps", 3, "--width", 8, "--threads", 1
    )
    assert code == 0, output
    assert re.search(r"finished after 3 steps in \d+ s", output)
    assert json.loads((out / "training.json").read_text())["seconds"] > 0
    for words in ("PSNR on held-out pictures:", "dB before", "skipped: 1\n  broken.png: no picture format"):
        assert words in output
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.mode == "RGB"
    cached = ("data", "cache", pictures, "--encoder", out, "--size", 16, 24, "--out", cache)
    code, output = command(*cached)
    assert code == 0, output
    assert f"13 encoded, 0 were there -> {cache}" in output  # one of them as what cannot be read
    assert "skipped: 1\n  broken.png: no picture format" in output
    assert "4 x 4 x 6 each" in output
    assert "latent mean: " in output
    code, output = command(*cached)
    assert (code, "0 encoded, 13 were there" in output) == (0, True)


def test_a_tokenizer_of_each_kind(command, pictures, tmp_path):
    small = ("--size", 16, 24, "--steps", 3, "--width", 8, "--threads", 1)
    for options, size in {
        ("--codebook-size", 32, "--distance", "cosine"): 32,
        ("--quantizer", "fsq", "--levels", 5, 3, "--factor", 2): 15,
    }.items():
        out = tmp_path / str(size)
        code, output = command("train-tokenizer", pictures, "--out", out, *small, *options)
        assert code == 0, output
        for words in (
            "finished after 3 steps in ",
            "dB before",
            "skipped: 1\n  broken.png: no picture format",
            f"codebook on held-out pictures: [0-9]+ of {size} codes used",
            f"autoencoder=tokenizer autoencoder.path={out} autoencoder.codebook_size={size}",
        ):
            assert re.search(words, output), words
        record = json.loads((out / "training.json").read_text())
        assert record["config"]["model"]["quantizer"]["kind"] == ("fsq" if size == 15 else "vq")
        assert 1 <= record["perplexity"] <= size
        with Image.open(out / "reconstructions.png") as picture:
            assert picture.mode == "RGB"
        code, output = command("data", "cache", pictures, "--encoder", out, "--size", 16, 24, "--out", tmp_path / "c")
        assert code == 2
        assert "autoencoder=tokenizer makes tokens, not latents" in output


def test_a_collapse_is_told(command, tmp_path):
    for number in range(3):  # flat pictures need few codes of so many
        Image.new("RGB", (128, 128), (40 * number,) * 3).save(tmp_path / f"{number}.png")
    code, output = command(
        "train-tokenizer", tmp_path, "--out", tmp_path / "out", "--size", 128, 128, "--steps", 2, "--width", 8,
        "--batch-size", 1, "--codebook-size", 1024, "--restart-below", 0, "--threads", 1,
    )  # fmt: skip
    assert code == 0
    advice = "try --quantizer fsq, which has no codes that can die, --restart-below 0.03, which revives dead codes, "
    assert re.search(rf"smalti: the codebook has collapsed: \d+ of 1024 codes used \([0-4]%\), .*; {advice}", output), (
        output
    )


def test_mistakes_end_with_one_line_and_code_2(command, pictures, tmp_path):
    for arguments, words in {
        ("train-autoencoder", pictures, "--out", pictures): "exists: pass --overwrite",
        ("train-autoencoder", pictures, "--size", 30, 30, "--out", tmp_path / "a"): "model.factor=4 must divide",
        ("train-tokenizer", pictures, "--levels", 5, 5): "--levels is for --quantizer fsq, and this is vq",
        ("train-tokenizer", pictures, "--codebook-size", 1): "quantizer.codebook_size=1 must lie in 2 ..",
        ("train-tokenizer", pictures, "--size", 30, 30, "--out", tmp_path / "a"): "model.factor=4 must divide",
        ("data", "cache", pictures, "--encoder", tmp_path): "holds no config.json: an autoencoder is one of",
    }.items():
        code, output = command(*arguments)
        assert code == 2
        assert words in output
        assert len(output.strip().splitlines()) == 1, output
