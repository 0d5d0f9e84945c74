"""Kernels on an accelerator at Llama-3.1-8B's shape, bf16: microseconds, and the fraction of the card's floor.

    python -m benchmarks.kernels [--tune] [--folder benchmarks/results] [part ...]

Parts: floors decode prefill lora lora_prefill rows. --tune tries other tiles too.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import device_timing as timing
from benchmarks.kernels_lora import lora, lora_prefill
from benchmarks.report import Report
from engine.worker.shapes import LONG_CONTEXT
from kernels import attention_decode, attention_meta, attention_prefill, launch, reference
from kernels.attention_meta import AttentionBounds, decode_bounds
from kernels.launch import AttentionTiles
from kernels.layout import KvLayout
from kernels.norm import add_rms_norm
from kernels.rotary import rotary_store
from kernels.silu_mul import silu_mul
from tests.kernels.build import KvStep, error, make_kv_step

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
DTYPE, DEVICE = torch.bfloat16, torch.device("cuda")
REPEATS = 20

DECODES = (
    (1, 512),
    (1, 8192),
    (8, 512),
    (8, 8192),
    (32, 512),
    (32, 2048),
    (64, 512),
    (128, 512),
    (128, 1024),
    (128, 8192),
)
TUNED_DECODES = ((1, 8192), (32, 512), (128, 1024))
PREFILLS = (
    ("1 x 8192", [8192], [8192]),
    ("8 x 1024", [1024] * 8, [1024] * 8),
    ("16 x 512", [512] * 16, [512] * 16),
    ("4 x 2048", [2048] * 4, [2048] * 4),
    ("2048 after 6144", [8192], [2048]),
)
DECODE_TILES = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (2, 7))  # warps, stages
DECODE_SPLITS = {
    (1, 512): (2, 8),
    (1, 8192): (16, 64),
    (8, 512): (2, 8),
    (8, 8192): (2, 10),
    (32, 512): (1, 4),
    (64, 512): (2,),
}
PREFILL_TILES = (
    (128, 32, 4, 3), (128, 32, 8, 2, 128), (128, 32, 8, 3, 128), (128, 32, 8, 4, 128),
    (128, 64, 8, 2, 128), (128, 64, 8, 3), (64, 32, 4, 3), (64, 64, 4, 3),
)  # fmt: skip


def floors(report: Report, tune: bool) -> None:
    report.add("read rate", "TB/s", [timing.read_rate() / 1e12])
    report.add("matrix rate", "TFLOP/s", [timing.matrix_rate() / 1e12])


def decode(report: Report, tune: bool) -> None:
    rate = timing.read_rate()
    for batch, context in DECODES:
        layout = KvLayout(max(2, min(32, 2**33 // (batch * context * 4096))), KV_HEADS, 16, HEAD_DIM)
        for tiles in DECODE_TILES if tune and (batch, context) in TUNED_DECODES else ():
            with timing.replaced(
                timing.always(AttentionTiles(8, launch.DECODE_KEYS, *tiles)), (attention_decode, "decode_tiles")
            ):
                _decode(report, layout, batch, context, rate, str(tiles))
        for splits in DECODE_SPLITS.get((batch, context), ()) if tune else ():
            with timing.replaced(timing.always(splits), (attention_meta, "decode_splits")):
                _decode(report, layout, batch, context, rate, f"splits {splits}")
        _decode(report, layout, batch, context, rate, "")


def _decode(report: Report, layout: KvLayout, batch: int, context: int, rate: float, tiles: str) -> None:
    torch.manual_seed(batch + context)
    bounds = decode_bounds(batch, KV_HEADS, launch.multiprocessors(DEVICE), context)
    step = make_kv_step(layout, [context] * batch, [1] * batch, bounds, HEADS, DTYPE, DEVICE, fill=False)
    q, out = (torch.randn(batch, HEADS * HEAD_DIM, device=DEVICE).to(DTYPE) for _ in range(2))

    def launch_all() -> None:
        for layer in range(layout.layers):
            attention_decode.decode_attention(out, q, step.arena, layout, layer, step.meta, SCALE)

    times = [t * 1e3 / layout.layers for t in timing.graph_times(launch_all, 20)]
    reached = batch * context * KV_HEADS * HEAD_DIM * 4 / (statistics.median(times) / 1e6) / rate
    note = f"{reached:.2f} of reads, error {last_row_error(step, out, q, layout.layers - 1):.1e}"
    report.add(f"decode attention {batch} x {context} {tiles}".rstrip(), "us", times, note=note)


def prefill(report: Report, tune: bool) -> None:
    rate, places = timing.matrix_rate(), ((attention_prefill, "prefill_tiles"), (launch, "prefill_tiles"))
    for name, contexts, lengths in PREFILLS:
        for tiles in PREFILL_TILES if tune else ():
            with timing.replaced(timing.always(AttentionTiles(*tiles)), *places):
                _prefill(report, f"{name} {tiles}", contexts, lengths, rate)
        _prefill(report, name, contexts, lengths, rate)


def _prefill(report: Report, name: str, contexts: list[int], lengths: list[int], rate: float) -> None:
    torch.manual_seed(len(contexts))
    layout, tokens = KvLayout(2, KV_HEADS, 16, HEAD_DIM), sum(lengths)
    tile = launch.q_tile(HEADS, KV_HEADS, HEAD_DIM, DTYPE.itemsize)
    bounds = AttentionBounds(tokens, len(lengths), tile, 1, max(contexts))
    step = make_kv_step(layout, contexts, lengths, bounds, HEADS, DTYPE, DEVICE, fill=False)
    q, out = (torch.randn(tokens, HEADS * HEAD_DIM, device=DEVICE).to(DTYPE) for _ in range(2))
    long = max(contexts) > LONG_CONTEXT

    def launch_one() -> None:
        attention_prefill.prefill_attention(out, q, step.arena, layout, 1, step.meta, SCALE, long=long)

    times = timing.graph_times(launch_one, 15)
    pairs = sum(n * (c - n) + n * (n + 1) / 2 for c, n in zip(contexts, lengths, strict=True))
    reached = 4 * pairs * HEADS * HEAD_DIM / (statistics.median(times) / 1e3)
    off = last_row_error(step, out, q, 1)
    note = f"{reached / 1e12:.0f} TFLOP/s, {reached / rate:.2f} of products, error {off:.1e}"
    report.add(f"prefill attention {name}", "us", [t * 1e3 for t in times], note=note)


def last_row_error(step: KvStep, out: Tensor, q: Tensor, layer: int) -> float:
    """Of the batch's last token, against float64."""
    layout = step.layout
    shape = (layout.layers, layout.kv_heads, layout.block_tokens, layout.head_dim)
    last = q[-1:].double().view(1, HEADS, HEAD_DIM)
    wanted = reference.attention(last, step.arena, step.token_tables[-1:], step.positions[-1:], layer, shape)
    return error(out[-1:], wanted.flatten(1))


