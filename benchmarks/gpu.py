"""The benchmarks of a GPU, part by part: Llama-3.1-8B's shape, bf16, random weights, everything beside its own floor.

    python -m benchmarks.gpu [--commit HASH] [--folder benchmarks/results] [--tiny] [part ...]

Each group of parts keeps a JSON of its own, row by row. --tiny: a tiny model, short, on the CPU.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import uvloop

from benchmarks import compare, steps, whole
from benchmarks.report import SHORT, Report

GROUPS = {"gpu": steps.PARTS, "compare": compare.PARTS, **whole.GROUPS}
PARTS = [part for parts in GROUPS.values() for part in parts]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    failed = []
    for group, parts in GROUPS.items():
        if wanted := [part for part in arguments.parts if part in parts]:
            name = group + SHORT if arguments.tiny else group
            report = Report(name, arguments.commit, folder=arguments.folder)
            try:
                _run(group, wanted, arguments, report)
            except Exception:
                traceback.print_exc()  # the other groups' figures are worth having
                failed.append(group)
    if failed:
        print(f"failed: {' '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(group: str, parts: Sequence[str], arguments: argparse.Namespace, report: Report) -> None:
    if group == "gpu":
        steps.run(parts, _step_scale(arguments), report, _ready(arguments.after))
    elif group == "compare":
        compare.run(parts, compare.SMALL if arguments.tiny else compare.FULL, report)
    else:
        uvloop.run(whole.run(parts, whole.SMALL if arguments.tiny else whole.FULL, report))


def _step_scale(arguments: argparse.Namespace) -> steps.Scale:
    if arguments.tiny:
        return steps.SMALL
    changes = {"max_loras_per_batch": arguments.slots, "mem_fraction_static": arguments.mem_fraction}
    return steps.full(msgspec.structs.replace(steps.FULL.engine, **changes))


def _ready(after: Path | None) -> Callable[[], None]:
    """Waits for the file: several benchmarks get ready together and measure in turn."""

    def wait() -> None:
        while after is not None and not after.exists():
            time.sleep(0.1)

    return wait


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {' '.join(PARTS)}; all by default")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="", help="the commit to name, where there is no .git")
    parser.add_argument("--tiny", action="store_true", help="the short form: shows that it runs")
    parser.add_argument("--slots", type=int, default=32, help="configured, for the steps")
    parser.add_argument("--after", type=Path, help="measure steps when this file exists; until then only get ready")
    parser.add_argument("--mem-fraction", type=float, default=0.88, help="of the card, for the steps")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {' '.join(sorted(unknown))}")
    arguments.parts = arguments.parts or PARTS
    return arguments


if __name__ == "__main__":
    sys.exit(main())
