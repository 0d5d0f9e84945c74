"""Adapters in host memory, in pages of chunk size that mirror their chunks in the arena byte for byte.

Loads store, the loop drops and looks up, from any thread. Memory comes in slabs from a thread of the tier's own, so
that no step ever waits for an allocation. Used and free pages together are always all pages.
"""

import threading
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

import psutil
import torch
from sortedcontainers import SortedKeyList
from torch import Tensor

from engine.adapters.layout import SIDE_A, Layout, Place, pack
from engine.adapters.pages import fresh_pages
from engine.adapters.peft import AdapterFile, LoraPair
from engine.adapters.spec import AdapterSpec, invalid
from engine.adapters.tensorfile import all_finite
from engine.geometry import PIECE_RANKS, Geometry
from engine.models.dims import LORA_MODULES, ModelDims
from engine.types import EngineError, ErrorCode
from engine.worker.breaks import Breaks

DEFAULT_MAX_BYTES = 32 << 30
SLAB_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter ready to be copied: page i goes to its i-th chunk. Once it is dropped, its pages are the tier's."""

    adapter_id: int
    spec: AdapterSpec
    layout: Layout
    pages: tuple[Tensor, ...]  # each [chunk_bytes] uint8

    @property
    def bytes(self) -> int:
        return self.layout.bytes