def rows(report: Report, tune: bool) -> None:
    """The ops between the products, without a delta and with one."""
    rate = timing.read_rate()
    for tokens in (1, 32, 128, 8192):
        for delta in (False, True):
            for name, (op, elements) in _row_ops(tokens, delta).items():
                micros = [t * 1e3 / REPEATS for t in timing.graph_times(partial(_repeat, op), 15)]
                floor = tokens * elements * DTYPE.itemsize / rate * 1e6
                report.add(
                    f"{name} {tokens} rows{' + delta' if delta else ''}", "us", micros, note=f"bytes {floor:.2f}"
                )


def _repeat(op: Callable[[], None]) -> None:
    for _ in range(REPEATS):
        op()


def _row_ops(tokens: int, delta: bool) -> dict[str, tuple[Callable[[], None], int]]:
    """Each op with the elements of one row that it must move."""
    layout = KvLayout(1, KV_HEADS, 16, HEAD_DIM)
    arena = torch.zeros(tokens // 16 + 1, layout.elements, device=DEVICE, dtype=DTYPE)
    qkv, y, gate_up = (torch.randn(tokens, n, device=DEVICE).to(DTYPE) for n in (6144, 4096, 28672))
    residual, out, product = torch.randn_like(y), torch.empty_like(y), torch.empty_like(gate_up[:, :14336])
    places = torch.arange(tokens, device=DEVICE, dtype=torch.int32)
    table = torch.randn(8192, HEAD_DIM, device=DEVICE)
    counts = torch.full((8,), tokens, device=DEVICE, dtype=torch.int32)
    more: list[dict[str, Any]] = [{"delta": t.clone(), "counts": counts} if delta else {} for t in (qkv, y, gate_up)]
    rotate = partial(rotary_store, out, qkv, arena, layout, 0, places, places, table, **more[0])
    norm = partial(add_rms_norm, out, residual, y, y[0].clone(), 1e-5, **more[1])
    multiply = partial(silu_mul, product, gate_up, **more[2])
    return {
        "rotary_store": (rotate, 6144 * (2 + delta)),
        "add_rms_norm": (norm, 4096 * (4 + delta)),
        "silu_mul": (multiply, 14336 * (3 + 2 * delta)),
    }


PARTS = {
    "floors": floors,
    "decode": decode,
    "prefill": prefill,
    "lora": lora,
    "lora_prefill": lora_prefill,
    "rows": rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="kernels")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    report = Report(arguments.name, arguments.commit)
    for part in arguments.parts or PARTS:
        PARTS[part](report, arguments.tune)
        torch.cuda.empty_cache()
        report.save(arguments.folder)


if __name__ == "__main__":
    main()
