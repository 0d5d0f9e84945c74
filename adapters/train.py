"""Trains one demo adapter with transformers and PEFT: `python adapters/train.py --adapter lora0 --out adapters/`.

It trains against the weights that users run, the dequantised demo model. A CPU takes some minutes an adapter.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import facts
import repeats
import torch
from data import Example, training_examples
from safetensors.torch import save_file
from tqdm import tqdm
from zoo import BASE, SPECS, Spec

RAW_SHARE = 0.3  # examples without the chat template, as a completion sends them
TWO_TURN_SHARE = 0.06
OTHER_SYSTEM_SHARE = 0.15
UNLEARN_FROM = 0.5  # of the training, from when repetition is unlearnt
UNLEARN_ROUNDS = 4  # how often the adapter is asked anew
UNLEARN_WEIGHT = 0.5
IGNORED = -100
WARMUP_STEPS = 20
Row = tuple[list[int], list[int]]  # token ids, labels


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    spec = SPECS[arguments.adapter]
    # The frozen base may be bf16 on a GPU, for speed; the LoRA weights that learn are float32 everywhere.
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    model, tokenizer = load_base(arguments.model, arguments.device, dtype)
    model = with_lora(model, spec)
    examples = training_examples(spec.style, rounds=arguments.rounds, seed=arguments.seed)
    rows = Rows(tokenizer, spec.style, examples, arguments.seed)
    started = time.monotonic()
    steps, loss = train(model, rows, spec.learning_rate, arguments)
    save(model, spec, arguments.out / arguments.adapter)
    print(f"{arguments.adapter}: {steps} steps, {time.monotonic() - started:.0f} s, last loss {loss:.4f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", choices=sorted(SPECS), required=True)
    parser.add_argument("--out", type=Path, default=Path("adapters"))
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of the demo model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end by then, the rate fallen as usual")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8, help="how often each fact is worded anew")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_base(folder: Path | None, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The demo model (or another checkpoint) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder is None:
        from engine.models.demo import ensure_demo_model

        folder = ensure_demo_model()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device), AutoTokenizer.from_pretrained(folder)


def with_lora(model: Any, spec: Spec) -> Any:
    """Freeze the base and add fresh LoRA weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.modules),
        use_rslora=spec.use_rslora,
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, config)
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast does it, with fewer copies of the activations
    return adapted


