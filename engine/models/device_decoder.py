"""The decoder on the device: every family's layers as a sequence of launches over buffers that never move.

The runner calls it eagerly or captures it. LoRA's deltas are computed beside the base products and added by the op that
follows each anyway; in large steps products take them in. Behind the last layer's attention a step of prompts goes on
with the sampled rows alone, since nobody reads the others. The caller fills the step's lists before; nothing here
depends on them but through the device.
"""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.decoder_buffers import DecoderBuffers
from engine.models.device_weights import DecoderWeights, LayerWeights, Linear
from engine.models.dims import LORA_MODULES, ModelDims
from engine.models.overlap import Overlap, default_overlap
from engine.worker.accelerator import Accelerator
from kernels.attention_decode import decode_attention
from kernels.attention_meta import AttentionMeta
from kernels.attention_prefill import prefill_attention
from kernels.large_product import Shrunk, gate_up_silu, product_onto
from kernels.layout import KvLayout
from kernels.lora_expand import lora_expand
from kernels.lora_gather import lora_gather
from kernels.lora_meta import GROUP_STARTS, LoraGroup, LoraMeta
from kernels.lora_shrink import lora_shrink
from kernels.norm import add_rms_norm, rms_norm
from kernels.product import product, product_parts
from kernels.rotary import rotary_store
from kernels.silu_mul import silu_mul
from kernels.step_input import embed, pick_rows


@dataclass(frozen=True, slots=True)
class LastRows:
    """The rows that are sampled, in the samples' order."""

    step: Tensor  # [STEP_INTS] int32
    samples: Tensor  # [samples, SAMPLE_INTS] int32
    lora: LoraMeta | None  # over these rows


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What one shape's steps read from the device."""

    ids: Tensor  # [tokens] int32
    positions: Tensor  # [tokens] int32
    locations: Tensor  # [tokens] int32
    attention: AttentionMeta
    windowed: AttentionMeta  # of the layers with a sliding window
    lora: LoraMeta | None  # None: nobody in the step has an adapter
    prefill: bool
    long: bool  # some prefill has a long context
    last: LastRows | None  # None: every row goes through the whole last layer
    decodes: int | None = None  # of the one step that is launched; None: of any


def lora_groups(dims: ModelDims) -> tuple[LoraGroup, ...]:
    """Of the four merged products: qkv, o, gate_up, down."""
    shapes = [dims.module_shape(module) for module in LORA_MODULES]
    bounds = pairwise((*GROUP_STARTS, len(shapes)))
    return tuple(LoraGroup(a, shapes[a][0], tuple(out for _, out in shapes[a:b])) for a, b in bounds)


