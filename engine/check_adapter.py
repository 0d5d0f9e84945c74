"""`python -m engine.check_adapter CONFIG`: what an adapter holds and whether this base serves it, as a table.

CONFIG is an EngineConfig as JSON with one entry in `lora_paths`; the gateway's command makes it. Nothing is loaded of
the base but its config.json. Exit code 0: accepted, 1: refused.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from engine.adapters.binding import Binding, bind
from engine.adapters.host import HostTier
from engine.adapters.layout import Layout, pack
from engine.adapters.peft import AdapterFile, read_adapter
from engine.adapters.peft_config import MAX_CONFIG_BYTES, LoraSettings, parse_settings
from engine.adapters.source import open_adapter_file, resolve_source
from engine.adapters.spec import AdapterLimits
from engine.adapters.tensorfile import Entry, read_header
from engine.config import EngineConfig
from engine.geometry import Geometry, make_geometry
from engine.models.config import ModelConfig, UnsupportedModelError
from engine.models.dims import LORA_MODULES
from engine.models.registry import load_config
from engine.models.source import ModelSourceError, resolve_model
from engine.types import CONFIG_FILE, TENSORS_FILE, EngineError

COLUMNS = ("module", "layers", "rank", "scale", "A", "B", "type")
LABEL_WIDTH = 10
ANY_RANK = 1 << 30  # without --max-lora-rank the server takes what its --lora-paths need


@dataclass
class Report:
    """What was found so far; a refusal may come at any point."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    modules: list[tuple[str, ...]] = field(default_factory=list)
    refusal: str | None = None

    def text(self) -> str:
        lines = [f"{label:<{LABEL_WIDTH}}  {value}" for label, value in self.facts]
        if self.modules:
            lines += ["", *_table([COLUMNS, *self.modules]), ""]
        verdict = "accepted" if self.refusal is None else f"refused: {self.refusal}"
        return "\n".join([*lines, f"{'verdict':<{LABEL_WIDTH}}  {verdict}"])


def check(config: EngineConfig) -> Report:
    """Every step that a load takes, up to the pages in host memory. Blocking; a base that cannot be had raises.

    Raises:
        ModelSourceError, UnsupportedModelError: there is no such base, or none that can be served.
    """
    (path,) = config.lora_paths
    base = load_config(resolve_model(config.model_path, config.revision, weights=False))
    report = Report([("adapter", path.path), ("base", _base(config, base))])
    try:
        folder = resolve_source(path.path, path.revision)
        settings, binding = _outline(folder)
        report.modules = list(_rows(settings, binding))
        limits = AdapterLimits(config.max_lora_rank or ANY_RANK, config.lora_target_modules or LORA_MODULES)
        _accept(report, config, base, read_adapter(folder, base.dims, limits))
    except EngineError as error:
        report.refusal = error.message
    return report


def _accept(report: Report, config: EngineConfig, base: ModelConfig, file: AdapterFile) -> None:
    """Stores it as a server would; raises EngineError where its values do not fit the dtype."""
    dtype: torch.dtype = getattr(torch, _dtype(config, base))
    geometry = make_geometry(base.dims, dtype.itemsize)
    layout = pack(file.spec.modules, base.dims, geometry)
    host = HostTier(base.dims, geometry, dtype, layout.bytes, slab_bytes=layout.bytes)
    try:
        host.store(1, file)
    finally:
        host.close()
    modules = " ".join(file.spec.module_names)
    report.facts += [
        ("files", f"{file.spec.file_bytes:,} bytes, sha256 {file.spec.content_hash}"),
        ("in memory", _memory(layout, geometry)),
        ("needs", f"--max-lora-rank {file.spec.rank} --lora-target-modules {modules}"),
    ]


def _memory(layout: Layout, geometry: Geometry) -> str:
    chunks = f"{layout.chunks} chunk{'s' if layout.chunks > 1 else ''} of {geometry.chunk_bytes:,}"
    return f"{layout.bytes:,} bytes: {chunks}, {layout.waste:.0%} unused"


def _base(config: EngineConfig, base: ModelConfig) -> str:
    name = config.model_path or "the demo"
    return f"{name}: {base.architecture}, {base.dims.layers} layers, {_dtype(config, base)}"


def _dtype(config: EngineConfig, base: ModelConfig) -> str:
    return base.dtype if config.dtype == "auto" else config.dtype


def _outline(folder: Path) -> tuple[LoraSettings, Binding]:
    """Config and header, without a look at the weights."""
    with open_adapter_file(folder, CONFIG_FILE, MAX_CONFIG_BYTES) as stream:
        settings = parse_settings(stream.read(MAX_CONFIG_BYTES))
    with open_adapter_file(folder, TENSORS_FILE) as stream:
        return settings, bind(read_header(stream, os.fstat(stream.fileno()).st_size).entries)


def _rows(settings: LoraSettings, binding: Binding) -> Iterable[tuple[str, ...]]:
    """A line for each kind of module, or several where its shapes or scales differ between layers."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for (layer, module), (a, b) in sorted(binding.pairs.items(), key=lambda item: item[0][::-1]):
        rank = a.shape[0] if a.shape else 0
        scale = f"{settings.scale_of(binding.name(layer, module), rank):.6g}" if rank else "-"
        key = (LORA_MODULES[module], str(rank), scale, _shape(a), _shape(b), str(a.dtype).removeprefix("torch."))
        groups.setdefault(key, []).append(layer)
    for (name, *rest), layers in groups.items():
        yield name, _ranges(layers), *rest


def _shape(entry: Entry) -> str:
    return "x".join(map(str, entry.shape)) or "scalar"


def _ranges(layers: Sequence[int]) -> str:
    """0-3,7 for ascending numbers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def main() -> int:
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    try:
        report = check(config)
    except (ModelSourceError, UnsupportedModelError) as error:
        print(f"loramux: error: {error}", file=sys.stderr)
        return 1
    print(report.text())
    return 0 if report.refusal is None else 1


if __name__ == "__main__":
    sys.exit(main())
