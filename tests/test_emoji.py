"""Emoji: a font's glyphs and ligatures as pictures, their captions, the folder that is written, the commands."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, features
from tiny_emoji_font import DISCS, disc, write_tiny_emoji_font

from smalti.cli import main
from smalti.data import emoji as emoji_module
from smalti.data.emoji import find_emoji_font, read_emoji_font, render_emoji, square_picture
from smalti.data.emoji_captions import describe_emoji, known_emoji, plain_sequence, with_article
from smalti.data.opening import open_rows
from smalti.data.rows import to_bytes
from smalti.data.sources import FolderData
from smalti.errors import UserError

try:
    NOTO = find_emoji_font()
except UserError:
    NOTO = None
needs_noto = pytest.mark.skipif(NOTO is None, reason="the font Noto Color Emoji is not installed")


@pytest.fixture(scope="module")
def font_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("font") / "tiny.ttf"
    write_tiny_emoji_font(path)
    return path


def metadata(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def command(capsys):
    """Runs `smalti ARGUMENTS` -> (exit code, what it printed)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        printed = capsys.readouterr()
        return stopped.value.code, printed.out + printed.err

    return run


# --- the font


def test_sequences_are_one_glyph_each(font_path):
    font = read_emoji_font(font_path)
    glyphs = {
        "👋": "hand",
        "👋🏽": "hand_medium",
        "👩‍💻": "technologist",
        "🇫🇷": "flag_fr",
        "1️⃣": "keycap_1",
        "😀": "grin",
    }
    assert {emoji: font.glyph(emoji) for emoji in glyphs} == glyphs
    for unknown in ("🍔", "👋🏿", "🇫🇨", "1", "👩‍"):
        assert font.glyph(unknown) is None
    assert font.bitmaps["grin"] == disc(DISCS["grin"])


@needs_noto
@pytest.mark.skipif(not features.check("raqm"), reason="Pillow was built without a text shaper")
def test_glyphs_are_those_that_a_text_shaper_draws():
    """Pillow with raqm (HarfBuzz and FreeType) is the truth: flags, keycaps, tones, ZWJ sequences, tag sequences."""
    font, shaper = read_emoji_font(NOTO), ImageFont.truetype(str(NOTO), 109, layout_engine=ImageFont.Layout.RAQM)
    some = ["😀", "❤️", "1️⃣", "🇫🇷", "👋🏽", "👩🏽‍💻", "🏴󠁧󠁢󠁷󠁬󠁳󠁿", "👨‍👩‍👧‍👦", "👩🏻‍❤️‍💋‍👨🏿", "🏳️‍🌈", "🧑🏾‍🤝‍🧑🏼", "🙂‍↔️"]
    for emoji in [*some, *list(known_emoji())[::150]]:
        glyph = font.glyph(emoji)
        if glyph is None:
            continue
        page = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(page).text((0, 0), emoji, font=shaper, embedded_color=True)
        with Image.open(BytesIO(font.bitmaps[glyph])) as bitmap:
            ours = bitmap.convert("RGBA").convert("RGBa")
        drawn = page.crop(page.getbbox()).convert("RGBa")
        ours = ours.crop(ours.getbbox())
        assert drawn.size == ours.size, emoji
        # Premultiplied, and with FreeType's own rounding; another glyph differs by hundreds.
        assert np.abs(np.asarray(drawn, int) - np.asarray(ours, int)).mean() < 1.5, emoji


@needs_noto
def test_noto_draws_nearly_all_that_unicode_15_lists():
    font = read_emoji_font(NOTO)
    listed = {emoji: data for emoji, data in known_emoji().items() if data["E"] <= 15}
    drawn = sum(font.glyph(emoji) is not None for emoji in listed)
    assert drawn >= 3000
    assert drawn > 0.99 * len(listed)


def test_what_is_no_emoji_font(tmp_path):
    with pytest.raises(UserError, match=r"--font .*missing.ttf cannot be read as a font"):
        read_emoji_font(tmp_path / "missing.ttf")
    (tmp_path / "text.ttf").write_text("not a font")
    with pytest.raises(UserError, match="cannot be read as a font"):
        read_emoji_font(tmp_path / "text.ttf")
    write_tiny_emoji_font(tmp_path / "outlines.ttf", bitmaps=False)
    with pytest.raises(UserError, match=r"no colour bitmaps \(table CBDT\) but no colour table: .*apt install"):
        read_emoji_font(tmp_path / "outlines.ttf")


def test_no_font_says_how_to_install_one(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji_module, "_FONT_FOLDERS", (str(tmp_path),))
    with pytest.raises(UserError, match=r"not installed.*apt install fonts-noto-color-emoji.*dnf install.*--font"):
        find_emoji_font()
    (tmp_path / "NotoColorEmoji.ttf").touch()
    assert find_emoji_font() == tmp_path / "NotoColorEmoji.ttf"


