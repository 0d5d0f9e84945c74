"""The host tier: pages hold the scaled pieces to the bit, nothing leaks, and the budget holds."""

import contextlib
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.adapters.host import HostAdapter, HostTier, default_budget
from engine.adapters.layout import SIDE_A
from engine.adapters.pages import fresh_pages
from engine.adapters.peft import AdapterFile, read_adapter
from engine.adapters.spec import AdapterLimits
from engine.geometry import PIECE_RANKS, make_geometry
from engine.models.dims import LORA_MODULES, ModelDims
from engine.types import EngineError, ErrorCode
from tests.support.adapters import write_adapter

DIMS = ModelDims(layers=3, hidden=24, intermediate=40, heads=3, kv_heads=1, head_dim=8, vocab=97)
LIMITS = AdapterLimits(max_rank=256)


def tier(max_bytes: int = 1 << 24, dtype: torch.dtype = torch.float32, slab_bytes: int = 1 << 16) -> HostTier:
    return HostTier(DIMS, make_geometry(DIMS, dtype.itemsize), dtype, max_bytes, slab_bytes=slab_bytes)


def load(folder: Path, **options: object) -> AdapterFile:
    return read_adapter(write_adapter(folder, DIMS, **options), DIMS, LIMITS)  # type: ignore[arg-type]


