"""What the benchmarks of the worker run: adapters of random weights, and plans made by hand."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor

from engine.adapters.layout import Layout, pack
from engine.adapters.spec import ModuleSpec
from engine.models.dims import LORA_MODULES, ModelDims
from engine.plan import AdapterLoad, Admission, SequenceStep, StepPlan
from engine.types import SamplingParams
from engine.worker.worker import Worker

GREEDY = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class HostPages:
    """An adapter in pinned memory."""

    pages: tuple[Tensor, ...]  # each [chunk_bytes] uint8
    layout: Layout

    @property
    def bytes(self) -> int:
        return sum(page.numel() for page in self.pages)


def random_pages(worker: Worker, rank: int, modules: Iterable[str] = LORA_MODULES) -> HostPages:
    """Weights of its own, drawn on the worker's device."""
    info = worker.info
    layout = adapter_layout(info.dims, worker, rank, modules)
    dtype = getattr(torch, info.dtype)
    shape = layout.chunks, info.geometry.chunk_elements
    drawn = torch.empty(shape, dtype=dtype, device=info.device).normal_(0.0, 0.02)
    pinned = info.device.startswith("cuda")
    host = torch.empty(layout.chunks, info.geometry.chunk_bytes, dtype=torch.uint8, pin_memory=pinned)
    host.copy_(drawn.view(torch.uint8))
    return HostPages(tuple(host.unbind()), layout)


def adapter_layout(dims: ModelDims, worker: Worker, rank: int, modules: Iterable[str]) -> Layout:
    indices = sorted(LORA_MODULES.index(module) for module in modules)
    specs = [ModuleSpec(layer, module, rank, 1.0) for layer in range(dims.layers) for module in indices]
    return pack(specs, dims, worker.info.geometry)


class Bench:
    """Rows, blocks and slots of a worker; sequences sit at whatever context a case asks for."""

    def __init__(self, worker: Worker, slots: int) -> None:
        self.worker = worker
        self.slots: list[int | None] = [None] * slots
        self._free = torch.randperm(worker.info.num_chunks).tolist()
        self._step = 0
        self._sequences = 0

    def load(self, adapter_id: int, pages: HostPages) -> tuple[int, ...]:
        """Waits until the adapter may be used, in the slot of its number; its chunks lie anywhere."""
        chunks = self.free(len(pages.pages))
        self.load_into(chunks, adapter_id, pages)
        return chunks

    def free(self, count: int) -> tuple[int, ...]:
        """Chunks from anywhere, the caller's until `drop`."""
        return tuple(self._free.pop() for _ in range(count))

    def load_into(self, chunks: tuple[int, ...], adapter_id: int, pages: HostPages) -> None:
        """As `load`, over whatever is in these chunks."""
        done, errors = Event(), list[BaseException | None]()

        def told(_: int, error: BaseException | None) -> None:
            errors.append(error)
            done.set()

        self.worker.load(AdapterLoad(adapter_id, chunks), pages, told)
        done.wait()
        if errors[0] is not None:
            raise errors[0]
        if adapter_id <= len(self.slots):
            self.slots[adapter_id - 1] = adapter_id

    def drop(self, adapter_id: int, chunks: Sequence[int]) -> None:
        self.worker.drop(adapter_id)
        self._free.extend(chunks)

    def decodes(self, batch: int, context: int, steps: int, adapters: int, *, keep: bool = False) -> list[StepPlan]:
        """Plans of `steps` decode steps; the context, of what the cache holds, grows from the given one on.

        Plans made later take the same blocks and write into them, unless these keep theirs.
        """
        size = self.worker.info.geometry.block_tokens
        blocks = [[self._free.pop() for _ in range(-(-(context + steps) // size))] for _ in range(batch)]
        slots = sorted((i % adapters if adapters else -1 for i in range(batch)), reverse=False)
        self._sequences += batch
        plans = []
        for step in range(steps):
            admissions = tuple(
                Admission(i, self._sequences + i, (5,) * context, context, 0, GREEDY)
                for i in range(batch if not step else 0)
            )
            sequences = tuple(
                SequenceStep(
                    row=i, sequence_id=self._sequences + i, slot=slots[i], start=context + step, length=1,
                    tokens=(7 + i,) if not step else (), first_new_block=0,
                    new_blocks=tuple(blocks[i]) if not step else (), sample=True, output_index=step, ban_stops=False,
                )
                for i in range(batch)
            )  # fmt: skip
            plans.append(self._plan(admissions, sequences))
        for own in () if keep else blocks:
            self._free.extend(own)
        return plans

    def prefills(self, lengths: Sequence[int], adapters: int) -> StepPlan:
        """One step that computes whole prompts."""
        size = self.worker.info.geometry.block_tokens
        blocks = [tuple(self._free.pop() for _ in range(-(-length // size))) for length in lengths]
        slots = sorted((i % adapters if adapters else -1) for i in range(len(lengths)))
        self._sequences += len(lengths)
        admissions, sequences = [], []
        for i, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
            tokens = tuple(torch.randint(self.worker.info.dims.vocab, (length,)).tolist())
            admissions.append(Admission(i, self._sequences + i, tokens, length, 0, GREEDY))
            sequences.append(
                SequenceStep(
                    row=i, sequence_id=self._sequences + i, slot=slot, start=0, length=length, tokens=tokens,
                    first_new_block=0, new_blocks=blocks[i], sample=True, output_index=0, ban_stops=False,
                )
            )  # fmt: skip
        for own in blocks:
            self._free.extend(own)
        return self._plan(tuple(admissions), tuple(sequences))

    def run(self, plans: Sequence[StepPlan]) -> None:
        """One step ahead, as the engine does."""
        pending = []
        for plan in plans:
            self.worker.forward(plan)
            pending.append(self.worker.sample(plan))
            if len(pending) > 1:
                pending.pop(0).result()
        for rest in pending:
            rest.result()

    def _plan(self, admissions: tuple[Admission, ...], sequences: tuple[SequenceStep, ...]) -> StepPlan:
        self._step += 1
        return StepPlan(self._step, tuple(self.slots), admissions=admissions, sequences=sequences)
