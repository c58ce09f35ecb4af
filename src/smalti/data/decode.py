"""Encoded pictures to pixels: whatever a user's folder holds, as plain 8-bit grey or RGB, upright, without alpha."""

from io import BytesIO
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Fit = Literal["crop", "pad", "stretch"]

MAX_PIXELS = 80_000_000  # a larger picture is refused from its header: decoded, it would take 240 MB and more
MIN_SIDE = 4  # a picture with a shorter side is a spacer or a mistake
MAX_ENLARGEMENT = 8.0  # a picture that must grow more than this to fill its target holds nothing to learn from

_ORIENTATION = 0x0112  # the EXIF tag; 5 .. 8 swap height and width


class UnreadablePicture(Exception):
    """Bytes that are no picture, or none that can be used: the reason, in words. A source skips it and says so."""


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadablePicture(
            f"{width} x {height} pixels: above the limit of {MAX_PIXELS // 1_000_000} megapixels; make it smaller"
        )
    if min(width, height) < MIN_SIDE:
        raise UnreadablePicture(f"{width} x {height} pixels: a side is shorter than {MIN_SIDE}")


def _upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says. Damaged EXIF data does not make a picture unreadable."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Deep grey pixels scaled to 8 bits; other modes as they are. (Pillow itself scales 16-bit colour on reading.)"""
    if picture.mode == "F":
        raise UnreadablePicture("floating-point pixels have no stated range: save it with 8 or 16 bits a channel")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64).clip(min=0)
    # Mode I holds 32-bit integers, but what is written so is nearly always 16-bit data.
    top = 2**16 - 1 if picture.mode != "I" or values.max(initial=0) < 2**16 else 2**31 - 1
    return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))


def _on_white(picture: Image.Image) -> Image.Image:
    """The picture without transparency.

    White, not black: cut-outs and emoji are drawn for light pages, dark outlines vanish on black, and a constant
    background leaves nothing random to learn where the file stores arbitrary colours under alpha 0.
    """
    if not picture.has_transparency_data:
        return picture
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture.convert("RGBA"))
    return page


def decode_picture(data: bytes, channels: int, enough: tuple[int, int] | None = None) -> Tensor:
    """The bytes of a picture file as uint8 [channels, height, width], 1 (grey) or 3 (RGB) channels.

    EXIF orientation is applied, palettes and CMYK become RGB, alpha is composited on white, 16-bit values are scaled
    to 8. Of an animation the first frame is read. Colour profiles are ignored. enough: a (height, width) that suffices;
    JPEG pictures far larger are then decoded at 1/2, 1/4 or 1/8 of their size, in a fraction of the time.

    Raises UnreadablePicture for bytes that are no picture or a truncated one, and for a picture with more than
    MAX_PIXELS pixels (which is not decoded) or a side below MIN_SIDE. Pillow warns besides at its own, larger limit.
    """
    assert channels in (1, 3)
    try:
        with Image.open(BytesIO(data)) as picture:
            _check_size(*picture.size)
            if enough is not None:
                picture.draft(None, (max(enough), max(enough)))  # a square: the EXIF orientation may yet turn it
            picture.load()
            plain = _on_white(_eight_bit(_upright(picture))).convert("L" if channels == 1 else "RGB")
    except UnreadablePicture:
        raise
    except Exception as error:  # Pillow's readers raise whatever their parsers stumble over
        raise UnreadablePicture(_reason(error, data)) from None
    return _to_tensor(plain)


def _reason(error: Exception, data: bytes) -> str:
    if not data:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return "no picture format that Pillow knows"
    return str(error) or type(error).__name__


def picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded picture when upright, from its header alone: the first part of the file may do.

    Raises UnreadablePicture as decode_picture does, where the header tells.
    """
    try:
        with Image.open(BytesIO(data)) as picture:
            width, height = picture.size
            _check_size(width, height)
            turned = _is_turned(picture)
    except UnreadablePicture:
        raise
    except Exception as error:
        raise UnreadablePicture(_reason(error, data)) from None
    return (width, height) if turned else (height, width)


def _is_turned(picture: Image.Image) -> bool:
    """Whether decoding will swap the height and width that the header gives."""
    if picture.format == "TIFF":
        return False  # its reader gives the upright size
    if picture.format == "PNG" and "exif" not in picture.info:
        return False  # asked further, its reader would decode the whole picture to look behind it
    try:
        return picture.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:
        return False


def _to_tensor(picture: Image.Image) -> Tensor:
    array = np.array(picture)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()


def fit_picture(picture: Tensor, height: int, width: int, fit: Fit = "crop") -> Tensor:
    """A picture, uint8 [channels, h, w], as uint8 [channels, height, width], resized by an antialiasing Lanczos filter.

    crop: the largest centred part of the target's shape. pad: all of it, on white. stretch: all of it, distorted.
    Raises UnreadablePicture where it would grow more than MAX_ENLARGEMENT-fold.
    """
    old_height, old_width = picture.shape[1:]
    if (old_height, old_width) == (height, width):
        return picture
    ratios = (height / old_height, width / old_width)
    factor = min(ratios) if fit == "pad" else max(ratios)
    if factor > MAX_ENLARGEMENT:
        raise UnreadablePicture(
            f"{old_width} x {old_height} pixels would be enlarged {factor:.0f}-fold for {width} x {height}; "
            f"at most {MAX_ENLARGEMENT:.0f}-fold is done"
        )
    array = picture.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else np.ascontiguousarray(array))
    lanczos = Image.Resampling.LANCZOS
    if fit == "crop":
        return _to_tensor(ImageOps.fit(image, (width, height), lanczos))
    if fit == "pad":
        return _to_tensor(ImageOps.pad(image, (width, height), lanczos, color="white"))
    return _to_tensor(image.resize((width, height), lanczos))


def grey_or_rgb(pictures: Tensor, channels: int) -> Tensor:
    """uint8 pictures [rows, 1 or 3, height, width] with 1 or 3 channels; grey is Rec. 601 luma, as Pillow's."""
    if pictures.shape[1] == channels:
        return pictures
    if channels == 3:
        return pictures.expand(-1, 3, -1, -1)
    luma = torch.tensor([0.299, 0.587, 0.114])
    return torch.einsum("c,bchw->bhw", luma, pictures.float()).round().to(torch.uint8)[:, None]
