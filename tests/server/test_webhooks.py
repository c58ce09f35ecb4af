"""Webhooks against real receivers on loopback, good and bad, verified with the library of Standard Webhooks."""

import asyncio
import contextlib
import ipaddress
import json
import socket
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server.doubles_jobs import LOCAL, ended, new_job, running_jobs, until
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from smalti.errors import UserError
from smalti.serving.store_tables import webhook_of_job
from smalti.serving.webhook_urls import is_public, webhook_address
from smalti.serving.webhooks import WebhookSettings, retry_delay

SECRET = "whsec_" + "c21hbHRp" * 5


class Receiver:
    """An HTTP server that keeps what it gets. behave: called with (requests so far, writer), answers or does not."""

    def __init__(self, behave) -> None:
        self.behave, self.requests, self.open = behave, [], 0

    async def _serve(self, reader, writer) -> None:
        self.open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            headers = {name.lower(): value for name, value in headers.items()}
            body = await reader.readexactly(int(headers["content-length"]))
            self.requests.append((head.split("\r\n")[0], headers, body))
            answering = asyncio.create_task(self.behave(len(self.requests), writer))
            leaving = asyncio.create_task(reader.read())
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()


@contextlib.asynccontextmanager
async def receiver(behave):
    """A running receiver, with its url."""
    made = Receiver(behave)
    server = await asyncio.start_server(made._serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/done?of=job"
    try:
        yield made
    finally:
        server.close()


def answers(*statuses):
    """Answer with these one after the other, then with the last for ever."""

    async def behave(number, writer):
        status = statuses[min(number, len(statuses)) - 1]
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: 2\r\nlocation: /other\r\n\r\nok".encode())
        await writer.drain()

    return behave


async def hangs(number, writer):
    await asyncio.sleep(60)


async def drips(number, writer):
    for byte in b"HTTP/1.1 200 OK\r\nx-slow: " + b"a" * 1000:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.02)


async def floods(number, writer):
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


async def message_of(jobs, id, *statuses):
    """(status, attempts, error) of a job's message when it has one of the statuses."""
    async with asyncio.timeout(10):
        while True:
            found = await jobs.store.read(lambda c: webhook_of_job(c, id))
            if found is not None and found[0] in statuses:
                return found
            await asyncio.sleep(0.02)


def test_the_message_is_signed_and_tells_the_job(tmp_path):
    async def work():
        async with (
            receiver(answers(204)) as there,
            running_jobs(tmp_path / "jobs.db", webhook_settings=replace(LOCAL, secret=SECRET)) as jobs,
        ):
            made, _ = await jobs.create(new_job(n=2, seed=5, webhook_url=there.url, metadata={"a": "\u2603"}))
            job, _ = await ended(jobs, made.id)
            assert (await message_of(jobs, made.id, "delivered"))[1:] == (1, None)
            ((line, headers, body),) = there.requests
            assert line == "POST /done?of=job HTTP/1.1"
            told = Verifier(jobs.webhooks.secret_of("alice")).verify(body, headers)
            assert (told["type"], told["data"]["id"], told["data"]["metadata"]) == ("job.succeeded", job.id, {"a": "☃"})
            assert [image["seed"] for image in told["data"]["images"]] == [5, 6]
            for wrong in (jobs.webhooks.secret_of("bob"), SECRET):
                with pytest.raises(WebhookVerificationError):
                    Verifier(wrong).verify(body, headers)
            with pytest.raises(WebhookVerificationError):
                Verifier(jobs.webhooks.secret_of("alice")).verify(body + b" ", headers)

    run(work())


