"""The page at /ui: draw, watch, compare. It talks to the service in its own process.

The page loads nothing from other hosts and tells nobody of its use. Its pictures are files in Gradio's temporary folder
($GRADIO_TEMP_DIR) for a day, so that a browser can fetch and download them.
"""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smalti.errors import UserError
from smalti.serving.access import Caller, caller_of
from smalti.serving.drawing import Watched, watch
from smalti.serving.messages import Finished, ModelCard, PictureOrder
from smalti.serving.service import PictureService, Ticket, Unavailable
from smalti.serving.ui_pieces import (
    SMALL_PICTURES,
    STYLE,
    caption,
    difference,
    error_line,
    progress_strip,
    status_line,
)

if TYPE_CHECKING:
    import gradio
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

# No progress bar over the outputs, and no entry in Gradio's own API, which would go around the server's.
_UNSEEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_FONTS = ("system-ui", "sans-serif")
_MONO_FONTS = ("ui-monospace", "monospace")
_PARTIAL_IMAGES = 6
_DAY = 86_400
_KEPT = 32  # pictures of earlier draws that stay in the gallery
_RADIO_LABELS = 20  # more classes than this are asked for by number
_SMALL = 64  # pixels; pictures up to this are shown without smoothing


@dataclass(frozen=True)
class _Sampler:
    """The inputs that say how to sample."""

    model: str | None
    solver: str | None
    steps: float
    guidance: float


@dataclass(frozen=True)
class _Subject:
    """The inputs that say what to draw. picked and typed are the label, of few classes and of many."""

    prompt: str
    negative_prompt: str
    picked: int | None
    typed: float | None


@dataclass(frozen=True)
class _Visit:
    """Who pressed a button. tab: the browser tab's name in Gradio."""

    tab: str | None
    caller: Caller


def _order(
    card: ModelCard, subject: _Subject, sampler: _Sampler, seed: int, index: int, caller: Caller
) -> PictureOrder:
    """The order for a card, of which it gets what it reads."""
    label = subject.picked if card.num_classes <= _RADIO_LABELS else subject.typed
    return PictureOrder(
        seed=seed,
        class_label=int(label) if card.num_classes and label is not None else None,
        prompt=subject.prompt if card.reads_prompts else None,
        negative_prompt=(subject.negative_prompt or None) if card.reads_prompts else None,
        solver=sampler.solver,
        num_inference_steps=int(sampler.steps),
        guidance_scale=float(sampler.guidance),
        partial_images=max(0, min(_PARTIAL_IMAGES, int(sampler.steps) - 1)),
        tenant=caller.tenant,
        weight=caller.weight,
        request_id=caller.request_id,
        index=index,
    )