# --- the pictures


def test_squares_lose_empty_columns_and_nothing_else():
    bitmap = Image.open(BytesIO(disc("red")))
    square = square_picture(disc("red"), 128)
    assert np.array_equal(np.asarray(square), np.asarray(bitmap)[:, 4:-4])
    bitmap.putpixel((0, 64), (0, 0, 255, 255))  # now a column at the edge is used
    buffer = BytesIO()
    bitmap.save(buffer, "PNG")
    padded = square_picture(buffer.getvalue(), 136)
    assert np.array_equal(np.asarray(padded)[4:-4], np.asarray(bitmap))
    assert not np.asarray(padded)[[0, 1, 2, 3, -4, -3, -2, -1], :, 3].any()


def test_resizing_lets_no_hidden_colour_through():
    """The ground is transparent black: an edge pixel must be the disc's colour, thinner, and not a darker one."""
    small = np.asarray(square_picture(disc("white"), 32))
    visible = small[small[..., 3] > 0]
    assert (visible[:, :3] > 240).all()
    assert ((visible[:, 3] > 0) & (visible[:, 3] < 255)).any()


def test_the_folder_reads_back(font_path, tmp_path):
    calls = []
    written = render_emoji(font_path, tmp_path / "out", size=64, progress=lambda *call: calls.append(call))
    rows = metadata(tmp_path / "out")
    assert (written.pictures, len(rows), calls[-1]) == (8, 8, (8, 8))
    assert written.captions == sum(len(row["text"]) for row in rows)
    by_emoji = {row["emoji"]: row for row in rows}
    assert by_emoji["👋🏽"]["file_name"] == "pictures/1f44b-1f3fd.png"
    assert by_emoji["👋🏽"]["base"] == by_emoji["👋"]["base"] == "waving hand"
    source = json.loads((tmp_path / "out" / "source.json").read_text())
    assert (source["font"], source["version"], source["licence"]) == ("tiny.ttf", "Version 1.0", "anyone's")

    opened = open_rows(FolderData(str(tmp_path / "out"), held_out=0), 3, (64, 64), needs_captions=True)
    assert opened.sizes.unique(dim=0).tolist() == [[64, 64]]
    for row, captions, picture in zip(
        rows, opened.training.captions, to_bytes(opened.training.read(torch.arange(8))), strict=True
    ):
        glyph = read_emoji_font(font_path).glyph(row["emoji"])
        assert picture[:, 32, 32].tolist() == list(ImageColor.getrgb(DISCS[glyph]))
        assert picture[:, 0, 0].tolist() == [255, 255, 255]
        assert captions == tuple(row["text"])


def test_emoji_drawn_alike_are_one_picture_with_the_captions_of_both(font_path, tmp_path):
    render_emoji(font_path, tmp_path / "out", size=16)
    rows = metadata(tmp_path / "out")
    (flag,) = [row for row in rows if row["base"].startswith("flag")]
    assert flag["emoji"] == "🇫🇷"  # Clipperton's came later
    assert {"the flag of France", "the flag of Clipperton Island"} <= set(flag["text"])


def test_a_folder_is_replaced_only_if_asked_and_only_if_it_is_ours(font_path, tmp_path):
    out = tmp_path / "out"
    render_emoji(font_path, out, size=16)
    with pytest.raises(UserError, match="exists: pass --overwrite"):
        render_emoji(font_path, out, size=16)
    (out / "stale.txt").touch()
    render_emoji(font_path, out, size=32, overwrite=True)
    assert not (out / "stale.txt").exists()
    assert Image.open(out / "pictures" / "1f44b.png").size == (32, 32)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.png").touch()
    with pytest.raises(UserError, match="was not written by `smalti data emoji`"):
        render_emoji(font_path, tmp_path / "holiday", overwrite=True)
    assert (tmp_path / "holiday" / "photo.png").exists()
    with pytest.raises(UserError, match=r"--size 4 must lie in 8 \.\. 1024"):
        render_emoji(font_path, tmp_path / "small", size=4)


def test_a_broken_off_attempt_leaves_what_was_there(font_path, tmp_path, monkeypatch):
    out = tmp_path / "out"
    render_emoji(font_path, out, size=16)
    before = (out / "metadata.jsonl").read_text()

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_emoji(font_path, out, size=32, overwrite=True, progress=stop)
    assert (out / "metadata.jsonl").read_text() == before
    assert Image.open(out / "pictures" / "1f44b.png").size == (16, 16)
    assert render_emoji(font_path, out, size=32, overwrite=True).pictures == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# --- captions