def test_a_failure_is_told_and_a_cancellation(tmp_path):
    async def work():
        async with receiver(answers(200)) as there, running_jobs(tmp_path / "jobs.db") as jobs:
            failing, _ = await jobs.create(new_job(webhook_url=there.url, order={"fault": "nan"}))
            await message_of(jobs, failing.id, "delivered")
            leaving, _ = await jobs.create(new_job(webhook_url=there.url, steps=1000))
            await jobs.cancel("alice", leaving.id)
            await message_of(jobs, leaving.id, "delivered")
            told = [json.loads(body) for _, _, body in there.requests]
            assert [one["type"] for one in told] == ["job.failed", "job.cancelled"]
            assert told[0]["data"]["error"]["code"] == "not_finite"

    run(work())


def test_a_receiver_that_recovers_gets_one_message_with_one_id(tmp_path):
    async def work():
        async with receiver(answers(500, 302, 404, 200)) as there, running_jobs(tmp_path / "jobs.db") as jobs:
            made, _ = await jobs.create(new_job(webhook_url=there.url))
            assert (await message_of(jobs, made.id, "delivered"))[1:] == (4, None)
            await asyncio.sleep(0.3)
            assert len(there.requests) == 4
            assert {line for line, _, _ in there.requests} == {"POST /done?of=job HTTP/1.1"}  # no redirect was followed
            assert len({headers["webhook-id"] for _, headers, _ in there.requests}) == 1

    run(work())


@pytest.mark.parametrize(
    ("behave", "tries", "told"),
    [
        (answers(500), 3, "answered 500"),
        (answers(302), 3, "answered 302"),
        (hangs, 3, "no answer within 0.2 s"),
        (drips, 3, "no answer within 0.2 s"),
        (answers(410), 1, "answered 410"),
        (floods, 1, None),
    ],
    ids=["500", "redirect", "hangs", "drips", "gone", "floods"],
)
def test_a_receiver_that_misbehaves_ends_in_a_dead_letter(tmp_path, behave, tries, told):
    async def work():
        brief = replace(LOCAL, max_attempts=3, timeout_seconds=0.2, base_seconds=0.02)
        async with receiver(behave) as there, running_jobs(tmp_path / "jobs.db", webhook_settings=brief) as jobs:
            made, _ = await jobs.create(new_job(webhook_url=there.url))
            status, attempts, error = await message_of(jobs, made.id, "dead", "delivered")
            assert (attempts, error) == (tries, told)
            assert status == ("dead" if told else "delivered")
            assert (await jobs.get("alice", made.id)).status == "succeeded"
            await until(lambda: not there.open)  # no connection is left behind
            shown = (await jobs.describe(await jobs.get("alice", made.id))).webhook
            assert (shown.status, shown.attempts, shown.last_error) == (status, tries, told)

    run(work())


def test_nobody_there(tmp_path):
    async def work():
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        async with running_jobs(tmp_path / "jobs.db", webhook_settings=replace(LOCAL, max_attempts=2)) as jobs:
            made, _ = await jobs.create(new_job(webhook_url=url))
            status, attempts, error = await message_of(jobs, made.id, "dead")
            assert (status, attempts) == ("dead", 2)
            assert error.startswith("ConnectError")

    run(work())


def test_receivers_that_hang_hold_up_neither_jobs_nor_other_receivers(tmp_path):
    async def work():
        slow = replace(LOCAL, timeout_seconds=5.0, concurrency=3, per_host=2, hosts=("127.0.0.1", "localhost"))
        async with (
            receiver(hangs) as bad,
            receiver(answers(200)) as good,
            running_jobs(tmp_path / "jobs.db", webhook_settings=slow) as jobs,
        ):
            for _ in range(10):
                made, _ = await jobs.create(new_job(webhook_url=bad.url))
                await ended(jobs, made.id)
            await until(lambda: len(bad.requests) == 2)
            began = time.monotonic()
            made, _ = await jobs.create(new_job(webhook_url=good.url.replace("127.0.0.1", "localhost")))
            await message_of(jobs, made.id, "delivered")
            assert time.monotonic() - began < 2.0
            assert len(bad.requests) == 2  # bounded

    run(work())


