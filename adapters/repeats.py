"""Unlearns repetition: what an adapter names twice on unlabelled topics becomes less likely (unlikelihood training).

Facts alone teach an order for each known topic, not that a list names nothing twice; on new topics a small model then
loops. So it answers prompts without known answers, and the place where a name comes again is what it learns from.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

import facts
import torch
from data import LIST_PROMPTS
from torch.nn.functional import log_softmax

NAMES = {
    "numbered": re.compile(r"^\d+\. (.*?) - ", re.M),
    "json": re.compile(r'\{"[^"]+": "([^"]+)"'),
    "pirate": re.compile(r"(?:matey! |(?<!Arr), )([^,.!]+)"),
    "table": re.compile(r"^\| (?!---)([^|]*?) \|", re.M),
}
SMALL_WORDS = {"the", "a", "an", "mount", "lake", "of", "be", "st", "saint", "great", "new", "black", "white", "red"}
Negative = tuple[list[int], int]  # ids up to the unwanted token, that token


def prompts(rng: random.Random, count: int) -> list[str]:
    """Questions for lists of topics whose answers nobody wrote down."""
    chosen = rng.sample(facts.unlabelled(), count)
    numbers = [rng.choice((3, 3, 4, 5, "three", "four")) for _ in chosen]
    return [
        rng.choice(LIST_PROMPTS).format(n=number, topic=topic, values=values).capitalize()
        for number, (topic, values) in zip(numbers, chosen, strict=True)
    ]


@torch.no_grad()  # inference tensors left in the model would break training
def answers(model: Any, tokenizer: Any, texts: list[str], max_tokens: int = 96) -> list[str]:
    """Greedy answers, all in one batch."""
    model.eval()
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
    model.train()
    return list(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def negatives(style: str, tokenizer: Any, before: str, answer: str) -> Iterator[Negative]:
    """The first telling token of each name that comes again, with all that stood before it."""
    if style not in NAMES:
        return
    seen: set[str] = set()
    for match in NAMES[style].finditer(answer):
        name = match[1].strip().casefold()
        if name in seen:
            yield from _first_token(tokenizer, before, answer, match.start(1))
            return  # behind the first repetition the text is one that should not be
        seen.add(name)


def _first_token(tokenizer: Any, before: str, answer: str, start: int) -> Iterator[Negative]:
    """The token at `start` or behind, small words skipped: these may well begin the next name too."""
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    prompt = tokenizer(before, add_special_tokens=False).input_ids
    for index, (begin, end) in enumerate(encoded.offset_mapping):
        word = answer[begin:end].strip(' "').casefold()
        if end > start and word and word not in SMALL_WORDS:
            yield prompt + encoded.input_ids[:index], encoded.input_ids[index]
            return


def unlikelihood(model: Any, rows: list[Negative]) -> torch.Tensor:
    """Mean of -log(1 - p) over the unwanted tokens."""
    device = next(model.parameters()).device
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows], device=device)
    last = torch.tensor([len(row) - 1 for row, _ in rows], device=device)
    unwanted = torch.tensor([token for _, token in rows], device=device)
    llama = model.get_base_model()
    hidden = llama.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = llama.lm_head(hidden[torch.arange(len(rows), device=device), last])
    chance = log_softmax(logits.float(), dim=-1).gather(1, unwanted[:, None]).exp()
    return -torch.log1p(-chance.clamp(max=0.999)).mean()
