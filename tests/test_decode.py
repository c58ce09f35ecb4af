"""Decoding: every mode that Pillow writes, orientation, and bytes that are no picture; fitting to a size."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smalti.data.decode import (
    MAX_PIXELS,
    UnreadablePicture,
    decode_picture,
    fit_picture,
    grey_or_rgb,
    picture_size,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged EXIF data and TIFF tags

HEIGHT, WIDTH = 6, 8


def encoded(picture, kind="PNG", **options):
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def colours():
    """RGB, uint8 [6, 8, 3], no two pixels alike."""
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def arrays_equal(picture, array):
    return torch.equal(picture, torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1))


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_colour_is_read_exactly(kind):
    assert arrays_equal(decode_picture(encoded(Image.fromarray(colours()), kind), 3), colours())


def test_grey_and_colour_become_each_other():
    grey = Image.fromarray(colours()).convert("L")
    assert torch.equal(decode_picture(encoded(grey), 3), decode_picture(encoded(grey), 1).expand(3, -1, -1))
    from_colour = decode_picture(encoded(Image.fromarray(colours())), 1)
    assert torch.equal(from_colour[0], torch.from_numpy(np.array(grey)))
    luma = grey_or_rgb(decode_picture(encoded(Image.fromarray(colours())), 3)[None], 1)[0]
    assert (luma.int() - from_colour.int()).abs().max() <= 1


def test_palette():
    palette = Image.fromarray(colours()).quantize(16)
    assert arrays_equal(decode_picture(encoded(palette), 3), np.array(palette.convert("RGB")))


def test_one_bit():
    bits = Image.fromarray(colours()).convert("1")
    assert set(decode_picture(encoded(bits), 1).unique().tolist()) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode):
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, : WIDTH // 2] = 255
    alpha[:, WIDTH // 2] = 51
    picture = Image.fromarray(colours()).convert(mode[:-1])
    opaque = np.array(picture.convert("RGB")).astype(float)
    picture.putalpha(Image.fromarray(alpha))
    assert picture.mode == mode
    decoded = decode_picture(encoded(picture), 3).permute(1, 2, 0).numpy()
    assert np.array_equal(decoded[:, : WIDTH // 2], opaque[:, : WIDTH // 2])
    assert (decoded[:, WIDTH // 2 + 1 :] == 255).all()
    assert np.abs(decoded[:, WIDTH // 2] - (0.2 * opaque[:, WIDTH // 2] + 0.8 * 255)).max() <= 1


def test_transparent_palette_entry_is_white():
    palette = Image.fromarray(colours()).quantize(16)
    hidden = np.array(palette) == 3
    decoded = decode_picture(encoded(palette, transparency=3), 3).permute(1, 2, 0).numpy()
    assert (decoded[hidden] == 255).all()
    assert np.array_equal(decoded[~hidden], np.array(palette.convert("RGB"))[~hidden])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    decoded = decode_picture(encoded(Image.fromarray(values), kind), 1)[0].numpy()
    assert np.array_equal(decoded, np.round(values / 257))
    assert np.array_equal(decode_picture(encoded(Image.fromarray(values), kind), 3)[2].numpy(), decoded)


def test_sixteen_bit_colour():
    values = np.linspace(0, 65535, HEIGHT * WIDTH * 3).astype(">u2").reshape(HEIGHT, WIDTH, 3)
    lines = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    decoded = decode_picture(data, 3).permute(1, 2, 0).numpy()
    assert np.abs(decoded - values / 257).max() <= 1


def test_32_bit_integers_are_scaled_by_what_they_hold():
    sixteen = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.int32).reshape(HEIGHT, WIDTH)
    assert decode_picture(encoded(Image.fromarray(sixteen), "TIFF"), 1).max() == 255
    wide = np.full((HEIGHT, WIDTH), 2**30, np.int32)
    assert decode_picture(encoded(Image.fromarray(wide), "TIFF"), 1).unique().tolist() == [128]


def test_cmyk():
    cmyk = Image.fromarray(colours()).convert("CMYK")
    decoded = decode_picture(encoded(cmyk, "TIFF"), 3).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(decoded - colours()).max() <= 1  # of an RGB made CMYK, the conversion back is exact up to rounding
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
    red = decode_picture(encoded(flat, "JPEG", quality=95), 3)
    assert red[0].min() > 245
    assert red[1:].max() < 10


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_orientation(orientation, kind):
    """A corner block of red and one of blue lie where the orientation puts them."""
    stored = np.full((32, 64, 3), 255, np.uint8)
    stored[:8, :16] = (255, 0, 0)  # the stored picture's top left
    stored[-8:, :16] = (0, 0, 255)  # its bottom left
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), kind, exif=exif)
    decoded = decode_picture(data, 3)
    assert picture_size(data) == tuple(decoded.shape[1:]) == ((64, 32) if orientation > 4 else (32, 64))

    def colour_at(corner):
        y, x = (2 if "top" in corner else -3), (2 if "left" in corner else -3)
        red, _, blue = (decoded[:, y, x] > 128).tolist()
        return {(True, False): "red", (False, True): "blue"}.get((red, blue), "white")

    # Where the stored first row and first column end up: TIFF 6.0, tag Orientation.
    places = {
        1: ("top left", "bottom left"), 2: ("top right", "bottom right"), 3: ("bottom right", "top right"),
        4: ("bottom left", "top left"), 5: ("top left", "top right"), 6: ("top right", "top left"),
        7: ("bottom right", "bottom left"), 8: ("bottom left", "bottom right"),
    }  # fmt: skip
    red, blue = places[orientation]
    assert (colour_at(red), colour_at(blue)) == ("red", "blue")


def test_damaged_exif_does_not_matter():
    data = encoded(Image.fromarray(colours()), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff rubbish")
    assert decode_picture(data, 3).shape == (3, HEIGHT, WIDTH)
    assert picture_size(data) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_truncation_is_refused_and_none_crashes(kind):
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for length in np.linspace(0, 0.8 * len(data), 40).astype(int):
        with pytest.raises(UnreadablePicture):
            decode_picture(data[:length], 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"]), at=st.floats(0, 1), value=st.integers(0, 255))
def test_a_changed_byte_gives_a_picture_or_a_refusal(kind, at, value):
    data = bytearray(encoded(Image.fromarray(colours()), kind))
    data[int(at * (len(data) - 1))] = value
    try:
        decoded = decode_picture(bytes(data), 3)
    except UnreadablePicture:
        return
    assert decoded.dtype == torch.uint8
    assert decoded.shape[0] == 3


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty file"),
        (b"not a picture at all", "no picture format"),
        (png_header(10_000, 10_000), f"limit of {MAX_PIXELS // 1_000_000} megapixels"),
        (png_header(100_000, 100_000), "pixel"),
        (encoded(Image.new("RGB", (1, 1))), "shorter than 4"),
        (encoded(Image.new("RGB", (100, 1))), "shorter than 4"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "floating-point"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_refused_and_why(data, says):
    with pytest.raises(UnreadablePicture, match=says):
        decode_picture(data, 3)
    if "floating" not in says:
        with pytest.raises(UnreadablePicture, match=says):
            picture_size(data)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_pillows_bomb_warning_as_an_error_is_a_refusal_too():
    with pytest.raises(UnreadablePicture):
        decode_picture(png_header(10_000, 10_000), 3)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_picture(data, 3)[:, 0, 0].tolist() == [255, 0, 0]


def test_large_jpegs_are_decoded_small_enough_and_no_smaller():
    smooth = np.zeros((600, 1000, 3), np.uint8)
    smooth[..., 0] = np.linspace(0, 255, 1000)[None]
    smooth[..., 1] = np.linspace(0, 255, 600)[:, None]
    data = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    reduced = decode_picture(data, 3, enough=(128, 128))
    assert reduced.shape == (3, 150, 250)
    both = [fit_picture(picture, 64, 64).int() for picture in (reduced, decode_picture(data, 3))]
    assert (both[0] - both[1]).abs().max() <= 3


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(16, 16), (16, 32), (64, 8), (50, 41)])
def test_fit_gives_the_size(fit, size):
    picture = torch.randint(0, 256, (3, 37, 61), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert fit_picture(picture, *size, fit).shape == (3, *size)
    assert fit_picture(picture[:1], *size, fit).shape == (1, *size)
    assert torch.equal(fit_picture(picture, 37, 61, fit), picture)


def test_crop_keeps_the_centre_and_pad_keeps_all():
    picture = torch.full((3, 20, 60), 100, dtype=torch.uint8)
    picture[:, :, :15] = 0  # what a centre crop to a square leaves away
    picture[:, :, -15:] = 0
    assert (fit_picture(picture, 10, 10, "crop")[:, :, 1:-1] == 100).all()
    padded = fit_picture(picture, 60, 60, "pad")
    assert (padded[:, :20] == 255).all()
    assert (padded[:, 40:] == 255).all()
    assert torch.equal(padded[:, 20:40], picture)
    assert fit_picture(picture, 20, 20, "stretch")[:, :, :3].max() < 30


def test_reducing_averages_what_it_leaves_out():
    """A fine chequerboard becomes its mean; picking single pixels would give black or white."""
    board = torch.tensor(np.indices((64, 64)).sum(0) % 2 * 255, dtype=torch.uint8).expand(3, -1, -1)
    reduced = fit_picture(board.contiguous(), 16, 16).float()
    assert (reduced[:, 2:-2, 2:-2] - 127.5).abs().max() < 2


def test_a_picture_far_too_small_is_refused():
    with pytest.raises(UnreadablePicture, match="enlarged 16-fold for 64 x 64; at most 8-fold"):
        fit_picture(torch.zeros(3, 4, 4, dtype=torch.uint8), 64, 64)
