"""What the page at /ui shows of pictures: text, a strip of previews, the difference of two. Pure functions."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

from smalti.errors import UserError
from smalti.serving.drawing import Watched
from smalti.serving.messages import Failed, Finished
from smalti.serving.service import Unavailable

STYLE = """
.gradio-container { max-width: 1200px !important; }
.strip { display: flex; flex-wrap: wrap; gap: 8px; }
.strip figure { margin: 0; width: 112px; }
.strip img, .strip .blank { display: block; width: 112px; height: 112px; object-fit: contain; border-radius: 4px;
  background: var(--background-fill-secondary); }
.strip figcaption { font-size: 12px; }
.failed { color: var(--error-text-color, #b91c1c); }
"""
SMALL_PICTURES = ".strip img, .results img { image-rendering: pixelated; }"

_PREVIEW_PIXELS = 224  # twice what is shown, for fine screens


def error_line(error: UserError | Unavailable) -> str:
    """What went wrong and what to do, as one line of HTML."""
    text = str(error)
    if isinstance(error, Unavailable):
        text += f": try again in {max(1, math.ceil(error.retry_after))} s"
    return f'<span class="failed">{escape(text)}</span>'


def status_line(pictures: Sequence[Watched], seconds: float) -> str:
    """How far the pictures are, as one line of HTML; failures are told one by one."""
    open_ = [picture for picture in pictures if picture.end is None]
    failed = [(p.order.seed, p.end) for p in pictures if isinstance(p.end, Failed)]
    done = sum(isinstance(picture.end, Finished) for picture in pictures)
    places = [place for picture in open_ if (place := picture.ticket.place) is not None]
    parts = []
    if places and min(places) > 0:
        before = min(places)
        parts.append(
            f"waiting: {before} picture{'s' if before > 1 else ''} before {'yours' if done == 0 else 'the next'}"
        )
    elif open_:
        parts.append(f"drawing: {done} of {len(pictures)} done")
    cancelled = sum(end.code == "cancelled" for _, end in failed)
    if cancelled:
        parts.append(f"{cancelled} cancelled")
    if not open_:
        versions = ", ".join(dict.fromkeys(picture.ticket.card.key for picture in pictures))
        parts.append(f"{done} of {len(pictures)} drawn in {seconds:.1f} s by {versions}")
    parts += [
        f'<span class="failed">seed {seed}: {escape(end.message)}</span>'
        for seed, end in failed
        if end.code != "cancelled"
    ]
    return "; ".join(parts)


def caption(picture: Watched) -> str:
    """The seed and what the picture was to show."""
    order = picture.order
    asked = f"label {order.class_label}" if order.class_label is not None else order.prompt
    return f"seed {order.seed}" + (f", {asked}" if asked else "")


def progress_strip(pictures: Sequence[Watched]) -> str:
    """A figure for each picture that has not ended: its newest preview and how far it is."""
    figures = [_figure(picture) for picture in pictures if picture.end is None]
    return f'<div class="strip">{"".join(figures)}</div>' if figures else ""


def _figure(picture: Watched) -> str:
    place, preview = picture.ticket.place, picture.preview
    image, far = '<div class="blank"></div>', f"{place} before it" if place else "begins"
    if preview is not None:
        image = f'<img alt="preview" src="{_data_url(preview.image)}">'
        far = f"call {preview.call} of {preview.calls}"
    return f"<figure>{image}<figcaption>seed {picture.order.seed}: {far}</figcaption></figure>"


def _data_url(picture: bytes) -> str:
    """The picture inside the page itself, made smaller where it is large: previews are sent many times."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        mime = image.get_format_mimetype()
        if max(image.size) > _PREVIEW_PIXELS:
            smaller, file = image.convert("RGB"), io.BytesIO()
            smaller.thumbnail((_PREVIEW_PIXELS, _PREVIEW_PIXELS))
            smaller.save(file, "jpeg", quality=80)
            picture, mime = file.getvalue(), "image/jpeg"
    return f"data:{mime};base64,{base64.b64encode(picture).decode()}"


def difference(first: bytes, second: bytes) -> tuple[bytes | None, str]:
    """|first - second| as a PNG, brightened until its largest value is white, and what it says.

    No picture where the two have different sizes.
    """
    from PIL import Image, ImageChops, ImageStat

    with Image.open(io.BytesIO(first)) as a, Image.open(io.BytesIO(second)) as b:
        if a.size != b.size:
            return None, f"no difference picture: A is {a.width} x {a.height}, B is {b.width} x {b.height}"
        apart = ImageChops.difference(a.convert("RGB"), b.convert("RGB"))
    statistics = ImageStat.Stat(apart)
    largest = max(high for _, high in statistics.extrema)
    mean = sum(statistics.mean) / 3
    gain = 255 / largest if largest else 1.0
    file = io.BytesIO()
    apart.point(lambda value: round(value * gain)).save(file, "png")
    said = f"mean difference {mean:.2f} of 255, shown x {gain:.1f}" if largest else "no difference: the same pixels"
    return file.getvalue(), said
