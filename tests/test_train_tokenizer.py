"""A small tokenizer trained on the digits for seconds: it reconstructs, reads back, and a collapse is told."""

import json

import pytest
import torch
from PIL import Image

from smalti.autoencoders.quantizers import FSQ, VQ
from smalti.autoencoders.registry import LearnedTokenizer, autoencoder_of, load_autoencoder, load_tokenizer
from smalti.autoencoders.small_tokenizer import (
    SmallTokenizerConfig,
    load_small_tokenizer,
    new_small_tokenizer,
    save_small_tokenizer,
)
from smalti.config import Budget, from_json
from smalti.data.digits import load_digits
from smalti.data.rows import PicturesInMemory
from smalti.errors import UserError
from smalti.optim.optimizers import AdamWConfig
from smalti.training.display import PlainDisplay
from smalti.training.tokenizer import (
    TokenizerTraining,
    collapse_advice,
    reconstruct,
    train_tokenizer,
    usage_in,
    usage_on,
)


def small_training(steps, quantizer, **changes):
    return TokenizerTraining(
        model=SmallTokenizerConfig(1, width=8, quantizer=quantizer),
        budget=Budget("steps", steps),
        optimizer=AdamWConfig(learning_rate=8e-3, beta2=0.99),
        **changes,
    )


class Listening(PlainDisplay):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(1e9)
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.fixture(scope="module")
def digits():
    training, held_out = load_digits()
    return PicturesInMemory(training.images[:500]), PicturesInMemory(held_out.images[:100])


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Of each quantizer: the result, its folder, what was said."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}
    for name, quantizer in {"vq": VQ(64), "fsq": FSQ((5, 5, 3))}.items():
        display = Listening()
        config = small_training(120, quantizer)
        made[name] = (train_tokenizer(config, *digits, folder / name, display=display), folder / name, display.messages)
    return made


@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_a_few_seconds_reconstruct_digits_with_most_codes_in_use(name, trained, digits):
    result, out, messages = trained[name]
    assert (result.outcome, result.steps) == ("finished", 120)
    assert result.psnr_before < 10
    assert result.psnr_after > 15  # the mean picture has 11.5 dB
    usage = usage_in(result)
    assert usage == usage_on(result.model, digits[1])
    assert usage.num_tokens == 100 * 7 * 7
    assert usage.share > 0.4
    assert not usage.collapsed
    assert not any("collapsed" in message for message in messages)
    record = json.loads((out / "training.json").read_text())
    assert record["psnr_after"] == pytest.approx(result.psnr_after, abs=1e-3)
    assert record["used_codes"] == usage.used
    assert record["perplexity"] == pytest.approx(usage.perplexity, abs=1e-3)
    assert from_json(TokenizerTraining, record["config"]) == small_training(120, result.model.config.quantizer)
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.size == (2 * (16 * 30 + 2), 2 * (2 * 30 + 2))


@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_what_is_loaded_is_what_was_trained(name, trained, digits):
    result, out, _ = trained[name]
    size = result.model.codebook_size
    config = autoencoder_of(str(out))
    assert config == LearnedTokenizer(str(out), size)
    loaded = load_tokenizer(config)
    assert (loaded.in_channels, loaded.factor, loaded.codebook_size) == (1, 4, size)
    assert loaded.fingerprint == result.model.fingerprint
    pictures = digits[1].read(torch.arange(5))
    tokens = loaded.encode(pictures)
    assert (tokens.shape, tokens.dtype) == ((5, 7, 7), torch.int64)
    assert torch.equal(loaded.decode(tokens).clamp(-1, 1), reconstruct(result.model, pictures))
    assert loaded.decode(tokens[:, :2, :3]).shape == (5, 1, 8, 12)  # any grid
    with pytest.raises(UserError, match=f"autoencoder.codebook_size=7: the tokenizer at .* has {size}; set it to that"):
        load_tokenizer(LearnedTokenizer(str(out), 7))
    with pytest.raises(UserError, match="autoencoder=tokenizer makes tokens, not latents"):
        load_autoencoder(config)
    with pytest.raises(UserError, match=f"tokens of 0 .. {size}"):
        loaded.decode(torch.tensor([[[0, size]]]))


def test_a_collapse_is_told_while_training_and_at_the_end(digits, tmp_path):
    # In 64 dimensions the first latents lie close together, next to one or two random codes, which then take them all.
    quantizer = VQ(256, 64, restart_below=0.0)
    display = Listening()
    result = train_tokenizer(small_training(400, quantizer, batch_size=2), *digits, tmp_path / "out", display=display)
    usage = usage_in(result)
    assert usage.collapsed
    told = [message for message in display.messages if "collapsed" in message]
    assert len(told) == 1  # once, not every 200 steps
    assert told[0].startswith("step 200: the codebook has collapsed: ")
    for words in ("--quantizer fsq", "--restart-below 0.03", "a smaller codebook", "more steps"):
        assert words in told[0]
    assert "fsq" not in collapse_advice(usage, FSQ())
    assert "--restart-below" not in collapse_advice(usage, VQ())


def test_training_is_a_function_of_its_config(digits, tmp_path):
    for quantizer in (VQ(16), FSQ((4, 4))):
        a, b, c = (
            train_tokenizer(small_training(3, quantizer, seed=s), *digits, tmp_path / f"{s}{n}{quantizer.kind}",
                            display=Listening()).model.fingerprint
            for s, n in ((0, "a"), (0, "b"), (1, "c"))
        )  # fmt: skip
        assert a == b != c


def test_damage_and_mistakes_are_found(digits, tmp_path):
    for quantizer in (VQ(16), FSQ((4, 4))):
        folder = tmp_path / quantizer.kind
        model = new_small_tokenizer(SmallTokenizerConfig(1, 2, 8, quantizer=quantizer), seed=3)
        save_small_tokenizer(model, folder)
        assert load_small_tokenizer(folder).fingerprint == model.fingerprint
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    body = json.loads((folder / "config.json").read_text())
    for change, (value, words) in {
        "levels": (None, "levels=None must be"),
        "kind": ("vqq", "is damaged"),
        "unknown": (1, "is damaged"),
    }.items():
        (folder / "config.json").write_text(json.dumps({**body, "quantizer": {**body["quantizer"], change: value}}))
        with pytest.raises(UserError, match=words):
            load_tokenizer(LearnedTokenizer(str(folder), 16))
    (folder / "config.json").write_text(json.dumps(body))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its checksum"):
        load_small_tokenizer(folder)
    with pytest.raises(UserError, match=r"config\.json is missing: .* holds no tokenizer"):
        load_small_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"model\.in_channels=3: the pictures have 1 channels"):
        train_tokenizer(TokenizerTraining(), *digits, tmp_path / "out")
    assert not (tmp_path / "out").exists()