@pytest.mark.parametrize(
    ("emoji", "caption"),
    [
        ("👋🏽", "a waving hand with medium skin tone"),
        ("👩🏾‍💻", "a woman technologist with medium-dark skin tone"),
        ("🧑🏿‍🤝‍🧑🏻", "people holding hands with dark and light skin tones"),
        ("👩🏻‍❤️‍💋‍👨🏿", "a woman and a man kissing with light and dark skin tones"),
        ("👨‍👩‍👧‍👧", "a family of a man, a woman and two girls"),
        ("💑", "a couple with heart"),
        ("👰🏻‍♂️", "a man with veil, light skin tone"),
        ("🧔🏼‍♂️", "a man with a beard, medium-light skin tone"),
        ("👱🏽‍♀️", "a woman with blond hair, medium skin tone"),
        ("👨🏿‍🦲", "a bald man with dark skin tone"),
        ("🇳🇱", "the flag of the Netherlands"),
        ("🇫🇷", "the flag of France"),
        ("🏴󠁧󠁢󠁳󠁣󠁴󠁿", "the flag of Scotland"),
        ("🇹🇹", "the flag of Trinidad and Tobago"),
        ("#️⃣", "a key with the sign #"),
        ("🍎", "a red apple"),
        ("☂️", "an umbrella"),
        ("🦄", "a unicorn"),
        ("⌛", "an hourglass done"),
        ("🆘", "an SOS button"),
        ("🆕", "a NEW button"),
        ("✂️", "scissors"),
        ("🧂", "salt"),
        ("🚌", "a bus"),
        ("🎅", "Santa Claus"),
        ("🏯", "a Japanese castle"),
        ("🕗", "eight o'clock"),
        ("👯", "people with bunny ears"),
        ("🏋️‍♀️", "a woman lifting weights"),
    ],
)
def test_captions_read_like_english(emoji, caption):
    by_sequence = {plain_sequence(text): data for text, data in known_emoji().items()}
    plain = plain_sequence(emoji)
    assert describe_emoji(emoji, by_sequence[plain]).captions[0] == caption


def test_every_emoji_has_several_clean_captions():
    for emoji, data in known_emoji().items():
        description = describe_emoji(emoji, data)
        assert len(description.captions) >= 4, description
        assert len(set(description.captions)) == len(description.captions)
        assert "skin tone" not in description.base
        for caption in description.captions:
            assert caption == " ".join(caption.split())
            assert not set(caption) & set("_’\ufe0f")
            assert ("skin" in caption) == ("skin_tone" in data["en"])


def test_aliases_and_character_names_come_along_unless_they_mislead():
    captions = {text: describe_emoji(text, data).captions for text, data in known_emoji().items()}
    assert "a slice of pizza" in captions["🍕"]
    assert "wave with dark skin tone" in captions["👋🏿"]
    assert not any("black" in caption for caption in captions["❤️"])  # HEAVY BLACK HEART, of a red one
    assert "train" not in captions["🚋"]  # an alias of the tram car, and the name of another picture
    assert with_article("umbrella") == "an umbrella"


@needs_noto
def test_no_two_pictures_share_a_caption():
    rows, _, missing = emoji_module._rows(read_emoji_font(NOTO))
    firsts = [row["text"][0] for row in rows.values()]
    everything = [caption for row in rows.values() for caption in row["text"]]
    assert len(set(firsts)) == len(rows) > 3500
    assert len(set(everything)) == len(everything)
    assert missing < 400


# --- the commands


def test_data_emoji_and_data_show(command, font_path, tmp_path):
    code, output = command("data", "emoji", "--font", font_path, "--out", tmp_path / "out", "--size", "32")
    assert code == 0, output
    assert f"8 emoji with {sum(len(row['text']) for row in metadata(tmp_path / 'out'))} captions -> " in output
    assert Image.open(tmp_path / "out" / "contact-sheet.png").size == (64 * 34 + 2, 36)
    (tmp_path / "out" / "pictures" / "1f600.png").write_bytes(b"broken")
    code, output = command("data", "show", tmp_path / "out", "--out", tmp_path / "sheet.png")
    assert code == 0, output
    for words in (
        "7 pictures to train on", "width 32 .. 32 .. 32", "captions: ", "classes: none", "skipped: 1",
        "  pictures/1f600.png: no picture format", "contact sheet of 7 pictures",
    ):  # fmt: skip
        assert words in output
    assert Image.open(tmp_path / "sheet.png").size == (7 * 66 + 2, 68)


def test_mistakes_on_the_command_line(command, font_path, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    code, output = command("data", "emoji", "--font", font_path, "--out", tmp_path / "full")
    assert (code, "exists: pass --overwrite" in output) == (2, True)
    code, output = command("data", "show", tmp_path / "full")
    assert (code, "holds no pictures" in output) == (2, True)
    code, output = command("data", "show", "digits", "--out", tmp_path / "sheet.unknown")
    assert (code, "cannot write --out" in output) == (2, True)
    assert not Path(tmp_path / "sheet.unknown").exists()
