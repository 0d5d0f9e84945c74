"""Bodies of forms, in pieces of every size, whole, cut off and doctored."""

from pathlib import Path

import pytest

from gateway.errors import ApiError
from gateway.multipart import MAX_FIELD, FormReader, boundary_of

BOUNDARY = b"limit"
FILES = {"config": 100, "weights": None}
FIELDS = frozenset({"name", "pinned"})
WEIGHTS = bytes(range(256)) * 40 + b"\r\n--limi\r\n--\r\n"  # near misses of the boundary among them


def part(name: str, data: bytes, extra: str = "") -> bytes:
    return f'--limit\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--limit--\r\n"


GOOD = form(part("config", b"{}", '; filename="../../etc/passwd"'), part("name", b"sql"), part("weights", WEIGHTS))


def read(folder: Path, body: bytes, size: int = 1000) -> dict[str, str]:
    reader = FormReader(BOUNDARY, folder, FILES, FIELDS)
    try:
        for start in range(0, len(body), size):
            reader.feed(body[start : start + size])
        return reader.finish()
    finally:
        reader.close()


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
def test_files_go_to_the_folder_and_fields_come_back(tmp_path: Path, size: int) -> None:
    assert read(tmp_path, GOOD, size) == {"name": "sql"}
    assert {path.name for path in tmp_path.iterdir()} == {"config", "weights"}
    assert (tmp_path / "weights").read_bytes() == WEIGHTS
    assert (tmp_path / "config").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (GOOD[:-20], 400, "ends within a part"),
        (b"", 400, "ends within a part"),
        (form(part("config", b"{}")), 400, "'weights': this part is missing"),
        (form(part("config", b"{}"), part("config", b"{}")), 400, "comes twice"),
        (form(part("../up", b"x")), 400, "unknown part"),
        (form(part("", b"x")), 400, "unknown part"),
        (form(part("config", b"x" * 101)), 413, "too large"),
        (form(part("name", b"x" * (MAX_FIELD + 1))), 413, "too large"),
        (form(part("config", b""), part("weights", b""), part("name", b"\xff")), 400, "not UTF-8"),
        (form(part("config", b"e30=", "\r\nContent-Transfer-Encoding: base64")), 400, "not in 'base64'"),
        (b"{}", 400, "no well-formed"),
        (b"--limit\r\n" + b"X" * 5000 + b": y\r\n", 400, "no well-formed"),
        (b"--limit\r\n" + b"A: b\r\n" * 20, 400, "no well-formed"),
    ],
)
def test_what_is_refused(tmp_path: Path, body: bytes, status: int, told: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(tmp_path, body)
    assert caught.value.status == status
    assert told in caught.value.message
    assert len(caught.value.message) < 400
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*"))


def test_the_boundary_is_that_of_the_header() -> None:
    assert boundary_of("multipart/form-data; boundary=abc") == b"abc"
    assert boundary_of('Multipart/Form-Data; charset=utf-8; boundary="a b"') == b"a b"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("", 415),
        ("application/json", 415),
        ("multipart/mixed; boundary=a", 415),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
    ],
)
def test_other_types_are_refused(header: str, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        boundary_of(header)
    assert caught.value.status == status


def test_a_boundary_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="no well-formed"):
        FormReader(b"x" * 1000, tmp_path, FILES, FIELDS)
