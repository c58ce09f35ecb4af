"""The application in-process: what clients in other languages send, and what a server must refuse."""

import asyncio
import base64
import io
import json
import struct
import subprocess
import sys
import zlib

import httpx
import pytest
from fastapi import APIRouter
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from server.double_service import DoubleService, card

from smalti.errors import UserError
from smalti.serving.access import parse_keys
from smalti.serving.app import create_app
from smalti.serving.output_files import OutputFiles
from smalti.serving.server_metrics import MeasuredService, ServerMetrics
from smalti.serving.server_settings import ServerSettings

KEY = "sk-right-0123456789abcdef"
PNG = io.BytesIO()
Image.new("RGB", (28, 28)).save(PNG, "png")
FORM = {"image": ("a.png", PNG.getvalue(), "image/png")}


def ask(method: str, path: str, service=None, settings=None, base_url="http://localhost", app=None, **request):
    """One request to a server of its own."""

    async def asked():
        made = app or create_app(service or DoubleService(step_seconds=0.0), settings)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url=base_url) as client:
            return await client.request(method, path, **request)

    answer = asyncio.run(asked())
    assert answer.headers["x-request-id"].startswith("req_")
    return answer


def generate(fields: dict, **more):
    return ask("POST", "/v1/images/generations", json=fields, **more)


def error_of(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    assert answer.status_code == status
    error = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("server_error" if status >= 500 else error["type"])
    assert answer.headers["x-should-retry"] == ("true" if status in (429, 503) else "false")
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    return error["message"]


def test_errors_that_no_endpoint_makes():
    error_of(ask("GET", "/nowhere"), 404, "not_found")
    answer = ask("PUT", "/v1/models")
    error_of(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (b'{"prompt": ', "application/json", "invalid_json"),
        (b"", "application/json", "invalid_body"),
        (b"[]", "application/json", "invalid_body"),
        (b'"7"', "application/json", "invalid_body"),
        (b'{"prompt": "7"}', "text/plain", "invalid_body"),
        (b'{"prompt": "7"}', None, "invalid_body"),
        (b"[" * 100_000, "application/json", "bad_request"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "application/json", "bad_request"),
        (b"\xff\xfe", "application/json", "invalid_json"),
        (b'{"prompt": "\xff"}', "application/json", "bad_request"),
    ],
)
def test_bodies_that_are_no_request(body, kind, code):
    headers = {"content-type": kind} if kind else {}
    error_of(ask("POST", "/v1/images/generations", content=body, headers=headers), 400, code)


