"""The command `loramux`: flags to settings, checked before anything is loaded, and the start of the server."""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

import gateway
from engine.config import EngineConfig, LoraPath
from engine.types import EngineError
from gateway.check import check_adapter
from gateway.flags import build_parser
from gateway.kernels_check import require_own_kernels
from gateway.lora_paths import demo_adapters, parse_lora_paths
from gateway.settings import Settings, SettingsError

DEMO_NAME = "llama"
DTYPES = {"half": "float16", "float": "float32"}
LARGEST_RANK = 256  # accepted where nothing says less
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "version":
        print(importlib.metadata.version("loramux"))
        return 0
    try:
        return _check(args) if args.command == "check-adapter" else _serve(settings_from(args, os.environ))
    except (SettingsError, EngineError) as error:
        print(f"loramux: error: {error}", file=sys.stderr)
        return 1


def _serve(settings: Settings) -> int:
    from gateway.server import run

    require_own_kernels()
    return run(settings)


def _check(args: argparse.Namespace) -> int:
    return check_adapter(args, DTYPES.get(args.dtype, args.dtype), _target_modules(args.lora_target_modules))


def settings_from(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The flags as settings.

    Raises:
        SettingsError: a value, or a combination, that cannot be served.
    """
    return Settings(
        engine=_engine_config(args),
        host=args.host,
        port=args.port,
        api_key=_key(args.api_key, environ, "LORAMUX_API_KEY"),
        admin_api_key=_key(args.admin_api_key, environ, "LORAMUX_ADMIN_API_KEY"),
        chat_template=args.chat_template,
        sampling_defaults=args.sampling_defaults,
        stream_interval=args.stream_interval,
        max_body_bytes=args.max_body_bytes,
        lora_dir=args.lora_dir,
        lora_hub_allow=tuple(args.lora_hub_allow or ()),
        lora_preload=tuple(args.lora_preload or ()),
        lora_warm=tuple(args.lora_warm or ()),
        lora_state=args.lora_state,
        lora_spool_dir=args.lora_spool_dir,
        max_lora_upload_bytes=args.max_lora_upload_bytes,
        shutdown_timeout=args.shutdown_timeout,
        log_level=args.log_level,
    )


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    served_name = _served_name(args)
    lora_paths = _preloaded(_lora_paths(args, served_name), args)
    _check_limits(args, lora_paths)
    on_demand = args.lora_dir is not None or bool(args.lora_hub_allow)
    modules = _target_modules(args.lora_target_modules)
    return EngineConfig(
        model_path=args.model_path,
        revision=args.revision,
        served_model_name=served_name,
        load_format=args.load_format,
        dtype=DTYPES.get(args.dtype, args.dtype),
        device=args.device,
        context_length=args.context_length,
        tp_size=args.tp_size,
        enable_lora=args.enable_lora or on_demand or bool(lora_paths),
        lora_paths=lora_paths,
        lora_dir=args.lora_dir and str(Path(args.lora_dir).expanduser().resolve()),
        lora_hub_timeout=args.lora_hub_timeout,
        max_lora_hub_bytes=args.max_lora_hub_bytes,
        max_loras_per_batch=args.max_loras_per_batch,
        max_loaded_loras=args.max_loaded_loras,
        # what comes on demand is not bounded by what --lora-paths happens to hold
        max_lora_rank=LARGEST_RANK if on_demand and args.max_lora_rank is None else args.max_lora_rank,
        lora_target_modules=LORA_MODULES if on_demand and modules is None else modules,
        lora_backend=args.lora_backend,
        max_host_lora_bytes=args.max_host_lora_bytes,
        mem_fraction_static=args.mem_fraction_static,
        max_total_tokens=args.max_total_tokens,
        chunked_prefill_size=args.chunked_prefill_size,
        max_running_requests=args.max_running_requests,
        max_queued_requests=args.max_queued_requests,
        schedule_policy=args.schedule_policy,
        schedule_patience=args.schedule_patience,
        num_continuous_decode_steps=args.num_continuous_decode_steps,
        lora_prefetch=not args.disable_lora_prefetch,
        lora_eviction_policy=args.lora_eviction_policy,
        disable_radix_cache=args.disable_radix_cache,
        disable_overlap_schedule=args.disable_overlap_schedule,
        disable_cuda_graph=args.disable_cuda_graph,
        cuda_graph_max_bs=args.cuda_graph_max_bs,
        compile_threads=args.compile_threads,
        lora_stack=not args.disable_lora_stack,
        threads=args.threads,
        log_level=args.log_level,
    )


def _served_name(args: argparse.Namespace) -> str:
    """As given, else the demo's name, a folder's last component or the hub id."""
    name: str = args.served_model_name if args.served_model_name is not None else _default_name(args.model_path)
    if not name or ":" in name or not name.isprintable() or name != name.strip():
        raise SettingsError(
            f"--served-model-name: {name!r} cannot name a model (it is empty or holds a colon or space)"
        )
    return name


def _default_name(model_path: str | None) -> str:
    if model_path is None:
        return DEMO_NAME
    folder = Path(model_path).expanduser()
    is_local = folder.exists() or model_path.startswith(("/", "./", "../", "~"))
    return folder.resolve().name if is_local else model_path


def _lora_paths(args: argparse.Namespace, base: str) -> tuple[LoraPath, ...]:
    if args.lora_paths is not None:
        return parse_lora_paths(args.lora_paths, base)
    repository = Path(gateway.__file__).parents[1]
    return demo_adapters(repository / "adapters") if args.model_path is None else ()


def _preloaded(lora_paths: Sequence[LoraPath], args: argparse.Namespace) -> tuple[LoraPath, ...]:
    """Those that --lora-preload or --lora-warm names have the host's room before the others."""
    names = {*(args.lora_preload or ()), *(args.lora_warm or ())}
    return tuple(msgspec.structs.replace(path, preload=path.name in names) for path in lora_paths)


def _check_limits(args: argparse.Namespace, lora_paths: Sequence[LoraPath]) -> None:
    slots = args.max_loras_per_batch
    if args.max_loaded_loras is not None and args.max_loaded_loras < slots:
        raise SettingsError(
            f"--max-loaded-loras {args.max_loaded_loras} is less than --max-loras-per-batch {slots}: "
            "every adapter of a batch must be loaded"
        )
    if args.tp_size > 1:
        raise SettingsError(
            f"--tp-size {args.tp_size}: tensor parallelism is not supported yet; serve with --tp-size 1"
        )
    if args.lora_backend == "triton" and args.device == "cpu":
        raise SettingsError("--lora-backend triton needs a GPU; on the CPU serve with --lora-backend torch")
    pinned = sum(entry.pinned for entry in lora_paths)
    if pinned >= slots:
        raise SettingsError(
            f"--lora-paths: {pinned} adapters are pinned, and --max-loras-per-batch {slots} allows {slots - 1}: "
            "one slot stays free for the others"
        )


def _target_modules(given: Sequence[str] | None) -> tuple[str, ...] | None:
    """None: inferred from the adapters."""
    if given is None:
        return None
    if "all" in given:
        return LORA_MODULES
    if unknown := sorted(set(given) - set(LORA_MODULES)):
        known = " ".join(LORA_MODULES)
        raise SettingsError(f"--lora-target-modules: {' '.join(unknown)} unknown; it takes `all` or some of {known}")
    if not given:
        raise SettingsError("--lora-target-modules: names no module")
    return tuple(module for module in LORA_MODULES if module in given)


def _key(flag: str | None, environ: Mapping[str, str], variable: str) -> str | None:
    """A key from its flag, else from the environment."""
    key = flag if flag is not None else environ.get(variable)
    if key is not None and (not key.strip() or not key.isprintable() or key != key.strip()):
        raise SettingsError(f"{variable} or its flag: a key must not be empty or begin or end with a space")
    return key


if __name__ == "__main__":
    sys.exit(main())
