"""Runs steps on a GPU: packs a plan, copies it once, replays or launches, and reads results when they are asked for.

Used by one step thread. Sampled tokens stay on the device, where the next step finds them; only `Pending.result` waits.
"""

import functools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.adapters.device_bank import DeviceBank
from engine.models.device_decoder import DeviceDecoder, LastRows, StepTensors
from engine.models.weights import Progress
from engine.plan import SequenceStep, StepPlan, StepResult
from engine.worker.accelerator import Accelerator
from engine.worker.device_batch import Packed, Packer
from engine.worker.device_logprobs import LogprobRows, logprob_rows
from engine.worker.device_sampler import DeviceSampler, SampleTensors
from engine.worker.graphs import Graphs
from engine.worker.results import sequence_result
from engine.worker.rows import Rows
from engine.worker.runner import Pending
from engine.worker.shapes import LAST, WINDOWED, Shapes, StepShape, second
from engine.worker.staging import Staging
from kernels.ahead import compiling_ahead
from kernels.attention_meta import AttentionWorkspace
from kernels.launch import narrow_items
from kernels.lora_meta import LoraWorkspace
from kernels.step_input import pick_rows, update_tables

TAIL_INTS = 1 << 17  # of the packed array; what does not fit takes a copy of its own
LOGPROB_ROWS = 64  # rows of logits held at once for a prompt's log-probabilities
RESULTS = 4  # token buffers on the host, used in turns; two steps are on their way at most


@dataclass(frozen=True, slots=True)
class Tensors:
    """One shape's views of the packed array on the device."""

    step: StepTensors
    sample: SampleTensors


@dataclass(frozen=True, slots=True)
class Flight:
    """What `forward` leaves for `sample`."""

    plan: StepPlan
    shape: StepShape
    packed: Packed
    started: float  # time.perf_counter() at launch