def unpacked(adapter: HostAdapter, layer: int, module: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A [stored ranks, in], B [out, stored ranks]) of a module, put together again from its pieces."""
    sides: tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor]]] = ([], [])
    inputs, outputs = DIMS.module_shape(LORA_MODULES[module])
    for place in adapter.layout.places:
        if (place.layer, place.module) == (layer, module):
            shape = (place.ranks, inputs) if place.side == SIDE_A else (outputs, place.ranks)
            start = place.offset // dtype.itemsize
            piece = adapter.pages[place.chunk].view(dtype)[start : start + shape[0] * shape[1]].view(shape)
            sides[place.side].append((place.rank_block, piece))
    a, b = ([piece for _, piece in sorted(side, key=lambda item: item[0])] for side in sides)
    return torch.cat(a), torch.cat(b, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 8, 13, 16, 33, 256])
def test_pages_hold_the_scaled_pieces(tmp_path: Path, rank: int, dtype: torch.dtype) -> None:
    file = load(tmp_path, rank=rank, alpha=7, rank_pattern={"v_proj": 5}, dtype=torch.bfloat16)
    host = tier(dtype=dtype)
    adapter = host.store(1, file)
    for module in file.spec.modules:
        pair = file.pairs[module.layer, module.module]
        a, b = unpacked(adapter, module.layer, module.module, dtype)
        assert torch.equal(a[: module.rank], pair.a.to(dtype))
        assert torch.equal(b[:, : module.rank], (pair.b.float() * module.scale).to(dtype))
        assert not a[module.rank :].any()
        assert not b[:, module.rank :].any()
        assert len(a) == -(-module.rank // 8) * 8
        assert b.shape[1] == len(a)
    host.close()


def test_only_the_last_rank_block_is_short(tmp_path: Path) -> None:
    host = tier()
    adapter = host.store(1, load(tmp_path, rank=40, modules=("q_proj",), layers=[1]))
    blocks = [(p.side, p.rank_block, p.ranks) for p in adapter.layout.places]
    assert sorted(blocks) == [(side, block, 8 if block == 2 else PIECE_RANKS) for side in (0, 1) for block in range(3)]
    host.close()


def test_reused_pages_keep_nothing_of_who_was_there(tmp_path: Path) -> None:
    first, second = load(tmp_path / "a", rank=16, std=9.0), load(tmp_path / "b", rank=3)
    fresh, used = tier(), tier()
    used.store(1, first)
    used.drop(1)
    expected, found = fresh.store(2, second), used.store(2, second)
    assert all(torch.equal(x, y) for x, y in zip(expected.pages, found.pages, strict=True))
    fresh.close()
    used.close()


def test_pages_taken_at_once_lie_together(tmp_path: Path) -> None:
    """In a slab, even where those before gave theirs back in another order."""
    file, host = load(tmp_path), tier(slab_bytes=1 << 20)
    for adapter_id in range(1, 5):
        host.store(adapter_id, file)
    for adapter_id in (3, 1, 4, 2):
        host.drop(adapter_id)
    starts = [page.data_ptr() for page in host.store(5, file).pages]
    assert len(starts) > 2
    assert starts == list(range(starts[0], starts[-1] + 1, host.bytes_used // len(starts)))


def test_bytes_are_counted(tmp_path: Path) -> None:
    host, file = tier(), load(tmp_path, rank=8)
    assert host.bytes_used == 0
    one, two = host.store(1, file), host.store(2, file)
    assert host.bytes_used == one.bytes + two.bytes == 2 * host.layout(file.spec).bytes
    assert host.get(1) is one
    host.drop(1)
    assert host.get(1) is None
    assert host.bytes_used == two.bytes
    with pytest.raises(KeyError):
        host.drop(1)
    host.drop(2)
    assert host.bytes_used == 0
    host.close()


def test_the_budget_holds_and_slabs_come_up_to_it(tmp_path: Path) -> None:
    file = load(tmp_path, rank=16)
    need = tier().layout(file.spec).bytes
    host = tier(max_bytes=4 * need, slab_bytes=1)
    for adapter_id in range(4):
        host.store(adapter_id, file)
    with pytest.raises(EngineError, match="--max-host-lora-bytes") as caught:
        host.store(4, file)
    assert caught.value.code is ErrorCode.ADAPTER_UNAVAILABLE
    assert host.bytes_used == host.bytes_capacity == 4 * need
    host.drop(2)
    host.store(4, file)
    host.close()


def test_an_adapter_larger_than_the_budget_is_refused(tmp_path: Path) -> None:
    host = tier(max_bytes=1)
    with pytest.raises(EngineError, match=r"of 0 \(--max-host-lora-bytes\)"):
        host.store(1, load(tmp_path, rank=16))
    host.close()


def test_a_failed_store_leaks_nothing(tmp_path: Path) -> None:
    host = tier(dtype=torch.float16)
    with pytest.raises(EngineError, match="scaled weights do not fit float16") as caught:
        host.store(1, load(tmp_path / "a", rank=4, std=1e6))
    assert caught.value.code is ErrorCode.ADAPTER_INVALID
    assert host.bytes_used == 0
    assert host.get(1) is None
    fine = load(tmp_path / "b", rank=4)
    host.store(1, fine)
    with pytest.raises(ValueError, match="already on the host"):
        host.store(1, fine)
    assert host.bytes_used == host.layout(fine.spec).bytes
    broken = AdapterFile(fine.spec, {key: pair for key, pair in fine.pairs.items() if key != (1, 1)})
    with pytest.raises(KeyError):
        host.store(2, broken)
    assert host.bytes_used == host.layout(fine.spec).bytes
    host.close()


def test_refused_memory_becomes_the_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = load(tmp_path, rank=16)
    page = make_geometry(DIMS, 4).chunk_bytes
    host = tier(max_bytes=100 * page, slab_bytes=page)
    left = threading.Semaphore(2 * host.layout(file.spec).chunks)

    def scarce(size: int) -> Tensor:
        if not left.acquire(blocking=False):
            raise MemoryError("no memory")
        return fresh_pages(size)

    monkeypatch.setattr("engine.adapters.host.fresh_pages", scarce)
    stored = 0
    with contextlib.suppress(EngineError):
        for stored in range(100):
            host.store(stored, file)
    assert 0 < stored < 100
    with pytest.raises(EngineError, match="--max-host-lora-bytes"):
        host.store(100, file)
    assert host.bytes_used <= host.bytes_capacity < 100 * page
    host.close()


def test_many_threads_store_and_drop(tmp_path: Path) -> None:
    files = [load(tmp_path / str(rank), rank=rank, seed=rank) for rank in (3, 8, 16, 40)]
    host = tier(slab_bytes=1 << 12)
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for turn in range(10):
                file, adapter_id = files[(worker + turn) % len(files)], worker * 100 + turn
                adapter = host.store(adapter_id, file)
                a, _ = unpacked(adapter, 2, 6, torch.float32)
                assert torch.equal(a[: file.spec.rank], file.pairs[2, 6].a)
                host.drop(adapter_id)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert host.bytes_used == 0
    host.close()


def test_a_closed_tier_refuses_rather_than_waits(tmp_path: Path) -> None:
    host = tier(slab_bytes=1)
    host.close()
    with pytest.raises(EngineError):
        host.store(1, load(tmp_path, rank=256))


def test_the_default_budget_is_within_half_of_the_free_memory() -> None:
    assert 0 < default_budget() <= 32 << 30
