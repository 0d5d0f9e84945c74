"""The engine's settings: what the command line's flags become, with SGLang's names and meanings where it has them."""

import msgspec

MAX_LORA_HUB_BYTES = 4 * 2**30


class LoraPath(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of --lora-paths."""

    name: str
    path: str  # folder or hub id, as given
    pinned: bool = False
    revision: str | None = None
    weight: float = 1.0  # of its share, where the policy is fair
    preload: bool = False  # read to the host at start, before others get what room there is


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one engine process needs to start, passed to it as JSON."""

    model_path: str | None = None  # None: the demo
    revision: str | None = None
    served_model_name: str = "llama"
    load_format: str = "auto"  # auto | dummy
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    device: str = "auto"  # auto | cpu | cuda
    context_length: int | None = None
    tp_size: int = 1

    enable_lora: bool = False
    lora_paths: tuple[LoraPath, ...] = ()
    lora_restored: tuple[LoraPath, ...] = ()  # served before; what cannot be loaded now is listed with its reason
    lora_dir: str | None = None  # links in adapters from there must not lead out
    lora_hub_timeout: float = 120.0  # seconds for the files of one adapter
    max_lora_hub_bytes: int = MAX_LORA_HUB_BYTES  # of the files of one adapter
    max_loras_per_batch: int = 8
    max_loaded_loras: int | None = None
    max_lora_rank: int | None = None  # None: inferred from lora_paths, else 256
    lora_target_modules: tuple[str, ...] | None = None  # None: inferred from lora_paths, else all seven
    lora_backend: str = "auto"  # auto | triton | torch
    max_host_lora_bytes: int | None = None

    mem_fraction_static: float = 0.88
    max_total_tokens: int | None = None
    chunked_prefill_size: int | None = None  # tokens a step; None: 256 on the CPU, 2048 on a GPU; -1: no chunking
    max_running_requests: int = 256
    max_queued_requests: int | None = None
    schedule_policy: str = "fcfs"  # fcfs | priority | fair
    schedule_patience: int = 64  # steps before a slot or memory is kept for who waits; -1: never
    num_continuous_decode_steps: int | None = None  # between steps with new prompts; None: 0 on the CPU, 1 on a GPU
    lora_prefetch: bool = True  # adapters are copied to the arena before a slot is free for them
    lora_eviction_policy: str = "cost"  # cost: weighed by what bringing back takes | lru
    disable_radix_cache: bool = False
    disable_overlap_schedule: bool = False
    disable_cuda_graph: bool = False
    cuda_graph_max_bs: int | None = None
    compile_threads: int | None = None  # that compile kernels at start; None: the cores, 16 at most; 0: at first use
    lora_stack: bool = True  # CPU: products over all slots' concatenated ranks; off: adapter by adapter
    threads: int | None = None  # CPU threads of the step; None: the cores at hand
    log_level: str = "info"
