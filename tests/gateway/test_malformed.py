"""What is no HTTP, or has no end, is refused in the API's own shape, and the server goes on."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.malformed import MAX_HEAD, HttpProtocol
from tests.gateway.app_harness import make_app
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.harness import serve


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    async with serve(make_app(tmp_path, FakeEngine()).asgi, HttpProtocol) as address:
        yield address


async def sent(url: str, start: bytes, more: bytes = b"") -> tuple[bytes, dict[str, str]]:
    """The answer's first line and its error; `more` is sent until it is too much."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(start)
    for _ in range((MAX_HEAD - len(start)) // len(more) + 1 if more else 0):
        writer.write(more)
        await asyncio.sleep(0.001)
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.read()
    writer.close()
    return head.splitlines()[0], json.loads(body)["error"]


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /health HTTP/1.1\r\n", b"X-A: " + b"a" * 1000 + b"\r\n"),
        (b"GET /health HTTP/1.1\r\nX-A: ", b"a" * 1000),
        (b"GET /", b"a" * 1000),
    ],
    ids=["many headers", "a long header", "a long address"],
)
async def test_a_head_without_an_end(url: str, start: bytes, more: bytes) -> None:
    line, error = await sent(url, start, more)
    assert line == b"HTTP/1.1 431 Request Header Fields Too Large"
    assert error["code"] == "head_too_large"
    assert str(MAX_HEAD) in error["message"]
    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/health")).status_code == 200


async def test_what_is_no_http(url: str) -> None:
    line, error = await sent(url, b"HELLO\r\n\r\n")
    assert line == b"HTTP/1.1 400 Bad Request"
    assert error["type"] == "invalid_request_error"


async def test_large_heads_within_bounds_and_bodies_of_any_size(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for _ in range(3):
            headers = {"X-A": "a" * (MAX_HEAD - 1000)}
            assert (await client.get("/health", headers=headers)).status_code == 200
            large = await client.post("/v1/completions", content=b" " * (3 * MAX_HEAD), headers=headers)
            assert large.json()["error"]["type"] == "invalid_request_error"
