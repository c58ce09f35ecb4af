"""Frozen text encoders against the diffusers pipelines' encode_prompt, with tiny random models saved to disk."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from diffusers import (
    FluxPipeline,
    PixArtAlphaPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from smalti.conditioning.captions import CountsTokens, caption_lengths
from smalti.conditioning.encoders import (
    FluxText,
    LLMText,
    SD3Text,
    T5Text,
    TextEncoder,
    build_text_encoder,
)
from smalti.conditioning.tiny import TinyTextConfig
from smalti.errors import UserError

CAPTIONS = ["a Red Heart", "", "two people holding hands, one of them waving at a dog " * 40, " Grinning face "]
LONG = "x" * 10_000
CHAT = (
    "{% for message in messages %}<start>{{ message.role }}: {{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant:{% if enable_thinking %} hm{% endif %}{% endif %}"
)


def tokenizer(folder, template, max_length, pad="<pad>", chat_template=None, padding_side="right"):
    """Byte-level pairs; padded with `pad`, ended by <end>."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CAPTIONS, trainer)
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<start>", 1), ("<end>", 2)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=max_length, bos_token="<start>", eos_token="<end>", pad_token=pad,
        chat_template=chat_template, padding_side=padding_side,
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


def clip(folder, cls, width, projection):
    config = transformers.CLIPTextConfig(
        vocab_size=400, hidden_size=width, intermediate_size=2 * width, projection_dim=projection, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return saved(cls(config), folder)


def t5(folder, width=48):
    config = transformers.T5Config(
        vocab_size=400, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return saved(transformers.T5EncoderModel(config), folder)


def saved(model, folder):
    """The model with every weight random (biases and norms too) but small, so that rounding stays small; on disk."""
    generator = torch.Generator().manual_seed(len(folder.name))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(one + 0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd3")
    parts = {
        "text_encoder": clip(root / "text_encoder", transformers.CLIPTextModelWithProjection, 16, 12),
        "text_encoder_2": clip(root / "text_encoder_2", transformers.CLIPTextModelWithProjection, 24, 20),
        "text_encoder_3": t5(root / "text_encoder_3"),
        "tokenizer": tokenizer(root / "tokenizer", "<start> $A <end>", 77, pad="<end>"),  # as CLIP-L's
        "tokenizer_2": tokenizer(root / "tokenizer_2", "<start> $A <end>", 77),  # as CLIP-G's: another padding
        "tokenizer_3": tokenizer(root / "tokenizer_3", "$A <end>", 512),
    }
    return root, parts


def sd3_config(root, **changes):
    sources = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
    folders = {field: str(root / name) for field, name in sources.items()}
    return SD3Text(**{**folders, "max_tokens": 96, **changes})


def sd3_pipeline(parts, **changes):
    return StableDiffusion3Pipeline(transformer=None, scheduler=None, vae=None, **{**parts, **changes})


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_sd3(sd3, clip_skip):
    root, parts = sd3
    ours = build_text_encoder(sd3_config(root, clip_skip=clip_skip))(CAPTIONS)
    embeds, _, pooled, _ = sd3_pipeline(parts).encode_prompt(
        CAPTIONS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=96,
        clip_skip=clip_skip,
    )  # fmt: skip
    torch.testing.assert_close(ours.text_embeds, embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooled_embeds, pooled, rtol=0, atol=1e-5)
    assert ours.text_embeds.shape == (4, 77 + 96, 48)
    assert ours.text_mask is None


def test_sd3_without_t5(sd3):
    from types import SimpleNamespace

    root, parts = sd3
    encoder = build_text_encoder(sd3_config(root, t5=None, text_width=64))
    pipeline = sd3_pipeline(parts, text_encoder_3=None, tokenizer_3=None)
    pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=64))
    embeds, _, pooled, _ = pipeline.encode_prompt(
        CAPTIONS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=96
    )
    ours = encoder(CAPTIONS)
    torch.testing.assert_close(ours.text_embeds, embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooled_embeds, pooled, rtol=0, atol=1e-5)
    assert encoder.max_tokens == 77


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux")
    parts = {
        "text_encoder": clip(root / "text_encoder", transformers.CLIPTextModel, 16, 12),
        "text_encoder_2": t5(root / "text_encoder_2"),
        "tokenizer": tokenizer(root / "tokenizer", "<start> $A <end>", 77, pad="<end>"),
        "tokenizer_2": tokenizer(root / "tokenizer_2", "$A <end>", 512),
    }
    return root, parts


def test_flux(flux):
    root, parts = flux
    config = FluxText(clip_l=str(root / "text_encoder"), t5=str(root / "text_encoder_2"), max_tokens=128)
    ours = build_text_encoder(config)(CAPTIONS)
    pipeline = FluxPipeline(transformer=None, scheduler=None, vae=None, **parts)
    embeds, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu", max_sequence_length=128)
    torch.testing.assert_close(ours.text_embeds, embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooled_embeds, pooled, rtol=0, atol=1e-5)
    assert ours.text_mask is None


def test_pixart(flux):
    root, parts = flux
    ours = build_text_encoder(T5Text(t5=str(root / "text_encoder_2"), max_tokens=120))(CAPTIONS)
    pipeline = PixArtAlphaPipeline(
        tokenizer=parts["tokenizer_2"], text_encoder=parts["text_encoder_2"], vae=None, transformer=None, scheduler=None
    )
    embeds, mask, _, _ = pipeline.encode_prompt(
        CAPTIONS, do_classifier_free_guidance=False, device="cpu", max_sequence_length=120
    )
    assert torch.equal(ours.text_mask, mask.bool())
    torch.testing.assert_close(ours.text_embeds[ours.text_mask], embeds[ours.text_mask], rtol=0, atol=1e-5)
    assert ours.text_embeds.shape == embeds.shape
    assert (ours.text_embeds[~ours.text_mask] == 0).all()


def test_t5_whose_padding_is_seen(flux):
    """CogVideoX's way: as FLUX's T5."""
    root, parts = flux
    config = T5Text(t5=str(root / "text_encoder_2"), max_tokens=40, padding_seen=True, lower_case=False)
    ours = build_text_encoder(config)(CAPTIONS)
    ids = parts["tokenizer_2"](CAPTIONS, padding="max_length", max_length=40, truncation=True, return_tensors="pt")
    torch.testing.assert_close(ours.text_embeds, parts["text_encoder_2"](ids.input_ids)[0], rtol=0, atol=1e-5)
    assert ours.text_mask is None


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_zimage(tmp_path, padding_side):
    config = transformers.Qwen3Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = saved(transformers.Qwen3ForCausalLM(config), tmp_path / "text_encoder")
    words = tokenizer(tmp_path / "tokenizer", "$A", 512, chat_template=CHAT, padding_side=padding_side)
    encoder = build_text_encoder(LLMText(llm=str(tmp_path / "text_encoder"), max_tokens=128))
    ours = encoder(CAPTIONS)
    pipeline = ZImagePipeline(text_encoder=model, tokenizer=words, vae=None, transformer=None, scheduler=None)
    expected, _ = pipeline.encode_prompt(
        list(CAPTIONS), device="cpu", do_classifier_free_guidance=False, max_sequence_length=128
    )
    assert ours.text_embeds.shape == (4, 128, 32)
    for embeds, mask, theirs in zip(ours.text_embeds, ours.text_mask, expected, strict=True):
        torch.testing.assert_close(embeds[mask], theirs, rtol=0, atol=1e-5)
        assert mask[: len(theirs)].all()  # the padding is on the right, whatever the tokenizer's own side
    counts = encoder.token_counts(CAPTIONS)
    assert [min(count, 128) for count in counts] == ours.text_mask.sum(1).tolist()
    words.chat_template = None
    shutil.rmtree(tmp_path / "tokenizer")
    words.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="chat template"):
        build_text_encoder(LLMText(llm=str(tmp_path / "text_encoder")))


