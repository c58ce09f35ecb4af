"""Webhooks: the signed message of a job's end (Standard Webhooks), sent until its receiver takes it or for long enough.

A message enters the store in the transaction that ends its job. So it survives the server, and jobs never wait for it.
A receiver may get it twice, when the server dies between its answer and our note of it: webhook-id is then the same.
"""

import asyncio
import base64
import datetime
import hashlib
import hmac
import json
import logging
import random
import secrets
import ssl
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

import httpcore
from standardwebhooks.webhooks import Webhook as Signer

from smalti.errors import UserError
from smalti.serving.job_schemas import job_object
from smalti.serving.service import Unavailable
from smalti.serving.store import Store
from smalti.serving.store_tables import Job, Webhook, WebhookStatus, fact, next_due, next_webhook, note_delivery
from smalti.serving.webhook_urls import AddressRefused, GuardedNetwork, webhook_address

_log = logging.getLogger(__name__)

_SECRET_PREFIX = "whsec_"
_LONGEST_ERROR = 300
_GONE = 410  # the receiver says that it wants no more


@dataclass(frozen=True)
class WebhookSettings:
    """secret: whsec_ and base64 of at least 24 bytes, from which each tenant's own is made; None = one that the store
    keeps. hosts: names that http may reach. allow_private: send to addresses of private networks.

    concurrency: messages on their way at once, per_host to one host. timeout_seconds: for the whole exchange.
    max_attempts: tries before a message is dead. base_seconds, longest_seconds: the wait before try k is
    base_seconds * 2^k, at most longest_seconds, times a random number of 0.5 .. 1.
    """

    secret: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    allow_private: bool = False
    concurrency: int = 8
    per_host: int = 2
    timeout_seconds: float = 10.0
    max_attempts: int = 10
    base_seconds: float = 5.0
    longest_seconds: float = 3600.0

    def __post_init__(self) -> None:
        names = ("concurrency", "per_host", "timeout_seconds", "max_attempts", "base_seconds", "longest_seconds")
        for name in names:
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        if self.secret is not None:
            _secret_bytes(self.secret)


