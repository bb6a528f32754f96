"""Malformed and hostile requests for ``bench/serve_load.py``.

A part comes from schemathesis, which reads the server's OpenAPI schema; the others from fuzzers of media and addresses.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from PIL import Image

from bt_adapter.mini import data_folder

if TYPE_CHECKING:
    from serve_load import Server

CHAT = "/v1/chat/completions"
_CLIENTS = 4
HOSTS = (
    "127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "0.0.0.0", "2130706433", "0x7f000001",
    "017700000001", "[::ffff:127.0.0.1]", "metadata.google.internal", "example.org", "user:pass@example.org",
    "example.org:22", "..", "",
)  # fmt: skip
PATHS = (
    "/etc/passwd", "/proc/self/environ", "/dev/zero", "/dev/stdin", "/", "/../../etc/shadow",
    "/%2e%2e/etc/passwd", "/\0", "", "/latest/meta-data/", "//etc/passwd", "/" + "a" * 5000, "/caf\u00e9",
    "/\u202e",
)  # fmt: skip
SCHEMES = (
    "file", "https", "http", "ftp", "gopher", "data", "javascript", "concat", "subfile", "rtsp", "pipe",
    "FILE", "hTTps", "",
)  # fmt: skip
HEADS = (
    "data:", "data:video/mp4", "data:;base64,", "data:video/mp4;base64", "data:video/jpeg;base64,",
    "DATA:video/webm;codecs=vp9,opus;BASE64,",
)  # fmt: skip
# what an answer must not tell: folders of this machine, and addresses that the client did not send
_TOLD = re.compile(rb"/(?:home|root|usr|tmp|work|opt|var|proc|site-packages)/|Traceback|line \d+, in|\.py\b")
_ADDRESS = re.compile(rb"\b\d{1,3}(?:\.\d{1,3}){3}\b")


def hostile(server: Server, count: int) -> dict[str, Any]:
    """Send so many requests by some clients, half of them of broken media; return what came back, and the memory."""
    seen: Counter[int] = Counter()
    faults: list[str] = []
    memory: list[float] = []
    draw = random.Random(0)
    makers = [*fuzzers(draw)]
    with httpx.Client(base_url=server.url, timeout=120) as client, ThreadPoolExecutor(_CLIENTS) as pool:

        def check(answer: httpx.Response, sent: bytes) -> None:
            seen[answer.status_code] += 1
            addresses = set(_ADDRESS.findall(answer.content)) - set(_ADDRESS.findall(sent))
            told = [word for word in _TOLD.findall(answer.content) if word not in sent]
            shaped = answer.status_code < 400 or b'"error"' in answer.content or answer.status_code == 405
            if answer.status_code >= 500 or addresses or told or not shaped:
                faults.append(f"{answer.status_code}: {answer.text[:200]!r} to {sent[:300]!r}")

        def send(made: tuple[bytes, str]) -> None:
            content, kind = made
            try:
                answer = client.post(CHAT, content=content, headers={"Content-Type": kind})
            except httpx.HTTPError as error:
                faults.append(f"{type(error).__name__} to {content[:300]!r}")
                return
            check(answer, content)

        by_schema = from_schema(server.url, max(1, count // 5), check)
        left, warm = count - by_schema, count // 10  # allocators and caches fill up
        for number in range(0, left, block := max(1, count // 50)):
            bodies = [draw.choice(makers)() for _ in range(min(block, left - number))]
            list(pool.map(send, bodies))
            if number >= warm:
                memory.append(server.memory)
        alive = client.get("/health").status_code == 200
        right = client.post(CHAT, json=good()).status_code == 200
    grown = max(memory[len(memory) // 2 :]) / max(memory[: len(memory) // 2]) - 1 if len(memory) > 1 else None
    for fault in faults[:20]:
        print(f"fault: {fault}")
    return {
        "part": "hostile", "requests": count, "by_schemathesis": by_schema, "statuses": dict(sorted(seen.items())),
        "faults": len(faults), "alive": alive and right, "memory_mib": [round(value) for value in memory],
        "memory_growth": grown, "held": not faults and alive and right and (grown is None or grown < 0.05),
    }  # fmt: skip


def from_schema(url: str, count: int, check: Callable[[httpx.Response, bytes], None]) -> int:
    """Send requests that schemathesis makes from the server's schema, valid and not; return how many were sent."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = sum(operation.method.upper() == "POST" for operation in operations)
    sent = 0
    for operation in operations:
        share = max(2, count // posts) if operation.method.upper() == "POST" else 20
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and operation.method.upper() != "POST":
                continue  # a request without parameters has no invalid form
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(
                max_examples=share // 2, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=strategy)
            def send(case: Any) -> None:
                nonlocal sent
                sent += 1
                answer = case.call(base_url=url, timeout=120)
                body = answer.request.body or b""
                check(
                    httpx.Response(answer.status_code, content=answer.content),
                    body if isinstance(body, bytes) else body.encode(),
                )

            send()
    return sent


@functools.cache
def _clip() -> bytes:
    return sorted((data_folder() / "clips").glob("*.mp4"))[0].read_bytes()


def good() -> dict[str, Any]:
    """A request that must be answered."""
    return json.loads(_about("video", _data("video/mp4", _clip())))


def fuzzers(draw: random.Random) -> Iterator[Callable[[], tuple[bytes, str]]]:
    """Yield functions that make the body of a request and its content type."""
    clips = [path.read_bytes() for path in sorted((data_folder() / "clips").glob("*.mp4"))]
    pictures = {form: _picture(form) for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")}
    kind = "application/json"

    def broken(content: bytes) -> bytes:
        data = bytearray(content)
        how = draw.randrange(5)
        if how == 0:
            return bytes(data[: draw.randrange(1, len(data))])
        if how == 1:
            return draw.randbytes(draw.randrange(1, 4000))
        if how == 2:
            place = draw.randrange(len(data))
            data[place:place] = draw.randbytes(draw.randrange(1, 64))
            return bytes(data)
        # fields of the header decide sizes and counts
        span = min(len(data), 1500) if how == 3 else len(data)
        for _ in range(draw.choice((1, 4, 32))):
            data[draw.randrange(span)] = draw.choice((0, 0xFF, 0x7F, draw.randrange(256)))
        return bytes(data)

    def video() -> tuple[bytes, str]:
        return _about("video", _data("video/mp4", broken(draw.choice(clips))), _choice(draw)), kind

    def still() -> tuple[bytes, str]:
        return _about("image", _data("image/png", broken(draw.choice(list(pictures.values()))))), kind

    def frames() -> tuple[bytes, str]:
        pieces = [base64.b64encode(broken(pictures["JPEG"])).decode() for _ in range(draw.randrange(1, 5))]
        return _about("video", "data:video/jpeg;base64," + ",".join(pieces), _choice(draw)), kind

    def address() -> tuple[bytes, str]:
        url = f"{draw.choice(SCHEMES)}{draw.choice(('://', ':', ':/', ''))}{draw.choice(HOSTS)}{draw.choice(PATHS)}"
        return _about(draw.choice(("video", "image")), url), kind

    def data_url() -> tuple[bytes, str]:
        head = draw.choice(HEADS)
        return _about(
            "video", head + draw.choice(("", ",", ",,,,", "=" * 50, "A" * 401, "%00", "\u00e9", ";" * 3000))
        ), kind

    def fields() -> tuple[bytes, str]:
        body = good()
        values = (None, 0, -1, 2**63, 1e308, float("nan"), "", "x" * 300, [], {}, [[]], True, "\ud800", {"a": [1] * 50})
        names = (
            "model", "messages", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "fps", "num_frames",
            "max_frames", "stream", "stream_options", "media_io_kwargs", "mm_processor_kwargs", "branch", "x",
        )  # fmt: skip
        for _ in range(draw.randrange(1, 4)):
            body[draw.choice(names)] = draw.choice(values)
        return json.dumps(body).encode(), kind

    def syntax() -> tuple[bytes, str]:
        body = bytearray(json.dumps(good()).encode())
        for _ in range(draw.randrange(1, 6)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        odd = (
            b"",
            b"null",
            b"[" * 5000,
            b'{"messages":[' + b"0," * 150_000,
            b'{"x":[' + b"{}," * 45_000 + b"0]}",
            b'{"a":' * 3000,
            b"9" * 6000,
            b"\xff\xfe",
            b'"\\ud800"',
            bytes(body),
        )
        return draw.choice(odd), draw.choice((kind, kind, "text/plain", "application/xml", "multipart/form-data", ""))

    yield from (video, video, video, still, still, frames, address, data_url, fields, syntax)


def _choice(draw: random.Random) -> dict[str, Any]:
    return draw.choice(({}, {"num_frames": 3}, {"fps": 1000.0, "max_frames": 4}, {"fps": 0.001}, {"fps": 1000.0}))


def _about(kind: str, url: str, fields: dict[str, Any] | None = None) -> bytes:
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    content = [part, {"type": "text", "text": "What is it?"}]
    body = {"model": "mini", "messages": [{"role": "user", "content": content}], "max_tokens": 1} | (fields or {})
    return json.dumps(body).encode()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _picture(form: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()
