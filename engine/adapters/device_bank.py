"""Adapters in a GPU's arena: copied there on a stream of their own, found by the kernels through tables of offsets.

The loop's thread calls `load` and `drop`, the step's thread `assign`. A thread waits for each load and tells who asked;
no step does.
"""

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.adapters.bank import Done, HostPages, PlaceLike
from engine.geometry import PIECE_ALIGN, PIECE_RANKS, Geometry
from engine.models.dims import LORA_MODULES, ModelDims
from engine.plan import AdapterLoad
from engine.worker.accelerator import Accelerator
from engine.worker.staging import Ints
from kernels.lora_meta import GROUP_STARTS

POLL_SECONDS = 20e-6  # between looks at whether a load is done: an interrupt comes a tenth of a millisecond late


@dataclass(frozen=True, slots=True)
class AdapterTables:
    """Where one resident adapter's pieces lie; copied to whatever slot it takes."""

    pieces: Tensor  # [layers, 7, 2, rank_blocks] int32 on the device: units of 256 bytes from the arena's start, or -1
    ranks: Tensor  # [layers, 7] int32 on the device
    blocks: Ints  # [groups]: most rank blocks of their modules


class DeviceBank:
    """Resident adapters by id, and the slots' tables. `arena` is [chunks, chunk_elements]."""

    def __init__(
        self,
        arena: Tensor,
        dims: ModelDims,
        geometry: Geometry,
        slots: int,
        rank_blocks: int,
        accelerator: Accelerator,
    ) -> None:
        modules = len(LORA_MODULES)
        device = accelerator.device
        self.pieces = torch.full((slots, dims.layers, modules, 2, rank_blocks), -1, dtype=torch.int32, device=device)
        self.ranks = torch.zeros(slots, dims.layers, modules, dtype=torch.int32, device=device)
        self.slot_blocks: Ints = np.zeros((slots, len(GROUP_STARTS)), np.int32)
        self._bytes = arena.view(torch.uint8)  # [chunks, chunk_bytes]
        self._arena = arena
        self._dims = dims
        self._geometry = geometry
        self._accelerator = accelerator
        self._lock = threading.Lock()
        self._resident: dict[int, AdapterTables] = {}
        self._slots: list[AdapterTables | None] = [None] * slots
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-loads")
        self._copied = accelerator.event()  # of the load under way

    def load(self, load: AdapterLoad, adapter: HostPages, done: Done) -> None:
        """Copies the pages to the chunks; `done(adapter_id, error)` is called from the loading thread."""
        self._thread.submit(lambda: done(load.adapter_id, self._load(load, adapter)))

    def drop(self, adapter_id: int) -> None:
        """The adapter's chunks are about to be reused."""
        with self._lock:
            self._resident.pop(adapter_id, None)

    def assign(self, slots: Sequence[int | None], used: Collection[int]) -> None:
        """Brings the tables of the slots that a step uses up to date. Raises KeyError for an adapter not resident."""
        for slot in used:
            adapter_id = slots[slot]
            assert adapter_id is not None
            with self._lock:
                tables = self._resident[adapter_id]
            if self._slots[slot] is not tables:
                self.pieces[slot].copy_(tables.pieces)
                self.ranks[slot].copy_(tables.ranks)
                self.slot_blocks[slot] = tables.blocks
                self._slots[slot] = tables

    def settle(self) -> None:
        """Waits until all that was asked for is done; for tests."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Ends the loading thread; loads that have not begun never report."""
        self._thread.shutdown(cancel_futures=True)

    def poison(self, chunks: Sequence[int]) -> None:
        """Fills freed chunks with NaN, so that a test sees whoever still reads them."""
        with self._accelerator.launching():
            for chunk in chunks:
                self._arena[chunk].fill_(float("nan"))

    @torch.inference_mode()
    def _load(self, load: AdapterLoad, adapter: HostPages) -> BaseException | None:
        try:
            with self._accelerator.copying():
                for first, pages in neighbours(load.chunks, adapter.pages):
                    self._bytes[first : first + len(pages)].copy_(pages, non_blocking=True)
                pieces, ranks = self._tables(load.chunks, adapter.layout.places)  # while the pages are on their way
                tables = AdapterTables(
                    self._accelerator.upload(pieces),
                    self._accelerator.upload(ranks),
                    -(-np.maximum.reduceat(ranks.max(0), GROUP_STARTS) // PIECE_RANKS),
                )
                self._copied.record()
            while not self._copied.query():
                time.sleep(POLL_SECONDS)
            with self._lock:
                self._resident[load.adapter_id] = tables
        except Exception as error:  # told to whoever asked for the load
            return error
        return None

    def _tables(self, chunks: Sequence[int], places: Sequence[PlaceLike]) -> tuple[Ints, Ints]:
        """(pieces [layers, 7, 2, rank_blocks], ranks [layers, 7])."""
        fields = np.array([(p.layer, p.module, p.side, p.rank_block, p.ranks, p.chunk, p.offset) for p in places])
        layer, module, side, block, ranks, chunk, offset = fields.reshape(-1, 7).T
        pieces = np.full(self.pieces.shape[1:], -1, np.int32)
        starts = np.array(chunks, np.int64)[chunk] * self._geometry.chunk_bytes + offset
        pieces[layer, module, side, block] = starts // PIECE_ALIGN
        total = np.zeros(self.ranks.shape[1:], np.int32)
        np.add.at(total, (layer, module), np.where(side == 0, ranks, 0).astype(np.int32))
        return pieces, total


def neighbours(chunks: Sequence[int], pages: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first chunk, [count, chunk_bytes]) of pages that lie together on both sides: as few copies as may be."""
    places, begin = list(zip(chunks, pages, strict=True)), 0
    for end in range(1, len(places) + 1):
        if end == len(places) or not _follows(places[end], places[end - 1]):
            chunk, page = places[begin]
            yield chunk, page.as_strided((end - begin, len(page)), (len(page), 1))
            begin = end


def _follows(place: tuple[int, Tensor], before: tuple[int, Tensor]) -> bool:
    """Whether one view can span both pages, and their chunks are neighbours."""
    (chunk, page), (last_chunk, last_page) = place, before
    same = page.untyped_storage().data_ptr() == last_page.untyped_storage().data_ptr()
    return same and chunk == last_chunk + 1 and page.data_ptr() == last_page.data_ptr() + last_page.nbytes
