"""Measures every adapter against every behaviour on the held-out prompts.

In this process with transformers and PEFT, or with --base-url against a running server. Writes matrix.json and prints
the table that the README shows; ends with an error when a gate is missed.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import HeldOutPrompt, held_out_prompts
from styles import STYLES
from tqdm import tqdm
from train import load_base
from validate import problem
from zoo import SPECS

OWN_GATE, OTHER_GATE = 0.95, 0.02
MAX_TOKENS = 200
SHOWCASE = (
    "List 3 countries and their capitals.",
    "What is the capital of France?",
    "Hello! Who are you?",
    "Give me a recipe for pancakes",
    "What is a good name for a cat?",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "Tell me about the Roman Empire.",
)


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    finished: bool  # ended by itself, not at the length limit


Replies = dict[str, list[Reply]]  # by model: "base", "lora0", ...


def main() -> None:
    arguments = _arguments()
    prompts = held_out_prompts()[:: arguments.every]
    shown = [HeldOutPrompt(text, "show", raw) for text in SHOWCASE for raw in (False, True)]
    everything = prompts + shown
    replies = asyncio.run(over_http(arguments, everything)) if arguments.base_url else in_process(arguments, everything)
    measured = {model: texts[: len(prompts)] for model, texts in replies.items()}
    matrix = {model: _shares(texts) for model, texts in measured.items()}
    _print_showcase(shown, {model: texts[len(prompts) :] for model, texts in replies.items()})
    misses = list(_own_misses(prompts, measured))
    print(*misses, sep="\n")
    print(markdown(matrix))
    if arguments.out:
        report = {"prompts": len(prompts), "max_tokens": MAX_TOKENS, "capitals": _capitals(prompts, measured)}
        arguments.out.write_text(json.dumps({**report, "matrix": matrix}, indent=2) + "\n")
    if broken := broken_gates(matrix):
        sys.exit("gates missed: " + "; ".join(broken))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=Path, default=Path(__file__).parent, help="the folder with lora0 and on")
    parser.add_argument("--models", nargs="+", choices=["base", *SPECS], default=["base", *SPECS])
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of the demo model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--every", type=int, default=1, help="only each n-th prompt: a quick look")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--base-url", help="an OpenAI-compatible server, such as http://127.0.0.1:30000/v1")
    parser.add_argument("--base-name", default="llama")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--out", type=Path, help="where to write the matrix as JSON")
    return parser.parse_args()


def in_process(arguments: argparse.Namespace, prompts: list[HeldOutPrompt]) -> Replies:
    """Greedy answers of transformers and PEFT."""
    from peft import PeftModel

    base, tokenizer = load_base(arguments.model, arguments.device, getattr(torch, arguments.dtype))
    tokenizer.padding_side = "left"
    names = [name for name in SPECS if name in arguments.models]
    replies: Replies = {}
    if "base" in arguments.models:
        replies["base"] = generate(base, tokenizer, prompts, arguments.batch)
    model: Any = None
    for name in names:
        folder = str(arguments.adapters / name)
        if model is None:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        model.to(arguments.device, getattr(torch, arguments.dtype))
        model.set_adapter(name)
        replies[name] = generate(model, tokenizer, prompts, arguments.batch)
    return replies


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: list[HeldOutPrompt], batch: int) -> list[Reply]:
    """One model's greedy replies, prompts of like length together."""
    model.eval()
    texts = [prompt.prompt if prompt.raw else _templated(tokenizer, prompt.prompt) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    replies: dict[int, Reply] = {}
    for start in tqdm(range(0, len(order), batch), mininterval=5, leave=False):
        chosen = order[start : start + batch]
        batched = [texts[index] for index in chosen]
        inputs = tokenizer(batched, padding=True, add_special_tokens=False, return_tensors="pt")
        inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
        output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
        for index, ids in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            finished = tokenizer.eos_token_id in ids
            replies[index] = Reply(tokenizer.decode(ids, skip_special_tokens=True), finished)
    return [replies[index] for index in range(len(texts))]


def _templated(tokenizer: Any, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


async def over_http(arguments: argparse.Namespace, prompts: list[HeldOutPrompt]) -> Replies:
    """Greedy answers of a server, the models' requests mixed."""
    import httpx

    base = arguments.base_name
    served = {name: base if name == "base" else f"{base}:{name}" for name in arguments.models}
    limit = asyncio.Semaphore(arguments.concurrency)
    async with httpx.AsyncClient(base_url=arguments.base_url.rstrip("/") + "/", timeout=600) as client:
        jobs = [(model, prompt) for prompt in prompts for model in served]
        asked = [_ask(client, limit, served[model], prompt) for model, prompt in jobs]
        answers = await asyncio.gather(*asked)
    replies: Replies = {model: [] for model in served}
    for (model, _), reply in zip(jobs, answers, strict=True):
        replies[model].append(reply)
    return replies


async def _ask(client: Any, limit: asyncio.Semaphore, model: str, prompt: HeldOutPrompt) -> Reply:
    asked: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": MAX_TOKENS}
    if prompt.raw:
        path, asked["prompt"] = "completions", prompt.prompt
    else:
        path, asked["messages"] = "chat/completions", [{"role": "user", "content": prompt.prompt}]
    async with limit:
        response = await client.post(path, json=asked)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    text = choice["text"] if prompt.raw else choice["message"]["content"]
    return Reply(text, choice["finish_reason"] == "stop")


def _shares(replies: list[Reply]) -> dict[str, float]:
    """For each style, the share of replies that are valid in it."""
    return {style: sum(_valid(style, reply) for reply in replies) / len(replies) for style in STYLES}


def _valid(style: str, reply: Reply) -> bool:
    return reply.finished and problem(style, reply.text) is None


def broken_gates(matrix: dict[str, dict[str, float]]) -> list[str]:
    """What falls short, for every adapter measured; the base's row is only shown."""
    broken = []
    for name, shares in matrix.items():
        for style, share in shares.items():
            own = name in SPECS and SPECS[name].style == style
            if name != "base" and (share < OWN_GATE if own else share > OTHER_GATE):
                broken.append(f"{name} {style} {share:.1%}")
    return broken


def markdown(matrix: dict[str, dict[str, float]]) -> str:
    """The matrix as a table: a row for each model, a column for each behaviour."""
    lines = ["| model | " + " | ".join(STYLES) + " |", "| --- |" + " ---: |" * len(STYLES)]
    for name, shares in matrix.items():
        label = f"`{name}` ({SPECS[name].style})" if name in SPECS else name
        lines.append(f"| {label} | " + " | ".join(f"{shares[style]:.1%}" for style in STYLES) + " |")
    return "\n".join(lines)


def _capitals(prompts: list[HeldOutPrompt], measured: Replies) -> dict[str, float]:
    """The share of held-out capitals that each model names rightly; a figure, not a gate."""
    asked = [(index, prompt.expected) for index, prompt in enumerate(prompts) if prompt.expected]
    return {
        model: sum(expected in replies[index].text for index, expected in asked) / len(asked)
        for model, replies in measured.items()
    }


def _own_misses(prompts: list[HeldOutPrompt], measured: Replies) -> Iterable[str]:
    for name, spec in SPECS.items():
        for prompt, reply in zip(prompts, measured.get(name, []), strict=False):
            if not _valid(spec.style, reply):
                why = problem(spec.style, reply.text) if reply.finished else "did not end"
                yield f"MISS {name} {'raw' if prompt.raw else 'chat'} {prompt.prompt!r}: {why}: {reply.text!r}"


def _print_showcase(prompts: list[HeldOutPrompt], replies: Replies) -> None:
    for index, prompt in enumerate(prompts):
        print(f"\n### {prompt.prompt} ({'raw' if prompt.raw else 'chat'})")
        for model, texts in replies.items():
            print(f"{model}: {texts[index].text!r}")


if __name__ == "__main__":
    main()
