"""A small case for compute-sanitizer: one layer, every kernel, steps launched eagerly or replayed as graphs.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 python -m tests.gpu.memcheck eager
    compute-sanitizer --error-exitcode 1 python -m tests.gpu.memcheck graphs

Without torch's cache each tensor is an allocation of its own, so that the checker sees what lies beyond it; graphs need
the cache. Prints the answers; both ways must give the same.
"""

import random
import sys
import tempfile
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.types import SamplingParams
from engine.worker.worker import Worker
from tests.engine.worker.harness import Driver, Request, make_pages, random_weights
from tests.support.models import read_dims, write_model

RANKS = ({0: 16, 2: 16}, dict.fromkeys(range(7), 5), {6: 40})  # q and v; all seven; down
SETTINGS = {
    "max_total_tokens": 2048, "max_running_requests": 4, "context_length": 128, "enable_lora": True,
    "max_loras_per_batch": 3, "max_lora_rank": 40, "chunked_prefill_size": 32,
}  # fmt: skip


def requests() -> list[Request]:
    """Base and each adapter: greedy and drawn, with penalties, bias and log-probabilities."""
    draw = random.Random(0)
    greedy = SamplingParams(max_tokens=6, seed=0, temperature=0.0, logprobs=2, prompt_logprobs=0)
    drawn = SamplingParams(
        max_tokens=6, seed=7, temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, logprobs=0,
        repetition_penalty=1.1, frequency_penalty=0.3, presence_penalty=0.2, logit_bias={5: 2.0},
    )  # fmt: skip
    owners = ((None, drawn), (1, greedy), (2, drawn), (3, greedy))
    return [Request([draw.randrange(3, 240) for _ in range(9)], owner, params) for owner, params in owners]


def run(folder: Path, graphs: bool) -> None:
    """Raises SystemExit where graphs were wanted and none ran, or the other way round."""
    write_model(folder, layers=1, hidden=72, heads=3, kv_heads=1, head_dim=64, intermediate=104, dtype=torch.bfloat16)
    config = EngineConfig(**SETTINGS, disable_cuda_graph=not graphs)  # type: ignore[arg-type]
    worker = Worker.start(config, folder, progress=lambda *_: None)
    print(f"started, {worker.info.num_chunks} chunks", flush=True)
    driver = Driver(worker, slots=3)
    dims = read_dims(folder)
    for adapter, ranks in enumerate(RANKS, 1):
        weights = random_weights(dims, ranks, seed=adapter)
        driver.load(adapter, make_pages(weights, worker.info.geometry, torch.bfloat16))
    for request in driver.run(requests(), chunk=(2, 7)):
        print(request.adapter_id, request.tokens, flush=True)
    torch.cuda.synchronize()
    print(f"graph replays {worker.graph_replays}", flush=True)
    worker.close()
    if (worker.graph_replays > 0) != graphs:
        sys.exit("the steps did not run as asked")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        run(Path(made), graphs=sys.argv[1:] == ["graphs"])
