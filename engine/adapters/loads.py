"""Loads that somebody asked for by name: first ones, shared by all who ask for the same, and those in place.

Called by the loader. Loads in place of one name are carried out one after the other, so the last one asked for is what
the name means in the end.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from engine.adapters.control import AdapterControl
from engine.adapters.intake import Intake, foreseen
from engine.messages import RequestFailed
from engine.types import AdapterInfo, EngineError, ErrorCode


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a load asks for."""

    name: str
    source: str
    revision: str | None = None
    pinned: bool | None = None  # None: no, or as the version before
    weight: float | None = None  # None: 1, or as the version before


@dataclass(slots=True)
class FirstLoad:
    """One that runs, and how many wait for it."""

    task: "asyncio.Task[None]"
    callers: int = 0


@dataclass(slots=True)
class Turns:
    """Loads in place of one name, in the order in which they came."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    callers: int = 0
    events: int = 0  # counts arrivals and beginnings
    done: tuple[int, Wanted, int] | None = None  # when the last that succeeded began, what it was, its adapter_id

    def tick(self) -> int:
        self.events += 1
        return self.events

    def served(self, wanted: Wanted, arrived: int) -> int | None:
        """The adapter_id of the same load, if one began after this one had arrived: it read what this one would."""
        if self.done is None:
            return None
        began, what, adapter_id = self.done
        return adapter_id if what == wanted and began > arrived else None


class Loads:
    """`fail` tells of requests that failed; `replaced` of an adapter_id (the second) that took over from the first.

    `lost` tells of one of which nothing is left, and why; `changed` is called when something may go on that could not
    before.
    """

    def __init__(
        self, control: AdapterControl, intake: Intake, fail: Callable[[list[RequestFailed]], None],
        replaced: Callable[[int, int], None], lost: Callable[[str, int, EngineError], None],
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self._control = control
        self._intake = intake
        self._fail = fail
        self._replaced = replaced
        self._lost = lost
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._first: dict[int, FirstLoad] = {}  # by adapter_id
        self._turns: dict[str, Turns] = {}  # by name

    async def first(self, wanted: Wanted, deadline: float | None = None) -> int:
        """Returns the adapter_id when the adapter is on the host. `deadline` is in the loop's seconds.

        The very same load that runs already is joined. Raises EngineError with the reason.
        """
        info, ours = self._begin(wanted)
        if ours:
            task = asyncio.create_task(self._run_first(info.adapter_id, wanted))
            self._first[info.adapter_id] = FirstLoad(task)
        await self._join(info.adapter_id, wanted.name, deadline)
        return info.adapter_id

    async def in_place(self, wanted: Wanted, deadline: float | None = None) -> int:
        """Returns the adapter_id that the name has when what is at the source serves it; a first load if there is none.

        Raises EngineError with the reason: the version before serves on, untouched.
        """
        turns = self._turns.setdefault(wanted.name, Turns())
        turns.callers += 1
        arrived = turns.tick()
        try:
            await _before(deadline, turns.lock.acquire(), wanted.name)
            try:
                return await self._take_turn(turns, arrived, wanted, deadline)
            finally:
                turns.lock.release()
        finally:
            turns.callers -= 1
            if not turns.callers:
                del self._turns[wanted.name]

    def close(self) -> None:
        """Ends what runs."""
        for load in self._first.values():
            load.task.cancel()

    # First loads

    def _begin(self, wanted: Wanted) -> tuple[AdapterInfo, bool]:
        """A failed adapter gives its name away, also where the load is refused in the end."""
        before = self._control.current_id(wanted.name)
        try:
            return self._control.begin_load(
                wanted.name, wanted.source, revision=wanted.revision, pinned=bool(wanted.pinned),
                weight=1.0 if wanted.weight is None else wanted.weight, now=self._loop.time(),
            )  # fmt: skip
        finally:
            if before is not None and self._control.find(before) is None:
                gone = EngineError(ErrorCode.ADAPTER_UNAVAILABLE, f"another load of adapter '{wanted.name}' was begun")
                self._lost(wanted.name, before, gone)

    async def _run_first(self, adapter_id: int, wanted: Wanted) -> None:
        try:
            file = await self._intake.read(adapter_id, wanted.source, wanted.revision)
            await self._intake.store(adapter_id, file)
            self._changed()
        except Exception as error:
            reason = foreseen(error)
            self._fail(self._control.host_failed(adapter_id, reason.message, self._loop.time()))
            if self._control.find(adapter_id) is None:
                self._lost(wanted.name, adapter_id, reason)
            raise reason from error
        finally:
            del self._first[adapter_id]

    async def _join(self, adapter_id: int, name: str, deadline: float | None) -> None:
        """Waits for a first load; the last who waits gives it up at the deadline."""
        load = self._first[adapter_id]
        load.callers += 1
        try:
            done, _ = await asyncio.wait((load.task,), timeout=self._left(deadline))
            if not done:
                if load.callers > 1:
                    raise _late(name)
                self._intake.abandon(adapter_id, _late(name))
            await asyncio.shield(load.task)  # which may have come too far to be given up: then it is there at once
        finally:
            load.callers -= 1

    # Loads in place

    async def _take_turn(self, turns: Turns, arrived: int, wanted: Wanted, deadline: float | None) -> int:
        same = turns.served(wanted, arrived)
        if same is not None and same == self._control.current_id(wanted.name):
            return same
        began = turns.tick()
        await self._until_known(wanted.name, deadline)
        known = self._control.current_id(wanted.name) is not None
        adapter_id = await (self._replace if known else self.first)(wanted, deadline)
        turns.done = (began, wanted, adapter_id)
        return adapter_id

    async def _until_known(self, name: str, deadline: float | None) -> None:
        """A first load of the name that runs comes first, whatever becomes of it."""
        for adapter_id, load in list(self._first.items()):
            info = self._control.find(adapter_id)
            if info is not None and info.name == name:
                await _before(deadline, asyncio.wait((load.task,)), name)

    async def _replace(self, wanted: Wanted, deadline: float | None) -> int:
        adapter_id = self._control.begin_replace(
            wanted.name, wanted.source, revision=wanted.revision, pinned=wanted.pinned, weight=wanted.weight,
            now=self._loop.time(),
        ).adapter_id  # fmt: skip
        late = None if deadline is None else self._loop.call_at(deadline, self._give_up, adapter_id, wanted.name)
        try:
            return await self._read_and_take_over(adapter_id, wanted)
        except Exception as error:
            self._control.give_up(adapter_id)
            self._intake.drop(adapter_id)
            raise foreseen(error) from error
        finally:
            if late is not None:
                late.cancel()
            self._changed()

    async def _read_and_take_over(self, adapter_id: int, wanted: Wanted) -> int:
        file = await self._intake.read(adapter_id, wanted.source, wanted.revision)
        same = self._control.same_content(adapter_id, file.spec.content_hash, wanted.pinned)
        if same is not None:
            return same
        await self._intake.store(adapter_id, file)
        self._replaced(self._control.take_over(adapter_id, wanted.pinned), adapter_id)
        return adapter_id

    def _give_up(self, adapter_id: int, name: str) -> None:
        self._intake.abandon(adapter_id, _late(name))

    def _left(self, deadline: float | None) -> float | None:
        return None if deadline is None else max(deadline - self._loop.time(), 0.0)


async def _before(deadline: float | None, work: Coroutine[Any, Any, object], name: str) -> None:
    try:
        async with asyncio.timeout_at(deadline):
            await work
    except TimeoutError:
        raise _late(name) from None


def _late(name: str) -> EngineError:
    return EngineError(ErrorCode.ADAPTER_UNAVAILABLE, f"adapter '{name}' was not loaded within the given time")