class DeviceDecoder:
    """`forward` leaves normalised hidden states in `buffers.hidden`: of all tokens, or of the step's last rows."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        buffers: DecoderBuffers,
        table: Tensor,
        kv: KvLayout,
        last_token: Tensor,
        accelerator: Accelerator,
        modules: Collection[str],
    ) -> None:
        """modules: those that adapters may have."""
        dims = config.dims
        self.buffers = buffers
        self._config = config
        self._weights = weights
        self._table = table  # [positions, head_dim] float32
        self._kv = kv
        self._last_token = last_token  # [state rows] int64
        self._accelerator = accelerator
        self.use(torch.empty(0), torch.empty(0), torch.empty(0))
        self._scale = dims.head_dim**-0.5
        self._qkv, self._o, self._gate_up, self._down = groups = lora_groups(dims)
        names = (LORA_MODULES[group.first : group.first + len(group.features)] for group in groups)
        self._adapted = [not set(modules).isdisjoint(own) for own in names]
        self._window_layers = config.sliding_layers or (False,) * dims.layers
        self.overlap(default_overlap(accelerator.device))

    def overlap(self, overlap: Overlap) -> None:
        """From the next launch or capture on."""
        self._overlap = overlap
        self._begin(0)

    def _begin(self, rows: int) -> None:
        """The launches that follow are of so many rows."""
        self._pdl, self._keep = self._overlap.dependent(rows), self._overlap.keeps(rows)

    @contextlib.contextmanager
    def overlapping(self, overlap: Overlap) -> Iterator[None]:
        """In place of the decoder's own, for as long as the context lasts."""
        own = self._overlap
        self.overlap(overlap)
        try:
            yield
        finally:
            self.overlap(own)

    @property
    def ways(self) -> tuple[Overlap, ...]:
        """Between them, large steps launch all that others of their kind do, however full their last turns are."""
        own = self._overlap
        return replace(own, fill=0.0), replace(own, fill=2.0, decodes_each=0)

    def use(self, arena: Tensor, pieces: Tensor, ranks: Tensor) -> None:
        """Keys, values and adapters are in this arena from now on, the slots' adapters where these tables say."""
        self._arena, self._pieces, self._ranks = arena, pieces, ranks

    @property
    def kinds(self) -> frozenset[int]:
        """Layers that launch, between them, every kernel there is: the first of each kind, and the last."""
        sliding = list(self._window_layers)
        return frozenset({sliding.index(kind) for kind in sliding} | {len(sliding) - 1})

    def forward(self, step: StepTensors, layers: Collection[int] | None = None) -> None:
        """Launches all layers, or some of them, which computes nothing of use."""
        weights, buffers, rows = self._weights, self.buffers, step.ids.shape[0]
        residual, hidden, mixed, lora = buffers.residual[:rows], buffers.hidden[:rows], buffers.mixed[:rows], step.lora
        if lora is not None:
            lora_gather(lora, self._pieces, self._ranks)
        embed(residual, weights.embed, step.ids, self._last_token)
        self._begin(rows)
        rms_norm(hidden, residual, weights.layers[0].attention_norm, self._config.norm_eps, keep=self._keep)
        following = [layer.attention_norm for layer in weights.layers[1:]]
        for index, (layer, norm) in enumerate(zip(weights.layers, [*following, weights.norm], strict=True)):
            if layers is not None and index not in layers:
                continue
            self._attend(index, layer, step, hidden)
            if step.last is not None and index == len(weights.layers) - 1:
                mixed, residual, lora = *self._pick(step.last), step.last.lora
            self._add(index, self._o, layer.o, mixed, residual, lora, layer.mlp_norm)
            active = self._feed_forward(index, layer, hidden[: len(mixed)], lora)
            self._add(index, self._down, layer.down, active, residual, lora, norm)

    def logits(self, out: Tensor, hidden: Tensor) -> None:
        """out: [rows, vocab] float32; hidden: [rows, hidden] from `forward`."""
        head = self._weights.head.t()
        if hidden.dtype == torch.float32:
            torch.mm(hidden, head, out=out)
        else:
            torch.mm(hidden, head, out_dtype=torch.float32, out=out)

    def _attend(self, index: int, layer: LayerWeights, step: StepTensors, hidden: Tensor) -> None:
        """Projects, rotates, stores and attends; the result is in `buffers.mixed`."""
        rows, kv, buffers = hidden.shape[0], self._kv, self.buffers
        qkv, query, out = buffers.qkv[:rows], buffers.query[:rows], buffers.mixed[:rows]
        lora = self._used(step.lora, self._qkv)
        delta, delta_rows = self._product(index, self._qkv, layer.qkv, hidden, qkv, lora)
        norms = None if layer.qk_norms is None else (*layer.qk_norms, self._config.norm_eps)
        rotary_store(
            query, qkv, self._arena, kv, index, step.positions, step.locations, self._table,
            delta=delta, delta_rows=delta_rows, norms=norms, pdl=self._pdl, keep=self._keep,
        )  # fmt: skip
        sliding = self._window_layers[index]
        meta = step.windowed if sliding else step.attention
        each = self._overlap.decodes_beside(rows, step.decodes) if step.prefill else 0
        if each:  # decodes wait for memory, prompts for products; decodes go first, and leave room
            with self._accelerator.beside():
                decode_attention(out, query, self._arena, kv, index, meta, self._scale, each=each)
        if step.prefill:
            window = self._config.sliding_window or 0 if sliding else 0
            prefill_attention(out, query, self._arena, kv, index, meta, self._scale, window, long=step.long)
        if each:
            self._accelerator.join()
        elif step.decodes != 0:
            decode_attention(out, query, self._arena, kv, index, meta, self._scale, pdl=self._pdl, keep=self._keep)

    def _pick(self, last: LastRows) -> tuple[Tensor, Tensor]:
        """What attention made of the last rows, in place of the queries, which it is done with; and their residual.

        The other layers' descriptors of LoRA's work are no longer needed: these rows' take their place. They are made
        first: shrink reads them before it waits for the kernel ahead.
        """
        count, buffers = last.samples.shape[0], self.buffers
        if last.lora is not None:
            lora_gather(last.lora, self._pieces, self._ranks)
        mixed, residual = buffers.query[:count], buffers.last_residual[:count]
        pick_rows(mixed, buffers.mixed, last.step, last.samples)
        pick_rows(residual, buffers.residual, last.step, last.samples)
        self._begin(count)
        return mixed, residual

    def _feed_forward(self, index: int, layer: LayerWeights, hidden: Tensor, lora: LoraMeta | None) -> Tensor:
        rows, buffers, lora = hidden.shape[0], self.buffers, self._used(lora, self._gate_up)
        active = buffers.active[:rows]
        if self._overlap.merges(rows, layer.gate_up.weight, lora=lora is not None):
            shrunk = self._shrink(index, self._gate_up, hidden, lora)
            gate_up_silu(active, hidden, layer.gate_up.weight, layer.gate_up.bias, shrunk)
            return active
        gate_up = buffers.gate_up[:rows]
        delta, delta_rows = self._product(index, self._gate_up, layer.gate_up, hidden, gate_up, lora)
        silu_mul(active, gate_up, delta=delta, delta_rows=delta_rows, pdl=self._pdl, keep=self._keep)
        return active

    def _add(
        self,
        index: int,
        group: LoraGroup,
        linear: Linear,
        x: Tensor,
        residual: Tensor,
        lora: LoraMeta | None,
        norm: Tensor,
    ) -> None:
        """The residual takes a product in, and the next norm is taken of it."""
        rows, lora = x.shape[0], self._used(lora, group)
        y = hidden = self.buffers.hidden[:rows]
        if self._overlap.onto_residual(rows, linear.weight) and linear.bias is None:
            self._add_onto(residual, x, linear.weight, self._shrink(index, group, x, lora))
            rms_norm(hidden, residual, norm, self._config.norm_eps)
            return
        if self._overlap.product(rows, linear.weight, lora=lora is not None):
            y = self.buffers.parts(product_parts(linear.weight), rows)
        delta, delta_rows = self._product(index, group, linear, x, y, lora)
        add_rms_norm(
            hidden, residual, y, norm, self._config.norm_eps,
            delta=delta, delta_rows=delta_rows, pdl=self._pdl, keep=self._keep,
        )  # fmt: skip

    def _product(
        self, index: int, group: LoraGroup, linear: Linear, x: Tensor, out: Tensor, lora: LoraMeta | None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """out = x @ weight.T (+ bias) and the adapters' delta, which the next op adds if it is returned.

        lora: None where no adapter of the step has the group. Returns the delta, which is computed beside the product,
        and how many rows it has.
        """
        rows = x.shape[0]
        if lora is not None:
            delta = self.buffers.delta(*out.shape[-2:])
            pdl = self._pdl and rows <= self._overlap.products
            early = self._pdl and self._overlap.early(rows)
            with self._accelerator.beside(early=early, first=self._overlap.lora_first(rows, group)):
                lora_shrink(x, self._arena, lora, index, group, pdl=early, keep=self._keep)
                lora_expand(delta, self._arena, lora, index, group, add=False, pdl=pdl, keep=self._keep)
        if self._overlap.product(rows, linear.weight, lora=lora is not None):
            product(out, x, linear.weight, linear.bias, pdl=self._pdl, keep=self._keep, shared=lora is not None)
        elif linear.bias is None:
            torch.mm(x, linear.weight.t(), out=out)
        else:
            torch.addmm(linear.bias, x, linear.weight.t(), out=out)
        if lora is None:
            return None, None
        self._accelerator.join()
        return delta, lora.rows(group)

    def _used(self, lora: LoraMeta | None, group: LoraGroup) -> LoraMeta | None:
        """None where it is known that no adapter of the step has the group."""
        if lora is None or not self._adapted[group.index] or (lora.known is not None and not lora.known[group.index]):
            return None
        return lora

    def _shrink(self, index: int, group: LoraGroup, x: Tensor, lora: LoraMeta | None) -> Shrunk | None:
        """Shrink in line; None where the group has no delta, and no lora."""
        if lora is None:
            return None
        lora_shrink(x, self._arena, lora, index, group)
        return Shrunk(self._arena, lora, index, group)

    def _add_onto(self, residual: Tensor, x: Tensor, weight: Tensor, shrunk: Shrunk | None) -> None:
        """o's product or down's, and the adapters' delta."""
        if shrunk is not None and self._overlap.takes_delta(len(x), weight):
            product_onto(residual, x, weight, shrunk)
            return
        if shrunk is not None:
            lora_expand(residual, shrunk.arena, shrunk.meta, shrunk.layer, shrunk.group, add=True)
        add_product(residual, x, weight)


def add_product(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    """residual += x @ weight.T; residual: [tokens, out] float32."""
    if x.dtype == torch.float32:
        residual.addmm_(x, weight.t())
    else:
        torch.addmm(residual, x, weight.t(), out_dtype=torch.float32, out=residual)
