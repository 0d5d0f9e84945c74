"""Names of adapters and what is known of each. Called by the loop for loads and unloads, by the scheduler to resolve.

Each load gets an adapter_id that is never used again; a name stands for at most one adapter, beside which a version
that is to take the name over may arrive, and older ones may end.
"""

from collections import OrderedDict
from collections.abc import Iterator

from engine.adapters.adapter import Adapter
from engine.types import AdapterState, EngineError, ErrorCode

MAX_SUCCESSIONS = 1024  # adapter_ids whose successor is known: a request may have been on its way when the name moved


class Catalog:
    """Every adapter the server knows, by name and by adapter_id. Iterates over all versions of all names."""

    def __init__(self, *, enabled: bool = True, first_id: int = 1) -> None:
        self.enabled = enabled
        self._by_name: dict[str, Adapter] = {}
        self._by_id: dict[int, Adapter] = {}
        self._others: dict[int, Adapter] = {}  # arriving and retired ones
        self._successors: OrderedDict[int, int] = OrderedDict()  # adapter_id -> the one that took its name over
        self._next_id = first_id

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def listed(self) -> list[Adapter]:
        """Each name once, with the version that new requests get."""
        return list(self._by_name.values())

    @property
    def pinned(self) -> list[Adapter]:
        """Of the listed ones that are not being unloaded; asked for in every step."""
        return [adapter for adapter in self._by_name.values() if adapter.pinned and not adapter.draining]

    @property
    def retired(self) -> list[Adapter]:
        return [adapter for adapter in self._others.values() if adapter.retired]

    def versions(self, name: str) -> list[Adapter]:
        """All that bear, bore or are to bear the name; the one that new requests get is first."""
        current = [self._by_name[name]] if name in self._by_name else []
        return current + [adapter for adapter in self._others.values() if adapter.name == name]

    def add(
        self, name: str, source: str, *, revision: str | None = None, pinned: bool = False, weight: float = 1.0,
        now: float = 0.0,
    ) -> Adapter:  # fmt: skip
        """Lists an adapter of --lora-paths, cold: it is loaded when named. Raises EngineError if the name is taken."""
        self._refuse_taken(name)
        adapter = self._new(name, source, revision, pinned, weight, now)
        adapter.keep = True
        return adapter

    def begin_load(
        self, name: str, source: str, *, revision: str | None = None, pinned: bool = False, weight: float = 1.0,
        now: float = 0.0,
    ) -> tuple[Adapter, bool]:  # fmt: skip
        """(the adapter, whether the caller is to read its source).

        False: the very same load runs already and its outcome answers both. Raises EngineError where LoRA is off or
        the name is taken; a failed adapter gives its name away.
        """
        if not self.enabled:
            raise EngineError(ErrorCode.LORA_DISABLED, "this server was started without --enable-lora")
        old = self._by_name.get(name)
        if old is not None and _first_load(old) and _same(old, source, revision, pinned, weight):
            return old, False
        if old is not None and old.state is AdapterState.FAILED and not old.open and not old.host_pages:
            self.remove(old)
        self._refuse_taken(name)
        adapter = self._new(name, source, revision, pinned, weight, now)
        adapter.fetching = True
        return adapter, True

    def begin_replace(self, name: str, source: str, *, revision: str | None, weight: float, now: float) -> Adapter:
        """A version that is to be read and then to take over the loaded name.

        Raises EngineError for a name that is unknown, being unloaded, or about to be taken over by another.
        """
        old = self.named(name)
        if old.draining or any(adapter.arriving for adapter in self.versions(name)):
            doing = "unloaded" if old.draining else "loaded already"
            raise EngineError(ErrorCode.ADAPTER_EXISTS, f"adapter '{name}' is being {doing}")
        adapter = Adapter(self._fresh_id(), name, source, revision, False, now, weight=weight)
        adapter.fetching = adapter.arriving = True
        self._by_id[adapter.adapter_id] = self._others[adapter.adapter_id] = adapter
        return adapter

    def take_over(self, adapter: Adapter) -> Adapter:
        """The name means the arriving version from now on; returns the one that it meant, now retired."""
        old = self._by_name[adapter.name]
        assert adapter.arriving
        assert not old.draining
        self._by_name[adapter.name] = adapter
        del self._others[adapter.adapter_id]
        self._others[old.adapter_id] = old
        adapter.arriving, old.retired, old.pinned = False, True, False
        adapter.tally.served = old.tally.served
        self._succeed(old.adapter_id, adapter.adapter_id)
        return old

    def get(self, adapter_id: int) -> Adapter:
        """Raises EngineError for an id that is not or no longer known."""
        adapter = self._by_id.get(adapter_id)
        if adapter is None:
            raise EngineError(ErrorCode.ADAPTER_NOT_FOUND, f"adapter_id {adapter_id} is not loaded any more")
        return adapter

    def find(self, adapter_id: int) -> Adapter | None:
        return self._by_id.get(adapter_id)

    def named(self, name: str) -> Adapter:
        """Raises EngineError for an unknown name."""
        adapter = self._by_name.get(name)
        if adapter is None:
            raise EngineError(ErrorCode.ADAPTER_NOT_FOUND, f"adapter '{name}' is not loaded")
        return adapter

    def for_request(self, adapter_id: int) -> Adapter:
        """The adapter a new request gets: the latest version of what the id named.

        Raises EngineError for a stale id and while the adapter is being unloaded.
        """
        while (later := self._successors.get(adapter_id)) is not None:
            adapter_id = later
        adapter = self.get(adapter_id)
        if adapter.draining:
            raise EngineError(ErrorCode.ADAPTER_NOT_FOUND, f"adapter '{adapter.name}' is being unloaded")
        return adapter

    def begin_unload(self, name: str) -> Adapter:
        """New requests are refused from now on, and nothing takes the name over.

        Raises EngineError for an unknown name or a second unload.
        """
        adapter = self.named(name)
        if adapter.draining:
            raise EngineError(ErrorCode.ADAPTER_NOT_FOUND, f"adapter '{name}' is being unloaded already")
        for version in self.versions(name):
            version.draining = True
        return adapter

    def renew(self, adapter: Adapter) -> None:
        """The source has changed: the name goes on under a fresh adapter_id, so nothing of the old one is met again."""
        old = adapter.adapter_id
        del self._by_id[old]
        adapter.adapter_id = self._fresh_id()
        self._by_id[adapter.adapter_id] = adapter
        if self._others.pop(old, None):
            self._others[adapter.adapter_id] = adapter
        else:
            self._succeed(old, adapter.adapter_id)

    def remove(self, adapter: Adapter) -> None:
        """A retired version leaves its totals to the one that has its name."""
        current = self._by_name.get(adapter.name)
        if current is adapter:
            del self._by_name[adapter.name]
        elif current is not None:
            current.tally.inherit(adapter.tally)
        del self._by_id[adapter.adapter_id]
        self._others.pop(adapter.adapter_id, None)

    def check(self) -> None:
        """Raises AssertionError unless the tables tell of the same adapters."""
        assert {a.adapter_id: a for a in self._by_name.values()} | self._others == self._by_id
        assert all(name == adapter.name for name, adapter in self._by_name.items())
        assert all(adapter_id < self._next_id for adapter_id in self._by_id)
        assert not any(adapter.retired or adapter.arriving for adapter in self._by_name.values())
        assert all(adapter.retired != adapter.arriving for adapter in self._others.values())
        arriving = [adapter.name for adapter in self._others.values() if adapter.arriving]
        assert len(arriving) == len(set(arriving))
        assert set(arriving) <= set(self._by_name)
        assert len(self._successors) <= MAX_SUCCESSIONS

    def _new(
        self, name: str, source: str, revision: str | None, pinned: bool, weight: float, now: float
    ) -> Adapter:  # fmt: skip
        adapter = Adapter(self._fresh_id(), name, source, revision, pinned, now, weight=weight)
        self._by_name[name] = self._by_id[adapter.adapter_id] = adapter
        return adapter

    def _succeed(self, old: int, new: int) -> None:
        self._successors[old] = new
        if len(self._successors) > MAX_SUCCESSIONS:
            self._successors.popitem(last=False)

    def _fresh_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _refuse_taken(self, name: str) -> None:
        old = self._by_name.get(name)
        if old is None:
            return
        doing = {AdapterState.DRAINING: "being unloaded", AdapterState.LOADING: "being loaded already"}
        raise EngineError(
            ErrorCode.ADAPTER_EXISTS, f"adapter '{name}' is {doing.get(old.state, 'loaded already; unload it first')}"
        )


def _first_load(adapter: Adapter) -> bool:
    return adapter.fetching and adapter.content is None and not adapter.keep and not adapter.draining


def _same(adapter: Adapter, source: str, revision: str | None, pinned: bool, weight: float) -> bool:
    told = (adapter.source, adapter.revision, adapter.pinned, adapter.weight)
    return told == (source, revision, pinned, weight)
