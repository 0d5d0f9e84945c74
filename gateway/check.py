"""`loramux check-adapter`: hands the check to a process of the engine's, for the gateway reads no weights."""

import argparse
import subprocess
import sys

import msgspec

from engine.config import EngineConfig, LoraPath

COMMAND = (sys.executable, "-P", "-m", "engine.check_adapter")
NAME = "adapter"  # what is checked here has no name yet


def check_adapter(args: argparse.Namespace, dtype: str, modules: tuple[str, ...] | None) -> int:
    """Prints what the adapter holds and the verdict; 0 where a server would take it."""
    config = EngineConfig(
        model_path=args.model_path,
        revision=args.revision,
        dtype=dtype,
        max_lora_rank=args.max_lora_rank,
        lora_target_modules=modules,
        lora_paths=(LoraPath(name=NAME, path=args.path, revision=args.adapter_revision),),
    )
    return subprocess.call([*COMMAND, msgspec.json.encode(config).decode()])
