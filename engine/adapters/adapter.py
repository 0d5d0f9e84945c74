"""One adapter: its facts, and the state that is read off them, so that no two facts can disagree with it.

The catalogue changes names and life, residency places, the scheduler the tally.
"""

from dataclasses import dataclass, field

from engine.types import AdapterInfo, AdapterState


@dataclass(slots=True)
class Tally:
    """Sequences and tokens of one adapter, or of the base. The first three only grow."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    waiting: int = 0  # accepted, without a state row
    running: int = 0  # with a state row
    served: float = 0.0  # the fair policy's counter

    def inherit(self, gone: "Tally") -> None:
        """The totals of a version of the same name that is gone."""
        self.requests += gone.requests
        self.prompt_tokens += gone.prompt_tokens
        self.generated_tokens += gone.generated_tokens


@dataclass(frozen=True, slots=True)
class Hosted:
    """What reading an adapter's source told."""

    pages: int  # chunks that its pieces fill
    rank: int
    modules: tuple[str, ...]
    content: str  # hash of what was read


@dataclass(slots=True, eq=False)
class Adapter:
    """The facts of one adapter, or of one version of it."""

    adapter_id: int
    name: str
    source: str
    revision: str | None
    pinned: bool
    created: float  # seconds
    rank: int = 0
    modules: tuple[str, ...] = ()
    pages: int = 0  # 0 while unknown
    content: str | None = None  # hash of what was read at the first load
    keep: bool = False  # it stays known when a load fails: listed at start, or loaded before
    fetching: bool = False  # on its way from the source
    on_host: bool = False
    host_pages: int = 0  # held or reserved on the host
    touched: int = 0  # residency's clock when last used
    chunks: list[int] = field(default_factory=list)  # in the arena, or being copied there
    copying: bool = False
    fresh: bool = False  # copied to the arena, and no sequence of it was admitted since
    awaited: bool = False  # a sequence was passed over for want of it alone, not of a slot
    idle_since: float = 0.0  # eviction's clock when its last sequence left
    last_step: int = 0  # the last step that refers to its chunks, told when its sequences leave
    draining: bool = False  # it is being unloaded
    arriving: bool = False  # it is read to take over a name that is loaded
    retired: bool = False  # another version has its name; it goes with its last sequence
    error: str | None = None  # why the last load failed
    retry_at: float = 0.0  # seconds; until then the source is not read again for those who name it
    used_at: float | None = None  # seconds
    weight: float = 1.0  # its share under the fair policy
    started: int = 0  # unfinished sequences that hold or held KV of this adapter
    tally: Tally = field(default_factory=Tally)

    @property
    def ready(self) -> bool:
        """Resident: sequences of it may be planned."""
        return bool(self.chunks) and not self.copying

    @property
    def fetchable(self) -> bool:
        """It is wanted, only at its source, and its last load did not fail."""
        return not (self.on_host or self.fetching or self.error)

    @property
    def leaving(self) -> bool:
        """No new request gets it."""
        return self.draining or self.retired

    @property
    def open(self) -> int:
        """Accepted sequences that have not ended."""
        return self.tally.waiting + self.tally.running

    @property
    def state(self) -> AdapterState:
        if self.leaving:
            return AdapterState.DRAINING
        if self.ready:
            return AdapterState.RESIDENT
        if self.fetching:
            return AdapterState.LOADING
        if self.error is not None:
            return AdapterState.FAILED
        return AdapterState.HOST if self.on_host else AdapterState.COLD

    def info(self, chunk_bytes: int, unix_offset: float = 0.0) -> AdapterInfo:
        """`unix_offset` turns the clock of `now` into unix seconds."""
        return AdapterInfo(
            name=self.name,
            adapter_id=self.adapter_id,
            source=self.source,
            revision=self.revision,
            state=self.state,
            pinned=self.pinned,
            rank=self.rank,
            modules=self.modules,
            bytes=self.pages * chunk_bytes,
            requests=self.open,
            created=self.created + unix_offset,
            weight=self.weight,
            last_used=self.used_at + unix_offset if self.used_at is not None else 0.0,
            error=self.error,
        )
