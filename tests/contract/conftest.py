"""Every YAML in conf/method, as a fixture."""

from pathlib import Path

import pytest
from contract_bench import YAMLS, Bench, method_in, small_bench

from opd_lab.methods.base import Method


@pytest.fixture(params=YAMLS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def method(path: Path) -> Method:
    return method_in(path)


@pytest.fixture
def bench(method: Method) -> Bench:
    return small_bench(method)
