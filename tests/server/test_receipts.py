"""Receipts: what is written is read back, the pixels are not touched, and nothing else is taken for one."""

import hashlib
import io
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smalti.errors import UserError
from smalti.serving.messages import PictureOrder
from smalti.serving.receipts import compare, order_again, parse_receipt, read_receipt, receipt_of, stamp

FORMATS = ("png", "jpeg", "webp")
MADE_BY = dict(model="digits", version="0123456789ab", smalti="0.1.0", torch="2.13.0")


def file_of(kind: str, mode: str = "RGB", size: tuple[int, int] = (9, 7), **options) -> bytes:
    file = io.BytesIO()
    gradient = Image.linear_gradient("L").resize(size)
    drawn = gradient.convert(mode)
    if mode == "RGBA":
        drawn.putalpha(gradient)
    drawn.save(file, kind, **options)
    return file.getvalue()


def read_back(image: bytes, tmp_path, name="picture"):
    path = tmp_path / name
    path.write_bytes(image)
    return read_receipt(path)


orders = st.builds(
    PictureOrder,
    seed=st.integers(0, 2**63 - 1),
    class_label=st.none() | st.integers(0, 999),
    prompt=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    num_inference_steps=st.none() | st.integers(1, 1000),
    guidance_scale=st.none() | st.floats(0, 100),
    solver=st.sampled_from([None, "ddim"]),
    solver_options=st.dictionaries(st.sampled_from(["eta", "churn", "clip"]), st.booleans() | st.floats(0, 1)),
    image_size=st.none() | st.tuples(st.integers(1, 99), st.integers(1, 99)),
    strength=st.floats(0.01, 1),
    output_format=st.sampled_from(FORMATS),
    request_id=st.sampled_from(["", "req_0123"]),
    index=st.integers(0, 9),
)


@settings(max_examples=60, deadline=None)
@given(order=orders, size=st.tuples(st.integers(1, 40), st.integers(1, 40)), mode=st.sampled_from(["L", "RGB", "RGBA"]))
def test_what_is_stamped_is_read_back(order, size, mode, tmp_path_factory):
    kind = order.output_format
    mode = "RGB" if kind == "jpeg" and mode == "RGBA" else mode
    plain = file_of(kind, mode, size)
    receipt = receipt_of(order, **MADE_BY)
    stamped = stamp(plain, receipt)
    path = tmp_path_factory.getbasetemp() / "stamped"
    path.write_bytes(stamped)
    assert read_receipt(path) == receipt
    assert order_again(read_receipt(path)) == order
    with Image.open(io.BytesIO(plain)) as before, Image.open(path) as after:
        assert (after.size, after.mode, after.format) == (before.size, before.mode, before.format)
        assert after.tobytes() == before.tobytes()
    assert stamp(plain, receipt) == stamped


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": False}, {"icc_profile": b"x" * 130}])
def test_every_kind_of_webp(options, tmp_path):
    receipt = receipt_of(PictureOrder(seed=3), **MADE_BY)
    for mode in ("RGB", "RGBA"):
        plain = file_of("webp", mode, **options)
        stamped = stamp(plain, receipt)
        assert read_back(stamped, tmp_path) == receipt
        assert (stamped[12:16], bool(stamped[20] & 0x10)) == (b"VP8X", mode == "RGBA")
        with Image.open(io.BytesIO(plain)) as before, Image.open(tmp_path / "picture") as after:
            assert (after.mode, after.tobytes()) == (before.mode, before.tobytes())


def test_what_a_receipt_leaves_out():
    order = PictureOrder(
        seed=1, tenant="studio", weight=3.0, deadline_seconds=9.0, partial_images=2, fault="nan", source=b"a", mask=b"b"
    )
    receipt = receipt_of(order, **MADE_BY)
    assert receipt.order == PictureOrder(seed=1)
    assert b"studio" not in msgspec.json.encode(receipt)
    assert receipt.source_sha256 == hashlib.sha256(b"a").hexdigest()


def test_the_files_of_an_edit_must_be_given_again():
    receipt = receipt_of(PictureOrder(seed=1, source=b"a", mask=b"b", strength=0.5), **MADE_BY)
    assert order_again(receipt, b"a", b"b") == PictureOrder(seed=1, source=b"a", mask=b"b", strength=0.5)
    for files, message in (((), "source is missing"), ((b"a",), "mask is missing"), ((b"x", b"b"), "is another file")):
        with pytest.raises(UserError, match=message):
            order_again(receipt, *files)
    with pytest.raises(UserError, match="mask was given"):
        order_again(receipt_of(PictureOrder(source=b"a"), **MADE_BY), b"a", b"b")


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_without_a_receipt(kind, tmp_path):
    with pytest.raises(UserError, match=r"picture has no receipt"):
        read_back(file_of(kind), tmp_path)


@pytest.mark.parametrize("damaged", [b"", b"text", file_of("png")[:40], file_of("webp")[:20], file_of("gif")])
def test_files_that_are_no_pictures(damaged, tmp_path):
    with pytest.raises(UserError, match="picture"):
        read_back(damaged, tmp_path)


def good() -> dict:
    return json.loads(msgspec.json.encode(receipt_of(PictureOrder(seed=5), **MADE_BY)))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"extra": 1},
        {"version": 3},
        {"order": None},
        {"order": {"seed": "5"}},
        {"order": {"seed": -1}},
        {"order": {"seed": 2**63}},
        {"order": {"sed": 5}},
        {"order": {"source": "QQ=="}},
        {"order": {"fault": "abort"}},
        {"order": {"tenant": "studio"}},
        {"order": {"output_format": "gif"}},
    ],
)
def test_receipts_that_stamp_would_not_write(change):
    assert parse_receipt(json.dumps(good()), "a.png").order.seed == 5
    with pytest.raises(UserError, match=r"^a\.png: the receipt"):
        parse_receipt(json.dumps(good() | change), "a.png")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10_000, "null", "1" * 5000, "x" * (2**20 + 1)])
def test_texts_that_are_no_receipts(text):
    with pytest.raises(UserError, match=r"^a\.png: the receipt"):
        parse_receipt(text, "a.png")


def test_a_jpeg_says_where_a_receipt_is_too_long():
    receipt = receipt_of(PictureOrder(prompt="x" * 70_000), **MADE_BY)
    with pytest.raises(UserError, match="ask for PNG"):
        stamp(file_of("jpeg"), receipt)
    longest = receipt_of(PictureOrder(prompt="\x01" * 4000, negative_prompt="\x01" * 4000), **MADE_BY)
    stamp(file_of("jpeg"), longest)  # the longest prompts that requests can have


def test_compare():
    receipt, other = (receipt_of(PictureOrder(), **MADE_BY | {"torch": torch}) for torch in ("2.13.0", "2.14.0"))
    plain = file_of("png")
    assert compare(stamp(plain, receipt), stamp(plain, receipt)) == "same bytes"
    assert compare(stamp(plain, receipt), stamp(plain, other)) == "same pixels"
    assert compare(stamp(plain, receipt), stamp(file_of("png", size=(9, 8)), receipt)) == "different"
    assert compare(stamp(plain, receipt), stamp(file_of("png", "L"), receipt)) == "different"
    for mode, pixel in (("RGB", (1, 2, 3)), ("RGBA", (1, 2, 3, 255))):
        changed = Image.linear_gradient("L").resize((9, 7)).convert(mode)
        changed.putpixel((8, 6), pixel)
        file = io.BytesIO()
        changed.save(file, "png")
        assert compare(file_of("png", mode), file.getvalue()) == "different"
