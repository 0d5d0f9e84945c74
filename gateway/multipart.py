"""A multipart/form-data body, taken piece by piece: its files go to a folder, its fields stay in memory. Blocking.

Which parts there may be is told beforehand; names of files come from there, never from the body.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gateway.errors import ApiError, bad_request, quote

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FORM_DATA = "multipart/form-data"
MAX_FIELD = 1024  # bytes
MAX_HEADERS, MAX_HEADER_BYTES = 8, 4096  # of one part
PLAIN = {"", "binary", "8bit", "7bit"}


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type names.

    Raises:
        ApiError: 415 for another type, 400 where it names none.
    """
    kind, options = parse_options_header(content_type)
    if kind != FORM_DATA.encode():
        raise ApiError(415, f"This route takes 'Content-Type: {FORM_DATA}' alone.", code="unsupported_media_type")
    if not (boundary := options.get(b"boundary")):
        raise bad_request("The Content-Type names no boundary.")
    return boundary


class FormReader:
    """`feed` each piece, then `finish`; `close` in any case."""

    def __init__(self, boundary: bytes, folder: Path, files: Mapping[str, int | None], fields: frozenset[str]) -> None:
        """`files`: the parts that are written to the folder, with their most bytes; `fields`: the other ones."""
        self._raw: dict[str, bytearray] = {}  # fields
        self._file: BinaryIO | None = None
        self._folder = folder
        self._files = files
        self._known = fields
        self._seen: set[str] = set()
        self._part: _Part | None = None
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value = b"", b""
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary, self._callbacks(), max_header_count=MAX_HEADERS, max_header_size=MAX_HEADER_BYTES
            )
        except FormParserError as error:
            raise _malformed(error) from None

    def feed(self, data: bytes) -> None:
        """Takes the next piece of the body. Raises ApiError for what may not be there, OSError where a disk is full."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(error) from None

    def finish(self) -> dict[str, str]:
        """The fields, all files written. Raises ApiError where the body is cut off or a file is missing."""
        if not self._ended:
            raise bad_request("The body ends within a part.")
        for name in self._files:
            if name not in self._seen:
                raise bad_request(f"{name!r}: this part is missing.", param=name)
        return {name: _text(name, raw) for name, raw in self._raw.items()}

    def close(self) -> None:
        """Closes the file that is being written, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._headers_begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._part_begin,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _headers_begin(self) -> None:
        self._headers = {}

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def _part_begin(self) -> None:
        name = self._name()
        if name in self._seen:
            raise bad_request(f"{quote(name)}: this part comes twice.", param=name)
        self._seen.add(name)
        if name in self._files:
            self._file = (self._folder / name).open("xb")
            self._part = _Part(name, self._files[name], self._file.write)
        else:
            self._part = _Part(name, MAX_FIELD, self._raw.setdefault(name, bytearray()).extend)

    def _name(self) -> str:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name not in self._files and name not in self._known:
            wanted = ", ".join([*self._files, *sorted(self._known)])
            raise bad_request(f"{quote(name)}: unknown part; known are {wanted}.", param=name[:64] or None)
        coding = self._headers.get(b"content-transfer-encoding", b"").decode("latin-1").strip().lower()
        if coding not in PLAIN:
            raise bad_request(f"{name!r}: parts are taken as they are, not in {quote(coding)}.", param=name)
        return name

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._part is not None
        self._part.write(memoryview(data)[start:end])

    def _part_end(self) -> None:
        self._part = None
        self.close()

    def _end(self) -> None:
        self._ended = True


class _Part:
    """One part's bytes on their way, counted."""

    def __init__(self, name: str, limit: int | None, take: Callable[[memoryview], object]) -> None:
        self._name = name
        self._room = limit
        self._take = take

    def write(self, data: memoryview) -> None:
        if self._room is not None:
            self._room -= len(data)
            if self._room < 0:
                raise ApiError(413, f"{self._name!r}: this part is too large.", param=self._name, code="body_too_large")
        self._take(data)


def _text(name: str, raw: bytearray) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise bad_request(f"{name!r}: not UTF-8.", param=name) from None


def _malformed(error: FormParserError) -> ApiError:
    return bad_request(f"The body is no well-formed {FORM_DATA}: {str(error)[:200]}.")