def test_sana_without_its_instruction(tmp_path):
    config = transformers.Gemma2Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = saved(transformers.Gemma2Model(config), tmp_path / "text_encoder")
    words = tokenizer(tmp_path / "tokenizer", "<start> $A", 512)
    llm = LLMText(llm=str(tmp_path / "text_encoder"), max_tokens=100, hidden_layer=-1, chat=False, lower_case=True)
    ours = build_text_encoder(llm)(CAPTIONS)
    pipeline = SanaPipeline(tokenizer=words, text_encoder=model, vae=None, transformer=None, scheduler=None)
    embeds, mask, _, _ = pipeline.encode_prompt(
        CAPTIONS, do_classifier_free_guidance=False, device="cpu", max_sequence_length=100
    )
    assert torch.equal(ours.text_mask, mask.bool())
    torch.testing.assert_close(ours.text_embeds[ours.text_mask], embeds[ours.text_mask], rtol=0, atol=1e-5)


def test_long_strange_and_lone_captions(sd3):
    root, _ = sd3
    encoder = build_text_encoder(sd3_config(root))
    assert isinstance(encoder, TextEncoder)
    assert isinstance(encoder, CountsTokens)
    captions = [LONG, "\ud800", "a Red Heart"]
    together = encoder(captions)
    assert together.text_embeds.isfinite().all()
    assert not together.text_embeds.is_inference()  # training reads them
    torch.testing.assert_close(together.text_embeds[2:], encoder(["a Red Heart"]).text_embeds, rtol=0, atol=1e-5)
    lengths = caption_lengths(encoder, captions)
    assert (lengths.truncated, lengths.limit) == (1, 96)
    assert lengths.longest > 1000