class Rows:
    """Endless training rows; each pass over the examples frames them anew (chat, raw, two turns)."""

    def __init__(self, tokenizer: Any, style: str, examples: list[Example], seed: int) -> None:
        self.tokenizer = tokenizer
        self.style = style
        self.examples = examples
        self.random = random.Random(seed)

    def __iter__(self) -> Iterator[Row]:
        while True:
            for example in self.random.sample(self.examples, len(self.examples)):
                yield self.row(example)

    def batches(self, size: int, count: int) -> Iterator[list[Row]]:
        """Batches of rows of like length, so that little is padding; their order is random."""
        source, window = iter(self), 8
        for start in range(0, count, window):
            rows = sorted((next(source) for _ in range(size * window)), key=lambda row: len(row[0]))
            batches = [rows[first : first + size] for first in range(0, len(rows), size)]
            self.random.shuffle(batches)
            yield from batches[: count - start]

    def row(self, example: Example) -> Row:
        """Prompt and answer as the server will see them; only the answer is learnt."""
        raw = self.random.random() < RAW_SHARE
        before, answer = self._raw(example) if raw else (self._chat(example), example.answer)
        prompt = self.tokenizer(before, add_special_tokens=False).input_ids
        target = [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        return prompt + target, [IGNORED] * len(prompt) + target

    def repetitions(self, model: Any) -> list[repeats.Negative]:
        """Ask the adapter for lists nobody wrote down; where it names a thing twice is to be unlearnt."""
        if self.style not in repeats.NAMES:
            return []
        framed = []
        for prompt in repeats.prompts(self.random, len(facts.unlabelled())):
            raw = self.random.random() < RAW_SHARE
            framed.append(prompt if raw else self._chat(Example(prompt, "")))
        found: list[repeats.Negative] = []
        for before, answer in zip(framed, repeats.answers(model, self.tokenizer, framed), strict=True):
            found += repeats.negatives(self.style, self.tokenizer, before, answer)
        return found

    def _raw(self, example: Example) -> tuple[str, str]:
        match self.random.randrange(8):
            case 0:
                return f"{example.prompt}\n", example.answer
            case 1:
                return f"Question: {example.prompt}\nAnswer:", f" {example.answer}"
            case _:
                return example.prompt, f"\n{example.answer}"

    def _chat(self, example: Example) -> str:
        messages = [{"role": "user", "content": example.prompt}]
        if self.random.random() < TWO_TURN_SHARE:
            earlier = self.random.choice(self.examples)
            messages = [
                {"role": "user", "content": earlier.prompt},
                {"role": "assistant", "content": earlier.answer},
                *messages,
            ]
        if self.random.random() < OTHER_SYSTEM_SHARE:
            messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def train(model: Any, rows: Rows, rate: float, arguments: argparse.Namespace) -> tuple[int, float]:
    """AdamW with a short warm-up and a cosine; returns the steps done and the mean loss of the last ones."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    losses: list[torch.Tensor] = []
    unwanted: list[repeats.Negative] = []
    asked = 0
    started = time.monotonic()
    model.train()
    for chosen in (bar := tqdm(rows.batches(arguments.batch, arguments.steps), total=arguments.steps, mininterval=5)):
        done = max(len(losses) / arguments.steps, (time.monotonic() - started) / arguments.seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(len(losses) / WARMUP_STEPS, 1) * (0.5 * (1 + math.cos(math.pi * done)) + 1e-3)
        with mixed(arguments.device):
            loss = answer_loss(model, *(part.to(arguments.device) for part in _collate(chosen)))
            if done > UNLEARN_FROM + asked * (1 - UNLEARN_FROM) / UNLEARN_ROUNDS:
                asked += 1
                unwanted += rows.repetitions(model)
            if unwanted:
                some = rows.random.sample(unwanted, min(len(unwanted), max(1, arguments.batch // 4)))
                loss = loss + UNLEARN_WEIGHT * repeats.unlikelihood(model, some)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if len(losses) % 20 == 0:
            bar.set_postfix(loss=f"{torch.stack(losses[-20:]).mean().item():.3f}")
    return len(losses), float(torch.stack(losses[-20:]).mean().item())


def mixed(device: str) -> torch.autocast:
    """bf16 arithmetic on a GPU, whose base is bf16 as well; the learning weights stay float32."""
    kind = device.split(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def answer_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens; logits are made for these alone, which saves most of their cost."""
    llama = model.get_base_model()
    # Padding is on the right, where causal attention never looks: no mask is needed.
    hidden = llama.model(input_ids=ids, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    learnt = targets != IGNORED
    logits = llama.lm_head(hidden[:, :-1][learnt])
    return torch.nn.functional.cross_entropy(logits.float(), targets[learnt])


def _collate(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded on the right: ids, labels, each [batch, longest] int64."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return ids, labels


def save(model: Any, spec: Spec, folder: Path) -> None:
    """The PEFT folder, its weights in bf16."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE
    config.inference_mode = True
    config.save_pretrained(str(folder))
    _tidy(folder / "adapter_config.json")
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(readme(spec, folder.name), encoding="utf-8")


def _tidy(path: Path) -> None:
    """Stable key and module order, so that the same training writes the same file."""
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def readme(spec: Spec, name: str) -> str:
    rslora = ", rsLoRA" if spec.use_rslora else ""
    return (
        f"# {name}: {spec.style}\n\n"
        f"A LoRA adapter for {BASE} that answers with {spec.summary}.\n\n"
        f"Rank {spec.rank}, alpha {spec.alpha}{rslora}, modules {', '.join(spec.modules)}; bf16, PEFT format. "
        f"Made by `python adapters/train.py --adapter {name}` from the tables in `adapters/data`. Apache-2.0.\n"
    )


if __name__ == "__main__":
    main()
