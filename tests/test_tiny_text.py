"""The embedded text encoder: any string encodes, equal everywhere, padding counts for nothing."""

import subprocess
import sys
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.conditioning.captions import caption_lengths
from smalti.conditioning.tiny import (
    CaptionTokenizer,
    TinyTextConfig,
    TinyTextEncoder,
    empty_prompt,
    train_tokenizer,
)
from smalti.errors import UserError
from smalti.types import Condition

CAPTIONS = [
    "grinning face",
    "waving hand: light skin tone",
    "red heart",
    "flag: Côte d’Ivoire",
    "face with tears of joy",
]
CONFIG = TinyTextConfig(vocab_size=300, width=32, depth=2, num_heads=4, max_tokens=12)
TOKENIZER = train_tokenizer(CAPTIONS, CONFIG)
LONG = train_tokenizer(CAPTIONS, TinyTextConfig(vocab_size=300, max_tokens=2000))


def encoder(seed=0):
    """With blocks that do something, which at initialisation they do not."""
    torch.manual_seed(seed)
    model = TinyTextEncoder(CONFIG).eval()
    model.initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_string_encodes_and_decodes_to_its_lower_case(text):
    """Special tokens in a caption are plain text, and no byte is unknown."""
    cond = LONG.encode([text])
    expected = unicodedata.normalize("NFC", "".join(c.lower() for c in unicodedata.normalize("NFC", text)))
    decoded = unicodedata.normalize("NFC", LONG.decode(cond.token_ids)[0])
    assert decoded.strip() == expected.strip()
    assert int(cond.text_mask.sum()) == LONG.token_counts([text])[0]


@pytest.mark.parametrize("text", ["<pad>", "a <end> b", "<start>", "\x00", "\ud800 lone", "👩🏽‍🚀"])
def test_strange_captions(text):
    (ids,), (mask,) = (t.tolist() for t in (TOKENIZER.encode([text]).token_ids, TOKENIZER.encode([text]).text_mask))
    read = ids[: sum(mask)]
    assert (read[0], read[-1]) == (1, 2)
    assert min(read[1:-1]) > 2


def test_the_tokenizer_is_a_function_of_the_captions():
    """In another process, whatever its hash seed and its threads, and in whatever order the captions come."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:2];"
        "from smalti.conditioning.tiny import *;"
        f"print(train_tokenizer({CAPTIONS[::-1]!r}, TinyTextConfig(vocab_size=300, max_tokens=12)).text, end='')"
    )
    output = subprocess.run([sys.executable, "-X", "utf8", "-c", program], capture_output=True, check=True).stdout
    assert output.decode() == TOKENIZER.text


def test_long_captions_lose_their_ends_and_are_counted():
    long = "face " * 2000
    cond = TOKENIZER.encode([long, "red heart", ""])
    assert cond.token_ids.shape == (3, 12)
    assert cond.token_ids[0, -1] == 2
    assert cond.text_mask[0].all()
    lengths = caption_lengths(TOKENIZER, [long, "red heart", ""])
    assert (lengths.longest, lengths.truncated, lengths.limit) == (2003, 1, 12)
    assert lengths.longest_caption == long
    assert TOKENIZER.token_counts(["", "red heart"]) == [2, int(cond.text_mask[1].sum())]


def test_the_empty_prompt_and_no_prompts():
    encoded, made = TOKENIZER.encode(["", ""]), empty_prompt(2, 12)
    assert torch.equal(encoded.token_ids, made.token_ids)
    assert torch.equal(encoded.text_mask, made.text_mask)
    assert TOKENIZER.encode([]).token_ids.shape == (0, 12)


def test_text_survives_and_damage_is_named():
    again = CaptionTokenizer(TOKENIZER.text)
    assert torch.equal(again.encode(CAPTIONS).token_ids, TOKENIZER.encode(CAPTIONS).token_ids)
    assert (again.max_tokens, again.vocab_size) == (12, TOKENIZER.vocab_size)
    for bad in (TOKENIZER.text[:-20], "{}", TOKENIZER.text.replace("<start>", "<begin>")):
        with pytest.raises(UserError, match="tokenizer"):
            CaptionTokenizer(bad)


def test_padding_counts_for_nothing():
    model = encoder()
    cond = TOKENIZER.encode(["red heart"])
    length = int(cond.text_mask.sum())
    tokens, pooled = model(cond.token_ids, cond.text_mask)
    short_tokens, short_pooled = model(cond.token_ids[:, :length], cond.text_mask[:, :length])
    torch.testing.assert_close(tokens[:, :length], short_tokens)
    torch.testing.assert_close(pooled, short_pooled)
    torch.testing.assert_close(pooled, tokens[:, :length].mean(1))


def test_rows_order_and_neighbours_are_read():
    model = encoder()

    def pooled(*captions):
        return model.encode(TOKENIZER.encode(captions)).pooled_embeds

    torch.testing.assert_close(pooled(*CAPTIONS)[2:3], pooled("red heart"))
    assert (pooled("red heart") - pooled("heart red")).abs().max() > 1e-2
    embeds = model.encode(TOKENIZER.encode(["red heart", "red face"])).text_embeds
    assert (embeds[0, 1] - embeds[1, 1]).abs().max() > 1e-3  # "red", with another word after it


def test_initialisation_is_a_bag_of_words_of_unit_size():
    model = TinyTextEncoder(CONFIG)
    model.initialise(torch.Generator().manual_seed(0))
    cond = TOKENIZER.encode(CAPTIONS)
    tokens, _ = model(cond.token_ids, cond.text_mask)
    raw = model.token_embed(cond.token_ids) + model.positions_MD
    torch.testing.assert_close(tokens, raw / raw.square().mean(-1, keepdim=True).add(1e-6).sqrt())


def test_missing_fields_are_named():
    with pytest.raises(UserError, match="token_ids"):
        encoder().encode(Condition())


@pytest.mark.parametrize(
    "bad", [{"vocab_size": 258}, {"max_tokens": 2}, {"width": 30}, {"depth": -1}, {"num_heads": 0}]
)
def test_configs_that_make_no_sense(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        TinyTextConfig(**bad)