def test_bfloat16_is_rounded_float32(sd3):
    root, _ = sd3
    exact = build_text_encoder(sd3_config(root))(CAPTIONS)
    rounded = build_text_encoder(sd3_config(root, precision="bfloat16"))(CAPTIONS)
    assert rounded.text_embeds.dtype == torch.float32
    assert 0 < (rounded.text_embeds - exact.text_embeds).abs().mean() < 0.05 * exact.text_embeds.abs().mean()


def test_the_fingerprint_is_of_the_files_and_options_and_not_of_their_place(sd3, tmp_path):
    root, _ = sd3
    shutil.copytree(root, tmp_path / "copy")
    first = build_text_encoder(sd3_config(root)).fingerprint
    copy = sd3_config(tmp_path / "copy")
    assert build_text_encoder(copy).fingerprint == first
    assert len(first) == 64
    assert build_text_encoder(dataclasses.replace(copy, max_tokens=50)).fingerprint != first
    assert build_text_encoder(dataclasses.replace(copy, t5=None)).fingerprint != first
    weights = tmp_path / "copy" / "text_encoder_2" / "model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, {"format": "pt"})
    changed = build_text_encoder(copy).fingerprint
    assert changed != first
    words = tmp_path / "copy" / "tokenizer" / "tokenizer.json"
    words.write_text(json.dumps(json.loads(words.read_text())))
    assert build_text_encoder(copy).fingerprint != changed


def test_sources_that_are_not_there_or_something_else(sd3, flux, tmp_path):
    root, _ = sd3
    wrong = {
        "no/such-model": "cannot be had from the hub",
        "hf://no/such-model/text_encoder": "local folder",
        "nothing": "no such folder",
        "/nowhere/at/all": "no such folder",
        str(root): "text_encoder",  # a pipeline's folder: which of its encoders?
        str(root / "text_encoder_3"): "is no CLIPTextModelWithProjection",
        str(flux[0] / "text_encoder"): "lacks 1 tensors, the first is text_projection",
    }
    for source, message in wrong.items():
        with pytest.raises(UserError, match=message) as error:
            build_text_encoder(sd3_config(root, clip_l=source))
        assert "text.clip_l=" in str(error.value)
        assert "\n" not in str(error.value)
    bare = tmp_path / "text_encoder_3"
    shutil.copytree(root / "text_encoder_3", bare)
    with pytest.raises(UserError, match=r"text\.t5=.*has no tokenizer"):
        build_text_encoder(T5Text(t5=str(bare)))
    shutil.copytree(root / "tokenizer_3", tmp_path / "tokenizer_3")
    (bare / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"text\.t5="):
        build_text_encoder(T5Text(t5=str(bare)))
    with pytest.raises(UserError, match="tiny"):
        build_text_encoder(TinyTextConfig())


def test_one_folder_may_hold_model_and_tokenizer(sd3, tmp_path):
    root, _ = sd3
    shutil.copytree(root / "text_encoder_3", tmp_path / "t5")
    shutil.copytree(root / "tokenizer_3", tmp_path / "t5", dirs_exist_ok=True)
    together, apart = (
        build_text_encoder(T5Text(t5=str(folder)))(CAPTIONS) for folder in (tmp_path / "t5", root / "text_encoder_3")
    )
    assert torch.equal(together.text_embeds, apart.text_embeds)


@pytest.mark.parametrize(
    "bad", [lambda: SD3Text(max_tokens=0), lambda: SD3Text(clip_skip=-1), lambda: LLMText(hidden_layer=2)]
)
def test_configs_that_make_no_sense(bad):
    with pytest.raises(UserError, match=r"text\."):
        bad()
