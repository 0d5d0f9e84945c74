"""A miniature of the engine for the worker's tests: tiny checkpoints, adapters in pages, a scheduler without policy."""

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.adapters.bank import AdapterBank
from engine.config import EngineConfig
from engine.geometry import PIECE_ALIGN, PIECE_RANKS, Geometry, piece_bytes
from engine.models.dims import LORA_MODULES, ModelDims
from engine.plan import AdapterLoad, Admission, SequenceStep, StepPlan
from engine.types import SamplingParams, TokenLogprob
from engine.worker.worker import Worker

GREEDY = SamplingParams(max_tokens=16, seed=0, temperature=0.0, logprobs=0)


def tiny_llama(folder: Path, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of odd sizes, saved to the folder."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 211,
        "hidden_size": 72,
        "intermediate_size": 104,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
    model.train(False)
    model.save_pretrained(folder)
    return model


def start(folder: Path, **settings: Any) -> Worker:
    defaults: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 4096, "max_running_requests": 16, "threads": 1}
    return Worker.start(EngineConfig(**(defaults | settings)), folder, progress=lambda *_: None)


@dataclass(frozen=True)
class Place:
    layer: int
    module: int
    side: int
    rank_block: int
    ranks: int
    chunk: int
    offset: int


@dataclass(frozen=True)
class Layout:
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Pages:
    """An adapter on the host."""

    pages: list[Tensor]
    layout: Layout


Weights = Mapping[tuple[int, int], tuple[Tensor, Tensor]]  # (layer, module) -> A [r, in], B [out, r], scaled


