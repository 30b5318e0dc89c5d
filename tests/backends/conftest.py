"""The ``backend`` fixture: every adapter over tiny models of several architectures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jaxtyping
import pytest
import torch

from persona_lens.backend import Backend
from tests.backends.fixtures import ADAPTERS, ARCHITECTURES, FEW_ARCHITECTURES, matrix, tiny_backend


def _pairs(architectures: Sequence[str]) -> list[object]:
    """The matrix for a fixture, which takes one parameter."""
    return [pytest.param(each.values, id=each.id, marks=each.marks) for each in matrix(architectures)]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models lose more to handing work between threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=_pairs(ARCHITECTURES))
def every_backend(request: pytest.FixtureRequest) -> Backend:
    """Every adapter over every architecture."""
    return tiny_backend(*request.param)


@pytest.fixture(params=_pairs(FEW_ARCHITECTURES))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every adapter over a few architectures that differ."""
    return tiny_backend(*request.param)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the shape checks that tests run under, as users run: the package's own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> str:
    """Every adapter's name, for tests that make a model of their own."""
    return str(request.param)