class OnlyWhatThePageNeeds:
    """ASGI middleware: of Gradio's addresses those that the page uses, and of files the page's own.

    Gradio's other ones take uploads of any size and fetch pages of other hosts for whoever asks.
    """

    def __init__(self, app: "ASGIApp", folder: str) -> None:
        files = re.escape(f"/gradio_api/file={folder}/")
        self.app, self.allowed = (
            app,
            re.compile(
                r"/?|/(config|theme\.css)|/(assets|static)/.+|/gradio_api/(cancel|queue/(join|data)|heartbeat/\w+)|"
                rf"{files}(?!.*\.\.).+"
            ),
        )

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass the request on, or answer it with 404."""
        from starlette.responses import PlainTextResponse

        if scope["type"] == "lifespan" or self.allowed.fullmatch(
            scope["path"].removeprefix(scope.get("root_path", ""))
        ):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("not found", 404)(scope, receive, send)


def _checked_seed(value: float | None) -> int:
    # Beyond 2^53 a browser's numbers are not exact.
    if value is None or not 0 <= value < 2**53:
        raise UserError(f"seed={value} must lie in 0 .. 2^53 - 1")
    return int(value)


@dataclass(frozen=True)
class _Page:
    """What the page's inputs call. drawing: the tickets of each open browser tab."""

    service: PictureService
    folder: str
    drawing: dict[str, set[Ticket]] = field(default_factory=dict)

    def card(self, model: str | None) -> ModelCard:
        """The card of a name, of which the newest, or of a key. Raises UserError where it is not served."""
        cards = self.service.cards()
        found = next((card for card in reversed(cards) if model in (card.key, card.name)), None)
        if found is None:
            reason = f"model={model!r} is not served any more" if cards else "no model is ready yet"
            raise UserError(f"{reason}: reload the page")
        return found

    async def watch(self, pictures: Sequence[Watched], tab: str | None) -> AsyncGenerator[list[Watched], None]:
        """drawing.watch; meanwhile the pictures are the tab's to cancel."""
        tickets = self.drawing.setdefault(tab or "", set())
        tickets.update(picture.ticket for picture in pictures)
        try:
            async with aclosing(watch(pictures)) as news:
                async for now in news:
                    yield now
        finally:
            tickets.difference_update(picture.ticket for picture in pictures)
            if not tickets:
                self.drawing.pop(tab or "", None)

    def submit(self, model: str, orders: Sequence[PictureOrder]) -> list[Watched]:
        """All of them or none. Raises UserError and Unavailable."""
        tickets = self.service.submit(model, orders)
        return [Watched(order, ticket) for order, ticket in zip(orders, tickets, strict=True)]

    def cancel(self, tab: str | None) -> None:
        """Drop what a browser tab is drawing: it asks for that, or was closed."""
        for ticket in tuple(self.drawing.get(tab or "", ())):
            ticket.cancel()

    async def file(self, picture: Watched) -> str:
        """The finished picture, as the service gave it, as a file that the browser may fetch."""
        assert isinstance(picture.end, Finished)
        card = picture.ticket.card
        return await self.write(picture.end.image, f"{card.name}-{card.version}-seed-{picture.order.seed}.png")

    async def write(self, image: bytes, name: str) -> str:
        """A file that the browser may fetch."""
        from gradio.processing_utils import save_bytes_to_cache

        return await asyncio.to_thread(save_bytes_to_cache, image, name, self.folder)


def gradio_page(service: PictureService, max_pictures: int = 8) -> "gradio.Blocks":
    """The page. max_pictures: of one draw."""
    import gradio as gr

    with gr.Blocks(title="smalti", analytics_enabled=False, delete_cache=(3600, _DAY)) as blocks:
        page = _Page(service, blocks.GRADIO_CACHE)
        gr.Markdown("# smalti")
        with gr.Tab("Draw"):
            _draw_tab(blocks, page, max_pictures)
        with gr.Tab("Compare"):
            _compare_tab(blocks, page)

        async def closed(request: gr.Request) -> None:
            page.cancel(request.session_hash)

        blocks.unload(closed)
    assert isinstance(blocks, gr.Blocks)
    return blocks


def mount_page(app: "FastAPI", service: PictureService, path: str = "/ui", max_pictures: int = 8) -> None:
    """Add the page to the app, behind the app's own middleware and so behind its keys. max_pictures: of one draw."""
    import gradio as gr
    from gradio.themes import Default
    from starlette.middleware import Middleware
    from starlette.responses import Response

    page = gradio_page(service, max_pictures)
    small = all(max(card.image_size) <= _SMALL for card in service.cards())
    gr.mount_gradio_app(
        app,
        page,
        path,
        app_kwargs={"middleware": [Middleware(OnlyWhatThePageNeeds, folder=page.GRADIO_CACHE)]},
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        show_error=False,
        theme=Default(font=_FONTS, font_mono=_MONO_FONTS),
        css=STYLE + (SMALL_PICTURES if small else ""),
    )

    # What browsers ask for beside a page, outside its path.
    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/manifest.json", include_in_schema=False)
    async def manifest() -> dict[str, str]:
        return {"name": "smalti", "start_url": f"{path}/"}


@dataclass(frozen=True)
class _SamplerInputs:
    """The components that a _Sampler is read from."""

    model: Any
    solver: Any
    steps: Any
    guidance: Any

    def all(self) -> list[Any]:
        """In the order of _Sampler's fields."""
        return [self.model, self.solver, self.steps, self.guidance]


def _models(service: PictureService, by_version: bool) -> list[str]:
    """What the model choice offers: names, of which the service picks the version, or versions."""
    return list(dict.fromkeys(card.key if by_version else card.name for card in service.cards()))