@pytest.mark.parametrize("name", ["\ud800", "x" * 10_000, "__class__", "", "n\n"])
def test_unknown_fields_with_odd_names(name):
    body = json.dumps({"prompt": "7", name: 1})
    headers = {"content-type": "application/json"}
    answer = ask("POST", "/v1/images/generations", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unknown_parameter"
    assert len(answer.content) < 2000


def test_a_lone_surrogate_is_no_text():
    body = b'{"prompt": "\\ud800"}'
    answer = ask("POST", "/v1/images/generations", content=body, headers={"content-type": "application/json"})
    error_of(answer, 400, "invalid_value", "prompt")


def test_null_takes_the_default():
    names = ("n", "size", "quality", "response_format", "output_format", "stream", "partial_images", "style", "user")
    answer = generate({"prompt": "7", **dict.fromkeys(names)}).raise_for_status().json()
    assert (len(answer["data"]), answer["output_format"]) == (1, "png")


def test_text_is_no_number_in_json():
    for field, value in (("n", "2"), ("seed", True), ("seed", 1.5), ("stream", "true"), ("guidance_scale", "2")):
        error_of(generate({"prompt": "7", field: value}), 400, "invalid_value", field)


def test_whole_numbers_may_have_a_point():
    body = b'{"prompt": "7", "n": 2.0, "seed": 1e2, "num_inference_steps": 3.0}'
    answer = ask("POST", "/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert [image["seed"] for image in answer.raise_for_status().json()["data"]] == [100, 101]


def test_the_document_has_the_bounds():
    document = ask("GET", "/openapi.json").json()
    edits = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    generations = document["components"]["schemas"]["GenerationRequest"]
    for name, (least, most) in {"n": (1, 10), "num_inference_steps": (1, 1000), "partial_images": (0, 3)}.items():
        for field in (edits["properties"][name], generations["properties"][name]["anyOf"][0]):
            assert (field["type"], field["minimum"], field["maximum"]) == ("integer", least, most)
    assert edits["properties"]["image"] == {**edits["properties"]["image"], "type": "string", "format": "binary"}
    assert (edits["required"], edits["additionalProperties"]) == (["image"], False)


def test_prompts_labels_and_models():
    service = DoubleService(card(), step_seconds=0.0)
    for fields, label in (({"prompt": " 07 "}, 7), ({"prompt": "a cat", "class_label": 2}, 2), ({"class_label": 0}, 0)):
        generate(fields, service=service).raise_for_status()
        assert (service.orders[-1][1].class_label, service.orders[-1][1].prompt) == (label, None)
    for prompt in ("", " ", "²", "７", "-1", "1.0", "1" * 400, "0x1"):
        assert generate({"prompt": prompt}, service=service).json()["error"]["param"] == "prompt"

    unconditional = DoubleService(card(num_classes=0), step_seconds=0.0)
    generate({"prompt": ""}, service=unconditional).raise_for_status()
    error_of(generate({"prompt": "7"}, service=unconditional), 400, "invalid_value", "prompt")
    error_of(generate({"class_label": 1}, service=unconditional), 400, "invalid_value", "class_label")

    words = DoubleService(card(num_classes=0, reads_prompts=True), step_seconds=0.0)
    error_of(generate({}, service=words), 400, "missing_required_parameter", "prompt")
    error_of(generate({"prompt": "a", "class_label": 1}, service=words), 400, "invalid_value", "class_label")

    two = DoubleService(card(), card("other"), step_seconds=0.0)
    assert "digits, other" in error_of(
        generate({"prompt": "7"}, service=two), 400, "missing_required_parameter", "model"
    )


def test_a_name_is_its_newest_version():
    service = DoubleService(card(), card(version="ba9876543210", num_classes=5), step_seconds=0.0)
    assert [model["version"] for model in ask("GET", "/v1/models", service=service).json()["data"]] == ["ba9876543210"]
    assert ask("GET", "/v1/models/digits", service=service).json()["num_classes"] == 5
    assert ask("GET", "/v1/models/digits@0123456789ab", service=service).json()["num_classes"] == 10
    error_of(generate({"prompt": "7"}, service=service), 400, "invalid_value", "prompt")
    generate({"prompt": "7", "model": "digits@0123456789ab"}, service=service).raise_for_status()


def test_sizes_and_qualities():
    service = DoubleService(card(takes_sizes=True, image_size=(28, 56), num_inference_steps=5), step_seconds=0.0)
    asked = [
        ("auto", "auto"),
        ("56x28", "low"),
        ("28x56", "medium"),
        ("8x16", "high"),
        ("auto", "standard"),
        ("auto", "hd"),
    ]
    for size, quality in asked:
        generate({"prompt": "7", "size": size, "quality": quality}, service=service).raise_for_status()
    orders = [order for _, order in service.orders]
    assert [order.image_size for order in orders] == [None, None, (56, 28), (16, 8), None, None]
    assert [order.num_inference_steps for order in orders] == [None, 2, None, 10, None, 10]
    generate({"prompt": "7", "quality": "low", "num_inference_steps": 3}, service=service)
    assert service.orders[-1][1].num_inference_steps == 3


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), n=st.integers(1, 10))
def test_picture_i_takes_seed_plus_i(seed, n):
    answer = generate({"prompt": "7", "n": n, "seed": seed, "num_inference_steps": 1})
    if seed + n - 1 < 2**63:
        assert [image["seed"] for image in answer.json()["data"]] == [seed + i for i in range(n)]
    else:
        error_of(answer, 400, "invalid_value", "seed")


def edit(data: dict, files=FORM, **more):
    return ask("POST", "/v1/images/edits", data=data, files=files, **more)


