"""What a server's start compiles ahead is all that its steps launch."""

from pathlib import Path
from typing import Any

import pytest
from triton import knobs

from engine.types import SamplingParams
from tests.engine.worker.harness import Driver, Request
from tests.gpu.conftest import Figures
from tests.gpu.test_parity import load, start, weights_of
from tests.support.models import write_model

RANKS = ({0: 16, 3: 8, 4: 16, 5: 16, 6: 16},)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_no_step_waits_for_a_kernel(
    tmp_path: Path, graphs: bool, figures: Figures, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_threads, by_launches = set[str](), set[str]()

    def compiled(*, key: str, fn: Any, is_manual_warmup: bool, **_: object) -> None:
        (by_threads if is_manual_warmup else by_launches).add(f"{fn.name} {key}")

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", compiled)
    head = 32 if graphs else 96  # of its own, so that no test before has compiled its kernels
    model = write_model(
        tmp_path, layers=3, hidden=160, heads=5, kv_heads=1, head_dim=head, intermediate=344, vocab=500,
        model_type="mistral", sliding_window=40,
    )  # fmt: skip
    driver = Driver(
        start(model, disable_cuda_graph=not graphs, chunked_prefill_size=2048, context_length=2048), slots=8
    )
    at_start = len(by_threads)
    load(driver, weights_of(model, RANKS))
    params = SamplingParams(max_tokens=6, seed=1, temperature=0.8)
    prompts = [[5 + i % 300 for i in range(length)] for length in (700, 30, 7, 200)]
    driver.run([Request(prompt, owner, params) for prompt in prompts for owner in (None, 1)])
    driver.run([Request(prompts[0][i : i + 20], (None, 1)[i % 2], params) for i in range(70)])  # many samples of a step
    driver.worker.close()
    figures(request.node.name, {"ahead": at_start, "later": sorted(by_launches)})
    assert at_start > 10
    assert not by_launches
