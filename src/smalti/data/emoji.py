"""The emoji of a colour font as a text-to-image set: pictures with captions, in the ImageFolder layout.

Noto Color Emoji (fonts: SIL Open Font Licence; drawings: Apache 2.0) holds a PNG of 136 x 128 for every emoji (tables
CBDT and CBLC of OpenType). A sequence of several characters (a flag, a skin tone, a family) is one glyph by a ligature
of the GSUB table. Both are read through fontTools; no text shaper is needed, since an emoji is exactly one ligature.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smalti.data.emoji_captions import describe_emoji, known_emoji, plain_sequence
from smalti.errors import UserError

_FONT_FOLDERS = (
    "/usr/share/fonts/truetype/noto",  # Debian, Ubuntu
    "/usr/share/fonts/google-noto-color-emoji-fonts",  # Fedora
    "/usr/share/fonts/noto",  # Arch
    "/usr/share/fonts",
    "~/.local/share/fonts",
    "~/Library/Fonts",  # macOS
    "/Library/Fonts",
)
_FONT_NAMES = ("NotoColorEmoji.ttf", "NotoColorEmoji-Regular.ttf")
_HOW_TO_GET_ONE = (
    "install it by `apt install fonts-noto-color-emoji` (Debian, Ubuntu) or `dnf install "
    "google-noto-color-emoji-fonts` (Fedora), or give NotoColorEmoji.ttf of github.com/googlefonts/noto-emoji by --font"
)


def find_emoji_font() -> Path:
    """The Noto colour font, where Debian, Fedora, Arch and macOS have it. Raises UserError where it is not."""
    for folder in _FONT_FOLDERS:
        for name in _FONT_NAMES:
            path = Path(folder).expanduser() / name
            if path.is_file():
                return path
    raise UserError(f"the font Noto Color Emoji is not installed: {_HOW_TO_GET_ONE}")


@dataclass(frozen=True)
class EmojiFont:
    """A colour font's bitmaps. names: character -> glyph; ligatures: several glyphs -> one; bitmaps: glyph -> PNG."""

    names: Mapping[int, str]
    ligatures: Mapping[tuple[str, ...], str]
    bitmaps: Mapping[str, bytes]
    version: str
    licence: str

    def glyph(self, emoji: str) -> str | None:
        """The glyph of an emoji; None where the font does not draw it as one."""
        glyphs = tuple(self.names.get(ord(character), "") for character in plain_sequence(emoji))
        name = glyphs[0] if len(glyphs) == 1 else self.ligatures.get(glyphs)
        return name if name in self.bitmaps else None


def read_emoji_font(path: Path) -> EmojiFont:
    """Read a font with PNG bitmaps. Raises UserError for a file that is none."""
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError:
        raise UserError("reading a font needs the package fonttools: pip install 'smalti[data]'") from None
    try:
        font = TTFont(path, lazy=True)
        tables = set(font.keys())
        if "CBDT" not in tables or "CBLC" not in tables:
            others = ", ".join(sorted(tables & {"COLR", "sbix", "SVG "})) or "no colour table"
            raise UserError(f"--font {path} has no colour bitmaps (table CBDT) but {others}: {_HOW_TO_GET_ONE}")
        sizes = [strike.bitmapSizeTable.ppemY for strike in font["CBLC"].strikes]
        strike = font["CBDT"].strikeData[sizes.index(max(sizes))]
        bitmaps = {name: bytes(glyph.imageData) for name, glyph in strike.items() if hasattr(glyph, "imageData")}
        ligatures: dict[tuple[str, ...], str] = {}
        for lookup in font["GSUB"].table.LookupList.Lookup if "GSUB" in tables else ():
            for subtable in lookup.SubTable:
                for first, rest in getattr(subtable, "ligatures", {}).items():
                    for ligature in rest:
                        ligatures.setdefault((first, *ligature.Component), ligature.LigGlyph)
        names = font["name"]
        version, licence = (str(names.getDebugName(i) or "") for i in (5, 13))
        return EmojiFont(dict(font.getBestCmap()), ligatures, bitmaps, version, licence)
    except (OSError, TTLibError) as error:
        raise UserError(f"--font {path} cannot be read as a font: {error}") from None


