"""One zoo for all tests over tiny models: making it and asking the reference are the larger part of their time."""

import pytest

from tests.parity.zoo import Zoo, make_zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))
