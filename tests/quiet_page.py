"""A page in Chromium that says nothing on its console and asks nobody for anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def quiet_page(browser: Any, path: Path, width: int, scheme: str) -> Iterator[Any]:
    """The page of a file, loaded. What it complained of or asked for fails the test at the end."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    yield page
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


def lowest_label(page: Any) -> float:
    """Height in pixels of the lowest text in the page's charts."""
    script = "all => Math.min(...all.map(t => t.getBoundingClientRect().height).filter(h => h > 0))"
    return float(page.eval_on_selector_all("svg text", script))
