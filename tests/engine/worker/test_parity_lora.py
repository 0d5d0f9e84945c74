"""The worker against transformers + PEFT in float32: mixed ranks, rsLoRA, subsets of modules, base beside them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from engine.models.dims import LORA_MODULES
from tests.engine.worker.harness import Driver, Pages, Request, make_pages, start, tiny_llama
from tests.engine.worker.test_parity_base import assert_matches, prompts

ADAPTERS: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 16, "lora_alpha": 16, "target_modules": list(LORA_MODULES)},
    {"r": 40, "lora_alpha": 20, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "down_proj", "up_proj"]},
    {"r": 8, "lora_alpha": 8, "target_modules": list(LORA_MODULES), "rank_pattern": {"layers.1.self_attn.q_proj": 21}},
    {"r": 1, "lora_alpha": 4, "target_modules": ["gate_proj"], "layers_to_transform": [1]},
)


class Zoo:
    """The tiny model with adapters, as PEFT models and as pages."""

    def __init__(self, folder: Path) -> None:
        base = tiny_llama(folder)
        self.folder = folder
        self.models: list[Any] = [_peft(base, settings, seed) for seed, settings in enumerate(ADAPTERS)]
        self.base = base

    def pages(self, index: int, driver: Driver) -> Pages:
        info = driver.worker.info
        return make_pages(_weights(self.models[index]), info.geometry, getattr(torch, info.dtype))

    def model(self, adapter_id: int | None) -> Any:
        return self.base if adapter_id is None else self.models[adapter_id - 1]

    def driver(self, **settings: Any) -> Driver:
        driver = Driver(start(self.folder, **settings), slots=len(ADAPTERS))
        for index in range(len(ADAPTERS)):
            driver.load(index + 1, self.pages(index, driver))
        return driver


def _peft(base: Any, settings: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _weights(model: Any) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            layer = int(name.split("layers.")[1].split(".")[0])
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            place = LORA_MODULES.index(name.rsplit(".", 1)[1])
            found[layer, place] = (a.detach(), b.detach() * module.scaling["default"])
    return found


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


def requests(owners: Sequence[int | None], longest: int = 40) -> list[Request]:
    return [Request(p, o) for p, o in zip(prompts(len(owners), longest, seed=4), owners, strict=True)]


EVERYONE = (None, 1, 2, 3, 4, 5, 3, None, 2)


@pytest.mark.parametrize("lora_stack", [True, False])
@pytest.mark.parametrize("chunk", [(1000, 1000), (2, 9)])
def test_mixed_batch_matches_peft(zoo: Zoo, lora_stack: bool, chunk: tuple[int, int]) -> None:
    driver = zoo.driver(lora_stack=lora_stack)
    for _ in range(2):  # by the second time the stack has been built
        for request in driver.run(requests(EVERYONE), chunk):
            assert_matches(zoo.model(request.adapter_id), request)
        driver.settle()
    counts = driver.worker.lora_steps
    assert counts["segmented"] > 0
    assert (counts["stacked"] > 0) == lora_stack


@pytest.mark.parametrize("adapter_id", range(1, len(ADAPTERS) + 1))
def test_alone_matches_peft(zoo: Zoo, adapter_id: int) -> None:
    for request in zoo.driver().run(requests([adapter_id])):
        assert_matches(zoo.model(adapter_id), request)


def test_base_alone_does_no_lora_work(zoo: Zoo) -> None:
    driver = zoo.driver()
    driver.run(requests([None, None]))
    assert driver.worker.lora_steps["segmented"] == driver.worker.lora_steps["stacked"] == 0


def test_swapped_adapters_are_seen(zoo: Zoo) -> None:
    """The parity test can fail: with two adapters' pages exchanged it does."""
    driver = Driver(start(zoo.folder), slots=2)
    driver.load(1, zoo.pages(1, driver))
    driver.load(2, zoo.pages(0, driver))
    (request,) = driver.run(requests([1]))
    with pytest.raises(AssertionError):
        assert_matches(zoo.model(1), request)


def test_reused_chunks(zoo: Zoo) -> None:
    """An adapter that leaves and comes back to other chunks is itself again; its old chunks are full of NaN."""
    driver = Driver(start(zoo.folder), slots=2)
    for index in (1, 2):
        chunks = driver.load(index + 1, zoo.pages(index, driver))
        driver.worker.drop(index + 1)
        driver.worker.poison(chunks)
        driver.free[:0] = chunks
    for index in (1, 2):
        driver.load(index + 1, zoo.pages(index, driver))
    for request in driver.run(requests([2, 3, 2, None])):
        assert_matches(zoo.model(request.adapter_id), request)