def _sampler_inputs(blocks: "gradio.Blocks", page: _Page, by_version: bool = False, nth: int = 0) -> _SamplerInputs:
    """Model, solver, steps and guidance, which take the model's defaults when it is chosen.

    nth: which of the models is chosen at first.
    """
    import gradio as gr

    inputs = _SamplerInputs(
        gr.Dropdown([], label="Model"),
        gr.Dropdown([], label="Solver"),
        gr.Slider(1, 100, 20, step=1, label="Steps"),
        gr.Slider(1, 10, 1, step=0.1, label="Guidance"),
    )

    async def show(model: str | None) -> list[Any]:
        models = _models(page.service, by_version)
        if not models:
            return [gr.Dropdown([], value=None), gr.skip(), gr.skip(), gr.skip()]
        if model not in models:
            model = models[min(nth, len(models) - 1)]
        card = page.card(model)
        return [
            gr.Dropdown(models, value=model),
            gr.Dropdown(list(card.solvers), value=card.solver),
            gr.Slider(value=card.num_inference_steps),
            gr.Slider(value=card.guidance_scale),
        ]

    gr.on([blocks.load, inputs.model.input], show, [inputs.model], inputs.all(), **_UNSEEN)
    return inputs


def _subject_inputs(blocks: "gradio.Blocks", page: _Page, models: Sequence[Any]) -> list[Any]:
    """Prompts or labels, as the chosen models read, in the order of _Subject's fields."""
    import gradio as gr

    inputs = [
        gr.Textbox(label="Prompt", lines=2, visible=False),
        gr.Textbox(label="Negative prompt", visible=False),
        gr.Radio([], label="Label", visible=False, elem_classes="labels"),
        gr.Number(0, label="Label", precision=0, minimum=0, visible=False),
    ]

    async def show(*chosen: str | None) -> list[Any]:
        cards = [card for card in page.service.cards() if card.key in chosen or card.name in chosen]
        reads = any(card.reads_prompts for card in cards)
        classes = min((card.num_classes for card in cards if card.num_classes), default=0)
        few = 0 < classes <= _RADIO_LABELS
        return [
            gr.Textbox(visible=reads),
            gr.Textbox(visible=reads),
            gr.Radio([(str(i), i) for i in range(classes if few else 0)], value=0 if few else None, visible=few),
            gr.Number(label=f"Label, 0 .. {classes - 1}", maximum=max(0, classes - 1), visible=classes > 0 and not few),
        ]

    gr.on([model.change for model in models], show, list(models), inputs, **_UNSEEN)
    return inputs


def _seed_inputs() -> Any:
    """The seed, with a button that draws another by lot."""
    import gradio as gr

    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
        dice = gr.Button("New seed", elem_classes="dice", min_width=80)

    async def roll() -> int:
        return secrets.randbelow(2**31)

    dice.click(roll, None, seed, **_UNSEEN)
    return seed


def _gallery(label: str) -> "gradio.Gallery":
    import gradio as gr

    return gr.Gallery(
        label=label,
        columns=3,
        fit_columns=False,
        format="png",
        elem_classes="results",
        buttons=["download", "fullscreen"],
    )


def _draw_tab(blocks: "gradio.Blocks", page: _Page, max_pictures: int) -> None:
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            what = gr.Column()
            sampler = _sampler_inputs(blocks, page)
            with what:
                subject = _subject_inputs(blocks, page, [sampler.model])
            number = gr.Slider(1, max_pictures, min(4, max_pictures), step=1, label="Pictures")
            seed = _seed_inputs()
            with gr.Row():
                go = gr.Button("Draw", variant="primary", min_width=100)
                stop = gr.Button("Cancel", min_width=100)
        with gr.Column(scale=2, min_width=280):
            status = gr.HTML(elem_classes="status")
            strip = gr.HTML()
            gallery = _gallery("Pictures")
            earlier = gr.State([])

    async def draw(*values: Any) -> AsyncGenerator[tuple[Any, ...], None]:
        *inputs, pictures, first, kept, visit = values
        began, results = time.monotonic(), dict[int, tuple[str, str]]()
        sampler, subject = _Sampler(*inputs[:4]), _Subject(*inputs[4:])
        try:
            card, first = page.card(sampler.model), _checked_seed(first)
            orders = [_order(card, subject, sampler, first + i, i, visit.caller) for i in range(int(pictures))]
            submitted = page.submit(sampler.model or card.name, orders)
        except (UserError, Unavailable) as error:
            yield error_line(error), "", gr.skip(), gr.skip()
            return
        async with aclosing(page.watch(submitted, visit.tab)) as news:
            async for now in news:
                fresh = [p for p in now if isinstance(p.end, Finished) and p.ticket.number not in results]
                for picture in fresh:
                    results[picture.ticket.number] = (await page.file(picture), caption(picture))
                shown = [*(results[number] for number in sorted(results)), *kept][:_KEPT]
                line = status_line(now, time.monotonic() - began)
                yield line, progress_strip(now), shown if fresh else gr.skip(), shown if fresh else gr.skip()

    _connect(page, go, stop, draw, [*sampler.all(), *subject, number, seed, earlier], [status, strip, gallery, earlier])


