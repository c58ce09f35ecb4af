"""Clients that go away, do not read, or send too much: real sockets against a real server."""

import json
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from server.double_service import DoubleService, picture
from server.live_server import live_server, wait_until

from smalti.serving.app import create_app
from smalti.serving.messages import PictureOrder, Preview
from smalti.serving.server_settings import ServerSettings


class ChattyService(DoubleService):
    """A double that sends previews for as long as it is asked to, and large ones."""

    async def _draw(self, ticket, order):
        if order.class_label == 9:
            for index in range(300):
                ticket.add(Preview(ticket.number, index, index, 300, bytes(100_000)))
        await super()._draw(ticket, order)

    def submit(self, model, orders):
        tickets = super().submit(model, orders)
        for ticket in tickets:
            ticket.events = self.counted(ticket.events)
        return tickets

    fetched = 0

    def counted(self, events):
        async def counted_events():
            async for event in events():
                self.fetched += isinstance(event, Preview)
                yield event

        return counted_events


@pytest.fixture
def service():
    return ChattyService(step_seconds=0.005)


@contextmanager
def asked(address: str, method: str, path: str, headers: dict[str, str], body: bytes = b""):
    """A socket over which a request was sent."""
    parts = urlsplit(address)
    lines = [f"{method} {path} HTTP/1.1", f"Host: {parts.netloc}", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode() + body)
        yield connection


def generate(address: str, **fields):
    body = json.dumps({"prompt": "7", "num_inference_steps": 1000, **fields}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    return asked(address, "POST", "/v1/images/generations", headers, body)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_takes_the_pictures_along(service, stream, caplog):
    with live_server(create_app(service)) as address:
        with generate(address, n=3, stream=stream) as connection:
            wait_until(lambda: len(service.live) == 3)
            tickets = list(service.live.values())
            if stream:
                connection.settimeout(5)
                assert b"200 OK" in connection.recv(100)
        began = time.monotonic()
        wait_until(lambda: not service.live)
        assert time.monotonic() - began < 1  # 1000 steps take 5 s
        assert all(ticket.cancelled for ticket in tickets)
        metrics = httpx.get(f"{address}/metrics").text
        assert 'smalti_pictures_total{arm="digits@0123456789ab",code="cancelled"} 3.0' in metrics
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_one_that_fails_cancels_the_others(service):
    class OneFails(DoubleService):
        async def _draw(self, ticket, order):
            faulty = order.index == 1
            changes = {"num_inference_steps": 3, "fault": "nan"} if faulty else {}
            await super()._draw(
                ticket, PictureOrder(**{n: getattr(order, n) for n in order.__struct_fields__} | changes)
            )

    service = OneFails(step_seconds=0.005)
    with live_server(create_app(service)) as address:
        for stream in (False, True):
            body = {"prompt": "7", "n": 3, "num_inference_steps": 1000, "stream": stream}
            answer = httpx.post(f"{address}/v1/images/generations", json=body)
            assert "not_finite" in answer.text
            assert answer.status_code == (200 if stream else 500)
            wait_until(lambda: not service.live, 1)


def test_a_slow_reader_blocks_nobody_and_is_dropped(service, caplog):
    caplog.set_level("INFO", "smalti.serving.streams")
    with (
        live_server(create_app(service, ServerSettings(stream_stall_seconds=0.5))) as address,
        httpx.Client(base_url=address) as client,
        generate(address, class_label=9, stream=True, partial_images=3),
    ):
        wait_until(lambda: len(service.live) == 1)
        (ticket,) = service.live.values()
        for _ in range(3):
            began = time.monotonic()
            answer = client.post("/v1/images/generations", json={"prompt": "1", "num_inference_steps": 1})
            assert answer.status_code == 200
            assert time.monotonic() - began < 0.5
        wait_until(lambda: ticket.number not in service.live, 3)  # 1000 steps take 5 s
        assert "took nothing" in caplog.text
        assert 0 < service.fetched < 150  # of 300: what the sockets' buffers hold


def test_a_deadline_reaches_the_order(service):
    with live_server(create_app(service, ServerSettings(deadline_seconds=9.0))) as address:
        body = {"prompt": "1", "num_inference_steps": 1}
        for headers in ({}, {"x-smalti-deadline": "2.5"}):
            httpx.post(f"{address}/v1/images/generations", json=body, headers=headers).raise_for_status()
    assert [order.deadline_seconds for _, order in service.orders] == [9.0, 2.5]


def test_many_at_once_get_their_own(service):
    service.step_seconds = 0.001
    with live_server(create_app(service)) as address, httpx.Client(base_url=address) as client:

        def picture_of(seed: int) -> bytes:
            fields = {
                "class_label": seed % 10,
                "seed": seed,
                "num_inference_steps": 1 + seed % 7,
                "response_format": "url",
            }
            answer = client.post("/v1/images/generations", json=fields).raise_for_status().json()
            return client.get(answer["data"][0]["url"]).content

        with ThreadPoolExecutor(16) as pool:
            pictures = list(pool.map(picture_of, range(64)))
    assert pictures == [picture(PictureOrder(seed=s, class_label=s % 10), "0123456789ab") for s in range(64)]


def test_a_stream_that_is_quiet_gives_signs_of_life(service):
    with (
        live_server(create_app(service, ServerSettings(stream_ping_seconds=0.05))) as address,
        generate(address, num_inference_steps=60, stream=True) as connection,
    ):
        text = b""
        while b"completed" not in text:
            text += connection.recv(4096)
    assert text.count(b": ping\r\n" if b": ping\r\n" in text else b": ping\n") >= 2


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=xx"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_megabytes_is_refused_in_flat_memory(service, chunked, kind):
    size, part = 100 * 2**20, bytes(2**20)
    framing = {"transfer-encoding": "chunked"} if chunked else {"content-length": str(size)}
    settings = ServerSettings(body_limit=4 * 2**20, json_limit=4 * 2**20)
    path = "/v1/images/edits" if "form" in kind else "/v1/images/generations"
    head = b'--xx\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n' if "form" in kind else b""
    with live_server(create_app(service, settings)) as address:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with asked(address, "POST", path, framing | {"content-type": kind}) as connection:
            connection.sendall(_chunk(head) if chunked and head else head)

            def send_all():
                try:
                    for _ in range(100):
                        connection.sendall(_chunk(part) if chunked else part)
                except OSError:
                    pass

            sender = threading.Thread(target=send_all)
            sender.start()
            answer = connection.recv(65536)
            while b"}" not in answer:
                answer += connection.recv(65536)
            sender.join(10)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'"code": "body_too_large"' in answer
        assert b"x-request-id: req_" in answer
        assert grown < 30 * 2**10
        assert httpx.get(f"{address}/livez").json() == {"status": "ok"}


def test_a_body_is_refused_by_its_length_before_it_comes(service):
    headers = {"content-type": "application/json", "content-length": str(100 * 2**20)}
    with (
        live_server(create_app(service)) as address,
        asked(address, "POST", "/v1/images/generations", headers) as connection,
    ):
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def _chunk(part: bytes) -> bytes:
    return f"{len(part):x}\r\n".encode() + part + b"\r\n"
