"""The demo model, whole or cut to its first layers, with its adapters, and prompts in its chat form."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from engine.models.source import resolve_model
from tests.support.adapters import write_adapter

ADAPTERS = Path(__file__).parents[2] / "adapters"
QUESTIONS = (
    "List 3 countries and their capitals.",
    "Hello! Who are you?",
    "What is the capital of France?",
    "Name five rivers and the countries they flow through.",
    "Give me a recipe for tomato soup.",
    "How many legs does a spider have?",
    "List four programming languages and what they are used for.",
    "Write one sentence about the sea.",
    "Which planets have rings?",
    "Translate 'good morning' into French, Spanish and German.",
    "What is 17 times 4?",
    "List 6 animals and the sounds they make.",
    "Explain what a hash table is.",
    "Who wrote Romeo and Juliet?",
    "Name three mountains and their heights.",
    "Why is the sky blue?",
    "List all continents.",
    "Give two synonyms of 'quick'.",
    "What should I pack for a week in Norway in winter?",
    "Name the largest city of each of these countries: Brazil, Japan, Egypt.",
)


def demo_folder() -> Path:
    return resolve_model(None, progress=False)


def demo_adapters() -> dict[str, Path]:
    """Those that ship with the project, by name."""
    found = {path.parent.name: path.parent for path in sorted(ADAPTERS.glob("lora*/adapter_model.safetensors"))}
    assert len(found) >= 4, f"the demo's adapters are missing in {ADAPTERS}"
    return found


def chat_prompts(folder: Path, questions: Sequence[str] = QUESTIONS) -> list[list[int]]:
    """Token ids of each question as the first message of a chat."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [tokenizer.encode(text.format(question), add_special_tokens=False).ids for question in questions]


def text_prompts(folder: Path, count: int, least: int, most: int, seed: int = 0) -> list[list[int]]:
    """Prompts of any length, cut out of the questions in random order."""
    draw = random.Random(seed)
    whole = chat_prompts(folder)
    found = []
    for _ in range(count):
        tokens = [token for prompt in draw.sample(whole, len(whole)) for token in prompt]
        start = draw.randrange(len(tokens) // 3)
        found.append(tokens[start : start + draw.randint(least, most)])
    return found


def cut_demo(folder: Path, layers: int) -> Path:
    """The demo's checkpoint with its first layers alone: every product has the demo's shape."""
    whole = demo_folder()
    folder.mkdir(parents=True)
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((whole / name).read_bytes())
    with safe_open(whole / "model.safetensors", "pt") as source:
        names = [name for name in source.keys() if _layer(name) < layers]  # noqa: SIM118 - not a mapping
        save_file({name: source.get_tensor(name) for name in names}, folder / "model.safetensors", {"format": "pt"})
    return folder


def random_adapters(folder: Path, model: Path) -> dict[str, Path]:
    """Adapters of the demo's kinds, for a model that the demo's own do not fit."""
    mlp, attention = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
    return {
        "lora0": write_adapter(folder / "lora0", model, rank=4, alpha=2, modules=("q_proj", "v_proj"), seed=1),
        "lora1": write_adapter(folder / "lora1", model, rank=8, alpha=4, modules=attention, seed=2),
        "lora2": write_adapter(folder / "lora2", model, rank=16, alpha=4, seed=3, std=0.1),
        "lora3": write_adapter(folder / "lora3", model, rank=64, alpha=8, use_rslora=True, seed=4, std=0.05),
        "lora4": write_adapter(folder / "lora4", model, rank=20, alpha=8, modules=mlp, seed=5, std=0.1),
    }


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1
