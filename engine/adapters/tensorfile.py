"""A safetensors file, header first: its tensors are judged before their bytes are read, and its bytes are read once.

Read rather than mapped, so that a file that shrinks under us is an error and no crash, and hash and tensors agree.
"""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.adapters.pages import ReusedPages
from engine.adapters.spec import invalid
from engine.types import TENSORS_FILE

MAX_HEADER_BYTES = 16 << 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READ_AT_ONCE = 1 << 18  # bytes: still in the core's own cache when they are hashed


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the header tells it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the body's start
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    raw: bytes  # as in the file, its length first
    entries: dict[str, Entry]
    body_bytes: int


def read_header(stream: BinaryIO, file_bytes: int) -> Header:
    """Reads and checks the header: tensors of known dtypes that fill the rest of the file without a gap.

    Raises EngineError (ADAPTER_INVALID).
    """
    start = stream.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if len(start) < 8 or size > file_bytes - 8:
        raise _fault(f"is truncated or no safetensors file ({file_bytes:,} bytes)")
    if size > MAX_HEADER_BYTES:
        raise _fault(f"has a header of {size:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    raw = stream.read(size)
    entries = {entry.name: entry for entry in _entries(raw)}
    body = file_bytes - 8 - size
    _check_ranges(entries, body)
    return Header(start + raw, entries, body)


def read_body(
    stream: BinaryIO, header: Header, seen: Callable[[memoryview], None], pages: ReusedPages
) -> NDArray[np.uint8]:
    """All tensors' bytes, [body_bytes] uint8 of `pages`; `seen` is given them piece by piece, in order.

    Raises EngineError (ADAPTER_INVALID).
    """
    body = pages.take(header.body_bytes)
    view, done = body.data, 0
    while done < len(view):
        count = stream.readinto(view[done : done + READ_AT_ONCE])  # type: ignore[attr-defined]
        if not count:
            raise _fault("became shorter while it was read")
        seen(view[done : done + count])
        done += count
    return body


def tensor_of(body: NDArray[np.uint8], entry: Entry) -> Tensor:
    """The entry's tensor; it shares the body's memory where its alignment allows."""
    part = body[entry.start : entry.end]
    if entry.start % entry.dtype.itemsize:
        part = part.copy()
    return torch.from_numpy(part).view(entry.dtype).view(entry.shape)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor infinity: a NaN would be its minimum and its maximum."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return isfinite(low.item()) and isfinite(high.item())


def _entries(raw: bytes) -> Iterator[Entry]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _fault("is no safetensors file: its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise _fault("is no safetensors file: its header is no object")
    header.pop("__metadata__", None)
    return (_entry(name, value) for name, value in header.items())


def _entry(name: str, value: Any) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            if dtype not in DTYPES:
                raise _fault(f"{name} has dtype {dtype}; expected {', '.join(DTYPES)}")
            if all(type(size) is int and size >= 0 for size in shape) and 0 <= start <= end:
                entry = Entry(name, DTYPES[dtype], tuple(shape), start, end)
                if prod(shape) * entry.dtype.itemsize == end - start:
                    return entry
    raise _fault(f"has a header that makes no sense at {name[:200]!r}")


def _check_ranges(entries: dict[str, Entry], body_bytes: int) -> None:
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            raise _fault(f"has a gap or an overlap before {entry.name}")
        position = entry.end
    if position > body_bytes:
        raise _fault(f"is truncated: its tensors take {position:,} bytes, {body_bytes:,} are there")
    if position < body_bytes:
        raise _fault(f"has {body_bytes - position:,} bytes behind its last tensor")


def _fault(reason: str) -> Exception:
    return invalid(f"{TENSORS_FILE} {reason}")
