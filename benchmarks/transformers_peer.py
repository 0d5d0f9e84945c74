"""The peer of the CPU benchmark: transformers' static-batch generate, with PEFT's mixed batches for adapters.

Runs as a process of its own, so that it may stay loaded beside the server: reads one JSON workload a line from
standard input (a list of [adapter or null, prompt ids, output length], and a batch size), answers one JSON line with
its seconds.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Item = tuple[str | None, list[int], int]


@dataclass(frozen=True, slots=True)
class Peer:
    model: Any
    mixed: bool

    @classmethod
    def load(cls, folder: str, adapters: dict[str, str], dtype: torch.dtype) -> "Peer":
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if adapters:
            from peft import PeftModel

            first, *rest = adapters.items()
            model = PeftModel.from_pretrained(model, first[1], adapter_name=first[0])
            for name, path in rest:
                model.load_adapter(path, adapter_name=name)
        return cls(model.eval().to(dtype), bool(adapters))

    def run(self, items: list[Item], batch_size: int) -> float:
        """Seconds for all items, in batches; longest outputs first, so that a batch wastes little."""
        order = sorted(items, key=lambda item: item[2], reverse=True)
        start = time.perf_counter()
        for i in range(0, len(order), batch_size):
            self._generate(order[i : i + batch_size])
        return time.perf_counter() - start

    def _generate(self, items: list[Item]) -> None:
        width = max(len(prompt) for _, prompt, _ in items)
        ids = torch.zeros(len(items), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (_, prompt, _) in enumerate(items):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        length = max(output for _, _, output in items)
        names = {"adapter_names": [name or "__base__" for name, _, _ in items]} if self.mixed else {}
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=length, max_new_tokens=length,
                pad_token_id=0, **names,
            )  # fmt: skip
        assert out.shape[1] == width + length


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True, choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    adapters = {name: str(Path(path)) for name, path in (item.split("=", 1) for item in args.adapter)}
    peer = Peer.load(args.model, adapters, getattr(torch, args.dtype))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        print(json.dumps({"seconds": peer.run(work["items"], work["batch_size"])}), flush=True)


if __name__ == "__main__":
    main()
