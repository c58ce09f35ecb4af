"""The page at /ui in headless Chromium, over a real server on loopback."""

import asyncio
import io
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from serving.double_service import DoubleService, DoubleTicket, card, picture

from smalti.errors import UserError
from smalti.serving.drawing import Watched, watch
from smalti.serving.messages import Failed, Finished, PictureOrder
from smalti.serving.service import QueueFull
from smalti.serving.ui_pieces import caption, difference, error_line, progress_strip, status_line

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# --- what the page shows


def watched(seed=3, **end) -> Watched:
    ticket = DoubleTicket(1, card())
    return Watched(PictureOrder(seed=seed, class_label=7), ticket, **end)


def test_errors_say_what_to_do():
    assert "no &lt;room&gt;: try again in 3 s" in error_line(QueueFull("no <room>", 2.2))
    assert "seed=-1" in error_line(UserError("seed=-1 must be above 0"))


def test_the_difference_of_two_pictures():
    def grey(value, size=(4, 4)):
        file = io.BytesIO()
        Image.new("L", size, value).save(file, "png")
        return file.getvalue()

    shown, said = difference(grey(10), grey(61))
    assert Image.open(io.BytesIO(shown)).getpixel((0, 0)) == (255, 255, 255)
    assert said == "mean difference 51.00 of 255, shown x 5.0"
    assert difference(grey(10), grey(10))[1] == "no difference: the same pixels"
    assert difference(grey(10), grey(10, (2, 2)))[0] is None


def test_the_status_tells_of_ends():
    failed, cancelled = Failed(1, "not_finite", "NaN <here>"), Failed(1, "cancelled", "cancelled")
    line = status_line([watched(3, end=failed), watched(4, end=cancelled)], 1.0)
    assert "1 cancelled" in line
    assert "seed 3: NaN &lt;here&gt;" in line
    assert "seed 4" not in line
    assert caption(watched(5)) == "seed 5, label 7"


def test_large_previews_are_made_smaller():
    from smalti.serving.messages import Preview

    file = io.BytesIO()
    Image.effect_noise((512, 512), 50).save(file, "png")
    strip = progress_strip([watched(preview=Preview(1, 0, 4, 20, file.getvalue()))])
    assert "call 4 of 20" in strip
    assert len(strip) < 40_000 < len(file.getvalue())


# --- watching


def test_who_stops_to_watch_cancels():
    async def run():
        service = DoubleService(step_seconds=0.01)
        order = PictureOrder(seed=1, partial_images=3)
        news = watch([Watched(order, ticket) for ticket in service.submit("digits", [order, order])])
        async for now in news:
            if now[0].preview is not None:
                break
        await news.aclose()
        await asyncio.sleep(0.05)
        return service.live

    assert asyncio.run(run()) == {}


def test_watching_ends_where_the_events_break():
    class Broken(DoubleTicket):
        async def events(self):
            raise RuntimeError("the worker's pipe")
            yield

    async def run():
        return [now async for now in watch([Watched(PictureOrder(), Broken(1, card()))])][-1]

    assert asyncio.run(run())[0].end.message == "the worker's pipe"


# --- the page


class OneAtATime(DoubleService):
    """A double whose pictures wait for each other."""

    def __init__(self, *cards, **settings):
        super().__init__(*cards, **settings)
        self.turn = asyncio.Lock()

    def submit(self, model, orders):
        tickets = super().submit(model, orders)
        for ticket in tickets:
            ticket.__class__ = _Queued
            ticket.line = self.live
        return tickets

    async def _draw(self, ticket, order):
        async with self.turn:
            await super()._draw(ticket, order)


class _Queued(DoubleTicket):
    @property
    def place(self):
        return None if self.ended else sum(n < self.number for n in self.line)


@contextmanager
def serving(service):
    """The page's address, served from a thread of its own."""
    import uvicorn
    from fastapi import FastAPI

    from smalti.serving.ui import mount_page

    app = FastAPI()
    mount_page(app, service)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/ui/"
    server.should_exit = True
    thread.join(5)


def eventually(check, seconds=8.0):
    """Wait for the truth."""
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, f"not in {seconds} s: {check}"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio")
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """A page of the browser, with what it asked for and what it complained of."""

    def __init__(self, browser, address, width=1280):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        self.page = self.context.new_page()
        self.hosts, self.complaints = set(), []
        self.page.on("request", lambda r: self.hosts.add(r.url.split("/")[2] if r.url.startswith("http") else "data"))
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.paths = set(); self.page.on("response", lambda r: self.paths.add((r.request.method, r.status, r.url.split("?")[0].split("/",3)[3].split("assets")[0])))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.goto(address)
        self.page.get_by_role("button", name="Draw").wait_for()
        eventually(lambda: self.page.get_by_label("Solver").first.input_value())

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    def enter(self, label, value):
        self.page.get_by_label(label).locator("visible=true").first.fill(str(value))
        self.page.keyboard.press("Tab")

    def status(self):
        return self.page.locator(".prose.status").locator("visible=true").inner_text()

    def previews(self):
        return self.page.eval_on_selector_all(".strip img", "images => images.map(image => image.src)")

    def results(self):
        images = self.page.locator(".results button.thumbnail-item img").locator("visible=true")
        return [images.nth(i).get_attribute("src") for i in range(images.count())]

    def overflow(self):
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
