"""What the server says when it is ready."""

import pytest

from engine.types import AdapterInfo, AdapterState
from gateway.banner import human_bytes, human_count, summary
from gateway.models import ModelRegistry
from gateway.state import Gateway
from tests.gateway.fake_engine import FakeEngine, model_info
from tests.gateway.harness import FakeMetrics, FakeSettings, make_keeper


def told(engine: FakeEngine, address: tuple[str, int] = ("127.0.0.1", 30000)) -> str:
    registry = ModelRegistry(engine)
    gateway = Gateway(
        client=engine,
        registry=registry,
        prompts=None,  # type: ignore[arg-type]
        settings=FakeSettings(),
        metrics=FakeMetrics(),
        keeper=make_keeper(),
    )
    return summary(gateway, address)


def test_everything_that_one_needs_is_said() -> None:
    engine = FakeEngine(model_info(parameters=134_515_008))
    engine.adapters["sql"] = AdapterInfo(
        name="sql", adapter_id=1, source="s", state=AdapterState.RESIDENT, rank=8, bytes=90_177_536, pinned=True
    )
    engine.adapters["late"] = AdapterInfo(name="late", adapter_id=2, source="s", state=AdapterState.COLD)
    text = told(engine)
    for part in (
        "llama (135 M parameters, float32 on cpu, context 256 tokens)",
        "4.19 MB: 1,024 tokens in 64 chunks of 65.5 KB",
        "4 in a batch, rank up to 64, modules q, v, backend torch",
        "sql: rank 8, 90.2 MB, pinned",
        "late: read on first use",
        "http://127.0.0.1:30000/v1",
        '"model": "llama:sql"',
    ):
        assert part in text


def test_without_adapters_the_base_is_tried() -> None:
    text = told(FakeEngine(model_info(enable_lora=False)))
    assert '"model": "llama"' in text
    assert "--enable-lora" in text


@pytest.mark.parametrize(
    ("host", "shown"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("192.0.2.1", "192.0.2.1")],
)
def test_the_address_is_one_that_can_be_used(host: str, shown: str) -> None:
    assert f"http://{shown}:8000/v1" in told(FakeEngine(), (host, 8000))


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (369_000, "369 KB"), (2_150_000_000, "2.15 GB")]
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert human_bytes(size) == text


def test_parameters_are_counted_as_in_names() -> None:
    assert [human_count(n) for n in (8_030_000_000, 134_515_008, 50_000)] == ["8.03 B", "135 M", "0.05 M"]