def _secret_bytes(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if len(key) < 24:
        raise UserError("webhook secret: must be whsec_ and base64 of at least 24 random bytes")
    return key


def retry_delay(settings: WebhookSettings, attempts: int) -> float:
    """Seconds before the next try, after so many: exponential, with jitter so that receivers that were down get no
    volley when they are back."""
    bound: float = min(settings.longest_seconds, settings.base_seconds * 2.0 ** min(attempts - 1, 60))
    return bound * random.uniform(0.5, 1.0)


class Webhooks:
    """Sends what is in the outbox. To be started on the event loop."""

    def __init__(self, store: Store, settings: WebhookSettings | None = None) -> None:
        self.store, self.settings = store, settings or WebhookSettings()
        self._resolver = ThreadPoolExecutor(self.settings.concurrency, "webhook-resolve")
        self._sending: dict[str, Webhook] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None
        self._master = b""
        self._pool: httpcore.AsyncConnectionPool | None = None

    # --- what jobs ask

    def check_url(self, url: str) -> None:
        """Refuse a URL that no message could go to. Raises UserError."""
        webhook_address(url, self.settings.hosts, self.settings.allow_private)

    def message_of(self, job: Job) -> Webhook | None:
        """The message of a job's end, where its caller wants one."""
        if job.webhook_url is None or job.ended is None:
            return None
        ended = datetime.datetime.fromtimestamp(job.ended, datetime.UTC).isoformat()
        data = job_object(job).model_dump(mode="json", exclude={"webhook", "place"})
        body = json.dumps({"type": f"job.{job.status}", "timestamp": ended, "data": data})
        host = urlsplit(job.webhook_url).hostname or ""
        return Webhook(f"msg_{job.id.removeprefix('job_')}", job.id, job.tenant, job.webhook_url, host, body, job.ended)

    def secret_of(self, tenant: str) -> str:
        """What a tenant's messages are signed with: its own, so that no receiver can speak for the server to another's.

        After start only.
        """
        assert self._master, "webhooks have not been started"
        key = hmac.digest(self._master, b"smalti webhook " + tenant.encode(), hashlib.sha256)
        return _SECRET_PREFIX + base64.b64encode(key).decode()

    def wake(self) -> None:
        """Look for new messages now."""
        self._news.set()

    # --- life

    async def start(self) -> None:
        """Begin to send."""
        if self.settings.secret is not None:
            self._master = _secret_bytes(self.settings.secret)
        else:
            made = base64.b64encode(secrets.token_bytes(32)).decode()
            self._master = _secret_bytes(await self.store.write(partial(fact, name="webhook_secret", otherwise=made)))
        self._dispatcher = asyncio.create_task(self._dispatch())

    async def close(self) -> None:
        """Stop sending. What was on its way is sent again by the next server."""
        tasks = [*self._tasks, *([self._dispatcher] if self._dispatcher is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._pool is not None:
            await self._pool.aclose()
        self._resolver.shutdown(wait=False, cancel_futures=True)

    async def _dispatch(self) -> None:
        while True:
            self._news.clear()
            wait: float | None = None
            try:
                await self._send_due()
                sending = list(self._sending)
                if len(sending) < self.settings.concurrency:
                    due = await self.store.read(partial(next_due, not_these=sending, not_hosts=self._busy_hosts()))
                    wait = None if due is None else max(due - time.time(), 0.02)
            except Unavailable:
                wait = 5.0
            except Exception:
                _log.exception("webhooks")
                wait = 5.0
            # Also woken when one of those on their way has ended, and with it there is room.
            try:
                async with asyncio.timeout(wait):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _send_due(self) -> None:
        room = self.settings.concurrency - len(self._sending)
        while room > 0:
            # One at a time: each may make its host a busy one.
            sending, busy = list(self._sending), self._busy_hosts()
            message = await self.store.read(partial(next_webhook, now=time.time(), not_these=sending, not_hosts=busy))
            if message is None:
                return
            self._sending[message.id] = message
            task = asyncio.create_task(self._deliver(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            room -= 1

    def _busy_hosts(self) -> list[str]:
        """Hosts that get nothing more now: one that hangs must not hold up the others' messages."""
        hosts = Counter(message.host for message in self._sending.values())
        return [host for host, count in hosts.items() if count >= self.settings.per_host]

    async def _deliver(self, message: Webhook) -> None:
        try:
            status, error = await self._attempt(message)
            due = time.time()
            if status == "pending":
                due += retry_delay(self.settings, message.attempts + 1)
            if status == "dead":
                _log.warning("webhook %s is dead after %d tries: %s", message.id, message.attempts + 1, error)
            note = partial(note_delivery, id=message.id, status=status, due=due, error=error)
            while True:
                try:
                    await self.store.write(note)
                    return
                except Unavailable:
                    # Without the note it would be sent again: better to hold its place until there is room.
                    await asyncio.sleep(1.0)
        finally:
            del self._sending[message.id]
            self._news.set()

    async def _attempt(self, message: Webhook) -> tuple[WebhookStatus, str | None]:
        """Send once: what it makes of the message, and what went wrong."""
        last = message.attempts + 1 >= self.settings.max_attempts
        failed: WebhookStatus = "dead" if last else "pending"
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                answer = await self._post(message)
        except (AddressRefused, UserError) as error:
            return "dead", str(error)[:_LONGEST_ERROR]
        except TimeoutError:
            return failed, f"no answer within {self.settings.timeout_seconds:g} s"
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError) as error:
            return failed, f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
        except Exception as error:
            _log.exception("webhook %s", message.id)
            return failed, type(error).__name__
        if 200 <= answer < 300:
            return "delivered", None
        return "dead" if answer == _GONE else failed, f"answered {answer}"

    async def _post(self, message: Webhook) -> int:
        """The status of the answer; its body is not read."""
        address = webhook_address(message.url, self.settings.hosts, self.settings.allow_private)
        now = datetime.datetime.now(datetime.UTC)
        headers: dict[bytes | str, bytes | str] = {
            "host": address.host_header,
            "content-type": "application/json",
            "content-length": str(len(message.body.encode())),
            "user-agent": "smalti-webhooks",
            "webhook-id": message.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Signer(self.secret_of(message.tenant)).sign(message.id, now, message.body),
        }
        pool = await self._connections()
        async with pool.stream("POST", address.url, headers=headers, content=message.body.encode()) as response:
            return int(response.status)

    async def _connections(self) -> httpcore.AsyncConnectionPool:
        if self._pool is None:
            # Reading the certificates takes 50 ms: not on the loop, and not where nothing is sent.
            context = await asyncio.get_running_loop().run_in_executor(None, ssl.create_default_context)
            self._pool = self._pool or httpcore.AsyncConnectionPool(
                ssl_context=context,
                max_connections=self.settings.concurrency,
                max_keepalive_connections=0,  # a receiver that changed its address is judged anew each time
                network_backend=GuardedNetwork(self.settings.allow_private, self._resolver),
            )
        return self._pool