def random_weights(
    dims: ModelDims, ranks: Mapping[int, int], seed: int, scale: float = 0.3
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Random A and B for the modules named by their position, the same ranks in every layer."""
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(dims.layers):
        for module, rank in ranks.items():
            inn, out = dims.module_shape(LORA_MODULES[module])
            a, b = torch.randn(rank, inn, generator=g), torch.randn(out, rank, generator=g)
            weights[layer, module] = (a * scale, b * (scale / rank**0.5))
    return weights


def make_pages(weights: Weights, geometry: Geometry, dtype: torch.dtype) -> Pages:
    """Lays the pieces one after the other."""
    pages, places = [torch.zeros(geometry.chunk_bytes, dtype=torch.uint8)], []
    offset = 0
    for (layer, module), (a, b) in weights.items():
        rank = -(-a.shape[0] // 8) * 8
        padded = torch.zeros(rank, a.shape[1]), torch.zeros(b.shape[0], rank)
        padded[0][: a.shape[0]], padded[1][:, : a.shape[0]] = a, b
        for block, first in enumerate(range(0, rank, PIECE_RANKS)):
            size = min(PIECE_RANKS, rank - first)
            for side, piece in enumerate((padded[0][first : first + size], padded[1][:, first : first + size])):
                data = piece.to(dtype).contiguous().view(-1).view(torch.uint8)
                if offset + piece_bytes(size, max(piece.shape), geometry.itemsize) > geometry.chunk_bytes:
                    pages.append(torch.zeros(geometry.chunk_bytes, dtype=torch.uint8))
                    offset = 0
                pages[-1][offset : offset + len(data)] = data
                places.append(Place(layer, module, side, block, size, len(pages) - 1, offset))
                offset += -(-len(data) // PIECE_ALIGN) * PIECE_ALIGN
    return Pages(pages, Layout(tuple(places)))


@dataclass
class Request:
    """One sequence on its way through the worker."""

    prompt: list[int]
    adapter_id: int | None = None
    params: SamplingParams = GREEDY
    choice: int = 0
    force: list[int] | None = None
    cached: "Request | None" = None  # whose full prompt blocks are shared instead of computed
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    computed: int = 0
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    told: int = 0  # blocks that the worker's table has
    sequence_id: int = -1

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.params.max_tokens


class Driver:
    """Plans steps at random: rows, blocks and cuts of prompts are arbitrary, as the worker must not depend on them."""

    def __init__(self, worker: Worker, slots: int = 4, seed: int = 0) -> None:
        self.worker = worker
        self.random = random.Random(seed)
        self.free = list(range(worker.info.num_chunks))
        self.random.shuffle(self.free)
        self.slots: list[int | None] = [None] * slots
        self.step = 0
        self.sequences = 0

    def load(self, adapter_id: int, pages: Pages) -> tuple[int, ...]:
        chunks = tuple(self.free.pop() for _ in pages.pages)
        done, errors = threading.Event(), list[BaseException | None]()

        def told(_: int, error: BaseException | None) -> None:
            errors.append(error)
            done.set()

        self.worker.load(AdapterLoad(adapter_id, chunks), pages, told)
        assert done.wait(30)
        assert errors == [None]
        return chunks

    def settle(self) -> None:
        """Waits until the background thread has done what it was given."""
        bank = self.worker._bank
        assert isinstance(bank, AdapterBank)
        bank._thread.submit(lambda: None).result(30)

    def run(
        self, requests: Sequence[Request], chunk: tuple[int, int] = (1000, 1000), poison: bool = True
    ) -> list[Request]:
        """Runs all to their end, together; prompts are cut into pieces of `chunk` (least, most) tokens."""
        rows = self.random.sample(range(self.worker.info.max_running), len(requests))
        waiting = []
        for request, row in zip(requests, rows, strict=True):
            self.sequences += 1
            request.row, request.sequence_id = row, self.sequences
            waiting.append(self._admit(request))
        running = list(requests)
        while running:
            self._step(running, waiting, chunk)
            waiting = []
            for request in [r for r in running if r.done]:
                running.remove(request)
                self._finish(request, poison)
        return list(requests)

    def _admit(self, request: Request) -> Admission:
        if request.cached is not None:
            size = self.worker.info.geometry.block_tokens
            shared = min(len(request.cached.prompt), len(request.prompt) - 1) // size
            request.blocks = request.cached.blocks[:shared]
            request.computed = shared * size
        tokens = tuple(request.prompt)
        return Admission(request.row, request.sequence_id, tokens, len(tokens), request.choice, request.params)

    def _step(self, running: list[Request], admissions: list[Admission], chunk: tuple[int, int]) -> None:
        self._assign_slots(running)
        order = sorted(self.random.sample(running, len(running)), key=self._order)
        steps = [self._sequence(request, chunk) for request in order]
        self.step += 1
        plan = StepPlan(self.step, tuple(self.slots), admissions=tuple(admissions), sequences=tuple(steps))
        self.worker.forward(plan)
        force = {r.sequence_id: r.force[len(r.tokens)] for r in order if r.force is not None}
        for request, step, result in zip(
            order, steps, self.worker.sample(plan, force=force).result().results, strict=True
        ):
            request.computed += step.length
            request.tokens += result.tokens
            request.logprobs += result.logprobs or []
            request.prompt_logprobs += result.prompt_logprobs or []

    def _sequence(self, request: Request, chunk: tuple[int, int]) -> SequenceStep:
        known = len(request.prompt) + len(request.tokens)
        left = known - request.computed
        length = left if left == 1 else min(left, self.random.randint(*chunk))
        needed = self.worker.info.geometry.blocks(request.computed + length)
        while len(request.blocks) < needed:
            request.blocks.append(self.free.pop())
        first, request.told = request.told, len(request.blocks)
        decode = request.computed >= len(request.prompt)
        return SequenceStep(
            row=request.row,
            sequence_id=request.sequence_id,
            slot=-1 if request.adapter_id is None else self.slots.index(request.adapter_id),
            start=request.computed,
            length=length,
            tokens=() if decode else tuple(request.prompt[request.computed : request.computed + length]),
            first_new_block=first,
            new_blocks=tuple(request.blocks[first:]),
            sample=request.computed + length == known,
            output_index=len(request.tokens),
            ban_stops=len(request.tokens) < request.params.min_tokens,
            prompt_logprobs=request.params.prompt_logprobs is not None and not decode,
        )

    def _order(self, request: Request) -> tuple[int, bool]:
        slot = len(self.slots) if request.adapter_id is None else self.slots.index(request.adapter_id)
        return slot, request.computed < len(request.prompt)

    def _assign_slots(self, running: list[Request]) -> None:
        wanted = [r.adapter_id for r in running if r.adapter_id is not None]
        self.slots = [slot if slot in wanted else None for slot in self.slots]
        for adapter_id in wanted:
            if adapter_id not in self.slots:
                self.slots[self.slots.index(None)] = adapter_id

    def _finish(self, request: Request, poison: bool) -> None:
        shared = request.cached.blocks if request.cached is not None else []
        freed = [block for block in request.blocks if block not in shared]
        if poison:
            self.worker.poison(freed)
            self.free += freed
