"""The wire between gateway and engine: length-prefixed msgpack over a Unix stream socket, or in memory for tests.

The end of the stream is the death of the peer; `flush` is the back-pressure. Each side names the type that it reads.
"""

import asyncio
import contextlib
from typing import Generic, Protocol, TypeVar

import msgspec

from engine.messages import Command, Event

In = TypeVar("In")
Out = TypeVar("Out")
In_co = TypeVar("In_co", covariant=True)
Out_contra = TypeVar("Out_contra", contravariant=True)

_PREFIX = 4  # bytes of the big-endian length before each message


class Link(Protocol[In_co, Out_contra]):
    """One end: reads `In_co`, writes `Out_contra`."""

    def post(self, message: Out_contra) -> None:
        """Queues one message; nothing happens when the peer is gone (the reader learns of that)."""

    async def flush(self) -> None:
        """Returns once the peer keeps up with what was posted."""

    async def receive(self) -> In_co | None:
        """The next message, or None when the peer is gone."""

    async def close(self) -> None: ...


class SocketLink(Generic[In, Out]):
    """A link over asyncio's streams."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decoder: "msgspec.msgpack.Decoder[In]"
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()

    def post(self, message: Out) -> None:
        if self._writer.is_closing():
            return
        payload = self._encoder.encode(message)
        self._writer.write(len(payload).to_bytes(_PREFIX, "big") + payload)

    async def flush(self) -> None:
        try:
            await self._writer.drain()
        except ConnectionError:
            return  # the reading side sees the end of the stream and acts on it

    async def receive(self) -> In | None:
        try:
            size = int.from_bytes(await self._reader.readexactly(_PREFIX), "big")
            return self._decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def close(self) -> None:
        self._writer.close()
        # Everyone who closes waits for one future of the stream: one that is cancelled must not end it for the others.
        await asyncio.shield(self._closed())

    async def _closed(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class MemoryLink(Generic[In, Out]):
    """One end of a pair of queues. Messages pass through msgpack all the same, so that types are checked."""

    def __init__(
        self,
        inbox: "asyncio.Queue[bytes | None]",
        outbox: "asyncio.Queue[bytes | None]",
        decoder: "msgspec.msgpack.Decoder[In]",
    ) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._closed = False

    def post(self, message: Out) -> None:
        if not self._closed:
            self._outbox.put_nowait(self._encoder.encode(message))

    async def flush(self) -> None:
        await asyncio.sleep(0)

    async def receive(self) -> In | None:
        payload = None if self._closed else await self._inbox.get()
        return None if payload is None else self._decoder.decode(payload)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._outbox.put_nowait(None)
            self._inbox.put_nowait(None)


GatewayLink = Link[Event, Command]
EngineLink = Link[Command, Event]


def gateway_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> SocketLink[Event, Command]:
    decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
    return SocketLink(reader, writer, decoder)


def engine_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> SocketLink[Command, Event]:
    decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
    return SocketLink(reader, writer, decoder)


def memory_pair() -> tuple[MemoryLink[Event, Command], MemoryLink[Command, Event]]:
    """(gateway's end, engine's end) within one event loop."""
    commands: asyncio.Queue[bytes | None] = asyncio.Queue()
    events: asyncio.Queue[bytes | None] = asyncio.Queue()
    event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
    command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
    return MemoryLink(events, commands, event_decoder), MemoryLink(commands, events, command_decoder)