def _compare_tab(blocks: "gradio.Blocks", page: _Page) -> None:
    import gradio as gr

    gr.Markdown("Two versions or two settings, from the same noise.")
    with gr.Row():
        with gr.Column(min_width=140):
            gr.Markdown("**A**")
            a = _sampler_inputs(blocks, page, by_version=True)
        with gr.Column(min_width=140):
            gr.Markdown("**B**")
            b = _sampler_inputs(blocks, page, by_version=True, nth=1)
    subject = _subject_inputs(blocks, page, [a.model, b.model])
    seed = _seed_inputs()
    with gr.Row():
        go = gr.Button("Compare", variant="primary", min_width=100)
        stop = gr.Button("Cancel", min_width=100)
    status = gr.HTML(elem_classes="status")
    strip = gr.HTML()
    gallery = _gallery("A, B and their difference")

    async def compare(*values: Any) -> AsyncGenerator[tuple[Any, ...], None]:
        *inputs, first, visit = values
        began = time.monotonic()
        samplers, subject = [_Sampler(*inputs[:4]), _Sampler(*inputs[4:8])], _Subject(*inputs[8:])
        submitted: list[Watched] = []
        try:
            first = _checked_seed(first)
            for sampler in samplers:
                card = page.card(sampler.model)
                submitted += page.submit(card.key, [_order(card, subject, sampler, first, 0, visit.caller)])
        except (UserError, Unavailable) as error:
            for picture in submitted:
                picture.ticket.cancel()
            yield error_line(error), "", []
            return
        now = submitted
        async with aclosing(page.watch(submitted, visit.tab)) as news:
            async for now in news:
                yield status_line(now, time.monotonic() - began), progress_strip(now), gr.skip()
        line = status_line(now, time.monotonic() - began)
        shown, said = await _compared(page, now)
        yield f"{line}; {said}" if said else line, "", shown

    _connect(page, go, stop, compare, [*a.all(), *b.all(), *subject, seed], [status, strip, gallery])


async def _compared(page: _Page, pictures: Sequence[Watched]) -> tuple[list[tuple[str, str]], str]:
    """Those that could be drawn, and where all were, their difference with what it says."""
    shown = [
        (await page.file(picture), f"{name}: {picture.ticket.card.key}")
        for name, picture in zip("AB", pictures, strict=True)
        if isinstance(picture.end, Finished)
    ]
    ends = [picture.end.image for picture in pictures if isinstance(picture.end, Finished)]
    if len(ends) < 2:
        return shown, ""
    apart, said = await asyncio.to_thread(difference, *ends)
    if apart is not None:
        shown.append((await page.write(apart, f"difference-seed-{pictures[0].order.seed}.png"), "difference"))
    return shown, said


def _connect(
    page: _Page,
    go: Any,
    stop: Any,
    run: Callable[..., AsyncGenerator[tuple[Any, ...], None]],
    inputs: list[Any],
    outputs: list[Any],
) -> None:
    """go runs it, with the visit as its last argument; stop cancels what the visit's browser tab is drawing."""
    import gradio as gr

    async def visited(request: gr.Request, *values: Any) -> AsyncGenerator[tuple[Any, ...], None]:
        assert request.request is not None
        visit = _Visit(request.session_hash, caller_of(request.request))
        async with aclosing(run(*values, visit)) as steps:
            async for step in steps:
                yield step

    async def cancel(request: gr.Request) -> None:
        page.cancel(request.session_hash)

    go.click(visited, inputs, outputs, concurrency_limit=None, **_UNSEEN)
    stop.click(cancel, None, None, concurrency_limit=None, **_UNSEEN)
