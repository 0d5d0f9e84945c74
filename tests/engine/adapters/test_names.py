import pytest

from engine.adapters.names import check_adapter_name
from engine.types import EngineError, ErrorCode


@pytest.mark.parametrize("name", ["a", "lora0", "team/sql-v1.2", "A_b-c.d/e", "x" * 128, "llama2"])
def test_allowed(name: str) -> None:
    check_adapter_name(name, base="llama")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "a name is needed"),
        ("x" * 129, "longer than 128"),
        ("a b", "only letters"),
        ("lora0\n", "only letters"),
        ("a\0b", "only letters"),
        ("llama:lora0", "only letters"),
        ("ünï", "only letters"),
        ("../etc/passwd", "'..' is not allowed"),
        ("a..b", "'..' is not allowed"),
        ("/etc/passwd", "leading slash"),
        ("llama", "the base model's name"),
    ],
)
def test_refused(name: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason) as caught:
        check_adapter_name(name, base="llama")
    assert caught.value.code is ErrorCode.ADAPTER_INVALID
    assert len(caught.value.message) < 300
