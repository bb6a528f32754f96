"""Downloads of stills and videos from allowed hosts, which cannot be turned against the server's own network.

The host's addresses are looked up once, each must be public, and the connection goes to one of those that were checked,
so that a second look-up cannot give another one. A redirect is followed only to the same host, with the same checks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urljoin, urlsplit, urlunsplit

import httpx

from bt_adapter.serve.media import MediaError

_REDIRECTS = 3
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all of IPv6 that is assigned to the public; Python's own list is older
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # addresses that stand for IPv4 ones
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """Look up the addresses of a host. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Tell whether an IP address is reachable from everywhere, and so none of the server's own network."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner:
            return is_public(str(inner))
        if ip not in _UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


class Downloader:
    """Downloads files by https from hosts of a list.

    Args:
        domains: allowed hosts, each with ``:PORT`` if it is not 443. most: limit on a file's bytes.
        seconds: limit on the time of a download with its redirects.
        resolve: looks up a host's addresses. transport: replaces the network.
    """

    def __init__(
        self,
        domains: Sequence[str],
        most: int,
        seconds: float,
        resolve: Resolve = resolve,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.hosts = {_with_port(domain) for domain in domains}
        self.most, self.seconds = most, seconds
        self.resolve, self.transport = resolve, transport

    async def get(self, url: str, hold: Callable[[int], None] = lambda size: None) -> bytes:
        """Download a file. hold: called with the size of each piece as it comes. Raises MediaError."""
        if not self.hosts:
            raise MediaError("URLs are not allowed by this server (option --allowed-media-domain of bt-adapter serve)")
        try:
            async with asyncio.timeout(self.seconds):
                # no proxy of the environment: it would look the host up by itself
                async with httpx.AsyncClient(
                    transport=self.transport, trust_env=False, follow_redirects=False, timeout=self.seconds
                ) as client:
                    for _ in range(_REDIRECTS + 1):
                        content, url = await self._get(client, url, hold)
                        if content is not None:
                            return content
            raise MediaError("the media's host redirects too often")
        except TimeoutError as error:
            raise MediaError(f"the download took longer than {self.seconds:g} seconds") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            raise MediaError("the media's host cannot be reached") from error

    async def _get(self, client: httpx.AsyncClient, url: str, hold: Callable[[int], None]) -> tuple[bytes | None, str]:
        """Request one address; return its content, or None and the address it redirects to."""
        host, port, target = self._checked(url)
        address = await self._address(host, port)
        dialled = f"https://[{address}]:{port}{target}" if ":" in address else f"https://{address}:{port}{target}"
        headers = {"Host": host if port == 443 else f"{host}:{port}", "Accept-Encoding": "identity"}
        async with client.stream("GET", dialled, headers=headers, extensions={"sni_hostname": host}) as answer:
            if answer.has_redirect_location:
                following = urljoin(url, answer.headers["Location"])
                if self._checked(following)[:2] != (host, port):
                    raise MediaError("the media's host redirects to another host, which is not followed")
                return None, following
            if answer.status_code != 200:
                raise MediaError(f"the media's host answered with status {answer.status_code}")
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise MediaError("the media's host compressed its answer, though it was asked not to")
            content = bytearray()
            async for piece in answer.aiter_raw():
                hold(len(piece))
                content += piece
                if len(content) > self.most:
                    raise MediaError(f"the file is larger than the limit of {self.most:,} bytes")
            if not content:
                raise MediaError("the media's host sent an empty file")
            return bytes(content), url

    def _checked(self, url: str) -> tuple[str, int, str]:
        """Return host, port and path of an allowed URL. Raises MediaError."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port or 443
        except ValueError as error:
            raise MediaError("the URL is not valid") from error
        if parts.scheme != "https" or parts.username is not None or parts.password is not None or not url.isascii():
            raise MediaError("a URL must begin with https://, and hold no user name and ASCII characters only")
        if (host, port) not in self.hosts:
            raise MediaError("the URL's host is not among those that this server allows")
        return host, port, urlunsplit(("", "", parts.path or "/", parts.query, ""))

    async def _address(self, host: str, port: int) -> str:
        """Look up a host and return one of its addresses. Raises MediaError unless all of them are public."""
        try:
            addresses = await self.resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise MediaError("the media's host is not known") from error
        if not addresses or not all(is_public(address) for address in addresses):
            raise MediaError("the media's host is not on the public internet")
        return addresses[0]


def _with_port(domain: str) -> tuple[str, int]:
    host, _, port = domain.lower().partition(":")
    return host.rstrip("."), int(port) if port else 443
