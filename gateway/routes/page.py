"""The live page at `/` and its parts at `/page/...`: static files, read once, that hold no data of the server.

They are open to all; what the page shows it asks of the other routes, with the key that it was given.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gateway.errors import ApiError, quote

INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "cache-control": "no-cache",  # kept, but asked about each time: another version of the server has other files
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str

    def answer(self, known: str) -> Response:
        """The file, or 304 where the client's `known` (If-None-Match) names it."""
        headers = HEADERS | {"etag": self.etag}
        tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}
        if self.etag in tags or "*" in tags:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers | {"content-type": self.media_type})


def routes() -> list[BaseRoute]:
    page = read_files()

    async def index(request: Request) -> Response:
        return page[INDEX].answer(request.headers.get("if-none-match", ""))

    async def part(request: Request) -> Response:
        name: str = request.path_params["file"]
        if name not in page or name == INDEX:
            raise ApiError(404, f"The page has no file {quote(name)}.", code="unknown_route")
        return page[name].answer(request.headers.get("if-none-match", ""))

    return [Route("/", index, methods=["GET"]), Route("/page/{file}", part, methods=["GET"])]


def read_files() -> dict[str, PageFile]:
    """Every file of the page by its name."""
    found = {}
    for file in files("gateway").joinpath("page").iterdir():
        ending = file.name[file.name.rfind(".") :]
        if ending in MEDIA_TYPES:
            content = file.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[file.name] = PageFile(content, MEDIA_TYPES[ending], etag)
    return found
