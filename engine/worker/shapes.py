"""The static shapes that steps run in: how many rows, which lists, how long. A captured graph is one of them.

A step runs in the smallest shape that holds it; what a shape holds beyond the step are neutral tails.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from engine.config import EngineConfig
from engine.geometry import PIECE_RANKS, Geometry
from engine.models.config import ModelConfig
from engine.worker.memory import DEFAULT_LORA_RANK
from kernels.attention_meta import AttentionBounds, decode_splits
from kernels.launch import DECODE_TOKENS, SMALL_STEP, lora_tile, power_of_two, q_tile
from kernels.layout import KvLayout
from kernels.lora_meta import HEADER, LARGE_TOKENS, LoraBounds, PackedLayout
from kernels.step_meta import step_fields

GRAPH_STEPS = ((4, 1), (8, 4), (64, 8), (128, 16), (512, 32))  # (up to this many rows, in steps of)
MIXED_GRAPHS = (16, 32, 64, 96, 128, 192, 256, 384, 512)  # tokens
# Mixed steps above them. With adapters, which are twice as many launches, these are graphs too, since the host would
# not keep up with the device; without they are not.
MIXED_STEPS = ((LARGE_TOKENS, 64), (SMALL_STEP, 128))
LARGE_STEP = 256  # mixed steps that are larger still are rounded up to whole ones
WINDOWED = "windowed_"  # prefix of the second set of attention lists
LONG_CONTEXT = 4096  # tokens; of a prefill whose attention takes larger tiles
LAST = "last_"  # prefix of the second set of LoRA lists: over the rows that are sampled


@dataclass(frozen=True, slots=True)
class StepShape:
    """One shape; hashable, so that a graph is found by it."""

    tokens: int
    sequences: int  # at most, and samples at most
    prefill: bool  # may hold more than one token of a sequence
    lora: bool
    long: bool  # some prefill has a long context; graphs are the same for all
    last_rows: bool  # behind the last layer's attention there are only rows that are sampled, `sequences` at most
    narrow: bool  # decodes over many adapters with few rows each: LoRA's items are smaller than its others' are
    attention: AttentionBounds
    lora_bounds: LoraBounds
    last_bounds: LoraBounds  # of those rows
    layout: PackedLayout

    def __hash__(self) -> int:
        return hash((self.tokens, self.sequences, self.prefill, self.lora, self.long, self.last_rows, self.narrow))


@dataclass(frozen=True, slots=True)
class Machine:
    """What shapes depend on beside the step."""

    kv: KvLayout
    heads: int
    itemsize: int
    multiprocessors: int
    max_context: int
    max_running: int
    step_tokens: int
    slots: int
    rank_blocks: int  # of the largest adapter allowed
    two_windows: bool  # some layers see a window, others everything

    @property
    def q_tile(self) -> int:
        return q_tile(self.heads, self.kv.kv_heads, self.kv.head_dim, self.itemsize)


def make_machine(
    config: EngineConfig, model: ModelConfig, geometry: Geometry, multiprocessors: int, context: int, step_tokens: int
) -> Machine:
    dims = model.dims
    rank = DEFAULT_LORA_RANK if config.max_lora_rank is None else config.max_lora_rank
    prompts = context if config.chunked_prefill_size == -1 else -(-step_tokens // 4)  # beside as many decodes as run
    return Machine(
        kv=KvLayout(dims.layers, dims.kv_heads, geometry.block_tokens, dims.head_dim),
        heads=dims.heads,
        itemsize=geometry.itemsize,
        multiprocessors=multiprocessors,
        max_context=context,
        max_running=config.max_running_requests,
        step_tokens=max(step_tokens, config.max_running_requests + prompts),
        slots=config.max_loras_per_batch,
        rank_blocks=-(-rank // PIECE_RANKS),
        two_windows=any(model.sliding_layers) and not all(model.sliding_layers),
    )


class Shapes:
    """Makes each shape once. `last_rows` off: the last layer computes every row, as the others do."""

    def __init__(
        self, machine: Machine, max_graph: int | None, mixed_graphs: bool = True, last_rows: bool = True
    ) -> None:
        self.machine = machine
        self._last_rows = last_rows
        self._made: dict[tuple[int, int, bool, bool, bool, bool, bool], StepShape] = {}
        limit = min(machine.max_running, DECODE_TOKENS if max_graph is None else max_graph)
        self.decode_buckets = tuple(_ladder(GRAPH_STEPS, limit))
        self._mixed_sizes = _ladder(MIXED_STEPS, SMALL_STEP)
        above = (size for size in self._mixed_sizes if size > MIXED_GRAPHS[-1])
        self._mixed_buckets = {
            lora: tuple(t for t in sizes if mixed_graphs and t <= machine.step_tokens)
            for lora, sizes in ((False, MIXED_GRAPHS), (True, (*MIXED_GRAPHS, *above)))
        }

    def graphs(self, *, lora: bool) -> list[StepShape]:
        """Every shape that is captured, the largest first, so that later ones reuse its memory."""
        decodes = [self._decodes(size, lora, narrow) for size in self.decode_buckets for narrow in (False, True)]
        mixed = [self._mixed(size, lora) for size in self._mixed_buckets[lora]]
        return [*reversed(mixed), *reversed(dict.fromkeys(decodes))]

    def choose(
        self,
        tokens: int,
        sequences: int,
        *,
        lora: bool,
        narrow: bool = False,
        all_rows: bool = False,
        context: int = 0,
    ) -> StepShape:
        """The shape of a step; those beyond the graphs' are rounded up, so that few exist.

        narrow: as `narrow_items` says of the adapters' rows. context: the longest of a prefill; a large step with a
        long one has no graph, since its attention takes other tiles. all_rows: the hidden states of all tokens are
        wanted; such a shape may have no graph where others have one.
        Raises ValueError for a step that no buffer holds.
        """
        machine = self.machine
        if tokens > machine.step_tokens or sequences > machine.max_running:
            raise ValueError(f"a step of {tokens} tokens and {sequences} sequences is larger than the worker's largest")
        if tokens == sequences:
            at = bisect_left(self.decode_buckets, tokens)
            size = self.decode_buckets[at] if at < len(self.decode_buckets) else _round(tokens, 64)
            return self._decodes(size, lora, narrow)
        mixed = self._mixed_buckets[lora]
        at, long = bisect_left(mixed, tokens), context > LONG_CONTEXT
        if at < len(mixed) and not (long and tokens > LARGE_TOKENS):
            return self._mixed(mixed[at], lora, all_rows)
        at = bisect_left(self._mixed_sizes, tokens)
        rows = self._mixed_sizes[at] if at < len(self._mixed_sizes) else _round(tokens, LARGE_STEP)
        return self.make(rows, power_of_two(sequences), prefill=True, lora=lora, all_rows=all_rows, long=long)

    def eager(self, *, lora: bool) -> list[StepShape]:
        """Steps beyond the graphs, of every kind whose kernels differ: for what is compiled at start.

        The number of samples decides what runs behind the last layer's attention, however many tokens there are.
        """
        machine = self.machine
        rows, running = _round(machine.step_tokens, 256), power_of_two(machine.max_running)
        sizes = sorted({min(rows, SMALL_STEP), rows})
        counts = [1 << i for i in range(running.bit_length())]
        kinds = [(False, False), (True, False)] + [(True, True), (False, True)] * (machine.max_context > LONG_CONTEXT)
        return [
            self.make(tokens, min(count, tokens), prefill=True, lora=lora, all_rows=all_rows, long=long)
            for tokens in sizes
            for all_rows, long in kinds
            for count in (counts if tokens == sizes[0] and not (all_rows or long) else counts[-1:])
        ]

    def largest(self) -> list[StepShape]:
        """Shapes that bound all others in every buffer."""
        machine = self.machine
        rows, running = _round(machine.step_tokens, 256), power_of_two(machine.max_running)
        # LoRA's lists are longest where items are short: in the largest of the small steps. The second set of them is
        # only where at most half of the rows are sampled.
        steps = [
            self.make(size, most, prefill=True, lora=True)
            for size in {rows, min(rows, SMALL_STEP)}
            for most in {running, min(running, size // 2)}
        ]
        steps += [self.make(_round(machine.max_running, 64), _round(machine.max_running, 64), prefill=False, lora=True)]
        return [*steps, *self.graphs(lora=True)]

    def make(
        self,
        tokens: int,
        sequences: int,
        *,
        prefill: bool,
        lora: bool,
        all_rows: bool = False,
        long: bool = False,
        narrow: bool = False,
    ) -> StepShape:
        last_rows = self._last_rows and prefill and not all_rows and 2 * sequences <= tokens
        key = tokens, sequences, prefill, lora, long, last_rows, narrow
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def _decodes(self, size: int, lora: bool, narrow: bool) -> StepShape:
        narrow = lora and narrow and lora_tile(size, prefill=False) != lora_tile(size, prefill=False, narrow=True)
        return self.make(size, size, prefill=False, lora=lora, narrow=narrow)

    def _mixed(self, tokens: int, lora: bool, all_rows: bool = False) -> StepShape:
        sequences = min(tokens, self.machine.max_running)
        return self.make(tokens, sequences, prefill=True, lora=lora, all_rows=all_rows)

    def _make(
        self, tokens: int, sequences: int, prefill: bool, lora: bool, long: bool, last_rows: bool, narrow: bool
    ) -> StepShape:
        machine = self.machine
        splits = decode_splits(sequences, machine.kv.kv_heads, machine.multiprocessors)
        tile = machine.q_tile if prefill else 0
        attention = AttentionBounds(tokens, sequences, tile, splits, machine.max_context)
        rows = lora_tile(tokens, prefill=prefill, narrow=narrow)
        bounds = LoraBounds(tokens, rows, machine.slots, machine.rank_blocks)
        last = LoraBounds(sequences, lora_tile(sequences, prefill=False), machine.slots, machine.rank_blocks)
        fields = [("counts", (HEADER,)), *step_fields(tokens, sequences), *attention.fields()]
        if machine.two_windows:
            fields += [(f"{WINDOWED}counts", (HEADER,)), *((WINDOWED + n, shape) for n, shape in attention.fields())]
        if lora:
            fields += bounds.fields()
        if lora and last_rows:
            fields += [(f"{LAST}counts", (HEADER,)), *((LAST + n, shape) for n, shape in last.fields())]
        layout = PackedLayout(tuple(fields))
        return StepShape(tokens, sequences, prefill, lora, long, last_rows, narrow, attention, bounds, last, layout)


T = TypeVar("T")


def second(fields: Mapping[str, T], prefix: str) -> dict[str, T]:
    """A second set of lists under the names of the first."""
    return {name.removeprefix(prefix): field for name, field in fields.items() if name.startswith(prefix)}


def _ladder(steps: Iterable[tuple[int, int]], limit: int) -> list[int]:
    sizes, size = list[int](), 0
    for end, step in steps:
        while size < min(end, limit):
            size = size + step if size % step == 0 else end
            sizes.append(min(size, limit))
    return sizes


def _round(value: int, step: int) -> int:
    return -(-value // step) * step
