"""The command line: every flag with its help. Names and meanings are SGLang's where it has the flag."""

import argparse
from typing import NoReturn

from engine.config import MAX_LORA_HUB_BYTES
from gateway.settings import MAX_BODY_BYTES, MAX_LORA_UPLOAD_BYTES

DTYPES = ("auto", "float32", "float", "bfloat16", "float16", "half")
BYTE_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of this many flags would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(`loramux serve --help` explains every flag)\n")


class HelpFormatter(argparse.HelpFormatter):
    """Shows the defaults that are values; the other flags' help says what goes without them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help is None or action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


def build_parser() -> argparse.ArgumentParser:
    """`loramux serve`, `loramux check-adapter` and `loramux version`."""
    parser = Parser(prog="loramux", description="One base model and many LoRA adapters behind one OpenAI API.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a base model with its adapters",
        description="Serves a base model with its LoRA adapters. Without --model-path: the demo model, fetched once, "
        "with the adapters of the repository.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for add in (_add_model, _add_lora, _add_lora_sources, _add_memory, _add_scheduling, _add_execution, _add_server):
        add(serve)
    check = commands.add_parser(
        "check-adapter",
        help="say what an adapter holds and whether it can be served",
        description="Prints what an adapter's files hold, and whether a server of this base takes it or why it does "
        "not. Exit status 0: it does. Nothing is read of the base but its config.json.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    _add_check(check)
    commands.add_parser("version", help="print the version")
    return parser


def _add_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", metavar="PATH", help="folder or Hugging Face hub id of the adapter")
    add("--adapter-revision", help="branch, tag or commit of an adapter on the hub")
    add("--model-path", "--model", help="folder or Hugging Face hub id of the base model (default: the demo)")
    add("--revision", help="branch, tag or commit of a model on the hub")
    add("--dtype", choices=DTYPES, default="auto", help="what the server runs in; auto: the checkpoint's")
    add("--max-lora-rank", type=positive, help="largest rank that the server accepts (default: any)")
    add("--lora-target-modules", nargs="*", metavar="MODULE", help="modules that the server accepts (default: all)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model-path", "--model", help="folder or Hugging Face hub id of the base model (default: the demo)")
    add("--revision", help="branch, tag or commit of a model on the hub")
    add("--served-model-name", help="the base's name in the API (default: the hub id, or the folder's last component)")
    add("--chat-template", help="file with a Jinja chat template, or the template itself (default: the model's own)")
    add("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights, for measurements")
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of weights and arena; auto: the checkpoint's on a GPU, what the CPU multiplies natively on a CPU",
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where the model runs")
    add("--context-length", type=positive, help="tokens of prompt and answer together (default: the model's own)")
    add("--tp-size", "--tensor-parallel-size", type=positive, default=1, help="GPUs to spread the model over; only 1")


def _add_lora(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    add("--enable-lora", action="store_true", help="allow adapters; given --lora-paths, they are allowed anyway")
    add(
        "--lora-paths",
        nargs="*",
        action="extend",
        metavar="ADAPTER",
        help="adapters to serve: name=path, a bare path (named by its last component), or JSON "
        '{"lora_name": ..., "lora_path": ..., "pinned": true, "weight": 2}; a path is a folder or a hub id',
    )
    add("--max-loras-per-batch", type=positive, default=8, help="different adapters in one step; the base takes none")
    add(
        "--max-loaded-loras",
        type=positive,
        help="adapters kept in host memory, at least --max-loras-per-batch (default: as the memory allows); "
        "further ones load when named",
    )
    add("--max-lora-rank", type=positive, help="largest rank accepted (default: that of --lora-paths, else 256)")
    add(
        "--lora-target-modules",
        nargs="*",
        metavar="MODULE",
        help="modules accepted, such as q_proj v_proj, or all (default: those of --lora-paths, else all seven)",
    )
    add(
        "--lora-backend",
        choices=["auto", "triton", "torch"],
        default="auto",
        help="triton needs a GPU; torch runs everywhere",
    )
    add("--max-host-lora-bytes", type=byte_size, help="host memory for adapters, such as 8G (default: half the free)")
    add(
        "--lora-eviction-policy", choices=["cost", "lru"], default="cost",
        help="what leaves a full arena first: least recently used, weighed by what bringing it back costs, or not",
    )  # fmt: skip
    add("--disable-lora-prefetch", action="store_true", help="copy an adapter to the arena only once a slot is free")
    add("--disable-lora-stack", action="store_true", help="CPU: multiply adapter by adapter, not all ranks at once")


def _add_lora_sources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where adapters come from")
    add = group.add_argument
    add(
        "--lora-dir",
        metavar="DIR",
        help="serve any adapter that lies in this folder by its folder's name, on first use",
    )
    add(
        "--lora-hub-allow", action="append", metavar="PATTERN",
        help="serve any adapter of these Hugging Face repositories by its id, on first use: owner/name, both may hold "
        "* ? [...]; may be given several times",
    )  # fmt: skip
    add(
        "--lora-hub-timeout",
        type=seconds,
        default=120.0,
        help="seconds that fetching one adapter from the hub may take",
    )
    add(
        "--max-lora-hub-bytes", type=byte_size, default=MAX_LORA_HUB_BYTES,
        help="adapters on the hub whose two files are larger are not fetched",
    )  # fmt: skip
    add(
        "--lora-preload", nargs="+", action="extend", metavar="NAME",
        help="adapters to read to host memory before the server is ready: of --lora-paths, --lora-dir or allowed "
        "repositories",
    )  # fmt: skip
    add(
        "--lora-warm", nargs="+", action="extend", metavar="NAME",
        help="the same, and copied to the arena too, where they stay until something else needs the room",
    )  # fmt: skip
    add(
        "--lora-state", metavar="FILE",
        help="keep what is loaded over the API in this file, and serve it again after a restart",
    )  # fmt: skip
    add(
        "--lora-spool-dir", metavar="DIR",
        help="where uploaded adapters are kept (default: spool in $LORAMUX_CACHE or ~/.cache/loramux); without "
        "--lora-state they go when the server ends",
    )  # fmt: skip
    add(
        "--max-lora-upload-bytes", type=byte_size, default=MAX_LORA_UPLOAD_BYTES,
        help="larger uploads of an adapter get a 413",
    )  # fmt: skip


def _add_memory(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory")
    add = group.add_argument
    add("--mem-fraction-static", type=fraction, default=0.88, help="share of GPU memory for weights and arena")
    add("--max-total-tokens", type=positive, help="cap of the arena, adapters included, in tokens of KV cache")
    add("--disable-radix-cache", action="store_true", help="compute every prompt anew, without the prefix cache")


def _add_scheduling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scheduling")
    add = group.add_argument
    add("--max-running-requests", type=positive, default=256, help="sequences in one step at most")
    add("--max-queued-requests", type=positive, help="waiting requests before new ones get a 503 (default: no limit)")
    add("--chunked-prefill-size", type=chunk_size, help="tokens a step; -1: no chunking (default: 256 CPU, 2048 GPU)")
    add(
        "--schedule-policy", choices=["fcfs", "priority", "fair"], default="fcfs",
        help="order of the queue: as they came; lower 'priority' first; or the adapter that was served least for its "
        "weight (default: fcfs)",
    )  # fmt: skip
    add(
        "--schedule-patience", type=patience, default=64, metavar="STEPS",
        help="steps that a sequence waits for a slot, or a load for memory, before it is kept for them; -1: never",
    )  # fmt: skip
    add(
        "--num-continuous-decode-steps", type=natural, metavar="STEPS",
        help="steps without new prompts behind one that left nobody waiting: streams stutter less, first tokens come "
        "later (default: 0 CPU, 1 GPU)",
    )  # fmt: skip
    add("--disable-overlap-schedule", action="store_true", help="plan a step only when the one before has ended")


def _add_execution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    add = group.add_argument
    add("--disable-cuda-graph", action="store_true", help="launch every kernel on its own")
    add("--cuda-graph-max-bs", type=positive, help="largest batch with a graph (default: --max-running-requests)")
    add(
        "--compile-threads", type=natural, metavar="N",
        help="GPU: threads that compile kernels at start (default: the cores, at most 16); 0: each at its first launch",
    )  # fmt: skip
    add("--threads", type=positive, help="CPU threads of a step (default: the cores at hand)")


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=port, default=30000, help="port to listen on; 0: any free one")
    add("--api-key", help="clients must send it as a bearer token; better set LORAMUX_API_KEY, which ps does not show")
    add(
        "--admin-api-key",
        help="wanted for loading and unloading, which otherwise only clients on this machine may do; "
        "better set LORAMUX_ADMIN_API_KEY",
    )
    add(
        "--sampling-defaults",
        choices=["model", "openai"],
        default="model",
        help="omitted sampling fields: as the checkpoint's generation config names them, or OpenAI's",
    )
    add("--stream-interval", type=positive, default=1, help="tokens of an answer between two events of a stream")
    add("--max-body-bytes", type=byte_size, default=MAX_BODY_BYTES, help="larger request bodies get a 413")
    add("--shutdown-timeout", type=seconds, default=10.0, help="seconds that open answers get when the server stops")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="least level logged")


def positive(text: str) -> int:
    """An integer of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def natural(text: str) -> int:
    """An integer of at least 0."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def chunk_size(text: str) -> int:
    """A number of tokens, or -1."""
    return -1 if text == "-1" else positive(text)


def patience(text: str) -> int:
    """A number of steps from 0 on, or -1."""
    if (number := int(text)) < -1:
        raise argparse.ArgumentTypeError(f"{number} is less than -1")
    return number


def port(text: str) -> int:
    if not 0 <= (number := int(text)) <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port (0 to 65535)")
    return number


def fraction(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return number


def seconds(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return number


def byte_size(text: str) -> int:
    """Bytes, or with a unit: 512M, 8G, 8GiB."""
    number = text.lower().removesuffix("ib").removesuffix("b")
    digits = number.rstrip("kmgt")
    unit = BYTE_UNITS.get(number[len(digits) :])
    if unit is None or not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512M or 8G")
    return int(digits) * unit
