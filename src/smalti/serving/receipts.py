"""What a picture's file says of its making, and the way back: from the file to the order that draws it again.

The receipt is JSON: in PNG an iTXt chunk named "smalti" (PNG 3rd edition, 11.3.3.4), in JPEG and WebP the UserComment
of their EXIF data (EXIF 2.32, tag 0x9286). It is put beside the compressed picture, which is not touched: the same
picture and receipt give the same bytes. Editing sources are told by their SHA-256 and must be given again.
"""

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import msgspec
from PIL import Image

from smalti.errors import UserError
from smalti.serving.messages import PictureOrder

_FORMAT = 1
_KEYWORD = "smalti"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_NO_CHARACTER_CODE = b"\0" * 8  # "undefined" in EXIF's words; what follows is UTF-8
_LONGEST = 2**20
_JPEG_SEGMENT = 65_533  # bytes that a segment can hold
_LARGEST_SEED = 2**63 - 1

Comparison = Literal["same bytes", "same pixels", "different"]


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How a picture was made.

    order: without files, and without what does not change the picture (whose it was, deadlines, previews).
    model, version: the name it was served under and the first hex digits of its weights' SHA-256. smalti, torch: their
    versions. source_sha256, mask_sha256: of the files that an edit began from.
    """

    format: int
    order: PictureOrder
    model: str
    version: str
    smalti: str
    torch: str
    source_sha256: str | None = None
    mask_sha256: str | None = None


def receipt_of(order: PictureOrder, *, model: str, version: str, smalti: str, torch: str) -> Receipt:
    """The receipt of an order that a model's version has drawn with these versions of the software."""
    kept = msgspec.structs.replace(
        order, source=None, mask=None, tenant="", weight=1.0, deadline_seconds=None, partial_images=0, fault=None
    )
    return Receipt(
        format=_FORMAT,
        order=kept,
        model=model,
        version=version,
        smalti=smalti,
        torch=torch,
        source_sha256=_sha256(order.source),
        mask_sha256=_sha256(order.mask),
    )


def _sha256(file: bytes | None) -> str | None:
    return None if file is None else hashlib.sha256(file).hexdigest()


# --- writing


def stamp(image: bytes, receipt: Receipt) -> bytes:
    """A PNG, JPEG or WebP file with the receipt in it. Raises UserError where it does not fit: a JPEG's has 64 kB."""
    text = msgspec.json.encode(receipt)
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return _stamped_png(image, text)
    if image.startswith(b"\xff\xd8"):
        return _stamped_jpeg(image, text)
    assert image.startswith(b"RIFF"), "not a picture of a format that is served"
    return _stamped_webp(image, text)


def _stamped_png(image: bytes, text: bytes) -> bytes:
    # After the header, so that reading it does not need the pixels. The zeros: not compressed, no language, no
    # translated keyword.
    body = b"iTXt" + _KEYWORD.encode() + b"\0" + b"\0\0" + b"\0" + b"\0" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    header_end = 8 + 12 + int.from_bytes(image[8:12], "big")
    return image[:header_end] + chunk + image[header_end:]


def _exif(text: bytes) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _NO_CHARACTER_CODE + text
    return exif.tobytes()


