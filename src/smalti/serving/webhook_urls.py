"""Where a webhook may go: a server that fetches what users name must not become their way into its own network.

The name is resolved here and the connection is made to the address that was judged, so that a name which changes its
address between the two (DNS rebinding) gains nothing. Redirects are not followed, and proxies of the environment are
not asked.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpcore

from smalti.errors import UserError

_LONGEST_URL = 2000
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class AddressRefused(Exception):
    """A webhook's host has an address that must not be reached."""


@dataclass(frozen=True)
class WebhookAddress:
    """A webhook's URL, taken apart once, so that what is checked is what is asked."""

    url: httpcore.URL
    host: str
    host_header: str


def webhook_address(url: str, allowed_hosts: Iterable[str], allow_private: bool) -> WebhookAddress:
    """A URL that may be a webhook's by its looks: https, or http to an allowed host; a literal address is judged too.

    Raises UserError.
    """
    shown = f"webhook_url={url[:100]!r}"
    if len(url) > _LONGEST_URL or not all(0x20 < ord(c) < 0x7F for c in url):
        raise UserError(f"{shown} must be ASCII without blanks, at most {_LONGEST_URL} characters")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise UserError(f"{shown} is not a URL: {error}") from None
    if not host or parts.username is not None or parts.password is not None:
        raise UserError(f"{shown} must name a host, and neither user nor password")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in set(allowed_hosts)):
        raise UserError(f"{shown} must begin with https://; http is for hosts that the server's webhook_hosts name")
    if not allow_private and any(not is_public(address) for address in _literal(host)):
        raise UserError(f"{shown} is an address of a private network")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    bracketed = f"[{host}]" if ":" in host else host
    return WebhookAddress(
        httpcore.URL(scheme=parts.scheme.encode(), host=host.encode(), port=port, target=target.encode()),
        host,
        bracketed if port is None else f"{bracketed}:{port}",
    )


def _literal(host: str) -> list[Address]:
    """The address that a host is, also in the old spellings that resolvers take (127.1, 0x7f000001, 2130706433)."""
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass
    try:
        return [ipaddress.IPv4Address(socket.inet_aton(host))]
    except OSError:
        return []


def is_public(address: Address) -> bool:
    """Whether an address is one of the open internet, and not a private one in the clothes of a tunnel's."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(address.packed[-4:])
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to hosts whose addresses are all public; to any where allow_private.

    resolver: threads to ask for addresses in, which may take as long as they like.
    """

    def __init__(self, allow_private: bool, resolver: Executor) -> None:
        self._allow_private, self._resolver = allow_private, resolver
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first of a host's addresses that answers. Raises AddressRefused."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self._resolver, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            )
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host} has no address: {error}") from error
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        if not self._allow_private:
            for address in addresses:
                if not is_public(ipaddress.ip_address(address.partition("%")[0])):
                    raise AddressRefused(f"{host} has an address of a private network")
        for last, address in enumerate(addresses, 1 - len(addresses)):
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError:
                if last == 0:
                    raise
        raise httpcore.ConnectError(f"{host} has no address")