def default_budget() -> int:
    """Bytes for --max-host-lora-bytes where it is not given: half of the free memory, at most 32 GiB."""
    return min(DEFAULT_MAX_BYTES, psutil.virtual_memory().available // 2)


class HostTier:
    """Pages within a budget of `max_bytes`, pinned where a GPU copies from them."""

    def __init__(
        self,
        dims: ModelDims,
        geometry: Geometry,
        dtype: torch.dtype,
        max_bytes: int,
        *,
        pinned: bool = False,
        slab_bytes: int = SLAB_BYTES,
        breaks: Breaks | None = None,
    ) -> None:
        self._dims = dims
        self._breaks = breaks or Breaks()
        self._geometry = geometry
        self._dtype = dtype
        self._adapters: dict[int, HostAdapter] = {}
        self._lock = threading.Lock()
        self._pool = PagePool(geometry.chunk_bytes, max_bytes, slab_bytes, pinned=pinned)

    @property
    def bytes_used(self) -> int:
        return self._pool.used * self._geometry.chunk_bytes

    @property
    def bytes_capacity(self) -> int:
        """The budget in whole pages; smaller than asked where the machine had less to give."""
        return self._pool.capacity * self._geometry.chunk_bytes

    def layout(self, spec: AdapterSpec) -> Layout:
        """How the adapter would lie, for who makes room before it is stored."""
        return pack(spec.modules, self._dims, self._geometry)

    def store(self, adapter_id: int, file: AdapterFile) -> HostAdapter:
        """Blocking: copies the adapter into pages, its scale folded into B in float32 before the one rounding.

        Raises EngineError: ADAPTER_UNAVAILABLE where the budget has no room (evict first), ADAPTER_INVALID where the
        values do not fit the model's dtype. What fails leaves nothing behind.
        """
        layout = self.layout(file.spec)
        pages = self._pool.take(layout.chunks)
        try:
            self._breaks.work(lambda: self._fill(pages, layout, file))
            adapter = HostAdapter(adapter_id, file.spec, layout, pages)
            with self._lock:
                if adapter_id in self._adapters:
                    raise ValueError(f"adapter {adapter_id} is already on the host")
                self._adapters[adapter_id] = adapter
        except BaseException:
            self._pool.give(pages)
            raise
        return adapter

    def get(self, adapter_id: int) -> HostAdapter | None:
        with self._lock:
            return self._adapters.get(adapter_id)

    def rename(self, adapter_id: int, renewed: int) -> None:
        """The adapter goes by another id from now on: its source had changed."""
        with self._lock:
            self._adapters[renewed] = replace(self._adapters.pop(adapter_id), adapter_id=renewed)

    def drop(self, adapter_id: int) -> None:
        """Frees its pages; nobody may read them any more. Raises KeyError for an adapter that is not here."""
        with self._lock:
            adapter = self._adapters.pop(adapter_id)
        self._pool.give(adapter.pages)

    def close(self) -> None:
        """Ends the tier's thread."""
        self._pool.close()

    def _fill(self, pages: tuple[Tensor, ...], layout: Layout, file: AdapterFile) -> None:
        """Page by page, so that each is still in the core's cache when it is looked at."""
        scales = {(module.layer, module.module): module.scale for module in file.spec.modules}
        places = groupby(sorted(layout.places, key=attrgetter("chunk")), attrgetter("chunk"))
        for page, (_, on_page) in zip(pages, places, strict=True):
            typed = page.zero_().view(self._dtype)
            for place in on_page:
                key = (place.layer, place.module)
                _fill_piece(typed, place, file.pairs[key], scales[key], self._dims)
            if not all_finite(typed):
                raise invalid(f"the adapter's scaled weights do not fit {str(self._dtype).removeprefix('torch.')}")
            self._breaks.turn()


class PagePool:
    """Equal pages cut from slabs. A slab is added whenever fewer pages than half a slab are free.

    Those taken at once lie together as far as may be.
    """

    def __init__(self, page_bytes: int, max_bytes: int, slab_bytes: int, *, pinned: bool) -> None:
        self._page_bytes = page_bytes
        self._slab_pages = max(1, slab_bytes // page_bytes)
        self._pinned = pinned
        self._free = SortedKeyList[Tensor, int](key=Tensor.data_ptr)
        self._pages = 0  # allocated
        self._wanted = 0  # free pages that somebody waits for
        self._closed = False
        self._changed = threading.Condition()
        self.capacity = max_bytes // page_bytes
        self._grow()
        self._thread = threading.Thread(target=self._run, name="host-pages", daemon=True)
        self._thread.start()

    @property
    def used(self) -> int:
        with self._changed:
            return self._pages - len(self._free)

    def take(self, count: int) -> tuple[Tensor, ...]:
        """Waits for pages that the budget still allows. Raises EngineError (ADAPTER_UNAVAILABLE) where it does not."""
        with self._changed:
            while len(self._free) < count:
                if self._closed or self._pages - len(self._free) + count > self.capacity:
                    raise self._full(count)
                self._wanted = max(self._wanted, count)
                self._changed.notify_all()
                self._changed.wait()
            first = len(self._free) - count
            pages = tuple(self._free.islice(first))
            del self._free[first:]
            self._changed.notify_all()
        return pages

    def give(self, pages: tuple[Tensor, ...]) -> None:
        with self._changed:
            self._free.update(pages)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _full(self, count: int) -> EngineError:
        need, budget = count * self._page_bytes, self.capacity * self._page_bytes
        return EngineError(
            ErrorCode.ADAPTER_UNAVAILABLE,
            f"the adapter needs {need:,} bytes of host memory; of {budget:,} (--max-host-lora-bytes) too few are free",
        )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._short())
                if self._closed:
                    return
            self._grow()

    def _short(self) -> bool:
        """Whether a slab is due. Holds the lock."""
        wanted = max(self._wanted, self._slab_pages // 2 + 1)
        return self._pages < self.capacity and len(self._free) < wanted

    def _grow(self) -> None:
        """Adds one slab; where memory is refused, what there is becomes the capacity."""
        count = min(self._slab_pages, self.capacity - self._pages)
        try:
            slab = self._allocate(count)
        except (RuntimeError, MemoryError):
            slab, count = torch.empty(0, self._page_bytes, dtype=torch.uint8), 0
        with self._changed:
            self._pages += count
            self._free.update(slab.unbind())
            self._wanted = 0
            if not count:
                self.capacity = self._pages
            self._changed.notify_all()

    def _allocate(self, count: int) -> Tensor:
        """[count, page_bytes] uint8."""
        if self._pinned:
            return torch.empty(count, self._page_bytes, dtype=torch.uint8, pin_memory=True)
        return fresh_pages(count * self._page_bytes).view(count, self._page_bytes)


def _fill_piece(page: Tensor, place: Place, pair: LoraPair, scale: float, dims: ModelDims) -> None:
    """A's rows, or B's columns times the scale; the padding is zero already."""
    inputs, outputs = dims.module_shape(LORA_MODULES[place.module])
    first = place.rank_block * PIECE_RANKS
    start = place.offset // page.element_size()
    if place.side == SIDE_A:
        rows = pair.a[first : first + PIECE_RANKS]
        page[start : start + place.ranks * inputs].view(place.ranks, inputs)[: len(rows)].copy_(rows)
    else:
        columns = pair.b[:, first : first + PIECE_RANKS]
        target = page[start : start + place.ranks * outputs].view(outputs, place.ranks)
        target[:, : columns.shape[1]].copy_(columns.float() * scale)