def test_edits_that_cannot_be():
    error_of(edit({}, files={"mask": FORM["image"]}), 400, "missing_required_parameter", "image")
    error_of(edit({"image": "text"}, files={"mask": FORM["image"]}), 400, "invalid_value", "image")
    error_of(edit({"prompt": "7"}, files={"image": b"text"}), 400, "invalid_value", "image")
    error_of(edit({"prompt": "7"}, files=FORM | {"prompt": FORM["image"]}), 400, "invalid_value", "prompt")
    error_of(edit({"prompt": "7", "strength": "0"}), 400, "invalid_value", "strength")
    error_of(edit({"prompt": "7", "strength": "nan"}), 400, "invalid_value", "strength")
    error_of(edit({"prompt": "7", "n": "1e6"}), 400, "invalid_value", "n")
    message = error_of(edit({"prompt": "7", "strengh": "1"}), 400, "unknown_parameter", "strengh")
    assert "did you mean strength" in message
    error_of(edit({"prompt": "7"}, files=[("image", FORM["image"])] * 2), 400, "invalid_value", "image")
    error_of(edit({"prompt": ["7", "8"]}), 400, "invalid_value", "prompt")
    small = io.BytesIO()
    Image.new("L", (8, 8)).save(small, "png")
    error_of(edit({"prompt": "7"}, files=FORM | {"mask": small.getvalue()}), 400, "invalid_value", "mask")
    service = DoubleService(card(takes_pictures=False))
    error_of(edit({"prompt": "7"}, service=service), 400, "invalid_value", "image")
    error_of(ask("POST", "/v1/images/edits", json={"prompt": "7"}), 400, "invalid_body")
    broken = {"content": b"--xx\r\nnonsense", "headers": {"content-type": "multipart/form-data; boundary=yy"}}
    assert ask("POST", "/v1/images/edits", **broken).status_code == 400


def test_a_picture_that_would_unpack_to_gigabytes_is_refused_unopened():
    for side in (5000, 10_000, 30_000):  # more than we take, than Pillow warns of, than Pillow opens
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        file = PNG.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG.getvalue()[33:]
        error_of(edit({"prompt": "7"}, files={"image": file}), 400, "invalid_value", "image")


def test_pictures_come_in_the_form_that_was_asked_for():
    for kind, start in (("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")):
        answer = generate({"prompt": "7", "output_format": kind, "output_compression": 30}).json()
        assert base64.b64decode(answer["data"][0]["b64_json"]).startswith(start)
        assert answer["output_format"] == kind


def test_pages_of_other_hosts_cannot_ask():
    message = error_of(ask("GET", "/v1/models", base_url="http://evil.example"), 400, "wrong_host", "host")
    assert "Host" in message
    ask("GET", "/v1/models", base_url="http://127.0.0.1:8000").raise_for_status()
    ask("GET", "/v1/models", base_url="http://[::1]:8000").raise_for_status()
    origin = {"origin": "http://evil.example"}
    error_of(generate({"prompt": "7"}, headers=origin), 403, "wrong_origin", "origin")
    error_of(edit({"prompt": "7"}, headers=origin), 403, "wrong_origin", "origin")
    generate({"prompt": "7"}, headers={"origin": "http://localhost"}).raise_for_status()
    assert "access-control-allow-origin" not in ask("GET", "/v1/models", headers=origin).headers


def test_cors_where_it_is_wanted():
    settings = ServerSettings(cors_origins=("http://studio.example",), keys=parse_keys(f"{KEY} studio", "test"))
    headers = {"origin": "http://studio.example", "authorization": f"Bearer {KEY}"}
    answer = generate({"prompt": "7"}, settings=settings, headers=headers).raise_for_status()
    assert answer.headers["access-control-allow-origin"] == "http://studio.example"
    preflight = {"origin": "http://studio.example", "access-control-request-method": "POST"}
    ask("OPTIONS", "/v1/images/generations", settings=settings, headers=preflight).raise_for_status()
    other = headers | {"origin": "http://evil.example"}
    assert generate({"prompt": "7"}, settings=settings, headers=other).status_code == 403


def test_keys_hold_for_everything_but_health_and_files():
    router, settings = APIRouter(), ServerSettings(keys=parse_keys(f"{KEY} studio", "test"))
    router.get("/v1/extra")(lambda: {"extra": 1})

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})

    def get(path, **headers):
        app = create_app(DoubleService(), settings, routers=[router], mounts={"/ui": page})
        return ask("GET", path, app=app, headers=headers)

    for path in ("/livez", "/readyz", "/metrics", "/openapi.json"):
        assert get(path).status_code == 200
    assert get("/v1/files/file-x").status_code == 404
    basic = base64.b64encode(f"me:{KEY}".encode()).decode()
    for path in ("/v1/models", "/v1/extra", "/ui/", "/nowhere"):
        assert get(path).status_code == 401
        assert get(path, authorization=f"Bearer {KEY}").status_code in (200, 404)
    assert get("/v1/models", authorization=f"Basic {basic}").status_code == 401
    assert get("/ui/", authorization=f"Basic {basic}").text == "page"
    assert get("/ui/", authorization="Basic ???").status_code == 401
    assert get("/ui/").headers["www-authenticate"].startswith("Basic")