def _stamped_jpeg(image: bytes, text: bytes) -> bytes:
    exif = _exif(text)
    if len(exif) > _JPEG_SEGMENT:
        raise UserError(f"the receipt has {len(text)} bytes, of which a JPEG holds about {_JPEG_SEGMENT}: ask for PNG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    # EXIF wants to be first; where JFIF's segment says so too, readers take EXIF after it.
    start = 4 + int.from_bytes(image[4:6], "big") if image[2:4] == b"\xff\xe0" else 2
    return image[:start] + segment + image[start:]


def _stamped_webp(image: bytes, text: bytes) -> bytes:
    exif = _exif(text).removeprefix(b"Exif\0\0")
    chunks = image[12:]
    if not chunks.startswith(b"VP8X"):
        with Image.open(io.BytesIO(image)) as picture:
            (width, height), alpha = picture.size, "A" in picture.mode
        flags = 0x10 if alpha else 0
        chunks = _riff(b"VP8X", struct.pack("<I", flags) + _three(width - 1) + _three(height - 1)) + chunks
    chunks = chunks[:8] + bytes([chunks[8] | 0x08]) + chunks[9:] + _riff(b"EXIF", exif)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _riff(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _three(number: int) -> bytes:
    return number.to_bytes(3, "little")


# --- reading


def read_receipt(path: str | Path) -> Receipt:
    """The receipt in a picture's file. Raises UserError for a file that has none, or one that smalti did not write."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
            if picture.format == "PNG":
                text: Any = picture.info.get(_KEYWORD)
            else:
                text = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture in PNG, JPEG or WebP: {error}") from None
    if isinstance(text, bytes) and text.startswith(_NO_CHARACTER_CODE):
        text = text.removeprefix(_NO_CHARACTER_CODE).decode("utf-8", "replace")
    if not isinstance(text, str):
        raise UserError(f"{path} has no receipt: smalti's server writes one into its pictures; editors may drop it")
    return parse_receipt(text, str(path))


def parse_receipt(text: str, source: str) -> Receipt:
    """A receipt from its JSON. source: what messages call it. Raises UserError for anything that stamp would not write.

    That is an unknown or missing field, a value of another type or out of its bounds, and files within.
    """
    if len(text) > _LONGEST:
        raise UserError(f"{source}: the receipt has {len(text)} characters, more than any of smalti's")
    try:
        raw = json.loads(text)
        if isinstance(raw, dict) and raw.get("format") != _FORMAT:
            raise UserError(f"{source}: the receipt has format={raw.get('format')!r}, this smalti reads {_FORMAT}")
        receipt = msgspec.convert(raw, Receipt, strict=True)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: the receipt is damaged: {error}") from None
    order = receipt.order
    unknown = set(raw["order"]) - set(PictureOrder.__struct_fields__)
    if unknown:
        raise UserError(f"{source}: the receipt's order has unknown fields: {', '.join(sorted(unknown))[:200]}")
    if receipt_of(order, model="", version="", smalti="", torch="").order != order:
        raise UserError(f"{source}: the receipt's order has fields that receipts leave out, such as files")
    if not 0 <= order.seed <= _LARGEST_SEED:
        raise UserError(f"{source}: the receipt has seed={order.seed}, which must lie in 0 .. {_LARGEST_SEED}")
    return receipt


# --- drawing again


def order_again(receipt: Receipt, source: bytes | None = None, mask: bytes | None = None) -> PictureOrder:
    """The order that draws a receipt's picture again. source, mask: the files of an edit.

    Raises UserError where a file is missing, is another one, or was not part of it.
    """
    for name, file, wanted in (("source", source, receipt.source_sha256), ("mask", mask, receipt.mask_sha256)):
        if wanted is not None and file is None:
            raise UserError(f"{name} is missing: the picture began from a file of SHA-256 {wanted}, give it again")
        if wanted is None and file is not None:
            raise UserError(f"{name} was given, but the picture began from none")
        if file is not None and _sha256(file) != wanted:
            raise UserError(f"{name} is another file: its SHA-256 is {_sha256(file)}, needed is {wanted}")
    return msgspec.structs.replace(receipt.order, source=source, mask=mask)


def compare(file: bytes, again: bytes) -> Comparison:
    """How a picture drawn again agrees with the first, both with their receipts."""
    if file == again:
        return "same bytes"
    with Image.open(io.BytesIO(file)) as first, Image.open(io.BytesIO(again)) as second:
        if (first.size, first.mode, first.tobytes()) == (second.size, second.mode, second.tobytes()):
            return "same pixels"
    return "different"