class DeviceRunner:
    """The device's side of a step. `forward` and `sample` alternate."""

    def __init__(
        self,
        decoder: DeviceDecoder,
        sampler: DeviceSampler,
        packer: Packer,
        shapes: Shapes,
        rows: Rows,
        accelerator: Accelerator,
    ) -> None:
        device, machine = accelerator.device, shapes.machine
        largest = shapes.largest()
        self._decoder = decoder
        self._sampler = sampler
        self._packer = packer
        self._shapes = shapes
        self._rows = rows
        self._accelerator = accelerator
        self._bank: DeviceBank | None = None
        self._staging = Staging(accelerator, max(shape.layout.size for shape in largest) + TAIL_INTS)
        self._block_tables = torch.zeros(rows.block_table.shape, dtype=torch.int32, device=device)
        bounds = [shape.attention for shape in largest]
        self._attention = AttentionWorkspace.allocate(bounds, machine.heads, machine.kv.head_dim, device)
        lists = [bounds for shape in largest for bounds in (shape.lora_bounds, shape.last_bounds)]
        self._lora = LoraWorkspace.allocate(lists, machine.kv.layers, device)
        hidden = decoder.buffers.hidden
        self._last_hidden = torch.zeros(sampler.tokens.shape[0], hidden.shape[1], dtype=hidden.dtype, device=device)
        self._tensors: dict[StepShape, Tensors] = {}
        self._results = [accelerator.host(sampler.tokens.shape[0], dtype=torch.int32) for _ in range(RESULTS)]
        self._flight: Flight | None = None
        self._step = 0
        self._graphs = Graphs(accelerator, self._launch_forward, self._launch_sample)
        self.lora_steps = {"base": 0, "triton": 0}

    def use(self, arena: Tensor, bank: DeviceBank) -> None:
        """Steps run over this arena from now on, and take their adapters from this bank."""
        self._decoder.use(arena, bank.pieces, bank.ranks)
        self._bank = bank
        self._accelerator.synchronize()  # what made them was in no order with the steps' stream

    @property
    def graph_replays(self) -> int:
        """Steps whose layers ran as a captured graph."""
        return self._graphs.replays

    def compile(self, threads: int, *, lora: bool, progress: Progress) -> None:
        """Compiles the kernels of every shape, several at once, on launches of empty steps. 0: does nothing.

        A kernel that is compiled already runs, and touches nothing that a step reads.
        """
        if not threads:
            return
        families = (False, True) if lora else (False,)
        told = functools.partial(progress, "kernels")
        with self._accelerator.launching(), compiling_ahead(threads, told):
            self._staging.device.zero_()
            for family in families:
                self._launch_kinds(self._shapes.graphs(lora=family))
                for way in self._decoder.ways:
                    with self._decoder.overlapping(way):
                        self._launch_kinds(self._shapes.eager(lora=family))

    def _launch_kinds(self, shapes: Iterable[StepShape]) -> None:
        for shape in shapes:
            self._launch_forward(shape, self._decoder.kinds)
            self._launch_sample(shape)

    def capture(self, *, lora: bool, progress: Progress) -> None:
        """Captures the graphs of every shape that has one."""
        families = (False, True) if lora else (False,)
        shapes = [shape for family in families for shape in self._shapes.graphs(lora=family)]
        with self._accelerator.launching():
            self._staging.device.zero_()
        self._graphs.capture(shapes, progress)

    def forward(self, plan: StepPlan) -> None:
        """Launches the layers of all the plan's tokens, and the head for those that sample."""
        started = time.perf_counter()
        with self._accelerator.launching():
            for admission in plan.admissions:
                self._rows.admit(admission)
                self._sampler.admit(admission)
            for step in plan.sequences:
                self._rows.extend(step)
            adapted = plan.adapted_rows()
            used = set(adapted)
            shape = self._shapes.choose(
                plan.tokens,
                len(plan.sequences),
                lora=bool(used),
                narrow=narrow_items(adapted.values()),
                all_rows=any(step.prompt_logprobs for step in plan.sequences),
                context=max((step.start + step.length for step in plan.sequences if step.length > 1), default=0),
            )
            packed = self._pack(plan, shape, used)
            self.lora_steps["triton" if used else "base"] += 1
            eager = functools.partial(self._launch_forward, shape, of=packed)
            self._graphs.forward(shape, eager)
        self._flight = Flight(plan, shape, packed, started)

    def sample(
        self, plan: StepPlan, masks: Mapping[int, Tensor] | None = None, force: Mapping[int, int] | None = None
    ) -> Pending:
        """Launches the sampling of the sequences that ask for it. `masks`: [vocab] bool of what is allowed."""
        flight, self._flight = self._flight, None
        if flight is None:
            raise RuntimeError("sample without forward")
        with self._accelerator.launching():
            steps, tokens = flight.packed.steps, self._sampler.tokens
            asked = [i for i, step in enumerate(steps) if self._rows.states[step.row].params.logprobs is not None]
            own = self._sampler.logits[self._index(asked)] if asked else None  # before the sampler edits them
            self._draw(flight, masks or {}, force)
            result = self._results[self._step % RESULTS]
            self._step += 1
            result[: len(steps)].copy_(tokens[: len(steps)], non_blocking=True)
            logprobs = (
                None if own is None else self._logprobs([steps[i] for i in asked], own, tokens[self._index(asked)])
            )
            prompts = dict(self._prompt_logprobs(flight))
            done = self._accelerator.event()
            done.record()

        def collect() -> StepResult:
            done.synchronize()
            ids = dict(zip((step.row for step in steps), result[: len(steps)].tolist(), strict=True))
            told = {} if logprobs is None else dict(zip((steps[i].row for i in asked), logprobs.read(), strict=True))
            found = {row: [x for part in parts for x in part.read()] for row, parts in prompts.items()}
            results = [sequence_result(step, ids, told, found) for step in plan.sequences]
            return StepResult(plan.step, results, time.perf_counter() - flight.started)

        return Pending(collect)

    def _pack(self, plan: StepPlan, shape: StepShape, used: set[int]) -> Packed:
        assert self._bank is not None
        self._bank.assign(plan.slots, used)
        steps = [step for step in plan.sequences if step.sample]
        packed = self._packer.pack(
            self._staging.begin(shape),
            shape,
            plan,
            self._bank.slot_blocks,
            self._sampler.lines(steps),
            self._sampler.edits(steps),
        )
        if packed.updates is not None:
            places = self._accelerator.upload(packed.updates.T.astype(np.int64))
            self._block_tables.view(-1)[places[0]] = places[1].int()
        self._staging.send(shape, packed.tail)
        return packed

    def _draw(self, flight: Flight, masks: Mapping[int, Tensor], force: Mapping[int, int] | None) -> None:
        steps, shape = flight.packed.steps, flight.shape
        if not steps:
            return
        self._sampler.force(steps, force)
        if masks or flight.packed.edits is not None:
            tensors = self._views(shape).sample
            self._sampler.launch_edits(tensors, shape.sequences)
            self._sampler.mask(steps, masks, flight.packed.edits)
            self._sampler.launch_draw(tensors, shape.sequences)
        else:
            self._graphs.sample(shape)

    # What a graph holds

    def _launch_forward(
        self, shape: StepShape, layers: Collection[int] | None = None, of: Packed | None = None
    ) -> None:
        """of: the one step that this is launched for; None: for any that has the shape."""
        tensors = self._views(shape)
        step = tensors.step
        if of is not None:
            step = replace(step, decodes=of.decodes)
            if step.lora is not None:
                step = replace(step, lora=replace(step.lora, known=of.lora_rows))
        update_tables(self._block_tables, tensors.sample.step, tensors.sample.tail)
        self._decoder.forward(step, layers)
        rows = self._decoder.buffers.hidden[: shape.sequences]
        if not shape.last_rows:
            rows = self._last_hidden[: shape.sequences]
            pick_rows(rows, self._decoder.buffers.hidden, tensors.sample.step, tensors.sample.samples)
        self._decoder.logits(self._sampler.logits[: shape.sequences], rows)

    def _launch_sample(self, shape: StepShape) -> None:
        self._sampler.launch(self._views(shape).sample, shape.sequences)

    def _views(self, shape: StepShape) -> Tensors:
        if shape not in self._tensors:
            self._tensors[shape] = self._make_views(shape)
        return self._tensors[shape]

    def _make_views(self, shape: StepShape) -> Tensors:
        device = self._staging.device
        fields = shape.layout.split(device)
        attention = self._attention.meta(shape.attention, fields, self._block_tables)
        windowed = second(fields, WINDOWED)
        step = StepTensors(
            ids=fields["ids"],
            positions=fields["positions"],
            locations=fields["locations"],
            attention=attention,
            windowed=self._attention.meta(shape.attention, windowed, self._block_tables) if windowed else attention,
            lora=self._lora.meta(shape.lora_bounds, fields, self._shapes.machine.kv.layers) if shape.lora else None,
            prefill=shape.prefill,
            long=shape.long,
            last=self._last_views(shape, fields) if shape.last_rows else None,
        )
        return Tensors(step, SampleTensors(fields["step"], fields["samples"], device[shape.layout.size :]))

    def _last_views(self, shape: StepShape, fields: Mapping[str, Tensor]) -> LastRows:
        lists, layers = second(fields, LAST), self._shapes.machine.kv.layers
        lora = self._lora.meta(shape.last_bounds, lists, layers) if shape.lora else None
        return LastRows(fields["step"], fields["samples"], lora)

    # Log-probabilities

    def _index(self, rows: list[int]) -> Tensor:
        return self._accelerator.upload(np.array(rows, np.int64))

    def _logprobs(self, steps: list[SequenceStep], logits: Tensor, tokens: Tensor) -> LogprobRows:
        alternatives = [self._rows.states[step.row].params.logprobs or 0 for step in steps]
        return logprob_rows(logits, tokens.long(), alternatives, self._accelerator)

    def _prompt_logprobs(self, flight: Flight) -> Iterator[tuple[int, list[LogprobRows]]]:
        for step, first in zip(flight.plan.sequences, flight.packed.firsts.tolist(), strict=True):
            if step.prompt_logprobs:
                yield step.row, list(self._prompt_part(step, first))

    def _prompt_part(self, step: SequenceStep, first: int) -> Iterable[LogprobRows]:
        """Log-probabilities of the prompt's tokens that follow this step's, the first of which is `first` in it."""
        state = self._rows.states[step.row]
        targets = state.tokens[step.start + 1 : min(step.start + step.length + 1, state.prompt_length)]
        for part in range(0, len(targets), LOGPROB_ROWS):
            some = targets[part : part + LOGPROB_ROWS]
            rows = self._decoder.buffers.hidden[first + part : first + part + len(some)]
            logits = torch.empty(len(some), self._sampler.logits.shape[1], dtype=torch.float32, device=rows.device)
            self._decoder.logits(logits, rows)
            top = [state.params.prompt_logprobs or 0] * len(some)
            yield logprob_rows(logits, self._index(list(some)), top, self._accelerator)