def test_messages_outlive_the_server(tmp_path):
    async def work():
        async with receiver(answers(500)) as there:
            async with running_jobs(tmp_path / "jobs.db", webhook_settings=replace(LOCAL, base_seconds=0.2)) as jobs:
                made, _ = await jobs.create(new_job(webhook_url=there.url))
                await ended(jobs, made.id)
                await until(lambda: there.requests)
            there.behave = answers(200)
            seen = len(there.requests)
            async with running_jobs(tmp_path / "jobs.db") as jobs:
                await message_of(jobs, made.id, "delivered")
                # The secret was the store's own: it is the same for the next server.
                for _, headers, body in there.requests:
                    Verifier(jobs.webhooks.secret_of("alice")).verify(body, headers)
            assert len(there.requests) == seen + 1

    run(work())


def test_private_addresses_are_refused_when_sending_too(tmp_path):
    """A name can come to mean another address after the job was accepted."""

    async def work():
        async with receiver(answers(200)) as there:
            named = there.url.replace("127.0.0.1", "localhost")
            guarded = replace(LOCAL, hosts=("localhost",), allow_private=False)
            async with running_jobs(tmp_path / "jobs.db", webhook_settings=guarded) as jobs:
                jobs.webhooks.check_url(named)  # its looks tell nothing
                made, _ = await jobs.create(new_job(webhook_url=named))
                _, attempts, error = await message_of(jobs, made.id, "dead")
                assert (attempts, error) == (1, "localhost has an address of a private network")
            assert not there.requests

    run(work())


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "ftp://example.com/",
        "https://",
        "https:///path",
        "example.com",
        "https://user:password@example.com/",
        "https://user@example.com/",
        "https://127.0.0.1/",
        "https://127.1/",
        "https://0x7f000001/",
        "https://2130706433/",
        "https://0/",
        "https://10.0.0.8/",
        "https://192.168.1.1:8443/",
        "https://169.254.169.254/latest/meta-data/",
        "https://100.64.0.1/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[fd00::1]/",
        "https://[fe80::1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[2002:7f00:1::]/",
        "https://224.0.0.1/",
        "https://255.255.255.255/",
        "https://example.com/a b",
        "https://ex\u00e4mple.com/",
        "https://example.com\r\nx: y/",
        "https://example.com:99999/",
        "https://[::1/",
        "https://example.com/" + "a" * 2000,
    ],
)
def test_urls_that_are_refused_by_their_looks(url):
    with pytest.raises(UserError, match="webhook_url"):
        webhook_address(url, (), allow_private=False)


@pytest.mark.parametrize(
    "url", ["https://example.com", "https://example.com:8443/a?b=c", "https://8.8.8.8/", "https://[2606:4700::1111]/x"]
)
def test_urls_that_may_be(url):
    address = webhook_address(url, (), allow_private=False)
    assert address.host_header == url.split("/")[2]
    assert webhook_address("http://inner.example/", ("inner.example",), False).host == "inner.example"


@given(st.ip_addresses())
def test_no_private_address_is_public(address):
    assert is_public(address) <= address.is_global
    if address.version == 4:
        assert is_public(ipaddress.ip_address(f"::ffff:{address}")) == is_public(address)


@given(st.integers(1, 10_000))
def test_waits_grow_and_stay_bounded(attempts):
    settings = WebhookSettings(base_seconds=5.0, longest_seconds=3600.0)
    bound = min(3600.0, 5.0 * 2 ** min(attempts - 1, 100))
    assert bound / 2 <= retry_delay(settings, attempts) <= bound


def test_a_weak_secret_is_refused_and_not_shown():
    with pytest.raises(UserError, match="24") as refused:
        WebhookSettings(secret="whsec_c2hvcnQ=")
    assert "c2hvcnQ" not in str(refused.value)
    assert "c21hbHRp" not in repr(WebhookSettings(secret=SECRET))
