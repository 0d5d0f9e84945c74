"""The adapters whose pieces are in the arena: copied there, viewed, merged for the torch backend, forgotten again.

The loop's thread calls `load` and `drop`, the step's thread `get`; copies and merging run on the background thread.
What is built from an adapter's chunks is kept only if the adapter stayed resident all the while.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.adapters.merged import PieceViews, merge
from engine.adapters.pages import touch_heap
from engine.layers.lora import AdapterSet
from engine.layers.packing import Packer
from engine.models.dims import LORA_MODULES, ModelDims
from engine.plan import AdapterLoad
from engine.worker.background import BackgroundThread
from engine.worker.breaks import Breaks

STEP_BYTES = 4 << 20  # of a step's tensors, about: logits above all
Done = Callable[[int, BaseException | None], None]


class PlaceLike(Protocol):
    """Where one piece lies; engine.adapters.layout decides it."""

    @property
    def layer(self) -> int: ...
    @property
    def module(self) -> int: ...
    @property
    def side(self) -> int: ...  # 0: A, 1: B
    @property
    def rank_block(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def chunk(self) -> int: ...  # index into the adapter's pages
    @property
    def offset(self) -> int: ...  # bytes


class LayoutLike(Protocol):
    @property
    def places(self) -> Sequence[PlaceLike]: ...


class HostPages(Protocol):
    """What the bank reads of a host adapter."""

    @property
    def pages(self) -> Sequence[Tensor]: ...  # each [chunk_bytes] uint8
    @property
    def layout(self) -> LayoutLike: ...


class AdapterBank:
    """Resident adapters by id. `arena` is [chunks, chunk_elements] in the model's dtype."""

    def __init__(
        self, arena: Tensor, dims: ModelDims, breaks: Breaks, merged_bytes: int, merged_least: int = 1
    ) -> None:
        self._arena = arena
        self._dims = dims
        self._breaks = breaks
        self._thread = BackgroundThread("adapter-loads", breaks)
        self._merged_limit = merged_bytes
        self._merged_least = merged_least  # as many stay merged whatever their bytes: those that a batch may hold
        self._packer = Packer()
        self._lock = threading.Lock()
        self._resident: dict[int, PieceViews] = {}
        self._merged: dict[int, AdapterSet] = {}  # least recently used first
        self._stack: AdapterSet | None = None
        self._building: tuple[int, ...] | None = None

    def load(self, load: AdapterLoad, adapter: HostPages, done: Done) -> None:
        """Copies the pages to the chunks; `done(adapter_id, error)` is called from the background thread."""
        self._thread.submit(lambda: done(load.adapter_id, self._load(load, adapter)))

    def drop(self, adapter_id: int) -> None:
        """The adapter's chunks are about to be reused."""
        with self._lock:
            self._resident.pop(adapter_id, None)
            self._merged.pop(adapter_id, None)
            if self._stack is not None and adapter_id in self._stack.adapter_ids:
                self._stack = None

    def get(self, adapter_id: int) -> AdapterSet:
        """The adapter by itself, merged now if it is not at hand. Raises KeyError where it is not resident."""
        with self._lock:
            merged = self._merged.pop(adapter_id, None)
            views = self._resident[adapter_id]
        return self._keep(adapter_id, views, merged or merge(self._dims, {adapter_id: views}, self._packer.pack))

    def stack(self) -> AdapterSet | None:
        """The last set that was built on request."""
        return self._stack

    def request_stack(self, adapter_ids: tuple[int, ...]) -> None:
        """Starts to build a set of these adapters, unless one is being built already."""
        if self._building is None:
            self._building = adapter_ids
            self._thread.submit(lambda: self._build_stack(adapter_ids))

    def settle(self) -> None:
        """Waits until all that was asked for is done; for tests."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Ends the background thread."""
        self._thread.close()

    def poison(self, chunks: Sequence[int]) -> None:
        """Fills freed chunks with NaN, so that a test sees whoever still reads them."""
        self._arena[list(chunks)] = float("nan")

    def _load(self, load: AdapterLoad, adapter: HostPages) -> BaseException | None:
        try:
            rows = self._arena.view(torch.uint8)
            for chunk, page in zip(load.chunks, adapter.pages, strict=True):
                rows[chunk].copy_(page)
                self._breaks.turn()
            views = self._views(load.chunks, adapter.layout.places)
            with self._lock:
                self._resident[load.adapter_id] = views
            touch_heap(len(load.chunks) * rows[0].nbytes + STEP_BYTES, self._breaks.turn)
            self._keep(load.adapter_id, views, self._merge({load.adapter_id: views}))
        except Exception as error:  # told to whoever asked for the load
            return error
        return None

    def _merge(self, adapters: Mapping[int, PieceViews]) -> AdapterSet:
        """In the background: weight by weight."""
        return merge(self._dims, adapters, self._pack_in_turn)

    def _pack_in_turn(self, weight: Tensor) -> Tensor:
        self._breaks.turn()
        return self._packer.pack(weight)

    def _keep(self, adapter_id: int, views: PieceViews, merged: AdapterSet) -> AdapterSet:
        """Remembers a merged adapter while its views are valid, within the limit of bytes."""
        with self._lock:
            if self._resident.get(adapter_id) is views:
                self._merged[adapter_id] = merged
            while len(self._merged) > self._merged_least and self._merged_bytes() > self._merged_limit:
                del self._merged[next(iter(self._merged))]
        return merged

    def _merged_bytes(self) -> int:
        return sum(merged.elements for merged in self._merged.values()) * self._arena.element_size()

    def _build_stack(self, adapter_ids: tuple[int, ...]) -> None:
        try:
            with self._lock:
                views = {i: self._resident[i] for i in adapter_ids if i in self._resident}
            stack = self._merge(views)
            with self._lock:
                if all(self._resident.get(i) is v for i, v in views.items()):
                    self._stack = stack
        finally:
            self._building = None

    def _views(self, chunks: Sequence[int], places: Sequence[PlaceLike]) -> PieceViews:
        """Pairs of views (A, B) for each (layer, module), by rank block."""
        blocks: dict[tuple[int, int, int], list[Tensor]] = {}
        for place in sorted(places, key=lambda p: (p.layer, p.module, p.rank_block, p.side)):
            key = (place.layer, place.module, place.rank_block)
            blocks.setdefault(key, []).append(self._view(chunks[place.chunk], place))
            self._breaks.turn()
        views: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for (layer, module, _), (a, b) in blocks.items():
            views.setdefault((layer, module), []).append((a, b))
        return views

    def _view(self, chunk: int, place: PlaceLike) -> Tensor:
        inn, out = self._dims.module_shape(LORA_MODULES[place.module])
        shape = (place.ranks, inn) if place.side == 0 else (out, place.ranks)
        start = place.offset // self._arena.element_size()
        return self._arena[chunk, start : start + shape[0] * shape[1]].view(shape)