def square_picture(png: bytes, size: int) -> Image.Image:
    """A glyph's bitmap as an RGBA square. Empty columns (or rows) at both sides go first; what is not square then is
    padded, with transparency; and the square is resized if it is not of the size asked for."""
    with Image.open(BytesIO(png)) as bitmap:
        picture = bitmap.convert("RGBA")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    alpha = np.asarray(picture)[..., 3]
    inside = alpha[top : top + side, left : left + side]
    if np.count_nonzero(inside) != np.count_nonzero(alpha):  # something would be cut off
        side = max(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))  # beyond the picture it is transparent
    return square if side == size else square.resize((size, size), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class RenderedEmoji:
    """What was written: pictures, emoji that the font lacks, captions in all."""

    folder: Path
    pictures: int
    not_in_font: int
    captions: int


def _make_room(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UserError(f"--out {out} exists: pass --overwrite to replace it")
    if not (out / "source.json").is_file():
        raise UserError(f"--out {out} was not written by `smalti data emoji` and is not replaced: give another folder")


def _rows(font: EmojiFont) -> tuple[dict[str, dict[str, Any]], dict[str, bytes], int]:
    """(metadata rows by file name, PNG by file name, number of emoji that the font lacks).

    Emoji that the font draws alike (the flags of France and Clipperton) are one picture with the captions of all.
    """
    rows: dict[str, dict[str, Any]] = {}
    bitmaps: dict[str, bytes] = {}
    drawn: dict[bytes, str] = {}
    missing = 0
    by_age = sorted(known_emoji().items(), key=lambda item: (item[1]["E"], item[0]))  # of two alike the older leads
    for emoji, data in by_age:
        glyph = font.glyph(emoji)
        if glyph is None:
            missing += 1
            continue
        description = describe_emoji(emoji, data)
        png = font.bitmaps[glyph]
        name = "pictures/" + "-".join(f"{ord(character):x}" for character in plain_sequence(emoji)) + ".png"
        twin = drawn.setdefault(png, name)
        if twin != name:
            rows[twin]["text"] = list(dict.fromkeys([*rows[twin]["text"], *description.captions]))
            continue
        rows[name] = {
            "file_name": name,
            "text": list(description.captions),
            "emoji": emoji,
            "base": description.base,
        }
        bitmaps[name] = png
    captions = Counter(caption for row in rows.values() for caption in row["text"])
    for row in rows.values():  # a second name that another picture has too tells nothing; the first name stays
        first, *others = row["text"]
        row["text"] = [first, *(caption for caption in others if captions[caption] == 1)]
    return rows, bitmaps, missing


def render_emoji(
    font_path: Path,
    out: Path,
    *,
    size: int = 128,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RenderedEmoji:
    """Write every emoji of a font as a size x size PNG with captions into the folder out.

    out/metadata.jsonl has a row a picture: file_name, text (a list of captions), emoji, base (the name without skin
    tones); source.json says where it comes from. The folder appears when it is whole: a broken-off attempt leaves
    nothing in its place. Raises UserError for a bad font or size, and where out exists and overwrite is not given.
    """
    if not 8 <= size <= 1024:
        raise UserError(f"--size {size} must lie in 8 .. 1024")
    _make_room(out, overwrite)
    font = read_emoji_font(font_path)
    rows, bitmaps, missing = _rows(font)
    if not rows:
        raise UserError(f"--font {font_path} draws none of the emoji: {_HOW_TO_GET_ONE}")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "pictures").mkdir(parents=True)

    def write(name: str) -> None:
        square_picture(bitmaps[name], size).save(partial / name)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, _ in enumerate(pool.map(write, rows), 1):
            if progress is not None:
                progress(done, len(rows))
    with (partial / "metadata.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
    source = {
        "written_by": "smalti data emoji", "font": font_path.name, "version": font.version, "licence": font.licence,
        "size": size, "pictures": len(rows),
    }  # fmt: skip
    (partial / "source.json").write_text(json.dumps(source, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
    return RenderedEmoji(out, len(rows), missing, sum(len(row["text"]) for row in rows.values()))
