"""Random arenas, adapters and batches for the kernels' tests and benchmark, and how results are compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import attention_meta, lora_meta
from kernels.attention_meta import AttentionBounds, AttentionMeta, AttentionWorkspace
from kernels.layout import PIECE_RANKS, PIECE_UNIT, KvLayout, piece_unit
from kernels.lora_meta import HEADER, LoraBounds, LoraMeta, LoraWorkspace, PackedLayout

# ||out - ref|| / ||ref||, the reference in float64 over the same inputs.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def error(out: Tensor, ref: Tensor) -> float:
    """Relative error in the 2-norm; not a number if the output has one."""
    return float((out.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30))


def assert_close(out: Tensor, ref: Tensor) -> None:
    assert out.shape == ref.shape
    assert error(out, ref) < TOLERANCE[out.dtype], error(out, ref)


@dataclass(frozen=True)
class Adapters:
    """Adapters of random weights whose pieces lie in random order in an arena between poison."""

    arena: Tensor  # [num_chunks, chunk_elements]
    pieces: Tensor  # [slots, layers, 7, 2, rank_blocks] int32
    ranks: Tensor  # [slots, layers, 7] int32

    @property
    def slot_blocks(self) -> lora_meta.Ints:
        """[slots, groups]"""
        largest = self.ranks.amax(1).cpu().numpy().astype(np.int32)
        blocks: lora_meta.Ints = -(-np.maximum.reduceat(largest, lora_meta.GROUP_STARTS, axis=1) // PIECE_RANKS)
        return blocks


def make_adapters(
    ranks: Tensor,  # [slots, layers, 7] int32, multiples of 8
    shapes: Sequence[tuple[int, int]],  # (in, out) of the seven modules
    rank_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    scale: float = 1.0,
) -> Adapters:
    """Every piece is followed by NaN up to the next multiple of 256 bytes and starts at a random place."""
    size = torch.empty((), dtype=dtype).element_size()
    todo: list[tuple[tuple[int, ...], int]] = []
    for slot, layer, module in ranks.nonzero().tolist():
        rank = int(ranks[slot, layer, module])
        for block in range(-(-rank // PIECE_RANKS)):
            here = min(PIECE_RANKS, rank - block * PIECE_RANKS)
            todo.extend(((slot, layer, module, side, block), here * shapes[module][side]) for side in (0, 1))
    units = [-(-n * size // PIECE_UNIT) for _, n in todo]
    arena = torch.full((sum(units) * piece_unit(size) + 1024,), float("nan"), dtype=dtype, device=device)
    pieces = torch.full((*ranks.shape, 2, rank_blocks), -1, dtype=torch.int32)
    at = 0
    for index in torch.randperm(len(todo)).tolist():
        place, n = todo[index]
        pieces[place] = at
        start = at * piece_unit(size)
        arena[start : start + n] = (torch.randn(n, device=device) * scale).to(dtype)
        at += units[index]
    return Adapters(arena.view(1, -1), pieces.to(device), ranks.to(device))


@dataclass(frozen=True)
class LoraStep:
    meta: LoraMeta
    slots: Tensor  # [tokens] int64, -1 for the base and for rows beyond the step
    rows: int  # rows with an adapter


def lora_fields(bounds: LoraBounds) -> PackedLayout:
    return PackedLayout((("counts", (HEADER,)), *bounds.fields()))


def pack_lora_step(bounds: LoraBounds, adapters: Adapters, groups: Sequence[tuple[int, int]]) -> Tensor:
    """The packed host array of a step with LoRA alone; what no list covers is poison."""
    layout = lora_fields(bounds)
    packed = torch.full((layout.size,), 2**30, dtype=torch.int32)
    host = {name: view.numpy() for name, view in layout.split(packed).items()}
    lora_meta.pack_lora(host, groups, adapters.slot_blocks, bounds.tile)
    return packed


def make_lora_step(bounds: LoraBounds, adapters: Adapters, groups: Sequence[tuple[int, int]]) -> LoraStep:
    layers, device = adapters.ranks.shape[1], adapters.arena.device
    packed = pack_lora_step(bounds, adapters, groups).to(device)
    workspace = LoraWorkspace.allocate([bounds], layers, device)
    workspace.z.fill_(float("nan"))
    slots = torch.full((bounds.tokens,), -1, dtype=torch.int64)
    rows = sum(n for _, n in groups)
    slots[:rows] = torch.repeat_interleave(torch.tensor([s for s, _ in groups]), torch.tensor([n for _, n in groups]))
    meta = workspace.meta(bounds, lora_fields(bounds).split(packed), layers)
    return LoraStep(meta, slots.to(device), rows)


@dataclass(frozen=True)
class KvStep:
    """Sequences with their whole context in the arena, and the metadata of one step over them."""

    arena: Tensor  # [num_chunks, chunk_elements]; NaN where no token lies
    layout: KvLayout
    tables: Tensor  # [rows, max_blocks] int32
    meta: AttentionMeta
    table_rows: Tensor  # [seqs] int64
    token_tables: Tensor  # [tokens, max_blocks] int32, each token's row of the block tables
    positions: Tensor  # [tokens] int64


def make_kv_step(
    layout: KvLayout,
    contexts: Sequence[int],
    lengths: Sequence[int],
    bounds: AttentionBounds,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int = 0,
    fill: bool = True,
) -> KvStep:
    """contexts: tokens in the cache, of which the last `lengths` are new in this step."""
    blocks = [-(-c // layout.block_tokens) for c in contexts]
    pad = 8 * layout.head_dim  # a chunk is longer than its KV
    shape = (sum(blocks) + 1, layout.elements + pad)
    arena = (
        torch.full(shape, float("nan"), dtype=dtype, device=device)
        if fill
        else torch.empty(shape, dtype=dtype, device=device).normal_()
    )
    rows = torch.randperm(len(contexts) + 2)[: len(contexts)].tolist()
    tables = torch.full((len(contexts) + 2, max(blocks) + 1), 2**30, dtype=torch.int32)
    order = torch.randperm(shape[0]).tolist()
    for row, count, context in zip(rows, blocks, contexts, strict=True):
        own = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(own, dtype=torch.int32)
        if fill:
            _fill(arena, layout, own, context)
    packed = _pack_attention(bounds, rows, contexts, lengths, window)
    layout_fields = PackedLayout((("counts", (HEADER,)), *bounds.fields()))
    workspace = AttentionWorkspace.allocate([bounds], heads, layout.head_dim, device)
    workspace.partial.fill_(float("nan"))
    tables = tables.to(device)
    meta = workspace.meta(bounds, layout_fields.split(packed.to(device)), tables)
    token_rows = torch.tensor([row for row, n in zip(rows, lengths, strict=True) for _ in range(n)])
    positions = torch.tensor([p for c, n in zip(contexts, lengths, strict=True) for p in range(c - n, c)])
    return KvStep(arena, layout, tables, meta, torch.tensor(rows), tables[token_rows.to(device)], positions.to(device))


def _pack_attention(
    bounds: AttentionBounds, rows: Sequence[int], contexts: Sequence[int], lengths: Sequence[int], window: int
) -> Tensor:
    layout = PackedLayout((("counts", (HEADER,)), *bounds.fields()))
    packed = torch.full((layout.size,), 2**30, dtype=torch.int32)
    host = {name: view.numpy() for name, view in layout.split(packed).items()}
    starts = [c - n for c, n in zip(contexts, lengths, strict=True)]
    attention_meta.pack_attention(host, bounds, rows, starts, lengths, window)
    return packed


def _fill(arena: Tensor, layout: KvLayout, blocks: Sequence[int], context: int) -> None:
    view = arena[:, : layout.elements].view(arena.shape[0], *layout.shape)
    for index, chunk in enumerate(blocks):
        tokens = min(layout.block_tokens, context - index * layout.block_tokens)
        part = view[chunk, :, :, :, :tokens]
        part.copy_(torch.randn(part.shape, device=arena.device))
