"""A colour font of a few emoji, in the tables that Noto Color Emoji uses."""

from io import BytesIO

from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
from fontTools.ttLib.tables.E_B_L_C_ import BitmapSizeTable, SbitLineMetrics, Strike, eblc_index_sub_table_1
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 136, 128

# glyph -> colour of its disc; two flags are drawn alike
DISCS = {
    "hand": "yellow", "tone": "brown", "hand_medium": "orange", "woman": "green", "laptop": "grey",
    "technologist": "purple", "flag_fr": "blue", "flag_cp": "blue", "keycap_1": "navy", "grin": "gold",
}  # fmt: skip
CHARACTERS = {
    0x1F44B: "hand", 0x1F3FD: "tone", 0x1F469: "woman", 0x1F4BB: "laptop", 0x200D: "joiner", 0x1F1EB: "F",
    0x1F1F7: "R", 0x1F1E8: "C", 0x1F1F5: "P", 0x31: "one", 0x20E3: "key", 0x1F600: "grin",
}  # fmt: skip
LIGATURES = """
feature ccmp {
    sub hand tone by hand_medium;
    sub woman joiner laptop by technologist;
    sub F R by flag_fr;
    sub C P by flag_cp;
    sub one key by keycap_1;
} ccmp;
"""


def disc(colour):
    """The bitmap of a glyph: a PNG with a disc on a transparent ground."""
    picture = Image.new("RGBA", (WIDTH, HEIGHT))
    ImageDraw.Draw(picture).ellipse((4, 0, 131, 127), fill=colour)
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_tiny_emoji_font(path, bitmaps=True):
    """The font; without bitmaps, only its outline tables."""
    order = [".notdef", *dict.fromkeys([*CHARACTERS.values(), *DISCS])]
    builder = FontBuilder(2048, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(CHARACTERS)
    builder.setupHorizontalMetrics(dict.fromkeys(order, (2550, 0)))
    builder.setupHorizontalHeader(ascent=1900, descent=-500)
    builder.setupNameTable({"familyName": "Tiny Emoji", "version": "Version 1.0", "licenseDescription": "anyone's"})
    builder.setupPost()
    builder.addOpenTypeFeatures(LIGATURES)
    if bitmaps:
        _add_bitmaps(builder.font)
    builder.font.save(path)


def _add_bitmaps(font):
    metrics = {"height": HEIGHT, "width": WIDTH, "BearingX": 0, "BearingY": 101, "Advance": WIDTH}
    data = {}
    names = sorted(DISCS, key=font.getGlyphID)
    for name in names:
        glyph = cbdt_bitmap_format_17(b"", font)
        glyph.metrics = SmallGlyphMetrics()
        vars(glyph.metrics).update(metrics)
        glyph.imageData = disc(DISCS[name])
        data[name] = glyph
    font["CBDT"] = table = newTable("CBDT")
    table.version, table.strikeData = 3.0, [data]

    strike = Strike()
    strike.bitmapSizeTable = size = BitmapSizeTable()
    size.colorRef, size.flags, size.bitDepth, size.ppemX, size.ppemY = 0, 1, 32, 109, 109
    lines = {
        "ascender": 101, "descender": -27, "widthMax": WIDTH, "caretSlopeNumerator": 0, "caretSlopeDenominator": 0,
        "caretOffset": 0, "minOriginSB": 0, "minAdvanceSB": 0, "maxBeforeBL": 0, "minAfterBL": 0, "pad1": 0, "pad2": 0,
    }  # fmt: skip
    size.hori, size.vert = SbitLineMetrics(), SbitLineMetrics()
    vars(size.hori).update(lines)
    vars(size.vert).update(lines)
    index = eblc_index_sub_table_1(b"", font)
    index.indexFormat, index.imageFormat, index.names = 1, 17, names
    index.firstGlyphIndex, index.lastGlyphIndex = font.getGlyphID(names[0]), font.getGlyphID(names[-1])
    strike.indexSubTables = [index]
    font["CBLC"] = table = newTable("CBLC")
    table.version, table.strikes = 3.0, [strike]