def test_readiness():
    service = DoubleService()
    assert ask("GET", "/readyz", service=service).json() == {
        "status": "ready",
        "ready_workers": {"digits@0123456789ab": 1},
    }
    service.draining = True
    error_of(ask("GET", "/readyz", service=service), 503, "shutting_down")
    error_of(generate({"prompt": "7"}, service=service), 503, "shutting_down")
    ask("GET", "/livez", service=service).raise_for_status()
    service = DoubleService()
    service._cards = []
    error_of(generate({"prompt": "7"}, service=service), 503, "not_ready")


def test_what_breaks_is_told_without_details(caplog):
    class Broken(DoubleService):
        def submit(self, model, orders):
            raise RuntimeError("secret detail")

    answer = generate({"prompt": "7"}, service=Broken())
    assert "secret" not in error_of(answer, 500, "internal_error")
    assert answer.headers["x-request-id"] in caplog.text
    assert "secret detail" in caplog.text


def test_user_errors_of_the_service_are_bad_requests():
    class Picky(DoubleService):
        def submit(self, model, orders):
            raise UserError("image_size=(1, 2) must be a multiple of 4")

    error_of(generate({"prompt": "7"}, service=Picky()), 400, "invalid_value", "image_size")


def test_faults_are_refused_unless_allowed():
    error_of(generate({"prompt": "7"}, headers={"x-smalti-fault": "nan"}), 400, "invalid_value", "x-smalti-fault")


def test_metrics_count_what_happened():
    metrics = ServerMetrics()
    service = MeasuredService(DoubleService(step_seconds=0.0), metrics)
    app = create_app(service, ServerSettings(allow_faults=True), metrics=metrics)
    ask("POST", "/v1/images/generations", app=app, json={"prompt": "7", "n": 2})
    ask("POST", "/v1/images/generations", app=app, json={"prompt": "7", "stream": True, "partial_images": 2})
    ask("POST", "/v1/images/generations", app=app, json={"prompt": "7"}, headers={"x-smalti-fault": "nan"})
    ask("GET", "/v1/files/file-secret", app=app)
    ask("GET", "/a/path/that/is/not", app=app)
    text = ask("GET", "/metrics", app=app).text
    assert "secret" not in text
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    arm = "digits@0123456789ab"
    assert samples["smalti_pictures_total", arm, "ok"] == 3
    assert samples["smalti_pictures_total", arm, "not_finite"] == 1
    assert samples["smalti_first_preview_seconds_count", arm] == 1
    assert samples["smalti_picture_seconds_count", arm] == 3
    assert samples["smalti_http_requests_total", "/v1/images/generations", "200", "POST"] == 2
    assert samples["smalti_http_requests_total", "/v1/images/generations", "500", "POST"] == 1
    assert samples["smalti_http_requests_total", "/v1/files/{file_id}", "404", "GET"] == 1
    assert samples["smalti_http_requests_total", "404", "GET", "unmatched"] == 1
    assert samples["smalti_rows_per_tick",] == 2
    assert samples["smalti_worker_ready", "0", arm] == 1


def test_files_are_bounded_in_time_and_bytes():
    now = 0.0
    files = OutputFiles(10.0, 100, lambda: now)
    ids = [files.add(bytes(40), "image/png") for _ in range(3)]
    assert len(set(ids)) == 3
    assert [files.get(i) is not None for i in ids] == [False, True, True]
    assert files.bytes_held == 80
    now = 9.9
    late = files.add(bytes(10), "image/png")
    now = 10.0
    assert [files.get(i) is not None for i in (*ids, late)] == [False, False, False, True]
    assert files.bytes_held == 10
    with pytest.raises(ValueError):
        files.add(bytes(101), "image/png")


def test_a_url_does_not_come_from_the_request_where_one_is_set():
    settings = ServerSettings(public_url="https://pictures.example/")
    url = generate({"prompt": "7", "response_format": "url"}, settings=settings).json()["data"][0]["url"]
    assert url.startswith("https://pictures.example/v1/files/file-")


def test_traces(monkeypatch):
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    parent = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    generate({"prompt": "a secret 7"}, settings=ServerSettings(traces=True), headers=parent)
    spans = exporter.get_finished_spans()
    assert any(span.name == "POST /v1/images/generations" for span in spans)
    assert {span.context.trace_id for span in spans} == {int("ab" * 16, 16)}
    assert "secret" not in "".join(span.to_json() for span in spans)


def test_the_server_does_not_import_torch():
    program = "import sys, smalti.serving.app, smalti.serving.receipts; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"
