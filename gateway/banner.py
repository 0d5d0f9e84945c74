"""What the server says when it is ready: model, sizes, adapters, address and a line to try."""

from engine.types import AdapterInfo, AdapterState, ModelInfo
from gateway.state import Gateway

UNITS = ("B", "KB", "MB", "GB", "TB")
UNREAD = {AdapterState.COLD: "read on first use"}


def summary(gateway: Gateway, address: tuple[str, int]) -> str:
    """The whole text. `address` is the listening socket's."""
    model = gateway.client.model
    adapters = list(gateway.client.adapters.values())
    lines = [_model_line(model), _arena_line(model), _lora_line(model), *map(_adapter_line, adapters)]
    url = f"http://{_host(address[0])}:{address[1]}"
    lines += ["", f"  ready at {url}/v1  - try:", f"  {_curl(url, _example(model, adapters))}", ""]
    return "\n".join(lines) + "\n"


def _model_line(model: ModelInfo) -> str:
    size = f"{human_count(model.parameters)} parameters, " if model.parameters else ""
    where = f"{model.dtype} on {model.device}, context {model.max_model_len:,} tokens"
    return f"\n  model     {model.served_name} ({size}{where})"


def _arena_line(model: ModelInfo) -> str:
    tokens = model.num_chunks * model.block_tokens
    size = human_bytes(model.num_chunks * model.chunk_bytes)
    return f"  arena     {size}: {tokens:,} tokens in {model.num_chunks:,} chunks of {human_bytes(model.chunk_bytes)}"


def _lora_line(model: ModelInfo) -> str:
    if not model.enable_lora:
        return "  adapters  off (--enable-lora or --lora-paths turns them on)"
    modules = ", ".join(name.removesuffix("_proj") for name in model.lora_target_modules)
    limits = f"{model.max_loras_per_batch} in a batch, rank up to {model.max_lora_rank}, modules {modules}"
    return f"  adapters  {limits}, backend {model.lora_backend}"


def _adapter_line(adapter: AdapterInfo) -> str:
    size = f", {human_bytes(adapter.bytes)}" if adapter.bytes else ""
    rank = f"rank {adapter.rank}{size}" if adapter.rank else UNREAD.get(adapter.state, adapter.state.value)
    return f"            {adapter.name}: {rank}{', pinned' if adapter.pinned else ''}"


def _example(model: ModelInfo, adapters: list[AdapterInfo]) -> str:
    return f"{model.served_name}:{adapters[0].name}" if adapters else model.served_name


def _curl(url: str, model: str) -> str:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello! Who are you?"}}]}}'
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def _host(host: str) -> str:
    """An address that a client on this machine can use."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host


def human_bytes(size: int) -> str:
    """Decimal units, three digits: 90.2 MB."""
    value = float(size)
    for unit in UNITS[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {UNITS[-1]}"


def human_count(number: int) -> str:
    """Parameters as models are named by them: 8.03 B, 135 M."""
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"
