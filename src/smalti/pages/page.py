"""The page that reports share: its style, light and dark, wide and narrow."""

from importlib.resources import files
from typing import Any

from smalti.errors import UserError


def render_page(template: str, **values: Any) -> str:
    """A report as HTML. template: jinja2's text, which extends "page" and fills its blocks `title` and `body`.

    Every value is escaped unless the template says otherwise. Raises UserError where jinja2 is missing.
    """
    try:
        from jinja2 import DictLoader, Environment, StrictUndefined
    except ImportError:
        raise UserError("the report needs jinja2: pip install jinja2") from None
    page = (files("smalti.pages") / "page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        loader=DictLoader({"page": page, "report": template}),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report").render(**values)
