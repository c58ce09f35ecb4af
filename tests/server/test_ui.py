"""The page at /ui in headless Chromium, over a real server on loopback."""

import asyncio
import io
import shutil
import socket
import threading
import time

import pytest
from PIL import Image
from server.double_service import DoubleService, DoubleTicket, card, picture

from smalti.errors import UserError
from smalti.serving.drawing import Watched, watch
from smalti.serving.messages import Failed, PictureOrder
from smalti.serving.service import QueueFull
from smalti.serving.ui_pieces import caption, difference, error_line, progress_strip, status_line

# Gradio's own statistics of its queue.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:gradio", "ignore:.*silent_downcasting", "ignore:The copy keyword"
)
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
        return dict(service.live)  # its tasks are cancelled, and leave it, when the loop ends

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


class Behind:
    """A service that stands for the one that a test puts behind the page."""

    def __init__(self):
        self.service = DoubleService()

    def cards(self):
        return self.service.cards()

    def submit(self, model, orders):
        return self.service.submit(model, orders)


def eventually(check, seconds=8.0):
    """Wait for the truth."""
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, f"not in {seconds} s: {check}"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="module")
def served():
    """The page, on a server of its own thread: its address and what stands behind it."""
    pytest.importorskip("gradio")
    import uvicorn
    from fastapi import FastAPI

    from smalti.serving.ui import mount_page

    app, behind = FastAPI(), Behind()
    mount_page(app, behind)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/ui/", behind
    server.should_exit = True
    thread.join(5)


@pytest.fixture(scope="module")
def visits():
    """A browser, which keeps the page's scripts between visits."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium.new_context(accept_downloads=True)
        chromium.close()


@pytest.fixture
def visit(served, visits):
    """Opens the page on a service, at a width."""
    address, behind = served
    opened = []

    def open_page(service, width=1280):
        behind.service = service
        opened.append(Visit(visits, address, width))
        return opened[-1]

    yield open_page
    for one in opened:
        one.page.close()
        assert one.complaints == []
        assert one.hosts <= {address.split("/")[2], "data"}


class Visit:
    """A page of the browser, with what it asked for and what it complained of."""

    def __init__(self, context, address, width):
        self.page = context.new_page()
        self.page.set_viewport_size({"width": width, "height": 900})
        self.hosts, self.complaints = set(), []
        self.page.on("request", lambda r: self.hosts.add(r.url.split("/")[2] if r.url.startswith("http") else "data"))
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
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


def test_drawing_with_previews_and_a_gallery(visit, tmp_path):
    service = OneAtATime(step_seconds=0.02)
    open_page = visit(service)
    open_page.page.get_by_label("7", exact=True).locator("visible=true").check()
    open_page.enter("Steps", 30)
    open_page.enter("Seed", 41)
    open_page.press("Draw")
    eventually(lambda: "1 before it" in open_page.page.locator(".strip").inner_text())
    first = eventually(open_page.previews)
    eventually(lambda: (now := open_page.previews()) and now[0] != first[0])
    eventually(lambda: len(open_page.results()) == 4)
    orders = [order for _, order in service.orders]
    assert [order.seed for order in orders] == [41, 42, 43, 44]
    assert {(order.class_label, order.num_inference_steps) for order in orders} == {(7, 30)}
    assert "4 of 4 drawn" in open_page.status()
    assert "seed 43, label 7" in open_page.page.locator(".results").inner_text()
    open_page.page.locator(".results button.thumbnail-item").first.click()
    with open_page.page.expect_download() as download:
        open_page.page.get_by_label("Download").locator("visible=true").click()
    download.value.save_as(tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes() == picture(orders[0], card().version)
    assert download.value.suggested_filename == "digits-0123456789ab-seed-41.png"


def test_cancel_and_a_closed_tab_stop_the_work(visit):
    service = DoubleService(step_seconds=0.2)
    open_page = visit(service)
    open_page.press("Draw")
    eventually(lambda: len(service.live) == 4)
    open_page.press("Cancel")
    eventually(lambda: "4 cancelled" in open_page.status())
    eventually(lambda: not service.live)
    open_page.press("Draw")
    eventually(lambda: len(service.live) == 4)
    open_page.page.close()
    eventually(lambda: not service.live, 3.5)  # they would take 4 s


def test_waiting_and_a_full_queue_are_told(visit):
    service = OneAtATime(step_seconds=0.05, room=5)
    first, second = visit(service), visit(service)
    first.press("Draw")
    eventually(lambda: len(service.live) == 4)
    second.press("Draw")
    eventually(lambda: second.status() == "the queue is full: try again in 2 s")
    second.enter("Pictures", 1)
    second.press("Draw")
    eventually(lambda: second.status().endswith("before yours"))


@pytest.mark.parametrize("width", [1280, 400])
def test_comparing_two_versions(visit, width):
    service = DoubleService(card(), card(version="fedcba987654"), step_seconds=0.002)
    open_page = visit(service, width)
    assert open_page.overflow() <= 0
    open_page.page.get_by_role("tab", name="Compare").click()
    open_page.enter("Seed", 7)
    open_page.press("Compare")
    eventually(lambda: len(open_page.results()) == 3)
    assert open_page.overflow() <= 0
    shown = open_page.page.locator(".results").locator("visible=true").inner_text()
    assert "A: digits@0123456789ab" in shown
    assert "B: digits@fedcba987654" in shown
    assert "mean difference" in open_page.status()
    drawn = {(key, order.seed) for key, order in service.orders}
    assert drawn == {("digits@0123456789ab", 7), ("digits@fedcba987654", 7)}


def test_a_model_that_reads_prompts(visit):
    service = DoubleService(card("emoji", num_classes=0, reads_prompts=True), step_seconds=0.001)
    open_page = visit(service)
    open_page.enter("Prompt", "a red heart")
    open_page.enter("Pictures", 1)
    open_page.press("Draw")
    eventually(open_page.results)
    assert service.orders[0][1].prompt == "a red heart"
    assert service.orders[0][1].class_label is None


def test_only_what_the_page_needs_is_there(served):
    httpx = pytest.importorskip("httpx")
    address, _ = served
    upload = httpx.post(f"{address}gradio_api/upload", files={"files": b"x" * 1000})
    fetched = httpx.get(f"{address}gradio_api/file=http://127.0.0.1:1/x")
    read = httpx.get(f"{address}gradio_api/file=/etc/hostname")
    assert {upload.status_code, fetched.status_code, read.status_code} == {404}
