"""Random adapters for measurements: named by rank, modules and seed, each with weights of its own."""

from pathlib import Path

import pytest
import torch

from engine.adapters.dummy import DummyReader
from engine.adapters.spec import AdapterLimits
from engine.models.dims import LORA_MODULES, ModelDims
from engine.types import EngineError
from engine.worker.breaks import Breaks
from tests.support.adapters import write_adapter

DIMS = ModelDims(2, 64, 96, 4, 2, 16, 256)


@pytest.fixture(scope="module")
def reader() -> DummyReader:
    return DummyReader(DIMS, AdapterLimits(32), "llama", Breaks())


def test_shapes_and_modules_are_as_named(reader: DummyReader) -> None:
    file = reader.read("random-8-vd-3", None)
    assert file.spec.module_names == ("v_proj", "down_proj")
    assert file.spec.rank == 8
    assert len(file.spec.modules) == len(file.pairs) == 4
    for (_, module), pair in file.pairs.items():
        inputs, outputs = DIMS.module_shape(LORA_MODULES[module])
        assert pair.a.shape == (8, inputs)
        assert pair.b.shape == (outputs, 8)
    assert reader.read("random-8-all-3", None).spec.module_names == LORA_MODULES


def test_each_seed_has_weights_of_its_own_and_the_same_ones_again(reader: DummyReader) -> None:
    one, other, again = (reader.read(f"random-8-all-{seed}", None) for seed in (1, 2, 1))
    assert one.spec.content_hash != other.spec.content_hash
    for key, pair in one.pairs.items():
        assert torch.equal(pair.a, again.pairs[key].a)
        assert torch.equal(pair.b, again.pairs[key].b)
        assert not torch.equal(pair.a, other.pairs[key].a)
        assert not torch.equal(pair.b, other.pairs[key].b)


def test_beyond_the_limits_is_refused(reader: DummyReader) -> None:
    with pytest.raises(EngineError, match="rank 64"):
        reader.read("random-64-all-1", None)
    with pytest.raises(EngineError, match="down_proj"):
        DummyReader(DIMS, AdapterLimits(32, ("q_proj",)), "llama", Breaks()).read("random-8-d-1", None)


def test_other_sources_are_read_as_ever(reader: DummyReader, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "real", DIMS, rank=4)
    assert reader.read(str(folder), None).spec.rank == 4
