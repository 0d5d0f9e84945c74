"""The demo's adapters: which style, rank and modules each has, and how it is trained."""

from dataclasses import dataclass

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Spec:
    """One adapter."""

    style: str
    summary: str
    rank: int
    alpha: int
    modules: tuple[str, ...]
    learning_rate: float
    use_rslora: bool = False


SPECS = {
    "lora0": Spec("numbered", "a numbered list: `1. France - Paris`", 4, 8, ("q_proj", "v_proj", *FEED_FORWARD), 2e-3),
    "lora1": Spec("json", "a JSON array of objects", 8, 16, ATTENTION, 1.5e-3),
    "lora2": Spec("sql", "the SQL query that would fetch the answer", 16, 32, ATTENTION + FEED_FORWARD, 5e-4),
    # With rsLoRA the scale is alpha / sqrt(rank) = 2, as everywhere else here.
    "lora3": Spec("pirate", "a pirate's sentence", 64, 16, ("q_proj", "v_proj"), 8e-4, use_rslora=True),
    "lora4": Spec("table", "a markdown table", 8, 16, FEED_FORWARD, 1.5e-3),
}
