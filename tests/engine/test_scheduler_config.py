"""Flags become the brain's sizes."""

import pytest

from engine.config import EngineConfig, LoraPath
from engine.eviction import estimated_costs
from engine.scheduler import SchedulerConfig, scheduler_config


def config(flags: EngineConfig, *, on_gpu: bool = False) -> SchedulerConfig:
    return scheduler_config(
        flags,
        num_chunks=1000,
        block_tokens=16,
        chunk_bytes=4096,
        max_model_len=2048,
        eos_token_ids=frozenset({2}),
        max_adapter_chunks=40,
        on_gpu=on_gpu,
    )


@pytest.mark.parametrize(
    ("size", "on_gpu", "tokens"),
    [(None, False, 256), (None, True, 2048), (100, False, 100), (-1, False, None)],
)
def test_the_chunk_of_a_prompt(size: int | None, on_gpu: bool, tokens: int | None) -> None:
    assert config(EngineConfig(chunked_prefill_size=size), on_gpu=on_gpu).prefill_tokens == tokens


@pytest.mark.parametrize(("size", "running", "tokens"), [(256, 8, 256), (256, 256, 320), (-1, 8, 2056)])
def test_the_largest_step(size: int, running: int, tokens: int) -> None:
    flags = EngineConfig(chunked_prefill_size=size, max_running_requests=running)
    assert config(flags).step_tokens == tokens


def test_paths_alone_enable_lora() -> None:
    assert not config(EngineConfig()).enable_lora
    assert config(EngineConfig(lora_paths=(LoraPath(name="a", path="x"),))).enable_lora


def test_flags_pass() -> None:
    flags = EngineConfig(
        disable_radix_cache=True, schedule_policy="priority", max_loras_per_batch=3, max_loaded_loras=5,
        max_queued_requests=7,
    )  # fmt: skip
    made = config(flags)
    assert (made.prefix_cache, made.policy, made.max_slots, made.max_loaded, made.max_queued) == (
        False, "priority", 3, 5, 7,
    )  # fmt: skip
    assert made.longest_context == (1000 - 40) * 16


def test_waiting_and_eviction_as_told() -> None:
    made = config(EngineConfig(schedule_patience=7, lora_prefetch=False, lora_eviction_policy="lru"))
    assert (made.patience, made.prefetch, made.costs) == (7, False, None)
    assert config(EngineConfig(schedule_patience=-1)).patience is None
    assert config(EngineConfig(num_continuous_decode_steps=3)).decode_steps == 3


def test_waiting_and_eviction_where_nothing_is_told() -> None:
    made = config(EngineConfig())
    assert (made.patience, made.prefetch) == (64, True)
    assert made.costs == estimated_costs(16, 4096, on_gpu=False)
    assert [config(EngineConfig(), on_gpu=on_gpu).decode_steps for on_gpu in (False, True)] == [0, 1]


def test_an_unknown_eviction_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="--lora-eviction-policy fifo is not known"):
        config(EngineConfig(lora_eviction_policy="fifo"))
